"""Which store a command is about: a path, a URL, or a job file that names it; and what a store says without torch.

``dask-influence status`` is asked often, and is here with the little that it loads: job files, which need the models'
names, are read where one is given.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dask_influence.cli.session import Exit, Session
from dask_influence.cli.status import Report
from dask_influence.storage.stores import Location

if TYPE_CHECKING:
    from dask_influence.cli.job import Job


def status(session: Session, store: str, as_json: bool) -> None:
    """Print how far a run is; 3 where it is not complete."""
    found = Report.of(place(session, store))
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else found)
    if not found.complete:
        raise SystemExit(Exit.INCOMPLETE)


def place(session: Session, store: str) -> Location:
    """The store, or the one that a job file names, with its credentials."""
    if Path(store).suffix in (".yaml", ".yml"):
        from dask_influence.cli import loading

        return loading.output(read(session, store))
    return Location.of(store)


def read(session: Session, job: str) -> Job:
    """The job, with its secrets and its wishes for the log known to the session."""
    from dask_influence.cli.job import Job

    asked = Job.read(job)
    session.secrets |= asked.secrets  # a command may read several jobs
    session.settle(asked.logging.level, asked.logging.format)
    return asked
