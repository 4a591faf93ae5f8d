"""Shipping: how a model, its forms and an inverse curvature reach another process.

A model travels as its skeleton (a pickle in which every tensor is a placeholder, a few
kilobytes, inside the task) and its tensors (an artifact). Neither tensors nor
weight-bearing modules enter a task graph.
"""

from __future__ import annotations

import copyreg
import hashlib
import io
import pickle
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dask_influence.core.estimators import INVERSES, Inverse
from dask_influence.core.forms import Forms
from dask_influence.core.objective import Objective, loss_on
from dask_influence.core.problem import Pairing, Problem
from dask_influence.errors import ConfigurationError
from dask_influence.execution import heap
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.devices import resolve_device

SKELETON_LIMIT = 8 * 2**20
"""A larger skeleton means that the model or the loss holds data other than tensors."""


@dataclass(frozen=True)
class Envelope:
    """A picklable value, pickled once by the client and unpickled once per process.

    Tasks carry the same few bytes each; what they open is cached by digest.
    """

    digest: str
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, value: Any) -> Envelope:
        """Pickle ``value`` (modules of the user's ``__main__`` by value)."""
        data = cloudpickle.dumps(value)
        return cls(hashlib.blake2b(data, digest_size=16).hexdigest(), data)

    def open(self) -> Any:
        """The value, one per process."""
        heap.steady()
        heap.at_work()
        return _OPENED.get(self.digest, lambda: pickle.loads(self.data))


@dataclass(frozen=True)
class ShippedModel:
    """A :class:`Problem` in transit.

    Attributes
    ----------
    skeleton : bytes
        Pickle of module and loss with placeholders for tensors.
    tensors : Artifact
        The tensors, by the placeholders' names.
    device : str
        ``"auto"`` is resolved where the problem is opened.
    """

    skeleton: bytes = field(repr=False)
    tensors: Artifact
    names: tuple[str, ...]
    forms: Forms
    activations: int
    device: str
    pairing: Pairing | None = None
    matmul_precision: str = "highest"

    @classmethod
    def of(cls, problem: Problem, device: str, artifacts: Artifacts) -> ShippedModel:
        """Publish the tensors of ``problem`` and keep the rest."""
        objective = problem.objective
        stream = io.BytesIO()
        pickler = _SkeletonPickler(stream)
        pickler.dump((objective.module, objective.loss))
        skeleton = stream.getvalue()
        if len(skeleton) > SKELETON_LIMIT:
            raise ConfigurationError(
                f"model and loss take {len(skeleton) / 2**20:.0f} MB beside their tensors; hold large data "
                "in the data set, or as tensors (buffers), not as Python objects in the model or the loss"
            )
        published = artifacts.publish(pickler.tensors)
        return cls(
            skeleton,
            published,
            objective.names,
            problem.forms,
            problem.activations,
            device,
            problem.pairing,
            problem.matmul_precision,
        )

    def problem(self) -> Problem:
        """The problem, one private copy of the module per process."""
        parts = self.tensors.digest, self.names, self.forms, self.device, self.pairing, self.matmul_precision
        key = hashlib.blake2b(
            self.skeleton + repr(parts).encode(),
            digest_size=16,
        ).hexdigest()
        return _OPENED.get(key, self._build)

    def _build(self) -> Problem:
        module, loss = _SkeletonUnpickler(io.BytesIO(self.skeleton), self.tensors.load()).load()
        device = resolve_device(self.device)
        objective = Objective(module.to(device), loss_on(loss, device), self.names)
        return Problem(objective, self.forms, self.activations, self.pairing, self.matmul_precision)


@dataclass(frozen=True)
class ShippedInverse:
    """An :class:`Inverse` in transit: its kind, its numbers and its published tensors."""

    kind: str
    values: dict[str, Any]
    tensors: Artifact

    @classmethod
    def of(cls, inverse: Inverse, artifacts: Artifacts, digest: str | None = None) -> ShippedInverse:
        """Publish the tensors of ``inverse``, under its ``digest`` where that is known."""
        tensors, values = inverse.state()
        return cls(inverse.kind, values, artifacts.publish(tensors, digest))

    def inverse(self) -> Inverse:
        """The inverse; its tensors are those of the process's artifact cache."""
        return INVERSES[self.kind].from_state(self.tensors.load(), self.values)


@dataclass(frozen=True)
class Held:
    """A value for tasks of this very process: an envelope, a model or an inverse, not serialised.

    Where it does leave the process (a lazy dask array computed on a cluster that the model
    was not given), its tensors ride along if they are small.
    """

    value: Any

    def open(self) -> Any:
        """The value itself."""
        return self.value

    problem = open
    inverse = open

    def __reduce__(self) -> tuple[Any, ...]:
        riding = Artifacts(riding=True)
        if isinstance(self.value, Problem):
            return _same, (ShippedModel.of(self.value, "auto", riding),)
        if isinstance(self.value, Inverse):
            return _same, (ShippedInverse.of(self.value, riding),)
        return _same, (Envelope.of(self.value),)


def _same(value: Any) -> Any:
    return value


class _SkeletonPickler(cloudpickle.CloudPickler):
    """Pickles everything but tensors, which it collects by name."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}

    def persistent_id(self, obj: Any) -> tuple[str, bool, bool] | None:
        if not isinstance(obj, Tensor):
            return None
        name = self._names.setdefault(id(obj), str(len(self._names)))
        self.tensors[name] = obj
        return name, isinstance(obj, nn.Parameter), obj.requires_grad and obj.is_leaf

    def reducer_override(self, obj: Any) -> Any:
        # Parametrised modules (spectral_norm, weight_norm) refuse to be pickled because their
        # class is made at run time; cloudpickle carries such classes by value.
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            return copyreg.__newobj__, (type(obj),), obj.__dict__  # type: ignore[attr-defined]
        return super().reducer_override(obj)


class _SkeletonUnpickler(pickle.Unpickler):
    """Puts the tensors back, tied ones as one object."""

    def __init__(self, stream: io.BytesIO, tensors: dict[str, Tensor]) -> None:
        super().__init__(stream)
        self._tensors, self._made = tensors, dict[str, Tensor]()

    def persistent_load(self, pid: tuple[str, bool, bool]) -> Tensor:
        name, is_parameter, requires_grad = pid
        if name not in self._made:
            value = self._tensors[name].clone()  # private: artifacts are shared and read-only
            self._made[name] = (
                nn.Parameter(value, requires_grad) if is_parameter else value.requires_grad_(requires_grad)
            )
        return self._made[name]


class _Opened:
    """What this process has unpacked, a few at a time, each made once even by many threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._lock = limit, threading.RLock()
        self._held: OrderedDict[str, Any] = OrderedDict()

    def get(self, key: str, make: Any) -> Any:
        with self._lock:
            if key not in self._held:
                self._held[key] = make()
                if len(self._held) > self._limit:
                    self._held.popitem(last=False)
            self._held.move_to_end(key)
            return self._held[key]


_OPENED = _Opened(limit=16)
