"""Factors and scores in this process's memory: the short way, for what fits."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from dask_influence.execution import tasks
from dask_influence.execution.drive import iterated_factors
from dask_influence.execution.plan import Plan
from dask_influence.execution.run import Fit
from dask_influence.grid import Chunks
from dask_influence.storage.sources import Source


def influences_in_memory(
    fit: Fit, test: Source, train: Source, plan: Plan, *, project: bool, perturbation: bool
) -> np.ndarray:
    """Scores (N, M, *features)."""
    factors = factors_in_memory(fit, test, test.argument, plan.factor_rows, plan.batch, project=project)
    return scores_in_memory(
        fit, factors, train, train.argument, plan, project=project, perturbation=perturbation
    )


def factors_in_memory(
    fit: Fit, source: Source, argument: str, rows: int, batch: int, *, project: bool
) -> torch.Tensor:
    """Factors (N, P), or coefficients (N, R) where ``project``, ``rows`` test points at a time."""
    job = tasks.Job(fit.model, source, argument, fit.threads)
    chunks = Chunks(len(source), rows)
    if fit.inverse.needs_rounds:
        return torch.cat([_by_rounds(fit, job, chunk, batch) for chunk in chunks])

    def solve(chunk: range) -> torch.Tensor:
        bounds = (chunk.start, chunk.stop, batch)
        return tasks.closed_factors(job, fit.solver, *bounds, project=project, certify=False).rows

    # Tasks of one torch thread leave cores free: as on a cluster, each takes a chunk, for the same bits.
    with ThreadPoolExecutor(max(1, torch.get_num_threads() // fit.threads)) as pool:
        return torch.cat(list(pool.map(solve, chunks)))


def _by_rounds(fit: Fit, job: tasks.Job, chunk: range, batch: int) -> torch.Tensor:
    with tasks.torch_threads(fit.threads):
        gradients = tasks.query_gradients(job, chunk.start, chunk.stop, batch)
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
    """Scores (N, M, *features), strip by strip."""
    job = tasks.Job(fit.model, source, argument, fit.threads)
    problem = fit.model.problem()
    own = fit.inverse.directions if project else None
    scores = np.empty((plan.work.tests, plan.work.trains, *plan.work.features), dtype=fit.score_dtype)
    with tasks.torch_threads(fit.threads):
        block, query = -1, None
        for strip in map(plan.strip, range(plan.strips)):
            rows, columns = (slice(part.start, part.stop) for part in (strip.rows, strip.columns))
            if query is None or strip.block != block:
                block, query = strip.block, tasks.Query.of(factors[rows], own, problem)
            derivatives = tasks.derivatives_of(job, query, strip.columns, plan.batch, perturbation)
            scores[rows, columns] = tasks.tile_of(query, derivatives, slice(None))
    return scores
