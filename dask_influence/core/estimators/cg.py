"""Conjugate gradient: (C + λI) s = g solved by passes over the data, nothing of size P² anywhere.

All right-hand sides of a block share every pass, and what they have in common is searched
once (block CG, Ji & Li 2017). A right-hand side is done when its *true* residual, from a
product with the solution itself, is small: recurrences drift, and what they promise is
checked before it is believed. Where a direction of negative curvature turns up, the rest is
solved by MINRES, which needs no definite system, and the warning names the λ that cures it.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
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
from dask_influence.core.estimators.krylov import Outcome, Tally, block_cg, minres, shifted_products
from dask_influence.core.estimators.preconditioners import (
    PRECONDITIONINGS,
    Preconditioner,
    Preconditioning,
    as_preconditioner,
)
from dask_influence.core.moments import Moments
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceError,
    ConvergenceWarning,
    IndefiniteCurvatureWarning,
)
from dask_influence.scalars import check_flag, check_number, plain_integers

ITERATIONS = 1000
"""Most iterations for a block of right-hand sides, unless the caller says otherwise or P is small."""


@dataclass(frozen=True)
class Tolerance:
    """When a right-hand side is done, and what happens to one that is not.

    Attributes
    ----------
    rtol, atol : float
        Done when ‖(C + λI) s − g‖ ≤ max(rtol·‖g‖, atol).
    maxiter : int or None
        Iterations for a block of right-hand sides; None is 10 P, at most ``ITERATIONS``.
    strict : bool
        Raise :class:`ConvergenceError` instead of the :class:`ConvergenceWarning`.
    """

    rtol: float
    atol: float
    maxiter: int | None
    strict: bool

    def goal(self, scale: Tensor) -> Tensor:
        """Absolute tolerances (B,) for right-hand sides of norms ``scale``."""
        return (self.rtol * scale).clamp_min(self.atol)


class CgInverse(Inverse):
    """(C + λI)⁻¹ by block conjugate gradient, at query time; holds a preconditioner and no curvature.

    Parameters
    ----------
    system : System
        What is inverted.
    tolerance : Tolerance
        When to stop.
    preconditioning : Preconditioning or None
        Fitted, without λ.
    report : mapping
        What the fit knows, for :meth:`diagnostics`.
    """

    kind: ClassVar[str] = "cg"
    needs_rounds: ClassVar[bool] = True

    def __init__(
        self,
        system: System,
        tolerance: Tolerance,
        preconditioning: Preconditioning | None,
        report: Mapping[str, Any],
    ) -> None:
        self.system, self.regularization = system, system.regularization
        self.tolerance, self.preconditioning, self.report = tolerance, preconditioning, dict(report)
        self._solved = _Solved()

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Solve all rows in one block.

        Raises
        ------
        ConvergenceError
            A product is NaN or inf; or, with ``strict``, a right-hand side did not converge.
        """
        block = _Block(self.system, gradients.to(torch.float64), self.tolerance)
        precondition = self._precondition
        while block.open.any() and block.budget > 0:
            rows, goal = block.residual[block.open], block.goal[block.open]
            if block.indefinite:
                outcome = yield from minres(self.system, rows, goal, block.budget, block.tally)
            else:
                outcome = yield from block_cg(
                    self.system, rows, goal, precondition, block.budget, block.tally
                )
            yield from block.advance(outcome)
        self._warn(block)
        relative = block.relative
        self._solved.add(block, relative)
        return Solution.measured(block.solution, relative)

    def _precondition(self, rows: Tensor) -> Tensor:
        return rows if self.preconditioning is None else self.preconditioning.apply(rows, self.regularization)

    def _warn(self, block: _Block) -> None:
        if block.indefinite:
            lowest = block.tally.lowest
            warnings.warn(
                IndefiniteCurvatureWarning(
                    f"H + λI is not positive definite: an eigenvalue of H is {lowest:.4g} or lower and "
                    f"hessian_regularization={self.regularization:g}. Scores can have the wrong sign and size; "
                    f"hessian_regularization > {-1.001 * lowest:.4g} makes it positive definite"
                ),
                stacklevel=2,
            )
        failed = block.failed
        if not failed.any():
            return
        singular = (
            "; H may be singular without hessian_regularization > 0" if self.regularization == 0 else ""
        )
        message = (
            f"{int(failed.sum())} of {len(failed)} influence factors stopped above rtol={self.tolerance.rtol:g}: "
            f"the worst relative residual is {block.relative.max():.2g} after {block.tally.iterations} iterations "
            f"(maxiter={block.most}); raise maxiter or hessian_regularization, give preconditioner='nystroem', or "
            f"compute in dtype=torch.float64{singular}"
        )
        if self.tolerance.strict:
            raise ConvergenceError(message)
        warnings.warn(ConvergenceWarning(message), stacklevel=2)

    def with_regularization(self, regularization: float) -> CgInverse:
        """Another λ in the same system; the preconditioner holds none."""
        system = replace(self.system, regularization=check_regularization(regularization))
        return CgInverse(system, self.tolerance, self.preconditioning, self.report)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The system, the tolerance and the preconditioner."""
        kind = None if self.preconditioning is None else self.preconditioning.kind
        tensors = {} if self.preconditioning is None else self.preconditioning.tensors()
        values = {
            "system": self.system.to_json(),
            "tolerance": vars(self.tolerance).copy(),
            "preconditioner": kind,
            "report": self.report,
        }
        return tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> CgInverse:
        """Solves by passes over the data, which have to be given again."""
        kind = values["preconditioner"]
        preconditioning = None if kind is None else PRECONDITIONINGS[kind].from_tensors(tensors)
        return cls(
            System.from_json(values["system"]),
            Tolerance(**values["tolerance"]),
            preconditioning,
            values["report"],
        )

    def diagnostics(self) -> dict[str, Any]:
        """Iterations, passes and worst residual of all solves of this object; Rayleigh quotients met.

        The quotients are inner bounds: H has an eigenvalue as low as the one and as high as the other.
        """
        return {**self.report, **self._solved.diagnostics(self.regularization)}


class _Solved:
    """What the solves of one inverse have cost and reached."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._factors, self._unconverged, self._worst = 0, 0, 0.0

    def add(self, block: _Block, relative: Tensor) -> None:
        self._tally = self._tally.joined(block.tally)
        self._factors += len(block.solution)
        self._unconverged += int(block.failed.sum())
        self._worst = max(self._worst, relative.max().item())

    def diagnostics(self, regularization: float) -> dict[str, Any]:
        values: dict[str, Any] = {"factors_solved": self._factors}
        if self._factors == 0:
            return values
        values |= {
            "solver_iterations": self._tally.iterations,
            "solver_passes": self._tally.passes,
            "worst_residual": self._worst,
            "unconverged": self._unconverged,
        }
        if self._tally.iterations > 0:
            values |= {
                "smallest_eigenvalue_at_most": self._tally.lowest,
                "largest_eigenvalue_at_least": self._tally.highest,
                "positive_definite_as_far_as_seen": self._tally.lowest + regularization > 0,
            }
        return values


class _Block:
    """Right-hand sides on their way: solutions with their true residuals."""

    def __init__(self, system: System, gradients: Tensor, tolerance: Tolerance) -> None:
        self._system, self._gradients = system, gradients
        self._scale = gradients.norm(dim=1)
        self.goal = tolerance.goal(self._scale)
        self.solution, self.residual = torch.zeros_like(gradients), gradients
        self.open = self._scale > self.goal
        self.tally = Tally()
        self.most = tolerance.maxiter or min(10 * system.size, ITERATIONS)
        self.indefinite = False

    @property
    def budget(self) -> int:
        """Iterations left."""
        return self.most - self.tally.iterations

    @property
    def relative(self) -> Tensor:
        """‖(C + λI) s − g‖ / ‖g‖, (B,)."""
        norms = self.residual.norm(dim=1)
        return torch.where(self._scale > 0, norms / self._scale, norms)

    @property
    def failed(self) -> Tensor:
        """Above tolerance by more than the rounding of the model's dtype explains, (B,).

        What a product in that dtype cannot resolve is no failure of the iteration, unless it
        costs more than half of the digits.
        """
        resolvable = torch.finfo(self._system.dtype).eps ** 0.5
        above = self.residual.norm(dim=1) > self.goal
        return above & ((self.residual.norm(dim=1) > self._rounding()) | (self.relative > resolvable))

    def _rounding(self) -> Tensor:
        magnitude = self.tally.magnitude + self._system.regularization
        return 8 * torch.finfo(self._system.dtype).eps * magnitude * self.solution.norm(dim=1)

    def advance(self, outcome: Outcome) -> Generator[Round, Moments, None]:
        """Add the corrections of the open rows where the true residual agrees that they help.

        A row stays open while it is above its goal and each cycle at least halves it.
        """
        self.indefinite = self.indefinite or outcome.indefinite
        rows = self.open.nonzero()[:, 0]
        trial = self.solution[rows] + outcome.solution
        products = yield from shifted_products(self._system, trial, self.tally)
        residual = self._gradients[rows] - products
        before, after = self.residual[rows].norm(dim=1), residual.norm(dim=1)
        better = after < before
        self.residual = self.residual.index_copy(0, rows[better], residual[better])
        self.solution[rows[better]] = trial[better]
        norms = self.residual.norm(dim=1)
        self.open = self.open & (norms > self.goal) & (norms > self._rounding())
        if not outcome.indefinite:  # the method changes then, which is worth another cycle
            self.open[rows[after > 0.5 * before]] = False


@dataclass(frozen=True)
class Cg(Estimator):
    """Block conjugate gradient over passes; certified by true residuals.

    Parameters
    ----------
    rtol, atol : float
        A factor s is done when ‖(C + λI) s − g‖ ≤ max(rtol·‖g‖, atol), with the product taken
        anew. A tolerance below what the model's dtype resolves is taken as what it resolves.
    maxiter : int, optional
        Iterations (passes) for a block of right-hand sides; default 10 P, at most 1000.
    preconditioner : None, "jacobi", "nystroem" or Preconditioner
        Fitted by one pass.
    strict : bool
        Raise :class:`ConvergenceError` where the default warns.
    """

    solves_by_rounds: ClassVar[bool] = True

    rtol: float = 1e-6
    atol: float = 0.0
    maxiter: int | None = None
    preconditioner: Preconditioner | str | Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Integers of numpy as Python's."""
        plain_integers(self, "maxiter")

    def validate(self, system: System) -> None:
        """Tolerances, iterations and the preconditioner."""
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 <= value < float("inf"):
                raise ConfigurationError(f"{name} must be a finite number ≥ 0; got {value!r}")
        if self.rtol == 0 and self.atol == 0:
            raise ConfigurationError(
                "rtol and atol are both 0, which is never reached; make one of them positive"
            )
        if self.rtol >= 1:
            raise ConfigurationError(f"rtol must be below 1, which factors of zero reach; got {self.rtol!r}")
        if self.maxiter is not None and (
            isinstance(self.maxiter, bool) or not isinstance(self.maxiter, int) or self.maxiter < 1
        ):
            raise ConfigurationError(f"maxiter must be None or a positive integer; got {self.maxiter!r}")
        check_flag("strict", self.strict)
        preconditioner = as_preconditioner(self.preconditioner)
        if preconditioner is not None:
            preconditioner.validate(system)

    def fit(self, system: System) -> Generator[Round, Moments, CgInverse]:
        """The preconditioner, if there is one; the curvature is met at query time."""
        preconditioner = as_preconditioner(self.preconditioner)
        preconditioning = None
        if preconditioner is not None:
            preconditioning = yield from preconditioner.fit(system)
        report = {"preconditioner": None if preconditioning is None else preconditioning.kind}
        tolerance = Tolerance(self.rtol, self.atol, self.maxiter, self.strict)
        return CgInverse(system, tolerance, preconditioning, report)
