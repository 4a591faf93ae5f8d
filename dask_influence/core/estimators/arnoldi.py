"""Arnoldi: the eigenpairs of largest magnitude, by a thick-restarted block Krylov method.

Products with a block of B vectors cost one pass over the data, so the basis grows by B
vectors a pass, those in which the residuals of open pairs are longest. Rayleigh-Ritz on the
basis gives the eigenpairs; their residuals and images are known without a product more
(:mod:`~dask_influence.core.estimators.decomposition`). When the basis is full, it is
restarted from its best Ritz vectors (Wu & Simon 2000), which loses nothing.

Influence through a low-rank inverse: Schioppa et al. 2022, section 3. With ``complement``
the orthogonal complement is kept with eigenvalue λ (the Woodbury identity).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.certificate import Certificate
from dask_influence.core.checks import SEEDS
from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
    relative_residuals,
)
from dask_influence.core.estimators.decomposition import Decomposition, Ritz
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

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """C V, and (g − g V Vᵀ)/λ where the complement is kept."""
        rows = gradients.to(torch.float64)
        factors = self.coefficients(rows) @ self.vectors
        if self.complement:
            factors = factors + (rows - (rows @ self.vectors.mT) @ self.vectors) / self.regularization
        return Solution(factors, partial(self._residuals, rows, factors))
        yield  # no round is needed, but the contract is a generator

    def _residuals(self, gradients: Tensor, factors: Tensor) -> Tensor | None:
        """Of the *full* system (H + λI) s = g, through HV; the complement's image needs a pass."""
        if self.complement:
            return None
        products = (factors @ self.vectors.mT) @ self.images
        return relative_residuals(products, self.regularization, gradients, factors)

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


CONFIRMATIONS = 4
"""Passes spent near convergence on looking for pairs that were missed.

A Krylov space of B start vectors holds at most B vectors of an eigenspace, so eigenvalues of
larger multiplicity (those of a linear layer under squared error, one for each output) would be
found once too few. A fresh random block finds the others.
"""

DOUBTFUL = 8
"""Such passes at most, where a pair that is left out may still be one of those kept, as far as its residual tells."""

NEAR = 4.0
"""Times the tolerance at which the search begins: its passes bring the pairs nearer, too."""

PROBES = 2
"""Vectors that such a block has at the least: a single one may happen to miss what is looked for."""


NOISE = 4.0
"""Roundoffs of the model's arithmetic below which a residual is that of products alone, by measurement."""


OPERANDS = 1 / 8
"""The same of rounded operands: of bfloat16's it is twice the residuals found on MLPs, layer norms and convolutions."""


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
        Vectors in the basis before a restart; default max(4R + 4B, 40), at most P. Twice as many where they
        are held in float32, which is for models in float32 and a ``tol`` of at least 64 times their roundoff.
    tol : float
        ``‖H v − θ v‖ ≤ tol·|θ_max|`` for each kept pair; of no less than 4 roundoffs of the model's dtype, or an
        eighth of that of operands which ``matmul_precision`` rounds (2⁻¹⁰ with ``"medium"``).
    seed : int
        Of the random start block.
    block_size : int, optional
        B, vectors multiplied in one pass, from 1 to 16 by default: √(c R / 2), for passes that cost c products beside
        their own. Smaller blocks take fewer products in all, in more passes.
    maxiter : int, optional
        Passes after which the best pairs are taken, with a :class:`ConvergenceWarning`; default 300,
        or 20 R / B where that is more.
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
    maxiter: int | None = None
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
        for name in ("krylov_dimension", "block_size", "maxiter"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
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

    @property
    def certifies_by_rounds(self) -> bool:  # type: ignore[override]
        """Where the complement is kept."""
        return self.complement

    def fit(self, system: System) -> Generator[Round, Moments, LowRankInverse]:
        """Grow the basis B vectors a pass, restart when it is full, stop when R pairs have converged."""
        block = min(self.block_size or _block(self.rank, system.pass_cost), system.size)
        tolerance = max(self.tol, NOISE * torch.finfo(system.dtype).eps, OPERANDS * system.rounded)
        held = _precision(system.dtype, tolerance)
        probes, limit = max(PROBES, block), self._limit(system.size, block, held)
        most = self.maxiter or max(300, 20 * self.rank // block)
        generator = torch.Generator().manual_seed(self.seed)
        basis = Decomposition(system.size, limit + block, held, generator)
        basis.add_random(block)
        moments = yield system.products(basis.next(block))
        basis.advance(moments.total["products"], moments.count)
        random, passes, confirmed = _Start.of(basis), 1, 0
        while True:
            ritz = basis.ritz()
            scale = ritz.values[0].abs().clamp_min(torch.finfo(torch.float64).tiny).item()
            complete = basis.multiplied == system.size
            farthest = ritz.residuals[: self.rank].max().item() / (tolerance * scale)
            near = basis.multiplied >= self.rank and farthest <= NEAR
            found = near and farthest <= 1
            done = found and confirmed >= CONFIRMATIONS
            doubtful = done and confirmed < DOUBTFUL and self._doubtful(ritz, 2 * probes, tolerance * scale)
            if complete or passes >= most or (done and not doubtful):
                break
            confirmed = confirmed + 1 if near else 0
            confirming = 0 < confirmed <= (DOUBTFUL if found else CONFIRMATIONS)
            wanted = probes * CONFIRMATIONS if confirmed == 1 else block
            if basis.multiplied + wanted > limit < system.size:
                kept = ritz.rotation[:, : min((limit + self.rank) // 2, limit - wanted)]
                basis.restart(kept)
                random, ritz = random.turned(kept), basis.ritz()
            count = probes if confirming else block
            if confirmed == 1 or basis.pending == 0:
                basis.add_random(count)
            elif confirming:
                # a missed pair is, so far, one of those next to the ones kept
                basis.favour(ritz.outside[:, self.rank : self.rank + count], 0.0)
            elif basis.multiplied >= self.rank:
                is_open = self._open(ritz, tolerance * scale)
                count = min(block, basis.favour(ritz.outside[:, : self.rank][:, is_open], tolerance * scale))
            moments = yield system.products(basis.next(count))
            basis.advance(moments.total["products"], moments.count)
            passes += 1
        vectors, values, images, residuals = basis.pairs(ritz.rotation[:, : self.rank])
        worst = (residuals.max() / scale).item()
        if worst > tolerance and not complete:
            warnings.warn(
                ConvergenceWarning(
                    f"after {passes} passes the worst of {self.rank} eigenpairs has relative residual "
                    f"{worst:.2g} > tol={self.tol:g}; raise maxiter={most} or krylov_dimension={limit}"
                ),
                stacklevel=2,
            )
        report = {
            "passes": passes,
            "block_size": block,
            "eigenpair_residual": worst,
            "krylov_dimension": limit,
            "captured_spectrum": random.captured(ritz.rotation[:, : self.rank], values, system.size),
        }
        return LowRankInverse.checked(vectors, values, images, system.regularization, self.complement, report)

    def _open(self, ritz: Ritz, allowed: float) -> Tensor:
        """Which of the R pairs have not converged."""
        return ritz.residuals[: self.rank] > allowed

    def _doubtful(self, ritz: Ritz, count: int, allowed: float) -> bool:
        """Whether one of the ``count`` pairs next to those kept may, by its residual, have as large an eigenvalue."""
        sizes, rest = ritz.values.abs(), slice(self.rank, self.rank + count)
        return bool((sizes[rest] + ritz.residuals[rest] > sizes[self.rank - 1] + allowed).any())

    def _limit(self, size: int, block: int, held: torch.dtype) -> int:
        """Rows of the basis before a restart."""
        limit = self.krylov_dimension or max(4 * (self.rank + block), 40) * (8 // held.itemsize)
        return min(max(limit, self.rank + CONFIRMATIONS * max(PROBES, block)), size)


def _block(rank: int, pass_cost: float) -> int:
    """Vectors multiplied at once that make the fit cheapest.

    About 4.5 R + 9 B products are taken in all, by measurement, so the passes' own cost c, in products,
    is worth that of larger blocks: (4.5 R + 9 B)(1 + c/B) is least at B = √(c R / 2).
    """
    return max(1, min(16, round(math.sqrt(pass_cost * rank / 2))))


@dataclass(frozen=True)
class _Start:
    """Random rows r, and how long C makes them.

    Attributes
    ----------
    coordinates : Tensor
        Of the rows in Q (K, b), as far as they lie in it.
    squares : Tensor
        ‖C r‖² (b,).
    """

    coordinates: Tensor
    squares: Tensor

    @classmethod
    def of(cls, basis: Decomposition) -> _Start:
        """The rows that Q begins with."""
        count = basis.multiplied
        return cls(torch.eye(count, dtype=torch.float64), basis.coefficients.square().sum(0))

    def turned(self, rotation: Tensor) -> _Start:
        """In a basis of the Ritz vectors of ``rotation`` (K, k)."""
        return _Start(rotation[: len(self.coordinates)].mT @ self.coordinates, self.squares)

    def captured(self, rotation: Tensor, values: Tensor, size: int) -> float:
        """Σ θ² of pairs over ‖C‖²_F: what C makes of random rows, less the pairs' share of it, estimates the rest."""
        inside = values[:, None] * (rotation[: len(self.coordinates)].mT @ self.coordinates)
        kept = values.square().sum().item()
        others = size * (self.squares - inside.square().sum(0)).mean().clamp_min(0).item()
        return kept / max(kept + others, torch.finfo(torch.float64).tiny)


COARSE = 64.0
"""Roundoffs of the model's arithmetic from which a tolerance leaves the basis in that arithmetic."""


def _precision(dtype: torch.dtype, tolerance: float) -> torch.dtype:
    """What the basis is held in: half the memory, and half the time beside the products, where it does no harm."""
    coarse = dtype == torch.float32 and tolerance >= COARSE * torch.finfo(dtype).eps
    return torch.float32 if coarse else torch.float64
