"""The contract of sources over every kind of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import optree
import pytest
import torch
import zarr
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dask_influence.storage.sources import Source, as_source, stage
from dask_influence.storage.stores import Location
from tests.contracts.sources import LENGTH, SourceContract, samples


class Items(Dataset[Any]):
    """Samples of two numpy trees, one at a time."""

    def __init__(self, x: Any, y: Any) -> None:
        self.pair = (x, y)

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        assert 0 <= index < LENGTH
        return optree.tree_map(lambda leaf: leaf[index], self.pair)


class TestNumpy(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source((x, y))


class TestNumpyViewsThatAreReadOnlyAndForeign(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source(optree.tree_map(self.awkward, (x, y)))

    @staticmethod
    def awkward(leaf: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The same values, read-only, backwards in memory and in the other byte order."""
        held = leaf[::-1].astype(leaf.dtype.newbyteorder()) if leaf.dtype != bool else leaf[::-1].copy()
        held.flags.writeable = False
        return held[::-1]


class TestTorch(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source([*optree.tree_map(torch.tensor, (x, y))])


class TestDask(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source(optree.tree_map(lambda a: da.from_array(a, chunks=(7, *a.shape[1:])), (x, y)))


class TestDaskOfIrregularChunks(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        chunks = (4, 11, 1, 7)
        return as_source(optree.tree_map(lambda a: da.from_array(a, chunks=(chunks, *a.shape[1:])), (x, y)))


class TestDaskBesideNumpy(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source((x, optree.tree_map(lambda a: da.from_array(a, chunks=(5, *a.shape[1:])), y)))


class TestDataset(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source(Items(x, y))


class TestTensorDataset(SourceContract):
    @pytest.fixture(params=["array"])
    def pair(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        return samples(request.param)

    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)))


class TestDataLoader(SourceContract):
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source(DataLoader(Items(x, y), batch_size=6))


def _written(x: Any, y: Any, location: Location, chunks: int = 6) -> Location:
    """The samples as a user would write them: no attributes, nothing of this package."""
    group = zarr.create_group(location.zarr())
    for root, tree in (("x", x), ("y", y)):
        for path, leaf in zip(optree.tree_paths(tree), optree.tree_leaves(tree), strict=True):
            group.create_array("/".join([root, *map(str, path)]), data=leaf, chunks=(chunks, *leaf.shape[1:]))
    return location


class TestZarrFolder(SourceContract):
    digest_is_of_content = False
    portable = True

    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return as_source(_written(x, y, Location.of(folder / "data.zarr")).local_path)


class TestZarrInMemory(SourceContract):
    digest_is_of_content = False

    def build(self, x: Any, y: Any, folder: Path) -> Source:
        location = Location.of(f"memory://sources{folder}")
        location.delete()
        return as_source(_written(x, y, location))


class TestStaged(SourceContract):
    portable = True

    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return stage(as_source((x, y)), Location.of(folder / "artifacts"), 4)


class TestStagedOnS3(SourceContract):
    portable = True

    @pytest.fixture(params=["nested"])
    def pair(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        return samples(request.param)

    @pytest.fixture(autouse=True)
    def _place(self, s3: Location) -> None:
        self.location = s3

    def build(self, x: Any, y: Any, folder: Path) -> Source:
        return stage(as_source((x, y)), self.location, 8)
