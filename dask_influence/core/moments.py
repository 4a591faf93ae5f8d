"""Moments: sums over samples with their count, and the only place that forms a mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over ``count`` samples, by name, in float64.

    Addition is exact bookkeeping: chunks of any size add up to the same moments (up to
    float64 rounding), because only :meth:`mean` divides.

    Examples
    --------
    >>> a = Moments({"loss": torch.tensor([1.0, 2.0])}, 2)
    >>> b = Moments({"loss": torch.tensor([3.0, 1.0])}, 1)
    >>> (a + b).mean("loss").tolist()
    [1.3333333333333333, 1.0]
    """

    total: dict[str, Tensor]
    count: int

    def __post_init__(self) -> None:
        total = {name: value.detach().to("cpu", torch.float64) for name, value in self.total.items()}
        object.__setattr__(self, "total", total)

    def __add__(self, other: Moments) -> Moments:
        if self.total.keys() != other.total.keys():
            raise KeyError(f"sums {sorted(self.total)} do not match {sorted(other.total)}")
        summed = {name: value + other.total[name] for name, value in self.total.items()}
        return Moments(summed, self.count + other.count)

    def __reduce__(self) -> tuple[Any, ...]:
        # numpy arrays travel out of band between processes; torch tensors are copied byte by byte
        return _restored, ({name: value.numpy() for name, value in self.total.items()}, self.count)

    def mean(self, name: str) -> Tensor:
        """Sum over samples divided by their number, float64."""
        return self.total[name] / self.count


def merge(parts: Sequence[Moments]) -> Moments:
    """Add ``parts`` pairwise in a tree whose shape depends on their number alone."""
    level = list(parts)
    while len(level) > 1:
        paired = [a + b for a, b in zip(level[0::2], level[1::2], strict=False)]
        level = paired + level[len(level) - len(level) % 2 :]
    return level[0]


def _restored(total: dict[str, np.ndarray], count: int) -> Moments:
    # what arrives over the wire is read-only memory, which torch tensors may not wrap
    return Moments({name: torch.tensor(value) for name, value in total.items()}, count)
