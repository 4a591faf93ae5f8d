"""Krylov iterations over distributed products: block CG, MINRES and extreme eigenvalues.

Each is a generator: a block of vectors costs one pass over the data. Vectors are rows.
What an iteration says of its own residual is a recurrence; whoever calls it checks the
true one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from dask_influence.core.estimators.base import Round, System
from dask_influence.core.moments import Moments
from dask_influence.errors import ConvergenceError

DEPENDENT = 1e-10
"""Directions of a block whose singular value is smaller, relative to the largest, are dropped."""

RESOLVED = 3e-7
"""The same, where inner products in float64 have to tell."""


@dataclass
class Tally:
    """What a solve has done and seen so far.

    Attributes
    ----------
    passes, iterations : int
        Passes over the data, and those of them that advanced an iteration.
    lowest, highest : float
        Extreme Rayleigh quotients of C that were met: inner bounds of its spectrum.
    """

    passes: int = 0
    iterations: int = 0
    lowest: float = field(default=float("inf"))
    highest: float = field(default=float("-inf"))

    def meet(self, quotients: Tensor) -> None:
        """Widen the bounds by Rayleigh or Ritz values of C."""
        self.lowest = min(self.lowest, quotients.min().item())
        self.highest = max(self.highest, quotients.max().item())

    def joined(self, other: Tally) -> Tally:
        """Both, one after the other."""
        return Tally(
            self.passes + other.passes,
            self.iterations + other.iterations,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
        )

    @property
    def magnitude(self) -> float:
        """The largest |Rayleigh quotient| met."""
        return max(abs(self.lowest), abs(self.highest))


@dataclass(frozen=True)
class Outcome:
    """Where an iteration for (C + λI) d = r stopped.

    Attributes
    ----------
    solution : Tensor
        d (B, P).
    indefinite : bool
        It met a direction of negative curvature.
    """

    solution: Tensor
    indefinite: bool = False


def shifted_products(system: System, vectors: Tensor, tally: Tally) -> Generator[Round, Moments, Tensor]:
    """(C + λI) v for rows (B, P), by one pass.

    Raises
    ------
    ConvergenceError
        A product is not finite.
    """
    moments = yield system.products(vectors)
    tally.passes += 1
    products = moments.mean("products").add_(vectors, alpha=system.regularization)
    # a sum takes one pass without a temporary; where that overflows, each entry counts
    if not (products.sum().isfinite() or torch.isfinite(products).all()):
        dtype = str(system.dtype).removeprefix("torch.")
        raise ConvergenceError(
            f"after {tally.iterations} iterations a product with the curvature is NaN or inf: the loss or its "
            f"second derivative overflows in {dtype}; use dtype=torch.float64, or look for samples of extreme loss"
        )
    return products


def block_cg(
    system: System,
    residual: Tensor,
    goal: Tensor,
    precondition: Callable[[Tensor], Tensor],
    budget: int,
    tally: Tally,
) -> Generator[Round, Moments, Outcome]:
    """Breakdown-free block conjugate gradient from zero, at most ``budget`` iterations.

    The directions of a block are an orthonormal basis of what the right-hand sides have in
    common, and dependent ones are dropped; a right-hand side leaves when its recurrence
    residual is below its ``goal``. Ji & Li 2017, algorithm 2.

    Parameters
    ----------
    residual : Tensor
        Right-hand sides (B, P).
    goal : Tensor
        Absolute tolerances (B,).
    precondition : callable
        Rows → rows, symmetric positive definite.
    """
    rows = _Rows(residual, goal)
    directions = _orthonormal(precondition(rows.residual), system)
    for _ in range(budget):
        images = yield from shifted_products(system, directions, tally)
        tally.iterations += 1
        gram = directions @ images.mT
        values, rotation = torch.linalg.eigh((gram + gram.mT) / 2)
        tally.meet(values - system.regularization)
        noise = 16 * torch.finfo(system.dtype).eps * (tally.magnitude + system.regularization)
        if values[0] < -noise:
            return Outcome(rows.finished(), indefinite=True)
        used = values > noise
        inverse = (rotation[:, used] / values[used]) @ rotation[:, used].mT
        rows.step(inverse @ (directions @ rows.residual.mT), directions, images)
        if rows.count == 0 or not used.any():
            break
        fresh = precondition(rows.residual)
        conjugate = inverse @ (images @ fresh.mT)
        del images  # before there is another block as large
        directions = _orthonormal(torch.addmm(fresh, conjugate.mT, directions, alpha=-1), system)
    return Outcome(rows.finished())


class _Rows:
    """Solutions and recurrence residuals of the right-hand sides that are not done; blocks change in place.

    Parameters
    ----------
    residual : Tensor
        Right-hand sides (B, P).
    goal : Tensor
        Absolute tolerances (B,).
    """

    def __init__(self, residual: Tensor, goal: Tensor) -> None:
        self._goal, self._left = goal, torch.arange(len(residual))
        self.residual, self._solution = residual.clone(), torch.zeros_like(residual)
        self._done: Tensor | None = None

    @property
    def count(self) -> int:
        """How many are left."""
        return len(self._left)

    def step(self, step: Tensor, directions: Tensor, images: Tensor) -> None:
        """Go ``step`` (D, B) along the directions (D, P); those that reach their goals leave."""
        self._solution.addmm_(step.mT, directions)
        self.residual.addmm_(step.mT, images, alpha=-1)
        remaining = self.residual.norm(dim=1) > self._goal[self._left]
        if remaining.all():
            return
        if self._done is None:
            self._done = torch.zeros_like(self._solution)
        self._done[self._left[~remaining]] = self._solution[~remaining]
        self._left, self.residual = self._left[remaining], self.residual[remaining]
        self._solution = self._solution[remaining]

    def finished(self) -> Tensor:
        """Solutions of all, (B, P)."""
        if self._done is None:
            return self._solution
        self._done[self._left] = self._solution
        return self._done


def _orthonormal(rows: Tensor, system: System) -> Tensor:
    """Orthonormal rows of the same span, without dependent ones, exact in the model's dtype."""
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    if system.dtype != torch.float64:
        basis = _from_products(rows, lengths)
    else:
        basis, triangle = torch.linalg.qr((rows / lengths).mT)
        left, singular, _ = torch.linalg.svd(triangle)
        kept = singular > DEPENDENT * singular[0]
        basis = (basis @ left[:, : len(singular)][:, kept]).mT
    return basis if system.dtype == torch.float64 else basis.copy_(basis.to(system.dtype))


def _from_products(rows: Tensor, lengths: Tensor) -> Tensor:
    """Orthonormal rows from the inner products of ``rows``, which resolve half of float64's digits.

    A product in a narrower dtype has no more, and this takes a tenth of the time of a factorisation.
    """
    products = (rows @ rows.mT) / lengths / lengths.mT
    values, vectors = torch.linalg.eigh(products)
    kept = values > RESOLVED**2 * values[-1]
    return (vectors[:, kept] / values[kept].sqrt() / lengths).mT @ rows


def minres(
    system: System, residual: Tensor, goal: Tensor, budget: int, tally: Tally
) -> Generator[Round, Moments, Outcome]:
    """Minimal residuals for an indefinite system, all right-hand sides in step, from zero.

    Each right-hand side has its own Lanczos recurrence; their products share one pass. The
    eigenvalues of the tridiagonal matrices widen ``tally``, so that the end of the spectrum
    that made the system indefinite is known. Paige & Saunders 1975.
    """
    solution = torch.zeros_like(residual)
    active = torch.arange(len(residual))
    beta = residual.norm(dim=1, keepdim=True)
    vector, before = residual / beta, torch.zeros_like(residual)
    newer, older = torch.zeros_like(residual), torch.zeros_like(residual)
    zero = torch.zeros_like(beta)
    carried, eliminated, cosine, sine, remaining = zero, zero, zero - 1, zero, beta
    links, diagonal, off = zero, [], []
    for _ in range(budget):
        images = yield from shifted_products(system, vector, tally)
        tally.iterations += 1
        images = images - links * before
        alpha = (vector * images).sum(dim=1, keepdim=True)
        images = images - alpha * vector
        beta = images.norm(dim=1, keepdim=True)
        # the next column of the tridiagonal matrix, rotated into upper triangular form
        second = cosine * carried + sine * alpha
        pivot = sine * carried - cosine * alpha
        first, eliminated, carried = eliminated, sine * beta, -cosine * beta
        length = torch.hypot(pivot, beta).clamp_min(torch.finfo(torch.float64).tiny)
        cosine, sine = pivot / length, beta / length
        older, newer = newer, (vector - first * older - second * newer) / length
        solution[active] += cosine * remaining * newer
        remaining = sine * remaining
        diagonal.append(_spread(alpha, active, len(solution)))
        off.append(_spread(beta, active, len(solution)))
        before, vector, links = vector, images / beta.clamp_min(torch.finfo(torch.float64).tiny), beta
        goes_on = (remaining.abs() > goal[active, None])[:, 0] & (beta[:, 0] > 0)
        state = (before, vector, newer, older, links, carried, eliminated, cosine, sine, remaining)
        before, vector, newer, older, links, carried, eliminated, cosine, sine, remaining = (
            part[goes_on] for part in state
        )
        active = active[goes_on]
        if len(active) == 0:
            break
    _ritz_values(torch.stack(diagonal), torch.stack(off), system.regularization, tally)
    return Outcome(solution)


def _spread(values: Tensor, active: Tensor, columns: int) -> Tensor:
    full = torch.full((columns,), torch.nan, dtype=torch.float64)
    full[active] = values[:, 0]
    return full


def _ritz_values(diagonal: Tensor, off: Tensor, regularization: float, tally: Tally) -> None:
    """Meet the extreme eigenvalues of the tridiagonal matrices, one for each column (K, B)."""
    for column in range(diagonal.shape[1]):
        main = diagonal[:, column]
        main = main[~main.isnan()]
        links = off[: len(main) - 1, column].numpy()
        for which in (0, len(main) - 1):
            value = scipy.linalg.eigh_tridiagonal(
                main.numpy(), links, eigvals_only=True, select="i", select_range=(which, which)
            )
            tally.meet(torch.from_numpy(np.asarray(value)) - regularization)


def extreme_eigenvalues(
    system: System, seed: int, passes: int = 12, block: int = 4
) -> Generator[Round, Moments, tuple[float, float, Tensor]]:
    """Smallest and largest Ritz value of C from a small block Krylov space, and the largest's vector.

    Inner bounds of the spectrum: the largest is close after a few passes, the smallest is
    only known to be at most this.
    """
    generator = torch.Generator().manual_seed(seed)
    block = min(block, system.size)
    fresh = torch.randn(block, system.size, generator=generator, dtype=torch.float64)
    basis = torch.empty(0, system.size, dtype=torch.float64)
    images = torch.empty(0, system.size, dtype=torch.float64)
    for _ in range(passes):
        for _ in range(2):
            fresh = fresh - (fresh @ basis.mT) @ basis
            fresh = _orthonormal(fresh, system)
        fresh = fresh[: system.size - len(basis)]
        moments = yield system.products(fresh)
        basis = torch.cat([basis, fresh])
        images = torch.cat([images, moments.mean("products")])
        fresh = moments.mean("products")
        if len(basis) >= system.size or not fresh.any():
            break
    projected = basis @ images.mT
    values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
    return values[0].item(), values[-1].item(), rotation[:, -1] @ basis
