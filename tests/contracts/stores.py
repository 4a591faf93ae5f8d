"""What every kind of store must do; a new scheme subclasses :class:`StoreContract`."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr

from dask_influence.errors import MissingObjectError
from dask_influence.storage.stores import Location


class StoreContract(ABC):
    """Tests over one scheme; ``location`` is all a subclass has to give."""

    @pytest.fixture
    @abstractmethod
    def location(self, tmp_path: Path) -> Location:
        """An empty place of this kind, new for every test."""

    def test_whole_objects(self, location: Location) -> None:
        location.put("a/b.json", b"one")
        location.put("a/b.json", b"two")
        assert location.get("a/b.json") == b"two"
        assert location.exists("a/b.json")

    @pytest.mark.parametrize("data", [b"", b"\x00" * 3, bytes(range(256)) * 4096])
    def test_bytes_come_back(self, location: Location, data: bytes) -> None:
        location.put("blob", data)
        assert location.get("blob") == data
        assert location.stat()["blob"][0] == len(data)

    def test_missing_object(self, location: Location) -> None:
        location.put("a/b", b"")
        assert not location.exists("nothing")
        assert not location.exists("a")
        with pytest.raises(MissingObjectError, match="nothing"):
            location.get("nothing")
        with pytest.raises(FileNotFoundError):
            location.get("a/nothing")

    def test_list(self, location: Location) -> None:
        assert location.list() == []
        for key in ["b/c/d", "b/a", "bc/x", "a"]:
            location.put(key, key.encode())
        assert location.list() == ["a", "b/a", "b/c/d", "bc/x"]
        assert location.list("b") == location.list("b/") == ["b/a", "b/c/d"]
        assert location.list("nothing") == []

    def test_folders_are_those_right_below(self, location: Location) -> None:
        assert [*location.folders()] == []
        for key in ["b/c/d", "b/a", "bc/x", "a"]:
            location.put(key, b"")
        assert sorted(location.folders()) == ["b", "bc"]
        assert [*location.child("b").folders()] == ["c"]

    def test_stat_tells_a_new_version(self, location: Location) -> None:
        location.put("k", b"1")
        before = location.stat()["k"]
        location.put("k", b"22")
        assert location.stat()["k"] != before

    def test_get_many(self, location: Location) -> None:
        written = {f"many/{i}": str(i).encode() for i in range(57)}
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(location.put, written, written.values()))
        assert location.get_many([*written, "many/none"]) == written
        assert location.get_many([]) == {}

    def test_delete(self, location: Location) -> None:
        for key in ["a/b/c", "a/d", "ab", "e"]:
            location.put(key, b"")
        location.delete("a")
        assert location.list() == ["ab", "e"]
        location.delete("e")
        location.delete("never/there")
        assert location.list() == ["ab"]
        location.delete()
        assert location.list() == []
        location.put("again", b"1")
        assert location.list() == ["again"]

    def test_child(self, location: Location) -> None:
        child = location.child("_run", "artifacts")
        child.put("x", b"1")
        assert location.get("_run/artifacts/x") == b"1"
        assert location.child("_run").list() == ["artifacts/x"]
        assert child.list() == ["x"]
        child.delete()
        assert location.list() == []

    def test_check_writable_leaves_nothing(self, location: Location) -> None:
        location.check_writable()
        assert location.list() == []
        location.child("deeper", "still").check_writable()
        assert location.list() == []

    def test_pickle_and_equality(self, location: Location) -> None:
        location.put("k", b"v")
        copy = pickle.loads(pickle.dumps(location))
        assert copy == location
        assert hash(copy) == hash(location)
        assert copy.get("k") == b"v"
        assert location.child("x") != location
        assert Location.of(location) is location
        assert Location.of(location.url) == location

    def test_zarr_round_trip(self, location: Location) -> None:
        values = np.arange(35, dtype=np.float32).reshape(5, 7)
        group = zarr.create_group(location.zarr())
        group.create_array("below/a", data=values, chunks=(2, 3))
        opened = zarr.open_group(location.zarr(), mode="r")
        np.testing.assert_array_equal(opened["below/a"][1:4, 2:], values[1:4, 2:])
        assert sorted(opened.keys()) == ["below"]
        assert "below/a/c/0/0" in location.list()
        del zarr.open_group(location.zarr(), mode="r+")["below"]
        assert location.list("below") == []

    def test_zarr_of_a_child(self, location: Location) -> None:
        child = location.child("inner")
        zarr.create_group(child.zarr(), attributes={"a": 1})
        assert location.exists("inner/zarr.json")
        assert zarr.open_group(location.zarr(), path="inner", mode="r").attrs["a"] == 1
