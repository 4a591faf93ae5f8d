"""NystroemSketchInfluence against its own dense formula, Ĉ = Y (Ωᵀ Y)⁺ Yᵀ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dask_influence import NystroemSketchInfluence
from dask_influence.core.estimators.preconditioners import sketch_of
from dask_influence.errors import ConfigurationError, IndefiniteCurvatureWarning
from tests import data, oracles

SCORES = 1e-8
RANKS = {"linear_regression": 4, "logistic_regression": 7, "mlp_regression": 11, "mlp_classification": 17}


def fit(case: data.Case, rank: int, **how: Any) -> NystroemSketchInfluence:
    how = {"curvature": "ggn"} | how
    return NystroemSketchInfluence(case.model, case.loss, case.regularization, rank=rank, **how).fit(
        case.train
    )


def dense_sketch(curvature: Tensor, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(rank, len(curvature), generator=generator, dtype=torch.float64).T
    images = curvature @ test
    return images @ torch.linalg.pinv(test.T @ images, rtol=1e-13) @ images.T


def expected_inverse(case: data.Case, rank: int, seed: int = 0) -> Tensor:
    curvature = oracles.ggn(case.model, case.loss, *case.train)
    return oracles.inverse(dense_sketch(curvature, rank, seed), case.regularization)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", RANKS)
def test_up_against_the_dense_formula(name: str, seed: int) -> None:
    case, rank = data.SMALL[name](), RANKS[name]
    scores = fit(case, rank, seed=seed, chunk_size=7).influences(*case.test, *case.train)
    expected = case.up(expected_inverse(case, rank, seed))
    assert oracles.relative_error(scores, expected) <= SCORES
    plain = case.up(torch.eye(len(case.inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5


def test_perturbation_and_factors_against_the_dense_formula() -> None:
    case = data.mlp_regression()
    fitted, inverse = fit(case, 11), expected_inverse(case, 11)
    values = fitted.influences(*case.test, *case.train, mode="perturbation")
    assert oracles.relative_error(values, case.perturbation(inverse)) <= SCORES
    gradients = oracles.gradients(case.model, case.loss, *case.test)
    assert oracles.relative_error(fitted.influence_factors(*case.test), gradients @ inverse) <= SCORES


def test_a_definite_hessian_and_a_rank_that_is_nearly_whole() -> None:
    case = data.linear_regression()
    scores = fit(case, 9, curvature="hessian").influences(*case.test, *case.train)
    expected = case.up(oracles.inverse(dense_sketch(case.hessian, 9), case.regularization))
    assert oracles.relative_error(scores, expected) <= SCORES


def test_rank_above_that_of_the_curvature_is_the_exact_inverse() -> None:
    """P = 18 and rank of H 12: five more test vectors find nothing new, and no noise either."""
    case = data.logistic_regression()
    fitted = fit(case, 17)
    assert fitted.diagnostics["rank"] == 12
    exact = case.up(oracles.inverse(case.hessian, case.regularization))
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), exact) <= 1e-6


def test_one_pass_and_another_regularization_without_any() -> None:
    case = data.mlp_classification()
    fitted = fit(case, 13)
    assert fitted.diagnostics["passes"] == 1
    moved = fitted.with_regularization(0.4)
    refit = NystroemSketchInfluence(case.model, case.loss, 0.4, rank=13, curvature="ggn").fit(case.train)
    assert torch.equal(moved.influence_factors(*case.test), refit.influence_factors(*case.test))


def test_chunks_do_not_matter() -> None:
    case = data.mlp_classification()
    first, second = (fit(case, 13, chunk_size=size).influence_factors(*case.test) for size in (3, 37))
    assert oracles.relative_error(first, second) <= 1e-10


def test_float32_drops_directions_that_are_noise() -> None:
    case = data.logistic_regression()
    model = oracles.copy.deepcopy(case.model).float()
    fitted = NystroemSketchInfluence(model, case.loss, case.regularization, rank=15)
    fitted.fit((case.train[0].float(), case.train[1]))
    scores = fitted.influences(case.test[0].float(), case.test[1], case.train[0].float(), case.train[1])
    exact = case.up(oracles.inverse(case.hessian, case.regularization))
    assert scores.dtype == torch.float32
    assert oracles.relative_error(scores, exact) <= 1e-2


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.bfloat16, 0.05), (torch.float32, 1e-5)])
def test_more_rank_keeps_no_fewer_directions_of_rounded_products(dtype: torch.dtype, accuracy: float) -> None:
    """What rounding hides does not grow with the rank: 60 of 83 vectors find what 30 find, and more."""
    size, spectrum = 83, 0.7 ** torch.arange(83, dtype=torch.float64)
    basis = torch.linalg.qr(data.normal(63, size, size)).Q
    curvature = (basis * spectrum) @ basis.mT
    exact, found = torch.linalg.inv(curvature + 0.1 * torch.eye(size, dtype=torch.float64)), []
    for rank in (30, 60):
        test = torch.linalg.qr(data.normal(64, size, rank)).Q.mT.to(dtype).to(torch.float64)
        sketch = sketch_of(test, (test @ curvature).to(dtype).to(torch.float64), torch.finfo(dtype).eps)
        found.append(len(sketch.values))
    inverse = sketch.inverse_times(torch.eye(size, dtype=torch.float64), 0.1, 0.1)
    assert found[1] >= found[0]
    assert oracles.relative_error(inverse, exact) <= accuracy


def test_no_curvature_leaves_the_gradient_over_lambda() -> None:
    zero = torch.zeros(3, 7, dtype=torch.float64)
    sketch = sketch_of(torch.linalg.qr(data.normal(61, 7, 3)).Q.mT, zero, 1e-16)
    rows = data.normal(62, 2, 7)
    assert len(sketch.values) == 0
    assert torch.equal(sketch.inverse_times(rows, 0.5, 0.5), rows / 0.5)


def test_indefinite_sketch_warns_with_the_lambda_that_cures() -> None:
    case = data.mlp_classification()
    lowest = float(torch.linalg.eigvalsh(dense_sketch(case.hessian, 40))[0])
    assert lowest < -0.01
    with pytest.warns(IndefiniteCurvatureWarning, match=f"hessian_regularization > {-lowest:.4g}"):
        NystroemSketchInfluence(case.model, case.loss, -lowest / 2, rank=40).fit(case.train)
    fitted = NystroemSketchInfluence(case.model, case.loss, -2 * lowest, rank=40).fit(case.train)
    assert fitted.diagnostics["positive_definite"]


@pytest.mark.parametrize("rank", [0, -1, 10, 11, 2.0, True, "3"])
def test_ranks_that_cannot_be_used(rank: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"rank must be an integer from 1 to P − 1 = 9"):
        fit(data.linear_regression(), rank)


@pytest.mark.parametrize("rank", [1, 9])
def test_ranks_that_can(rank: int) -> None:
    assert fit(data.linear_regression(), rank).diagnostics["rank"] == rank


def test_no_regularization_is_refused() -> None:
    case = data.linear_regression()
    with pytest.raises(ConfigurationError, match="give hessian_regularization > 0"):
        NystroemSketchInfluence(case.model, case.loss, 0.0, rank=3).fit(case.train)
    fitted = fit(case, 3)
    with pytest.raises(ConfigurationError, match="give hessian_regularization > 0"):
        fitted.with_regularization(0.0)
