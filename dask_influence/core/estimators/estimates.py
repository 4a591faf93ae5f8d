"""Estimates: residuals of many factors from a few random vectors.

Each by itself takes a product with the curvature. A factor s = C g of an approximate inverse C leaves r = A s − g
in the system A s = g that was asked for. For random ω_k of independent standard normal entries, since A and C are
symmetric,

    ⟨r, ω_k⟩ = ⟨g, ψ_k⟩,    ψ_k = C A ω_k − ω_k,    and    ‖r‖² ≈ Σ_k ⟨g, ψ_k⟩² / K

without bias: the ratio of both sides has the distribution χ²_K / K. Products A ω_k and solves with them are made
once for a fit, whatever the number of test points; the gradient of each of those is projected on the ψ_k, and no
factor is formed. Of large problems fewer vectors are taken, and only some of them are held at a time.
Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix", of r rᵀ.
"""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from dask_influence.core.estimators.base import Inverse, Round, System, without_rounds
from dask_influence.core.estimators.sweep import SweepInverse, SweepSystem
from dask_influence.core.moments import Moments

MOST, FEWEST = 32, 8
"""K, the fewer the more a product costs: each residual is right to an eighth, or to a quarter."""

EXACT = 1e11
"""Test points × samples fitted × size up to which each residual has its own product: seconds of a core."""

SPENT = 2e11
"""The same of vectors, of which there are fewer beyond it."""

PER_ACTIVATION = 500
"""Parameters of a perceptron whose products take as long as those of one element that a layer puts out, where
each vector is pushed through the model and back: 23 ns beside 0.04, of a convolution and of a transformer."""


def count_for(tests: int, samples: int, parameters: int, activations: int = 0) -> int:
    """Random vectors from which residuals of so many test points are estimated; 0 where they are computed.

    ``activations`` are the elements that layers put out for one sample, 0 where products are matrix products.

    Examples
    --------
    >>> count_for(360, 1437, 2410), count_for(256, 4096, 820_874), count_for(32, 4096, 820_874)
    (0, 32, 0)
    >>> count_for(300, 1000, 1594, 3082), count_for(30, 1000, 1594, 3082)
    (32, 0)
    >>> count_for(256, 100_000, 100_000_000)
    8
    """
    each = samples * (parameters + PER_ACTIVATION * activations)
    count = max(FEWEST, min(MOST, int(SPENT // each)))
    return count if tests > count and tests * each > EXACT else 0


def deviation(count: int) -> float:
    """Relative standard deviation of what ``count`` vectors estimate, about: (2 K)^-½.

    >>> deviation(32), deviation(8)
    (0.125, 0.25)
    """
    return (2 * count) ** -0.5


def directions(inverse: Inverse, system: System, chosen: range) -> Generator[Round, Moments, Tensor]:
    """ψ of each λ for these vectors, (L·K, P) float64, by one pass."""
    vectors = torch.stack([_normal(k, system.size) for k in chosen])
    moments = yield system.products(vectors)
    products = moments.mean("products")
    del moments
    parts = inverse.parts if isinstance(inverse, SweepInverse) else (inverse,)
    systems = system.systems if isinstance(system, SweepSystem) else (system,)
    return torch.cat(
        [
            without_rounds(part.solve(products + own.damped(vectors))).factors - vectors
            for part, own in zip(parts, systems, strict=True)
        ]
    )


def _normal(k: int, size: int) -> Tensor:
    """ω_k, the same whatever others are made beside it."""
    random = torch.Generator().manual_seed(size + k)
    return torch.randn(size, dtype=torch.float64, generator=random)


def squares(seen: Tensor, copies: int) -> Tensor:
    """Σ_k ⟨g, ψ_k⟩² at each λ, (n, L), from ⟨g, ψ⟩ (n, L·K)."""
    return seen.unflatten(1, (copies, -1)).square().sum(2)


def residuals(sums: Tensor, lengths: Tensor, count: int) -> Tensor:
    """Estimates of ‖A s − g‖ / ‖g‖, (n·L,), 0 where g = 0, from the sums of all K squares (n, L) and ‖g‖² (n,)."""
    norms = sums / count
    return (norms / torch.where(lengths > 0, lengths, 1.0)[:, None]).sqrt().flatten()
