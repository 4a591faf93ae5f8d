"""Reading ahead and writing behind: in order, as many at a time as are allowed, and nothing is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import pytest

from dask_influence.execution.overlap import Ahead, Behind
from dask_influence.storage.sources import ArraySource


class Noting(ArraySource):
    """Samples that say which of them are read."""

    def __init__(self) -> None:
        super().__init__(np.arange(11.0), np.arange(11))
        self.ranges: list[tuple[int, int]] = []
        self.grown = threading.Condition()

    def _read(self, start: int, stop: int) -> Any:
        with self.grown:
            self.ranges.append((start, stop))
            self.grown.notify_all()
        return super()._read(start, stop)

    def seen(self, count: int) -> bool:
        """Whether so many reads have begun, by themselves."""
        with self.grown:
            return self.grown.wait_for(lambda: len(self.ranges) >= count, timeout=60)


def test_the_next_samples_are_read_before_they_are_asked_for() -> None:
    source, ranges = Noting(), [(0, 4), (4, 8), (8, 11)]
    with closing(Ahead(source, ranges)) as ahead:
        for count, bounds in enumerate(ranges, 2):
            np.testing.assert_array_equal(ahead.read(*bounds)[1], np.arange(*bounds))
            assert source.seen(min(count, 3))
    assert source.ranges == ranges  # each once
    assert ahead.digest() == source.digest()


def test_other_samples_are_read_when_they_are_asked_for() -> None:
    """As those of a batch that is looked at again for the sample that spoils it."""
    source = Noting()
    with closing(Ahead(source, [(0, 4), (4, 8)])) as ahead:
        for bounds in [(0, 4), (0, 4), (2, 3), (4, 8)]:
            np.testing.assert_array_equal(ahead.read(*bounds)[1], np.arange(*bounds))
    assert sorted(source.ranges) == [(0, 4), (0, 4), (2, 3), (4, 8)]


def test_what_reading_ahead_raises_is_raised_where_it_is_asked_for() -> None:
    with closing(Ahead(Noting(), [(0, 4), (4, 12)])) as ahead:
        ahead.read(0, 4)
        with pytest.raises(IndexError, match="4 to 12 of 11"):
            ahead.read(4, 12)


@pytest.mark.parametrize("allowed", [1, 3])
def test_calls_go_on_behind_their_caller_a_few_at_a_time(allowed: int) -> None:
    go, lock, running, most = threading.Event(), threading.Lock(), [0], [0]

    def call(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        go.wait(60)
        with lock:
            running[0] -= 1
        return number

    with Behind[int](allowed) as behind:
        for number in range(allowed):
            behind.submit(partial(call, number))  # returns, although the call does not
        while most[0] < allowed:
            time.sleep(0.001)
        go.set()
        for number in range(allowed, 9):
            behind.submit(partial(call, number))
    assert behind.results == [*range(9)]
    assert most == [allowed]


def behind_of(*calls: Callable[[], int]) -> list[int]:
    with Behind[int]() as behind:
        for call in calls:
            behind.submit(call)
    return behind.results


def test_what_a_call_raises_is_raised_by_the_next_or_at_the_end() -> None:
    made = []

    def fails() -> int:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        behind_of(fails, lambda: made.append(1) or 1)
    with pytest.raises(OSError, match="full"):
        behind_of(fails)
    assert made == []


def test_no_call_is_left_running_when_its_caller_raises() -> None:
    begun, ended = threading.Event(), []

    def call() -> int:
        begun.set()
        ended.append(threading.Event().wait(0.1))
        return 1

    def caller() -> None:
        with Behind[int]() as behind:
            behind.submit(call)
            begun.wait(60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        caller()
    assert ended == [False]
