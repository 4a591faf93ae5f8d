"""Heap: what the process of a worker does with memory that it has freed.

While it works it keeps it, up to a bound, and hands it back once it has nothing to do: Dask gives no tasks
to a worker that holds much of what it may, and would wait for ever for one that does nothing and lets go of nothing.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Callable

LARGEST, MOST = 32 * 2**20, 64 * 2**20
"""Bytes of a tensor that is kept when it is freed, and of what is kept at the end of the heap."""

IDLE = 1.0
"""Seconds without a task after which all that has been freed is handed back."""

_WORKED = threading.Event()


@functools.cache
def steady() -> bool:
    """Let this process keep memory that it frees for as long as it works; whether it could be asked to.

    Dask's nannies start workers with MALLOC_TRIM_THRESHOLD_=65536, under which glibc hands
    every freed tensor back to the kernel and takes the next one page by page: a fit of the
    digits network made two million page faults and took four times as long. What is kept is kept once,
    not by every thread for itself: of a thread's own heap nothing is handed back before all of it is free.
    Elsewhere glibc learns by itself what to keep.
    """
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        return False
    try:
        mallopt, trim = ctypes.CDLL(None).mallopt, ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # no glibc, no such setting
        return False
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    wanted = ((m_mmap_threshold, LARGEST), (m_trim_threshold, MOST), (m_arena_max, 1))
    if not all(mallopt(option, value) for option, value in wanted):
        return False
    threading.Thread(target=_hand_back, args=(trim,), name="dask-influence-heap", daemon=True).start()
    return True


# a child of this process has its settings, but no thread that hands anything back
os.register_at_fork(after_in_child=steady.cache_clear)


def at_work() -> None:
    """Say that a task begins or ends: the next one may need what it frees."""
    _WORKED.set()


def _hand_back(trim: Callable[[int], int]) -> None:
    while _WORKED.wait():
        while _WORKED.is_set():
            _WORKED.clear()
            time.sleep(IDLE)
        trim(0)
