"""Checkpoints: the sums of finished passes, kept in a store, so that a killed fit goes on where it was.

An estimator's fit is a deterministic generator of rounds, so that its state is nothing but the
answers that it has had. Each answer is kept under a digest of everything it depends on; a fit that
is called again is handed the ones it finds and makes the remaining passes, and its result has the
bits of a fit that was never disturbed.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from dask_influence.core.content import named, update_digest
from dask_influence.core.estimators.base import Round
from dask_influence.core.moments import Moments
from dask_influence.execution.artifacts import owned
from dask_influence.storage.stores import Location

_COUNT = "*count"
"""Name of the number of samples among the sums."""

_CHECKSUM_BYTES = 16


class Checkpoints:
    """Passes over the data whose sums are kept at ``location``.

    Parameters
    ----------
    passes : callable
        Answers a round by a pass over the data.
    location : Location
        Folder of the sums; it may hold those of other fits.
    identity : str
        Digest of all that sums depend on beside their round: model, loss, data, chunks, versions.

    Attributes
    ----------
    restored : int
        Rounds that were answered from the store.
    """

    def __init__(self, passes: Callable[..., Moments], location: Location, identity: str) -> None:
        self._passes, self._location, self._identity = passes, location, identity
        self.restored = 0

    def __call__(self, request: Round, **how: Any) -> Moments:
        """The sums that the round asks for, from the store where they are there, undamaged."""
        key = f"{self._digest(request)}.safetensors"
        kept = self._kept(key)
        if kept is not None:
            self.restored += 1
            return kept
        moments = self._passes(request, **how)
        held = {name: owned(value) for name, value in moments.total.items()}
        data = safetensors.torch.save(held | {_COUNT: torch.tensor(moments.count)})
        self._location.put(key, _checksum(data) + data)
        return moments

    def _kept(self, key: str) -> Moments | None:
        """What the store holds under ``key``; None where it is missing or damaged, and the pass is made again."""
        if not self._location.exists(key):
            return None
        content = self._location.get(key)
        checksum, data = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
        if checksum != _checksum(data):
            return None
        held = {name: value.clone() for name, value in safetensors.torch.load(data).items()}
        return Moments(held, int(held.pop(_COUNT)))

    def _digest(self, request: Round) -> str:
        digest = hashlib.sha256(self._identity.encode())
        _describe(digest, request.function)
        _describe(digest, request.operand)
        _describe(digest, request.samples)
        return named(digest)


def _describe(digest: hashlib._Hash, value: Any) -> None:
    """Add to ``digest`` what ``value`` is, in words that are the same in every session."""
    if isinstance(value, partial):
        _describe(digest, (value.func, value.args, value.keywords))
    elif isinstance(value, Tensor):
        update_digest(digest, [("", value)])
    elif isinstance(value, Mapping):
        _describe(digest, sorted(value.items()))
    elif isinstance(value, (tuple, list)):
        digest.update(f"{len(value)}(".encode())
        for item in value:
            _describe(digest, item)
    elif dataclasses.is_dataclass(value):
        _describe(
            digest, [type(value).__qualname__, *(getattr(value, f.name) for f in dataclasses.fields(value))]
        )
    else:
        digest.update(f"{getattr(value, '__qualname__', repr(value))};".encode())


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_CHECKSUM_BYTES).digest()
