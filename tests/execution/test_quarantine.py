"""Poison: a sample that yields NaN, raises, or kills whoever works on it, is missing from the store, and it alone."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from distributed import Client, LocalCluster
from torch import nn

from dask_influence import (
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GroupSum,
    SelfInfluence,
    TopK,
    open_influences,
    verify,
)
from dask_influence.errors import (
    ClusterError,
    ConfigurationError,
    DataError,
    IncompleteRunError,
    InfluenceWarning,
    PoisonedSamplesError,
    StoreMismatchError,
)
from dask_influence.execution import quarantine
from dask_influence.execution.job import Job
from dask_influence.execution.shipping import Held
from dask_influence.storage.results import described
from tests import data

N, M = 71, 97
"""More than the samples that are looked at before a run."""
TILE = 12_000
MARK = 1234.5
"""In the first feature: the sample that kills."""
STRANGE = -1234.5
"""In the first feature: a sample that the model raises of."""


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two workers that may die, of a scheduler that soon suspects a task."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="2GiB"
        ) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


def deadly() -> nn.Module:
    """The network of mlp_regression; in another process than this one it dies of a marked sample."""
    home, mark = os.getpid(), MARK

    class Deadly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(data.mlp_regression().model)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            plain, functorch = x.detach(), torch._C._functorch
            while functorch.is_functorch_wrapped_tensor(plain):
                plain = functorch.get_unwrapped(plain)
            if os.getpid() != home and bool((plain == mark).any()):
                os._exit(7)
            return self.inner(torch.where(x == mark, torch.zeros_like(x), x))

    return Deadly()


class Moody(nn.Module):
    """The network of mlp_regression, whose output for a marked sample is infinite; it raises of a strange one.

    With ``crowd`` > 1 it takes so many strange samples in one batch.
    """

    factor = float("inf")

    def __init__(self, crowd: int = 1) -> None:
        super().__init__()
        self.inner, self.crowd = copy.deepcopy(data.mlp_regression().model), crowd

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        plain, functorch = x.detach(), torch._C._functorch
        while functorch.is_functorch_wrapped_tensor(plain):
            plain = functorch.get_unwrapped(plain)
        if int((plain == STRANGE).sum()) >= self.crowd:
            raise KeyError("no such sample")
        marked = x[..., :1] == MARK
        factor = torch.where(marked, self.factor, 1.0).to(x.dtype)
        return self.inner(torch.where(marked, 1e-3 * x, x)) * factor


def stored(folder: Path, pairs: tuple[data.Pair, data.Pair]) -> tuple[str, str]:
    """Both in Zarr groups, of which no value is read before the tasks do."""
    for name, (x, y) in zip(("test", "train"), pairs, strict=True):
        group = zarr.open_group(folder / f"{name}.zarr", mode="w")
        group.create_array("x", data=x.numpy(), chunks=(20, 3))
        group.create_array("y", data=y.numpy(), chunks=(20, 1))
    return str(folder / "test.zarr"), str(folder / "train.zarr")


def problem(side: str, samples: dict[int, float]) -> tuple[data.Pair, data.Pair]:
    """Test and training data, the first feature of some samples of one side set to a value."""
    pairs = {
        "test": (data.normal(51, N, 3), data.normal(52, N, 1)),
        "train": (data.normal(53, M, 3), data.normal(54, M, 1)),
    }
    for sample, value in samples.items():
        pairs[side][0][sample, 0] = value
    return pairs["test"], pairs["train"]


def model(client: Client | None = None, module: nn.Module | None = None, kind: Any = DirectInfluence) -> Any:
    case = data.mlp_regression()
    fitted = kind(module or case.model, case.loss, case.regularization, client=client, chunk_size=20)
    return fitted.fit(case.train)


IDS = {"test_ids": [f"query {i}" for i in range(N)], "train_ids": [f"image {j}" for j in range(M)]}


def expected(side: str, scores: np.ndarray, samples: list[int]) -> np.ndarray:
    scores = scores.copy()
    scores[(samples, ...) if side == "test" else (slice(None), samples)] = np.nan
    return scores


def entries(store: Path) -> dict[str, Any]:
    folder = store / "_run" / "ledger"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("side", ["test", "train"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (float("nan"), "its x holds NaN or inf"),
        (MARK, "its loss or gradient is not finite"),
        (STRANGE, "it raises KeyError: 'no such sample'"),
    ],
    ids=["input", "gradient", "raises"],
)
@pytest.mark.parametrize("first", [0, 66], ids=["among the first", "later"])
def test_samples_without_derivatives(
    tmp_path: Path, side: str, value: float, reason: str, mode: str, first: int
) -> None:
    infl, bad = model(module=Moody()), [first, 70]
    sound = infl.influences_to_zarr(tmp_path / "sound", *problem(side, {}), mode=mode, tile_bytes=TILE)
    test, train = stored(tmp_path, problem(side, dict.fromkeys(bad, value)))
    with pytest.raises(PoisonedSamplesError, match=rf"{side} sample {first}.*{reason}.*sample 70") as caught:
        infl.influences_to_zarr(tmp_path / "run", test, train, mode=mode, tile_bytes=TILE, **IDS)
    assert isinstance(caught.value, (DataError, IncompleteRunError))
    ids = IDS[f"{side}_ids"]
    listed = [{"sample": j, "id": ids[j], "reason": reason} for j in bad]
    assert caught.value.missing == {side: listed}
    with pytest.warns(
        InfluenceWarning, match=rf"lacks {side} sample {first} \(id '{ids[first]}'\): {reason}"
    ):
        written = open_influences(tmp_path / "run")
    assert written.attrs["state"] == "incomplete"
    assert written.attrs["missing"] == {side: [ids[j] for j in bad]}
    np.testing.assert_array_equal(written.influence.values, expected(side, sound.influence.values, bad))
    residual = written.factor_residual.values
    assert np.isnan(residual[bad]).all() == (side == "test")
    assert np.isfinite(np.delete(residual, bad)).all()
    found = [one for name, entry in entries(tmp_path / "run").items() if name != "residual"
             for one in entry.get("missing", ())]  # fmt: skip
    assert sorted(found, key=lambda one: one["sample"]) == listed
    assert verify(tmp_path / "run")


def test_what_is_missing_is_told_again_and_tried_again_on_request(tmp_path: Path) -> None:
    infl = model(module=Moody())
    test, train = problem("train", {70: MARK})
    with pytest.warns(InfluenceWarning, match="train sample 70"):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE, on_missing="warn")
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(PoisonedSamplesError, match="train sample 70"):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE)
    assert {p: p.stat().st_mtime_ns for p in times} == times
    with pytest.raises(PoisonedSamplesError, match="train sample 70"):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE, repair=True)
    redone = {p.stem for p, time in times.items() if p.stat().st_mtime_ns != time and "ledger" in str(p)}
    assert redone == {name for name, entry in entries(tmp_path / "run").items() if "missing" in entry}
    assert len(redone) == 1


def test_a_test_point_that_is_mended_by_trying_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All strips of its query block are redone, and the store is complete then."""
    infl = model(module=Moody())
    test, train = problem("test", {68: MARK})
    with pytest.raises(PoisonedSamplesError, match="test sample 68"):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE)
    monkeypatch.setattr(Moody, "factor", 1.0)
    infl = model(module=Moody())
    written = infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE, repair=True)
    assert written.attrs["state"] == "complete"
    assert "missing" not in written.attrs
    sound = infl.influences_to_zarr(tmp_path / "sound", test, train, tile_bytes=TILE)
    np.testing.assert_array_equal(written.influence.values, sound.influence.values)
    np.testing.assert_array_equal(written.factor_residual.values, sound.factor_residual.values)


def test_factors_in_a_store_of_their_own(tmp_path: Path) -> None:
    infl = model(module=Moody())
    sound = infl.influences_to_zarr(tmp_path / "sound", *problem("test", {}), tile_bytes=TILE)
    test, train = problem("test", {65: MARK})
    with pytest.raises(PoisonedSamplesError, match="test sample 65"):
        infl.influence_factors_to_zarr(tmp_path / "factors", test)
    with pytest.warns(InfluenceWarning, match="lacks test sample 65"):
        factors = open_influences(tmp_path / "factors")
    assert np.isnan(factors.factors.values[65]).all()
    assert np.isfinite(np.delete(factors.factors.values, 65, axis=0)).all()
    for _ in range(2):  # written, and resumed
        with pytest.raises(PoisonedSamplesError, match="test sample 65"):
            infl.influences_to_zarr(tmp_path / "run", tmp_path / "factors", train, tile_bytes=TILE)
    with pytest.warns(InfluenceWarning, match="lacks test sample 65"):
        written = open_influences(tmp_path / "run")
    np.testing.assert_array_equal(written.influence.values, expected("test", sound.influence.values, [65]))


def test_factors_solved_by_passes(tmp_path: Path) -> None:
    infl = model(module=Moody(), kind=CgInfluence)
    sound = infl.influences_to_zarr(tmp_path / "sound", *problem("test", {}), tile_bytes=TILE)
    with pytest.warns(InfluenceWarning, match="lacks test sample 65"):
        written = infl.influences_to_zarr(
            tmp_path / "run", *problem("test", {65: MARK}), tile_bytes=TILE, on_missing="warn"
        )
    np.testing.assert_allclose(
        written.influence.values, expected("test", sound.influence.values, [65]), rtol=1e-4, atol=1e-8
    )
    assert np.isnan(written.factor_residual.values[65])


def test_a_whole_batch_of_nan(tmp_path: Path) -> None:
    infl = model()
    test, train = stored(tmp_path, problem("train", dict.fromkeys(range(64, M), float("nan"))))
    with pytest.raises(PoisonedSamplesError, match="and 23 more"):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE)
    with pytest.warns(InfluenceWarning):
        scores = open_influences(tmp_path / "run").influence.values
    assert np.isnan(scores[:, 64:]).all()
    assert np.isfinite(scores[:, :64]).all()


def test_in_memory_scores_still_need_every_sample(client: Client) -> None:
    test, train = problem("train", {66: 1e200})
    for where in (None, client):
        infl = DirectInfluence(
            nn.Linear(3, 1, dtype=torch.float64), nn.functional.mse_loss, 0.05, client=where
        )
        with pytest.raises(DataError, match=r"\b66\b"):
            infl.fit(problem("train", {})[1]).influences(*test, *train)


# -- reductions -----------------------------------------------------------------------------------
LABELS, QUERY_LABELS = np.arange(M) % 3, np.array(["a", "b"])[np.arange(N) % 2]
REDUCTIONS = {
    "best of each test point": TopK(3),
    "best of each training point": TopK(3, per="train"),
    "sums over training points": GroupSum(LABELS),
    "sums over test points": GroupSum(test_labels=QUERY_LABELS),
    "sums over both": GroupSum(LABELS, test_labels=QUERY_LABELS),
}


def reduction_of(
    reduce: Any, scores: np.ndarray, tests: list[int], trains: list[int]
) -> dict[str, np.ndarray]:
    """``reduce`` of scores (N, M) without some test and training points; NaN where those are kept."""
    held = np.delete(np.delete(scores, tests, axis=0), trains, axis=1)
    queries, images = np.delete(np.arange(N), tests), np.delete(np.arange(M), trains)
    if isinstance(reduce, TopK):
        listed = (images, queries)[reduce.per == "train"]
        lists, kept, total = (held.T, images, M) if reduce.per == "train" else (held, queries, N)
        found = {}
        for side, sign in (("helpful", -1), ("harmful", 1)):
            order = np.argsort(sign * lists, axis=1, kind="stable")[:, : reduce.k]
            scored, named = np.full((total, reduce.k), np.nan), np.full((total, reduce.k), -1)
            scored[kept], named[kept] = np.take_along_axis(lists, order, axis=1), listed[order]
            found |= {
                f"{side}_score": scored,
                f"{side}_{'test' if reduce.per == 'train' else 'train'}": named,
            }
        return found
    sums, labels = np.full((N, M), np.nan), reduce._labels
    sums[np.ix_(queries, images)] = held
    for axis, side in ((1, "train"), (0, "test")):
        if side not in labels:
            continue
        keep = (queries, images)[axis]
        groups = [keep[labels[side][keep] == label] for label in np.unique(labels[side])]
        sums = np.stack([sums.take(group, axis=axis).sum(axis=axis) for group in groups], axis=axis)
    return {"group_influence": sums}


@pytest.mark.parametrize("reduce", REDUCTIONS.values(), ids=REDUCTIONS)
@pytest.mark.parametrize("side", ["test", "train"])
def test_reductions_leave_missing_samples_out(tmp_path: Path, side: str, reduce: Any) -> None:
    infl = model(module=Moody())
    scores = infl.influences_to_zarr(tmp_path / "full", *problem(side, {}), tile_bytes=TILE).influence.values
    bad = {66: MARK, 70: STRANGE}
    test, train = stored(tmp_path, problem(side, bad))
    call = {"reduce": reduce, "tile_bytes": TILE}
    told = rf"{side} sample 66.*not finite.*{side} sample 70.*raises KeyError"
    with pytest.raises(PoisonedSamplesError, match=told) as caught:
        infl.influences_to_zarr(tmp_path / "run", test, train, **call)
    assert [one["sample"] for one in caught.value.missing[side]] == [66, 70]
    with pytest.warns(InfluenceWarning, match=told):
        found = open_influences(tmp_path / "run").load()
    sides = {"test": ([66, 70], []), "train": ([], [66, 70])}[side]
    for name, expected in reduction_of(reduce, scores, *sides).items():
        np.testing.assert_allclose(found[name].values, expected, rtol=1e-9, atol=1e-12, err_msg=name)
    assert verify(tmp_path / "run")
    with pytest.warns(InfluenceWarning, match=told):  # told again, nothing done again
        infl.influences_to_zarr(tmp_path / "run", test, train, on_missing="warn", **call)


@pytest.mark.parametrize("kind", [DirectInfluence, CgInfluence])
def test_self_influence_leaves_missing_samples_out(tmp_path: Path, kind: Any) -> None:
    infl = model(module=Moody(), kind=kind)
    sound = infl.influences_to_zarr(
        tmp_path / "sound", None, problem("train", {})[1], reduce=SelfInfluence()
    ).self_influence.values
    _, train = stored(tmp_path, problem("train", {66: MARK, 70: STRANGE}))
    with pytest.raises(PoisonedSamplesError, match=r"train sample 66.*train sample 70"):
        infl.influences_to_zarr(tmp_path / "run", None, train, reduce=SelfInfluence())
    with pytest.warns(InfluenceWarning, match="lacks train sample 66"):
        found = open_influences(tmp_path / "run").self_influence.values
    sound[[66, 70]] = np.nan
    np.testing.assert_allclose(found, sound, rtol=1e-6 if kind is CgInfluence else 1e-12)


def test_lists_end_where_too_few_samples_are_left(tmp_path: Path) -> None:
    infl = model()
    bad = dict.fromkeys(range(64, M), float("nan"))
    test, train = stored(tmp_path, problem("train", bad))
    ids = [f"image {j}" for j in range(M)]
    with pytest.warns(InfluenceWarning, match="image 64"):
        found = infl.influences_to_zarr(
            tmp_path / "run", test, train, reduce=TopK(70), train_ids=ids, tile_bytes=TILE, on_missing="warn"
        ).load()
    assert np.isnan(found.helpful_score.values[:, 64:]).all()
    assert np.isfinite(found.helpful_score.values[:, :64]).all()
    assert set(found.harmful_train.values[:, 64:].ravel()) == {""}
    assert set(found.harmful_train.values[:, :64].ravel()) == set(ids[:64])


@pytest.mark.parametrize("lost", [False, True], ids=["entry", "entry lost"])
def test_a_reduction_tries_missing_samples_again_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    """Also where the entry that says so is lost, and the record of the run alone knows."""
    infl, call = model(module=Moody()), {"reduce": TopK(3), "tile_bytes": TILE}
    test, train = problem("train", {70: MARK})
    store = tmp_path / "run"
    with pytest.raises(PoisonedSamplesError, match="train sample 70"):
        infl.influences_to_zarr(store, test, train, **call)
    if lost:
        (name,) = (name for name, entry in entries(store).items() if entry.get("missing"))
        (store / "_run" / "ledger" / f"{name}.json").unlink()
    monkeypatch.setattr(Moody, "factor", 1.0)
    infl = model(module=Moody())
    if lost:  # the strip alone is made again, now without harm; what was written is without the sample still
        with pytest.raises(PoisonedSamplesError, match="train sample 70"):
            infl.influences_to_zarr(store, test, train, **call)
    written = infl.influences_to_zarr(store, test, train, repair=True, **call)
    assert written.attrs["state"] == "complete"
    sound = infl.influences_to_zarr(tmp_path / "sound", test, train, **call)
    xr.testing.assert_equal(written.load(), sound.load())


def test_on_missing_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match='on_missing must be "raise" or "warn"'):
        model().influences_to_zarr(tmp_path / "run", *problem("train", {}), on_missing="ignore")
    assert not (tmp_path / "run").exists()


# -- exceptions -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [DirectInfluence, CgInfluence, EkfacInfluence])
def test_samples_of_which_the_model_raises_in_memory(kind: Any) -> None:
    """EK-FAC scores without gradients, CG sees the fitted data with its first factors only."""
    infl, told = model(module=Moody(), kind=kind), "sample 66 raises KeyError: 'no such sample'; mend"
    (test, train), strange = problem("train", {}), problem("train", {66: STRANGE, 70: STRANGE})[1]
    assert torch.isfinite(infl.influences(*test, *train)).all()
    for argument, ask in {
        "x, y": lambda: infl.influences(*test, *strange),
        "x_test, y_test": lambda: infl.influences(*strange, *train),
        "x, y ": lambda: infl.influence_factors(*strange),
        "train": lambda: infl.fit(strange).influence_factors(*test),
    }.items():
        with pytest.raises(DataError, match=f"{argument.strip()}: {told}") as caught:
            ask()
        assert isinstance(caught.value.__cause__, KeyError)


def test_what_no_sample_raises_alone_is_raised_as_it_is() -> None:
    infl = DirectInfluence(Moody(crowd=2), nn.functional.mse_loss, 5.0, chunk_size=20)
    with pytest.raises(KeyError, match="no such sample"):
        infl.fit(problem("train", {66: STRANGE, 70: STRANGE})[1])
    infl.fit(problem("train", {66: STRANGE})[1])


def test_samples_are_not_blamed_for_a_model_that_raises_of_most(tmp_path: Path) -> None:
    x, y = data.normal(55, 200, 3), data.normal(56, 200, 1)
    infl, test = model(module=Moody()), problem("train", {})[0]
    x[64:128, 0] = STRANGE
    with pytest.raises(PoisonedSamplesError, match="and 54 more"):
        infl.influences_to_zarr(tmp_path / "64", test, (x, y))
    x[128, 0] = STRANGE
    with pytest.raises(
        DataError, match=r"sample 64 raises KeyError.*64 or more beside it.*look at the model"
    ) as caught:
        infl.influences_to_zarr(tmp_path / "65", test, (x, y))
    assert not isinstance(caught.value, PoisonedSamplesError)


def test_labels_out_of_range_on_a_cluster(tmp_path: Path, client: Client) -> None:
    """The fit names the sample; a run goes on without it; mended labels are another run, which may replace it."""
    case = data.logistic_regression()
    x, y = data.normal(57, M, 5), data.classes(58, M, 3)
    wrong = torch.where(torch.arange(M) == 66, 7, y)
    infl = DirectInfluence(case.model, case.loss, case.regularization, client=client, chunk_size=20)
    with pytest.raises(DataError, match=r"train: sample 66 raises \w+Error: .*7 is out of bounds"):
        infl.fit((x, wrong))
    infl.fit((x, y))
    sound = infl.influences_to_zarr(tmp_path / "sound", case.test, (x, y), tile_bytes=TILE)
    with pytest.raises(
        PoisonedSamplesError, match=r"train sample 66: it raises \w+Error: .*7 is out of bounds"
    ):
        infl.influences_to_zarr(tmp_path / "run", case.test, (x, wrong), tile_bytes=TILE)
    with pytest.warns(InfluenceWarning, match="train sample 66"):
        written = open_influences(tmp_path / "run")
    np.testing.assert_array_equal(written.influence.values, expected("train", sound.influence.values, [66]))
    with pytest.raises(StoreMismatchError, match="overwrite=True"):
        infl.influences_to_zarr(tmp_path / "run", case.test, (x, y), tile_bytes=TILE)
    mended = infl.influences_to_zarr(tmp_path / "run", case.test, (x, y), tile_bytes=TILE, overwrite=True)
    assert mended.attrs["state"] == "complete"
    np.testing.assert_array_equal(mended.influence.values, sound.influence.values)


def test_a_store_that_holds_no_strip_yet_is_replaced_on_request(tmp_path: Path) -> None:
    infl = model()
    (test, train), other = problem("train", {}), problem("train", {66: 0.5})[1]

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE, progress=stop)
    assert not entries(tmp_path / "run")
    with pytest.raises(StoreMismatchError, match=r"train.*overwrite=True"):
        infl.influences_to_zarr(tmp_path / "run", test, other, tile_bytes=TILE)
    written = infl.influences_to_zarr(tmp_path / "run", test, other, tile_bytes=TILE, overwrite=True)
    assert written.attrs["state"] == "complete"
    assert np.isfinite(written.influence.values).all()


# -- crashes --------------------------------------------------------------------------------------
def test_samples_that_kill_their_worker(tmp_path: Path, client: Client) -> None:
    """Found one by one in child processes; the bits of all others are those of an undisturbed run.

    One of them is among the first, which workers look at before anything is done.
    """
    infl = model(client, deadly())
    sound = infl.influences_to_zarr(tmp_path / "sound", *problem("train", {}), tile_bytes=TILE)
    test, train = problem("test", {70: MARK})[0], problem("train", {3: MARK, 69: MARK})[1]
    reason = r"it ended its process \(exit code 7\)"
    told = rf"test sample 70: {reason}; train sample 3: {reason}; train sample 69: {reason}"
    with pytest.raises(PoisonedSamplesError, match=told):
        infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE)
    with pytest.warns(InfluenceWarning, match=told):
        again = infl.influences_to_zarr(tmp_path / "run", test, train, tile_bytes=TILE, on_missing="warn")
    assert again.attrs["missing"] == {"test": [70], "train": [3, 69]}
    scores = expected("train", expected("test", sound.influence.values, [70]), [3, 69])
    np.testing.assert_array_equal(again.influence.values, scores)
    assert verify(tmp_path / "run")


@pytest.mark.parametrize("reduce", [TopK(3), GroupSum(LABELS), SelfInfluence()], ids=repr)
def test_reductions_of_samples_that_kill_their_worker(tmp_path: Path, client: Client, reduce: Any) -> None:
    infl = model(client, deadly())
    test, train = problem("test", {70: MARK})[0], problem("train", {66: MARK, 69: MARK})[1]
    sound = infl.influences_to_zarr(
        tmp_path / "sound", *problem("train", {}), tile_bytes=TILE
    ).influence.values
    diagonal = isinstance(reduce, SelfInfluence)
    told = r"train sample 66: it ended its process \(exit code 7\); train sample 69"
    with pytest.warns(InfluenceWarning, match=told):
        found = infl.influences_to_zarr(
            tmp_path / "run",
            None if diagonal else test,
            train,
            reduce=reduce,
            tile_bytes=TILE,
            on_missing="warn",
        ).load()
    assert found.attrs["missing"] == {"train": [66, 69]} | ({} if diagonal else {"test": [70]})
    if diagonal:
        assert np.flatnonzero(np.isnan(found.self_influence.values)).tolist() == [66, 69]
        return
    for name, expected in reduction_of(reduce, sound, [70], [66, 69]).items():
        np.testing.assert_allclose(found[name].values, expected, rtol=1e-9, atol=1e-12, err_msg=name)


JOB = Held(Job(None, None, "train", 1))  # type: ignore[arg-type]


def _kills(sample: int, job: Any, *rest: Any) -> None:
    if sample in (3, 5):
        os.kill(os.getpid(), 9)


def _dies(job: Any, *rest: Any) -> None:
    os._exit(3)


def _dies_unless_spared(job: Any, needed: list[int]) -> Any:
    if sorted(job.open().poison) != needed:
        os._exit(3)
    return job.open().poison


def test_signals_are_named_and_the_search_goes_on() -> None:
    found = quarantine._isolated(_dies_unless_spared, _kills, range(1, 7), JOB, ([3, 5],))
    assert found == dict.fromkeys((3, 5), "it ended its process (SIGKILL)")


def _knows_functions(job: Any, *rest: Any) -> bool:
    return "torch._dynamo" in sys.modules


def test_forks_find_imported_what_the_first_derivative_would_import() -> None:
    assert quarantine._isolated(_knows_functions, _kills, range(1), JOB, ())


def test_samples_that_only_together_kill_are_not_blamed() -> None:
    with pytest.raises(ClusterError, match=r"samples 0 to 2 together ended.*exit code 3.*tile_bytes"):
        quarantine._isolated(_dies, _kills, range(3), JOB, ())


def _always(sample: int, job: Any, *rest: Any) -> None:
    os._exit(3)


def test_samples_are_not_blamed_for_a_machine_that_kills_everything() -> None:
    with pytest.raises(ClusterError, match=r"more than 64 samples.*first of them 5.*not the samples"):
        quarantine._isolated(_dies, _always, range(5, 99), JOB, ())


def _raises(job: Any, *rest: Any) -> None:
    raise DataError("what the child raised")


def test_exceptions_of_the_child_are_raised_here() -> None:
    with pytest.raises(DataError, match="what the child raised"):
        quarantine._isolated(_raises, _kills, range(2), JOB, ())


def _about(job: Any, name: str) -> tuple[int, str | None, str]:
    return os.getppid(), os.environ.get(name), sys.stdin.read()


def _kills_what_forked_it(job: Any) -> None:
    os.kill(os.getppid(), 9)


def test_one_process_answers_calls_for_as_long_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in the environment of its caller; after one that left, or was killed, there is another."""
    monkeypatch.setattr(quarantine, "_waiting", [])
    monkeypatch.setattr(quarantine, "IDLE", 0.5)

    def ask() -> Any:
        return quarantine._isolated(_about, _kills, range(1), JOB, ("INFLUENCE_TEST_OF_QUARANTINE",))

    one, *told = ask()
    assert told == [None, ""]
    monkeypatch.setenv("INFLUENCE_TEST_OF_QUARANTINE", "later")
    assert ask() == (one, "later", "")
    (left,) = quarantine._waiting
    assert (left.pid, left.wait(20)) == (one, 0)
    with pytest.raises(ClusterError, match=r"a process that a worker began ended its process \(SIGKILL\)"):
        quarantine._isolated(_kills_what_forked_it, _kills, range(1), JOB, ())
    assert not quarantine._waiting


def test_described() -> None:
    one = {"sample": 3, "id": 3, "reason": "why"}
    assert described({"test": [one], "train": [{**one, "id": "c"}]}) == (
        "test sample 3: why; train sample 3 (id 'c'): why"
    )
    assert described({"train": [one] * 12}).endswith("; and 2 more")
