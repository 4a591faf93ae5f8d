"""The same run to Zarr on one worker of one thread and on two, in turn, each on a cluster that has been warmed up."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import processes
import results
from growth import Size, fitted, samples
from problems import SMALL
from results import Result

SIZE = Size(tests=512, trains=2**12 if SMALL else 2**15, features=512, hidden=256)
"""Many seconds of one core: what starting tasks costs is none of it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    times: dict[int, list[float]] = {1: [], 2: []}
    test, train = samples(SIZE.tests, SIZE.features, 1), samples(SIZE.trains, SIZE.features, 2)
    for _ in range(args.repeats):
        for workers, seconds in times.items():
            with tempfile.TemporaryDirectory() as name:
                place = Path(name)
                with processes.cluster(place, workers, memory_limit="4GiB") as (client, _):
                    infl = fitted(SIZE, client)
                    infl.influences_to_zarr(place / "warm", test, tuple(part[:1024] for part in train))
                    began = time.perf_counter()
                    infl.influences_to_zarr(place / "run", test, train)
                    seconds.append(time.perf_counter() - began)
            print(f"    {workers} workers: {seconds[-1]:.2f} s", flush=True)
    row = Result("workers", "2 workers of one core", "1 worker", times[2], times[1], 1.8)
    results.write(args.output / "workers.json", [row])


if __name__ == "__main__":
    main()
