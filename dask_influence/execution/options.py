"""Options that need something of the processes that run tasks: who has it, and what it costs in accuracy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dask_influence.core.compiled import check_compiler
from dask_influence.core.options import Compiled, Rounded, compiled_errors, rounding_errors
from dask_influence.core.precision import check_products
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError, InfluenceWarning
from dask_influence.execution.devices import resolve_device

log = logging.getLogger(__name__)

COARSE = 0.05
"""Relative error of gradients from which scores are hardly those of the model."""

DIGIT = 10
"""λ should be so many times the error that products make of the curvature."""


@dataclass(frozen=True)
class Options:
    """What is asked of a process.

    Attributes
    ----------
    device, compile, matmul_precision
        As for :class:`~dask_influence.InfluenceFunctionModel`.
    """

    device: str = "auto"
    compile: bool = False
    matmul_precision: str = "highest"

    @property
    def demanding(self) -> bool:
        """Whether any process may lack something."""
        return self.compile or self.matmul_precision != "highest" or self.device not in ("auto", "cpu")

    def check(self) -> None:
        """Refuse what this process lacks.

        Raises
        ------
        ConfigurationError
            Says what it is.
        """
        device = resolve_device(self.device)
        check_products(self.matmul_precision, device)
        if self.compile:
            check_compiler(device)

    def lacking(self) -> str | None:
        """What :meth:`check` says, or None.

        Examples
        --------
        >>> Options().lacking() is None
        True
        """
        try:
            self.check()
        except ConfigurationError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Found:
    """What a process found out about options on a few samples; None of those that were not asked for."""

    compiled: Compiled | None
    rounded: Rounded | None

    @classmethod
    def of(cls, problem: Problem, x: Any, y: Any, options: Options, curvature: str) -> Found:
        """Compile, and compare; within no precision."""
        compiled = compiled_errors(problem, x, y) if options.compile else None
        if compiled is not None:
            problem = replace(problem, forms=replace(problem.forms, compiled=compiled.kinds))
        if options.matmul_precision == "highest":
            return cls(compiled, None)
        return cls(compiled, rounding_errors(problem, x, y, curvature, options.matmul_precision))

    def applied(self, problem: Problem, options: Options) -> Problem:
        """The problem with the options in place."""
        kinds = () if self.compiled is None else self.compiled.kinds
        return replace(
            problem,
            forms=replace(problem.forms, compiled=kinds),
            matmul_precision=options.matmul_precision,
        )

    def report(self, options: Options) -> dict[str, Any]:
        """JSON-able, for diagnostics."""
        told: dict[str, Any] = {}
        if self.compiled is not None:
            told["compiled_error"] = self.compiled.errors
            told["uncompiled"] = {**self.compiled.skipped, **self.compiled.failures}
            log.info("compiled derivatives, relative error: %s", _listed(self.compiled.errors))
        if self.rounded is not None:
            told["matmul_error"] = {**asdict(self.rounded)["errors"]}
            name = options.matmul_precision
            log.info(
                "derivatives at matmul_precision=%r, relative error: %s", name, _listed(self.rounded.errors)
            )
        return told

    def warn(self, regularization: float, *, inverts_products: bool) -> None:
        """Of what is not compiled, and of errors that λ does not cover.

        Warns
        -----
        InfluenceWarning
            A derivative that torch cannot compile; gradients that are off by more than :data:`COARSE`; products
            with the curvature C whose error, ε ‖C‖, is not small against λ. (C + λI)⁻¹ makes ε ‖C‖ / λ of it.
        """
        if self.compiled is not None and self.compiled.failures:
            told = "; ".join(f"{kind}: {why}" for kind, why in self.compiled.failures.items())
            _warn(f"compile=True: some derivatives of this model run uncompiled ({told})")
        if self.rounded is None:
            return
        gradient = self.rounded.errors["gradient"]
        if not gradient <= COARSE:
            _warn(
                f"matmul_precision: gradients are off by {gradient:.1%}, and so are scores; use "
                "matmul_precision='highest'"
            )
        wrong = self.rounded.errors["product"] * self.rounded.largest
        if inverts_products and not DIGIT * wrong <= regularization:
            _warn(
                f"matmul_precision: products with the curvature are off by {wrong:.1e}, "
                f"{self.rounded.errors['product']:.1e} of its largest eigenvalue, which is not small against λ = "
                f"{regularization:g}: factors are wrong by about {wrong / regularization if regularization else 1:.0%} "
                f"in directions of little curvature; take hessian_regularization ≥ {DIGIT * wrong:.1e}, or "
                "matmul_precision='highest'"
            )


def _listed(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {error:.1e}" for kind, error in errors.items()) or "none"


def _warn(message: str) -> None:
    warnings.warn(InfluenceWarning(message), stacklevel=5)
