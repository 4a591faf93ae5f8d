"""Factoring: the smallest ranks at which directions give scores of the accuracy asked for, measured on data.

Norms of what is left out of V overstate the error by orders of magnitude, since gradients are anything but
isotropic; so each rank is chosen by the scores of sample pairs, with the factors against without. Bases are leading
singular vectors of all directions' blocks at once: bases that were weighted by the samples measured on fit those
better, and others no better.

Notation as in ``core.factored``; M (D, q, p) are the blocks of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dask_influence.core.factored import (
    Approximation,
    Block,
    Factored,
    Span,
    score_error,
)
from dask_influence.core.objective import Tree
from dask_influence.core.pairs import Pairs, Product
from dask_influence.core.problem import Problem

PROBES = 256
"""Samples of the data fitted that accuracy is measured on."""

MARGIN = 2.0
"""How much more accurate than asked for the factors are on those samples, since others differ."""

WORTH = 0.7
"""Of the multiplications of dense directions: with more than that factors are not worth their error."""

COMBINATIONS = 2
FIRST_RANK = 16
SHARE = 0.95
"""Of the error that is left, what a layer may take: more for the largest ones."""

_NARROW = 1e-5  # errors down to which float32 does


@dataclass(frozen=True, eq=False)
class _Measure:
    """Scores of samples, as far as all layers but one are exact."""

    exact: Tensor
    weights: Tensor
    plain: float
    products: Tensor

    def error(self, off: Tensor) -> float:
        """Relative error of scores where projections are ``off`` (n, D)."""
        return score_error(self.exact, self.exact + off, self.weights, self.plain, self.products)


def approximation(
    problem: Problem, x: Tree, y: Tree, directions: Tensor, weights: Tensor, plain: float, tolerance: float
) -> Approximation:
    """Directions V (D, P) in factors, for scores Σ_d w_d E_id E_jd + μ ⟨g_i, g_j⟩ to ``tolerance``.

    Parameters
    ----------
    problem : Problem
        Its layers may be factored where it has a pairing that fits.
    x, y
        n samples to measure on.
    directions, weights, plain
        V, w (D,) and μ, float64.
    tolerance : float
        Relative error of scores, in the norm over all pairs.
    """
    if not problem.pairs(x):
        none = torch.zeros(2, len(directions), dtype=torch.float64)
        return Approximation(tolerance, None, none, none, torch.zeros(1, 1, dtype=torch.float64))
    pairs = Pairs(problem, directions, torch.float64)
    directions = pairs.dense
    rows = pairs.held(problem, x, y)
    along = [part.along(own, directions) for part, own in zip(pairs.parts, rows, strict=True)]
    exact, half = torch.stack(along).sum(0), len(rows[0]) // 2
    inner = (part.inner(own[:half], own[half:]) for part, own in zip(pairs.parts, rows, strict=True))
    products = sum(inner, directions.new_zeros(()))
    measure = _Measure(exact, weights.to(directions), plain, products)
    wide = [at for at, part in enumerate(pairs.parts) if isinstance(part, Product) and part.weight]
    wide.sort(key=lambda at: -pairs.parts[at].size)
    blocks: dict[int, Block] = {}
    found = exact
    for at in wide:  # what one layer leaves of the error allowed is for the next ones
        part, spent = pairs.parts[at], measure.error(found - exact)
        assert isinstance(part, Product)
        left = SHARE * math.sqrt(max(0.0, (tolerance / MARGIN) ** 2 - spent**2))
        block = _block(part, rows[at], along[at], directions, measure, left)
        if block is None:
            continue
        with_it = found + block.along(*part.sides(rows[at])) - along[at]
        if measure.error(with_it - exact) <= tolerance / MARGIN:
            blocks[at], found = block, with_it
    dtype = torch.float32 if tolerance >= _NARROW else torch.float64
    factored = _factored(pairs, directions, blocks, weights, dtype) if blocks else None
    known = (held.to("cpu", torch.float64) for held in (exact, found, products))
    return Approximation(tolerance, factored, *known)


def _block(
    part: Product, rows: Tensor, along: Tensor, directions: Tensor, measure: _Measure, allowed: float
) -> Block | None:
    """The cheapest factors of one layer that put scores off by ``allowed``; None where none are cheap."""
    matrices, sides = part.matrices(directions), part.sides(rows)
    count, outer, inner = matrices.shape
    formed = part.positions if part.positions > 1 else 0  # of several positions the sum is formed first

    def cost(r: int, s: int | None) -> int:
        own = outer if s is None else s
        rotated = inner * r + (0 if s is None else outer * s)
        return part.positions * rotated + own * r * (count + formed)

    def good(block: Block) -> bool:
        return measure.error(block.along(*sides) - along) <= allowed

    def narrow(basis: Tensor, images: Tensor) -> Block:
        return Block(images.unflatten(0, (count, outer)), basis, None)

    single, dense = allowed >= _NARROW, outer * inner * (count + formed)
    block = _smallest(matrices.flatten(0, 1), narrow, good, lambda r: cost(r, None) <= WORTH * dense, single)
    if block is None:
        return None
    first, rank = block, block.cores.shape[2]

    def both(basis: Tensor, images: Tensor) -> Block:
        return Block(images.unflatten(0, (count, rank)).mT, first.inputs, basis)

    worth = WORTH * cost(rank, None)
    return (
        _smallest(first.cores.mT.flatten(0, 1), both, good, lambda s: cost(rank, s) <= worth, single) or first
    )


def _smallest(
    stacked: Tensor,
    made: Callable[[Tensor, Tensor], Block],
    good: Callable[[Block], bool],
    cheap: Callable[[int], bool],
    single: bool,
) -> Block | None:
    """The smallest ``good`` block that is ``made`` of leading right singular vectors of ``stacked`` (m, p).

    It is made of them and their images (m, rank). None where all that are good are not cheap.
    """
    most = _last(1, min(stacked.shape), cheap) if cheap(1) else 0
    low, high = 0, min(FIRST_RANK, most)
    while high > low:
        basis = _leading(stacked, high, single)
        images = stacked @ basis
        if good(made(basis, images)):
            while high - low > max(1, high // 16):  # a few vectors more are no matter
                middle = (low + high) // 2
                is_good = good(made(basis[:, :middle], images[:, :middle]))
                low, high = (low, middle) if is_good else (middle, high)
            return made(basis[:, :high].contiguous(), images[:, :high].contiguous())
        low, high = high, min(2 * high, most)
    return None


def _last(low: int, most: int, true: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` of which it is true, as it is of ``low`` and all between."""
    high = most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if true(middle) else (low, middle)
    return low


def _leading(stacked: Tensor, rank: int, single: bool) -> Tensor:
    """About the first ``rank`` right singular vectors, by falling singular value, (p, rank), orthonormal in float64."""
    with torch.random.fork_rng(devices=[stacked.device] if stacked.is_cuda else []):
        torch.manual_seed(0)  # the same basis in each process
        _, _, vectors = torch.svd_lowrank(stacked.float() if single else stacked, q=rank, niter=2)
    basis, upper = torch.linalg.qr(vectors.to(stacked))
    return basis * upper.diagonal().sign()


def _factored(
    pairs: Pairs, directions: Tensor, blocks: dict[int, Block], weights: Tensor, dtype: torch.dtype
) -> Factored:
    """Blocks of some parts, and all else of the directions."""
    spans: list[Span] = []
    for at, part in enumerate(pairs.parts):
        if at not in blocks:
            spans += part.spans
    spans.sort()
    scales = weights.abs().sqrt().to(directions)
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (COMBINATIONS, len(directions)), generator=random) * 2.0 - 1
    signed = signs.to(directions) * scales
    left_out = directions.new_zeros(COMBINATIONS, directions.shape[1])
    by_path = {}
    for at, block in blocks.items():
        part = pairs.parts[at]
        assert isinstance(part, Product)
        by_path[part.layer.path] = block
        off = torch.einsum("kd,dqp->kqp", signed, part.matrices(directions)) - block.combined(signed)
        part.put(off, left_out)
    rest = [directions[:, low:high] for low, high in spans]
    held = torch.cat(rest, dim=1) if rest else directions.new_zeros(len(directions), 0)
    whole = Factored(by_path, held, tuple(spans), left_out, scales, math.inf)
    whole = whole.to(torch.device("cpu"), dtype)
    return replace(whole, left_out=whole.left_out.float())  # of which two digits matter
