"""Stores of every kind, of one small classifier of digits, made by real runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence import (
    ArnoldiInfluence,
    DirectInfluence,
    GroupSum,
    InfluenceFunctionModel,
    SelfInfluence,
    TopK,
    open_influences,
)
from tests import data

TESTS, TRAINS = 7, 53
ORIGINAL, COPY, WRONG = 11, 40, 23
"""Training points: one, a copy of it, and one that got another's label after the training."""

TILE = 600
"""Bytes: several strips even of so little."""


@dataclass(frozen=True)
class Stores:
    """What runs left in one folder, and the data that they were given."""

    path: Path
    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    test_ids: list[str]

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def direct(self, damping: float = 0.05) -> InfluenceFunctionModel:
        return DirectInfluence(self.model, cross_entropy, damping).fit(self.train)

    def scores(self, name: str = "scores.zarr") -> np.ndarray:
        return open_influences(self / name)["influence"].to_numpy()


def problem(path: Path) -> Stores:
    """Model and data, and no store yet."""
    x, y = data.digits()
    x, y = x[: TRAINS + TESTS].float(), y[: TRAINS + TESTS].clone()
    x[COPY], y[COPY] = x[ORIGINAL], y[ORIGINAL]
    fitted = (x[:TRAINS].double(), y[:TRAINS].clone())
    model = data.trained(data.seeded(lambda: nn.Linear(64, 10)), cross_entropy, fitted, decay=1e-2).float()
    y[WRONG] = (y[WRONG] + 1) % 10
    ids = [f"t{i}" for i in range(TESTS)]
    return Stores(path, model, (x[:TRAINS], y[:TRAINS]), (x[TRAINS:], y[TRAINS:]), ids)


def written(path: Path) -> Stores:
    """Scores, pixels, self influence, lists, sums, factors, several λ, a sketch."""
    made = problem(path)
    train, test, ids = made.train, made.test, {"test_ids": made.test_ids}
    infl, few = made.direct(), (test[0][2:4], test[1][2:4])
    infl.influences_to_zarr(path / "scores.zarr", test, train, tile_bytes=TILE, **ids)
    pixels = {"mode": "perturbation", "test_ids": made.test_ids[2:4], "tile_bytes": 20_000}
    infl.influences_to_zarr(path / "pixels.zarr", few, train, **pixels)
    infl.influences_to_zarr(path / "own.zarr", None, train, reduce=SelfInfluence())
    infl.influences_to_zarr(path / "top.zarr", test, train, reduce=TopK(3), **ids)
    infl.influences_to_zarr(path / "per_train.zarr", test, train, reduce=TopK(2, per="train"), **ids)
    infl.influences_to_zarr(path / "groups.zarr", test, train, reduce=GroupSum(train[1].numpy()), **ids)
    infl.influence_factors_to_zarr(path / "factors.zarr", test)
    infl.influences_to_zarr(path / "swept.zarr", test, train, hessian_regularization=[0.05, 0.5], **ids)
    sketch = ArnoldiInfluence(made.model, cross_entropy, 0.05, rank=12, complement=True).fit(train)
    sketch.influences_to_zarr(path / "sketch.zarr", test, train)
    return made
