"""Peak memory of workers, client and scheduler against the plan, while M, N, P and F · P grow.

Run it by itself: ``make bench-memory``. Two workers of one thread score synthetic data with an MLP.
The plan says what a worker takes at its peak, interpreter and libraries included (a constant,
``PROCESS_BYTES``); measured is the largest resident set of a worker over the run. Since that constant
hides much where plans are small, the bytes above it are compared too: what a worker takes more than it had after
a run of a few samples of a tiny model, and the plan's bytes of a task.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import processes
import torch
import zarr
from distributed import Client
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence, TopK
from dask_influence.execution.plan import PROCESS_BYTES
from dask_influence.execution.units import format_bytes

CLASSES, RANK = 10, 8
TOLERANCE = 0.2


@dataclass(frozen=True)
class Size:
    """One run: N, M, features, hidden units, mode, and whether the scores are reduced or the complement kept."""

    tests: int
    trains: int
    features: int
    hidden: int
    mode: str = "up"
    reduced: bool = False
    complement: bool = True


GROWING: dict[str, tuple[Size, Size]] = {
    "M": (Size(256, 2**14, 64, 64), Size(256, 2**18, 64, 64)),
    "M, reduced": (Size(512, 2**13, 64, 64, reduced=True), Size(512, 2**17, 64, 64, reduced=True)),
    "N, reduced": (Size(2**9, 2**13, 64, 64, reduced=True), Size(2**13, 2**13, 64, 64, reduced=True)),
    "N, low rank": (
        Size(2**10, 2**13, 64, 64, reduced=True, complement=False),
        Size(2**14, 2**13, 64, 64, reduced=True, complement=False),
    ),
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


def model_of(features: int, hidden: int) -> nn.Module:
    """The MLP, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES))


def fitted(size: Size, folder: Path, client: Client) -> ArnoldiInfluence:
    """A sketch of the curvature on few samples."""
    folder.mkdir()
    how: dict[str, Any] = {"rank": RANK, "tol": 1e-2, "curvature": "ggn", "complement": size.complement}
    infl = ArnoldiInfluence(model_of(size.features, size.hidden), cross_entropy, 0.1, client=client, **how)
    return infl.fit(write(folder / "fit", 512, size.features, 0))


def measure(name: str, size: Size, folder: Path) -> bool:
    """One run on a fresh cluster, told as a line; whether it is within the tolerance."""
    place = Path(tempfile.mkdtemp(dir=folder))
    with processes.cluster(place, 2, memory_limit="8GiB") as (client, scheduler):
        infl = fitted(size, place / "measured", client)
        client.restart()  # what the fit left behind in the workers is none of the run's
        tiny = Size(8, 8, 4, 3, mode=size.mode)
        few = write(place / "few", 8, tiny.features, 1)
        warmed = fitted(tiny, place / "tiny", client)
        warmed.influences_to_zarr(place / "warm", few, few, mode=size.mode)
        test = write(place / "test", size.tests, size.features, 1)
        train = write(place / "train", size.trains, size.features, 2)
        asked = {"mode": size.mode, "reduce": TopK(10) if size.reduced else None}
        plan = infl.plan(test, train, **asked)
        before = min(client.run(processes.resident).values())
        client.run(processes.reset_peak)
        beside = [("client", "self"), ("scheduler", scheduler)]
        held = {who: processes.resident(process) for who, process in beside}
        for _, process in beside:
            processes.reset_peak(process)
        infl.influences_to_zarr(place / "run", test, train, **asked)
        peak = max(client.run(processes.peak).values())
        others = {who: (held[who], processes.peak(process)) for who, process in beside}
    planned = plan.worker_bytes()
    ratio, own = peak / planned, (peak - before) / (planned - PROCESS_BYTES)
    grew = "  ".join(f"{who} {format_bytes(was)} → {format_bytes(at)}" for who, (was, at) in others.items())
    was, at = others["client"]  # which holds what its fit left
    relative = (PROCESS_BYTES + at - was) / plan.client_bytes
    grew += f"  client's plan {format_bytes(plan.client_bytes)} ({relative:.2f})"
    print(
        f"{name:<20} N {size.tests:>6,}  M {size.trains:>7,}  F {size.features:>5,}  "
        f"P {plan.work.parameters:>9,}  plan {format_bytes(planned):>9}  peak {format_bytes(peak):>9}  "
        f"peak / plan {ratio:.2f}  |  above the process: plan {format_bytes(planned - PROCESS_BYTES):>9}  "
        f"measured {format_bytes(peak - before):>9} ({own:.2f}), process {format_bytes(before)}  |  {grew}",
        flush=True,
    )
    return abs(ratio - 1) <= TOLERANCE


def main() -> None:
    """The small and the large run of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(GROWING), help=", ".join(GROWING))
    kept = True
    for name in parser.parse_args().rows:
        for size in GROWING[name]:
            with tempfile.TemporaryDirectory() as folder:
                kept &= measure(name, size, Path(folder))
    said = "all" if kept else "NOT all"
    print(f"{said} workers stayed within {TOLERANCE:.0%} of what their plan says")


if __name__ == "__main__":
    main()
