"""Double: gradients of narrower models, of which the loss's derivative is taken in float64.

∇θ ℓ = Jᵀ δ with δ = ∂ℓ/∂f, f the model's outputs and J their derivative. Of a sample that the model is sure of,
δ = softmax(f) − y is a small difference of large numbers, of which float32 keeps few digits. It costs nothing
beside J to take δ in float64 and round it then; the model itself computes as it always does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # knows containers such as ModelOutput, which optree does not

from dask_influence.core.elementary import differentiation
from dask_influence.core.forms import sample_gradients
from dask_influence.core.objective import Objective, Tree
from dask_influence.core.precision import rounding
from dask_influence.core.problem import OUT_OF_MEMORY, Problem


def gradients(problem: Problem, x: Tree, y: Tree) -> Tensor:
    """∇θ ℓ(z_j) for each sample, (n, P) in the model's dtype, with δ_j taken in float64.

    Of samples whose loss is another one in float64, and where the loss cannot be evaluated in it, δ is
    taken in the model's dtype.

    Examples
    --------
    >>> from dask_influence.core.forms import Forms
    >>> net = torch.nn.Linear(2, 2)
    >>> objective = Objective.of(net, torch.nn.functional.cross_entropy)
    >>> gradients(Problem(objective, Forms()), torch.ones(3, 2), torch.tensor([0, 1, 1])).dtype
    torch.float32
    """
    own = problem.objective
    seeds = None if own.dtype == torch.float64 else _seeds(own, x, y)
    if seeds is None:
        return sample_gradients(own, x, y, problem.forms)
    along = Objective(own.module, _along, own.names)
    return sample_gradients(along, x, seeds, replace(problem.forms, compiled=()))


def _along(outputs: Any, seeds: tuple[Tensor, ...]) -> Tensor:
    """The mean of ⟨δ_j, f_j⟩, whose gradient is that of the loss."""
    pairs = zip(_numbers(outputs), seeds, strict=True)
    return torch.stack([_rows(value * seed).sum(1) for value, seed in pairs]).sum(0).mean()


def slopes(objective: Objective, x: Tree, y: Tree) -> Tensor:
    """Σ |δ_j| of each sample, (n,): 0 where its gradient is zero whatever the model is."""
    with differentiation(), torch.no_grad():
        outputs = objective.outputs(objective.parameters(), x)
        _, found = _differentiated(objective, outputs, y, objective.dtype)
    return torch.stack([_rows(one).abs().sum(1) for one in found]).sum(0)


def _seeds(objective: Objective, x: Tree, y: Tree) -> tuple[Tensor, ...] | None:
    """δ by each tensor of the outputs; None where the loss cannot be evaluated in float64."""
    with differentiation(), torch.no_grad():
        outputs = objective.outputs(objective.parameters(), x)
        try:
            losses, wide = _differentiated(objective, outputs, y, torch.float64)
        except OUT_OF_MEMORY:
            raise
        except (RuntimeError, TypeError, ValueError) as error:  # tensors of a fixed dtype in the loss
            if "allocate memory" in str(error):  # as torch says it on a CPU; float32 would be other bits
                raise
            return None
        narrow_losses, narrow = _differentiated(objective, outputs, y, objective.dtype)
    same = _same(narrow_losses, losses, _numbers(outputs), rounding(objective.dtype) ** 0.5)
    narrow = [b.masked_fill(_beside(~narrow_losses.isfinite(), b), torch.nan) for b in narrow]
    pairs = zip(wide, narrow, strict=True)
    return tuple(torch.where(_beside(same, a), a.to(b.dtype), b) for a, b in pairs)


def _differentiated(
    objective: Objective, outputs: Any, y: Tree, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Losses of all samples in this dtype, and their derivatives by the outputs."""
    leaves, structure = pytree.tree_flatten(outputs)
    held = [leaf.detach().to(dtype).requires_grad_() if _is_number(leaf) else leaf for leaf in leaves]
    moving = [leaf for leaf in held if _is_number(leaf)]
    y = optree.tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, y)
    with torch.enable_grad():
        losses = objective.losses(pytree.tree_unflatten(held, structure), y)
        found = torch.autograd.grad(losses.sum(), moving, allow_unused=True)
    pairs = zip(found, moving, strict=True)
    return losses.detach(), [torch.zeros_like(leaf) if one is None else one for one, leaf in pairs]


def _same(narrow: Tensor, wide: Tensor, outputs: list[Tensor], digits: float) -> Tensor:
    """Of which samples the losses are the same to ``digits`` of what they are made of, (n,).

    A bound such as ``finfo(f.dtype).eps``, or rounding to whole numbers, makes the loss another function.
    """
    sizes = [_rows(value.detach().to(torch.float64)).abs().amax(1) for value in outputs]
    scale = torch.stack([wide.abs(), *sizes]).amax(0)
    return (narrow.to(torch.float64) - wide).abs() <= digits * scale


def _rows(values: Tensor) -> Tensor:
    """One for each sample, which may have a single number and no axis for it."""
    return values.reshape(len(values), -1)


def _beside(flags: Tensor, values: Tensor) -> Tensor:
    return flags.reshape(-1, *(1,) * (values.dim() - 1))


def _numbers(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if _is_number(leaf)]


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
