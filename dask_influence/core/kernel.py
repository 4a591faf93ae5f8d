"""Scores straight from layer inputs and output gradients, where the inverse is a diagonal by layers.

In bases U_B and U_A of a layer the gradient of sample i is G_i = Σ_t d_t a_tᵀ, with d = U_Bᵀ δ (q)
and a the rotated input (p), and with the diagonal W (q × p) the layer adds ⟨G_i, W ∘ G_j⟩ to a score.
No gradient and no factor of size P is formed: with one position and one group the layer adds
d_jᵀ (W ∘ d_i a_iᵀ) a_j, a matrix product of all a_j with all W ∘ d_i a_iᵀ. (W itself is no low-rank
matrix at the precision of a dtype: the corrected eigenvalues are means over samples, not products.)

Notation: N test and n training samples, T positions, g groups, q × p the matrix of one group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from dask_influence.core.capture import Captured, capture
from dask_influence.core.layers import Layer, Layout, layout_of
from dask_influence.core.objective import Tree
from dask_influence.core.predictive import Expectation
from dask_influence.core.problem import Problem
from dask_influence.core.sizes import BUDGET

MATRIX_SHARE = 4
"""Of several positions or groups a layer's G is held, if it is at most so many times as large as a and δ."""

Part = tuple[Tensor, ...]
"""One layer of n samples: d (n, q) and a (n, p); or G alone, (n, gqp); or nothing where it is never called."""


@dataclass(frozen=True)
class Diagonal:
    """One layer's part of an inverse, and how it multiplies a pair of samples.

    Attributes
    ----------
    layer : Layer
        Which one.
    inputs, outputs : Tensor
        U_A (g, p, p) and U_B (g, q, q).
    weights : Tensor
        W (g, q, p).
    """

    layer: Layer
    inputs: Tensor
    outputs: Tensor
    weights: Tensor

    def rotated(self, seen: Captured) -> Part:
        """d and a of one position, G of several."""
        delta, inputs = seen.derivatives[:, 0].to(self.weights), self.layer.homogeneous(seen.inputs)
        d = torch.einsum("ntgq,gqs->ntgs", delta, self.outputs)
        a = torch.einsum("ntgp,gps->ntgs", inputs.to(self.weights), self.inputs)
        if _is_single(self.layer, seen):
            return d[:, 0, 0], a[:, 0, 0]
        return (torch.einsum("ntgq,ntgp->ngqp", d, a).flatten(1),)

    def products(self, tests: Part, trains: Part) -> Tensor:
        """⟨G_i, W ∘ G_j⟩ of each pair, (N, n)."""
        if len(tests) == 1:
            return (tests[0] * self.weights.flatten()) @ trains[0].mT
        weights = self.weights[0]
        if weights.shape[0] > weights.shape[1]:  # the longer side is the one to contract first
            return _contracted(weights.mT, tests[::-1], trains[::-1])
        return _contracted(weights, tests, trains)


@dataclass(frozen=True)
class Kernel:
    """Scores of test and training samples from what their layers see.

    Attributes
    ----------
    layout : Layout
        θ in layers.
    diagonals : tuple of Diagonal
        In their order.
    """

    layout: Layout
    diagonals: tuple[Diagonal, ...]

    @classmethod
    def of(cls, problem: Problem, x: Tree, y: Tree, diagonals: Sequence[Sequence[Tensor]]) -> Self | None:
        """From U_A, U_B and W of each layer; None where gradients serve better.

        ``x`` and ``y`` are a sample, which shows how many positions the layers have.
        """
        layout, dtype = layout_of(problem.objective), problem.objective.dtype
        if any(layer.indexed for layer in layout.layers):
            return None
        (captured,) = capture(problem, x, y, layout, _GRADIENTS.columns)
        called = [(layer, seen) for layer, seen in zip(layout.layers, captured, strict=True) if seen]
        if not called or not all(_is_compact(layer, seen) for layer, seen in called):
            return None
        like = torch.empty(
            0, dtype=torch.promote_types(dtype, torch.float32), device=problem.objective.device
        )
        parts = (
            Diagonal(layer, *(tensor.to(like) for tensor in tensors))
            for layer, tensors in zip(layout.layers, diagonals, strict=True)
        )
        return cls(layout, tuple(parts))

    def features(self, problem: Problem, x: Tree, y: Tree) -> list[Part]:
        """What scores need of samples, layer by layer."""
        parts: list[list[Part]] = [[] for _ in self.diagonals]
        for captured in capture(problem, x, y, self.layout, _GRADIENTS.columns):
            for held, diagonal, seen in zip(parts, self.diagonals, captured, strict=True):
                if seen is not None:
                    held.append(diagonal.rotated(seen))
        return [tuple(torch.cat(piece) for piece in zip(*held, strict=True)) for held in parts]

    def scores(self, tests: Sequence[Part], trains: Sequence[Part]) -> Tensor:
        """Σ over layers of ⟨G_i, W ∘ G_j⟩, (N, n)."""
        layers = zip(self.diagonals, tests, trains, strict=True)
        parts = (diagonal.products(test, train) for diagonal, test, train in layers if test and train)
        return functools.reduce(Tensor.add_, parts)


_GRADIENTS = Expectation("empirical_fisher")
"""Columns whose pullback is the gradient at the targets given."""


def _is_single(layer: Layer, seen: Captured) -> bool:
    """Whether the gradient is one product δ aᵀ."""
    return layer.groups == 1 and seen.inputs.shape[1] == 1


def _is_compact(layer: Layer, seen: Captured) -> bool:
    """Whether the pair, or G in its place, is small enough to be held for many samples."""
    shared = MATRIX_SHARE * seen.inputs.shape[1] * (layer.rows + layer.width)
    return _is_single(layer, seen) or layer.rows * layer.width <= shared


def _contracted(weights: Tensor, tests: Part, trains: Part) -> Tensor:
    """d_jᵀ (W ∘ d_i a_iᵀ) a_j, for as many i at a time as the budget allows."""
    (d, a), rows = trains, len(weights)
    step = max(1, BUDGET // (weights.element_size() * (weights.numel() + len(d) * rows)))
    parts = []
    for d_test, a_test in zip(tests[0].split(step), tests[1].split(step), strict=True):
        matrices = weights * d_test[:, :, None] * a_test[:, None, :]  # (b, q, p)
        pushed = a @ matrices.reshape(-1, a.shape[1]).mT  # (n, b q)
        parts.append(torch.einsum("nbq,nq->bn", pushed.unflatten(1, (-1, rows)), d))
    return torch.cat(parts)
