"""Arnoldi: the eigenpairs of largest magnitude, by a thick-restarted block Krylov method.

Products with a block of B vectors cost one pass over the data, so the basis grows by B
vectors a pass. The curvature is symmetric: Rayleigh-Ritz on the basis Q gives the
eigenpairs, with residuals known exactly because the images HQ are kept. Full
reorthogonalisation (twice) keeps Q orthonormal to machine precision. When the basis is
full, it is restarted from its best Ritz vectors (Wu & Simon 2000); restarting loses
nothing, because the images of Ritz vectors are combinations of the images held.

Influence through a low-rank inverse: Schioppa et al. 2022, section 3. With ``complement``
the orthogonal complement is kept with eigenvalue λ (the Woodbury identity).
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.certificate import Certificate
from dask_influence.core.checks import SEEDS
from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    System,
    check_regularization,
    relative_residuals,
)
from dask_influence.core.estimators.factored import (
    FactoredInverse,
    check_accuracy,
    check_tolerance,
    spectrum,
)
from dask_influence.core.factored import Approximation
from dask_influence.core.factoring import approximation
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree
from dask_influence.core.pairs import Spectral
from dask_influence.core.problem import Problem
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceWarning,
    IndefiniteCurvatureWarning,
    SingularCurvatureError,
)
from dask_influence.scalars import check_flag, check_integer, check_number, plain_integers


class LowRankInverse(Inverse):
    """V (Λ + λ)⁻¹ Vᵀ, plus (I − V Vᵀ)/λ where the complement is kept.

    Parameters
    ----------
    vectors : Tensor
        V as rows (R, P), orthonormal, float64.
    values : Tensor
        Λ (R,), by falling magnitude.
    images : Tensor
        H V as rows (R, P): they certify factors without another pass.
    regularization : float
        λ.
    complement : bool
        Whether the orthogonal complement of V counts, with eigenvalue λ.
    approximation : Approximation, optional
        V in factors.
    """

    kind: ClassVar[str] = "low_rank"

    def __init__(
        self,
        vectors: Tensor,
        values: Tensor,
        images: Tensor,
        regularization: float,
        complement: bool,
        report: Mapping[str, Any],
        approximation: Approximation | None = None,
    ) -> None:
        self.approximation = approximation
        self.vectors, self.values, self.images = vectors, values, images
        self.regularization, self.complement, self.report = regularization, complement, dict(report)

    @classmethod
    def checked(
        cls,
        vectors: Tensor,
        values: Tensor,
        images: Tensor,
        regularization: float,
        complement: bool,
        report: Mapping[str, Any],
        approximation: Approximation | None = None,
    ) -> LowRankInverse:
        """An inverse whose Λ + λ has been checked, with a warning where it is indefinite."""
        shifted = values + regularization
        scale = max(values.abs().max().item(), torch.finfo(torch.float64).tiny)
        if shifted.abs().min().item() <= torch.finfo(torch.float64).eps * len(values) * scale:
            raise SingularCurvatureError(
                f"a kept eigenvalue plus hessian_regularization={regularization:g} is zero "
                f"(eigenvalues from {values.min():.3g} to {values.max():.3g}); use a larger "
                f"hessian_regularization, for example {1e-3 * scale:.2g}, or a smaller rank"
            )
        smallest = values.min().item()
        if smallest + regularization < 0:
            warnings.warn(
                IndefiniteCurvatureWarning(
                    f"H + λI is not positive definite: the smallest eigenvalue found is {smallest:.4g} and "
                    f"hessian_regularization={regularization:g}; "
                    f"hessian_regularization > {-smallest:.4g} makes the part found positive definite"
                ),
                stacklevel=2,
            )
        if complement and regularization == 0:
            raise ConfigurationError(
                "complement=True divides the orthogonal complement by hessian_regularization, which is 0; "
                "give hessian_regularization > 0 or complement=False"
            )
        check_accuracy(approximation, values, regularization, complement)
        return cls(vectors, values, images, regularization, complement, report, approximation)

    @property
    def residuals_need_rounds(self) -> bool:
        """H times the complement of a gradient is not known from the fit."""
        return self.complement

    @property
    def directions(self) -> Tensor | None:
        """V, unless the complement makes factors leave its span."""
        return None if self.complement else self.vectors

    @cached_property
    def certificate(self) -> Certificate | None:
        """By HV, unless the complement makes factors leave the span of V."""
        return None if self.complement else Certificate(self.vectors, self.images, self.values)

    @property
    def form(self) -> Spectral | None:
        """w = 1/(Λ + λ) − 1/λ and μ = 1/λ, where the complement is kept."""
        if not self.complement:
            return None
        weights, plain = self._spectrum
        return Spectral(self.vectors, weights[None], torch.tensor([plain], dtype=torch.float64))

    def coefficients(self, gradients: Tensor) -> Tensor:
        """(g V)(Λ + λ)⁻¹, shape (n, R)."""
        return self.weighed(gradients.to(torch.float64) @ self.vectors.mT)

    def weighed(self, projections: Tensor) -> Tensor:
        """(g V)(Λ + λ)⁻¹ of g V (n, R)."""
        return projections.to(torch.float64) / (self.values + self.regularization)

    @property
    def _spectrum(self) -> tuple[Tensor, float]:
        return spectrum(self.values, self.regularization, self.complement)

    def approximated(self, problem: Problem, x: Tree, y: Tree, tolerance: float) -> LowRankInverse:
        """With V in factors."""
        found = approximation(problem, x, y, self.vectors, *self._spectrum, tolerance)
        own = (self.vectors, self.values, self.images, self.regularization, self.complement, self.report)
        return type(self)(*own, found)

    @property
    def approximate(self) -> FactoredInverse | None:
        """V in factors, where they are accurate enough at λ."""
        factored = None if self.approximation is None else self.approximation.at(*self._spectrum)
        if factored is None:
            return None
        return FactoredInverse(factored, self.values, self.regularization, self.complement)

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Tensor]:
        """C V, and (g − g V Vᵀ)/λ where the complement is kept."""
        rows = gradients.to(torch.float64)
        factors = self.coefficients(rows) @ self.vectors
        if self.complement:
            factors = factors + (rows - (rows @ self.vectors.mT) @ self.vectors) / self.regularization
        return factors
        yield  # no round is needed, but the contract is a generator

    def residuals(self, gradients: Tensor, factors: Tensor) -> Tensor | None:
        """Of the *full* system (H + λI) s = g, through HV; the complement's image needs a pass."""
        if self.complement:
            return None
        products = (factors @ self.vectors.mT) @ self.images
        return relative_residuals(products, self.regularization, gradients.to(torch.float64), factors)

    def with_regularization(self, regularization: float) -> LowRankInverse:
        """λ enters the kept eigenvalues alone: nothing is recomputed."""
        return self.checked(
            self.vectors,
            self.values,
            self.images,
            check_regularization(regularization),
            self.complement,
            self.report,
            self.approximation,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Eigenpairs and images."""
        tensors = {"vectors": self.vectors, "values": self.values, "images": self.images}
        values = {
            "regularization": self.regularization,
            "complement": self.complement,
            "report": self.report,
        }
        if self.approximation is not None:
            own, values["approximation"] = self.approximation.state()
            tensors |= own
        return tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> LowRankInverse:
        """Take the eigenpairs as they are."""
        known = {name: value for name, value in values.items() if name != "approximation"}
        found = Approximation.from_state(tensors, values.get("approximation"))
        return cls(tensors["vectors"], tensors["values"], tensors["images"], **known, approximation=found)

    def diagnostics(self) -> dict[str, Any]:
        """Spectrum kept, its residuals, the rounds that it took.

        ``captured_spectrum`` estimates Σ θ² of the kept eigenvalues over that of all.
        """
        return {
            "eigenvalues": self.values.tolist(),
            "smallest_eigenvalue": self.values.min().item(),
            "largest_eigenvalue": self.values.max().item(),
            "positive_definite": self.values.min().item() + self.regularization > 0,
            "complement": self.complement,
            **self.report,
            **({} if self.approximation is None else self.approximation.report(*self._spectrum)),
        }


CONFIRMATIONS = 3
"""Passes spent after convergence on looking for pairs that were missed.

A Krylov space of B start vectors holds at most B vectors of an eigenspace, so eigenvalues of
larger multiplicity (those of a linear layer under squared error, one for each output) would be
found once too few. A fresh random block finds the others.
"""


@dataclass(frozen=True)
class Arnoldi(Estimator):
    """Eigenpairs of largest magnitude (negatives included) to a relative residual ``tol``.

    Parameters
    ----------
    rank : int
        R, 1 ≤ R < P.
    complement : bool
        Keep the orthogonal complement with eigenvalue λ.
    krylov_dimension : int, optional
        Vectors in the basis before a restart; default max(2R + 2B, 20), at most P. Twice as many where they
        are held in float32, which is for models in float32 and a ``tol`` of at least 256 times their roundoff.
    tol : float
        ``‖H v − θ v‖ ≤ tol·|θ_max|`` for each kept pair.
    seed : int
        Of the random start block.
    block_size : int, optional
        B, vectors multiplied in one pass; default about a tenth of the rank, from 2 to 16. Smaller
        blocks take fewer products in all, in more passes: rank 20 of an MLP of 820,874 parameters
        (4,096 samples, tol=1e-3) took about 90 products in 43 passes by blocks of 2, 150 in 37 by blocks of 4.
    maxiter : int
        Passes after which the best pairs are taken, with a :class:`ConvergenceWarning`.
    direction_tol : float, optional
        Relative error of scores that may be made for speed: directions are held layer by layer as thin
        matrices, of ranks chosen by scores of samples of the data fitted, where that is cheaper. Part of what
        is scored is compared with the directions themselves, which are taken where they differ by more. None
        takes them always. Perturbation and influence factors do.
    """

    rank: int = 10
    complement: bool = False
    krylov_dimension: int | None = None
    tol: float = 1e-6
    seed: int = 0
    block_size: int | None = None
    maxiter: int = 300
    direction_tol: float | None = None

    @property
    def tolerance(self) -> float | None:
        """``direction_tol``."""
        return self.direction_tol

    def directions(self, system: System) -> int | None:
        """R, unless the complement is kept."""
        return None if self.complement else self.rank

    def inverse_bytes(self, system: System, regularizations: int = 1) -> int:
        """V and its images, float64."""
        return 16 * self.rank * system.size

    def form(self, system: System) -> Spectral | None:
        """R directions, where the complement is kept."""
        return Spectral.foreseen(self.rank, system.size) if self.complement else None

    def __post_init__(self) -> None:
        """Integers of numpy as Python's."""
        plain_integers(self, "rank", "krylov_dimension", "seed", "block_size", "maxiter")

    def validate(self, system: System) -> None:
        """Rank, basis and tolerance against P and against each other."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank < system.size:
            raise ConfigurationError(
                f"rank must be an integer from 1 to P − 1 = {system.size - 1} (the model has P = {system.size} "
                f"parameters in θ); got {self.rank!r}"
            )
        for name in ("krylov_dimension", "block_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        check_integer("maxiter", self.maxiter)
        check_flag("complement", self.complement)
        check_integer("seed", self.seed, *SEEDS)
        check_number("tol", self.tol)
        check_tolerance(self.direction_tol)
        if self.krylov_dimension is not None and not self.rank < self.krylov_dimension:
            raise ConfigurationError(
                f"krylov_dimension must be larger than rank={self.rank}; got {self.krylov_dimension!r}"
            )
        if not self.tol > 0:
            raise ConfigurationError(f"tol must be positive; got {self.tol!r}")
        if self.complement and system.regularization == 0:
            raise ConfigurationError(
                "complement=True divides the orthogonal complement by hessian_regularization, which is 0; "
                "give hessian_regularization > 0 or complement=False"
            )

    def fit(self, system: System) -> Generator[Round, Moments, LowRankInverse]:
        """Grow the basis B vectors a pass, restart when it is full, stop when R pairs have converged."""
        block = min(self.block_size or max(2, min(16, -(-self.rank // 10))), system.size)
        probe = min(max(block, 4), system.size)  # vectors that look for missed pairs
        tolerance = max(self.tol, 32 * torch.finfo(system.dtype).eps)  # below it products are noise
        held = _precision(system.dtype, tolerance)
        limit = self.krylov_dimension or max(2 * self.rank + 2 * block, 20) * (8 // held.itemsize)
        limit = min(max(limit, self.rank + 2 * probe), system.size)
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(block, system.size, generator=generator, dtype=torch.float64)
        basis = _Basis(system.size, limit, held)
        fresh = basis.orthonormalised(start.to(held), generator)
        passes = confirmed = 0
        random = fresh, fresh  # with its images, once they are there
        while True:
            moments = yield system.products(fresh)
            passes += 1
            if passes == 1:
                random = fresh, moments.mean("products")
            basis.append(fresh, moments.mean("products"))
            values, rotation = basis.ritz()
            wanted = min(
                self.rank + (probe if confirmed else 0), basis.length
            )  # more of them where they are looked for
            kept = slice(min(self.rank, wanted))
            scale = values[0].abs().clamp_min(torch.finfo(torch.float64).tiny).item()
            # The residuals of the pairs still open span what a Lanczos step would add next.
            candidates = basis.open(rotation[:, kept], values[kept], tolerance * scale, block)
            complete = basis.length == system.size
            converged = basis.length >= self.rank and len(candidates) == 0
            if complete or passes >= self.maxiter or (converged and confirmed == CONFIRMATIONS):
                break
            if len(candidates):
                confirmed = 0
            else:
                others = torch.arange(self.rank if confirmed else wanted, wanted)
                candidates = basis.residuals(rotation[:, others], values[others])
                if len(candidates) == 0:  # zeros are replaced by random vectors: look elsewhere
                    candidates = torch.zeros(probe, system.size, dtype=held)
            confirmed += converged
            if basis.length + len(candidates) > limit:
                basis.restart(rotation[:, : min(max(self.rank, limit - 2 * probe), basis.length)])
            fresh = basis.orthonormalised(candidates[: system.size - basis.length], generator)
        vectors, values, images = basis.pairs(rotation[:, : self.rank])
        worst = ((images - values[:, None] * vectors).norm(dim=1).max() / scale).item()
        if worst > tolerance and not complete:
            warnings.warn(
                ConvergenceWarning(
                    f"after {passes} passes the worst of {self.rank} eigenpairs has relative residual "
                    f"{worst:.2g} > tol={self.tol:g}; raise maxiter={self.maxiter} or krylov_dimension={limit}"
                ),
                stacklevel=2,
            )
        report = {
            "passes": passes,
            "block_size": block,
            "eigenpair_residual": worst,
            "krylov_dimension": limit,
            "captured_spectrum": _captured(vectors, values, *random),
        }
        return LowRankInverse.checked(vectors, values, images, system.regularization, self.complement, report)


def _captured(vectors: Tensor, values: Tensor, rows: Tensor, images: Tensor) -> float:
    """Σ θ² of the pairs kept over ‖C‖²_F: random rows, and their images, estimate what the complement adds to it."""
    rows = rows.to(torch.float64)
    rest = images - ((rows @ vectors.mT) * values) @ vectors
    kept, lengths = values.square().sum().item(), rows.square().sum(1)
    others = vectors.shape[1] * (rest.square().sum(1) / lengths).mean().item()
    return kept / max(kept + others, torch.finfo(torch.float64).tiny)


COARSE = 256.0
"""Roundoffs of the model's arithmetic from which a tolerance leaves the basis in that arithmetic."""


def _precision(dtype: torch.dtype, tolerance: float) -> torch.dtype:
    """What the basis is held in: half the memory, and half the time beside the products, where it does no harm."""
    coarse = dtype == torch.float32 and tolerance >= COARSE * torch.finfo(dtype).eps
    return torch.float32 if coarse else torch.float64


CLEAR = 0.1
"""Of the length of rows: what may be subtracted, and has to be left, for one orthogonalisation to do."""

VANISHED = 4096.0
"""Roundoffs of a row's length below which what is left of it is rounding."""


class _Basis:
    """Orthonormal rows Q (K, P) with their images HQ, preallocated."""

    def __init__(self, size: int, limit: int, dtype: torch.dtype) -> None:
        self._rows = torch.empty(limit, size, dtype=dtype)
        self._images = torch.empty(limit, size, dtype=dtype)
        self._projected = torch.empty(limit, limit, dtype=torch.float64)  # Q (H Q)ᵀ, symmetric to rounding
        self.length = self._first = 0

    def append(self, rows: Tensor, images: Tensor) -> None:
        start, self.length = self.length, self.length + len(rows)
        new, held = slice(start, self.length), slice(self.length)
        self._rows[new], self._images[new] = rows, images
        projected = self._rows[held] @ self._images[new].mT  # (K, B)
        self._projected[held, new] = projected.to(torch.float64)
        self._projected[new, :start] = self._projected[:start, new].mT

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values by falling magnitude, and the rotation (K, K) of the basis to their vectors, float64."""
        projected = self._projected[: self.length, : self.length]
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        return values[order], rotation[:, order]

    def open(self, rotation: Tensor, values: Tensor, allowed: float, count: int) -> Tensor:
        """``count`` residuals, of the Ritz pairs of ``rotation``, that are longer than ``allowed``, or all there are.

        Pairs that were open before are looked at first: one that has converged seldom opens again.
        """
        order = [*range(self._first, len(values)), *range(min(self._first, len(values)))]
        found: list[Tensor] = []
        for part in torch.tensor(order).split(count):
            residuals = self.residuals(rotation[:, part], values[part])
            longer = residuals.norm(dim=1) > allowed
            if not found and longer.any():
                self._first = int(part[longer][0])
            found.extend(residuals[longer])
            if len(found) >= count:
                break  # no need to look at the others
        return torch.stack(found[:count]) if found else self._rows[:0]

    def residuals(self, rotation: Tensor, values: Tensor) -> Tensor:
        """H v − θ v for the Ritz pairs of ``rotation``, as rows."""
        held, turned = slice(self.length), rotation.mT.to(self._rows.dtype)
        scaled = (values * rotation).mT.to(self._rows.dtype)
        return (turned @ self._images[held]).addmm_(scaled, self._rows[held], alpha=-1)

    def restart(self, rotation: Tensor) -> None:
        """Replace the basis by the Ritz vectors of ``rotation``."""
        held = slice(self.length)
        projected = rotation.mT @ self._projected[held, held] @ rotation
        vectors, images = self.rotated(rotation)
        held = slice(len(vectors))
        self.length = len(vectors)
        self._rows[held], self._images[held] = vectors, images
        self._projected[held, held] = projected

    def rotated(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Rows rotationᵀ Q and their images."""
        turned = rotation.mT.to(self._rows.dtype)
        return turned @ self._rows[: self.length], turned @ self._images[: self.length]

    def pairs(self, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V (R, P), Λ (R,) by falling magnitude and H V of the span of ``rotation``, V orthonormal in float64."""
        vectors, images = (part.to(torch.float64) for part in self.rotated(rotation))
        whitening = torch.linalg.inv(torch.linalg.cholesky(vectors @ vectors.mT))  # of nearly the identity
        projected = whitening @ (vectors @ images.mT) @ whitening.mT
        values, turned = torch.linalg.eigh((projected + projected.mT) / 2)
        order = values.abs().argsort(descending=True, stable=True)
        turned = turned[:, order].mT @ whitening
        return turned @ vectors, values[order], turned @ images

    def orthonormalised(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """``rows`` made orthonormal to the basis and to each other.

        Rows that vanish (the Krylov space is exhausted) are replaced by random ones, so
        that an invariant subspace never stops the search.
        """
        held = self._rows[: self.length]
        least = torch.finfo(rows.dtype)
        rows = rows.clone()
        for _ in range(2):
            norms = rows.norm(dim=1, keepdim=True)
            rows = torch.where(norms > 0, rows / norms.clamp_min(least.tiny), rows)
            overlap = rows @ held.mT
            rows = rows - overlap @ held
            orthonormal, triangle = torch.linalg.qr(rows.mT)
            remaining = triangle.diagonal().abs()
            vanished = remaining < VANISHED * least.eps
            if vanished.any():
                shape = int(vanished.sum()), rows.shape[1]
                random = torch.randn(shape, generator=generator, dtype=torch.float64).to(rows.dtype)
                rows = orthonormal.mT.clone()
                rows[vanished] = random / random.norm(dim=1, keepdim=True)
                return self.orthonormalised(rows, generator)
            rows = orthonormal.mT
            if remaining.min() > CLEAR and (overlap.abs() < CLEAR).all():
                break  # little was subtracted, and rounding is all that is left of it
        return rows.contiguous()
