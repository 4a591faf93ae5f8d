"""Pairs under a diagonal inverse in a Kronecker-factored eigenbasis of each layer.

In bases U_B and U_A of a layer the gradient of sample i is G_i = Σ_t d_t a_tᵀ, with d = U_Bᵀ δ (q)
and a the rotated input (p), and with W = 1/(Λ + λ) (q × p) the layer adds ⟨G_i, W ∘ G_j⟩ to a score.
A row holds d and a of every layer of few positions, and their products go term by term
(:mod:`~dask_influence.core.expansion`). A layer whose positions are so many that G is the smaller is
held as G, of which the test side is multiplied by the layer's part of the inverse; an embedding as d
and indices, which pick rows of W. Parameters in no layer add nothing.

Notation: N test and n training samples, L values of λ, T positions, g groups, q × p the matrix of one group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from dask_influence.core.capture import Captured
from dask_influence.core.derived import derived
from dask_influence.core.expansion import Expansion, typical_products
from dask_influence.core.gemm import product
from dask_influence.core.layers import Layer, Layout
from dask_influence.core.objective import Tree
from dask_influence.core.pairs import Form, PairScores, formed, trusted
from dask_influence.core.problem import Problem
from dask_influence.core.sizes import BUDGET, Size
from dask_influence.core.watching import watched


@dataclass(frozen=True, eq=False)
class Factored:
    """One layer's part of the curvature.

    Attributes
    ----------
    path : str
        Of the layer.
    inputs, outputs : Tensor
        U_A (g, p, p) and U_B (g or 1, q, q), float64.
    eigenvalues : Tensor
        Λ (g, q, p), float64.
    """

    path: str
    inputs: Tensor
    outputs: Tensor
    eigenvalues: Tensor


@dataclass(frozen=True, eq=False)
class Kronecker(Form):
    """(U (Λ + λ) Uᵀ)⁻¹ layer by layer, at L values of λ.

    Attributes
    ----------
    layers : tuple of Factored
        Of every layer in θ; none where only sizes are asked for.
    regularizations : tuple of float
        λ.
    """

    layers: tuple[Factored, ...]
    regularizations: tuple[float, ...]

    @property
    def rank(self) -> int:
        """No projections."""
        return 0

    def joined(self, others: Sequence[Self]) -> Self:
        """The same layers at all λ."""
        values = (value for one in (self, *others) for value in one.regularizations)
        return type(self)(self.layers, tuple(values))

    def size(self, problem: Problem) -> Size:
        """From the layers' shapes alone."""
        parts, dtype = _parts(problem), _dtype(problem)
        return Size(
            sum(part.width for part in parts),
            sum(part.products for part in parts),
            dtype.itemsize,
            sum(part.rotated for part in parts),
            sum(part.held_bytes(dtype.itemsize) for part in parts),
        )

    def pairs(self, problem: Problem) -> KroneckerPairs:
        """Parts of the layers that the model calls."""
        return KroneckerPairs(problem, self)

    def report(self, problem: Problem) -> dict[str, Any]:
        """Each layer's expansion, and ε of |score error| ≤ ε √(s_ii s_jj), at the first λ."""
        like = torch.empty(0, dtype=_dtype(problem))
        index = {layer.path: i for i, layer in enumerate(self.layers)}
        paths = [part.layer.path for part in _parts(problem) if isinstance(part, _Rotated)]
        found = {path: self.expansion(index[path], 0, like) for path in paths}
        return {
            "score_bound": max((expansion.bound for expansion in found.values()), default=0.0),
            "score_terms": {path: expansion.terms for path, expansion in found.items()},
            "score_products": {path: expansion.multiplications for path, expansion in found.items()},
        }

    def weights(self, index: int, at: int) -> Tensor:
        """W (g, q, p) of a layer at one λ, float64."""
        return 1 / (self.layers[index].eigenvalues + self.regularizations[at])

    def expansion(self, index: int, at: int, like: Tensor) -> Expansion:
        """Of W, for a layer of one group, in the dtype and on the device of ``like``; made once in a process."""
        values, regularization = self.layers[index].eigenvalues, self.regularizations[at]
        dtype, device = like.dtype, like.device

        def make() -> Expansion:
            return Expansion.of(values[0] + regularization, dtype).to(device)

        return derived(values, ("expansion", regularization, dtype, device), make)

    def bases(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """U_A and U_B of a layer in the dtype and on the device of ``like``; made once in a process."""
        layer = self.layers[index]
        return _basis(layer.inputs, like), _basis(layer.outputs, like)


def _basis(basis: Tensor, like: Tensor) -> Tensor:
    # torch's own memory, in order: the same wherever the bases came from, hence the same bits
    dtype, device = like.dtype, like.device

    def make() -> Tensor:
        return basis.to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    return derived(basis, ("basis", dtype, device), make)


class KroneckerPairs(PairScores):
    """Rows of samples, and the products of them.

    Parameters
    ----------
    problem : Problem
        With a pairing.
    form : Kronecker
        Bases and eigenvalues.
    """

    def __init__(self, problem: Problem, form: Kronecker) -> None:
        self.form, self.dtype, self.score_dtype = form, _dtype(problem), problem.objective.dtype
        self._like = torch.empty(0, 0, dtype=self.dtype, device=problem.objective.device)
        self.directions = self._like
        index = {layer.path: i for i, layer in enumerate(form.layers)}
        self.parts = _parts(problem)
        self._layout = Layout(tuple(part.layer for part in self.parts), ())
        for part in self.parts:
            part.of(form, index[part.layer.path])

    def rows(self, problem: Problem, x: Tree, y: Tree) -> Tensor:
        """The numbers of every part, (n, W)."""
        found = [
            torch.cat([part.held(one, self._like) for part, one in zip(self.parts, seen, strict=True)], dim=1)
            for seen in watched(problem, x, y, self._layout)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _split(self, rows: Tensor) -> list[Tensor]:
        return list(rows.split([part.width for part in self.parts], dim=1))

    def weighted(self, rows: Tensor) -> Tensor:
        """What the test side of a score is, (n·L, W), the λ running fastest."""
        copies = [
            torch.cat(
                [part.weighted(own, at) for part, own in zip(self.parts, self._split(rows), strict=True)],
                dim=1,
            )
            for at in range(len(self.form.regularizations))
        ]
        return torch.stack(copies, dim=1).flatten(0, 1)

    def scores(self, tests: Tensor, trains: Tensor) -> Tensor:
        """Scores (N, n) of :meth:`weighted` rows (N, W), whole test points of them, and rows (n, W)."""
        count = len(self.form.regularizations)
        total = tests.new_zeros(len(tests), len(trains))
        others = self._split(trains)
        for at in range(count):
            for part, left, right in zip(self.parts, self._split(tests[at::count]), others, strict=True):
                total[at::count] += part.inner(left, right, at)
        return total.to(self.score_dtype)

    def alone(self, rows: Tensor) -> Tensor:
        """Scores (L, n) of each of n samples on itself, from rows (n, W)."""
        found = [
            sum(
                (part.alone(own, at) for part, own in zip(self.parts, self._split(rows), strict=True)),
                rows.new_zeros(()),
            )
            for at in range(len(self.form.regularizations))
        ]
        return torch.stack(found).to(self.score_dtype)


def _dtype(problem: Problem) -> torch.dtype:
    return torch.promote_types(problem.objective.dtype, torch.float32)


# -- what is held of one layer ---------------------------------------------------------
class _Part(ABC):
    """One layer: ``width`` numbers of each sample."""

    width: int
    products: int
    """Multiplications of one pair of samples, about."""
    rotated: int
    """Multiplications that bring one sample into the bases."""
    form: Kronecker
    index: int

    def __init__(self, layer: Layer, positions: int) -> None:
        self.layer, self.positions = layer, positions

    def of(self, form: Kronecker, index: int) -> None:
        """The layer's own numbers."""
        self.form, self.index = form, index

    def held_bytes(self, itemsize: int) -> int:
        """Bases and eigenvalues, and the bases in the dtype of rows."""
        layer = self.layer
        groups = 1 if layer.indexed else layer.groups
        bases = layer.groups * layer.width**2 + groups * layer.rows**2
        return (8 + itemsize) * bases + 8 * layer.size

    @abstractmethod
    def held(self, seen: Captured, like: Tensor) -> Tensor:
        """The numbers of n samples, (n, width), in dtype and on device of ``like``."""

    def weighted(self, rows: Tensor, at: int) -> Tensor:
        """Rows of the test side, for :meth:`inner`."""
        return rows

    @abstractmethod
    def inner(self, left: Tensor, right: Tensor, at: int) -> Tensor:
        """⟨G_i, W ∘ G_j⟩ of weighted rows (N, width) and rows (n, width): (N, n)."""

    @abstractmethod
    def alone(self, rows: Tensor, at: int) -> Tensor:
        """⟨G_j, W ∘ G_j⟩ of rows (n, width): (n,)."""

    def _weights(self, at: int, like: Tensor) -> Tensor:
        return self.form.weights(self.index, at).to(like)


class _Rotated(_Part):
    """d (T, q) and a (T, p) in one group, of few positions."""

    def __init__(self, layer: Layer, positions: int) -> None:
        super().__init__(layer, positions)
        self._split = positions * layer.rows
        self.width = positions * (layer.rows + layer.width)
        self.products = positions**2 * typical_products(layer.rows, layer.width)
        self.rotated = positions * (layer.rows**2 + layer.width**2)

    def held(self, seen: Captured, like: Tensor) -> Tensor:
        inputs, outputs = (basis[0] for basis in self.form.bases(self.index, like))
        d = product(seen.derivatives[:, 0, :, 0].to(like), outputs)
        a = rotated_inputs(self.layer, seen.inputs[:, :, 0].to(like), inputs)
        return torch.cat([d.flatten(1), a.flatten(1)], dim=1)

    def _sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """d (n·T, q) and a (n·T, p)."""
        if self.positions == 1:
            return rows[:, : self._split], rows[:, self._split :]
        d, a = rows[:, : self._split], rows[:, self._split :]
        return d.reshape(-1, self.layer.rows), a.reshape(-1, self.layer.width)

    def inner(self, left: Tensor, right: Tensor, at: int) -> Tensor:
        expansion = self.form.expansion(self.index, at, right)
        if self.positions == 1:
            return expansion.scores(self._sides(left), self._sides(right))
        step = max(1, BUDGET // (2 * right.element_size() * len(right) * self.positions**2))
        others, parts = self._sides(right), []
        for part in left.split(step):
            products = expansion.scores(self._sides(part), others)
            parts.append(products.reshape(len(part), self.positions, len(right), -1).sum((1, 3)))
        return torch.cat(parts)

    def alone(self, rows: Tensor, at: int) -> Tensor:
        d, a = self._sides(rows)
        weights = self._weights(at, rows)[0]
        if self.positions == 1:
            return ((d.square() @ weights) * a.square()).sum(1)
        step, found = max(1, BUDGET // (2 * rows.element_size() * weights.numel())) * self.positions, []
        for some_d, some_a in zip(d.split(step), a.split(step), strict=True):
            shaped = (side.unflatten(0, (-1, self.positions)) for side in (some_d, some_a))
            found.append((torch.einsum("ntq,ntp->nqp", *shaped).square_() * weights).sum((1, 2)))
        return torch.cat(found)


def rotated_inputs(layer: Layer, inputs: Tensor, basis: Tensor) -> Tensor:
    """U_Aᵀ a of inputs (n, T, p), with the 1 of the bias, for a layer of one group and its U_A (p, p)."""
    if layer.weight is None:
        return basis.expand(*inputs.shape[:2], 1)
    rotated = product(inputs, basis[: layer.columns])
    return rotated if layer.bias is None else rotated.add_(basis[-1])


class _Picked(_Part):
    """d (T, q) and the row of the table that each position picks."""

    def __init__(self, layer: Layer, positions: int) -> None:
        super().__init__(layer, positions)
        self.width = positions * (layer.rows + 1)
        self.products = positions**2 * (layer.rows + 1)
        self.rotated = positions * layer.rows**2

    def held(self, seen: Captured, like: Tensor) -> Tensor:
        _, outputs = self.form.bases(self.index, like)
        d = product(seen.derivatives[:, 0, :, 0].to(like), outputs[0])
        return torch.cat([d.flatten(1), seen.inputs.to(like)], dim=1)

    def _sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """d (n, T, q), zero where a padding row is picked, and what is picked (n, T)."""
        d, ids = rows[:, : -self.positions], rows[:, -self.positions :]
        return d.unflatten(1, (self.positions, -1)) * (ids < self.layer.groups)[..., None], ids

    def weighted(self, rows: Tensor, at: int) -> Tensor:
        d, ids = self._sides(rows)
        picked = self._weights(at, rows)[ids.long().clamp_max(self.layer.groups - 1), :, 0]
        return torch.cat([(d * picked).flatten(1), ids], dim=1)

    def inner(self, left: Tensor, right: Tensor, at: int) -> Tensor:
        step = max(1, BUDGET // (2 * right.element_size() * len(right) * self.positions**2))
        (d, ids), parts = self._sides(right), []
        for part in left.split(step):
            d_left, ids_left = self._sides(part)
            products = product(d_left.flatten(0, 1), d.flatten(0, 1).mT)
            products.mul_(ids_left.reshape(-1, 1) == ids.reshape(1, -1))
            parts.append(products.reshape(len(part), self.positions, len(right), -1).sum((1, 3)))
        return torch.cat(parts)

    def alone(self, rows: Tensor, at: int) -> Tensor:
        (own, ids), (d, _) = self._sides(self.weighted(rows, at)), self._sides(rows)
        return ((own @ d.mT) * (ids[:, :, None] == ids[:, None, :])).sum((1, 2))


class _Formed(_Part):
    """G itself, [weight, bias] flat: where positions are many, or groups."""

    def __init__(self, layer: Layer, positions: int) -> None:
        super().__init__(layer, positions)
        self.width = self.products = layer.size
        self.rotated = 0

    def held(self, seen: Captured, like: Tensor) -> Tensor:
        return formed(self.layer, seen, like)

    def weighted(self, rows: Tensor, at: int) -> Tensor:
        """U_B ((U_Bᵀ G U_A) ∘ W) U_Aᵀ, in the order of G."""
        layer, columns = self.layer, self.layer.columns if self.layer.weight else 0
        inputs, outputs = self.form.bases(self.index, rows)
        sides = rows.tensor_split([layer.groups * layer.rows * columns], dim=1)  # weight and bias
        shaped = [side.reshape(len(rows), layer.groups, layer.rows, -1) for side in sides if side.shape[1]]
        rotated = outputs.mT @ torch.cat(shaped, dim=-1) @ inputs
        solved = outputs @ (rotated * self._weights(at, rows)) @ inputs.mT
        return torch.cat([solved[..., :columns].flatten(1), solved[..., columns:].flatten(1)], dim=1)

    def inner(self, left: Tensor, right: Tensor, at: int) -> Tensor:
        return product(left, right.mT)

    def alone(self, rows: Tensor, at: int) -> Tensor:
        return (self.weighted(rows, at) * rows).sum(1)


def _parts(problem: Problem) -> list[_Part]:
    """Each layer that the model calls."""
    pairing = problem.pairing
    assert pairing is not None
    positions = dict(pairing.layers)
    layers = trusted(problem.objective, pairing).layers
    return [_kind(layer, positions[layer.path])(layer, positions[layer.path]) for layer in layers]


def _kind(layer: Layer, positions: int) -> type[_Part]:
    """How a layer is held: what takes the fewest multiplications for a pair."""
    if layer.indexed:
        return _Picked if positions**2 * (layer.rows + 1) <= layer.size else _Formed
    if layer.groups > 1:
        return _Formed
    products = positions**2 * typical_products(layer.rows, layer.width)
    return _Rotated if positions == 1 or products <= layer.size else _Formed
