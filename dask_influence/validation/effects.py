"""Effects on the test losses, measured one call at a time by an executor; what is done is kept in a store.

Notation: M training and N test points, S subsets of the training points, K seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import optree
import torch
from torch import nn

from dask_influence.core.content import contents
from dask_influence.core.objective import Objective, Tree
from dask_influence.errors import DataWarning, IncompleteRunError
from dask_influence.execution.base import Executor, Sealed
from dask_influence.execution.job import torch_threads
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location

BATCH = 1024
"""Samples that are passed through a model at once where nothing else is asked for."""

DETERMINISTIC = 1e-6
"""Relative difference of what is measured twice up to which it counts as the same."""

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What was measured for each subset.

    Attributes
    ----------
    losses : numpy array
        (S, K, N) float64: a figure of each test point.
    subsets : tuple of int
        Which of the subsets asked for they belong to: all, but for those that failed.
    failures : dict
        Reason for each of the others.
    noise : float
        Relative difference of measuring one subset twice from one seed; 0 where that is deterministic.
    seconds : float
        Time spent on it, on all workers together; what was found in the store counts as it took then.
    """

    losses: np.ndarray
    subsets: tuple[int, ...]
    failures: dict[int, str]
    noise: float
    seconds: float


@dataclass(frozen=True)
class Job(ABC):
    """What every task shares.

    Attributes
    ----------
    train, test : Source
        The data.
    """

    doing: ClassVar[str]
    """Stage of progress, and what failed, in messages."""
    each: ClassVar[str]
    """What it is done for, in the plural."""
    remedy: ClassVar[str]
    """What to do where it fails."""

    train: Source
    test: Source

    @property
    @abstractmethod
    def identity(self) -> str:
        """Digest of all that figures depend on, but the subset and the seed."""

    @abstractmethod
    def measured(self, members: np.ndarray, seed: int) -> np.ndarray:
        """A figure of each test point, (N,) float64, for the training points ``members``."""

    def test_losses(self, objective: Objective) -> np.ndarray:
        """Loss of each test point, (N,) float64."""
        losses = losses_of(objective, self.test)
        if not np.isfinite(losses).all():
            raise ValueError(
                f"the loss of test point {int(np.flatnonzero(~np.isfinite(losses))[0])} is not finite"
            )
        return losses


@dataclass(frozen=True)
class Call:
    """One measurement: the subset's number and members, the seed, and which time it is."""

    number: int
    members: np.ndarray
    seed: int
    time: int = 0

    def key(self, identity: str) -> str:
        """Under which it is kept."""
        digest = hashlib.blake2b(identity.encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.members, np.int64).tobytes())
        digest.update(f"{self.seed}, {self.time}".encode())
        return f"trained/{digest.hexdigest()}.npy"


def measure(job: Sealed, call: Call) -> tuple[Call, np.ndarray | str, float]:
    """Figures of the test points, or why there are none, and the seconds it took."""
    opened: Job = job.open()
    began = time.perf_counter()
    try:
        with torch_threads(1):
            found: np.ndarray | str = opened.measured(call.members, call.seed)
    except Exception as failure:  # noqa: BLE001 - the user's own code, of which one subset may fail
        found = told(failure)
    return call, found, time.perf_counter() - began


def told(failure: Exception) -> str:
    """One line of an error that somebody else's code raised."""
    return f"{type(failure).__name__}: {(str(failure).strip().splitlines() or [''])[0][:200]}"


def effects(
    executor: Executor,
    job: Job,
    subsets: Sequence[np.ndarray],
    seeds: Sequence[int],
    store: Location | None,
    report: Report,
    least: int,
) -> Measured:
    """Measure each of ``subsets`` from each of ``seeds``, and the first once more to see whether it is the same.

    Raises
    ------
    IncompleteRunError
        Fewer than ``least`` subsets could be measured; says why.

    Warns
    -----
    DataWarning
        Some subset failed and is left out, or measuring is not deterministic.
    """
    asked = [Call(number, members, seed) for number, members in enumerate(subsets) for seed in seeds]
    record = _Record(job.identity, store, len(job.test), lambda done, of: report(job.doing, done, of))
    missing = record.restore([*asked, dataclasses.replace(asked[0], time=1)])
    reached = dataclasses.replace(
        job, train=executor.reachable(job.train, BATCH), test=executor.reachable(job.test, BATCH)
    )
    sealed = executor.seal(reached)
    calls = ((sealed, call) for call in missing)
    for call, losses, took in executor.map(measure, calls, lambda arguments: record.lose(arguments[1])):
        record.keep(call, losses, took)
    whole = [number for number in range(len(subsets)) if number not in record.reasons]
    if record.reasons:
        first = min(record.reasons)
        told = (
            f"{job.doing} failed on {len(record.reasons)} of {len(subsets)} {job.each}; "
            f"on number {first}: {record.reasons[first]}"
        )
        if len(whole) < least:
            raise IncompleteRunError(f"{told}; {least} are needed. {job.remedy}, or give more {job.each}")
        warnings.warn(DataWarning(f"{told}. They are left out"), stacklevel=4)
    noise = _noise(record.losses.get((0, seeds[0], 0)), record.losses.get((0, seeds[0], 1)))
    if noise > DETERMINISTIC:
        warnings.warn(
            DataWarning(
                f"{job.doing} is not deterministic: losses after two of it from one seed differ by {noise:.1e} of "
                "their spread. Take all randomness from the seed, or give several seeds, of which the mean is taken"
            ),
            stacklevel=4,
        )
    losses = np.stack([np.stack([record.losses[n, seed, 0] for seed in seeds]) for n in whole])
    return Measured(losses, tuple(whole), record.reasons, noise, record.seconds)


class _Record:
    """What has been measured so far, here and in the store."""

    def __init__(
        self, identity: str, store: Location | None, tests: int, report: Callable[[int, int], None]
    ) -> None:
        self._identity, self._store, self._tests, self._report = identity, store, tests, report
        self._total = 0
        self.losses: dict[tuple[int, int, int], np.ndarray] = {}
        self.reasons: dict[int, str] = {}
        self.seconds = 0.0

    def restore(self, calls: Sequence[Call]) -> list[Call]:
        """Take what the store holds of ``calls``; the others are returned."""
        self._total, missing = len(calls), []
        keys = [call.key(self._identity) for call in calls]
        held = {} if self._store is None else self._store.get_many(keys)
        for call, key in zip(calls, keys, strict=True):
            kept = _unpacked(held[key], self._tests) if key in held else None
            if kept is None:
                missing.append(call)
            else:
                self._know(call, *kept)
        if self.losses and missing:
            self._report(len(self.losses), self._total)
        return missing

    def keep(self, call: Call, losses: np.ndarray | str, seconds: float) -> None:
        """Figures, into the store as well; or why there are none."""
        if isinstance(losses, str):
            self.reasons.setdefault(call.number, losses)
            return
        if self._store is not None:
            self._store.put(call.key(self._identity), _packed(losses, seconds))
        self._know(call, losses, seconds)
        self._report(len(self.losses), self._total)

    def lose(self, call: Call) -> None:
        """Its worker died."""
        self.reasons.setdefault(call.number, "it killed the worker that was at it")

    def _know(self, call: Call, losses: np.ndarray, seconds: float) -> None:
        self.losses[call.number, call.seed, call.time] = losses
        self.seconds += seconds


def _noise(once: np.ndarray | None, twice: np.ndarray | None) -> float:
    if once is None or twice is None:
        return float("nan")
    scale = float(np.std(once)) or float(np.abs(once).max()) or 1.0
    return float(np.abs(once - twice).max()) / scale


# -- what is kept ----------------------------------------------------------------------
_CHECKSUM_BYTES = 16


def signed(data: bytes) -> bytes:
    """``data`` with its checksum in front."""
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest() + data


def unsigned(content: bytes) -> bytes | None:
    """What was signed, None where it is damaged."""
    checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    return data if checksum == hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest() else None


def _packed(losses: np.ndarray, seconds: float) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.append(losses, seconds), allow_pickle=False)
    return signed(stream.getvalue())


def _unpacked(content: bytes, count: int) -> tuple[np.ndarray, float] | None:
    """Figures and seconds; None where they are damaged, and are measured again."""
    data = unsigned(content)
    if data is None:
        return None
    values = np.load(io.BytesIO(data), allow_pickle=False)
    return (values[:-1], float(values[-1])) if len(values) == count + 1 else None


def described(value: Any) -> list[tuple[str, Any]]:
    """What a callable computes, in words that are the same in every session."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ((field.name, described(getattr(value, field.name))) for field in dataclasses.fields(value))
        return [("", type(value).__qualname__), *fields]
    if callable(value):
        return sorted(contents(nn.Identity(), value).items())
    return [("", repr(value))]


def digest_of(*parts: Any) -> str:
    """Names what is made of ``parts``, by their representation."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# -- data ------------------------------------------------------------------------------
def tensors(batch: Any, dtype: torch.dtype, members: np.ndarray | None = None) -> tuple[Tree, Tree]:
    """A batch as tensors: floats in ``dtype``, and of all samples those of ``members``."""

    def convert(leaf: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.array(leaf if members is None else leaf[members]))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    x, y = optree.tree_map(convert, batch)
    return x, y


def losses_of(objective: Objective, source: Source) -> np.ndarray:
    """Loss of each sample of ``source``, (n,) float64, computed in the model's dtype."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(source), BATCH):
            batch = source.read(start, min(start + BATCH, len(source)))
            parts.append(objective.sample_losses(objective.parameters(), *tensors(batch, objective.dtype)))
    return torch.cat(parts).to(torch.float64).numpy()
