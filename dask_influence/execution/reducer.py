"""The contract of a reduction: what is kept of a block of scores, and how two parts become one.

Execution knows no reduction by name. What a user asks for (:class:`Reduction`, configured once)
is bound to the sizes of a run as a :class:`Reducer`, a few numbers that every task carries;
arrays as long as the data (labels, ids) are its *tables*, published beside the factors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dask_influence.execution.tree import Axis
from dask_influence.storage.results import ArrayTemplate

Array = np.ndarray[Any, Any]

Part = dict[str, Array]
"""What is kept of some scores. Axes of every array: λ, the kept points (length 1 for none), the rest."""


@dataclass(frozen=True)
class Scores:
    """The scores that are not kept: what they would be.

    Attributes
    ----------
    tests : int
        N; 0 without test data.
    trains : int
        M.
    features : tuple of int
        Shape of one input in perturbation mode, () otherwise.
    perturbation : bool
        Mode.
    dtype : numpy dtype
        Of a score.
    ids : mapping
        Coordinates of the dimensions ``test`` and ``train``.
    """

    tests: int
    trains: int
    features: tuple[int, ...]
    perturbation: bool
    dtype: np.dtype[Any]
    ids: Mapping[str, Array]


class Reducer(ABC):
    """A reduction bound to the sizes of one run; frozen, picklable and small."""

    @property
    @abstractmethod
    def axis(self) -> Axis:
        """Whose points are kept; the result falls into cells along it."""

    @property
    @abstractmethod
    def arrays(self) -> dict[str, ArrayTemplate]:
        """What is written, at one λ; tiles are cut later."""

    @abstractmethod
    def partial(self, scores: Array, rows: Array, columns: Array, tables: Mapping[str, Array]) -> Part:
        """What is kept of ``scores`` (λ, rows, columns, *features) of points at those positions.

        Of a diagonal they are (λ, columns). Points on the side that is not kept may be few, or none.
        """

    def merge(self, first: Part, second: Part) -> Part:
        """One part of two for the same kept points; the other points of ``second`` come after those of ``first``."""
        raise NotImplementedError(f"{type(self).__name__} keeps every score that it sees")

    @abstractmethod
    def finish(self, part: Part, tables: Mapping[str, Array]) -> Part:
        """The arrays of a whole cell, λ in front."""


class Reduction(ABC):
    """What a user passes as ``reduce=``; its ``repr`` is what plans and stores show.

    Attributes
    ----------
    diagonal : bool
        Whether the scores are those of each training point on itself.
    """

    diagonal: ClassVar[bool] = False

    @abstractmethod
    def bind(self, scores: Scores) -> Reducer:
        """The reducer for scores of these sizes.

        Raises
        ------
        ConfigurationError, DataError
            The reduction does not fit them; names the argument, both numbers and what to do.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-able values that tell it from every other reduction, for fingerprints."""

    def tables(self, scores: Scores) -> dict[str, Array]:
        """Arrays that tasks look things up in."""
        return {}

    def coordinates(self) -> dict[str, Array]:
        """Index arrays of the result beside ``test`` and ``train``."""
        return {}
