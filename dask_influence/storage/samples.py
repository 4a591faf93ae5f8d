"""Samples by range: what every data source is, whatever container the data came in.

A data set is a pair ``(x, y)``; each is one array, or a tuple or mapping of arrays (nested
where need be) that share the leading sample axis. Everything leaves here as numpy.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import optree
import torch

from dask_influence.errors import DataError
from dask_influence.grid import Chunks

Tree = Any
"""An array, or a tuple or mapping of arrays that share one leading sample axis."""

Pair = Any
"""``(x, y)``, a tuple of two trees."""

DIGEST_BLOCK = 16 * 2**20
"""Bytes hashed at a time; fixed, because the digest depends on where blocks begin."""

HASHERS = 2
"""Blocks that are hashed at once, beside one that is read: hashing leaves the interpreter to others."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a sample: its shape without the leading axis, and its dtype.

    >>> ArraySpec((3, 2), np.dtype("float32")).nbytes
    24
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Source(ABC):
    """Samples of one data set, readable by range.

    Parameters
    ----------
    length : int
        Number of samples.
    spec : (Tree, Tree)
        :class:`ArraySpec` leaves in the structure of x and y.
    chunk_size : int or None
        Samples that are natural to read at once: a loader's batch, an array's chunks.
    argument : str
        What the caller's parameter is called; begins every error.
    """

    portable: bool = False
    """Whether another process can read the samples by itself, from the pickle of this source."""

    held: bool = False
    """Whether the samples are in this process, so that to read them starts no threads or processes of others."""

    def __init__(self, length: int, spec: Pair, chunk_size: int | None, argument: str) -> None:
        self.spec = spec
        self.chunk_size = chunk_size
        self._length = length
        self.argument = argument
        self._digest: str | None = None

    @final
    def __len__(self) -> int:
        return self._length

    @property
    @final
    def nbytes_per_sample(self) -> int:
        """Bytes of one sample, x and y together."""
        return sum(leaf.nbytes for leaf in optree.tree_leaves(self.spec))

    @final
    def read(self, start: int, stop: int) -> Pair:
        """Samples ``start`` to ``stop`` as writable, contiguous numpy arrays.

        Raises
        ------
        IndexError
            Where the range is empty or leaves the data.
        DataError
            Where what was read is not what the data said of itself: shapes, dtypes, structure.
        """
        if not 0 <= start < stop <= self._length:
            raise IndexError(f"{self.argument}: samples {start} to {stop} of {self._length}")
        tree = self._read(start, stop)
        self._verify(tree, start, stop)
        return optree.tree_map(_usable, tree)

    @final
    def digest(self) -> str:
        """Digest of the content; equal content has an equal digest in every kind of source.

        A Zarr group is the exception: its digest is that of its listing (names, sizes, versions), so that
        its data need not be read, unless it was staged by this package from another source.

        Raises
        ------
        DataError
            Where a sample that is read for it holds NaN or inf, or is shaped unlike the others.
        """
        if self._digest is None:
            self._digest = self._content_digest()
        return self._digest

    @abstractmethod
    def _read(self, start: int, stop: int) -> Pair:
        """The samples, as numpy arrays of the announced structure."""

    def _content_digest(self) -> str:
        return self._combined_digest(self._digests())

    def _digests(self) -> Iterator[bytes]:
        """Of blocks that are read here while those before are hashed."""
        blocks = self._digest_blocks()
        with ThreadPoolExecutor(min(HASHERS, len(blocks))) as pool:
            hashed: deque[Future[bytes]] = deque()
            for block in blocks:
                if len(hashed) == HASHERS:
                    yield hashed.popleft().result()
                held = self._read(block.start, block.stop)
                hashed.append(pool.submit(checked_digest, held, self.argument, block.start))
            yield from (one.result() for one in hashed)

    def wait(self, stop: int) -> None:
        """Return when samples before ``stop`` can be read: at once, unless they are being brought here."""
        assert 0 <= stop <= self._length

    def write(self, arrays: Pair, rows: int, reached: Callable[[int], None]) -> None:
        """Copy all samples into arrays that are indexed like numpy's, ``rows`` samples at a time.

        ``reached`` is told before which sample all are written.
        """
        targets = optree.tree_leaves(arrays)
        for piece in Chunks(self._length, rows):
            leaves = optree.tree_leaves(self.read(piece.start, piece.stop))
            for target, leaf in zip(targets, leaves, strict=True):
                target[piece.start : piece.stop] = leaf
            reached(piece.stop)

    @final
    def _digest_blocks(self) -> Chunks:
        return Chunks(self._length, max(1, DIGEST_BLOCK // self.nbytes_per_sample))

    @final
    def _combined_digest(self, blocks: Iterable[bytes]) -> str:
        paths = [[*map(str, path)] for path in optree.tree_paths(self.spec)]
        shapes = [(leaf.dtype.str, leaf.shape) for leaf in optree.tree_leaves(self.spec)]
        digest = hashlib.blake2b(json.dumps([self._length, paths, shapes]).encode(), digest_size=16)
        for block in blocks:
            digest.update(block)
        return digest.hexdigest()

    @final
    def _verify(self, tree: Pair, start: int, stop: int) -> None:
        if optree.tree_structure(tree) != optree.tree_structure(self.spec):
            raise DataError(
                f"{self.argument}: samples {start} to {stop} are structured otherwise than sample 0; "
                "every sample needs the same arrays under the same names"
            )
        for path, leaf, spec in zip(
            optree.tree_paths(tree), optree.tree_leaves(tree), optree.tree_leaves(self.spec), strict=True
        ):
            if leaf.shape != (stop - start, *spec.shape) or leaf.dtype != spec.dtype:
                raise DataError(
                    f"{self.argument}: {leaf_name(path)} of samples {start} to {stop} is {leaf.dtype} of "
                    f"shape {leaf.shape}; expected {spec.dtype} of shape {(stop - start, *spec.shape)}. "
                    "Every sample needs the same shape and dtype: pad or crop to a fixed one"
                )


def _usable(leaf: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # torch.from_numpy refuses negative strides and warns of read-only memory.
    return np.require(leaf, requirements=("C", "W"))


def digest_block(leaves: Iterable[np.ndarray[Any, Any]]) -> bytes:
    """Digest of the same samples in every array, one after the other."""
    digest = hashlib.sha256()  # processors have instructions for it: twice as fast as blake2b
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.digest()


def checked_digest(block: Pair, argument: str, start: int) -> bytes:
    """:func:`digest_block` of finite samples: whoever reads all the data may as well look at them."""
    check_finite(block, argument, start)
    return digest_block(optree.tree_leaves(block))


# -- structure ----------------------------------------------------------------------------
def as_pair(data: Any, argument: str) -> tuple[Any, Any]:
    """``data`` as ``(x, y)``.

    Raises
    ------
    DataError
        Where it is anything but a tuple or list of two.
    """
    if isinstance(data, tuple | list) and len(data) == 2:
        return data[0], data[1]
    arrived = f"{type(data).__name__} of {len(data)}" if isinstance(data, tuple | list) else _described(data)
    raise DataError(
        f"{argument} must be a pair (x, y), where each is an array or a tuple or mapping of arrays; "
        f"got {arrived}"
    )


def _described(data: Any) -> str:
    if isinstance(data, Mapping):
        return f"mapping with {', '.join(map(repr, data))}"
    return type(data).__name__


def arranged(tree: Any, leaf: Callable[[Any, str], Any], name: str, argument: str) -> Tree:
    """Plain tuples and dicts with ``leaf(value, name)`` at their ends.

    Raises
    ------
    DataError
        Where a mapping's key is not a string, or a container is empty.
    """
    if isinstance(tree, Mapping):
        if not tree or not all(isinstance(key, str) for key in tree):
            raise DataError(f"{argument}: {name} must have names that are strings; got {_described(tree)}")
        return {key: arranged(value, leaf, f"{name}[{key!r}]", argument) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        if not tree:
            raise DataError(f"{argument}: {name} holds no array")
        return tuple(arranged(value, leaf, f"{name}[{i}]", argument) for i, value in enumerate(tree))
    return leaf(tree, name)


def leaf_name(path: tuple[Any, ...]) -> str:
    """``x['mask']`` for the path ``(0, 'mask')`` in a pair (x, y).

    >>> leaf_name((1,)), leaf_name((0, "mask", 2))
    ('y', "x['mask'][2]")
    """
    return "xy"[path[0]] + "".join(f"[{key!r}]" for key in path[1:])


def as_numpy(value: Any, name: str, argument: str) -> np.ndarray[Any, Any]:
    """A tensor or array-like as numpy: detached, on the CPU, bfloat16 as float32, native byte order.

    Raises
    ------
    DataError
        Where it is no array, or numpy has no such layout or dtype.
    """
    if isinstance(value, torch.Tensor):
        try:
            value = value.detach().cpu()  # refused of a tensor on the meta device
            return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"{argument}: {name} is a tensor of {value.dtype} and {value.layout}, which numpy cannot "
                f"hold ({error}); pass a dense tensor of a usual dtype"
            ) from error
    if not isinstance(value, np.ndarray | np.generic) and not callable(getattr(value, "__array__", None)):
        raise DataError(f"{argument}: {name} must be an array; got {type(value).__name__}")
    return native(np.asarray(value))


def native(array: Any) -> Any:
    """A numpy or dask array in the byte order of this machine, which is the only one torch takes."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def spec_of(pair: Pair, argument: str) -> tuple[int, Pair]:
    """Number of samples and :class:`ArraySpec` leaves of arrays that fit together.

    ``pair`` holds anything with ``shape`` and ``dtype``: numpy, dask and Zarr arrays.

    Raises
    ------
    DataError
        Where an array has no sample axis, no entries, or a dtype that no tensor has, or where
        lengths differ (every length is quoted).
    """
    paths, leaves = optree.tree_paths(pair), optree.tree_leaves(pair)
    for path, leaf in zip(paths, leaves, strict=True):
        _check_leaf(leaf, leaf_name(path), argument)
    lengths = {leaf_name(path): int(leaf.shape[0]) for path, leaf in zip(paths, leaves, strict=True)}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise DataError(f"{argument}: x and y must have the same number of samples; {found}")
    return next(iter(lengths.values())), optree.tree_map(_spec_of_leaf, pair)


def _spec_of_leaf(leaf: Any) -> ArraySpec:
    return ArraySpec(tuple(map(int, leaf.shape[1:])), np.dtype(leaf.dtype).newbyteorder("="))


def _check_leaf(leaf: Any, name: str, argument: str) -> None:
    dtype = np.dtype(leaf.dtype)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataError(
            f"{argument}: {name} has dtype {dtype}; only floating point, integer and bool arrays can be used"
        )
    if len(leaf.shape) == 0:
        raise DataError(f"{argument}: {name} is a single number; it needs a leading axis of samples")
    if 0 in leaf.shape:
        raise DataError(f"{argument}: {name} is empty (shape {tuple(leaf.shape)})")


def check_finite(tree: Pair, argument: str, start: int = 0) -> None:
    """Refuse NaN and inf in a pair (x, y) of numpy arrays whose first sample is number ``start``.

    Raises
    ------
    DataError
        Names the argument, the array and the first sample that is not finite.

    Examples
    --------
    >>> check_finite((np.array([0.0, np.nan]), np.array([1, 2])), "train", start=10)
    Traceback (most recent call last):
    dask_influence.errors.DataError: train: x of sample 11 holds NaN or inf; clean or drop that sample
    """
    for sample, name in non_finite(tree).items():
        raise DataError(
            f"{argument}: {name} of sample {start + sample} holds NaN or inf; clean or drop that sample"
        )


def non_finite(tree: Pair) -> dict[int, str]:
    """Positions of the samples that hold NaN or inf, and the array that does.

    Examples
    --------
    >>> non_finite((np.array([0.0, np.nan, 1.0]), np.array([1, 2, 3])))
    {1: 'x'}
    """
    found: dict[int, str] = {}
    for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
        if leaf.dtype.kind == "f" and not _surely_finite(leaf):
            finite = np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)
            found = {int(sample): leaf_name(path) for sample in np.flatnonzero(~finite)} | found
    return found


def _surely_finite(leaf: np.ndarray[Any, Any]) -> bool:
    # One sum without a temporary; it may overflow, which only sends us to the full check.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(leaf.sum()))


def regular_size(sizes: Iterable[int]) -> int | None:
    """The common size of consecutive pieces of which only the last is smaller, else None.

    >>> regular_size((4, 4, 3)), regular_size((4, 3, 4))
    (4, None)
    """
    held = list(map(int, sizes))
    return held[0] if set(held[:-1]) <= {held[0]} and held[-1] <= held[0] else None
