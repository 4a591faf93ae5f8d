"""CgInfluence: values against dense solves, what convergence means, and what bad systems get."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from dask_influence import CgInfluence, JacobiPreconditioner, NystroemPreconditioner
from dask_influence.core.estimators import Cg, CgInverse
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceError,
    ConvergenceWarning,
    IndefiniteCurvatureWarning,
)
from dask_influence.execution.drive import drive
from tests import data, oracles
from tests.core.estimators import dense

SCORES = 1e-8
DEFINITE = [*(1.0 + 0.37 * k for k in range(17)), 40.0, 90.0]
INDEFINITE = [-0.9, -0.4, *(0.01 * k for k in range(12)), 3.0, 9.0]


def fit(case: data.Case, **how: Any) -> CgInfluence:
    how = {"rtol": 1e-10} | how
    return CgInfluence(case.model, case.loss, case.regularization, **how).fit(case.train)


def inverse(size: int, regularization: float, answer: dense.Answer, **how: Any) -> CgInverse:
    system = dense.system(size, regularization, how.pop("dtype", torch.float64))
    configuration = Cg(**how)
    configuration.validate(system)
    return drive(configuration.fit(system), answer)


# -- values -------------------------------------------------------------------------------------
@pytest.mark.parametrize("preconditioner", [None, "jacobi", "nystroem"])
@pytest.mark.parametrize("name", data.ALL)
def test_up_against_a_dense_solve(name: str, preconditioner: str | None) -> None:
    """Some cases have N > P; every chunking here is ragged."""
    case = data.ALL[name]()
    scores = fit(case, preconditioner=preconditioner, chunk_size=7 if name in data.SMALL else 60)
    scores = scores.influences(*case.test, *case.train)
    expected = case.up(case.inverse)
    assert oracles.relative_error(scores, expected) <= SCORES
    plain = case.up(torch.eye(len(case.inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5


@pytest.mark.parametrize("name", ["linear_regression", "mlp_classification"])
def test_perturbation_against_a_dense_solve(name: str) -> None:
    case = data.SMALL[name]()
    values = fit(case).influences(*case.test, *case.train, mode="perturbation")
    assert oracles.relative_error(values, case.perturbation(case.inverse)) <= SCORES


def test_factors_and_one_test_point() -> None:
    case = data.mlp_classification()
    fitted = fit(case)
    gradients = oracles.gradients(case.model, case.loss, *case.test)
    factors = fitted.influence_factors(*case.test)
    assert oracles.relative_error(factors, gradients @ case.inverse) <= SCORES
    one = fitted.influence_factors(case.test[0][:1], case.test[1][:1])
    assert oracles.relative_error(one, (gradients @ case.inverse)[:1]) <= SCORES


@pytest.mark.parametrize("kind", ["ggn", "fisher", "empirical_fisher"])
def test_other_curvatures(kind: str) -> None:
    case = data.mlp_classification()
    curvature = getattr(oracles, "ggn" if kind == "fisher" else kind)(case.model, case.loss, *case.train)
    expected = case.up(oracles.inverse(curvature, case.regularization))
    scores = fit(case, curvature=kind).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, expected) <= SCORES


def test_chunks_do_not_matter() -> None:
    case = data.mlp_classification()
    first, second = (fit(case, chunk_size=size).influence_factors(*case.test) for size in (3, 37))
    assert oracles.relative_error(first, second) <= 1e-10


@pytest.mark.parametrize("preconditioner", [None, "nystroem"])
def test_another_regularization_equals_a_refit(preconditioner: str | None) -> None:
    case = data.mlp_regression()
    moved = fit(case, preconditioner=preconditioner).with_regularization(0.3)
    refit = CgInfluence(case.model, case.loss, 0.3, rtol=1e-10, preconditioner=preconditioner).fit(case.train)
    assert torch.equal(moved.influence_factors(*case.test), refit.influence_factors(*case.test))


def test_float32_reaches_what_float32_resolves_without_a_warning() -> None:
    case = data.mlp_classification()
    model = oracles.copy.deepcopy(case.model).float()
    fitted = CgInfluence(model, case.loss, case.regularization, rtol=1e-12)
    fitted.fit((case.train[0].float(), case.train[1]))
    scores = fitted.influences(case.test[0].float(), case.test[1], case.train[0].float(), case.train[1])
    assert scores.dtype == torch.float32
    assert oracles.relative_error(scores, case.up(case.inverse)) <= 1e-4
    assert 1e-12 < fitted.diagnostics["worst_residual"] < 1e-4


# -- blocks -------------------------------------------------------------------------------------
def test_dependent_right_hand_sides_do_not_break_it_down() -> None:
    matrices = dense.with_spectrum(DEFINITE)
    rows = data.normal(91, 3, len(DEFINITE))
    rows = torch.cat(
        [rows, rows, rows[:1] - 2 * rows[1:2], torch.zeros(1, len(DEFINITE), dtype=torch.float64)]
    )
    answer = dense.Answer(matrices)
    cg = inverse(len(DEFINITE), 0.1, answer, rtol=1e-11)
    solution = dense.solution(cg, rows, answer)
    assert oracles.relative_error(solution.factors, dense.exact(matrices, 0.1, rows)) <= 1e-10
    assert answer.vectors <= 3 * answer.passes + len(rows)  # three directions, whatever the rows
    reported = solution.residuals()
    assert reported is not None
    assert float(reported[-1]) == 0


def test_dependent_right_hand_sides_in_a_narrow_dtype() -> None:
    """Where directions are told apart by inner products of rows; one row is nearly another."""
    matrices = dense.with_spectrum(DEFINITE)
    rows = data.normal(91, 3, len(DEFINITE))
    rows = torch.cat([rows, 1e6 * rows, rows[:1] + 1e-9 * rows[1:2]])
    answer = dense.Answer(matrices)
    cg = inverse(len(DEFINITE), 0.1, answer, rtol=1e-5, dtype=torch.float32)
    factors = dense.solve(cg, rows, answer)
    assert float(dense.residuals(matrices, 0.1, rows, factors).max()) <= 1e-5
    assert answer.vectors <= 3 * answer.passes + len(rows)


def test_more_right_hand_sides_take_fewer_passes_for_all_of_them() -> None:
    matrices = dense.with_spectrum([10.0 ** (k / 10) for k in range(-20, 21)])
    rows = data.normal(92, 13, 41)
    passes = {}
    for count in (1, 13):
        answer = dense.Answer(matrices)
        dense.solve(inverse(41, 1e-3, answer, rtol=1e-8), rows[:count], answer)
        passes[count] = answer.passes
    assert passes[13] < passes[1] / 3


def test_converged_right_hand_sides_leave_the_block() -> None:
    """An eigenvector is solved in one iteration and then costs nothing."""
    matrices = dense.with_spectrum([10.0 ** (k / 5) for k in range(-9, 10)])
    _, vectors = torch.linalg.eigh(matrices.mean(0))
    rows = torch.cat([vectors.T[:5], data.normal(93, 1, 19)])
    answer = dense.Answer(matrices)
    dense.solve(inverse(19, 1e-3, answer, rtol=1e-8), rows, answer)
    alone = dense.Answer(matrices)
    dense.solve(inverse(19, 1e-3, alone, rtol=1e-8), rows[5:], alone)
    assert answer.vectors <= alone.vectors + 3 * len(rows)


def test_reported_residuals_are_the_true_ones() -> None:
    matrices = dense.with_spectrum([10.0 ** (k / 10) for k in range(-20, 21)])
    rows = data.normal(94, 4, 41)
    answer = dense.Answer(matrices)
    cg = inverse(41, 0.1, answer, rtol=1e-3)
    solution = dense.solution(cg, rows, answer)
    true = dense.residuals(matrices, 0.1, rows, solution.factors)
    reported = solution.residuals()
    assert reported is not None
    assert torch.allclose(reported, true, rtol=1e-9, atol=0)
    assert 1e-9 < float(true.max()) <= 1e-3


def test_absolute_tolerance() -> None:
    matrices = dense.with_spectrum(DEFINITE)
    rows = torch.stack([data.normal(95, len(DEFINITE)), 1e-9 * data.normal(96, len(DEFINITE))])
    answer = dense.Answer(matrices)
    factors = dense.solve(inverse(len(DEFINITE), 0.1, answer, rtol=0.0, atol=1e-6), rows, answer)
    assert not factors[1].any()
    difference = factors[0] @ matrices.mean(0) + 0.1 * factors[0] - rows[0]
    assert float(difference.norm()) <= 1e-6


# -- preconditioners ------------------------------------------------------------------------------
def test_nystroem_saves_passes_where_few_eigenvalues_are_large() -> None:
    spectrum = [*(10.0 ** (k / 4) for k in range(18)), *(1e-2 for _ in range(60))]
    matrices = dense.with_spectrum(spectrum)
    rows = data.normal(97, 1, len(spectrum))
    passes = {}
    for preconditioner in (None, NystroemPreconditioner(rank=20)):
        answer = dense.Answer(matrices)
        cg = inverse(len(spectrum), 1e-2, answer, rtol=1e-8, preconditioner=preconditioner)
        factors = dense.solve(cg, rows, answer)
        assert float(dense.residuals(matrices, 1e-2, rows, factors).max()) <= 1e-8
        passes[preconditioner] = answer.passes
    assert passes[NystroemPreconditioner(rank=20)] < passes[None] / 2


def test_jacobi_saves_passes_where_the_diagonal_varies() -> None:
    diagonal = torch.diag(torch.logspace(-3, 3, 61, dtype=torch.float64)).expand(dense.SAMPLES, -1, -1)
    rows = data.normal(98, 1, 61)
    passes = {}
    for preconditioner in (None, JacobiPreconditioner(probes=3)):
        answer = dense.Answer(diagonal)
        cg = inverse(61, 1e-2, answer, rtol=1e-8, preconditioner=preconditioner)
        factors = dense.solve(cg, rows, answer)
        assert float(dense.residuals(diagonal, 1e-2, rows, factors).max()) <= 1e-8
        passes[preconditioner] = answer.passes
    assert passes[JacobiPreconditioner(probes=3)] < passes[None] / 2


def test_names_mappings_and_objects_are_the_same_preconditioner() -> None:
    case = data.mlp_regression()
    kinds = ("jacobi", JacobiPreconditioner(), {"kind": "jacobi", "probes": 32, "seed": 0})
    first, *others = (fit(case, preconditioner=kind).influence_factors(*case.test) for kind in kinds)
    assert all(torch.equal(first, other) for other in others)


# -- what does not converge ------------------------------------------------------------------------
def test_too_few_iterations_warn_with_the_residual_reached() -> None:
    case = data.digits_mlp()
    fitted = fit(case, maxiter=3)
    with pytest.warns(
        ConvergenceWarning, match=r"worst relative residual is .* \(maxiter=3\); raise maxiter"
    ):
        fitted.influence_factors(*case.test)
    found = fitted.diagnostics
    assert found["unconverged"] == len(case.test[1])
    assert 1e-10 < found["worst_residual"] < 1
    assert found["solver_iterations"] == 3


def test_strict_raises_instead() -> None:
    case = data.digits_mlp()
    with pytest.raises(ConvergenceError, match="maxiter=3"):
        fit(case, maxiter=3, strict=True).influence_factors(*case.test)
    fit(data.mlp_regression(), strict=True).influence_factors(*data.mlp_regression().test)


def test_singular_without_regularization_says_so() -> None:
    matrices = dense.with_spectrum([0.0, 0.0, *DEFINITE])
    answer = dense.Answer(matrices)
    cg = inverse(len(DEFINITE) + 2, 0.0, answer)
    with pytest.warns(ConvergenceWarning, match="singular without hessian_regularization > 0"):
        dense.solve(cg, data.normal(99, 2, len(DEFINITE) + 2), answer)


def test_singular_without_regularization_solves_what_has_a_solution() -> None:
    matrices = dense.with_spectrum([0.0, 0.0, *DEFINITE])
    rows = data.normal(99, 2, len(DEFINITE) + 2) @ matrices.mean(0)
    answer = dense.Answer(matrices)
    factors = dense.solve(inverse(len(DEFINITE) + 2, 0.0, answer, rtol=1e-9), rows, answer)
    assert oracles.relative_error(factors, rows @ torch.linalg.pinv(matrices.mean(0), rtol=1e-12)) <= 1e-8


@pytest.mark.parametrize("poison", [1, 3])
def test_products_that_are_not_finite_stop_it(poison: int) -> None:
    answer = dense.Answer(dense.with_spectrum(DEFINITE), poison)
    with pytest.raises(ConvergenceError, match=r"NaN or inf.*dtype=torch\.float64"):
        dense.solve(inverse(len(DEFINITE), 0.1, answer), data.normal(99, 2, len(DEFINITE)), answer)


@pytest.mark.parametrize("preconditioner", [None, "jacobi", "nystroem"])
def test_negative_curvature_warns_of_the_lambda_that_cures_and_still_solves(
    preconditioner: str | None,
) -> None:
    matrices = dense.with_spectrum(INDEFINITE)
    rows = data.normal(99, 3, len(INDEFINITE))
    answer = dense.Answer(matrices)
    cg = inverse(len(INDEFINITE), 0.3, answer, rtol=1e-10, preconditioner=preconditioner)
    with pytest.warns(IndefiniteCurvatureWarning, match=r"hessian_regularization > 0\.9009"):
        factors = dense.solve(cg, rows, answer)
    assert oracles.relative_error(factors, dense.exact(matrices, 0.3, rows)) <= SCORES
    assert cg.diagnostics()["smallest_eigenvalue_at_most"] == pytest.approx(-0.9, rel=1e-8)
    assert not cg.diagnostics()["positive_definite_as_far_as_seen"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense.solve(cg.with_regularization(0.9009), rows, answer)


def test_digits_network_below_its_lowest_eigenvalue() -> None:
    case = data.digits_mlp()
    lowest = float(torch.linalg.eigvalsh(case.hessian)[0])
    assert lowest < -1e-3
    fitted = CgInfluence(case.model, case.loss, 1e-3, rtol=1e-9, maxiter=3000).fit(case.train)
    with pytest.warns(IndefiniteCurvatureWarning, match=f"> {-1.001 * lowest:.4g} makes"):
        factors = fitted.influence_factors(case.test[0][:2], case.test[1][:2])
    gradients = oracles.gradients(case.model, case.loss, case.test[0][:2], case.test[1][:2])
    assert oracles.relative_error(factors, gradients @ oracles.inverse(case.hessian, 1e-3)) <= 1e-7


# -- arguments ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"rtol": -1.0}, "rtol must be a finite number"),
        ({"atol": float("nan")}, "atol must be a finite number"),
        ({"rtol": 0.0}, "never reached"),
        ({"rtol": 1.0}, "below 1"),
        ({"maxiter": 0}, "maxiter must be None or a positive integer"),
        ({"maxiter": 2.5}, "maxiter must be None or a positive integer"),
        ({"preconditioner": "ilu"}, "preconditioner must be None, 'jacobi', 'nystroem'"),
        ({"preconditioner": 3}, "preconditioner must be None"),
        ({"preconditioner": {"kind": "jacobi", "probes": 0}}, "probes of JacobiPreconditioner .* ≥ 1"),
        ({"preconditioner": {"kind": "nystroem", "rank": 0}}, "rank of NystroemPreconditioner .* ≥ 1"),
    ],
)
def test_arguments_that_cannot_be_used(how: dict[str, Any], message: str) -> None:
    case = data.linear_regression()
    with pytest.raises(ConfigurationError, match=message):
        fit(case, **how)


def test_a_preconditioner_of_more_rank_than_parameters_is_the_whole_curvature() -> None:
    case = data.linear_regression()
    fitted = fit(case, preconditioner=NystroemPreconditioner(rank=99))
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(case.inverse)) <= SCORES
