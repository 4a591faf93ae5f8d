"""Residuals that would take a product each, estimated from random vectors: right on average, one pass a fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client, LocalCluster

from dask_influence import ArnoldiInfluence, EkfacInfluence, NystroemSketchInfluence, TopK
from dask_influence.core import sizes
from dask_influence.core.estimators import System, estimates
from dask_influence.errors import InfluenceWarning
from tests import data

COUNT = 32
"""Vectors that serve problems as small as these."""

DEVIATION = estimates.deviation(COUNT)

CASE = data.mlp_classification()
SIZE = sum(parameter.numel() for parameter in CASE.model.parameters())
KINDS = {
    "ekfac": (EkfacInfluence, {}),
    "complement": (ArnoldiInfluence, {"rank": 5, "complement": True}),
    "nystroem": (NystroemSketchInfluence, {"rank": 20}),
    "blocks": (ArnoldiInfluence, {"rank": 3, "complement": True, "block_structure": "layer"}),
}
X, Y = CASE.test
TEST = torch.cat([X + off for off in (0.0, 0.3, -0.4, 0.7)]), Y.repeat(4)
"""More test points than there are random vectors."""


def fitted(kind: str, client: Client | None = None, **own: Any) -> Any:
    estimator, arguments = KINDS[kind]
    return estimator(CASE.model, CASE.loss, 0.05, client=client, **arguments, **own).fit(CASE.train)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Vectors of each pass that multiplies them by the curvature, where none are computed for each test point."""
    counted: list[int] = []
    original = System.products
    monkeypatch.setattr(
        System, "products", lambda own, vectors: counted.append(len(vectors)) or original(own, vectors)
    )
    monkeypatch.setattr(estimates, "EXACT", 0.0)
    return counted


def within(found: np.ndarray, exact: np.ndarray) -> None:
    """Each to five standard deviations, and on average: the same vectors serve all, so that they are off together."""
    ratios = found / exact
    assert np.abs(ratios - 1).max() <= 5 * DEVIATION
    assert 0.2 * DEVIATION <= ratios.std() <= 2 * DEVIATION
    assert abs(ratios.mean() - 1) <= 2 * DEVIATION


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("swept", [None, [0.05, 0.5]])
def test_estimates_are_near_the_residuals(
    tmp_path: Path, kind: str, swept: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    infl, how = fitted(kind), {"hessian_regularization": swept}
    exact = infl.influences_to_zarr(tmp_path / "exact", TEST, CASE.train, **how)
    assert "estimated_from" not in exact.factor_residual.attrs
    monkeypatch.setattr(estimates, "EXACT", 0.0)
    found = infl.influences_to_zarr(tmp_path / "estimated", TEST, CASE.train, **how)
    assert found.factor_residual.attrs == {
        "estimated_from": "32 random vectors",
        "relative_standard_deviation": 0.125,
    }
    assert found.factor_residual.shape == exact.factor_residual.shape
    for one, other in zip(
        np.atleast_2d(found.factor_residual), np.atleast_2d(exact.factor_residual), strict=True
    ):
        within(one, other)
    np.testing.assert_allclose(found.influence, exact.influence, rtol=1e-9, atol=1e-12)


def test_one_pass_serves_all_test_points_and_runs(tmp_path: Path, products: list[int]) -> None:
    infl = fitted("ekfac")
    products.clear()
    for name in ("first", "second"):
        infl.influences_to_zarr(tmp_path / name, TEST, CASE.train)
    infl.influences_to_zarr(tmp_path / "reduced", TEST, CASE.train, reduce=TopK(3))
    infl.influence_factors_to_zarr(tmp_path / "factors", TEST)
    assert products == [COUNT]
    few = tuple(part[:COUNT] for part in TEST)
    infl.influences_to_zarr(tmp_path / "few", few, CASE.train)
    assert sum(products) == 2 * COUNT  # a product for each of them
    infl.influences_to_zarr(tmp_path / "first", TEST, CASE.train)  # nothing is left to do
    assert sum(products) == 2 * COUNT


def test_workers_estimate_the_same(tmp_path: Path, products: list[int]) -> None:
    alone = fitted("ekfac").influences_to_zarr(tmp_path / "alone", TEST, CASE.train)
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        there = fitted("ekfac", client).influences_to_zarr(tmp_path / "there", TEST, CASE.train)
    np.testing.assert_array_equal(there.factor_residual, alone.factor_residual)
    np.testing.assert_array_equal(there.influence, alone.influence)


def test_a_test_point_without_a_gradient_has_no_residual(tmp_path: Path, products: list[int]) -> None:
    x = TEST[0].clone()
    x[7, 0] = torch.nan
    group = zarr.create_group(tmp_path / "test")  # not read before it is used
    for name, part in (("x", x), ("y", TEST[1])):
        group.create_array(name, data=part.numpy())
    with pytest.warns(InfluenceWarning, match="test sample 7"):
        found = fitted("ekfac").influences_to_zarr(
            tmp_path / "run", tmp_path / "test", CASE.train, on_missing="warn"
        )
    assert np.flatnonzero(np.isnan(found.factor_residual)).tolist() == [7]
    assert np.isnan(found.influence[7]).all()


@pytest.mark.parametrize("swept", [None, [0.05, 0.5]])
def test_large_models_hold_some_of_fewer_vectors(
    tmp_path: Path, products: list[int], monkeypatch: pytest.MonkeyPatch, swept: list[float] | None
) -> None:
    """The residuals are those of the same vectors held together, and right to what is said."""
    infl, how = fitted("ekfac"), {"hessian_regularization": swept}
    monkeypatch.setattr(estimates, "MOST", 8)
    whole = infl.influences_to_zarr(tmp_path / "whole", TEST, CASE.train, **how).factor_residual
    assert whole.attrs == {"estimated_from": "8 random vectors", "relative_standard_deviation": 0.25}
    monkeypatch.setattr(sizes, "ESTIMATING", sizes.making_bytes(3, SIZE, 1 if swept is None else 2))
    again = fitted("ekfac")  # or the vectors that there are would do
    products.clear()
    found = again.influences_to_zarr(tmp_path / "apart", TEST, CASE.train, **how).factor_residual
    assert products == [3, 3, 2]
    np.testing.assert_allclose(found, whole, rtol=1e-12)


def test_vectors_that_are_gone_are_made_again(tmp_path: Path, products: list[int]) -> None:
    """The place of a fit's artifacts may be emptied between two runs."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        infl = fitted("ekfac", client, artifacts=tmp_path / "artifacts")
        first = infl.influences_to_zarr(tmp_path / "first", TEST, CASE.train).factor_residual
        products.clear()
        again = infl.influences_to_zarr(tmp_path / "second", TEST, CASE.train).factor_residual
        assert products == []
        for path in (tmp_path / "artifacts").glob("**/*.safetensors"):
            path.unlink()
        third = infl.influences_to_zarr(tmp_path / "third", TEST, CASE.train).factor_residual
    assert products == [COUNT]
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(third, first)


def test_without_a_certificate_there_is_none(tmp_path: Path, products: list[int]) -> None:
    infl = EkfacInfluence(CASE.model, CASE.loss, 0.05, certify=False).fit(CASE.train)
    products.clear()
    found = infl.influences_to_zarr(tmp_path / "run", TEST, CASE.train)
    assert products == []
    assert np.isnan(found.factor_residual).all()
    assert not found.factor_residual.attrs


def test_a_loaded_fit_without_its_data_estimates_nothing(tmp_path: Path, products: list[int]) -> None:
    fitted("ekfac").save(tmp_path / "fit")
    infl = EkfacInfluence.load(tmp_path / "fit", CASE.model, CASE.loss)
    products.clear()
    found = infl.influences_to_zarr(tmp_path / "run", TEST, CASE.train)
    assert products == []
    assert np.isnan(found.factor_residual).all()
    assert not found.factor_residual.attrs


def test_a_plan_counts_the_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    infl = fitted("ekfac")
    before = infl.plan(TEST, CASE.train)
    monkeypatch.setattr(estimates, "EXACT", 0.0)
    after = infl.plan(TEST, CASE.train)
    assert (before.work.estimated, after.work.estimated) == (0, COUNT)
    vectors = COUNT * after.work.parameters * after.work.itemsize
    assert after.factor_bytes >= before.resident_bytes + vectors
    assert after.client_bytes - before.client_bytes >= 3 * vectors  # float64, and their products


def test_a_product_costs_by_what_layers_put_out_where_it_is_pushed_through_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A convolution has fewer parameters than a perceptron, and products that take a hundred times as long."""
    monkeypatch.setattr(estimates, "EXACT", 20.0 * len(TEST[0]) * len(X) * SIZE)
    assert fitted("ekfac").plan(TEST, CASE.train).work.estimated == 0
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, -1)),
        torch.nn.Conv1d(1, 2, 2),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(3),
    ).double()
    model(X)
    convolution = EkfacInfluence(model, CASE.loss, 0.05).fit(CASE.train)
    assert convolution.diagnostics["parameters"] < SIZE
    assert convolution.plan(TEST, CASE.train).work.estimated == COUNT


def test_the_ratio_has_the_distribution_that_is_claimed() -> None:
    """K/(C A − I) squares of independent normal numbers, whatever A and C are."""
    size, count = 30, 400
    root = data.normal(1, size, size)
    matrix = root @ root.mT / size
    approximate = torch.linalg.inv(matrix + torch.eye(size, dtype=torch.float64))
    gradients = data.normal(2, 1, size)
    true = ((matrix @ approximate - torch.eye(size, dtype=torch.float64)) @ gradients.mT).norm()
    ratios = []
    for seed in range(count):
        vectors = data.normal(100 + seed, COUNT, size)
        seen = gradients @ (approximate @ matrix @ vectors.mT - vectors.mT)
        sums, squares = estimates.squares(seen, 1), gradients.square().sum(1)
        ratios.append(float(estimates.residuals(sums, squares, COUNT)[0] * gradients.norm() / true))
    assert abs(np.mean(ratios) - 1) <= 4 * DEVIATION / count**0.5 + 1e-2
    assert np.std(ratios) == pytest.approx(DEVIATION, rel=0.15)
    assert estimates.residuals(torch.zeros(1, 1), torch.zeros(1), 4).tolist() == [0.0]
