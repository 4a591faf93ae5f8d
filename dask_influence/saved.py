"""A fitted model on disk: what its record says of it, and how it is put together again."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dask_influence.configuration import Configuration
from dask_influence.core.content import Content, contents
from dask_influence.core.forms import Forms
from dask_influence.core.layers import layout_of
from dask_influence.core.objective import Objective
from dask_influence.core.problem import Pairing, Problem
from dask_influence.errors import StoreError, StoreMismatchError
from dask_influence.execution import persistence
from dask_influence.execution.persistence import Saved
from dask_influence.fitted import Fitted
from dask_influence.storage.stores import Location

CLASS = "class"
"""Where a record has the estimator by name; a fingerprint calls it ``estimator``."""


def save(fitted: Fitted, location: Location) -> None:
    """Write the inverse, and beside it all that is needed to use it with the same model again."""
    asked, pairing = fitted.configuration.described(), fitted.problem.pairing
    record = {
        CLASS: asked.pop("estimator"),
        **asked,
        "model": persistence.model_digest(fitted.problem.objective.module),
        "parameters": list(fitted.system.names),
        "samples": fitted.system.samples,
        "dtype": fitted.dtype,
        "forms": dataclasses.asdict(fitted.problem.forms),
        "activations": fitted.problem.activations,
        "pairing": None if pairing is None else dataclasses.asdict(pairing),
        "fit": fitted.digest,
        "counts": fitted.counts,
        "behaviour": fitted.behaviour,
        "content": fitted.content.parts,
    }
    persistence.save(location, fitted.inverse, record)


def constructor_arguments(saved: Saved, location: Location, name: str) -> dict[str, Any]:
    """What the model was made with, beside model and loss; refused where it is not one of class ``name``."""
    record = saved.record
    if record[CLASS] != name:
        raise StoreError(f"{location.url} was saved by {record[CLASS]}; load it with {record[CLASS]}.load")
    shared = (
        "hessian_regularization",
        "curvature",
        "block_structure",
        "parameters",
        "compile",
        "matmul_precision",
    )
    dtype: torch.dtype = getattr(torch, record["dtype"])
    return {**{key: record[key] for key in shared}, "dtype": dtype, **record["configuration"]}


def restored(saved: Saved, location: Location, configuration: Configuration, objective: Objective) -> Fitted:
    """The fit, where model and loss are those it was made with; it has no passes over the data.

    Raises
    ------
    StoreMismatchError
        Weights, parameters or loss are others.
    """
    record, loss = saved.record, configuration.described()["loss"]
    persistence.check_model(location, record, objective)
    if loss != record["loss"]:
        raise StoreMismatchError(f"{location.url} was fitted with the loss {record['loss']}; got {loss}")
    content = Content(record["content"])
    others = content.differing(contents(objective.module, objective.loss))
    if others:
        raise StoreMismatchError(
            f"{location.url} was fitted with another model or loss: {', '.join(others[:5])} differ; give the same"
        )
    held = record.get("pairing")
    pairing = None if held is None else Pairing.from_json(held)
    return Fitted(
        configuration,
        Problem(
            objective,
            Forms(**record["forms"]),
            record["activations"],
            pairing,
            configuration.matmul_precision,
        ),
        configuration.system(objective, record["samples"], layout_of(objective)),
        saved.inverse,
        None,
        record["fit"],
        record["counts"],
        record["behaviour"],
        content,
    )
