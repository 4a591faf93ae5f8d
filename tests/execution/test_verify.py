"""verify: each kind of damage to each kind of object is named, and repair redoes that and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

from dask_influence import DirectInfluence, TopK, open_influences, verify
from dask_influence.errors import CorruptStoreError, InfluenceWarning, StoreError, StoreMismatchError
from dask_influence.execution import artifacts, tasks
from dask_influence.execution import verify as module
from dask_influence.storage.stores import Location
from tests import data

TILE = 1_500


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "remove": Path.unlink}
damages = pytest.mark.parametrize("hurt", DAMAGES.values(), ids=DAMAGES)


class Run:
    """A complete run in a folder of its own, and what it held when it was complete."""

    def __init__(self, store: Path, client: Client | None = None) -> None:
        case = data.mlp_regression()
        self.store, self.case = store, case
        self.model = DirectInfluence(case.model, case.loss, case.regularization, client=client)
        self.model.fit(case.train)
        self.scores = self.call().influence.values
        self.content, self.times = self.read()

    def call(self, **how: Any) -> Any:
        ids = {"train_ids": [f"image {j}" for j in range(43)]}
        return self.model.influences_to_zarr(
            self.store, self.case.test, self.case.train, tile_bytes=TILE, **ids, **how
        )

    def read(self) -> tuple[dict[str, bytes], dict[str, int]]:
        paths = {str(p.relative_to(self.store)): p for p in self.store.rglob("*") if p.is_file()}
        return {k: p.read_bytes() for k, p in paths.items()}, {
            k: p.stat().st_mtime_ns for k, p in paths.items()
        }

    def redone(self) -> set[str]:
        """Ledger entries written since the run was complete."""
        after = self.read()[1]
        entries = {key for key, time in after.items() if self.times.get(key) != time and "ledger" in key}
        return {Path(key).stem for key in entries}

    def arrays(self) -> dict[str, bytes]:
        return {key: content for key, content in self.read()[0].items() if not key.startswith("_run")}

    def owner(self, key: str) -> str:
        """The strip that wrote a shard."""
        for path in (self.store / "_run" / "ledger").glob("*.json"):
            if any(shard[0] == key for shard in json.loads(path.read_text()).get("shards", ())):
                return path.stem
        raise AssertionError(key)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_an_undamaged_run(run: Run) -> None:
    found = verify(run.store)
    assert found
    assert found.ok
    assert (found.damaged, found.unfinished, found.state) == ((), 0, "complete")
    assert found.objects == len(run.content)
    shards = sum(len(v) for k, v in run.content.items() if "/c/" in k)
    assert shards < found.nbytes <= sum(map(len, run.content.values()))
    assert "all as written" in str(found)
    assert run.read() == (run.content, run.times)


@damages
def test_a_damaged_shard_is_named_and_its_strip_alone_is_done_again(
    run: Run, hurt: Callable[[Path], None]
) -> None:
    key = sorted(k for k in run.content if k.startswith("influence/c"))[3]
    strip = run.owner(key)
    hurt(run.store / key)
    found = verify(run.store)
    assert not found
    assert [(one.key, one.piece) for one in found.damaged] == [(key, strip)]
    assert key in str(found)
    assert strip in str(found)
    assert "repair=True" in str(found)
    expected = {"flip": "crc32", "truncate": "bytes", "unlink": "missing"}[hurt.__name__]
    assert expected in found.damaged[0].wrong
    again = run.call(repair=True)
    assert run.redone() == {strip}
    np.testing.assert_array_equal(again.influence.values, run.scores)
    assert run.arrays() == {k: v for k, v in run.content.items() if not k.startswith("_run")}
    assert verify(run.store)


def test_several_damaged_strips_and_their_count(run: Run) -> None:
    strips = {"strip-000001", "strip-000003"}
    keys = [k for k in run.content if k.startswith("influence/c") and run.owner(k) in strips]
    assert 2 < len(keys) < len([k for k in run.content if k.startswith("influence/c")])
    for key, hurt in zip(keys, [flip, truncate, Path.unlink] * len(keys), strict=False):
        hurt(run.store / key)
    assert {one.key for one in verify(run.store).damaged} == set(keys)
    steps: list[tuple[str, int, int]] = []
    run.call(repair=True, progress=lambda *step: steps.append(step))
    assert run.redone() == strips
    assert next(done for stage, done, _ in steps if stage == "strips") == steps[-1][2] - len(strips)
    assert verify(run.store)


def test_repair_without_a_model_withdraws_and_the_same_call_redoes(run: Run) -> None:
    key = sorted(k for k in run.content if k.startswith("influence/c"))[0]
    strip = run.owner(key)
    flip(run.store / key)
    found = verify(run.store, repair=True)
    assert (found.state, found.repaired, found.pieces) == ("damaged", True, (strip,))
    assert "recomputes just these" in str(found)
    assert not (run.store / key).exists()
    with pytest.warns(InfluenceWarning, match="damaged"):
        assert open_influences(run.store).influence.isnull().any()
    assert "state" not in json.loads((run.store / "zarr.json").read_text())["attributes"]
    again = verify(run.store)
    assert again.ok
    assert again.unfinished == 1
    np.testing.assert_array_equal(run.call().influence.values, run.scores)
    assert run.redone() == {strip}
    assert verify(run.store).state == "complete"


@pytest.mark.parametrize("key", ["zarr.json", "influence/zarr.json", "train/zarr.json"])
@damages
def test_metadata_are_rebuilt_without_a_model(run: Run, key: str, hurt: Callable[[Path], None]) -> None:
    hurt(run.store / key)
    found = verify(run.store)
    assert [(one.key, one.piece) for one in found.damaged] == [(key, "metadata")]
    repaired = verify(run.store, repair=True)
    assert (repaired.state, repaired.repaired) == ("complete", True)
    assert run.read()[0] == run.content
    assert run.redone() == set()
    np.testing.assert_array_equal(open_influences(run.store).influence, run.scores)


@pytest.mark.parametrize("key", ["test/c/0", "train/c/0", "factor_residual/c/0"])
@damages
def test_coordinates_and_residuals_are_written_again(
    run: Run, key: str, hurt: Callable[[Path], None]
) -> None:
    hurt(run.store / key)
    (one,) = verify(run.store).damaged
    assert (one.key, one.piece) == (key, "residual" if "residual" in key else "coordinates")
    assert verify(run.store, repair=True).state == "damaged"
    run.call()
    assert run.redone() == ({"residual"} if "residual" in key else set())
    assert run.arrays() == {k: v for k, v in run.content.items() if not k.startswith("_run")}
    assert verify(run.store)


@damages
def test_artifacts_are_compared_with_the_checksum_they_carry(run: Run, hurt: Callable[[Path], None]) -> None:
    entry = json.loads((run.store / "_run" / "ledger" / "factors-000000.json").read_text())
    key = f"_run/artifacts/{entry['digest']}.safetensors"
    hurt(run.store / key)
    assert [(one.key, one.piece) for one in verify(run.store).damaged] == [(key, "artifacts")]
    found = verify(run.store, repair=True)
    assert found.state == "complete"  # no score was damaged
    assert verify(run.store)
    shard = sorted(k for k in run.content if k.startswith("influence/c"))[0]
    strip = run.owner(shard)
    flip(run.store / shard)
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)
    assert run.redone() == {strip, "factors-000000", "residual"}
    assert verify(run.store)


def test_a_damaged_artifact_is_never_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight, a factor: whoever loads it compares it, and says its name."""
    entry = json.loads((run.store / "_run" / "ledger" / "factors-000000.json").read_text())
    path = run.store / "_run" / "artifacts" / f"{entry['digest']}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    for key in (k for k in run.content if k.startswith("influence/c")):
        (run.store / key).unlink()
    artifacts._CACHE._held.clear()  # as a process that begins now
    monkeypatch.setattr(tasks, "_QUERIES", tasks._Latest())
    with pytest.raises(CorruptStoreError, match=rf"{path.name}.*checksum"):
        run.call()
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)


@pytest.mark.parametrize("name", ["strip-000001", "factors-000000"])
@damages
def test_ledger_entries(run: Run, name: str, hurt: Callable[[Path], None]) -> None:
    key = f"_run/ledger/{name}.json"
    hurt(run.store / key)
    found = verify(run.store)
    assert key in {one.key for one in found.damaged}
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)
    assert run.redone() <= {name, "residual"}
    assert verify(run.store)


def copied(store: Path, name: str, over: str) -> str:
    """Key of the entry that is another one's now."""
    ledger = store / "_run" / "ledger"
    (ledger / f"{over}.json").write_bytes((ledger / f"{name}.json").read_bytes())
    return f"_run/ledger/{over}.json"


@pytest.mark.parametrize(
    ("name", "over", "wrong"),
    [
        ("strip-000001", "strip-000002", "columns"),
        ("strip-000001", "strip-000009", "no piece of its run"),
        ("strip-000001", "note", "no piece of its run"),
        ("strip-000001", "residual", "another piece"),
        ("strip-000001", "factors-000000", "lacks residuals"),
        ("factors-000000", "strip-000001", "lacks columns"),
        ("factors-000000", "residual", "names no shards"),
        ("residual", "strip-000001", "lacks rows and columns"),
    ],
)
def test_an_entry_that_was_copied_over_another_name(run: Run, name: str, over: str, wrong: str) -> None:
    """Its checksum is right, and what it names is there."""
    key = copied(run.store, name, over)
    (found,) = verify(run.store).damaged
    assert (found.key, found.piece) == (key, "ledger")
    assert wrong in found.wrong
    with pytest.raises(CorruptStoreError, match=rf"{over}\.json.*delete it and run the same call again"):
        run.call()
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)
    assert run.redone() <= {over, "residual"}
    assert verify(run.store)


@pytest.mark.parametrize("name", ["strip-000001", "factors-000000", "residual"])
def test_an_empty_entry_stands_for_nothing(run: Run, name: str) -> None:
    key = f"_run/ledger/{name}.json"
    (run.store / key).write_text("{}")
    assert [(one.key, one.piece) for one in verify(run.store).damaged] == [(key, "ledger")]
    with pytest.raises(CorruptStoreError, match=rf"{name}\.json"):
        run.call()
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)
    assert verify(run.store)


def test_factors_of_another_run_of_test_points(tmp_path: Path) -> None:
    case = data.mlp_regression()
    model = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    test = (case.test[0].repeat(2, 1), case.test[1].repeat(2, 1))  # two tasks of factors
    first = model.influence_factors_to_zarr(tmp_path / "run", test).factors.values
    key = copied(tmp_path / "run", "factors-000000", "factors-000001")
    assert [one.key for one in verify(tmp_path / "run").damaged] == [key]
    again = model.influence_factors_to_zarr(tmp_path / "run", test, repair=True)
    np.testing.assert_array_equal(again.factors.values, first)
    assert verify(tmp_path / "run")


def test_entries_of_a_reduction_copied(tmp_path: Path) -> None:
    case = data.mlp_regression()
    model = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    call = {"tile_bytes": 300, "reduce": TopK(3)}
    first = model.influences_to_zarr(tmp_path / "run", case.test, case.train, **call)
    names = sorted(path.stem for path in (tmp_path / "run" / "_run" / "ledger").iterdir())
    (merge,) = (name for name in names if name.startswith("merge-"))
    for name, over in ((merge, "strip-000001"), ("strip-000001", merge), ("strip-000001", "strip-000002")):
        key = copied(tmp_path / "run", name, over)
        assert [one.key for one in verify(tmp_path / "run").damaged] == [key]
        again = model.influences_to_zarr(tmp_path / "run", case.test, case.train, repair=True, **call)
        assert again.equals(first)
        assert verify(tmp_path / "run")


def test_entries_of_earlier_versions_are_as_written(run: Run) -> None:
    """They carried no checksum, and those of factors no rows."""
    for path in (run.store / "_run" / "ledger").iterdir():
        entry = json.loads(path.read_text())
        del entry["checksum"]
        if path.stem.startswith("factors-"):
            del entry["rows"]
        path.write_text(json.dumps(entry))
    assert verify(run.store).ok
    before = run.read()
    np.testing.assert_array_equal(run.call().influence.values, run.scores)
    assert run.read() == before


@pytest.mark.parametrize(
    "hurt",
    [
        {"shards": 5},
        {"shards": [["influence/c/0/0", 1]]},
        {"shards": []},
        {"missing": [{"sample": 1_000, "id": 1_000, "reason": "NaN"}]},
        {"rows": "all"},
    ],
)
def test_an_entry_of_another_shape(run: Run, hurt: dict[str, Any]) -> None:
    path = run.store / "_run" / "ledger" / "strip-000001.json"
    entry = {name: held for name, held in json.loads(path.read_text()).items() if name != "checksum"}
    path.write_text(json.dumps({**entry, **hurt}))
    assert [one.piece for one in verify(run.store).damaged] == ["ledger"]
    with pytest.raises(CorruptStoreError, match=r"strip-000001\.json"):
        run.call()
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)


@pytest.mark.parametrize(
    "hurt",
    [
        {"plan": {}},
        {"plan": {"work": 5}},
        {"plan": {"tile": "large"}},
        {"plan": {"more": 1}},
        {"objects": 5},
        {"objects": [["elsewhere", 5, "crc32:0"]], "metadata": {}},
        {"missing": {"train": 5}},
    ],
)
def test_a_run_of_another_shape(run: Run, hurt: dict[str, Any]) -> None:
    path = run.store / "_run" / "run.json"
    record = {name: held for name, held in json.loads(path.read_text()).items() if name != "checksum"}
    if "more" in hurt.get("plan", {}) or "tile" in hurt.get("plan", {}):
        hurt = {"plan": {**record["plan"], **hurt["plan"]}}
    path.write_text(json.dumps({**record, **hurt}))
    assert not verify(run.store)
    with pytest.raises(CorruptStoreError, match=r"run\.json"):
        run.call()
    np.testing.assert_array_equal(run.call(overwrite=True).influence.values, run.scores)


@damages
def test_the_record_of_the_run(run: Run, hurt: Callable[[Path], None]) -> None:
    hurt(run.store / "_run" / "run.json")
    found = verify(run.store, repair=True)
    assert [(one.key, one.piece) for one in found.damaged] == [("_run/run.json", "run")]
    assert "overwrite=True" in str(found)
    with pytest.raises(CorruptStoreError, match=r"run\.json.*overwrite=True"):
        run.call(repair=True)
    np.testing.assert_array_equal(run.call(overwrite=True).influence.values, run.scores)
    assert verify(run.store)


def test_repair_does_not_touch_the_store_of_another_run(run: Run) -> None:
    key = sorted(k for k in run.content if k.startswith("influence/c"))[0]
    flip(run.store / key)
    before = run.read()
    with pytest.raises(StoreMismatchError, match="regularization"):
        run.model.with_regularization(0.7).influences_to_zarr(
            run.store, run.case.test, run.case.train, repair=True
        )
    assert run.read() == before


def test_without_repair_a_flipped_byte_is_not_looked_for(run: Run) -> None:
    key = sorted(k for k in run.content if k.startswith("influence/c"))[0]
    flip(run.store / key)
    run.call()
    assert run.redone() == set()
    assert not verify(run.store)


def test_a_run_that_was_interrupted_is_as_written_so_far(tmp_path: Path, one_thread: None) -> None:
    case = data.mlp_regression()
    model = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.influences_to_zarr(tmp_path / "run", case.test, case.train, tile_bytes=TILE, progress=stop)
    found = verify(tmp_path / "run")
    assert found.ok
    assert found.state == "running"
    assert found.unfinished == 1
    assert "not done yet" in str(found)


@damages
def test_a_store_of_factors(tmp_path: Path, hurt: Callable[[Path], None]) -> None:
    case = data.mlp_regression()
    model = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    store = tmp_path / "factors"
    first = model.influence_factors_to_zarr(store, case.test).factors.values
    assert verify(store)
    shard = store / "factors" / "c" / "0" / "0"
    artifact = sorted((store / "_run" / "artifacts").glob("*"), key=lambda p: p.stat().st_size)[0]
    for path in (shard, artifact):
        hurt(path)
        assert {one.key for one in verify(store).damaged} == {str(path.relative_to(store))}
        again = model.influence_factors_to_zarr(store, case.test, repair=True)
        np.testing.assert_array_equal(again.factors.values, first)
        assert verify(store)


def test_workers_read(tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run", client)
    key = sorted(k for k in run.content if k.startswith("influence/c"))[2]
    strip = run.owner(key)
    flip(run.store / key)
    monkeypatch.setattr(module, "GROUP_OBJECTS", 3)
    there = verify(run.store, client=client)
    monkeypatch.setattr(module, "ThreadPoolExecutor", None)
    assert there == verify(run.store, client=client)
    assert [one.key for one in there.damaged] == [key]
    np.testing.assert_array_equal(run.call(repair=True).influence.values, run.scores)
    assert run.redone() == {strip}


def test_workers_that_cannot_reach_the_store_do_not_say_that_all_is_missing(client: Client) -> None:
    case = data.mlp_regression()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    fitted.influences_to_zarr("memory://verify-elsewhere", case.test, case.train)
    assert verify("memory://verify-elsewhere").ok
    with pytest.raises(StoreError, match="cannot reach memory://verify-elsewhere"):
        verify("memory://verify-elsewhere", client=client, repair=True)
    assert verify("memory://verify-elsewhere").ok


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        verify(tmp_path / "nothing")
    with pytest.raises(StoreError, match="holds no run"):
        verify("memory://nothing-to-verify")


def test_large_objects_are_read_in_pieces() -> None:
    location = Location.of("memory://pieces")
    content = np.random.default_rng(0).bytes(9 * 2**20 + 7)
    location.put("large", content)
    pieces = list(location.stream("large"))
    assert b"".join(pieces) == content
