"""Random faults, from a seed: each scenario ends in the bits of an undisturbed run, or in a named error.

    python -m tests.faults.suite --scenarios 30 --seed 0

Workers and clients are killed with SIGKILL at random moments of fits, factors and strips, schedulers die,
and random files of a store are flipped, truncated or deleted. After a named error the same call is made
again (with repair=True), and must then give the bits. Anything else is a failure: other bits, an
exception that is none of ours, or no end. The last line says what was tried and what was lost.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distributed import Client, LocalCluster

from dask_influence import DirectInfluence, verify
from dask_influence.errors import InfluenceError, InfluenceWarning
from tests import data
from tests.faults.problem import content, score, slow_model, solve, unfitted

PATIENCE = 120
"""Seconds after which a call that has not ended counts as one that never does."""


class Lost(Exception):  # noqa: N818 - the result of a scenario
    """A scenario that ended in neither the bits nor a named error."""


class World:
    """What scenarios share: a cluster, fits, reference results, processes to kill.

    Parameters
    ----------
    folder : Path
        Scratch space.
    seed : int
        Of all that is random.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.train = data.mlp_classification().train
        self.local = unfitted().fit(self.train)
        self.seconds = {"client": _seconds(score, self.local, folder / "scores")}
        solve(self.local, folder / "factors")
        self.expected = {name: content(folder / name) for name in ("scores", "factors")}
        self._connect()
        self.seconds["fit"] = _seconds(self.remote.fit, self.train)
        self.seconds["scores"] = _seconds(score, self.remote, folder / "remote-scores")
        self.seconds["factors"] = _seconds(solve, self.remote, folder / "remote-factors")
        for name, expected in self.expected.items():
            assert content(folder / f"remote-{name}") == expected
        self._clients = _started("tests.faults.clients")
        _line(self._clients)
        self._count = 0

    def _connect(self) -> None:
        self._cluster = LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB"
        )
        self.client = Client(self._cluster)
        self.remote = unfitted(self.client)
        self.remote.fit(self.train)  # the first one also unpacks the model on all workers

    def close(self) -> None:
        """End all processes."""
        _ended(self._clients)
        self.client.close()
        self._cluster.close()

    def store(self) -> Path:
        """A new place."""
        self._count += 1
        return self.folder / f"run-{self._count}"

    def settled(self) -> None:
        """Wait until killed workers are back; a nanny whose worker died while it began gives up on it."""
        try:
            self.client.wait_for_workers(2, timeout=15)
        except TimeoutError:
            self.client.close()
            self._cluster.close()
            self._connect()

    def compare(self, store: Path, kind: str) -> None:
        """Refuse other bits than those of the undisturbed run."""
        found, expected = content(store), self.expected[kind]
        differing = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
        if differing:
            raise Lost(f"differs in {', '.join(differing[:5])}")
        damaged = verify(store)
        if not damaged:
            raise Lost(f"has the right bits and is not as recorded: {damaged}")

    # -- faults ------------------------------------------------------------------------
    @contextmanager
    def worker_killed(self, stage: str) -> Iterator[None]:
        """Kill a random worker once, at a random moment of a stage."""
        pids = [nanny.pid for nanny in self._cluster.workers.values()]
        victim, delay = self.random.choice(pids), self.random.uniform(0, self.seconds[stage])
        timer = threading.Timer(delay, _kill, (victim,))
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def client_killed(self, store: Path) -> None:
        """Begin a run in another process, and kill that at a random moment."""
        assert self._clients.stdin is not None
        self._clients.stdin.write(f"{store}\n")
        self._clients.stdin.flush()
        child = int(_line(self._clients))
        time.sleep(self.random.uniform(0, self.seconds["client"]))
        _kill(child)
        _line(self._clients)

    def damaged(self, store: Path, among: str = "*") -> str:
        """Flip, truncate or delete a random file of the store; what was done."""
        path = self.random.choice(sorted(p for p in store.rglob(among) if p.is_file()))
        how = self.random.choice(["flipped", "truncated", "deleted"])
        held = bytearray(path.read_bytes())
        path.unlink()  # a file may have a second name elsewhere, which is not to be hurt
        if how == "flipped":
            held[self.random.randrange(len(held))] ^= 1 << self.random.randrange(8)
            path.write_bytes(bytes(held))
        elif how == "truncated":
            path.write_bytes(bytes(held[: self.random.randrange(len(held))]))
        return f"{path.relative_to(store)} {how}"


# -- scenarios: each does its harm, ends in the bits or raises, and says what it did -----------------
def worker_in_fit(world: World, store: Path) -> str:
    with world.worker_killed("fit"):
        infl = unfitted(world.client).fit(world.train)
    score(infl, store)
    return "scores"


def worker_in_factors(world: World, store: Path) -> str:
    with world.worker_killed("factors"):
        solve(world.remote, store)
    return "factors"


def worker_in_strips(world: World, store: Path) -> str:
    with world.worker_killed("scores"):
        score(world.remote, store)
    return "scores"


def client_in_run(world: World, store: Path) -> str:
    world.client_killed(store)
    score(world.random.choice([world.local, world.remote]), store)
    return "scores"


def client_killed_twice(world: World, store: Path) -> str:
    for _ in range(2):
        world.client_killed(store)
    score(world.local, store)
    return "scores"


def scheduler_in_run(world: World, store: Path) -> str:
    process = _started("tests.faults.cluster")
    try:
        with Client(_line(process), timeout=60) as client:
            infl = DirectInfluence(slow_model(), world.local.loss, 0.05, chunk_size=4, client=client)
            delay = world.random.uniform(0, 2 * (world.seconds["fit"] + world.seconds["scores"]))
            timer = threading.Timer(delay, _kill_group, (process.pid,))
            timer.start()
            try:
                score(infl.fit(world.train), store)
            finally:
                timer.cancel()
                timer.join()
    finally:
        _kill_group(process.pid)
        _ended(process)
    return "scores"


def damage_repaired(world: World, store: Path) -> str:
    kind = world.random.choice(["scores", "factors"])
    shutil.copytree(world.folder / kind, store)
    for _ in range(world.random.randint(1, 4)):
        print(" ", world.damaged(store), end="")
    write = score if kind == "scores" else solve
    write(world.random.choice([world.local, world.remote]), store, repair=True)
    return kind


def damage_withdrawn(world: World, store: Path) -> str:
    shutil.copytree(world.folder / "scores", store)
    print(" ", world.damaged(store), end="")
    verify(store, repair=True)
    score(world.local, store)
    return "scores"


def damage_in_a_run(world: World, store: Path) -> str:
    """Interrupted, damaged, and continued as if nothing had happened."""
    until = world.random.randint(1, 4)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done == until:
            raise KeyboardInterrupt

    try:
        score(world.local, store, progress=stop)
    except KeyboardInterrupt:
        print(" ", world.damaged(store, world.random.choice(["*", "*.safetensors", "*.json"])), end="")
    score(world.remote, store, repair=world.random.random() < 0.5)
    return "scores"


SCENARIOS: dict[Callable[[World, Path], str], int] = {
    worker_in_fit: 3,
    worker_in_factors: 3,
    worker_in_strips: 4,
    client_in_run: 5,
    client_killed_twice: 2,
    scheduler_in_run: 2,
    damage_repaired: 5,
    damage_withdrawn: 3,
    damage_in_a_run: 5,
}
"""With how often each is drawn."""


def attempt(world: World, scenario: Callable[[World, Path], str]) -> str:
    """Run one scenario to its end: ``"at once"`` or ``"after a named error"``.

    Raises
    ------
    Lost
        It ended otherwise.
    """
    store = world.store()
    outcome = "at once"
    try:
        try:
            kind = _in_time(scenario, world, store)
        except InfluenceError as error:
            outcome = "after a named error"
            print(f"  {type(error).__name__}: {str(error)[:160]}", end="")
            world.settled()
            kind = _again(world, store, scenario)
        world.compare(store, kind)
    except Lost:
        raise
    except Exception as error:
        raise Lost(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    shutil.rmtree(store)
    return outcome


def _again(world: World, store: Path, scenario: Callable[[World, Path], str]) -> str:
    """The same call; where the run's own record is lost, from the beginning."""
    kind = "factors" if scenario is worker_in_factors or _holds(store, "factors") else "scores"
    write = solve if kind == "factors" else score
    try:
        _in_time(write, world.local, store, repair=True)
    except InfluenceError as error:
        if "overwrite=True" not in str(error):
            raise
        _in_time(write, world.local, store, overwrite=True)
    return kind


def _holds(store: Path, array: str) -> bool:
    return (store / array).exists()


def _in_time(function: Callable[..., Any], *arguments: object, **how: object) -> Any:
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function, *arguments, **how).result(PATIENCE)
    except TimeoutError:
        faulthandler.dump_traceback()
        raise Lost(f"no end after {PATIENCE} s") from None
    finally:
        pool.shutdown(wait=False)


def _seconds(function: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


# -- processes -----------------------------------------------------------------------------------
def _started(module: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _ended(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(30)


def _kill(pid: int | None) -> None:
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def main(scenarios: int, seed: int) -> int:
    """Run them all; how many were lost."""
    for name in ("distributed", "distributed.client", "distributed.nanny", "distributed.scheduler"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", InfluenceWarning)
    warnings.filterwarnings("ignore", r"\s*Port \d+ is already in use")
    tried: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    lost = []
    with tempfile.TemporaryDirectory(prefix="dask-influence-faults-") as folder:
        world = World(Path(folder), seed)
        print("undisturbed:", ", ".join(f"{name} {s:.1f} s" for name, s in world.seconds.items()), flush=True)
        try:
            for index in range(scenarios):
                (scenario,) = world.random.choices(list(SCENARIOS), list(SCENARIOS.values()))
                tried[scenario.__name__] += 1
                print(f"{index + 1:4} {scenario.__name__}", end="", flush=True)
                world.settled()
                began = time.perf_counter()
                try:
                    end = attempt(world, scenario)
                except Lost as error:
                    end = "lost"
                    lost.append(f"{index + 1} {scenario.__name__}")
                    print(f"\n{error}")
                ends[end] += 1
                print(f"  {end}, {time.perf_counter() - began:.1f} s", flush=True)
        finally:
            world.close()
    named = ", ".join(f"{count} {name}" for name, count in sorted(tried.items()))
    print(
        f"{scenarios} scenarios from seed {seed} ({named}): {ends['at once']} ended in the bits of an undisturbed "
        f"run at once, {ends['after a named error']} after a named error and the same call again, "
        f"{len(lost)} lost{': ' if lost else ''}{'; '.join(lost)}"
    )
    return len(lost)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(1 if main(options.scenarios, options.seed) else 0)
