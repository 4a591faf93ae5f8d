"""Scheduler and workers as processes of their own, and how much memory a process takes (Linux)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed import Client


@contextmanager
def cluster(
    folder: Path, workers: int, *, threads: int = 1, memory_limit: str = "2GiB", pinned: bool = False
) -> Iterator[tuple[Client, int]]:
    """A scheduler and workers, and a client in this process; yields the client and the scheduler's id.

    Workers that are ``pinned`` have one core each.
    """
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": where}
    scheduler = [*dask, "scheduler", "--scheduler-file", str(file), "--no-dashboard"]
    started = [subprocess.Popen([*scheduler, "--host", "127.0.0.1", "--port", "0"], **quiet)]
    worker = [*dask, "worker", "--scheduler-file", str(file), "--nthreads", str(threads), "--no-dashboard"]
    started += [subprocess.Popen([*worker, "--memory-limit", memory_limit], **quiet) for _ in range(workers)]
    try:
        if pinned:  # before they have started anything, which then stays there
            for process, core in zip(started[1:], sorted(os.sched_getaffinity(0)), strict=False):
                os.sched_setaffinity(process.pid, {core})
        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(workers, timeout=60)
            yield client, started[0].pid
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def resident(process: int | str = "self") -> int:
    """Bytes of a process that are in memory now."""
    return _status(process, "VmRSS")


def peak(process: int | str = "self") -> int:
    """Bytes of a process that were in memory at most since it was reset."""
    return _status(process, "VmHWM")


def reset_peak(process: int | str = "self") -> None:
    """Forget a process's high-water mark."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def _status(process: int | str, name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0
