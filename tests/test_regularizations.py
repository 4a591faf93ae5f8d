"""Scores at several λ from one pass over the training data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client, LocalCluster
from torch import Tensor, nn

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    NystroemSketchInfluence,
    open_influences,
)
from dask_influence.core import directional
from dask_influence.core.estimators.sweep import check_sweep
from dask_influence.errors import ConfigurationError, StoreMismatchError
from tests import data, oracles

VALUES = [0.2, 0.03, 1.0]
DIRECT = (DirectInfluence, {})
KINDS = {
    "direct": DIRECT,
    "blocks": (DirectInfluence, {"block_structure": "layer"}),
    "arnoldi": (ArnoldiInfluence, {"rank": 7, "tol": 1e-10}),
    "arnoldi_blocks": (ArnoldiInfluence, {"rank": 4, "tol": 1e-10, "block_structure": "layer"}),
    "complement": (ArnoldiInfluence, {"rank": 7, "tol": 1e-10, "complement": True}),
    "cg": (CgInfluence, {"rtol": 1e-11}),
    "nystroem": (NystroemSketchInfluence, {"rank": 9}),
    "ekfac": (EkfacInfluence, {}),
}


def fitted(kind: Any = DIRECT, regularization: float = 0.5, **how: Any) -> Any:
    case, (model, own) = data.mlp_classification(), kind
    return model(case.model, case.loss, regularization, curvature="ggn", **own, **how).fit(case.train)


def swept(model: Any, store: Path, values: Any = VALUES, **how: Any) -> xr.Dataset:
    case = data.mlp_classification()
    return model.influences_to_zarr(store, case.test, case.train, hessian_regularization=values, **how)


def error(actual: Any, expected: Any) -> float:
    return oracles.relative_error(np.asarray(actual), torch.as_tensor(np.asarray(expected)))


# -- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["up", "perturbation"])
def test_against_dense_inverses(tmp_path: Path, mode: str) -> None:
    case = data.mlp_classification()
    dataset = swept(fitted(), tmp_path / "run", mode=mode)
    dense = oracles.ggn(case.model, case.loss, *case.train)
    features = (4,) if mode == "perturbation" else ()
    assert dataset.influence.shape == (3, 13, 37, *features)
    assert dataset.influence.dims[:3] == ("regularization", "test", "train")
    assert dataset["regularization"].values.tolist() == VALUES
    for value in VALUES:
        inverse = oracles.inverse(dense, value)
        expected = case.up(inverse) if mode == "up" else case.perturbation(inverse)
        assert error(dataset.influence.sel(regularization=value), expected) < 1e-9
    assert dataset["factor_residual"].shape == (3, 13)
    assert float(dataset["factor_residual"].max()) < 1e-10


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_equal_to_a_run_at_each(tmp_path: Path, kind: Any) -> None:
    case, model = data.mlp_classification(), fitted(kind)
    dataset = swept(model, tmp_path / "run")
    for at, value in enumerate(VALUES):
        alone = model.with_regularization(value).influences_to_zarr(tmp_path / str(at), case.test, case.train)
        assert error(dataset["influence"][at], alone["influence"]) < 1e-10
        residual, expected = (np.asarray(d["factor_residual"]) for d in (dataset, alone))
        np.testing.assert_allclose(residual[at], expected, rtol=1e-6, atol=1e-9)
    assert model.hessian_regularization == 0.5


def test_small_tiles_and_query_blocks(tmp_path: Path) -> None:
    whole = swept(fitted(), tmp_path / "whole")
    cut = swept(fitted(), tmp_path / "cut", tile_bytes=8 * 4 * 5)
    assert error(cut["influence"], whole["influence"]) < 1e-12
    model = fitted()
    case = data.mlp_classification()
    limit = 4 * 3 * 8 * 51 * 4  # directions of four test points at three values of λ
    plan = model.plan(case.test, case.train, hessian_regularization=VALUES, memory_limit=limit)
    assert plan.query_rows == 4
    assert plan.passes == 4


# -- one pass ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [DIRECT, KINDS["arnoldi"]], ids=["direct", "arnoldi"])
def test_training_data_are_differentiated_once(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = fitted(kind), []
    primitive = directional.directional_derivatives

    def counted(problem: Any, x: Tensor, y: Tensor, *rest: Any, **how: Any) -> Tensor:
        samples.append(len(x))
        return primitive(problem, x, y, *rest, **how)

    monkeypatch.setattr(directional, "directional_derivatives", counted)
    swept(model, tmp_path / "run")
    assert sum(samples) == 37


def test_the_plan_counts_every_value() -> None:
    case, model = data.mlp_classification(), fitted()
    one, many = (model.plan(case.test, case.train, hessian_regularization=v) for v in (None, VALUES))
    assert many.passes == one.passes == 1
    assert many.directions == 3 * one.directions
    assert many.output_bytes == 3 * one.output_bytes
    assert many.tiles == 3 * one.tiles
    assert "3 × 13 × 37" in str(many)


# -- stores -----------------------------------------------------------------------------------------
def test_a_store_is_resumed_with_the_same_values_alone(tmp_path: Path) -> None:
    model = fitted()
    expected = np.asarray(swept(model, tmp_path / "run", tile_bytes=8 * 13 * 5)["influence"])
    ledger = tmp_path / "run" / "_run"
    strips = sorted((ledger / "ledger").glob("strip-*"))
    assert len(strips) > 1
    strips[-1].unlink()
    run = json.loads((ledger / "run.json").read_text())
    (ledger / "run.json").write_text(json.dumps({**run, "state": "running"}))
    assert np.array_equal(np.asarray(swept(model, tmp_path / "run")["influence"]), expected)
    for other in (VALUES[:2], VALUES[::-1], None):
        with pytest.raises(StoreMismatchError, match="regularization"):
            swept(model, tmp_path / "run", other)
    assert np.array_equal(np.asarray(open_influences(tmp_path / "run")["influence"]), expected)


def test_factors_of_one_value_are_refused(tmp_path: Path) -> None:
    case, model = data.mlp_classification(), fitted()
    model.influence_factors_to_zarr(tmp_path / "factors", case.test)
    with pytest.raises(ConfigurationError, match="factors of one λ"):
        model.influences_to_zarr(
            tmp_path / "run", tmp_path / "factors", case.train, hessian_regularization=VALUES
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("values", [[], [0.1, 0.1], [0.1, -1.0], [0.1, float("nan")], 0.1, "0.1", {"0": 0.1}])
def test_values_that_are_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises(ConfigurationError, match="hessian_regularization"):
        swept(fitted(), tmp_path / "run", values)
    assert not (tmp_path / "run").exists()


def test_values_that_are_taken(tmp_path: Path) -> None:
    assert check_sweep(np.array([0.5, 0.1])) == [0.5, 0.1]
    dataset = swept(fitted(), tmp_path / "run", (0.25,))
    assert dataset["influence"].shape == (1, 13, 37)


def test_a_single_sample_and_a_single_test_point(tmp_path: Path) -> None:
    model = data.seeded(lambda: nn.Linear(3, 2)).double()
    train, test = (data.normal(1, 1, 3), data.normal(2, 1, 2)), (data.normal(3, 1, 3), data.normal(4, 1, 2))
    direct = DirectInfluence(model, nn.functional.mse_loss, 0.1).fit(train)
    dataset = direct.influences_to_zarr(tmp_path / "run", test, train, hessian_regularization=VALUES)
    dense = oracles.hessian(model, nn.functional.mse_loss, *train)
    for value in VALUES:
        expected = oracles.up(model, nn.functional.mse_loss, oracles.inverse(dense, value), test, train)
        assert error(dataset.influence.sel(regularization=value), expected) < 1e-9


# -- on a cluster -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    cluster = LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None)
    with cluster, Client(cluster) as client:
        yield client


@pytest.mark.parametrize("name", ["direct", "arnoldi_blocks", "cg"])
def test_a_cluster_writes_the_same(tmp_path: Path, client: Client, name: str) -> None:
    local = swept(fitted(KINDS[name]), tmp_path / "local")
    shared = swept(fitted(KINDS[name], client=client), tmp_path / "shared")
    assert np.array_equal(np.asarray(shared["influence"]), np.asarray(local["influence"]))
    np.testing.assert_array_equal(shared["factor_residual"].values, local["factor_residual"].values)


def test_workers_do_not_take_one_value_for_another(client: Client) -> None:
    """They keep what they have read of a fit, and a fit at another λ has another factorisation."""
    case, model = data.mlp_classification(), fitted(client=client)
    dense = oracles.ggn(case.model, case.loss, *case.train)
    for value in VALUES:
        scores = model.with_regularization(value).influences(*case.test, *case.train)
        assert error(scores, case.up(oracles.inverse(dense, value))) < 1e-9
