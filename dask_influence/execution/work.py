"""The sizes of what is asked for: all that a plan depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dask_influence.core.sizes import Size
from dask_influence.execution.tree import Axis


@dataclass(frozen=True)
class Kept:
    """What a reduction leaves of the scores.

    Attributes
    ----------
    text : str
        The reduction, for people.
    axis : "test", "train" or None
        Whose points are kept.
    nbytes : int
        Bytes of all arrays that it writes, at one λ.
    diagonal : bool
        Whether the scores are those of each training point on itself; there are no test points then.
    """

    text: str
    axis: Axis
    nbytes: int
    diagonal: bool


@dataclass(frozen=True)
class Work:
    """The sizes of what is asked for.

    Attributes
    ----------
    tests, trains : int
        N and M.
    features : tuple of int
        Shape of one input in perturbation mode, () otherwise.
    parameters : int
        P.
    rank : int or None
        R, where the inverse has directions of its own.
    itemsize : int
        Bytes of a score and of a parameter.
    activations : int
        Elements one forward pass keeps for a sample.
    sample_bytes : int
        Bytes of one training sample as it is read.
    regularizations : int, optional
        L, where scores are asked for at several λ; None is the one of the model.
    kept : Kept, optional
        What a reduction leaves of the scores; None keeps them all.
    inverse_bytes : int
        Of the tensors of the inverse, which a process keeps once it has solved with them.
    paired : Size, optional
        What pairs of samples take, where they are scored without factors; R are the projections then.
    """

    tests: int
    trains: int
    features: tuple[int, ...]
    parameters: int
    rank: int | None
    itemsize: int
    activations: int
    sample_bytes: int
    regularizations: int | None = None
    kept: Kept | None = None
    inverse_bytes: int = 0
    paired: Size | None = None

    @property
    def diagonal(self) -> bool:
        """Whether each training point is scored on itself alone."""
        return self.kept is not None and self.kept.diagonal

    @property
    def copies(self) -> int:
        """L, or 1: scores of a pair of points."""
        return self.regularizations or 1

    @property
    def width(self) -> int:
        """F in perturbation mode, 1 otherwise: numbers per score."""
        return math.prod(self.features)
