"""Cores: threads that have all cores of the process between them compute on one each.

The kernel wakes threads that have slept for a tenth of a second on one core (a virtual one that was idle it takes
for one that is away), and may take milliseconds to part them, in which only one computes. A thread on its way
elsewhere has to wait for the other as well: it is told before it wakes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch


def cores_of(threads: int) -> Sequence[int]:
    """A core for each of the threads, where they are all that the process computes with and may run on; else none.

    Fewer threads than cores are better placed by the kernel, which knows where other processes compute.
    """
    if not hasattr(os, "sched_setaffinity") or threads != torch.get_num_threads():
        return ()
    cores = sorted(os.sched_getaffinity(0))
    return cores if len(cores) == threads else ()


@contextmanager
def keeping_to(cores: Sequence[int], number: int) -> Iterator[None]:
    """The calling thread on ``cores[number]``, then on any of ``cores``; wherever it is without ``cores``.

    Threads and processes that it starts meanwhile stay where it is.
    """
    if not cores:
        yield
        return
    place(cores[number : number + 1])
    try:
        yield
    finally:
        place(cores)


def place(cores: Sequence[int], thread: int = 0) -> None:
    """A thread of this process by its native number, or the calling one, on one of ``cores`` from now on."""
    with suppress(OSError):  # a container may refuse, or have taken cores away: all goes as without
        os.sched_setaffinity(thread, cores)
