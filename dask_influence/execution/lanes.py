"""Lanes: threads of this process that take tasks side by side, each with torch threads of its own.

A task computes with as many torch threads as it would on a cluster, and so leaves the same bits; what
the process has beyond those goes to other tasks. Derivatives are taken one at a time
(:func:`~dask_influence.core.elementary.differentiation`), products meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")

AHEAD = 3
"""Calls that are begun for each lane: what waits is taken when a lane is free, and there may be any number."""


def lanes_of(threads: int) -> int:
    """How many tasks of ``threads`` torch threads run at once."""
    return max(1, torch.get_num_threads() // threads)


@functools.cache
def pool(lanes: int) -> ThreadPoolExecutor:
    """Threads that stay: to start some takes milliseconds beside others that compute."""
    return ThreadPoolExecutor(lanes, thread_name_prefix="dask-influence")


# a child of this process has the pool, but none of its threads
os.register_at_fork(after_in_child=pool.cache_clear)


def in_lanes(calls: Iterable[Callable[[], T]], threads: int) -> Iterator[T]:
    """Results of the calls, in their order, of which a few are begun ahead; none is left running when one raises."""
    lanes = lanes_of(threads)
    if lanes == 1:
        yield from (call() for call in calls)
        return
    coming, futures = iter(calls), deque[Future[T]]()
    try:
        while True:
            futures.extend(
                pool(lanes).submit(call) for call in itertools.islice(coming, AHEAD * lanes - len(futures))
            )
            if not futures:
                return
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
