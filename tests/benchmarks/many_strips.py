"""What scheduling costs a run of a million tiles: time of a strip, memory of client and scheduler.

The strips do nothing but their ledger entry; the scheduler, the workers and the client are
processes of their own, and everything between them is what a real run has. A plan never has more
than 50,000 strips, so that a million tiles are 50,000 strips of twenty.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from distributed import Client

from dask_influence.execution.dask import DaskExecutor
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.plan import MOST_STRIPS, Work, arrange
from dask_influence.storage.stores import Location

MILLION = Work(
    tests=1_000,
    trains=1_000_000,
    features=(),
    parameters=1_000,
    rank=20,
    itemsize=4,
    activations=100,
    sample_bytes=400,
)
"""A billion scores: at 4,000 bytes a tile, a million tiles."""


def empty_strip(location: Location, index: int) -> str:
    """A strip without its work: the entry alone."""
    name = f"strip-{index:06d}"
    Ledger(location).record(name, {"shards": [], "seconds": 0.0, "worker": f"{os.getpid()}"})
    return name


@contextmanager
def cluster(folder: Path, workers: int) -> Iterator[tuple[Client, psutil.Process]]:
    """A scheduler and workers as processes, and a client; yields the client and the scheduler."""
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [
        subprocess.Popen([*dask, "scheduler", "--scheduler-file", str(file), "--no-dashboard"], **quiet)
    ]
    worker = [*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard"]
    started += [subprocess.Popen([*worker, "--memory-limit", "2GiB"], **quiet) for _ in range(workers)]
    try:
        with Client(scheduler_file=str(file)) as client:
            client.wait_for_workers(workers, timeout=60)
            yield client, psutil.Process(started[0].pid)
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def main() -> None:
    """Run the strips and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strips", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    plan = arrange(MILLION, tile_bytes=4_000)
    print(
        f"the plan of {MILLION.tests:,} × {MILLION.trains:,} scores: {plan.tiles:,} tiles, {plan.strips:,} strips"
    )
    client_process = psutil.Process()
    with (
        tempfile.TemporaryDirectory() as folder,
        cluster(Path(folder), arguments.workers) as (client, scheduler),
    ):
        executor = DaskExecutor(client)
        location = Location.of(Path(folder) / "run")
        list(executor.map(empty_strip, ((location, index) for index in range(200))))  # warm
        began, every = time.perf_counter(), max(1, arguments.strips // 10)
        print("   strips  seconds  ms a strip  client MiB  scheduler MiB")
        calls = ((location, index) for index in range(arguments.strips))
        for done, _ in enumerate(executor.map(empty_strip, calls), 1):
            if done % every == 0:
                seconds = time.perf_counter() - began
                sizes = [process.memory_info().rss / 2**20 for process in (client_process, scheduler)]
                print(
                    f"{done:9,}  {seconds:7.1f}  {1e3 * seconds / done:10.2f}  {sizes[0]:10.0f}  {sizes[1]:13.0f}"
                )
        per_strip = (time.perf_counter() - began) / arguments.strips
        listing = time.perf_counter()
        entries = len(Ledger(location).entries())
        print(f"reading the ledger of {entries:,} strips again: {time.perf_counter() - listing:.1f} s")
    print(f"a million tiles in {plan.strips:,} strips: {per_strip * plan.strips / 60:.1f} min of scheduling")
    assert plan.strips <= MOST_STRIPS


if __name__ == "__main__":
    main()
