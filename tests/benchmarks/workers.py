"""The same runs to Zarr on one worker and on two, in turn, each on a cluster that has been warmed up.

Each worker is one thread in a process that is kept on a core of its own, so that a single one cannot read ahead or
write behind on the other core; scheduler and client run wherever there is room. The training data are tensors that
the client holds and has to bring to the workers (64 MiB, two to four seconds of one core), and a Zarr group on
disk, four times as large, in chunks and codecs as zarr chooses them. A sample of
2 KiB takes a tenth of a millisecond: an MLP 512-256-10 along 20 directions and 512 scores, a small model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import processes
import results
import zarr
from growth import Size, fitted, samples
from problems import SMALL
from results import Result
from torch import Tensor

SIZE = Size(tests=512, trains=2**12 if SMALL else 2**15, features=512, hidden=256)
ON_DISK = 4
"""Times that the group on disk is larger."""


def written(place: Path, parts: tuple[Tensor, ...]) -> Path:
    """Samples as a Zarr group, chunks of 1,024 of them."""
    group = zarr.create_group(place)
    for name, part in zip("xy", parts, strict=True):
        group.create_array(name, data=part.numpy(), chunks=(1024, *part.shape[1:]))
    return place


def run(workers: int, test: Any, trains: dict[str, Any], others: tuple[Tensor, ...]) -> dict[str, float]:
    """Seconds of each run, on a new cluster that has scored ``others``: so many that each worker has had some."""
    seconds = {}
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = processes.cluster(place, workers, memory_limit="4GiB", pinned=True)
        infl = fitted(SIZE, stack.enter_context(cluster)[0])
        infl.influences_to_zarr(place / "warm", test, others)
        for name, train in trains.items():
            began = time.perf_counter()
            infl.influences_to_zarr(place / name, test, train)
            seconds[name] = time.perf_counter() - began
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    times: dict[tuple[str, int], list[float]] = {}
    test, train = samples(SIZE.tests, SIZE.features, 1), samples(SIZE.trains, SIZE.features, 2)
    others = samples(SIZE.trains, SIZE.features, 4)
    with tempfile.TemporaryDirectory() as name:
        on_disk = written(Path(name) / "data", samples(ON_DISK * SIZE.trains, SIZE.features, 3))
        trains = {"tensors": train, "Zarr": on_disk}
        for _ in range(args.repeats):
            for workers in (1, 2):
                for kind, seconds in run(workers, test, trains, others).items():
                    times.setdefault((kind, workers), []).append(seconds)
                    print(f"    {workers} workers, {kind}: {seconds:.2f} s", flush=True)
    rows = [
        Result("workers", f"2 workers of one core, {kind}", "1 worker", times[kind, 2], times[kind, 1], 1.8)
        for kind in trains
    ]
    results.write(args.output / "workers.json", rows)


if __name__ == "__main__":
    main()
