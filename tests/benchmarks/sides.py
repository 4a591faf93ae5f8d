"""The packages under measurement, each in a process of its own, in its environment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol import Process
from targets import Ask

OURS = "dask_influence"


class Sides:
    """The processes, each started when it is first needed and kept warm."""

    def __init__(self, pythons: Mapping[str, str], folder: Path, threads: int) -> None:
        self.pythons, self.folder, self.threads = pythons, folder, threads
        self._started: dict[str, Process] = {}

    def __getitem__(self, name: str) -> Process:
        if name not in self._started:
            self._started[name] = Process(
                name, self.pythons[name], f"side_{name}.py", self.folder, self.threads, self.folder
            )
        return self._started[name]

    @property
    def versions(self) -> dict[str, Any]:
        """Of the packages that took part."""
        return {name: process.versions for name, process in self._started.items()}

    def close(self) -> None:
        """End them."""
        for process in self._started.values():
            process.close()

    def run(
        self, side: str, problem: str, ask: Ask, dtype: str = "float32", *, values: bool = False
    ) -> dict[str, Any]:
        """Seconds of one piece of work, and what it computed where asked for."""
        found = self[side].ask(
            f"{problem}-{ask.work}",
            values=values,
            work=ask.work,
            problem=problem,
            dtype=dtype,
            estimator=ask.estimator,
            options=dict(ask.options),
            arguments=dict(ask.arguments),
        )
        print(f"    {side} {problem} {ask.work} {dtype}: {found['seconds']:.3f} s", flush=True)
        return found
