"""Residuals of many solutions of one system, from products with few random vectors.

A residual r = A s − g has the products ⟨r, ω_k⟩ = ⟨s, A ω_k⟩ − ⟨g, ω_k⟩ with vectors ω_k: once A ω_k are
known, K products of length P tell of each solution what a product with the matrix A tells. For independent
standard normal ω_k they are ‖r‖ times standard normal numbers, so that

    ‖r‖² ≤ Σ_k ⟨r, ω_k⟩² / q,    q the ε-quantile of χ² with K degrees of freedom,

holds except with probability ε, whatever r is. With K = 32 and ε = 10⁻¹² the bound is about 3.5 ‖r‖.
Freivalds 1977, "Probabilistic machines can use less running time", checks matrix products in this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.special import gammaincinv
from torch import Tensor

COUNT = 32
"""K."""

FAILURE = 1e-12
"""ε: a bound of a residual is too small with this probability."""

QUANTILE = 2 * float(gammaincinv(COUNT / 2, FAILURE))
"""q, without all of scipy.stats."""

SMALL = 8 * COUNT
"""P up to which products with the matrix itself cost no more than drawing from them would save."""

PANEL = 64
"""Rows that are widened at a time: their copies stay in the cache."""


@dataclass(frozen=True, eq=False)
class Probes:
    """Random vectors and their products with a symmetric matrix A.

    Attributes
    ----------
    vectors, images : Tensor
        Ω and A Ω as columns, (P, K), float64; Ω is the identity where P is small.
    """

    vectors: Tensor
    images: Tensor

    @classmethod
    def of(cls, matrix: Tensor, shift: float) -> Probes:
        """Those of A = ``matrix`` + ``shift`` I, always the same for one matrix."""
        size = len(matrix)
        if size <= SMALL:
            vectors = torch.eye(size, dtype=torch.float64)
        else:
            random = torch.Generator().manual_seed(size)
            vectors = torch.randn(size, COUNT, dtype=torch.float64, generator=random)
        return cls(vectors, torch.addmm(vectors, matrix, vectors, beta=shift))

    def residuals(self, gradients: Tensor, factors: Tensor) -> Tensor:
        """‖A s − g‖ / ‖g‖ of rows s and g, (n, P), in float64; 0 where g = 0.

        The norm itself where Ω is the identity, else a bound of it that is about 3.5 times as large and too
        small with probability 10⁻¹².
        """
        panels = zip(gradients.split(PANEL), factors.split(PANEL), strict=True)
        return torch.cat([self._residuals(*(side.to(torch.float64) for side in panel)) for panel in panels])

    def _residuals(self, gradients: Tensor, factors: Tensor) -> Tensor:
        seen = torch.addmm(factors @ self.images, gradients, self.vectors, alpha=-1)
        drawn = self.vectors.shape[1] < len(self.vectors)
        found = seen.norm(dim=1) / (QUANTILE**0.5 if drawn else 1.0)
        scale = gradients.norm(dim=1)
        return torch.where(scale > 0, found / scale, found)
