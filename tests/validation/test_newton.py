"""Newton's method: minima against closed forms, and what it cannot minimise."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dask_influence.errors import ConfigurationError
from dask_influence.validation import Newton
from tests.validation.test_experiments import LAMBDA, LOSS, TRAIN, ridge


def linear() -> nn.Linear:
    torch.manual_seed(4)
    return nn.Linear(4, 1)


def test_reaches_the_closed_form_from_a_model_in_single_precision() -> None:
    found = Newton(linear(), LOSS, LAMBDA)(*TRAIN, seed=0)
    for ours, theirs in zip(found.parameters(), ridge(*TRAIN).parameters(), strict=True):
        assert ours.dtype == torch.float64
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_the_start_and_the_seed_change_nothing_and_nothing_given_is_changed() -> None:
    start, labels = nn.Linear(4, 3).double(), (TRAIN[0][:, 0] > 0).long() + (TRAIN[0][:, 1] > 0).long()
    before = start.weight.detach().clone()
    far = nn.Linear(4, 3).double()
    far.weight.data *= 30  # whole steps would overshoot from here
    found = [
        Newton(model, nn.functional.cross_entropy, 0.01)(TRAIN[0], labels, seed=seed)
        for model, seed in ((start, 0), (far, 7))
    ]
    assert torch.allclose(found[0].weight, found[1].weight, rtol=0, atol=1e-7)
    assert torch.equal(start.weight, before)
    assert not torch.equal(found[0].weight, before)


def test_the_gradient_at_the_end_is_below_the_tolerance() -> None:
    labels = (TRAIN[0][:, 0] > 0).long()
    model = Newton(nn.Linear(4, 2), nn.functional.cross_entropy, 0.01, 1e-12)(TRAIN[0], labels, seed=0)
    value = nn.functional.cross_entropy(model(TRAIN[0]), labels)
    value = value + 0.005 * sum(p.square().sum() for p in model.parameters())
    value.backward()
    assert sum(p.grad.square().sum() for p in model.parameters()) < 1e-24


def test_frozen_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    model[0].requires_grad_(False)
    found = Newton(model, LOSS, LAMBDA)(*TRAIN, seed=0)
    assert torch.equal(found[0].weight, model[0].weight)
    assert not torch.equal(found[2].weight, model[2].weight)


def test_one_that_was_used_travels_and_serves_other_data() -> None:
    newton = Newton(linear(), LOSS, LAMBDA)
    newton(*TRAIN, seed=0)
    part = TRAIN[0][:31], TRAIN[1][:31]
    found = pickle.loads(pickle.dumps(newton))(*part, seed=0)
    assert torch.allclose(found.weight, ridge(*part).weight, rtol=0, atol=1e-10)


def test_what_is_not_convex_is_refused() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    with pytest.raises(ArithmeticError, match="is not positive definite"):
        Newton(model, LOSS, 0.0)(*TRAIN, seed=0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": 3}, "model must be a torch.nn.Module; got int"),
        ({"loss": 3}, "loss must be callable"),
        ({"regularization": -1.0}, "regularization must be ≥ 0"),
        ({"tolerance": 0.0}, "tolerance must be > 0"),
        ({"tolerance": "small"}, "tolerance must be a number"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Newton(**{"model": linear(), "loss": LOSS, **given})
