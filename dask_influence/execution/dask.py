"""DaskExecutor: the only file that knows a scheduler."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from distributed import Client, as_completed
from distributed.comm.core import CommClosedError
from distributed.scheduler import KilledWorker
from torch import Tensor

from dask_influence import settings
from dask_influence.core.estimators import Inverse
from dask_influence.core.moments import Moments, merge
from dask_influence.core.problem import Problem
from dask_influence.errors import ClusterError, ConfigurationError, InfluenceError, StoreError
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.base import Executor
from dask_influence.execution.forecast import Cluster
from dask_influence.execution.options import Options
from dask_influence.execution.shipping import Envelope, ShippedInverse, ShippedModel
from dask_influence.execution.units import format_bytes
from dask_influence.storage.sources import Source, stage
from dask_influence.storage.stores import Location

FAN_IN = 8
"""Partial sums that one task adds. A power of two: the tree is then the one of ``merge``."""

SMALL_RESULT = 2**16
"""Bytes of sums that travel through the scheduler; larger ones go through the store."""

LOOK, SELDOM = 1.0, 30.0
"""Seconds between two looks at whether there are workers, while nothing comes back: at first, and after a long time."""


def check_client(client: Any) -> None:
    """Refuse what is no client: the address of a scheduler, a cluster.

    Examples
    --------
    >>> check_client("tcp://scheduler:8786")
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: client must be None or a distributed.Client; got \
'tcp://scheduler:8786' (str): pass distributed.Client('tcp://scheduler:8786')
    """
    if client is not None and not isinstance(client, Client):
        example = (
            f"distributed.Client({client!r})" if isinstance(client, str) else "distributed.Client(address)"
        )
        raise ConfigurationError(
            f"client must be None or a distributed.Client; got {client!r:.80} ({type(client).__name__}): pass {example}"
        )


class DaskExecutor(Executor):
    """Runs tasks on a cluster, a window at a time.

    Parameters
    ----------
    client : distributed.Client
        A synchronous client.
    location : Location, optional
        Where artifacts go. By default a temporary folder, if every worker sees this host's files.
    """

    def __init__(self, client: Client, location: Location | None = None) -> None:
        self.client = client
        self._checked: frozenset[str] = frozenset()
        self._able: dict[Options, frozenset[str]] = {}
        self.check()
        self.location: Location = location if location is not None else self._temporary_folder()
        self._artifacts = Artifacts(self.location)
        # Staged data stay where the fit put them, whatever store a run publishes to.
        self._home = self

    @property
    def memory_limit(self) -> int | None:
        """Bytes one task may hold on the smallest worker, or None where workers have no limit.

        A worker's own limit is shared by its threads, and some of it is left to the interpreter
        and its libraries (:attr:`Cluster.memory_limit`).
        """
        return self.cluster.memory_limit

    @property
    def cluster(self) -> Cluster:
        """The workers, each taken to be as the smallest one."""
        with self._connected(), self._reaching():
            found = self.client.scheduler_info(n_workers=-1)
        if "workers" not in found:  # what a client says of a scheduler that has just gone
            raise self._gone(CommClosedError("it told nothing of its workers"))
        workers = found["workers"].values()
        threads = min((worker["nthreads"] for worker in workers), default=1)
        memory = [worker["memory_limit"] * threads // worker["nthreads"] for worker in workers]
        return Cluster(max(1, len(workers)), threads, min((m for m in memory if m), default=None))

    def at(self, location: Location) -> DaskExecutor:
        """The same cluster, with artifacts in another place."""
        other = DaskExecutor.__new__(DaskExecutor)
        other.client, other.location, other._artifacts = self.client, location, Artifacts(location)
        other._home, other._able = self._home, self._able
        return other

    def check_reach(self, location: Location) -> None:
        """Refuse this process's memory, or this host's files, where workers have others."""
        if location.in_process:
            blind = [address for address, pid in self._run(_process).items() if pid != _process()]
        elif location.local_path is not None:
            folder = location.local_path
            nearest = folder if folder.exists() else next(up for up in folder.parents if up.exists())
            # where nothing can be written, the check of the store itself says so better
            blind = self._blind_to(nearest) if os.access(nearest, os.W_OK) else []
        else:
            return
        if blind:
            raise StoreError(
                f"workers {', '.join(blind)} cannot reach {location.url}; give a store that this process and all "
                "workers share, such as s3://bucket/run or a network drive"
            )

    def check_options(self, options: Options) -> None:
        """Ask every worker, again when there are others."""
        if not options.demanding or self._workers() <= self._able.get(options, frozenset()):
            return
        answers = self._run(options.lacking)
        for address, lacks in answers.items():
            if lacks is not None:
                raise ConfigurationError(f"worker {address}: {lacks}")
        self._able[options] = frozenset(answers)

    def publish(self, tensors: dict[str, Tensor]) -> Artifact:
        """Write the tensors to the store."""
        return self._artifacts.publish(tensors)

    def seal(self, value: Any) -> Envelope:
        """Pickle the value once."""
        return Envelope.of(value)

    def model(self, problem: Problem, device: str) -> ShippedModel:
        """Publish the model's tensors."""
        return ShippedModel.of(problem, device, self._artifacts)

    def inverse(self, inverse: Inverse, digest: Callable[[], str]) -> ShippedInverse:
        """Publish the inverse's tensors: runs whose stores share a file system share one file."""
        name = digest()
        shipped = ShippedInverse.of(inverse, self._home._artifacts, name)
        adopted = self._artifacts.adopt(shipped.tensors)
        if adopted is None:
            return ShippedInverse.of(inverse, self._artifacts, name)
        return replace(shipped, tensors=adopted)

    def reachable(self, source: Source, chunk_size: int, beside: ThreadPoolExecutor | None = None) -> Source:
        """Stage what only this process can read."""
        if source.portable:
            return source
        with self._connected(), self.client.as_current():
            return stage(source, self._home.location.child("data"), chunk_size, beside)

    def reduce(
        self,
        function: Callable[..., Moments],
        calls: Sequence[tuple[Any, ...]],
        report: Callable[[int, int], None] | None = None,
        threads: int = 1,
    ) -> Moments:
        """Σ function(*call): partial sums meet on the workers, the total comes through the store."""
        with self._connected():
            submit, retries = self.client.submit, settings.count("retries", 0)
            level = [submit(function, *call, pure=False, retries=retries) for call in calls]
            leaves = self._each(level if report is not None else [])  # lets go of each as it is reported
            while len(level) > 1:
                level = [
                    submit(_merge, level[low : low + FAN_IN], pure=False, retries=retries)
                    for low in range(0, len(level), FAN_IN)
                ]
            total = submit(_deliver, level[0], self.location, pure=False, retries=retries)
            del level
            for done, _ in enumerate(self._completed(leaves), 1):
                assert report is not None
                report(done, len(calls))
            (_,) = self._completed(self._each([total]))
            answer = self._result(total)
        if isinstance(answer, Moments):
            return answer
        artifact, count = answer
        return Moments(artifact.read(), count)

    def map(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        lost: Callable[[tuple[Any, ...]], None] | None = None,
        threads: int | None = None,
    ) -> Iterator[Any]:
        """Submit through a window and release each future as it completes."""
        pending, retries = iter(calls), settings.count("retries", 0)
        running = self._each([])
        asked: dict[Any, tuple[Any, ...]] = {}  # by key of the future

        def submit(count: int) -> None:
            for call in _first(pending, count):
                future = self.client.submit(function, *call, pure=False, retries=retries)
                asked[future.key] = call
                running.add(future)

        try:
            with self._connected():
                submit(self._window())
                for future in self._completed(running):
                    call = asked.pop(future.key)
                    if lost is not None and _killed_its_worker(future):
                        future.release()
                        lost(call)
                        submit(1)
                        continue
                    result = self._result(future)
                    future.release()
                    submit(1)
                    yield result
        finally:
            running.clear()

    def _each(self, futures: Sequence[Any]) -> as_completed:
        """Futures of this client, which need not be the default one."""
        return as_completed(futures, loop=self.client.loop)

    def _completed(self, running: as_completed) -> Iterator[Any]:
        """Futures as they complete, for as long as there is somebody to complete them.

        Raises
        ------
        ClusterError
            For as long as the configuration allows there have been no workers, or none that takes or has a task.
        """
        patience = _Patience(self._hands)
        while not running.is_empty():
            if running.has_ready():
                yield next(running)
                patience = _Patience(self._hands)
                continue
            with running.thread_condition:
                running.thread_condition.wait(0.1)
            patience.look(running.count())

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Name what a lost scheduler looks like from here: cancelled futures, or a closed connection."""
        try:
            yield
        except InfluenceError:
            raise
        except CancelledError as error:
            reason = str(error).partition("\n")[0]
            raise ClusterError(
                f"tasks were cancelled, as they are when a scheduler is lost ({reason}); see that one runs, connect a "
                "client to it and make the same call again"
            ) from error
        except (OSError, TimeoutError) as error:
            if self.client.status == "running" and not isinstance(error, CommClosedError):
                raise
            raise self._gone(error) from error

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Name a scheduler that cannot be reached; for what asks it alone, and raises nothing of a user's."""
        try:
            yield
        except (OSError, TimeoutError) as error:
            raise self._gone(error) from error

    def _gone(self, error: BaseException) -> ClusterError:
        return ClusterError(f"the scheduler at {self.client} is gone ({error}); start it and call again")

    def _nthreads(self) -> Mapping[str, int]:
        """Threads of each worker."""
        with self._reaching():
            return self.client.nthreads()

    def _hands(self) -> tuple[int, str]:
        """How many workers take tasks or have one, and what the others are, where there are any."""
        if not self._nthreads():  # which raises where nobody answers
            return 0, ""
        with self._reaching():
            workers = self.client.scheduler_info(n_workers=-1).get("workers", {}).values()
        idle = [worker for worker in workers if worker["status"] == "paused" and not _executing(worker)]
        most = max(idle, key=_held, default=None)
        if most is None:
            return len(workers), ""
        held, limit = format_bytes(_held(most)), format_bytes(most["memory_limit"] or 0)
        return len(workers) - len(idle), f"{len(idle)} paused, which hold up to {held} of {limit}"

    def _result(self, future: Any) -> Any:
        """Of a future that is done, or is to be done again since its worker has left with the only copy."""
        patience, wait = _Patience(self._hands), LOOK
        while future.status not in ("error", "cancelled"):  # what it raises now comes from fetching it
            try:
                return future.result(timeout=wait)
            except TimeoutError:
                patience.look(1)
                wait *= 2  # it may be large
            except OSError as error:
                raise self._gone(error) from error
        try:
            return future.result()
        except KilledWorker as error:
            raise ClusterError(
                f"workers died while running {error.task}: {error}; "
                "look at their logs, and give them more memory or smaller tiles (tile_bytes=)"
            ) from error

    def _window(self) -> int:
        threads = self._nthreads()
        return settings.count("window") * max(1, sum(threads.values()))

    # -- checks before anything runs --------------------------------------------------
    def check(self) -> None:
        """Refuse a cluster that cannot run the job: gone, empty, or with other versions."""
        if self.client.asynchronous:
            raise ConfigurationError("client is asynchronous; pass a synchronous distributed.Client")
        if self.client.status != "running":
            raise ClusterError(f"client is {self.client.status}; connect it to a running scheduler")
        workers = self._workers()
        if workers <= self._checked:
            return
        mine = versions()
        for address, theirs in self._run(versions).items():
            for package, wanted in mine.items():
                if theirs.get(package) != wanted:
                    raise ClusterError(
                        f"worker {address} has {package} {theirs.get(package)} and this process has {wanted}; "
                        "install the same version on both"
                    )
        self._checked = workers

    def _workers(self) -> frozenset[str]:
        """Addresses of the workers, of which there is at least one; an adaptive cluster of none starts one."""
        patience = settings.seconds("wait-for-workers")
        with self._connected():
            workers = frozenset(self._nthreads())
            if workers:
                return workers
            asked = self.client.submit(versions, pure=False)  # workers are started for work alone
            try:
                self.client.wait_for_workers(1, timeout=patience)
            except TimeoutError as error:
                raise ClusterError(
                    f"the cluster has no workers after {patience:g} s (config influence.wait-for-workers); "
                    "start at least one"
                ) from error
            finally:
                asked.release()
            return frozenset(self._nthreads())

    def _run(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Answers of all workers but those that die meanwhile."""
        self._workers()
        with self._connected():
            with self._reaching():
                answers = self.client.run(function, *arguments, on_error="return")
            for address, answer in answers.items():
                if isinstance(answer, Exception) and not isinstance(answer, CommClosedError):
                    # of a function that a worker cannot unpickle only the error's text comes back
                    absent = re.search(r"^(?:ModuleNotFoundError\(\W)?No module named '([^']+)'", str(answer))
                    if absent is None:
                        raise answer
                    raise ClusterError(
                        f"worker {address} cannot import {absent[1]!r}; install dask_influence "
                        f"{version('dask_influence')} on all workers"
                    ) from answer
        return {at: answer for at, answer in answers.items() if not isinstance(answer, CommClosedError)}

    def _blind_to(self, folder: Path) -> list[str]:
        """Workers that do not see a file made in ``folder``."""
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dask-influence-") as token:
            return [address for address, seen in self._run(os.path.exists, token.name).items() if not seen]

    def _temporary_folder(self) -> Location:
        folder = Path(tempfile.mkdtemp(prefix="dask-influence-"))
        blind = self._blind_to(folder)
        if blind:
            folder.rmdir()
            raise ConfigurationError(
                f"workers {', '.join(blind)} do not share this host's files, so artifacts= is needed: a URL that "
                'every worker can read and write, such as artifacts="s3://bucket/scratch" '
                "(or config influence.artifacts.url)"
            )
        # Lazy arrays read from the folder when no executor is left, but not without the client.
        weakref.finalize(self.client, shutil.rmtree, folder, ignore_errors=True)
        return Location.of(folder)


@functools.cache
def versions() -> dict[str, str]:
    """What client and workers must agree on; read once: it is looked up in files."""
    return {"dask_influence": version("dask_influence"), "torch": str(torch.__version__)}


class _Patience:
    """With a cluster that has nobody to do its tasks, as long as the configuration allows.

    Parameters
    ----------
    hands : callable
        How many workers take tasks or have one, and what is said of the others.
    """

    def __init__(self, hands: Callable[[], tuple[int, str]]) -> None:
        self._hands = hands
        self._began = self._looked = time.monotonic()
        self._alone: float | None = None

    def look(self, waiting: int) -> None:
        """See now and then, ever more rarely, whether there are workers for the ``waiting`` tasks.

        Raises
        ------
        ClusterError
            There have been none for too long.
        """
        now, allowed = time.monotonic(), settings.seconds("workers-gone")
        rarely = min(0.1 * (self._looked - self._began), SELDOM) if self._alone is None else 0.0
        if now < self._looked + max(LOOK, rarely):
            return
        self._looked = now
        able, others = self._hands()
        if able:
            self._alone = None
            return
        if self._alone is None:
            self._alone = now
        if now <= self._alone + allowed:
            return
        seconds = f"{now - self._alone:.0f} s"
        if others:
            raise ClusterError(
                f"no worker has taken a task for {seconds}, and {waiting} tasks wait for one: there are {others}, and "
                "Dask gives a worker that holds that much no more; give workers more memory, or let go of what they "
                f"hold, and make the same call again (config influence.workers-gone allows {allowed:g} s)"
            )
        raise ClusterError(
            f"the cluster has had no workers for {seconds}, and {waiting} tasks wait for one; "
            "start workers and make the same call again, which goes on where this one was "
            f"(config influence.workers-gone allows {allowed:g} s)"
        )


def _held(worker: Mapping[str, Any]) -> int:
    return int(worker["metrics"].get("memory", 0))


def _executing(worker: Mapping[str, Any]) -> bool:
    return worker["metrics"].get("task_counts", {}).get("executing", 0) > 0


def _killed_its_worker(future: Any) -> bool:
    return future.status == "error" and isinstance(future.exception(), KilledWorker)


def _process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def _merge(parts: Sequence[Moments]) -> Moments:
    return merge(parts)


def _deliver(total: Moments, location: Location) -> Moments | tuple[Artifact, int]:
    if sum(value.nbytes for value in total.total.values()) <= SMALL_RESULT:
        return total
    return Artifacts(location).publish(total.total), total.count


def _first(items: Iterator[Any], count: int) -> Iterator[Any]:
    for _ in range(count):
        try:
            yield next(items)
        except StopIteration:
            return
