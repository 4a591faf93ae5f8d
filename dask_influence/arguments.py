"""What callers pass, and what they get back: modes, ids, features, kinds of arrays, names of losses."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor, nn

from dask_influence.core.forms import input_leaf
from dask_influence.errors import ConfigurationError, DataError
from dask_influence.storage.sources import Source


class InfluenceMode(StrEnum):
    """What a score measures: the effect of removing a sample, or of perturbing its input."""

    Up = "up"
    Perturbation = "perturbation"


def mode_of(given: InfluenceMode | str) -> InfluenceMode:
    """The mode by its name, or a ConfigurationError that names both."""
    try:
        return InfluenceMode(given)
    except ValueError:
        raise ConfigurationError(f'mode must be "up" or "perturbation"; got {given!r}') from None


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
    """One unique id per sample, a number or a string: those ``given``, or positions.

    Raises
    ------
    DataError
        Where they are of another kind, NaN, too many or few, or not unique.
    """
    if given is None:
        return np.arange(len(source))
    chosen = labels_of(given, argument)
    if chosen.shape != (len(source),):
        raise DataError(f"{argument} must hold one id per sample, shape ({len(source)},); got {chosen.shape}")
    values, counts = np.unique(chosen, return_counts=True)
    if len(values) != len(chosen):
        raise DataError(f"{argument} must be unique; {values[counts > 1][0]!r} occurs {counts.max()} times")
    return chosen


def labels_of(given: Any, argument: str) -> np.ndarray[Any, Any]:
    """``given`` as an array of numbers or of strings, the kinds that a store keeps as coordinates."""
    advice = "pass a 1-D array or list of integers, floats or strings, all of one kind"
    try:
        labels = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{argument} cannot be made an array ({error}); {advice}") from error
    # numpy makes strings of the numbers beside them, and objects of what has no dtype.
    if labels.dtype.kind == "O" or (labels.dtype.kind in "US" and isinstance(given, list | tuple)):
        items = list(labels.flat) if labels.dtype.kind == "O" else list(given)
        kinds = sorted({type(item).__name__ for item in items if not isinstance(item, str)})
        if kinds:
            mixed = [*kinds, "str"] if any(isinstance(item, str) for item in items) else kinds
            raise DataError(f"{argument} holds {', '.join(mixed)}; {advice}")
        cut = next((item for item in items if item.endswith("\0")), None)
        if cut is not None:
            raise DataError(f"{argument} holds {cut!r}, of which numpy drops the trailing NUL; leave it out")
        labels = labels.astype(str)
    if labels.dtype.kind not in "iufUT" or labels.dtype == np.longdouble:
        raise DataError(f"{argument} has dtype {labels.dtype}; {advice}")
    if labels.dtype.kind in "UT":
        try:
            "".join(labels.flat).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{argument} holds text that no store can ({error}); {advice}") from error
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        raise DataError(f"{argument} holds NaN at position {int(np.isnan(labels).argmax())}; {advice}")
    return labels


def check_factors(given: Any, parameters: int) -> None:
    """Refuse what is no array of real numbers (N, P), or has no rows.

    Raises
    ------
    DataError
        Names the shape or the dtype that arrived.

    Examples
    --------
    >>> check_factors(np.ones((2, 3)), parameters=3)
    >>> check_factors(np.ones((2, 3)) * 1j, parameters=3)
    Traceback (most recent call last):
    dask_influence.errors.DataError: factors must hold real numbers, as influence_factors returns; got complex128
    """
    shape = tuple(getattr(given, "shape", ()))
    if len(shape) != 2 or shape[1] != parameters:
        raise DataError(
            f"factors must have shape (N, P = {parameters}), as influence_factors returns; got {shape}"
        )
    if not shape[0] > 0:  # rows of a dask array may be NaN in number
        raise DataError(f"factors must hold at least one row, of a known number; got shape {shape}")
    dtype = getattr(given, "dtype", None)
    if isinstance(given, Tensor):
        real = not given.is_complex()
    else:
        real = isinstance(dtype, np.dtype) and dtype.kind in "biuf" and dtype != np.longdouble
    if not real:
        raise DataError(f"factors must hold real numbers, as influence_factors returns; got {dtype}")


def id_digests(ids: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, str]:
    """Entries of a fingerprint that tell one set of ids from another, 1 from "1" among them."""
    return {f"{name}_ids": digest_of(values) for name, values in ids.items()}


def digest_of(values: np.ndarray[Any, Any]) -> str:
    """Digest of ids or labels that is the same whatever array held them."""
    # Strings come back from a store under another dtype than they were given in.
    kind = "U" if values.dtype.kind in "UTO" else values.dtype.kind
    digest = hashlib.blake2b(f"{kind}{values.shape}".encode(), digest_size=16)
    for low in range(0, len(values), 2**16):  # Python's own numbers take ten times the memory
        digest.update(json.dumps(values[low : low + 2**16].tolist()).encode())
    return digest.hexdigest()


def described(loss: Any) -> str:
    """Name of a loss that is the same in every session."""
    if isinstance(loss, functools.partial):
        return f"{described(loss.func)}(*{loss.args}, **{loss.keywords})"
    if isinstance(loss, nn.Module):
        return repr(loss)
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"
