"""How long a plan says that scores take, beside how long they take: runs to a store, in this process, on one core.

A plan's times only set how coarse strips are and what people are told; beyond a factor of four its costs are to
be mended. (Of runs of a few hundredths of a second the start is most, which no plan counts.)
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from choices import WORKS, Work
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence, EkfacInfluence, GradientDotInfluence, InfluenceFunctionModel

FITTED, TESTS, TRAINS = 256, 64, 1024
WITHIN = 4.0

DAMPED = {"hessian_regularization": 0.1}
SKETCH = DAMPED | {"rank": 10, "tol": 1e-1}

RUNS: dict[str, tuple[type[InfluenceFunctionModel], dict[str, Any], str]] = {
    "Arnoldi": (ArnoldiInfluence, SKETCH, "up"),
    "complement kept": (ArnoldiInfluence, SKETCH | {"complement": True}, "up"),
    "EK-FAC": (EkfacInfluence, DAMPED, "up"),
    "gradient dot": (GradientDotInfluence, {}, "up"),
    "Arnoldi, perturbation": (ArnoldiInfluence, SKETCH, "perturbation"),
}


def measured(work: Work, run: str, repeats: int) -> tuple[float, float]:
    """Seconds that are foretold, and the median of those taken, after one run that warms up."""
    torch.manual_seed(0)
    estimator, own, mode = RUNS[run]
    model, x, y = work.model().eval(), work.inputs(TRAINS), torch.randint(10, (TRAINS,))
    test = work.inputs(TESTS), y[:TESTS]
    infl = estimator(model, cross_entropy, **own).fit((x[:FITTED], y[:FITTED]))
    plan = infl.plan(test, (x, y), mode=mode)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats + 1):
            began = time.perf_counter()
            infl.influences_to_zarr(Path(folder) / str(i), test, (x, y), mode=mode)
            times.append(time.perf_counter() - began)
    return plan.run_seconds, statistics.median(times[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("model", "scores", "foretold, s", "taken, s", "taken / foretold")
    for name in asked.only:
        for run, (*_, mode) in RUNS.items():
            if mode == "perturbation" and not WORKS[name].inputs(1).is_floating_point():
                continue
            said, took = measured(WORKS[name], run, asked.repeats)
            ratio = took / said
            beyond = " *" * (not 1 / WITHIN <= ratio <= WITHIN)
            table.add_row(name, run, f"{said:.3f}", f"{took:.3f}", f"{ratio:.2f}{beyond}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
