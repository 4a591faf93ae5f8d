"""What scheduling costs a run of a million tiles: a strip's overhead beside its work, memory of client and scheduler.

The strips of the large run do nothing but their ledger entry; the scheduler, the workers and the client are
processes of their own, and everything between them is what a real run has. A plan makes strips of about two
seconds of work, and never more than 50,000 of them, which is the number that the total is projected for too. What
the work of a strip takes is measured before, on tiles that are really computed and written, in this process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import processes
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence
from dask_influence.execution.dask import DaskExecutor
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.plan import MOST_STRIPS, Plan, Work, arrange
from dask_influence.storage.stores import Location

FEATURES, CLASSES, RANK, TILE = 99, 10, 20, 4_000
MILLION = Work(
    tests=1_000,
    trains=1_000_000,
    features=(),
    parameters=(FEATURES + 1) * CLASSES,
    rank=RANK,
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


def work_of_a_strip(plan: Plan, folder: Path, measured: int = 2) -> float:
    """Seconds of a strip of ``plan``, derivatives and tiles written: those of a few columns of tiles, scaled."""
    torch.manual_seed(0)
    columns = plan.tile[1] * measured
    (x, y), (x_test, y_test) = (
        (torch.randn(n, FEATURES), torch.randint(CLASSES, (n,))) for n in (columns, plan.work.tests)
    )
    infl = ArnoldiInfluence(nn.Linear(FEATURES, CLASSES), cross_entropy, 0.1, rank=RANK, tol=1e-2)
    infl.fit((x, y)).influences_to_zarr(folder / "real", (x_test, y_test), (x, y), tile_bytes=TILE)
    entries = Ledger(Location.of(folder / "real")).entries("strip-").values()
    each = [entry["seconds"] / (entry["columns"][1] - entry["columns"][0]) for entry in entries]
    return statistics.median(each) * plan.strip_columns


def main() -> None:
    """Run the strips and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strips", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    plan = arrange(MILLION, tile_bytes=TILE)
    print(
        f"the plan of {MILLION.tests:,} × {MILLION.trains:,} scores: {plan.tiles:,} tiles, {plan.strips:,} strips"
    )
    assert plan.strips <= MOST_STRIPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = work_of_a_strip(plan, folder)
        with processes.cluster(folder, arguments.workers) as (client, scheduler):
            executor = DaskExecutor(client)
            location = Location.of(folder / "run")
            list(executor.map(empty_strip, ((location, index) for index in range(200))))  # warm
            began, every = time.perf_counter(), max(1, arguments.strips // 10)
            print("   strips  seconds  ms a strip  client MiB  scheduler MiB")
            calls = ((location, index) for index in range(arguments.strips))
            for done, _ in enumerate(executor.map(empty_strip, calls), 1):
                if done % every == 0:
                    seconds = time.perf_counter() - began
                    sizes = [processes.resident(process) / 2**20 for process in ("self", scheduler)]
                    print(
                        f"{done:9,}  {seconds:7.1f}  {1e3 * seconds / done:10.2f}  {sizes[0]:10.0f}  {sizes[1]:13.0f}",
                        flush=True,
                    )
            overhead = (time.perf_counter() - began) / arguments.strips
            listing = time.perf_counter()
            entries = len(Ledger(location).entries())
            print(f"reading the ledger of {entries:,} strips again: {time.perf_counter() - listing:.1f} s")
    print(
        f"a strip: {1e3 * overhead:.1f} ms of scheduling beside {1e3 * work:.0f} ms of work, {overhead / work:.2%}; "
        f"a million tiles: {overhead * plan.strips / 60:.2f} min of scheduling in {plan.strips:,} strips, "
        f"{overhead * MOST_STRIPS / 60:.1f} min in the {MOST_STRIPS:,} that a plan may have at most, beside "
        f"{work * plan.strips / 60:.1f} min of work on one core"
    )


if __name__ == "__main__":
    main()
