"""Zarr groups as data: reading samples from one, and staging any source as one.

The layout is one array ``x`` and one array ``y``, or a group of arrays in their place:
``x/input_ids``, ``x/mask`` for a mapping, ``x/0``, ``x/1`` for a tuple.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, Self

import numpy as np
import optree
import zarr
import zict
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, ContainsGroupError

from dask_influence.errors import CorruptStoreError, DataError, StoreError
from dask_influence.storage.samples import ArraySpec, Pair, Source, Tree, leaf_name, native, spec_of
from dask_influence.storage.stores import Location, store_errors

STAGED_SHARD = 16 * 2**20
"""Bytes of staged samples that are written at once, and whose small or many chunks are one stored object."""

OWN_OBJECT, MOST_OBJECTS = 2**19, 4096
"""Bytes from which an array's chunk is an object of its own, and how many of these an array may have.

To write a shard of chunks takes half as long again as to write them one by one.
"""

MOST_CHUNKS, MOST_EXCESS = 16, 2
"""Chunks that are read for what one could hold, and times that a chunk may be larger, before data are staged anew."""

RECENT = 16 * 2**20
"""Bytes of staged samples that a process remembers; batches of a quarter and more are not."""

_CONTAINER = "dask_influence_container"
_DIGEST = "dask_influence_digest"


class ZarrSource(Source):
    """Samples in a Zarr group with ``x`` and ``y``; every process can read them by itself.

    Parameters
    ----------
    location : Location
        The group.
    argument : str
        Begins every error.

    Raises
    ------
    StoreError
        Where no Zarr group is there.
    DataError
        Where it lacks ``x`` or ``y`` (what it holds is named), or its arrays do not fit together.
    """

    def __init__(self, location: Location, argument: str = "data") -> None:
        group = _open_group(location, argument)
        missing = [name for name in "xy" if name not in group]
        if missing:
            held = ", ".join(sorted(group.keys())) or "nothing"
            raise DataError(
                f"{argument}: {location.url} has no {' and no '.join(missing)}; it holds {held}. Name the "
                "arrays x and y (or x/<name> where x is a mapping)"
            )
        self.location = location
        self.portable = not location.in_process
        self._arrays: Any = tuple(_tree_of(group[name], argument) for name in "xy")
        length, spec = spec_of(self._arrays, argument)
        # What the data are called in the store, in their structure: opened again after unpickling.
        self._names = optree.tree_map(lambda array: array.path, self._arrays)
        first = optree.tree_leaves(self._arrays)[0]
        super().__init__(length, spec, min(length, int(first.chunks[0])), argument)
        staged = group.attrs.get(_DIGEST)
        self._by_content = False  # a user's own group may be written to
        self._arriving: _Arriving | None = None
        self._digest = str(staged) if staged is not None else None

    @classmethod
    def staged(cls, location: Location, source: Source, rows: int) -> Self:
        """What :func:`stage` wrote of ``source``, in chunks of so many samples; opened when it is read."""
        self = cls.__new__(cls)
        Source.__init__(self, len(source), source.spec, rows, source.argument)
        self.location, self.portable, self._by_content = location, not location.in_process, True
        self._arrays, self._digest, self._arriving = None, source.digest(), None
        names = ["/".join(("xy"[path[0]], *map(str, path[1:]))) for path in optree.tree_paths(source.spec)]
        self._names = optree.tree_unflatten(optree.tree_structure(source.spec), names)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None, "_arriving": None}

    def wait(self, stop: int) -> None:
        """Return when samples before ``stop`` are there; raises what kept them from being staged."""
        if self._arriving is not None:
            self._arriving.wait(stop)

    def _read(self, start: int, stop: int) -> Pair:
        if not self._by_content:
            return self._decoded(start, stop)
        key = (self.digest(), start, stop)
        try:
            return _RECENT[key]
        except KeyError:
            batch = self._decoded(start, stop)
        leaves = optree.tree_leaves(batch)
        if (stop - start) * self.nbytes_per_sample < RECENT // 4 and all(map(_surely_there, leaves)):
            for leaf in leaves:
                leaf.flags.writeable = False  # who reads it gets a copy
            _RECENT[key] = batch
        return batch

    def _decoded(self, start: int, stop: int) -> Pair:
        with store_errors(self.location, f"read samples {start} to {stop} of"):
            if self._arrays is None:
                group = _open_group(self.location, self.argument)
                self._arrays = optree.tree_map(lambda name: group[name], self._names)
            try:
                leaves, structure = optree.tree_flatten(self._arrays)
                # all at once: zarr's own thread is waited for a single time
                held = sync(_gathered(leaves, slice(start, stop)))
                return optree.tree_unflatten(structure, [native(np.asarray(array)) for array in held])
            except (ValueError, RuntimeError) as error:
                raise CorruptStoreError(
                    f"{self.argument}: samples {start} to {stop} of {self.location.url} cannot be decoded: "
                    f"{error}"
                ) from error

    def _content_digest(self) -> str:
        listing = {key: mark for name in "xy" for key, mark in self.location.stat(name).items()}
        metadata = [key for key in listing if key.rpartition("/")[2] in {"zarr.json", ".zarray", ".zattrs"}]
        contents = {key: data.decode() for key, data in self.location.get_many(sorted(metadata)).items()}
        chunks = {key: mark for key, mark in listing.items() if key not in contents}
        record = json.dumps([contents, chunks], sort_keys=True)
        return hashlib.blake2b(record.encode(), digest_size=16).hexdigest()


_RECENT: zict.LRU[tuple[str, int, int], Pair] = zict.LRU(
    RECENT, {}, weight=lambda _, batch: sum(leaf.nbytes for leaf in optree.tree_leaves(batch))
)
"""Staged samples by content and place: the next query of the same data finds them decoded.

To read a hundred kilobytes takes a worker that computes 10 to 20 ms, most of it turns of the interpreter.
"""


async def _gathered(arrays: Iterable[zarr.Array[Any]], samples: slice) -> list[Any]:
    return await asyncio.gather(*(array.async_array.getitem(samples) for array in arrays))


class _Arriving:
    """How far a staging is that goes on in another thread."""

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._there = 0
        self._failure: BaseException | None = None

    def reached(self, stop: int) -> None:
        """Samples before ``stop`` are there."""
        with self._moved:
            self._there = stop
            self._moved.notify_all()

    def wait(self, stop: int) -> None:
        """Return when samples before ``stop`` are there; raises what ended the staging before."""
        with self._moved:
            self._moved.wait_for(lambda: self._there >= stop or self._failure is not None)
            if self._there < stop and self._failure is not None:
                raise self._failure

    @contextmanager
    def told(self) -> Iterator[None]:
        """Let whoever waits know of what is raised."""
        try:
            yield
        except BaseException as error:
            with self._moved:
                self._failure = error
                self._moved.notify_all()
            raise


def stage(
    source: Source, location: Location, chunk_size: int, beside: ThreadPoolExecutor | None = None
) -> ZarrSource:
    """Write the samples once as a Zarr group below ``location``, from where any process reads them.

    The group is named by content and layout, and marked when it is whole: staging the same
    content again returns at once, also for chunks that those already there serve; a staging that was killed
    is done again, and two at the same time write the same bytes. At most about 16 MiB (or one chunk of
    ``chunk_size`` samples) is held; dask arrays are computed and stored chunk by chunk by dask.

    Parameters
    ----------
    source : Source
        What to copy.
    location : Location
        A folder that may hold other staged data.
    chunk_size : int
        Samples that will be read at once; the chunks of the arrays.
    beside : ThreadPoolExecutor, optional
        Writes them while the caller goes on; :meth:`ZarrSource.wait` says what is there.

    Raises
    ------
    DataError
        Where a name in x or y cannot be the name of an array in Zarr.
    StoreError
        Where the store cannot be written.

    Examples
    --------
    >>> from dask_influence.storage.sources import ArraySource
    >>> source = ArraySource(np.arange(10.0).reshape(5, 2), np.arange(5))
    >>> staged = stage(source, Location.of("memory://staging-example"), chunk_size=2)
    >>> staged.read(1, 3)[1], staged.chunk_size, staged.digest() == source.digest()
    (array([1, 2]), 2, True)
    """
    rows = min(max(1, chunk_size), len(source))
    held = next(_held(location, source.digest(), rows), None)
    if held is not None:
        return ZarrSource.staged(location.child(f"{source.digest()}-{held}"), source, held)
    target = location.child(f"{source.digest()}-{rows}")
    staged = ZarrSource.staged(target, source, rows)
    _check_names(source)
    if beside is None:
        _write(source, target, rows, _Arriving())
    else:
        staged._arriving = _Arriving()
        # the client of a cluster that computes dask arrays is part of the context
        beside.submit(copy_context().run, _write, source, target, rows, staged._arriving)
    return staged


def _write(source: Source, target: Location, rows: int, arriving: _Arriving) -> None:
    chunks = -(-len(source) // rows)
    at_once = min(max(1, STAGED_SHARD // (rows * source.nbytes_per_sample)), chunks)
    with arriving.told(), store_errors(target, "stage samples in"):
        group = _group(target)
        arrays = tuple(
            _created(group, name, tree, len(source), rows, at_once)
            for name, tree in zip("xy", source.spec, strict=True)
        )
        source.write(arrays, rows * at_once, arriving.reached)
        group.update_attributes({_DIGEST: source.digest()})
        arriving.reached(len(source))


def _held(location: Location, digest: str, rows: int) -> Iterator[int]:
    """Chunks, fit to be read ``rows`` samples at a time, in which the content is staged whole; the best first."""
    names = (name.rpartition("-") for name in location.folders())
    sizes = [int(size) for held, _, size in names if held == digest]
    for size in sorted(sizes, key=lambda size: abs(size - rows)):
        fits = rows <= MOST_CHUNKS * size and size <= MOST_EXCESS * rows
        if fits and _is_staged(location.child(f"{digest}-{size}")):
            yield size


def _is_staged(target: Location) -> bool:
    if not target.exists("zarr.json"):
        return False
    return _DIGEST in json.loads(target.get("zarr.json")).get("attributes", {})


def _group(target: Location) -> zarr.Group:
    try:
        return zarr.create_group(target.zarr())
    except ContainsGroupError:  # of a staging that was killed, or goes on elsewhere
        return zarr.open_group(target.zarr(), mode="r+", use_consolidated=False)


def _created(group: zarr.Group, name: str, tree: Tree, length: int, rows: int, in_shard: int) -> Tree:
    """Empty arrays in the structure of ``tree``, ``in_shard`` chunks of ``rows`` an object where those are small."""
    if isinstance(tree, ArraySpec):
        chunk, shard = (rows, *tree.shape), (rows * in_shard, *tree.shape)
        own = math.prod(chunk) * tree.dtype.itemsize >= OWN_OBJECT and -(-length // rows) <= MOST_OBJECTS
        try:
            return group.create_array(
                name,
                shape=(length, *tree.shape),
                chunks=chunk,
                shards=None if own or in_shard == 1 else shard,
                dtype=tree.dtype,
                fill_value=_improbable(tree.dtype),
                config={"write_empty_chunks": True},
                compressors=[BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec()],
            )
        except ContainsArrayError:
            return group[name]
    below = group.require_group(name)
    below.update_attributes({_CONTAINER: "tuple" if isinstance(tree, tuple) else "mapping"})
    if isinstance(tree, tuple):
        return tuple(_created(below, str(i), value, length, rows, in_shard) for i, value in enumerate(tree))
    return {key: _created(below, key, value, length, rows, in_shard) for key, value in tree.items()}


def _improbable(dtype: np.dtype[Any]) -> Any:
    """What a chunk that went missing reads as: refused as data where the dtype allows it, not taken for 0."""
    if dtype.kind == "f":
        return np.nan
    return {"i": np.iinfo(dtype).min, "u": np.iinfo(dtype).max}[dtype.kind] if dtype.kind in "iu" else False


def _surely_there(leaf: np.ndarray[Any, Any]) -> bool:
    """Whether no chunk of it was missing, which would be remembered after it is staged again."""
    if leaf.dtype.kind == "f":
        return not np.isnan(leaf).any()
    return leaf.dtype.kind in "iu" and not (leaf == _improbable(leaf.dtype)).any()


def _check_names(source: Source) -> None:
    for path in optree.tree_paths(source.spec):
        for key in path[1:]:
            name = str(key)
            if not name or "/" in name or name in {".", "..", "zarr.json"} or name.startswith("__"):
                raise DataError(
                    f"{source.argument}: {leaf_name(path)} cannot be stored as {name!r}; rename it"
                )


def _open_group(location: Location, argument: str) -> zarr.Group:
    if not any(location.exists(key) for key in ("zarr.json", ".zgroup")):
        raise StoreError(
            f"{argument}: no Zarr group is at {location.url}; write one with arrays x and y, or check the URL"
        )
    with store_errors(location, "open"):
        return zarr.open_group(location.zarr(), mode="r")


def _tree_of(node: zarr.Array[Any] | zarr.Group, argument: str) -> Tree:
    if isinstance(node, zarr.Array):
        return node
    names = sorted(node.keys())
    if not names:
        raise DataError(f"{argument}: the group {node.path!r} holds no array")
    positions = {str(i) for i in range(len(names))}
    if node.attrs.get(_CONTAINER, "tuple" if positions == set(names) else "mapping") == "tuple":
        return tuple(_tree_of(node[str(i)], argument) for i in range(len(names)))
    return {name: _tree_of(node[name], argument) for name in names}
