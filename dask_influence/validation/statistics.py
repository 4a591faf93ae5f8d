"""Statistics: correlations by row, areas under curves, and bootstrap intervals of both.

Notation: N test points, S subsets or points left out.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

Interval = tuple[float, float]

Resampled = Callable[[np.ndarray], np.ndarray]
"""How often each column is taken (S,) → the correlation of each row (N,)."""


def pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation of each row of two arrays (N, S): (N,), NaN where a row is constant.

    Examples
    --------
    >>> pearson(np.array([[1.0, 2, 3], [1, 1, 1]]), np.array([[2.0, 4, 6], [1, 2, 3]]))
    array([ 1., nan])
    """
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (np.asarray(a, float), np.asarray(b, float)))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (a * b).sum(1) / scale, np.nan)


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each row, (N,); ties take the mean of their ranks.

    Examples
    --------
    >>> spearman(np.array([[1.0, 2, 30]]), np.array([[0.1, 5, 6]]))
    array([1.])
    """
    return pearson(rankdata(a, axis=1), rankdata(b, axis=1))


def resampled_pearson(a: np.ndarray, b: np.ndarray) -> Resampled:
    """:func:`pearson` of (N, S) as a function of how often each column is taken.

    Examples
    --------
    >>> a, b = np.array([[1.0, 2, 3, 9]]), np.array([[2.0, 4, 7, 0]])
    >>> columns = np.array([0, 1, 1, 2])
    >>> resampled_pearson(a, b)(np.bincount(columns, minlength=4)) - pearson(a[:, columns], b[:, columns])
    array([0.])
    """
    return lambda counts: _weighted(a, b, counts)


def resampled_spearman(a: np.ndarray, b: np.ndarray) -> Resampled:
    """:func:`spearman` of (N, S) as a function of how often each column is taken, sorted once."""
    first, second = _Ranks(a), _Ranks(b)
    return lambda counts: _weighted(first.of(counts), second.of(counts), counts)


class _Ranks:
    """Ranks of the entries of each row (N, S) where columns are repeated."""

    def __init__(self, values: np.ndarray) -> None:
        self._order = np.argsort(values, axis=1, kind="stable")
        ordered = np.take_along_axis(values, self._order, axis=1)
        places, change = np.arange(values.shape[1]), np.ones(values.shape, bool)
        change[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        # of each entry in order, the first and the last that equal it
        self._first = np.maximum.accumulate(np.where(change, places, 0), axis=1)
        ends = np.where(np.roll(change, -1, axis=1), places, places[-1])
        self._last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
        self._back = np.argsort(self._order, axis=1)

    def of(self, counts: np.ndarray) -> np.ndarray:
        """(N, S): the mean of the ranks that copies of the entry and its equals take."""
        ordered = counts[self._order]
        below = np.cumsum(ordered, axis=1)
        last = np.take_along_axis(below, self._last, axis=1)
        first = np.take_along_axis(below - ordered, self._first, axis=1)
        return np.take_along_axis((first + 1 + last) / 2, self._back, axis=1)


def _weighted(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Correlation of each row with its columns taken ``counts`` times, (N,)."""
    a, b = (rows - (rows @ counts / counts.sum())[:, None] for rows in (a, b))
    scale = np.sqrt((a * a @ counts) * (b * b @ counts))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (a * b) @ counts / scale, np.nan)


def mean(values: np.ndarray) -> float:
    """Mean of what is no NaN; NaN where nothing is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def slope(predicted: np.ndarray, actual: np.ndarray) -> float:
    """Of actual on predicted (N, S), with an intercept for each row.

    Examples
    --------
    >>> slope(np.array([[0.0, 1, 2]]), np.array([[5.0, 7, 9]]))
    2.0
    """
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (predicted, actual))
    total = float((a * a).sum())
    return float((a * b).sum() / total) if total else float("nan")


def area_under_curve(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has the higher score than a negative, ties counting half (Mann & Whitney).

    Examples
    --------
    >>> area_under_curve(np.array([3.0, 1.0, 2.0]), np.array([True, False, True]))
    1.0
    """
    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - count * (count + 1) / 2) / (count * (len(positive) - count)))


def bootstrap(
    statistic: Callable[[tuple[np.ndarray, ...]], float],
    sizes: tuple[int, ...],
    *,
    confidence: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    center: float | None = None,
) -> Interval:
    """Percentile interval of a statistic of samples drawn with replacement along each of several axes.

    Parameters
    ----------
    statistic : callable
        Of the indices drawn along each axis.
    sizes : tuple of int
        Lengths of the axes.
    confidence : float
        Share of the draws inside.
    draws, seed : int
        How many, and from which seed.
    center : float, optional
        What the interval is moved to, so that the mean of the draws lies there: where what is drawn twice
        ties, and lowers a rank correlation, as nothing does in the data.

    References
    ----------
    Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 13.3; axes that are
    resampled independently: Owen 2007, "The pigeonhole bootstrap".

    Examples
    --------
    >>> values = np.arange(100.0)
    >>> low, high = bootstrap(lambda drawn: values[drawn[0]].mean(), (100,))
    >>> low < 49.5 < high
    True
    """
    random = np.random.default_rng(seed)
    found = np.array(
        [statistic(tuple(random.integers(0, size, size) for size in sizes)) for _ in range(draws)]
    )
    found = found[~np.isnan(found)]
    if not len(found):
        return (float("nan"), float("nan"))
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    shift = 0.0 if center is None else center - found.mean()
    return float(low + shift), float(high + shift)
