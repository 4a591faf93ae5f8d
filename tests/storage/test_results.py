"""Results: templates, tiles written by several processes, what the recorder says, and reading back."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from dask_influence.errors import CorruptStoreError, DataError, InfluenceWarning, StoreError
from dask_influence.storage import results
from dask_influence.storage.results import (
    RUN_KEY,
    ArrayTemplate,
    ShardRecord,
    checksum,
    create,
    damage,
    finish,
    inner_chunk,
    open_influences,
    write_region,
)
from dask_influence.storage.stores import Location

N, M = 7, 11
SCORES = ArrayTemplate(("test", "train", "pixel"), (N, M, 2), (3, 4, 2), np.dtype("float32"))
VALUES = np.random.default_rng(0).normal(size=(N, M, 2)).astype(np.float32)
IDS = {"test": np.arange(N) * 10, "train": np.array([f"image-{i}" for i in range(M)])}


@pytest.fixture
def location(tmp_path: Path) -> Location:
    return Location.of(tmp_path / "run.zarr")


def _create(location: Location, **arrays: ArrayTemplate) -> None:
    create(location, {"influence": SCORES, **arrays}, coordinates=IDS, attributes={"lambda": 0.01})


def _box(tile: results.Tile) -> tuple[slice, ...]:
    return tuple(map(slice, tile.start, tile.stop))


def _write_tile(location: Location, tile: results.Tile) -> list[ShardRecord]:
    return write_region(location, "influence", tile.start, VALUES[_box(tile)])


# -- geometry -----------------------------------------------------------------------------
@given(
    axes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=3),
)
def test_tiles_cover_every_entry_once(axes: list[tuple[int, int]]) -> None:
    shape, tile = zip(*axes, strict=True)
    template = ArrayTemplate(tuple("abc"[: len(shape)]), shape, tile, np.dtype("f4"))
    count = np.zeros(shape, int)
    for piece in template.tiles():
        count[_box(piece)] += 1
    assert (count == 1).all()


@given(tile=st.lists(st.integers(1, 6000), min_size=1, max_size=3), itemsize=st.sampled_from([2, 4, 8]))
def test_inner_chunks_divide_the_tile(tile: list[int], itemsize: int) -> None:
    inner = inner_chunk(tuple(tile), itemsize)
    assert all(extent % part == 0 for extent, part in zip(tile, inner, strict=True))
    small = math.prod(tile) * itemsize <= results.LARGEST_CHUNK
    assert (inner == tuple(tile)) == small
    assert small or math.prod(inner) * itemsize <= results.INNER_CHUNK


@pytest.mark.parametrize(
    ("dims", "shape", "tile"), [(("a",), (3, 4), (1, 1)), (("a",), (0,), (1,)), (("a",), (3,), (0,))]
)
def test_templates_that_are_refused(dims: Any, shape: Any, tile: Any) -> None:
    with pytest.raises(ValueError, match="shape"):
        ArrayTemplate(dims, shape, tile, np.dtype("f4"))


# -- a whole run --------------------------------------------------------------------------
def test_tiles_written_one_by_one_are_read_as_one_array(location: Location) -> None:
    _create(location, factor_residual=ArrayTemplate(("test",), (N,), (N,), np.dtype("f8"), coordinate=True))
    records = [record for tile in SCORES.tiles() for record in _write_tile(location, tile)]
    write_region(location, "factor_residual", (0,), np.arange(7.0))
    finish(location, {"state": "complete", "model": "digits"})
    assert len(records) == 9
    for opened in (open_influences(location), xr.open_zarr(location.local_path)):
        np.testing.assert_array_equal(opened.influence, VALUES)
        assert opened.influence.dims == ("test", "train", "pixel")
        assert opened.test.values.tolist() == list(range(0, 70, 10))
        assert opened.train.values.tolist() == IDS["train"].tolist()
        assert opened.factor_residual.dims == ("test",)
        assert "factor_residual" in opened.coords
        assert opened.attrs["lambda"] == 0.01
        assert opened.attrs["model"] == "digits"
    one = open_influences(str(location.local_path)).influence.sel(test=30, train="image-4")
    np.testing.assert_array_equal(one, VALUES[3, 4])


def test_opening_is_lazy(location: Location) -> None:
    _create(location)
    finish(location, {"state": "complete"})
    assert dask.is_dask_collection(open_influences(location).influence)


def test_on_s3(s3: Location) -> None:
    _create(s3)
    with ThreadPoolExecutor(4) as pool:
        records = [r for found in pool.map(lambda tile: _write_tile(s3, tile), SCORES.tiles()) for r in found]
    finish(s3, {"state": "complete"})
    np.testing.assert_array_equal(open_influences(s3.url, s3.storage_options).influence, VALUES)
    for record in records:
        assert damage(s3, record) is None


def _write_and_return(arguments: tuple[Location, results.Tile]) -> list[ShardRecord]:
    return _write_tile(*arguments)


def test_two_processes_write_different_tiles(location: Location) -> None:
    _create(location)
    tiles = list(SCORES.tiles())
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        elsewhere = pool.map(_write_and_return, [(location, tile) for tile in tiles[::2]])
        records = [_write_tile(location, tile) for tile in tiles[1::2]] + list(elsewhere)
    assert len({record.key for found in records for record in found}) == 9
    finish(location, {"state": "complete"})
    np.testing.assert_array_equal(open_influences(location).influence, VALUES)


def test_integers_and_other_names(location: Location) -> None:
    template = ArrayTemplate(("test", "rank"), (N, 3), (4, 3), np.dtype("i8"), attrs={"long_name": "ids"})
    create(location, {"top": template}, coordinates={"test": np.arange(N)}, attributes={})
    write_region(location, "top", (4, 0), np.arange(9).reshape(3, 3))
    with pytest.warns(InfluenceWarning):
        top = open_influences(location).top
    assert top.dtype == np.int64
    assert top.attrs["long_name"] == "ids"
    assert top.values.tolist() == [[-1] * 3] * 4 + [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


# -- region writes ------------------------------------------------------------------------
def test_a_block_of_many_tiles_gives_a_record_for_each(location: Location) -> None:
    _create(location)
    records = write_region(location, "influence", (3, 0, 0), VALUES[3:])
    keys = [f"influence/c/{i}/{j}/0" for i in (1, 2) for j in (0, 1, 2)]
    assert [record.key for record in records] == keys
    stored = location.stat("influence/c")
    assert {record.key: record.nbytes for record in records} == {
        key: size for key, (size, _) in stored.items()
    }


def test_records_are_of_the_bytes_that_are_stored(location: Location) -> None:
    _create(location)
    (record,) = write_region(location, "influence", (6, 8, 0), VALUES[6:, 8:])
    data = location.get(record.key)
    assert (len(data), checksum(data)) == (record.nbytes, record.checksum)
    assert damage(location, record) is None


@pytest.mark.parametrize("large", [False, True])
def test_a_tile_of_nan_is_stored_and_recorded(
    location: Location, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(results, "LARGEST_CHUNK", 40)
        monkeypatch.setattr(results, "INNER_CHUNK", 40)
    _create(location)
    assert zarr.open_array(location.zarr(), path="influence").shards == ((3, 4, 2) if large else None)
    (record,) = write_region(location, "influence", (3, 8, 0), np.full((3, 3, 2), np.nan, np.float32))
    assert damage(location, record) is None
    assert write_region(location, "influence", (3, 8, 0), VALUES[3:6, 8:])[0].checksum != record.checksum
    array = zarr.open_array(location.zarr(), path="influence")
    np.testing.assert_array_equal(array[3:6, 8:], VALUES[3:6, 8:])
    assert np.isnan(array[:3]).all()


def test_equal_tiles_have_equal_bytes(location: Location) -> None:
    _create(location)
    first = write_region(location, "influence", (0, 0, 0), VALUES)
    assert write_region(location, "influence", (0, 0, 0), VALUES) == first


@pytest.mark.parametrize("large", [False, True])
def test_a_corrupt_tile_at_the_edge_can_be_written_again(
    location: Location, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr(results, "LARGEST_CHUNK", 40)
        monkeypatch.setattr(results, "INNER_CHUNK", 40)
    _create(location)
    (record,) = write_region(location, "influence", (6, 8, 0), VALUES[6:, 8:])
    data = bytearray(location.get(record.key))
    data[len(data) // 2] ^= 1
    location.put(record.key, bytes(data))
    assert re.fullmatch(r"has crc32:\w+; crc32:\w+ was written", damage(location, record) or "")
    assert write_region(location, "influence", (6, 8, 0), VALUES[6:, 8:]) == [record]
    assert damage(location, record) is None


def test_flipped_byte_is_noticed_by_any_reader(location: Location) -> None:
    _create(location)
    write_region(location, "influence", (0, 0, 0), VALUES)
    data = bytearray(location.get("influence/c/0/0/0"))
    data[-10] ^= 1
    location.put("influence/c/0/0/0", bytes(data))
    finish(location, {"state": "complete"})
    with pytest.raises(ValueError, match="checksum"):
        xr.open_zarr(location.local_path).influence.load()


def test_lost_and_shortened_tiles_are_named(location: Location) -> None:
    _create(location)
    first, second, *_ = write_region(location, "influence", (0, 0, 0), VALUES)
    location.delete(first.key)
    assert damage(location, first) == "is missing"
    location.put(second.key, location.get(second.key)[:-1])
    assert damage(location, second) == f"has {second.nbytes - 1} bytes; {second.nbytes} were written"


def test_checksums_tell_tiles_of_one_length_apart(location: Location) -> None:
    # A tile that was written in place of another passes zarr's own check.
    template = ArrayTemplate(("test",), (64,), (8,), np.dtype("f8"))
    create(location, {"a": template}, coordinates={}, attributes={})
    records = write_region(location, "a", (0,), np.random.default_rng(1).normal(size=64))
    assert len({record.checksum for record in records}) == 8
    location.put(records[0].key, location.get(records[1].key))
    assert records[0].nbytes == records[1].nbytes
    assert damage(location, records[0])


@pytest.mark.parametrize(
    ("start", "shape"),
    [
        ((1, 0, 0), (3, 4, 2)),
        ((0, 0, 0), (2, 4, 2)),
        ((0, 0, 0), (3, 4, 1)),
        ((6, 0, 0), (2, 4, 2)),
        ((6, 8, 0), (3, 4, 2)),
        ((9, 0, 0), (3, 4, 2)),
        ((0, 0, 0), (0, 4, 2)),
        ((-3, 0, 0), (3, 4, 2)),
        ((0, 0), (3, 4)),
    ],
)
def test_blocks_that_cut_tiles_are_refused(location: Location, start: tuple[int, ...], shape: Any) -> None:
    _create(location)
    with pytest.raises(ValueError, match="influence"):
        write_region(location, "influence", start, np.zeros(shape, np.float32))
    assert location.list("influence/c") == []


def test_dtypes_that_do_not_fit_are_refused(location: Location) -> None:
    _create(location, top=ArrayTemplate(("test",), (N,), (N,), np.dtype("i8")))
    with pytest.raises(ValueError, match="top holds int64; a block of float64"):
        write_region(location, "top", (0,), np.zeros(N))
    write_region(location, "influence", (0, 0, 0), VALUES.astype(np.float64))  # narrowing a float is fine


def test_an_array_that_is_not_there(location: Location) -> None:
    _create(location)
    with pytest.raises(StoreError, match=r"influense/zarr\.json.*it does not exist"):
        write_region(location, "influense", (0, 0, 0), VALUES)


def test_a_store_made_anew_is_written_in_its_new_layout(location: Location) -> None:
    _create(location)
    write_region(location, "influence", (0, 0, 0), VALUES)
    location.delete()
    template = ArrayTemplate(("test", "train"), (N, M), (2, M), np.dtype("f8"))
    create(location, {"influence": template}, coordinates=IDS, attributes={})
    assert len(write_region(location, "influence", (0, 0), VALUES[..., 0].astype("f8"))) == 4


# -- refusals of create -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(N + 1), "ids of 'test' has 8 entries; the dimension has 7"),
        (np.zeros((N, 1)), "2 axes of float64"),
        (np.array([None] * N), "of object"),
        (np.zeros(N, "datetime64[s]"), "datetime64"),
        (np.zeros(N, complex), "complex128"),
    ],
)
def test_ids_that_are_refused(location: Location, ids: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        create(location, {"influence": SCORES}, coordinates={"test": ids}, attributes={})
    assert location.list() == []


@pytest.mark.parametrize(
    "ids", [np.arange(N), np.linspace(0, 1, N), np.array(list("abcdefg")), np.array(list("abcdefg"), object)]
)
def test_ids_come_back(location: Location, ids: Any) -> None:
    create(location, {"influence": SCORES}, coordinates={"test": ids}, attributes={})
    finish(location, {"state": "complete"})
    assert open_influences(location).test.values.tolist() == ids.tolist()


def test_an_existing_group_is_kept(location: Location) -> None:
    _create(location)
    write_region(location, "influence", (0, 0, 0), VALUES)
    before = location.stat()
    with pytest.raises(StoreError, match="already holds a Zarr group"):
        _create(location)
    assert location.stat() == before


# -- opening ------------------------------------------------------------------------------
def test_unfinished_runs_are_opened_with_a_warning(location: Location) -> None:
    _create(location)
    location.put(RUN_KEY, json.dumps({"state": "running"}).encode())
    _write_tile(location, next(SCORES.tiles()))
    with pytest.warns(InfluenceWarning, match=r"not complete \(state 'running'\): missing tiles read as NaN"):
        opened = open_influences(location)
    np.testing.assert_array_equal(opened.influence[:3, :4], VALUES[:3, :4])
    assert np.isnan(opened.influence[3:]).all()


def test_the_run_record_decides_whether_a_store_is_complete(location: Location) -> None:
    _create(location)
    finish(location, {"state": "complete"})
    location.put(RUN_KEY, json.dumps({"state": "running"}).encode())
    with pytest.warns(InfluenceWarning):
        open_influences(location)
    location.put(RUN_KEY, json.dumps({"state": "complete"}).encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_influences(location)


def test_metadata_are_consolidated_by_finish_alone(location: Location) -> None:
    _create(location)
    assert "consolidated_metadata" not in json.loads(location.get("zarr.json"))
    location.put("_run/ledger/strip-0.json", b"{}")
    finish(location, {"state": "complete"})
    consolidated = json.loads(location.get("zarr.json"))["consolidated_metadata"]["metadata"]
    assert sorted(consolidated) == ["influence", "test", "train"]
    finish(location, {"again": 1})
    assert open_influences(location).attrs["again"] == 1


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no Zarr group; check the URL"):
        open_influences(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_group_of_another_program(location: Location) -> None:
    zarr.create_group(location.zarr())
    with pytest.raises(StoreError, match=r"dask_influence did not write; open it with xarray\.open_zarr"):
        open_influences(location)


def test_broken_metadata(location: Location) -> None:
    location.put("zarr.json", b"{")
    with pytest.raises(CorruptStoreError, match="is not JSON"):
        open_influences(location)
