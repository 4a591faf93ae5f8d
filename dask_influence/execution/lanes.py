"""Lanes: threads of this process that take tasks side by side, each with torch threads of its own.

A task computes with as many torch threads as it would on a cluster, and so leaves the same bits; what
the process has beyond those goes to other tasks. Derivatives are taken one at a time
(:func:`~dask_influence.core.elementary.differentiation`), products meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any, Self, TypeVar

import torch

from dask_influence.execution.cores import cores_of, keeping_to, place

T = TypeVar("T")

AHEAD = 3
"""Calls that are begun for each lane: what waits is taken when a lane is free, and there may be any number."""


def lanes_of(threads: int) -> int:
    """How many tasks of ``threads`` torch threads run at once."""
    return max(1, torch.get_num_threads() // threads)


class _Lanes:
    """Threads that stay, each a lane: to start some takes milliseconds beside others that compute."""

    def __init__(self, count: int) -> None:
        self._own, self._numbers = threading.local(), itertools.count()
        self._lock, self._resting = threading.Lock(), dict[int, int]()
        self._told = dict[int, Sequence[int]]()
        self._pool = ThreadPoolExecutor(count, "dask-influence", initializer=self._begin)

    def _begin(self) -> None:
        self._own.number = next(self._numbers)

    def submit(self, call: Callable[[], T], cores: Sequence[int]) -> Future[T]:
        """Let a lane make the call, on its own of the ``cores`` if there are any: the first lane on the first."""
        return self._pool.submit(self._make, call, cores)

    def _make(self, call: Callable[[], T], cores: Sequence[int]) -> T:
        number = self._own.number
        with self._lock:
            self._resting.pop(number, None)
            told = self._told.pop(number, ())
        if told and not cores:  # for a call beside this one
            place(told)
        try:
            with keeping_to(cores, number):
                return call()
        finally:
            with self._lock:
                self._resting[number] = threading.get_native_id()

    @contextmanager
    def at_hand(self, cores: Sequence[int]) -> Iterator[None]:
        """Lanes that rest are told their own of the ``cores``, to wake up on; those not woken may go anywhere again."""
        try:
            with self._lock:
                for number, thread in self._resting.items() if cores else ():
                    self._told[number] = cores
                    place(cores[number : number + 1], thread)
            yield
        finally:
            with self._lock:
                for number in [*self._told] if cores else ():
                    place(self._told.pop(number), self._resting[number])


_pool = functools.cache(_Lanes)

# a child of this process has the lanes, but none of their threads
os.register_at_fork(after_in_child=_pool.cache_clear)


def in_lanes(calls: Iterable[Callable[[], T]], threads: int, *, apart: bool = False) -> Iterator[T]:
    """Results of the calls, in their order, of which a few are begun ahead; none is left running when one raises.

    Lanes that are kept ``apart`` have a core each (:mod:`~dask_influence.execution.cores`): for calls that start
    neither threads nor processes, which would stay there.
    """
    lanes = lanes_of(threads)
    if lanes == 1:
        yield from (call() for call in calls)
        return
    coming, futures, cores = iter(calls), deque[Future[T]](), cores_of(lanes) if apart else ()
    pool = _pool(lanes)
    with pool.at_hand(cores):
        try:
            while True:
                few = itertools.islice(coming, AHEAD * lanes - len(futures))
                futures.extend(pool.submit(call, cores) for call in few)
                if not futures:
                    return
                yield futures.popleft().result()
        finally:
            wait(_begun(futures))


def _begun(futures: Iterable[Future[Any]]) -> list[Future[Any]]:
    """Those that have begun, and cancel the rest: one that is only cancelled is waited for until a lane is free."""
    return [future for future in futures if not future.cancel()]


class Shared:
    """Calls that this thread and other lanes take from one queue, in order; none goes on after the ``with`` block.

    After one that fails no more are begun, and this thread raises its error where it adds, takes part or finishes:
    of several the one whose call was added first, whoever was faster.

    Parameters
    ----------
    threads : int
        Torch threads of a lane.
    apart : bool
        As in :func:`in_lanes`.
    abandon : callable, optional
        Called where the block raises, before other lanes are waited for: to end what they wait for.
    """

    def __init__(
        self, threads: int, *, apart: bool = False, abandon: Callable[[], None] = lambda: None
    ) -> None:
        self._others = lanes_of(threads) - 1
        self._abandon, self._placed = abandon, ExitStack()
        self._cores = cores_of(lanes_of(threads)) if apart else ()
        self._elsewhere = *self._cores[1:], *self._cores[:1]  # the first core is this thread's
        self._numbers, self._failed = itertools.count(), dict[int, Exception]()
        self._queue = deque[tuple[int, Callable[[], None]]]()
        self._busy: list[Future[None]] = []

    def add(self, calls: Iterable[Callable[[], None]]) -> None:
        """Let the others begin with ``calls``, after those that were added before."""
        self._raise()
        self._queue.extend((next(self._numbers), call) for call in calls)
        self._busy += [_pool(self._others).submit(self._take, self._elsewhere) for _ in range(self._others)]

    def relieve(self, most: int) -> None:
        """Take part until no more than ``most`` calls wait for somebody to begin."""
        while len(self._queue) > most:
            self._take_one()
        self._raise()

    def finish(self) -> None:
        """Take part until all is done."""
        self._take()
        for other in _begun(self._busy):  # another would find nothing left to take
            other.result()
        self._busy.clear()
        self._raise()

    def __enter__(self) -> Self:
        with ExitStack() as placed:
            placed.enter_context(keeping_to(self._cores, 0))
            if self._others:
                placed.enter_context(_pool(self._others).at_hand(self._elsewhere))
            self._placed = placed.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.clear()
        if kind is not None:
            self._abandon()
        try:
            wait(_begun(self._busy))
        finally:  # whoever interrupts twice gets the cores back, too
            self._placed.close()

    def _raise(self) -> None:
        if self._failed:
            self._queue.clear()
            wait(_begun(self._busy))  # what was added before may fail yet
            raise self._failed[min(self._failed)]

    def _take(self) -> None:
        while self._take_one():
            pass

    def _take_one(self) -> bool:
        try:
            number, call = self._queue.popleft()
        except IndexError:  # another lane was faster
            return False
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised by the thread that shares them
            self._failed[number] = error
            self._queue.clear()
        return True
