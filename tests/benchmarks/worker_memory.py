"""Peak memory of a worker against the plan, while M, N and F · P grow sixteenfold.

Run it by itself: ``python tests/benchmarks/worker_memory.py``. Two workers of one thread score
synthetic data with an MLP; what a worker holds at its peak is compared with what it holds before
the run (interpreter, libraries) plus the plan's bytes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from distributed import Client, LocalCluster
from side import peak_memory, reset_peak_memory
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence, TopK
from dask_influence.execution.plan import format_bytes

CLASSES, RANK = 10, 8


@dataclass(frozen=True)
class Size:
    """One run: N, M, features, hidden units, mode and whether the scores are reduced."""

    tests: int
    trains: int
    features: int
    hidden: int
    mode: str = "up"
    reduced: bool = False


GROWING: dict[str, tuple[Size, Size]] = {
    "M": (Size(256, 2**14, 64, 64), Size(256, 2**18, 64, 64)),
    "N, reduced": (Size(2**9, 2**13, 64, 64, reduced=True), Size(2**13, 2**13, 64, 64, reduced=True)),
    "F · P, perturbation": (
        Size(8, 512, 256, 64, mode="perturbation"),
        Size(8, 512, 1024, 256, mode="perturbation"),
    ),
    "P": (Size(128, 4096, 256, 256), Size(128, 4096, 1024, 1024)),
}


def write(path: Path, samples: int, features: int, seed: int) -> str:
    """Random samples as a Zarr group, a chunk at a time."""
    group, rng, rows = zarr.open_group(path, mode="w"), np.random.default_rng(seed), 2**10
    x = group.create_array("x", shape=(samples, features), chunks=(rows, features), dtype="float32")
    y = group.create_array("y", shape=(samples,), chunks=(rows,), dtype="int64")
    for low in range(0, samples, rows):
        count = min(rows, samples - low)
        x[low : low + count] = rng.standard_normal((count, features), dtype=np.float32)
        y[low : low + count] = rng.integers(0, CLASSES, count)
    return str(path)


def measure(name: str, size: Size) -> None:
    """One run on a fresh cluster, told as a line."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size.features, size.hidden), nn.Tanh(), nn.Linear(size.hidden, CLASSES))
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="8GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        place = Path(folder)
        fitted_on = write(place / "fit", 512, size.features, 0)
        test = write(place / "test", size.tests, size.features, 1)
        train = write(place / "train", size.trains, size.features, 2)
        infl = ArnoldiInfluence(
            model, cross_entropy, 0.1, rank=RANK, tol=1e-2, curvature="ggn", complement=True, client=client
        ).fit(fitted_on)
        asked = {"mode": size.mode, "reduce": TopK(10) if size.reduced else None}
        warm = write(place / "warm", 40, size.features, 3)
        infl.influences_to_zarr(place / "warmed", warm, warm, mode=size.mode)
        plan = infl.plan(test, train, **asked)
        client.run(reset_peak_memory)
        before = max(client.run(resident).values())
        infl.influences_to_zarr(place / "run", test, train, **asked)
        peak = max(client.run(peak_memory).values())
    planned = max(plan.peak_bytes, plan.factor_bytes)
    print(
        f"{name:<20} N {size.tests:>5,}  M {size.trains:>7,}  F {size.features:>5,}  "
        f"P {plan.work.parameters:>9,}  before {format_bytes(before):>9}  plan {format_bytes(planned):>9}  "
        f"peak {format_bytes(peak):>9}  peak / (before + plan) {peak / (before + planned):.2f}",
        flush=True,
    )


def resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    """The small and the large run of each kind."""
    for name, sizes in GROWING.items():
        for size in sizes:
            measure(name, size)


if __name__ == "__main__":
    main()
