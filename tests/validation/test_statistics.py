"""Correlations, areas and intervals against scipy, scikit-learn and known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from dask_influence.validation import statistics

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("ours", "theirs"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_correlations_are_those_of_scipy(ours: str, theirs: object) -> None:
    a, b = RANDOM.normal(size=(4, 9)), RANDOM.normal(size=(4, 9))
    b[1] = np.round(b[1])  # ties
    expected = [theirs(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert np.allclose(getattr(statistics, ours)(a, b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_columns_drawn_anew_need_not_be_sorted_again(kind: str) -> None:
    a, b = RANDOM.normal(size=(5, 12)), np.round(RANDOM.normal(size=(5, 12)))  # ties
    resampled = getattr(statistics, f"resampled_{kind}")(a, b)
    for columns in (RANDOM.integers(0, 12, 12), np.arange(12), np.zeros(12, int)):
        expected = getattr(statistics, kind)(a[:, columns], b[:, columns])
        found = resampled(np.bincount(columns, minlength=12))
        assert np.allclose(found, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_a_constant_row_has_no_correlation_and_is_left_out() -> None:
    a = np.stack([np.arange(5.0), np.ones(5)])
    rows = statistics.pearson(a, a)
    assert np.isnan(rows[1])
    assert statistics.mean(rows) == pytest.approx(1)
    assert np.isnan(statistics.mean(np.full(3, np.nan)))


def test_area_is_that_of_scikit_learn() -> None:
    scores, positive = np.round(RANDOM.normal(size=40), 1), RANDOM.random(40) < 0.3
    assert statistics.area_under_curve(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert np.isnan(statistics.area_under_curve(scores, np.zeros(40, bool)))


def test_slope_forgets_what_each_row_adds() -> None:
    predicted = RANDOM.normal(size=(3, 20))
    actual = 1.5 * predicted + RANDOM.normal(size=(3, 1))
    assert statistics.slope(predicted, actual) == pytest.approx(1.5)
    assert np.isnan(statistics.slope(np.ones((1, 4)), np.ones((1, 4))))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = 0
    for trial in range(200):
        values = np.random.default_rng(trial).normal(size=60)
        low, high = statistics.bootstrap(
            lambda drawn, values=values: values[drawn[0]].mean(), (60,), confidence=0.9, draws=200, seed=trial
        )
        covered += low <= 0 <= high
    assert 165 <= covered <= 194  # 180 expected of 200, ± 3.5 standard deviations


def test_a_center_moves_the_interval_there_and_leaves_its_width() -> None:
    values = RANDOM.normal(size=40)
    statistic = lambda drawn: values[drawn[0]].mean()  # noqa: E731
    plain, moved = (statistics.bootstrap(statistic, (40,), center=center) for center in (None, 7.0))
    assert moved[1] - moved[0] == pytest.approx(plain[1] - plain[0])
    assert moved[0] < 7 < moved[1]


def test_interval_of_two_axes_is_wider_than_of_one() -> None:
    values = RANDOM.normal(size=(30, 1)) + RANDOM.normal(size=(1, 10))
    both = statistics.bootstrap(lambda drawn: values[np.ix_(*drawn)].mean(), (30, 10))
    rows = statistics.bootstrap(lambda drawn: values[drawn[0]].mean(), (30,))
    assert both[1] - both[0] > rows[1] - rows[0]


def test_random_scores_are_within_the_interval_of_zero() -> None:
    predicted, actual = RANDOM.normal(size=(40, 30)), RANDOM.normal(size=(40, 30))

    def statistic(drawn: tuple[np.ndarray, ...]) -> float:
        at = np.ix_(*drawn)
        return statistics.mean(statistics.spearman(predicted[at], actual[at]))

    low, high = statistics.bootstrap(statistic, (40, 30), draws=300)
    assert low < 0 < high
