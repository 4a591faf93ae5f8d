"""Saving and loading a fitted inverse: arrays and JSON, never a pickle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from dask_influence.core.content import tensors_digest
from dask_influence.core.estimators import INVERSES, Inverse
from dask_influence.core.objective import Objective
from dask_influence.errors import CorruptStoreError, StoreError, StoreMismatchError
from dask_influence.execution.artifacts import owned
from dask_influence.storage.stores import Location

RECORD = "influence.json"
ARRAYS = "inverse.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A fitted model on disk: the inverse, and what is needed to use it with the same model again."""

    inverse: Inverse
    record: dict[str, Any]


def save(location: Location, inverse: Inverse, record: dict[str, Any]) -> None:
    """Write the arrays, then the record that names them."""
    tensors, values = inverse.state()
    location.check_writable()
    location.put(ARRAYS, safetensors.torch.save({name: owned(value) for name, value in tensors.items()}))
    content = {"format": FORMAT, "kind": inverse.kind, "values": values, **record}
    location.put(RECORD, json.dumps(content, indent=1).encode())


def load(location: Location) -> Saved:
    """Read what :func:`save` wrote.

    Raises
    ------
    StoreError
        Nothing is there, or it was written by a format this version does not know.
    CorruptStoreError
        What is there is damaged; names the object.
    """
    if not location.exists(RECORD):
        raise StoreError(f"{location.url} holds no saved influence model ({RECORD} is missing)")
    try:
        record = json.loads(location.get(RECORD))
        saved_as = record["format"], record["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{RECORD} of {location.url} is damaged; fit and save again") from error
    if saved_as[0] != FORMAT or saved_as[1] not in INVERSES:
        raise StoreError(
            f"{location.url} was saved as kind {saved_as[1]!r} in format {saved_as[0]}; "
            f"this version reads format {FORMAT} of {', '.join(sorted(INVERSES))}"
        )
    try:
        tensors = safetensors.torch.load(location.get(ARRAYS))
    except SafetensorError as error:
        raise CorruptStoreError(f"{ARRAYS} of {location.url} is damaged; fit and save again") from error
    return Saved(INVERSES[record["kind"]].from_state(tensors, record["values"]), record)


def check_model(location: Location, record: dict[str, Any], objective: Objective) -> None:
    """Refuse a model other than the one that was fitted."""
    names = record["parameters"]
    if list(objective.names) != names:
        raise StoreMismatchError(
            f"{location.url} was fitted on parameters {', '.join(names)}; the model given has "
            f"{', '.join(objective.names)}"
        )
    digest = model_digest(objective.module)
    if digest != record["model"]:
        raise StoreMismatchError(
            f"{location.url} was fitted on other weights (digest {record['model']}, given {digest}); "
            "load the weights that the model had when it was fitted"
        )


def model_digest(module: nn.Module) -> str:
    """Digest of all parameters and buffers, by name."""
    # the state_dict lacks buffers that are not persistent
    held = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return tensors_digest(held)


def inverse_digest(inverse: Inverse) -> str:
    """Digest of everything scores depend on beside model and data."""
    tensors, values = inverse.state()
    return tensors_digest(sorted(tensors.items()), json.dumps(values, sort_keys=True, default=str))
