"""Estimators whose factors take passes over the data: stores, lazy arrays, clusters, saving."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client, LocalCluster

from dask_influence import (
    CgInfluence,
    InfluenceFunctionModel,
    LissaInfluence,
    NystroemSketchInfluence,
    open_influences,
)
from dask_influence.errors import (
    ConvergenceWarning,
    DataError,
    DataWarning,
    NotFittedError,
    StoreMismatchError,
)
from tests import data, oracles

Model = type[InfluenceFunctionModel]

ITERATIVE: list[tuple[Model, dict[str, Any]]] = [
    (CgInfluence, {"rtol": 1e-10, "preconditioner": "nystroem"}),
    (LissaInfluence, {"rtol": 3e-2, "batch_size": 20}),
]
ALL = [*ITERATIVE, (NystroemSketchInfluence, {"rank": 9})]


def fit(model: Model, how: dict[str, Any], **shared: Any) -> Any:
    case = data.mlp_classification()
    return model(case.model, case.loss, case.regularization, chunk_size=15, **how, **shared).fit(case.train)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit="2GB"
        ) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.mark.parametrize(("model", "how"), ALL)
def test_store_holds_scores_and_the_residuals_of_the_system_asked_for(
    model: Model, how: dict[str, Any], tmp_path: Path
) -> None:
    case, fitted = data.mlp_classification(), fit(model, how)
    result = fitted.influences_to_zarr(tmp_path / "scores", case.test, case.train)
    scores = fitted.influences(*case.test, *case.train)
    assert np.array_equal(result["influence"], scores)
    factors = fitted.influence_factors(*case.test)
    gradients = oracles.gradients(case.model, case.loss, *case.test)
    true = (factors @ case.hessian + case.regularization * factors - gradients).norm(dim=1)
    assert np.allclose(result["factor_residual"], true / gradients.norm(dim=1), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(("model", "how"), ITERATIVE)
def test_stored_factors_are_scored_without_another_solve(
    model: Model, how: dict[str, Any], tmp_path: Path
) -> None:
    case, fitted = data.mlp_classification(), fit(model, how)
    scores = fitted.influences(*case.test, *case.train)
    fitted.influence_factors_to_zarr(tmp_path / "factors", case.test)
    solved = fitted.diagnostics["factors_solved"]
    result = fitted.influences_to_zarr(tmp_path / "scores", tmp_path / "factors", case.train)
    assert np.array_equal(result["influence"], scores)
    assert fitted.diagnostics["factors_solved"] == solved


def test_what_did_not_converge_is_marked_in_the_store(tmp_path: Path) -> None:
    case = data.mlp_classification()
    fitted = CgInfluence(case.model, case.loss, case.regularization, maxiter=1).fit(case.train)
    with pytest.warns(ConvergenceWarning):
        fitted.influences_to_zarr(tmp_path / "scores", case.test, case.train)
    assert float(open_influences(tmp_path / "scores")["factor_residual"].min()) > 1e-6


@pytest.mark.parametrize(("model", "how"), ITERATIVE)
def test_a_fit_on_other_data_is_another_run(model: Model, how: dict[str, Any], tmp_path: Path) -> None:
    """The inverse holds no curvature, so its own digest would not tell."""
    case = data.mlp_classification()
    how = {"maxiter": 5000, **how}
    fit(model, how).influences_to_zarr(tmp_path / "scores", case.test, case.train)
    other = model(case.model, case.loss, case.regularization, **how).fit((case.train[0] + 0.1, case.train[1]))
    with pytest.raises(StoreMismatchError, match="fit"):
        other.influences_to_zarr(tmp_path / "scores", case.test, case.train)


@pytest.mark.parametrize(("model", "how"), ITERATIVE)
def test_loading_with_the_training_data(model: Model, how: dict[str, Any], tmp_path: Path) -> None:
    case, fitted = data.mlp_classification(), fit(model, how)
    expected = fitted.influences(*case.test, *case.train)
    fitted.save(tmp_path / "model")
    loaded = model.load(tmp_path / "model", case.model, case.loss, train=case.train)
    assert oracles.relative_error(loaded.influences(*case.test, *case.train), expected) <= 1e-10
    assert (
        oracles.relative_error(
            loaded.with_regularization(0.5).influence_factors(*case.test),
            fitted.with_regularization(0.5).influence_factors(*case.test),
        )
        <= 1e-10
    )


@pytest.mark.parametrize(("model", "how"), ITERATIVE)
def test_loading_without_the_training_data(model: Model, how: dict[str, Any], tmp_path: Path) -> None:
    case, fitted = data.mlp_classification(), fit(model, how)
    fitted.save(tmp_path / "model")
    loaded = model.load(tmp_path / "model", case.model, case.loss)
    for ask in (
        lambda: loaded.influence_factors(*case.test),
        lambda: loaded.influences_to_zarr(tmp_path / "scores", case.test, case.train),
        lambda: loaded.influence_factors_to_zarr(tmp_path / "scores", case.test),
    ):
        with pytest.raises(NotFittedError, match=r"load\(url, model, loss, train=\.\.\.\)"):
            ask()
    assert not (tmp_path / "scores").exists()
    factors = fitted.influence_factors(*case.test)
    scores = loaded.influences_from_factors(factors, *case.train)
    assert torch.equal(scores, fitted.influences_from_factors(factors, *case.train))


def test_loading_with_other_data_than_those_fitted(tmp_path: Path) -> None:
    case = data.mlp_classification()
    fit(*ITERATIVE[0]).save(tmp_path / "model")
    shorter = case.train[0][:5], case.train[1][:5]
    with pytest.raises(DataError, match="5 samples, and the model was fitted on 37"):
        CgInfluence.load(tmp_path / "model", case.model, case.loss, train=shorter)
    with pytest.raises(StoreMismatchError, match="first samples of train"):
        CgInfluence.load(tmp_path / "model", case.model, case.loss, train=(case.train[0] + 1, case.train[1]))
    x = case.train[0].clone()
    x[-1] += 1
    with pytest.warns(DataWarning, match="digests differ"):
        CgInfluence.load(tmp_path / "model", case.model, case.loss, train=(x, case.train[1]))


@pytest.mark.parametrize(("model", "how"), ALL)
def test_cluster_gives_the_same_bits(model: Model, how: dict[str, Any], client: Client) -> None:
    case = data.mlp_classification()
    local, distributed = fit(model, how), fit(model, how, client=client)
    for mode in ("up", "perturbation"):
        here, there = (
            fitted.influences(*case.test, *case.train, mode=mode) for fitted in (local, distributed)
        )
        assert torch.equal(here, there)


@pytest.mark.parametrize(("model", "how"), ALL)
def test_lazy_scores_here_and_on_a_cluster(model: Model, how: dict[str, Any], client: Client) -> None:
    case = data.mlp_classification()
    test, train = (
        [da.from_array(leaf.numpy(), chunks=(size, *leaf.shape[1:])) for leaf in pair]
        for pair, size in ((case.test, 5), (case.train, 11))
    )
    local, distributed = fit(model, how), fit(model, how, client=client)
    expected = local.influences(*case.test, *case.train)
    # chunks of test points are blocks of their own to CG: equal within its tolerance
    assert oracles.relative_error(distributed.influences(*test, *train).compute(), expected) <= 1e-9
    lazy = local.influences(*test, *train)
    assert oracles.relative_error(lazy.compute(scheduler="threads"), expected) <= 1e-9


def _in(dtype: torch.dtype, pair: data.Pair) -> data.Pair:
    return tuple(leaf.to(dtype) if leaf.is_floating_point() else leaf for leaf in pair)


@pytest.mark.parametrize("way", ["memory", "lazy", "store", "cluster"])
def test_float32_solves_for_gradients_that_its_rounding_did_not_spoil(
    way: str, client: Client, tmp_path: Path
) -> None:
    case = data.digits_mlp()
    net = copy.deepcopy(case.model).float()
    train, test = _in(torch.float32, case.train), _in(torch.float32, case.test)
    options = {"rtol": 1e-6, "client": client if way == "cluster" else None}
    fitted = CgInfluence(net, case.loss, case.regularization, **options).fit(train)
    if way == "memory":
        factors = fitted.influence_factors(*test)
    elif way == "lazy":
        chunked = [da.from_array(leaf.numpy(), chunks=(37, *leaf.shape[1:])) for leaf in test]
        factors = torch.from_numpy(fitted.influence_factors(*chunked).compute(scheduler="synchronous"))
    else:
        result = fitted.influence_factors_to_zarr(tmp_path / "factors", test)
        factors = torch.from_numpy(result["factors"].to_numpy())
    exact, wide = copy.deepcopy(net).double(), factors.double()
    gradients = oracles.gradients(exact, case.loss, *_in(torch.float64, test))
    hessian = oracles.hessian(exact, case.loss, *_in(torch.float64, train))
    true = (wide @ hessian + case.regularization * wide - gradients).norm(dim=1)
    assert (true / gradients.norm(dim=1)).max() < 2e-6  # of the surest it was four times that in float32
