"""Products of a chain's curvature with many vectors: a handful of large matrix products each.

The way of :mod:`~dask_influence.core.chain`, whose notation and values are used here. Directions stand
next to the samples, ȧ (n, D, S, p), so that what they have in common is one matrix product for all of
them: V a for the rows of all V, W ȧ for all samples and directions, h̄̇ᵀ a for the rows of all products.

Notation: n samples, D directions, S positions of a sample (1 but for sequences), p entries of what
enters a linear layer at a position and q of what leaves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dask_influence.core.chain import Along, Chain, Elementwise, Linear, Reshaped, Step
from dask_influence.core.objective import Objective

Moved = Tensor | None
"""A derivative along D directions, (n, D, ...); None stands for zero."""


def products(chain: Chain, vectors: Tensor, into: Tensor, *, gauss_newton: bool = False) -> Tensor:
    """Σ_j ∇²θ ℓ(z_j) v_d for ``vectors`` (D, P), all at once, written to ``into`` (D, P) and returned.

    With ``gauss_newton`` Σ_j J_jᵀ A_j J_j v_d, J the derivative of the chain's output: the way back
    leaves out what bends. Both arrays may be of another dtype and on another device than the chain.

    Raises
    ------
    ConfigurationError
        Where parameters in θ belong to another module than a linear layer.

    Examples
    --------
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> objective = Objective.of(net, torch.nn.functional.mse_loss)
    >>> chain = Chain(objective, objective.parameters(), torch.ones(5, 3), torch.zeros(5, 2))
    >>> vectors = torch.ones(7, objective.size)
    >>> products(chain, vectors, torch.empty(7, objective.size, dtype=torch.float64)).shape
    torch.Size([7, 26])
    """
    steps, sums = chain.moving, dict[str, Tensor]()
    with torch.no_grad():
        along = _directions(chain.objective, vectors)
        moved: list[Moved] = [None]
        for step in steps:
            moved.append(_pushed(step, along, moved[-1]))
        output = moved.pop()
        adjoint = None if output is None else chain.loss.pull_rows(output)
        if gauss_newton:
            along, moved = {}, [None] * len(steps)
        for step in reversed(steps):
            tangent = moved.pop()
            if isinstance(step, Linear):
                _gather(step, tangent, adjoint, len(vectors), sums)
            if moved:
                adjoint = _pulled(step, along, tangent, adjoint)
        parts = into.split(chain.objective.sizes, dim=1)
        for name, part in zip(chain.objective.names, parts, strict=True):
            if name in sums:
                part.copy_(sums[name].flatten(1))
            else:  # not every parameter has a product
                part.zero_()
    return into


def _directions(objective: Objective, vectors: Tensor) -> Along:
    """θ's parts of the vectors, each in torch's own memory and in order, which products need.

    It is the same wherever the vectors came from, hence the same bits.
    """
    return {
        name: part.to(objective.device, objective.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, part in objective.unflatten(vectors).items()
    }


# -- forward and back ------------------------------------------------------------------
def _pushed(step: Step, along: Along, tangent: Moved) -> Moved:
    """ḣ of ȧ, whose memory it may take where the way back does without it."""
    if isinstance(step, Linear):
        return _pushed_linear(step, along, tangent)
    if tangent is None:
        return None
    if isinstance(step, Elementwise):
        slope = step.slope[:, None]
        return tangent.mul_(slope) if step.bend is None else slope * tangent
    if isinstance(step, Reshaped):
        return tangent.reshape(*tangent.shape[:2], *step.output.shape[1:])
    return _turned(step.push(along, _turned(tangent)))


def _pulled(step: Step, along: Along, tangent: Moved, adjoint: Moved) -> Moved:
    """ā̇ of ȧ and h̄̇, whose memory it may take."""
    if isinstance(step, Linear):
        return _pulled_linear(step, along, adjoint)
    if isinstance(step, Elementwise):
        moved = None if adjoint is None else adjoint.mul_(step.slope[:, None])
        if tangent is None or step.bend is None:
            return moved
        bend = step.bend[:, None]
        return bend * tangent if moved is None else moved.addcmul_(bend, tangent)
    if isinstance(step, Reshaped):
        return None if adjoint is None else adjoint.reshape(*adjoint.shape[:2], *step.input.shape[1:])
    return _turned(step.pull(along, _turned(tangent), _turned(adjoint)))


def _turned(moved: Moved) -> Moved:
    """Directions first for samples first, and the other way round."""
    return None if moved is None else moved.transpose(0, 1)


# -- linear layers ---------------------------------------------------------------------
def _pushed_linear(step: Linear, along: Along, tangent: Moved) -> Moved:
    """ḣ = W ȧ + V a, and the direction of the bias."""
    weights, biases = step.of(along, "weight"), step.of(along, "bias")
    moved = None
    if weights is not None:
        moved = _spread(step, _matrix(step.input) @ weights.flatten(0, 1).mT, len(weights))
    if tangent is not None:
        rows = tangent.reshape(-1, tangent.shape[-1])
        if moved is None:
            moved = (rows @ step.weight.mT).reshape(*tangent.shape[:-1], -1)
        else:
            moved.view(-1, moved.shape[-1]).addmm_(rows, step.weight.mT)
    if biases is not None:
        if moved is None:
            moved = biases.new_zeros(len(step.output), len(biases), *step.output.shape[1:])
        moved += biases.reshape(len(biases), *(1,) * (step.output.dim() - 2), -1)
    return moved


def _pulled_linear(step: Linear, along: Along, adjoint: Moved) -> Moved:
    """ā̇ = Wᵀ h̄̇ + Vᵀ h̄."""
    weights = step.of(along, "weight")
    moved = None
    if weights is not None:
        side_by_side = weights.transpose(0, 1).flatten(1)  # (q, D p)
        moved = _spread(step, _matrix(step.adjoint) @ side_by_side, len(weights))
    if adjoint is not None:
        rows = adjoint.reshape(-1, adjoint.shape[-1])
        if moved is None:
            moved = (rows @ step.weight).reshape(*adjoint.shape[:-1], -1)
        else:
            moved.view(-1, moved.shape[-1]).addmm_(rows, step.weight)
    return moved


def _gather(step: Linear, tangent: Moved, adjoint: Moved, count: int, into: dict[str, Tensor]) -> None:
    """Σ_j h̄̇ aᵀ + h̄ ȧᵀ of the weights, Σ_j h̄̇ of the bias, for ``count`` directions, by their names."""
    weight, bias = step.names.get("weight"), step.names.get("bias")
    if adjoint is not None:
        rows = _gathered(adjoint)  # (n S, D q)
        if weight is not None:
            _add(into, weight, (rows.mT @ _matrix(step.input)).unflatten(0, (count, -1)))
        if bias is not None:
            _add(into, bias, rows.sum(0).unflatten(0, (count, -1)))
    if tangent is not None and weight is not None:
        bent = _matrix(step.adjoint).mT @ _gathered(tangent)  # (q, D p)
        _add(into, weight, bent.unflatten(1, (count, -1)).transpose(0, 1))


def _add(into: dict[str, Tensor], name: str, part: Tensor) -> None:
    into[name] = into[name].add_(part) if name in into else part


def _matrix(values: Tensor) -> Tensor:
    """Samples and their positions as rows, (n S, p)."""
    return values.reshape(-1, values.shape[-1])


def _spread(step: Linear, rows: Tensor, count: int) -> Tensor:
    """(n, D, ..., p), in order, of rows (n S, D p) for the positions of ``step``."""
    leading = step.input.shape[:-1]
    if len(leading) == 1:
        return rows.unflatten(1, (count, -1))
    apart = rows.reshape(len(step.input), -1, count, rows.shape[1] // count).transpose(1, 2)  # (n, D, S, p)
    return apart.contiguous().view(leading[0], count, *leading[1:], -1)


def _gathered(moved: Tensor) -> Tensor:
    """Rows (n S, D p) of (n, D, ..., p)."""
    if moved.dim() > 3:
        moved = moved.flatten(2, -2).transpose(1, 2).flatten(0, 1)
    return moved.flatten(1)
