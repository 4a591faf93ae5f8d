"""What tests of the command line share: the files of a job, and processes that run it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from dask_influence.cli import cli

FACTORY = """
import torch

def net(slow=0.0, password=None):
    return torch.nn.Linear(64, 10)

def pair(count=53):
    from sklearn.datasets import load_digits
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x[:count] / 16).float(), torch.tensor(y[:count])

def picky(password):
    raise ValueError(f"wrong password {password}")

def no_model():
    return 3
"""


def invoke(*arguments: object, **environment: str) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], env=environment)


@dataclass
class Folder:
    """Where a job lives, and its samples."""

    path: Path
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]


def command(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    """The command line in a process (and a group) of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dask_influence.cli", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str], timeout: float = 200) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a process that ends by itself."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def status_of(store: Path) -> dict[str, Any]:
    """What the client of a run last wrote; empty where it has not."""
    try:
        return json.loads((store / "_run" / "status.json").read_text())
    except FileNotFoundError:
        return {}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until ``condition`` holds; fails where the process ends or the time is over before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextmanager
def dask(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A ``dask`` command as a process, ended with its children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dask", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
