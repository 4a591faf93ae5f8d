"""Size, time and memory of a report about 10⁴ × 10⁶ scores, of which lists of ten were kept.

Run it by itself: ``python tests/benchmarks/report_size.py [--tests N] [--trains M]``. A linear model with
P = 36 is scored in this process with ``TopK(10)`` and ``SelfInfluence()``; the report is then made in a process of
its own, with the training data at hand, and its peak memory is that of that process.
"""

from __future__ import annotations

import argparse
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

from dask_influence import DirectInfluence, SelfInfluence, TopK
from dask_influence.execution.units import format_bytes
from dask_influence.report import report

FEATURES, CLASSES, ROWS = 8, 4, 2**14


def write(path: Path, count: int, seed: int) -> Path:
    """Random points, a chunk at a time."""
    group, rng = zarr.open_group(path, mode="w"), np.random.default_rng(seed)
    x = group.create_array("x", shape=(count, FEATURES), chunks=(ROWS, FEATURES), dtype="float32")
    y = group.create_array("y", shape=(count,), chunks=(ROWS,), dtype="int64")
    for low in range(0, count, ROWS):
        high = min(low + ROWS, count)
        x[low:high] = rng.standard_normal((high - low, FEATURES), dtype=np.float32)
        y[low:high] = rng.integers(0, CLASSES, high - low)
    return path


def make(folder: Path) -> None:
    """The report, in this process, told as a line."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
    page = report(
        folder / "top",
        folder / "report.html",
        self_influence=folder / "own",
        test=folder / "test",
        train=folder / "train",
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"report  {format_bytes(page.stat().st_size)}  {time.perf_counter() - began:.1f} s  peak {format_bytes(peak)}, "
        f"of which before {format_bytes(before)}",
        flush=True,
    )


def main() -> None:
    """Both stores, then the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tests", type=int, default=10**4)
    parser.add_argument("--trains", type=int, default=10**6)
    parser.add_argument("--report-of", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.report_of is not None:
        make(asked.report_of)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test, train = write(folder / "test", asked.tests, 1), write(folder / "train", asked.trains, 0)
        torch.manual_seed(0)
        infl = DirectInfluence(nn.Linear(FEATURES, CLASSES), cross_entropy, 0.1).fit(train)
        began = time.perf_counter()
        infl.influences_to_zarr(folder / "top", test, train, reduce=TopK(10))
        infl.influences_to_zarr(folder / "own", None, train, reduce=SelfInfluence())
        print(f"scores  {asked.tests:,} × {asked.trains:,}  {time.perf_counter() - began:.1f} s", flush=True)
        subprocess.run([sys.executable, __file__, "--report-of", str(folder)], check=True)


if __name__ == "__main__":
    main()
