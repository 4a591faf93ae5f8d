"""The ready training function."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dask_influence.errors import ConfigurationError
from dask_influence.validation import Training
from tests.validation.test_experiments import LAMBDA, LOSS, TRAIN, ridge

LINEAR = partial(nn.Linear, 4, 1, dtype=torch.float64)


def test_reaches_the_minimum_with_its_penalty() -> None:
    # without a line search, which compares losses: half of their digits tell the place
    optimizer = partial(torch.optim.LBFGS, max_iter=300, tolerance_grad=1e-13, tolerance_change=0)
    model = Training(LINEAR, LOSS, optimizer, steps=3, regularization=LAMBDA)(*TRAIN, seed=0)
    expected = ridge(*TRAIN)
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert not model.training


@pytest.mark.parametrize("batch_size", [None, 7, 1000])
def test_the_seed_decides_everything_and_leaves_the_callers_alone(batch_size: int | None) -> None:
    training = Training(LINEAR, LOSS, steps=9, batch_size=batch_size)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (training(*TRAIN, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


def test_batches_are_passes_over_all_samples() -> None:
    seen: list[float] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.extend(target[:, 0].tolist())
        return LOSS(output, target)

    Training(LINEAR, loss, steps=6, batch_size=25)(*TRAIN, seed=0)
    assert sorted(seen[:60]) == sorted(TRAIN[1][:, 0].tolist()) == sorted(seen[60:])
    assert seen[:60] != seen[60:]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"steps": 0}, "steps must be an integer ≥ 1"),
        ({"batch_size": 0}, "batch_size must be an integer ≥ 1"),
        ({"regularization": -1.0}, "regularization must be ≥ 0"),
        ({"build": 3}, "build must be callable"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        Training(**{"build": LINEAR, "loss": LOSS, **given})
