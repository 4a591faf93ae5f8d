"""What ``compile=`` and ``matmul_precision=`` are worth here: whole calls with and without, in turn, in one process.

Each model is fitted with and without the option and scores are taken once, which compiles what they need and
compares values; then scores are repeated in turn, and medians of CPU seconds compared. Scores by CG hold the
passes of a fit.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from dask_influence import ArnoldiInfluence, CgInfluence, GradientDotInfluence, InfluenceFunctionModel
from dask_influence.errors import ConfigurationError

AGREEMENT = 1e-3
"""Largest relative error of compiled scores."""


@dataclass(frozen=True)
class Work:
    """A model, the shape of its inputs, how many samples of each side, and who scores them."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tests: int
    trains: int
    estimator: type[InfluenceFunctionModel]
    own: dict[str, Any]


def perceptron(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers = [nn.Linear(wide, narrow) for wide, narrow in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers[:-1] for part in (layer, nn.ReLU())], layers[-1])


def convolution() -> nn.Module:
    """Two convolutions and a linear layer."""
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), *head)


def encoder() -> nn.Module:
    """One layer of a transformer over eight tokens."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (8, 16)), layer, nn.Flatten(), nn.Linear(128, 10))


WORKS = {
    "MLP 64-32-10, CG": Work(lambda: perceptron(64, 32, 10), (64,), 64, 1024, CgInfluence, {"rtol": 1e-3}),
    "conv, CG": Work(convolution, (1, 16, 16), 64, 512, CgInfluence, {"rtol": 1e-2}),
    "conv, gradient dot": Work(convolution, (1, 16, 16), 64, 1024, GradientDotInfluence, {}),
    "encoder, Arnoldi": Work(encoder, (128,), 64, 512, ArnoldiInfluence, {"rank": 16}),
    "MLP 3072-256-128-10, Arnoldi": Work(
        lambda: perceptron(3072, 256, 128, 10), (3072,), 64, 512, ArnoldiInfluence, {"rank": 16}
    ),
}


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returns."""
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def measured(work: Work, options: dict[str, Any], repeats: int) -> list[str]:
    """Cells of the table: seconds until compiled, then medians of scores without and with the option."""
    torch.manual_seed(0)
    model, x = work.model(), torch.randn(work.tests + work.trains, *work.shape)
    y = torch.randint(0, 10, (len(x),))
    test, train = (x[: work.tests], y[: work.tests]), (x[work.tests :], y[work.tests :])

    def fitted(**asked: Any) -> InfluenceFunctionModel:
        loss = nn.functional.cross_entropy
        return work.estimator(model, loss, 0.1, curvature="ggn", **work.own, **asked).fit(train)

    def scores(of: InfluenceFunctionModel) -> Any:
        return of.influences(*test, *train)

    plain = fitted()
    ahead, with_option = seconds(lambda: fitted(**options))
    first, found = seconds(lambda: scores(with_option))
    expected = scores(plain)
    error = float((found - expected).norm() / expected.norm())
    if "compile" in options and not error <= AGREEMENT:
        raise SystemExit(f"scores differ by {error:.1e}")
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        times[False].append(seconds(lambda: scores(plain))[0])
        times[True].append(seconds(lambda: scores(with_option))[0])
    without, with_ = median(times[False]), median(times[True])
    return [
        f"{ahead + first:.0f}",
        f"{without:.3f}",
        f"{with_:.3f}",
        f"{without / with_:.2f}",
        f"{error:.0e}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    for options in ({"compile": True}, {"matmul_precision": "medium"}):
        console.print(str(options))
        table = Table("scores", "fit and first scores, s", "without, s", "with, s", "ratio", "relative error")
        for name in asked.only:
            try:
                row = measured(WORKS[name], options, asked.repeats)
            except ConfigurationError as lacking:
                console.print(str(lacking))
                break
            console.print(name, *row)  # what takes minutes is seen as it comes
            table.add_row(name, *row)
        if table.row_count:
            console.print(table)


if __name__ == "__main__":
    main()
