"""Encoding: chunks and shards as Zarr v3 lays them out, encoded and decoded in the calling thread.

zarr takes a chunk through some thirty steps of an event loop in a thread of its own, which takes longer than
compressing a MiB does. Arrays whose codecs are not known here are left to it.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.zstd import Zstd
from zarr.abc.codec import Codec
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata

_ABSENT = 2**64 - 1
"""Offset and length of a chunk that a shard does not hold."""

_SHUFFLES = {"noshuffle": 0, "shuffle": 1, "bitshuffle": 2}
_CHECKSUM_BYTES = 4
_BLOSC_SIZES = slice(4, 8), slice(12, 16)
"""Where the header of Blosc says how many bytes were compressed, and how long it is with them."""


class _Compressor(Protocol):
    def encode(self, data: Any) -> bytes: ...

    def decode(self, data: Any) -> bytes: ...


@dataclass(frozen=True)
class Layout:
    """How the objects of one array hold its chunks.

    Attributes
    ----------
    metadata : ArrayV3Metadata
        Of the array.
    stored : tuple of int
        Entries of one object, a chunk or a shard.
    chunk : tuple of int
        Entries of one chunk; of a shard there are several.
    compressor : Blosc, Zstd or None
        Of a chunk.
    checked : bool
        Whether a chunk ends with its CRC-32C.
    """

    metadata: ArrayV3Metadata
    stored: tuple[int, ...]
    chunk: tuple[int, ...]
    compressor: _Compressor | None
    checked: bool

    @classmethod
    def of(cls, metadata: object) -> Layout | None:
        """The layout that these metadata of an array describe, where it is known here."""
        if not isinstance(metadata, ArrayV3Metadata):
            return None
        dtype, stored = metadata.data_type.to_native_dtype(), getattr(metadata.chunk_grid, "chunk_shape", ())
        if dtype.kind not in "biuf" or not dtype.isnative or sys.byteorder != "little" or not stored:
            return None
        codecs: Sequence[Codec] = metadata.codecs
        chunk = tuple(stored)
        if isinstance(codecs[0], ShardingCodec) and len(codecs) == 1:
            sharding = codecs[0]
            if sharding.index_location.value != "end" or _known(sharding.index_codecs) != (None, True):
                return None
            chunk, codecs = tuple(sharding.chunk_shape), sharding.codecs
        found = _known(codecs)
        return None if found is None else cls(metadata, tuple(stored), chunk, *found)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the entries."""
        return self.metadata.data_type.to_native_dtype()

    @property
    def sharded(self) -> bool:
        """Whether an object holds several chunks and ends with their index."""
        return isinstance(self.metadata.codecs[0], ShardingCodec)

    # -- writing ----------------------------------------------------------------------
    def objects(self, start: Sequence[int], block: np.ndarray[Any, Any]) -> Iterator[tuple[str, bytes]]:
        """Key, below the array, and bytes of each object of ``block``, which consists of whole ones."""
        for low, high in _boxes(self.stored, start, block.shape):
            place = tuple(a // n for a, n in zip(low, self.stored, strict=True))
            inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
            yield self.metadata.encode_chunk_key(place), self._object(block[inside])

    def _object(self, block: np.ndarray[Any, Any]) -> bytes:
        """One object, of which ``block`` is what lies within the array."""
        if not self.sharded:
            return b"".join(self._encoded(block))
        index = np.full((*self._grid, 2), _ABSENT, "<u8")
        parts: list[bytes] = []
        offset = 0
        for low, high in _boxes(self.chunk, (0,) * block.ndim, block.shape):
            encoded = self._encoded(block[tuple(map(slice, low, high))])
            length = sum(map(len, encoded))
            index[tuple(a // n for a, n in zip(low, self.chunk, strict=True))] = offset, length
            parts, offset = [*parts, *encoded], offset + length
        tail = index.tobytes()
        return b"".join([*parts, tail, _checksum(tail)])

    def _encoded(self, block: np.ndarray[Any, Any]) -> list[bytes]:
        """A chunk, of which ``block`` is what lies within the array; the rest is the fill value."""
        if block.shape != self.chunk:
            whole = np.full(self.chunk, self.metadata.fill_value, self.dtype)
            whole[tuple(map(slice, block.shape))] = block
            block = whole
        block = np.ascontiguousarray(block, self.dtype)
        data = block.tobytes() if self.compressor is None else self.compressor.encode(block)
        return [data, _checksum(data)] if self.checked else [data]

    # -- reading ----------------------------------------------------------------------
    def read(self, folder: Path, start: int, stop: int) -> np.ndarray[Any, Any]:
        """Entries ``start`` to ``stop`` of the leading axis, of an array of this host's files.

        Raises
        ------
        ValueError, RuntimeError
            What is stored cannot be decoded.
        """
        shape = (stop - start, *self.metadata.shape[1:])
        origin = (start, *(0 for _ in shape[1:]))
        found: np.ndarray[Any, Any] = np.empty(shape, self.dtype)
        for low, high in _boxes(self.stored, origin, shape):
            place = tuple(a // n for a, n in zip(low, self.stored, strict=True))
            inside = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, origin, strict=True))
            begin = tuple(p * n for p, n in zip(place, self.stored, strict=True))
            within = tuple(a - b for a, b in zip(low, begin, strict=True))
            try:
                with open(folder / self.metadata.encode_chunk_key(place), "rb", buffering=0) as file:
                    self._fill(found[inside], file.fileno(), within)
            except FileNotFoundError:
                found[inside] = self.metadata.fill_value
        return found

    def _fill(self, part: np.ndarray[Any, Any], file: int, within: Sequence[int]) -> None:
        """What ``part``, which begins ``within`` an object, holds of its chunks."""
        index = self._index(file) if self.sharded else None
        for low, high in _boxes(self.chunk, within, part.shape):
            place = tuple(a // n for a, n in zip(low, self.chunk, strict=True))
            wanted = part[tuple(slice(a - w, b - w) for a, b, w in zip(low, high, within, strict=True))]
            offset, length = (0, os.fstat(file).st_size) if index is None else map(int, index[place])
            if offset == _ABSENT:
                wanted[...] = self.metadata.fill_value
                continue
            data = os.pread(file, length, offset)
            if wanted.shape == self.chunk and wanted.flags.c_contiguous:
                self._decode(data, wanted)
                continue
            whole = np.empty(self.chunk, self.dtype)
            self._decode(data, whole)
            first = tuple(a % n for a, n in zip(low, self.chunk, strict=True))
            wanted[...] = whole[tuple(slice(a, a + n) for a, n in zip(first, wanted.shape, strict=True))]

    def _index(self, file: int) -> np.ndarray[Any, Any]:
        grid = self._grid
        length = 16 * prod(grid) + _CHECKSUM_BYTES
        tail = os.pread(file, length, max(0, os.fstat(file).st_size - length))
        return np.frombuffer(_verified(tail), "<u8").reshape(*grid, 2)

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(s // c for s, c in zip(self.stored, self.chunk, strict=True))

    def _decode(self, data: bytes, out: np.ndarray[Any, Any]) -> None:
        """A whole chunk."""
        held = _verified(data) if self.checked else memoryview(data)
        if isinstance(self.compressor, Blosc):
            if [int.from_bytes(held[part], "little") for part in _BLOSC_SIZES] != [out.nbytes, len(held)]:
                raise ValueError(f"it is not what Blosc makes of {out.nbytes} bytes")
            self.compressor.decode(held, out)  # without a copy
            return
        raw = held if self.compressor is None else self.compressor.decode(held)
        out[...] = np.frombuffer(raw, self.dtype).reshape(out.shape)


def _known(codecs: Iterable[Codec]) -> tuple[_Compressor | None, bool] | None:
    """Compressor, and whether a checksum follows; None where there is any other codec or order."""
    compressor: _Compressor | None = None
    checked = False
    for place, codec in enumerate(codecs):
        match codec:
            case BytesCodec() if place == 0 and (codec.endian is None or codec.endian.value == "little"):
                pass
            case BloscCodec() if place == 1:
                shuffle = _SHUFFLES[codec.shuffle.value]
                compressor = Blosc(codec.cname.value, codec.clevel, shuffle, codec.blocksize)
            case ZstdCodec() if place == 1:
                compressor = Zstd(codec.level, codec.checksum)
            case Crc32cCodec() if place > 0 and not checked:
                checked = True
            case _:
                return None
    return compressor, checked


def _boxes(
    size: Sequence[int], start: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """First and last corners of the box at ``start``, cut where a grid of boxes of ``size`` cuts it."""
    cuts = [
        [a, *range((a // step + 1) * step, a + length, step), a + length]
        for step, a, length in zip(size, start, shape, strict=True)
    ]
    for sides in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
        low, high = zip(*sides, strict=True)
        yield low, high


def _checksum(data: Any) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(_CHECKSUM_BYTES, "little")


def _verified(data: bytes) -> memoryview:
    """What comes before the checksum at the end of ``data``, and fits it."""
    held = memoryview(data)[:-_CHECKSUM_BYTES]
    if _checksum(np.frombuffer(held, np.uint8)) != data[-_CHECKSUM_BYTES:]:
        raise ValueError("its checksum does not fit")
    return held
