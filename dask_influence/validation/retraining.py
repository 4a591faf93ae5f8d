"""Training again on many subsets of the data, as tasks of an executor; what is done is kept in a store.

Notation: M training and N test points, S subsets, K seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import torch
from torch import nn

from dask_influence.core.content import contents
from dask_influence.core.objective import Loss, Objective, Tree
from dask_influence.errors import DataWarning, IncompleteRunError
from dask_influence.execution.base import Executor, Sealed
from dask_influence.execution.tasks import torch_threads
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location
from dask_influence.validation.training import TrainingFunction

BATCH = 1024
"""Test points whose losses are computed at once."""

DETERMINISTIC = 1e-6
"""Relative difference of the losses after two trainings up to which they count as the same."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Retrained:
    """Test losses after training on each subset.

    Attributes
    ----------
    losses : numpy array
        (S, K, N) float64.
    subsets : tuple of int
        Which of the subsets asked for they belong to: all, but for those on which training failed.
    failures : dict
        Reason for each of the others.
    noise : float
        Relative difference of the losses of two trainings on one subset from one seed; 0 where training is
        deterministic.
    seconds : float
        Time spent on training, on all workers together; what was found in the store counts as it took then.
    """

    losses: np.ndarray
    subsets: tuple[int, ...]
    failures: dict[int, str]
    noise: float
    seconds: float


@dataclass(frozen=True)
class Job:
    """What every task shares."""

    training: TrainingFunction
    loss: Loss
    train: Source
    test: Source
    dtype: torch.dtype

    @property
    def identity(self) -> str:
        """Digest of all that losses after training depend on, but the subset and the seed."""
        parts = [_described(self.training), _described(self.loss), self.train.digest(), self.test.digest()]
        return hashlib.blake2b(repr((parts, str(self.dtype))).encode(), digest_size=16).hexdigest()

    def losses_after(self, members: np.ndarray, seed: int) -> np.ndarray:
        """Loss of each test point, (N,) float64, after training on ``members`` of the training data."""
        x, y = tensors(self.train.read(0, len(self.train)), self.dtype, members)
        model = self.training(x, y, seed)
        if not isinstance(model, nn.Module):
            raise TypeError(f"the training function returned {type(model).__name__}, no torch module")
        objective = Objective.of(model, self.loss)
        parts = []
        for start in range(0, len(self.test), BATCH):
            batch = self.test.read(start, min(start + BATCH, len(self.test)))
            with torch.no_grad():
                x, y = tensors(batch, self.dtype)
                parts.append(objective.sample_losses(objective.parameters(), x, y))
        losses = torch.cat(parts).to(torch.float64).numpy()
        if not np.isfinite(losses).all():
            raise ValueError(
                f"the loss of test point {int(np.flatnonzero(~np.isfinite(losses))[0])} is not finite"
            )
        return losses


@dataclass(frozen=True)
class _Call:
    """One training: the subset's number and members, the seed, and which time it is."""

    number: int
    members: np.ndarray
    seed: int
    time: int = 0

    def key(self, identity: str) -> str:
        """Under which its losses are kept."""
        digest = hashlib.blake2b(identity.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.members, np.int64).tobytes())
        digest.update(f"{self.seed}, {self.time}".encode())
        return f"trained/{digest.hexdigest()}.npy"


def train_again(job: Sealed, call: _Call) -> tuple[_Call, np.ndarray | str, float]:
    """Losses of the test points, or why there are none, and the seconds it took."""
    opened: Job = job.open()
    began = time.perf_counter()
    try:
        with torch_threads(1):
            found: np.ndarray | str = opened.losses_after(call.members, call.seed)
    except Exception as failure:  # noqa: BLE001 - the user's own code, of which one subset may fail
        found = f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:200]}"
    return call, found, time.perf_counter() - began


def retrained(
    executor: Executor,
    job: Job,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    store: Location | None,
    report: Report,
    least: int,
) -> Retrained:
    """Train on each of ``subsets`` from each of ``seeds``, and once more on the first to see whether it is the same.

    Raises
    ------
    IncompleteRunError
        Fewer than ``least`` subsets were trained on; says why.

    Warns
    -----
    DataWarning
        Training failed on some subset, which is left out, or is not deterministic.
    """
    asked = [_Call(number, members, seed) for number, members in enumerate(subsets) for seed in seeds]
    record = _Record(job.identity, store, len(job.test), report)
    missing = record.restore([*asked, dataclasses.replace(asked[0], time=1)])
    reached = dataclasses.replace(
        job, train=executor.reachable(job.train, BATCH), test=executor.reachable(job.test, BATCH)
    )
    sealed = executor.seal(reached)
    calls = ((sealed, call) for call in missing)
    for call, losses, took in executor.map(train_again, calls, lambda arguments: record.lose(arguments[1])):
        record.keep(call, losses, took)
    whole = [number for number in range(len(subsets)) if number not in record.reasons]
    if record.reasons:
        first = min(record.reasons)
        told = (
            f"training failed on {len(record.reasons)} of {len(subsets)} subsets; "
            f"on number {first}: {record.reasons[first]}"
        )
        if len(whole) < least:
            raise IncompleteRunError(
                f"{told}; {least} are needed. Mend the training function, or give more subsets"
            )
        warnings.warn(DataWarning(f"{told}. They are left out"), stacklevel=4)
    noise = _noise(record.losses.get((0, seeds[0], 0)), record.losses.get((0, seeds[0], 1)))
    if noise > DETERMINISTIC:
        warnings.warn(
            DataWarning(
                f"training is not deterministic: losses after two trainings from one seed differ by {noise:.1e} of "
                "their spread. Take all randomness from the seed, or give several seeds, of which the mean is taken"
            ),
            stacklevel=4,
        )
    losses = np.stack([np.stack([record.losses[n, seed, 0] for seed in seeds]) for n in whole])
    return Retrained(losses, tuple(whole), record.reasons, noise, record.seconds)


class _Record:
    """What has been trained so far, here and in the store."""

    def __init__(self, identity: str, store: Location | None, tests: int, report: Report) -> None:
        self._identity, self._store, self._tests, self._report = identity, store, tests, report
        self._total = 0
        self.losses: dict[tuple[int, int, int], np.ndarray] = {}
        self.reasons: dict[int, str] = {}
        self.seconds = 0.0

    def restore(self, calls: Sequence[_Call]) -> list[_Call]:
        """Take what the store holds of ``calls``; the others are returned."""
        self._total, missing = len(calls), []
        for call in calls:
            kept = None if self._store is None else _kept(self._store, call.key(self._identity), self._tests)
            if kept is None:
                missing.append(call)
            else:
                self._know(call, *kept)
        return missing

    def keep(self, call: _Call, losses: np.ndarray | str, seconds: float) -> None:
        """Losses, into the store as well; or why there are none."""
        if isinstance(losses, str):
            self.reasons.setdefault(call.number, losses)
            return
        if self._store is not None:
            self._store.put(call.key(self._identity), _packed(losses, seconds))
        self._know(call, losses, seconds)

    def lose(self, call: _Call) -> None:
        """Its worker died."""
        self.reasons.setdefault(call.number, "it killed the worker that trained on it")

    def _know(self, call: _Call, losses: np.ndarray, seconds: float) -> None:
        self.losses[call.number, call.seed, call.time] = losses
        self.seconds += seconds
        self._report("training", len(self.losses), self._total)


def _noise(once: np.ndarray | None, twice: np.ndarray | None) -> float:
    if once is None or twice is None:
        return float("nan")
    scale = float(np.std(once)) or float(np.abs(once).max()) or 1.0
    return float(np.abs(once - twice).max()) / scale


# -- what is kept ----------------------------------------------------------------------
_CHECKSUM_BYTES = 16


def _packed(losses: np.ndarray, seconds: float) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.append(losses, seconds), allow_pickle=False)
    data = stream.getvalue()
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest() + data


def _kept(store: Location, key: str, count: int) -> tuple[np.ndarray, float] | None:
    """Losses and seconds; None where they are missing or damaged, and training is done again."""
    if not store.exists(key):
        return None
    content = store.get(key)
    checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if checksum != hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest():
        return None
    values = np.load(io.BytesIO(data), allow_pickle=False)
    return (values[:-1], float(values[-1])) if len(values) == count + 1 else None


def _described(value: Any) -> list[tuple[str, Any]]:
    """What a callable computes, in words that are the same in every session."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, _described(getattr(value, field.name))) for field in dataclasses.fields(value))
        return [("", type(value).__qualname__), *fields]
    if callable(value):
        return sorted(contents(nn.Identity(), value).items())
    return [("", repr(value))]


# -- data ------------------------------------------------------------------------------
def tensors(batch: Any, dtype: torch.dtype, members: np.ndarray | None = None) -> tuple[Tree, Tree]:
    """A batch as tensors: floats in ``dtype``, and of all samples those of ``members``."""

    def convert(leaf: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(leaf if members is None else leaf[members]))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    x, y = optree.tree_map(convert, batch)
    return x, y
