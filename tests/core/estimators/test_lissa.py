"""LissaInfluence: it converges to the dense solve, and says which setting cures a divergence."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

from dask_influence import LissaInfluence
from dask_influence.core.estimators import Lissa, LissaInverse
from dask_influence.core.estimators.lissa import Draws
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceError,
    ConvergenceWarning,
    IndefiniteCurvatureWarning,
)
from dask_influence.execution.drive import drive
from tests import data, oracles
from tests.core.estimators import dense

DEFINITE = [0.2, 0.3, 0.5, 0.7, 1.1, 1.3, 1.7, 2.0, 2.9, 3.1, 4.1, 5.3, 6.0]
ROWS = data.normal(99, 3, len(DEFINITE))


def fit(case: data.Case, **how: Any) -> LissaInfluence:
    return LissaInfluence(case.model, case.loss, case.regularization, **how).fit(case.train)


def inverse(size: int, regularization: float, answer: dense.Answer, **how: Any) -> LissaInverse:
    system = dense.system(size, regularization)
    configuration = Lissa(**how)
    configuration.validate(system)
    return drive(configuration.fit(system), answer)


# -- values -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["linear_regression", "logistic_regression", "mlp_classification"])
def test_up_against_a_dense_solve_within_its_tolerance(name: str) -> None:
    case = data.SMALL[name]()
    fitted = fit(case, rtol=1e-3)
    gradients = oracles.gradients(case.model, case.loss, *case.test)
    factors = fitted.influence_factors(*case.test)
    matrix = case.hessian + case.regularization * torch.eye(len(case.hessian), dtype=torch.float64)
    residual = (factors @ matrix - gradients).norm(dim=1) / gradients.norm(dim=1)
    assert float(residual.max()) <= 1e-3
    assert fitted.diagnostics["worst_residual"] == pytest.approx(float(residual.max()), rel=1e-3)
    expected = case.up(case.inverse)
    assert oracles.relative_error(factors, gradients @ case.inverse) <= 1e-2
    scores = fitted.influences_from_factors(factors, *case.train)
    assert oracles.relative_error(scores, expected) <= 1e-2
    plain = case.up(torch.eye(len(case.inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5


def test_perturbation_against_a_dense_solve() -> None:
    case = data.linear_regression()
    values = fit(case, rtol=1e-7).influences(*case.test, *case.train, mode="perturbation")
    assert oracles.relative_error(values, case.perturbation(case.inverse)) <= 1e-6


@pytest.mark.parametrize("batch_size", [None, 1, 3, 7, 11, 400])
def test_draws_of_any_size_converge_to_the_exact_factors(batch_size: int | None) -> None:
    """Matrices of single samples differ, so that a series without restarts would stop at their noise."""
    matrices = dense.with_spectrum(DEFINITE, noise=0.1)
    answer = dense.Answer(matrices)
    lissa = inverse(len(DEFINITE), 0.1, answer, rtol=1e-9, batch_size=batch_size)
    solution = dense.solution(lissa, ROWS, answer)
    true = dense.residuals(matrices, 0.1, ROWS, solution.factors)
    assert float(true.max()) <= 1e-9
    reported = solution.residuals()
    assert reported is not None
    assert torch.allclose(reported, true, rtol=1e-4, atol=0)


def test_dampening_adds_its_share_of_the_scale_and_is_certified_without() -> None:
    matrices = dense.with_spectrum(DEFINITE)
    answer = dense.Answer(matrices)
    lissa = inverse(len(DEFINITE), 0.1, answer, rtol=1e-9, scale=8.0, dampen=0.05)
    solution = dense.solution(lissa, ROWS, answer)
    factors = solution.factors
    assert oracles.relative_error(factors, dense.exact(matrices, 0.1 + 0.05 * 8.0, ROWS)) <= 1e-8
    reported = solution.residuals()
    assert reported is not None
    assert torch.allclose(reported, dense.residuals(matrices, 0.1, ROWS, factors), rtol=1e-6)
    assert float(reported.min()) > 0.05


def test_gradients_of_zero_have_factors_of_zero() -> None:
    answer = dense.Answer(dense.with_spectrum(DEFINITE))
    rows = torch.cat([ROWS, torch.zeros(1, len(DEFINITE), dtype=torch.float64)])
    factors = dense.solve(inverse(len(DEFINITE), 0.1, answer), rows, answer)
    assert not factors[-1].any()


# -- draws --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("total", "size"), [(37, 5), (37, 32), (401, 41), (10, 9), (7, 1)])
def test_an_epoch_of_draws_goes_through_every_sample_once(total: int, size: int) -> None:
    draws = Draws(total, size, seed=3)
    epoch = list(itertools.islice(iter(draws), draws.epoch))
    seen = [sample for draw in epoch if draw for run in draw for sample in run]
    assert sorted(seen) == list(range(total))
    assert max(sum(map(len, draw)) for draw in epoch if draw) <= size + 3


def test_draws_of_everything_are_passes() -> None:
    assert next(iter(Draws(11, 11, seed=0))) is None


def test_same_seed_same_bits_and_another_seed_the_same_values() -> None:
    case = data.logistic_regression()
    how = {"batch_size": 5, "rtol": 1e-3}
    first, again, other = (fit(case, seed=seed, **how).influence_factors(*case.test) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert oracles.relative_error(other, first) <= 1e-2


@pytest.mark.filterwarnings("ignore::dask_influence.errors.ConvergenceWarning")
def test_draws_do_not_depend_on_chunks() -> None:
    case = data.logistic_regression()
    first, second = (
        fit(case, batch_size=5, chunk_size=size, maxiter=60, rtol=1e-3).influence_factors(*case.test)
        for size in (3, 29)
    )
    assert oracles.relative_error(first, second) <= 1e-10


# -- the scale ------------------------------------------------------------------------------------
def test_chosen_scale_is_above_the_largest_eigenvalue_and_follows_lambda() -> None:
    case = data.mlp_classification()
    fitted = fit(case)
    largest = float(torch.linalg.eigvalsh(case.hessian)[-1])
    assert largest + case.regularization < fitted.diagnostics["scale"] < 5 * largest
    moved = fitted.with_regularization(0.4)
    refit = LissaInfluence(case.model, case.loss, 0.4).fit(case.train)
    assert moved.diagnostics["scale"] == refit.diagnostics["scale"]
    assert torch.equal(moved.influence_factors(*case.test), refit.influence_factors(*case.test))


def test_a_scale_below_half_of_the_largest_eigenvalue_diverges_and_says_what_would_do() -> None:
    answer = dense.Answer(dense.with_spectrum(DEFINITE))
    with pytest.raises(
        ConvergenceError,
        match=r"scale=2 is too small for an eigenvalue of about [56]\.\d.*use scale=[89]\.\d",
    ):
        dense.solve(inverse(len(DEFINITE), 0.1, answer, scale=2.0), ROWS, answer)
    dense.solve(inverse(len(DEFINITE), 0.1, answer, scale=6.8), ROWS, answer)


def test_a_chosen_scale_is_doubled_where_single_samples_diverge() -> None:
    matrices = dense.with_spectrum(DEFINITE, noise=2.0)
    answer = dense.Answer(matrices)
    lissa = inverse(len(DEFINITE), 1.0, answer, rtol=1e-6, batch_size=1, maxiter=200_000)
    factors = dense.solve(lissa, ROWS, answer)
    assert float(dense.residuals(matrices, 1.0, ROWS, factors).max()) <= 1e-6


# -- what does not converge ------------------------------------------------------------------------
def test_too_few_steps_warn_with_the_residual_reached() -> None:
    case = data.mlp_classification()
    fitted = fit(case, maxiter=3)
    with pytest.warns(
        ConvergenceWarning, match=r"worst relative residual is 0\.\d+ after 3 iterations; raise maxiter=3"
    ):
        fitted.influence_factors(*case.test)
    assert fitted.diagnostics["unconverged"] > 0
    with pytest.raises(ConvergenceError, match="raise maxiter=3"):
        fit(case, maxiter=3, strict=True).influence_factors(*case.test)


@pytest.mark.parametrize("poison", [1, 3])
def test_products_that_are_not_finite_stop_it(poison: int) -> None:
    answer = dense.Answer(dense.with_spectrum(DEFINITE), poison)
    with pytest.raises(ConvergenceError, match=r"NaN or inf.*dtype=torch\.float64"):
        dense.solve(inverse(len(DEFINITE), 0.1, answer, scale=9.0), ROWS, answer)


@pytest.mark.parametrize("batch_size", [3, 11])
def test_negative_curvature_under_a_given_scale(batch_size: int) -> None:
    answer = dense.Answer(dense.with_spectrum([-0.9, *DEFINITE[:-1]]))
    lissa = inverse(len(DEFINITE), 0.1, answer, scale=8.0, batch_size=batch_size)
    with pytest.raises(
        ConvergenceError, match=r"negative eigenvalue of -0\.[678].*hessian_regularization > 0\.[789]"
    ):
        dense.solve(lissa, ROWS, answer)


@pytest.mark.parametrize("batch_size", [3, 11])
def test_negative_curvature_names_the_lambda_that_cures(batch_size: int) -> None:
    matrices = dense.with_spectrum([-0.9, *DEFINITE[:-1]])
    answer = dense.Answer(matrices)
    with pytest.warns(IndefiniteCurvatureWarning, match=r"hessian_regularization > 0\.9"):
        lissa = inverse(len(DEFINITE), 0.1, answer, batch_size=batch_size)
    with pytest.raises(
        ConvergenceError, match=r"negative eigenvalue of -0\.[78].*hessian_regularization > 0\.[89]"
    ):
        dense.solve(lissa, ROWS, answer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense.solve(lissa.with_regularization(1.1), ROWS, answer)


# -- arguments ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"maxiter": 0}, "maxiter must be a positive integer"),
        ({"maxiter": None}, "maxiter must be a positive integer"),
        ({"batch_size": 2.5}, "batch_size must be a positive integer"),
        ({"dampen": -0.1}, "dampen must be at least 0"),
        ({"dampen": 1.0}, "dampen must be at least 0"),
        ({"scale": 0.0}, "scale must be None or a positive number"),
        ({"scale": float("nan")}, "scale must be None or a positive number"),
        ({"rtol": 0.0}, "rtol must be between 0 and 1"),
        ({"rtol": 1.0}, "rtol must be between 0 and 1"),
    ],
)
def test_arguments_that_cannot_be_used(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(data.linear_regression(), **how)
