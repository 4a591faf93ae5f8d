"""What is wrong outside the job file: one line that says what, an exit code, and nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from tests.cli.jobs import Folder, dask, free_port, invoke

Write = Callable[..., Path]

SECRET = "a-secret-that-nobody-may-see"

OTHER_TORCH = """
import torch

torch.__version__ = "1.2.3"
"""

REFUSAL = b"""<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>SignatureDoesNotMatch</Code><Message>The request signature does not match.</Message></Error>"""


class Refuses(BaseHTTPRequestHandler):
    """An object store to which no credentials are right."""

    def _refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", str(len(REFUSAL)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(REFUSAL)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._refuse
        raise AttributeError(name)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def empty() -> Iterator[str]:
    """A server without a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def bucket(endpoint: str) -> dict[str, Any]:
    options = {
        "endpoint": endpoint,
        "access_key_id": "SOMEBODY",
        "secret_access_key": SECRET,
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
    }
    return {"output": {"store": "s3://nowhere/scores.zarr", "storage_options": options}}


def the_error(said: str) -> str:
    """The one line that is an error."""
    assert "Traceback" not in said
    (line,) = (line for line in said.splitlines() if " ERROR " in line)
    assert said.splitlines()[-1] == line
    return line


def test_a_bucket_that_is_not_there(empty: str, job: Write) -> None:
    result = invoke("run", job(**bucket(empty)))
    assert result.exit_code == 1
    assert "s3://nowhere/scores.zarr" in the_error(result.stderr)
    assert "bucket" in the_error(result.stderr)


def test_credentials_that_are_wrong(refusing: str, job: Write) -> None:
    result = invoke("run", job(**bucket(refusing)))
    assert result.exit_code == 1
    assert "the credentials were refused" in the_error(result.stderr)
    assert SECRET not in result.stderr


def test_a_scheduler_that_does_not_answer(
    job: Write, monkeypatch: pytest.MonkeyPatch, folder: Folder
) -> None:
    monkeypatch.setattr("dask_influence.cli.cluster.CONNECT_TIMEOUT", "1 s")
    address = f"tcp://127.0.0.1:{free_port()}"
    result = invoke("run", job(), "--scheduler-address", address)
    assert result.exit_code == 1
    assert f"no scheduler answers at {address}" in the_error(result.stderr)
    assert not (folder.path / "scores.zarr").exists()


def test_workers_of_another_version(job: Write, folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.path / "other.py").write_text(OTHER_TORCH)
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    options = (
        "--nthreads",
        1,
        "--memory-limit",
        "2GiB",
        "--no-dashboard",
        "--preload",
        folder.path / "other.py",
    )
    with (
        dask("scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"),
        dask("worker", address, *options),
    ):
        result = invoke("run", job(), "--scheduler-address", address)
    assert result.exit_code == 1
    assert "has torch 1.2.3 and this process has" in the_error(result.stderr)
    assert not list((folder.path / "scores.zarr").rglob("*.*"))


def unshared(command: str) -> list[str]:
    """A command that may mount what nobody else sees."""
    return ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", command]


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(unshared("mount -t tmpfs none /mnt"), capture_output=True).returncode != 0,
    reason="takes a file system of its own, which this machine does not let its users have",
)
def test_a_disk_that_is_full_and_then_is_not(job: Write, folder: Folder) -> None:
    """The same file system with more room: the same call finishes what was begun."""
    path = job(output={"store": "disk/scores.zarr", "tile_bytes": 600})
    (folder.path / "disk").mkdir()
    run = f"{sys.executable} -m dask_influence.cli run {path}"
    ran = subprocess.run(
        unshared(
            f"mount -t tmpfs -o size=40k none {folder.path / 'disk'}; {run}; echo code $?; "
            f"mount -o remount,size=40m {folder.path / 'disk'}; {run}; echo code $?"
        ),
        capture_output=True,
        text=True,
    )
    codes = [line for line in ran.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 1", "code 0"], ran.stderr
    assert "No space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr
