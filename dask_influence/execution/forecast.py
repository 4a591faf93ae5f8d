"""Forecast: what a plan costs on a cluster, which may not exist yet, and what limits it first.

A plan is integers; a forecast adds speeds. Work, reading, writing and scheduling go on at the
same time, so that the slowest of the four sets the time of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import optree
import torch

from dask_influence.core import directional
from dask_influence.core.estimators.base import Inverse, without_rounds
from dask_influence.core.objective import Tree, leading_size
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError
from dask_influence.execution.plan import PROCESS_BYTES, Plan, training_seconds
from dask_influence.execution.units import format_bytes, format_seconds
from dask_influence.grid import MOST_BYTES
from dask_influence.scalars import check_integer, check_number

PAUSE = 0.8
"""Share of its memory at which Dask gives a worker no more tasks (``distributed.worker.memory.pause``)."""

TASKS_PER_SECOND = 350.0
"""What one scheduler hands out: measured with empty tasks on a two-core machine."""

FEWEST, MOST = (32, 8), (512, 32)
"""Samples and directions that are timed after a fit, and as many of both at once if those take less than ENOUGH."""

ENOUGH, SLOW = 0.005, 0.1
"""Seconds of a call of which what it costs to begin is a small part, and from which one call tells enough."""

ROWS, ROWS_SECONDS, ROWS_BYTES = 32, 1.0, 2**28
"""Factors that are timed together, as they are solved: fewer, where they may take longer or are larger."""


@dataclass(frozen=True)
class Speed:
    """What one core of this machine does.

    Attributes
    ----------
    derivatives : float
        Measured over predicted time of the training side: 2 says that it takes twice what ``plan`` assumes.
    factor : float or None
        Seconds that solve one factor; None where that takes passes over the data.
    gradient : float
        Seconds of a gradient that is solved with.
    """

    derivatives: float = 1.0
    factor: float | None = None
    gradient: float = 0.0

    def solving(self, inverse: Inverse, size: int) -> Speed:
        """The same with the time of factors, of ``size`` numbers each; nothing of a user's is called."""
        if inverse.needs_rounds:
            return self
        alone = _timed(_solving(inverse, 1, size))
        rows = max(1, min(_rows(size), int(ROWS_SECONDS / alone)))
        return replace(self, factor=self.gradient + _fastest(_solving(inverse, rows, size)) / rows)


def calibrate(problem: Problem, x: Tree, y: Tree, *, solved: bool = True) -> Speed:
    """Time derivatives of a few samples that are repeated, in this thread; gradients where they are ``solved`` with."""
    speed = Speed(_derivatives(problem, x, y))
    if not solved:
        return speed
    rows = _rows(problem.objective.size)
    gradients = partial(directional.gradients, problem, *_repeated(rows, x, y))
    return replace(speed, gradient=_fastest(gradients) / rows)


def _rows(size: int) -> int:
    return max(1, min(ROWS, ROWS_BYTES // (8 * size)))


def _derivatives(problem: Problem, x: Tree, y: Tree) -> float:
    """Measured over predicted time."""
    relative, objective = 1.0, problem.objective
    for samples, directions in (FEWEST, MOST):
        along = torch.ones(directions, objective.size, dtype=objective.dtype, device=objective.device)
        repeated = _repeated(samples, x, y)
        call = partial(directional.directional_derivatives, problem, *repeated, directions=along)
        seconds = _fastest(call)
        relative = seconds / training_seconds(objective.size, problem.activations, samples, directions)
        if seconds >= ENOUGH:
            break
    return relative


def _repeated(samples: int, x: Tree, y: Tree) -> tuple[Tree, Tree]:
    again = torch.arange(samples) % leading_size(y)
    repeated: tuple[Tree, Tree] = optree.tree_map(lambda leaf: leaf[again.to(leaf.device)], (x, y))
    return repeated


def _solving(inverse: Inverse, rows: int, size: int) -> Callable[[], object]:
    gradients = torch.ones(rows, size, dtype=torch.float64)
    return lambda: without_rounds(inverse.solve(gradients))


def _fastest(call: Callable[[], object]) -> float:
    """The shorter of two calls, if one takes so little that it may be for warming up."""
    first = _timed(call)
    return first if first >= SLOW else min(first, _timed(call))


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@dataclass(frozen=True)
class Cluster:
    """The machines that a forecast is for.

    Attributes
    ----------
    workers : int
        Processes, with ``threads`` tasks at once each.
    memory : int or None
        Bytes of one worker.
    bandwidth : float or None
        Bytes a second between the store and all workers together; None takes it as no limit.
    """

    workers: int = 1
    threads: int = 1
    memory: int | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        check_integer("workers", self.workers)
        check_integer("threads_per_worker", self.threads)
        if self.memory is not None:
            check_integer("worker_memory", self.memory, most=MOST_BYTES)
        if self.bandwidth is not None:
            check_number("bandwidth", self.bandwidth)
        if self.bandwidth is not None and not 0 < self.bandwidth < float("inf"):
            raise ConfigurationError(
                f"bandwidth must be a positive number of bytes a second, such as 1e9; got {self.bandwidth!r}"
            )

    @property
    def slots(self) -> int:
        """Tasks that run at once."""
        return self.workers * self.threads

    @property
    def memory_limit(self) -> int | None:
        """Bytes that one task may hold: what a worker's process leaves of the memory at which Dask pauses it."""
        if self.memory is None:
            return None
        return max(1, int((PAUSE * self.memory - PROCESS_BYTES) / self.threads))


@dataclass(frozen=True)
class Forecast(Plan):
    """A plan with its cost on a cluster."""

    speed: Speed = Speed()
    cluster: Cluster = Cluster()

    @classmethod
    def of(cls, plan: Plan, speed: Speed, cluster: Cluster) -> Forecast:
        """``plan`` on ``cluster``, at the ``speed`` of each of its cores."""
        own = {field.name: getattr(plan, field.name) for field in fields(plan)}
        return cls(**own, speed=speed, cluster=cluster)

    # -- what it costs ----------------------------------------------------------------
    @property
    def compute_seconds(self) -> float:
        """Of all cores together, for strips."""
        derivatives = self.speed.derivatives * self.derivative_seconds
        if self.work.diagonal and self.speed.factor is not None:
            return derivatives + self.work.trains * self.speed.factor
        return derivatives + self.product_seconds

    @property
    def factor_seconds(self) -> float:
        """Of all cores together, for factors; not of passes that solve them, whose number is not known before."""
        work, certifying = self.work, self.speed.derivatives * self.certifying_seconds
        if work.diagonal:  # solved in strips
            return certifying
        if (
            work.paired is not None and work.estimated
        ):  # rows of pairs are made of test points as of training points
            seen = training_seconds(
                work.parameters, work.activations, work.tests, work.estimated * work.copies
            )
            return self.speed.derivatives * (1e-9 * work.tests * self._row_ns + seen)
        return certifying + (0.0 if self.speed.factor is None else work.tests * self.speed.factor)

    @property
    def published_bytes(self) -> int:
        """Weights and directions that one worker loads over the run."""
        work = self.work
        return (1 + self.passes * self.directions) * work.parameters * work.itemsize

    @property
    def moved_bytes(self) -> int:
        """Between the store and all workers: training samples, tiles or parts, weights and directions."""
        read = self.passes * self.work.trains * self.work.sample_bytes
        if self.merges:  # a part is written and read once
            read += 2 * self.strips * self.part_bytes
        return read + self.output_bytes + min(self.cluster.slots, self.tasks) * self.published_bytes

    @property
    def tasks(self) -> int:
        """Strips, what joins them, and factor tasks."""
        return self.strips + self.merges + (0 if self.work.diagonal else len(self.factor_chunks))

    @property
    def limits(self) -> dict[str, float]:
        """Seconds that the run would take if each of these were all that limits it."""
        strips = self.compute_seconds / min(self.cluster.slots, self.strips)
        factors = self.factor_seconds / min(self.cluster.slots, len(self.factor_chunks))
        limits = {"computing": strips + factors, "scheduler": self.tasks / TASKS_PER_SECOND}
        if self.cluster.bandwidth is not None:
            limits["store"] = self.moved_bytes / self.cluster.bandwidth
        return limits

    @property
    def run_seconds(self) -> float:
        """Of the whole run; factors that are solved by passes over the data come on top."""
        return max(self.limits.values())

    @property
    def first_limit(self) -> str:
        """What sets the time of the run, in a sentence."""
        limits = self.limits
        name = max(limits, key=lambda key: limits[key])
        if name == "scheduler":
            return (
                f"the scheduler: {self.tasks:,} tasks at {TASKS_PER_SECOND:.0f} a second; larger strips help"
            )
        if name == "store":
            needed = self.moved_bytes / max(limits["computing"], limits["scheduler"])
            return (
                f"the store: {format_bytes(needed)}/s would keep the workers busy, "
                f"{format_bytes(self.cluster.bandwidth or 0)}/s are there; reduce= writes less"
            )
        if self.strips < self.cluster.slots:
            few = f"{self.strips:,} strips for {self.cluster.slots:,} threads"
            return f"too few tasks: {few}; smaller tiles (tile_bytes=) make more"
        work = self.compute_seconds + self.factor_seconds
        return f"computing: {format_seconds(work)} of work on {self.cluster.slots:,} threads"

    def table(self) -> list[tuple[str, str]]:
        """The plan's table, and the cluster's."""
        cluster, limits = self.cluster, self.limits
        by_passes = ", and the passes that solve factors" if self.speed.factor is None else ""
        if self.work.estimated:
            by_passes = ", and the passes that estimate residuals, once for a fit"
        held = "" if cluster.memory is None else f" of {format_bytes(cluster.memory)}"
        return [
            *super().table()[:-1],
            ("workers", f"{cluster.workers:,} of {cluster.threads:,} threads{held}"),
            (
                "peak bytes per worker",
                f"{format_bytes(self.worker_bytes(cluster.threads))}, "
                f"{format_bytes(PROCESS_BYTES)} of them interpreter and libraries",
            ),
            ("peak bytes of the client", format_bytes(self.client_bytes)),
            ("bytes through the store", format_bytes(self.moved_bytes)),
            ("tasks", f"{self.tasks:,}, {format_seconds(limits['scheduler'])} of the scheduler's time"),
            ("estimated time", format_seconds(self.run_seconds) + by_passes),
            ("limited by", self.first_limit),
        ]
