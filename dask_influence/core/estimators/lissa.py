"""LiSSA: (C + λI)⁻¹ g as a Neumann series over sampled chunks of the data.

δ ← δ + (r − (C_t + λI) δ)/σ with the curvature C_t of a few samples drawn anew in each step
(Agarwal, Bullins & Hazan 2017). Sampling noise is proportional to δ, so that one series
stops improving at a noise floor; it is therefore restarted on the true residual
r = g − (C + λI) s, which takes one pass over all data and certifies the factor besides. What
converges is then the exact factor, to any tolerance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
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
from dask_influence.core.estimators.krylov import extreme_eigenvalues
from dask_influence.core.moments import Moments
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceError,
    ConvergenceWarning,
    IndefiniteCurvatureWarning,
)
from dask_influence.grid import Chunks
from dask_influence.scalars import check_integer, check_number, plain_integers

RUNS = 4
"""Runs of consecutive samples that make up a draw: data are often sorted."""

SHARE, LEAST = 10, 32
"""By default a draw is a tenth of the samples, and at least 32 of them."""

EPOCHS = 4
"""Times the data are gone through between two true residuals."""

PROBED = 8
"""Draws on which the largest eigenvalue is estimated beside that of all data."""

MARGIN = 1.1
"""Of the chosen scale over the largest eigenvalue found."""

EXPLODED = 1e8
"""Growth of a series at which it is stopped before it overflows."""

GROWN = 4.0
"""Growth of a true residual over the best one that is taken for divergence."""

DOUBLINGS = 6
"""Times that a scale chosen here is doubled when the series diverges."""


@dataclass(frozen=True)
class Draws:
    """Seeded draws of runs of samples: all runs once in random order, then again.

    Attributes
    ----------
    total, size : int
        Samples there are, and samples of a draw.
    seed : int
        Of the order.
    """

    total: int
    size: int
    seed: int

    @property
    def runs(self) -> Chunks:
        """The grid that runs are taken from; it does not depend on how the data are chunked."""
        return Chunks(self.total, -(-self.size // RUNS))

    @property
    def epoch(self) -> int:
        """Draws that go through the data once."""
        return -(-len(self.runs) // RUNS)

    def __iter__(self) -> Iterator[tuple[range, ...] | None]:
        if self.size >= self.total:
            while True:
                yield None
        generator, runs = torch.Generator().manual_seed(self.seed), self.runs
        while True:
            order = torch.randperm(len(runs), generator=generator).tolist()
            for low in range(0, len(order), RUNS):
                yield tuple(runs[index] for index in sorted(order[low : low + RUNS]))


class LissaInverse(Inverse):
    """(C + λI)⁻¹ by the Neumann series, at query time; holds no curvature.

    Parameters
    ----------
    system : System
        What is inverted.
    settings : Lissa
        How.
    largest, smallest : float or None
        Largest eigenvalue of C and of sampled C_t, and an upper bound of the smallest;
        estimated where ``settings.scale`` is None.
    """

    kind: ClassVar[str] = "lissa"
    needs_rounds: ClassVar[bool] = True

    def __init__(
        self, system: System, settings: Lissa, largest: float | None = None, smallest: float | None = None
    ) -> None:
        self.system, self.regularization = system, system.regularization
        self.settings, self.largest, self.smallest = settings, largest, smallest
        self._log = {"factors_solved": 0, "solver_iterations": 0, "solver_passes": 0, "unconverged": 0}
        self._worst = 0.0

    @classmethod
    def checked(
        cls, system: System, settings: Lissa, largest: float | None, smallest: float | None
    ) -> LissaInverse:
        """An inverse, with a warning where C + λI is known to be indefinite."""
        if smallest is not None and smallest + system.regularization < 0:
            warnings.warn(
                IndefiniteCurvatureWarning(
                    f"H + λI is not positive definite: an eigenvalue of H is {smallest:.4g} or lower and "
                    f"hessian_regularization={system.regularization:g}. The series will diverge; "
                    f"hessian_regularization > {-smallest:.4g} makes it positive definite"
                ),
                stacklevel=2,
            )
        return cls(system, settings, largest, smallest)

    @property
    def scale(self) -> float:
        """σ: the one given, or a little more than the largest eigenvalue of C + λI."""
        if self.settings.scale is not None:
            return self.settings.scale
        assert self.largest is not None
        return MARGIN * (max(self.largest, 0.0) + self.regularization) or 1.0

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """All rows in step.

        Raises
        ------
        ConvergenceError
            The series diverges, or holds NaN: names the setting that cures it. With
            ``strict`` also where maxiter is reached.
        """
        smallest = math.inf if self.smallest is None else self.smallest
        series = _Series(self.system, self.settings, self.scale, smallest, gradients.to(torch.float64))
        yield from series.run()
        relative = series.relative(self.system.regularization)
        self._log["factors_solved"] += len(relative)
        self._log["solver_iterations"] += series.iterations
        self._log["solver_passes"] += series.passes
        self._log["unconverged"] += int(series.open.sum())
        self._worst = max(self._worst, relative.max().item())
        self._warn(series)
        return Solution.measured(series.solution, relative)

    def _warn(self, series: _Series) -> None:
        if not series.open.any():
            return
        message = (
            f"{int(series.open.sum())} of {len(series.open)} influence factors stopped above "
            f"rtol={self.settings.rtol:g}: the worst relative residual is {series.damped_relative().max():.2g} after "
            f"{series.iterations} iterations; raise maxiter={self.settings.maxiter} or hessian_regularization"
            f"={self.regularization:g}, or lower scale={series.scale:.3g} towards the largest eigenvalue"
        )
        if self.settings.strict:
            raise ConvergenceError(message)
        warnings.warn(ConvergenceWarning(message), stacklevel=2)

    def with_regularization(self, regularization: float) -> LissaInverse:
        """Another λ in the same system, with a scale to match."""
        system = replace(self.system, regularization=check_regularization(regularization))
        return self.checked(system, self.settings, self.largest, self.smallest)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The system, the settings and the eigenvalues found."""
        values = {
            "system": self.system.to_json(),
            "settings": asdict(self.settings),
            "largest": self.largest,
            "smallest": self.smallest,
        }
        return {}, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> LissaInverse:
        """Solves by passes over the data, which have to be given again."""
        system, settings = System.from_json(values["system"]), Lissa(**values["settings"])
        return cls(system, settings, values["largest"], values["smallest"])

    def diagnostics(self) -> dict[str, Any]:
        """Scale, eigenvalue estimates, and what all solves of this object took and reached."""
        values: dict[str, Any] = {"scale": self.scale, **self._log}
        if self.largest is not None:
            values |= {
                "largest_eigenvalue": self.largest,
                "smallest_eigenvalue_at_most": self.smallest,
            }
        return values | ({"worst_residual": self._worst} if self._log["factors_solved"] else {})


class _Series:
    """Right-hand sides on their way: solutions with true residuals, both of the damped system."""

    def __init__(
        self, system: System, settings: Lissa, scale: float, smallest: float, gradients: Tensor
    ) -> None:
        self._system, self._settings, self.scale, self._smallest = system, settings, scale, smallest
        self._gradients = gradients
        self._norms = gradients.norm(dim=1)
        self.solution, self._residual = torch.zeros_like(gradients), gradients
        self.open = self._norms > settings.rtol * self._norms
        self._best = self._norms.clone()
        self.iterations, self.passes, self._doublings = 0, 0, 0
        size = settings.draw_size(system.samples)
        self._draws = Draws(system.samples, size, settings.seed)
        # With all data in a draw, the step after a true residual is the series itself.
        self._steps = 1 if size >= system.samples else EPOCHS * self._draws.epoch

    @property
    def _shift(self) -> float:
        """λ plus what dampening adds to it."""
        return self._system.regularization + self._settings.dampen * self.scale

    def relative(self, regularization: float) -> Tensor:
        """‖(C + λI) s − g‖ / ‖g‖ of the system asked for, without dampening."""
        undamped = self._residual + (self._shift - regularization) * self.solution
        return self._per_norm(undamped.norm(dim=1))

    def damped_relative(self) -> Tensor:
        """The same of the system that the series solves."""
        return self._per_norm(self._residual.norm(dim=1))

    def _per_norm(self, residual: Tensor) -> Tensor:
        return torch.where(self._norms > 0, residual / self._norms, residual)

    def run(self) -> Generator[Round, Moments, None]:
        """Series and true residual in turn, until all rows are below rtol or maxiter is reached."""
        draws = iter(self._draws)
        while self.open.any() and self.iterations < self._settings.maxiter:
            rows = self.open.nonzero()[:, 0]
            correction = yield from self._expand(self._residual[rows], draws)
            trial = self.solution[rows] + correction
            products = yield from self._products(trial, None)
            self.passes += 1
            residual = self._gradients[rows] - products
            after = residual.norm(dim=1)
            grown = ~(after <= GROWN * self._best[rows])
            if grown.any():
                self._diverged(correction[grown], (self._residual[rows] - residual)[grown])
                continue
            self._best[rows] = torch.minimum(self._best[rows], after)
            self.solution[rows] = trial
            self._residual = self._residual.index_copy(0, rows, residual)
            self.open[rows[after <= self._settings.rtol * self._norms[rows]]] = False

    def _expand(
        self, residual: Tensor, draws: Iterator[tuple[range, ...] | None]
    ) -> Generator[Round, Moments, Tensor]:
        """δ ≈ (C + λI)⁻¹ r by so many steps; the first, from δ = 0, needs no product."""
        delta = residual / self.scale
        self.iterations += 1
        bound = EXPLODED * delta.norm(dim=1)
        for _ in range(min(self._steps, self._settings.maxiter - self.iterations + 1) - 1):
            products = yield from self._products(delta, next(draws))
            self.iterations += 1
            step = delta + (residual - products) / self.scale
            if not (step.norm(dim=1) <= bound).all():
                break  # the true residual of what is still finite shows why
            delta = step
        return delta

    def _products(
        self, vectors: Tensor, samples: tuple[range, ...] | None
    ) -> Generator[Round, Moments, Tensor]:
        moments = yield replace(self._system.products(vectors), samples=samples)
        products = moments.mean("products") + self._shift * vectors
        if not torch.isfinite(products).all():
            dtype = str(self._system.dtype).removeprefix("torch.")
            raise ConvergenceError(
                f"after {self.iterations} iterations a product with the curvature is NaN or inf: the loss or its "
                f"second derivative overflows in {dtype}; use dtype=torch.float64, or a larger scale than "
                f"{self.scale:.3g}"
            )
        return products

    def _diverged(self, vectors: Tensor, products: Tensor) -> None:
        """Double a scale chosen here; otherwise say which setting cures the divergence.

        What has grown points along the eigenvector at fault: its Rayleigh quotient, from the
        corrections and their products, is about the eigenvalue.
        """
        quotients = (vectors * products).sum(dim=1) / (vectors * vectors).sum(dim=1)
        lowest, highest = quotients.min().item(), quotients.max().item()
        lowest = min(lowest, self._smallest + self._shift)
        start = f"the series diverged after {self.iterations} iterations"
        if lowest < 0:
            cure = self._system.regularization - 1.001 * lowest
            raise ConvergenceError(
                f"{start}: H + λI has a negative eigenvalue of {lowest:.3g} or lower, which no scale cures; "
                f"use hessian_regularization > {cure:.4g} instead of {self._system.regularization:g}"
            )
        if self._settings.scale is not None or self._doublings >= DOUBLINGS:
            needed = max(1.5 * highest, 2 * self.scale)
            raise ConvergenceError(
                f"{start}: scale={self.scale:.4g} is too small for an eigenvalue of about {highest:.3g} (of the whole "
                f"data; draws of a few samples can have larger ones); use scale={needed:.3g} or scale=None, or a "
                f"larger batch_size"
            )
        self.scale *= 2
        self._doublings += 1


@dataclass(frozen=True)
class Lissa(Estimator):
    """Neumann series over sampled chunks, restarted on true residuals.

    Parameters
    ----------
    maxiter : int
        Steps for a block of right-hand sides; each takes ``batch_size`` samples.
    dampen : float
        d ≥ 0: s ← (1 − d) s + …, which adds d·scale to λ. 0 solves the system asked for; the
        residuals reported are always of that system.
    scale : float, optional
        σ, above the largest eigenvalue of C + λI (of sampled C too); default from an estimate
        of it, and doubled should the series diverge all the same.
    rtol : float
        A factor is done when its true residual is below rtol·‖g‖.
    seed : int
        Of the draws.
    batch_size : int, optional
        Samples of a step; default a tenth of the data, at least 32.
    strict : bool
        Raise :class:`ConvergenceError` where the default warns that maxiter was reached.
    """

    solves_by_rounds: ClassVar[bool] = True

    maxiter: int = 5000
    dampen: float = 0.0
    scale: float | None = None
    rtol: float = 1e-4
    seed: int = 0
    batch_size: int | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Integers of numpy as Python's."""
        plain_integers(self, "maxiter", "seed", "batch_size")

    def draw_size(self, samples: int) -> int:
        """Samples of a step."""
        size = self.batch_size or max(LEAST, math.ceil(samples / SHARE))
        return min(size, samples)

    def validate(self, system: System) -> None:
        """Each argument against what it can be."""
        for name in ("maxiter", "batch_size"):
            value = getattr(self, name)
            allowed = name == "batch_size" and value is None
            if not allowed and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigurationError(f"{name} must be a positive integer; got {value!r}")
        check_integer("seed", self.seed, *SEEDS)
        for name in ("dampen", "rtol", *(() if self.scale is None else ("scale",))):
            check_number(name, getattr(self, name))
        if not 0 <= self.dampen < 1:
            raise ConfigurationError(f"dampen must be at least 0 and below 1; got {self.dampen!r}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ConfigurationError(f"scale must be None or a positive number; got {self.scale!r}")
        if not 0 < self.rtol < 1:
            raise ConfigurationError(f"rtol must be between 0 and 1; got {self.rtol!r}")

    def fit(self, system: System) -> Generator[Round, Moments, LissaInverse]:
        """Eigenvalue estimates where a scale has to be chosen; the curvature is met at query time."""
        if self.scale is not None:
            return LissaInverse(system, self)
        smallest, largest, vector = yield from extreme_eigenvalues(system, self.seed)
        size = self.draw_size(system.samples)
        if size < system.samples:
            draws = iter(Draws(system.samples, size, self.seed))
            for _ in range(min(PROBED, Draws(system.samples, size, self.seed).epoch)):
                moments = yield replace(system.products(vector[None]), samples=next(draws))
                largest = max(largest, moments.mean("products").norm().item())
        return LissaInverse.checked(system, self, largest, smallest)
