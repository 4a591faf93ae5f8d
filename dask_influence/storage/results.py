"""Results in three acts: template, region writes by many processes, finish; and opening them.

A store is one Zarr v3 group that ``xr.open_zarr`` opens. The unit of writing is the *tile*:
one shard, or one chunk where the tile is small enough not to need inner chunks. Two
processes may write different tiles of one array at the same time, never parts of the same.
Arrays are named by the caller, so scores, factors and reductions are all written here.

::

    scores.zarr/         a Zarr v3 group: open_influences(store), or xarray.open_zarr(store)
    ├── influence        (test, train), or (test, train, feature_0, …): the scores, in the model's dtype;
    │                    with reduce= the arrays that it keeps instead
    ├── test, train      ids of the rows and columns: yours (test_ids=, train_ids=), or positions
    ├── factor_residual  (test): ‖(H + λI)s − g‖ / ‖g‖, how well each row's system was solved
    └── _run/
        ├── run.json     fingerprint of model, data, λ, estimator and versions; the plan; the state
        ├── ledger/      one entry for each finished task: bytes and checksums of what it wrote
        ├── status.json  how far the command line's client is
        └── artifacts/   what was published to the workers: weights, inverse, factors

Attributes of the group say what was computed from what; ``state`` is ``complete`` once everything is
there, and ``incomplete`` where samples are missing.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.array_spec import ArrayConfig
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.metadata import ArrayV3Metadata
from zarr.core.sync import sync
from zarr.errors import ZarrUserWarning
from zarr.storage import StorePath, WrapperStore

from dask_influence.errors import (
    CorruptStoreError,
    DataError,
    InfluenceWarning,
    MissingObjectError,
    StoreError,
)
from dask_influence.storage.shapes import Shape, anything, holding, listed, mapped, misshapen, text, whole
from dask_influence.storage.stores import Location, store_errors

FORMAT = "dask_influence"
FORMAT_VERSION = 1
GROUP_KEY = "zarr.json"
"""Metadata of the group."""

RUN_KEY = "_run/run.json"
"""State and fingerprint of the run that writes, or wrote, the arrays beside it."""

FINAL = ("complete", "incomplete")
"""States of a run that has written all it can; incomplete is one that lacks the scores of some samples."""

FINISHED = ("state", "missing", "diagnostics")
"""Attributes of the group that a run adds when everything else is written."""

MISSING = listed(holding(sample=whole, id=anything, reason=text))
"""Shape of the missing samples of one side in a run's record."""

LARGEST_CHUNK = 16 * 2**20
"""Tiles of more bytes become shards, so that a reader of one row decompresses a part."""

INNER_CHUNK = 2 * 2**20
"""Bytes aimed at for the inner chunks of a shard."""

_ZARR_CONFIG = ArrayConfig(order="C", write_empty_chunks=True)  # an all-NaN tile is a result too


@dataclass(frozen=True)
class ArrayTemplate:
    """Shape and layout of one array before anything is written to it.

    Parameters
    ----------
    dims : tuple of str
        Dimension names, one per axis.
    shape, tile : tuple of int
        Entries of the array, and of one tile; a tile larger than the array is cut to it.
    dtype : numpy dtype
        Floats are filled with NaN, signed integers with -1, strings with "", the rest with zero.
    coordinate : bool
        Listed as a coordinate that is no index, such as a residual for every test point.
    attrs : mapping
        JSON attributes of the array.

    Examples
    --------
    >>> scores = ArrayTemplate(("test", "train"), (7, 11), (3, 4), np.dtype("float32"))
    >>> [tile.start for tile in scores.tiles()][:4]
    [(0, 0), (0, 4), (0, 8), (3, 0)]
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    tile: tuple[int, ...]
    dtype: np.dtype[Any]
    coordinate: bool = False
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.shape) == len(self.tile):
            raise ValueError(f"dims {self.dims}, shape {self.shape} and tile {self.tile} differ in length")
        if min((*self.shape, *self.tile), default=1) < 1:
            raise ValueError(f"shape {self.shape} and tile {self.tile} must be at least 1 along every axis")
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        object.__setattr__(self, "tile", tuple(min(t, s) for t, s in zip(self.tile, self.shape, strict=True)))

    def tiles(self) -> Iterator[Tile]:
        """All tiles in row-major order."""
        for start in product(*(range(0, s, t) for s, t in zip(self.shape, self.tile, strict=True))):
            yield Tile(start, tuple(map(min, map(sum, zip(start, self.tile, strict=True)), self.shape)))


@dataclass(frozen=True)
class Tile:
    """The half-open box from ``start`` to ``stop``."""

    start: tuple[int, ...]
    stop: tuple[int, ...]


@dataclass(frozen=True)
class ShardRecord:
    """One stored object: its name, its length in bytes and the checksum of what was written."""

    key: str
    nbytes: int
    checksum: str


def checksum(data: bytes | memoryview) -> str:
    """CRC-32 (the polynomial of zip files) of stored bytes, with the algorithm's name.

    Not CRC-32C: a chunk ends with its own CRC-32C, and that of data followed by their CRC is
    one and the same number for all data.

    >>> checksum(b"123456789")
    'crc32:cbf43926'
    """
    return _named(zlib.crc32(data))


def _named(crc: int) -> str:
    return f"crc32:{crc:08x}"


def damage(location: Location, record: ShardRecord) -> str | None:
    """What is wrong with one stored object, read anew in pieces; None where it is what was written.

    Examples
    --------
    >>> location = Location.of("memory://damage-example")
    >>> location.put("c/0", b"123456789")
    >>> damage(location, ShardRecord("c/0", 9, "crc32:cbf43926")) is None
    True
    >>> location.put("c/0", b"123456780")
    >>> damage(location, ShardRecord("c/0", 9, "crc32:cbf43926"))
    'has crc32:b2288182; crc32:cbf43926 was written'
    """
    nbytes, crc = 0, 0
    try:
        for piece in location.stream(record.key):
            nbytes, crc = nbytes + len(piece), zlib.crc32(piece, crc)
    except MissingObjectError:
        return "is missing"
    if nbytes != record.nbytes:
        return f"has {nbytes} bytes; {record.nbytes} were written"
    found = _named(crc)
    return None if found == record.checksum else f"has {found}; {record.checksum} was written"


# -- act one: the template ----------------------------------------------------------------
def create(
    location: Location,
    arrays: Mapping[str, ArrayTemplate],
    *,
    coordinates: Mapping[str, np.ndarray[Any, Any]],
    attributes: Mapping[str, Any],
) -> None:
    """Write the metadata of an empty store, and its index arrays whole.

    Parameters
    ----------
    location : Location
        Where no Zarr group is yet.
    arrays : mapping of str to ArrayTemplate
        What :func:`write_region` will fill.
    coordinates : mapping of str to numpy array
        1-D index arrays, named after the dimensions they label: numbers or strings.
    attributes : mapping
        JSON attributes of the group.

    Raises
    ------
    DataError
        Where an index array is not 1-D, not of numbers or strings, or does not fit its dimension.
    StoreError
        Where a group is there already, or the store cannot be written.
    """
    indices = {name: _index_array(name, ids, arrays) for name, ids in coordinates.items()}
    if location.exists("zarr.json"):
        raise StoreError(
            f"{location.url} already holds a Zarr group; resume it, delete it or pass another URL"
        )
    marks: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    labels = sorted(name for name, template in arrays.items() if template.coordinate)
    if labels:
        marks["coordinates"] = " ".join(labels)  # where xarray looks for coordinates that are no index
    with store_errors(location, "create"):
        # all at once: zarr's own thread is waited for a single time
        sync(_create(location.zarr(), arrays, indices, {**attributes, **marks}))


async def _create(
    store: Store,
    arrays: Mapping[str, ArrayTemplate],
    indices: Mapping[str, np.ndarray[Any, Any]],
    attributes: Mapping[str, Any],
) -> None:
    group = await zarr.AsyncGroup.from_store(StorePath(store), attributes=dict(attributes))
    for name, ids in indices.items():
        await create_index(group, name, ids)
    for name, template in arrays.items():
        await create_array(group, name, template)


async def create_array(group: zarr.AsyncGroup, name: str, template: ArrayTemplate) -> zarr.AsyncArray[Any]:
    """Write the metadata of one tiled array: Blosc lz4 with bit shuffle, then CRC-32C."""
    inner = inner_chunk(template.tile, template.dtype.itemsize)
    return await group.create_array(
        name,
        shape=template.shape,
        chunks=inner,
        shards=None if inner == template.tile else template.tile,
        dtype=template.dtype,
        fill_value=fill_of(template.dtype),
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
        dimension_names=template.dims,
        attributes=dict(template.attrs),
    )


async def create_index(group: zarr.AsyncGroup, name: str, ids: np.ndarray[Any, Any]) -> None:
    """Write a 1-D index array whole, in one chunk."""
    # Fixed-length strings have no stable Zarr v3 type; variable-length ones do.
    dtype = "str" if ids.dtype.kind in "UT" else ids.dtype
    array = await group.create_array(
        name, shape=ids.shape, chunks=ids.shape, dtype=dtype, dimension_names=(name,)
    )
    await array.setitem(slice(None), ids)


def inner_chunk(tile: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Chunk of a tile: the tile itself up to 16 MiB, else a slab of about 2 MiB that divides it.

    Leading axes are cut first, so that a slab is contiguous.

    >>> inner_chunk((512, 1024), 4), inner_chunk((4096, 4096), 4), inner_chunk((2, 4_000_000), 4)
    ((512, 1024), (128, 4096), (1, 500000))
    """
    if math.prod(tile) * itemsize <= LARGEST_CHUNK:
        return tile
    inner = list(tile)
    for axis, extent in enumerate(tile):
        row = math.prod(inner) // extent * itemsize
        inner[axis] = max((d for d in _divisors(extent) if d * row <= INNER_CHUNK), default=1)
        if math.prod(inner) * itemsize <= INNER_CHUNK:
            break
    return tuple(inner)


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in small]


def fill_of(dtype: np.dtype[Any]) -> Any:
    """What stands where nothing is: NaN, −1, an empty text, or 0."""
    return {"f": math.nan, "i": -1, "T": ""}.get(dtype.kind, dtype.type(0))


def _index_array(
    name: str, ids: np.ndarray[Any, Any], arrays: Mapping[str, ArrayTemplate]
) -> np.ndarray[Any, Any]:
    ids = np.asarray(ids)
    if ids.dtype.kind == "O" and all(isinstance(i, str) for i in ids.flat):
        ids = ids.astype(str)
    if ids.ndim != 1 or ids.dtype.kind not in "iufUT":
        raise DataError(
            f"ids of {name!r} must be a 1-D array of numbers or strings; got {ids.ndim} axes of {ids.dtype}"
        )
    extents = {t.shape[t.dims.index(name)] for t in arrays.values() if name in t.dims}
    if extents - {len(ids)}:
        raise DataError(f"ids of {name!r} has {len(ids)} entries; the dimension has {max(extents)}")
    return ids


# -- act two: region writes ---------------------------------------------------------------
class _Recorder(WrapperStore[Store]):
    """Notes length and checksum of every object that zarr writes, and never reads a tile back.

    Without the second part zarr reads the old object whenever a tile at the edge of the
    array is written again, and a corrupt one could not be replaced.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.records: list[ShardRecord] = []

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        return None

    async def set(self, key: str, value: Buffer) -> None:
        await self._store.set(key, value)
        data = value.as_numpy_array().data
        self.records.append(ShardRecord(key, data.nbytes, checksum(data)))


def write_region(
    location: Location, array: str, start: tuple[int, ...], block: np.ndarray[Any, Any]
) -> list[ShardRecord]:
    """Write whole tiles of one array, and say what bytes were stored under which name.

    Any number of processes may write different tiles; writing a tile again replaces it.

    Parameters
    ----------
    location : Location
        A store made by :func:`create`.
    array : str
        Name of the array.
    start : tuple of int
        First entry of the block, on a tile boundary along every axis.
    block : numpy array
        Values up to the next tile boundary or the end of the array along every axis.

    Returns
    -------
    list of ShardRecord
        One for each tile, sorted by key.

    Raises
    ------
    ValueError
        Where the block cuts a tile, or its dtype does not fit that of the array.
    StoreError
        Where the array is missing or the store cannot be written; names the tile.
    """
    metadata = _array_metadata(location.get(f"{array}/zarr.json"))
    block = np.ascontiguousarray(block)
    tiles = _tiles_covered(metadata, array, start, block)
    recorder = _Recorder(location.zarr())
    target = zarr.Array(zarr.AsyncArray(metadata, StorePath(recorder, array), config=_ZARR_CONFIG))
    region = tuple(slice(a, a + n) for a, n in zip(start, block.shape, strict=True))
    with store_errors(location, f"write {array}{list(start)} to"):
        target[region] = block
    if len(recorder.records) != tiles:
        raise StoreError(
            f"{len(recorder.records)} of {tiles} tiles of {array}{list(start)} reached {location.url}"
        )
    return sorted(recorder.records, key=lambda record: record.key)


def read_index(location: Location, name: str, positions: Iterable[int]) -> dict[int, Any]:
    """Ids at some positions of an index array, as Python numbers or strings."""
    with store_errors(location, f"read {name!r} from"):
        ids = np.asarray(zarr.open_array(location.zarr(), path=name, mode="r")[:]).tolist()
    return {position: ids[position] for position in positions}


@lru_cache(maxsize=64)
def _array_metadata(stored: bytes) -> ArrayV3Metadata:
    # Cached by content, not by URL: a store may be deleted and made anew with another layout.
    return ArrayV3Metadata.from_dict(json.loads(stored))


def _tiles_covered(
    metadata: ArrayV3Metadata, array: str, start: tuple[int, ...], block: np.ndarray[Any, Any]
) -> int:
    """Number of tiles in a block that must consist of whole ones."""
    shape, tile = metadata.shape, metadata.chunk_grid.chunk_shape  # type: ignore[attr-defined]
    if len(start) != len(shape) or block.ndim != len(shape):
        raise ValueError(f"{array} has {len(shape)} axes; got start {start} and a block of {block.shape}")
    for first, size, extent, step in zip(start, block.shape, shape, tile, strict=True):
        stop = first + size
        if (
            size < 1
            or first < 0
            or first % step
            or not (stop == extent or (stop % step == 0 and stop < extent))
        ):
            raise ValueError(
                f"a block of {block.shape} at {start} cuts the tiles of {array}: shape {shape}, tile {tile}"
            )
    stored = metadata.data_type.to_native_dtype()
    if not np.can_cast(block.dtype, stored, "same_kind"):
        raise ValueError(f"{array} holds {stored}; a block of {block.dtype} does not fit")
    return math.prod(-(-size // step) for size, step in zip(block.shape, tile, strict=True))


# -- act three: finish, and read ----------------------------------------------------------
def finish(location: Location, attributes: Mapping[str, Any], *, again: bool = False) -> None:
    """Add attributes to the group and write its consolidated metadata; done last of all.

    One object is written. ``again`` leaves out what an earlier end has added.
    """
    with store_errors(location, "finish"):
        keys = [f"{folder}/{GROUP_KEY}" for folder in location.folders()]
        held = sorted(location.get_many(keys).items())  # _run holds none: it is no array
        found = location.get(GROUP_KEY)
    group = json.loads(unfinished(found) if again else found)
    group["attributes"] = {**group.get("attributes", {}), **attributes}
    group["consolidated_metadata"] = {
        "kind": "inline",
        "must_understand": False,
        "metadata": {key.removesuffix(f"/{GROUP_KEY}"): json.loads(data) for key, data in held},
    }
    location.put(GROUP_KEY, json.dumps(group, indent=2).encode())


def unfinished(group: bytes) -> bytes:
    """Metadata of the group without what :func:`finish` added to them.

    Raises
    ------
    ValueError
        They are not a JSON object.
    """
    held = json.loads(group)
    if not isinstance(held, dict) or not isinstance(held.get("attributes", {}), dict):
        raise ValueError("metadata of a group are a JSON object, and so are its attributes")
    held.pop("consolidated_metadata", None)
    for name in FINISHED:
        held.get("attributes", {}).pop(name, None)
    return json.dumps(held, indent=2).encode()


def open_influences(store: Any, storage_options: Mapping[str, Any] | None = None) -> xr.Dataset:
    """Open a store of scores, factors or reductions lazily.

    Parameters
    ----------
    store : path, URL or Location
        What ``influences_to_zarr`` wrote.
    storage_options : mapping, optional
        Credentials and client settings.

    Returns
    -------
    xarray.Dataset
        Dask-backed arrays with the ids as coordinates. Tiles of an unfinished run read as NaN, and an
        :class:`~dask_influence.errors.InfluenceWarning` says so.

    Raises
    ------
    StoreError
        Where nothing is there, or the group was not written by this package.

    Examples
    --------
    >>> location = Location.of("memory://results-example")
    >>> scores = ArrayTemplate(("test", "train"), (1, 3), (1, 2), np.dtype("float32"))
    >>> create(location, {"influence": scores}, coordinates={"train": np.array(["a", "b", "c"])},
    ...        attributes={"lambda": 0.1})
    >>> records = write_region(location, "influence", (0, 0), np.float32([[1, 2, 3]]))
    >>> [record.key for record in records]
    ['influence/c/0/0', 'influence/c/0/1']
    >>> finish(location, {"state": "complete"})
    >>> open_influences(location).influence.sel(train="b").values.tolist()
    [2.0]
    """
    location = Location.of(store, storage_options)
    attributes = _group_attributes(location)
    if attributes.get("format") != FORMAT:
        raise StoreError(
            f"{location.url} is a Zarr group that dask_influence did not write; open it with xarray.open_zarr"
        )
    run = _run_record(location, attributes)
    state = run.get("state")
    if state == "incomplete":
        warnings.warn(
            f"{location.url} lacks {described(run.get('missing', {}))}; what belongs to them reads as NaN, or is "
            "left out of a reduction",
            InfluenceWarning,
            stacklevel=2,
        )
    elif state != "complete":
        warnings.warn(
            f"{location.url} is not complete (state {state!r}): missing tiles read as NaN. "
            "Run the same call again to resume it",
            InfluenceWarning,
            stacklevel=2,
        )
    with store_errors(location, "open"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ZarrUserWarning)
        # another client that finishes the same run may be consolidating at this moment
        warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated", RuntimeWarning)
        how: dict[str, Any] = {"consolidated": None if state in FINAL else False}
        # A lazy array in this process's memory must not be computed by a cluster, which finds nothing there.
        if location.in_process:
            return xr.open_zarr(location.zarr(), chunks=None, **how)
        try:
            return xr.open_zarr(location.zarr(), chunks="auto", **how)
        except NotImplementedError:  # dask cannot tell how many bytes a string takes
            return _chunked(location, how)


def _chunked(location: Location, how: Mapping[str, Any]) -> xr.Dataset:
    """With dask arrays, of chunks that are multiples of the stored ones; of texts the stored ones."""
    whole = xr.open_zarr(location.zarr(), chunks={}, **how)
    texts = [name for name, array in whole.data_vars.items() if array.dtype.hasobject]
    found = xr.open_zarr(location.zarr(), chunks="auto", drop_variables=texts, **how)
    return found.assign(whole[texts].variables)


def _group_attributes(location: Location) -> dict[str, Any]:
    try:
        held = _object(location, GROUP_KEY, {"attributes": mapped(anything)})
    except MissingObjectError:
        raise StoreError(
            f"{location.url} holds no Zarr group; check the URL, or write it with influences_to_zarr"
        ) from None
    return dict(held.get("attributes", {}))


def _run_record(location: Location, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return _object(location, RUN_KEY, {"missing": mapped(MISSING)})
    except MissingObjectError:
        return attributes


def _object(location: Location, key: str, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    try:
        held = json.loads(location.get(key))
    except (ValueError, RecursionError) as error:
        raise CorruptStoreError(f"{key!r} of {location.url} is not JSON: {error}") from None
    if not isinstance(held, dict):
        raise CorruptStoreError(f"{key!r} of {location.url} is not a JSON object")
    wrong = misshapen(held, shapes)
    if wrong:
        raise CorruptStoreError(f"{key!r} of {location.url} is damaged: look at its {', '.join(wrong)}")
    return held


def described(missing: Mapping[str, Sequence[Mapping[str, Any]]], most: int = 10) -> str:
    """Samples without results, for people: at most so many by name.

    >>> described({"train": [{"sample": 3, "id": "image 3", "reason": "its x holds NaN or inf"}], "test": []})
    "train sample 3 (id 'image 3'): its x holds NaN or inf"
    """
    lines = [
        f"{side} sample {one['sample']}" + _id_of(one) + f": {one['reason']}"
        for side, ones in missing.items()
        for one in ones
    ]
    more = f"; and {len(lines) - most:,} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def _id_of(one: Mapping[str, Any]) -> str:
    return "" if one["id"] == one["sample"] else f" (id {one['id']!r})"
