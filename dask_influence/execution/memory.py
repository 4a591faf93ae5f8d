"""Factors and scores in this process's memory: the short way, for what fits."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch

from dask_influence.core import directional
from dask_influence.core.chain import Chain
from dask_influence.execution import tasks
from dask_influence.execution.base import Solver
from dask_influence.execution.drive import iterated_factors
from dask_influence.execution.job import Job, computing
from dask_influence.execution.lanes import Shared, in_lanes
from dask_influence.execution.plan import FEWEST_FACTORS, Plan
from dask_influence.execution.run import Fit
from dask_influence.grid import Chunks
from dask_influence.storage.sources import ArraySource, Source

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
    if (
        perturbation
        and not project
        and not fit.inverse.needs_rounds
        and fit.model.problem().forms.mixed == "chain"
    ):
        return _perturbations_by_chain(fit, test, train, plan, check)
    check()
    factors = factors_in_memory(fit, test, test.argument, plan.factor_rows, plan.batch, project=project)
    return scores_in_memory(
        fit, factors, train, train.argument, plan, project=project, perturbation=perturbation
    )


def _held(source: Source) -> bool:
    """Whether samples are there, and to read them starts no threads or processes of a library or a user."""
    return isinstance(source, ArraySource)


def _job(fit: Fit, source: Source) -> Job:
    return Job(fit.model, source, source.argument, fit.threads)


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
    return torch.cat([*in_lanes(calls, fit.threads, apart=_held(source))])


def solved_rows(job: Job, solver: Solver, gradients: torch.Tensor, rows: int) -> torch.Tensor:
    """Factors of test points with these gradients where that takes no pass over data, ``rows`` of them at a time."""
    inverse = solver.inverse()

    def solve(part: torch.Tensor) -> torch.Tensor:
        with job.running():
            return tasks.solved(inverse, part, project=False, certify=False).rows

    calls = [partial(solve, part) for part in gradients.split(rows)]
    return torch.cat([*in_lanes(calls, job.threads, apart=True)])


def _perturbations_by_chain(
    fit: Fit, test: Source, train: Source, plan: Plan, check: Callable[[], None]
) -> np.ndarray:
    """Perturbations (N, M, *features): lanes solve chunks of test points, then go on to their scores.

    This thread is one of the lanes, and differentiates, which only one can do at a time, while the others
    multiply: first the gradients of the test points, then what the training samples of a batch need.
    """
    problem, work = fit.model.problem(), plan.work
    scores = np.empty((work.tests, work.trains, *work.features), dtype=fit.score_dtype)
    queries, inverse = _job(fit, test), fit.solver.inverse()

    def solve(gradients: torch.Tensor, solved: Future[torch.Tensor]) -> None:
        try:
            with computing(fit.model, fit.threads):
                factors = tasks.solved(inverse, gradients, project=False, certify=False)
                directions = tasks.Query.of(factors.rows, None, problem).directions
                assert isinstance(directions, torch.Tensor)
                solved.set_result(directions)
        except BaseException as error:
            solved.set_exception(error)  # another lane may wait for it
            raise

    def score(chain: Chain, solved: Future[torch.Tensor], rows: slice, columns: range) -> None:
        part = torch.from_numpy(scores[rows, columns.start : columns.stop])
        with computing(fit.model, fit.threads):
            derivatives = chain.mixed_derivatives(solved.result(), out=part)
        tasks.refuse_non_finite(derivatives, train.argument, columns.start)

    with Shared(fit.threads, apart=_held(test) and _held(train)) as lanes, computing(fit.model, fit.threads):
        solving: list[tuple[Future[torch.Tensor], slice]] = []
        for batch in Chunks(work.tests, max(plan.batch, plan.factor_rows)):
            gradients = tasks.query_gradients(queries, batch.start, batch.stop, plan.batch)
            for chunk in Chunks(len(batch), plan.factor_rows):
                solved = Future[torch.Tensor]()
                solving.append((solved, slice(batch.start + chunk.start, batch.start + chunk.stop)))
                lanes.add([partial(solve, gradients[chunk.start : chunk.stop], solved)])
        check()
        for columns in Chunks(work.trains, plan.batch):
            chain = _job(fit, train).computed(directional.chain_of, columns.start, columns.stop)
            lanes.add(partial(score, chain, solved, rows, columns) for solved, rows in solving)
            lanes.finish()
    return scores


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
    deque(in_lanes(calls, job.threads, apart=_held(job.source)), maxlen=0)


def _pieces(columns: range) -> Iterator[range]:
    """The columns in about four pieces, however many threads will take them."""
    for piece in Chunks(len(columns), max(FEWEST_SAMPLES, -(-len(columns) // 4))):
        yield columns[piece.start : piece.stop]
