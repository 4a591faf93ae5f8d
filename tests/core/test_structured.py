"""Matrices of curvature from the responses of layers, against dense oracles that know no layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dask_influence.core import curvature, structured
from dask_influence.core.curvature import matrix_sums
from dask_influence.core.objective import Objective
from dask_influence.core.problem import Problem, prepare
from dask_influence.core.structured import gauss_newton_sum, hessian_sum
from dask_influence.errors import InfluenceWarning
from tests import data, oracles


class Branches(nn.Module):
    """Layers called in another order than they stand in θ, one of them beside the others."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.beside = nn.Linear(4, 3), nn.Linear(5, 4), nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * self.beside(x).sin())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + F.gelu(self.inner(x)))


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 3))
    net[2].requires_grad_(False)
    net[4].weight.requires_grad_(False)
    return net


def narrow() -> nn.Module:
    """Of the head, which one unit enters, the bias alone is in θ."""
    net = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 3))
    net[2].weight.requires_grad_(False)
    return net


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 6), nn.Softplus(), nn.Linear(6, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "regression": lambda: nn.Linear(5, 3),
    "perceptron": lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
    "deep": deep,
    "branches": Branches,
    "residual": Residual,
    "frozen": frozen,
    "narrow": narrow,
}


def prepared(build: Callable[[], nn.Module], n: int = 7, names: Any = None) -> tuple[Problem, Tensor, Tensor]:
    x, y = data.normal(1, n, 5), data.classes(2, n, 3)
    problem, _ = prepare(Objective.of(data.seeded(build).double(), F.cross_entropy, names), x, y)
    return problem, x, y


@pytest.mark.parametrize("budget", [1, 2**27], ids=["sample by sample", "at once"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_hessian(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured, "BUDGET", budget)
    problem, x, y = prepared(MODELS[name])
    expected = oracles.hessian(problem.objective.module, F.cross_entropy, x, y, problem.objective.names)
    value = hessian_sum(problem, x, y)
    assert value is not None
    assert oracles.relative_error(value / len(x), expected) <= 1e-12
    assert torch.equal(value, value.mT)


@pytest.mark.parametrize("names", [["0.weight"], ["0.bias", "2.weight"], ["4.*"], ["2.bias", "4.bias"]])
def test_of_a_subset_of_the_parameters(names: list[str]) -> None:
    problem, x, y = prepared(deep, names=names)
    expected = oracles.hessian(problem.objective.module, F.cross_entropy, x, y, problem.objective.names)
    value = hessian_sum(problem, x, y)
    assert value is not None
    assert oracles.relative_error(value / len(x), expected) <= 1e-12


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    net[2].weight = net[0].weight
    return net


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tokens(nn.Module):
    """A linear layer of several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(1, 2), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.unsqueeze(-1))).flatten(1))


@pytest.mark.parametrize(
    "build",
    [
        tied,
        Twice,
        Tokens,
        lambda: nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3)),
        lambda: nn.Sequential(nn.PReLU(), nn.Linear(5, 3)),
    ],
    ids=["tied", "twice", "positions", "norm", "other parameters"],
)
def test_other_models_take_the_columns(build: Callable[[], nn.Module]) -> None:
    problem, x, y = prepared(build)
    assert hessian_sum(problem, x, y) is None
    value = matrix_sums(problem, x, y, {}, "hessian").total["matrix"]
    expected = oracles.hessian(problem.objective.module, F.cross_entropy, x, y)
    assert oracles.relative_error(value / len(x), expected) <= 1e-9


def test_curvature_takes_it_without_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, x, y = prepared(deep)
    monkeypatch.setattr(curvature, "_matrix_of_products", None)
    value = matrix_sums(problem, x, y, {}, "hessian").total["matrix"]
    assert torch.equal(value, hessian_sum(problem, x, y))


# -- Gauss-Newton and Fisher -----------------------------------------------------------
def summed(problem: Problem, x: Tensor, y: Tensor, kind: str) -> Tensor | None:
    return gauss_newton_sum(problem, x, y, partial(curvature._factors, curvature=kind))


def bent(output: Tensor, target: Tensor) -> Tensor:
    """Of any sign of curvature in the outputs, which are coupled."""
    return output.sin().gather(1, target[:, None]).mean() + (output[:, 0] * output[:, 1]).mean()


@pytest.mark.parametrize("budget", [1, 2**27], ids=["sample by sample", "at once"])
@pytest.mark.parametrize("loss", [F.cross_entropy, bent])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_gauss_newton_matrix(
    name: str, loss: Any, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structured, "BUDGET", budget)
    x, y = data.normal(1, 7, 5), data.classes(2, 7, 3)
    problem, _ = prepare(Objective.of(data.seeded(MODELS[name]).double(), loss), x, y)
    value = summed(problem, x, y, "ggn")
    assert value is not None
    expected = oracles.ggn(problem.objective.module, loss, x, y)
    assert oracles.relative_error(value / len(x), expected) <= 1e-12
    assert torch.equal(value, value.mT)


@pytest.mark.parametrize("name", MODELS)
def test_fisher_equals_the_gauss_newton_matrix_of_cross_entropy(name: str) -> None:
    problem, x, y = prepared(MODELS[name])
    value, expected = (summed(problem, x, y, kind) for kind in ("fisher", "ggn"))
    assert value is not None
    assert expected is not None
    assert oracles.relative_error(value, expected) <= 1e-12


@pytest.mark.parametrize("loss", [F.binary_cross_entropy_with_logits, F.mse_loss])
def test_outputs_without_an_axis_of_their_own(loss: Callable[..., Tensor]) -> None:
    """One number for each sample, as (n,)."""
    net = data.seeded(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    ).double()
    x, y = data.normal(1, 7, 5), data.classes(2, 7, 2).double()
    problem, _ = prepare(Objective.of(net, loss), x, y)
    found = matrix_sums(problem, x, y, {}, "fisher").mean("matrix")
    assert oracles.relative_error(found, oracles.ggn(net[:3], loss, x, y[:, None])) < 1e-12


def test_float32_models_keep_it_positive_semidefinite() -> None:
    # as far as the curvature in the outputs is, which is float32's here
    x, y = data.normal(1, 40, 5).float(), data.classes(2, 40, 3)
    problem, _ = prepare(Objective.of(data.seeded(deep).float(), F.cross_entropy), x, y)
    value = summed(problem, x, y, "ggn")
    assert value is not None
    eigenvalues = torch.linalg.eigvalsh(value)
    assert eigenvalues[0] >= -1e-8 * eigenvalues[-1]


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
@pytest.mark.parametrize("build", [tied, Twice, Tokens], ids=["tied", "twice", "positions"])
def test_other_models_take_rows(build: Callable[[], nn.Module], kind: str) -> None:
    problem, x, y = prepared(build)
    assert summed(problem, x, y, kind) is None
    value = matrix_sums(problem, x, y, {}, kind).total["matrix"]
    expected = oracles.ggn(problem.objective.module, F.cross_entropy, x, y)
    assert oracles.relative_error(value / len(x), expected) <= 1e-9


def test_gauss_newton_takes_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, x, y = prepared(deep)
    monkeypatch.setattr(curvature, "_factor_rows", None)
    value = matrix_sums(problem, x, y, {}, "ggn").total["matrix"]
    assert torch.equal(value, summed(problem, x, y, "ggn"))


# -- trust -------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize("wrong", ["value", "error"])
def test_a_wrong_one_is_not_taken(wrong: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = {"hessian": hessian_sum, "ggn": gauss_newton_sum}[kind]

    def spoiled(*args: Any) -> Tensor | None:
        if wrong == "error":
            raise RuntimeError("no forward mode")
        value: Tensor | None = function(*args)  # type: ignore[operator]
        assert value is not None
        value[3, 3] *= 1.01
        return value

    problem, x, y = prepared(deep)
    monkeypatch.setattr(curvature, function.__name__, spoiled)
    with pytest.warns(InfluenceWarning, match="off by|raises RuntimeError"):
        value = matrix_sums(problem, x, y, {}, kind).total["matrix"]
    expected = getattr(oracles, kind)(problem.objective.module, F.cross_entropy, x, y)
    assert oracles.relative_error(value / len(x), expected) <= 1e-9


def test_a_loss_without_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data.normal(1, 6, 5), data.normal(2, 6, 2)
    problem, _ = prepare(Objective.of(data.seeded(lambda: nn.Linear(5, 2)).double(), F.l1_loss), x, y)
    monkeypatch.setattr(curvature, "_matrix_of_products", None)
    assert not matrix_sums(problem, x, y, {}, "hessian").total["matrix"].any()


def test_sums_that_are_large_in_half_precision() -> None:
    model = data.seeded(lambda: nn.Linear(5, 3))
    x, y = (4 * data.normal(1, 3000, 5)).half(), data.normal(2, 3000, 3).half()
    problem, _ = prepare(Objective.of(model, F.mse_loss, dtype=torch.float16), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = matrix_sums(problem, x, y, {}, "hessian").total["matrix"]
    expected = oracles.hessian(problem.objective.module.double(), F.mse_loss, x.double(), y.double())
    assert oracles.relative_error(value / len(x), expected) <= 5e-3
