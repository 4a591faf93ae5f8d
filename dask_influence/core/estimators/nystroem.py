"""Nyström sketch: a low-rank approximation of the curvature from one pass over the data.

Ĉ = Y (Ωᵀ Y)⁺ Yᵀ with Y = C Ω and a random Ω (P, R); its inverse keeps the orthogonal
complement with eigenvalue λ. Frangella, Tropp & Udell 2023 use it as a preconditioner,
Hataya & Yamada 2023 for inverse Hessian products.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.checks import SEEDS
from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.estimators.factored import (
    FactoredInverse,
    check_accuracy,
    check_tolerance,
    spectrum,
)
from dask_influence.core.estimators.preconditioners import Sketch, nystroem_sketch
from dask_influence.core.factored import Approximation
from dask_influence.core.factoring import approximation
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree
from dask_influence.core.pairs import Spectral
from dask_influence.core.problem import Problem
from dask_influence.errors import (
    ConfigurationError,
    IndefiniteCurvatureWarning,
    SingularCurvatureError,
)
from dask_influence.scalars import check_integer, plain_integers


class SketchInverse(Inverse):
    """(V Λ Vᵀ + λI)⁻¹ = V (Λ + λ)⁻¹ Vᵀ + (I − V Vᵀ)/λ.

    Parameters
    ----------
    sketch : Sketch
        V and Λ.
    regularization : float
        λ > 0.
    """

    kind: ClassVar[str] = "nystroem_sketch"

    def __init__(
        self, sketch: Sketch, regularization: float, approximation: Approximation | None = None
    ) -> None:
        self.sketch, self.regularization, self.approximation = sketch, regularization, approximation

    @classmethod
    def checked(
        cls, sketch: Sketch, regularization: float, approximation: Approximation | None = None
    ) -> SketchInverse:
        """An inverse whose Λ + λ has been checked, with a warning where it is indefinite."""
        _check_complement(regularization)
        values = sketch.values
        if len(values) == 0:
            return cls(sketch, regularization)
        smallest, scale = values.min().item(), values.abs().max().item()
        if (values + regularization).abs().min().item() <= len(values) * torch.finfo(
            torch.float64
        ).eps * scale:
            raise SingularCurvatureError(
                f"an eigenvalue of the sketch plus hessian_regularization={regularization:g} is zero (eigenvalues "
                f"from {smallest:.3g} to {values.max():.3g}); use hessian_regularization > {-smallest:.4g}"
            )
        if smallest + regularization < 0:
            warnings.warn(
                IndefiniteCurvatureWarning(
                    f"the sketch of H, plus λI, is not positive definite: its smallest eigenvalue is {smallest:.4g} "
                    f"and hessian_regularization={regularization:g}. The approximation is meant for curvatures "
                    f"without negative eigenvalues: use curvature='ggn', or hessian_regularization > {-smallest:.4g}"
                ),
                stacklevel=2,
            )
        check_accuracy(approximation, values, regularization, complement=True)
        return cls(sketch, regularization, approximation)

    @property
    def residuals_need_rounds(self) -> bool:
        """H times the complement of a gradient is not known from the fit."""
        return True

    @property
    def form(self) -> Spectral:
        """w = 1/(Λ + λ) − 1/λ and μ = 1/λ."""
        weights, plain = self._spectrum
        return Spectral(self.sketch.vectors, weights[None], torch.tensor([plain], dtype=torch.float64))

    @property
    def _spectrum(self) -> tuple[Tensor, float]:
        return spectrum(self.sketch.values, self.regularization, complement=True)

    def approximated(self, problem: Problem, x: Tree, y: Tree, tolerance: float) -> SketchInverse:
        """With V in factors."""
        found = approximation(problem, x, y, self.sketch.vectors, *self._spectrum, tolerance)
        return type(self)(self.sketch, self.regularization, found)

    @property
    def approximate(self) -> FactoredInverse | None:
        """V in factors, where they are accurate enough at λ."""
        factored = None if self.approximation is None else self.approximation.at(*self._spectrum)
        if factored is None:
            return None
        return FactoredInverse(factored, self.sketch.values, self.regularization, complement=True)

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """The kept part through Λ + λ, the rest through λ."""
        rows = gradients.to(torch.float64)
        return Solution(self.sketch.inverse_times(rows, self.regularization, complement=self.regularization))
        yield  # no round is needed, but the contract is a generator

    def with_regularization(self, regularization: float) -> SketchInverse:
        """λ enters by itself: nothing is recomputed."""
        return self.checked(self.sketch, check_regularization(regularization), self.approximation)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The sketch and λ."""
        tensors = {"vectors": self.sketch.vectors, "values": self.sketch.values}
        values: dict[str, Any] = {"regularization": self.regularization}
        if self.approximation is not None:
            own, values["approximation"] = self.approximation.state()
            tensors |= own
        return tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> SketchInverse:
        """Take the sketch as it is."""
        found = Approximation.from_state(tensors, values.get("approximation"))
        return cls(Sketch(tensors["vectors"], tensors["values"]), values["regularization"], found)

    def diagnostics(self) -> dict[str, Any]:
        """Spectrum of the sketch; ``rank`` is smaller than asked for where C has fewer dimensions."""
        values = self.sketch.values
        found = {} if len(values) == 0 else {"largest_eigenvalue": values[0].item()}
        return {
            "rank": len(values),
            "eigenvalues": values.tolist(),
            **found,
            "positive_definite": bool((values + self.regularization > 0).all()),
            **({} if self.approximation is None else self.approximation.report(*self._spectrum)),
        }


def _check_complement(regularization: float) -> None:
    if regularization == 0:
        raise ConfigurationError(
            "the Nyström sketch keeps the orthogonal complement with eigenvalue hessian_regularization, which is 0; "
            "give hessian_regularization > 0"
        )


@dataclass(frozen=True)
class NystroemSketch(Estimator):
    """A randomised low-rank approximation of C, complement kept with eigenvalue λ; one pass.

    Parameters
    ----------
    rank : int
        R, products taken in the pass, 1 ≤ R < P.
    seed : int
        Of the test matrix Ω: ``torch.randn(R, P)`` transposed, in float64.
    direction_tol : float, optional
        Relative error of scores that may be made for speed: directions are held layer by layer as thin
        matrices, of ranks chosen by scores of samples of the data fitted, where that is cheaper. Part of what
        is scored is compared with the directions themselves, which are taken where they differ by more. None
        takes them always. Perturbation and influence factors do.
    """

    certifies_by_rounds: ClassVar[bool] = True

    rank: int = 10
    seed: int = 0
    direction_tol: float | None = None

    @property
    def tolerance(self) -> float | None:
        """``direction_tol``."""
        return self.direction_tol

    def __post_init__(self) -> None:
        """Integers of numpy as Python's."""
        plain_integers(self, "rank", "seed")

    def inverse_bytes(self, system: System, regularizations: int = 1) -> int:
        """The sketch, float64."""
        return 8 * self.rank * system.size

    def validate(self, system: System) -> None:
        """Rank against P, and λ > 0."""
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank < system.size:
            raise ConfigurationError(
                f"rank must be an integer from 1 to P − 1 = {system.size - 1} (the model has P = {system.size} "
                f"parameters in θ); got {self.rank!r}"
            )
        check_integer("seed", self.seed, *SEEDS)
        check_tolerance(self.direction_tol)
        _check_complement(system.regularization)

    def form(self, system: System) -> Spectral:
        """R directions."""
        return Spectral.foreseen(self.rank, system.size)

    def fit(self, system: System) -> Generator[Round, Moments, SketchInverse]:
        """One round: R products."""
        sketch = yield from nystroem_sketch(system, self.rank, self.seed)
        return SketchInverse.checked(sketch, system.regularization)
