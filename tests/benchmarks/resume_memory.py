"""What a resume reads: client memory and seconds over a ledger of a million shard records.

    python tests/benchmarks/resume_memory.py [--shards 62500 1000000] [--folder FOLDER]

A run is begun, and its first strip done. Entries and shards of the other strips are then made up as if they had been
done, but for the last one, and the same call is made again by a new process: it reads the ledger, does one strip and
completes the store. Printed are the seconds of the whole call and of reading the ledger, and the MiB by which each
raised the peak resident memory of the process. Shards are names of one small file, so that a million of them fits
anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dask_influence import DirectInfluence
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.plan import Plan
from dask_influence.storage.stores import Location

TESTS, TILE_COLUMNS, TILE_BYTES = 20, 4, 64
"""Tiles of 4 × 4 scores, five for each four training samples."""

NAMES = 20_000
"""Names that one file gets; file systems allow few more."""


def infl() -> DirectInfluence:
    """One parameter: nothing here is about computing."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # no strip is begun beside the first
    model, few = torch.nn.Linear(1, 1, bias=False), torch.linspace(-1, 1, 100)[:, None]
    return DirectInfluence(model, torch.nn.functional.mse_loss, 0.1).fit((few, few**2))


def write(fitted: DirectInfluence, store: Path, shards: int, progress: Any = None) -> None:
    """The run of that many shards."""
    x = torch.linspace(-1, 1, shards * TILE_COLUMNS * 4 // TESTS)[:, None]
    test = (x[:TESTS], x[:TESTS] ** 3)
    fitted.influences_to_zarr(store, test, (x, x**2), tile_bytes=TILE_BYTES, progress=progress)


def make_up(store: Path) -> int:
    """Entries and shards of all strips but the last one, from those of the first; the number of shards."""
    ledger = Ledger(Location.of(store))
    run, first = ledger.read_run(), ledger.read("strip-000000")
    assert run is not None
    assert first is not None
    plan = Plan.from_json(run["plan"])
    model, count = store / first["shards"][0][0], len(first["shards"])
    _, nbytes, checksum = first["shards"][0]
    for index in range(1, plan.strips - 1):
        strip = plan.strip(index)
        shards = []
        for columns in plan.columns(strip):
            for rows in plan.rows(strip):
                key = f"influence/c/{rows.start // plan.tile[0]}/{columns.start // plan.tile[1]}"
                target = store / key
                target.parent.mkdir(parents=True, exist_ok=True)
                if count % NAMES == 0:
                    target.write_bytes(model.read_bytes())
                    model = target
                else:
                    os.link(model, target)
                count += 1
                shards.append([key, nbytes, checksum])
        own = {
            name: [part.start, part.stop] for name, part in (("rows", strip.rows), ("columns", strip.columns))
        }
        ledger.record(strip.name, {**first, **own, "shards": shards})
    return count


def peak() -> float:
    """MiB of resident memory, at its most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def resume(store: Path, shards: int) -> None:
    """Make the call again, and print what it took."""
    fitted, small = infl(), Path(tempfile.mkdtemp(dir=store.parent)) / "warm"
    write(fitted, small, 100)  # all that is imported and started once
    standing, spent = Ledger.standing, dict[str, float]()

    def measured(*arguments: Any) -> Any:
        before, began = peak(), time.perf_counter()
        found = standing(*arguments)
        spent.update(ledger_seconds=time.perf_counter() - began, ledger_mib=peak() - before)
        return found

    Ledger.standing = measured  # type: ignore[method-assign]
    before, began = peak(), time.perf_counter()
    write(fitted, store, shards)
    spent.update(seconds=time.perf_counter() - began, mib=peak() - before, before_mib=before)
    print(json.dumps(spent))


class _Enough(Exception):  # noqa: N818 - not an error
    pass


def _stop(stage: str, done: int, total: int) -> None:
    if stage == "strips" and done == 1:
        raise _Enough


def main(sizes: list[int], folder: str | None) -> None:
    """Print a line for each size."""
    for shards in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            store = Path(scratch) / "run"
            try:
                write(infl(), store, shards, _stop)
            except _Enough:
                made = make_up(store)
            command = [sys.executable, __file__, "--resume", str(store), "--shards", str(shards)]
            spent = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{made:,} shard records: ledger read in {spent['ledger_seconds']:.1f} s, "
                f"{spent['ledger_mib']:.1f} MiB; "
                f"whole resume {spent['seconds']:.1f} s, {spent['mib']:.1f} MiB over {spent['before_mib']:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[62_500, 1_000_000])
    parser.add_argument("--folder")
    parser.add_argument("--resume", type=Path)
    options = parser.parse_args()
    if options.resume is None:
        main(options.shards, options.folder)
    else:
        resume(options.resume, options.shards[0])
