"""direction_tol: directions in factors give scores to the accuracy asked for, or are not taken."""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
    SelfInfluence,
    open_influences,
)
from dask_influence.cli import estimators
from dask_influence.core.factored import Factored
from dask_influence.core.factoring import approximation
from dask_influence.errors import ConfigurationError, InfluenceWarning, StoreMismatchError
from dask_influence.execution.base import Approximated
from dask_influence.execution.local import LocalExecutor
from tests import data, oracles

KINDS: dict[str, tuple[type[InfluenceFunctionModel], dict[str, Any]]] = {
    "dropped": (ArnoldiInfluence, {"rank": 7, "tol": 1e-9}),
    "woodbury": (ArnoldiInfluence, {"rank": 7, "tol": 1e-9, "complement": True}),
    "nystroem": (NystroemSketchInfluence, {"rank": 9, "curvature": "ggn"}),
}
ALL = pytest.mark.parametrize("kind", KINDS)


# -- problems --------------------------------------------------------------------------
def lifted(seed: int, count: int) -> Tensor:
    """Inputs of 53 features that lie near a space of 5 dimensions."""
    return data.normal(seed, count, 5) @ data.normal(900, 5, 53) + 0.02 * data.normal(seed + 1, count, 53)


@cache
def wide() -> data.Case:
    """53-31-3 tanh, P = 1770, of which the blocks of eigenvectors are nearly low rank."""
    x = lifted(901, 211)
    y = (x[:, 0] + x[:, 1].square() > 0).long() + (x[:, 2] > 1).long()
    build = lambda: nn.Sequential(nn.Linear(53, 31), nn.Tanh(), nn.Linear(31, 3))  # noqa: E731
    model = data.trained(data.seeded(build), functional.cross_entropy, (x, y), decay=1e-2, steps=40)
    return data.Case(model, functional.cross_entropy, (x, y), (lifted(903, 67), y[:67]), 0.1)


class Twice(nn.Module):
    """One layer that is called for two halves of the input, and a convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.images = nn.Conv2d(1, 3, 3, stride=2)
        self.shared, self.last = nn.Linear(27, 29), nn.Linear(58, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (n, 16, 8)."""
        halves = [self.images(half[:, None]).flatten(1) for half in x.split(8, dim=1)]
        return self.last(torch.cat([torch.tanh(self.shared(half)) for half in halves], dim=1))


@cache
def images() -> data.Case:
    """A small convolutional net whose linear layer is used twice."""
    flat = data.normal(905, 127, 4) @ data.normal(906, 4, 128) + 0.01 * data.normal(907, 127, 128)
    x, y = flat.reshape(-1, 16, 8), data.classes(908, 127, 4)
    model = data.trained(data.seeded(Twice), functional.cross_entropy, (x, y), decay=1e-2, steps=20)
    return data.Case(model, functional.cross_entropy, (x, y), (x[:23] * 1.1, y[:23]), 0.1)


def made(kind: str, tolerance: Any, case: data.Case | None = None, **how: Any) -> Any:
    """A model of one kind, fitted."""
    case, (model, own) = case or wide(), KINDS[kind]
    model_of: Any = model
    options = {**own, "direction_tol": tolerance, **how}
    return model_of(case.model, case.loss, case.regularization, **options).fit(case.train)


fitted = cache(made)


def scores(infl: Any, case: data.Case | None = None) -> Tensor:
    case = case or wide()
    result: Tensor = infl.influences(*case.test, *case.train)
    return result


def dense(infl: Any) -> Tensor:
    """The inverse that was fitted, from its factors of the unit vectors."""
    computation = infl._fitted.inverse.solve(torch.eye(infl._fitted.system.size, dtype=torch.float64))
    with pytest.raises(StopIteration) as finished:
        next(computation)
    return finished.value.value.factors


def unlike(infl: Any) -> data.Pair:
    """Samples along what the factors leave out."""
    left_out = infl._fitted.inverse.approximation.factored.left_out[:, : 31 * 53].reshape(-1, 53)
    x, y = wide().train
    return 0.3 * x + 10 * torch.linalg.svd(left_out.double())[2][0], y


# -- accuracy --------------------------------------------------------------------------
@ALL
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-5])
def test_scores_are_as_near_the_dense_oracle_as_asked_for(kind: str, tolerance: float) -> None:
    infl = fitted(kind, tolerance)
    expected = wide().up(dense(infl))
    error = oracles.relative_error(scores(infl), expected)
    assert error <= tolerance
    report = infl.diagnostics
    assert report["direction_tol"] == tolerance
    assert 0 < report["direction_score_error"] <= tolerance
    assert error > 1e-12  # they are other numbers
    assert report["direction_ranks"]["0"][1] < 53


@ALL
def test_a_tighter_tolerance_takes_larger_ranks(kind: str) -> None:
    loose, tight = (fitted(kind, tolerance).diagnostics for tolerance in (1e-1, 1e-4))
    assert loose["direction_ranks"]["0"][1] < tight["direction_ranks"]["0"][1]
    assert tight["direction_score_error"] < loose["direction_score_error"]


@ALL
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_convolutions_and_a_layer_that_is_called_twice(kind: str, tolerance: float) -> None:
    infl = fitted(kind, tolerance, images())
    assert oracles.relative_error(scores(infl, images()), images().up(dense(infl))) <= tolerance


@pytest.mark.parametrize("tolerance", [3e-2, 1e-3])
def test_digits(tolerance: float) -> None:
    case = data.digits_mlp()
    infl = fitted("dropped", tolerance, case, rank=11)
    assert oracles.relative_error(scores(infl, case), case.up(dense(infl))) <= tolerance


def test_float32() -> None:
    case = wide()
    infl = fitted("dropped", 1e-3, dtype=torch.float32, tol=1e-4)
    test, train = ((pair[0].float(), pair[1]) for pair in (case.test, case.train))
    found = infl.influences(*test, *train)
    assert found.dtype == torch.float32
    assert infl.diagnostics["direction_ranks"]
    assert oracles.relative_error(found.double(), case.up(dense(infl))) <= 1e-3


def test_half_precision_loses_no_more_than_it_does_anyway() -> None:
    errors = []
    for tolerance in (None, 1e-3):
        infl = fitted("dropped", tolerance, dtype=torch.bfloat16, tol=1e-2)
        test, train = ((x.bfloat16(), y) for x, y in (wide().test, wide().train))
        found = infl.influences(*test, *train)
        assert found.dtype == torch.bfloat16
        errors.append(oracles.relative_error(found.double(), wide().up(dense(infl))))
    assert infl.diagnostics["direction_ranks"]
    assert errors[1] <= errors[0] + 1e-3


@ALL
def test_without_a_tolerance_there_are_no_factors(kind: str) -> None:
    infl = fitted(kind, None)
    assert infl._fitted.inverse.approximate is None
    assert "direction_tol" not in infl.diagnostics
    assert oracles.relative_error(scores(infl), wide().up(dense(infl))) <= 1e-9


# -- where factors are no use ----------------------------------------------------------
@ALL
def test_a_tolerance_that_takes_full_ranks_leaves_the_directions_whole(kind: str) -> None:
    exact, tight = fitted(kind, None), fitted(kind, 1e-13)
    assert tight.diagnostics["direction_ranks"] == {}
    assert tight.diagnostics["direction_score_error"] == 0
    assert torch.equal(scores(exact), scores(tight))


@pytest.mark.parametrize("random", [True, False])
def test_random_directions_are_left_whole_and_those_of_a_curvature_are_not(random: bool) -> None:
    fit, (x, y) = fitted("dropped", None)._fitted, wide().train
    vectors = fit.inverse.vectors
    if random:  # and so are the inputs, so that no space is empty
        vectors, x = data.normal(909, *vectors.shape), data.normal(910, *x.shape)
    weights = torch.ones(len(vectors), dtype=torch.float64)
    found = approximation(fit.problem, x, y, vectors, weights, 0.0, 1e-3)
    assert (found.factored is None) == random


def test_a_model_without_layers_is_scored_exactly() -> None:
    pair = data.normal(911, 19, 3), data.normal(912, 19, 3)
    case = data.Case(nn.PReLU(3).double(), functional.mse_loss, pair, pair, 0.1)
    infl = fitted("dropped", 1e-2, case, rank=2)
    assert infl.diagnostics["direction_ranks"] == {}
    assert oracles.relative_error(scores(infl, case), case.up(dense(infl))) <= 1e-9


@ALL
def test_samples_unlike_those_fitted_are_scored_exactly_and_it_is_said(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    infl, case = fitted(kind, 1e-3), wide()
    others = unlike(infl)
    expected = case.up(dense(infl), train=others)
    with pytest.warns(InfluenceWarning, match="more than direction_tol allows"):
        found = infl.influences(*case.test, *others)
    assert oracles.relative_error(found, expected) <= 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", InfluenceWarning)
        infl.influences(*case.test, *case.train)
    monkeypatch.setattr(Factored, "agrees", lambda *_: True)  # nobody looks, and it is wrong
    assert oracles.relative_error(infl.influences(*case.test, *others), expected) > 1e-3


# -- λ ---------------------------------------------------------------------------------
@ALL
@pytest.mark.parametrize("regularization", [0.02, 0.5])
def test_at_another_regularization_scores_are_as_accurate(kind: str, regularization: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        infl = fitted(kind, 1e-3).with_regularization(regularization)
    assert oracles.relative_error(scores(infl), wide().up(dense(infl))) <= 1e-3


def test_where_another_regularization_needs_more_they_are_left_whole_and_it_is_said() -> None:
    infl = fitted("woodbury", 1e-2, dataclasses.replace(wide(), regularization=100.0))
    assert infl.diagnostics["direction_ranks"]
    with pytest.warns(InfluenceWarning, match=r"hessian_regularization=0\.1 .*direction_tol=0\.01"):
        other = infl.with_regularization(0.1)
    assert other.diagnostics["direction_ranks"] == {}
    assert other._fitted.inverse.approximate is None
    assert oracles.relative_error(scores(other), wide().up(dense(other))) <= 1e-7


@ALL
def test_several_regularizations_at_once(kind: str, tmp_path: Path) -> None:
    infl, case = fitted(kind, 1e-3), wide()
    several = [0.1, 0.3]
    found = infl.influences_to_zarr(
        tmp_path / "scores", case.test, case.train, hessian_regularization=several
    )
    for value in several:
        expected = case.up(dense(infl.with_regularization(value)))
        one = torch.from_numpy(found["influence"].sel(regularization=value).to_numpy())
        assert 1e-12 < oracles.relative_error(one, expected) <= 1e-3


# -- runs ------------------------------------------------------------------------------
@ALL
def test_a_cluster_gives_the_same_bits_as_this_process_and_its_store_says_what_it_cost(
    kind: str, tmp_path: Path, client: Client
) -> None:
    case, infl = wide(), fitted(kind, 1e-3)
    here = infl.influences_to_zarr(tmp_path / "here", case.test, case.train, tile_bytes=2**14)
    found = torch.from_numpy(here["influence"].to_numpy())
    assert 1e-12 < oracles.relative_error(found, case.up(dense(infl))) <= 1e-3
    written = open_influences(tmp_path / "here").attrs["diagnostics"]
    assert written["direction_tol"] == 1e-3
    assert 0 < written["direction_score_error"] <= 1e-3
    infl.save(tmp_path / "saved")
    loaded = type(infl).load(tmp_path / "saved", case.model, case.loss, client=client)
    there = loaded.influences_to_zarr(tmp_path / "there", case.test, case.train, tile_bytes=2**14)
    assert np.array_equal(there["influence"], here["influence"])
    others = unlike(infl)  # for which workers fetch the directions themselves
    there = loaded.influences_to_zarr(tmp_path / "others there", case.test, others)
    with pytest.warns(InfluenceWarning, match="more than direction_tol allows"):
        here = infl.influences_to_zarr(tmp_path / "others here", case.test, others)
    assert np.array_equal(there["influence"], here["influence"])
    found = torch.from_numpy(there["influence"].to_numpy())
    assert oracles.relative_error(found, case.up(dense(infl), train=others)) <= 1e-3


@ALL
def test_dask_arrays_and_memory_agree(kind: str) -> None:
    case, infl = wide(), fitted(kind, 1e-3)
    x, y = (da.from_array(part.numpy(), chunks=(97, *part.shape[1:])) for part in case.train)
    lazy = infl.influences(case.test[0].numpy(), case.test[1].numpy(), x, y)
    found = torch.from_numpy(lazy.compute())
    assert oracles.relative_error(found, case.up(dense(infl))) <= 1e-3
    assert oracles.relative_error(found, scores(infl)) <= 1e-3


@ALL
def test_a_run_resumes_and_one_of_another_tolerance_is_refused(kind: str, tmp_path: Path) -> None:
    case, infl, store = wide(), fitted(kind, 1e-3), tmp_path / "scores"
    first = infl.influences_to_zarr(store, case.test, case.train, tile_bytes=2**14)["influence"].to_numpy()
    (store / "_run" / "ledger" / "000001.json").unlink(missing_ok=True)
    again = made(kind, 1e-3).influences_to_zarr(store, case.test, case.train, tile_bytes=2**14)
    assert np.array_equal(again["influence"], first)
    for other in (1e-4, None):
        with pytest.raises(StoreMismatchError, match="direction_tol"):
            fitted(kind, other).influences_to_zarr(store, case.test, case.train, tile_bytes=2**14)


@ALL
def test_saved_and_loaded_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    infl, case = fitted(kind, 1e-3), wide()
    infl.save(tmp_path / "saved")
    loaded = type(infl).load(tmp_path / "saved", case.model, case.loss)
    assert torch.equal(scores(loaded), scores(infl))
    assert loaded.diagnostics["direction_ranks"] == infl.diagnostics["direction_ranks"]
    assert loaded.diagnostics["direction_score_error"] == infl.diagnostics["direction_score_error"]


def test_strips_are_sent_factors_and_find_the_directions_where_they_need_them() -> None:
    infl = fitted("dropped", 1e-1)
    fit = infl._fitted.shipped(infl._resources, LocalExecutor())
    assert isinstance(fit.scorer, Approximated)
    thin, whole = fit.scorer.approximate.inverse(), fit.solver.inverse()
    sent = sum(tensor.nbytes for tensor in thin.state()[0].values())
    assert sent < whole.vectors.nbytes
    assert not any(tensor.shape == whole.vectors.shape for tensor in thin.state()[0].values())
    directions: Any = fit.scorer.inverse().directions
    assert torch.equal(directions.dense(), whole.vectors)


def test_self_influence(tmp_path: Path) -> None:
    case = wide()
    for kind in KINDS:
        infl = fitted(kind, 1e-3)
        found = infl.influences_to_zarr(tmp_path / kind, None, case.train, reduce=SelfInfluence())
        expected = case.up(dense(infl), case.train).diagonal()
        own = torch.from_numpy(found["self_influence"].to_numpy())
        assert oracles.relative_error(own, expected) <= 1e-3


def test_perturbation_and_factors_take_the_directions_themselves() -> None:
    case, exact, infl = wide(), fitted("dropped", None), fitted("dropped", 1e-1)
    found, wanted = (one.influences(*case.test, *case.train, mode="perturbation") for one in (infl, exact))
    assert torch.equal(found, wanted)
    assert torch.equal(infl.influence_factors(*case.test), exact.influence_factors(*case.test))


def test_a_plan_counts_the_factors() -> None:
    case = wide()
    exact, infl = (fitted("dropped", tolerance).plan(case.test, case.train) for tolerance in (None, 1e-1))
    assert infl.resident_bytes > exact.resident_bytes


# -- bad input -------------------------------------------------------------------------
@pytest.mark.parametrize("value", [0, -1e-3, 1, 1.5, float("nan"), float("inf"), "1e-4", True, [1e-4]])
@pytest.mark.parametrize("kind", ["dropped", "nystroem"])
def test_what_is_no_tolerance_is_refused(kind: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match="direction_tol"):
        made(kind, value)


@pytest.mark.parametrize("model", [DirectInfluence, CgInfluence])
def test_estimators_without_directions_of_their_own_have_no_such_argument(model: Any) -> None:
    with pytest.raises(TypeError, match="'direction_tol'"):
        model(wide().model, wide().loss, 0.1, direction_tol=1e-4)


@pytest.mark.parametrize("kind", ["dropped", "nystroem"])
def test_blocks_have_directions_each(kind: str) -> None:
    fitted(kind, None, block_structure="layer")
    with pytest.raises(ConfigurationError, match=r"direction_tol.*block_structure"):
        fitted(kind, 1e-3, block_structure="layer")


def test_a_job_may_ask_for_it() -> None:
    section: Any = TypeAdapter(estimators.Estimator)
    asked = section.validate_python({"name": "ArnoldiInfluence", "direction_tol": 1e-4})
    assert asked.constructor_arguments()["direction_tol"] == 1e-4
    with pytest.raises(ValidationError):
        section.validate_python({"name": "DirectInfluence", "direction_tol": 1e-4})
