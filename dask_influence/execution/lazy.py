"""Lazy scores: a dask array whose graph solves each test chunk once and differentiates each
training chunk once.

Only the graph is built here, from the same functions that tasks run; whoever computes the
array brings the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import optree
import torch
from dask import delayed
from dask.delayed import Delayed

from dask_influence.core.estimators import System
from dask_influence.core.objective import leading_size
from dask_influence.execution import tasks
from dask_influence.execution.base import Model, Sealed, Solver
from dask_influence.execution.drive import Passes, iterated_factors
from dask_influence.execution.local import LocalExecutor
from dask_influence.execution.plan import Plan
from dask_influence.execution.run import Fit
from dask_influence.grid import Chunks
from dask_influence.storage.sources import ArraySource, DaskSource, Source


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
    factors = lazy_factors(fit, blocks, plan.batch, project=project)
    return lazy_scores(
        fit,
        factors,
        blocks.sizes,
        Blocks.of(train),
        plan.batch,
        plan.work.features,
        project=project,
        perturbation=perturbation,
    )


def lazy_influence_factors(fit: Fit, test: Source, plan: Plan) -> da.Array:
    """Factors (N, P) of lazy data."""
    blocks = Blocks.of(test)
    parts = lazy_factors(fit, blocks, plan.batch, project=False)
    return lazy_rows(fit, parts, blocks.sizes, plan.work.parameters)


def lazy_influences_from_factors(
    fit: Fit, factors: Any, train: Source, plan: Plan, *, perturbation: bool
) -> da.Array:
    """Scores (N, M, *features) of factors (N, P), where they or the training data are lazy."""
    parts, sizes = row_blocks(factors)
    return lazy_scores(
        fit,
        parts,
        sizes,
        Blocks.of(train),
        plan.batch,
        plan.work.features,
        project=False,
        perturbation=perturbation,
    )


def lazy_factors(fit: Fit, test: Blocks, batch: int, *, project: bool) -> list[Delayed]:
    """Factors (or coefficients) of each test chunk, solved once."""
    shared = delayed(_Shared(fit.model, fit.threads), pure=False)
    closed = fit.scorer if project else fit.solver
    solver = delayed(_Iterated.of(fit) if fit.inverse.needs_rounds else closed, pure=False)
    solve = delayed(_factors, pure=False)
    return [
        solve(shared, solver, block, start, batch, project)
        for block, start in zip(test.parts, test.starts, strict=True)
    ]


def lazy_scores(
    fit: Fit,
    factors: Sequence[Delayed],
    sizes: Sequence[int],
    train: Blocks,
    batch: int,
    features: tuple[int, ...],
    *,
    project: bool,
    perturbation: bool,
) -> da.Array:
    """Scores (N, M, *features), chunked like test and training data."""
    shared = delayed(_Shared(fit.model, fit.threads), pure=False)
    solver = delayed(fit.scorer if project else None, pure=False)
    strip, tile = delayed(_strip, pure=False), delayed(_rows, pure=False)
    gathered = delayed(_concatenated, pure=False)(list(factors))
    offsets = [0, *np.cumsum(sizes).tolist()]
    columns = []
    for block, start, count in zip(train.parts, train.starts, train.sizes, strict=True):
        scores = strip(shared, solver, gathered, block, start, batch, perturbation)
        tiles = [
            da.from_delayed(tile(scores, low, high), (high - low, count, *features), fit.score_dtype)
            for low, high in pairwise(offsets)
        ]
        columns.append(da.concatenate(tiles, axis=0))
    return da.concatenate(columns, axis=1)


def lazy_rows(fit: Fit, factors: Sequence[Delayed], sizes: Sequence[int], parameters: int) -> da.Array:
    """Factors as a dask array (N, P)."""
    rows = delayed(tasks.stored, pure=False)
    return da.concatenate(
        [
            da.from_delayed(rows(part), (size, parameters), fit.score_dtype)
            for part, size in zip(factors, sizes, strict=True)
        ]
    )


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

    def job(self, block: Any, start: int, argument: str) -> tasks.Job:
        return tasks.Job(self.model, _Block(block, start, argument), argument, self.threads)


class _Block(Source):
    """One chunk of the data that begins with sample ``start`` and is numbered so, as errors name samples."""

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
    shared: _Shared, solver: _Iterated | Solver, block: Any, start: int, batch: int, project: bool
) -> torch.Tensor:
    job, stop = shared.job(block, start, "test (x, y)"), start + leading_size(block[1])
    if isinstance(solver, _Iterated):
        with tasks.computing(shared.model, shared.threads):
            return solver.factors(tasks.query_gradients(job, start, stop, batch))
    return tasks.closed_factors(job, solver, start, stop, batch, project=project, certify=False).rows


def _concatenated(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.as_tensor(part) for part in parts])


def _strip(
    shared: _Shared,
    solver: Solver | None,
    factors: torch.Tensor,
    block: Any,
    start: int,
    batch: int,
    perturbation: bool,
) -> np.ndarray:
    """Scores of all test points against one training chunk, differentiated once."""
    job = shared.job(block, start, "x, y")
    inverse = None if solver is None else solver.inverse()
    with tasks.computing(shared.model, shared.threads):
        query = tasks.Query.of(factors, inverse, shared.model.problem())
        columns = range(start, start + leading_size(block[1]))
        derivatives = tasks.derivatives_of(job, query, columns, batch, perturbation)
        return tasks.tile_of(query, derivatives, slice(None))


def _rows(scores: np.ndarray, low: int, high: int) -> np.ndarray:
    return scores[low:high]
