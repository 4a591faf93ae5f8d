"""Overlap: the next samples are read and the last tiles are written while a task computes.

Neither computes, but waits for a store or for a codec, which leave the interpreter to others. A plan
counts how many are under way for a task.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

from dask_influence.storage.samples import Pair
from dask_influence.storage.sources import Source

T = TypeVar("T")

_MOST_THREADS = 32


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that stay: to start some takes milliseconds beside others that compute."""
    return ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="dask-influence-overlap")


# a child of this process has the pool, but none of its threads
os.register_at_fork(after_in_child=_pool.cache_clear)


class Behind(Generic[T]):
    """Calls that are made while their caller goes on, ``most`` of them at once; none outlives the ``with`` block.

    Attributes
    ----------
    results : list
        Of the calls that are done, in the order in which they were given; of all of them once the block has ended.
    """

    def __init__(self, most: int = 1) -> None:
        self.results: list[T] = []
        self._most, self._made = most, deque[Future[T]]()

    def submit(self, call: Callable[[], T]) -> None:
        """Begin with ``call`` when there are fewer than ``most``; raises what one before raised."""
        self._finish(self._most - 1)
        self._made.append(_pool().submit(call))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish(0)
        finally:
            wait(self._made)

    def _finish(self, most: int) -> None:
        while len(self._made) > most:
            self.results.append(self._made.popleft().result())


class Ahead(Source):
    """A source whose ``ranges`` are read in that order, each before it is asked for; to be closed.

    Any other range is read when it is asked for.
    """

    def __init__(self, source: Source, ranges: Iterable[tuple[int, int]]) -> None:
        super().__init__(len(source), source.spec, source.chunk_size, source.argument)
        self._source, self._coming = source, iter(ranges)
        self._next: tuple[tuple[int, int], Future[Pair]] | None = None

    def close(self) -> None:
        """Wait for what is being read."""
        if self._next is not None:
            wait([self._next[1]])

    def _read(self, start: int, stop: int) -> Pair:
        begun = self._next is not None and self._next[0] == (start, stop)
        if begun:
            assert self._next is not None
            (_, reading), self._next = self._next, None  # one that failed is not asked again
            batch = reading.result()
        else:
            batch = self._source.read(start, stop)
        coming = next(self._coming, None) if self._next is None else None
        if coming == (start, stop):  # the first one, which nobody has begun
            coming = next(self._coming, None)
        if coming is not None:
            self._next = coming, _pool().submit(self._source.read, *coming)
        return batch

    def _content_digest(self) -> str:
        return self._source.digest()
