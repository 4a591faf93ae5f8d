"""Residuals by projections are those of the factors themselves, and are not claimed where rounding has them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.certificate import Certificate, Witness
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


WIDE = torch.float64


def weighed(certificate: Certificate, along: Tensor) -> Tensor:
    """Coefficients at every λ, which runs fastest."""
    parts = [along / (certificate.values + damping) for damping in LAMBDAS]
    return torch.stack(parts, 1).flatten(0, 1)


def solved(
    certificate: Certificate, gradients: Tensor, dtype: torch.dtype = WIDE
) -> tuple[Tensor, Tensor, Witness]:
    """Coefficients, what is seen of the gradients, and the witness of it."""
    witness = certificate.witness(dtype)
    narrow = gradients.to(dtype)
    along, others = (narrow @ side.to(dtype).mT for side in (certificate.directions, witness.others))
    seen = torch.cat([along, others, narrow.square().sum(1)[:, None]], dim=1).double()
    return weighed(certificate, along.double()), seen, witness


def residuals(certificate: Certificate, curvature: Tensor, gradients: Tensor) -> Tensor:
    """Of the factors themselves, (n·L,)."""
    factors = weighed(certificate, gradients @ certificate.directions.mT) @ certificate.directions
    wide = gradients.repeat_interleave(len(LAMBDAS), 0)
    dampings = torch.tensor(LAMBDAS, dtype=torch.float64).repeat(len(gradients))[:, None]
    return (factors @ curvature + dampings * factors - wide).norm(dim=1) / wide.norm(dim=1)


def block_sketch(
    size: int, rank: int, block: int, noise: float, least: float = 1.0
) -> tuple[Tensor, Certificate]:
    """Eigenvectors of which the products leave their span in ``block`` directions, by ``noise``."""
    values = torch.linspace(least, 2.0, rank, dtype=torch.float64)
    basis = torch.linalg.qr(data.normal(11, size, rank + block)).Q.mT
    vectors, outside = basis[:rank], basis[rank:]
    across = noise * outside.mT @ data.normal(12, block, rank) @ vectors
    curvature = vectors.mT @ (values[:, None] * vectors) + across + across.mT
    return curvature, Certificate(vectors, vectors @ curvature, values)


@pytest.mark.parametrize("noise", [0.0, 1e-1], ids=["exact", "rough"])
def test_residuals_are_those_of_the_factors(noise: float) -> None:
    curvature, certificate = sketch(RANK, noise)
    gradients = data.normal(3, 7, SIZE)
    gradients[4] = 0.0
    coefficients, seen, witness = solved(certificate, gradients)
    found = certificate.residuals(coefficients, seen, witness)
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
    assert (certificate.residuals(*solved(certificate, data.normal(3, 7, SIZE))) == -1).all()


def test_nothing_is_claimed_where_a_sum_nearly_cancels() -> None:
    """Where λ is the negative of an eigenvalue but for its ninth digit: factors are 10⁹ times as large as gradients."""
    _, certificate = sketch(RANK, 1e-9)
    gradients = data.normal(3, 7, SIZE)
    _, seen, witness = solved(certificate, gradients)
    shifted = certificate.values - certificate.values[0] * (1 - 1e-9)
    coefficients = gradients @ certificate.directions.mT / shifted
    assert (certificate.residuals(coefficients, seen, witness) == -1).any()


@pytest.mark.parametrize("noise", [0.0, 1e-3, 1e-1])
def test_few_projections_in_single_precision_tell_five_digits(noise: float) -> None:
    """On as many directions as the block of a Krylov space has, down to the least residual that is claimed."""
    curvature, certificate = block_sketch(400, 6, 2, noise)
    inside, outside = data.normal(13, 40, 6) @ certificate.directions, data.normal(14, 40, 400)
    gradients = inside + torch.logspace(-3, 1, 40, dtype=torch.float64)[:, None] * outside / 20
    coefficients, seen, witness = solved(certificate, gradients, torch.float32)
    assert witness.others.dtype == torch.float32
    assert len(witness.others) == (2 if noise else 0)
    found = certificate.residuals(coefficients, seen, witness)
    expected = residuals(certificate, curvature, gradients)
    known = found >= 0
    assert 20 <= known.sum() < len(found)
    assert (~known == (expected < 2**-2.5)).sum() >= len(found) - 2  # but for what is at the edge
    torch.testing.assert_close(found[known], expected[known], rtol=1e-5, atol=0)


def test_what_few_directions_miss_is_not_claimed() -> None:
    """Residuals of the vectors are left out, which count where θ + λ is a thousandth of the largest θ."""
    _, certificate = block_sketch(400, 6, 2, 3e-7, least=1e-3)
    gradients = 10 * certificate.directions.sum(0) + data.normal(14, 9, 400)
    _, seen, witness = solved(certificate, gradients, torch.float32)
    assert len(witness.others) == 0
    for damping, claimed in ((1.0, True), (0.0, False)):
        coefficients = seen[:, :6] / (certificate.values + damping)
        assert ((certificate.residuals(coefficients, seen, witness) >= 0) == claimed).all()
    _, seen, witness = solved(certificate, gradients)
    assert (certificate.residuals(seen[:, :6] / certificate.values, seen, witness) >= 0).all()


def test_what_is_made_of_a_certificate_is_made_once() -> None:
    _, certificate = block_sketch(400, 6, 2, 1e-3)
    again = Certificate(certificate.directions, certificate.images, certificate.values)
    assert again.witness(torch.float32) is certificate.witness(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_samples_that_need_it_are_projected_in_float64(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in the span of V, of which little is left; of the others no more is asked."""
    case = data.mlp_classification()
    model = copy.deepcopy(case.model).to(dtype)
    objective = Objective.of(model, case.loss)
    problem = Problem(objective, choose_forms(objective, *case.train)[0], 20)
    x, y = case.test[0].to(dtype), case.test[1]
    rows = oracles.gradients(case.model, case.loss, *case.test)
    vectors = torch.linalg.qr(torch.cat([rows[2:4], data.normal(21, 2, rows.shape[1])]).mT).Q.mT
    curvature = vectors.mT @ (torch.tensor([4.0, 3, 2, 1]).double()[:, None] * vectors)
    values, turned = torch.linalg.eigh(vectors @ curvature @ vectors.mT)
    off = 1e-2 * data.normal(22, rows.shape[1], rows.shape[1])
    curvature = curvature + off + off.mT - vectors.mT @ (vectors @ (off + off.mT) @ vectors.mT) @ vectors
    vectors = turned.mT @ vectors
    certificate = Certificate(vectors, vectors @ curvature, values)
    calls = []
    original = directional.witnessed
    monkeypatch.setattr(
        directional,
        "witnessed",
        lambda problem, x, *given: calls.append((len(x), given[3])) or original(problem, x, *given),
    )
    found = directional.certified(problem, x, y, certificate, partial(weighed, certificate))
    expected = residuals(certificate, curvature, rows).reshape(-1, len(LAMBDAS))
    few = int((expected < 2**-2.5).any(1).sum())
    assert 2 <= few < len(x)
    assert calls == [(len(x), dtype), *([(few, WIDE)] if dtype != WIDE else [])]
    torch.testing.assert_close(found[:, :4], rows @ vectors.mT, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[:, 4:], expected, rtol=2e-5 if dtype != WIDE else 1e-9, atol=0)


@pytest.mark.parametrize("pairs", [True, False], ids=["layers", "gradients"])
def test_what_is_seen_of_gradients(pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections on directions and images, and squares, from layers and from gradients a few at a time."""
    case = data.mlp_classification()
    objective = Objective.of(case.model, case.loss)
    problem = Problem(objective, choose_forms(objective, *case.train)[0], 20)
    if pairs:
        problem, _ = paired(problem, *case.train)
        monkeypatch.setattr(directional, "_CHAINED", 0)
        monkeypatch.setattr(directional, "gradients", None)
    directions, images = data.normal(5, 2, objective.size), data.normal(6, 2, objective.size)
    budget = 3 * 2 * 8 * objective.size
    seen = directional.witnessed(problem, *case.test, directions, images, WIDE, budget)
    rows = oracles.gradients(case.model, case.loss, *case.test)
    expected = torch.cat([rows @ directions.mT, rows @ images.mT, rows.square().sum(1)[:, None]], dim=1)
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)
