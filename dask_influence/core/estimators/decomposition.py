"""A block Krylov decomposition C Q = [Q F] M, grown by products, with full reorthogonalisation.

Q holds the rows that have been multiplied by the symmetric C, F those that are pending: what
products left outside of Q, or random rows. All are orthonormal. M knows the rest, so that no
image is held: a Ritz pair (θ, Qy) has the residual F S y, S the last rows of M, of length ‖S y‖,
and its image is [Q F] M y. What an image has in common with Q is known from earlier products by
symmetry, and subtracted from the few rows that it concerns (Lanczos 1950). A second subtraction,
from all rows, takes what rounding left. It is bound by reading them, so that a row which comes by
itself waits for the next one: it is multiplied before that, and M follows. Restarts keep Ritz
vectors, which lose nothing: the decomposition stays one (Stewart 2001; Wu & Simon 2000).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CLEAR = 0.1
"""Of the length rows keep: where more is subtracted, or one keeps less beside others, it is done again."""

VANISHED = 32.0
"""Roundoffs of the longest image of a block below which what is left of one is rounding."""

ATTEMPTS = 4
"""Times that rows are orthogonalised at most; twice is enough but for the worst of luck."""

PANEL = 2**14
"""Columns that many rows have in the cache at once."""


@dataclass(frozen=True)
class Ritz:
    """Ritz values by falling magnitude, the rotation (K, K) of Q to their vectors, and residuals.

    Attributes
    ----------
    values : Tensor
        θ (K,).
    rotation : Tensor
        y as columns (K, K).
    outside : Tensor
        S y (p, K): coordinates of the residuals in the pending rows.
    """

    values: Tensor
    rotation: Tensor
    outside: Tensor

    @property
    def residuals(self) -> Tensor:
        """‖C v − θ v‖ (K,)."""
        return self.outside.norm(dim=0)


class Decomposition:
    """C Q = [Q F] M with K rows in Q and p in F.

    Parameters
    ----------
    size : int
        P.
    rows : int
        Rows for which there is memory at first; more is taken where it is needed.
    dtype : torch.dtype
        In which rows are held; M is float64.
    generator : torch.Generator
        Of random rows.
    """

    def __init__(self, size: int, rows: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        self._rows = torch.empty(min(rows, size), size, dtype=dtype)
        self._coefficients = torch.zeros(len(self._rows), len(self._rows), dtype=torch.float64)
        self._generator = generator
        self.multiplied = self.pending = 0
        """K and p."""
        self._waiting = False
        """Whether the only pending row is yet to be subtracted from, once more."""

    @property
    def size(self) -> int:
        """P."""
        return self._rows.shape[1]

    @property
    def coefficients(self) -> Tensor:
        """M (K + p, K)."""
        return self._coefficients[: self._length, : self.multiplied]

    @property
    def _length(self) -> int:
        return self.multiplied + self.pending

    # -- what is multiplied next -------------------------------------------------------
    def next(self, count: int) -> Tensor:
        """The first ``count`` pending rows, or all there are: what :meth:`advance` wants the products of."""
        return self._rows[self.multiplied : self.multiplied + min(count, self.pending)]

    def add_random(self, count: int) -> None:
        """Add ``count`` random rows, where there are as many dimensions left, and mix the pending ones with them.

        Mixed, because pending rows may hold what is looked for, which rows orthogonal to them would not see.
        """
        count = min(count, self.size - self._length)
        if count == 0:
            return
        if self._waiting:
            self._settle(self._rows.new_empty(1, self.size))
        random = torch.randn(count, self.size, generator=self._generator, dtype=torch.float64)
        nothing = torch.zeros(self._length, count, dtype=torch.float64)
        fresh, _ = self._outside(random.to(self._rows.dtype), nothing)
        self._append(fresh)
        mixing = torch.randn(self.pending, self.pending, generator=self._generator, dtype=torch.float64)
        self._turn_pending(torch.linalg.qr(mixing).Q)

    def favour(self, outside: Tensor, least: float) -> int:
        """Turn the pending rows so that those come first along which residuals ``outside`` (p, k) are longest.

        Returns along how many they are longer than ``least``, one at the least.
        """
        turn, lengths, _ = torch.linalg.svd(outside)
        if self.pending > 1:
            self._turn_pending(turn.mT)
        return max(1, int((lengths > least).sum()))

    def _turn_pending(self, turn: Tensor) -> None:
        """F replaced by turn F, for an orthogonal ``turn``."""
        own = slice(self.multiplied, self._length)
        self._rows[own] = turn.to(self._rows.dtype) @ self._rows[own]
        self._coefficients[own] = turn @ self._coefficients[own]

    # -- growth ------------------------------------------------------------------------
    def advance(self, images: Tensor, samples: int = 1) -> None:
        """Take the products (b, P), times ``samples``, of the first b pending rows, which move from F to Q.

        They are of any size, zero too: what is squared is scaled to 1 by a power of two.
        """
        start, count = self.multiplied, len(images)
        unit = 2.0 ** (math.frexp(max(map(abs, map(float, images.aminmax()))) / samples)[1] - 1)
        both = self._rows.new_empty(self._waiting + count, self.size)  # with room for the row that waits
        rows = torch.div(images, unit * samples, out=both[-count:])
        known = torch.zeros(self._length, count, dtype=torch.float64)
        known[:start] = self._coefficients[start : start + count, :start].mT / unit  # C is symmetric
        concerned = known.any(dim=1).nonzero()
        self._subtract(rows, known, slice(int(concerned[0]) if len(concerned) else start, start))
        own = slice(start, self._length)
        known[own] = _overlap(self._rows[own], rows)
        self._subtract(rows, known, own)
        taken = None
        waits = self.pending == 1 and not self._waiting and self._may_wait(rows, known, unit)
        if waits:
            taken = known[:0]
        elif self._waiting:
            common, length, taken = self._settle(both)
            known[:start] += common * known[start]
            known[start] *= length
            known += taken
            # the image of what the row has become
            known = (known - self.coefficients @ common / unit) / length
            rows, taken = rows.div_(length), taken / length
        fresh, coordinates = self._outside(rows, known, taken)
        self.multiplied, self.pending = start + count, self.pending - count
        self._append(fresh)
        self._coefficients[: self._length, start : start + count] = unit * torch.cat([known, coordinates])
        self._waiting = waits and self.pending == 1

    def _may_wait(self, rows: Tensor, known: Tensor, unit: float) -> bool:
        """Whether what is left of an image is long beside C, so that little of it is rounding, which may be inside Q.

        An image is not enough to tell: that of a row which C makes nothing of is rounding altogether.
        """
        left, taken = unit * rows.norm().item(), unit * known.norm().item()
        seen = self.coefficients.abs().max().item() if self.multiplied else 0.0
        return left > CLEAR**2 * max(seen, math.hypot(left, taken))

    def _settle(self, both: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take what the row f that waits and the other rows of ``both`` (1 + b, P) have inside Q from them.

        By one reading of Q; the first row of ``both`` is overwritten. f was Q c + ν f' and becomes f'. Returns
        c (K, 1), ν, and what was taken from the others (K + 1, b), which have nothing of f' either.
        """
        start, inside = self.multiplied, slice(self.multiplied)
        own, others = slice(start, start + 1), both[1:]
        both[:1] = self._rows[own]
        overlap = _overlap(self._rows[inside], both)
        self._subtract(both, overlap, inside)
        common, length = overlap[:, :1], both[0].norm().to(torch.float64)
        torch.div(both[:1], length, out=self._rows[own])
        rest = _overlap(self._rows[own], others)
        _subtract(others, rest.mT.to(both.dtype), self._rows[own])
        coefficients = self.coefficients
        coefficients[:start] += common * coefficients[start]
        coefficients[start] *= length
        self._waiting = False
        return common, length, torch.cat([overlap[:, 1:], rest])

    def _subtract(self, rows: Tensor, overlap: Tensor, held: slice) -> None:
        """Take ``overlap`` (K + p, b) with the rows ``held`` from ``rows`` (b, P)."""
        _subtract(rows, overlap[held].mT.to(rows.dtype), self._rows[held])

    def _outside(self, rows: Tensor, known: Tensor, taken: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """An orthonormal basis (b', P) of what ``rows`` (b, P) have outside of [Q F], and their coordinates (b', b).

        What they have inside is taken from them, and added to ``known`` (K + p, b), what has been taken before;
        ``taken`` is of that what was last, by which to see whether it has to be done again.
        """
        held, coordinates = slice(self._length), torch.eye(len(rows), dtype=torch.float64)
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
        if not squares.any():
            return rows[:0], coordinates[:0]
        squares += known.square().sum(0)
        noise = VANISHED * torch.finfo(rows.dtype).eps * squares.max().sqrt()
        for _ in range(ATTEMPTS):
            if taken is None:
                taken = _overlap(self._rows[held], rows)
                self._subtract(rows, taken, held)
                known += taken @ coordinates
            rows, own = _orthonormal(rows)
            coordinates = own @ coordinates
            left, lengths, right = torch.linalg.svd(coordinates)
            clear = lengths > noise
            clear[self.size - self._length :] = False  # P dimensions have no room for more
            if len(rows) > 1 or not clear.all():  # a single row has nothing to be turned to
                rows = left[:, : len(lengths)][:, clear].mT.to(rows.dtype) @ rows
                coordinates = (lengths[:, None] * right[: len(lengths)])[clear]
            remained = torch.linalg.svdvals(own)[: len(rows)]
            if len(rows) == 0 or CLEAR * remained[-1] >= max(taken.norm(), CLEAR**2 * remained[0]):
                break
            taken = None
        return rows, coordinates

    def _append(self, fresh: Tensor) -> None:
        """More pending rows."""
        length = self._length + len(fresh)
        held = len(self._rows)
        if length > held:
            more = self._rows.new_empty(min(max(length, 5 * held // 4), self.size) - held, self.size)
            self._rows = torch.cat([self._rows, more])
            self._coefficients = torch.nn.functional.pad(self._coefficients, (0, len(more), 0, len(more)))
        self._rows[self._length : length] = fresh
        self.pending += len(fresh)

    # -- what is known ------------------------------------------------------------------
    def ritz(self) -> Ritz:
        """Of the space of Q."""
        coefficients = self.coefficients
        projected = coefficients[: self.multiplied]
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        rotation = rotation[:, order]
        return Ritz(values[order], rotation, coefficients[self.multiplied :] @ rotation)

    def restart(self, rotation: Tensor) -> None:
        """Keep the Ritz vectors of ``rotation`` (K, k), and the pending rows that their residuals lie in."""
        coefficients, count = self.coefficients, rotation.shape[1]
        projected = rotation.mT @ coefficients[: self.multiplied] @ rotation
        turn, lengths, _ = torch.linalg.svd(coefficients[self.multiplied :] @ rotation)
        noise = torch.finfo(self._rows.dtype).eps * projected.abs().max()
        turn = turn[:, : int((lengths > noise).sum())]
        outside = turn.mT @ coefficients[self.multiplied :] @ rotation
        whole = torch.block_diag(rotation, turn).mT.to(self._rows.dtype)
        for part in self._panels():
            self._rows[: len(whole), part] = whole @ self._rows[: self._length, part]
        self.multiplied, self.pending = count, len(outside)
        self._waiting &= self.pending == 1
        self._coefficients.zero_()
        self._coefficients[: self._length, :count] = torch.cat([projected, outside])

    def pairs(self, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """V (R, P), θ (R,) by falling magnitude, C V and ‖C v − θ v‖ (R,), of the span of ``rotation`` (K, R).

        V is orthonormal in float64, whatever Q is.
        """
        turned = rotation.mT.to(self._rows.dtype)
        pictured = (self.coefficients @ rotation).mT.to(self._rows.dtype)
        vectors = torch.empty(len(turned), self.size, dtype=torch.float64)
        images = torch.empty_like(vectors)
        gram, projected = torch.zeros(2, len(turned), len(turned), dtype=torch.float64)
        for part in self._panels():
            vectors[:, part] = turned @ self._rows[: self.multiplied, part]
            images[:, part] = pictured @ self._rows[: self._length, part]
            gram += vectors[:, part] @ vectors[:, part].mT
            projected += vectors[:, part] @ images[:, part].mT
        whitening = torch.linalg.inv(torch.linalg.cholesky(gram))  # of nearly the identity
        projected = whitening @ projected @ whitening.mT
        values, turn = torch.linalg.eigh((projected + projected.mT) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        values, turn = values[order], turn[:, order].mT @ whitening
        squares = torch.zeros_like(values)
        for part in self._panels():
            vectors[:, part], images[:, part] = turn @ vectors[:, part], turn @ images[:, part]
            squares += (images[:, part] - values[:, None] * vectors[:, part]).square().sum(1)
        return vectors, values, images, squares.sqrt()

    def _panels(self) -> Iterator[slice]:
        return (slice(start, start + PANEL) for start in range(0, self.size, PANEL))


def _in_panels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Panels (s, k, PANEL) of the columns of ``rows`` (k, P), and the columns left (k, P mod PANEL); views.

    One product for each panel: few rows with many are bound by memory, of which each core then reads its own.
    """
    whole = rows.shape[1] // PANEL * PANEL
    return rows[:, :whole].unflatten(1, (-1, PANEL)).transpose(0, 1), rows[:, whole:]


def _overlap(held: Tensor, rows: Tensor) -> Tensor:
    """Inner products (K, b) of ``held`` (K, P) with ``rows`` (b, P), in float64 from panel to panel."""
    (panels, rest), (own, own_rest) = _in_panels(held), _in_panels(rows)
    overlap = torch.bmm(own, panels.mT).sum(0, dtype=torch.float64)
    return (overlap + own_rest @ rest.mT).mT


def _subtract(rows: Tensor, coordinates: Tensor, held: Tensor) -> None:
    """Take ``coordinates`` (b, K) with ``held`` (K, P) from ``rows`` (b, P)."""
    (panels, rest), (own, own_rest) = _in_panels(held), _in_panels(rows)
    own.baddbmm_(coordinates.expand(len(own), -1, -1), panels, alpha=-1)
    own_rest.addmm_(coordinates, rest, alpha=-1)


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """U, an orthonormal basis of the ``rows`` (b, P), and A with Aᵀ U = rows, from inner products.

    Those resolve half of the digits, so that rows which are nearly dependent take more than one turn.
    (Stathopoulos & Wu 2002.)
    """
    coordinates, eps = torch.eye(len(rows), dtype=torch.float64), torch.finfo(rows.dtype).eps
    for _ in range(ATTEMPTS):
        squares, turn = torch.linalg.eigh((rows @ rows.mT).to(torch.float64))
        lengths = squares.clamp_min(eps * squares[-1]).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        rows = (turn / lengths).mT.to(rows.dtype) @ rows
        coordinates = lengths[:, None] * turn.mT @ coordinates
        if lengths[0] > CLEAR * lengths[-1]:
            break
    return rows, coordinates
