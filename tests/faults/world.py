"""What scenarios share: clusters, fits, reference results, processes to kill, and what was seen."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

from dask_influence import DirectInfluence, verify
from dask_influence.storage.stores import Location
from tests import data
from tests.faults import machines, watch
from tests.faults.problem import FORMS, content, unfitted, write
from tests.s3.server import Server

IMPATIENT = {
    "distributed.comm.timeouts.tcp": "11s",  # until a peer that says nothing is given up: the least it takes
    "distributed.comm.timeouts.connect": "10s",
    "influence.workers-gone": "6s",
}
"""Of this process and all that it starts: what takes minutes elsewhere."""

SILENCE = "4s"
"""Until the scheduler of the bare cluster gives up a worker that does not report."""


class Lost(Exception):  # noqa: N818 - the result of a scenario
    """A scenario that ended in neither the bits nor a named error."""


class World:
    """What scenarios share. What only some of them need is made when the first one asks.

    Parameters
    ----------
    folder : Path
        Scratch space.
    seed : int
        Of all that is random.

    Attributes
    ----------
    seconds : dict of str to dict of str to float
        Of undisturbed runs of each form, by who ran them, and of a fit.
    strikes : int
        Faults of the scenario at hand that came while there was something to harm.
    threads_lost : int
        Threads of workers and clients that they have taken away.
    resumed : dict of str to list of float
        By what was killed: seconds that kills and resumes took beyond an undisturbed run.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self._exits = ExitStack()
        self.train = data.mlp_classification().train
        os.environ[watch.LOG], os.environ["TMPDIR"] = str(folder / "strips"), str(folder)
        os.environ["OMP_NUM_THREADS"] = "1"  # OpenMP's own threads do not survive a fork
        for key, value in IMPATIENT.items():
            os.environ[f"DASK_{key.replace('.', '__').replace('-', '_').upper()}"] = value
        dask.config.set(IMPATIENT)
        (folder / "strips").touch()
        watch.install()
        self.forks = self._exits.enter_context(Forks())
        self.local = unfitted().fit(self.train)
        self.references = {form: Location.of(folder / f"reference-{form}") for form in FORMS}
        self.seconds: dict[str, dict[str, float]] = {"here": {}}
        for form, store in self.references.items():
            self.seconds["here"][form] = _seconds(write, form, self.local, store)
        self.expected = {form: content(store) for form, store in self.references.items()}
        self._count = self.strikes = self.threads_lost = 0
        self.resumed: dict[str, list[float]] = defaultdict(list)

    def close(self) -> None:
        """End all processes, unmount and unplug everything."""
        self._exits.close()

    def place(self, folder: Path | None = None) -> Location:
        """A new one for a store."""
        self._count += 1
        return Location.of((folder or self.folder) / f"run-{self._count}")

    def compare(self, store: Location, form: str) -> None:
        """Refuse other bits than those of the undisturbed run."""
        found, expected = content(store), self.expected[form]
        differing = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
        if differing:
            raise Lost(f"differs in {', '.join(differing[:5])}")
        damaged = verify(store)
        if not damaged:
            raise Lost(f"has the right bits and is not as recorded: {damaged}")

    def struck(self, threads: int = 0) -> None:
        """Note a fault that came in time, and how many threads it has taken away."""
        self.strikes += 1
        self.threads_lost += threads

    def settle(self) -> None:
        """Wait until the clusters that are there are whole."""
        for name in ("two", "four", "inside"):
            if name in self.__dict__:
                self.__dict__[name].settled()

    def moment(self, seconds: float) -> float:
        """A random part of that time."""
        return self.random.uniform(0, seconds)

    # -- clusters ----------------------------------------------------------------------
    @cached_property
    def two(self) -> Nursed:
        """Two worker processes of one thread, which nannies replace."""
        return self._exits.enter_context(Nursed(self, n_workers=2, threads_per_worker=1))

    @cached_property
    def four(self) -> Nursed:
        """One worker process of four threads, which a nanny replaces."""
        return self._exits.enter_context(Nursed(self, n_workers=1, threads_per_worker=4))

    @cached_property
    def inside(self) -> Nursed:
        """Two workers of two threads in this process."""
        return self._exits.enter_context(Nursed(self, n_workers=2, threads_per_worker=2, processes=False))

    @cached_property
    def adaptive(self) -> Nursed:
        """No worker at rest, two where there is work."""
        found = self._exits.enter_context(Nursed(self, n_workers=0, threads_per_worker=1, settle=False))
        found.cluster.adapt(minimum=0, maximum=2, interval="300 ms", wait_count=5)
        found.fit("adaptive")
        return found

    @cached_property
    def bare(self) -> Bare:
        """Workers without nannies, of which some may be on another host."""
        return self._exits.enter_context(Bare(self, self.other_host))

    # -- machines ----------------------------------------------------------------------
    @cached_property
    def other_host(self) -> machines.OtherHost | None:
        """A host behind a cable; None where this user may not have one."""
        if not machines.is_root():
            return None
        host = machines.OtherHost()
        self._exits.callback(host.close)
        return host

    @cached_property
    def disk(self) -> machines.SmallDisk:
        """A small one."""
        found = machines.SmallDisk(self.folder / "disk")
        self._exits.callback(found.close)
        return found

    @cached_property
    def s3(self) -> Server:
        """A server of its own; its credentials are in the environment."""
        (self.folder / "s3").mkdir()
        server = Server(self.folder / "s3")
        self._exits.callback(server.kill)
        server.start()
        os.environ |= server.environment
        return server

    # -- clients -----------------------------------------------------------------------
    def client(self, store: Location, form: str, forks: Forks | None = None, **how: Any) -> Other:
        """A client in another process, at work."""
        self._count += 1
        return Other(forks or self.forks, store, form, self.folder / f"outcome-{self._count}", how)


class Other:
    """A client in another process.

    Attributes
    ----------
    pid : int
        Of its process.
    """

    def __init__(self, forks: Forks, store: Location, form: str, outcome: Path, how: dict[str, Any]) -> None:
        self._outcome = outcome
        self.pid = forks.start(do="client", store=store.url, form=form, outcome=str(outcome), **how)

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return Path(f"/proc/{self.pid}").exists()

    def ended(self, patience: float = 90) -> str:
        """How it ended, once it has: ``"done"``, a named error, or nothing where it was killed."""
        deadline = time.monotonic() + patience
        while self.running:
            if time.monotonic() > deadline:
                raise Lost(f"a client in another process has no end after {patience:.0f} s")
            time.sleep(0.02)
        said = self._outcome.read_text() if self._outcome.exists() else ""
        if said.startswith("LOST"):
            raise Lost(said)
        return said


class Nursed:
    """A cluster of one machine, whose workers come back.

    Parameters
    ----------
    world : World
        Whose model is fitted on it.
    settle : bool
        Wait for the workers, and fit.
    **how
        Arguments of ``LocalCluster``.
    """

    def __init__(self, world: World, settle: bool = True, **how: Any) -> None:
        self._world, self._settle, self._how = world, settle, how
        self.threads = int(how["threads_per_worker"])
        self._open()

    def __enter__(self) -> Nursed:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        with suppress(TimeoutError):  # a nanny that lost its worker in the wrong moment waits for it for ever
            self.cluster.close(timeout=30)

    def _open(self) -> None:
        processes = {"memory_limit": "2GiB", "preload": "tests.faults.watch"}
        extra = processes if self._how.get("processes", True) else {}
        self.cluster = LocalCluster(**self._how, **extra, dashboard_address=None)
        self.client = Client(self.cluster, set_as_default=False)
        self.model = unfitted(self.client)
        if self._settle:
            self.fit(f"{self._how['n_workers']} × {self.threads}")

    def fit(self, name: str) -> None:
        """Fit the model, and time what undisturbed runs take."""
        self.name = name
        self.model.fit(self._world.train)  # the first one also unpacks the model on all workers
        if name not in self._world.seconds:
            self._world.seconds[name] = _undisturbed(self._world, self.model)

    def settled(self) -> None:
        """Wait until killed workers are back; a nanny whose worker died while it began gives up on it."""
        if not self._settle:
            return
        try:
            self.client.wait_for_workers(self._how["n_workers"], timeout=30)
        except TimeoutError:
            self.__exit__()
            self._open()

    @contextmanager
    def worker_killed(self, stage: str) -> Iterator[None]:
        """Kill a random worker once, at a random moment of a stage: a fit, or a form that is written."""
        delay = self._world.moment(self._world.seconds[self.name][stage])

        def kill() -> None:
            pids = [nanny.pid for nanny in list(self.cluster.workers.values()) if nanny.pid]
            if pids:
                killed(self._world.random.choice(pids))
                self._world.struck(self.threads)

        with later(delay, kill):
            yield


class Bare:
    """A scheduler in this process, and workers without nannies in others, as many as are asked for.

    Parameters
    ----------
    world : World
        Whose model is fitted on it.
    other_host : OtherHost, optional
        Where some of them may be.
    """

    def __init__(self, world: World, other_host: machines.OtherHost | None) -> None:
        self._world, self._pids, self._count = world, dict[str, int](), 0
        self.other_host = other_host
        with ExitStack() as exits:
            self.away = None if other_host is None else exits.enter_context(Forks(other_host.prefix))
            here = "127.0.0.1" if other_host is None else other_host.here
            with dask.config.set({"distributed.scheduler.worker-ttl": SILENCE}):
                self.cluster = exits.enter_context(
                    LocalCluster(n_workers=0, host=here, dashboard_address=None)
                )
            self.client = exits.enter_context(Client(self.cluster, set_as_default=False))
            self._exits = exits.pop_all()
        self.model = unfitted(self.client)
        self.roster(2)
        self.model.fit(world.train)
        world.seconds["bare"] = _undisturbed(world, self.model)

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        self.roster(0)
        self._exits.close()

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return str(self.cluster.scheduler_address)

    def roster(self, here: int, away: int = 0) -> list[str]:
        """End all workers, and begin with so many new ones; their names."""
        for name in list(self._pids):
            self.killed(name)
        deadline = time.monotonic() + 20
        while self.client.nthreads() and time.monotonic() < deadline:
            time.sleep(0.05)
        names = [self.joined() for _ in range(here)] + [self.joined(away=True) for _ in range(away)]
        if names:
            self.client.wait_for_workers(len(names), timeout=120)
        return names

    def joined(self, away: bool = False) -> str:
        """The name of a new worker, which is on its way."""
        self._count += 1
        name = f"bare-{self._count}"
        forks = self.away if away else self._world.forks
        assert forks is not None
        self._pids[name] = forks.start(do="worker", address=self.address, name=name)
        return name

    def killed(self, name: str) -> None:
        """Kill a worker for good."""
        killed(self._pids.pop(name))

    def frozen(self, name: str) -> None:
        """Stop a worker where it is."""
        os.kill(self._pids[name], signal.SIGSTOP)

    def thawed(self, name: str) -> None:
        """Let it go on."""
        os.kill(self._pids[name], signal.SIGCONT)

    def retired(self, name: str) -> None:
        """Have a worker leave in an orderly way."""
        self.client.retire_workers(names=[name], close_workers=True)


class Forks:
    """A process that forks clients and workers; see :mod:`tests.faults.forks`."""

    def __init__(self, prefix: tuple[str, ...] = ()) -> None:
        self._process = started("tests.faults.forks", prefix)
        line(self._process)

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *_: object) -> None:
        ended(self._process)

    def start(self, **order: Any) -> int:
        """The process id of a new fork."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()
        return int(line(self._process))


# -- processes -----------------------------------------------------------------------------------
def started(module: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A module as a process."""
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def line(process: subprocess.Popen[str]) -> str:
    """The next one that it prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ended(process: subprocess.Popen[str]) -> None:
    """Close its input, and wait for its end."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)


def killed_with_children(process: subprocess.Popen[str]) -> None:
    """Kill one that :func:`started` made and that was not waited for, with all of its session's group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def killed(pid: int) -> None:
    """Kill a process, if it is there."""
    if pid <= 1:  # 0 and below are groups, and -1 is everybody
        raise ValueError(f"{pid} is no process that the suite began")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def later(seconds: float, function: Callable[[], None]) -> Iterator[None]:
    """Call a function after that time, unless what is done meanwhile has ended before."""
    timer = threading.Timer(seconds, function)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


@contextmanager
def resumed(world: World, killed_one: str, runner: str, form: str) -> Iterator[None]:
    """Note what is done here, with kills and resumes, beyond the time of an undisturbed run."""
    before, began = world.threads_lost, time.perf_counter()
    yield
    if world.threads_lost > before:
        world.resumed[killed_one].append(time.perf_counter() - began - world.seconds[runner][form])


def _undisturbed(world: World, model: DirectInfluence) -> dict[str, float]:
    """Seconds of a fit and of each form, on the cluster of a fitted model: the better one of two."""
    client = model._resources.client
    spent = {"fit": min(_seconds(unfitted(client).fit, world.train) for _ in range(2))}
    for form in FORMS:
        stores = [world.place() for _ in range(2)]
        spent[form] = min(_seconds(write, form, model, store) for store in stores)
        world.compare(stores[0], form)
    return spent


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began
