"""What scoring needs of an inverse whose directions are factored: no vector of size P but a few."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.estimators.base import Inverse, Round, Solution
from dask_influence.core.factored import Approximation, Factored
from dask_influence.core.moments import Moments
from dask_influence.core.pairs import Spectral
from dask_influence.errors import ConfigurationError, InfluenceWarning
from dask_influence.scalars import check_number


class FactoredInverse(Inverse):
    """V (Λ + λ)⁻¹ Vᵀ, plus (I − V Vᵀ)/λ where the complement is kept, with V in factors.

    Parameters
    ----------
    factored : Factored
        V.
    values : Tensor
        Λ (R,), float64.
    regularization : float
        λ.
    complement : bool
        Whether the orthogonal complement of V counts, with eigenvalue λ.
    """

    kind: ClassVar[str] = "factored"

    def __init__(self, factored: Factored, values: Tensor, regularization: float, complement: bool) -> None:
        self.factored, self.values = factored, values
        self.regularization, self.complement = regularization, complement
        self._exact: Callable[[], Inverse] | None = None

    @property
    def directions(self) -> Factored | None:
        """V, unless the complement makes factors leave its span."""
        return None if self.complement else self.factored

    @property
    def form(self) -> Spectral | None:
        """w and μ, where the complement is kept."""
        if not self.complement:
            return None
        weights, plain = spectrum(self.values, self.regularization, self.complement)
        return Spectral(self.factored, weights[None], torch.tensor([plain], dtype=torch.float64))

    def weighed(self, projections: Tensor) -> Tensor:
        """(g V)(Λ + λ)⁻¹ of g V (n, R)."""
        return projections.to(torch.float64) / (self.values + self.regularization)

    def limited(self, limit: float) -> FactoredInverse:
        """The same with another limit to the error of projections."""
        factored = replace(self.factored, limit=limit)
        return type(self)(factored, self.values, self.regularization, self.complement)

    def backed_by(self, exact: Callable[[], Inverse]) -> FactoredInverse:
        """The same, knowing where the dense directions are."""
        other = self.limited(self.factored.limit)
        other.factored = replace(self.factored, exact=lambda: _vectors(exact()))
        other._exact = exact
        return other

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Factors, by the dense directions."""
        assert self._exact is not None
        solution: Solution = yield from self._exact().solve(gradients)
        return solution

    def with_regularization(self, regularization: float) -> Inverse:
        """That of the dense directions."""
        assert self._exact is not None
        return self._exact().with_regularization(regularization)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Factors and spectrum."""
        tensors, values = self.factored.state()
        own = {"regularization": self.regularization, "complement": self.complement, "factored": values}
        return {**tensors, "values": self.values}, own

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> FactoredInverse:
        """Take the factors as they are."""
        factored = Factored.from_state(tensors, values["factored"])
        return cls(factored, tensors["values"], values["regularization"], values["complement"])


def _vectors(inverse: Inverse) -> Tensor:
    """V (R, P) of a low-rank inverse."""
    form = inverse.form
    found = form.directions if isinstance(form, Spectral) else inverse.directions
    assert isinstance(found, Tensor)
    return found


def spectrum(values: Tensor, regularization: float, complement: bool) -> tuple[Tensor, float]:
    """w (R,) and μ of V diag(w) Vᵀ + μI: 1/(Λ + λ) and 0, or 1/(Λ + λ) − 1/λ and 1/λ with the complement.

    Examples
    --------
    >>> spectrum(torch.tensor([1.0, 3.0]), 1.0, complement=True)
    (tensor([-0.5000, -0.7500]), 1.0)
    """
    plain = 1 / regularization if complement else 0.0
    return 1 / (values + regularization) - plain, plain


def check_accuracy(
    approximation: Approximation | None, values: Tensor, regularization: float, complement: bool
) -> None:
    """Warn where factored directions are not accurate enough at λ, so that scores are those of dense ones."""
    if approximation is None or approximation.factored is None:
        return
    weights, plain = spectrum(values, regularization, complement)
    if not approximation.allows(weights, plain):
        warnings.warn(
            InfluenceWarning(
                f"at hessian_regularization={regularization:g} the directions as they were factored would put scores "
                f"off by {approximation.error(weights, plain):.2g}, more than direction_tol="
                f"{approximation.tolerance:g}; they are taken whole (fit again at this λ to have others)"
            ),
            stacklevel=3,
        )


def check_tolerance(value: object) -> None:
    """Refuse a ``direction_tol`` that is neither None nor a number between 0 and 1.

    Examples
    --------
    >>> check_tolerance(1.5)
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: direction_tol must be None or between 0 and 1, such as 1e-4; got 1.5
    """
    if value is None:
        return
    check_number("direction_tol", value)
    if not 0 < value < 1:  # type: ignore[operator] # a number by now
        raise ConfigurationError(
            f"direction_tol must be None or between 0 and 1, such as 1e-4; got {value!r}"
        )
