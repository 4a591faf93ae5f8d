"""Expansion: the matrix of 1/(Λ + λ) as a few rank-one terms, to a bound that is certified.

A diagonal inverse in a Kronecker-factored eigenbasis scores a pair of samples in a layer by

    s_ij = Σ_qp W_qp (d_iq d_jq)(a_ip a_jp),        W = 1/(Λ + λ),

which takes a product of size q·p for each pair. With W ≈ Ŵ = Σ_k u_k v_kᵀ it takes q + p for each term,

    ŝ_ij = Σ_k ((u_k ∘ d_i)·d_j) ((v_k ∘ a_i)·a_j).

If |Ŵ − W| ≤ ε W entry by entry, then by Cauchy and Schwarz in the metric of W

    |ŝ_ij − s_ij| ≤ ε √(s_ii s_jj),

also where the gradient is a sum of such products. The rounding of sums of q and of p products has a bound
of the same kind, (q + p) u with the unit roundoff u of the dtype (Higham 2002, §3.1): a quarter of that is
the ε asked for. Errors of both kinds average out, and are some thousand times smaller in a wide layer.

The terms are the leading singular vectors of a matrix whose rows and columns are scaled to entries near 1,
from a random sketch (Halko, Martinsson & Tropp 2011), block by block: where Λ is far below λ a block is
nearly constant, and a block of one row is one term, so that any matrix has an expansion. Terms that cancel
each other would lose digits; blocks in which they do are cut.

Notation: q × p the matrix, K terms of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAST_TOLERANCE = 1e-12
"""ε that is asked for at least: of float64, what singular vectors give."""

MOST_TERMS = 48
"""Of one block, before it is cut or taken row by row."""

CANCELLATION = 32.0
"""Σ_k |u_k v_k| / W up to which terms may cancel."""

TYPICAL_TERMS = 16
"""What a plan takes for the terms of a matrix, before there is one."""

DEPTH = 6
"""Times that a block may be cut."""

_OVERHEAD = 8
"""Multiplications that take as long as to multiply and add the two factors of a term."""

_UNIFORM = 0.25
"""Logarithm of the range of a block's rows or columns, from which it is cut there."""

_FEW = 2
"""Terms of a block that need not be fewer."""

_OVERSAMPLED = 8
"""Random directions beside those wanted."""

_FEWEST = 8
"""Rows or columns of a block that is not cut any more."""

BLOCK = 2**17
"""Products of pairs that are added up at a time: what the cache holds."""


@dataclass(frozen=True, eq=False)
class Block:
    """K terms of a part of the matrix.

    Attributes
    ----------
    rows, columns : slice
        The part.
    left, right : Tensor
        u (K, q) and v (K, p) of the part.
    """

    rows: slice
    columns: slice
    left: Tensor
    right: Tensor

    @property
    def products(self) -> int:
        """Multiplications for a pair, and what takes as long."""
        return len(self.left) * (self.left.shape[1] + self.right.shape[1] + _OVERHEAD)

    def terms(self) -> Iterator[tuple[Tensor, Tensor]]:
        """u (q,) and v (p,)."""
        return zip(self.left, self.right, strict=True)


@dataclass(frozen=True, eq=False)
class Expansion:
    """W as rank-one terms of blocks that cover it.

    Attributes
    ----------
    blocks : tuple of Block
        They do not overlap.
    bound : float
        The largest |Ŵ − W| / W, of the terms as they are rounded.
    """

    blocks: tuple[Block, ...]
    bound: float

    @classmethod
    def of(cls, spectrum: Tensor, dtype: torch.dtype, tolerance: float | None = None) -> Expansion:
        """Of 1 / ``spectrum``, for a positive Λ + λ (q, p) in float64; terms in ``dtype``.

        Examples
        --------
        >>> spectrum = torch.linspace(0, 9, 30)[:, None] * torch.linspace(0, 9, 40) + 0.1
        >>> found = Expansion.of(spectrum.double(), torch.float32)
        >>> found.bound <= 70 * 2**-26, found.products < 30 * 40
        (True, True)
        """
        rows, columns = spectrum.shape
        found = _Cover(dtype, tolerated(rows, columns, dtype) if tolerance is None else tolerance)
        blocks, bound = found.of(spectrum.cpu(), slice(0, rows), slice(0, columns), DEPTH)
        return cls(tuple(blocks), bound)

    def to(self, device: torch.device) -> Expansion:
        """The same on another device."""
        blocks = (replace(one, left=one.left.to(device), right=one.right.to(device)) for one in self.blocks)
        return Expansion(tuple(blocks), self.bound)

    @property
    def terms(self) -> int:
        """Of all blocks."""
        return sum(len(block.left) for block in self.blocks)

    @property
    def products(self) -> int:
        """Multiplications for a pair of samples, about."""
        return _cost(self.blocks)

    def scores(self, tests: tuple[Tensor, Tensor], trains: tuple[Tensor, Tensor]) -> Tensor:
        """Σ_k ((u_k ∘ d_i)·d_j) ((v_k ∘ a_i)·a_j) for d (N, q) and a (N, p), and those of n samples: (N, n)."""
        (d, a), (count, others) = tests, (len(tests[0]), len(trains[0]))
        total = d.new_zeros(count, others)
        height = min(count, 2 * math.isqrt(BLOCK))
        for rows in _slices(count, height):
            own = d[rows], a[rows]
            for columns in _slices(others, max(1, BLOCK // height)):
                self._add(total[rows, columns], own, (trains[0][columns], trains[1][columns]))
        return total

    def _add(self, total: Tensor, tests: tuple[Tensor, Tensor], trains: tuple[Tensor, Tensor]) -> None:
        left, right = torch.empty_like(total), torch.empty_like(total)
        for block in self.blocks:
            d, a = tests[0][:, block.rows], tests[1][:, block.columns]
            d_train, a_train = trains[0][:, block.rows].mT, trains[1][:, block.columns].mT
            for u, v in block.terms():
                if len(u) == 1:  # the factor of a row, or of a column, is one number of each sample
                    total.addcmul_(torch.mm(a * v * (d * u), a_train, out=right), d_train)
                elif len(v) == 1:
                    total.addcmul_(torch.mm(d * u * (a * v), d_train, out=left), a_train)
                else:
                    torch.mm(d * u, d_train, out=left)
                    total.addcmul_(left, torch.mm(a * v, a_train, out=right))


def tolerated(rows: int, columns: int, dtype: torch.dtype) -> float:
    """A quarter of (q + p) u, but no less than :data:`LEAST_TOLERANCE`."""
    return max(LEAST_TOLERANCE, (rows + columns) * torch.finfo(dtype).eps / 8)


def typical_products(rows: int, columns: int) -> int:
    """What a plan takes for :attr:`Expansion.products`, before there is a matrix."""
    return min(TYPICAL_TERMS * (rows + columns + _OVERHEAD), _row_by_row(rows, columns))


def _row_by_row(rows: int, columns: int) -> int:
    """The cost of an expansion without an error: each row, or column, a term of its own."""
    return min(rows, columns) * (1 + max(rows, columns) + _OVERHEAD)


def _cost(blocks: list[Block] | tuple[Block, ...]) -> int:
    return sum(block.products for block in blocks)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


@dataclass(frozen=True)
class _Cover:
    """Blocks that cover a matrix, for terms in one dtype."""

    dtype: torch.dtype
    tolerance: float

    def of(self, spectrum: Tensor, rows: slice, columns: slice, depth: int) -> tuple[list[Block], float]:
        """The cheapest of: one block, the blocks of two halves, and a block for each row."""
        part = spectrum[rows, columns]
        found = self._factors(part)
        ways: list[tuple[list[Block], float]] = []
        if found is not None:
            left, right, bound = found
            ways.append(([Block(rows, columns, left, right)], bound))
        if depth and min(part.shape) >= _FEWEST and (found is None or len(found[0]) > _FEW):
            halves = [self.of(spectrum, *half, depth - 1) for half in _halves(part, rows, columns)]
            blocks = [block for own, _ in halves for block in own]
            ways.append((blocks, max(bound for _, bound in halves)))
        best = min(ways, key=lambda way: _cost(way[0]), default=None)
        if best is None or _cost(best[0]) > _row_by_row(*part.shape):
            return self._lines(part, rows, columns)
        return best

    def _factors(self, spectrum: Tensor) -> tuple[Tensor, Tensor, float] | None:
        """The fewest u (K, q) and v (K, p), and their error; None where they do not pay, or cancel."""
        each = sum(spectrum.shape) + _OVERHEAD
        most = min(MOST_TERMS, _row_by_row(*spectrum.shape) // each)
        if most < 1:
            return None
        left, right = self._leading(spectrum, most)
        few, many = 0, len(left) + 1  # too few, and enough
        best = None
        while many - few > 1:
            count = (few + many) // 2 if best is not None else many - 1
            error = self._error(spectrum, left[:count], right[:count])
            if error <= self.tolerance:
                many, best = count, (left[:count], right[:count], error)
            elif best is None:
                return None
            else:
                few = count
        # else, products of terms would be larger than their sum
        return best if best is not None and _cancelled(spectrum, *best[:2]) <= CANCELLATION else None

    def _leading(self, spectrum: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Terms of 1 / ``spectrum`` by falling size, in the dtype asked for."""
        logs = spectrum.log()
        across, down = logs.mean(1), logs.mean(0) - logs.mean()
        scaled = (across[:, None] + down - logs).exp()  # near 1 everywhere
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(
            scaled.shape[1], min(most + _OVERSAMPLED, *scaled.shape), generator=generator, dtype=torch.float64
        )
        basis = torch.linalg.qr(scaled @ sketch).Q
        basis = torch.linalg.qr(scaled @ torch.linalg.qr(scaled.mT @ basis).Q).Q
        u, values, v = torch.linalg.svd(basis.mT @ scaled, full_matrices=False)
        left = (basis @ u * values).mT / across.exp()
        right = v / down.exp()
        return left[:most].to(self.dtype).contiguous(), right[:most].to(self.dtype).contiguous()

    def _error(self, spectrum: Tensor, left: Tensor, right: Tensor) -> float:
        """max |Σ u v − W| / W, of the terms as they are rounded."""
        wide = left.to(torch.float64), right.to(torch.float64)
        return float((wide[0].mT @ wide[1]).mul_(spectrum).sub_(1).abs_().max())

    def _lines(self, spectrum: Tensor, rows: slice, columns: slice) -> tuple[list[Block], float]:
        """A block for each row, or for each column where they are fewer."""
        weights = (1 / spectrum).to(self.dtype)
        error = float(((weights * spectrum) - 1).abs().max())
        one = weights.new_ones(1, 1)
        if len(weights) <= weights.shape[1]:
            starts = range(rows.start, rows.stop)
            lines = [
                Block(slice(at, at + 1), columns, one, row[None])
                for at, row in zip(starts, weights, strict=True)
            ]
        else:
            starts = range(columns.start, columns.stop)
            lines = [
                Block(rows, slice(at, at + 1), column[None], one)
                for at, column in zip(starts, weights.mT.contiguous(), strict=True)
            ]
        return lines, error


def _cancelled(spectrum: Tensor, left: Tensor, right: Tensor) -> float:
    """max Σ |u v| / W."""
    wide = left.abs().to(torch.float64), right.abs().to(torch.float64)
    return float((wide[0].mT @ wide[1]).mul_(spectrum).max())


def _halves(spectrum: Tensor, rows: slice, columns: slice) -> list[tuple[slice, slice]]:
    """The part cut in two: where its largest entries pass half of their range, or in the middle if they hardly differ.

    Eigenvalues ascend, so that what is far below λ and what is not come apart.
    """
    largest = [spectrum.amax(1).log(), spectrum.amax(0).log()]
    spread = [float(values.max() - values.min()) for values in largest]
    axis = 0 if spread[0] > spread[1] else 1
    values, bounds = largest[axis], ((rows.start, rows.stop), (columns.start, columns.stop))
    below = int((values < (values.max() + values.min()) / 2).sum())
    if spread[axis] < _UNIFORM:
        axis = 0 if spectrum.shape[0] > spectrum.shape[1] else 1
        below = spectrum.shape[axis] // 2
    start, stop = bounds[axis]
    middle = start + min(max(below, 1), stop - start - 1)
    if axis == 0:
        return [(slice(start, middle), columns), (slice(middle, stop), columns)]
    return [(rows, slice(start, middle)), (rows, slice(middle, stop))]
