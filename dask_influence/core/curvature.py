"""Curvature: sums over a chunk of products with blocks of vectors, and of whole matrices.

H is the second derivative of the *mean* loss; what is computed here for one chunk is the
sum over its samples, and :class:`~dask_influence.core.moments.Moments` forms the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dask_influence.core import forms
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree, leading_size
from dask_influence.core.problem import Problem

VECTOR_BUDGET = 256 * 2**20
"""Bytes that the vectors pushed through the model at once may keep alive."""

Products = Callable[[Problem, Tree, Tree, Tensor], Tensor]
"""Σ_j C(z_j) v_b for a block of vectors (B, P) → (B, P)."""


def hessian_products(problem: Problem, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    """Σ_j ∇²ℓ(z_j) v_b, shape (B, P)."""
    return forms.products(problem.objective, x, y, vectors, problem.forms)


PRODUCTS: dict[str, Products] = {"hessian": hessian_products}
"""The curvatures by their name in ``curvature=``."""


def product_sums(problem: Problem, x: Tree, y: Tree, operand: dict[str, Tensor], curvature: str) -> Moments:
    """Chunk function: Σ_j C(z_j) v_b for ``operand["vectors"]`` (B, P), as ``"products"``."""
    objective = problem.objective
    vectors = operand["vectors"]
    count = leading_size(y)
    block = problem.block_of_vectors(count, VECTOR_BUDGET)
    products = [
        PRODUCTS[curvature](problem, x, y, part.to(objective.device, objective.dtype)).to(
            "cpu", torch.float64
        )
        for part in vectors.split(block)
    ]
    return Moments({"products": torch.cat(products)}, count)


def matrix_sums(problem: Problem, x: Tree, y: Tree, operand: dict[str, Tensor], curvature: str) -> Moments:
    """Chunk function: Σ_j C(z_j) as a symmetric (P, P) matrix, as ``"matrix"``.

    Columns are products with the unit vectors, a block at a time.
    """
    objective = problem.objective
    count = leading_size(y)
    block = problem.block_of_vectors(count, VECTOR_BUDGET)
    matrix = torch.empty(objective.size, objective.size, dtype=torch.float64)
    for start in range(0, objective.size, block):
        rows = range(start, min(start + block, objective.size))
        units = torch.zeros(len(rows), objective.size, dtype=objective.dtype, device=objective.device)
        units[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
        matrix[rows.start : rows.stop] = PRODUCTS[curvature](problem, x, y, units)
    # Rounding makes the two triangles differ in the last bits; a symmetric factorisation
    # must not depend on which one it reads.
    return Moments({"matrix": (matrix + matrix.mT) / 2}, count)
