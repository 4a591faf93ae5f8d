"""Drives a computation: rounds of a fit, factors of the test points, strips of scores.

It knows what has to happen in which order and nothing about who runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dask_influence.core.estimators.base import Inverse, Round, Rounds, System
from dask_influence.core.moments import Moments
from dask_influence.errors import MemoryLimitError
from dask_influence.execution import tasks
from dask_influence.execution.base import Executor, Sealed
from dask_influence.execution.job import torch_threads
from dask_influence.execution.units import format_bytes
from dask_influence.grid import Chunks, balanced

MOST_GROUPS = 64
"""Tasks of one round; each adds up a run of chunks, so that few partial sums are in flight."""

MOST_JOINED = 1024
"""Samples up to which chunks are joined where their sums are large beside all that the samples take."""

BESIDE_SUMS = 4
"""Times their sums that joined samples may take: of fewer, calls and sums cost as much as the products."""

SMALL = 2**20
"""Numbers of a block of vectors below which torch's threads cost an algorithm more than they save."""

SUMS_IN_FLIGHT = 4 * 2**30
"""Bytes of partial sums that all groups of one round may hold together."""


@dataclass(frozen=True)
class Passes:
    """Answers rounds: one pass over the chunks of the fitted data each.

    Attributes
    ----------
    executor : Executor
        Who sums.
    job : Sealed
        A :class:`~dask_influence.execution.job.Job` whose source is the fitted data.
    chunks : Chunks
        How they are cut.
    threads : int
        torch threads that a task takes.
    sample_bytes : int, optional
        What a sample takes when it is differentiated; chunks are joined by it.
    whole : int
        Samples that rounds which want as many as they can get may take at once; 0 where tasks run side by side.
    lasting : Sealed, optional
        The same job for rounds over all samples, whose chunks keep what they share; see :meth:`keeping`.
    most_bytes : int
        Of the sums of any of these rounds: chunks that keep something are joined alike in all of them.
    """

    executor: Executor
    job: Sealed
    chunks: Chunks
    threads: int = 1
    sample_bytes: int | None = None
    whole: int = 0
    lasting: Sealed | None = None
    most_bytes: int = 0

    def keeping(self, most_bytes: int = 0) -> Passes:
        """The same for the many rounds of one computation: what chunks keep is freed with what is returned."""
        return replace(self, lasting=self.executor.keeping(self.job), most_bytes=most_bytes)

    def __call__(
        self, request: Round, *, first: bool = False, report: Callable[[int, int], None] | None = None
    ) -> Moments:
        """Sum ``request.function`` over the chunks, in an order that depends on the chunks alone.

        ``report`` is told how many of the pass's tasks are done, and how many there are.

        Raises
        ------
        MemoryLimitError
            The sums alone are more than one task may hold; no task has run.
        """
        self._check_memory(request.result_bytes)
        operand = self.executor.publish(request.operand)
        groups = self._groups(self._pieces(request), request.result_bytes)
        job = self.lasting if self.lasting is not None and request.samples is None else self.job
        calls = [(job, request.function, operand, group, first) for group in groups]
        return self.executor.reduce(tasks.sum_group, calls, report, self.threads)

    def _check_memory(self, result_bytes: int) -> None:
        needed, allowed = (
            2 * result_bytes,
            self.executor.memory_limit,
        )  # those of a chunk, and of all before it
        if allowed is not None and needed > allowed:
            raise MemoryLimitError(
                f"the fit sums {format_bytes(result_bytes)} over each chunk, for which a task needs at least "
                f"{format_bytes(needed)} ({needed} bytes), but one may hold {format_bytes(allowed)} ({allowed} bytes) "
                "on the smallest worker; take an estimator without a matrix over all parameters (ArnoldiInfluence, "
                "EkfacInfluence), narrow parameters= or block_structure=, or give workers more memory"
            )

    def _pieces(self, request: Round) -> list[range]:
        if request.samples is not None:
            return [piece for run in request.samples for piece in self.chunks.within(run.start, run.stop)]
        return list(self._joined(request))

    def _joined(self, request: Round) -> Chunks:
        """The chunks; runs of them where adding up sums as large would cost as much as making them."""
        if self.sample_bytes is None:
            return self.chunks
        sums = max(request.result_bytes, self.most_bytes)
        enough, allowed = BESIDE_SUMS * sums, self.executor.memory_limit
        if allowed is not None:  # beside sums of a chunk, and of all before it
            enough = min(enough, max(0, allowed - 2 * sums))
        most = min(most_joined(self.chunks.total), enough // self.sample_bytes)
        if request.whole:
            most = max(most, min(self.whole, self.chunks.total))
        wide = balanced(self.chunks.total, max(most, self.chunks.size)).size
        return Chunks(self.chunks.total, self.chunks.size * max(1, -(-wide // self.chunks.size)))

    def _groups(self, pieces: list[range], result_bytes: int) -> Iterator[Sequence[range]]:
        most = min(MOST_GROUPS, max(4, SUMS_IN_FLIGHT // max(1, result_bytes)))
        per_group = -(-len(pieces) // most)
        return (pieces[low : low + per_group] for low in range(0, len(pieces), per_group))


def most_joined(samples: int) -> int:
    """Up to how many of ``samples`` chunks are joined, whatever their sums take: there stay two."""
    return min(MOST_JOINED, -(-samples // 2))


def drive(computation: Generator[Round, Moments, Any], answer: Callable[[Round], Moments]) -> Any:
    """Run ``computation`` to its result, answering every round it yields."""
    try:
        request = next(computation)
        while True:
            request = computation.send(answer(request))
    except StopIteration as finished:
        return finished.value


def _in_one_thread(computation: Rounds) -> Rounds:
    """``computation`` itself, whose own work leaves the cores to the tasks of its rounds."""
    answer: Moments | None = None
    while True:
        with torch_threads(1):
            try:
                request = computation.send(answer)  # type: ignore[arg-type]  # None, at first
            except StopIteration as finished:
                return finished.value
        answer = yield request


def iterated_factors(
    inverse: Inverse, system: System, passes: Passes, gradients: torch.Tensor, *, certify: bool
) -> tasks.Factors:
    """Factors of the rows of ``gradients`` where solving or certifying takes passes over the data."""
    wide, passes = gradients.to(torch.float64), passes.keeping(8 * gradients.numel())
    solution = drive(
        _in_one_thread(inverse.solve(wide)) if wide.numel() < SMALL else inverse.solve(wide), passes
    )
    factors, residual = solution.factors, solution.residuals()
    if residual is None and certify:
        products = passes(system.products(factors)).mean("products")
        residual = system.residuals(products, wide, factors)
    if residual is None:
        residual = torch.full((len(factors),), torch.nan, dtype=torch.float64)
    return tasks.Factors(factors.to(gradients.dtype), residual.numpy())
