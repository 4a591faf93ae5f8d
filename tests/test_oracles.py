"""The oracles against finite differences and closed forms, and the cases against their promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests import data, oracles


@pytest.mark.parametrize("name", data.SMALL)
def test_gradients_are_slopes_of_the_loss(name: str) -> None:
    case = data.SMALL[name]()
    model = oracles.prepared(case.model)
    direction = data.normal(90, *oracles.flat(oracles.theta(model)).shape)
    expected = oracles.gradients(case.model, case.loss, *case.test) @ direction

    def losses(step: float) -> torch.Tensor:
        moved = oracles.prepared(case.model)
        parts = direction.split([p.numel() for p in oracles.theta(moved)])
        for parameter, part in zip(oracles.theta(moved), parts, strict=True):
            parameter.data += step * part.view_as(parameter)
        rows = [slice(j, j + 1) for j in range(len(case.test[1]))]
        return torch.stack([case.loss(moved(case.test[0][j]), case.test[1][j]) for j in rows]).detach()

    assert oracles.relative_error((losses(1e-5) - losses(-1e-5)) / 2e-5, expected) < 1e-8


@pytest.mark.parametrize("name", data.SMALL)
def test_mean_gradient_is_mean_of_sample_gradients(name: str) -> None:
    case = data.SMALL[name]()
    mean = oracles.mean_gradient(case.model, case.loss, *case.test)
    assert oracles.relative_error(oracles.gradients(case.model, case.loss, *case.test).mean(0), mean) < 1e-12


@pytest.mark.parametrize("name", data.SMALL)
def test_hessian_by_double_backward_and_by_differences_agree(name: str) -> None:
    case = data.SMALL[name]()
    dense = case.hessian
    assert oracles.relative_error(dense.T, dense) < 1e-13
    differences = oracles.hessian_by_differences(case.model, case.loss, *case.train)
    assert oracles.relative_error(differences, dense) < 1e-8


@pytest.mark.parametrize("name", data.SMALL)
def test_perturbation_by_double_backward_and_by_differences_agree(name: str) -> None:
    case = data.SMALL[name]()
    arguments = (case.model, case.loss, case.inverse, case.test, case.train)
    dense = oracles.perturbation(*arguments)
    assert dense.shape == (len(case.test[0]), *case.train[0].shape)
    assert oracles.relative_error(oracles.perturbation_by_differences(*arguments), dense) < 1e-8


def test_linear_regression_in_closed_form() -> None:
    """mse over K outputs: H = 2/K · mean of x̃x̃ᵀ for each output, g = 2/K · (f − y) ⊗ x̃."""
    case = data.linear_regression()
    weight, bias = case.model.weight.detach(), case.model.bias.detach()

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        residual = (x @ weight.T + bias - y) * 2 / 2
        return torch.cat([(residual[:, :, None] * x[:, None, :]).flatten(1), residual], dim=1)

    x = case.train[0]
    second, mean = x.T @ x / len(x), x.mean(0)
    dense = torch.zeros(10, 10, dtype=torch.float64)
    for k in range(2):
        weights, offset = slice(4 * k, 4 * k + 4), 8 + k
        dense[weights, weights], dense[offset, offset] = second, 1.0
        dense[weights, offset] = dense[offset, weights] = mean
    assert oracles.relative_error(case.hessian, dense) < 1e-13
    assert (
        oracles.relative_error(oracles.gradients(case.model, case.loss, *case.test), gradient(*case.test))
        < 1e-13
    )
    shifted = dense + case.regularization * torch.eye(10, dtype=torch.float64)
    scores = gradient(*case.test) @ torch.linalg.solve(shifted, gradient(*case.train).T)
    assert oracles.relative_error(case.up(case.inverse), scores) < 1e-12


def test_logistic_regression_hessian_in_closed_form() -> None:
    case = data.logistic_regression()
    probabilities = case.model(case.train[0]).detach().softmax(-1)
    inner = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
    weights = torch.einsum("nkl,nf,ng->kflg", inner, case.train[0], case.train[0]).reshape(15, 15)
    dense = case.hessian
    assert oracles.relative_error(dense[:15, :15], weights / 29) < 1e-12
    assert oracles.relative_error(dense[15:, 15:], inner.mean(0)) < 1e-12


def test_matrices_of_linear_models_coincide() -> None:
    """Linear in θ: GGN equals the Hessian; with cross-entropy the Fisher matrix is both."""
    for case in (data.linear_regression(), data.logistic_regression()):
        assert oracles.relative_error(oracles.ggn(case.model, case.loss, *case.train), case.hessian) < 1e-12
    case = data.mlp_classification()
    true = oracles.ggn(case.model, case.loss, *case.train)
    assert oracles.relative_error(oracles.fisher_of_categorical(case.model, case.train[0]), true) < 1e-12
    assert oracles.relative_error(case.hessian, true) > 1e-3
    assert oracles.relative_error(oracles.empirical_fisher(case.model, case.loss, *case.train), true) > 1e-1


def test_low_rank_inverse_at_full_rank_is_the_inverse() -> None:
    case = data.mlp_classification()
    dense = case.hessian
    for complement in (True, False):
        full = oracles.low_rank_inverse(dense, case.regularization, len(dense), complement)
        assert oracles.relative_error(full, case.inverse) < 1e-10


def test_low_rank_inverse_keeps_largest_magnitude_and_treats_the_rest_as_documented() -> None:
    """diag(5, −4, 1, 0), λ = ½: rank 2 keeps 5 and −4; the complement is dropped or has eigenvalue λ."""
    dense = torch.diag(torch.tensor([1.0, 5.0, 0.0, -4.0], dtype=torch.float64))
    dropped = torch.diag(torch.tensor([0.0, 1 / 5.5, 0.0, 1 / -3.5], dtype=torch.float64))
    kept = torch.diag(torch.tensor([2.0, 1 / 5.5, 2.0, 1 / -3.5], dtype=torch.float64))
    assert torch.allclose(oracles.low_rank_inverse(dense, 0.5, 2, False), dropped)
    assert torch.allclose(oracles.low_rank_inverse(dense, 0.5, 2, True), kept)


def test_block_diagonal() -> None:
    dense = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    expected = torch.tensor([[1, 2, 0], [4, 5, 0], [0, 0, 9]], dtype=torch.float64)
    assert torch.equal(oracles.block_diagonal(dense, [2, 1]), expected)


def test_trees() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(2, 1), nn.Embedding(3, 1)

        def forward(self, values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return self.linear(values) * self.table(tokens)

    model, values, tokens = data.seeded(Two).double(), data.normal(91, 5, 2), data.classes(92, 5, 3)
    y = data.normal(93, 5, 1)
    positional = oracles.gradients(model, nn.functional.mse_loss, (values, tokens), y)
    keywords = oracles.gradients(model, nn.functional.mse_loss, {"tokens": tokens, "values": values}, y)
    assert torch.equal(positional, keywords)
    assert positional.shape == (5, 6)
    assert oracles.gradients(model, nn.functional.mse_loss, (values, tokens), y, ["table.weight"]).shape == (
        5,
        3,
    )


@pytest.mark.parametrize("name", data.ALL)
def test_cases_are_well_posed_and_curvature_matters(name: str) -> None:
    """H + λI is safely positive definite, and scores without curvature would be wrong by half."""
    case = data.ALL[name]()
    values = torch.linalg.eigvalsh(case.hessian)
    smallest = float(values[0]) + case.regularization
    assert smallest > 0.1 * case.regularization
    assert float(values[-1] + case.regularization) / smallest < 1e5
    identity = torch.eye(len(values), dtype=torch.float64)
    plain = case.up(identity / case.regularization)
    assert oracles.weight_of_curvature(case.up(case.inverse), plain) > 0.5
