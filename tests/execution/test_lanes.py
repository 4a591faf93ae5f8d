"""Lanes: tasks side by side leave the results, the order and the errors of tasks one after the other."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import dask.array as da
import pytest
import torch

import dask_influence as di
from dask_influence.execution import lanes
from dask_influence.execution.cores import cores_of, keeping_to
from dask_influence.execution.lanes import AHEAD, Shared, in_lanes, lanes_of
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


@pytest.fixture
def two_cores(two_threads: None) -> set[int]:
    """Of a machine that has no more: lanes of more would not keep to them."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(cores) != 2:
        pytest.skip("this process has not two cores")
    return cores


def test_lanes_of_all_cores_keep_to_one_each_while_they_compute(two_cores: set[int]) -> None:
    meet = threading.Barrier(2, timeout=60)

    def call() -> tuple[int, set[int]]:
        meet.wait()
        return threading.get_native_id(), os.sched_getaffinity(0)

    places = dict(in_lanes([call, call], threads=1, apart=True))
    assert set.union(*places.values()) == two_cores
    assert [len(place) for place in places.values()] == [1, 1]
    assert all(os.sched_getaffinity(thread) == two_cores for thread in places)


def test_lanes_that_may_start_threads_are_not_kept_to_cores(two_cores: set[int]) -> None:
    """Those would stay where they are started: dask has threads for each thread that asks it."""

    def pinned() -> set[str]:
        masks = (path.joinpath("status").read_text() for path in Path("/proc/self/task").iterdir())
        found = {re.search(r"Cpus_allowed_list:\s*(\S+)", mask)[1] for mask in masks}  # type: ignore[index]
        return found - {",".join(map(str, two_cores)), "0-1"}

    case = data.mlp_classification()
    x, y = (da.from_array(part.numpy(), chunks=(5, *part.shape[1:])) for part in case.train)
    infl = di.DirectInfluence(case.model, case.loss, 0.1, chunk_size=5).fit((x, y))
    infl.influences_to_zarr("memory://lanes-and-cores", (x[:4], y[:4]), (x, y), tile_bytes=64)
    few_x, few_y = (part[:4] for part in case.train)
    infl.influences(few_x, few_y, *case.train)
    assert not pinned()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_calls_in_memory_keep_their_lanes_apart(
    two_cores: set[int], monkeypatch: pytest.MonkeyPatch, mode: str, lazy: bool
) -> None:
    case, places, real = data.mlp_classification(), list[list[int]](), os.sched_setaffinity

    def watching(thread: int, cores: Sequence[int]) -> None:
        places.append([*cores])
        real(thread, cores)

    infl = di.DirectInfluence(case.model, case.loss, 0.1, chunk_size=5).fit(case.train)
    monkeypatch.setattr(os, "sched_setaffinity", watching)
    few_x, few_y = (part[:4] for part in case.train)
    if lazy:
        x, y = (da.from_array(part.numpy(), chunks=(5, *part.shape[1:])) for part in case.train)
        infl.influences(few_x, few_y, x, y, mode=mode).compute(scheduler="synchronous")
    else:
        infl.influences(few_x, few_y, *case.train, mode=mode)
    assert min(map(len, places), default=0) == 1
    assert os.sched_getaffinity(0) == two_cores


def test_this_thread_shares_work_on_a_core_of_its_own(two_cores: set[int]) -> None:
    meet, places = threading.Barrier(2, timeout=60), list[set[int]]()

    def call() -> None:
        meet.wait()
        places.append(os.sched_getaffinity(0))

    with Shared(1, apart=True) as lanes:
        lanes.add([call, call])
        lanes.finish()
    assert set.union(*places) == two_cores
    assert [len(place) for place in places] == [1, 1]
    assert os.sched_getaffinity(0) == two_cores


def resting() -> list[set[int]]:
    """Where each of two lanes may run, once it has made a call."""
    meet = threading.Barrier(2, timeout=60)
    threads = in_lanes([lambda: (meet.wait(), threading.get_native_id())[1]] * 2, threads=1)
    return [os.sched_getaffinity(thread) for thread in threads]


def test_lanes_are_told_their_core_before_they_wake(two_cores: set[int]) -> None:
    """A thread that wakes on the core where another computes waits for milliseconds to get away."""
    lanes._pool.cache_clear()
    own, meet = Shared(1, apart=True), threading.Barrier(2, timeout=60)
    with own:
        own.add([lambda: meet.wait() and None] * 2)  # starts the other lane
        own.finish()
    (thread,) = lanes._pool(1)._resting.values()
    assert os.sched_getaffinity(thread) == two_cores
    with own:
        here, there = os.sched_getaffinity(0), os.sched_getaffinity(thread)
        assert len(here) == len(there) == 1
        assert here | there == two_cores
    assert os.sched_getaffinity(thread) == two_cores
    assert os.sched_getaffinity(0) == two_cores


def test_a_lane_that_was_told_a_core_makes_plain_calls_on_any(two_cores: set[int]) -> None:
    """Those of another thread, beside a call whose lanes are kept apart."""
    assert resting() == [two_cores, two_cores]
    with lanes._pool(2).at_hand(sorted(two_cores)):  # and no call for them yet
        assert all(cores == two_cores for cores in in_lanes([lambda: os.sched_getaffinity(0)] * 4, threads=1))
    assert resting() == [two_cores, two_cores]


def test_an_interrupt_on_the_way_in_gives_the_core_back(
    two_cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(count: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "_pool", interrupted)
    own = Shared(1, apart=True)
    with pytest.raises(KeyboardInterrupt), own:
        raise AssertionError("went in")
    assert os.sched_getaffinity(0) == two_cores


@pytest.mark.parametrize("threads", [1, 2])
def test_of_calls_that_fail_the_first_that_was_added_is_raised(threads: int) -> None:
    """Not the one that was first to fail; those after it are not begun."""
    before, begun = torch.get_num_threads(), list[int]()
    torch.set_num_threads(threads)

    def call(number: int) -> None:
        begun.append(number)
        time.sleep(0.05 if number == 1 else 0.0)
        if number in (1, 2, 50):
            raise ZeroDivisionError(number)

    def shared() -> None:
        with Shared(1) as lanes:
            lanes.add(partial(call, number) for number in range(100))
            lanes.relieve(1)
            raise AssertionError("went on")

    try:
        with pytest.raises(ZeroDivisionError, match="1"):
            shared()
    finally:
        torch.set_num_threads(before)
    assert len(begun) < 90


def test_calls_that_are_all_done_wait_for_no_lane_of_others(two_threads: None) -> None:
    """One pool serves all calls of the process: a short one is not to last as long as a long one beside it."""
    taken, go, long = threading.Event(), threading.Event(), []

    def occupy() -> None:
        taken.set()
        go.wait(10)
        long.append("done")

    try:
        with Shared(1) as others, Shared(1) as own:
            others.add([occupy])
            taken.wait(10)
            short: list[str] = []
            own.add([lambda: short.append("done")])
            own.finish()
            assert (short, long) == (["done"], [])
            with Shared(1) as left:
                left.add([occupy])
            assert long == []
            go.set()
    finally:
        go.set()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are the kernel's own affair")
def test_cores_are_given_back_where_waiting_is_interrupted(
    two_threads: None, two_cores: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(futures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lanes, "wait", interrupted)
    own = Shared(1, apart=True)  # lanes that go on hold it: nothing is put in order where it is forgotten
    with pytest.raises(KeyboardInterrupt), own:
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == two_cores


def test_fewer_lanes_than_cores_are_placed_by_the_kernel(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 1, 2, 5})
    assert not cores_of(2)
    torch.set_num_threads(4)
    assert [*cores_of(4)] == [0, 1, 2, 5]
    assert not cores_of(2)


def test_cores_that_were_taken_away_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(thread: int, cores: Sequence[int]) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", refuses)
    with keeping_to([0, 1], 1):
        assert os.sched_getaffinity(0)


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
