"""Certificates of factors that are combinations of few directions, without a vector of size P for each.

Factors s = Σ_r c_r v_r with c_r = ⟨v_r, g⟩ / (θ_r + λ), for orthonormal v_r with C v_r = θ_r v_r + e_r, solve
(C + λI) s = g but for

    (C + λI) s − g = Σ_r c_r e_r − g⊥,    g⊥ = g − Σ_r ⟨v_r, g⟩ v_r,

whose norm takes the Gram matrix of the e_r, the projections of g on v_r and on what spans the e_r, and ‖g‖².
The C v_r do. So do fewer, since e_r of a Krylov space lie in the span of its last block: with orthogonal
f_k = Σ_r U_rk e_r of which all but a few are next to nothing, e_r = Σ_k U_rk f_k but for those.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dask_influence.core.derived import derived

ROUNDING = 1e-6
"""Squares of residuals below which differences of squares are too few digits of them, relative to those squares."""

NARROW_ROUNDING = 2.0**-5
"""The same for projections in float32: five digits of a residual are right above it."""

LEFT_OUT = 1e-6
"""Length of an f_k that is next to nothing, relative to the largest θ."""

OFF = 2e-5
"""Relative error of the square of a residual that those left out may make."""

PANEL = 2**15
"""Columns of the f_k that are made at a time: the e_r take as much memory as V."""


@dataclass(frozen=True, eq=False)
class Witness:
    """What gradients are projected on, beside V, and what that tells.

    Attributes
    ----------
    others : Tensor
        What spans the e_r, up to what is ``missed``: rows (K, P).
    turn : Tensor
        e_r in terms of the others, as far as they are outside of V: (R, K), float64.
    overlap : Tensor
        ⟨v_r, others_k⟩ (R, K), float64.
    missed : Tensor or None
        Gram matrix (R, R) of what is missed of the e_r, if something is.
    rounding : float
        Squares of residuals that are claimed, at least, relative to those of which they are the difference.
    """

    others: Tensor
    turn: Tensor
    overlap: Tensor
    missed: Tensor | None
    rounding: float


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

    def witness(self, dtype: torch.dtype) -> Witness:
        """By projections in float64, or in a narrower dtype, which know less and are as good where that is enough."""
        if dtype == torch.float64:
            turn = torch.eye(len(self.values), dtype=torch.float64)
            return Witness(self.images, turn, self._overlap, None, ROUNDING)
        return derived(self.images, ("witness", dtype), lambda: self._few(dtype))

    def _few(self, dtype: torch.dtype) -> Witness:
        scale = float(self.values.abs().max())
        squares, turn = torch.linalg.eigh(self._gram)
        kept = squares > (LEFT_OUT * scale) ** 2
        noise = len(squares) * torch.finfo(torch.float64).eps * scale**2  # of the Gram matrix
        missed = turn * torch.where(kept, 0.0, squares.clamp_min(noise)) @ turn.mT
        turn = turn[:, kept]
        others = torch.empty(turn.shape[1], self.images.shape[1], dtype=dtype)
        for panel, images, vectors in zip(
            *(side.split(PANEL, dim=1) for side in (others, self.images, self.directions)), strict=True
        ):
            panel.copy_(turn.mT @ images - (turn.mT * self.values) @ vectors)
        overlap = self._overlap @ turn - self.values[:, None] * turn
        return Witness(others, turn, overlap, missed, NARROW_ROUNDING)

    @property
    def _overlap(self) -> Tensor:
        """⟨v_r, C v_s⟩ (R, R)."""
        return derived(self.images, "overlap", lambda: self.directions @ self.images.mT)

    @property
    def _gram(self) -> Tensor:
        """⟨e_r, e_s⟩ (R, R)."""

        def make() -> Tensor:
            across = self._overlap.mT * self.values - self.values.square().diag()  # ⟨e_r, θ_s v_s⟩
            return self.images @ self.images.mT - across - across.mT - self.values.square().diag()

        return derived(self.images, "gram", make)

    def residuals(self, coefficients: Tensor, seen: Tensor, witness: Witness) -> Tensor:
        """‖(C + λI) s − g‖ / ‖g‖, (n·L,), 0 where g = 0, and −1 where what is seen tells too few digits of it.

        Parameters
        ----------
        coefficients : Tensor
            Factors are ``coefficients @ directions``: (n·L, R), for L values of λ, which runs fastest.
        seen : Tensor
            Of each gradient its products with the directions and with the witness's others, and ‖g‖²:
            (n, R + K + 1).
        """
        seen = seen.repeat_interleave(len(coefficients) // len(seen), dim=0)
        rank = len(self.values)
        along, others, squares = seen[:, :rank], seen[:, rank:-1], seen[:, -1]
        outside = squares - along.square().sum(1)
        across = others - along @ witness.overlap  # with g⊥
        found = (coefficients @ self._gram * coefficients).sum(1) + outside
        found -= 2 * (coefficients @ witness.turn * across).sum(1)
        # far larger than g where some θ + λ nearly cancels
        terms = (coefficients * self.values).square().sum(1)
        unknown = found < witness.rounding * torch.maximum(squares, terms)
        if witness.missed is not None:
            off = (coefficients @ witness.missed * coefficients).sum(1) * outside
            unknown |= 4 * off > (OFF * found).square()
        return torch.where(unknown, -1.0, (found / torch.where(squares > 0, squares, 1.0)).sqrt())
