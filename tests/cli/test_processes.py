"""Jobs as processes: signals, a scheduler that is there, a client that is killed; equal bits after all of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import click
import numpy as np
import pytest
from click.testing import CliRunner
from dask.cli import _register_command_ep

from dask_influence import open_influences
from dask_influence.cli.cluster import Scheduler
from dask_influence.errors import ClusterError, ConfigurationError
from tests.cli.jobs import Folder, command, dask, finished, free_port, invoke, status_of, wait_for

Write = Callable[..., Path]

SLOW = """
import time
from pathlib import Path
import torch

class Slow(torch.nn.Linear):
    def forward(self, x):
        if SECONDS and Path("FOLDER", "slow").exists():
            time.sleep(SECONDS)
        return super().forward(x)

SECONDS = 0.0

def net(seconds, password=None):
    global SECONDS
    SECONDS = seconds
    return Slow(64, 10)
"""


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """Address of a scheduler process with two workers."""
    address = f"tcp://127.0.0.1:{free_port()}"
    port = address.rpartition(":")[2]
    with ExitStack() as stack:
        stack.enter_context(dask("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"))
        for _ in range(2):
            options = ("--nthreads", 1, "--memory-limit", "2GiB", "--no-dashboard")
            stack.enter_context(dask("worker", address, *options))
        yield address


def expected(folder: Folder, job: Write, **sections: Any) -> np.ndarray[Any, Any]:
    """Scores of the job that nothing disturbed, in one process."""
    path = job(**{**sections, "cluster": {"workers": 0}})
    result = invoke("run", path)
    assert result.exit_code == 0, result.stderr
    scores = open_influences(folder.path / "scores.zarr")["influence"].to_numpy()
    shutil.rmtree(folder.path / "scores.zarr")
    return scores


def slow(folder: Folder, seconds: float = 0.03, **cluster: Any) -> dict[str, Any]:
    """Sections of a job of many strips whose model takes its time for as long as :func:`hold` says so."""
    (folder.path / "cli_slow_model.py").write_text(SLOW.replace("FOLDER", str(folder.path)))
    model = {
        "factory": "cli_slow_model:net",
        "arguments": {"seconds": seconds},
        "weights": "weights.safetensors",
    }
    return {"model": model, "cluster": cluster, "output": {"store": "scores.zarr", "tile_bytes": 80}}


@contextmanager
def hold(folder: Folder) -> Iterator[None]:
    """Where there has to be time to see a run, or to end it."""
    (folder.path / "slow").touch()
    yield
    (folder.path / "slow").unlink()


def strips_done(folder: Folder) -> int:
    return len(list((folder.path / "scores.zarr" / "_run" / "ledger").glob("strip-*.json")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_and_the_same_call_goes_on(
    folder: Folder, job: Write, number: signal.Signals
) -> None:
    sections = slow(folder, workers=0)
    undisturbed = expected(folder, job, **sections)
    path = job(**sections)
    with hold(folder):
        process = command("run", path, DASK_INFLUENCE__STATUS_INTERVAL="0 s")
        wait_for(lambda: strips_done(folder) >= 2, process)
        process.send_signal(number)
        code, _, err = finished(process)
    assert code == 128 + number, err
    assert "Traceback" not in err
    assert f"stopped by {number.name}; run the same job again" in err
    said = status_of(folder.path / "scores.zarr")
    assert (said["state"], said["stage"]) == ("interrupted", "strips")
    begun = strips_done(folder)
    told = invoke("status", path)
    assert told.exit_code == 3
    assert "interrupted" in told.stdout

    resumed = invoke("run", path)
    assert resumed.exit_code == 0, resumed.stderr
    assert f"strips: {begun} of " in resumed.stderr  # what was done is not done again
    found = open_influences(folder.path / "scores.zarr")["influence"].to_numpy()
    np.testing.assert_array_equal(found, undisturbed)


def test_ctrl_c_ends_the_workers_of_a_local_cluster(folder: Folder, job: Write) -> None:
    path = job(**slow(folder, 0.01, workers=2))
    with hold(folder):
        process = command("run", path)
        wait_for(lambda: strips_done(folder) >= 1, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everyone in the group
        code, _, err = finished(process)
    assert code == 130, err
    end = time.monotonic() + 30
    while group_lives(process.pid):
        assert time.monotonic() < end, "worker processes were left behind"
        time.sleep(0.1)


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_job_on_a_scheduler_survives_its_client(
    folder: Folder, job: Write, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLI_SECRET", "correct-horse-battery")
    sections = slow(folder, 0.05)
    sections["model"]["arguments"]["password"] = "${CLI_SECRET}"
    sections["output"]["storage_options"] = {"secret": "${CLI_SECRET}"}
    undisturbed = expected(folder, job, **sections)
    path = job(**sections)
    with hold(folder):
        process = command(
            "run", path, "--scheduler-address", scheduler, DASK_INFLUENCE__STATUS_INTERVAL="0 s"
        )
        wait_for(lambda: strips_done(folder) >= 2, process)
        told = invoke("status", path)  # another process than the one that runs it, from the store alone
        assert told.exit_code == 3
        assert f"by process {process.pid} on {socket.gethostname()}" in told.stdout
        assert "strips" in told.stdout
        process.kill()
    said = "".join(process.communicate())
    assert status_of(folder.path / "scores.zarr")["state"] == "running"

    report = folder.path / "report.html"
    options = ("--performance-report", report) if has_bokeh() else ()
    resumed = invoke("run", path, "-v", *options, DASK_SCHEDULER_ADDRESS=scheduler)
    assert resumed.exit_code == 0, resumed.stderr
    assert "2 workers, 2 threads" in resumed.stderr
    assert not options or report.stat().st_size > 1000
    found = open_influences(folder.path / "scores.zarr")["influence"].to_numpy()
    np.testing.assert_array_equal(found, undisturbed)
    assert invoke("verify", path).exit_code == 0
    written = [file.read_bytes() for file in (folder.path / "scores.zarr").rglob("*") if file.is_file()]
    shown = [said, told.stdout, resumed.stdout, resumed.stderr]
    assert not any("correct-horse" in text for text in shown)
    assert not any(b"correct-horse" in content for content in written)


def has_bokeh() -> bool:
    from importlib.util import find_spec

    return find_spec("bokeh") is not None


def test_workers_of_a_scheduler_verify(
    folder: Folder, job: Write, scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job()
    assert invoke("run", path).exit_code == 0
    monkeypatch.setattr(
        "dask_influence.execution.verify.ThreadPoolExecutor", None
    )  # no threads of this process
    whole = invoke("verify", path, "--scheduler-address", scheduler)
    assert whole.exit_code == 0, whole.stderr
    assert "all as written" in whole.stdout
    next((folder.path / "scores.zarr" / "influence" / "c" / "0").iterdir()).write_bytes(b"")
    assert invoke("verify", path, "--scheduler-address", scheduler).exit_code == 3


def test_metrics_are_served_while_a_run_goes_on(folder: Folder, job: Write) -> None:
    pytest.importorskip("prometheus_client", reason="the extra [metrics]")
    port = free_port()
    path = job(**slow(folder, workers=0))
    with hold(folder):
        process = command("run", path, "--metrics-port", port, "--log-format", "json")
        wait_for(lambda: strips_done(folder) >= 2, process)
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            said = answer.read().decode()
    assert "dask_influence_total{" in said
    assert 'stage="strips"' in said
    code, _, err = finished(process)
    assert code == 0
    assert all(json.loads(line)["run"] for line in err.splitlines())


def test_tls_reaches_a_scheduler_that_wants_it_and_nothing_else_does(
    folder: Folder, job: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cryptography", reason="makes the certificates")
    from distributed.security import Security

    made = Security.temporary()
    files = {"ca": made.tls_ca_file, "cert": made.tls_client_cert, "key": made.tls_client_key}
    for name, content in files.items():
        (tmp_path / f"{name}.pem").write_text(str(content))
    address = f"tls://127.0.0.1:{free_port()}"
    ca, cert, key = (tmp_path / f"{name}.pem" for name in files)
    options = ("--tls-ca-file", ca, "--tls-cert", cert, "--tls-key", key)
    port = address.rpartition(":")[2]
    with (
        dask("scheduler", "--host", address.rpartition(":")[0], "--port", port, "--no-dashboard", *options),
        dask("worker", address, "--nthreads", 1, "--memory-limit", "2GiB", "--no-dashboard", *options),
    ):
        result = invoke("run", job(), "--scheduler-address", address, *options)
        assert result.exit_code == 0, result.stderr
        assert f"scheduler {address}" in result.stderr
        monkeypatch.setattr("dask_influence.cli.cluster.CONNECT_TIMEOUT", "2 s")
        with pytest.raises(ClusterError, match="no scheduler answers"):
            Scheduler(address=address).join()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"address": "tcp://a:1", "file": "f"}, "both given"),
        ({"address": "tcp://a:1", "tls_cert": "c"}, "--tls-ca-file, --tls-key was not given"),
        ({"tls_ca_file": "a", "tls_cert": "c", "tls_key": "k"}, "give --scheduler-address too"),
    ],
)
def test_options_of_a_scheduler_that_do_not_go_together_are_refused(
    given: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Scheduler(**given)


def test_no_scheduler_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask_influence.cli.cluster.CONNECT_TIMEOUT", "1 s")
    with pytest.raises(ClusterError, match=r"no scheduler answers at tcp://127\.0\.0\.1"):
        Scheduler(address=f"tcp://127.0.0.1:{free_port()}").join()


def test_dask_has_the_command_and_does_not_load_torch_for_it() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, dask_influence.cli; print(dask_influence.cli.cli.name, 'torch' in sys.modules, "
            "'pydantic' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["influence", "False", "False"]


def test_the_package_runs_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "dask_influence", "--help"], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert "python -m dask_influence [OPTIONS] COMMAND" in shown.stdout


def test_the_entry_points_are_those_of_the_command() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"dask-influence": "dask_influence.cli:cli"}
    (given,) = project["entry-points"]["dask_cli"].items()
    group = click.Group("dask")
    _register_command_ep(group, EntryPoint(*given, "dask_cli"))  # as every dask command does
    assert CliRunner().invoke(group, ["influence", "version"]).exit_code == 0
