"""Estimators that keep the complement score pairs of samples, without gradients and factors of size P."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
from distributed import Client
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import (
    ArnoldiInfluence,
    DirectInfluence,
    EkfacInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
    SelfInfluence,
    TopK,
)
from dask_influence.core import directional
from dask_influence.errors import DataError, InfluenceWarning, MemoryLimitError
from dask_influence.execution.plan import Plan
from dask_influence.models import GradientDotInfluence
from tests import data, oracles

EXACT = 1e-9
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "woodbury": (ArnoldiInfluence, {"rank": 6, "complement": True, "tol": 1e-11}),
    "nystroem": (NystroemSketchInfluence, {"rank": 9, "curvature": "ggn"}),
    "gradient dot": (GradientDotInfluence, {}),
    "ekfac": (EkfacInfluence, {"curvature": "ggn"}),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def fitted(kind: str, **how: Any) -> Any:
    case, (model, own) = data.digits_mlp(), KINDS[kind]
    return model(case.model, case.loss, 0.5, **{**own, **how}).fit(case.train)


def dense(infl: InfluenceFunctionModel) -> Tensor:
    """The inverse that was fitted, from its factors of the unit vectors."""
    inverse, size = infl._fitted.inverse, infl._fitted.system.size
    computation = inverse.solve(torch.eye(size, dtype=torch.float64))
    with pytest.raises(StopIteration) as finished:
        next(computation)
    return finished.value.value.factors


def expected(infl: InfluenceFunctionModel) -> Tensor:
    return data.digits_mlp().up(dense(infl))


def refuse(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("gradients of size P were formed")


def error(actual: Any, wanted: Any) -> float:
    return oracles.relative_error(np.asarray(actual), torch.as_tensor(np.asarray(wanted)))


# -- values ----------------------------------------------------------------------------
@ALL
def test_in_memory_against_the_dense_inverse_and_no_gradient_is_formed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    wanted = expected(infl)
    if kind == "woodbury":
        inverse = oracles.low_rank_inverse(case.hessian, 0.5, 6, complement=True)
        assert error(wanted, case.up(inverse)) <= EXACT
        assert oracles.weight_of_curvature(wanted, case.up(torch.eye(len(inverse)).double() / 0.5)) > 0.1
    for name in ("gradients", "directional_derivatives"):
        monkeypatch.setattr(directional, name, refuse)
    assert error(infl.influences(*case.test, *case.train), wanted) <= EXACT


@ALL
def test_on_a_cluster_to_a_store_bit_for_bit_as_in_this_process(
    kind: str, client: Client, tmp_path: Path
) -> None:
    case, runs = data.digits_mlp(), {}
    wanted = expected(fitted(kind))
    for name, own in {"here": None, "cluster": client}.items():
        infl = fitted(kind, client=own)
        assert infl.plan(case.test, case.train, tile_bytes=9_000).work.paired is not None
        runs[name] = infl.influences_to_zarr(tmp_path / name, case.test, case.train, tile_bytes=9_000).load()
    assert runs["here"]["influence"].values.tobytes() == runs["cluster"]["influence"].values.tobytes()
    assert error(runs["cluster"]["influence"], wanted) <= EXACT


@ALL
def test_any_chunks_and_tiles(kind: str, tmp_path: Path) -> None:
    case = data.digits_mlp()
    wanted = fitted(kind).influences(*case.test, *case.train)
    for size in (1_000, 50_000):
        infl = fitted(kind, chunk_size=53 if size > 1_000 else None)
        run = infl.influences_to_zarr(tmp_path / str(size), case.test, case.train, tile_bytes=size)
        assert error(run["influence"], wanted) <= 1e-10


@ALL
def test_residuals_are_those_of_the_factors(kind: str, tmp_path: Path) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    factors = infl.influence_factors(*case.test)
    assert factors.shape == (37, 610)
    gradients = oracles.gradients(case.model, case.loss, *case.test)
    own = KINDS[kind][1].get("curvature", "hessian")
    curvature = case.hessian if own == "hessian" else oracles.ggn(case.model, case.loss, *case.train)
    left = factors @ curvature + 0.5 * factors - gradients
    run = infl.influences_to_zarr(tmp_path / "scores", case.test, case.train)
    assert error(run["factor_residual"], left.norm(dim=1) / gradients.norm(dim=1)) <= EXACT
    quick = fitted(kind, certify=False).influences_to_zarr(tmp_path / "quick", case.test, case.train)
    assert np.isnan(quick["factor_residual"]).all()
    assert error(quick["influence"], run["influence"]) == 0


@ALL
def test_factors_in_a_store_are_scored_as_factors(kind: str, tmp_path: Path) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    infl.influence_factors_to_zarr(tmp_path / "factors", case.test)
    run = infl.influences_to_zarr(tmp_path / "scores", tmp_path / "factors", case.train)
    assert error(run["influence"], infl.influences(*case.test, *case.train)) <= EXACT


@ALL
def test_several_regularizations(kind: str, client: Client, tmp_path: Path) -> None:
    case, infl = data.digits_mlp(), fitted(kind, client=client)
    run = infl.influences_to_zarr(
        tmp_path / "scores", case.test, case.train, hessian_regularization=[0.7, 0.3], tile_bytes=20_000
    )
    for i, value in enumerate((0.7, 0.3)):
        one = fitted(kind).with_regularization(value)
        assert error(run["influence"][i], expected(one)) <= EXACT


@ALL
def test_reductions(kind: str, tmp_path: Path) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    scores = infl.influences(*case.test, *case.train).numpy()
    top = infl.influences_to_zarr(tmp_path / "top", case.test, case.train, reduce=TopK(3), tile_bytes=9_000)
    assert error(top["helpful_score"], -np.sort(-scores, axis=1)[:, :3]) <= EXACT
    own = infl.influences_to_zarr(tmp_path / "self", None, case.train, reduce=SelfInfluence())
    gradients = oracles.gradients(case.model, case.loss, *case.train)
    wanted = ((gradients @ dense(infl)) * gradients).sum(1)
    assert error(own["self_influence"], wanted) <= EXACT


@ALL
def test_lazy_arrays(kind: str) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    train = [da.from_array(part.numpy(), chunks=(97, *part.shape[1:])) for part in case.train]
    test = [da.from_array(part.numpy(), chunks=(17, *part.shape[1:])) for part in case.test]
    lazy = infl.influences(*test, *train)
    assert lazy.chunks == ((17, 17, 3), (97, 97, 97, 97, 13))
    assert error(lazy.compute(scheduler="threads"), expected(infl)) <= EXACT


@ALL
def test_single_precision(kind: str) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    narrow = fitted(kind, dtype=torch.float32, **({"tol": 1e-5} if kind == "woodbury" else {}))
    scores = narrow.influences(*case.test, *case.train)
    assert scores.dtype == torch.float32
    assert error(scores, expected(infl)) <= 1e-4


@ALL
def test_saved_and_loaded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    infl.save(tmp_path)
    loaded = type(infl).load(tmp_path, case.model, case.loss)
    monkeypatch.setattr(directional, "gradients", refuse)
    assert torch.equal(loaded.influences(*case.test, *case.train), infl.influences(*case.test, *case.train))


# -- when it is taken ------------------------------------------------------------------
@ALL
def test_the_plan_counts_what_is_held_and_says_so(kind: str) -> None:
    case, infl = data.digits_mlp(), fitted(kind)
    plan = infl.plan(case.test, case.train)
    rank = KINDS[kind][1].get("rank", 0)
    numbers = rank + 64 + 1 + 8 + 8 + 1 + 10
    assert (plan.work.rank, plan.work.paired.numbers) == (rank, numbers)
    assert f"{numbers} of each sample, {rank} of them projections" in str(plan)
    own = {field.name: getattr(plan, field.name) for field in dataclasses.fields(Plan)}
    assert Plan.from_json(json.loads(json.dumps(Plan(**own).to_json()))) == Plan(**own)
    more = dataclasses.replace(
        plan.work, paired=dataclasses.replace(plan.work.paired, numbers=numbers + 1000)
    )
    held = dataclasses.replace(plan, work=more).scoring_bytes - plan.scoring_bytes
    batch = min(plan.batch, plan.tile[1])
    # the test side mapped and put together; four of the training side while they are made
    assert held == 8 * 1000 * (2 * plan.query_rows + 2 * plan.tile[1] + 4 * batch)
    with pytest.raises(MemoryLimitError, match="memory_limit"):
        plan.validate(1_000_000)
    before = KINDS[kind][0](case.model, case.loss, 0.5, **KINDS[kind][1])
    foreseen = before.plan(case.test, case.train, before_fit=True)
    assert (foreseen.work, foreseen.tile) == (plan.work, plan.tile)


@pytest.mark.parametrize("tests", [1, 37])
def test_few_test_points_are_cheaper_as_factors(tests: int) -> None:
    case, infl = data.digits_mlp(), fitted("nystroem")
    few = tuple(part[:tests] for part in case.test)
    assert (infl.plan(few, case.train).work.paired is None) is (tests == 1)
    assert error(infl.influences(*few, *case.train), expected(infl)[:tests]) <= EXACT


def test_other_estimators_and_perturbation_go_by_factors() -> None:
    case = data.digits_mlp()
    assert fitted("woodbury", complement=False).plan(case.test, case.train).work.paired is None
    assert fitted("woodbury").plan(case.test, case.train, mode="perturbation").work.paired is None
    blocks = fitted("nystroem", block_structure="layer")
    assert blocks.plan(case.test, case.train).work.paired is None
    direct = DirectInfluence(case.model, case.loss, 0.5).fit(case.train)
    assert "pairs" not in direct.diagnostics["derivatives"]
    assert fitted("woodbury").diagnostics["derivatives"]["pairs"] == {"layers": ["0", "2"], "formed": []}


def test_samples_of_another_shape_go_by_factors() -> None:
    """Positions of a convolution are counted on the data fitted."""
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Unflatten(1, (1, -1)),
        nn.Conv1d(1, 3, 4),
        nn.Tanh(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(3, 90),
        nn.Tanh(),
        nn.Linear(90, 4),
    )
    model = data.seeded(build).double()
    train = data.normal(401, 41, 9), data.classes(402, 41, 4)
    longer = data.normal(403, 19, 13), data.classes(404, 19, 4)
    infl = GradientDotInfluence(model, functional.cross_entropy, 0.1).fit(train)
    for test, paired in ((train, True), (longer, False)):
        assert (infl.plan(test, train).work.paired is not None) is paired
        wanted = oracles.gradients(model, infl.loss, *test) @ oracles.gradients(model, infl.loss, *train).mT
        assert error(infl.influences(*test, *train), wanted) <= EXACT


# -- bad samples -----------------------------------------------------------------------
@pytest.mark.parametrize("side", ["test", "train"])
def test_samples_without_finite_numbers_are_missing_by_name(side: str, tmp_path: Path) -> None:
    def pair(seed: int) -> tuple[Tensor, Tensor]:
        return data.normal(seed, 97, 20), data.classes(seed + 1, 97, 5)

    model = data.seeded(lambda: nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5))).double()
    model[0].weight.data *= 30  # so that 1e308 overflows
    sides = {"test": pair(405), "train": pair(407)}
    infl = NystroemSketchInfluence(model, functional.cross_entropy, 0.5, rank=3, curvature="ggn").fit(
        pair(409)
    )
    sound = infl.influences(*sides["test"], *sides["train"]).numpy()
    sides[side][0][83] = 1e308  # behind the samples looked at before
    assert infl.plan(sides["test"], sides["train"]).work.paired is not None
    with pytest.warns(InfluenceWarning, match=f"{side} sample 83"):
        run = infl.influences_to_zarr(tmp_path / "run", sides["test"], sides["train"], on_missing="warn")
    found = np.moveaxis(np.asarray(run["influence"]), 0 if side == "test" else 1, 0)
    sound = np.moveaxis(sound, 0 if side == "test" else 1, 0)
    assert np.isnan(found[83]).all()
    assert error(np.delete(found, 83, 0), np.delete(sound, 83, 0)) <= EXACT
    with pytest.raises(DataError, match="sample 83"):
        infl.influences(*sides["test"], *sides["train"])
