"""Jobs: what every task of one computation shares, and torch as a task finds it.

A task differentiates under the process-wide lock on the process's private copy of the module.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import optree
import torch
from torch import Tensor

from dask_influence.core.elementary import undisturbed
from dask_influence.core.kept import Kept, Shelf, bytes_of
from dask_influence.core.objective import Objective, Tree
from dask_influence.core.precision import check_products, matmul_precision
from dask_influence.core.problem import Problem
from dask_influence.errors import DataError
from dask_influence.execution import heap
from dask_influence.execution.base import Model
from dask_influence.execution.blame import INNOCENT, MOST_POISON, to_blame, told
from dask_influence.storage.sources import Source, check_finite, non_finite

T = TypeVar("T")

Missing = dict[int, str]
"""Samples that have no result, by position, and why."""


@dataclass(frozen=True)
class Job:
    """What every task of one computation shares: opened once per process.

    Attributes
    ----------
    model : Model
        Model, loss, θ and forms.
    source : Source
        The data this job reads.
    argument : str
        Name of those data in the call, for errors.
    threads : int
        torch threads per task; part of the job, because the bits may depend on it.
    poison : dict of int to str
        Samples that are known to crash a process or to raise, and how.
    kept : Kept, optional
        What batches keep from one pass to the next, in this process alone.
    """

    model: Model
    source: Source
    argument: str
    threads: int
    poison: Mapping[int, str] = field(default_factory=dict)
    kept: Kept | None = None

    def running(self) -> AbstractContextManager[None]:
        """:func:`computing` with the job's model and threads."""
        return computing(self.model, self.threads)

    def batch(self, start: int, stop: int) -> tuple[Problem, Tree, Tree]:
        """The problem, and samples ``start`` to ``stop`` as tensors in its dtype, on its device."""
        problem = self.model.problem()
        if self.kept is None:
            return (problem, *self._tensors(problem, start, stop))
        shelf = Shelf(self.kept, (start, stop))
        x, y = shelf.get("samples", partial(self._tensors, problem, start, stop), bytes_of)
        return replace(problem, shelf=shelf), x, y

    def _tensors(self, problem: Problem, start: int, stop: int) -> tuple[Tree, Tree]:
        batch = self.source.read(start, stop)
        check_finite(batch, self.argument, start)
        x, y = to_tensors(batch, problem.objective)
        return x, y

    def spared(self, start: int, stop: int, missing: Missing | None) -> tuple[Problem, Tree, Tree]:
        """:meth:`batch`, with a healthy neighbour in place of each sample that cannot be used.

        Those samples are added to ``missing``, where None refuses them instead. The shapes stay, and so do
        the bits of all the others.
        """
        if missing is None:
            return self.batch(start, stop)
        batch = self.source.read(start, stop)
        bad = {place: f"its {name} holds NaN or inf" for place, name in non_finite(batch).items()}
        bad |= {sample - start: why for sample, why in self.poison.items() if start <= sample < stop}
        missing |= {start + place: why for place, why in bad.items()}
        problem = self.model.problem()
        x, y = to_tensors(_replaced(batch, bad, stop - start), problem.objective)
        return problem, x, y

    def computed(
        self,
        function: Callable[[Problem, Tree, Tree], T],
        start: int,
        stop: int,
        missing: Missing | None = None,
    ) -> T:
        """``function`` of :meth:`spared` samples; those of which it raises are spared too, or refused.

        What no sample raises alone goes on as it is.

        Raises
        ------
        DataError
            Names the first sample of which it raises, where ``missing`` is None or too many do.
        """
        problem, x, y = self.spared(start, stop, missing)
        try:
            return function(problem, x, y)
        except INNOCENT:
            raise
        except Exception as error:
            tried = {sample - start for sample in missing or ()}
            most = 1 if missing is None else MOST_POISON + 1
            found = to_blame(function, problem, x, y, spared=tried, most=most)
            if not found:
                raise
            if missing is None or len(found) > MOST_POISON:
                raise self._refusal(found, start) from error
        poison = {start + place: f"it raises {told(raised)}" for place, raised in found.items()}
        return replace(self, poison={**self.poison, **poison}).computed(function, start, stop, missing)

    def _refusal(self, found: Mapping[int, Exception], start: int) -> DataError:
        """Names the first of the samples that raise, and says whether they are to blame at all."""
        first = min(found)
        what = f"{self.argument}: sample {start + first} raises {told(found[first])}"
        if len(found) > MOST_POISON:
            return DataError(
                f"{what}; so do {MOST_POISON} or more beside it, which is not the samples' fault: "
                "look at the model and the loss"
            )
        return DataError(f"{what}; mend its input or its target, or leave the sample out")


def _replaced(batch: Any, bad: Mapping[int, str], count: int) -> Any:
    """``batch`` with its first healthy sample in the places of the ``bad`` ones, or zeros if none is."""
    if not bad:
        return batch
    healthy = next((place for place in range(count) if place not in bad), None)
    if healthy is None:
        return optree.tree_map(np.zeros_like, batch)
    order = [healthy if place in bad else place for place in range(count)]
    return optree.tree_map(lambda leaf: leaf[order], batch)


def to_tensors(batch: Any, objective: Objective) -> Any:
    """Arrays as tensors on the model's device: floats in the model's dtype, integers as they are."""

    def convert(array: np.ndarray) -> Tensor:
        # torch's own memory: aligned the same wherever the array came from, hence the same bits
        tensor = torch.from_numpy(array).clone()
        return tensor.to(objective.device, objective.dtype if tensor.is_floating_point() else None)

    return optree.tree_map(convert, batch)


# -- torch's threads and precision -------------------------------------------------------------------
@contextmanager
def computing(model: Model, threads: int) -> Iterator[None]:
    """torch as a task finds it: so many threads, the precision of the model's products, none of the caller's modes."""
    problem = model.problem()
    check_products(problem.matmul_precision, problem.objective.device)  # this worker may have joined since
    with torch_threads(threads), matmul_precision(problem.matmul_precision):
        yield


_THREADS_LOCK = threading.Lock()
_THREADS_DEPTH = 0
_THREADS_BEFORE = 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's thread count while tasks run, and none of the caller's modes.

    OpenMP keeps a count for every thread, which is restored with each task, and torch one for threads
    to come, restored when the last task of the process ends.
    """
    global _THREADS_DEPTH, _THREADS_BEFORE
    own = torch.get_num_threads()
    with _THREADS_LOCK:
        if _THREADS_DEPTH == 0:
            _THREADS_BEFORE = own
        torch.set_num_threads(count)
        _THREADS_DEPTH += 1
    try:
        with undisturbed():
            yield
    finally:
        with _THREADS_LOCK:
            _THREADS_DEPTH -= 1
            torch.set_num_threads(own)
            if _THREADS_DEPTH == 0:
                torch.set_num_threads(_THREADS_BEFORE)
        heap.at_work()
