"""Chunks and shards encoded and decoded here are those of zarr."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from dask_influence.storage.encoding import Layout

BLOSC = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
CODECS: dict[str, list[Any]] = {
    "none": [],
    "checksum": [Crc32cCodec()],
    "blosc": [BLOSC],
    "blosc and checksum": [BLOSC, Crc32cCodec()],
    "zstd": [ZstdCodec(level=0)],
    "zstd and checksum": [ZstdCodec(level=1), Crc32cCodec()],
}
GRIDS = {
    "one axis": ((11,), (3,), None),
    "ragged": ((7, 10, 3), (2, 4, 3), None),
    "one chunk": ((5, 4), (9, 4), None),
    "sharded": ((13, 5), (2, 5), (6, 5)),
    "sharded along both axes": ((9, 10), (2, 2), (4, 6)),
}
DTYPES = ["float32", "float64", "int64", "uint8", "bool", "float16"]


def _made(folder: Path, grid: str, codecs: str, dtype: str) -> tuple[np.ndarray[Any, Any], Layout]:
    """Values in an empty array of zarr's, and its layout."""
    shape, chunks, shards = GRIDS[grid]
    values = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)
    array = zarr.create_array(
        folder,
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=dtype,
        compressors=CODECS[codecs],
        fill_value=1,
        config={"write_empty_chunks": True},
    )
    layout = Layout.of(array.metadata)
    assert layout is not None
    return values, layout


def _write(folder: Path, layout: Layout, start: tuple[int, ...], block: np.ndarray[Any, Any]) -> None:
    for key, data in layout.objects(start, block):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("grid", GRIDS)
def test_zarr_reads_what_is_encoded(tmp_path: Path, grid: str, codecs: str) -> None:
    values, layout = _made(tmp_path, grid, codecs, "float32")
    step = layout.stored[0]
    for start in range(0, len(values), step):
        _write(tmp_path, layout, (start, *[0] * (values.ndim - 1)), values[start : start + step])
    np.testing.assert_array_equal(zarr.open_array(tmp_path)[:], values)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_are_those_of_zarr_byte_for_byte(tmp_path: Path, codecs: str, dtype: str) -> None:
    values, layout = _made(tmp_path, "ragged", codecs, dtype)
    zarr.open_array(tmp_path, config={"write_empty_chunks": True})[:] = values
    made = dict(layout.objects((0, 0, 0), values))
    assert len(made) == 4 * 3
    assert made == {key: (tmp_path / key).read_bytes() for key in made}


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_zarr_wrote_is_read(tmp_path: Path, grid: str, codecs: str, dtype: str) -> None:
    values, layout = _made(tmp_path, grid, codecs, dtype)
    zarr.open_array(tmp_path)[:] = values
    for start, stop in [(0, len(values)), (2, 5), (3, 4), (len(values) - 1, len(values))]:
        found = layout.read(tmp_path, start, stop)
        assert found.dtype == values.dtype
        np.testing.assert_array_equal(found, values[start:stop])


@pytest.mark.parametrize("grid", ["ragged", "sharded"])
def test_what_is_missing_reads_as_the_fill_value(tmp_path: Path, grid: str) -> None:
    values, layout = _made(tmp_path, grid, "blosc", "float32")
    zarr.open_array(tmp_path)[2:4] = values[2:4]  # the chunks of others, or their shards, are not there
    np.testing.assert_array_equal(layout.read(tmp_path, 0, len(values)), zarr.open_array(tmp_path)[:])
    assert (layout.read(tmp_path, 4, len(values)) == 1).all()


@pytest.mark.parametrize("grid", ["ragged", "sharded"])
@pytest.mark.parametrize("codecs", ["checksum", "blosc and checksum", "zstd and checksum"])
@pytest.mark.parametrize("place", [3, -3, None])
def test_flipped_bytes_and_torn_objects_are_noticed(
    tmp_path: Path, grid: str, codecs: str, place: int | None
) -> None:
    values, layout = _made(tmp_path, grid, codecs, "float32")
    zarr.open_array(tmp_path)[:] = values
    for file in filter(Path.is_file, (tmp_path / "c").rglob("*")):
        data = bytearray(file.read_bytes())
        if place is None:
            del data[len(data) // 2 :]
        else:
            data[place] ^= 4
        file.write_bytes(data)
    with pytest.raises((ValueError, RuntimeError)):
        layout.read(tmp_path, 0, len(values))


def test_chunk_of_another_length_is_noticed(tmp_path: Path) -> None:
    values, layout = _made(tmp_path, "one axis", "blosc", "float32")
    for key, _ in layout.objects((0,), values):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(layout.compressor.encode(np.zeros(2, "float32")))  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="not what Blosc makes of 12 bytes"):
        layout.read(tmp_path, 0, 3)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("float32", {"compressors": [GzipCodec()]}),
        ("float32", {"filters": [zarr.codecs.TransposeCodec(order=(1, 0))]}),
        (">f4", {}),
        ("complex64", {}),
        ("float32", {"zarr_format": 2}),
    ],
    ids=["gzip", "transposed", "big end first", "complex", "format 2"],
)
def test_other_layouts_are_left_to_zarr(tmp_path: Path, dtype: str, how: dict[str, Any]) -> None:
    array = zarr.create_array(tmp_path, shape=(4, 3), chunks=(2, 3), dtype=dtype, **how)
    assert Layout.of(array.metadata) is None
