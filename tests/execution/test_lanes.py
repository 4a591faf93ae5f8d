"""Lanes: tasks side by side leave the results, the order and the errors of tasks one after the other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import dask_influence as di
from dask_influence.execution.lanes import AHEAD, in_lanes, lanes_of
from dask_influence.execution.local import LocalExecutor
from tests import data


def test_calls_run_at_the_same_time_and_come_in_order(two_threads: None) -> None:
    assert (lanes_of(1), lanes_of(2)) == (2, 1)
    meet = threading.Barrier(2, timeout=60)  # passed by two at once, or never

    def call(number: int) -> int:
        meet.wait()
        return number

    assert list(in_lanes([lambda n=n: call(n) for n in range(6)], threads=1)) == [*range(6)]


def test_of_any_number_of_calls_few_are_begun_ahead(two_threads: None) -> None:
    made: list[int] = []

    def calls() -> Iterator[Callable[[], int]]:
        for number in itertools.count():
            made.append(number)
            yield lambda n=number: n

    lanes = in_lanes(calls(), threads=1)
    assert [next(lanes) for _ in range(5)] == [*range(5)]
    lanes.close()  # type: ignore[attr-defined] # a generator
    assert len(made) <= 5 + AHEAD * 2


def test_tasks_of_a_run_in_this_process_are_side_by_side(two_threads: None) -> None:
    """Where each takes fewer threads than there are; one after the other where that is not known."""
    meet = threading.Barrier(2, timeout=60)
    assert sorted(LocalExecutor().map(lambda n: (meet.wait(), n)[1], [(1,), (2,)], threads=1)) == [1, 2]
    own = threading.get_ident()
    assert [*LocalExecutor().map(threading.get_ident, [(), ()])] == [own, own]


def test_an_error_waits_for_what_runs(two_threads: None) -> None:
    begun, go, ended = threading.Event(), threading.Event(), []

    def fails() -> None:
        begun.wait(60)
        go.set()
        raise ZeroDivisionError("in a lane")

    def goes_on() -> None:
        begun.set()
        go.wait(60)
        ended.append("second")

    with pytest.raises(ZeroDivisionError, match="in a lane"):
        list(in_lanes([fails, goes_on], threads=1))
    assert ended == ["second"]
    assert list(in_lanes([lambda: 1], threads=1)) == [1]


def test_an_error_drops_what_has_not_begun(two_threads: None) -> None:
    free, ended = threading.Event(), []

    def fails() -> None:
        raise ZeroDivisionError("in a lane")

    def later() -> None:
        free.wait(0.05)
        ended.append(None)

    with pytest.raises(ZeroDivisionError, match="in a lane"):
        list(in_lanes([fails] + [later] * 1000, threads=1))
    assert len(ended) < 500


@pytest.mark.parametrize("estimator", [di.DirectInfluence, di.CgInfluence, di.EkfacInfluence])
def test_scores_are_the_bits_of_one_thread(estimator: type, two_threads: None) -> None:
    problem = data.mlp_classification()
    x, y = problem.train

    def scores() -> torch.Tensor:
        infl = estimator(problem.model, problem.loss, 0.1, chunk_size=5).fit((x, y))
        return infl.influences(x[:4], y[:4], x, y)

    at_once = scores()
    torch.set_num_threads(1)
    assert torch.equal(at_once, scores())


def test_a_sample_that_cannot_be_scored_is_named_from_any_lane(two_threads: None) -> None:
    case = data.mlp_classification()
    x, y = case.train
    infl = di.DirectInfluence(case.model, case.loss, 0.1, chunk_size=5).fit((x, y))
    bad = x.clone()
    bad[-2, 0] = torch.nan
    with pytest.raises(di.errors.DataError, match=f"sample {len(x) - 2}"):
        infl.influences(x[:4], y[:4], bad, y)
