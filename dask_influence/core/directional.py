"""The hot primitive: directional derivatives of the per-sample loss along D directions.

E[j, d] = ⟨v_d, ∇θ ℓ(z_j)⟩ for ``Up``, and its gradient in the input,
E[j, d, :] = ∇x ⟨v_d, ∇θ ℓ(z_j)⟩, for ``Perturbation``. A tile of scores is then C Eᵀ with
a small coefficient matrix C (N, D). Everything the training side of a run needs is here;
an n × P gradient matrix is formed only where that is cheaper and fits, an n × F × P
tensor never.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dask_influence.core import forms
from dask_influence.core.chain import Chain
from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.problem import Problem, bytes_of_a_vector

BUDGET = 128 * 2**20
"""Bytes that one call may keep alive beside its result, unless the caller says otherwise."""

# Costs in nanoseconds per (sample × parameter), measured on one core; only their ratio
# matters. A direction pushed forward costs two products with the weights; a gradient
# costs its backward pass and, above all, being written and read again.
_FORWARD_PER_DIRECTION = 0.12
_GRADIENT = 2.5
_PRODUCT_PER_DIRECTION = 0.04


def directional_derivatives(
    problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int = BUDGET
) -> Tensor:
    """E[j, d] = ⟨v_d, ∇θ ℓ(z_j)⟩ for directions (D, P): (n, D).

    Chooses between pushing directions forward and forming gradients, by cost; either way
    at most about ``budget`` bytes are alive beside the result.
    """
    if _gradients_are_cheaper(len(directions)):
        return _by_gradients(problem, x, y, directions, budget)
    return _by_blocks(forms.directional_derivatives, problem, x, y, directions, budget)


def mixed_derivatives(problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int = BUDGET) -> Tensor:
    """E[j, d, :] = ∇x ⟨v_d, ∇θ ℓ(z_j)⟩ for directions (D, P): (n, D, *features)."""
    if problem.forms.mixed == "chain":
        return chain_of(problem, x, y).mixed_derivatives(directions)
    return _by_blocks(forms.mixed_derivatives, problem, x, y, directions, budget)


def chain_of(problem: Problem, x: Tree, y: Tree) -> Chain:
    """What :func:`mixed_derivatives` of these samples begins with, where the problem's form is a chain."""
    return Chain(problem.objective, problem.objective.parameters(), x, y)


def gradients(problem: Problem, x: Tree, y: Tree) -> Tensor:
    """∇θ ℓ(z_j) for each sample, (n, P)."""
    return forms.sample_gradients(problem.objective, x, y, problem.forms)


def working_bytes(
    samples: int,
    activations: int,
    parameters: int,
    itemsize: int,
    directions: int,
    *,
    features: int | None = None,
    budget: int = BUDGET,
) -> int:
    """Bytes that one call keeps alive beside its result: for plans, which have no model at hand.

    ``features`` are those of one input where the derivatives are mixed. A single vector, or the gradient
    of a single sample, may exceed ``budget``; results of several blocks of directions are there twice while
    they are joined.

    >>> few, many = (working_bytes(1024, 100, 5000, 4, directions) for directions in (1, 1000))
    >>> few, many
    (2577600, 43417600)
    """
    if features is None and _gradients_are_cheaper(directions):
        rows = min(samples, _rows_at_once(parameters, itemsize, budget))
        return itemsize * rows * (2 * parameters + 6 * activations)
    each = bytes_of_a_vector(samples, activations, parameters, itemsize)
    block = min(directions, max(1, budget // each))
    joined = itemsize * samples * directions * (features or 1)
    return max(each * block, joined if block < directions else 0)


def _rows_at_once(parameters: int, itemsize: int, budget: int) -> int:
    """Gradients that fit: each is there twice while its parts are joined."""
    return max(1, int(budget // (2 * itemsize * parameters)))


def _gradients_are_cheaper(directions: int) -> bool:
    forward = directions * _FORWARD_PER_DIRECTION
    return forward > _GRADIENT + directions * _PRODUCT_PER_DIRECTION


def _by_blocks(
    derivatives: Callable[..., Tensor], problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int
) -> Tensor:
    """``derivatives`` along as many directions at a time as fit the budget."""
    block = problem.block_of_vectors(leading_size(y), budget)
    parts = [derivatives(problem.objective, x, y, part, problem.forms) for part in directions.split(block)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _by_gradients(problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int) -> Tensor:
    """Form gradients of a few samples at a time, in memory that is reused, and multiply."""
    count = leading_size(y)
    step = _rows_at_once(problem.objective.size, problem.objective.dtype.itemsize, budget)
    result = torch.empty(count, len(directions), dtype=directions.dtype, device=directions.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows = gradients(problem, sliced(x, part), sliced(y, part))
        torch.matmul(rows, directions.mT, out=result[part])
        del rows  # before the next ones are formed
    return result
