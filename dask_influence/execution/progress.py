"""Progress of a run, as the caller asked to see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dask_influence.errors import ConfigurationError

Report = Callable[[str, int, int], None]
"""Called with the stage's name, how much is done and how much there is to do."""


def check_progress(progress: object) -> None:
    """Refuse what is neither a flag nor callable."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise ConfigurationError(
            f"progress must be True, False or a callable(stage, done, total); got {progress!r} "
            f"({type(progress).__name__})"
        )


@contextmanager
def reporting(progress: bool | Report | None) -> Iterator[Report]:
    """A callable to report to: silent (None, False), a bar on the terminal (True), or the caller's own."""
    if callable(progress):
        yield progress
    elif progress:
        with _bars() as bars:
            tasks = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total)
                bars.update(tasks[stage], completed=done)

            yield show
    else:
        yield lambda stage, done, total: None


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
