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

Report = Callable[[str, int, int], None]
"""Called with the stage's name, how much is done and how much there is to do."""


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
