"""How the time of a run grows: with workers, and with N, M, P, R and the features of perturbation mode.

Workers are processes of one thread each; the run on one and on two is the same, made in turn. The other rows
double one size at a time from a common base, in this process. Medians are printed, written as JSON and drawn.
Run it by itself: ``python tests/benchmarks/scaling.py --output FOLDER``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import processes
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence

mpl.use("Agg")
from matplotlib import pyplot as plt

CLASSES = 10


@dataclass(frozen=True)
class Size:
    """N, M, inputs and hidden units of an MLP, rank; perturbation mode or not."""

    tests: int = 256
    trains: int = 4096
    features: int = 256
    hidden: int = 128
    rank: int = 20
    mode: str = "up"

    @property
    def parameters(self) -> int:
        """P."""
        return (self.features + 1) * self.hidden + (self.hidden + 1) * CLASSES


BASE = Size()
PERTURBED = Size(tests=8, trains=256, mode="perturbation")
GROWING: dict[str, tuple[Callable[[Size], int], list[Size]]] = {
    "N": (lambda s: s.tests, [replace(BASE, tests=256 * 2**i) for i in range(5)]),
    "M": (lambda s: s.trains, [replace(BASE, trains=4096 * 2**i) for i in range(4)]),
    "P": (lambda s: s.parameters, [replace(BASE, hidden=128 * 2**i) for i in range(4)]),
    "R": (lambda s: s.rank, [replace(BASE, rank=10 * 2**i) for i in range(4)]),
    "D, perturbation": (lambda s: s.tests, [replace(PERTURBED, tests=8 * 2**i) for i in range(4)]),
    "F, perturbation": (lambda s: s.features, [replace(PERTURBED, features=128 * 2**i) for i in range(4)]),
}
CLUSTER = Size(tests=512, trains=2**16, features=512, hidden=256)
"""Half a minute of one core: what starting tasks costs is none of it."""


def samples(count: int, features: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and classes."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=random)
    return x, torch.randint(CLASSES, (count,), generator=random)


def fitted(size: Size, client: Any = None) -> ArnoldiInfluence:
    """A sketch of the curvature, from few samples: what is timed are scores."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size.features, size.hidden), nn.Tanh(), nn.Linear(size.hidden, CLASSES))
    how: dict[str, Any] = {"rank": size.rank, "tol": 1e-1, "curvature": "ggn", "client": client}
    return ArnoldiInfluence(model, cross_entropy, 0.1, **how).fit(samples(256, size.features, 0))


def timed(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def on_cluster(workers: int, folder: Path, repeats: int) -> float:
    """Seconds of a run to Zarr on ``workers`` warm workers of one thread."""
    size = CLUSTER
    place = Path(tempfile.mkdtemp(dir=folder))
    with processes.cluster(place, workers, memory_limit="4GiB") as (client, _):
        infl = fitted(size, client)
        test, train = samples(size.tests, size.features, 1), samples(size.trains, size.features, 2)
        infl.influences_to_zarr(place / "warm", test, tuple(part[:1024] for part in train))
        return median(
            timed(lambda run=run: infl.influences_to_zarr(place / f"{run}", test, train))
            for run in range(repeats)
        )


def main() -> None:
    """Time, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/scaling"))
    parser.add_argument("--only", nargs="*", choices=["workers", *GROWING])
    arguments = parser.parse_args()
    wanted = arguments.only or ["workers", *GROWING]
    arguments.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[int, float]]] = {}
    if "workers" in wanted:
        with tempfile.TemporaryDirectory() as name:
            found["workers"] = [(n, on_cluster(n, Path(name), arguments.repeats)) for n in (1, 2)]
        (_, one), (_, two) = found["workers"]
        print(f"workers: one {one:.2f} s, two {two:.2f} s, {one / two:.2f} times as fast", flush=True)
    for name in (name for name in GROWING if name in wanted):
        of, sizes = GROWING[name]
        found[name] = []
        for size in sizes:
            infl = fitted(size)
            test, train = samples(size.tests, size.features, 1), samples(size.trains, size.features, 2)
            infl.influences(*test, *train, mode=size.mode)
            each = [
                timed(
                    lambda infl=infl, test=test, train=train, size=size: infl.influences(
                        *test, *train, mode=size.mode
                    )
                )
                for _ in range(arguments.repeats)
            ]
            found[name].append((of(size), median(each)))
        text = "  ".join(f"{at:,}: {seconds:.3f} s" for at, seconds in found[name])
        print(f"{name}: {text}", flush=True)
    (arguments.output / "scaling.json").write_text(json.dumps(found, indent=1))
    draw(found, arguments.output / "scaling.png")


def draw(found: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """One panel for each size, both axes logarithmic, with a line of slope one for comparison."""
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.5), constrained_layout=True)
    for ax, (name, points) in zip(axes.flat, found.items(), strict=False):
        at, seconds = zip(*points, strict=True)
        ax.loglog(at, seconds, "o-", base=2)
        slope = -1 if name == "workers" else 1
        ax.loglog(at, [seconds[0] * (value / at[0]) ** slope for value in at], "--", base=2, color="0.7")
        ax.set(title=name, ylabel="seconds")
    for ax in axes.flat[len(found) :]:
        ax.axis("off")
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


if __name__ == "__main__":
    main()
