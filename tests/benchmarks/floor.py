"""Scoring beside the floor measured in the same run: what no way of scoring can do without.

The floor is one forward and backward pass of the mean loss over test and training samples, the matrix
products at the speed that a product of their very sizes has here (of a Direct estimator also its
factors, one float64 product with P × P numbers), and the write of as many bytes as the scores take.
Ours and the floor are timed in turn; medians and their ratio are printed. Run it by itself:
``python tests/benchmarks/floor.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import estimators_problem
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dask_influence

BATCH = 1024


@dataclass(frozen=True)
class Work:
    """One estimator on one problem, N test points, to Zarr or in memory."""

    name: str
    problem: str
    estimator: str
    tests: int
    to_zarr: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        """D of the products M × P × D and N × D × M; 0 where layer pairs need no directions."""
        return int(self.options.get("rank", 0)) or (self.tests if self.estimator == "DirectInfluence" else 0)


SKETCH = {"rank": 20, "tol": 1e-2, "curvature": "ggn"}
WORKS = (
    Work("Direct, digits, in memory", "digits", "DirectInfluence", 1437),
    Work("Direct, digits, to Zarr", "digits", "DirectInfluence", 1437, to_zarr=True),
    Work("Arnoldi 20, 820,874 parameters", "large", "ArnoldiInfluence", 2048, options=SKETCH),
    Work("Arnoldi 20, the same to Zarr", "large", "ArnoldiInfluence", 2048, to_zarr=True, options=SKETCH),
    Work("EK-FAC, 820,874 parameters", "large", "EkfacInfluence", 256),
)


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def passes(setting: estimators_problem.Setting, data: tuple[Tensor, Tensor]) -> None:
    """Loss and its gradient, batch by batch."""
    for x, y in zip(*(part.split(BATCH) for part in data), strict=True):
        setting.model.zero_grad(set_to_none=True)
        setting.loss(setting.model(x), y).backward()


def floor(
    work: Work, setting: estimators_problem.Setting, test: tuple[Tensor, Tensor], folder: Path
) -> dict[str, float]:
    """Seconds of each part of the floor."""
    train, parameters = setting.train, sum(p.numel() for p in setting.model.parameters())
    found = {"passes": seconds_of(lambda: (passes(setting, test), passes(setting, train)))}
    directions, products = work.directions, 0.0
    if directions:
        left, right = torch.randn(directions, parameters), torch.randn(parameters, BATCH)
        products += seconds_of(lambda: left @ right) * len(train[0]) / BATCH
    inner = directions or sum(sum(layer.weight.shape) for layer in setting.model if hasattr(layer, "weight"))
    if work.estimator == "DirectInfluence":
        gradients, inverse = (
            torch.randn(n, parameters, dtype=torch.float64) for n in (work.tests, parameters)
        )
        products += seconds_of(lambda: gradients @ inverse)
    left, right = torch.randn(work.tests, inner), torch.randn(inner, len(train[0]))
    found["products"] = products + seconds_of(lambda: left @ right)
    if work.to_zarr:
        scores = torch.randn(work.tests, len(train[0])).numpy().tobytes()
        found["write"] = seconds_of(lambda: (folder / "floor").write_bytes(scores))
    return found


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="parts of the works' names")
    arguments = parser.parse_args()
    table = Table(title="seconds, medians; the floor is measured beside")
    for column in ("work", "N × M", "ours", "floor", "passes", "products", "write", "ratio"):
        table.add_column(column, justify="left" if column == "work" else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        estimators_problem.make(folder)
        for work in WORKS:
            if arguments.only and not any(part in work.name for part in arguments.only):
                continue
            setting = estimators_problem.Setting(folder, work.problem, "float32")
            # the digits problem holds 360 test points; training points serve as well
            test = tuple(part[: work.tests] for part in (setting.x, setting.y))
            kind = getattr(dask_influence, work.estimator)
            infl = kind(setting.model, setting.loss, setting.regularization, **work.options).fit(
                setting.train
            )

            def score(
                run: int, work: Work = work, infl: Any = infl, test: Any = test, setting: Any = setting
            ) -> None:
                if work.to_zarr:
                    infl.influences_to_zarr(folder / f"{work.estimator}-{run}", test, setting.train)
                else:
                    infl.influences(*test, *setting.train)

            score(-1)
            ours, floors = [], []
            for run in range(arguments.repeats):
                ours.append(seconds_of(lambda run=run: score(run)))
                floors.append(floor(work, setting, test, folder))
            parts = {part: median(one[part] for one in floors) for part in floors[0]}
            least = median(sum(one.values()) for one in floors)
            shown = [
                f"{parts[part]:.3f}" if part in parts else "" for part in ("passes", "products", "write")
            ]
            ratio = median(ours) / least
            table.add_row(
                work.name,
                f"{work.tests:,} × {len(setting.train[0]):,}",
                f"{median(ours):.3f}",
                f"{least:.3f}",
                *shown,
                f"{ratio:.1f}",
            )
            print(
                f"{work.name}: ours {median(ours):.3f} s, floor {least:.3f} s, {ratio:.1f} times", flush=True
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
