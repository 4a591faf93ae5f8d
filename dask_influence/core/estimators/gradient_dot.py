"""Gradient dot product: the baseline that leaves the curvature out.

The score is ⟨g_test, g_train⟩, as in TracIn with one checkpoint and learning rate 1 (Pruthi et al.
2020). λ is recorded and not used: it would divide every score by the same number.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.moments import Moments
from dask_influence.core.pairs import Spectral


class IdentityInverse(Inverse):
    """The identity in place of (C + λI)⁻¹."""

    kind: ClassVar[str] = "identity"

    def __init__(self, regularization: float) -> None:
        self.regularization = regularization

    @property
    def residuals_need_rounds(self) -> bool:
        """How far the identity is from the inverse asked for takes a product with the curvature."""
        return True

    @property
    def form(self) -> Spectral:
        """μ = 1, and no directions."""
        none = torch.empty(0, 0, dtype=torch.float64)
        return Spectral(none, none.new_empty(1, 0), none.new_ones(1))

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """The gradients themselves."""
        return Solution(gradients.to(torch.float64))
        yield  # no round is needed, but the contract is a generator

    def with_regularization(self, regularization: float) -> IdentityInverse:
        """The same: λ is recorded, not used."""
        return IdentityInverse(check_regularization(regularization))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """λ alone."""
        return {}, {"regularization": self.regularization}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> IdentityInverse:
        """Inverse of :meth:`state`."""
        return cls(values["regularization"])

    def diagnostics(self) -> dict[str, Any]:
        """That curvature and λ are left out."""
        return {"fitted_curvature": "identity", "regularization_used": False, "positive_definite": True}


@dataclass(frozen=True)
class GradientDot(Estimator):
    """Scores ⟨g_test, g_train⟩: no pass over the data, no curvature, no λ."""

    certifies_by_rounds: ClassVar[bool] = True
    inverts_products: ClassVar[bool] = False

    def form(self, system: System) -> Spectral:
        """No directions."""
        return Spectral.foreseen(0, system.size)

    def fit(self, system: System) -> Generator[Round, Moments, IdentityInverse]:
        """Nothing to do."""
        return IdentityInverse(system.regularization)
        yield  # no round is needed, but the contract is a generator
