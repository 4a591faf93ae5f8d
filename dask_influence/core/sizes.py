"""What parts of a model take, as integers: all that a plan knows of them. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What rows of pairs take.

    Attributes
    ----------
    numbers : int
        Held of one sample.
    products : int
        Multiplications for one pair of samples.
    itemsize : int
        Bytes of a number.
    """

    numbers: int
    products: int
    itemsize: int
