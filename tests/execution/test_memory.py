"""Scores in memory: chunks of test points and batches of training samples, in lanes."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from dask_influence import DirectInfluence
from dask_influence.core import directional
from dask_influence.core.directional import Way
from dask_influence.errors import DataError
from dask_influence.execution import memory, side_by_side, tasks
from dask_influence.execution.lanes import Shared
from dask_influence.execution.plan import Plan
from dask_influence.execution.run import Fit
from dask_influence.execution.side_by_side import Step
from dask_influence.storage.sources import Source
from tests import data, oracles

CASE = data.mlp_classification()


@pytest.fixture(scope="module")
def fitted() -> DirectInfluence:
    return DirectInfluence(CASE.model, CASE.loss, 0.05).fit(CASE.train)


MODES = pytest.mark.parametrize("mode", ["up", "perturbation"])


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three test points and five training samples at a time, whose gradients are formed."""
    whole = memory.scores_side_by_side

    def cut(
        fit: Fit, test: Source, train: Source, plan: Plan, step: Step, check: Callable[[], None]
    ) -> np.ndarray:
        small = dataclasses.replace(plan, factor_rows=3, batch=5), dataclasses.replace(step, samples=5)
        return whole(fit, test, train, *small, check)

    monkeypatch.setattr(memory, "scores_side_by_side", cut)
    monkeypatch.setattr(directional, "chosen", lambda *_: Way.GRADIENTS)


@pytest.mark.usefixtures("in_small_parts")
@pytest.mark.parametrize(("threads", "together"), [(1, 64), (2, 64), (1, 6), (2, 6), (2, 3)])
@MODES
def test_parts_are_put_together_and_threads_given_back(
    fitted: DirectInfluence, mode: str, threads: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, multiplied, product = [], [], side_by_side._multiplied
    monkeypatch.setattr(side_by_side, "FACTORS", together)
    monkeypatch.setattr(side_by_side, "_multiplied", lambda *a: multiplied.append(len(a[1])) or product(*a))
    for name in ("chain_of", "gradients"):
        of = getattr(directional, name)
        monkeypatch.setattr(directional, name, lambda *a, of=of: prepared.append(len(a[2])) or of(*a))
    test, train = ((x[:n], y[:n]) for (x, y), n in ((CASE.test, 7), (CASE.train, 13)))
    inverse = oracles.inverse(oracles.hessian(CASE.model, CASE.loss, *CASE.train), 0.05)
    of_mode = oracles.perturbation if mode == "perturbation" else oracles.up
    expected = of_mode(CASE.model, CASE.loss, inverse, test, train)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value = fitted.influences(*test, *train, mode=mode)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert oracles.relative_error(value, expected) <= 1e-9
    assert prepared == [3, 3, 1, 5, 5, 3]  # each sample once, whatever the chunks of the other side
    blocks = {64: [7], 6: [1, 6], 3: [1, 3, 3]}[together] if mode == "up" else []
    assert sorted(multiplied) == sorted(3 * blocks)  # chunks of factors are joined before they are multiplied


@pytest.mark.usefixtures("in_small_parts")
@MODES
def test_a_sample_without_a_finite_derivative_is_named(
    fitted: DirectInfluence, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(rows: torch.Tensor, *args: object) -> object:
        if args[:2] == ("x, y", 5):  # the second batch
            rows[2] = torch.nan
        return refuse(rows, *args)

    refuse = tasks.refuse_non_finite
    monkeypatch.setattr(tasks, "refuse_non_finite", spoiled)
    test = tuple(a[:7] for a in CASE.test)
    with pytest.raises(DataError, match="x, y: the gradient of sample 7 is not finite"):
        fitted.influences(*test, *(a[:13] for a in CASE.train), mode=mode)


@pytest.mark.usefixtures("in_small_parts")
@MODES
def test_no_lane_goes_on_after_an_error(
    fitted: DirectInfluence, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training data are refused while other lanes solve."""
    running: list[str] = []

    def slow(*arguments: object, **how: object) -> object:
        running.append("begun")
        time.sleep(0.05)
        found = solved(*arguments, **how)
        running.append("done")
        return found

    solved, (x, y), test = tasks.solved, (a[:13] for a in CASE.train), [a[:7] for a in CASE.test]
    monkeypatch.setattr(tasks, "solved", slow)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(DataError, match="x, y"):
            fitted.influences(*test, x[:, :2], y, mode=mode)
        assert running.count("begun") == running.count("done")
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("in_small_parts", "two_threads")
@pytest.mark.parametrize(("mode", "held"), [("up", 4), ("perturbation", 1)])
def test_few_samples_are_differentiated_before_others_need_them(
    fitted: DirectInfluence, mode: str, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of one batch in each lane, of one that waits and one that is formed; chains one at a time."""
    ahead, most, lock, whole = [0], [0], threading.Lock(), memory.scores_side_by_side

    def watched(*arguments: Any) -> np.ndarray:
        *others, step, check = arguments

        def prepare(*samples: Any) -> Any:
            with lock:
                ahead[0] += 1
                most[0] = max(most[0], ahead[0])
            return step.prepare(*samples)

        def scores(*prepared: Any) -> torch.Tensor:
            time.sleep(0.02)
            with lock:
                ahead[0] -= 1
            return step.scores(*prepared)

        return whole(*others, dataclasses.replace(step, prepare=prepare, scores=scores), check)

    monkeypatch.setattr(memory, "scores_side_by_side", watched)
    fitted.influences(*(a[:3] for a in CASE.test), *(a[:35] for a in CASE.train), mode=mode)
    assert ahead == [0]
    assert most[0] <= held
    assert (most[0] > 1) == (held > 1)


@pytest.mark.usefixtures("in_small_parts", "two_threads")
@MODES
def test_an_interrupt_between_two_calls_leaves_no_lane_waiting(
    fitted: DirectInfluence, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This thread took the last solve and never began with it; another lane waits for its factors."""
    waiting, taken, solved = threading.Event(), list[object](), tasks.solved

    def take(lanes: Shared) -> bool:
        if threading.current_thread() is not threading.main_thread():
            return whole(lanes)
        taken.append(lanes._queue.popleft())
        assert waiting.wait(60)
        raise KeyboardInterrupt

    def slow(*arguments: object, **how: object) -> object:
        while not taken:  # not the last one, too
            time.sleep(0.001)
        return solved(*arguments, **how)

    class Watched(Future[torch.Tensor]):
        def result(self, timeout: float | None = None) -> torch.Tensor:
            if not self.done():
                waiting.set()
            return super().result(timeout)

    whole = Shared._take_one
    monkeypatch.setattr(Shared, "_take_one", take)
    monkeypatch.setattr(tasks, "solved", slow)
    monkeypatch.setattr(side_by_side, "Future", Watched)
    with pytest.raises(KeyboardInterrupt):
        fitted.influences(*(a[:6] for a in CASE.test), *(a[:13] for a in CASE.train), mode=mode)
    assert waiting.is_set()
    monkeypatch.undo()
    assert fitted.influences(*(a[:6] for a in CASE.test), *CASE.train, mode=mode).isfinite().all()


@MODES
def test_models_of_half_precision(mode: str) -> None:
    """Numpy has no bfloat16: its scores are kept in it until they are complete."""
    model = copy.deepcopy(CASE.model).to(torch.bfloat16)
    x, y = CASE.train[0].to(torch.bfloat16), CASE.train[1]
    half = DirectInfluence(model, CASE.loss, 0.05).fit((x, y)).influences(x[:20], y[:20], x, y, mode=mode)
    assert half.dtype == torch.bfloat16
    whole = DirectInfluence(copy.deepcopy(model).double(), CASE.loss, 0.05).fit((x.double(), y))
    expected = whole.influences(x[:20].double(), y[:20], x.double(), y, mode=mode)
    assert oracles.relative_error(half.double(), expected) <= 0.1


@MODES
def test_scores_elsewhere_are_brought_here(
    fitted: DirectInfluence, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of an accelerator, which cannot write to this memory."""
    test = tuple(a[:7] for a in CASE.test)
    expected = fitted.influences(*test, *CASE.train, mode=mode)
    given, whole = [], memory.scores_side_by_side

    def elsewhere(*arguments: Any) -> np.ndarray:
        *others, step, check = arguments

        def scores(prepared: Any, factors: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
            given.append(out)
            return step.scores(prepared, factors, None)

        return whole(*others, dataclasses.replace(step, scores=scores), check)

    monkeypatch.setattr(memory, "scores_side_by_side", elsewhere)
    monkeypatch.setattr(directional, "chosen", lambda *_: Way.GRADIENTS)
    monkeypatch.setattr(side_by_side, "_here", lambda device: False)
    found = fitted.influences(*test, *CASE.train, mode=mode)
    assert set(given) == {None}
    assert oracles.relative_error(found, expected) <= 1e-9


@MODES
def test_shapes_are_looked_at_before_derivatives_are(mode: str) -> None:
    """In the first call of a mode, too, which checks derivatives of these samples."""
    fresh = DirectInfluence(CASE.model, CASE.loss, 0.05).fit(CASE.train)
    x, y = CASE.train
    with pytest.raises(DataError, match="x, y: x: the model cannot be called"):
        fresh.influences(*CASE.test, x[:, :2], y, mode=mode)


@pytest.mark.usefixtures("in_small_parts", "two_threads")
@MODES
@pytest.mark.parametrize("where", ["scores", "samples"])
def test_of_several_bad_samples_the_first_is_named(
    fitted: DirectInfluence, mode: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever lane is faster: that of the first batch takes its time; and what follows is not begun."""
    refuse, begun = tasks.refuse_non_finite, list[int]()

    def spoiled(rows: torch.Tensor, argument: str, start: int, *more: object) -> object:
        if argument == "x, y":
            begun.append(start)
            time.sleep(0.1 if start == 0 else 0.0)
            if start in (0, 5) or (where == "scores" and start == 10):
                rows[2] = torch.nan
        return refuse(rows, argument, start, *more)

    monkeypatch.setattr(tasks, "refuse_non_finite", spoiled)
    x, y = CASE.train[0].clone(), CASE.train[1]
    if where == "samples":
        x[11] = torch.nan  # seen by this thread, as soon as it prepares the third batch
    for _ in range(5):
        begun.clear()
        with pytest.raises(DataError, match="x, y: the gradient of sample 2 is not finite"):
            fitted.influences(*(a[:3] for a in CASE.test), x, y, mode=mode)
        assert max(begun) <= 15


# -- scores ----------------------------------------------------------------------------
def test_scores_of_small_models_are_cut_the_same_whatever_the_threads(
    fitted: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a strip go side by side where there are threads, and each sample is differentiated once."""
    seen: list[int] = []

    def counted(problem: object, x: torch.Tensor, y: torch.Tensor, **more: object) -> torch.Tensor:
        seen.append(len(y))
        return whole(problem, x, y, **more)

    whole = directional.directional_derivatives
    monkeypatch.setattr(directional, "directional_derivatives", counted)
    monkeypatch.setattr(memory, "FEWEST_SAMPLES", 5)
    before, found, factors = torch.get_num_threads(), [], fitted.influence_factors(*CASE.test)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fitted.influences_from_factors(factors, *CASE.train).numpy())
    finally:
        torch.set_num_threads(before)
    size = -(-len(CASE.train[1]) // 4)
    pieces = [size] * 3 + [len(CASE.train[1]) - 3 * size]
    assert sorted(seen) == sorted(2 * pieces)
    np.testing.assert_array_equal(*found)
