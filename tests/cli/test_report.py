"""``dask-influence report``: a page of a store, with samples where a job file names them, and its exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dask_influence import open_influences
from dask_influence.report import report
from tests.cli.jobs import Folder, invoke
from tests.report.document import cases, check, listed, notes, parsed

Write = Callable[..., Path]


def test_a_page_of_a_job_shows_samples_and_one_of_a_store_ids(folder: Folder, job: Write) -> None:
    path, page = job(), folder.path / "report.html"
    assert invoke("run", path).exit_code == 0
    names = folder.path / "names.txt"
    names.write_text(
        "\n".join(
            f"a {word}"
            for word in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        )
    )
    options = ("--image-shape", "8x8", "--class-names", names, "-t", 2, "-k", 3, "--title", "What <moved> it")
    result = invoke("report", path, "-o", page, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(page)
    document = parsed(page.read_text())
    check(document)
    assert document.one("h1").text == "What <moved> it"
    (case,) = cases(document).values()
    scores = open_influences(folder.path / "scores.zarr")["influence"].to_numpy()[2]
    assert listed(case)[0] == list(map(str, np.argsort(-scores, kind="stable")[:3]))
    assert len(case.all("img")) == 7
    assert "target a " in case.text

    alone = invoke("report", folder.path / "scores.zarr", "--output", page, "-t", 2, "-k", 3)
    assert alone.exit_code == 0, alone.stderr
    assert (
        page.read_bytes()
        == report(folder.path / "scores.zarr", folder.path / "b.html", tests=[2], top=3).read_bytes()
    )
    assert not parsed(page.read_text()).all("img")


def test_other_stores_may_be_jobs_too(folder: Folder, job: Write) -> None:
    own = job(output={"store": "own.zarr"}, reduce={"name": "SelfInfluence"}, data={"train": "train.zarr"})
    assert invoke("run", own).exit_code == 0
    kept = own.rename(folder.path / "own.yaml")
    pixels = {"mode": "perturbation", "output": {"store": "pixels.zarr"}}
    assert invoke("run", job(**pixels)).exit_code == 0
    path = job()
    assert invoke("run", path).exit_code == 0
    page = folder.path / "report.html"
    others = ("--self-influence", kept, "--perturbation", folder.path / "pixels.zarr", "--image-shape", "8x8")
    result = invoke("report", path, "-o", page, *others)
    assert result.exit_code == 0, result.stderr
    document = parsed(page.read_text())
    check(document)
    assert "Suspected mislabels" in document.text
    assert all(len(case.all("img")) == 1 + 2 * 10 for case in cases(document).values())


def test_factors_in_place_of_test_data_are_no_samples(folder: Folder, job: Write) -> None:
    from dask_influence.cli import loading
    from dask_influence.cli.job import Job

    read = Job.read(job())
    model = loading.influence(read).fit(loading.data(read, "train"))
    model.influence_factors_to_zarr(folder.path / "factors.zarr", loading.data(read, "test"))
    path = job(data={"train": "train.zarr", "test": "factors.zarr"})
    assert invoke("run", path).exit_code == 0
    result = invoke("report", path, "-o", folder.path / "r.html", "--image-shape", "8x8")
    assert result.exit_code == 0, result.stderr
    assert parsed((folder.path / "r.html").read_text()).all("img")


def test_an_incomplete_store_gets_its_page_and_exit_code_3(folder: Folder, job: Write) -> None:
    assert invoke("run", job()).exit_code == 0
    store, page = folder.path / "scores.zarr", folder.path / "report.html"
    (strip, *_) = sorted((store / "_run" / "ledger").glob("strip-*"))
    strip.unlink()
    record = store / "_run" / "run.json"
    record.write_text(record.read_text().replace('"complete"', '"running"'))
    result = invoke("report", store, "-o", page)
    assert result.exit_code == 3
    assert "the store is running" in result.stderr
    assert "The run is running" in notes(parsed(page.read_text()))


def test_secrets_of_every_job_that_is_read_are_shown_nowhere(
    folder: Folder, job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"FIRST": "correct-horse-battery", "SECOND": "staple-of-secrets"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    train = {"train": {"dataset": "cli_job_model:pair", "storage_options": {"secret": "${SECOND}"}}}
    own = job(output={"store": "own.zarr"}, reduce={"name": "SelfInfluence"}, data={"train": "train.zarr"})
    assert invoke("run", own).exit_code == 0
    job(output={"store": "own.zarr"}, reduce={"name": "SelfInfluence"}, data=train).rename(
        folder.path / "own.yaml"
    )
    path = job(output={"store": "scores.zarr", "storage_options": {"secret": "${FIRST}"}})
    assert invoke("run", path).exit_code == 0
    page = folder.path / "report.html"
    options = ("--self-influence", folder.path / "own.yaml", "-v")
    good = invoke("report", path, "-o", page, *options)
    assert good.exit_code == 0, good.stderr
    bad = invoke("report", path, "-o", page, *options, "-t", secrets["FIRST"], "-t", secrets["SECOND"])
    assert bad.exit_code == 2
    assert "'${FIRST}' is not in" in bad.stderr
    shown = good.stdout + good.stderr + bad.stdout + bad.stderr + page.read_text()
    assert not [secret for secret in secrets.values() if secret in shown]


def test_what_is_refused_leaves_no_page(folder: Folder, job: Write) -> None:
    path, page = job(), folder.path / "report.html"
    assert invoke("report", path, "-o", page).exit_code == 1  # no store yet
    assert invoke("run", path).exit_code == 0
    unknown = invoke("report", path, "-o", page, "-t", 99)
    assert unknown.exit_code == 2
    assert "'99' is not in" in unknown.stderr
    for options in (
        ("--image-shape", "eight"),
        ("--image-shape", "8x9"),
        ("--regularization", 3.0),
        ("-k", 0),
    ):
        assert invoke("report", path, "-o", page, *options).exit_code == 2
    assert invoke("report", path).exit_code == 2
    assert invoke("report", path, "-o", folder.path / "none" / "r.html").exit_code == 2
    (folder.path / "binary").write_bytes(b"\xff\xfe\x00")
    assert invoke("report", path, "-o", page, "--class-names", folder.path / "binary").exit_code == 2
    assert not page.exists()
