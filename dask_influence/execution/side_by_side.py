"""Scores in memory of factors that take no pass: test points and training samples side by side.

One thread differentiates, which only one can do at a time, first the test points and then the training samples;
the others solve and multiply meanwhile, and it takes part where it is far enough ahead. Nobody waits for the lock of
derivatives, and of a chunk of test points there are scores before the next one is solved.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.chain import Chain
from dask_influence.core.directional import Way
from dask_influence.core.objective import Tree
from dask_influence.core.problem import Problem
from dask_influence.core.sizes import BUDGET, gradients_at_once
from dask_influence.execution import tasks
from dask_influence.execution.job import Job, computing
from dask_influence.execution.lanes import Shared, lanes_of
from dask_influence.execution.plan import Plan
from dask_influence.execution.run import Fit
from dask_influence.grid import Chunks
from dask_influence.storage.sources import Source

SAMPLES = 512
"""Samples differentiated at once: many enough that a call costs little, few enough that others soon have work."""


@dataclass(frozen=True)
class Step:
    """How scores are made of factors.

    Attributes
    ----------
    prepare : callable
        (problem, x, y) → what scores of these training samples with any factors begin with.
    scores : callable
        (that, factors (D, P), out) → E (n, D, *features); ``out`` (D, n, *features) is memory to take for it, or None.
    samples : int
        Training samples at once.
    """

    prepare: Callable[[Problem, Tree, Tree], Any]
    scores: Callable[[Any, Tensor, Tensor | None], Tensor]
    samples: int


def step_of(fit: Fit, train: Source, plan: Plan, *, perturbation: bool) -> Step | None:
    """The step of these scores, where what is differentiated does not depend on the factors."""
    problem = fit.model.problem()
    if perturbation:
        return Step(directional.chain_of, _mixed, plan.batch) if problem.forms.mixed == "chain" else None
    objective, count = problem.objective, min(_at_once(problem, plan), plan.work.trains)
    samples = optree.tree_map(lambda spec: torch.empty(()).expand(count, *spec.shape), train.spec[0])
    directions = torch.empty((), dtype=objective.dtype, device=objective.device).expand(
        plan.work.tests, objective.size
    )
    formed = directional.chosen(problem, samples, directions) is Way.GRADIENTS
    return Step(directional.gradients, _multiplied, count) if formed else None


def _at_once(problem: Problem, plan: Plan) -> int:
    """Samples of which gradients are formed at once."""
    objective = problem.objective
    return min(SAMPLES, plan.batch, gradients_at_once(objective.size, objective.dtype.itemsize, BUDGET))


def _here(device: torch.device) -> bool:
    return device.type == "cpu"


def _mixed(chain: Chain, factors: Tensor, out: Tensor | None) -> Tensor:
    return chain.mixed_derivatives(factors, out=out)


def _multiplied(gradients: Tensor, factors: Tensor, out: Tensor | None) -> Tensor:
    return torch.mm(factors, gradients.mT, out=out).mT


def scores_side_by_side(
    fit: Fit, test: Source, train: Source, plan: Plan, step: Step, check: Callable[[], None]
) -> np.ndarray:
    """Scores (N, M, *features); ``check`` refuses training data before any of them are used."""
    problem, work = fit.model.problem(), plan.work
    objective, inverse = problem.objective, fit.solver.inverse()
    scores = torch.empty(work.tests, work.trains, *work.features, dtype=objective.dtype)
    queries, samples = (Job(fit.model, side, side.argument, fit.threads) for side in (test, train))

    def solve(gradients: Tensor, solved: Future[Tensor]) -> None:
        try:
            with computing(fit.model, fit.threads):
                factors = tasks.solved(inverse, gradients, project=False, certify=False)
                directions = tasks.Query.of(factors.rows, None, problem).directions
                assert isinstance(directions, Tensor)
                solved.set_result(directions)
        except BaseException as error:
            solved.set_exception(error)  # another lane may wait for it
            raise

    def score(prepared: Any, solved: Future[Tensor], rows: slice, columns: range) -> None:
        part = scores[rows, columns.start : columns.stop]
        out = part if _here(objective.device) else None
        with computing(fit.model, fit.threads):
            derivatives = step.scores(prepared, solved.result(), out)
            tasks.refuse_non_finite(derivatives, train.argument, columns.start)
            if out is None:
                part.copy_(derivatives.transpose(0, 1))

    solving: list[tuple[Future[Tensor], slice]] = []

    def abandon() -> None:
        for solved, _ in solving:
            solved.cancel()  # by an interrupt it may have been taken and never begun, and a lane waits for it

    with (
        Shared(fit.threads, apart=test.held and train.held, abandon=abandon) as lanes,
        computing(fit.model, fit.threads),
    ):
        together = max(1, _at_once(problem, plan) // plan.factor_rows) * plan.factor_rows
        for group in Chunks(work.tests, together):
            gradients = tasks.query_gradients(queries, group.start, group.stop, plan.batch)
            for own in Chunks(len(group), plan.factor_rows):
                solved = Future[Tensor]()
                solving.append((solved, slice(group.start + own.start, group.start + own.stop)))
                lanes.add([partial(solve, gradients[own.start : own.stop], solved)])
            lanes.relieve(2 * lanes_of(fit.threads))
        check()
        for columns in Chunks(work.trains, step.samples):
            prepared = samples.computed(step.prepare, columns.start, columns.stop)
            lanes.add([partial(score, prepared, solved, rows, columns) for solved, rows in solving])
            lanes.relieve(len(solving))
        lanes.finish()
    return tasks.stored(scores)
