"""Quarantine: a task that took its worker with it is run again where it can only take a child process.

Dask blames every task that a dying worker had, so most of those that end here are innocent. Each is
run in a process forked from one that a worker starts, and keeps while one such task follows another: a
process without threads, of which a fork is safe, and which imports torch once, for seconds, but nothing
of the user's: that may leave threads and locks. Where the fork dies, the next one tries the samples one
at a time, says which before each, and then runs the task without those that killed its predecessors: a
sample that is to blame costs one fork, where halving the task would cost one for each halving.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle

from dask_influence.errors import ClusterError
from dask_influence.execution import reduce_tasks, tasks
from dask_influence.execution.base import Sealed
from dask_influence.execution.blame import MOST_POISON
from dask_influence.execution.job import Missing
from dask_influence.execution.shipping import Held
from dask_influence.execution.tree import Node
from dask_influence.storage.results import ShardRecord


def isolated_strip(job: Sealed, scoring: Sealed, index: int) -> Missing:
    """:func:`tasks.score_strip` in a child process, without the training samples that crash it."""
    run: tasks.Scoring = scoring.open()
    return _isolated(
        tasks.score_strip, tasks.probe_column, run.plan.strip(index).columns, job, (scoring, index)
    )


def isolated_node(job: Sealed, reducing: Sealed, node: Node, parts: Sequence[ShardRecord]) -> Any:
    """:func:`reduce_tasks.reduce_node` in a child process, without the training samples that crash it."""
    plan = reducing.open().scoring.plan
    samples = range(0) if node.level else plan.strip(plan.tree.strip(node)).columns
    rest = (reducing, node, parts)
    return _isolated(reduce_tasks.reduce_node, reduce_tasks.probe_node, samples, job, rest)


def isolated_factors(job: Sealed, start: int, stop: int, *rest: Any) -> Any:
    """:func:`tasks.factor_task` in a child process, without the test points that crash it."""
    return _isolated(tasks.factor_task, tasks.probe_gradient, range(start, stop), job, (start, stop, *rest))


def isolated_gradients(job: Sealed, start: int, stop: int, *rest: Any) -> Any:
    """:func:`tasks.gradient_task` in a child process, without the test points that crash it."""
    return _isolated(tasks.gradient_task, tasks.probe_gradient, range(start, stop), job, (start, stop, *rest))


def _isolated(
    task: Callable[..., Any],
    probe: Callable[..., None],
    samples: range,
    job: Sealed,
    rest: tuple[Any, ...],
) -> Any:
    """``task(job, *rest)``, without the ``samples`` of which ``probe(sample, job, *rest)`` kills its process."""
    with tempfile.TemporaryDirectory(prefix="dask-influence-") as name:
        folder = Path(name)
        with (folder / _CALL).open("wb") as stream:
            pickle.dump((sys.path, dict(os.environ)), stream)  # first: unpickling the rest imports modules
            stream.write(cloudpickle.dumps((task, probe, samples, job, rest)))
        while (code := _ended(folder)) == 0:  # it had left before it saw the call
            pass
        if code is not None:
            raise ClusterError(f"a process that a worker began {_ending(code)}; look at the worker's log")
        return _given(folder / _ANSWER)


IDLE = 10.0
"""Seconds that a process, which has torch in memory, waits for another call."""

_waiting: list[subprocess.Popen[bytes]] = []
"""Those that wait for one of this process."""


def _ended(folder: Path) -> int | None:
    """None once the call in ``folder`` is answered, or the exit code of the process that was to answer it."""
    try:
        process = _waiting.pop()
    except IndexError:
        command = [sys.executable, "-m", "dask_influence.execution.quarantine", str(IDLE)]
        process = subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, bufsize=0)
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # it has left
        process.stdin.write(os.fsencode(folder) + b"\n")
    while not (folder / _ANSWER).exists():
        if process.poll() is not None:
            process.stdin.close()
            return process.returncode
        time.sleep(_LOOK)
    _waiting.append(process)
    return None


@atexit.register
def _dismissed() -> None:
    for process in _waiting:
        with process:  # which closes its standard input and waits for its end
            pass


def _environment() -> dict[str, str]:
    """That of this process, with the package found where it was found here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _ending(code: int) -> str:
    ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"ended its process ({ending})"


def _write(path: Path, result: Any, error: Exception | None) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(cloudpickle.dumps((result, error)))
    partial.replace(path)


def _given(path: Path) -> Any:
    result, error = pickle.loads(path.read_bytes())
    if error is not None:
        raise error
    return result


# -- in the process that a worker starts -----------------------------------------------
_LOOK = 0.02
"""Seconds between two looks at a process."""

_CALL, _RESULT, _ANSWER, _PROGRESS, _TASK = "call", "result", "answer", "progress", "task"


def _searched(
    folder: Path,
    task: Callable[..., Any],
    probe: Callable[..., None],
    samples: range,
    job: Sealed,
    rest: tuple[Any, ...],
    *,
    worker: int,
) -> None:
    """Have the task's result written, by as many forks as it takes; none of it is read here."""
    poison: Missing = {}
    untried: Sequence[int] = ()  # the task is innocent, as a rule
    fork = _Fork(worker, folder, task, probe, untried, job, poison, rest)
    untried = samples
    while not fork.answered:
        fork = _Fork(worker, folder, task, probe, untried, job, poison, rest)
        if fork.answered:
            break
        if fork.last is None:
            raise ClusterError(
                f"samples {samples.start} to {samples.stop - 1} together {fork.reason}, and each alone does not; "
                "give workers more memory, or take smaller tiles (tile_bytes=)"
            )
        poison[fork.last] = f"it {fork.reason}"
        untried = [sample for sample in untried if sample > fork.last]
        if len(poison) > MOST_POISON:
            raise ClusterError(
                f"more than {MOST_POISON} samples of one task each {fork.reason}, the first of them "
                f"{min(poison)}: it is not the samples; look at the logs of the workers"
            )


class _Fork:
    """One attempt in a process of its own, waited for: first the probes, then the task.

    Attributes
    ----------
    answered : bool
        Whether it came to its end; an exception is an end.
    reason : str
        How it ended.
    last : int or None
        The sample that it said it was about to probe; None while it did anything else.
    """

    def __init__(self, worker: int, folder: Path, *attempt: Any) -> None:
        progress = folder / _PROGRESS
        progress.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _answer(folder / _RESULT, _attempt, progress, *attempt)
            os._exit(0)
        self.reason = _ending(_waited(child, worker))
        self.answered = (folder / _RESULT).exists()
        said = progress.read_text().split() if progress.exists() else [_TASK]
        self.last = int(said[-1]) if said and said[-1] != _TASK else None


def _waited(child: int, worker: int) -> int:
    """Exit code of ``child``, which does not outlive the worker, and neither does this process."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != worker:
            os.kill(child, signal.SIGKILL)
            os._exit(1)
        time.sleep(_LOOK)


def _answer(path: Path, function: Callable[..., Any], *arguments: Any) -> None:
    """Write what a call returns or raises."""
    result, error = None, None
    try:
        result = function(*arguments)
    except Exception as raised:  # noqa: BLE001 - it is raised again by whoever reads the answer
        error = raised
    _write(path, result, error)


def _attempt(
    progress: Path,
    task: Callable[..., Any],
    probe: Callable[..., None],
    samples: Sequence[int],
    job: Sealed,
    poison: Missing,
    rest: tuple[Any, ...],
) -> Any:
    with progress.open("w") as said:
        for sample in samples:
            print(sample, file=said, flush=True)  # to the operating system, which outlives this process
            probe(sample, job, *rest)
        print(_TASK, file=said, flush=True)
    return task(Held(replace(job.open(), poison=poison)), *rest)


def _answered(folder: Path, worker: int) -> None:
    with (folder / _CALL).open("rb") as stream:
        sys.path[:], environment = pickle.load(stream)
        os.environ.clear()
        os.environ.update(environment)
        call = pickle.load(stream)
    try:
        _searched(folder, *call, worker=worker)
    except Exception as error:  # noqa: BLE001 - it is raised again by the worker
        _write(folder / _RESULT, None, error)
    (folder / _RESULT).replace(folder / _ANSWER)  # this process is ready for the next


def _main(idle: float) -> None:
    """Answer the calls whose folders standard input names, until none has come for long or the worker is gone."""
    worker = os.getppid()
    importlib.import_module("torch._dynamo")  # torch.func's first call does, for seconds
    with os.fdopen(os.dup(0)) as calls, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)  # whatever a fork reads, it is no call
        while select.select([calls], [], [], idle)[0] and (folder := calls.readline().rstrip("\n")):
            _answered(Path(folder), worker)


if __name__ == "__main__":
    _main(float(sys.argv[1]))
