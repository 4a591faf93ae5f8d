"""Notes every strip that is begun, in a file: what kills cost is the strips that were begun twice.

Workers of the suite preload it; other processes call :func:`install`.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dask_influence.execution import reduce, reduce_tasks, tasks
from dask_influence.execution.ledger import Ledger
from dask_influence.storage.stores import Location

LOG = "DASK_INFLUENCE_FAULTS_LOG"
"""Environment variable that names the file."""


def install() -> None:
    """Wrap the tasks of this process that compute strips."""
    tasks.score_strip = _noted(tasks.score_strip, lambda scoring, index: scoring.plan.strip(index).name)
    reduce_tasks.reduce_node = _noted(
        reduce_tasks.reduce_node, lambda run, node, parts: run.scoring.plan.tree.name(node)
    )
    reduce.reduce_node = reduce_tasks.reduce_node  # type: ignore[attr-defined]


def dask_setup(worker: Any) -> None:
    """What Dask calls in a worker that preloads this module."""
    install()


def repeated(store: Location) -> int:
    """Strips of a run that were begun again, whoever began them."""
    lines = Path(os.environ[LOG]).read_text().splitlines()
    begun = Counter(line for line in lines if line.startswith(f"{store.url} "))
    return sum(begun.values()) - len(begun)


def _noted(task: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
    @functools.wraps(task)
    def noted(job: Any, shared: Any, *rest: Any) -> Any:
        run = shared.open()
        strip = name(run, *rest)
        # what the ledger lists is not computed again
        if strip.startswith("strip-") and Ledger(run.location).read(strip) is None:
            log = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(log, f"{run.location.url} {strip}\n".encode())
            os.close(log)
        return task(job, shared, *rest)

    return noted
