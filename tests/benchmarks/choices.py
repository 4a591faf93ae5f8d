"""Which way of taking directional derivatives is chosen, beside how long each takes.

E = ⟨v_d, ∇θ ℓ(z_j)⟩ can be had by pushing directions forward, by forming gradients and multiplying, or by
contracting directions with what layers see. The choice is by a model of costs; here each way is timed on models
of several kinds, for several numbers of directions D, in turn, and all values are compared first. What the choice
loses against the best way is the last column; beyond 1.5 the model of costs is to be mended.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from options import convolution, encoder, perceptron
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence.core.directional import Way, chosen, derivatives_by
from dask_influence.core.objective import Objective
from dask_influence.core.pairs import paired
from dask_influence.core.problem import prepare

AGREEMENT = 1e-3
"""Largest relative error of one way against another, in float32."""

WITHIN = 1.5


class Tokens(nn.Module):
    """Tokens embedded, one layer of a transformer, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(x)).mean(1))


def normalised() -> nn.Module:
    """Linear layers with layer norms between them."""
    parts = [(nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU()) for _ in range(3)]
    return nn.Sequential(*(one for part in parts for one in part), nn.Linear(128, 10))


@dataclass(frozen=True)
class Work:
    """A model, and how to draw so many inputs."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    samples: int = 512


WORKS = {
    "MLP 64-32-10": Work(lambda: perceptron(64, 32, 10), lambda n: torch.randn(n, 64)),
    "MLP 1024-256-10": Work(lambda: perceptron(1024, 256, 10), lambda n: torch.randn(n, 1024)),
    "MLP 256 x 4": Work(lambda: perceptron(256, 256, 256, 256, 10), lambda n: torch.randn(n, 256)),
    "convolutions": Work(convolution, lambda n: torch.randn(n, 1, 16, 16), 256),
    "encoder": Work(encoder, lambda n: torch.randn(n, 128)),
    "embedding, attention": Work(Tokens, lambda n: torch.randint(200, (n, 12)), 256),
    "layer norms": Work(normalised, lambda n: torch.randn(n, 128)),
}


def seconds(way: Way, *given: object) -> float:
    """Of one call."""
    began = time.perf_counter()
    derivatives_by(way, *given)  # type: ignore[arg-type]
    return time.perf_counter() - began


def measured(work: Work, count: int, repeats: int) -> tuple[dict[Way, float], Way]:
    """Median seconds of each way for ``count`` directions, and which is chosen.

    Raises
    ------
    SystemExit
        Two ways give other values.
    """
    torch.manual_seed(0)
    objective = Objective.of(work.model().eval(), cross_entropy)
    x, y = work.inputs(work.samples), torch.randint(10, (work.samples,))
    problem, _ = paired(prepare(objective, x[:4], y[:4])[0], x, y)
    directions = torch.randn(count, objective.size)
    given = (problem, x, y, directions)
    ways = [way for way in Way if way is not Way.LAYERS or problem.pairs(x)]
    values = [derivatives_by(way, *given) for way in ways]  # which also warms up
    for value in values:
        if not (value - values[0]).norm() <= AGREEMENT * values[0].norm():
            raise SystemExit("ways differ")
    times = [[seconds(way, *given) for way in ways] for _ in range(repeats)]
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    return dict(zip(ways, medians, strict=True)), chosen(problem, x, directions)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directions", type=int, nargs="*", default=[2, 8, 32, 128])
    parser.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    table = Table("model", "D", *(f"{way.name.lower()}, ms" for way in Way), "chosen", "against the best")
    for name in asked.only:
        for count in asked.directions:
            found, way = measured(WORKS[name], count, asked.repeats)
            ratio = found[way] / min(found.values())
            cells = (f"{1e3 * found[one]:.1f}" if one in found else "" for one in Way)
            loss = f"{ratio:.2f}" + " *" * (ratio > WITHIN)
            table.add_row(name, str(count), *cells, way.name.lower(), loss)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
