"""Overlap: the next samples are read and the last tile is written while a task computes.

Neither computes, but waits for a store or for a codec, which leave the interpreter to others. One of
each is under way for a task, at most; a plan counts them.
"""

from __future__ import annotations

import functools
import os
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
    """Calls that are made in order, each while its caller goes on to the next; none outlives the ``with`` block.

    Attributes
    ----------
    results : list
        Of the calls that are done, in their order; of all of them once the block has ended.
    """

    def __init__(self) -> None:
        self.results: list[T] = []
        self._last: Future[T] | None = None

    def submit(self, call: Callable[[], T]) -> None:
        """Begin with ``call`` when the one before is done; raises what that one raised."""
        self._finish()
        self._last = _pool().submit(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self._last is not None:
            wait([self._last])

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            self.results.append(last.result())


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
