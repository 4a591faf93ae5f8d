"""Reductions: equal to the same reduction of the full tensor, whoever computes it, in whatever pieces."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GroupSum,
    NystroemSketchInfluence,
    SelfInfluence,
    TopK,
    open_influences,
    verify,
)
from dask_influence.core import directional, double
from dask_influence.errors import (
    ConfigurationError,
    CorruptStoreError,
    DataError,
    InfluenceWarning,
    MemoryLimitError,
    NotFittedError,
    StoreMismatchError,
)
from dask_influence.execution import plan, reduce_tasks, tasks
from dask_influence.execution.pieces import score_names
from dask_influence.execution.work import Kept, Work
from dask_influence.reductions import largest
from tests import data, oracles

N, M = 13, 37
SMALL = 8 * 3 * 4
"""Bytes of a tile: 13 × 37 scores make many ragged ones."""

VALUES = [0.2, 0.03, 1.0]
CLASSES = np.array(["oak", "elm", "ash", "fir", "elm"])[np.arange(M) * 3 % 5]
KINDS = {
    "direct": (DirectInfluence, {}),
    "blocks": (DirectInfluence, {"block_structure": "layer"}),
    "arnoldi": (ArnoldiInfluence, {"rank": 7, "tol": 1e-10}),
    "arnoldi_blocks": (ArnoldiInfluence, {"rank": 4, "tol": 1e-10, "block_structure": "layer"}),
    "complement": (ArnoldiInfluence, {"rank": 7, "tol": 1e-10, "complement": True}),
    "cg": (CgInfluence, {"rtol": 1e-11}),
    "nystroem": (NystroemSketchInfluence, {"rank": 9}),
    "ekfac": (EkfacInfluence, {}),
}


@pytest.fixture
def query_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Few directions and little work at a time: five query blocks, and a strip for each column of tiles."""
    monkeypatch.setattr(plan, "DIRECTION_BYTES", 5 * 8 * 51)
    monkeypatch.setattr(plan, "STRIP_SECONDS", 1e-9)
    return 5


@cache
def fitted(kind: str = "direct", **how: Any) -> Any:
    case, (model, own) = data.mlp_classification(), KINDS[kind]
    return model(case.model, case.loss, 0.05, curvature="ggn", **own, **how).fit(case.train)


def reduced(model: Any, store: Path, reduce: Any, **how: Any) -> xr.Dataset:
    case = data.mlp_classification()
    return model.influences_to_zarr(store, case.test, case.train, reduce=reduce, **how)


def full(model: Any, mode: str = "up") -> np.ndarray[Any, Any]:
    case = data.mlp_classification()
    return np.asarray(model.influences(*case.test, *case.train, mode=mode))


def top(scores: np.ndarray[Any, Any], k: int) -> dict[str, np.ndarray[Any, Any]]:
    """Scores and positions of each row, the plain way."""
    found = {}
    for side, sign in (("helpful", -1), ("harmful", 1)):
        order = np.argsort(sign * scores, axis=-1, kind="stable")[..., :k]
        found[side] = order
        found[f"{side}_score"] = np.take_along_axis(scores, order, axis=-1)
    return found


def check_top(dataset: xr.Dataset, scores: np.ndarray[Any, Any], k: int, listed: str = "train") -> None:
    expected = top(scores, k)
    for side in ("helpful", "harmful"):
        np.testing.assert_array_equal(dataset[f"{side}_{listed}"], expected[side])
        np.testing.assert_allclose(dataset[f"{side}_score"], expected[f"{side}_score"], rtol=1e-10)


def strips(store: Path) -> int:
    return len(list((store / "_run" / "ledger").glob("strip-*.json")))


def contents(store: Path) -> dict[str, bytes]:
    """Every stored object of the arrays."""
    return {
        str(p.relative_to(store)): p.read_bytes()
        for p in store.rglob("*")
        if p.is_file() and "_run" not in p.relative_to(store).parts and p.name != "zarr.json"
    }


# -- TopK -----------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 4, M])
@pytest.mark.parametrize("kind", ["direct", "arnoldi"])
def test_top_of_each_test_point(tmp_path: Path, query_blocks: int, kind: str, k: int) -> None:
    model = fitted(kind)
    dataset = reduced(model, tmp_path / "run", TopK(k), tile_bytes=SMALL)
    assert dataset.helpful_score.dims == dataset.harmful_train.dims == ("test", "rank")
    assert dataset.helpful_score.shape == (N, k)
    check_top(dataset, full(model), k)
    if kind == "direct":
        assert strips(tmp_path / "run") >= query_blocks * 10
        assert float(dataset.factor_residual.max()) < 1e-8
    assert "influence" not in dataset
    assert not (tmp_path / "run" / "influence").exists()
    assert not (tmp_path / "run" / "_run" / "partials").exists()


@pytest.mark.parametrize("k", [1, 5, N])
def test_top_of_each_training_point(tmp_path: Path, query_blocks: int, k: int) -> None:
    model = fitted()
    dataset = reduced(model, tmp_path / "run", TopK(k, per="train"), tile_bytes=SMALL)
    assert dataset.helpful_test.dims == ("train", "rank")
    check_top(dataset, full(model).T, k, "test")


def test_values_against_the_dense_inverse(tmp_path: Path) -> None:
    case = data.mlp_regression()
    model = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    dataset = model.influences_to_zarr(
        tmp_path / "run", case.test, case.train, reduce=TopK(3), tile_bytes=1_500
    )
    expected = top(case.up(case.inverse).numpy(), 3)
    np.testing.assert_allclose(dataset.helpful_score, expected["helpful_score"], rtol=1e-8)
    np.testing.assert_array_equal(dataset.harmful_train, expected["harmful"])


def test_equal_scores_are_listed_by_position(tmp_path: Path, query_blocks: int) -> None:
    """Training points that occur again and again: what is listed depends on no order of merging."""
    case = data.mlp_classification()
    train = oracles.pick(case.train, torch.arange(90) % 4)
    model = fitted()
    dataset = model.influences_to_zarr(tmp_path / "run", case.test, train, reduce=TopK(30), tile_bytes=SMALL)
    scores = np.asarray(model.influences(*case.test, *oracles.pick(case.train, slice(0, 4))))
    check_top(dataset, np.tile(scores, 23)[:, :90], 30)


def test_scores_of_one_sign_fill_both_lists(tmp_path: Path) -> None:
    """With fewer positive scores than k, the list goes on with the others."""
    model = fitted()
    dataset = reduced(model, tmp_path / "run", TopK(M))
    np.testing.assert_array_equal(dataset.helpful_score, np.asarray(dataset.harmful_score)[:, ::-1])
    assert float(dataset.helpful_score.min()) < 0 < float(dataset.harmful_score.max())


@pytest.mark.parametrize("ids", ["strings", "objects", "integers", "floats"])
def test_lists_hold_ids(tmp_path: Path, ids: str) -> None:
    given = {
        "strings": np.array([f"image {j}" for j in range(M)]),
        "objects": np.array([f"image {j}" for j in range(M)], dtype=object),
        "integers": np.arange(M) * 7 + 100,
        "floats": np.arange(M) / 4,
    }[ids]
    model = fitted()
    dataset = reduced(
        model,
        tmp_path / "run",
        TopK(3),
        train_ids=given,
        test_ids=[f"q{i}" for i in range(N)],
        tile_bytes=SMALL,
    )
    expected = top(full(model), 3)
    for found in (dataset, open_influences(tmp_path / "run"), xr.open_zarr(tmp_path / "run", chunks={})):
        assert found.helpful_train.sel(test="q3").values.tolist() == given[expected["helpful"][3]].tolist()
        assert found.harmful_train.values.tolist() == given[expected["harmful"]].tolist()


def test_one_test_point_and_one_training_point(tmp_path: Path) -> None:
    case, model = data.mlp_classification(), fitted()
    test, train = (oracles.pick(side, slice(0, 1)) for side in (case.test, case.train))
    one = full(model)[:1]
    lists = model.influences_to_zarr(tmp_path / "a", test, case.train, reduce=TopK(2), tile_bytes=SMALL)
    check_top(lists, one, 2)
    single = model.influences_to_zarr(tmp_path / "b", test, train, reduce=TopK(1))
    assert single.helpful_score.values.tolist() == single.harmful_score.values.tolist()
    assert float(single.helpful_score[0, 0]) == pytest.approx(one[0, 0], rel=1e-10)


def test_scores_keep_their_dtype(tmp_path: Path) -> None:
    dataset = reduced(fitted(dtype=torch.float32), tmp_path / "a", TopK(2))
    assert dataset.helpful_score.dtype == np.float32
    sums = reduced(fitted(dtype=torch.float32), tmp_path / "b", GroupSum(CLASSES))
    assert sums.group_influence.dtype == np.float64


ROWS = st.integers(1, 60).flatmap(
    lambda width: st.lists(
        st.lists(st.sampled_from([-2.0, -1.0, 0.0, -0.0, 1.0, 3.5]), min_size=width, max_size=width),
        min_size=1,
        max_size=4,
    )
)


@given(ROWS, st.integers(1, 7))
def test_largest_is_a_stable_sort(rows: list[list[float]], k: int) -> None:
    scores = np.array(rows)
    best, at = largest(scores, k)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(at, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


@pytest.mark.parametrize("order", ["random", "rising", "falling", "level", "one rises"])
def test_largest_of_long_rows(order: str) -> None:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((7, 5_003)).astype(np.float32).round(2)
    if order in ("rising", "falling"):
        scores = np.sort(scores, axis=1)[:, :: 1 if order == "rising" else -1]
    elif order == "level":
        scores[:] = 0
    elif order == "one rises":
        scores[3] = np.sort(scores[3])
    best, at = largest(scores, 9)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :9]
    np.testing.assert_array_equal(at, expected)
    np.testing.assert_array_equal(best, np.take_along_axis(scores, expected, axis=1))


# -- GroupSum -------------------------------------------------------------------------------
def sums_of(scores: np.ndarray[Any, Any], labels: Any, axis: int) -> np.ndarray[Any, Any]:
    """Sums over the groups of sorted labels along an axis."""
    labels = np.asarray(labels)
    parts = [np.compress(labels == one, scores, axis).sum(axis) for one in np.unique(labels)]
    return np.stack(parts, axis)


@pytest.mark.parametrize("kind", ["direct", "arnoldi"])
@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("groups", ["train", "test", "both"])
def test_group_sums(tmp_path: Path, query_blocks: int, groups: str, mode: str, kind: str) -> None:
    model, of_tests = fitted(kind), np.arange(N) * 5 % 4 - 1
    scores = full(model, mode)
    reduce = {
        "train": GroupSum(list(CLASSES)),
        "test": GroupSum(test_labels=of_tests),
        "both": GroupSum(CLASSES, test_labels=of_tests),
    }[groups]
    dataset = reduced(model, tmp_path / "run", reduce, mode=mode, tile_bytes=SMALL)
    expected, dims = scores, ["test", "train"]
    if groups != "test":
        expected, dims[1] = sums_of(expected, CLASSES, 1), "group"
        assert dataset.group.values.tolist() == ["ash", "elm", "fir", "oak"]
    if groups != "train":
        expected, dims[0] = sums_of(expected, of_tests, 0), "test_group"
        assert dataset.test_group.values.tolist() == [-1, 0, 1, 2]
    features = ["feature_0"] if mode == "perturbation" else []
    assert dataset.group_influence.dims == (*dims, *features)
    np.testing.assert_allclose(dataset.group_influence, expected, rtol=1e-9, atol=1e-12)
    assert "influence" not in dataset


def test_groups_are_selected_by_label(tmp_path: Path) -> None:
    model = fitted()
    dataset = reduced(model, tmp_path / "run", GroupSum(CLASSES))
    expected = full(model)[:, CLASSES == "elm"].sum(1)
    np.testing.assert_allclose(dataset.group_influence.sel(group="elm"), expected, rtol=1e-10)


def test_labels_are_those_that_were_given(tmp_path: Path) -> None:
    """A copy: the caller may go on with the array."""
    model, labels = fitted(), np.arange(M) % 3
    groups = GroupSum(labels)
    labels[:] = 0
    dataset = reduced(model, tmp_path / "run", groups)
    expected = reduced(model, tmp_path / "other", GroupSum(np.arange(M) % 3))
    np.testing.assert_array_equal(dataset.group_influence, expected.group_influence)
    assert dataset.sizes["group"] == 3


def test_a_group_for_each_point_keeps_every_score(tmp_path: Path) -> None:
    model = fitted()
    dataset = reduced(model, tmp_path / "run", GroupSum(np.arange(M)), tile_bytes=SMALL)
    np.testing.assert_allclose(dataset.group_influence, full(model), rtol=1e-10)


# -- SelfInfluence ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_self_influence_is_the_diagonal(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "DIRECTION_BYTES", 5 * 51 * 72)  # factors of five points at a time
    case, model = data.mlp_classification(), fitted(kind)
    dataset = model.influences_to_zarr(tmp_path / "run", None, case.train, reduce=SelfInfluence())
    expected = np.diag(np.asarray(model.influences(*case.train)))
    assert dataset.self_influence.dims == ("train",)
    np.testing.assert_allclose(dataset.self_influence, expected, rtol=1e-8)
    assert strips(tmp_path / "run") == 8
    assert "test" not in dataset.dims
    assert sorted(dataset.variables) == ["self_influence", "train"]
    assert not (tmp_path / "run" / "_run" / "partials").exists()


@pytest.mark.parametrize("kind", ["direct", "arnoldi", "cg"])
def test_self_influence_at_several_values(tmp_path: Path, kind: str) -> None:
    case, model = data.mlp_classification(), fitted(kind)
    dataset = model.influences_to_zarr(
        tmp_path / "run", None, case.train, reduce=SelfInfluence(), hessian_regularization=VALUES
    )
    assert dataset.self_influence.dims == ("regularization", "train")
    for value in VALUES:
        alone = np.diag(np.asarray(model.with_regularization(value).influences(*case.train)))
        np.testing.assert_allclose(dataset.self_influence.sel(regularization=value), alone, rtol=1e-8)


def test_self_influence_takes_the_training_data_as_test_data(tmp_path: Path) -> None:
    case, model = data.mlp_classification(), fitted()
    first = model.influences_to_zarr(tmp_path / "a", case.train, case.train, reduce=SelfInfluence())
    again = model.influences_to_zarr(tmp_path / "a", None, case.train, reduce=SelfInfluence())
    xr.testing.assert_identical(first.load(), again.load())
    for test in (case.test, (case.train[0], case.train[1].flip(0))):
        with pytest.raises(ConfigurationError, match=r"test holds other data; give test=None"):
            model.influences_to_zarr(tmp_path / "b", test, case.train, reduce=SelfInfluence())
    assert not (tmp_path / "b").exists()


# -- several λ --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reduce", [TopK(4), TopK(3, per="train"), GroupSum(CLASSES), GroupSum(CLASSES, test_labels=range(N))]
)
@pytest.mark.parametrize("kind", ["direct", "arnoldi"])
def test_several_values_equal_a_run_at_each(
    tmp_path: Path, query_blocks: int, kind: str, reduce: Any
) -> None:
    model = fitted(kind)
    dataset = reduced(model, tmp_path / "run", reduce, hessian_regularization=VALUES, tile_bytes=SMALL).load()
    assert dataset.regularization.values.tolist() == VALUES
    for at, value in enumerate(VALUES):
        alone = reduced(model.with_regularization(value), tmp_path / str(at), reduce)
        for name, array in alone.data_vars.items():
            assert dataset[name].dims == ("regularization", *array.dims)
            np.testing.assert_allclose(dataset[name][at], array, rtol=1e-9, atol=1e-12)


# -- on a cluster -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reduce",
    [
        TopK(4),
        TopK(3, per="train"),
        GroupSum(CLASSES),
        GroupSum(CLASSES, test_labels=range(N)),
        SelfInfluence(),
    ],
    ids=repr,
)
def test_a_cluster_writes_the_same_bits(
    tmp_path: Path, query_blocks: int, client: Client, reduce: Any
) -> None:
    case = data.mlp_classification()
    test = None if isinstance(reduce, SelfInfluence) else case.test
    ids = {"train_ids": [f"image {j}" for j in range(M)], "tile_bytes": SMALL}
    stores = tmp_path / "local", tmp_path / "shared"
    for store, model in zip(stores, (fitted(), fitted(client=client)), strict=True):
        model.influences_to_zarr(store, test, case.train, reduce=reduce, **ids)
    assert contents(stores[0]) == contents(stores[1])
    assert strips(stores[1]) == strips(stores[0]) > 1
    assert not (stores[1] / "_run" / "partials").exists()


def test_a_killed_worker_costs_no_bit(tmp_path: Path, query_blocks: int, client: Client) -> None:
    """Killed while strips run and merges begin; its tasks run again, some of them for the second time."""
    killed: list[int] = []

    def kill(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done >= total // 2 and not killed:
            workers = client.run(os.getpid)
            killed.append(min(workers.values()))
            os.kill(killed[0], signal.SIGKILL)

    reduce = GroupSum(CLASSES, test_labels=range(N))
    reduced(fitted(), tmp_path / "local", reduce, tile_bytes=SMALL)
    reduced(fitted(client=client), tmp_path / "shared", reduce, tile_bytes=SMALL, progress=kill)
    assert len(killed) == 1
    assert contents(tmp_path / "local") == contents(tmp_path / "shared")
    assert not (tmp_path / "shared" / "_run" / "partials").exists()


@pytest.mark.parametrize("kind", ["cg", "arnoldi"])
def test_other_solvers_on_a_cluster(tmp_path: Path, client: Client, kind: str) -> None:
    case = data.mlp_classification()
    local, shared = fitted(kind), fitted(kind, client=client)
    for reduce, test in ((TopK(4), case.test), (SelfInfluence(), None)):
        found = [
            model.influences_to_zarr(tmp_path / f"{side}-{reduce!r}", test, case.train, reduce=reduce).load()
            for side, model in (("local", local), ("shared", shared))
        ]
        for name in found[0].data_vars:
            np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-12)


# -- cost ---------------------------------------------------------------------------------------
@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Training samples differentiated, test gradients formed, strips scored."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str, size: Callable[..., int]) -> None:
        function = getattr(module, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            counted[name] += size(*arguments)
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, wrapped)

    count(directional, "directional_derivatives", lambda problem, x, *_: len(x))
    for module in (directional, double):
        count(module, "gradients", lambda problem, x, *_: len(x))
    count(reduce_tasks, "_scored", lambda *_: 1)
    return counted


def test_each_training_sample_once_for_each_query_block(
    tmp_path: Path, query_blocks: int, calls: Counter[str]
) -> None:
    model = fitted()
    calls.clear()
    reduced(model, tmp_path / "run", TopK(3), tile_bytes=SMALL)
    assert calls["directional_derivatives"] == query_blocks * M
    assert calls["gradients"] == N
    calls.clear()
    reduced(model, tmp_path / "lists", TopK(3, per="train"), tile_bytes=SMALL)
    assert (calls["directional_derivatives"], calls["gradients"]) == (query_blocks * M, N)


@pytest.mark.parametrize("kind", ["direct", "arnoldi", "cg"])
def test_self_influence_forms_each_gradient_once(tmp_path: Path, calls: Counter[str], kind: str) -> None:
    case, model = data.mlp_classification(), fitted(kind)
    calls.clear()
    model.influences_to_zarr(tmp_path / "run", None, case.train, reduce=SelfInfluence())
    assert calls["gradients"] == M
    assert calls["directional_derivatives"] == 0


# -- resume ---------------------------------------------------------------------------------------
class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


def killed_after(monkeypatch: pytest.MonkeyPatch, done: int, *, between: bool = False) -> None:
    """Die when that many nodes are in the ledger, or just before the next one's entry."""
    emit, left = reduce_tasks.Reducing.emit, [done]

    def dying(self: Any, node: Any, part: Any, entry: Any) -> Any:
        if not left[0]:
            if between:
                self._keep(node, part)
            raise Killed
        left[0] -= 1
        return emit(self, node, part, entry)

    monkeypatch.setattr(reduce_tasks.Reducing, "emit", dying)


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("reduce", [TopK(3), TopK(3, per="train"), GroupSum(CLASSES, test_labels=range(N))])
def test_a_killed_run_goes_on(
    tmp_path: Path,
    query_blocks: int,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    reduce: Any,
    between: bool,
) -> None:
    model = fitted()
    reduced(model, tmp_path / "whole", reduce, tile_bytes=SMALL)
    total, expected = calls["_scored"], contents(tmp_path / "whole")
    assert total == strips(tmp_path / "whole") > 17
    with monkeypatch.context() as patched:
        killed_after(patched, 19, between=between)
        with pytest.raises(Killed):
            reduced(model, tmp_path / "run", reduce, tile_bytes=SMALL)
    with pytest.warns(InfluenceWarning, match="not complete"):
        open_influences(tmp_path / "run")
    done = strips(tmp_path / "run")
    calls.clear()
    reduced(model, tmp_path / "run", reduce, tile_bytes=SMALL)
    assert calls["_scored"] == total - done < total  # parts and results that were written stay
    assert calls["gradients"] == 0  # factors are there
    assert contents(tmp_path / "run") == expected
    assert not (tmp_path / "run" / "_run" / "partials").exists()


def unfinished(store: Path) -> dict[str, Any]:
    """Put a complete store back to running."""
    record = json.loads((store / "_run" / "run.json").read_text())
    (store / "_run" / "run.json").write_text(json.dumps({**record, "state": "running"}))
    return record


def test_a_missing_part_is_made_again(
    tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, store = fitted(), tmp_path / "run"
    expected = reduced(model, tmp_path / "whole", TopK(3), tile_bytes=SMALL).load()
    with monkeypatch.context() as patched:
        killed_after(patched, 5)
        with pytest.raises(Killed):
            reduced(model, store, TopK(3), tile_bytes=SMALL)
    parts = sorted((store / "_run" / "partials").iterdir())
    assert len(parts) == 5
    parts[1].unlink()
    parts[3].write_bytes(parts[3].read_bytes()[:-1])
    calls.clear()
    again = reduced(model, store, TopK(3), tile_bytes=SMALL)
    assert calls["_scored"] == strips(store) - 3
    xr.testing.assert_equal(again.load(), expected)


def test_a_damaged_part_is_named_and_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = fitted(), tmp_path / "run"
    expected = reduced(model, tmp_path / "whole", TopK(3), tile_bytes=SMALL).load()
    with monkeypatch.context() as patched:
        killed_after(patched, 5)
        with pytest.raises(Killed):
            reduced(model, store, TopK(3), tile_bytes=SMALL)
    part = sorted((store / "_run" / "partials").iterdir())[2]
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(CorruptStoreError, match=f"{part.name}.*run the same call again"):
        reduced(model, store, TopK(3), tile_bytes=SMALL)
    xr.testing.assert_equal(reduced(model, store, TopK(3), tile_bytes=SMALL).load(), expected)


def test_a_missing_result_is_made_again(tmp_path: Path, query_blocks: int, calls: Counter[str]) -> None:
    """Only the strips of its query block are scored again: their parts are gone."""
    model, store = fitted(), tmp_path / "run"
    expected = reduced(model, store, TopK(3), tile_bytes=SMALL).load()
    total = calls["_scored"]
    (store / "helpful_train" / "c" / "1" / "0").unlink()
    calls.clear()
    xr.testing.assert_equal(reduced(model, store, TopK(3), tile_bytes=SMALL).load(), expected)
    assert calls["_scored"] == total // query_blocks
    calls.clear()
    reduced(model, store, TopK(3), tile_bytes=SMALL)
    assert not calls["_scored"]


@pytest.mark.parametrize("reduce", [TopK(3), GroupSum(CLASSES), SelfInfluence()], ids=repr)
def test_damage_is_found_and_mended(
    tmp_path: Path, query_blocks: int, calls: Counter[str], reduce: Any
) -> None:
    case, model, store = data.mlp_classification(), fitted(), tmp_path / "run"
    call = (store, None if isinstance(reduce, SelfInfluence) else case.test, case.train)
    expected = model.influences_to_zarr(*call, reduce=reduce, tile_bytes=SMALL).load()
    assert verify(store).ok
    assert verify(store).unfinished == 0
    name = next(iter(expected.data_vars))
    shard = sorted(p for p in (store / name / "c").rglob("*") if p.is_file())[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    found = verify(store)
    assert [one.key for one in found.damaged] == [str(shard.relative_to(store))]
    total = calls["_scored"]
    calls.clear()
    mended = model.influences_to_zarr(*call, reduce=reduce, tile_bytes=SMALL, repair=True)
    xr.testing.assert_equal(mended.load(), expected)
    assert 0 < calls["_scored"] < total
    assert verify(store).ok


@pytest.mark.parametrize("name", ["strip-000001", "merge-000000-1-000000", "factors-000000"])
@pytest.mark.parametrize("reduce", [TopK(3), GroupSum(CLASSES)], ids=repr)
def test_lost_entries_are_found_and_mended(
    tmp_path: Path,
    query_blocks: int,
    calls: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    reduce: Any,
    name: str,
) -> None:
    """Of nodes below those that hold the result, and of factors that nobody needs any more."""
    monkeypatch.setattr("dask_influence.execution.tree.FAN_IN", 4)
    model, store = fitted(), tmp_path / "run"
    expected = reduced(model, store, reduce, tile_bytes=SMALL // 4).load()
    entry = store / "_run" / "ledger" / f"{name}.json"
    held = plan.Plan.from_json(json.loads((store / "_run/run.json").read_text())["plan"])
    assert name in score_names(held, solves=True)
    entry.unlink()
    before = contents(store)
    found = verify(store)
    assert [(one.key, one.piece, one.wrong) for one in found.damaged] == [
        (f"_run/ledger/{name}.json", name, "is missing")
    ]
    calls.clear()
    mended = reduced(model, store, reduce, tile_bytes=SMALL // 4, repair=True)
    xr.testing.assert_equal(mended.load(), expected)
    assert contents(store) == before
    assert calls["_scored"] == name.startswith("strip")
    assert verify(store).ok
    assert entry.exists()
    assert not (store / "_run" / "partials").exists() or not list((store / "_run" / "partials").iterdir())


def test_a_merge_may_run_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that lost its answer runs it again, and the parts are gone by then."""
    node_task, again = reduce_tasks.reduce_node, []

    def twice(*call: Any) -> Any:
        first = node_task(*call)
        assert node_task(*call) == first
        again.append(call[2])
        return first

    model = fitted()
    expected = reduced(model, tmp_path / "once", TopK(3), tile_bytes=SMALL).load()
    monkeypatch.setattr("dask_influence.execution.reduce.reduce_node", twice)
    dataset = reduced(model, tmp_path / "run", TopK(3), tile_bytes=SMALL)
    assert any(node.level for node in again)
    xr.testing.assert_equal(dataset.load(), expected)


def test_another_reduction_is_another_run(tmp_path: Path) -> None:
    model, store = fitted(), tmp_path / "run"
    first = reduced(model, store, TopK(3)).load()
    for other, named in (
        (TopK(4), r"reduce.k: stored 3, asked 4"),
        (TopK(3, per="train"), r"reduce.per: stored 'test', asked 'train'"),
        (GroupSum(CLASSES), r"reduce.kind: stored 'TopK', asked 'GroupSum'"),
        (None, r"reduce: stored \{.*\}, asked nothing"),
    ):
        with pytest.raises(StoreMismatchError, match=named):
            reduced(model, store, other)
    xr.testing.assert_equal(reduced(model, store, TopK(3)).load(), first)
    reduced(model, tmp_path / "sums", GroupSum(CLASSES))
    with pytest.raises(StoreMismatchError, match=r"reduce.train_labels"):
        reduced(model, tmp_path / "sums", GroupSum(CLASSES[::-1]))
    reduced(model, tmp_path / "sums", GroupSum([str(label) for label in CLASSES]))


def test_overwriting_leaves_nothing_behind(tmp_path: Path) -> None:
    model, store = fitted(), tmp_path / "run"
    reduced(model, store, GroupSum(CLASSES))
    reduced(model, store, TopK(3), overwrite=True)
    (store / "notes.txt").write_text("mine")
    assert not (store / "group").exists()
    reduced(model, store, None, overwrite=True)
    names = {p.name for p in store.iterdir()}
    assert names == {
        "_run", "factor_residual", "influence", "notes.txt", "test", "train", "zarr.json"
    }  # fmt: skip


# -- plans ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reduce", "shown"),
    [
        (TopK(3), "TopK(3), 1.2 KiB"),
        (TopK(3, per="train"), 'TopK(3, per="train"), 3.5 KiB'),
        (GroupSum(CLASSES), "GroupSum(4 groups), 416 B"),
        (SelfInfluence(), "SelfInfluence(), 296 B"),
    ],
    ids=repr,
)
def test_a_plan_says_what_is_kept(tmp_path: Path, reduce: Any, shown: str) -> None:
    case, model = data.mlp_classification(), fitted()
    test = None if isinstance(reduce, SelfInfluence) else case.test
    planned = model.plan(test, case.train, reduce=reduce)
    assert shown in str(planned)
    dataset = model.influences_to_zarr(tmp_path / "run", test, case.train, reduce=reduce)
    assert planned.output_bytes == sum(array.nbytes for array in dataset.data_vars.values())
    record = json.loads((tmp_path / "run" / "_run" / "run.json").read_text())
    stored = plan.Plan.from_json(record["plan"])
    assert json.loads(json.dumps(stored.to_json())) == record["plan"]
    assert stored.work == planned.work
    several = model.plan(test, case.train, reduce=reduce, hessian_regularization=VALUES)
    assert several.output_bytes == 3 * planned.output_bytes


def test_bytes_of_a_task_do_not_grow_with_the_data() -> None:
    """N·k is kept and a tile is bounded, however many training points there are."""

    def peak(trains: int) -> int:
        kept = Kept("TopK(10)", "test", 1000 * 10 * 2 * 12, False)
        work = Work(1000, trains, (), 2410, None, 4, 42, 264, kept=kept)
        return plan.arrange(work).scoring_bytes

    assert peak(16 * 10**6) <= peak(10**6)
    lists = Kept("TopK(1000)", "test", 10**6 * 1000 * 2 * 12, False)
    work = Work(10**6, 10**6, (), 2410, 50, 4, 42, 264, kept=lists)
    assert plan.arrange(work, memory_limit=2**30).scoring_bytes < 2**30


def test_lists_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Both sides of the limit that the plan itself gives."""
    case, model = data.mlp_classification(), fitted()
    least = model.plan(case.test, case.train, reduce=TopK(3), memory_limit=2**20).scoring_bytes
    with pytest.raises(MemoryLimitError, match=r"memory_limit"):
        reduced(model, tmp_path / "run", TopK(3), memory_limit=least // 2)
    assert not (tmp_path / "run").exists()
    reduced(model, tmp_path / "run", TopK(3), memory_limit=least + 2**20)


# -- factors from a store -----------------------------------------------------------------------------
def test_factors_of_an_earlier_run(tmp_path: Path) -> None:
    case, model = data.mlp_classification(), fitted()
    ids = [f"q{i}" for i in range(N)]
    model.influence_factors_to_zarr(tmp_path / "factors", case.test, test_ids=ids)
    dataset = model.influences_to_zarr(tmp_path / "run", tmp_path / "factors", case.train, reduce=TopK(3))
    check_top(dataset, full(model), 3)
    assert dataset.test.values.tolist() == ids
    lists = model.influences_to_zarr(
        tmp_path / "lists", tmp_path / "factors", case.train, reduce=TopK(2, per="train")
    )
    assert lists.helpful_test.values.tolist() == np.array(ids)[top(full(model).T, 2)["helpful"]].tolist()


# -- refusals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [0, -1, 2.0, "3", None, True])
def test_k_that_is_no_count(k: Any) -> None:
    with pytest.raises(ConfigurationError, match="k must be an integer ≥ 1"):
        TopK(k)


@pytest.mark.parametrize(
    ("reduce", "error", "named"),
    [
        (TopK(M + 1), ConfigurationError, r"TopK\(38\) asks for 38 training points, and there are 37"),
        (TopK(14, per="train"), ConfigurationError, r"asks for 14 test points, and there are 13"),
        (GroupSum(CLASSES[1:]), DataError, r"labels must hold one label for each training point, 37; got 36"),
        (GroupSum(CLASSES, test_labels=range(12)), DataError, r"test_labels.*13; got 12"),
        (TopK, ConfigurationError, r"reduce must be None .* TopK\(k\)"),
        ("topk", ConfigurationError, r"got 'topk'"),
        (10, ConfigurationError, r"got 10"),
    ],
)
def test_reductions_that_do_not_fit(tmp_path: Path, reduce: Any, error: type[Exception], named: str) -> None:
    case, model = data.mlp_classification(), fitted()
    with pytest.raises(error, match=named):
        reduced(model, tmp_path / "run", reduce)
    with pytest.raises(error, match=named):
        model.plan(case.test, case.train, reduce=reduce)
    assert not (tmp_path / "run").exists()


def test_modes_that_have_no_order(tmp_path: Path) -> None:
    case, model = data.mlp_classification(), fitted()
    with pytest.raises(ConfigurationError, match=r"TopK\(3\) orders scores.*shape \(4,\).*mode='up'"):
        reduced(model, tmp_path / "run", TopK(3), mode="perturbation")
    with pytest.raises(ConfigurationError, match="defined for mode='up'"):
        model.influences_to_zarr(
            tmp_path / "run", None, case.train, reduce=SelfInfluence(), mode="perturbation"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (np.ones((M, 1)), r"labels must have one axis; got shape \(37, 1\)"),
        ([None] * M, "labels holds NoneType"),
        ([1, "a"] * 5, "labels holds int, str"),
        (np.full(M, np.nan), "labels holds NaN"),
        (np.arange(M) * 1j, "labels has dtype complex128"),
        (["a", "a\0"] * 5, r"labels holds 'a\\x00', of which numpy drops"),
        (np.array(["a", "a\0"] * 5, object), r"labels holds 'a\\x00', of which numpy drops"),
        (["a", "\ud800"] * 5, "labels holds text that no store can"),
    ],
)
def test_labels_of_other_kinds(labels: Any, named: str) -> None:
    with pytest.raises(DataError, match=named):
        GroupSum(labels)
    with pytest.raises(DataError, match=f"test_{named}"):
        GroupSum(test_labels=labels)


def test_arguments_that_mean_nothing(tmp_path: Path) -> None:
    case, model = data.mlp_classification(), fitted()
    with pytest.raises(ConfigurationError, match=r"labels.*test_labels.*or both"):
        GroupSum()
    with pytest.raises(ConfigurationError, match='per must be "test" or "train"; got \'both\''):
        TopK(3, per="both")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="test_ids"):
        model.influences_to_zarr(
            tmp_path / "run", None, case.train, reduce=SelfInfluence(), test_ids=range(N)
        )
    with pytest.raises(DataError, match="test"):
        model.influences_to_zarr(tmp_path / "run", None, case.train, reduce=TopK(3))
    with pytest.raises(NotFittedError):
        DirectInfluence(case.model, case.loss).influences_to_zarr(
            tmp_path / "run", None, case.train, reduce=SelfInfluence()
        )
    assert not (tmp_path / "run").exists()


def test_scores_that_are_nan_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tile_of = tasks.tile_of

    def spoilt(query: Any, derivatives: Any, rows: slice) -> Any:
        tile = tile_of(query, derivatives, rows).copy()
        tile[2, 5] = np.nan
        return tile

    model = fitted()
    monkeypatch.setattr(reduce_tasks, "tile_of", spoilt)
    with pytest.raises(DataError, match="test point 2 and training point 5 is NaN"):
        reduced(model, tmp_path / "run", TopK(3))
