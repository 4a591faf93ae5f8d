"""DataInf against its dense formula: the mean over training samples of inverses of rank-one blocks."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dask_influence import InverseHarmonicMeanInfluence
from dask_influence.core import outer
from dask_influence.core.estimators import datainf
from dask_influence.core.estimators.datainf import sherman_morrison_sums
from dask_influence.errors import ConfigurationError
from tests import data, oracles

EXACT = 1e-8
SAME = 1e-10


def dense(held: data.Case, regularization: float, how: str = "layer") -> Tensor:
    """mean_j (g_j g_jᵀ + λI)⁻¹ by inverting every one of them, (P, P)."""
    rows = oracles.gradients(held.model, held.loss, *held.train)
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for g in rows:
        outer = oracles.block_diagonal(torch.outer(g, g), sizes(held, how))
        total += torch.linalg.inv(outer + regularization * torch.eye(len(g), dtype=torch.float64))
    return total / len(rows)


def sizes(held: data.Case, how: str) -> list[int]:
    if how == "model":
        return [sum(p.numel() for p in held.model.parameters())]
    if how == "parameter":
        return [p.numel() for p in held.model.parameters()]
    parts = (sum(p.numel() for p in m.parameters(recurse=False)) for m in held.model.modules())
    return [size for size in parts if size]


def scores(held: data.Case, **how: Any) -> Tensor:
    model = InverseHarmonicMeanInfluence(held.model, held.loss, held.regularization, **how)
    return model.fit(held.train).influences(*held.test, *held.train)


def aligned() -> data.Case:
    """Inputs far from the origin: gradients share a direction, and most of every score lies along it."""
    train, test = ((3 + data.normal(s, n, 3), data.normal(s + 1, n, 2)) for s, n in ((81, 17), (83, 11)))
    model = data.seeded(lambda: nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 2))).double()
    return data.Case(model, nn.functional.mse_loss, train, test, 0.05)


CASES = data.SMALL | {"aligned": aligned}


@pytest.mark.parametrize("how", ["layer", "parameter", "model"])
@pytest.mark.parametrize("name", ["aligned", "linear_regression", "mlp_regression", "mlp_classification"])
def test_equals_the_dense_formula(name: str, how: str) -> None:
    held = CASES[name]()
    inverse = dense(held, held.regularization, how)
    expected = held.up(inverse)
    plain = held.up(torch.eye(len(inverse), dtype=torch.float64) / held.regularization)
    # A mean of rank-one corrections changes little where gradients point everywhere.
    assert oracles.weight_of_curvature(expected, plain) > (0.5 if name == "aligned" else 0.15)
    assert oracles.relative_error(scores(held, blocks=how, chunk_size=7), expected) <= EXACT


@pytest.mark.parametrize("how", ["layer", "parameter", "model"])
def test_outer_products_and_gradients_agree(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = data.mlp_classification()
    found = scores(held, blocks=how)
    with monkeypatch.context() as patch:
        patch.setattr(outer, "BUDGET", 1)
        assert oracles.relative_error(scores(held, blocks=how), found) <= SAME
        patch.setattr(datainf, "outer_gradients", lambda *_: None)
        assert oracles.relative_error(scores(held, blocks=how), found) <= SAME
    monkeypatch.setattr(datainf, "_add_outer", lambda *_: None)
    assert oracles.relative_error(scores(held, blocks=how), found) > SAME  # that way is the one taken


class Rarely(nn.Module):
    """Uses a weight in another way too, on samples that are not among the first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        also = (self.inner.weight.square().sum() * (x[:, :1] > 1)).expand(-1, 2)
        return self.head(torch.tanh(self.inner(x))) + also


def test_gradients_that_are_no_outer_products_on_some_samples_are_formed() -> None:
    train, test = ((data.normal(s, n, 3), data.normal(s + 1, n, 2)) for s, n in ((81, 17), (83, 11)))
    train[0][:5, 0], train[0][9, 0] = -1, 2
    held = data.Case(data.seeded(Rarely).double(), nn.functional.mse_loss, train, test, 0.05)
    assert oracles.relative_error(scores(held), held.up(dense(held, 0.05))) <= EXACT


def test_blocks_are_those_asked_for() -> None:
    held = data.mlp_classification()
    results = [scores(held, blocks=how) for how in ("layer", "parameter", "model")]
    assert oracles.relative_error(results[0], results[1]) > 1e-3
    assert oracles.relative_error(results[0], results[2]) > 1e-3
    assert torch.equal(results[0], scores(held))


def test_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    held = data.mlp_classification()
    whole = scores(held, chunk_size=1000)
    for size in (1, 5, 11):
        assert oracles.relative_error(scores(held, chunk_size=size), whole) <= SAME
    monkeypatch.setattr("dask_influence.core.estimators.datainf.GRADIENT_BUDGET", 1)
    assert oracles.relative_error(scores(held), whole) <= SAME


def test_the_weight_is_that_of_training_samples() -> None:
    """A test point's scores do not depend on how many others are asked for with it; N > P."""
    held = data.linear_regression()
    model = InverseHarmonicMeanInfluence(held.model, held.loss, held.regularization).fit(held.train)
    together = model.influences(*held.test, *held.train)
    assert len(together) > sum(p.numel() for p in held.model.parameters())
    alone = model.influences(*oracles.pick(held.test, slice(0, 1)), *held.train)
    assert oracles.relative_error(alone, together[:1]) <= SAME


def test_one_training_sample() -> None:
    base = data.mlp_regression()
    held = data.Case(base.model, base.loss, oracles.pick(base.train, slice(0, 1)), base.test, 0.05)
    assert oracles.relative_error(scores(held), held.up(dense(held, 0.05))) <= EXACT


def test_another_regularization_is_a_refit_and_fits_nothing() -> None:
    held = data.mlp_classification()
    model = InverseHarmonicMeanInfluence(held.model, held.loss, 0.05).fit(held.train)
    assert model.diagnostics["passes"] == 0
    assert model.diagnostics["blocks"] == 2
    moved = model.with_regularization(0.4).influences(*held.test, *held.train)
    assert oracles.relative_error(moved, held.up(dense(held, 0.4))) <= EXACT


def test_saved_and_loaded_with_its_training_data(tmp_path: Any) -> None:
    held = data.mlp_classification()
    model = InverseHarmonicMeanInfluence(held.model, held.loss, 0.05).fit(held.train)
    model.save(tmp_path / "fit")
    loaded = InverseHarmonicMeanInfluence.load(tmp_path / "fit", held.model, held.loss, train=held.train)
    assert torch.equal(loaded.influences(*held.test, *held.train), model.influences(*held.test, *held.train))


def test_without_regularization_it_is_refused() -> None:
    held = data.mlp_classification()
    with pytest.raises(ConfigurationError, match="hessian_regularization > 0"):
        InverseHarmonicMeanInfluence(held.model, held.loss).fit(held.train)
    fitted = InverseHarmonicMeanInfluence(held.model, held.loss, 0.1).fit(held.train)
    with pytest.raises(ConfigurationError, match="hessian_regularization > 0"):
        fitted.with_regularization(0.0)


def test_unknown_blocks_are_refused() -> None:
    held = data.mlp_classification()
    with pytest.raises(ConfigurationError, match="blocks must be one of 'layer'"):
        scores(held, blocks="module")


def test_the_chunk_function_travels() -> None:
    function = partial(sherman_morrison_sums, blocks=(((0, 3),),), regularization=0.1)
    assert pickle.loads(pickle.dumps(function)).keywords == function.keywords
