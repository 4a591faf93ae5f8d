"""Each command in this process: what it prints, what it writes, and its exit code."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from dask_influence import open_influences
from dask_influence.cli import loading
from dask_influence.cli.job import Job
from dask_influence.cli.session import Stopped
from dask_influence.cli.status import StatusFile
from dask_influence.storage.stores import Location
from tests import oracles
from tests.cli.jobs import Folder, invoke, status_of

Write = Callable[..., Path]


def scores_of(path: Path) -> np.ndarray[Any, Any]:
    return open_influences(path)["influence"].to_numpy()


def oracle(folder: Folder) -> np.ndarray[Any, Any]:
    """+ gᵀ (GGN + λI)⁻¹ g, dense, float64."""
    import safetensors.torch
    import torch

    model = torch.nn.Linear(64, 10)
    model.load_state_dict(safetensors.torch.load_file(folder.path / "weights.safetensors"))
    model = model.double()
    loss = torch.nn.functional.cross_entropy
    x, y = torch.from_numpy(folder.x).double(), torch.from_numpy(folder.y)
    train, test = (x[:53], y[:53]), (x[53:60], y[53:60])
    # of a linear model with cross-entropy the Hessian is the Gauss-Newton matrix
    inverse = oracles.inverse(oracles.hessian(model, loss, *train), 0.5)
    return oracles.up(model, loss, inverse, test, train).numpy()


def test_run_writes_the_scores_and_says_so(folder: Folder, job: Write) -> None:
    result = invoke("run", job())
    assert result.exit_code == 0, result.stderr
    assert "state           complete" in result.stdout
    assert "strips" in result.stderr  # progress, as lines
    np.testing.assert_allclose(scores_of(folder.path / "scores.zarr"), oracle(folder), rtol=1e-3, atol=1e-5)
    said = status_of(folder.path / "scores.zarr")
    assert (said["state"], said["stage"], said["error"]) == ("complete", "strips", None)
    assert said["done"] == said["total"] > 1


def test_run_again_does_nothing_and_other_scores_are_refused(folder: Folder, job: Write) -> None:
    assert invoke("run", job()).exit_code == 0
    store = folder.path / "scores.zarr"
    before = {path: path.stat().st_mtime_ns for path in (store / "influence").rglob("*") if path.is_file()}
    said = status_of(store)
    assert invoke("run", job()).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before

    estimator = {"name": "DirectInfluence", "hessian_regularization": 0.7, "curvature": "ggn"}
    refused = invoke("run", job(estimator=estimator))
    assert refused.exit_code == 2
    assert "hessian_regularization: stored 0.5, asked 0.7" in refused.stderr
    assert status_of(store)["job"] == said["job"]  # nor is the status of the other job touched
    assert invoke("run", job(estimator=estimator), "--no-resume").exit_code == 2
    assert invoke("run", job(estimator=estimator), "--overwrite").exit_code == 0
    assert status_of(store)["job"] != said["job"]


@pytest.mark.parametrize(
    "sections",
    [
        {"estimator": {"name": "ArnoldiInfluence", "rank": 5000}},
        {"output": {"store": "scores.zarr", "memory_limit": 1000}},
        {"output": {"store": "scores.zarr", "test_ids": [1, 2]}},
        {"reduce": {"name": "TopK", "k": 54}},
        {"mode": "upp"},
        {"data": {"train": "train.zarr", "test": {"npy": {"x": "y.npy", "y": "y.npy"}}}},
        {"loss": "torch.nn.functional:mse_loss"},
    ],
)
def test_a_job_is_refused_before_the_fit_and_leaves_nothing(
    folder: Folder, job: Write, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    fits: list[object] = []
    monkeypatch.setattr("dask_influence.fitting.fit", lambda *arguments: fits.append(arguments))
    result = invoke("run", job(**sections))
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not fits
    assert not (folder.path / "scores.zarr").exists() or not list((folder.path / "scores.zarr").rglob("*.*"))


def test_a_run_stopped_in_its_fit_goes_on_too(
    folder: Folder, job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = StatusFile.progress

    def stop(self: StatusFile, stage: str, *rest: Any) -> None:
        note(self, stage, *rest)
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StatusFile, "progress", stop)
        assert invoke("run", job()).exit_code == 143
    said = status_of(folder.path / "scores.zarr")
    assert (said["state"], said["stage"]) == ("interrupted", "pass 1")
    assert invoke("status", job()).exit_code == 3
    assert invoke("run", job()).exit_code == 0
    np.testing.assert_allclose(scores_of(folder.path / "scores.zarr"), oracle(folder), rtol=1e-3, atol=1e-5)


def test_an_error_of_nobody_has_a_traceback_and_exit_code_1(
    job: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("dask_influence.cli.loading.model", broken)
    result = invoke("run", job())
    assert result.exit_code == 1
    assert "ZeroDivisionError: of all things" in result.stderr
    assert "Traceback" in result.stderr


def test_reductions_and_sweeps_are_those_of_all_scores(folder: Folder, job: Write) -> None:
    full = invoke("run", job())
    assert full.exit_code == 0
    scores = scores_of(folder.path / "scores.zarr")
    reduced = invoke("run", job(output={"store": "top.zarr"}, reduce={"name": "TopK", "k": 3}))
    assert reduced.exit_code == 0, reduced.stderr
    best = open_influences(folder.path / "top.zarr")["helpful_score"].to_numpy()
    np.testing.assert_array_equal(best, -np.sort(-scores, axis=1)[:, :3])

    groups = {"name": "GroupSum", "labels": [j % 3 for j in range(53)]}
    assert invoke("run", job(output={"store": "groups.zarr"}, reduce=groups)).exit_code == 0
    sums = open_influences(folder.path / "groups.zarr")["group_influence"].to_numpy()
    np.testing.assert_allclose(sums[:, 1], scores[:, 1::3].astype(float).sum(axis=1), rtol=1e-6)

    alone = job(output={"store": "self.zarr"}, reduce={"name": "SelfInfluence"}, data={"train": "train.zarr"})
    assert invoke("run", alone).exit_code == 0
    assert open_influences(folder.path / "self.zarr")["self_influence"].shape == (53,)

    swept = job(output={"store": "swept.zarr"}, hessian_regularizations=[0.5, 2.0])
    assert invoke("run", swept).exit_code == 0
    both = open_influences(folder.path / "swept.zarr")["influence"]
    np.testing.assert_allclose(both.sel(regularization=0.5), scores, rtol=1e-4, atol=1e-6)

    for store, options in (("top.zarr", ()), ("swept.zarr", ("--regularization", "0.5"))):
        result = invoke("top", folder.path / store, "-t", 2, "-k", 3, "--json", *options)
        assert result.exit_code == 0, result.stderr
        (found,) = json.loads(result.stdout)
        order = np.argsort(-scores[2], kind="stable")
        assert [one["train"] for one in found["helpful"]] == order[:3].tolist()
        assert [one["train"] for one in found["harmful"]] == np.argsort(scores[2], kind="stable")[:3].tolist()
    assert invoke("top", folder.path / "top.zarr", "-t", 2, "-k", 4).exit_code == 2
    assert invoke("top", folder.path / "swept.zarr", "-t", 2).exit_code == 2
    assert invoke("top", folder.path / "groups.zarr", "-t", 2).exit_code == 2


def test_factors_in_a_store_take_the_place_of_test_data(folder: Folder, job: Write) -> None:
    assert invoke("run", job()).exit_code == 0
    read = Job.read(job())
    model = loading.influence(read).fit(loading.data(read, "train"))
    model.influence_factors_to_zarr(folder.path / "factors.zarr", loading.data(read, "test"))
    sections = {"data": {"train": "train.zarr", "test": "factors.zarr"}, "output": {"store": "again.zarr"}}
    result = invoke("run", job(**sections))
    assert result.exit_code == 0, result.stderr
    again = scores_of(folder.path / "again.zarr")
    np.testing.assert_allclose(again, scores_of(folder.path / "scores.zarr"), rtol=1e-5, atol=1e-7)


def test_a_plan_that_does_not_fit_is_shown_and_refused(job: Write) -> None:
    result = invoke("plan", job(output={"store": "scores.zarr", "memory_limit": "1 MiB"}))
    assert result.exit_code == 2
    assert "peak bytes" in result.stdout
    assert "memory_limit allows 1.0 MiB" in result.stderr


def test_verify_of_a_store_whose_run_has_not_begun(folder: Folder, job: Write) -> None:
    StatusFile(Location.of(folder.path / "scores.zarr"), "r1", "job").progress("pass 1", 1, 9, None)
    result = invoke("verify", job())
    assert result.exit_code == 3
    assert "not begun" in result.stdout


def test_plan_shows_the_plan_and_fits_nothing(folder: Folder, job: Write) -> None:
    result = invoke("plan", job(cluster={"workers": 3}), "--bandwidth", "1GB")
    assert result.exit_code == 0, result.stderr
    assert "scores                     7 × 53" in result.stdout
    assert "3 of 1 threads" in result.stdout
    assert not (folder.path / "scores.zarr").exists()
    assert (
        "100 of 2 threads of 7.5 GiB"
        in invoke("plan", job(), "--workers", 100, "--threads-per-worker", 2, "--worker-memory", "8GB").stdout
    )
    assert invoke("plan", job(), "--bandwidth", "fast").exit_code == 2


def test_status_tells_done_from_begun_from_absent(folder: Folder, job: Write) -> None:
    path = job()
    absent = invoke("status", path)
    assert absent.exit_code == 1
    assert "holds no run" in absent.stderr
    invoke("run", path)
    assert invoke("status", path).exit_code == 0
    store = folder.path / "scores.zarr"
    (strip, *_) = sorted((store / "_run" / "ledger").glob("strip-*"))
    strip.unlink()
    record = store / "_run" / "run.json"
    record.write_text(record.read_text().replace('"complete"', '"running"'))
    partial = invoke("status", store, "--json")
    assert partial.exit_code == 3
    found = json.loads(partial.stdout)
    assert found["state"] == "running"
    assert found["done"] == found["total"] - 1
    assert invoke("run", path).exit_code == 0
    assert invoke("status", path).exit_code == 0


def test_verify_names_what_is_damaged(folder: Folder, job: Write) -> None:
    path = job()
    invoke("run", path)
    whole = invoke("verify", path)
    assert whole.exit_code == 0
    assert "all as written" in whole.stdout
    shard = next(
        p for p in sorted((folder.path / "scores.zarr" / "influence" / "c").rglob("*")) if p.is_file()
    )
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    before = scores_of(folder.path / "scores.zarr")
    shard.write_bytes(content)
    damaged = invoke("verify", path, "--json")
    assert damaged.exit_code == 3
    (found,) = json.loads(damaged.stdout)["damaged"]
    assert found["key"] == shard.relative_to(folder.path / "scores.zarr").as_posix()
    assert invoke("run", path, "--repair").exit_code == 0
    assert invoke("verify", path).exit_code == 0
    np.testing.assert_array_equal(scores_of(folder.path / "scores.zarr"), before)


def test_top_lists_ids_of_either_kind_and_names_what_is_not_there(folder: Folder, job: Write) -> None:
    ids = {"test_ids": [f"t{i}" for i in range(7)], "train_ids": [10 * j for j in range(53)]}
    path = job(output={"store": "scores.zarr", **ids})
    assert invoke("run", path).exit_code == 0
    scores = open_influences(folder.path / "scores.zarr")["influence"]
    result = invoke("top", path, "-t", "t3", "-t", "t0", "-k", 2)
    assert result.exit_code == 0
    best = int(scores.sel(test="t3").idxmax("train"))
    assert result.stdout.startswith("test t3\n  helpful")
    assert f"\n  {best}  " in result.stdout
    assert "test t0" in result.stdout
    unknown = invoke("top", path, "-t", "t9")
    assert unknown.exit_code == 2
    assert "--test t9 is not in the store, which holds 7 test points: t0, t1" in unknown.stderr
    assert invoke("top", path).exit_code == 2  # click's own: no --test


def test_top_of_an_incomplete_row_warns(tmp_path: Path) -> None:
    from dask_influence.cli.top import top

    values = [[1.0, np.nan, -2.0]]
    scores = xr.Dataset({"influence": (("test", "train"), values)}, coords={"test": [0], "train": [0, 1, 2]})
    (found,) = top(scores, ["0"], 5)
    assert found.missing == 1
    assert found.helpful == [(0, 1.0), (2, -2.0)]


def test_schema_and_version_and_help() -> None:
    assert json.loads(invoke("schema").stdout)["title"] == "Job"
    assert "torch" in invoke("version").stdout
    said = invoke("--help").stdout
    assert "Exit codes" in said
    assert all(name in said for name in ("plan", "run", "status", "verify", "top"))
    assert invoke("run").exit_code == 2
    assert invoke("run", "none.yaml").exit_code == 2
    assert invoke("fly").exit_code == 2


def test_logs_are_json_where_asked_for_and_loggers_are_left_as_they_were(folder: Folder, job: Write) -> None:
    handlers = logging.getLogger("distributed").handlers
    result = invoke("run", job(), "--log-format", "json")
    assert result.exit_code == 0
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    strips = [line for line in lines if line.get("stage") == "strips"]
    assert strips[-1]["done"] == strips[-1]["strip"] == strips[-1]["total"]
    assert len({line["run"] for line in lines}) == 1
    assert logging.getLogger("distributed").handlers is handlers
    quiet = invoke("run", job(logging={"level": "error"}), "--overwrite")
    assert quiet.stderr == ""


SECRET = "correct-horse-battery"


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"data": {"train": {"dataset": "cli_job_model:picky", "arguments": {"password": "${CLI_SECRET}"}}}},
        {"model": {"factory": "cli_job_model:nett", "arguments": {"password": "${CLI_SECRET}"}}},
        {"mode": "${CLI_SECRET}"},
        {"loss": {"function": "cli_job_model:pair", "arguments": {"password": "${CLI_SECRET}"}}},
        {"output": {"store": "${CLI_SECRET}://a/b"}},
        {"output": {"store": "s3://${CLI_SECRET}@a/b"}},
        {"data": {"train": "${CLI_SECRET}/none.zarr"}},
    ],
)
def test_a_secret_is_shown_nowhere(
    folder: Folder, job: Write, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], form: str
) -> None:
    monkeypatch.setenv("CLI_SECRET", SECRET)
    good = {
        "model": {
            "factory": "cli_job_model:net",
            "weights": "weights.safetensors",
            "arguments": {"password": "${CLI_SECRET}"},
        },
        "output": {
            "store": "scores.zarr",
            "storage_options": {"secret": "${CLI_SECRET}", "key": "literal-key"},
        },
    }
    path = job(**(good | sections))
    result = invoke("run", path, "-v", "--log-format", form)
    assert result.exit_code == (2 if sections else 0), result.stderr
    assert result.stderr
    shown = result.stdout + result.stderr
    written = b"".join(p.read_bytes() for p in (folder.path / "scores.zarr").rglob("*") if p.is_file())
    for secret in (SECRET, "literal-key"):
        assert secret not in shown
        assert secret.encode() not in written
