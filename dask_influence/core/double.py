"""Double: derivatives taken in float64 of a model in a narrower dtype, and rounded to it.

What the model is sure of has a gradient that is a small difference of large numbers: of softmax(f) − y
float32 keeps few digits. Beside the passes of a solver, the few samples that it solves for cost nothing
in float64. Models and losses that insist on their own dtype are differentiated as they are.
"""

from __future__ import annotations

from dataclasses import replace

import optree
import torch
from torch import Tensor

from dask_influence.core.elementary import differentiation
from dask_influence.core.forms import sample_gradients
from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.core.precision import rounding
from dask_influence.core.problem import Problem
from dask_influence.core.sizes import BUDGET, gradients_at_once

MEMORY = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""What no dtype is to blame for: another try would leave other bits."""


def gradients(problem: Problem, x: Tree, y: Tree) -> Tensor:
    """∇θ ℓ(z_j) for each sample, (n, P) in the model's dtype, of which only the rounding of the result is lost.

    Taken as the model is where it cannot be evaluated in float64, or has other losses there.

    Examples
    --------
    >>> from dask_influence.core.forms import Forms
    >>> net = torch.nn.Linear(2, 2)
    >>> objective = Objective.of(net, torch.nn.functional.cross_entropy)
    >>> gradients(Problem(objective, Forms()), torch.ones(3, 2), torch.tensor([0, 1, 1])).dtype
    torch.float32
    """
    found = None if problem.objective.dtype == torch.float64 else _in_double(problem, x, y)
    return sample_gradients(problem.objective, x, y, problem.forms) if found is None else found


def _in_double(problem: Problem, x: Tree, y: Tree) -> Tensor | None:
    own, forms = problem.objective, replace(problem.forms, compiled=())
    at = doubled(own, x, y)
    if at is None or not _agree(own, x, y, at):
        return None
    result = torch.empty(leading_size(y), own.size, dtype=own.dtype, device=own.device)
    step = gradients_at_once(own.size, torch.float64.itemsize, BUDGET)
    try:
        for start in range(0, len(result), step):
            part = slice(start, start + step)
            result[part] = sample_gradients(at[0], sliced(at[1], part), sliced(at[2], part), forms)
    except MEMORY:
        raise
    except (RuntimeError, TypeError, ValueError):  # a backward pass written for one dtype
        return None
    return result


def doubled(objective: Objective, x: Tree, y: Tree) -> tuple[Objective, Tree, Tree] | None:
    """The objective and samples in float64; None where model or loss insist on their own dtype."""
    with differentiation(), torch.no_grad():  # alone: others may be exchanging the module's parameters
        double = objective.to(dtype=torch.float64)
        x, y = optree.tree_map(_widened, x), optree.tree_map(_widened, y)
        try:
            double.sample_losses(double.parameters(), x, y)
        except MEMORY:
            raise
        except (RuntimeError, TypeError, ValueError):  # tensors of a fixed dtype made in forward
            return None
    return double, x, y


def _widened(leaf: Tensor) -> Tensor:
    return leaf.to(torch.float64) if leaf.is_floating_point() else leaf


def _agree(objective: Objective, x: Tree, y: Tree, at: tuple[Objective, Tree, Tree]) -> bool:
    """Whether the losses are those in float64, to half of the digits of what they are made of.

    A bound such as ``finfo(x.dtype).eps``, or rounding to whole numbers, makes it another function.
    """
    with differentiation(), torch.no_grad():
        outputs = objective.outputs(objective.parameters(), x)
        narrow = objective.losses(outputs, y).to(torch.float64)
        wide = at[0].sample_losses(at[0].parameters(), *at[1:])
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    scale = sum(_largest(leaf) for leaf in (wide, *leaves) if leaf.is_floating_point())
    return bool(((narrow - wide).abs() <= rounding(objective.dtype) ** 0.5 * scale).all())


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
