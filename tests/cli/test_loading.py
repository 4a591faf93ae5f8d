"""What a job's strings mean: modules, weights, samples of every kind; and what is refused, at its line."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dask_influence.cli import loading
from dask_influence.cli.document import JobError
from dask_influence.cli.job import Job
from dask_influence.errors import ConfigurationError, DataError, InfluenceError
from dask_influence.storage.sources import as_source
from dask_influence.storage.stores import Location
from tests.cli.jobs import Folder

Write = Callable[..., Path]


def names_its_line(job: Job, error: BaseException) -> bool:
    """Whether an error begins with the line of the field that it names."""
    found = re.match(r".*job\.yaml, line (\d+): ([\w.]+): ", str(error))
    assert found is not None, error
    key = job.document.place(tuple(found[2].split(".")))
    return len(key) > 0 and job.document.lines[key] == int(found[1])


def test_weights_of_either_kind_are_those_of_the_file(folder: Folder, job: Write) -> None:
    expected = safetensors.torch.load_file(folder.path / "weights.safetensors")
    torch.save({"state": expected, "epoch": 3}, folder.path / "checkpoint.pt")
    for weights in ("weights.safetensors", {"path": "checkpoint.pt", "key": "state"}):
        module = loading.model(Job.read(job(model={"factory": "cli_job_model:net", "weights": weights})))
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


class Explosive:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(Explosive.target),))

    target = ""


def test_a_checkpoint_that_is_more_than_tensors_is_never_unpickled(folder: Folder, job: Write) -> None:
    Explosive.target = str(folder.path / "exploded")
    torch.save({"weight": Explosive()}, folder.path / "bad.pt")
    (folder.path / "plain.pt").write_bytes(pickle.dumps(Explosive(), protocol=2))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(ConfigurationError, match=r"line \d+: model.weights: .*weights_only=True"):
            loading.model(Job.read(job(model={"factory": "cli_job_model:net", "weights": name})))
    assert not Path(Explosive.target).exists()


@pytest.mark.parametrize(
    ("sections", "kind", "message"),
    [
        ({"model": "no_such_module:net"}, JobError, "model.factory: cannot import 'no_such_module'"),
        ({"model": "cli_job_model:nett"}, JobError, "module 'cli_job_model' has no 'nett'"),
        ({"model": "cli_job_model:no_model"}, JobError, "must make a torch.nn.Module; it made a int"),
        ({"model": {"factory": "cli_job_model:net", "arguments": {"a": 1}}}, JobError, "these arguments"),
        ({"model": "torch:pi"}, JobError, "must be a function or a class; float cannot be called"),
        ({"model": {"factory": "cli_job_model:net", "weights": "none.pt"}}, JobError, "model.weights"),
        (
            {"model": {"factory": "cli_job_model:net", "weights": "x.npy"}},
            ConfigurationError,
            "model.weights: .*weights_only=True",
        ),
        (
            {
                "model": {
                    "factory": "cli_job_model:net",
                    "weights": {"path": "weights.safetensors", "key": "a"},
                }
            },
            ConfigurationError,
            "holds no 'a'; it holds ",
        ),
        (
            {"model": {"factory": "torch.nn:Identity", "weights": "weights.safetensors"}},
            ConfigurationError,
            "fit",
        ),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_at_its_line(
    job: Write, sections: dict[str, Any], kind: type[InfluenceError], message: str
) -> None:
    read = Job.read(job(**sections))
    with pytest.raises(kind, match=message) as refused:
        loading.model(read)
    assert names_its_line(read, refused.value)


def test_losses_are_functions_bound_functions_and_objects(job: Write) -> None:
    output, target = torch.randn(5, 10), torch.randint(10, (5,))
    plain = torch.nn.functional.cross_entropy(output, target, label_smoothing=0.3)
    for loss in ("torch.nn.functional:cross_entropy", "torch.nn:CrossEntropyLoss"):
        given = {"function": loss, "arguments": {"label_smoothing": 0.3}}
        assert loading.loss(Job.read(job(loss=given)))(output, target) == plain


def test_every_kind_of_data_reads_the_same_samples(folder: Folder, job: Write) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra [parquet]")
    arrow = pytest.importorskip("pyarrow")
    x, y = folder.x[:53], folder.y[:53]
    np.save(folder.path / "train_x.npy", x)
    np.save(folder.path / "train_y.npy", y)
    columns = {f"p{i}": x[:, i] for i in range(64)} | {"label": y, "pixels": list(x)}
    table = arrow.table(columns)
    (folder.path / "parts").mkdir()
    parquet.write_table(table[:20], folder.path / "parts" / "a.parquet")
    parquet.write_table(table[20:], folder.path / "parts" / "b.parquet")
    parquet.write_table(table, folder.path / "one.parquet")
    kinds = [
        "train.zarr",
        {"npy": {"x": "train_x.npy", "y": "train_y.npy"}},
        {"parquet": {"path": "one.parquet", "x": [f"p{i}" for i in range(64)], "y": "label"}},
        {"parquet": {"path": "parts", "x": "pixels", "y": "label"}},
    ]
    for kind in kinds:
        source = as_source(loading.data(Job.read(job(data={"train": kind})), "train"), "train")
        read_x, read_y = source.read(0, 53)
        np.testing.assert_array_equal(read_x, x)
        np.testing.assert_array_equal(read_y, y)


def test_a_dataset_factory_gets_its_arguments(job: Write) -> None:
    given = {"dataset": "cli_job_model:pair", "arguments": {"count": 17}}
    assert len(loading.data(Job.read(job(data={"train": given})), "train")) == 17  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ("none.zarr", ConfigurationError, "no Zarr group is at"),
        ({"npy": {"x": "none.npy", "y": "y.npy"}}, JobError, "none.npy"),
        ({"npy": {"x": "weights.safetensors", "y": "y.npy"}}, DataError, "is no .npy file"),
        ({"npy": {"x": "objects.npy", "y": "y.npy"}}, DataError, "is no .npy file of numbers"),
        ({"npy": {"x": "x.npy", "y": "x2.npy"}}, DataError, "same number of samples"),
        (
            {"parquet": {"path": "t.parquet", "x": ["a", "c"], "y": "b"}},
            DataError,
            "has no column 'c'; it has a, b",
        ),
        ({"parquet": {"path": "t.parquet", "x": "b", "y": "a"}}, DataError, "column 'b' holds 1 missing"),
        ({"parquet": {"path": "x.npy", "x": "b", "y": "a"}}, DataError, "cannot be read as Parquet"),
        ({"dataset": "cli_job_model:picky", "arguments": {"password": "x"}}, JobError, "raised ValueError"),
        ({"dataset": "cli_job_model:no_model"}, DataError, "data.test"),
    ],
)
def test_data_that_cannot_be_read_are_refused_at_their_line(
    folder: Folder, job: Write, given: Any, kind: type[InfluenceError], message: str
) -> None:
    np.save(folder.path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.save(folder.path / "x2.npy", folder.x[:3])
    if "parquet" in given:
        parquet = pytest.importorskip("pyarrow.parquet", reason="the extra [parquet]")
        table = pytest.importorskip("pyarrow").table({"a": [1.0, 2.0], "b": [1, None]})
        parquet.write_table(table, folder.path / "t.parquet")
    read = Job.read(job(data={"train": "train.zarr", "test": given}))
    with pytest.raises(kind, match=message) as refused:
        as_source(loading.data(read, "test"), "test")
    assert names_its_line(read, refused.value)


def test_paths_are_relative_to_the_job_and_urls_are_urls(
    folder: Folder, job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    read = Job.read(job())
    assert loading.output(read).local_path == folder.path / "scores.zarr"
    assert loading.location(read, "s3://bucket/a", {}).url == "s3://bucket/a"


def test_ids_and_labels_come_from_the_file_or_the_job(folder: Folder, job: Write) -> None:
    np.save(folder.path / "ids.npy", np.arange(7) * 10)
    read = Job.read(
        job(
            output={"store": "a", "test_ids": "ids.npy", "train_ids": ["a", "b"]},
            reduce={"name": "GroupSum", "labels": "ids.npy"},
        )
    )
    assert loading.ids(read, "test").tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert loading.ids(read, "train") == ["a", "b"]
    reduction = loading.reduction(read)
    assert repr(reduction) == "GroupSum(7 groups)"


def test_objects_are_read_from_object_stores(folder: Folder) -> None:
    memory = Location.of("memory://cli-loading/folder")
    memory.put("x.npy", (folder.path / "x.npy").read_bytes())
    read = loading.array(Location.of("memory://cli-loading/folder/x.npy"))
    np.testing.assert_array_equal(read, folder.x[53:60])
