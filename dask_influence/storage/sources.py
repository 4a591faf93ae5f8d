"""Sources: every kind of data a user may pass, as samples that are read by range.

A new kind is one class here (or in its own file) and one line in :func:`as_source`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
import optree
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)
from zarr.storage import MemoryStore

from dask_influence.errors import DataError, DataWarning
from dask_influence.storage.samples import (
    ArraySpec,
    Pair,
    Source,
    Tree,
    arranged,
    as_numpy,
    as_pair,
    check_finite,
    checked_digest,
    leaf_name,
    native,
    non_finite,
    regular_size,
    spec_of,
)
from dask_influence.storage.staging import ZarrSource, stage
from dask_influence.storage.stores import Location

__all__ = [
    "ArraySource",
    "ArraySpec",
    "DaskSource",
    "DatasetSource",
    "Source",
    "Tree",
    "ZarrSource",
    "as_source",
    "check_finite",
    "non_finite",
    "stage",
]


def as_source(data: Any, argument: str = "data", storage_options: Mapping[str, Any] | None = None) -> Source:
    """The source of samples in whatever ``data`` is.

    Parameters
    ----------
    data : pair, Dataset, DataLoader, path, URL or Source
        ``(x, y)`` of torch tensors, numpy or dask arrays, each an array or a tuple or mapping of arrays; a
        map-style torch ``Dataset``; a ``DataLoader`` (its dataset, collate function and
        batch size are used); the path or URL of a Zarr group with ``x`` and ``y``.
    argument : str
        What the caller's parameter is called; begins every error and warning.
    storage_options : mapping, optional
        Credentials for a URL.

    Raises
    ------
    DataError
        Where the data cannot be used; says what arrived and what to do.
    StoreError
        Where a URL cannot be read.

    Warns
    -----
    DataWarning
        Where a loader's order or dask's chunks are not followed.

    Examples
    --------
    >>> source = as_source((np.zeros((5, 3), np.float32), np.arange(5)), "train")
    >>> len(source), source.spec[0], source.read(3, 5)[1]
    (5, ArraySpec(shape=(3,), dtype=dtype('float32')), array([3, 4]))
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike | Location):
        return ZarrSource(Location.of(data, storage_options), argument)
    if isinstance(data, DataLoader):
        return _of_loader(data, argument)
    if isinstance(data, Dataset):
        return _of_dataset(data, None, None, argument)
    x, y = as_pair(data, argument)
    kind = DaskSource if _holds_dask(x) or _holds_dask(y) else ArraySource
    return kind(x, y, argument=argument)


def _holds_dask(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return any(map(_holds_dask, tree.values()))
    return any(map(_holds_dask, tree)) if isinstance(tree, tuple | list) else isinstance(tree, da.Array)


class ArraySource(Source):
    """Tensors and numpy arrays, held in this process and read without a copy.

    Parameters
    ----------
    x, y : array, or tuple or mapping of arrays
        Tensors are detached, brought to the CPU, and bfloat16 becomes float32.
    chunk_size : int, optional
        Samples that are natural to read at once.
    argument : str
        Begins every error.

    Attributes
    ----------
    data : (Tree, Tree)
        The numpy arrays.
    """

    held = True

    def __init__(self, x: Any, y: Any, *, chunk_size: int | None = None, argument: str = "data") -> None:
        self.data = _pair_of(x, y, lambda leaf, name: as_numpy(leaf, name, argument), argument)
        super().__init__(*spec_of(self.data, argument), chunk_size, argument)

    def _read(self, start: int, stop: int) -> Pair:
        return optree.tree_map(lambda leaf: leaf[start:stop], self.data)


class DaskSource(Source):
    """Dask arrays, aligned so that a chunk holds whole samples of x and y.

    Parameters
    ----------
    x, y : dask array, or tuple or mapping of arrays
        Numpy arrays and tensors beside dask arrays are cut like them.
    argument : str
        Begins every error and warning.

    Attributes
    ----------
    data : (Tree, Tree)
        The dask arrays, with equal chunks of the sample axis and features in one piece.

    Raises
    ------
    DataError
        Where sizes of chunks are unknown, or the arrays do not fit together.
    """

    def __init__(self, x: Any, y: Any, *, argument: str = "data") -> None:
        pair = _pair_of(x, y, lambda leaf, name: _known(leaf, name, argument), argument)
        length, spec = spec_of(pair, argument)
        self.data = _aligned(pair, argument)
        chunks = optree.tree_leaves(self.data)[0].chunks[0]
        super().__init__(length, spec, regular_size(chunks), argument)

    def _read(self, start: int, stop: int) -> Pair:
        leaves, structure = optree.tree_flatten(self.data)
        values = dask.compute(*(leaf[start:stop] for leaf in leaves))
        return optree.tree_unflatten(structure, map(np.asarray, values))

    def _content_digest(self) -> str:
        # The data stay where they are computed: only digests of blocks come here.
        leaves, structure = optree.tree_flatten(self.data)
        argument, pieces = self.argument, self._digest_blocks()

        @dask.delayed(pure=False)
        def digest(start: int, *block: Any) -> bytes:
            pair = optree.tree_unflatten(structure, map(np.asarray, block))
            return checked_digest(pair, argument, start)

        sizes = tuple(map(len, pieces))
        blocks = [leaf.rechunk({0: sizes}).to_delayed().ravel() for leaf in leaves]
        digests = [digest(piece.start, *block) for piece, *block in zip(pieces, *blocks, strict=True)]
        return self._combined_digest(dask.compute(*digests))

    def write(self, arrays: Pair, rows: int, reached: Callable[[int], None]) -> None:
        """Let dask store ``rows`` samples at a time, wherever it computes them; all are there at the end."""
        targets = optree.tree_leaves(arrays)
        if not all(_reachable(target) for target in targets):
            super().write(arrays, rows, reached)
            return
        cut = [leaf.rechunk({0: rows}) for leaf in optree.tree_leaves(self.data)]
        da.store(cut, targets, lock=False, compute=True)


class DatasetSource(Source):
    """A map-style torch Dataset whose items are pairs, brought together by a collate function.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        With ``__len__`` and ``__getitem__``; items are read in the order of their index.
    collate : callable, optional
        List of items to a pair (x, y) with a leading axis; ``default_collate`` where not given.
    chunk_size : int, optional
        Items that are natural to read at once.
    argument : str
        Begins every error.

    Raises
    ------
    DataError
        Where items are not pairs, are not of one shape, or cannot be collated.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        chunk_size: int | None = None,
        argument: str = "data",
    ) -> None:
        self.dataset, self.collate = dataset, collate or default_collate
        length = _dataset_length(dataset, argument)
        _, spec = spec_of(self._collated([dataset[0]], argument), argument)
        super().__init__(length, spec, chunk_size, argument)

    def _read(self, start: int, stop: int) -> Pair:
        indices = range(start, stop)
        many = getattr(self.dataset, "__getitems__", None)  # torch's own protocol for batched reads
        items = many(list(indices)) if callable(many) else [self.dataset[index] for index in indices]
        return self._collated(items, self.argument)

    def _collated(self, items: Sequence[Any], argument: str) -> Pair:
        try:
            batch = self.collate(list(items))
        except (TypeError, ValueError, RuntimeError, KeyError) as error:
            raise DataError(
                f"{argument}: {len(items)} items of the dataset cannot be collated ({error}); return arrays "
                "of one shape, or pass a DataLoader whose collate_fn makes a pair (x, y) of them"
            ) from error
        x, y = as_pair(batch, f"{argument}: a collated batch of the dataset")
        return _pair_of(x, y, lambda leaf, name: as_numpy(leaf, name, argument), argument)


# -- loaders and datasets -----------------------------------------------------------------
def _of_loader(loader: DataLoader[Any], argument: str) -> Source:
    if isinstance(loader.dataset, IterableDataset):
        return _of_dataset(loader.dataset, None, None, argument)
    if loader.batch_sampler is None:
        raise DataError(
            f"{argument}: the DataLoader has batch_size=None, so its dataset makes the batches; samples are "
            "needed one by one. Pass a DataLoader with a batch_size, over a dataset of single samples"
        )
    source = _of_dataset(loader.dataset, loader.collate_fn, loader.batch_size, argument)
    order = loader.batch_sampler if loader.batch_size is None else loader.sampler
    sampling = None if isinstance(order, SequentialSampler) else type(order).__name__
    # A sequential sampler takes its length from what it was given, which need not be the dataset.
    if isinstance(order, SequentialSampler) and len(order.data_source) != len(source):
        sampling = f"SequentialSampler over {len(order.data_source)} of {len(source)} samples"
    if sampling is not None:
        warnings.warn(
            f"{argument}: the DataLoader's shuffling or sampling ({sampling}) is ignored: all samples "
            "of its dataset are used, each once, in the order of their index",
            DataWarning,
            stacklevel=4,
        )
    if loader.drop_last:
        warnings.warn(
            f"{argument}: drop_last=True of the DataLoader is ignored: the last samples are used too",
            DataWarning,
            stacklevel=4,
        )
    return source


def _of_dataset(
    dataset: Dataset[Any], collate: Callable[[list[Any]], Any] | None, chunk_size: int | None, argument: str
) -> Source:
    if isinstance(dataset, IterableDataset):
        raise DataError(
            f"{argument} is an IterableDataset ({type(dataset).__name__}), whose samples have no index; use "
            "a map-style Dataset with __len__ and __getitem__, or write the samples to a Zarr group"
        )
    if type(dataset) is TensorDataset and len(dataset.tensors) == 2 and collate in (None, default_collate):
        return ArraySource(*dataset.tensors, chunk_size=chunk_size, argument=argument)
    return DatasetSource(dataset, collate, chunk_size=chunk_size, argument=argument)


def _dataset_length(dataset: Any, argument: str) -> int:
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise DataError(f"{argument}: {type(dataset).__name__} has no length; give it __len__") from error
    if length < 1:
        raise DataError(f"{argument} is empty: {type(dataset).__name__} has no item")
    return length


def _pair_of(x: Any, y: Any, leaf: Callable[[Any, str], Any], argument: str) -> Pair:
    return arranged(x, leaf, "x", argument), arranged(y, leaf, "y", argument)


# -- dask arrays --------------------------------------------------------------------------
def _known(leaf: Any, name: str, argument: str) -> Any:
    """A dask array of known chunks, or the numpy array of anything else."""
    if not isinstance(leaf, da.Array):
        return as_numpy(leaf, name, argument)
    if any(np.isnan(size) for sizes in leaf.chunks for size in sizes):
        raise DataError(
            f"{argument}: {name} has chunks of unknown size; call {name}.compute_chunk_sizes() first"
        )
    return native(leaf)


def _aligned(pair: Pair, argument: str) -> Pair:
    """Chunks of whole samples, the same in every array; warns where that took a rechunk."""
    paths, (leaves, structure) = optree.tree_paths(pair), optree.tree_flatten(pair)
    wanted = next(leaf for leaf in leaves if isinstance(leaf, da.Array)).chunks[0]
    given = leaf_name(paths[next(i for i, leaf in enumerate(leaves) if isinstance(leaf, da.Array))])
    aligned = []
    for path, leaf in zip(paths, leaves, strict=True):
        name = leaf_name(path)
        if not isinstance(leaf, da.Array):
            aligned.append(da.from_array(leaf, chunks=(wanted, *((size,) for size in leaf.shape[1:]))))
            continue
        cut = {axis: -1 for axis in range(1, leaf.ndim) if len(leaf.chunks[axis]) > 1}
        if cut:
            _warn_rechunk(argument, name, "is cut along its features", f"{name}.rechunk({cut})")
        if leaf.chunks[0] != wanted:
            call = f"{name}.rechunk({{0: {given}.chunks[0]}})"
            _warn_rechunk(argument, name, f"has other chunks of samples than {given}", call)
        aligned.append(leaf.rechunk({**cut, 0: wanted}))
    return optree.tree_unflatten(structure, aligned)


def _warn_rechunk(argument: str, name: str, what: str, call: str) -> None:
    warnings.warn(
        f"{argument}: {name} {what} and is rechunked; pass {call} to avoid this", DataWarning, stacklevel=6
    )


def _reachable(target: Any) -> bool:
    """Whether another process that unpickles this Zarr array writes to the same store."""
    return not isinstance(target.store, MemoryStore)
