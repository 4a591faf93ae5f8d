"""The sizes of what is asked for: all that a plan depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dask_influence.core import sizes
from dask_influence.core.sizes import BUDGET, Size
from dask_influence.execution.tree import Axis

_ITERATED, _CERTIFIED = 11, 5
"""Blocks as large as the factors, in float64, that solving and that checking holds at its peak, by measurement."""


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
class Passing:
    """Passes over the fitted data that factors take.

    Attributes
    ----------
    fitted : int
        Samples that each of them goes over.
    samples : int
        Of those, multiplied at once.
    chained : bool
        Whether products go along a chain of linear layers, and not by graphs.
    solving : bool
        Whether factors are solved by them, and not only certified.
    """

    fitted: int
    samples: int
    chained: bool
    solving: bool


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
    estimated : int
        Random vectors from which residuals are estimated; 0 where they are computed.
    passing : Passing, optional
        Passes that factors take; None where they take none.
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
    estimated: int = 0
    passing: Passing | None = None

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

    @property
    def by_coefficients(self) -> bool:
        """Whether the test side is coefficients, for which no gradient need be formed."""
        return self.rank is not None and self.paired is None and not self.diagonal

    # -- bytes ----------------------------------------------------------------------------
    @property
    def row_bytes(self) -> int:
        """What a query block holds of one test point: a factor, coefficients or a row of pairs."""
        if self.paired is not None:
            return self.copies * self.paired.numbers * self.paired.itemsize
        return self.copies * self.itemsize * (self.parameters if self.rank is None else self.rank)

    @property
    def estimating_bytes(self) -> int:
        """Vectors that a process projects gradients on at once, where residuals are estimated."""
        return self._estimated_at_once * self.copies * self.parameters * max(4, self.itemsize)

    @property
    def estimated_bytes(self) -> int:
        """All of those vectors."""
        return self.estimated * self.copies * self.parameters * max(4, self.itemsize)

    @property
    def making_bytes(self) -> int:
        """What a process holds at once that makes those vectors, or adds up the products for them."""
        return sizes.making_bytes(self._estimated_at_once, self.parameters, self.copies)

    @property
    def _estimated_at_once(self) -> int:
        if not self.estimated:
            return 0
        return sizes.estimating_blocks(self.estimated, self.parameters, self.copies).size

    def passing_bytes(self, points: int) -> int:
        """What a task holds that multiplies factors of so many test points by the curvature of some samples."""
        if self.passing is None:
            return 0
        each = self.passing.samples, points * self.copies, self.activations, self.parameters, self.itemsize
        return sizes.passing_bytes(*each, chained=self.passing.chained)

    def iterating_bytes(self, points: int) -> int:
        """What the process holds that drives those passes: gradients, factors, and blocks of an iteration as large."""
        if self.passing is None:
            return 0
        blocks = _ITERATED if self.passing.solving else _CERTIFIED
        return 8 * blocks * points * self.copies * self.parameters

    def kept_bytes(self, points: int) -> int:
        """What is kept of one of ``points``, and of its parts while they are joined."""
        assert self.kept is not None
        return 3 * -(-self.copies * self.kept.nbytes // points)

    @property
    def narrow_bytes(self) -> int:
        """Directions in the precision in which they are projected on, beside the inverse's; or their witness."""
        if not self.by_coefficients or self.itemsize >= 8:
            return 0
        assert self.rank is not None
        return 4 * self.rank * self.parameters

    def projecting_bytes(self, samples: int) -> int:
        """Projections of so many samples: gradients of some of them, in float64, where layers do not do."""
        if not self.by_coefficients:
            return 0
        each = self.parameters * (8 + 2 * self.itemsize)
        formed = max(each, min(2 * BUDGET, samples * each))
        return formed + samples * (2 * self.sample_bytes + 6 * self.activations * self.itemsize)

    @property
    def point_bytes(self) -> int:
        """One point's gradient, twice while parts are joined, and factors; in float64 both, residual and temporaries.

        Where there are coefficients in their place: projections on directions and images, and what is made of them;
        where rows of pairs are, of which no residual is computed: them, twice, and projections that estimate it.
        """
        if self.paired is not None and self.estimated:
            return 3 * self.row_bytes + 8 * (1 + self.estimated * self.copies)
        if self.by_coefficients:
            assert self.rank is not None
            return 8 * self.rank * (4 + 4 * self.copies)
        return self.parameters * self.copies * (3 * self.itemsize + 6 * 8)
