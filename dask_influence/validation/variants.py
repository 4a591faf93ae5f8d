"""Variants: a fitted model of influence, made again with something else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from dask_influence.influence import InfluenceFunctionModel
from dask_influence.validation.effects import digest_of

SHARED = (
    "curvature",
    "block_structure",
    "parameters",
    "device",
    "dtype",
    "chunk_size",
    "client",
    "artifacts",
    "certify",
)


def variant(influence: InfluenceFunctionModel, model: Any = None, **own: Any) -> InfluenceFunctionModel:
    """The same model of influence, not fitted, of another ``model`` or with other arguments of its estimator.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import ArnoldiInfluence
    >>> influence = ArnoldiInfluence(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, 0.1, rank=2)
    >>> variant(influence, rank=3).configuration.rank
    3
    """
    configuration = influence.configuration
    held = {field.name: getattr(configuration, field.name) for field in dataclasses.fields(configuration)}
    return type(influence)(
        influence.model if model is None else model,
        influence.loss,
        influence.hessian_regularization,
        **(held | own),
        **{name: getattr(influence, name) for name in SHARED},
    )


def name_of(influence: InfluenceFunctionModel) -> str:
    """A name that is another for every other fit: model, data, estimator, λ."""
    identity = json.dumps(influence._require_fit().identity(), sort_keys=True, default=str)
    return f"{type(influence).__name__}-{digest_of(identity)[:12]}"
