"""How a driver and the packages under measurement speak: one warm process per package.

Each process runs in the environment of its package and does a named piece of work whenever it is
asked. Requests and answers are one JSON object a line, over standard input and what was standard
output; anything the packages print goes to standard error. This file runs in every environment,
and so needs nothing but torch and numpy.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

Measured = tuple[float, dict[str, Any]]
"""Seconds of the timed part, and what came of it; an array under ``"values"``."""

HERE = Path(__file__).resolve().parent


class SideError(RuntimeError):
    """A side could not do what it was asked for, or has ended."""


# -- the driver's end ---------------------------------------------------------------------
class Process:
    """A side, running in the environment of its package."""

    def __init__(
        self, name: str, python: str, script: str, folder: Path, threads: int, *arguments: Path
    ) -> None:
        self.name, self.folder = name, folder
        (folder / name).mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
        self.log = (folder / f"{name}.log").open("w")
        self.process = subprocess.Popen(
            [python, str(HERE / script), str(folder / name), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.versions = self._answer()["versions"]

    def ask(self, title: str, *, values: bool = False, **request: Any) -> dict[str, Any]:
        """What one request is answered with; with ``values``, what was computed stands in it."""
        path = self.folder / f"{self.name}-{title}.npy" if values else None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**request, "values": str(path) if path else None}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise SideError(f"{self.name} has ended") from None
        answer = self._answer()
        return {**answer, "values": np.load(path)} if path else answer

    def close(self) -> None:
        """Let the process end by itself, with its cluster."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the process ended"}
        if "error" in answer:
            self.log.flush()
            tail = Path(self.log.name).read_text()[-3000:]
            raise SideError(f"{self.name}: {answer['error']}\n{tail}")
        return answer


# -- the package's end --------------------------------------------------------------------
def serve(packages: Sequence[str], answer: Callable[[dict[str, Any]], Measured]) -> None:
    """Answer requests until standard input closes.

    Each is answered with ``{"seconds": …}`` and what else was measured; where ``"values"`` is a
    path, the array computed is written there, as .npy.
    """
    answers = _claim_standard_output()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    versions = {name: version(name) for name in (*packages, "torch", "numpy")}
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        path = request.pop("values")
        try:
            seconds, outcome = answer(request)
        except Exception as error:  # noqa: BLE001 - the driver reports it and stops
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
            continue
        values = outcome.pop("values", None)
        if path and values is not None:
            np.save(path, values)
        print(json.dumps({"seconds": seconds, **outcome}), file=answers, flush=True)


def timed(function: Any, *args: Any, **kwargs: Any) -> tuple[float, Any]:
    """Seconds and result of one call."""
    start = time.perf_counter()
    result = function(*args, **kwargs)
    return time.perf_counter() - start, result


def _claim_standard_output() -> TextIO:
    """Keep standard output for answers alone: whatever else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
