"""Responses to the weight of one training point, against minima found by other means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.func import functional_call

from dask_influence import DirectInfluence, GradientDotInfluence
from dask_influence.errors import ConfigurationError, DataWarning, IncompleteRunError, NotFittedError
from dask_influence.validation import (
    Newton,
    finite_difference_response,
    proximal_bregman_response,
    response,
)

LAMBDA = 0.02
LOSS = nn.functional.cross_entropy
RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(57, 4, dtype=torch.float64, generator=RANDOM)
Y = (X[:, 0] + 0.7 * torch.randn(57, dtype=torch.float64, generator=RANDOM) > 0).long() + (X[:, 1] > 1).long()
TRAIN, TEST = (X[:50], Y[:50]), (X[50:], Y[50:])


def fitted_head() -> nn.Module:
    torch.manual_seed(1)
    return Newton(nn.Linear(4, 3).double(), LOSS, LAMBDA)(*TRAIN, seed=0)


def network() -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        LOSS(net(TRAIN[0]), TRAIN[1]).backward()
        optimizer.step()
    return net


@pytest.fixture(scope="module")
def exact() -> DirectInfluence:
    return DirectInfluence(fitted_head(), LOSS, LAMBDA).fit(TRAIN)


@pytest.fixture(scope="module")
def gauss_newton() -> DirectInfluence:
    return DirectInfluence(network(), LOSS, LAMBDA, curvature="ggn").fit(TRAIN)


def minimised(model: nn.Module, value: Any) -> np.ndarray:
    """Test losses where scipy finds the minimum of ``value(θ by name)``, from the model's own θ."""
    held = dict(model.named_parameters())
    start = nn.utils.parameters_to_vector(held.values()).detach()
    sizes, shapes = [p.numel() for p in held.values()], [p.shape for p in held.values()]

    def named(flat: Tensor) -> dict[str, Tensor]:
        return {n: p.reshape(s) for n, p, s in zip(held, flat.split(sizes), shapes, strict=True)}

    def both(flat: np.ndarray) -> tuple[float, np.ndarray]:
        theta = torch.tensor(flat, requires_grad=True)
        found = value(named(theta), theta - start)
        (slope,) = torch.autograd.grad(found, theta)
        return found.item(), slope.numpy()

    found = minimize(both, start.numpy(), jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 3000})
    with torch.no_grad():
        outputs = functional_call(model, named(torch.from_numpy(found.x)), (TEST[0],))
        return LOSS(outputs, TEST[1], reduction="none").numpy()


# -- values ----------------------------------------------------------------------------
def test_finite_differences_are_those_of_the_regularised_objective(exact: DirectInfluence) -> None:
    found = finite_difference_response(exact, TRAIN, TEST, points=[3, 17, 40], weight=1e-2)

    def losses(k: int, weight: float) -> np.ndarray:
        def value(theta: dict[str, Tensor], _: Tensor) -> Tensor:
            outputs = functional_call(exact.model, theta, (TRAIN[0],))
            penalty = LAMBDA / 2 * sum(p.square().sum() for p in theta.values())
            return LOSS(outputs, TRAIN[1]) + penalty + weight * LOSS(outputs[k : k + 1], TRAIN[1][k : k + 1])

        return minimised(exact.model, value)

    expected = [(losses(k, -1e-2) - losses(k, 1e-2)) / (2e-2 * 50) for k in (3, 17, 40)]
    assert np.allclose(found.actual, np.stack(expected, 1), rtol=1e-4, atol=1e-7)


def test_small_finite_differences_are_the_exact_scores(exact: DirectInfluence) -> None:
    found = finite_difference_response(exact, TRAIN, TEST, points=20, weight=1e-5)
    assert np.allclose(found.actual, found.predicted, rtol=1e-5, atol=1e-9)
    assert found.value > 1 - 1e-9
    assert found.slope == pytest.approx(1, abs=1e-6)
    assert found.noise == 0
    plain = GradientDotInfluence(exact.model, LOSS, LAMBDA).fit(TRAIN)
    other = finite_difference_response(plain, TRAIN, TEST, points=20, weight=1e-5)
    assert np.array_equal(other.actual, found.actual)
    assert other.value < 0.98


def test_it_holds_at_a_model_that_is_no_minimum() -> None:
    torch.manual_seed(3)
    somewhere = DirectInfluence(nn.Linear(4, 3).double(), LOSS, LAMBDA).fit(TRAIN)
    found = finite_difference_response(somewhere, TRAIN, TEST, points=8, weight=1e-5)
    assert np.allclose(found.actual, found.predicted, rtol=1e-4, atol=1e-9)


def test_a_head_alone_may_be_weighed(gauss_newton: DirectInfluence) -> None:
    head = DirectInfluence(gauss_newton.model, LOSS, LAMBDA, parameters=["2.*"]).fit(TRAIN)
    found = finite_difference_response(head, TRAIN, TEST, points=8, weight=1e-5)
    assert np.allclose(found.actual, found.predicted, rtol=1e-4, atol=1e-9)


def proximal(model: nn.Module, k: int, regularization: float = LAMBDA) -> np.ndarray:
    """Change of the test losses under the proximal Bregman objective, divergence written out for cross-entropy."""
    with torch.no_grad():
        before = model(TRAIN[0])
        slopes = torch.softmax(before, 1) - nn.functional.one_hot(TRAIN[1], 3)
        at = LOSS(before, TRAIN[1])
        losses = LOSS(model(TEST[0]), TEST[1], reduction="none").numpy()

    def value(theta: dict[str, Tensor], moved: Tensor) -> Tensor:
        outputs = functional_call(model, theta, (TRAIN[0],))
        divergence = LOSS(outputs, TRAIN[1]) - at - (slopes * (outputs - before)).sum() / 50
        near = regularization / 2 * moved.square().sum()
        return divergence + near - LOSS(outputs[k : k + 1], TRAIN[1][k : k + 1]) / 50

    return minimised(model, value) - losses


def test_the_proximal_response_is_the_minimum_of_its_objective(gauss_newton: DirectInfluence) -> None:
    found = proximal_bregman_response(gauss_newton, TRAIN, TEST, points=[0, 8, 31], tolerance=1e-5)
    expected = [proximal(gauss_newton.model, k) for k in (0, 8, 31)]
    assert np.allclose(found.actual, np.stack(expected, 1), rtol=1e-3, atol=1e-7)


def test_the_proximal_response_is_what_gauss_newton_scores_say(gauss_newton: DirectInfluence) -> None:
    """The closer θ is kept, the more so."""
    near = gauss_newton.with_regularization(0.5)
    found = proximal_bregman_response(near, TRAIN, TEST, points=25)
    assert found.value > 0.99
    assert found.slope == pytest.approx(1, abs=0.25)
    assert proximal_bregman_response(gauss_newton, TRAIN, TEST, points=25).value < found.value
    plain = GradientDotInfluence(gauss_newton.model, LOSS, 0.02).fit(TRAIN)
    exact = proximal_bregman_response(gauss_newton, TRAIN, TEST, points=25)
    assert proximal_bregman_response(plain, TRAIN, TEST, points=25).value < exact.value - 0.05


def test_coordinates_do_not_change_the_minimum(
    gauss_newton: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = gauss_newton.with_regularization(0.5)
    one = proximal_bregman_response(near, TRAIN, TEST, points=4)
    monkeypatch.setattr("dask_influence.validation.proximal.DENSE", 10)
    other = proximal_bregman_response(near, TRAIN, TEST, points=4)
    assert np.allclose(one.actual, other.actual, rtol=1e-2, atol=2e-5)
    assert not np.array_equal(one.actual, other.actual)


def test_of_a_linear_model_both_responses_agree(exact: DirectInfluence) -> None:
    """The two divergences are the same there: what differs is second order in the weight."""
    one = finite_difference_response(exact, TRAIN, TEST, points=[4, 9, 30])
    other = proximal_bregman_response(exact, TRAIN, TEST, points=[4, 9, 30])
    assert np.corrcoef(one.actual.ravel(), other.actual.ravel())[0, 1] > 0.99


def test_kinks_are_no_hindrance() -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    influence = DirectInfluence(net, LOSS, 0.05, curvature="ggn").fit(TRAIN)
    found = proximal_bregman_response(influence, TRAIN, TEST, points=6)
    assert not found.failures
    expected = [proximal(net, k, 0.05) for k in np.random.default_rng(0).choice(50, 6, replace=False)]
    assert np.corrcoef(found.actual.ravel(), np.stack(expected, 1).ravel())[0, 1] > 0.999


def test_random_scores_have_a_response_about_zero(
    exact: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = np.random.default_rng(0).normal(size=(7, 25))
    monkeypatch.setattr(DirectInfluence, "influences", lambda *args: scores)
    found = finite_difference_response(exact, TRAIN, TEST, points=25)
    assert found.interval[0] < 0 < found.interval[1]


# -- store, cluster, failures ------------------------------------------------------------
def test_a_second_call_measures_nothing_again(exact: DirectInfluence, tmp_path: Path) -> None:
    first = proximal_bregman_response(exact, TRAIN, TEST, points=3, store=tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(kept) == 4
    again = proximal_bregman_response(exact, TRAIN, TEST, points=3, store=tmp_path)
    assert np.array_equal(first.actual, again.actual)
    assert again.seconds == first.seconds
    proximal_bregman_response(exact.with_regularization(0.1), TRAIN, TEST, points=3, store=tmp_path)
    finite_difference_response(exact, TRAIN, TEST, points=3, store=tmp_path)
    assert len(list(tmp_path.rglob("*.npy"))) == 12
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_a_cluster_measures_the_same_bits(exact: DirectInfluence, cluster: Any) -> None:
    there = DirectInfluence(exact.model, LOSS, LAMBDA, client=cluster).fit(TRAIN)
    seen: list[tuple[str, int, int]] = []
    found = proximal_bregman_response(
        there, TRAIN, TEST, points=3, progress=lambda *state: seen.append(state)
    )
    here = proximal_bregman_response(exact, TRAIN, TEST, points=3)
    assert np.array_equal(found.actual, here.actual)
    assert seen[-1] == ("response", 4, 4)


def test_minima_that_are_not_found_are_told(gauss_newton: DirectInfluence) -> None:
    with pytest.raises(IncompleteRunError, match=r"response failed on 3 of 3 .* 10 steps leave a gradient"):
        proximal_bregman_response(gauss_newton.with_regularization(1e-4), TRAIN, TEST, points=3, steps=10)
    torch.manual_seed(5)
    bent = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    bent = DirectInfluence(bent, LOSS, 1e-6, curvature="ggn").fit(TRAIN)
    with pytest.raises(IncompleteRunError, match="not positive definite at the fitted parameters"):
        finite_difference_response(bent, TRAIN, TEST, points=3)


def test_a_point_that_cannot_be_measured_is_left_out(
    exact: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finite_difference_response(exact, TRAIN, TEST, points=[1, 3, 4, 6])
    measured = response.FiniteDifference.measured

    def fails(self: Any, members: np.ndarray, seed: int) -> np.ndarray:
        if members[0] == 5:
            raise ArithmeticError("no minimum")
        return measured(self, members, seed)

    monkeypatch.setattr(response.FiniteDifference, "measured", fails)
    with pytest.warns(DataWarning, match="response failed on 1 of 5 points; on number 2"):
        found = finite_difference_response(exact, TRAIN, TEST, points=[1, 3, 5, 4, 6])
    assert np.array_equal(found.actual, whole.actual)
    assert np.array_equal(found.predicted, whole.predicted)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"points": 2}, "points must be an integer from 3 to 50"),
        ({"points": [1, 2, 50]}, "positions from 0 to 49"),
        ({"weight": 0.0}, "weight must be > 0 and finite; got 0.0"),
        ({"weight": "much"}, "weight must be a number"),
        ({"tolerance": float("nan")}, "tolerance must be > 0"),
    ],
)
def test_bad_arguments_are_named(exact: DirectInfluence, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        finite_difference_response(exact, TRAIN, TEST, **given)


def test_models_without_such_a_response_are_refused(
    exact: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFittedError):
        finite_difference_response(DirectInfluence(exact.model, LOSS, LAMBDA), TRAIN, TEST)
    with pytest.raises(ConfigurationError, match="steps must be an integer"):
        proximal_bregman_response(exact, TRAIN, TEST, steps=0)
    line = nn.Linear(4, 1).double()
    free = DirectInfluence(line, nn.functional.mse_loss, 0.0).fit((X, X[:, :1]))
    with pytest.raises(ConfigurationError, match="takes hessian_regularization > 0"):
        proximal_bregman_response(free, (X, X[:, :1]), (X, X[:, :1]))
    blocks = DirectInfluence(exact.model, LOSS, {"weight": 0.1, "bias": 0.2}, block_structure="parameter")
    with pytest.raises(ConfigurationError, match="one λ; the model has one for each block"):
        finite_difference_response(blocks.fit(TRAIN), TRAIN, TEST)
    monkeypatch.setattr(response, "MOST_PARAMETERS", 14)
    with pytest.raises(ConfigurationError, match="up to 14 parameters; the model has 15 in θ"):
        finite_difference_response(exact, TRAIN, TEST)
