"""Scores against the truth they predict: the change of the test loss when a training point is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence, GradientDotInfluence, InfluenceFunctionModel
from tests.benchmarks.digits_accuracy import (
    PENALTY,
    Digits,
    halves,
    left_out,
    linear,
    linear_datamodeling_score,
    losses_of,
    newton,
    pearson,
    regression_slope,
)

LEFT_OUT = 12
SUBSETS = 8


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A third of the training data, so that a refit takes a third of the time."""
    whole = Digits.load()
    return Digits((whole.train[0][:479], whole.train[1][:479]), whole.test)


@pytest.fixture(scope="module")
def theta(digits: Digits) -> torch.Tensor:
    """Weights at the minimum."""
    return newton(*digits.train)


def scores(kind: type[InfluenceFunctionModel], digits: Digits, theta: torch.Tensor) -> np.ndarray:
    """All scores at the λ that is the second derivative of the penalty."""
    model = kind(linear(theta), cross_entropy, 2 * PENALTY).fit(digits.train)
    return model.influences(*digits.test, *digits.train).numpy()


def test_leave_one_out(digits: Digits, theta: torch.Tensor) -> None:
    """Exact scores are the effect of leaving a point out, in size too; without curvature they are not."""
    actual = left_out(digits, theta, np.arange(LEFT_OUT))
    predicted = scores(DirectInfluence, digits, theta)[:, :LEFT_OUT]
    assert pearson(predicted, actual) >= 0.999
    assert regression_slope(predicted / len(digits.train[0]), actual) == pytest.approx(1, abs=0.2)
    baseline = scores(GradientDotInfluence, digits, theta)[:, :LEFT_OUT]
    assert pearson(baseline, actual) < 0.9


def test_training_on_halves(digits: Digits, theta: torch.Tensor) -> None:
    """Summed scores of a half's members rank the losses that training on it gives."""
    x, y = digits.train
    members = halves(SUBSETS, of=len(x))
    losses = np.stack([losses_of(linear(newton(x[s], y[s], theta)), digits.test) for s in members], axis=1)
    exact, baseline = (
        linear_datamodeling_score(scores(kind, digits, theta), members, losses)
        for kind in (DirectInfluence, GradientDotInfluence)
    )
    assert exact >= 0.93
    assert baseline < 0.85
