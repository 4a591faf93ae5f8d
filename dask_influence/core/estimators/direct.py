"""Direct: the exact curvature as a dense matrix, factorised once.

(H + λI) = L Lᵀ by Cholesky where it is positive definite; otherwise by the symmetric
indefinite factorisation of Bunch and Kaufman, with a warning that names the λ that would
make it definite. Koh & Liang 2017, equation 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import scipy.linalg.lapack
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from dask_influence.core.curvature import matrix_sums
from dask_influence.core.derived import derived
from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.moments import Moments
from dask_influence.core.probes import SMALL, Probes
from dask_influence.core.triangular import BLOCK, Blocked
from dask_influence.errors import IndefiniteCurvatureWarning, SingularCurvatureError

NARROW = torch.finfo(torch.float32).eps
NARROW_RESIDUAL = 32 * NARROW
"""Bound of residuals of float32 solves that are taken: norms are a third of it, as rounding of gradients makes them."""

FEWEST_NARROW = 16
"""Rows from which float32 is tried: solves of fewer take the time of reading the factorisation."""

RESTARTS_FOR_ALL = 60
"""P divided by this: the restarts, of about ten solves each, that take as long as all eigenvalues. Where the least is
not found by then, as among many that are next to it, all are computed."""

LARGEST_LOOKED_AT = 2048
"""P up to which a run looks at the extreme eigenvalues for its record: a fraction of a second."""


class DirectInverse(Inverse):
    """(H + λI)⁻¹ through a symmetric factorisation; H is kept, so that λ can change.

    Parameters
    ----------
    matrix : Tensor
        H (P, P), float64, symmetric.
    regularization : float
        λ.
    precision : float
        Unit roundoff of the arithmetic that H was computed in; at λ = 0 an eigenvalue
        below it (relative to the largest) is indistinguishable from zero.
    factor, pivots : Tensor, optional
        A factorisation made before; ``pivots`` marks the indefinite one.
    probes : Probes, optional
        What residuals are told by, made before.
    """

    kind: ClassVar[str] = "direct"

    def __init__(
        self,
        matrix: Tensor,
        regularization: float,
        precision: float,
        factor: Tensor | None = None,
        pivots: Tensor | None = None,
        probes: Probes | None = None,
    ) -> None:
        self.matrix = matrix
        self.regularization = regularization
        self.precision = precision
        if factor is None:
            factor, pivots = self._factorise()
        # a file holds rows: one layout, so that solves give the same bits
        self._factor, self._pivots = factor.contiguous(), pivots
        if probes is not None:
            self._probes = probes

    def _shifted(self) -> Tensor:
        shifted = self.matrix.clone()
        shifted.diagonal().add_(self.regularization)
        return shifted

    def _factorise(self) -> tuple[Tensor, Tensor | None]:
        shifted = self._shifted()
        # LAPACK's columns of the upper factor are the rows of the lower one
        upper, info = torch.linalg.cholesky_ex(shifted, upper=True)
        factor = upper.mT
        tolerance = len(shifted) * torch.finfo(torch.float64).eps
        if self.regularization == 0:
            tolerance = max(tolerance, self.precision)
        if info == 0 and self._reciprocal_condition(factor, shifted) > tolerance:
            return factor, None
        eigenvalues = torch.linalg.eigvalsh(self.matrix)
        smallest = eigenvalues[0].item()
        shifted_values = (eigenvalues + self.regularization).abs()
        if shifted_values.min() <= tolerance * shifted_values.max():
            raise SingularCurvatureError(
                f"H + λI is singular at hessian_regularization={self.regularization:g}: an eigenvalue of it is "
                f"{shifted_values.min():.2g} beside a largest of {shifted_values.max():.2g}; "
                f"use hessian_regularization > {max(0.0, -smallest) + 1e-6 * float(eigenvalues.abs().max()):.3g}"
            )
        if smallest + self.regularization > 0:
            return factor, None
        warnings.warn(
            IndefiniteCurvatureWarning(
                f"H + λI is not positive definite: the smallest eigenvalue of H is {smallest:.4g} and "
                f"hessian_regularization={self.regularization:g}. Scores can have the wrong sign and size; "
                f"hessian_regularization > {-smallest:.4g} makes it positive definite"
            ),
            stacklevel=2,
        )
        packed, pivots, _ = torch.linalg.ldl_factor_ex(shifted)
        return packed, pivots

    @staticmethod
    def _reciprocal_condition(factor: Tensor, shifted: Tensor) -> float:
        norm = scipy.linalg.lapack.dlange("1", shifted.mT.numpy())
        return float(scipy.linalg.lapack.dpocon(factor.mT.numpy(), norm, uplo="U")[0])

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Factors of all rows at once: two triangular solves.

        Residuals are those of H itself and not of its factorisation, or bounds of them.
        """
        narrow = None if len(gradients) < FEWEST_NARROW else self._narrow
        if narrow is None:
            rows = gradients.to(torch.float64)
            factors = self._solve_rows(rows)
            return Solution(factors, partial(self._probes.residuals, rows, factors))
        # gradients in float32 get factors in float32: as wide ones they would only be copied to and fro
        held = torch.promote_types(gradients.dtype, torch.float32)
        factors = narrow.solve(gradients.to(torch.float32)).to(held)
        residuals = self._probes.residuals(gradients, factors)
        lost = ~(residuals <= NARROW_RESIDUAL)  # float32 may have overflown
        if lost.any():
            rows, factors = gradients[lost].to(torch.float64), factors.to(torch.float64)
            factors[lost] = wide = self._solve_rows(rows)
            residuals[lost] = self._probes.residuals(rows, wide)
        return Solution.measured(factors, residuals)
        yield  # no round is needed, but the contract is a generator

    def _solve_rows(self, rows: Tensor) -> Tensor:
        if self._pivots is None:
            # twice as fast as `cholesky_solve` for few rows
            half = torch.linalg.solve_triangular(self._factor, rows.mT, upper=False)
            return torch.linalg.solve_triangular(self._factor.mT, half, upper=True).mT
        return torch.linalg.ldl_solve(self._factor, self._pivots, rows.mT.contiguous()).mT

    @property
    def _narrow(self) -> Blocked | None:
        """The factorisation in float32, where that is for gradients of fewer digits and a matrix that allows it.

        Made once in a process, which gets another inverse of the same tensors with each task.
        """
        if self._pivots is not None or self.precision < NARROW or len(self.matrix) <= SMALL:
            return None
        return derived(self._factor, "narrow", self._narrowed)

    def _narrowed(self) -> Blocked | None:
        factor, rows = Blocked.of(self._factor, torch.float32), self._probes.images.mT
        tried = factor.solve(rows.to(torch.float32))
        kept = self._probes.residuals(rows, tried) <= NARROW_RESIDUAL
        return factor if kept.all() else None

    @cached_property
    def _probes(self) -> Probes:
        return Probes.of(self.matrix, self.regularization)

    def with_regularization(self, regularization: float) -> DirectInverse:
        """Factorise the same H at another λ."""
        return DirectInverse(self.matrix, check_regularization(regularization), self.precision)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """H, its factorisation, and what tells residuals."""
        tensors = {"matrix": self.matrix, "factor": self._factor}
        tensors |= {"probes": self._probes.vectors, "probed": self._probes.images}
        if self._pivots is not None:
            tensors["pivots"] = self._pivots
        return tensors, {"regularization": self.regularization, "precision": self.precision}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> DirectInverse:
        """Take the arrays as they are: nothing is factorised again."""
        probes = Probes(tensors["probes"], tensors["probed"]) if "probes" in tensors else None
        return cls(
            tensors["matrix"],
            values["regularization"],
            values["precision"],
            tensors["factor"],
            tensors.get("pivots"),
            probes,
        )

    def diagnostics(self) -> dict[str, Any]:
        """Extreme eigenvalues of H (estimates to 1e-6 of the largest) and the factorisation used."""
        smallest, largest = self._extremes
        return {
            "factorisation": "cholesky" if self._pivots is None else "bunch-kaufman",
            "smallest_eigenvalue": smallest,
            "largest_eigenvalue": largest,
            "positive_definite": smallest + self.regularization > 0,
        }

    def recorded(self) -> dict[str, Any]:
        """The same; of a large matrix without its eigenvalues, which take as long as many solves."""
        if len(self.matrix) <= LARGEST_LOOKED_AT:
            return self.diagnostics()
        definite = self._pivots is None
        return {"factorisation": "cholesky" if definite else "bunch-kaufman", "positive_definite": definite}

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        size = len(self.matrix)
        if size < 512:
            values = torch.linalg.eigvalsh(self.matrix)
            return values[0].item(), values[-1].item()
        dense, restarts = self.matrix.numpy(), size // RESTARTS_FOR_ALL
        start = torch.ones(size, dtype=torch.float64).numpy()
        solve = LinearOperator(
            (size, size),
            matvec=lambda v: self._solve_rows(torch.from_numpy(v).reshape(1, -1))[0].numpy(),
            dtype=np.float64,
        )
        try:
            largest = eigsh(
                dense, k=1, which="LA", tol=1e-6, v0=start, maxiter=restarts, return_eigenvectors=False
            )[0]
            if self._pivots is not None:
                raise ArpackNoConvergence("indefinite: no shift-invert at the lower end", [], [])
            # the eigenvalue of H next to −λ is its smallest one when H + λI is positive definite
            smallest = eigsh(
                dense,
                k=1,
                sigma=-self.regularization,
                OPinv=solve,
                which="LM",
                tol=1e-6,
                v0=start,
                maxiter=restarts,
                return_eigenvectors=False,
            )[0]
        except ArpackNoConvergence:
            values = torch.linalg.eigvalsh(self.matrix)
            smallest, largest = values[0].item(), values[-1].item()
        return float(smallest), float(largest)


@dataclass(frozen=True)
class Direct(Estimator):
    """Exact Hessian: one pass over the data, P² float64 sums."""

    def inverse_bytes(self, system: System, regularizations: int = 1) -> int:
        """H and a factorisation for each λ, float64, and half of that in float32 with its diagonal blocks inverted."""
        narrow = 2 * system.size * (system.size + min(BLOCK, system.size))
        return (8 + 8 * regularizations) * system.size**2 + regularizations * narrow

    def fit(self, system: System) -> Generator[Round, Moments, DirectInverse]:
        """One round: the matrix of the mean loss."""
        function = partial(matrix_sums, curvature=system.curvature)
        moments = yield Round(function, result_bytes=8 * system.size**2)
        return DirectInverse(moments.mean("matrix"), system.regularization, torch.finfo(system.dtype).eps)
