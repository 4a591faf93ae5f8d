"""Reductions: what is kept of the scores where all N × M of them are too many.

Each is computed while the tiles are, on the workers, and equals the same reduction of the full
tensor; no tile is stored. A new one is a :class:`~dask_influence.execution.reducer.Reduction`
here and a line among the exports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from dask_influence.arguments import digest_of, labels_of
from dask_influence.errors import ConfigurationError, DataError
from dask_influence.execution.reducer import Array, Part, Reducer, Reduction, Scores
from dask_influence.execution.tree import Axis
from dask_influence.scalars import check_integer
from dask_influence.storage.results import ArrayTemplate, fill_of

SIDES = ("helpful", "harmful")


def check_reduction(reduce: object) -> Reduction | None:
    """``reduce=`` as it is, or a ConfigurationError that names what it may be.

    >>> check_reduction("topk")
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: reduce must be None (keep every score), TopK(k), SelfInfluence() or \
GroupSum(labels); got 'topk'
    """
    if reduce is None or isinstance(reduce, Reduction):
        return reduce
    raise ConfigurationError(
        "reduce must be None (keep every score), TopK(k), SelfInfluence() or GroupSum(labels); "
        f"got {reduce!r}"
    )


# -- the most helpful and the most harmful ------------------------------------------------
@dataclass(frozen=True, repr=False)
class TopK(Reduction):
    """The k most helpful and the k most harmful training points of each test point.

    Writes ``helpful_score`` and ``harmful_score`` (test, rank) and the ids of those training points,
    ``helpful_train`` and ``harmful_train`` (test, rank), rank 0 being the largest score, or the smallest.
    Of equal scores the one of the lower position comes first. Scores are listed whatever their
    sign: with fewer than k positive ones, ``helpful`` ends with scores ≤ 0. Samples that are missing are in no
    list; where fewer than k are left, lists end with NaN and the id −1, NaN or "". With ``per="train"`` the
    sides change: (train, rank), and ids of test points.

    Parameters
    ----------
    k : int
        Points of each kind, at most as many as there are.
    per : "test" or "train"
        Whose lists these are.

    Raises
    ------
    ConfigurationError
        k is no integer ≥ 1, or larger than the number of points; ``per`` is something else; the
        mode is perturbation, whose scores are vectors and have no order.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import DirectInfluence, TopK
    >>> model, x = torch.nn.Linear(1, 1, bias=False).double(), torch.tensor([[1.0], [2.0], [-3.0]]).double()
    >>> weight, y = torch.nn.init.zeros_(model.weight), torch.ones(3, 1).double()
    >>> infl = DirectInfluence(model, torch.nn.functional.mse_loss).fit((x, y))
    >>> best = infl.influences_to_zarr("memory://top-example", (x[:1], y[:1]), (x, y), reduce=TopK(2))
    >>> best.helpful_train.values.tolist(), best.harmful_train.values.tolist()
    ([[1, 0]], [[2, 0]])
    """

    k: int
    per: Literal["test", "train"] = "test"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_integer("k", self.k))
        if self.per not in ("test", "train"):
            raise ConfigurationError(f'per must be "test" or "train"; got {self.per!r}')

    def __repr__(self) -> str:
        return f"TopK({self.k})" if self.per == "test" else f'TopK({self.k}, per="train")'

    @property
    def _listed(self) -> str:
        return "train" if self.per == "test" else "test"

    def bind(self, scores: Scores) -> Reducer:
        """The reducer, for scores that are numbers and at least k."""
        if scores.features:
            raise ConfigurationError(
                f"reduce={self!r} orders scores, and those of mode 'perturbation' are arrays of shape "
                f"{scores.features}; use mode='up', or reduce=GroupSum(labels)"
            )
        count = {"test": scores.tests, "train": scores.trains}
        if self.k > count[self._listed]:
            points = {"test": "test", "train": "training"}[self._listed]
            raise ConfigurationError(
                f"reduce={self!r} asks for {self.k} {points} points, and there are {count[self._listed]}; "
                f"k ≤ {count[self._listed]} fits"
            )
        ids = scores.ids[self._listed]
        text = ids.dtype.kind not in "iuf"
        id_dtype = np.dtypes.StringDType() if text else ids.dtype
        return _Top(self.per, self.k, count[self.per], scores.dtype, self._listed, id_dtype)

    def identity(self) -> dict[str, Any]:
        """Its arguments."""
        return {"kind": "TopK", "k": self.k, "per": self.per}

    def tables(self, scores: Scores) -> dict[str, Array]:
        """Ids of the points listed, where they are not their positions."""
        ids = scores.ids[self._listed]
        positions = ids.dtype.kind in "iu" and np.array_equal(ids, np.arange(len(ids)))
        return {} if positions else {"ids": ids}


@dataclass(frozen=True)
class _Top(Reducer):
    """Parts hold, for each side, scores and positions (λ, kept, ≤ k), the best first."""

    per: Literal["test", "train"]
    k: int
    count: int
    dtype: np.dtype[Any]
    listed: str
    id_dtype: np.dtype[Any]

    @property
    def axis(self) -> Axis:
        return self.per

    @property
    def arrays(self) -> dict[str, ArrayTemplate]:
        dims, shape = (self.per, "rank"), (self.count, self.k)
        found = {}
        for side in SIDES:
            found[f"{side}_score"] = ArrayTemplate(dims, shape, shape, self.dtype)
            found[f"{side}_{self.listed}"] = ArrayTemplate(dims, shape, shape, self.id_dtype)
        return found

    def partial(self, scores: Array, rows: Array, columns: Array, tables: Mapping[str, Array]) -> Part:
        if self.per == "train":
            scores, listed = scores.swapaxes(1, 2), rows
        else:
            listed = columns
        shape = (*scores.shape[:2], min(self.k, scores.shape[2]))
        lists = np.ascontiguousarray(scores).reshape(shape[0] * shape[1], scores.shape[2])
        part = {}
        for side, sign in zip(SIDES, (1, -1), strict=True):
            best, at = largest(lists if sign > 0 else -lists, self.k)
            part[f"{side}_score"] = (sign * best).reshape(shape)
            part[f"{side}_at"] = listed[at].reshape(shape)
        return part

    def merge(self, first: Part, second: Part) -> Part:
        part = {}
        for side, sign in zip(SIDES, (1, -1), strict=True):
            scores, at = (
                np.concatenate([first[f"{side}_{of}"], second[f"{side}_{of}"]], axis=2)
                for of in ("score", "at")
            )
            order = np.argsort(-sign * scores, axis=2, kind="stable")[..., : self.k]
            part[f"{side}_score"] = np.take_along_axis(scores, order, axis=2)
            part[f"{side}_at"] = np.take_along_axis(at, order, axis=2)
        return part

    def finish(self, part: Part, tables: Mapping[str, Array]) -> Part:
        ids = tables.get("ids")
        found = {}
        for side in SIDES:
            at = part[f"{side}_at"]
            found[f"{side}_score"] = self._filled(part[f"{side}_score"], self.dtype)
            named = (at if ids is None else ids[at]).astype(self.id_dtype)
            found[f"{side}_{self.listed}"] = self._filled(named, self.id_dtype)
        return found

    def _filled(self, lists: Array, dtype: np.dtype[Any]) -> Array:
        """Lists of k, where so many samples are missing that there are fewer."""
        lacking = self.k - lists.shape[2]
        if not lacking:
            return lists
        nothing = np.full((*lists.shape[:2], lacking), fill_of(dtype), dtype=dtype)
        return np.concatenate([lists, nothing], axis=2)


def largest(scores: Array, k: int) -> tuple[Array, Array]:
    """The k largest of each row of ``scores`` (n, m), or all m, and where they are; both (n, min(k, m)).

    The largest comes first; of equal ones the first. An eighth of each row sets the bar that the
    rest must clear, so that most of it is looked at once.

    Examples
    --------
    >>> best, at = largest(np.array([[3.0, 5.0, 3.0, 4.0]]), 3)
    >>> best.tolist(), at.tolist()
    ([[5.0, 4.0, 3.0]], [[1, 3, 0]])
    """
    width = scores.shape[1]
    cut = max(width // 8, 4 * k)
    if width <= 2 * cut:
        return _selected(scores, k)
    best, at = _selected(scores[:, :cut], k)
    rest = scores[:, cut:]
    clear = rest > best[:, -1:]  # one that equals the bar comes after it
    most = int(clear.sum(axis=1).max())
    if most == 0:
        return best, at
    if most > rest.shape[1] // 2:  # rows that rise: the bar holds nothing back
        return _selected(scores, k)
    more, where = _gathered(rest, clear, most, cut)
    best, at = np.concatenate([best, more], axis=1), np.concatenate([at, where], axis=1)
    best, chosen = _selected(best, k)
    return best, np.take_along_axis(at, chosen, axis=1)


def _selected(scores: Array, k: int) -> tuple[Array, Array]:
    """:func:`largest` by the k-th largest of each row."""
    width = scores.shape[1]
    if width > k:
        bar = np.partition(scores, width - k, axis=1)[:, width - k, None]
        chosen, level = scores > bar, scores == bar
        wanted = k - chosen.sum(axis=1, keepdims=True)
        chosen |= level & (np.cumsum(level, axis=1) <= wanted)
        at = (np.flatnonzero(chosen) % width).reshape(-1, k)
        scores = np.take_along_axis(scores, at, axis=1)
    else:
        at = np.broadcast_to(np.arange(width), scores.shape)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(at, order, axis=1)


def _gathered(scores: Array, chosen: Array, most: int, first: int) -> tuple[Array, Array]:
    """The ``chosen`` of each row, padded with -inf to ``most``, and where they are, counted from ``first``."""
    flat = np.flatnonzero(chosen)
    row, column = np.divmod(flat, scores.shape[1])
    counts = np.bincount(row, minlength=len(scores))
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    best = np.full((len(scores), most), -math.inf, dtype=scores.dtype)
    at = np.zeros((len(scores), most), dtype=np.int64)
    best[row, place], at[row, place] = scores[row, column], column + first
    return best, at


# -- sums over groups ---------------------------------------------------------------------
class GroupSum(Reduction):
    """Sums of scores over groups of training points, of test points, or of both.

    Writes ``group_influence``: Σ_j score[i, j] over the training points j of each group, (test, group);
    with ``test_labels`` alone over test points, (test_group, train); with both, (test_group,
    group). Perturbation scores keep their axes of features. Sums are float64, in an order that depends on the plan
    alone. Coordinates ``group`` and ``test_group`` are the sorted labels. Influence adds up over
    training points: to first order, the sum over a group is the influence of the group.

    Parameters
    ----------
    labels : sequence of int or str, optional
        Group of each training point, length M; its class, its source, its annotator.
    test_labels : sequence of int or str, optional
        Group of each test point, length N.

    Raises
    ------
    ConfigurationError
        Neither is given.
    DataError
        Labels are of another kind, not one for each point, or NaN.

    Examples
    --------
    >>> GroupSum(["cat", "dog", "cat"])
    GroupSum(2 groups)
    >>> GroupSum([0, 1, 0], test_labels=["a", "b"])
    GroupSum(2 groups, 2 test groups)
    """

    def __init__(self, labels: Any = None, *, test_labels: Any = None) -> None:
        if labels is None and test_labels is None:
            raise ConfigurationError(
                "GroupSum needs labels (the group of each training point), test_labels (of each test point) or both"
            )
        given = {"train": (labels, "labels"), "test": (test_labels, "test_labels")}
        self._labels = {
            side: _label_array(values, argument)
            for side, (values, argument) in given.items()
            if values is not None
        }
        self._groups = {side: np.unique(values) for side, values in self._labels.items()}

    def __repr__(self) -> str:
        names = {"train": "groups", "test": "test groups"}
        return f"GroupSum({', '.join(f'{len(v)} {names[side]}' for side, v in self._groups.items())})"

    def bind(self, scores: Scores) -> Reducer:
        """The reducer, for as many points as there are labels."""
        count = {"test": scores.tests, "train": scores.trains}
        for side, values in self._labels.items():
            argument, points = {"train": ("labels", "training"), "test": ("test_labels", "test")}[side]
            if len(values) != count[side]:
                raise DataError(
                    f"{argument} must hold one label for each {points} point, {count[side]}; got {len(values)}"
                )
        groups = {side: len(values) for side, values in self._groups.items()}
        return _Sums(groups.get("train"), groups.get("test"), count, scores.features)

    def identity(self) -> dict[str, Any]:
        """Digests of its labels."""
        digests = {f"{side}_labels": digest_of(values) for side, values in self._labels.items()}
        return {"kind": "GroupSum", **digests}

    def tables(self, scores: Scores) -> dict[str, Array]:
        """Group of each point, as its place in the sorted labels."""
        return {
            side: np.searchsorted(self._groups[side], values).astype(np.int32)
            for side, values in self._labels.items()
        }

    def coordinates(self) -> dict[str, Array]:
        """The sorted labels."""
        names = {"train": "group", "test": "test_group"}
        return {names[side]: values for side, values in self._groups.items()}


@dataclass(frozen=True)
class _Sums(Reducer):
    """Parts hold sums (λ, kept, groups, *features), or (λ, 1, test groups, groups, *features)."""

    groups: int | None
    test_groups: int | None
    count: Mapping[str, int]
    features: tuple[int, ...]

    @property
    def axis(self) -> Axis:
        if self.test_groups is None:
            return "test"
        return "train" if self.groups is None else None

    @property
    def arrays(self) -> dict[str, ArrayTemplate]:
        rows = ("test", self.count["test"]) if self.test_groups is None else ("test_group", self.test_groups)
        columns = ("train", self.count["train"]) if self.groups is None else ("group", self.groups)
        names = tuple(f"feature_{axis}" for axis in range(len(self.features)))
        shape = (rows[1], columns[1], *self.features)
        template = ArrayTemplate((rows[0], columns[0], *names), shape, shape, np.dtype(np.float64))
        return {"group_influence": template}

    def partial(self, scores: Array, rows: Array, columns: Array, tables: Mapping[str, Array]) -> Part:
        sums = scores.reshape(*scores.shape[:3], math.prod(self.features))  # (λ, rows, columns, F)
        if self.groups is not None:
            sums = group_sums(sums, tables["train"][columns], self.groups)
        if self.test_groups is not None:
            sums = sums.swapaxes(1, 2)
            sums = group_sums(sums, tables["test"][rows], self.test_groups)
        if self.axis is None:
            sums = sums.swapaxes(1, 2)[:, None]
        return {"sums": sums.reshape(*sums.shape[:-1], *self.features)}

    def merge(self, first: Part, second: Part) -> Part:
        return {"sums": first["sums"] + second["sums"]}

    def finish(self, part: Part, tables: Mapping[str, Array]) -> Part:
        sums = part["sums"]
        if self.axis == "train":
            sums = sums.swapaxes(1, 2)
        return {"group_influence": sums[:, 0] if self.axis is None else sums}


def group_sums(scores: Array, codes: Array, groups: int) -> Array:
    """Σ over the points of each group: (a, b, n, F) and codes (n,) → (a, b, groups, F), float64, in order.

    >>> group_sums(np.array([[[[1.0], [2.0], [4.0]]]]), np.array([1, 0, 1]), 2).tolist()
    [[[[2.0], [5.0]]]]
    """
    width = scores.shape[3]
    index = (codes[:, None].astype(np.int64) * width + np.arange(width)).ravel()
    sums = np.empty((*scores.shape[:2], groups, width))
    for at in np.ndindex(*scores.shape[:2]):
        found = np.bincount(index, weights=scores[at].ravel(), minlength=groups * width)
        sums[at] = found.reshape(groups, width)
    return sums


def _label_array(given: Any, argument: str) -> Array:
    labels = labels_of(given, argument)
    if labels.ndim != 1:
        raise DataError(f"{argument} must have one axis; got shape {labels.shape}")
    # A copy, which the caller cannot change; one kind of text, however it came: labels are compared by their digest.
    return labels.copy() if labels.dtype.kind in "iuf" else labels.astype(str)


# -- every training point on itself --------------------------------------------------------
class SelfInfluence(Reduction):
    """The influence of each training point on itself: gⱼᵀ (C + λI)⁻¹ gⱼ, the diagonal of train × train.

    Writes ``self_influence`` (train): large where the model has to rely on the point itself, so that atypical and
    mislabelled ones come first (Koh & Liang 2017, section 5.4). Each training gradient is formed once, and no
    test data are needed: pass None, or the training data again. Estimators whose factors take passes over the
    data (CG, LiSSA, DataInf) solve one factor for each training point, a block at a time.

    Raises
    ------
    ConfigurationError
        In perturbation mode; and where other test data are given.

    Examples
    --------
    >>> SelfInfluence()
    SelfInfluence()
    """

    diagonal: ClassVar[bool] = True

    def __repr__(self) -> str:
        return "SelfInfluence()"

    def bind(self, scores: Scores) -> Reducer:
        """The reducer, for scores of pairs."""
        if scores.perturbation:
            raise ConfigurationError("reduce=SelfInfluence() is defined for mode='up'; got 'perturbation'")
        return _Diagonal(scores.trains, scores.dtype)

    def identity(self) -> dict[str, Any]:
        """It has no arguments."""
        return {"kind": "SelfInfluence"}


@dataclass(frozen=True)
class _Diagonal(Reducer):
    """Keeps all that it is given."""

    count: int
    dtype: np.dtype[Any]

    @property
    def axis(self) -> Axis:
        return "train"

    @property
    def arrays(self) -> dict[str, ArrayTemplate]:
        return {"self_influence": ArrayTemplate(("train",), (self.count,), (self.count,), self.dtype)}

    def partial(self, scores: Array, rows: Array, columns: Array, tables: Mapping[str, Array]) -> Part:
        return {"self_influence": scores}

    def finish(self, part: Part, tables: Mapping[str, Array]) -> Part:
        return part
