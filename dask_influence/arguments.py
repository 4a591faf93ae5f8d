"""What callers pass, and what they get back: ids, features, kinds of arrays, names of losses."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn

from dask_influence.core.forms import input_leaf
from dask_influence.errors import DataError
from dask_influence.storage.sources import Source


def like(scores: np.ndarray[Any, Any], given: Any, dtype: torch.dtype) -> Any:
    """``scores`` as the kind of array that ``given`` is made of."""
    leaf = optree.tree_leaves(given)[0]
    return torch.from_numpy(scores).to(leaf.device, dtype) if isinstance(leaf, Tensor) else scores


def features(source: Source) -> tuple[int, ...]:
    """Shape of one input, where perturbation is defined on it."""
    empty = optree.tree_map(
        lambda spec: torch.from_numpy(np.empty((1, *spec.shape), spec.dtype)), source.spec[0]
    )
    return tuple(input_leaf(empty).shape[1:])


def ids(given: Any, source: Any, argument: str) -> np.ndarray[Any, Any]:
    """One unique id per sample: those ``given``, or positions."""
    if given is None:
        return np.arange(len(source))
    chosen = np.asarray(given)
    if chosen.shape != (len(source),):
        raise DataError(f"{argument} must hold one id per sample, shape ({len(source)},); got {chosen.shape}")
    values, counts = np.unique(chosen, return_counts=True)
    if len(values) != len(chosen):
        raise DataError(f"{argument} must be unique; {values[counts > 1][0]!r} occurs {counts.max()} times")
    return chosen


def id_digests(ids: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Entries of a fingerprint that tell one set of ids from another."""
    return {
        f"{name}_ids": hashlib.blake2b("\n".join(map(str, values)).encode(), digest_size=16).hexdigest()
        for name, values in ids.items()
    }


def described(loss: Any) -> str:
    """Name of a loss that is the same in every session."""
    if isinstance(loss, functools.partial):
        return f"{described(loss.func)}(*{loss.args}, **{loss.keywords})"
    if isinstance(loss, nn.Module):
        return repr(loss)
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"
