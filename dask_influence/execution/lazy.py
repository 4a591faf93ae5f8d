"""Lazy scores: a dask array whose graph solves each test chunk once and differentiates each
training chunk once.

Only the graph is built here, from the same functions that tasks run; whoever computes the
array brings the scheduler.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import optree
import torch
from dask import delayed
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph

from dask_influence.core.estimators import System
from dask_influence.execution import tasks
from dask_influence.execution.base import Model, Sealed, Solver
from dask_influence.execution.drive import Passes, iterated_factors
from dask_influence.execution.job import Job
from dask_influence.execution.local import LocalExecutor
from dask_influence.execution.memory import score_columns, solved_rows
from dask_influence.execution.plan import Plan, factors_at_once
from dask_influence.execution.run import Fit
from dask_influence.grid import Chunks
from dask_influence.storage.sources import ArraySource, DaskSource, Source

COLUMNS_AT_ONCE = 512
"""Training samples that are worth a task of their own."""

STRIP_BYTES = 64 * 2**20
"""Scores that a task of several training chunks holds at most."""

JOINED_BYTES = 64 * 2**20
"""Samples of several chunks that are joined for one task, at most."""


@dataclass(frozen=True)
class Blocks:
    """One data set as delayed (x, y) blocks.

    Attributes
    ----------
    parts : list of Delayed
        One for each chunk of the sample axis.
    sizes : tuple of int
        Samples of each.
    """

    parts: list[Delayed]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, source: Source) -> Blocks:
        """Chunks of dask arrays as they are; anything else as one block, since it is here already."""
        if not isinstance(source, DaskSource):
            return cls([delayed(source.read(0, len(source)), traverse=False)], (len(source),))
        leaves, structure = optree.tree_flatten(source.data)
        sizes = leaves[0].chunks[0]
        columns = [leaf.to_delayed().reshape(len(sizes), -1)[:, 0] for leaf in leaves]
        gather = delayed(_gather, pure=False)
        return cls(
            [gather(structure, *parts) for parts in zip(*columns, strict=True)], tuple(map(int, sizes))
        )

    @property
    def starts(self) -> list[int]:
        """First sample of each chunk."""
        return [0, *np.cumsum(self.sizes)[:-1].tolist()]


def lazy_influences(
    fit: Fit, test: Source, train: Source, plan: Plan, *, project: bool, perturbation: bool
) -> da.Array:
    """Scores (N, M, *features) of data of which a part is lazy."""
    blocks = Blocks.of(test)
    factors = [group for group, _ in lazy_factors(fit, blocks, plan, project=project)]
    return lazy_scores(
        fit, factors, blocks.sizes, Blocks.of(train), plan, project=project, perturbation=perturbation
    )


def lazy_influence_factors(fit: Fit, test: Source, plan: Plan) -> da.Array:
    """Factors (N, P) of lazy data."""
    blocks = Blocks.of(test)
    rows, name = delayed(_stored_rows, pure=False), _name("factors")
    parts = [
        rows(group, low, high)
        for group, sizes in lazy_factors(fit, blocks, plan, project=False)
        for low, high in pairwise([0, *itertools.accumulate(sizes)])
    ]
    layer = {(name, index, 0): part.key for index, part in enumerate(parts)}
    return _array(name, layer, parts, (blocks.sizes, (plan.work.parameters,)), fit.score_dtype)


def lazy_influences_from_factors(
    fit: Fit, factors: Any, train: Source, plan: Plan, *, perturbation: bool
) -> da.Array:
    """Scores (N, M, *features) of factors (N, P), where they or the training data are lazy."""
    parts, sizes = row_blocks(factors)
    return lazy_scores(fit, parts, sizes, Blocks.of(train), plan, project=False, perturbation=perturbation)


def lazy_factors(
    fit: Fit, test: Blocks, plan: Plan, *, project: bool
) -> list[tuple[Delayed, tuple[int, ...]]]:
    """Factors (or coefficients) of the test chunks, each solved once, with the sizes of the chunks that a task solves.

    Small chunks are differentiated and solved together, where that takes no passes: one of few rows costs
    little less than one of many.
    """
    shared = delayed(_Shared(fit.model, fit.threads), pure=False)
    closed = fit.scorer if project else fit.solver
    solver = delayed(_Iterated.of(fit) if fit.inverse.needs_rounds else closed, pure=False)
    solve, starts = delayed(_factors, pure=False), test.starts
    most = (
        0 if project or fit.inverse.needs_rounds else min(factors_at_once(plan.work), _joined_at_most(plan))
    )
    return [
        (
            solve(
                shared,
                solver,
                test.parts[group.start : group.stop],
                starts[group.start],
                plan.factor_rows,
                plan.batch,
                project,
            ),
            test.sizes[group.start : group.stop],
        )
        for group in _groups(test.sizes, most)
    ]


def _groups(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Places of consecutive chunks of ``most`` rows at most together, or of a single one, and empty ones beside it."""
    start, rows = 0, 0
    for place, size in enumerate(sizes):
        if rows and size and rows + size > most:
            yield range(start, place)
            start, rows = place, 0
        rows += size
    yield range(start, len(sizes))


def lazy_scores(
    fit: Fit,
    factors: Sequence[Delayed],
    sizes: tuple[int, ...],
    train: Blocks,
    plan: Plan,
    *,
    project: bool,
    perturbation: bool,
) -> da.Array:
    """Scores (N, M, *features), chunked like test and training data."""
    shared = delayed(_Shared(fit.model, fit.threads), pure=False)
    solver = delayed(fit.scorer if project else None, pure=False)
    gathered, strip = delayed(_concatenated, pure=False)(list(factors)), delayed(_strip, pure=False)
    name, starts, features = _name("influences"), train.starts, plan.work.features
    rows = [*pairwise([0, *itertools.accumulate(sizes)])]
    strips, layer = [], {}
    for group in _groups(train.sizes, _columns_at_once(plan)):
        first, blocks = starts[group.start], train.parts[group.start : group.stop]
        strips.append(strip(shared, solver, gathered, blocks, first, plan.batch, features, perturbation))
        for column in group:
            low = starts[column] - first
            columns = low, low + train.sizes[column]
            # the tiles are the chunks themselves: a chain of tasks for each would cost more than its scores
            for row, bounds in enumerate(rows):
                key = (name, row, column, *(0 for _ in features))
                layer[key] = (_tile, strips[-1].key, *bounds, *columns)
    chunks = (sizes, train.sizes, *((size,) for size in features))
    return _array(name, layer, strips, chunks, fit.score_dtype)


def _columns_at_once(plan: Plan) -> int:
    """Training samples up to which one task takes several chunks."""
    each = plan.work.tests * math.prod(plan.work.features) * plan.work.itemsize
    return min(COLUMNS_AT_ONCE, plan.batch, STRIP_BYTES // each, _joined_at_most(plan))


def _joined_at_most(plan: Plan) -> int:
    return JOINED_BYTES // max(1, plan.work.sample_bytes)


def _name(what: str) -> str:
    return f"{what}-{uuid.uuid4().hex}"


def _array(
    name: str, layer: dict[Any, Any], parts: list[Any], chunks: tuple[tuple[int, ...], ...], dtype: Any
) -> da.Array:
    graph = HighLevelGraph.from_collections(name, layer, dependencies=parts)
    return da.Array(graph, name, chunks, dtype)


def row_blocks(factors: Any) -> tuple[list[Delayed], tuple[int, ...]]:
    """Row chunks of factors (N, P), a dask array or any other, and their sizes."""
    if not isinstance(factors, da.Array):
        return [delayed(np.asarray(factors), traverse=False)], (len(factors),)
    whole = factors.rechunk({1: -1})
    return list(whole.to_delayed()[:, 0]), tuple(map(int, whole.chunks[0]))


# -- what the graph runs ---------------------------------------------------------------
@dataclass(frozen=True)
class _Shared:
    """The model as a graph carries it: one node, whatever the number of chunks."""

    model: Model
    threads: int

    def job(self, block: Any, start: int, argument: str) -> Job:
        return Job(self.model, _Block(block, start, argument), argument, self.threads)


class _Block(Source):
    """One chunk of the data that begins with sample ``start`` and is numbered so, as errors name samples."""

    held = True

    def __init__(self, block: Any, start: int, argument: str) -> None:
        self._own, self._start = ArraySource(*block, argument=argument), start
        super().__init__(start + len(self._own), self._own.spec, None, argument)

    def _read(self, start: int, stop: int) -> Any:
        return self._own.read(start - self._start, stop - self._start)


@dataclass(frozen=True)
class _Iterated:
    """An inverse that solves by passes, as a graph carries it.

    The one task that solves a test chunk makes the passes itself: it must not wait for other
    tasks of the cluster that computes the graph.
    """

    solver: Solver
    system: System
    job: Sealed
    chunks: Chunks

    @classmethod
    def of(cls, fit: Fit) -> _Iterated:
        passes = fit.answer()
        return cls(fit.solver, fit.system, passes.job, passes.chunks)

    def factors(self, gradients: torch.Tensor) -> torch.Tensor:
        passes = Passes(LocalExecutor(), self.job, self.chunks)
        return iterated_factors(self.solver.inverse(), self.system, passes, gradients, certify=False).rows


def _gather(structure: Any, *leaves: np.ndarray) -> Any:
    return optree.tree_unflatten(structure, [np.asarray(leaf) for leaf in leaves])


def _factors(
    shared: _Shared,
    solver: _Iterated | Solver,
    blocks: Sequence[Any],
    start: int,
    rows: int,
    batch: int,
    project: bool,
) -> torch.Tensor:
    """Factors of the test points of ``blocks``, solved ``rows`` at a time."""
    job = shared.job(_joined(blocks), start, "test (x, y)")
    bounds = start, len(job.source), batch
    if project and not isinstance(solver, _Iterated):
        return tasks.closed_factors(job, solver, *bounds, project=True, certify=False).rows
    with job.running():
        take = tasks.precise_gradients if isinstance(solver, _Iterated) else tasks.query_gradients
        gradients = take(job, *bounds)
        if isinstance(solver, _Iterated):
            return solver.factors(gradients)
    return solved_rows(job, solver, gradients, rows)


def _joined(blocks: Sequence[Any]) -> Any:
    if len(blocks) == 1:
        return blocks[0]
    return optree.tree_map(lambda *leaves: np.concatenate(leaves), *blocks)


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.as_tensor(part) for part in parts])


def _strip(
    shared: _Shared,
    solver: Solver | None,
    factors: torch.Tensor,
    blocks: Sequence[Any],
    start: int,
    batch: int,
    features: tuple[int, ...],
    perturbation: bool,
) -> np.ndarray:
    """Scores of all test points against the training samples of ``blocks``, each differentiated once."""
    job = shared.job(_joined(blocks), start, "x, y")
    inverse = None if solver is None else solver.inverse()
    with job.running():
        query = tasks.Query.of(factors, inverse, shared.model.problem())
    dtype = tasks.stored_dtype(shared.model.problem().objective.dtype)
    columns = range(start, len(job.source))
    scores = np.empty((len(factors), len(columns), *features), dtype)
    score_columns(job, query, [columns], batch, scores, perturbation, first=start)
    return scores


def _stored_rows(part: torch.Tensor, low: int, high: int) -> np.ndarray:
    return tasks.stored(part[low:high])


def _tile(scores: np.ndarray, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    return scores[top:bottom, left:right]
