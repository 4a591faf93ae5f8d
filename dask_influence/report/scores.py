"""Scores: as much of a store's arrays as a report shows, and never N × M of them.

What is read: whole stored chunks, evenly drawn, for the distribution (``SAMPLE_BYTES``); the rows of the test points
that are shown, in blocks of training points; lists of a reduction as they are. Chunks are the unit of
reading, so that a row costs the chunks that it crosses; none but the one being read is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import zarr

from dask_influence.arguments import digest_of
from dask_influence.errors import ConfigurationError, CorruptStoreError, DataError, InfluenceError
from dask_influence.reductions import SIDES
from dask_influence.report.facts import Array, Facts
from dask_influence.storage.stores import Location, store_errors

SAMPLE_BYTES = 32 * 2**20
"""Of scores that are read for the distribution: all of a small store, evenly drawn chunks of a large one."""

BLOCK_BYTES = 64 * 2**20
"""Of rows that are read at once."""

ROW_BYTES = 8 * 2**30
"""Of the chunks that all rows cross; where they are more, evenly drawn blocks of training points are read."""

SCORES, GROUPS, OWN = "influence", "group_influence", "self_influence"


@contextmanager
def reading(location: Location, name: str) -> Iterator[None]:
    """Name the store where stored bytes are not what was written."""
    try:
        with store_errors(location, f"read {name!r} of"):
            yield
    except InfluenceError:
        raise
    except (ValueError, RuntimeError) as error:  # what codecs raise
        raise CorruptStoreError(
            f"{name!r} of {location.url} cannot be decoded ({error}); verify(store) names what is damaged"
        ) from error


def drawn_boxes(
    shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int
) -> Iterator[tuple[slice, ...]]:
    """All chunks of an array, or as many as ``SAMPLE_BYTES`` allow, drawn evenly and always the same.

    >>> [box[1] for box in drawn_boxes((2, 5), (2, 3), 8)]
    [slice(0, 3, None), slice(3, 5, None)]
    """
    counts = [-(-extent // size) for extent, size in zip(shape, chunks, strict=True)]
    total, few = math.prod(counts), max(1, SAMPLE_BYTES // max(1, math.prod(chunks) * itemsize))
    drawn = np.arange(total)
    if few < total:
        drawn = np.sort(np.random.default_rng(0).choice(total, few, replace=False))
    for place in zip(*np.unravel_index(drawn, counts), strict=True):
        starts = [int(at) * size for at, size in zip(place, chunks, strict=True)]
        yield tuple(slice(a, min(a + size, n)) for a, size, n in zip(starts, chunks, shape, strict=True))


class Stored:
    """One array of a store, at one λ, read by chunks.

    Parameters
    ----------
    facts : Facts
        The store.
    name : str
        Of the array.
    """

    def __init__(self, facts: Facts, name: str) -> None:
        self.name, self.location = name, facts.location
        with reading(self.location, name):
            self._array: Any = zarr.open_array(self.location.zarr(), path=name, mode="r")
        swept = facts.regularization is not None
        self._prefix = (facts.regularizations.index(facts.regularization),) if swept else ()
        self.shape: tuple[int, ...] = self._array.shape[len(self._prefix) :]
        self.chunks: tuple[int, ...] = self._array.chunks[len(self._prefix) :]
        self.dtype: np.dtype[Any] = self._array.dtype

    def read(self, *box: Any) -> Array:
        """Slices, or lists of positions, along the first axes."""
        with reading(self.location, self.name):
            return np.asarray(self._array.oindex[(*self._prefix, *box)])


@dataclass(frozen=True)
class Layout:
    """Which array holds the scores, and what its rows and columns are.

    Attributes
    ----------
    name : str
        The array, or the first of the arrays of TopK.
    rows, columns : str
        ``"test"``, ``"train"``, ``"group"`` or ``"test_group"``: whose lists are shown, and what is listed.
    features : tuple of int
        Shape of an input in perturbation mode.
    listed : bool
        Whether the store holds lists (TopK) instead of scores.
    """

    name: str
    rows: str
    columns: str
    features: tuple[int, ...] = ()
    listed: bool = False

    @classmethod
    def of(cls, facts: Facts) -> Layout | None:
        """The layout, or None where the store has no scores of pairs."""
        dataset = facts.dataset
        for name in (SCORES, GROUPS):
            if name in dataset:
                rows, columns = map(str, dataset[name].dims[:2])
                return cls(name, rows, columns, tuple(dataset[name].shape[2:]))
        if f"{SIDES[0]}_score" in dataset:
            rows = str(dataset[f"{SIDES[0]}_score"].dims[0])
            return cls(f"{SIDES[0]}_score", rows, "train" if rows == "test" else "test", listed=True)
        return None


@dataclass(frozen=True)
class Scored:
    """One entry of a list: a point, its score, and where it is in the data.

    ``position`` is None where the store does not say.
    """

    id: Any
    score: float
    position: int | None


@dataclass(frozen=True)
class Ranked:
    """The lists of one row.

    Attributes
    ----------
    id, position
        Of the test point.
    helpful, harmful : tuple of Scored
        By largest and by smallest score; in perturbation mode by largest ‖·‖, and none.
    values : numpy array or None
        All scores of the row that are there; None where the store holds lists.
    missing : int
        Scores of the row that are not there.
    """

    id: Any
    position: int
    helpful: tuple[Scored, ...]
    harmful: tuple[Scored, ...]
    values: Array | None = field(repr=False)
    missing: int = 0


@dataclass(frozen=True)
class Sample:
    """Scores that were read for the distribution.

    Attributes
    ----------
    values : numpy array
        (S,) those that are there; in perturbation mode ‖·‖ over the features of each pair.
    pairs : int
        Pairs that were read, missing ones included.
    share : float
        Of all pairs.
    lowest : mapping of int to float
        By row that was met: its smallest score, or its largest ‖·‖, negated.
    """

    values: Array
    pairs: int
    share: float
    lowest: dict[int, float]


class Scores:
    """What a report reads of the scores of one store.

    Parameters
    ----------
    facts : Facts
        The store.
    layout : Layout
        What it holds.
    ids : mapping of str to array
        Ids of points that the store does not list as coordinates, by ``"test"`` and ``"train"``.

    Attributes
    ----------
    columns_read : float
        Share of the columns that the rows ranked were read of; less than 1 where they were too long.
    """

    def __init__(self, facts: Facts, layout: Layout, ids: dict[str, Array]) -> None:
        self.facts, self.layout, self._given = facts, layout, ids
        self._stored = Stored(facts, layout.name)
        self.columns_read = 1.0

    # -- names --------------------------------------------------------------------------
    @cached_property
    def row_ids(self) -> list[Any]:
        """Of all rows."""
        return list(self.facts.dataset[self.layout.rows].values.tolist())

    @cached_property
    def _column_ids(self) -> Array | None:
        """Of all columns, or None where the store lists points without saying which they are."""
        side = self.layout.columns
        return known_ids(self.facts, side, self._given)

    @cached_property
    def _places(self) -> dict[Any, int]:
        ids = self._column_ids
        return {} if ids is None else {one: at for at, one in enumerate(ids.tolist())}

    @cached_property
    def _row_places(self) -> dict[Any, int]:
        return {one: at for at, one in enumerate(self.row_ids)}

    def row_of(self, one: Any) -> int | None:
        """Row of an id, None where the store has no such row."""
        return self._row_places.get(one)

    def column_id(self, position: int) -> Any:
        """Id of a column, its position where the store does not say."""
        ids = self._column_ids
        return position if ids is None else _plain(ids[position])

    # -- the distribution ---------------------------------------------------------------
    @cached_property
    def sample(self) -> Sample:
        """Scores of evenly drawn chunks; None of a store of lists is a sample of all scores."""
        found, lowest, pairs = list[Array](), dict[int, float](), 0
        stored = self._stored
        cut = (*stored.chunks[:2], *stored.shape[2:])
        for box in drawn_boxes(stored.shape, cut, stored.dtype.itemsize):
            block = self._strength(stored.read(*box))
            pairs += block.size
            held = ~np.isnan(block)
            self._check_there(block.size - int(held.sum()))
            found.append(block[held])
            signed = -block if self.layout.features else block
            least = np.where(held, signed, np.inf).min(axis=1)
            for row, value in enumerate(least.tolist(), start=box[0].start):
                if np.isfinite(value):
                    lowest[row] = min(value, lowest.get(row, math.inf))
        total = math.prod(self._stored.shape[:2])
        values = np.concatenate(found) if found else np.empty(0)
        return Sample(values, pairs, min(1.0, pairs / total), lowest)

    def _strength(self, block: Array) -> Array:
        """Scores as they are, or ‖·‖ over features: (a, b, *features) → (a, b) float64."""
        block = block.astype(np.float64)
        axes = tuple(range(2, block.ndim))
        return np.sqrt((block * block).sum(axis=axes)) if axes else block

    def _check_there(self, missing: int) -> None:
        """Refuse a complete store of which objects are gone: they read as NaN."""
        if missing and self.facts.state == "complete":
            raise CorruptStoreError(
                f"{self.layout.name!r} of {self.facts.location.url} is complete, and scores of it are gone; "
                "verify(store) names what is damaged"
            )

    # -- which rows ---------------------------------------------------------------------
    def positions(self, asked: Sequence[Any]) -> list[int]:
        """Rows of the ids ``asked``, which may be given as text.

        Raises
        ------
        ConfigurationError
            There is no such row.
        """
        by_id = self._row_places
        by_text = {str(one): at for one, at in by_id.items()}
        found = []
        for one in asked:
            at = by_id.get(one) if not isinstance(one, str) or one in by_id else by_text.get(one)
            if at is None:
                few = ", ".join(map(str, self.row_ids[:5]))
                raise ConfigurationError(
                    f"tests: {one!r} is not in {self.facts.location.url}, which holds {len(self.row_ids):,} "
                    f"{self.layout.rows} ids: {few}{' …' if len(self.row_ids) > 5 else ''}"
                )
            found.append(at)
        return list(dict.fromkeys(found))

    def harmed(self, count: int) -> list[int]:
        """The rows with the lowest scores among those sampled, or in the lists: where there is most to explain."""
        if self.layout.listed:
            lowest = Stored(self.facts, f"{SIDES[1]}_score").read(slice(None), slice(0, 1))[:, 0]
            order = np.argsort(lowest, kind="stable")
            return [int(row) for row in order[:count] if not np.isnan(lowest[row])]
        lows = self.sample.lowest
        return sorted(lows, key=lambda row: (lows[row], row))[:count]

    # -- lists --------------------------------------------------------------------------
    def ranked(self, rows: Sequence[int], top: int) -> list[Ranked]:
        """The ``top`` strongest of either side, for each of the ``rows``."""
        if self.layout.listed:
            return self._listed(rows, top)
        values, columns = self._rows(rows)
        return [self._sorted(row, own, columns, top) for row, own in zip(rows, values, strict=True)]

    def _blocks(self, rows: Sequence[int]) -> list[slice]:
        """Blocks of columns, whole chunks each; evenly drawn where the chunks that ``rows`` cross are too many."""
        stored = self._stored
        deep, wide = min(stored.chunks[0], stored.shape[0]), stored.chunks[1]
        width = math.prod(stored.shape[2:]) * stored.dtype.itemsize
        step = wide * max(1, BLOCK_BYTES // max(1, deep * wide * width))
        count = -(-stored.shape[1] // step)
        crossed = len({row // stored.chunks[0] for row in rows}) * deep * step * width
        drawn = np.unique(
            np.linspace(0, count - 1, max(1, min(count, ROW_BYTES // crossed))).round().astype(int)
        )
        self.columns_read = len(drawn) / count
        return [slice(int(at) * step, min(int(at + 1) * step, stored.shape[1])) for at in drawn]

    def _rows(self, rows: Sequence[int]) -> tuple[Array, Array]:
        """(len(rows), columns read) strengths, and positions of those columns."""
        if not rows:
            return np.empty((0, 0)), np.empty(0, dtype=np.int64)
        order = np.argsort(rows)  # one chunk is read once, for all rows in it
        listed, blocks = np.asarray(rows)[order], self._blocks(rows)
        parts = [self._strength(self._stored.read(listed, block)) for block in blocks]
        values = np.concatenate(parts, axis=1)[np.argsort(order)]
        return values, np.concatenate([np.arange(block.start, block.stop) for block in blocks])

    def _sorted(self, row: int, values: Array, columns: Array, top: int) -> Ranked:
        held = np.flatnonzero(~np.isnan(values))
        self._check_there(len(values) - len(held))
        order = held[np.argsort(-values[held], kind="stable")]

        def entry(at: int) -> Scored:
            column = int(columns[at])
            return Scored(self.column_id(column), float(values[at]), column)

        best = tuple(entry(int(at)) for at in order[:top])
        worst = () if self.layout.features else tuple(entry(int(at)) for at in order[::-1][:top])
        return Ranked(self.row_ids[row], row, best, worst, values[held], len(values) - len(held))

    def _listed(self, rows: Sequence[int], top: int) -> list[Ranked]:
        sides = {}
        for side in SIDES:
            scores, ids = (Stored(self.facts, f"{side}_{of}") for of in ("score", self.layout.columns))
            box = (np.asarray(rows, dtype=np.int64), slice(0, top))
            sides[side] = (
                (scores.read(*box), ids.read(*box)) if len(rows) else (np.empty((0, 0)), np.empty((0, 0)))
            )
        found = []
        for at, row in enumerate(rows):
            best, worst = (self._entries(*(part[at] for part in sides[side])) for side in SIDES)
            lacking = min(top, self._stored.shape[1]) - len(best)
            found.append(Ranked(self.row_ids[row], row, best, worst, None, lacking))
        return found

    def _entries(self, scores: Array, ids: Array) -> tuple[Scored, ...]:
        return tuple(
            Scored(one, float(score), self._places.get(one))
            for score, one in zip(scores.tolist(), ids.tolist(), strict=True)
            if not math.isnan(score)
        )

    def features_of(self, row: int, column: int) -> Array:
        """The perturbation scores of one pair, (*features)."""
        return self._stored.read(slice(row, row + 1), slice(column, column + 1))[0, 0].astype(np.float64)


def known_ids(facts: Facts, side: str, given: dict[str, Array]) -> Array | None:
    """Ids of ``side`` from the store, those given, or positions where these were the ids; else None.

    Raises
    ------
    DataError
        Those given are not the run's.
    CorruptStoreError
        Those in the store are not: where the object that holds them is gone, they read as zeros.
    """
    own = given.get(side)
    written = facts.fingerprint.get(f"{side}_ids")
    if own is not None and written is not None and digest_of(own) != written:
        raise DataError(f"{side}_ids are not those of the run that wrote {facts.location.url}; give the same")
    if side in facts.dataset.coords:
        held = np.asarray(facts.dataset[side].values)
        if written is not None and digest_of(held) != written:
            raise CorruptStoreError(
                f"{side!r} of {facts.location.url} is not what was written; verify(store) names what is damaged"
            )
        return held
    if own is not None:
        return own
    count = {"test": facts.plan.work.tests, "train": facts.plan.work.trains}.get(side, 0)
    positions = np.arange(count)
    return positions if count and digest_of(positions) == written else None


# -- every training point on itself ----------------------------------------------------------
@dataclass(frozen=True)
class Own:
    """Influence of training points on themselves.

    Attributes
    ----------
    values : numpy array
        (M,) NaN where missing.
    ids : numpy array
        (M,)
    """

    values: Array
    ids: Array

    @classmethod
    def of(cls, facts: Facts) -> Own | None:
        """Of a store that holds them, else None."""
        if OWN not in facts.dataset:
            return None
        return cls(
            Stored(facts, OWN).read(slice(None)).astype(np.float64), np.asarray(facts.dataset["train"].values)
        )

    def id_of(self, position: int) -> Any:
        """Id of a training point."""
        return _plain(self.ids[position])

    def largest(self, count: int) -> list[Scored]:
        """The points that the model relies on most to get themselves right."""
        held = np.flatnonzero(~np.isnan(self.values))
        order = held[np.argsort(-self.values[held], kind="stable")][:count]
        return [Scored(self.id_of(int(at)), float(self.values[at]), int(at)) for at in order]


def _plain(one: Any) -> Any:
    """An id as a Python number or text."""
    return one.item() if isinstance(one, np.generic) else one


@dataclass(frozen=True)
class Signal:
    """Something that copies of a sample have in common, (M,), and how far rounding may set them apart.

    Attributes
    ----------
    values : numpy array
        NaN where nothing is known.
    floor : float
        What is added to the relative tolerance.
    """

    values: Array
    floor: float = 0.0


def twins(signals: Sequence[Signal], tolerance: float, largest: int = 20) -> list[tuple[int, ...]]:
    """Groups of positions that no signal tells apart: candidates for duplicates, in the order of the data.

    Copies of a sample have equal gradients, hence equal scores up to rounding. Runs of neighbours that are close by
    one signal are split by the next one; groups of more than ``largest`` are taken for values that crowd.

    Parameters
    ----------
    signals : sequence of Signal
        One or more, of one length.
    tolerance : float
        Relative to the values.

    Examples
    --------
    >>> own, row = np.array([0.5, 2.0, 0.5000001, 0.5]), np.array([1.0, 7.0, 1.0, -3.0])
    >>> twins([Signal(own)], 1e-6), twins([Signal(own), Signal(row)], 1e-6)
    ([(0, 2, 3)], [(0, 2)])
    """
    held = np.flatnonzero(~np.isnan(np.stack([signal.values for signal in signals])).any(axis=0))
    held = held[signals[0].values[held] != 0]  # of samples without a gradient nothing can be said
    labels = np.zeros(len(held), dtype=np.int64)
    for signal in signals:
        values = signal.values[held]
        order = np.lexsort((values, labels))
        values, ordered = values[order], labels[order]
        apart = np.diff(values) > tolerance * np.abs(values[1:]) + signal.floor
        fresh = (
            np.cumsum(np.concatenate([[False], apart | (np.diff(ordered) != 0)])) if len(held) else ordered
        )
        labels[order] = fresh
    sizes = np.bincount(labels, minlength=1)
    crowded = np.flatnonzero((sizes > 1) & (sizes <= largest))
    members = np.isin(labels, crowded)
    groups: dict[int, list[int]] = {}
    for label, position in zip(labels[members].tolist(), held[members].tolist(), strict=True):
        groups.setdefault(label, []).append(position)
    return sorted(map(tuple, groups.values()))
