"""Estimates: residuals of many factors from a few random vectors.

Each by itself takes a product with the curvature. A factor s = C g of an approximate inverse C leaves r = A s − g
in the system A s = g that was asked for. For random ω_k of independent standard normal entries, since A and C are
symmetric,

    ⟨r, ω_k⟩ = ⟨g, ψ_k⟩,    ψ_k = C A ω_k − ω_k,    and    ‖r‖² ≈ Σ_k ⟨g, ψ_k⟩² / K

without bias: the ratio of both sides has the distribution χ²_K / K. Products A ω_k and solves with them are made
once for a fit, whatever the number of test points; the gradient of each of those is projected on the ψ_k, and no
factor is formed.
Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix", of r rᵀ.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from dask_influence.core.estimators.base import Inverse, Round, System, without_rounds
from dask_influence.core.estimators.sweep import SweepInverse, SweepSystem
from dask_influence.core.moments import Moments

COUNT = 32
"""K."""

DEVIATION = (2 * COUNT) ** -0.5
"""Relative standard deviation of an estimated residual, about: an eighth."""

EXACT = 1e11
"""Test points times samples fitted times P up to which each residual has its own product: seconds of a core."""


def count_for(tests: int, samples: int, parameters: int) -> int:
    """Random vectors from which residuals of so many test points are estimated; 0 where they are computed.

    Examples
    --------
    >>> count_for(360, 1437, 2410), count_for(256, 4096, 820_874), count_for(COUNT, 4096, 820_874)
    (0, 32, 0)
    """
    return COUNT if tests > COUNT and tests * samples * parameters > EXACT else 0


def directions(inverse: Inverse, system: System, count: int) -> Generator[Round, Moments, Tensor]:
    """ψ of each λ, (L·K, P) float64, by one pass."""
    random = torch.Generator().manual_seed(system.size)
    vectors = torch.randn(count, system.size, dtype=torch.float64, generator=random)
    moments = yield system.products(vectors)
    products = moments.mean("products")
    parts = inverse.parts if isinstance(inverse, SweepInverse) else (inverse,)
    systems = system.systems if isinstance(system, SweepSystem) else (system,)
    return torch.cat(
        [
            without_rounds(part.solve(products + own.damped(vectors))).factors - vectors
            for part, own in zip(parts, systems, strict=True)
        ]
    )


def residuals(seen: Tensor, squares: Tensor, count: int) -> Tensor:
    """Estimates of ‖A s − g‖ / ‖g‖, (n·L,), 0 where g = 0, from ⟨g, ψ⟩ (n, L·K) and ‖g‖² (n,)."""
    norms = seen.unflatten(1, (-1, count)).square().mean(2)
    return (norms / torch.where(squares > 0, squares, 1.0)[:, None]).sqrt().flatten()
