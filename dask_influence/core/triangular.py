"""Solves by a Cholesky factor as matrix products, with blocks on its diagonal inverted beforehand.

A triangular solve of many rows spends its flops in products with what lies off the diagonal, and is
slowed down by what lies on it. Cut in halves, L = [[L₁₁, 0], [L₂₁, L₂₂]], it is a solve, a product and a solve,

    x₁ ← x₁ L₁₁⁻ᵀ,    x₂ ← (x₂ − x₁ L₂₁ᵀ) L₂₂⁻ᵀ,    and back    x₂ ← x₂ L₂₂⁻¹,    x₁ ← (x₁ − x₂ L₂₁) L₁₁⁻¹,

and halves of halves down to blocks D on the diagonal of which D⁻¹ is known: all of it is products, the largest
of them as large as can be (Elmroth, Gustavson, Jonsson & Kågström 2004, "Recursive blocked algorithms").

Its backward error has the condition of a diagonal block where that of substitution has 1 (Du Croz & Higham
1992, "Stability of methods for matrix inversion"): whoever solves looks at the residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dask_influence.core.gemm import add_product, product

BLOCK = 320
"""Columns of a block at the most: enough for products at full speed, few beside P."""

ALIGNED = 16
"""Columns of which halves hold a multiple: what processors multiply at once."""

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Blocked:
    """L of a matrix L Lᵀ in blocks, and the inverses of those on its diagonal.

    Attributes
    ----------
    size : int
        P.
    below : dict of (int, int) to Tensor
        L₂₁ by where the halves of which it joins the second to the first begin and end.
    inverses : dict of (int, int) to Tensor
        D⁻¹ by where D begins and ends, of at most BLOCK rows each.
    """

    size: int
    below: dict[Span, Tensor]
    inverses: dict[Span, Tensor]

    @classmethod
    def of(cls, factor: Tensor, dtype: torch.dtype) -> Blocked:
        """In another dtype than ``factor`` (P, P) has, in which the blocks are inverted."""
        found = cls(len(factor), {}, {})
        found._take(factor, (0, len(factor)), dtype)
        return found

    def _take(self, factor: Tensor, span: Span, dtype: torch.dtype) -> None:
        if span[1] - span[0] <= BLOCK:
            block = factor[slice(*span), slice(*span)]
            identity = torch.eye(len(block), dtype=block.dtype)
            self.inverses[span] = torch.linalg.solve_triangular(block, identity, upper=False).to(dtype)
            return
        first, second = _halves(span)
        below = factor[slice(*second), slice(*first)]
        self.below[span] = below.to(dtype, copy=True, memory_format=torch.contiguous_format)
        self._take(factor, first, dtype)
        self._take(factor, second, dtype)

    def solve(self, rows: Tensor) -> Tensor:
        """(L Lᵀ)⁻¹ x of the rows x (n, P).

        Examples
        --------
        >>> lower = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> Blocked.of(lower, torch.float32).solve(torch.tensor([[4.0, 3.0]]))
        tensor([[0.5000, 1.0000]])
        """
        found, half = rows.clone(), torch.empty_like(rows)
        self._forward(found, half, (0, self.size))
        self._back(half, found, (0, self.size))
        return found

    def _forward(self, rows: Tensor, found: Tensor, span: Span) -> None:
        """x L⁻ᵀ in the columns of ``span``; ``rows`` are written to."""
        if span in self.inverses:
            product(rows[:, slice(*span)], self.inverses[span].mT, out=found[:, slice(*span)])
            return
        first, second = _halves(span)
        low, high = slice(*first), slice(*second)
        self._forward(rows, found, first)
        add_product(rows[:, high], found[:, low], self.below[span].mT, alpha=-1)
        self._forward(rows, found, second)

    def _back(self, rows: Tensor, found: Tensor, span: Span) -> None:
        """x L⁻¹ in the columns of ``span``; ``rows`` are written to."""
        if span in self.inverses:
            product(rows[:, slice(*span)], self.inverses[span], out=found[:, slice(*span)])
            return
        first, second = _halves(span)
        low, high = slice(*first), slice(*second)
        self._back(rows, found, second)
        add_product(rows[:, low], found[:, high], self.below[span], alpha=-1)
        self._back(rows, found, first)


def _halves(span: Span) -> tuple[Span, Span]:
    low, high = span
    middle = low + -(-(high - low) // (2 * ALIGNED)) * ALIGNED
    return (low, middle), (middle, high)
