"""A small problem whose work takes long enough to be killed in the middle of it."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dask_influence import DirectInfluence
from tests import data

TILE = 700
"""Bytes of a tile: 13 × 37 scores in several strips."""

PAUSE = 0.04
"""Seconds that each forward pass takes, beside its work."""


def slow_model() -> nn.Module:
    """The network of mlp_classification, a little slower; its class travels by value."""
    inner, pause = copy.deepcopy(data.mlp_classification().model), PAUSE

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(pause)
            return self.inner(x)

    return Slow()


def unfitted(client: Any = None) -> DirectInfluence:
    """The model, of which every fit and run here is one."""
    case = data.mlp_classification()
    return DirectInfluence(slow_model(), case.loss, case.regularization, chunk_size=4, client=client)


def score(infl: DirectInfluence, store: Path, **how: Any) -> None:
    """Write the scores."""
    case = data.mlp_classification()
    infl.influences_to_zarr(store, case.test, case.train, tile_bytes=TILE, **how)


def solve(infl: DirectInfluence, store: Path, **how: Any) -> None:
    """Write the factors."""
    infl.influence_factors_to_zarr(store, data.mlp_classification().test, **how)


def content(store: Path) -> dict[str, bytes]:
    """Everything that a reader of a store sees, by name."""
    files = (path for path in store.rglob("*") if path.is_file() and "_run" not in path.parts)
    return {str(path.relative_to(store)): path.read_bytes() for path in files}
