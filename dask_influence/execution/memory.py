"""Factors and scores in this process's memory: the short way, for what fits."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch

from dask_influence.execution import tasks
from dask_influence.execution.base import Solver
from dask_influence.execution.drive import iterated_factors
from dask_influence.execution.job import Job, computing
from dask_influence.execution.lanes import in_lanes
from dask_influence.execution.plan import FEWEST_FACTORS, Plan
from dask_influence.execution.run import Fit
from dask_influence.execution.side_by_side import scores_side_by_side, step_of
from dask_influence.grid import Chunks
from dask_influence.storage.sources import Source

FEWEST_SAMPLES = 256
"""Samples of a piece: to differentiate fewer at once costs more than another thread saves."""


def influences_in_memory(
    fit: Fit,
    test: Source,
    train: Source,
    plan: Plan,
    check: Callable[[], None],
    *,
    project: bool,
    perturbation: bool,
) -> np.ndarray:
    """Scores (N, M, *features).

    ``check`` refuses training data that cannot be used, before any of them are.
    """
    if not project and not fit.inverse.needs_rounds:
        step = step_of(fit, train, plan, perturbation=perturbation)
        if step is not None:
            return scores_side_by_side(fit, test, train, plan, step, check)
    check()
    factors = factors_in_memory(fit, test, test.argument, plan.factor_rows, plan.batch, project=project)
    return scores_in_memory(
        fit, factors, train, train.argument, plan, project=project, perturbation=perturbation
    )


def factors_in_memory(
    fit: Fit, source: Source, argument: str, rows: int, batch: int, *, project: bool
) -> torch.Tensor:
    """Factors (N, P), or coefficients (N, R) where ``project``, ``rows`` test points at a time."""
    job = Job(fit.model, source, argument, fit.threads)
    if project:  # projections take no memory to speak of
        rows = max(rows, min(batch, max(FEWEST_FACTORS, -(-len(source) // 4))))
    chunks = Chunks(len(source), rows)
    if fit.inverse.needs_rounds:
        return torch.cat([_by_rounds(fit, job, chunk, batch) for chunk in chunks])

    solver = fit.scorer if project else fit.solver

    def solve(chunk: range) -> torch.Tensor:
        bounds = (chunk.start, chunk.stop, batch)
        return tasks.closed_factors(job, solver, *bounds, project=project, certify=False).rows

    calls = [partial(solve, chunk) for chunk in chunks]
    return torch.cat([*in_lanes(calls, fit.threads, apart=source.held)])


def solved_rows(job: Job, solver: Solver, gradients: torch.Tensor, rows: int) -> torch.Tensor:
    """Factors of test points with these gradients where that takes no pass over data, ``rows`` of them at a time."""
    inverse = solver.inverse()

    def solve(part: torch.Tensor) -> torch.Tensor:
        with job.running():
            return tasks.solved(inverse, part, project=False, certify=False).rows

    calls = [partial(solve, part) for part in gradients.split(rows)]
    return torch.cat([*in_lanes(calls, job.threads, apart=True)])


def _by_rounds(fit: Fit, job: Job, chunk: range, batch: int) -> torch.Tensor:
    with computing(fit.model, fit.threads):
        gradients = tasks.precise_gradients(job, chunk.start, chunk.stop, batch)
    return iterated_factors(fit.inverse, fit.system, fit.answer(), gradients, certify=False).rows


def scores_in_memory(
    fit: Fit,
    factors: torch.Tensor,
    source: Source,
    argument: str,
    plan: Plan,
    *,
    project: bool,
    perturbation: bool,
) -> np.ndarray:
    """Scores (N, M, *features), strips of the same test points side by side."""
    job = Job(fit.model, source, argument, fit.threads)
    problem = fit.model.problem()
    inverse = fit.scorer.inverse() if project else None
    scores = np.empty((plan.work.tests, plan.work.trains, *plan.work.features), dtype=fit.score_dtype)
    for _, strips in itertools.groupby(map(plan.strip, range(plan.strips)), lambda strip: strip.block):
        block = [*strips]  # of the same test points
        rows = slice(block[0].rows.start, block[0].rows.stop)
        with computing(fit.model, fit.threads):
            query = tasks.Query.of(factors[rows], inverse, problem)
        score_columns(job, query, [strip.columns for strip in block], plan.batch, scores[rows], perturbation)
    return scores


def score_columns(
    job: Job,
    query: tasks.Query,
    strips: Iterable[range],
    batch: int,
    scores: np.ndarray,
    perturbation: bool,
    first: int = 0,
) -> None:
    """Scores of a query and ``strips`` of training samples, into ``scores``, whose columns begin with sample ``first``.

    Strips of tasks of one torch thread are cut in pieces, so that some are multiplied while another is
    differentiated.
    """

    def score(columns: range) -> None:
        place = slice(columns.start - first, columns.stop - first)
        with job.running():
            derivatives = tasks.derivatives_of(job, query, columns, batch, perturbation)
            scores[:, place] = tasks.tile_of(query, derivatives, slice(None))

    pieces = [piece for strip in strips for piece in (_pieces(strip) if job.threads == 1 else [strip])]
    calls = [partial(score, piece) for piece in pieces]
    deque(in_lanes(calls, job.threads, apart=job.source.held), maxlen=0)


def _pieces(columns: range) -> Iterator[range]:
    """The columns in about four pieces, however many threads will take them."""
    for piece in Chunks(len(columns), max(FEWEST_SAMPLES, -(-len(columns) // 4))):
        yield columns[piece.start : piece.stop]
