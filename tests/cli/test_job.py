"""Job files: every mistake is named with its line and its field, and no value of the environment is shown."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

from dask_influence.cli.document import Document, JobError
from dask_influence.cli.estimators import ESTIMATORS
from dask_influence.cli.job import Job, schema

GOOD = """\
model:
  factory: mine:net
  arguments: {hidden: 3, token: "${TOKEN}"}
  weights: weights.safetensors
loss: torch.nn.functional:cross_entropy
data:
  train: train.zarr
  test: {npy: {x: x.npy, y: y.npy}}
estimator:
  name: CgInfluence
  hessian_regularization: 1e-2
  preconditioner: jacobi
output:
  store: s3://${BUCKET:-scores}/a.zarr
  tile_bytes: 64 MiB
  storage_options: {key: literal-key, secret: "${SECRET}", endpoint: "http://localhost"}
reduce: {name: TopK, k: 10}
"""
ENVIRONMENT = {"TOKEN": "open-sesame", "SECRET": "hunter2hunter2"}


def read(text: str) -> Job:
    return Job.of(Document.parse(text, "job.yaml"), ENVIRONMENT)


def test_a_good_job_has_every_value_in_its_type() -> None:
    job = read(GOOD)
    assert job.model.arguments == {"hidden": 3, "token": "open-sesame"}
    assert job.model.weights is not None
    assert job.model.weights.path == "weights.safetensors"
    assert job.data.train.zarr == "train.zarr"
    assert job.estimator.hessian_regularization == 0.01
    assert job.output.store == "s3://scores/a.zarr"
    assert job.output.tile_bytes == 64 * 2**20
    assert job.output.storage_options["secret"] == "hunter2hunter2"
    assert job.cluster.workers == 1


def test_a_repr_and_hidden_text_show_no_secret() -> None:
    job = read(GOOD)
    for secret in (*ENVIRONMENT.values(), "literal-key"):
        assert secret not in repr(job)
    said = job.secrets.hide("open-sesame, hunter2hunter2 and literal-key at http://localhost")
    assert said == "${TOKEN}, ${SECRET} and … at http://localhost"


BAD = {
    "unknown field": (
        "  weights:",
        "  weigths:",
        4,
        "model.weigths: no such field; this section has factory",
    ),
    "unknown section": (
        "reduce:",
        "reduction:",
        17,
        "reduction: no such field; this section has model, loss",
    ),
    "no reference": ("mine:net", "mine.net", 2, "model.factory: must be module:name"),
    "missing": ("  store: s3", "  stores: s3", 14, "output.stores: no such field"),
    "missing section": ("loss: torch.nn.functional:cross_entropy\n", "", 1, "loss: is missing"),
    "unknown estimator": (
        "CgInfluence",
        "CGInfluence",
        10,
        "must be one of DirectInfluence, ArnoldiInfluence",
    ),
    "no estimator": (
        "  name: CgInfluence\n",
        "",
        9,
        "estimator.name: is missing; it is one of DirectInfluence",
    ),
    "argument of another estimator": (
        "preconditioner: jacobi",
        "rank: 3",
        12,
        "estimator.rank: no such field; this section has name, hessian_regularization",
    ),
    "negative λ": ("1e-2", "-1", 11, "hessian_regularization: must be greater than or equal to 0"),
    "λ of nan": ("1e-2", ".nan", 11, "estimator.hessian_regularization: must be"),
    "no number": ("1e-2", "small", 11, "must be a valid number"),
    "no size": ("64 MiB", "64 apples", 15, "output.tile_bytes: must be a number of bytes, such as 64 MiB"),
    "size of 0": ("64 MiB", "0", 15, "output.tile_bytes: must be greater than 0"),
    "no choice": ("reduce:", "mode: upp\nreduce:", 17, "mode: must be 'up' or 'perturbation'; got 'upp'"),
    "two kinds of data": (
        "{npy:",
        "{zarr: a, npy:",
        8,
        "exactly one of zarr, npy, parquet and dataset; has zarr",
    ),
    "no kind of data": ("{npy: {x: x.npy, y: y.npy}}", "{}", 8, "parquet and dataset; has none"),
    "part of an array pair": ("{x: x.npy, y: y.npy}", "{x: x.npy}", 8, "data.test.npy.y: is missing"),
    "no section": ("{npy: {x: x.npy, y: y.npy}}", "[1, 2]", 8, "data.test: must be a mapping"),
    "unknown reduction": ("TopK", "Top", 17, "must be one of TopK, SelfInfluence, GroupSum; got 'Top'"),
    "no variable": ("${SECRET}", "${SECRTE}", 16, "the environment variable SECRTE is not set"),
    "twice": ("loss:", "loss: a:b\nloss:", 6, "loss is given twice, first in line 5"),
    "no YAML": ("[1, 2]", "", 17, "this is not YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_line_and_field(case: str) -> None:
    old, new, line, message = BAD[case]
    text = GOOD.replace(old, new) if case != "no YAML" else GOOD.replace("{name: TopK", "name: TopK")
    assert text != GOOD
    with pytest.raises(JobError) as refused:
        read(text)
    said = str(refused.value)
    assert message in said
    assert f"job.yaml, line {line}:" in said
    assert not any(secret in said for secret in (*ENVIRONMENT.values(), "literal-key"))


@pytest.mark.parametrize(
    ("old", "shown"),
    [("tile_bytes: 64 MiB", "tile_bytes: ${SECRET}"), ("k: 10", 'k: "${SECRET}"')],
)
def test_an_error_shows_the_variable_and_not_its_value(old: str, shown: str) -> None:
    with pytest.raises(JobError) as refused:
        read(GOOD.replace(old, shown))
    assert "got '${SECRET}'" in str(refused.value)
    assert ENVIRONMENT["SECRET"] not in str(refused.value)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(JobError) as refused:
        read(GOOD.replace("mine:net", "mine").replace("k: 10", "k: 0").replace("64 MiB", "many"))
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "job.yaml, line 2",
        "job.yaml, line 15",
        "job.yaml, line 17",
    ]


def test_variables_are_replaced_after_parsing_and_can_be_escaped() -> None:
    document = Document.parse('{a: "${A}", b: "${B:-c: d}", c: "$${A} costs $5", d: ["${A}x"]}')
    values, secrets = document.resolved({"A": "{x: 1}  # no YAML"})
    assert values["a"] == "{x: 1}  # no YAML"
    assert values["b"] == "c: d"
    assert values["c"] == "${A} costs $5"
    assert values["d"] == ["{x: 1}  # no YAMLx"]
    assert secrets.hide("see {x: 1}  # no YAML and c: d") == "see ${A} and c: d"


@pytest.mark.parametrize(
    "text", ["", "- 1", "3", "a: &a [*a]", "? [1]\n: 2", "a: !!python/object:os.system {}"]
)
def test_what_is_no_job_at_all_is_refused(text: str) -> None:
    with pytest.raises(JobError):
        read(text)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="cannot read the job file"):
        Job.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JobError, match="cannot read the job file"):
        Job.read(tmp_path / "binary.yaml")


def test_every_estimator_of_the_package_can_be_named_with_its_own_arguments() -> None:
    for name, model in ESTIMATORS.items():
        job = read(GOOD.replace("CgInfluence", name).replace("  preconditioner: jacobi\n", ""))
        defaults = job.estimator.constructor_arguments()
        model(lambda_free_module(), lambda output, target: output, **{**defaults, "dtype": None})


def lambda_free_module() -> object:
    import torch

    return torch.nn.Linear(1, 1)


def test_the_schema_accepts_what_the_job_accepts_and_refuses_what_it_refuses() -> None:
    published = schema()
    jsonschema.Draft202012Validator.check_schema(published)
    validator = jsonschema.Draft202012Validator(published)
    assert validator.is_valid(yaml.safe_load(GOOD.replace("1e-2", "0.01")))
    for case in ("unknown field", "missing section", "unknown estimator", "no choice", "unknown reduction"):
        old, new, *_ = BAD[case]
        assert not validator.is_valid(yaml.safe_load(GOOD.replace("1e-2", "0.01").replace(old, new))), case
