"""What layers saw, by one pass along a chain and by tracing the model: the same numbers."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dask_influence.core import chain, watching
from dask_influence.core.capture import Captured
from dask_influence.core.forms import Forms
from dask_influence.core.layers import Layout, layout_of
from dask_influence.core.objective import Objective
from dask_influence.core.problem import Problem
from dask_influence.core.watching import layers_seen, watched
from dask_influence.errors import DerivativeError
from tests import data, oracles
from tests.core.test_chain import CHAINS, NO_PRODUCTS


def both(objective: Objective, x: Tensor, y: Tensor) -> tuple[list[list[Captured | None]], ...]:
    """By the chain, and by tracing."""
    layout = layout_of(objective)
    problems = (Problem(objective, Forms(gradient=form), activations=10) for form in ("chain", "vmap"))
    return tuple([*layers_seen(problem, x, y, layout)] for problem in problems)


def joined(parts: list[list[Captured | None]]) -> list[tuple[Tensor, Tensor]]:
    layers = zip(*parts, strict=True)
    return [
        tuple(torch.cat([getattr(one, side) for one in layer]) for side in ("inputs", "derivatives"))  # type: ignore[misc]
        for layer in layers
    ]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's, where a trace meets Mish
@pytest.mark.parametrize("budget", [1, 2**20], ids=["one sample at a time", "all at once"])
@pytest.mark.parametrize("name", sorted(CHAINS.keys() - NO_PRODUCTS))
def test_a_chain_has_seen_what_a_trace_sees(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "CAPTURE_BUDGET", budget)
    specimen = CHAINS[name]
    along, traced = both(specimen.objective(), *specimen.samples(5))
    assert len(along) == (5 if budget == 1 else 1)
    assert along[0]
    for found, expected in zip(joined(along), joined(traced), strict=True):
        for own, other in zip(found, expected, strict=True):
            assert own.shape == other.shape
            assert oracles.relative_error(own, other) <= 1e-13


def endless(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) + torch.where(target == ENDLESS, torch.inf, 0.0).mean()


def summed(output: Tensor, target: Tensor) -> Tensor:
    """Its gradient is one number in memory, whatever the sample."""
    return output.sum() / len(output) + torch.where(target == ENDLESS, torch.inf, 0.0).mean()


ENDLESS = 7.0


@pytest.mark.parametrize("loss", [endless, summed])
def test_a_sample_without_a_finite_loss_has_no_finite_derivative(loss: Any) -> None:
    """However finite that of its loss is; no other sample pays for it."""
    objective = Objective.of(
        data.seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), loss
    )
    x, y = data.normal(1, 4, 3).float(), data.normal(2, 4, 2).float()
    y[2] = ENDLESS
    for parts in both(objective, x, y):
        for _, derivatives in joined(parts):
            assert derivatives.isnan().flatten(1).all(1).tolist() == [False, False, True, False]
            assert derivatives.isnan().flatten(1).any(1).tolist() == [False, False, True, False]


def test_a_chain_takes_one_pass_and_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(chain.Chain):
        def __init__(self, *given: object, **asked: object) -> None:
            made.append(asked)
            super().__init__(*given, **asked)  # type: ignore[arg-type]

    monkeypatch.setattr(watching, "Chain", Counted)
    monkeypatch.delattr(watching, "capture")
    specimen = CHAINS["perceptron"]
    problem = Problem(specimen.objective(), Forms(gradient="chain"), activations=10)
    (part,) = watched(problem, *specimen.samples(6), layout_of(problem.objective))
    assert [len(one.inputs) for one in part] == [6, 6]
    assert made == [{"twice": False}]


def test_some_samples_at_a_time_and_one_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the values and derivatives of their layers leave room for; what was seen does not hold the chain."""
    activations, alive = 10, weakref.WeakSet[chain.Chain]()

    class Weighed(chain.Chain):
        def __init__(self, *given: Any, **asked: Any) -> None:
            assert not alive
            alive.add(self)
            super().__init__(*given, **asked)

    monkeypatch.setattr(watching, "Chain", Weighed)
    monkeypatch.setattr(watching, "CAPTURE_BUDGET", 2 * 4 * activations * 8)
    specimen = CHAINS["perceptron"]
    problem = Problem(specimen.objective(), Forms(gradient="chain"), activations=activations)
    parts = watched(problem, *specimen.samples(5), layout_of(problem.objective))
    assert [len(part[0].inputs) for part in parts] == [2, 2, 1]


@pytest.mark.parametrize("form", ["chain", "vmap"])
def test_a_layer_that_is_not_called_is_named(form: str) -> None:
    specimen = CHAINS["perceptron"]
    problem = Problem(specimen.objective(), Forms(gradient=form), activations=10)
    first, last = layout_of(problem.objective).layers
    other = replace(last, path="head", weight="head.weight", bias="head.bias", key=("head.weight", 0))
    with pytest.raises(DerivativeError, match="layer head is called for some samples only"):
        next(watched(problem, *specimen.samples(3), Layout((first, other), ())))
