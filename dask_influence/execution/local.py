"""LocalExecutor: the readable oracle that runs every task in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dask_influence.core.estimators import Inverse
from dask_influence.core.kept import Kept
from dask_influence.core.moments import Moments, merge
from dask_influence.core.problem import Problem
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.base import Executor, Sealed
from dask_influence.execution.job import torch_threads
from dask_influence.execution.lanes import in_lanes
from dask_influence.execution.options import Options
from dask_influence.execution.shipping import Held
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location

SMALL = 2**20
"""Numbers of sums up to which more threads do not pay: they spin for milliseconds where the next tasks are to run."""


class LocalExecutor(Executor):
    """Nothing serialised, nothing staged; tasks side by side where they leave threads."""

    def __init__(self) -> None:
        self._artifacts = Artifacts()

    def at(self, location: Location) -> LocalExecutor:
        """The same: what stays in this process is in every location."""
        return self

    def check_reach(self, location: Location) -> None:
        """Tasks run here, so they reach what this process reaches."""

    def check_options(self, options: Options) -> None:
        """Of this process, which runs the tasks."""
        options.check()

    def publish(self, tensors: dict[str, Tensor]) -> Artifact:
        """Keep the tensors in this process."""
        return self._artifacts.publish(tensors)

    def seal(self, value: Any) -> Held:
        """The value itself."""
        return Held(value)

    def keeping(self, job: Sealed) -> Held:
        """With what chunks keep, for as long as the job that is returned lives."""
        return Held(replace(job.open(), kept=Kept()))

    def model(self, problem: Problem, device: str) -> Held:
        """The problem itself."""
        return Held(problem)

    def inverse(self, inverse: Inverse, digest: Callable[[], str]) -> Held:
        """The inverse itself."""
        return Held(inverse)

    def reachable(self, source: Source, chunk_size: int, beside: ThreadPoolExecutor | None = None) -> Source:
        """Every source can be read where it was made."""
        return source

    def reduce(
        self,
        function: Callable[..., Moments],
        calls: Sequence[tuple[Any, ...]],
        report: Callable[[int, int], None] | None = None,
        threads: int = 1,
    ) -> Moments:
        """Evaluate all calls, side by side where threads are left, then add them in the tree of every executor."""
        parts = []
        for part in in_lanes([partial(function, *call) for call in calls], threads):
            parts.append(part)
            if report is not None:
                report(len(parts), len(calls))
        with torch_threads(1) if _small(parts) else nullcontext():
            return merge(parts)

    def map(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        lost: Callable[[tuple[Any, ...]], None] | None = None,
        threads: int | None = None,
    ) -> Iterator[Any]:
        """Evaluate lazily, side by side where threads are left; what crashes this process is not survived."""
        evaluated = (partial(function, *call) for call in calls)
        return in_lanes(evaluated, torch.get_num_threads() if threads is None else threads)


def _small(parts: Sequence[Moments]) -> bool:
    return sum(value.numel() for value in parts[0].total.values()) <= SMALL
