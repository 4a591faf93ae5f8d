"""Training again: the test losses after training on part of the data."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import safetensors.torch
import torch
from torch import nn

from dask_influence.core.objective import Loss, Objective
from dask_influence.errors import ConfigurationError, IncompleteRunError
from dask_influence.execution.base import Sealed
from dask_influence.execution.job import torch_threads
from dask_influence.execution.resources import Resources
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location
from dask_influence.validation.effects import (
    BATCH,
    Job,
    described,
    digest_of,
    signed,
    tensors,
    told,
    unsigned,
)
from dask_influence.validation.training import TrainingFunction


@dataclass(frozen=True)
class Retraining(Job):
    """Trains on the members of a subset; the figures are the losses of the test points then."""

    doing: ClassVar[str] = "training"
    each: ClassVar[str] = "subsets"
    remedy: ClassVar[str] = "Mend the training function"

    training: TrainingFunction
    loss: Loss
    dtype: torch.dtype

    @property
    def identity(self) -> str:
        """Of the training function, the loss and the data."""
        parts = [described(self.training), described(self.loss), self.train.digest(), self.test.digest()]
        return digest_of(parts, str(self.dtype))

    def measured(self, members: np.ndarray, seed: int) -> np.ndarray:
        """Losses after training on ``members`` alone."""
        return self.test_losses(Objective.of(self.trained(members, seed), self.loss))

    def trained(self, members: np.ndarray, seed: int) -> nn.Module:
        """The model trained on ``members`` alone."""
        x, y = tensors(self.train.read(0, len(self.train)), self.dtype, members)
        model = self.training(x, y, seed)
        if not isinstance(model, nn.Module):
            raise TypeError(f"the training function returned {type(model).__name__}, no torch module")
        return model


def dtype_of(influence: InfluenceFunctionModel) -> torch.dtype:
    """Floating dtype that a model of influence computes in, and that training data are given in."""
    return influence.dtype or next(influence.model.parameters()).dtype


def trained_on(
    influence: InfluenceFunctionModel,
    train: Source,
    training: TrainingFunction,
    seed: int,
    store: Location | None,
) -> nn.Module:
    """The model of ``influence`` trained on all of ``train``, by a task; kept in ``store``.

    Raises
    ------
    IncompleteRunError
        Training failed.
    ConfigurationError
        It gave a model of another kind.
    """
    executor = Resources(influence.client, influence.device, influence.artifacts).executor()
    job = Retraining(train, train, training, influence.loss, dtype_of(influence))
    key = f"weights/{digest_of(job.identity, seed)}.safetensors"
    content = unsigned(store.get(key)) if store is not None and store.exists(key) else None
    if content is None:
        reached = executor.reachable(train, BATCH)
        sealed = executor.seal(replace(job, train=reached, test=reached))
        (content,) = executor.map(weights_after, [(sealed, seed)])
        if isinstance(content, str):
            raise IncompleteRunError(
                f"training on the changed labels failed: {content}; mend the training function"
            )
        if store is not None:
            store.put(key, signed(content))
    model = copy.deepcopy(influence.model)
    try:
        model.load_state_dict(safetensors.torch.load(content))
    except RuntimeError as error:
        raise ConfigurationError(
            f"training made another model than the one that is validated: {' '.join(str(error).split())}"
        ) from error
    return model


def weights_after(job: Sealed, seed: int) -> bytes | str:
    """Weights after training on all of the data as safetensors, or why there are none."""
    opened: Retraining = job.open()
    try:
        with torch_threads(1):
            model = opened.trained(np.arange(len(opened.train)), seed)
        return safetensors.torch.save(
            {name: value.contiguous() for name, value in model.state_dict().items()}
        )
    except Exception as failure:  # noqa: BLE001 - the user's own code
        return told(failure)
