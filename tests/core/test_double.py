"""Gradients of float32 models whose losses are differentiated in float64: what they are worth, and where not."""

from __future__ import annotations

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

ROUNDED = 5e-6
"""Relative error of what float32 makes of a model's layers."""


class Watched(nn.Module):
    """Keeps what its layers return, as models that show their attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.first(x).tanh()
        return self.last(self.hidden)


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
def test_of_samples_the_model_is_sure_of_only_its_own_rounding_is_lost(form: str) -> None:
    net, x, y = sure_network()
    problem, expected = problem_of(net, form=form), exact(net, functional.cross_entropy, x, y)
    found = double.gradients(problem, x, y)
    assert found.dtype == torch.float32
    assert errors(found, expected).max() < ROUNDED
    lost = errors(plainly(problem, x, y), expected).max()
    assert lost < ROUNDED if form == "chain" else lost > 500 * ROUNDED  # a chain's loss is written down


def test_one_sample_the_model_is_sure_of_is_no_exception() -> None:
    net, x, y = sure_network()
    expected = exact(net, functional.cross_entropy, x, y)
    worst = slice(j := int(expected.norm(dim=1).argmin()), j + 1)
    found = double.gradients(problem_of(net), x[worst], y[worst])
    assert errors(found, expected[worst]).max() < ROUNDED


def test_a_loss_that_insists_on_float32_is_differentiated_in_it() -> None:
    problem, x, y = problem_of(nn.Linear(3, 3), lambda f, t: ((f @ torch.eye(3)) - t).square().mean()), *xy()
    assert torch.equal(double.gradients(problem, x, y), plainly(problem, x, y))


def xy() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3), torch.randn(5, 3)


def test_a_loss_that_is_another_one_in_float64_is_differentiated_as_it_is() -> None:
    net, x, y = sure_network()
    wrong = (y + 1) % 3  # of probabilities below the bound
    problem = problem_of(net, bounded_loss)
    expected = plainly(problem, x, wrong)
    assert (expected.norm(dim=1) == 0).any()
    assert (exact(net, bounded_loss, x, wrong).norm(dim=1) > 0.1).all()
    torch.testing.assert_close(double.gradients(problem, x, wrong), expected)


def test_whether_a_loss_is_another_one_does_not_depend_on_neighbours() -> None:
    """Of one with large outputs either: half of the digits of those are more than all of the others' losses."""
    torch.manual_seed(2)
    net, x = nn.Linear(7, 3), 60 * torch.randn(11, 7)
    x[0] *= 1e6
    wrong = net(x).argmin(1)
    problem = problem_of(net, bounded_loss)
    expected = plainly(problem, x, wrong)[1:]
    assert (expected.norm(dim=1) == 0).any()
    torch.testing.assert_close(double.gradients(problem, x, wrong)[1:], expected)


def test_memory_that_is_lacking_is_told_and_not_taken_for_a_dtype() -> None:
    """As torch says it on a CPU."""

    def lacking(f: Tensor, t: Tensor) -> Tensor:
        if f.dtype == torch.float64:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"
            )
        return functional.mse_loss(f, t)

    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        double.gradients(problem_of(nn.Linear(3, 3), lacking), *xy())


@pytest.mark.parametrize("form", ["vmap", "loop"])
def test_a_model_that_keeps_what_it_computes(form: str) -> None:
    problem, (x, y) = problem_of(Watched(), form=form), (torch.randn(4, 7), torch.randint(0, 3, (4,)))
    once, again = (double.gradients(problem, x, y) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize("loss", [functional.mse_loss, functional.binary_cross_entropy_with_logits])
def test_outputs_without_an_axis_of_their_own(loss: Any) -> None:
    """One number a sample, as of ``squeeze(-1)``."""
    torch.manual_seed(3)
    net, x, y = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), torch.randn(7, 5), torch.rand(7)
    found = double.gradients(problem_of(net, loss), x, y)
    assert oracles.relative_error(found, exact(net, loss, x, y)) <= ROUNDED


def test_slopes_are_zero_where_the_loss_is_flat() -> None:
    objective = Objective.of(nn.Sequential(nn.Linear(5, 2), nn.ReLU()), functional.l1_loss)
    x = torch.randn(7, 5)
    targets = objective.module(x).detach()
    targets[[2, 5]] += 1
    assert double.slopes(objective, x, targets).nonzero()[:, 0].tolist() == [2, 5]


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
    plain = plainly(problem_of(net, specimen.loss, "loop"), x, y)
    allowed = max(ROUNDED * expected.norm(), 2 * (plain.double() - expected).norm())
    assert (found.double() - expected).norm() <= allowed


def _narrowed(leaf: Tensor) -> Tensor:
    return leaf.float() if leaf.is_floating_point() else leaf


def _widened(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf
