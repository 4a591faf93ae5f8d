"""Certificates of factors that are combinations of few directions, without a vector of size P for each.

Factors s = Σ_r c_r v_r with c_r = ⟨v_r, g⟩ / (θ_r + λ), for orthonormal v_r with C v_r = θ_r v_r + e_r, solve
(C + λI) s = g but for

    (C + λI) s − g = Σ_r c_r e_r − g⊥,    g⊥ = g − Σ_r ⟨v_r, g⟩ v_r,

whose norm takes the Gram matrix of the e_r, the projections of g on v_r and on C v_r, and ‖g‖².
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Squares of residuals below which differences of squares are too few digits of them, relative to those squares."""


@dataclass(frozen=True, eq=False)
class Certificate:
    """What tells residuals of factors from projections of their gradients.

    Attributes
    ----------
    directions : Tensor
        V as rows (R, P), orthonormal, float64.
    images : Tensor
        C V as rows (R, P), float64.
    values : Tensor
        Rayleigh quotients θ (R,), float64.
    """

    directions: Tensor
    images: Tensor
    values: Tensor

    @cached_property
    def _overlap(self) -> Tensor:
        """⟨e_r, v_s⟩ (R, R)."""
        return self.images @ self.directions.mT - self.values.diag()

    @cached_property
    def _gram(self) -> Tensor:
        """⟨e_r, e_s⟩ (R, R)."""
        across = self._overlap * self.values  # ⟨e_r, θ_s v_s⟩
        return self.images @ self.images.mT - across - across.mT - self.values.square().diag()

    def residuals(self, coefficients: Tensor, seen: Tensor) -> Tensor | None:
        """‖(C + λI) s − g‖ / ‖g‖, (n·L,), 0 where g = 0; None where that is lost in rounding for some row.

        Parameters
        ----------
        coefficients : Tensor
            Factors are ``coefficients @ directions``: (n·L, R), for L values of λ, which runs fastest.
        seen : Tensor
            Of each gradient its products with the directions and with their images, and ‖g‖²: (n, 2R + 1).
        """
        seen = seen.repeat_interleave(len(coefficients) // len(seen), dim=0)
        rank = len(self.values)
        along, imaged, squares = seen[:, :rank], seen[:, rank : 2 * rank], seen[:, -1]
        outside = squares - along.square().sum(1)
        across = imaged - along * self.values - along @ self._overlap.mT  # ⟨e_r, g⊥⟩
        found = (
            (coefficients @ self._gram * coefficients).sum(1) - 2 * (coefficients * across).sum(1) + outside
        )
        terms = (
            (coefficients * self.values).square().sum(1)
        )  # far larger than g where some θ + λ nearly cancels
        if (found < ROUNDING * torch.maximum(squares, terms)).any():
            return None
        return (found / torch.where(squares > 0, squares, 1.0)).sqrt()
