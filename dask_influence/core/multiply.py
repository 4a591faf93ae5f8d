"""Products of a chain's curvature with many vectors: a handful of large matrix products each.

The way of :mod:`~dask_influence.core.chain`, whose notation and values are used here, and to its end: what
is left in each linear layer is h̄̇ aᵀ + h̄ ȧᵀ, added up over samples, for the rows of all directions at once.

Notation: n samples, D directions, S positions of a sample (1 but for sequences), p entries of what
enters a linear layer at a position and q of what leaves it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dask_influence.core.chain import Along, Chain, Linear, Moved, matrix
from dask_influence.core.gemm import product
from dask_influence.core.objective import Objective


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
            moved.append(step.push(along, moved[-1]))
        output = moved.pop()
        adjoint = None if output is None else chain.loss.pull(output)
        if gauss_newton:
            along, moved = {}, [None] * len(steps)
        for step in reversed(steps):
            tangent = moved.pop()
            if isinstance(step, Linear):
                _gather(step, tangent, adjoint, len(vectors), sums)
            if moved:
                adjoint = step.pull(along, tangent, adjoint)
        parts = into.split(chain.objective.sizes, dim=1)
        for name, part in zip(chain.objective.names, parts, strict=True):
            if name in sums:
                part.copy_(sums[name].flatten(1))
            else:  # not every parameter has a product
                part.zero_()
    return into


def _directions(objective: Objective, vectors: Tensor) -> Along:
    """θ's parts of the ``vectors`` (D, P), each in torch's own memory and in order, which products need.

    It is the same wherever the vectors came from, hence the same bits.
    """
    return {
        name: part.to(objective.device, objective.dtype, copy=True, memory_format=torch.contiguous_format)
        for name, part in objective.unflatten(vectors).items()
    }


def _gather(step: Linear, tangent: Moved, adjoint: Moved, count: int, into: dict[str, Tensor]) -> None:
    """Σ_j h̄̇ aᵀ + h̄ ȧᵀ of the weights, Σ_j h̄̇ of the bias, for ``count`` directions, by their names."""
    weight, bias = step.names.get("weight"), step.names.get("bias")
    if adjoint is not None:
        rows = _gathered(adjoint)  # (n S, D q)
        if weight is not None:
            _add(into, weight, product(rows.mT, matrix(step.input)).unflatten(0, (count, -1)))
        if bias is not None:
            _add(into, bias, rows.sum(0).unflatten(0, (count, -1)))
    if tangent is not None and weight is not None:
        bent = product(matrix(step.adjoint).mT, _gathered(tangent))  # (q, D p)
        _add(into, weight, bent.unflatten(1, (count, -1)).transpose(0, 1))


def _add(into: dict[str, Tensor], name: str, part: Tensor) -> None:
    into[name] = into[name].add_(part) if name in into else part


def _gathered(moved: Tensor) -> Tensor:
    """Rows (n S, D p) of (n, D, ..., p)."""
    if moved.dim() > 3:
        moved = moved.flatten(2, -2).transpose(1, 2).flatten(0, 1)
    return moved.flatten(1)
