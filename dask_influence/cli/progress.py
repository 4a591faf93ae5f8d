"""Progress of a run to everyone who wants to know: a terminal, a log, the store, Prometheus."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dask_influence import settings
from dask_influence.cli.status import told
from dask_influence.errors import ConfigurationError
from dask_influence.execution.units import format_bytes

log = logging.getLogger(__name__)

Memory = Callable[[], tuple[int, int] | None]
"""Bytes that the workers hold together and may hold, where there are workers."""


class Sink(Protocol):
    """Is told how far each stage is."""

    def progress(self, stage: str, done: int, total: int, rate: float | None) -> None:
        """``rate`` is in pieces a second since this client began the stage, None before the second one."""


class Relay:
    """Turns what a run reports into rates, and hands it to every sink.

    Examples
    --------
    >>> class Show:
    ...     def progress(self, stage, done, total, rate):
    ...         print(stage, done, total, rate)
    >>> clock = iter([0.0, 2.0]).__next__
    >>> relay = Relay([Show()], clock)
    >>> relay("strips", 3, 8), relay("strips", 7, 8)
    strips 3 8 None
    strips 7 8 2.0
    (None, None)
    """

    def __init__(self, sinks: Sequence[Sink], clock: Callable[[], float] = time.monotonic) -> None:
        self._sinks, self._clock = sinks, clock
        self._stage, self._begin, self._first = "", 0.0, 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take a report (stage, done, total)."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._begin, self._first = stage, now, done
        passed = now - self._begin
        rate = (done - self._first) / passed if done > self._first and passed > 0 else None
        for sink in self._sinks:
            sink.progress(stage, done, total, rate)


class Lines:
    """Lines of the log: where a stage begins and ends, and every few seconds between."""

    def __init__(self) -> None:
        self._interval = settings.seconds("log-interval")
        self._stage, self._said = "", 0.0

    def progress(self, stage: str, done: int, total: int, rate: float | None) -> None:
        """One line, if it is time."""
        now, kind = time.monotonic(), stage.partition(" ")[0]  # a fit may have very many short passes
        due = kind != self._stage or now - self._said >= self._interval
        if not due and (kind == "pass" or done < total):
            return
        self._stage, self._said = kind, now
        fields = {"stage": stage, "done": done, "total": total, "rate": rate}
        if stage == "strips":
            fields["strip"] = done
        log.info(told(stage, done, total, rate), extra={"fields": fields})


class Bars:
    """Bars on a terminal, with rate, time left and what the workers hold."""

    def __init__(self, bars: Progress, memory: Memory) -> None:
        self._bars, self._memory = bars, memory
        self._tasks: dict[str, TaskID] = {}
        self._looked, self._held = -float("inf"), ""

    def progress(self, stage: str, done: int, total: int, rate: float | None) -> None:
        """Move the bar of the stage, a new one below the others where it is new."""
        name = stage.partition(" ")[0]  # passes share a bar
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, rate="", held="")
        shown = "" if rate is None else f"{rate:.1f}/s"
        self._bars.update(
            self._tasks[name],
            description=stage,
            completed=done,
            total=total,
            rate=shown,
            held=self._memory_held(),
        )

    def _memory_held(self) -> str:
        if time.monotonic() - self._looked > settings.seconds("status-interval"):
            self._looked = time.monotonic()
            found = self._memory()
            if found is not None:
                held, limit = found
                self._held = f"workers {format_bytes(held)}" + (f" of {format_bytes(limit)}" if limit else "")
        return self._held


class Metrics:
    """Gauges that Prometheus scrapes at ``http://host:port/metrics``."""

    def __init__(self, port: int, run: str) -> None:
        try:
            from prometheus_client import CollectorRegistry, Gauge, start_http_server
        except ImportError as error:
            raise ConfigurationError(
                "--metrics-port takes prometheus-client: pip install 'dask_influence[metrics]'"
            ) from error
        registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Any:
            return Gauge(f"dask_influence_{name}", text, ["run", "stage"], registry=registry)

        self._run = run
        self._done = gauge("done", "Pieces of work done, by stage")
        self._total = gauge("total", "Pieces of work there are, by stage")
        self._rate = gauge("rate", "Pieces of work done in a second, by stage")
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise ConfigurationError(
                f"--metrics-port {port} cannot be used: {error}; choose another"
            ) from error

    def progress(self, stage: str, done: int, total: int, rate: float | None) -> None:
        """Set the gauges of the stage."""
        labels = (self._run, stage.partition(" ")[0])
        self._done.labels(*labels).set(done)
        self._total.labels(*labels).set(total)
        self._rate.labels(*labels).set(rate or 0.0)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def shown(sinks: Sequence[Sink], memory: Memory, *, terminal: bool | None = None) -> Iterator[Relay]:
    """A report for a run: bars where standard error is a terminal, lines elsewhere, and the ``sinks``."""
    with ExitStack() as stack:
        if sys.stderr.isatty() if terminal is None else terminal:
            yield Relay([Bars(stack.enter_context(_bars()), memory), *sinks])
        else:
            yield Relay([Lines(), *sinks])


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[held]}"),
        console=Console(stderr=True),
    )
