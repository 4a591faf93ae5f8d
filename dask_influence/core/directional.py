"""The hot primitive: directional derivatives of the per-sample loss along D directions.

E[j, d] = ⟨v_d, ∇θ ℓ(z_j)⟩ for ``Up``, and its gradient in the input,
E[j, d, :] = ∇x ⟨v_d, ∇θ ℓ(z_j)⟩, for ``Perturbation``. A tile of scores is then C Eᵀ with
a small coefficient matrix C (N, D). Everything the training side of a run needs is here;
an n × P gradient matrix is formed only where that is cheaper and fits, an n × F × P
tensor never.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial

import optree
import torch
from torch import Tensor

from dask_influence.core import forms
from dask_influence.core.certificate import Certificate
from dask_influence.core.chain import Chain
from dask_influence.core.derived import held_in
from dask_influence.core.factored import Factored
from dask_influence.core.gemm import product
from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.pairs import Pairs
from dask_influence.core.problem import Problem
from dask_influence.core.sizes import (
    BUDGET,
    GRADIENT,
    PASSES_PER_ACTIVATION,
    PRODUCT_PER_DIRECTION,
    Size,
    forward_cost,
    gradient_cost,
    gradients_at_once,
)
from dask_influence.core.watching import along_a_chain

# Further costs, in the unit of those of ``sizes``.
_CAPTURED = 0.25  # the backward pass of a gradient, of which only what layers see is written
_CAPTURE = 1e7  # of a call: the model is traced, and watched
_CHAINED, _CHAINED_PER_ACTIVATION = 1e5, 4.0  # the same along a chain, whose passes are written down
_WRITTEN = 2.0  # of a number that a contraction writes and reads again


class Way(Enum):
    """How E is computed."""

    FORWARD = "directions pushed forward"
    GRADIENTS = "gradients formed, then multiplied"
    LAYERS = "contracted with what layers see"


def directional_derivatives(
    problem: Problem, x: Tree, y: Tree, directions: Tensor | Factored, budget: int = BUDGET
) -> Tensor:
    """E[j, d] = ⟨v_d, ∇θ ℓ(z_j)⟩ for directions (D, P): (n, D).

    Chooses between pushing directions forward, contracting them with what enters the layers and
    what comes back, and forming gradients, by cost; either way at most about ``budget`` bytes are
    alive beside the result.
    """
    if isinstance(directions, Factored):
        if problem.pairs(x):
            factored = Pairs(problem, directions, torch.promote_types(directions.dtype, torch.float32))
            return _by_layers(
                factored.projections, factored.size, problem, x, y, problem.objective.dtype, budget
            )
        directions = directions.dense().to(problem.objective.device, problem.objective.dtype)
    return derivatives_by(chosen(problem, x, directions), problem, x, y, directions, budget)


def derivatives_by(
    way: Way, problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int = BUDGET
) -> Tensor:
    """:func:`directional_derivatives` by the ``way`` given; that by layers needs a problem that pairs them."""
    if way is Way.LAYERS:
        layers = _layers(problem, directions)
        return _by_layers(layers.projections, layers.size, problem, x, y, directions.dtype, budget)
    if way is Way.GRADIENTS:
        return _by_gradients(problem, x, y, directions, budget)
    return _by_blocks(forms.directional_derivatives, problem, x, y, directions, budget)


def projections(
    problem: Problem, x: Tree, y: Tree, directions: Tensor | Factored, budget: int = BUDGET
) -> Tensor:
    """The same, in float32 at least: what coefficients are made of.

    Not to more than the model's own float32: a score is as near as the training side's, which it multiplies.
    """
    dtype = torch.promote_types(problem.objective.dtype, torch.float32)
    layers = _projecting(problem, x, y, directions, dtype)
    if layers is not None:
        return _by_layers(layers.projections, layers.size, problem, x, y, dtype, budget)
    dense = directions.dense() if isinstance(directions, Factored) else directions
    return _by_gradients(problem, x, y, dense.to(problem.objective.device, dtype), budget // 2)


def certified(
    problem: Problem,
    x: Tree,
    y: Tree,
    certificate: Certificate,
    weighed: Callable[[Tensor], Tensor],
    budget: int = BUDGET,
) -> Tensor:
    """⟨v_r, g_j⟩ for the directions of a certificate, and residuals of the factors made of them: (n, R + L), float64.

    ``weighed`` makes coefficients at L values of λ of the projections. A residual is −1 where projections do
    not tell it. They are taken in the model's precision, and again in float64 for samples that need it.
    """
    narrow = torch.promote_types(problem.objective.dtype, torch.float32)
    found = _certified(problem, x, y, certificate, weighed, narrow, budget)
    unknown = (found[:, len(certificate.values) :] < 0).any(dim=1).nonzero().flatten()
    if len(unknown) and narrow != torch.float64:
        x, y = optree.tree_map(lambda leaf: leaf[unknown], (x, y))
        found[unknown] = _certified(problem, x, y, certificate, weighed, torch.float64, budget)
    return found


def _certified(
    problem: Problem,
    x: Tree,
    y: Tree,
    certificate: Certificate,
    weighed: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    budget: int,
) -> Tensor:
    witness = certificate.witness(dtype)
    seen = witnessed(problem, x, y, certificate.directions, witness.others, dtype, budget).cpu()
    along = seen[:, : len(certificate.values)]
    residuals = certificate.residuals(weighed(along), seen, witness)
    return torch.cat([along, residuals.reshape(len(along), -1)], dim=1)


def witnessed(
    problem: Problem,
    x: Tree,
    y: Tree,
    directions: Tensor,
    others: Tensor,
    dtype: torch.dtype,
    budget: int = BUDGET,
) -> Tensor:
    """⟨v_r, g_j⟩ and ⟨w_k, g_j⟩ for directions (R, P) and others (K, P), and ‖g_j‖²: (n, R + K + 1), float64.

    Products are taken in ``dtype``.
    """
    device = problem.objective.device
    layers = _projecting(problem, x, y, directions, dtype)
    if layers is not None:
        along = partial(layers.witnessed, others=others.to(device, dtype))
        return _by_layers(along, layers.size, problem, x, y, torch.float64, budget)
    sides = [held_in(side, dtype, device) for side in (directions, others)]
    parts = []
    step = gradients_at_once(problem.objective.size, dtype.itemsize, budget)
    for start in range(0, leading_size(y), step):
        part = slice(start, start + step)
        rows = gradients(problem, sliced(x, part), sliced(y, part)).to(dtype)
        parts.append(
            torch.cat([*(product(rows, side.mT) for side in sides), rows.square().sum(1)[:, None]], dim=1)
        )
    return torch.cat(parts).to(torch.float64)


def squared(problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int = BUDGET) -> Tensor:
    """⟨v_r, g_j⟩ for directions (R, P), and ‖g_j‖²: (n, R + 1), float64, of products in the model's precision."""
    dtype = torch.promote_types(problem.objective.dtype, torch.float32)
    return witnessed(problem, x, y, directions, directions[:0], dtype, budget)


def _projecting(
    problem: Problem, x: Tree, y: Tree, directions: Tensor | Factored, dtype: torch.dtype
) -> Pairs | None:
    """θ in layers, in this dtype, where projecting by them is cheaper than forming gradients."""
    if not problem.pairs(x):
        return None
    layers = Pairs(problem, directions, dtype)
    saved = (GRADIENT - _CAPTURED) * leading_size(y) * problem.objective.size
    cheaper = saved > _beginning(problem) and 2 * layers.size.numbers <= problem.objective.size
    return layers if cheaper or isinstance(directions, Factored) else None


def mixed_derivatives(problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int = BUDGET) -> Tensor:
    """E[j, d, :] = ∇x ⟨v_d, ∇θ ℓ(z_j)⟩ for directions (D, P): (n, D, *features)."""
    if problem.forms.mixed == "chain":
        return chain_of(problem, x, y).mixed_derivatives(directions)
    return _by_blocks(forms.mixed_derivatives, problem, x, y, directions, budget)


def chain_of(problem: Problem, x: Tree, y: Tree) -> Chain:
    """What derivatives of these samples begin with, where the problem's form is a chain; kept where they are."""
    objective = problem.objective

    def make() -> Chain:
        return Chain(objective, objective.parameters(), x, y)

    if problem.shelf is None:
        return make()
    return problem.shelf.get(objective.names, make, lambda chain: chain.nbytes)


def gradients(problem: Problem, x: Tree, y: Tree) -> Tensor:
    """∇θ ℓ(z_j) for each sample, (n, P)."""
    return forms.sample_gradients(problem.objective, x, y, problem.forms)


def _by_blocks(
    derivatives: Callable[..., Tensor], problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int
) -> Tensor:
    """``derivatives`` along as many directions at a time as fit the budget."""
    block = problem.block_of_vectors(leading_size(y), budget)
    parts = [derivatives(problem.objective, x, y, part, problem.forms) for part in directions.split(block)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def chosen(problem: Problem, x: Tree, directions: Tensor) -> Way:
    """The cheapest way, as far as costs can tell; by layers only where they hold less of a sample than a gradient."""
    count, parameters, activations = len(directions), problem.objective.size, problem.activations
    forward, formed = (cost(count, parameters, activations) for cost in (forward_cost, gradient_cost))
    general = Way.GRADIENTS if forward > formed else Way.FORWARD
    passes = _CHAINED_PER_ACTIVATION if along_a_chain(problem) else PASSES_PER_ACTIVATION
    contracted = (_CAPTURED + PRODUCT_PER_DIRECTION * count) * parameters + passes * activations
    saved = min(forward, formed) - contracted
    if not problem.pairs(x) or saved * leading_size(x) <= _beginning(problem):
        return general
    layers = _layers(problem, directions)
    made = layers.made + count * layers.written
    if 2 * layers.size.numbers > parameters or _WRITTEN * made > saved:
        return general
    return Way.LAYERS


def _beginning(problem: Problem) -> float:
    """What a call that watches layers takes, however few the samples."""
    return _CHAINED if along_a_chain(problem) else _CAPTURE


def _layers(problem: Problem, directions: Tensor) -> Pairs:
    return Pairs(problem, directions, torch.promote_types(directions.dtype, torch.float32))


def _by_layers(
    along: Callable[[Problem, Tree, Tree], Tensor],
    size: Size,
    problem: Problem,
    x: Tree,
    y: Tree,
    dtype: torch.dtype,
    budget: int,
) -> Tensor:
    """Contract directions with the inputs and output gradients of the layers, a few samples at a time."""
    count = leading_size(y)
    step = max(1, budget // (2 * size.itemsize * size.numbers))
    parts = [slice(start, start + step) for start in range(0, count, step)]
    return torch.cat([along(problem, sliced(x, part), sliced(y, part)) for part in parts]).to(dtype)


def _by_gradients(problem: Problem, x: Tree, y: Tree, directions: Tensor, budget: int) -> Tensor:
    """Form gradients of a few samples at a time, in memory that is reused, and multiply."""
    count = leading_size(y)
    step = gradients_at_once(problem.objective.size, problem.objective.dtype.itemsize, budget)
    result = torch.empty(len(directions), count, dtype=directions.dtype, device=directions.device)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows = gradients(problem, sliced(x, part), sliced(y, part))
        # this way round, as scores in memory are multiplied, for the same bits
        product(directions, rows.to(directions).mT, out=result[:, part])
        del rows  # before the next ones are formed
    return result.mT
