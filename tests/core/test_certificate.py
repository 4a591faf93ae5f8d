"""Residuals by projections are those of the factors themselves, and are not claimed where rounding has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.certificate import Certificate
from dask_influence.core.derivatives import choose_forms
from dask_influence.core.objective import Objective
from dask_influence.core.pairs import paired
from dask_influence.core.problem import Problem
from tests import data, oracles

LAMBDAS = (0.3, 2.0)
SIZE, RANK = 37, 5


def sketch(rank: int, noise: float) -> tuple[Tensor, Certificate]:
    """A curvature, and ``rank`` of its eigenvectors that are off by ``noise``."""
    root = data.normal(1, SIZE, SIZE)
    curvature = (root + root.mT) / 2
    vectors = torch.linalg.eigh(curvature).eigenvectors[:, -rank:] + noise * data.normal(2, SIZE, rank)
    vectors = torch.linalg.qr(vectors).Q.mT
    projected = vectors @ curvature @ vectors.mT
    values, turned = torch.linalg.eigh(projected)
    vectors = turned.mT @ vectors
    return curvature, Certificate(vectors, vectors @ curvature, values)


def solved(certificate: Certificate, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients at every λ, which runs fastest, and what is seen of the gradients."""
    along = gradients @ certificate.directions.mT
    parts = [along / (certificate.values + damping) for damping in LAMBDAS]
    squares = gradients.square().sum(1)[:, None]
    return torch.stack(parts, 1).flatten(0, 1), torch.cat(
        [along, gradients @ certificate.images.mT, squares], dim=1
    )


@pytest.mark.parametrize("noise", [0.0, 1e-1], ids=["exact", "rough"])
def test_residuals_are_those_of_the_factors(noise: float) -> None:
    curvature, certificate = sketch(RANK, noise)
    gradients = data.normal(3, 7, SIZE)
    gradients[4] = 0.0
    coefficients, seen = solved(certificate, gradients)
    found = certificate.residuals(coefficients, seen)
    assert found is not None
    wide = gradients.repeat_interleave(len(LAMBDAS), 0)
    factors = coefficients @ certificate.directions
    left = (
        factors @ curvature + torch.tensor(LAMBDAS, dtype=torch.float64).repeat(7)[:, None] * factors - wide
    )
    expected = left.norm(dim=1) / wide.norm(dim=1)
    assert (found[8:10] == 0).all()
    known = ~expected.isnan()
    torch.testing.assert_close(found[known], expected[known], rtol=1e-12, atol=0)
    assert (
        noise == 0 or (left @ certificate.directions.mT).abs().max() < 1e-10
    )  # what is left is outside of V


def test_nothing_is_claimed_of_what_rounding_has() -> None:
    """All of the space: the residual is rounding, of which the difference of squares knows nothing."""
    _, certificate = sketch(SIZE, 0.0)
    assert certificate.residuals(*solved(certificate, data.normal(3, 7, SIZE))) is None


def test_nothing_is_claimed_where_a_sum_nearly_cancels() -> None:
    """Where λ is the negative of an eigenvalue but for its ninth digit: factors are 10⁹ times as large as gradients."""
    _, certificate = sketch(RANK, 1e-9)
    gradients = data.normal(3, 7, SIZE)
    _, seen = solved(certificate, gradients)
    shifted = certificate.values - certificate.values[0] * (1 - 1e-9)
    coefficients = gradients @ certificate.directions.mT / shifted
    assert certificate.residuals(coefficients, seen) is None


@pytest.mark.parametrize("pairs", [True, False], ids=["layers", "gradients"])
def test_what_is_seen_of_gradients(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections on directions and images, and squares, from layers and from gradients a few at a time."""
    case = data.mlp_classification()
    objective = Objective.of(case.model, case.loss)
    problem = Problem(objective, choose_forms(objective, *case.train)[0], 20)
    if pairs:
        problem, _ = paired(problem, *case.train)
        monkeypatch.setattr(directional, "_CAPTURE", 0)
        monkeypatch.setattr(directional, "gradients", None)
    directions, images = data.normal(5, 2, objective.size), data.normal(6, 2, objective.size)
    budget = 3 * 2 * 8 * objective.size
    seen = directional.witnessed(problem, *case.test, directions, images, budget)
    rows = oracles.gradients(case.model, case.loss, *case.test)
    expected = torch.cat([rows @ directions.mT, rows @ images.mT, rows.square().sum(1)[:, None]], dim=1)
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)
