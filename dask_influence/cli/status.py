"""``_run/status.json``: how far the client of a run is, in the store itself, so that it survives the client.

The ledger says what is done; the status says who is at it, at which stage (also before the first
piece of work is done), how fast, and how it ended.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from dask_influence import settings
from dask_influence.errors import MissingObjectError, StoreError
from dask_influence.execution.ledger import STATUS_KEY, Ledger
from dask_influence.execution.pieces import expected_pieces
from dask_influence.execution.units import format_seconds
from dask_influence.storage.results import RUN_KEY
from dask_influence.storage.stores import Location

SILENCE = timedelta(minutes=2)
"""A running client that has not written for so long may be dead."""

NOT_BEGUN = "not begun"
"""State of a store of which there is a status only: the fit goes on, or ended."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Status:
    """What the client of a run last said.

    Attributes
    ----------
    run : str
        Names this client's part of the run.
    job : str
        Digest of the job file.
    state : str
        ``"running"``, ``"complete"``, ``"incomplete"``, ``"failed"`` or ``"interrupted"``.
    stage : str
        ``"pass 3"`` of the fit, ``"factors"``, ``"strips"`` …
    done, total : int
        Of that stage.
    rate : float or None
        Done in a second.
    started, updated : str
        Times, UTC.
    host, pid
        The client.
    error : str or None
        What it ended with.
    """

    run: str
    job: str
    state: str = "running"
    stage: str = "start"
    done: int = 0
    total: int = 0
    rate: float | None = None
    started: str = field(default_factory=lambda: _now())
    updated: str = field(default_factory=lambda: _now())
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    error: str | None = None

    @classmethod
    def read(cls, location: Location) -> Status | None:
        """The status in a store, or None where there is none that can be read."""
        try:
            held = json.loads(location.get(STATUS_KEY))
            return cls(**{name: held[name] for name in cls.__dataclass_fields__})
        except (MissingObjectError, ValueError, TypeError, KeyError):
            return None

    @property
    def silent(self) -> timedelta:
        """How long ago it was written."""
        return datetime.now(UTC) - datetime.fromisoformat(self.updated)


class StatusFile:
    """Writes the status of one client, at most every few seconds, and never over that of another job.

    Before the run has begun to write, the store is not known to be this job's: it is left alone unless
    it is empty, or its last status is of the same job.

    Parameters
    ----------
    location : Location
        The store.
    run, job : str
        As in :class:`Status`.
    hide : callable
        Takes secrets out of a text.
    """

    def __init__(self, location: Location, run: str, job: str, hide: Callable[[str], str] = str) -> None:
        self._location, self._hide = location, hide
        self._status = Status(run, job)
        self._interval = settings.seconds("status-interval")
        self._written = -float("inf")
        self._ours: bool | None = None

    def progress(self, stage: str, done: int, total: int, rate: float | None) -> None:
        """Note how far it is; written where it is time."""
        self._status = replace(self._status, stage=stage, done=done, total=total, rate=rate)
        if stage in WRITING:
            self._ours = True
        if time.monotonic() - self._written >= self._interval:
            self._write()

    def end(self, state: str, error: str | None = None) -> None:
        """Note how it ended, where anything was written: a job that was refused leaves nothing."""
        if self._written < 0 and state not in ("complete", "incomplete"):
            return
        self._ours = self._ours or state in ("complete", "incomplete")
        self._status = replace(self._status, state=state, error=None if error is None else self._hide(error))
        self._write()

    def withdraw(self) -> None:
        """Remove it from a store in which nothing else was begun."""
        try:
            if self._written >= 0 and not self._location.exists(RUN_KEY):
                self._location.delete(STATUS_KEY)
        except StoreError as error:
            log.warning("the status could not be removed: %s", error)

    def _write(self) -> None:
        try:
            if self._ours is None:
                self._ours = self._may_begin()
            if self._ours:
                self._status = replace(self._status, updated=_now())
                self._location.put(STATUS_KEY, json.dumps(asdict(self._status), indent=1).encode())
                self._written = time.monotonic()
        except (
            StoreError
        ) as error:  # the run itself says better what is wrong with the store, if it is more than this
            self._written = time.monotonic()
            log.warning("the status could not be written: %s", error)

    def _may_begin(self) -> bool:
        last = Status.read(self._location)
        return not self._location.list() if last is None else last.job == self._status.job


WRITING = ("factors", "strips")
"""Stages of a run that has begun to write: the fingerprint of the store is the job's."""


# -- what a store says of itself ------------------------------------------------------------
@dataclass(frozen=True)
class Report:
    """State of a store, from the store alone.

    Attributes
    ----------
    url : str
        The store.
    state : str
        Of its run, or ``NOT_BEGUN``.
    kind : str or None
        ``"scores"`` or ``"factors"``.
    done, total : int
        Pieces of work in the ledger, and of the plan.
    client : Status or None
        What the last client said.
    """

    url: str
    state: str
    kind: str | None = None
    done: int = 0
    total: int = 0
    client: Status | None = None

    @classmethod
    def of(cls, location: Location) -> Report:
        """What the store at ``location`` says.

        Raises
        ------
        StoreError
            Nothing of this package is there, or it cannot be read.
        CorruptStoreError
            The record of the run is damaged.
        """
        ledger = Ledger(location)
        run, client = ledger.read_begun(), Status.read(location)
        if run is None:
            if client is None:
                raise StoreError(f"{location.url} holds no run of dask_influence; check the URL")
            return cls(location.url, NOT_BEGUN, client=client)
        expected = expected_pieces(run)
        done = len(expected & ledger.done())
        kind = run["fingerprint"].get("kind")
        return cls(location.url, run["state"], kind, done, len(expected), client)

    @property
    def complete(self) -> bool:
        """Whether everything is there."""
        return self.state == "complete"

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("store", self.url), ("state", self.state)]
        if self.kind is not None:
            rows.append(("pieces of work", f"{self.done:,} of {self.total:,} done ({self.kind})"))
        if self.client is not None:
            rows += _client_rows(self.client)
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _client_rows(client: Status) -> list[tuple[str, str]]:
    silent = client.silent
    ago = f"{format_seconds(max(0.0, silent.total_seconds()))} ago"
    said = f"{client.state}, {ago}, by process {client.pid} on {client.host}"
    if client.state == "running" and silent > SILENCE:
        said += "; it may be dead: run the same job again, which goes on where it was"
    rows = [("client", said)]
    if client.state == "running":
        rows.append(("stage", told(client.stage, client.done, client.total, client.rate)))
    if client.error is not None:
        rows.append(("error", client.error))
    return rows


def told(stage: str, done: int, total: int, rate: float | None) -> str:
    """One line of progress.

    >>> told("strips", 3, 8, 2.0), told("pass 1", 4, 4, None)
    ('strips: 3 of 8, 2.0/s, 2.5 s left', 'pass 1: 4 of 4')
    """
    line = f"{stage}: {done:,} of {total:,}"
    if rate:
        line += f", {rate:.3g}/s" if rate >= 100 else f", {rate:.1f}/s"
        if done < total:
            line += f", {format_seconds((total - done) / rate)} left"
    return line


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
