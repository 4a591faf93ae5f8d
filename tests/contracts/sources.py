"""What every source of samples must do; a new kind subclasses :class:`SourceContract`."""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import optree
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_influence.storage.sources import ArraySource, Source, stage
from dask_influence.storage.stores import Location

LENGTH = 23


def samples(structure: str, seed: int = 0) -> tuple[Any, Any]:
    """23 samples whose x is an array, a tuple, a mapping, or nested."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(LENGTH, 3, 2)).astype(np.float32)
    tokens = rng.integers(0, 99, size=(LENGTH, 5))
    mask = rng.random((LENGTH, 5)) > 0.5
    labels = rng.integers(0, 10, size=LENGTH)
    targets = rng.normal(size=(LENGTH, 4))
    return {
        "array": (images, labels),
        "tuple": ((images, tokens), targets),
        "mapping": ({"input_ids": tokens, "attention_mask": mask}, {"y": labels, "a": targets}),
        "nested": ({"b": (images, mask), "a": tokens}, (labels, targets)),
    }[structure]


def assert_same(actual: Any, expected: Any) -> None:
    """Equal structure, dtypes and values."""
    assert optree.tree_structure(actual) == optree.tree_structure(expected)
    for a, b in zip(optree.tree_leaves(actual), optree.tree_leaves(expected), strict=True):
        assert isinstance(a, np.ndarray)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


class SourceContract(ABC):
    """Tests over one kind of source; ``build`` is all a subclass has to give."""

    digest_is_of_content = True
    portable = False

    @abstractmethod
    def build(self, x: Any, y: Any, folder: Path) -> Source:
        """The kind's own source of the numpy trees ``x`` and ``y``."""

    @pytest.fixture(params=["array", "tuple", "mapping", "nested"])
    def pair(self, request: pytest.FixtureRequest) -> tuple[Any, Any]:
        """What the source should give."""
        return samples(request.param)

    @pytest.fixture
    def source(self, pair: tuple[Any, Any], tmp_path: Path) -> Source:
        """The source under test."""
        return self.build(*pair, tmp_path)

    def test_length_and_spec(self, source: Source, pair: tuple[Any, Any]) -> None:
        assert len(source) == LENGTH
        assert optree.tree_structure(source.spec) == optree.tree_structure(pair)
        for spec, leaf in zip(optree.tree_leaves(source.spec), optree.tree_leaves(pair), strict=True):
            assert (spec.shape, spec.dtype) == (leaf.shape[1:], leaf.dtype)
        total = sum(leaf.nbytes for leaf in optree.tree_leaves(pair))
        assert source.nbytes_per_sample * LENGTH == total

    def test_chunk_size_is_none_or_positive(self, source: Source) -> None:
        assert source.chunk_size is None or 1 <= source.chunk_size <= LENGTH

    @settings(max_examples=8)
    @given(bounds=st.tuples(st.integers(0, LENGTH - 1), st.integers(1, LENGTH)).filter(lambda b: b[0] < b[1]))
    def test_any_range(self, source: Source, pair: tuple[Any, Any], bounds: tuple[int, int]) -> None:
        start, stop = bounds
        assert_same(source.read(start, stop), optree.tree_map(lambda leaf: leaf[start:stop], pair))

    def test_whole_and_last_sample(self, source: Source, pair: tuple[Any, Any]) -> None:
        assert_same(source.read(0, LENGTH), pair)
        assert_same(source.read(LENGTH - 1, LENGTH), optree.tree_map(lambda leaf: leaf[-1:], pair))

    def test_arrays_are_ready_for_torch(self, source: Source) -> None:
        for leaf in optree.tree_leaves(source.read(2, 9)):
            assert leaf.flags.c_contiguous
            assert leaf.flags.writeable
            assert leaf.dtype.isnative

    def test_range_outside_the_data(self, source: Source) -> None:
        for bounds in [(-1, 2), (3, 3), (4, 2), (0, LENGTH + 1), (LENGTH, LENGTH + 1)]:
            with pytest.raises(IndexError, match="of 23"):
                source.read(*bounds)

    def test_digest(self, source: Source, pair: tuple[Any, Any]) -> None:
        again = source.digest()
        assert again == source.digest()
        if self.digest_is_of_content:
            assert again == ArraySource(*pair).digest()

    def test_digest_tells_a_changed_value(
        self, source: Source, pair: tuple[Any, Any], tmp_path: Path
    ) -> None:
        x, y = optree.tree_map(np.copy, pair)
        last = optree.tree_leaves(y)[-1]
        last.flat[-1] += 1
        assert self.build(x, y, tmp_path / "changed").digest() != source.digest()

    def test_portable_sources_are_read_from_their_pickle(self, source: Source, pair: tuple[Any, Any]) -> None:
        assert source.portable == self.portable
        if source.portable:
            source.read(0, 1)
            copy = pickle.loads(pickle.dumps(source))
            assert_same(copy.read(4, 11), optree.tree_map(lambda leaf: leaf[4:11], pair))
            assert copy.digest() == source.digest()

    @pytest.mark.parametrize("chunk_size", [5, 40])
    def test_staged_copy_is_the_same(
        self, source: Source, pair: tuple[Any, Any], tmp_path: Path, chunk_size: int
    ) -> None:
        staged = stage(source, Location.of(tmp_path / "staged"), chunk_size)
        assert staged.portable
        assert staged.digest() == source.digest()
        assert staged.chunk_size == min(chunk_size, LENGTH)
        assert_same(staged.read(0, LENGTH), pair)
        assert_same(staged.read(3, 8), optree.tree_map(lambda leaf: leaf[3:8], pair))
