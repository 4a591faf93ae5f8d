"""The baseline: scores are inner products of gradients, whatever λ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dask_influence import GradientDotInfluence
from tests import data, oracles


@pytest.mark.parametrize("name", ["mlp_regression", "mlp_classification"])
@pytest.mark.parametrize("regularization", [0.0, 0.3])
def test_scores_are_inner_products(name: str, regularization: float) -> None:
    held = data.SMALL[name]()
    size = sum(p.numel() for p in held.model.parameters())
    fitted = GradientDotInfluence(held.model, held.loss, regularization, chunk_size=7).fit(held.train)
    expected = held.up(torch.eye(size, dtype=torch.float64))
    assert oracles.relative_error(fitted.influences(*held.test, *held.train), expected) <= 1e-12
    moved = fitted.with_regularization(0.7).influences(*held.test, *held.train)
    assert oracles.relative_error(moved, expected) <= 1e-12


def test_it_says_what_it_leaves_out() -> None:
    held = data.mlp_regression()
    found = GradientDotInfluence(held.model, held.loss, 0.1).fit(held.train).diagnostics
    assert found["fitted_curvature"] == "identity"
    assert found["regularization_used"] is False
    assert found["passes"] == 0


def test_saved_and_loaded(tmp_path: Any) -> None:
    held = data.mlp_regression()
    model = GradientDotInfluence(held.model, held.loss, 0.1).fit(held.train)
    model.save(tmp_path / "fit")
    loaded = GradientDotInfluence.load(tmp_path / "fit", held.model, held.loss)
    assert torch.equal(loaded.influences(*held.test), model.influences(*held.test))
