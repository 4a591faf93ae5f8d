"""Solves by a Cholesky factor as matrix products, with blocks on its diagonal inverted beforehand.

A triangular solve of many rows spends its flops in products with what lies off the diagonal, and is
slowed down by what lies on it. Cut in halves, L = [[L₁₁, 0], [L₂₁, L₂₂]], it is a solve, a product and a solve,

    x₁ ← x₁ L₁₁⁻ᵀ,    x₂ ← (x₂ − x₁ L₂₁ᵀ) L₂₂⁻ᵀ,    and back    x₂ ← x₂ L₂₂⁻¹,    x₁ ← (x₁ − x₂ L₂₁) L₁₁⁻¹,

and halves of halves down to blocks D on the diagonal of which D⁻¹ is known: all of it is products, the largest
of them as large as can be (Elmroth, Gustavson, Jonsson & Kågström 2004, "Recursive blocked algorithms"). The
products are listed beforehand, with all that does not depend on x: threads that solve few rows side by side wait for
Python's lock after every call of torch.

Its backward error has the condition of a diagonal block where that of substitution has 1 (Du Croz & Higham
1992, "Stability of methods for matrix inversion"): whoever solves looks at the residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dask_influence.core.gemm import add_product, product

BLOCK = 320
"""Columns of a block at the most: enough for products at full speed, few beside P."""

ALIGNED = 16
"""Columns of which halves hold a multiple: what processors multiply at once."""


class Step(NamedTuple):
    """The product of ``length`` columns from ``start`` on with a matrix, for ``width`` columns from ``to`` on.

    Either of what enters columns, with a D⁻¹, and is what leaves them; or, where it ``joins`` two halves, of what has
    left the columns of one, and is taken off what enters the other.
    """

    joins: bool
    start: int
    length: int
    to: int
    width: int
    matrix: Tensor


@dataclass(frozen=True, eq=False)
class Blocked:
    """L of a matrix L Lᵀ in blocks, of which those on its diagonal are inverted.

    Attributes
    ----------
    forward, back : sequence of Step
        What makes x L⁻ᵀ of x, and x L⁻¹; matrices of one are those of the other, transposed.
    """

    forward: Sequence[Step]
    back: Sequence[Step]

    @classmethod
    def of(cls, factor: Tensor, dtype: torch.dtype) -> Blocked:
        """In another dtype than ``factor`` (P, P) has, in which the blocks are inverted."""
        return cls(*_steps(factor, 0, len(factor), dtype))

    def solve(self, rows: Tensor) -> Tensor:
        """(L Lᵀ)⁻¹ x of the rows x (n, P).

        Examples
        --------
        >>> lower = torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> Blocked.of(lower, torch.float32).solve(torch.tensor([[4.0, 3.0]]))
        tensor([[0.5000, 1.0000]])
        """
        entering, leaving = rows.clone(), torch.empty_like(rows)
        for steps in (self.forward, self.back):
            for step in steps:
                columns = step.to, step.width
                if step.joins:
                    known = leaving.narrow(1, step.start, step.length)
                    add_product(entering.narrow(1, *columns), known, step.matrix, alpha=-1)
                else:
                    own = entering.narrow(1, step.start, step.length)
                    product(own, step.matrix, out=leaving.narrow(1, *columns))
            entering, leaving = leaving, entering
        return entering


def _steps(factor: Tensor, low: int, high: int, dtype: torch.dtype) -> tuple[list[Step], list[Step]]:
    """Those of the columns ``low`` to ``high``, forward and back."""
    if high - low <= BLOCK:
        block, own = factor[low:high, low:high], (low, high - low)
        identity = torch.eye(len(block), dtype=block.dtype)
        inverse = torch.linalg.solve_triangular(block, identity, upper=False)
        inverse = inverse.to(dtype, memory_format=torch.contiguous_format)
        return [Step(False, *own, *own, inverse.mT)], [Step(False, *own, *own, inverse)]
    middle = low + -(-(high - low) // (2 * ALIGNED)) * ALIGNED
    below = factor[middle:high, low:middle]
    below = below.to(dtype, copy=True, memory_format=torch.contiguous_format)
    first, last = _steps(factor, low, middle, dtype), _steps(factor, middle, high, dtype)
    upper, lower = (low, middle - low), (middle, high - middle)
    forward, back = Step(True, *upper, *lower, below.mT), Step(True, *lower, *upper, below)
    return [*first[0], forward, *last[0]], [*last[1], back, *first[1]]
