"""Curvature sums against dense oracles: every curvature, every form, any cut of the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import DirectInfluence
from dask_influence.core import curvature, sizes
from dask_influence.core.curvature import PRODUCTS, check_curvature, matrix_sums, product_sums
from dask_influence.core.moments import merge
from dask_influence.core.objective import Objective
from dask_influence.core.problem import Problem, prepare
from dask_influence.errors import ConfigurationError, DerivativeError
from tests import data, oracles
from tests.core.zoo import ZOO

TRUE = {
    "hessian": oracles.hessian,
    "ggn": oracles.ggn,
    "fisher": oracles.ggn,  # of these losses; computed as an expectation, compared with J^T H_out J
    "empirical_fisher": oracles.empirical_fisher,
}
EACH = pytest.mark.parametrize("name", TRUE)


def problem_of(model: nn.Module, loss: Any, pair: data.Pair) -> Problem:
    return prepare(Objective.of(model.double(), loss), *oracles.pick(pair, slice(4)))[0]


def matrix(problem: Problem, pair: data.Pair, name: str) -> Tensor:
    return matrix_sums(problem, *pair, {}, name).mean("matrix")


def error(value: Tensor, expected: Tensor) -> float:
    return oracles.relative_error(value, expected)


# -- values -----------------------------------------------------------------------------------------
@EACH
@pytest.mark.parametrize("make", data.SMALL.values(), ids=data.SMALL)
def test_matrix_and_products(make: Any, name: str) -> None:
    case = make()
    problem = problem_of(case.model, case.loss, case.train)
    expected = TRUE[name](case.model, case.loss, *case.train)
    vectors = data.normal(1, 11, problem.objective.size)
    assert error(matrix(problem, case.train, name), expected) < 1e-12
    for few in (vectors, vectors[:3], vectors[:1]):  # two ways to the products of the empirical Fisher
        products = product_sums(problem, *case.train, {"vectors": few}, name).mean("products")
        assert error(products, few @ expected) < 1e-12


@pytest.mark.parametrize(
    "specimen", ["layer_norm", "prelu", "attention", "gru", "packed", "old_style_function"]
)
@pytest.mark.parametrize("name", ["ggn", "fisher", "empirical_fisher"])
def test_models_of_every_kind(specimen: str, name: str) -> None:
    kind = ZOO[specimen]
    model, pair = kind.model(), kind.samples(3)
    problem = prepare(kind.objective(), *pair)[0]
    expected = TRUE[name](model, kind.loss, *pair)
    check_curvature(problem, *pair, name)
    assert error(matrix(problem, pair, name), expected) < 1e-11
    vectors = data.normal(1, 3, problem.objective.size)
    products = product_sums(problem, *pair, {"vectors": vectors}, name).mean("products")
    assert error(products, vectors @ expected) < 1e-11


@pytest.mark.parametrize("name", ["ggn", "fisher"])
@pytest.mark.parametrize(
    "form", ["forward", "forward_loop", "dummy_weights", "dummy_weights_loop", "gradients"]
)
def test_every_form_gives_the_same_products(form: str, name: str) -> None:
    case = data.mlp_classification()
    problem = problem_of(case.model, case.loss, case.train)
    looped = dataclasses.replace(problem.forms, directional=form, gradient="loop")
    problem = dataclasses.replace(problem, forms=looped)
    vectors = data.normal(1, 3, problem.objective.size)
    products = product_sums(problem, *case.train, {"vectors": vectors}, name).mean("products")
    assert error(products, vectors @ oracles.ggn(case.model, case.loss, *case.train)) < 1e-12
    assert error(matrix(problem, case.train, name), oracles.ggn(case.model, case.loss, *case.train)) < 1e-12
    check_curvature(problem, *case.train, name)


def test_fisher_is_the_expectation_over_classes() -> None:
    case = data.mlp_classification()
    problem = problem_of(case.model, case.loss, case.train)
    expected = oracles.fisher_of_categorical(case.model, case.train[0])
    assert error(matrix(problem, case.train, "fisher"), expected) < 1e-12
    assert error(matrix(problem, case.train, "ggn"), expected) < 1e-10
    assert error(matrix(problem, case.train, "empirical_fisher"), expected) > 0.1
    assert error(matrix(problem, case.train, "hessian"), expected) > 0.05


def test_fisher_of_log_probabilities_is_that_of_their_logits() -> None:
    case = data.mlp_classification()
    model = nn.Sequential(*case.model, nn.LogSoftmax(1))
    problem = problem_of(model, functional.nll_loss, case.train)
    expected = oracles.ggn(case.model, case.loss, *case.train)
    assert error(matrix(problem, case.train, "fisher"), expected) < 1e-12
    with pytest.raises(ConfigurationError, match=r"linear in the model's output.*logits"):
        check_curvature(problem, *case.train, "ggn")
    check_curvature(problem, *case.train, "fisher")


# -- outputs of other shapes ------------------------------------------------------------------------
class Sequence(nn.Module):
    """(n, T, F) → logits (n, C, T), as cross_entropy takes them."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.layer, self.last = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)), last

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x)
        return logits if self.last else logits.mT


class Flat(nn.Module):
    """The same outputs as one row, for the oracle."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(1)


@pytest.mark.parametrize("name", ["ggn", "fisher"])
@pytest.mark.parametrize("last", [False, True], ids=["classes_first", "classes_last"])
def test_one_prediction_for_each_position(name: str, last: bool) -> None:
    model = data.seeded(lambda: Sequence(last)).double()
    x, y = data.normal(1, 7, 2, 3), data.classes(2, 14, 5).reshape(7, 2)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(output.mT if last else output, target)

    def flat_loss(output: Tensor, target: Tensor) -> Tensor:
        return loss(output.reshape(-1, 2, 5) if last else output.reshape(-1, 5, 2), target)

    problem = problem_of(model, loss, (x, y))
    expected = oracles.ggn(Flat(model), flat_loss, x, y)
    assert error(matrix(problem, (x, y), name), expected) < 1e-12
    vectors = data.normal(3, 2, problem.objective.size)
    products = product_sums(problem, x, y, {"vectors": vectors}, name).mean("products")
    assert error(products, vectors @ expected) < 1e-12


class Heads(nn.Module):
    """Two outputs in a mapping beside one that no loss looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x), "b": self.b(x).tanh(), "hidden": 2 * x, "ids": x[:, 0].long()}


def test_several_outputs() -> None:
    model = data.seeded(Heads).double()
    x, y = data.normal(1, 7, 3), data.normal(2, 7, 2)

    def both(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return (
            functional.mse_loss(output["a"], target) + output["b"].pow(4).mean() * output["a"].square().mean()
        )

    def one(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return functional.mse_loss(output["a"] * 1.0, target)

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            output = self.model(x)
            return torch.cat([output["a"], output["b"]], 1)

    def separate(output: Tensor, target: Tensor) -> Tensor:
        return sample(output[:, :2], output[:, 2:], target)

    def sample(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        return (
            functional.mse_loss(a, target, reduction="none").mean(1) + b.pow(4).mean(1) * a.square().mean(1)
        ).mean()

    def per_sample(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return sample(output["a"], output["b"], target)

    problem = problem_of(model, per_sample, (x, y))
    assert error(matrix(problem, (x, y), "ggn"), oracles.ggn(Joined(), separate, x, y)) < 1e-12
    with pytest.raises(ConfigurationError, match=r"one model output.*2"):
        check_curvature(problem, x, y, "fisher")
    alone = problem_of(model, one, (x, y))
    assert error(matrix(alone, (x, y), "fisher"), matrix(alone, (x, y), "ggn")) < 1e-12


@pytest.mark.parametrize("samples", [2, 7])
def test_a_loss_that_is_linear_in_pieces_has_no_gauss_newton_matrix(samples: int) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = data.normal(1, samples, 3), data.normal(2, samples, 2)
    found = matrix(problem_of(net, nn.functional.l1_loss, (x, y)), (x, y), "ggn")
    assert torch.equal(found, torch.zeros(26, 26, dtype=torch.float64))


def test_losses_that_are_not_convex_in_the_output() -> None:
    """GGN of an indefinite output Hessian: rows of both signs."""
    model = data.seeded(lambda: nn.Linear(3, 2)).double()
    x, y = 2 * data.normal(1, 7, 3), data.normal(2, 7, 2)

    def welsch(output: Tensor, target: Tensor) -> Tensor:
        return (1 - torch.exp(-(output - target).square())).mean()

    problem = problem_of(model, welsch, (x, y))
    expected = oracles.ggn(model, welsch, x, y)
    assert torch.linalg.eigvalsh(expected)[0] < 0
    assert error(matrix(problem, (x, y), "ggn"), expected) < 1e-12


# -- sums, cuts, memory -----------------------------------------------------------------------------
@EACH
def test_any_cut_of_the_data_gives_the_same_sums(name: str) -> None:
    case = data.mlp_classification()
    problem = problem_of(case.model, case.loss, case.train)
    vectors = data.normal(1, 3, problem.objective.size)
    whole = matrix(problem, case.train, name)
    products = product_sums(problem, *case.train, {"vectors": vectors}, name).mean("products")
    for size in (1, 10, 36):
        parts = [oracles.pick(case.train, slice(i, i + size)) for i in range(0, 37, size)]
        cut = merge([matrix_sums(problem, *part, {}, name) for part in parts])
        assert error(cut.mean("matrix"), whole) < 1e-12
        cut = merge([product_sums(problem, *part, {"vectors": vectors}, name) for part in parts])
        assert error(cut.mean("products"), products) < 1e-12


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [(2**29, [(5, 37)]), (60_000, [(5, 13), (5, 11)]), (25_000, [(3, 8), (2, 8)]), (1, [(1, 1)])],
)
def test_vectors_share_the_graph_of_some_samples(
    budget: int, blocks: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few bytes a few vectors go with a few samples at a time; each of them meets each once."""
    case, seen = data.mlp_classification(), list[tuple[int, int]]()
    problem = problem_of(case.model, case.loss, case.train)
    vectors = data.normal(1, 5, problem.objective.size)
    expected = vectors @ oracles.ggn(case.model, case.loss, *case.train)
    whole = PRODUCTS["fisher"]
    monkeypatch.setitem(
        PRODUCTS, "fisher", lambda own, x, y, v: seen.append((len(v), len(y))) or whole(own, x, y, v)
    )
    monkeypatch.setattr(sizes, "SHARED", budget)
    products = product_sums(problem, *case.train, {"vectors": vectors}, "fisher").mean("products")
    assert error(products, expected) < 1e-12
    assert sum(count * samples for count, samples in seen) == 5 * 37
    assert set(blocks) <= set(seen)


@EACH
@pytest.mark.parametrize("budget", [1, 60_000, 300_000])
def test_small_memory_takes_other_ways_to_the_same_matrix(
    name: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = data.mlp_classification()
    problem = problem_of(case.model, case.loss, case.train)
    monkeypatch.setattr(sizes, "VECTORS", budget)
    monkeypatch.setattr(curvature, "_GRAM_COLUMNS", 20)
    expected = TRUE[name](case.model, case.loss, *case.train)
    assert error(matrix(problem, case.train, name), expected) < 1e-12


@EACH
def test_sums_of_a_float32_model_are_float64(name: str) -> None:
    case = data.mlp_classification()
    single = Objective.of(case.model, case.loss, dtype=torch.float32)
    pair = (case.train[0].float(), case.train[1])
    problem = prepare(single, *pair)[0]
    check_curvature(problem, *pair, name)
    value = matrix(problem, pair, name)
    assert value.dtype == torch.float64
    assert error(value, TRUE[name](case.model, case.loss, *case.train)) < 1e-5


def narrow_huber(output: Tensor, target: Tensor) -> Tensor:
    """A Huber loss that is half a square nowhere near the errors of the samples."""
    return functional.huber_loss(output, target, delta=0.02)


# -- the check --------------------------------------------------------------------------------------
def test_a_loss_without_a_likelihood() -> None:
    case = data.mlp_regression()
    problem = problem_of(case.model, narrow_huber, case.train)
    with pytest.raises(ConfigurationError, match=r"'narrow_huber'.*curvature='ggn'"):
        check_curvature(problem, *case.train, "fisher")
    for name in ("hessian", "ggn", "empirical_fisher"):
        check_curvature(problem, *case.train, name)
        assert (
            error(
                matrix(problem, case.train, name),
                TRUE[name](case.model, narrow_huber, *case.train),
            )
            < 1e-12
        )


class Crooked(torch.autograd.Function):
    """x³ whose forward-mode derivative is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] ** 2 * tangent


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Crooked.apply(x)


def test_a_wrong_derivative_is_found() -> None:
    model = data.seeded(lambda: nn.Sequential(nn.Linear(3, 4), Cubed(), nn.Linear(4, 2))).double()
    x, y = data.normal(1, 5, 3), data.normal(2, 5, 2)
    problem = problem_of(model, functional.mse_loss, (x, y))  # which has found another form
    check_curvature(problem, x, y, "ggn")
    trusting = dataclasses.replace(problem, forms=dataclasses.replace(problem.forms, directional="forward"))
    with pytest.raises(DerivativeError, match="forward and reverse"):
        check_curvature(trusting, x, y, "ggn")
    assert error(matrix(problem, (x, y), "ggn"), oracles.ggn(model, functional.mse_loss, x, y)) < 1e-12


# -- in the models ----------------------------------------------------------------------------------
@EACH
def test_direct_influence(name: str) -> None:
    case = data.mlp_classification()
    dense = TRUE[name](case.model, case.loss, *case.train)
    expected = case.up(oracles.inverse(dense, 0.05))
    plain = case.up(torch.eye(51, dtype=torch.float64) / 0.05)
    assert oracles.weight_of_curvature(expected, plain) > 0.5
    for size in (37, 10):
        fitted = DirectInfluence(case.model, case.loss, 0.05, curvature=name, chunk_size=size).fit(case.train)
        scores = fitted.influences(*case.test, *case.train)
        assert error(scores, expected) < 1e-9
    inverse = oracles.inverse(dense, 0.05)
    changed = fitted.influences(*case.test, *case.train, mode="perturbation")
    assert error(changed, case.perturbation(inverse)) < 1e-9


def test_the_curvatures_a_model_takes() -> None:
    assert set(PRODUCTS) == set(TRUE)
    case = data.mlp_regression()
    with pytest.raises(ConfigurationError, match=r"(?s)'ggn'.*'gauss_newton'"):
        DirectInfluence(case.model, case.loss, 0.1, curvature="gauss_newton")
    with pytest.raises(ConfigurationError, match="likelihood"):
        DirectInfluence(case.model, narrow_huber, 0.1, curvature="fisher").fit(case.train)
    DirectInfluence(case.model, narrow_huber, 0.1, curvature="ggn").fit(case.train)
