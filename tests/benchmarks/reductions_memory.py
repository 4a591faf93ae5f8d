"""Peak memory of a reduction against the number of training points, which it must not depend on.

Run it by itself: ``python tests/benchmarks/reductions_memory.py``. Each run is a process of its
own: 200 test points of a linear model with P = 36, training points from a Zarr group on disk, a
reduction kept of all scores. Between the rows M grows sixteenfold, and with it the scores that
are never stored; tiles are of one size. Resident memory is shown at its peak, and at its peak before the
run began. What grows with M is labels and ids, of 8 bytes each.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence, GroupSum, SelfInfluence, TopK
from dask_influence.execution.units import format_bytes

TESTS, FEATURES, CLASSES = 200, 8, 4
SIZES = (2**17, 2**21)
TILE = 2**21
KINDS = ("top", "sums", "self")


def write(path: Path, trains: int) -> None:
    """Random training points, a chunk at a time."""
    group, rng, rows = zarr.open_group(path, mode="w"), np.random.default_rng(0), 2**14
    x = group.create_array("x", shape=(trains, FEATURES), chunks=(rows, FEATURES), dtype="float32")
    y = group.create_array("y", shape=(trains,), chunks=(rows,), dtype="int64")
    for low in range(0, trains, rows):
        x[low : low + rows] = rng.standard_normal((rows, FEATURES), dtype=np.float32)
        y[low : low + rows] = rng.integers(0, CLASSES, rows)


def peak() -> int:
    """Bytes resident at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(kind: str, trains: int, folder: Path) -> None:
    """One run in this process, told as a line."""
    torch.manual_seed(0)
    x, y = torch.randn(TESTS, FEATURES), torch.randint(CLASSES, (TESTS,))
    infl = DirectInfluence(nn.Linear(FEATURES, CLASSES), cross_entropy, 0.1).fit((x, y))
    reduce = {"top": TopK(10), "sums": GroupSum(np.arange(trains) % 7), "self": SelfInfluence()}[kind]
    test = None if kind == "self" else (x, y)
    data = folder / f"train-{trains}"
    planned = infl.plan(test, data, reduce=reduce, tile_bytes=TILE)
    before, began = peak(), time.perf_counter()
    infl.influences_to_zarr(folder / f"{kind}-{trains}", test, data, reduce=reduce, tile_bytes=TILE)
    seconds = time.perf_counter() - began
    scores = trains * 4 * (1 if kind == "self" else TESTS)
    print(
        f"{reduce!r:<24} M = {trains:>9,}  scores {format_bytes(scores):>9}  planned "
        f"{format_bytes(planned.peak_bytes):>9}  peak {format_bytes(peak()):>9}  "
        f"of which before {format_bytes(before):>9}  {seconds:5.1f} s",
        flush=True,
    )


def main() -> None:
    """Both sizes of each reduction, one process after the other."""
    if len(sys.argv) > 1:
        measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for trains in SIZES:
            write(Path(folder) / f"train-{trains}", trains)
        for kind in KINDS:
            for trains in SIZES:
                subprocess.run([sys.executable, __file__, kind, str(trains), folder], check=True)


if __name__ == "__main__":
    main()
