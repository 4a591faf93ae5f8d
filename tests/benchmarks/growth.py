"""How the time of scores grows with N, M, P, R, and with the test points and features of perturbation mode.

One size at a time is doubled from a common base, in this process. Medians are printed, written as JSON and drawn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pictures
import results
import torch
from problems import SMALL
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence

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


def runs(size: Size, repeats: int) -> list[float]:
    """Wall-clock seconds of scores, after one run that is not counted."""
    infl = fitted(size)
    test, train = samples(size.tests, size.features, 1), samples(size.trains, size.features, 2)
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        infl.influences(*test, *train, mode=size.mode)
        times.append(time.perf_counter() - began)
    return times[1:]


def main() -> None:
    """Time, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    parser.add_argument("--only", nargs="*", choices=GROWING, default=list(GROWING))
    args = parser.parse_args()
    found: dict[str, list[tuple[int, float]]] = {}
    for name in args.only:
        of, sizes = GROWING[name]
        found[name] = [(of(size), median(runs(size, args.repeats))) for size in sizes[: 2 if SMALL else None]]
        text = "  ".join(f"{at:,}: {seconds:.3f} s" for at, seconds in found[name])
        print(f"    {name}: {text}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "growth-times.json").write_text(json.dumps(found, indent=1))
    results.write(args.output / "growth.json", [])  # it has no target
    pictures.growth(found, args.output / "growth.png")


if __name__ == "__main__":
    main()
