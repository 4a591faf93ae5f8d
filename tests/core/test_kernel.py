"""Scores straight from layer inputs and output gradients, against scores by factors and the dense construction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import EkfacInfluence
from dask_influence.core import directional, kernel
from dask_influence.core.estimators.ekfac import EkfacInverse
from dask_influence.core.kernel import Kernel
from dask_influence.errors import DataError
from dask_influence.execution import memory
from tests import data, oracles
from tests.core.estimators.kronecker import dense

SAME = 1e-11


class Called(nn.Module):
    """Layers that are called once, twice and never, and one with a channel for each group."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.never = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(torch.tanh(self.first(x)))
        return self.head(torch.tanh(self.again(torch.tanh(self.again(hidden)))))


def narrowing() -> nn.Module:
    """More outputs than inputs, and fewer, with and without bias."""
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2, bias=False), nn.Tanh(), nn.Linear(2, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"called": Called, "narrowing": narrowing, "images": images}


def held(name: str) -> data.Case:
    """29 training and 11 test points; λ at which the Fisher matrix matters."""
    model = data.seeded(MODELS[name]).double()
    train = data.normal(201, 29, 4), data.classes(202, 29, 3)
    test = data.normal(203, 11, 4), data.classes(204, 11, 3)
    return data.Case(model, functional.cross_entropy, train, test, 0.01)


def fitted(case: data.Case, **how: Any) -> EkfacInfluence:
    return EkfacInfluence(case.model, case.loss, case.regularization, **how).fit(case.train)


def refuse(*_: Any) -> Tensor:
    raise AssertionError("a gradient was formed")


@pytest.mark.parametrize("name", MODELS)
def test_equals_scores_by_factors_and_forms_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = held(name)
    infl = fitted(case)
    expected = infl.influences_from_factors(infl.influence_factors(*case.test), *case.train)
    monkeypatch.setattr(directional, "gradients", refuse)
    monkeypatch.setattr(directional, "directional_derivatives", refuse)
    assert oracles.relative_error(infl.influences(*case.test, *case.train), expected) <= SAME


@pytest.mark.parametrize("name", ["narrowing", "images"])
def test_equals_the_dense_construction(name: str) -> None:
    case = held(name)
    inverse = dense(case.model, case.loss, case.train, case.regularization)
    plain = case.up(torch.eye(len(inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(case.up(inverse), plain) > 0.2
    actual = fitted(case).influences(*case.test, *case.train)
    assert oracles.relative_error(actual, case.up(inverse)) <= 1e-8


def test_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = held("narrowing")
    infl = fitted(case, chunk_size=7)
    expected = infl.influences(*case.test, *case.train)
    monkeypatch.setattr(memory, "FEATURE_BYTES", 2000)
    monkeypatch.setattr(kernel, "BUDGET", 600)
    assert oracles.relative_error(infl.influences(*case.test, *case.train), expected) <= SAME


def test_single_precision() -> None:
    case = held("narrowing")
    expected, infl = fitted(case).influences(*case.test, *case.train), fitted(case, dtype=torch.float32)
    factors = infl.influence_factors(*case.test)
    for actual in (
        infl.influences(*case.test, *case.train),
        infl.influences_from_factors(factors, *case.train),
    ):
        assert actual.dtype == torch.float32
        assert oracles.relative_error(actual.double(), expected) <= 1e-4


@pytest.mark.parametrize(
    ("model", "there"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), True),
        (nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 3)), True),
        (nn.Sequential(nn.Linear(4, 80), nn.Linear(80, 80), nn.Flatten(), nn.Linear(240, 3)), False),
    ],
    ids=["one position", "a small matrix", "a large matrix of several positions"],
)
def test_gradients_serve_large_matrices_of_several_positions(model: nn.Module, there: bool) -> None:
    data.seeded(lambda: [layer.reset_parameters() for layer in model if isinstance(layer, nn.Linear)])
    x, y = data.normal(205, 13, 3, 4).float(), data.classes(206, 13, 3)
    infl = EkfacInfluence(model, functional.cross_entropy, 0.1).fit((x, y))
    inverse, problem = infl._fitted.inverse, infl._fitted.problem
    assert isinstance(inverse, EkfacInverse)
    assert isinstance(inverse.kernel(problem, x[:1], y[:1]), Kernel) is there
    factors = infl.influence_factors(x[:5], y[:5])
    assert (
        oracles.relative_error(infl.influences(x[:5], y[:5], x, y), factors @ gradients(infl, x, y)) <= 1e-4
    )


def gradients(infl: EkfacInfluence, x: Tensor, y: Tensor) -> Tensor:
    return directional.gradients(infl._fitted.problem, x, y).mT


@pytest.mark.parametrize("argument", ["x_test, y_test", "x, y"])
def test_samples_whose_gradient_is_not_finite_are_named(argument: str) -> None:
    def pair(seed: int) -> data.Pair:
        return data.normal(seed, 80, 4), data.classes(seed + 1, 80, 3)

    model = data.seeded(narrowing).double()
    model[0].weight.data *= 10
    infl = EkfacInfluence(nn.Sequential(model[0], nn.Linear(7, 3).double()), functional.cross_entropy, 0.1)
    infl = infl.fit(pair(207))
    sides = {"x_test, y_test": pair(209), "x, y": pair(211)}
    sides[argument][0][71] = 1e308  # the first layer overflows; behind the samples looked at before
    with pytest.raises(DataError, match=f"{argument}: the gradient of sample 71"):
        infl.influences(*sides["x_test, y_test"], *sides["x, y"])
