"""Gradients taken in float64 of models in float32: what they are worth, and where they cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.core import double
from dask_influence.core.forms import FORMS, Forms, sample_gradients
from dask_influence.core.objective import Objective
from dask_influence.core.problem import Problem
from tests import oracles
from tests.core import zoo

ROUNDED = 1e-7
"""Relative error of what is rounded to float32 once."""


class Scaled(nn.Module):
    """Multiplies by a matrix that is no buffer, so that it stays in float32."""

    def __init__(self, entries: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.entries = nn.Linear(3, 3), entries

    def forward(self, x: Tensor) -> Tensor:
        return self.entries(self.net(x))


class NarrowBackward(torch.autograd.Function):
    """The identity, whose derivative is written for float32 alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return (g @ torch.eye(3),)


def bounded_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy whose probabilities are bounded by the rounding of their dtype."""
    probabilities = outputs.softmax(1).clamp_min(torch.finfo(outputs.dtype).eps)
    return functional.nll_loss(probabilities.log(), targets)


def sure_network() -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier, samples, and targets it is sure of."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        net[2].weight *= 40
    x = torch.randn(11, 7)
    return net, x, net(x).argmax(1)


def problem_of(net: nn.Module, loss: Any = functional.cross_entropy, form: str = "vmap") -> Problem:
    return Problem(Objective.of(net, loss), Forms(gradient=form))


def plainly(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    return sample_gradients(problem.objective, x, y, problem.forms)


def exact(net: nn.Module, loss: Any, x: Any, y: Any) -> Tensor:
    """The oracle in float64, at these very parameters and samples."""
    return oracles.gradients(net, loss, *optree.tree_map(_widened, (x, y)))


def errors(rows: Tensor, expected: Tensor) -> Tensor:
    """Of each sample, relative."""
    return (rows.double() - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.mark.parametrize("form", FORMS["gradient"])
def test_of_samples_the_model_is_sure_of_only_the_rounding_of_the_result_is_lost(form: str) -> None:
    net, x, y = sure_network()
    problem, expected = problem_of(net, form=form), exact(net, functional.cross_entropy, x, y)
    found = double.gradients(problem, x, y)
    assert found.dtype == torch.float32
    assert errors(found, expected).max() < ROUNDED
    assert errors(plainly(problem, x, y), expected).max() > 1e3 * ROUNDED  # it matters


def test_one_sample_the_model_is_sure_of_is_no_exception() -> None:
    net, x, y = sure_network()
    expected = exact(net, functional.cross_entropy, x, y)
    worst = slice(j := int(expected.norm(dim=1).argmin()), j + 1)
    found = double.gradients(problem_of(net), x[worst], y[worst])
    assert errors(found, expected[worst]).max() < ROUNDED


def test_in_parts_where_all_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = sure_network()
    problem = problem_of(net)
    monkeypatch.setattr(double, "BUDGET", 4 * 2 * 8 * problem.objective.size)  # 4 samples, 11 in all
    expected = exact(net, functional.cross_entropy, x, y)
    assert errors(double.gradients(problem, x, y), expected).max() < ROUNDED


@pytest.mark.parametrize(
    ("net", "loss"),
    [
        (Scaled(lambda a: a @ torch.eye(3)), functional.mse_loss),
        (Scaled(NarrowBackward.apply), functional.mse_loss),
        (nn.Linear(3, 3), lambda f, t: ((f @ torch.eye(3)) - t).square().mean()),
    ],
    ids=["forward", "backward", "loss"],
)
def test_what_insists_on_float32_is_differentiated_in_it(net: nn.Module, loss: Any) -> None:
    problem, x, y = problem_of(net, loss), torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(double.gradients(problem, x, y), plainly(problem, x, y))


def test_a_loss_that_is_another_one_in_float64_is_differentiated_as_it_is() -> None:
    net, x, y = sure_network()
    wrong = (y + 1) % 3  # of probabilities below the bound
    problem = problem_of(net, bounded_loss)
    expected = plainly(problem, x, wrong)
    assert (expected.norm(dim=1) == 0).any()
    assert (exact(net, bounded_loss, x, wrong).norm(dim=1) > 0.1).all()
    assert torch.equal(double.gradients(problem, x, wrong), expected)


def test_memory_that_is_lacking_is_told_and_not_taken_for_a_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    net, x, y = sure_network()
    monkeypatch.setattr(double, "sample_gradients", lacking)
    with pytest.raises(torch.OutOfMemoryError):
        double.gradients(problem_of(net), x, y)


def test_the_model_at_hand_stays_in_its_dtype() -> None:
    net, x, y = sure_network()
    problem = problem_of(net)
    double.gradients(problem, x, y)
    assert all(p.dtype == torch.float32 for p in problem.objective.module.parameters())


def test_float64_is_what_it_was() -> None:
    net, x, y = sure_network()
    problem, wide = problem_of(net.double()), x.double()
    assert torch.equal(double.gradients(problem, wide, y), plainly(problem, wide, y))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_of_any_layer(name: str) -> None:
    specimen = zoo.ZOO[name]
    net, (x, y) = specimen.model().float(), optree.tree_map(_narrowed, specimen.samples(5))
    expected = exact(net, specimen.loss, x, y)
    found = double.gradients(problem_of(net, specimen.loss, "loop"), x, y)
    assert (found.double() - expected).norm() <= max(ROUNDED, specimen.rounding) * expected.norm()


def _narrowed(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.is_floating_point() else leaf


def _widened(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf
