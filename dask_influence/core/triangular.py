"""Solves by a Cholesky factor as matrix products, with its diagonal blocks inverted beforehand.

A triangular solve of many rows spends its flops in products with what lies off the diagonal, and is
slowed down by what lies on it. With D_k⁻¹ of the blocks D_k on the diagonal all of it is products: of
rows x in place,

    x_k ← (x_k − Σ_{j<k} x_j L_kjᵀ) D_k⁻ᵀ,    and back    x_k ← (x_k − Σ_{j>k} x_j L_jk) D_k⁻¹.

Its backward error has the condition of a diagonal block where that of substitution has 1 (Du Croz & Higham
1992, "Stability of methods for matrix inversion"): whoever solves looks at the residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 384
"""Columns of a block: enough for products at full speed, few beside P."""


@dataclass(frozen=True, eq=False)
class Blocked:
    """L of a matrix L Lᵀ, and the inverses of its diagonal blocks.

    Attributes
    ----------
    factor : Tensor
        L (P, P), lower triangular.
    inverses : tuple of Tensor
        D_k⁻¹, of BLOCK rows each but for the last.
    """

    factor: Tensor
    inverses: tuple[Tensor, ...]

    @classmethod
    def of(cls, factor: Tensor, dtype: torch.dtype) -> Blocked:
        """In another dtype than ``factor`` has, in which the blocks are inverted."""
        blocks = [factor[own, own] for own in _blocks(len(factor))]
        inverses = (
            torch.linalg.solve_triangular(block, torch.eye(len(block), dtype=block.dtype), upper=False)
            for block in blocks
        )
        return cls(factor.to(dtype), tuple(inverse.to(dtype) for inverse in inverses))

    def solve(self, rows: Tensor) -> Tensor:
        """(L Lᵀ)⁻¹ x of the rows x (n, P), which are overwritten.

        Examples
        --------
        >>> lower = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> Blocked.of(lower, torch.float32).solve(torch.tensor([[4.0, 3.0]]))
        tensor([[0.5000, 1.0000]])
        """
        whole = list(zip(_blocks(len(self.factor)), self.inverses, strict=True))
        for own, inverse in whole:
            before = slice(own.start)
            rows[:, own] = (
                rows[:, own].addmm_(rows[:, before], self.factor[own, before].mT, alpha=-1) @ inverse.mT
            )
        for own, inverse in reversed(whole):
            after = slice(own.stop, None)
            rows[:, own] = rows[:, own].addmm_(rows[:, after], self.factor[after, own], alpha=-1) @ inverse
        return rows


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]
