"""Clusters without Kubernetes, run for real but for the programs that reach other machines."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dask_influence.cli.status import Report
from dask_influence.storage.stores import Location
from tests.deploy.manifests import KUBERNETES, ROOT, tool

SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
shift # the host: this one
exec bash -c "$*"
"""

SBATCH = """#!/usr/bin/env bash
script=$(mktemp -p "$(dirname "$0")")
cp "${@: -1}" "$script" # as Slurm does: the file is gone when the job begins
setsid bash "$script" > /dev/null 2>&1 &
echo "Submitted batch job $!"
"""

SCANCEL = """#!/usr/bin/env bash
kill -- -"$1"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The job of the manifests, with a store beside it, and a folder of programs that come first."""
    for file in (KUBERNETES / "base" / "job").iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    job = tmp_path / "job.yaml"
    job.write_text(job.read_text().replace("/data/", "").replace("count: 4000", "count: 300"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def program(folder: Path, name: str, content: str) -> None:
    (folder / "bin" / name).write_text(content)
    (folder / "bin" / name).chmod(0o755)


def run(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    return subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_workers_over_ssh(folder: Path) -> None:
    program(folder, "ssh", SSH)
    for name, module in (("dask", "dask"), ("dask-influence", "dask_influence.cli")):
        program(folder, name, f'#!/usr/bin/env bash\nexec {sys.executable} -m {module} "$@"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings = {
        "ADDRESS": "127.0.0.1",
        "PORT": str(port),
        "CORES": "1",
        "MEMORY": "2GiB",
        "SCRATCH": str(folder),
    }
    ran = run(folder, ROOT / "deploy/ssh/run.sh", "job.yaml", "host-1", "host-2", **settings)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert Report.of(Location.of(folder / "scores.zarr")).complete
    assert f"scheduler tcp://127.0.0.1:{port}" in ran.stderr
    refused = run(folder, ROOT / "deploy/ssh/run.sh", "job.yaml")
    assert refused.returncode != 0
    assert "run.sh JOB HOST" in refused.stderr


def test_workers_as_jobs_of_slurm(folder: Path) -> None:
    program(folder, "sbatch", SBATCH)
    program(folder, "scancel", SCANCEL)
    submit = ROOT / "deploy/slurm/submit.py"
    ran = run(folder, sys.executable, submit, "job.yaml", "--workers=1", "--cores=1", "--memory=2GiB")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "1 workers, 1 threads" in ran.stderr
    assert Report.of(Location.of(folder / "scores.zarr")).complete
    (script,) = (file.read_text() for file in (folder / "bin").glob("tmp.*"))
    assert re.search(r"--nthreads 1\b", script)
    assert "#SBATCH --cpus-per-task=1" in script
    assert "--death-timeout 120" in script


def test_scripts_are_clean() -> None:
    scripts = [
        ROOT / "deploy/ssh/run.sh",
        ROOT / "deploy/slurm/job.sbatch",
        KUBERNETES / "secrets/make-tls.sh",
    ]
    found = subprocess.run([tool("shellcheck"), *map(str, scripts)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_certificates_are_signed_by_their_authority(tmp_path: Path) -> None:
    for name in ("one", "two"):
        subprocess.run([KUBERNETES / "secrets/make-tls.sh", tmp_path / name], check=True, capture_output=True)
    for authority, right in (("one", True), ("two", False)):
        command = [
            "openssl",
            "verify",
            "-CAfile",
            tmp_path / authority / "ca.crt",
            tmp_path / "one" / "tls.crt",
        ]
        assert (subprocess.run(command, capture_output=True).returncode == 0) == right
    assert (tmp_path / "one" / "tls.key").stat().st_mode & 0o077 == 0
