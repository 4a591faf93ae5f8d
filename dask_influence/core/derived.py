"""Derived: what is made of a tensor once in a process, and kept for as long as the tensor lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class _Derived:
    """Values by tensor and key."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = WeakTensorKeyDictionary()

    def get(self, tensor: Tensor, key: Hashable, make: Callable[[], T]) -> T:
        """The value of ``key``, which must not hold ``tensor`` itself; threads wait for the one that makes it."""
        with self._lock:
            values: dict[Hashable, Any] = self._held.setdefault(tensor, {})
            if key not in values:
                values[key] = make()
            found: T = values[key]
            return found


_DERIVED = _Derived()


def derived(tensor: Tensor, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` makes of a tensor that is not written to, the first time; it must not hold the tensor itself.

    Examples
    --------
    >>> tensor = torch.ones(2)
    >>> derived(tensor, "sum", lambda: [2.0]) is derived(tensor, "sum", lambda: [2.0])
    True
    """
    return _DERIVED.get(tensor, key, make)


def held_in(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``tensor`` in another dtype and place; a narrower one is kept beside it, unless that is another device."""
    if tensor.device != device or tensor.dtype.itemsize <= dtype.itemsize:
        return tensor.to(device, dtype)
    return derived(tensor, dtype, lambda: tensor.to(dtype))
