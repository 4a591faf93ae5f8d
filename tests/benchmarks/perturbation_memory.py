"""Peak memory of a perturbation run with F = 3,072 and P = 820,874, at several M, each in a fresh process.

Eight test points are differentiated with respect to every pixel of every training sample, to Zarr, in this
process. A peer that forms ∇x∇θ would take F · P numbers a sample, 10 GB. The peak is that of the whole
process, interpreter and libraries, model and data included (Linux).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import processes
import results
from problems import Setting, make
from results import Result

from dask_influence import ArnoldiInfluence

TESTS = 8
SAMPLES = (64, 256, 1024)
LIMIT = 2_000_000_000


def run(folder: Path, samples: int) -> None:
    """One run; prints its seconds and the bytes of this process at its peak."""
    setting = Setting(folder, "large", "float32")
    how = {"rank": 20, "tol": 1e-1, "curvature": "ggn"}
    infl = ArnoldiInfluence(setting.model, setting.loss, setting.regularization, **how)
    infl.fit(tuple(part[:256] for part in setting.train))
    train = tuple(part[:samples] for part in setting.train)
    with tempfile.TemporaryDirectory(dir=folder) as store:
        began = time.perf_counter()
        infl.influences_to_zarr(f"{store}/scores", setting.test(TESTS), train, mode="perturbation")
        print(time.perf_counter() - began, processes.peak())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="not used: memory is measured once")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--problems", type=Path, help="run once, on what is written there")
    parser.add_argument("--samples", type=int, help="of that run")
    args = parser.parse_args()
    if args.problems:
        run(args.problems, args.samples)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for samples in SAMPLES:
            again = [sys.executable, __file__, "--problems", name, "--samples", str(samples)]
            told = subprocess.run(again, check=True, capture_output=True, text=True).stdout.split()
            seconds, peak = float(told[0]), int(told[1])
            title = f"perturbation {TESTS} x {samples:,} x 3,072, P = 820,874, peak memory"
            note = f"{seconds:.1f} s, to Zarr"
            rows.append(Result(f"memory-{samples}", title, "-", [peak], [], LIMIT, "bytes", note))
            print(f"    M = {samples:,}: {peak / 1e9:.2f} GB, {note}", flush=True)
    results.write(args.output / "memory.json", rows)


if __name__ == "__main__":
    main()
