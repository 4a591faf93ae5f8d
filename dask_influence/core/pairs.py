"""Pairs: inner products and projections of gradients from layer inputs and output gradients.

The gradient of a sample in a layer is G = Σ_t δ_t a_tᵀ, so that

    ⟨G_i, G_j⟩ = Σ_t Σ_s (δ_it · δ_js)(a_it · a_js),        ⟨V, G_j⟩ = Σ_t δ_jtᵀ V a_jt

take q + p numbers of a sample where G has q·p. An inverse of the form V diag(w) Vᵀ + μI scores a
pair of samples by Σ_r w_r ⟨v_r, g_i⟩ ⟨v_r, g_j⟩ + μ ⟨g_i, g_j⟩: neither gradients nor factors of size
P are formed. A layer whose positions are so many that G is the smaller is held as G, an embedding as
indices and δ, and parameters in no such layer as their gradients by the general way.

A row holds what is known of one sample: its R projections, then layer by layer its numbers. Where V is
orthonormal and the inverse definite, s_jj ≥ min(μ, w_r + μ) ‖g_j‖², so that no part of a score s_ij is larger than

    μ ‖g_i‖ ‖g_j‖ ≤ κ √(s_ii s_jj),        κ = μ / min(μ, w_r + μ).

Σ w_r … and μ ⟨g_i, g_j⟩ cancel by that factor in the span of V. Rows are in the model's own dtype, float32 at
least, where they can afford κ roundoffs; else in float64.

Notation: N test and n training samples, T positions, g groups, q × p the matrix of one group (p with
the bias), R directions, W numbers of a row.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Self

import optree
import torch
from torch import Tensor

from dask_influence.core import double
from dask_influence.core.capture import Captured
from dask_influence.core.factored import CHECKED as FEW
from dask_influence.core.factored import Block, Factored, Span, directions_in
from dask_influence.core.forms import Forms, sample_gradients
from dask_influence.core.gemm import product
from dask_influence.core.layers import Layer, Layout, layout_of
from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.core.problem import Pairing, Problem
from dask_influence.core.sizes import Size
from dask_influence.core.watching import layers_seen, watched
from dask_influence.errors import InfluenceWarning

BUDGET = 64 * 2**20
"""Bytes of what one product makes on its way."""

CHECKED = 4
"""Samples on which a layer's pair is compared with its gradient."""

CANCELLATION = 32.0
"""κ up to which rows have no more digits than the model: its own gradients, as it rounds them, put such scores off by
2 √κ roundoffs."""

BLOCK = 256, 512
"""Test and training samples whose products are added up at a time: what the cache holds."""

NOISE = 16
"""Roundoffs of a whole gradient by which that of a layer may be off."""


# -- what an inverse has to offer -------------------------------------------------------
class Form(ABC):
    """An inverse, at L values of λ, by which pairs of samples are scored without factors."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """R, the projections that a row holds."""

    @abstractmethod
    def joined(self, others: Sequence[Self]) -> Self:
        """Itself and ``others``, of the same fit at other λ, as one."""

    @abstractmethod
    def size(self, problem: Problem) -> Size:
        """Of its rows; known before a fit."""

    @abstractmethod
    def pairs(self, problem: Problem) -> PairScores:
        """What scores the pairs."""

    def report(self, problem: Problem) -> dict[str, Any]:
        """For diagnostics: how far scores of pairs may be from those of factors, where that is not rounding."""
        return {}


class PairScores(ABC):
    """Rows of single samples, and scores of pairs of them.

    Attributes
    ----------
    directions : Tensor or Factored
        Along which rows hold projections, (R, P).
    dtype : torch.dtype
        Of rows.
    """

    directions: Tensor | Factored
    dtype: torch.dtype

    @abstractmethod
    def rows(self, problem: Problem, x: Tree, y: Tree) -> Tensor:
        """What is known of samples, (n, W)."""

    @abstractmethod
    def weighted(self, rows: Tensor) -> Tensor:
        """What the test side of a score is, (n·L, W), the λ running fastest."""

    @abstractmethod
    def scores(self, tests: Tensor, trains: Tensor) -> Tensor:
        """Scores (N, n) of :meth:`weighted` rows (N, W) and rows (n, W)."""

    @abstractmethod
    def alone(self, rows: Tensor) -> Tensor:
        """Scores (L, n) of each of n samples on itself, from rows (n, W)."""


# -- what is held of one layer ---------------------------------------------------------
class _Part(ABC):
    """One layer, or all parameters outside of layers: ``width`` numbers of each sample."""

    width: int
    products: int
    """Multiplications of one pair of samples."""
    written: int = 0
    """Numbers that one projection of a sample makes on its way."""
    made: int = 0
    """Numbers of a sample that projections make on their way, however many there are."""

    @abstractmethod
    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """⟨G_i, G_j⟩ of rows (N, width) and (n, width): (N, n)."""

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add :meth:`inner` to ``total`` (N, n)."""
        total += self.inner(left, right)

    @abstractmethod
    def alone(self, rows: Tensor) -> Tensor:
        """‖G_j‖² of rows (n, width): (n,)."""

    @abstractmethod
    def along(self, rows: Tensor, directions: Tensor) -> Tensor:
        """⟨V_r, G_j⟩ of rows (n, width) and directions (R, P): (n, R)."""

    def scale(self, rows: Tensor, factor: float) -> None:
        """Make G ``factor`` times as large, in place."""
        rows *= factor

    @property
    @abstractmethod
    def spans(self) -> tuple[Span, ...]:
        """Where its parameters are in θ."""

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(stop - start for start, stop in self.spans)

    @abstractmethod
    def moved(self, places: Mapping[Span, Span]) -> Self:
        """The same for directions that have its spans at other ``places``."""


class _LayerPart(_Part):
    """A layer that is captured."""

    def __init__(self, layer: Layer, weight: Span | None, bias: Span | None) -> None:
        self.layer, self.weight, self.bias = layer, weight, bias

    @property
    def spans(self) -> tuple[Span, ...]:
        return tuple(span for span in (self.weight, self.bias) if span is not None)

    def moved(self, places: Mapping[Span, Span]) -> Self:
        other = copy.copy(self)
        other.weight, other.bias = (
            None if span is None else places[span] for span in (self.weight, self.bias)
        )
        return other

    @abstractmethod
    def hold(self, seen: Captured, rows: Tensor) -> None:
        """Write the numbers of n samples to ``rows`` (n, width), in whose dtype and on whose device they are held."""

    def held(self, seen: Captured, like: Tensor) -> Tensor:
        """The numbers of n samples, (n, width), in dtype and on device of ``like``."""
        rows = like.new_empty(len(seen.inputs), self.width)
        self.hold(seen, rows)
        return rows


class Product(_LayerPart):
    """δ (T, q) and a (T, p): one matrix of few positions."""

    def __init__(self, layer: Layer, positions: int, weight: Span | None, bias: Span | None) -> None:
        super().__init__(layer, weight, bias)
        self.positions = positions
        self._split = positions * layer.rows
        self.width = positions * (layer.rows + layer.width)
        self.products = positions**2 * (layer.rows + layer.width)
        self.written = min(layer.rows, layer.columns) if positions == 1 else 0
        self.made = 0 if positions == 1 else layer.size

    def hold(self, seen: Captured, rows: Tensor) -> None:
        """δ, then a with the 1 of the bias."""
        delta, inputs = self.sides(rows)
        delta.copy_(seen.derivatives[:, 0, :, 0])
        columns = self.layer.columns if self.weight is not None else 0
        if columns:
            inputs[..., :columns] = seen.inputs[:, :, 0]
        inputs[..., columns:] = 1.0

    def scale(self, rows: Tensor, factor: float) -> None:
        """Make G ``factor`` times as large."""
        rows[:, : self._split] *= factor

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """δ (n, T, q) and a (n, T, p)."""
        delta, inputs = (half.unflatten(1, (self.positions, -1)) for half in self._halves(rows))
        return delta, inputs

    def _halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, : self._split], rows[:, self._split :]

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """⟨G_i, G_j⟩ of rows (N, width) and (n, width): (N, n)."""
        if self.positions == 1:
            delta, inputs = self._both(left, right)
            return delta.mul_(inputs)
        step = max(1, BUDGET // (2 * right.element_size() * len(right) * self.positions**2))
        (d, a), parts = self.sides(right), []
        for part in left.split(step):
            d_left, a_left = self.sides(part)
            products = product(d_left.flatten(0, 1), d.flatten(0, 1).mT)
            products.mul_(product(a_left.flatten(0, 1), a.flatten(0, 1).mT))
            parts.append(products.reshape(len(part), self.positions, len(right), -1).sum((1, 3)))
        return torch.cat(parts)

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """Add :meth:`inner` to ``total`` (N, n)."""
        if self.positions > 1:
            super().add(total, left, right)
            return
        total.addcmul_(*self._both(left, right))

    def _both(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """δ_i · δ_j and a_i · a_j of single positions, (N, n) each."""
        (d_left, a_left), (d, a) = self._halves(left), self._halves(right)
        return product(d_left, d.mT), product(a_left, a.mT)

    def alone(self, rows: Tensor) -> Tensor:
        """‖G_j‖² of rows (n, width): (n,)."""
        if self.positions == 1:
            delta, inputs = (half.square().sum(1) for half in self._halves(rows))
            return delta * inputs
        delta, inputs = self.sides(rows)
        return ((delta @ delta.mT) * (inputs @ inputs.mT)).sum((1, 2))

    def along(self, rows: Tensor, directions: Tensor) -> Tensor:
        """⟨V_r, G_j⟩ of rows (n, width) and directions (R, P): (n, R)."""
        step = _step(self._bytes(rows, directions))
        return torch.cat([self._along(part, directions) for part in rows.split(step)])

    def factored(self, rows: Tensor, block: Block) -> Tensor:
        """⟨V_r, G_j⟩ of directions in factors: (n, R)."""
        parts = rows.split(_step(rows.element_size() * block.written))
        return torch.cat([block.along(*self.sides(part)) for part in parts])

    def matrices(self, directions: Tensor) -> Tensor:
        """The layer's blocks of directions (R, P), with the column of the bias: (R, q, p)."""
        shaped = (directions[:, slice(*span)].unflatten(1, (self.layer.rows, -1)) for span in self.spans)
        return torch.cat(list(shaped), dim=2)

    def put(self, matrices: Tensor, vectors: Tensor) -> None:
        """Write ``matrices`` (K, q, p) to where the layer's parameters are in ``vectors`` (K, P)."""
        columns = [self.layer.width] if len(self.spans) == 1 else [self.layer.columns, 1]
        for span, part in zip(self.spans, matrices.split(columns, dim=2), strict=True):
            vectors[:, slice(*span)] = part.flatten(1)

    def _bytes(self, rows: Tensor, directions: Tensor) -> int:
        """What :meth:`_along` makes of one sample."""
        each = len(directions) * self.written if self.positions == 1 else self.layer.size
        return rows.element_size() * each

    def _along(self, rows: Tensor, directions: Tensor) -> Tensor:
        delta, inputs = self.sides(rows)
        total = torch.zeros(len(directions), len(rows), dtype=rows.dtype, device=rows.device)
        if self.bias is not None:
            total += directions[:, slice(*self.bias)] @ delta.sum(1).mT
        if self.weight is not None:
            matrices = directions[:, slice(*self.weight)].unflatten(1, (self.layer.rows, -1))  # (R, q, p)
            inputs = inputs[..., : self.layer.columns]
            if self.positions > 1:
                formed = torch.einsum("ntq,ntp->nqp", delta, inputs).flatten(1)
                total += product(matrices.flatten(1), formed.mT)
            elif self.layer.rows <= self.layer.columns:  # the longer side is the one to contract first
                total += product(matrices, inputs[:, 0].mT).mul_(delta[:, 0].mT).sum(1)
            else:
                total += product(matrices.mT, delta[:, 0].mT).mul_(inputs[:, 0].mT).sum(1)
        return total.mT


class _Picked(_LayerPart):
    """δ (T, q) and the row of the table that each position picks, in a matrix of few positions."""

    def __init__(self, layer: Layer, positions: int, weight: Span | None, bias: Span | None) -> None:
        super().__init__(layer, weight, bias)
        self.positions = positions
        self.width = positions * (layer.rows + 1)
        self.products = positions**2 * (layer.rows + 1)

    def hold(self, seen: Captured, rows: Tensor) -> None:
        rows[:, : -self.positions] = seen.derivatives[:, 0].flatten(1)
        rows[:, -self.positions :] = seen.inputs

    def scale(self, rows: Tensor, factor: float) -> None:
        rows[:, : -self.positions] *= factor

    def sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """δ (n, T, q), zero where a padding row is picked, and what is picked (n, T)."""
        delta, ids = rows[:, : -self.positions], rows[:, -self.positions :]
        picks = (ids < self.layer.groups)[..., None]
        return delta.unflatten(1, (self.positions, -1)) * picks, ids

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        step = max(1, BUDGET // (2 * right.element_size() * len(right) * self.positions**2))
        (delta, ids), parts = self.sides(right), []
        for part in left.split(step):
            delta_left, ids_left = self.sides(part)
            products = product(delta_left.flatten(0, 1), delta.flatten(0, 1).mT)
            products.mul_(ids_left.reshape(-1, 1) == ids.reshape(1, -1))
            parts.append(products.reshape(len(part), self.positions, len(right), -1).sum((1, 3)))
        return torch.cat(parts)

    def alone(self, rows: Tensor) -> Tensor:
        delta, ids = self.sides(rows)
        return ((delta @ delta.mT) * (ids[:, :, None] == ids[:, None, :])).sum((1, 2))

    def along(self, rows: Tensor, directions: Tensor) -> Tensor:
        assert self.weight is not None
        table = directions[:, slice(*self.weight)].unflatten(1, (self.layer.groups, -1))  # (R, g, q)
        step = _step(rows.element_size() * len(directions) * self.positions * self.layer.rows)
        parts = []
        for part in rows.split(step):
            delta, ids = self.sides(part)
            places = ids.long().clamp_max(self.layer.groups - 1)
            parts.append(torch.einsum("rntq,ntq->nr", table[:, places], delta))
        return torch.cat(parts)


class _Matrix(_LayerPart):
    """G itself, [weight, bias] flat: where positions are many, or groups."""

    def __init__(self, layer: Layer, weight: Span | None, bias: Span | None) -> None:
        super().__init__(layer, weight, bias)
        self.width = self.products = layer.size

    def hold(self, seen: Captured, rows: Tensor) -> None:
        rows.copy_(formed(self.layer, seen, rows))

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right.mT)

    def alone(self, rows: Tensor) -> Tensor:
        return rows.square().sum(1)

    def along(self, rows: Tensor, directions: Tensor) -> Tensor:
        return _along_spans(rows, directions, self.spans)


def formed(layer: Layer, seen: Captured, like: Tensor) -> Tensor:
    """G of n samples, [weight, bias] flat, in dtype and on device of ``like``."""
    delta = seen.derivatives[:, 0].to(like)
    parts = []
    if layer.weight is not None:
        parts.append(_weight(layer, delta, seen.inputs).flatten(1))
    if layer.bias is not None:
        parts.append(delta.sum(1).flatten(1))
    return torch.cat(parts, dim=1)


def _weight(layer: Layer, delta: Tensor, inputs: Tensor) -> Tensor:
    """Σ_t δ_t a_tᵀ, (n, g, q, p)."""
    if not layer.indexed:
        return torch.einsum("ntgq,ntgp->ngqp", delta, inputs.to(delta))
    shape = (len(delta), layer.groups + 1, layer.rows)  # a padding row picks the last
    total = torch.zeros(shape, dtype=delta.dtype, device=delta.device)
    index = inputs[..., None].expand(-1, -1, layer.rows)
    return total.scatter_add_(1, index, delta[:, :, 0])[:, : layer.groups]


class _Rest(_Part):
    """Gradients of the parameters that are in no layer, by the general way."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = tuple(spans)
        self.width = self.products = sum(stop - start for start, stop in spans)

    @property
    def spans(self) -> tuple[Span, ...]:
        return self._spans

    def moved(self, places: Mapping[Span, Span]) -> Self:
        return type(self)([places[span] for span in self._spans])

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        return product(left, right.mT)

    def alone(self, rows: Tensor) -> Tensor:
        return rows.square().sum(1)

    def along(self, rows: Tensor, directions: Tensor) -> Tensor:
        return _along_spans(rows, directions, self.spans)


def _along_spans(rows: Tensor, directions: Tensor, spans: Sequence[Span]) -> Tensor:
    ends = list(accumulate((stop - start for start, stop in spans), initial=0))
    parts = (
        product(rows[:, low:high], directions[:, slice(*span)].mT)
        for span, (low, high) in zip(spans, pairwise(ends), strict=True)
    )
    return sum(parts, torch.zeros(len(rows), len(directions), dtype=rows.dtype, device=rows.device))


def _step(nbytes: int) -> int:
    """Samples at a time that take ``nbytes`` each."""
    return max(1, BUDGET // max(1, nbytes))


# -- all of θ --------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Spectral(Form):
    """An inverse V diag(w) Vᵀ + μI, at L values of λ.

    Attributes
    ----------
    directions : Tensor or Factored
        V as rows (R, P), float64.
    weights : Tensor
        w (L, R).
    plain : Tensor
        μ (L,).
    """

    directions: Tensor | Factored
    weights: Tensor
    plain: Tensor

    @classmethod
    def foreseen(cls, rank: int, size: int) -> Self:
        """Without numbers: R directions in θ of size P."""
        directions = torch.empty(rank, size, device="meta")
        return cls(directions, torch.ones(1, rank), torch.ones(1))

    @property
    def rank(self) -> int:
        """R."""
        return len(self.directions)

    def joined(self, others: Sequence[Self]) -> Self:
        """The same directions, the weights of all λ."""
        weights, plain = (
            torch.cat([getattr(one, name) for one in (self, *others)]) for name in ("weights", "plain")
        )
        return type(self)(self.directions, weights, plain)

    def size(self, problem: Problem) -> Size:
        """From the number of directions alone."""
        return Pairs(problem, torch.empty(self.rank, 0)).size

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """The narrowest dtype of rows in which scores of a model of ``dtype`` keep their digits."""
        narrow, plain = _narrow(dtype), self.plain[:, None]
        least = torch.cat([plain, plain + self.weights], dim=1).amin(1)
        allowed = CANCELLATION * torch.finfo(dtype).eps / torch.finfo(narrow).eps
        affordable = (least > 0) & (self.plain <= allowed * least)
        return narrow if bool(affordable.all()) else torch.float64

    def pairs(self, problem: Problem) -> SpectralPairs:
        """Parts of θ, with projections."""
        return SpectralPairs(problem, self)


def _narrow(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Pairs:
    """θ as parts of which pairs of samples are multiplied.

    Parameters
    ----------
    problem : Problem
        With a pairing.
    directions : Tensor or Factored
        V as rows (R, P); R may be 0.
    dtype : torch.dtype, optional
        Of rows; by default float64 where there are directions.
    """

    def __init__(
        self, problem: Problem, directions: Tensor | Factored, dtype: torch.dtype | None = None
    ) -> None:
        pairing, objective = problem.pairing, problem.objective
        assert pairing is not None
        self.rank = len(directions)
        self.dtype = dtype or (torch.float64 if self.rank else _narrow(objective.dtype))
        self.score_dtype = objective.dtype
        self.directions = directions_in(directions, self.dtype, objective.device)
        self._like = torch.empty(0, dtype=self.dtype, device=objective.device)
        self.layout = trusted(objective, pairing)
        spans = _spans(objective)
        held = {name for layer in self.layout.layers for name in (layer.weight, layer.bias)}
        self.rest = tuple(name for name in objective.names if name not in held)
        positions = dict(pairing.layers)
        layers = [_part(layer, positions[layer.path], spans) for layer in self.layout.layers]
        self._layers: list[_LayerPart] = layers
        self.parts: list[_Part] = [*layers]
        if self.rest:
            self.parts.append(_Rest([spans[name] for name in self.rest]))
        self._moved = self.parts
        if isinstance(self.directions, Factored):
            blocks, places = self.directions.blocks, self.directions.places()
            self._moved = [
                part if isinstance(part, Product) and part.layer.path in blocks else part.moved(places)
                for part in self.parts
            ]

    @property
    def size(self) -> Size:
        """Of its rows."""
        return Size(
            self.rank + sum(part.width for part in self.parts),
            self.rank + sum(part.products for part in self.parts),
            self.dtype.itemsize,
        )

    @property
    def written(self) -> int:
        """Numbers that one projection of a sample makes on its way."""
        return sum(part.written for part in self.parts)

    @property
    def made(self) -> int:
        """Numbers of a sample that projections make on their way, however many there are."""
        return sum(part.made for part in self.parts)

    # -- rows -------------------------------------------------------------------------
    def rows(self, problem: Problem, x: Tree, y: Tree) -> Tensor:
        """⟨v_r, g_j⟩ and the numbers of every part, (n, W)."""
        rows = self._like.new_empty(leading_size(y), self.size.numbers)
        parts = [own for _, own in self._split(rows)]
        self._hold(problem, x, y, parts)
        if self.rank:
            rows[:, : self.rank] = self._along(parts)
        return rows

    def projections(self, problem: Problem, x: Tree, y: Tree) -> Tensor:
        """⟨v_r, g_j⟩ alone, (n, R)."""
        return self._along(self.held(problem, x, y))

    def witnessed(self, problem: Problem, x: Tree, y: Tree, others: Tensor) -> Tensor:
        """⟨v_r, g_j⟩, ⟨w_k, g_j⟩ for ``others`` (K, P) beside the directions, and ‖g_j‖²: (n, R + K + 1)."""
        parts = self.held(problem, x, y)
        squares = sum(
            (part.alone(own) for part, own in zip(self.parts, parts, strict=True)), self._like.new_zeros(())
        )
        return torch.cat([self._along(parts), self._dense_along(parts, others), squares[:, None]], dim=1)

    @property
    def dense(self) -> Tensor:
        """V (R, P), in dtype and on device of rows."""
        whole = self.directions.dense() if isinstance(self.directions, Factored) else self.directions
        return whole.to(self._like)

    def _along(self, parts: Sequence[Tensor]) -> Tensor:
        directions = self.directions
        if not isinstance(directions, Factored):
            return self._dense_along(parts, directions)
        found = self._like.new_zeros(())
        for part, rows in zip(self._moved, parts, strict=True):
            if isinstance(part, Product) and part.layer.path in directions.blocks:
                found = found + part.factored(rows, directions.blocks[part.layer.path])
            else:
                found = found + part.along(rows, directions.rest)
        count = len(found)
        few = torch.linspace(0, count - 1, min(FEW, count), device=found.device).long()
        left_out = self._dense_along([rows[few] for rows in parts], directions.left_out)
        if directions.agrees(found[few], left_out):
            return found
        warnings.warn(
            InfluenceWarning(
                f"projections of {count} samples on factored directions are off by more than direction_tol "
                "allows, since these samples differ from the data fitted; they are computed from the directions "
                "themselves, which is slower and right"
            ),
            stacklevel=2,
        )
        return self._dense_along(parts, self.dense)

    def _dense_along(self, parts: Sequence[Tensor], directions: Tensor) -> Tensor:
        along = (part.along(rows, directions) for part, rows in zip(self.parts, parts, strict=True))
        return sum(along, self._like.new_zeros(()))

    def held(self, problem: Problem, x: Tree, y: Tree) -> list[Tensor]:
        """The numbers of every part."""
        parts = [self._like.new_empty(leading_size(y), part.width) for part in self.parts]
        self._hold(problem, x, y, parts)
        return parts

    def _hold(self, problem: Problem, x: Tree, y: Tree, parts: Sequence[Tensor]) -> None:
        """Write the numbers of every part where they are to be held."""
        if self._layers:
            start = 0
            for seen in watched(problem, x, y, self.layout):
                stop = start + len(seen[0].inputs)
                for part, one, rows in zip(self._layers, seen, parts, strict=False):
                    part.hold(one, rows[start:stop])
                start = stop
        if self.rest:
            own = Objective(problem.objective.module, problem.objective.loss, self.rest)
            parts[-1].copy_(sample_gradients(own, x, y, problem.forms))

    def _split(self, rows: Tensor) -> Iterator[tuple[_Part, Tensor]]:
        start = self.rank
        for part in self.parts:
            yield part, rows[:, start : start + part.width]
            start += part.width

    # -- scores -----------------------------------------------------------------------
    def scores(self, tests: Tensor, trains: Tensor) -> Tensor:
        """Products (N, n) of rows (N, W) and rows (n, W), projections included."""
        total = torch.empty(len(tests), len(trains), dtype=self.score_dtype, device=tests.device)
        for left, across in zip(tests.split(BLOCK[0]), total.split(BLOCK[0]), strict=True):
            for right, scores in zip(trains.split(BLOCK[1]), across.split(BLOCK[1], dim=1), strict=True):
                scores.copy_(self._products(left, right))
        return total

    def _products(self, tests: Tensor, trains: Tensor) -> Tensor:
        total = product(tests[:, : self.rank], trains[:, : self.rank].mT)
        for (part, left), (_, right) in zip(self._split(tests), self._split(trains), strict=True):
            part.add(total, left, right)
        return total


class SpectralPairs(Pairs, PairScores):
    """Pairs under an inverse V diag(w) Vᵀ + μI."""

    def __init__(self, problem: Problem, form: Spectral) -> None:
        super().__init__(problem, form.directions, form.precision(problem.objective.dtype))
        self.form = form

    def weighted(self, rows: Tensor) -> Tensor:
        """w ∘ projections and μ G, (n·L, W), the λ running fastest."""
        copies = rows[:, None].repeat(1, len(self.form.plain), 1)
        for at, (weights, plain) in enumerate(zip(self.form.weights, self.form.plain.tolist(), strict=True)):
            copies[:, at, : self.rank] *= weights.to(rows)
            for part, own in self._split(copies[:, at]):
                part.scale(own, plain)
        return copies.flatten(0, 1)

    def alone(self, rows: Tensor) -> Tensor:
        """Σ_r w_r ⟨v_r, g_j⟩² + μ ‖g_j‖², (L, n)."""
        form, squares = self.form, rows[:, : self.rank].square()
        plain = sum((part.alone(own) for part, own in self._split(rows)), rows.new_zeros(()))
        total = form.weights.to(rows) @ squares.mT + form.plain.to(rows)[:, None] * plain
        return total.to(self.score_dtype)


def _spans(objective: Objective) -> dict[str, Span]:
    """Where each parameter is in θ."""
    ends = list(accumulate(objective.sizes, initial=0))
    return dict(zip(objective.names, pairwise(ends), strict=True))


def trusted(objective: Objective, pairing: Pairing) -> Layout:
    """The layers of a pairing."""
    known = dict(pairing.layers)
    return Layout(tuple(layer for layer in layout_of(objective).layers if layer.path in known), ())


def _part(layer: Layer, positions: int, spans: dict[str, Span]) -> _LayerPart:
    """The part of a layer that takes the fewest multiplications for a pair."""
    weight = bias = None
    if layer.weight is not None:
        start = spans[layer.weight][0] + layer.key[1] * layer.columns
        weight = start, start + layer.groups * layer.rows * layer.columns
    if layer.bias is not None:
        start = spans[layer.bias][0] + layer.bias_start
        bias = start, start + layer.groups * layer.rows
    if layer.indexed and positions**2 * (layer.rows + 1) <= layer.size:
        return _Picked(layer, positions, weight, bias)
    if layer.groups == 1 and positions**2 * (layer.rows + layer.width) <= layer.size:
        return Product(layer, positions, weight, bias)
    return _Matrix(layer, weight, bias)


# -- which layers may be taken so ------------------------------------------------------
def paired(problem: Problem, x: Tree, y: Tree) -> tuple[Problem, dict[str, Any]]:
    """The problem with the layers whose pairs agree with the gradient on a few samples, those of the steepest loss.

    Of a layer whose gradients are zero in all of these nothing is known; it is differentiated by the general way.

    Returns
    -------
    Problem
        Without a pairing where the model's layers cannot be watched, or none agrees.
    dict
        JSON-able: the layers taken, and why others are not.

    Warns
    -----
    InfluenceWarning
        A layer's parameters act otherwise than through its own kind of call; they are
        differentiated by the general way.
    """
    objective = problem.objective
    layout = layout_of(objective)
    try:
        few = double.slopes(objective, x, y).nan_to_num(-1.0).argsort(descending=True, stable=True)[:CHECKED]
        x, y = sliced(x, few), sliced(y, few)
        captured = next(layers_seen(problem, x, y, layout))
    except Exception as error:  # noqa: BLE001 - the user's own code runs in here
        return problem, {"layers": [], "reason": f"{type(error).__name__}: {error}"[:200]}
    # one by one: by nothing that layers are watched by
    true = sample_gradients(objective, x, y, Forms(gradient="loop")).to(torch.float64)
    spans = _spans(objective)
    agreeing: list[tuple[str, int]] = []
    differing: list[tuple[str, int]] = []
    unknown: list[str] = []
    for layer, one in zip(layout.layers, captured, strict=True):
        if one is None:  # never called: its gradient is zero by the general way
            continue
        positions = one.inputs.shape[1]
        part, own = _part(layer, positions, spans), true[: len(one.inputs)]
        if not _gathered(own, part).any():  # 0 = 0 tells nothing
            unknown.append(layer.path)
            continue
        agrees = _agrees(part, one, own, objective.dtype)
        (agreeing if agrees else differing).append((layer.path, positions))
    if differing:
        names = ", ".join(path for path, _ in differing)
        warnings.warn(
            InfluenceWarning(
                f"the gradient of layer {names} is not the product of its inputs and output gradients, as where its "
                "parameters are used in another way too; it is formed instead, which is slower and right"
            ),
            stacklevel=2,
        )
    report = {"layers": [path for path, _ in agreeing], "formed": [path for path, _ in differing] + unknown}
    if not agreeing:
        return problem, report
    shapes = tuple(tuple(leaf.shape[1:]) for leaf in optree.tree_leaves(x))
    return replace(problem, pairing=Pairing(tuple(agreeing), shapes)), report


def _agrees(part: _LayerPart, seen: Captured, true: Tensor, dtype: torch.dtype) -> bool:
    """Whether the layer's G, its inner products and its projections are those of gradients ``true`` (n, P)."""
    expected, held = _gathered(true, part), part.held(seen, true)
    allowed = rounding(expected, true, dtype)
    products = expected @ expected.mT
    ways = [(part.inner(held, held), products), (part.along(held, true), products)]
    ways.append((part.alone(held), products.diagonal()))
    return bool((formed(part.layer, seen, true) - expected).norm() <= allowed) and all(
        (found - known).norm() <= 2 * allowed * expected.norm() for found, known in ways
    )


def rounding(own: Tensor, whole: Tensor, dtype: torch.dtype) -> float:
    """How far the gradients of a layer may be from ``own``, a part of ``whole``: half of their digits.

    However small they are beside the others, but for what those leave of them in rounding.
    """
    digits = float(torch.finfo(dtype).eps) ** 0.5
    return digits * min(float(whole.norm()), float(own.norm()) + NOISE * digits * float(whole.norm()))


def _gathered(gradients: Tensor, part: _LayerPart) -> Tensor:
    return torch.cat([gradients[:, slice(*span)] for span in part.spans], dim=1)
