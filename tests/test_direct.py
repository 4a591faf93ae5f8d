"""DirectInfluence against dense float64 algebra: values, never correlations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dask_influence import DirectInfluence, InfluenceMode
from tests import data, oracles

EXACT = 1e-9


@pytest.mark.parametrize("name", data.ALL)
def test_up_against_dense_algebra(name: str) -> None:
    case = data.ALL[name]()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    scores = fitted.influences(*case.test, *case.train)
    assert isinstance(scores, Tensor)
    assert scores.dtype == torch.float64
    expected = case.up(case.inverse)
    assert oracles.relative_error(scores, expected) <= EXACT
    plain = case.up(torch.eye(len(case.inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5


@pytest.mark.parametrize("mode", [InfluenceMode.Perturbation, "perturbation"])
@pytest.mark.parametrize("name", data.SMALL)
def test_perturbation_against_dense_algebra(name: str, mode: InfluenceMode | str) -> None:
    case = data.SMALL[name]()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    values = fitted.influences(*case.test, *case.train, mode=mode)
    expected = case.perturbation(case.inverse)
    assert values.shape == (len(case.test[0]), *case.train[0].shape)
    assert oracles.relative_error(values, expected) <= EXACT
    plain = case.perturbation(torch.eye(len(case.inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5


def test_perturbation_of_digits() -> None:
    case = data.digits_mlp()
    test, train = oracles.pick(case.test, slice(0, 5)), oracles.pick(case.train, slice(3, 16))
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    values = fitted.influences(*test, *train, mode="perturbation")
    assert oracles.relative_error(values, case.perturbation(case.inverse, test, train)) <= EXACT


@pytest.mark.parametrize("name", data.SMALL)
def test_one_data_set_is_the_symmetric_case(name: str) -> None:
    case = data.SMALL[name]()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    scores = fitted.influences(*case.test)
    assert oracles.relative_error(scores, case.up(case.inverse, train=case.test)) <= EXACT
    assert oracles.relative_error(scores.T, scores) <= EXACT


def test_mode_up_by_enumeration_and_by_name() -> None:
    case = data.mlp_regression()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    scores = fitted.influences(*case.test, *case.train)
    assert torch.equal(scores, fitted.influences(*case.test, *case.train, mode=InfluenceMode.Up))
    assert torch.equal(scores, fitted.influences(*case.test, *case.train, mode="up"))


@pytest.mark.parametrize("name", data.SMALL)
def test_factors_solve_the_system(name: str) -> None:
    case = data.SMALL[name]()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    factors = fitted.influence_factors(*case.test)
    expected = oracles.gradients(case.model, case.loss, *case.test) @ case.inverse
    assert oracles.relative_error(factors, expected) <= EXACT


@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_influences_from_factors(mode: str) -> None:
    case = data.mlp_classification()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    factors = fitted.influence_factors(*case.test)
    values = fitted.influences_from_factors(factors, *case.train, mode=mode)
    assert oracles.relative_error(values, getattr(case, mode)(case.inverse)) <= EXACT


def test_positive_influence_helps() -> None:
    """Leaving the most helpful point out raises the test loss, by about score/M."""
    case = data.linear_regression()
    scores = DirectInfluence(case.model, case.loss, 1e-3).fit(case.train).influences(*case.test, *case.train)
    i, j = divmod(int(scores.argmax()), scores.shape[1])
    kept = torch.arange(scores.shape[1]) != j
    train = oracles.pick(case.train, kept)
    retrained = data.trained(data.seeded(lambda: nn.Linear(4, 2)), nn.functional.mse_loss, train)
    x, y = oracles.pick(case.test, slice(i, i + 1))
    rise = float((case.loss(retrained(x), y) - case.loss(case.model(x), y)).detach())
    assert rise > 0
    assert 0.5 < rise / (float(scores[i, j]) / len(kept)) < 2.0


def test_influence_of_fitted_points_need_not_be_asked_in_fit_order() -> None:
    case = data.mlp_classification()
    order = torch.randperm(len(case.train[0]))
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    scores = fitted.influences(*case.test, *oracles.pick(case.train, order))
    assert oracles.relative_error(scores, case.up(case.inverse)[:, order]) <= EXACT


def _curvature(case: data.Case, kind: str) -> Tensor:
    if kind == "fisher":
        return oracles.fisher_of_categorical(case.model, case.train[0])
    return getattr(oracles, kind)(case.model, case.loss, *case.train)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_each_curvature_is_the_one_it_is_called(kind: str) -> None:
    case = data.mlp_classification()
    fitted = DirectInfluence(case.model, case.loss, case.regularization, curvature=kind).fit(case.train)
    inverse = oracles.inverse(_curvature(case, kind), case.regularization)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(inverse)) <= EXACT
    values = fitted.influences(*case.test, *case.train, mode="perturbation")
    assert oracles.relative_error(values, case.perturbation(inverse)) <= EXACT


@pytest.mark.parametrize("kind", ["ggn", "fisher"])
def test_gauss_newton_and_fisher_of_regression(kind: str) -> None:
    """For the Gaussian loss the Fisher matrix is the Gauss-Newton matrix, whatever the residuals."""
    case = data.mlp_regression()
    fitted = DirectInfluence(case.model, case.loss, case.regularization, curvature=kind).fit(case.train)
    inverse = oracles.inverse(oracles.ggn(case.model, case.loss, *case.train), case.regularization)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(inverse)) <= EXACT


@pytest.mark.parametrize(
    ("structure", "sizes"),
    [
        ("layer", [30, 21]),
        ("parameter", [24, 6, 18, 3]),
        ({"inner": ["0.weight", "0.bias", "2.weight"], "outer": ["2.bias"]}, [48, 3]),
    ],
)
def test_block_structures(structure: object, sizes: list[int]) -> None:
    case = data.mlp_classification()
    fitted = DirectInfluence(case.model, case.loss, case.regularization, block_structure=structure).fit(
        case.train
    )
    inverse = oracles.inverse(oracles.block_diagonal(case.hessian, sizes), case.regularization)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(inverse)) <= EXACT


def test_regularization_by_block() -> None:
    case = data.mlp_classification()
    blocks = {"inner": ["0.weight", "0.bias"], "outer": ["2.weight", "2.bias"]}
    fitted = DirectInfluence(
        case.model, case.loss, {"inner": 0.3, "outer": 0.07}, block_structure=blocks
    ).fit(case.train)
    damped = oracles.block_diagonal(case.hessian, [30, 21])
    damped = damped + torch.diag(torch.tensor([0.3] * 30 + [0.07] * 21, dtype=torch.float64))
    expected = case.up(torch.linalg.inv(damped))
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), expected) <= EXACT


def test_more_test_points_than_training_points() -> None:
    case = data.mlp_regression()
    test, train = case.train, oracles.pick(case.test, slice(0, 7))
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    for mode in ("up", "perturbation"):
        expected = getattr(case, mode)(case.inverse, test, train)
        assert oracles.relative_error(fitted.influences(*test, *train, mode=mode), expected) <= EXACT


@pytest.mark.parametrize("how", ["model", "argument"])
def test_float32_within_what_it_allows(how: str) -> None:
    """Curvature is summed in float64: only gradients and their products carry float32's rounding."""
    case = data.mlp_classification()
    model = oracles.copy.deepcopy(case.model)
    model = model.float() if how == "model" else model
    single = [(x.float(), y) for x, y in (case.test, case.train)]
    dtype = torch.float32 if how == "argument" else None
    fitted = DirectInfluence(model, case.loss, case.regularization, dtype=dtype).fit(single[1])
    for mode in ("up", "perturbation"):
        values = fitted.influences(*single[0], *single[1], mode=mode)
        assert values.dtype == torch.float32
        assert oracles.relative_error(values, getattr(case, mode)(case.inverse)) <= 1e-4


def test_float32_sums_do_not_drift_with_the_number_of_chunks() -> None:
    """A thousand chunks of one sample lose no more than one chunk does."""
    case = data.logistic_regression()
    model = oracles.copy.deepcopy(case.model).float()
    x, y = case.train[0].repeat(35, 1).float(), case.train[1].repeat(35)
    errors = []
    for size in (1, len(x)):
        fitted = DirectInfluence(model, case.loss, case.regularization, chunk_size=size).fit((x, y))
        scores = fitted.influences(case.test[0].float(), case.test[1], x[:29], y[:29])
        errors.append(oracles.relative_error(scores, case.up(case.inverse)))
    assert max(errors) <= 1e-4
