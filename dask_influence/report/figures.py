"""Figures of what a store holds, on matplotlib axes: each takes what ``open_influences`` returns.

They draw on the axes given, or on new ones, and return them. Nothing of N × M is ever loaded: the
distribution is that of all scores of a small store, and of evenly drawn chunks of a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import xarray as xr

from dask_influence.errors import ConfigurationError
from dask_influence.execution.ledger import Ledger
from dask_influence.report.facts import Array, Effort
from dask_influence.report.palette import HARMS, HELPS, LINE, QUIET
from dask_influence.report.scores import GROUPS, OWN, SCORES, drawn_boxes
from dask_influence.scalars import check_integer
from dask_influence.storage.stores import Location

Axes = Any
"""matplotlib.axes.Axes, which is imported when a figure is drawn."""

MOST_POINTS = 400
"""Of a curve: as many as can be told apart."""


# -- scores --------------------------------------------------------------------------------
def score_distribution(dataset: xr.Dataset, *, bins: int = 60, ax: Axes | None = None) -> Axes:
    """Histogram of scores, on an axis that is linear near zero and logarithmic beyond.

    Parameters
    ----------
    dataset : xarray.Dataset
        Scores of pairs, or sums over groups, at one λ: ``open_influences(store)``. Up to 32 MiB are read; in
        perturbation mode the norm of each pair's scores is shown.
    bins : int
        Of equal width on that axis, at most; fewer where there are few scores.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Those drawn on.

    Raises
    ------
    ConfigurationError
        The dataset holds no scores of pairs, or several λ.

    Examples
    --------
    >>> scores = xr.Dataset({"influence": (("test", "train"), np.linspace(-1, 3, 20).reshape(4, 5))})
    >>> score_distribution(scores).get_xlabel()
    'score'
    """
    array = _one_regularization(dataset)[_named(dataset, SCORES, GROUPS)]
    cut = _chunks(array)
    blocks = [
        array[box].values.astype(np.float64) for box in drawn_boxes(array.shape, cut, array.dtype.itemsize)
    ]
    if array.ndim > 2:
        blocks = [np.linalg.norm(block.reshape(*block.shape[:2], -1), axis=-1) for block in blocks]
    values = np.concatenate([block.ravel() for block in blocks])
    return histogram(
        _axes(ax), values, bins=bins, label="score" if array.ndim == 2 else "‖score‖ over features"
    )


def histogram(
    ax: Axes, values: Array, *, bins: int = 60, label: str = "score", marks: Sequence[float] = ()
) -> Axes:
    """:func:`score_distribution` of values that are at hand, with ``marks`` below it."""
    values = values[np.isfinite(values)]
    ax.set_xlabel(label)
    ax.set_ylabel("share")
    if len(values) == 0:
        ax.set_axis_off()
        ax.text(0.5, 0.5, "no scores are there yet", ha="center", va="center", transform=ax.transAxes)
        return ax
    # linear up to the median size; then equal steps are equal factors
    scale = float(np.median(np.abs(values))) or float(np.abs(values).max()) or 1.0
    low, high = (float(np.arcsinh(end / scale)) for end in (values.min(), values.max()))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    bins = min(bins, 10 + 2 * math.isqrt(len(values)))
    edges = scale * np.sinh(np.linspace(low, high, bins + 1))
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
    counts, _ = np.histogram(values, edges)
    shares, middles = counts / len(values), (edges[:-1] + edges[1:]) / 2
    ax.set_xscale("asinh", linear_width=scale)
    for side, colour in ((middles < 0, HARMS), (middles >= 0, HELPS)):
        ax.stairs(np.where(side, shares, 0.0), edges, fill=True, color=colour, linewidth=0)
    for mark in marks:
        ax.plot([mark], [0], marker="^", markersize=5, clip_on=False, color=HELPS if mark >= 0 else HARMS)
    _ticks(ax, edges[0], edges[-1], scale)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(_few())
    return ax


def top_scores(dataset: xr.Dataset, test: Any, *, count: int = 10, ax: Axes | None = None) -> Axes:
    """The most helpful and the most harmful training points of one test point, as bars.

    Parameters
    ----------
    dataset : xarray.Dataset
        All scores (test, train), or those of ``TopK``, at one λ.
    test : int or str
        Id of the test point.
    count : int
        Of either side.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Those drawn on.

    Raises
    ------
    ConfigurationError
        There is no such test point, or no lists of training points.

    Examples
    --------
    >>> scores = xr.Dataset(
    ...     {"influence": (("test", "train"), [[3.0, -1.0, 2.0]])}, coords={"test": [7], "train": ["a", "b", "c"]}
    ... )
    >>> [text.get_text() for text in top_scores(scores, 7, count=1).get_yticklabels()]
    ['b', 'a']
    """
    count = check_integer("count", count)
    one = _one_regularization(dataset)
    if "test" not in one.dims or test not in one["test"].values:
        raise ConfigurationError(f"test={test!r} is not among the test points of the dataset")
    row = one.sel(test=test)
    if SCORES in row and row[SCORES].dims == ("train",):
        scores = row[SCORES].load().dropna("train")
        order = np.argsort(-scores.values, kind="stable")
        chosen = np.unique(np.concatenate([order[:count], order[::-1][:count]]))
        names, values = scores["train"].values[chosen], scores.values[chosen]
    elif "helpful_train" in row:
        row = row.isel(rank=slice(0, count)).load()
        names = np.concatenate([row[f"{side}_train"].values for side in ("helpful", "harmful")])
        values = np.concatenate([row[f"{side}_score"].values for side in ("helpful", "harmful")])
        names, values = names[~np.isnan(values)], values[~np.isnan(values)]
    else:
        raise ConfigurationError(
            "the dataset holds no scores of single training points for single test points"
        )
    order = np.argsort(values, kind="stable")
    names, values = names[order], values[order]
    ax = _axes(ax)
    places = np.arange(len(values))
    ax.barh(places, values, color=np.where(values >= 0, HELPS, HARMS))
    ax.set_yticks(places, [_plain(name) for name in names])
    ax.axvline(0, color=QUIET, linewidth=0.8)
    ax.set_xlabel(f"score for test point {_plain(test)}")
    return ax


# -- certificates --------------------------------------------------------------------------
def spectrum(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the curvature as the estimator knows them, beside λ.

    All that a sketch kept, by size; or from the smallest to the largest of each layer or block, or of the whole.

    Parameters
    ----------
    dataset : xarray.Dataset
        Of a finished run: its ``diagnostics`` are among the attributes.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Those drawn on.

    Raises
    ------
    ConfigurationError
        The store says nothing of eigenvalues.

    Examples
    --------
    >>> known = {"eigenvalues": [5.0, 1.0, -0.1], "hessian_regularization": 0.01}
    >>> spectrum(xr.Dataset(attrs={"diagnostics": known})).get_yscale()
    'log'
    """
    known = dataset.attrs.get("diagnostics", {})
    damping = dataset.attrs.get("hessian_regularization", known.get("hessian_regularization"))
    damping = damping if isinstance(damping, int | float) and damping > 0 else None
    if known.get("eigenvalues"):
        return _eigenvalues(_axes(ax), np.asarray(known["eigenvalues"], dtype=np.float64), damping)
    ranges = eigenvalue_ranges(known)
    if not ranges:
        raise ConfigurationError("the attributes of the dataset hold no diagnostics with eigenvalues")
    return _ranges(_axes(ax), ranges, damping)


def _eigenvalues(ax: Axes, values: Array, damping: float | None) -> Axes:
    values = values[np.argsort(-np.abs(values), kind="stable")]
    ranks = np.arange(1, len(values) + 1)
    for side, colour, label in ((values > 0, HELPS, "positive"), (values < 0, HARMS, "negative")):
        if side.any():
            ax.plot(ranks[side], np.abs(values[side]), ".", color=colour, label=label)
    ax.set_yscale("log")
    if damping is not None:
        ax.axhline(damping, color=QUIET, linestyle="--", linewidth=1)
        ax.annotate(
            f"λ = {damping:g}", (1, damping), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    if (values < 0).any():
        ax.legend()
    ax.set_xlabel("eigenvalue, by size")
    ax.set_ylabel("|eigenvalue|")
    _plain_decades(ax.yaxis)
    return ax


def eigenvalue_ranges(known: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Smallest and largest eigenvalue of each layer or block, or of the whole; empty where neither is known."""
    parts = known.get("layers") or known.get("blocks") or {"all parameters": known}
    ends = ("smallest_eigenvalue", "largest_eigenvalue")
    return {
        name: (float(part[ends[0]]), float(part[ends[1]]))
        for name, part in parts.items()
        if all(isinstance(part.get(end), int | float) for end in ends)
    }


def _ranges(ax: Axes, ranges: Mapping[str, tuple[float, float]], damping: float | None) -> Axes:
    names = list(ranges)[:MOST_ROWS]
    largest = max(high for _, high in ranges.values())
    linear = damping or 1e-6 * (largest or 1.0)
    for place, name in enumerate(names):
        low, high = ranges[name]
        ax.plot(
            [low, high],
            [place, place],
            "-|",
            color=HELPS if low + (damping or 0.0) > 0 else HARMS,
            linewidth=2,
        )
    ax.set_xscale("asinh", linear_width=linear)
    _ticks(ax, min(0.0, *(low for low, _ in ranges.values())), largest, linear)
    if damping is not None:
        ax.axvline(damping, color=QUIET, linestyle="--", linewidth=1)
        offset: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "ha": "left", "va": "top"}
        ax.annotate(f"λ = {damping:g}", (damping, 1), xycoords=("data", "axes fraction"), **offset)
    ax.set_yticks(range(len(names)), [_plain(name) for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6 - 0.04 * len(names))
    left = len(ranges) - len(names)
    ax.set_xlabel("eigenvalue" + (f" ({left} more not shown)" if left else ""))
    return ax


MOST_ROWS = 12
"""Layers or blocks in one figure."""


def residuals(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Histogram of ‖(H + λI)s − g‖ / ‖g‖ over test points: how well each system was solved.

    Parameters
    ----------
    dataset : xarray.Dataset
        With ``factor_residual``, at one λ.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Those drawn on.

    Raises
    ------
    ConfigurationError
        There are none.

    Examples
    --------
    >>> solved = xr.Dataset(coords={"factor_residual": ("test", [1e-7, 2e-6, 5e-6])})
    >>> residuals(solved).get_xlabel()
    'relative residual'
    """
    one = _one_regularization(dataset)
    values = np.asarray(
        one["factor_residual"].values if "factor_residual" in one.variables else [], dtype=np.float64
    )
    values = values[np.isfinite(values)]
    if len(values) == 0:
        raise ConfigurationError("the dataset holds no residuals of factors")
    ax = _axes(ax)
    least = values[values > 0].min() if (values > 0).any() else 1e-16
    logs = np.log10(np.maximum(values, least))  # an exact zero is as good as the best of the others
    low, high = logs.min(), logs.max()
    low, high = (low - 0.5, high + 0.5) if high - low < 0.5 else (low, high)
    counts, edges = np.histogram(logs, np.linspace(low, high, min(30, 5 + 2 * math.isqrt(len(logs))) + 1))
    ax.stairs(counts, 10**edges, fill=True, color=HELPS, linewidth=0)
    ax.set_xscale("log")
    ax.set_xlabel("relative residual")
    ax.set_ylabel("test points")
    ax.yaxis.set_major_locator(_few(integer=True))
    _plain_decades(ax.xaxis)
    return ax


# -- every training point on itself, and the run ----------------------------------------------
def self_influence(dataset: xr.Dataset, *, ax: Axes | None = None) -> Axes:
    """Influence of training points on themselves, the largest first: a steep start are points unlike the others.

    Parameters
    ----------
    dataset : xarray.Dataset
        What ``reduce=SelfInfluence()`` left, at one λ.
    ax : matplotlib.axes.Axes, optional
        Where to draw.

    Returns
    -------
    matplotlib.axes.Axes
        Those drawn on.

    Raises
    ------
    ConfigurationError
        The dataset holds none.

    Examples
    --------
    >>> own = xr.Dataset({"self_influence": ("train", [0.5, 4.0, 1.0])})
    >>> self_influence(own).lines[0].get_ydata().tolist()
    [4.0, 1.0, 0.5]
    """
    values = _one_regularization(dataset)[_named(dataset, OWN)].values.astype(np.float64)
    return ranked_curve(_axes(ax), values)


def ranked_curve(ax: Axes, values: Array) -> Axes:
    """:func:`self_influence` of values that are at hand."""
    values = np.sort(values[np.isfinite(values)])[::-1]
    ranks = np.arange(1, len(values) + 1)
    if len(values) > MOST_POINTS:
        kept = np.unique(np.geomspace(1, len(values), MOST_POINTS).astype(int)) - 1
        ranks, values = ranks[kept], values[kept]
    ax.plot(ranks, values, color=HELPS, marker="." if len(values) < 40 else "", linewidth=1.8)
    ax.set_xscale("log")
    if len(values) and values.min() > 0 and values[0] > 20 * values[-1]:
        ax.set_yscale("log")
        _plain_decades(ax.yaxis)
    _plain_decades(ax.xaxis)
    ax.set_xlabel("training points, by self influence")
    ax.set_ylabel("self influence")
    return ax


def timing(
    store: str | PathLike[str] | Location,
    *,
    ax: Axes | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Axes:
    """Pieces of work that were being done at each time, from the ledger of a store.

    Parameters
    ----------
    store : path or URL
        What a run wrote, or is writing; its ledger is no part of the dataset.
    ax : matplotlib.axes.Axes, optional
        Where to draw.
    storage_options : mapping, optional
        Credentials and client settings.

    Returns
    -------
    matplotlib.axes.Axes
        Those drawn on.

    Raises
    ------
    ConfigurationError
        Nothing that is timed has been done there.

    Examples
    --------
    >>> place = Location.of("memory://timing-example")
    >>> for at, ended in enumerate((1002.0, 1003.0)):
    ...     Ledger(place).record(f"strip-{at}", {"seconds": 2.0, "ended": ended, "worker": "a"})
    >>> timing(place).get_ylabel()
    'tasks at work'
    """
    effort = Effort.of(Ledger(Location.of(store, storage_options)))
    if len(effort.seconds) == 0:
        raise ConfigurationError(f"{Location.of(store).url} tells of no work that is done")
    return work_curve(_axes(ax), effort)


def work_curve(ax: Axes, effort: Effort) -> Axes:
    """:func:`timing` of a ledger that has been read; seconds of tasks where it does not say when they ended."""
    curve = effort.at_work()
    if curve is None:
        ax.hist(effort.seconds, bins=30, color=HELPS)
        ax.set_xlabel("seconds of a task")
        ax.set_ylabel("tasks")
        return ax
    edges, working = curve
    unit, size = next((u, s) for u, s, limit in UNITS if edges[-1] < limit)
    ax.stairs(working, edges / size, fill=True, color=HELPS, linewidth=0)
    ax.axhline(len(effort.workers), color=LINE, linewidth=1)
    ax.set_xlim(0, edges[-1] / size)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(_few())
    ax.set_xlabel(f"{unit} since the first task began")
    ax.set_ylabel("tasks at work")
    ax.yaxis.set_major_locator(_few())
    return ax


UNITS = (("seconds", 1, 180), ("minutes", 60, 10_800), ("hours", 3600, math.inf))


# -- axes and ticks ------------------------------------------------------------------------
def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(5.2, 3.4), layout="constrained").subplots()


def _one_regularization(dataset: xr.Dataset) -> xr.Dataset:
    if "regularization" in dataset.dims:
        raise ConfigurationError(
            f"the dataset holds {dataset.sizes['regularization']} λ; choose one: dataset.sel(regularization=…)"
        )
    return dataset


def _named(dataset: xr.Dataset, *names: str) -> str:
    for name in names:
        if name in dataset:
            return name
    held = ", ".join(map(str, dataset.data_vars)) or "nothing"
    raise ConfigurationError(f"the dataset holds {held}; this figure shows {' or '.join(names)}")


def _chunks(array: xr.DataArray) -> tuple[int, ...]:
    """Stored chunks of the first two axes, features whole."""
    stored = array.encoding.get("chunks") or array.shape
    return (*stored[len(stored) - array.ndim :][:2], *array.shape[2:])


def _few(*, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(3, integer=integer)


def _ticks(ax: Axes, low: float, high: float, scale: float) -> None:
    """Zero and a few powers of ten on either side."""
    ticks = [0.0] if low <= 0 <= high else []
    for sign, end in ((-1, -low), (1, high)):
        if end > scale / 10:
            top = math.floor(math.log10(end))
            bottom = max(math.ceil(math.log10(scale)), top - 3)
            step = max(1, top - bottom)
            ticks += [sign * 10.0**power for power in range(top, bottom - 1, -step)]
    from matplotlib.ticker import NullLocator

    ticks = sorted(set(ticks))
    ax.set_xticks(ticks, [power_of_ten(tick) for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())


def _plain_decades(axis: Any) -> None:
    """Labels of a logarithmic axis as text that every font has; few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axis.set_minor_locator(NullLocator())


def power_of_ten(value: float) -> str:
    """A round number in few characters.

    >>> [power_of_ten(v) for v in (0.0, 1e-5, -0.1, 300.0, 1e6)]
    ['0', '10⁻⁵', '−0.1', '300', '10⁶']
    """
    if value == 0:
        return "0"
    size, sign = abs(value), "−" if value < 0 else ""
    power = round(math.log10(size))
    if 1e-3 < size < 1e5 or not math.isclose(size, 10.0**power, rel_tol=1e-6):
        return f"{sign}{size:g}"
    return f"{sign}10{str(power).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _plain(text: Any) -> str:
    """Ids as they are: a dollar sign begins no formula."""
    return str(text).replace("$", r"\$")
