"""A small problem whose work takes long enough to be killed in the middle of it, written in every form."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dask_influence import DirectInfluence, GroupSum, SelfInfluence, TopK
from dask_influence.storage.stores import Location
from tests import data

TILE = 300
"""Bytes of a tile: 13 × 37 scores in a score of strips."""

PAUSE = 0.04
"""Seconds that each forward pass takes, beside its work."""

FORMS = ("scores", "factors", "top", "groups", "self")
"""What a run writes: all scores, factors, or a reduction of the scores."""


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


def unfitted(client: Any = None, artifacts: Path | None = None) -> DirectInfluence:
    """The model, of which every fit and run here is one."""
    case = data.mlp_classification()
    return DirectInfluence(
        slow_model(),
        case.loss,
        case.regularization,
        chunk_size=4,
        client=client,
        artifacts=None if artifacts is None else str(artifacts),
    )


def write(form: str, infl: DirectInfluence, store: Location, train: Any = None, **how: Any) -> None:
    """One of ``FORMS``, from the data of the problem or from others that are to be equal."""
    case = data.mlp_classification()
    if form == "factors":
        infl.influence_factors_to_zarr(store, case.test, **how)
        return
    reductions = {"top": TopK(3), "groups": GroupSum(case.train[1].tolist()), "self": SelfInfluence()}
    test = None if form == "self" else case.test
    infl.influences_to_zarr(
        store,
        test,
        case.train if train is None else train,
        tile_bytes=TILE,
        reduce=reductions.get(form),
        **how,
    )


def content(store: Location) -> dict[str, bytes]:
    """Everything that a reader of a store sees, by name."""
    return store.get_many(key for key in store.list() if not key.startswith("_run/"))
