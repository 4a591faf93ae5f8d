"""Scores in memory of factors that take no pass: test points and training samples side by side.

One thread differentiates, which only one can do at a time, first the test points and then the training samples;
the others solve and multiply meanwhile, and it takes part where it is far enough ahead. Nobody waits for the lock of
derivatives, nor for the last factors where there are others to be multiplied with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.chain import Chain
from dask_influence.core.directional import Way
from dask_influence.core.gemm import product
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

FACTORS = 64
"""Factors up to which it pays to multiply several chunks at once."""


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
    ahead : bool
        Whether the next ones are prepared while these are scored, and what is prepared is held a few times.
    """

    prepare: Callable[[Problem, Tree, Tree], Any]
    scores: Callable[[Any, Tensor, Tensor | None], Tensor]
    samples: int
    ahead: bool


def step_of(fit: Fit, train: Source, plan: Plan, *, perturbation: bool) -> Step | None:
    """The step of these scores, where what is differentiated does not depend on the factors."""
    problem = fit.model.problem()
    if perturbation:
        chain = problem.forms.mixed == "chain"
        return Step(directional.chain_of, _mixed, plan.batch, ahead=False) if chain else None
    objective, count = problem.objective, min(_at_once(problem, plan), plan.work.trains)
    samples = optree.tree_map(lambda spec: torch.empty(()).expand(count, *spec.shape), train.spec[0])
    wide = torch.promote_types(objective.dtype, torch.float32)  # or they would be widened, and be there
    directions = torch.empty((), dtype=wide, device=objective.device).expand(plan.work.tests, objective.size)
    formed = directional.chosen(problem, samples, directions) is Way.GRADIENTS
    return Step(directional.gradients, _multiplied, count, ahead=True) if formed else None


def _at_once(problem: Problem, plan: Plan) -> int:
    """Samples of which gradients are formed at once."""
    objective = problem.objective
    return min(SAMPLES, plan.batch, gradients_at_once(objective.size, objective.dtype.itemsize, BUDGET))


def _here(device: torch.device) -> bool:
    return device.type == "cpu"


def _mixed(chain: Chain, factors: Tensor, out: Tensor | None) -> Tensor:
    return chain.mixed_derivatives(factors, out=out)


def _multiplied(gradients: Tensor, factors: Tensor, out: Tensor | None) -> Tensor:
    return product(factors, gradients.mT, out=out).mT


def scores_side_by_side(
    fit: Fit, test: Source, train: Source, plan: Plan, step: Step, check: Callable[[], None]
) -> np.ndarray:
    """Scores (N, M, *features); ``check`` refuses training data before any of them are used."""
    call, checked = _Call(fit, test, train, plan, step), cache(check)
    lanes = Shared(fit.threads, apart=test.held and train.held, abandon=call.abandon)
    waiting = 2 * lanes_of(fit.threads)
    with lanes, computing(fit.model, fit.threads):
        for solves in call.solves():
            lanes.add(solves)
            lanes.relieve(waiting)
            checked()  # once, while others solve
        for columns in Chunks(plan.work.trains, step.samples):
            try:
                prepared = call.prepared(columns)
            except Exception:
                lanes.finish()  # raises what is wrong with samples before these
                raise
            lanes.add(call.products(prepared, columns))
            if step.ahead:
                lanes.relieve(len(call.blocks))
            else:
                lanes.finish()
        lanes.finish()
    return tasks.stored(call.scores)


class _Block:
    """Test points whose factors are multiplied at once, solved in one chunk or several."""

    def __init__(self, chunks: Sequence[range]) -> None:
        self.chunks, self.rows = chunks, slice(chunks[0].start, chunks[-1].stop)
        self.directions = Future[Tensor]()
        self._solved = dict[range, Tensor]()
        self._lock = threading.Lock()

    def put(self, chunk: range, factors: Tensor) -> None:
        """The factors of one of the chunks; the last one makes the directions."""
        with self._lock:
            self._solved[chunk] = factors
            if len(self._solved) == len(self.chunks):
                parts = [self._solved.pop(own) for own in self.chunks]
                self.directions.set_result(parts[0] if len(parts) == 1 else torch.cat(parts))

    def fail(self, error: BaseException) -> None:
        """End the wait for the directions: another lane may be there."""
        with self._lock:
            if not self.directions.done():
                self.directions.set_exception(error)


class _Call:
    """What lanes do for one call: they solve chunks of test points, and write the products of training samples."""

    def __init__(self, fit: Fit, test: Source, train: Source, plan: Plan, step: Step) -> None:
        self.fit, self.plan, self.step, self.argument = fit, plan, step, train.argument
        self.problem, self.inverse = fit.model.problem(), fit.solver.inverse()
        self.test, self.train = (Job(fit.model, side, side.argument, fit.threads) for side in (test, train))
        shape = plan.work.tests, plan.work.trains, *plan.work.features
        self.scores = torch.empty(shape, dtype=self.problem.objective.dtype)
        self.blocks = list(self._blocks())

    def _blocks(self) -> Iterator[_Block]:
        """Test points multiplied at once: few rows of factors with few of gradients are bound by reading them."""
        work, rows = self.plan.work, self.plan.factor_rows
        most = min(FACTORS, BUDGET // (work.parameters * work.itemsize)) if self.step.ahead else 1
        for own in Chunks(work.tests, rows * max(1, most // rows)):
            yield _Block(list(self.plan.factor_chunks.within(own.start, own.stop)))

    def solves(self) -> Iterator[list[Callable[[], None]]]:
        """Solves of test points that are differentiated together, in chunks."""
        chunks = [(block, chunk) for block in self.blocks for chunk in block.chunks]
        together = max(1, _at_once(self.problem, self.plan) // self.plan.factor_rows)
        for low in range(0, len(chunks), together):
            group = chunks[low : low + together]
            start, stop = group[0][1].start, group[-1][1].stop
            gradients = tasks.query_gradients(self.test, start, stop, self.plan.batch)
            yield [
                partial(self._solve, gradients[chunk.start - start : chunk.stop - start], block, chunk)
                for block, chunk in group
            ]

    def _solve(self, gradients: Tensor, block: _Block, chunk: range) -> None:
        try:
            with computing(self.fit.model, self.fit.threads):
                factors = tasks.solved(self.inverse, gradients, project=False, certify=False)
                directions = tasks.Query.of(factors.rows, None, self.problem).directions
                assert isinstance(directions, Tensor)
                block.put(chunk, directions)
        except BaseException as error:
            block.fail(error)
            raise

    def abandon(self) -> None:
        """End what lanes wait for: by an interrupt a solve may have been taken and never begun."""
        for block in self.blocks:
            block.directions.cancel()

    def prepared(self, columns: range) -> Any:
        """What products of these training samples begin with."""
        return self.train.computed(self.step.prepare, columns.start, columns.stop)

    def products(self, prepared: Any, columns: range) -> list[Callable[[], None]]:
        """The scores of these training samples, one call for each block of test points."""
        return [partial(self._score, prepared, block, columns) for block in self.blocks]

    def _score(self, prepared: Any, block: _Block, columns: range) -> None:
        part = self.scores[block.rows, columns.start : columns.stop]
        out = part if _here(self.problem.objective.device) else None
        with computing(self.fit.model, self.fit.threads):
            derivatives = self.step.scores(prepared, block.directions.result(), out)
            tasks.refuse_non_finite(derivatives, self.argument, columns.start)
            if out is None:
                part.copy_(derivatives.transpose(0, 1))
