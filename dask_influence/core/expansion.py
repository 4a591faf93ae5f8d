"""Expansion: the matrix of 1/(Λ + λ) as a few rank-one terms and single entries, to a bound that is certified.

A diagonal inverse in a Kronecker-factored eigenbasis scores a pair of samples in a layer by

    s_ij = Σ_qp W_qp (d_iq d_jq)(a_ip a_jp),        W = 1/(Λ + λ),

which takes a product of size q·p for each pair. With W ≈ Ŵ = Σ_k u_k v_kᵀ it takes q + p for each term,

    ŝ_ij = Σ_k ((u_k ∘ d_i)·d_j) ((v_k ∘ a_i)·a_j),

and one for each entry in which Ŵ is corrected: a low-rank matrix and a sparse one. Corrected eigenvalues are
means over samples, which scatter; what scatters is in few entries, and would take many terms.
If |Ŵ − W| ≤ ε W entry by entry, then by Cauchy and Schwarz in the metric of W

    |ŝ_ij − s_ij| ≤ ε √(s_ii s_jj),

also where the gradient is a sum of such products. The rounding of sums of q and of p products has a bound
of the same kind, (q + p) u with the unit roundoff u of the dtype (Higham 2002, §3.1): a quarter of that is
the ε asked for. Errors of both kinds average out, and are some thousand times smaller in a wide layer.

The terms are the leading singular vectors of a matrix whose rows and columns are scaled to entries near 1,
from a random sketch (Halko, Martinsson & Tropp 2011), block by block: where Λ is far below λ a block is
nearly constant. Entries that the terms miss by more than ε are the sparse part; a block without structure
is all entries, so that any matrix has an expansion. Terms that cancel each other would lose digits; they
are not taken.

Notation: q × p the matrix, K terms of a block, C entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dask_influence.core.gemm import add_product, dense, product
from dask_influence.core.sizes import BUDGET

LEAST_TOLERANCE = 1e-12
"""ε that is asked for at least: of float64, what singular vectors give."""

MOST_TERMS = 48
"""Of one block."""

CANCELLATION = 32.0
"""Σ_k |u_k v_k| / W up to which terms may cancel."""

TYPICAL_TERMS = 16
"""What a plan takes for the terms of a matrix, before there is one."""

DEPTH = 6
"""Times that a block may be cut."""

_OVERHEAD = 8
"""Multiplications that take as long as to multiply and add the two factors of a term."""

_ENTRY = 1.125
"""Multiplications that take as long as an entry, whose two numbers of a sample have to be gathered."""

_UNIFORM = 0.25
"""Logarithm of the range of a block's rows or columns, from which it is cut there."""

_FEW = 2
"""Terms, or entries that take as long, from which a block is not cut."""

_OVERSAMPLED = 8
"""Random directions beside those wanted."""

_FEWEST = 8
"""Rows or columns of a block that is not cut any more."""

BLOCK = 2**17
"""Products of pairs that are added up at a time: what the cache holds."""

WIDEST = 2**10
"""Training samples of such a block."""

GATHERED = 2**18
"""Numbers that are gathered at a time for the entries of a block."""


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

    def add(
        self,
        total: Tensor,
        tests: tuple[Tensor, Tensor],
        trains: tuple[Tensor, Tensor],
        out: Sequence[Tensor],
    ) -> None:
        """Add the terms' part of the scores; ``out`` is memory for the two factors of a term."""
        d, a = tests[0][:, self.rows], tests[1][:, self.columns]
        d_train, a_train = dense(trains[0][:, self.rows].mT), dense(trains[1][:, self.columns].mT)
        for u, v in zip(self.left, self.right, strict=True):
            left = product(d * u, d_train, out=out[0])
            total.addcmul_(left, product(a * v, a_train, out=out[1]))


@dataclass(frozen=True, eq=False)
class Entries:
    """C single entries, of whatever block: a sparse matrix.

    Attributes
    ----------
    rows, columns : Tensor
        Where they are, (C,).
    values : Tensor
        What is added there, (C,).
    """

    rows: Tensor
    columns: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """All of them."""
        named = ([getattr(part, name) for part in parts] for name in ("rows", "columns", "values"))
        return cls(*map(torch.cat, named))

    def to(self, device: torch.device) -> Entries:
        """The same on another device."""
        return Entries(self.rows.to(device), self.columns.to(device), self.values.to(device))

    def weighted(self, d: Tensor, a: Tensor) -> Tensor:
        """What the test side multiplies, (N, C)."""
        return d[:, self.rows].mul_(a[:, self.columns]).mul_(self.values)

    def add(self, total: Tensor, weighted: Tensor, trains: tuple[Tensor, Tensor]) -> None:
        """Add the entries' part of the scores: a product of what :meth:`weighted` made and of d_jq a_jp."""
        d, a = (side.mT.contiguous() for side in trains)  # whole rows are gathered, which is faster
        step = max(1, GATHERED // total.shape[1])
        parts = (part.split(step) for part in (self.rows, self.columns))
        for left, rows, columns in zip(weighted.split(step, 1), *parts, strict=True):
            add_product(total, left, d.index_select(0, rows).mul_(a.index_select(0, columns)))


@dataclass(frozen=True, eq=False)
class Expansion:
    """W as rank-one terms of blocks that cover it, and entries beside them.

    Attributes
    ----------
    blocks : tuple of Block
        They do not overlap; where there is none, W is in the entries alone.
    entries : Entries
        What is added to the terms.
    bound : float
        The largest |Ŵ − W| / W, of terms and entries as they are rounded.
    """

    blocks: tuple[Block, ...]
    entries: Entries
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
        parts = found.of(spectrum.cpu(), slice(0, rows), slice(0, columns), DEPTH)
        blocks = tuple(part.block for part in parts if len(part.block.left))
        return cls(blocks, Entries.joined([part.entries for part in parts]), max(p.bound for p in parts))

    def to(self, device: torch.device) -> Expansion:
        """The same on another device."""
        blocks = (replace(one, left=one.left.to(device), right=one.right.to(device)) for one in self.blocks)
        return Expansion(tuple(blocks), self.entries.to(device), self.bound)

    @property
    def terms(self) -> int:
        """Of all blocks."""
        return sum(len(block.left) for block in self.blocks)

    @property
    def multiplications(self) -> int:
        """In the products of matrices, for a pair of samples."""
        return sum(block.left.numel() + block.right.numel() for block in self.blocks) + len(self.entries)

    @property
    def products(self) -> int:
        """Multiplications for a pair of samples, and what takes as long."""
        return sum(block.products for block in self.blocks) + math.ceil(_ENTRY * len(self.entries))

    def scores(self, tests: tuple[Tensor, Tensor], trains: tuple[Tensor, Tensor]) -> Tensor:
        """Σ_qp Ŵ_qp (d_iq d_jq)(a_ip a_jp) for d (N, q) and a (N, p), and those of n samples: (N, n)."""
        (d, a), (count, others) = tests, (len(tests[0]), len(trains[0]))
        total = d.new_zeros(count, others)
        held = BUDGET // (d.element_size() * max(1, len(self.entries)))
        height = max(1, min(count, 2 * math.isqrt(BLOCK), held))
        for rows in _slices(count, height):
            own = d[rows], a[rows]
            weighted = self.entries.weighted(*own)
            for columns in _slices(others, max(1, min(WIDEST, BLOCK // height))):
                part, side = total[rows, columns], (trains[0][columns], trains[1][columns])
                out = torch.empty_like(part), torch.empty_like(part)
                for block in self.blocks:
                    block.add(part, own, side, out)
                if len(self.entries):
                    self.entries.add(part, weighted, side)
        return total


def tolerated(rows: int, columns: int, dtype: torch.dtype) -> float:
    """A quarter of (q + p) u, but no less than :data:`LEAST_TOLERANCE`."""
    return max(LEAST_TOLERANCE, (rows + columns) * torch.finfo(dtype).eps / 8)


def typical_products(rows: int, columns: int) -> int:
    """What a plan takes for :attr:`Expansion.products`, before there is a matrix."""
    return min(TYPICAL_TERMS * (rows + columns + _OVERHEAD), entry_by_entry(rows, columns))


def entry_by_entry(rows: int, columns: int) -> int:
    """The cost of an expansion without an error."""
    return math.ceil(_ENTRY * rows * columns)


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


@dataclass(frozen=True, eq=False)
class _Part:
    """A block, which may have no term, the entries beside its terms, and the error that is left."""

    block: Block
    entries: Entries
    bound: float

    @property
    def cost(self) -> float:
        """Multiplications for a pair."""
        return self.block.products + _ENTRY * len(self.entries)


@dataclass(frozen=True)
class _Cover:
    """Parts that cover a matrix, for terms in one dtype."""

    dtype: torch.dtype
    tolerance: float

    def of(self, spectrum: Tensor, rows: slice, columns: slice, depth: int) -> list[_Part]:
        """The cheaper of one part, and the parts of two halves."""
        part = spectrum[rows, columns]
        whole = self._whole(part, rows, columns)
        if not depth or min(part.shape) < _FEWEST or whole.cost <= _FEW * (sum(part.shape) + _OVERHEAD):
            return [whole]
        halves = [one for half in _halves(part, rows, columns) for one in self.of(spectrum, *half, depth - 1)]
        return halves if sum(one.cost for one in halves) < whole.cost else [whole]

    def _whole(self, spectrum: Tensor, rows: slice, columns: slice) -> _Part:
        """As many terms as make terms and entries cheapest, which may be none."""
        each, weights = sum(spectrum.shape) + _OVERHEAD, 1 / spectrum
        most = min(MOST_TERMS, entry_by_entry(*spectrum.shape) // each)
        left, right = self._leading(spectrum, most)
        best, cost = 0, float(entry_by_entry(*spectrum.shape))
        found, sizes = torch.zeros_like(spectrum), torch.zeros_like(spectrum)
        for count, (u, v) in enumerate(zip(left.double(), right.double(), strict=True), start=1):
            if count * each >= cost:
                break
            found.addr_(u, v)
            sizes.addr_(u.abs(), v.abs())
            missed = int(((found - weights).abs_() > self.tolerance * weights).sum())
            # where terms cancel, their products would be larger than the sum
            if count * each + _ENTRY * missed < cost and (sizes <= CANCELLATION * weights).all():
                best, cost = count, count * each + _ENTRY * missed
        return self._part(weights, Block(rows, columns, left[:best], right[:best]))

    def _part(self, weights: Tensor, block: Block) -> _Part:
        """With the entries that the terms of ``block`` miss, and the error that is left."""
        found = block.left.double().mT @ block.right.double()
        missed = ((found - weights).abs() > self.tolerance * weights).nonzero(as_tuple=True)
        values = (weights - found)[missed].to(self.dtype)
        found[missed] += values.double()
        bound = float((found / weights).sub_(1).abs_().max())
        places = missed[0] + block.rows.start, missed[1] + block.columns.start
        return _Part(block, Entries(*places, values), bound)

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
