"""Sources: what is refused, what is warned of, and how foreign containers are read."""

from __future__ import annotations

import pickle
import threading
import warnings
from collections import UserDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import optree
import pytest
import torch
import zarr
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from dask_influence.errors import CorruptStoreError, DataError, DataWarning, StoreError
from dask_influence.storage import samples, staging
from dask_influence.storage.sources import (
    ArraySource,
    DaskSource,
    Source,
    ZarrSource,
    as_source,
    check_finite,
    stage,
)
from dask_influence.storage.stores import Location

X, Y = np.arange(22.0, dtype=np.float32).reshape(11, 2), np.arange(11)


class Listed(Dataset[Any]):
    """Items from a list."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


# -- pairs ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (X, "train must be a pair.*got ndarray"),
        ((X,), "got tuple of 1"),
        ((X, Y, Y), "got tuple of 3"),
        ({"x": X, "y": Y}, "got mapping with 'x', 'y'"),
        ((X, Y[:9]), "x has 11, y has 9"),
        (({"a": X, "b": X[:3]}, Y), r"x\['a'\] has 11, x\['b'\] has 3, y has 11"),
        ((X[:0], Y[:0]), r"x is empty \(shape \(0, 2\)\)"),
        ((X[:, :0], Y), "x is empty"),
        ((X, np.float64(3)), "y is a single number"),
        ((X, np.array(["a"] * 11)), "y has dtype <U1; only"),
        ((X, Y.astype(object)), "y has dtype object"),
        ((X.astype(np.complex64), Y), "x has dtype complex64"),
        ((X.astype("datetime64[s]"), Y), "x has dtype datetime64"),
        ((X.astype(np.longdouble), Y), "x has dtype float128"),
        ((X, None), "y must be an array; got NoneType"),
        (((X, "text"), Y), r"x\[1\] must be an array; got str"),
        ((X, ()), "y holds no array"),
        ((X, {}), "y must have names that are strings; got mapping with "),
        ((X, {1: Y}), "y must have names that are strings; got mapping with 1"),
        ((torch.from_numpy(X).to_sparse(), Y), "x is a tensor of torch.float32 and torch.sparse_coo"),
        ((torch.zeros(11, dtype=torch.complex64), Y), "x has dtype complex64"),
    ],
)
def test_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        as_source(data, "train")
    assert str(caught.value).startswith("train")


def test_one_sample_and_mixed_kinds_are_fine() -> None:
    source = as_source((torch.zeros(1, 3), [np.ones(1)]))
    assert len(source) == 1
    assert source.read(0, 1)[1][0].tolist() == [1.0]


def test_tensors_become_plain_arrays() -> None:
    x = torch.arange(6.0, requires_grad=True).reshape(3, 2)
    y = torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16)
    source = as_source((x, y))
    assert source.spec[1].dtype == np.float32
    assert source.read(1, 3)[1].tolist() == [2.5, -3.0]
    assert source.read(0, 3)[0].tolist() == x.tolist()


def test_containers_become_plain() -> None:
    Batch = namedtuple("Batch", ["a", "b"])
    source = as_source((UserDict(ids=Y, mask=X), Batch(X, Y)))
    x, y = source.read(0, 2)
    assert type(x) is dict
    assert type(y) is tuple
    assert list(x) == ["ids", "mask"]


def test_a_source_is_returned_as_it_is() -> None:
    source = ArraySource(X, Y)
    assert as_source(source) is source


def test_reads_do_not_copy_what_can_be_viewed() -> None:
    assert np.shares_memory(as_source((X, Y)).read(2, 5)[0], X)


# -- digests ------------------------------------------------------------------------------
def test_digest_depends_on_dtype_shape_and_names() -> None:
    pairs = [
        (X, Y),
        (X.astype(np.float64), Y),
        (X.reshape(11, 2, 1), Y),
        ((X,), Y),
        ({"a": X}, Y),
        ({"b": X}, Y),
        (X[::-1], Y),
        (X, Y.astype(np.int32)),
        (X[:10], Y[:10]),
    ]
    digests = {as_source(pair).digest() for pair in pairs}
    assert len(digests) == len(pairs)


def test_digest_is_the_same_however_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = as_source((X, Y)).digest()
    monkeypatch.setattr(samples, "DIGEST_BLOCK", 50)  # blocks of 3 samples: part of the definition
    blocks = as_source((X, Y)).digest()
    assert blocks != whole
    for chunks in [(4, 7), (1,) * 11, (11,)]:
        x, y = da.from_array(X, chunks=(chunks, 2)), da.from_array(Y, chunks=(chunks,))
        assert as_source((x, y)).digest() == blocks


@pytest.mark.parametrize("kind", ["numpy", "dask", "dataset"])
def test_digest_names_a_bad_sample_of_the_whole_data(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "DIGEST_BLOCK", 50)
    x = X.copy()
    x[8, 1] = np.nan
    data = {
        "numpy": ((Y, x), Y),
        "dask": ((Y, da.from_array(x, chunks=(4, 2))), Y),
        "dataset": Listed(*(((label, row), label) for label, row in zip(Y, x, strict=True))),
    }[kind]
    source = as_source(data, "train")
    with pytest.raises(DataError, match=r"train: x\[1\] of sample 8 holds NaN"):
        source.digest()


def test_digest_of_a_zarr_group_is_its_listing(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "g"))
    group.create_array("x", data=X, chunks=(4, 2))
    group.create_array("y", data=Y, chunks=(4,))
    before = as_source(tmp_path / "g").digest()
    group.create_array("unrelated", data=Y)
    assert as_source(tmp_path / "g").digest() == before
    group["y"][3] = 77
    assert as_source(tmp_path / "g").digest() != before


# -- NaN and inf --------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_first_bad_sample_is_named(bad: float, dtype: Any) -> None:
    x = np.zeros((7, 2, 3), dtype)
    x[4, 1, 2] = x[6] = bad
    with pytest.raises(DataError, match=r"train: x\['a'\] of sample 104 holds NaN or inf"):
        check_finite(({"a": x, "b": Y[:7]}, Y[:7]), "train", start=100)


def test_large_and_opposite_values_are_finite() -> None:
    x = np.full((5, 1000), np.finfo(np.float32).max)
    y = np.full(5, np.finfo(np.float16).max, np.float16)
    check_finite((x, (y, Y[:5], Y[:5] > 2)), "train")
    x[::2] *= -1
    check_finite((x, y), "train")


# -- datasets and loaders -----------------------------------------------------------------
def test_loader_gives_batch_size_and_collate() -> None:
    def padded(items: list[Any]) -> Any:
        rows = [np.pad(ids, (0, 5 - len(ids))) for ids, _ in items]
        return {"ids": torch.tensor(np.stack(rows))}, torch.tensor([label for _, label in items])

    dataset = Listed(*((np.arange(1 + i % 5), i) for i in range(8)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = as_source(DataLoader(dataset, batch_size=3, collate_fn=padded))
    assert source.chunk_size == 3
    x, y = source.read(2, 8)
    assert y.tolist() == [2, 3, 4, 5, 6, 7]
    assert x["ids"].shape == (6, 5)


@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        ({"shuffle": True}, "RandomSampler. is ignored"),
        ({"drop_last": True}, "drop_last=True"),
        ({"sampler": RandomSampler(range(11))}, "RandomSampler"),
        ({"batch_size": 1, "batch_sampler": [[3, 1], [2]]}, ".list. is ignored"),
        ({"sampler": SequentialSampler(range(4))}, "SequentialSampler over 4 of 11 samples. is ignored"),
    ],
)
def test_loader_order_and_drop_last_are_not_followed(arguments: dict[str, Any], warning: str) -> None:
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    with pytest.warns(DataWarning, match=f"train: .*{warning}"):
        source = as_source(DataLoader(dataset, **({"batch_size": 4} | arguments)), "train")
    assert len(source) == 11
    np.testing.assert_array_equal(source.read(0, 11)[1], Y)


def test_sequential_sampler_over_the_whole_dataset_is_followed() -> None:
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = as_source(DataLoader(dataset, batch_size=4, sampler=SequentialSampler(range(11))))
    assert len(source) == 11


def test_loader_that_gives_whole_batches_is_refused() -> None:
    with pytest.raises(DataError, match="batch_size=None"):
        as_source(DataLoader(Listed((X, Y)), batch_size=None))


def test_subset_and_random_access() -> None:
    dataset = Subset(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), [5, 3, 9])
    source = as_source(dataset)
    assert source.read(1, 3)[1].tolist() == [3, 9]
    assert source.read(0, 1)[1].tolist() == [5]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(X[0], Y[0])])


class Lengthless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return X[0], Y[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "IterableDataset .Endless., whose samples have no index"),
        (DataLoader(Endless()), "whose samples have no index"),
        (Lengthless(), "Lengthless has no length"),
        (Listed(), "train is empty"),
        (Listed(X[0], X[1]), "collated batch of the dataset must be a pair .*got Tensor"),
        (Listed({"x": X[0], "y": Y[0]}), "got mapping with 'x', 'y'"),
        (Listed((X[0], Y[0], Y[0])), "of 3"),
        (Listed((X[0], "label")), r"y\[0\] must be an array; got str"),
        (Listed((X[0], object())), "1 items of the dataset cannot be collated"),
    ],
)
def test_datasets_that_are_refused(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        as_source(data, "train")


def test_dataset_of_ragged_samples_is_refused_when_read() -> None:
    source = as_source(Listed((X[0], 0), (X[:2].ravel(), 1)), "train")
    with pytest.raises(DataError, match="train: 2 items of the dataset cannot be collated"):
        source.read(0, 2)
    with pytest.raises(
        DataError, match=r"x of samples 1 to 2 is float32 of shape \(1, 4\); expected.*\(1, 2\)"
    ):
        source.read(1, 2)


def test_dataset_whose_structure_changes_is_refused_when_read() -> None:
    source = as_source(Listed(({"a": X[0]}, 0), ({"b": X[0]}, 1)))
    with pytest.raises(DataError, match="samples 1 to 2 are structured otherwise"):
        source.read(1, 2)


def test_collate_that_loses_a_sample_is_refused() -> None:
    loader = DataLoader(
        Listed(*zip(X, Y, strict=True)), collate_fn=lambda items: (X[: len(items)][-1:], Y[:1])
    )
    with pytest.raises(DataError, match=r"shape \(1, 2\); expected float32 of shape \(3, 2\)"):
        as_source(loader).read(0, 3)


# -- dask ---------------------------------------------------------------------------------
def test_aligned_dask_arrays_pass_in_silence() -> None:
    x, y = da.from_array(X, chunks=(4, 2)), da.from_array(Y, chunks=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = as_source((x, y))
    assert isinstance(source, DaskSource)
    assert source.chunk_size == 4
    assert source.data[0] is x


def test_misaligned_chunks_are_rechunked_with_the_call_that_avoids_it() -> None:
    x, y = da.from_array(X, chunks=(4, 2)), da.from_array(Y, chunks=5)
    with pytest.warns(
        DataWarning, match=r"train: y has other chunks of samples than x.*y\.rechunk\({0: x\.chunks"
    ):
        source = as_source((x, y), "train")
    assert source.data[1].chunks == ((4, 4, 3),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_source((x, y.rechunk({0: x.chunks[0]})), "train")


def test_chunks_across_features_are_rechunked_with_the_call_that_avoids_it() -> None:
    x, y = da.from_array(X, chunks=(4, 1)), da.from_array(Y, chunks=4)
    with pytest.warns(DataWarning, match=r"x is cut along its features .*x\.rechunk\({1: -1}\)"):
        source = as_source((x, y))
    np.testing.assert_array_equal(source.read(3, 9)[0], X[3:9])


def test_unknown_chunks_are_refused_with_the_call_that_helps() -> None:
    x, y = da.from_array(X, chunks=(4, 2)), da.from_array(Y, chunks=4)
    kept = y > 2
    with pytest.raises(
        DataError, match=r"train: x has chunks of unknown size; call x\.compute_chunk_sizes\(\)"
    ):
        as_source((x[kept], y[kept]), "train")
    known = x[kept].compute_chunk_sizes(), y[kept].compute_chunk_sizes()
    assert len(as_source(known)) == 8


def test_dask_lengths_and_dtypes() -> None:
    with pytest.raises(DataError, match="x has 11, y has 9"):
        as_source((da.from_array(X), da.from_array(Y[:9])))
    with pytest.raises(DataError, match="dtype object"):
        as_source((da.from_array(X), da.from_array(Y.astype(object), chunks=4)))


def test_dask_array_that_lies_about_its_dtype_is_refused_when_read() -> None:
    x = da.from_array(X, chunks=(4, 2)).map_blocks(lambda block: block.astype(np.float64), dtype=np.float32)
    with pytest.raises(DataError, match="x of samples 0 to 3 is float64"):
        as_source((x, Y)).read(0, 3)


def test_a_read_computes_only_the_chunks_it_touches() -> None:
    computed: list[int] = []

    def noted(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        computed.append(int(block[0]))
        return block

    y = da.from_array(Y, chunks=4).map_blocks(noted, dtype=Y.dtype, meta=Y[:0])
    source = as_source((da.from_array(X, chunks=(4, 2)), y))
    source.read(5, 7)
    assert computed == [4]


# -- zarr ---------------------------------------------------------------------------------
def test_zarr_without_x_or_y_says_what_is_there(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "g"))
    group.create_array("images", data=X)
    group.create_array("y", data=Y)
    with pytest.raises(DataError, match=r"train: file://.*/g has no x; it holds images, y"):
        as_source(str(tmp_path / "g"), "train")
    zarr.create_group(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="has no x and no y; it holds nothing"):
        as_source(tmp_path / "empty")


def test_no_zarr_group_at_the_url(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"train: no Zarr group is at file://.*check the URL"):
        as_source(tmp_path / "nothing", "train")
    assert not (tmp_path / "nothing").exists()


def test_zarr_of_unequal_lengths(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "g"))
    group.create_array("x", data=X)
    group.create_array("y", data=Y[:4])
    with pytest.raises(DataError, match="x has 11, y has 4"):
        as_source(tmp_path / "g")
    group.create_group("empty/x")
    group["empty"].create_array("y", data=Y)
    with pytest.raises(DataError, match="the group 'x' holds no array"):
        as_source(tmp_path / "g" / "empty")


def test_zarr_version_2_and_foreign_byte_order(tmp_path: Path) -> None:
    group = zarr.create_group(str(tmp_path / "v2"), zarr_format=2)
    group.create_array("x", data=X.astype(">f4"), chunks=(4, 2))
    group.create_array("y", data=Y)
    x, y = as_source(tmp_path / "v2").read(3, 8)
    np.testing.assert_array_equal(x, X[3:8])
    np.testing.assert_array_equal(y, Y[3:8])


def test_dask_of_foreign_byte_order() -> None:
    foreign = da.from_array(X.astype(">f4"), chunks=(4, 2)), da.from_array(Y.astype(">i8"), chunks=4)
    source = as_source(foreign)
    np.testing.assert_array_equal(source.read(3, 8)[0], X[3:8])
    assert source.digest() == as_source((X, Y)).digest()


def test_flipped_byte_in_staged_samples_is_noticed(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    staged = stage(as_source((X, Y), "train"), location, 4)
    key = next(k for k in location.list() if "/x/c/" in k)
    data = bytearray(location.get(key))
    data[len(data) // 2 - 20] ^= 1
    location.put(key, bytes(data))
    with pytest.raises(CorruptStoreError, match=r"train: samples 0 to 11 of .* cannot be decoded"):
        staged.read(0, 11)


def test_lost_chunk_of_staged_samples_does_not_read_as_zero(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    staged = stage(as_source((np.zeros((11, 2)), Y)), location, 4)
    for root in "xy":
        location.delete(next(k for k in location.list() if f"/{root}/c/" in k))
    x, y = staged.read(0, 3)
    assert np.isnan(x).all()
    assert (y < -1e9).all()


# -- what is remembered of staged samples --------------------------------------------------
@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranges that are read from a store, by a process that remembers nothing yet."""
    staging._RECENT.clear()
    ranges, real = list[tuple[int, int]](), ZarrSource._decoded

    def counting(self: ZarrSource, start: int, stop: int) -> Any:
        ranges.append((start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(ZarrSource, "_decoded", counting)
    return ranges


def test_staged_samples_are_read_once_by_a_process(tmp_path: Path, decoded: list[tuple[int, int]]) -> None:
    """By content: wherever they are staged again. Whoever reads them may write into them."""
    for folder in ("first", "again"):
        staged = stage(as_source((X, Y)), Location.of(tmp_path / folder), 4)
        for one in (staged, pickle.loads(pickle.dumps(staged))):
            x, y = one.read(3, 9)
            np.testing.assert_array_equal(x, X[3:9])
            np.testing.assert_array_equal(y, Y[3:9])
            x[:], y[:] = 0, 0
    assert decoded == [(3, 9)]
    staged.read(3, 8)
    assert decoded == [(3, 9), (3, 8)]


def test_what_may_have_been_missing_is_not_remembered(tmp_path: Path, decoded: list[tuple[int, int]]) -> None:
    cases = [(X, Y, 0), (X, Y + 1, 1), (np.arange(11.0)[:, None], Y % 2 == 0, 1)]
    for number, (*pair, lost) in enumerate(cases):
        location = Location.of(tmp_path / str(number))
        staged = stage(as_source(tuple(pair)), location, 11)
        chunks = {key: location.get(key) for key in location.list() if f"/{'xy'[lost]}/c/" in key}
        for key in chunks:
            location.delete(key)
        assert (staged.read(0, 11)[lost] != pair[lost]).any()
        for key, content in chunks.items():
            location.put(key, content)
        np.testing.assert_array_equal(staged.read(0, 11)[lost], pair[lost])
    assert len(decoded) == 6


def test_large_batches_are_not_remembered(
    tmp_path: Path, decoded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = stage(as_source((X, Y)), Location.of(tmp_path), 4)
    monkeypatch.setattr(staging, "RECENT", 4 * 4 * staged.nbytes_per_sample)
    for _ in range(2):
        staged.read(0, 3)
        staged.read(0, 4)
    assert decoded == [(0, 3), (0, 4), (0, 4)]


def test_a_group_of_the_users_is_read_each_time(tmp_path: Path, decoded: list[tuple[int, int]]) -> None:
    """It may be written to."""
    staged = stage(as_source((X, Y)), Location.of(tmp_path), 4)
    own = ZarrSource(staged.location)
    for _ in range(2):
        own.read(0, 4)
    assert len(decoded) == 2


# -- staging ------------------------------------------------------------------------------
def test_staging_again_writes_nothing(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    first = stage(as_source((X, Y)), location, 4)
    before = location.stat()
    again = stage(as_source((torch.from_numpy(X), Y)), location, 4)
    assert again.location == first.location
    assert location.stat() == before


def test_what_is_staged_serves_other_chunks(tmp_path: Path) -> None:
    location, source = Location.of(tmp_path), as_source((X, Y))
    first = stage(source, location, 4)
    before = location.stat()
    for rows in (2, 3, 11):
        again = stage(source, location, rows)
        assert (again.location, again.chunk_size) == (first.location, 4)
        np.testing.assert_array_equal(again.read(3, 9)[0], X[3:9])
    assert location.stat() == before
    assert stage(source, location, 1).chunk_size == 1  # four times as much would be read
    assert stage(source, location, 2).chunk_size in (1, 4)
    location.delete(f"{source.digest()}-4/zarr.json")  # as of a staging that was killed
    location.delete(f"{source.digest()}-1/zarr.json")
    assert stage(source, location, 3).chunk_size == 3


@pytest.mark.parametrize(
    "x", [X, (X, {"b": X[:, :1], "a": X + 1}), {"z": X, "a": (X, X + 2)}], ids=["array", "tuple", "mapping"]
)
def test_what_is_staged_is_what_is_found_there(tmp_path: Path, x: Any) -> None:
    """It is not opened until it is read, and then it is what a group at that place is."""
    staged = stage(as_source((x, Y), "train"), Location.of(tmp_path), 4)
    opened = ZarrSource(staged.location, "train")
    assert staged._arrays is None
    assert staged.spec == opened.spec
    assert (len(staged), staged.chunk_size, staged.digest()) == (
        len(opened),
        opened.chunk_size,
        opened.digest(),
    )
    for one in (staged, pickle.loads(pickle.dumps(staged))):
        for left, right in zip(
            optree.tree_leaves(one.read(3, 9)), optree.tree_leaves(opened.read(3, 9)), strict=True
        ):
            np.testing.assert_array_equal(left, right)


def test_other_content_is_staged_beside_it(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    first, second = (stage(as_source((x, Y)), location, 4) for x in (X, X + 1))
    np.testing.assert_array_equal(first.read(0, 11)[0] + 1, second.read(0, 11)[0])


def test_staging_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location, source = Location.of(tmp_path), as_source((X, Y))
    monkeypatch.setattr(ArraySource, "write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stage(source, location, 4)
    monkeypatch.undo()
    staged = stage(source, location, 4)
    np.testing.assert_array_equal(staged.read(0, 11)[0], X)
    assert staged.digest() == source.digest()


class Gated(Source):
    """Samples that are read when they are let go."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__(len(X), as_source((X, Y)).spec, None, "train")
        self._digest, self.gates, self._fails = "known", [threading.Event() for _ in X], fails

    def _read(self, start: int, stop: int) -> Any:
        assert self.gates[start].wait(10)
        if self._fails and start:
            raise DataError("train: sample 4 is no more")
        return X[start:stop].copy(), Y[start:stop].copy()


def test_samples_are_read_while_others_are_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_influence.storage.staging.STAGED_SHARD", 100)
    source = Gated()
    with ThreadPoolExecutor(1) as pool:
        staged = stage(source, Location.of(tmp_path), 4, beside=pool)
        source.gates[0].set()
        staged.wait(4)
        elsewhere = pickle.loads(pickle.dumps(staged))
        np.testing.assert_array_equal(elsewhere.read(0, 4)[0], X[:4])
        elsewhere.wait(11)  # it does not know of the staging
        waiting = ThreadPoolExecutor(1).submit(staged.wait, 8)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        for gate in source.gates:
            gate.set()
        staged.wait(11)
    np.testing.assert_array_equal(elsewhere.read(0, 11)[0], X)
    assert ZarrSource(staged.location).digest() == "known"


def test_failure_of_a_staging_reaches_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_influence.storage.staging.STAGED_SHARD", 100)
    source = Gated(fails=True)
    for gate in source.gates:
        gate.set()
    with ThreadPoolExecutor(1) as pool:
        staged = stage(source, Location.of(tmp_path), 4, beside=pool)
        staged.wait(4)
        with pytest.raises(DataError, match="sample 4 is no more"):
            staged.wait(5)


def test_digest_reads_in_order_and_holds_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "DIGEST_BLOCK", 1)
    read, hashed = [], []
    hashing = samples.checked_digest

    class Counted(ArraySource):
        def _read(self, start: int, stop: int) -> Any:
            assert len(read) - len(hashed) <= samples.HASHERS
            read.append(start)
            return super()._read(start, stop)

    def counted(block: Any, argument: str, start: int) -> bytes:
        digest = hashing(block, argument, start)
        hashed.append(start)
        return digest

    monkeypatch.setattr(samples, "checked_digest", counted)
    source = Counted(X, Y)
    assert source.digest() == ArraySource(X, Y).digest()
    assert read == list(range(11))


def test_small_chunks_share_an_object(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    x = np.random.default_rng(0).normal(size=(5000, 3))
    staged = stage(as_source((x, np.arange(5000))), location, 7)
    assert sum("/c/" in key for key in location.list()) == 2
    assert staged.chunk_size == 7
    np.testing.assert_array_equal(staged.read(1234, 1243)[0], x[1234:1243])


def test_large_samples_have_an_object_for_every_chunk(tmp_path: Path) -> None:
    location = Location.of(tmp_path)
    x = np.zeros((5, 2**20), np.float64)
    x[4, 7] = 1.0
    staged = stage(as_source((x, np.arange(5))), location, 2)
    assert sum("/x/c/" in key for key in location.list()) == 3
    assert staged.read(4, 5)[0][0, 7] == 1.0


def test_chunks_that_are_large_enough_are_objects_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there would be too many, or they are of an array with little in them: then they share some."""
    x = np.random.default_rng(0).normal(size=(40, 2**14))
    source = as_source((x, np.arange(40)))
    stage(source, Location.of(tmp_path / "own"), 8)
    monkeypatch.setattr("dask_influence.storage.staging.MOST_OBJECTS", 4)
    shared = stage(source, Location.of(tmp_path / "shared"), 8)
    found = [len([*(tmp_path / name).rglob("x/c/*/0")]) for name in ("own", "shared")]
    assert found == [5, 1]
    assert len([*(tmp_path / "own").rglob("y/c/*")]) == 1
    np.testing.assert_array_equal(shared.read(7, 33)[0], x[7:33])


def test_dask_data_are_never_whole_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "DIGEST_BLOCK", 100)
    largest: list[int] = []
    x = da.from_array(X, chunks=(2, 2)).map_blocks(
        lambda b: (largest.append(len(b)), b)[1], dtype=X.dtype, meta=X[:0]
    )
    source = as_source((x, da.from_array(Y, chunks=2)))
    monkeypatch.setattr(DaskSource, "_read", lambda *args: pytest.fail("read here"))
    monkeypatch.setattr("dask_influence.storage.staging.STAGED_SHARD", 100)
    with dask.config.set(scheduler="threads"):
        staged = stage(source, Location.of(tmp_path), 3)
    assert max(largest) == 2
    np.testing.assert_array_equal(staged.read(0, 11)[0], X)
    assert len([key for key in Location.of(tmp_path).list() if "/x/c/" in key]) > 1


def test_failure_of_the_data_is_not_hidden_by_the_store(tmp_path: Path) -> None:
    class Files(Listed):
        def __getitem__(self, index: int) -> Any:
            return (X[0], 0) if index == 0 else np.load(tmp_path / "lost.npy")

    source = as_source(Files(0, 1), "train")
    source._digest = "known"
    with pytest.raises(StoreError, match=r"lost\.npy") as caught:
        stage(source, Location.of(tmp_path), 1)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("name", ["a/b", "", "..", "zarr.json", "__reserved"])
def test_names_that_zarr_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    source = as_source(({name: X}, Y), "train")
    with pytest.raises(DataError, match=r"train: x.* cannot be stored as"):
        stage(source, Location.of(tmp_path), 4)
    assert Location.of(tmp_path).list() == []


def test_mapping_named_by_digits_stays_a_mapping(tmp_path: Path) -> None:
    staged = stage(as_source(({"0": X, "1": Y}, Y)), Location.of(tmp_path), 4)
    assert list(pickle.loads(pickle.dumps(staged)).read(0, 3)[0]) == ["0", "1"]


def test_staging_in_memory_works_for_dask_too() -> None:
    source = as_source((da.from_array(X, chunks=(4, 2)), da.from_array(Y, chunks=4)))
    staged = stage(source, Location.of("memory://staged-dask"), 3)
    assert not staged.portable
    np.testing.assert_array_equal(staged.read(2, 9)[0], X[2:9])
