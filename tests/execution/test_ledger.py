"""The ledger: what is recorded comes back, what is torn is named, what differs is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_influence.errors import CorruptStoreError, StoreError
from dask_influence.execution.ledger import Ledger, compare_fingerprints
from dask_influence.storage.results import checksum
from dask_influence.storage.stores import Location


@pytest.fixture(params=["file", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Ledger:
    url = str(tmp_path / "run") if request.param == "file" else f"memory://ledger{tmp_path}"
    return Ledger(Location.of(url))


def test_run_record(ledger: Ledger) -> None:
    assert ledger.read_run() is None
    ledger.write_run({"state": "running", "plan": {"tile": (3, 4)}})
    ledger.write_run({"state": "complete"})
    assert ledger.read_run() == {"state": "complete"}
    assert ledger.location.list() == ["_run/run.json"]


def test_entries(ledger: Ledger) -> None:
    assert ledger.entries() == {}
    assert ledger.done() == set()
    written = {f"strip-{i:06d}": {"seconds": i / 7, "shards": [["k", i, "crc"]]} for i in range(41)}
    for name, entry in written.items():
        ledger.record(name, entry)
    ledger.record("factors-0", {"digest": "a"})
    assert ledger.entries("strip-") == written
    assert ledger.entries() == {**written, "factors-0": {"digest": "a"}}
    assert ledger.done() == {*written, "factors-0"}


def test_people_find_a_line_for_each_name(ledger: Ledger) -> None:
    ledger.record("a", {"shards": [["k", 1, "crc"], ["l", 2, "crc"]], "seconds": 1.5})
    lines = ledger.location.get("_run/ledger/a.json").decode().splitlines()
    assert [line.split(":")[0] for line in lines] == ["{", ' "checksum"', ' "seconds"', ' "shards"', "}"]


def test_records_that_were_indented_are_read(ledger: Ledger) -> None:
    """As they all were: a run that was begun then goes on."""
    entry = {"seconds": 1.5, "shards": [["k", 1, "crc"]]}
    said = checksum(json.dumps(entry, sort_keys=True, indent=1).encode())
    ledger.location.put("_run/ledger/a.json", json.dumps({**entry, "checksum": said}, indent=1).encode())
    assert ledger.read("a") == entry
    ledger.location.put("_run/ledger/a.json", json.dumps({**entry, "seconds": 2, "checksum": said}).encode())
    with pytest.raises(CorruptStoreError, match="checksum differs"):
        ledger.read("a")


def test_failures_are_not_done_until_they_are(ledger: Ledger) -> None:
    ledger.record("a", {"error": "KilledWorker"})
    ledger.record("b", {"seconds": 1})
    assert ledger.done() == {"b"}
    assert ledger.entries() == {"a": {"error": "KilledWorker"}, "b": {"seconds": 1}}
    ledger.record("a", {"seconds": 2})
    assert ledger.done() == {"a", "b"}
    assert ledger.entries()["a"] == {"seconds": 2}


def test_what_is_done_is_listed_and_not_read(ledger: Ledger) -> None:
    ledger.record("a", {})
    ledger.location.put("_run/ledger/b.json", b"torn")
    assert ledger.done() == {"a", "b"}
    assert ledger.done("b") == {"b"}


@pytest.mark.parametrize("name", ["", "a/b", "a.failed"])
def test_names_that_are_refused(ledger: Ledger, name: str) -> None:
    with pytest.raises(ValueError, match="slash"):
        ledger.record(name, {})


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"[]", b'""', b'[["a", 1]]', b"\xff", 100_000 * b"["])
def test_torn_records_are_named(ledger: Ledger, data: bytes) -> None:
    ledger.record("fine", {})
    ledger.location.put("_run/ledger/torn.json", data)
    with pytest.raises(CorruptStoreError, match=r"_run/ledger/torn\.json.*delete it and run"):
        ledger.entries()
    ledger.location.put("_run/run.json", data)
    with pytest.raises(CorruptStoreError, match=r"_run/run\.json"):
        ledger.read_run()


@pytest.mark.parametrize(
    ("run", "lacking"),
    [
        ({}, "state, fingerprint, plan"),
        ({"state": "running", "fingerprint": []}, "fingerprint, plan"),
        ({"state": 1, "fingerprint": {}, "plan": {}}, "state"),
    ],
)
def test_run_records_that_lack_something_are_named(ledger: Ledger, run: dict[str, Any], lacking: str) -> None:
    assert ledger.read_begun() is None
    ledger.write_run(run)
    with pytest.raises(CorruptStoreError, match=rf"_run/run\.json.*lacks {lacking}; .*overwrite=True"):
        ledger.read_begun()
    whole = {"state": "running", "fingerprint": {}, "plan": {}}
    ledger.write_run(whole)
    assert ledger.read_begun() == whole


def test_pieces_without_their_shards_are_forgotten(ledger: Ledger) -> None:
    for name, nbytes in (("whole", 3), ("short", 4), ("gone", 3)):
        ledger.location.put(f"a/{name}", b"abc")
        ledger.record(name, {"shards": [[f"a/{name}", nbytes, "crc"]]})
    ledger.record("none", {})
    ledger.record("bad", {"error": "KilledWorker"})
    ledger.location.delete("a/gone")
    assert ledger.standing().done == {"whole", "none"}
    assert ledger.done() == {"whole", "none"}
    assert set(ledger.entries()) == {"whole", "none", "bad"}


def test_a_standing_reads_all_entries_and_keeps_what_is_missing(ledger: Ledger) -> None:
    missing = [{"sample": 3, "id": 3, "reason": "NaN"}]
    for index in range(700):  # more than are read at once
        ledger.record(f"strip-{index:06d}", {"shards": []} | ({"missing": missing} if index == 650 else {}))
    standing = ledger.standing(["influence"])
    assert standing.done == ledger.done()
    assert standing.missing == {"strip-000650": missing}
    left = standing.without(["strip-000650"])
    assert (len(left.done), left.missing) == (699, {})


def test_shards_that_a_listing_lacks_are_looked_for_themselves(ledger: Ledger) -> None:
    """As one that is written between the listing and its entry."""
    ledger.location.put("late/0", b"abc")
    ledger.record("late", {"shards": [["late/0", 3, "crc"]]})
    assert ledger.standing(["influence"]).done == {"late"}


def test_other_files_beside_entries_are_left_alone(ledger: Ledger) -> None:
    ledger.record("a", {})
    ledger.location.put("_run/ledger/.DS_Store", b"")
    assert list(ledger.entries()) == ["a"]


def test_a_store_that_cannot_be_reached_is_not_an_empty_one() -> None:
    options = {
        "endpoint": "http://127.0.0.1:9",
        "key": "k",
        "secret": "s",
        "retry_config": {"max_retries": 0},
    }
    with pytest.raises(StoreError, match="s3://bucket/run"):
        Ledger(Location.of("s3://bucket/run", options)).read_run()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shards", 5),
        ("shards", [["k", 1]]),
        ("shards", [["k", -1, "crc"]]),
        ("shards", [["../k", 1, "crc"]]),
        ("shards", [["", 1, "crc"]]),
        ("part", "k"),
        ("rows", [0, True]),
        ("missing", [{"sample": "3", "reason": "NaN"}]),
        ("missing", [3]),
        ("digest", None),
        ("residual", [None]),
        ("seconds", "1.5"),
    ],
)
def test_fields_of_another_shape_are_named(ledger: Ledger, field: str, value: object) -> None:
    ledger.record("bad", {field: value})
    named = rf"_run/ledger/bad\.json.*look at its {field}; delete it and run"
    for read in (ledger.entries, ledger.standing, lambda: ledger.read("bad"), lambda: list(ledger.stream())):
        with pytest.raises(CorruptStoreError, match=named):
            read()
    read, torn = ledger.survey()
    assert (read, list(torn)) == ({}, ["_run/ledger/bad.json"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("solves", None),
        ("objects", {"zarr.json": 3}),
        ("metadata", {"zarr.json": {}}),
        ("metadata", {"zarr.json": "\ud800"}),
        ("missing", {"train": [{"sample": 3}]}),
        ("missing", {"elsewhere": []}),
    ],
)
def test_a_run_of_another_shape_is_named(ledger: Ledger, field: str, value: object) -> None:
    ledger.write_run({"state": "running", "fingerprint": {}, "plan": {}, field: value})
    with pytest.raises(CorruptStoreError, match=rf"_run/run\.json.*look at its {field}; pass overwrite=True"):
        ledger.read_begun()


# -- fingerprints -------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("stored", "asked", "lines"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1}, []),
        ({"tile": [3, 4]}, {"tile": (3, 4)}, []),
        (
            {"hessian_regularization": 0.01},
            {"hessian_regularization": 0.1},
            ["hessian_regularization: stored 0.01, asked 0.1"],
        ),
        ({"a": None}, {}, ["a: stored None, asked nothing"]),
        ({}, {"a": {"b": 1}}, ["a: stored nothing, asked {'b': 1}"]),
        (
            {"data": {"x": "1", "y": "2"}, "rank": 3},
            {"data": {"x": "1", "y": "4"}, "rank": 5},
            ["data.y: stored '2', asked '4'", "rank: stored 3, asked 5"],
        ),
        ({"a": {"b": 1}}, {"a": 1}, ["a: stored {'b': 1}, asked 1"]),
    ],
)
def test_compared(stored: dict[str, Any], asked: dict[str, Any], lines: list[str]) -> None:
    assert compare_fingerprints(stored, asked) == lines


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(fingerprint=st.dictionaries(st.text(), _JSON, max_size=4))
def test_a_fingerprint_equals_what_was_stored_of_it(fingerprint: dict[str, Any]) -> None:
    ledger = Ledger(Location.of("memory://fingerprints"))
    ledger.write_run({"fingerprint": fingerprint})
    stored = ledger.read_run()
    assert stored is not None
    assert compare_fingerprints(stored["fingerprint"], fingerprint) == []
    assert len(compare_fingerprints(stored["fingerprint"], {**fingerprint, "more": "\0"})) <= 1
