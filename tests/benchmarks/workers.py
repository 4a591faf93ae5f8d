"""The same run to Zarr on one worker of one thread and on two; both clusters stay up, runs are taken in turn."""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import processes
import results
from growth import Size, fitted, samples
from problems import SMALL
from results import Result

SIZE = Size(tests=512, trains=2**12 if SMALL else 2**16, features=512, hidden=256)
"""Many seconds of one core: what starting tasks costs is none of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    test, train = samples(SIZE.tests, SIZE.features, 1), samples(SIZE.trains, SIZE.features, 2)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        models: dict[int, Any] = {}
        for workers in times:
            place = Path(name) / f"{workers}"
            place.mkdir()
            client, _ = stack.enter_context(processes.cluster(place, workers, memory_limit="4GiB"))
            models[workers] = fitted(SIZE, client)
            few = tuple(part[:1024] for part in train)
            models[workers].influences_to_zarr(place / "warm", test, few)
        for number in range(args.repeats):
            for workers, infl in models.items():
                began = time.perf_counter()
                infl.influences_to_zarr(Path(name) / f"{workers}" / f"{number}", test, train)
                times[workers].append(time.perf_counter() - began)
                print(f"    {workers} workers: {times[workers][-1]:.2f} s", flush=True)
    row = Result("workers", "2 workers of one core", "1 worker", times[2], times[1], 1.8)
    results.write(args.output / "workers.json", [row])


if __name__ == "__main__":
    main()
