"""Kept: what chunks of samples have in common from one pass over the data to the next.

A solver multiplies by the same curvature in every pass: the samples as tensors, what enters the
layers and the derivatives of the loss by it are the same each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import optree
from torch import Tensor

T = TypeVar("T")

BUDGET = 256 * 2**20
"""Bytes that the chunks of one computation may keep."""


class Kept:
    """Values by key, for as long as this object lives, up to ``budget`` bytes; threads may share it.

    What came first stays: passes go through the data in one order, in which the oldest is always what is
    wanted next.

    Parameters
    ----------
    budget : int
        Bytes; what does not fit is made anew each time.

    Examples
    --------
    >>> kept = Kept(budget=10)
    >>> kept.get("a", lambda: [1], lambda value: 8) is kept.get("a", lambda: [1], lambda value: 8)
    True
    >>> kept.get("b", lambda: [1], lambda value: 8) is kept.get("b", lambda: [1], lambda value: 8)
    False
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self._left, self._held = budget, dict[Hashable, Any]()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], T], nbytes: Callable[[T], int]) -> T:
        """The value of ``key``, made where it is not kept; two threads may make it, and one is kept."""
        with self._lock:
            if key in self._held:
                found: T = self._held[key]
                return found
        value = make()
        size = nbytes(value)
        with self._lock:
            if key not in self._held and size <= self._left:
                self._held[key] = value
                self._left -= size
        return value


class Shelf:
    """The part of ``kept`` that belongs to one chunk.

    Parameters
    ----------
    kept : Kept
        Shared by all chunks.
    chunk : hashable
        Tells the chunk from the others.
    """

    def __init__(self, kept: Kept, chunk: Hashable) -> None:
        self._kept, self._chunk = kept, chunk

    def get(self, key: Hashable, make: Callable[[], T], nbytes: Callable[[T], int]) -> T:
        """As :meth:`Kept.get`."""
        return self._kept.get((self._chunk, key), make, nbytes)


def bytes_of(tree: Any) -> int:
    """Bytes of the tensors in ``tree``.

    Examples
    --------
    >>> import torch
    >>> bytes_of((torch.zeros(3), {"y": torch.zeros(2, dtype=torch.float64)}))
    28
    """
    return sum(leaf.nbytes for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor))
