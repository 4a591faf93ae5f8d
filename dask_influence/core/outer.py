"""Gradients of perceptrons as outer products: g = δ aᵀ of what enters a layer and what comes back.

Inner products with vectors, norms and weighted sums of them are matrix products, and no gradient is
formed: ⟨V, g⟩ = δᵀ V a, ‖g‖² = ‖δ‖² ‖a‖², Σ_j w_j g_j = (w ∘ δ)ᵀ a. All in float64.

Notation: n samples, B vectors, q × p the weight of one layer, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from dask_influence.core.capture import Captured, perceptron
from dask_influence.core.curvature import weighted_gradients
from dask_influence.core.gemm import product
from dask_influence.core.layers import Layout
from dask_influence.core.objective import Tree, leading_size
from dask_influence.core.precision import rounding
from dask_influence.core.problem import Problem
from dask_influence.core.watching import watched

BUDGET = 64 * 2**20
"""Bytes that a product makes on its way for each of few vectors."""

Span = tuple[int, int]
"""First and one past the last entry of θ."""


@dataclass(frozen=True)
class _Run:
    """What stands in one span of θ: the weight of a layer with its inputs a (n, p), or a bias without."""

    derivatives: Tensor
    inputs: Tensor | None

    def inner(self, vectors: Tensor) -> Tensor:
        """⟨v_b, g_j⟩ of vectors (B, ·), (B, n)."""
        if self.inputs is None:
            return product(vectors, self.derivatives.mT)
        inputs, derivatives = self.inputs, self.derivatives
        step = max(1, BUDGET // (8 * derivatives.numel()))
        parts = (part.unflatten(1, (derivatives.shape[1], -1)) for part in vectors.split(step))
        return torch.cat([product(part, inputs.mT).mul_(derivatives.mT).sum(1) for part in parts])

    def norms(self) -> Tensor:
        """‖g_j‖², (n,)."""
        squares = self.derivatives.square().sum(1)
        return squares if self.inputs is None else squares * self.inputs.square().sum(1)

    def combined(self, weights: Tensor) -> Tensor:
        """Σ_j w_bj g_j of weights (B, n), (B, ·)."""
        if self.inputs is None:
            return product(weights, self.derivatives)
        inputs, derivatives = self.inputs, self.derivatives.mT
        step = max(1, BUDGET // (8 * derivatives.numel()))
        parts = (part[:, None] * derivatives for part in weights.split(step))  # (·, q, n)
        return torch.cat([product(part.flatten(0, 1), inputs).reshape(len(part), -1) for part in parts])


class OuterGradients:
    """Gradients of n samples, by the span of each parameter."""

    def __init__(self, problem: Problem, layout: Layout, seen: Sequence[Captured]) -> None:
        names, sizes = problem.objective.names, problem.objective.sizes
        starts = dict(zip(names, accumulate(sizes, initial=0), strict=False))
        self._runs: dict[Span, _Run] = {}
        for layer, found in zip(layout.layers, seen, strict=True):
            derivatives = found.derivatives[:, 0, 0, 0].to(torch.float64)
            if layer.weight is not None:
                start = starts[layer.weight] + layer.key[1] * layer.columns
                inputs = found.inputs[:, 0, 0].to(torch.float64)
                self._runs[start, start + layer.rows * layer.columns] = _Run(derivatives, inputs)
            if layer.bias is not None:
                start = starts[layer.bias] + layer.bias_start
                self._runs[start, start + layer.rows] = _Run(derivatives, None)

    @property
    def count(self) -> int:
        """n."""
        return len(next(iter(self._runs.values())).derivatives)

    @property
    def spans(self) -> list[Span]:
        """One for each weight and bias."""
        return list(self._runs)

    def inner(self, vectors: Tensor, span: Span) -> Tensor:
        """⟨v_b, g_j⟩ within one span, of vectors (B, P): (B, n)."""
        return self._runs[span].inner(vectors[:, slice(*span)])

    def norms(self, span: Span) -> Tensor:
        """‖g_j‖² within one span, (n,)."""
        return self._runs[span].norms()

    def combined(self, weights: Tensor, span: Span) -> Tensor:
        """Σ_j w_bj g_j within one span, of weights (B, n): (B, ·)."""
        return self._runs[span].combined(weights)


def outer_gradients(problem: Problem, x: Tree, y: Tree) -> list[OuterGradients] | None:
    """Those of some samples each; None where gradients are no outer products, by the layers or as a sum of them shows.

    Examples
    --------
    >>> from dask_influence.core.objective import Objective
    >>> from dask_influence.core.problem import prepare
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    >>> x, y = torch.ones(5, 3).double(), torch.zeros(5, 1).double()
    >>> problem, _ = prepare(Objective.of(net, torch.nn.functional.mse_loss), x, y)
    >>> (seen,) = outer_gradients(problem, x, y)
    >>> seen.spans, tuple(seen.norms((0, 12)).shape)
    ([(0, 12), (12, 16), (16, 20), (20, 21)], (5,))
    """
    layout = perceptron(problem, x)
    if layout is None:
        return None
    found = [OuterGradients(problem, layout, seen) for seen in watched(problem, x, y, layout)]
    return found if _agree(problem, x, y, found) else None


def _agree(problem: Problem, x: Tree, y: Tree, found: list[OuterGradients]) -> bool:
    """Whether all gradients, with a random sign each, add up to what one backward pass says."""
    objective = problem.objective
    random = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (leading_size(y), 1), generator=random) * 2.0 - 1
    signs = signs.to(objective.device, objective.dtype)
    expected = weighted_gradients(problem, x, y, signs).to(torch.float64)
    total, size, start = torch.zeros_like(expected), 0.0, 0
    for part in found:
        own = signs[start : start + part.count].mT.to(torch.float64)
        start += part.count
        for span in part.spans:
            total[:, slice(*span)] += part.combined(own, span)
            size += float(part.norms(span).sum())
    # signs cancel: rounding is that of the gradients, not of their sum
    tolerance = max(torch.finfo(objective.dtype).eps ** 0.5, 4 * rounding(objective.dtype))
    return bool((total - expected).norm() <= tolerance * size**0.5)
