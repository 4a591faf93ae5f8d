"""The scenarios: each does its harm while something is written, and ends in that or raises."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client

from dask_influence import DirectInfluence, verify
from dask_influence.errors import CorruptStoreError, InfluenceError
from dask_influence.storage.stores import Location
from tests.faults import machines
from tests.faults.problem import FORMS, unfitted, write
from tests.faults.world import (
    Other,
    World,
    ended,
    killed,
    killed_with_children,
    later,
    line,
    resumed,
    started,
)
from tests.s3.server import program

SCORED = ("scores", "top", "groups", "self")
"""Forms that are written strip by strip."""


# -- workers -------------------------------------------------------------------------------
def worker_killed(world: World, store: Location, form: str) -> None:
    with resumed(world, "worker", world.two.name, form), world.two.worker_killed(form):
        write(form, world.two.model, store)


def worker_killed_in_fit(world: World, store: Location, form: str) -> None:
    with world.two.worker_killed("fit"):
        infl = unfitted(world.two.client).fit(world.train)
    write(form, infl, store)


def worker_of_four_threads_killed(world: World, store: Location, form: str) -> None:
    with world.four.worker_killed(form):
        write(form, world.four.model, store)


def threads_of_this_process_leave(world: World, store: Location, form: str) -> None:
    """All workers of ``processes=False`` are closed in the middle of a run, and others come."""
    cluster = world.inside.cluster

    def replaced() -> None:
        world.struck(4)
        cluster.scale(0)
        time.sleep(world.moment(0.5))
        cluster.scale(2)

    with later(world.moment(world.seconds[world.inside.name][form]), replaced):
        write(form, world.inside.model, store)


def worker_of_adaptive_cluster_killed(world: World, store: Location, form: str) -> None:
    with world.adaptive.worker_killed(form):
        write(form, world.adaptive.model, store)


def worker_lost_with_what_it_held(world: World, store: Location, form: str) -> None:
    """No nanny: the results that only it has are gone, and so is a half of the cluster."""
    victim, _ = world.bare.roster(2)

    def lose() -> None:
        world.bare.killed(victim)
        world.struck(1)

    with later(world.moment(world.seconds["bare"][form]), lose):
        write(form, world.bare.model, store)


def worker_retired_and_another_late(world: World, store: Location, form: str) -> None:
    leaving, _ = world.bare.roster(2)

    def relieve() -> None:
        world.bare.joined()
        world.bare.retired(leaving)
        world.struck(1)

    with later(world.moment(world.seconds["bare"][form]), relieve):
        write(form, world.bare.model, store)


def worker_frozen(world: World, store: Location, form: str) -> None:
    """It hears nothing and says nothing, and goes on after a while, or never."""
    victim, _ = world.bare.roster(2)

    def freeze() -> None:
        world.bare.frozen(victim)
        world.struck(1)

    def thaw() -> None:
        if forgiven:
            world.bare.thawed(victim)

    freezing, forgiven = world.moment(world.seconds["bare"][form]), world.random.random() < 0.5
    with later(freezing, freeze), later(freezing + world.moment(6), thaw):
        write(form, world.bare.model, store)


def all_workers_gone(world: World, store: Location, form: str) -> None:
    """One comes back within the time that is allowed, or none."""
    (only,) = world.bare.roster(1)
    back = world.random.random() < 0.3

    def leave() -> None:
        world.bare.killed(only)
        world.struck(1)
        if back:
            world.bare.joined()

    with later(world.moment(world.seconds["bare"][form]), leave):
        write(form, world.bare.model, store)


# -- clients and schedulers ------------------------------------------------------------------
def client_killed(world: World, store: Location, form: str) -> None:
    with resumed(world, "client", "here", form):
        client = world.client(store, form)
        time.sleep(world.moment(world.seconds["here"][form]))
        _killed(world, client, threads=1)
        write(form, world.local, store)


def client_killed_twice(world: World, store: Location, form: str) -> None:
    for _ in range(2):
        client = world.client(store, form)
        time.sleep(world.moment(world.seconds["here"][form]))
        _killed(world, client, threads=1)
    write(form, world.random.choice([world.local, world.two.model]), store)


def _killed(world: World, client: Other, threads: int) -> None:
    """Kill a client that is still at work, and with it what so many threads were doing for it."""
    if client.running:
        killed(client.pid)
        world.struck(threads)
    client.ended()


def client_of_cluster_killed(world: World, store: Location, form: str) -> None:
    """During a fit with ``artifacts=`` or the run; another client does the same call on the same cluster."""
    artifacts = world.place().local_path
    assert artifacts is not None
    address, spent = world.two.cluster.scheduler_address, world.seconds[world.two.name]
    client = world.client(store, form, address=address, artifacts=str(artifacts))
    time.sleep(0.3 + world.moment(spent["fit"] + spent[form]))
    _killed(world, client, threads=2)  # what the workers are at goes on, and is not waited for
    write(form, unfitted(world.two.client, artifacts).fit(world.train), store)


def client_and_worker_killed(world: World, store: Location, form: str) -> None:
    address = world.two.cluster.scheduler_address
    client = world.client(store, form, address=address)
    time.sleep(0.3 + world.moment(world.seconds[world.two.name][form]))
    _killed(world, client, threads=2)
    with world.two.worker_killed(form):
        write(form, world.two.model, store)


def scheduler_killed(world: World, store: Location, form: str) -> None:
    """With its workers, in a fit or a run."""
    process = started("tests.faults.cluster")
    try:
        with Client(line(process), timeout=60, set_as_default=False) as client:
            spent = world.seconds[world.two.name]

            def lose() -> None:
                killed_with_children(process)
                world.struck(2)

            with later(world.moment(1.5 * (spent["fit"] + spent[form])), lose):
                write(form, unfitted(client).fit(world.train), store)
    finally:
        killed_with_children(process)
        ended(process)


def two_clients(world: World, store: Location, form: str) -> None:
    """On one store at once, and one of them may be killed."""
    world.struck()
    other = world.client(store, form)
    time.sleep(world.moment(world.seconds["here"][form] / 2))
    shared = world.random.choice([world.local, world.two.model])
    if world.random.random() < 0.5:
        delay = world.moment(world.seconds["here"][form])
        with later(delay, lambda: killed(other.pid)):
            write(form, shared, store)
    else:
        write(form, shared, store)
    _accept(other.ended())


def _accept(said: str) -> None:
    if said not in ("", "done"):
        raise InfluenceError(f"the other client: {said}")


# -- the network -----------------------------------------------------------------------------
def worker_cut_off(world: World, store: Location, form: str) -> None:
    """A worker on another host, whose cable is pulled; it may be put back before the others have done its work."""
    host = world.bare.other_host
    assert host is not None
    world.bare.roster(1, away=1)
    cutting, forgiven = world.moment(world.seconds["bare"][form]), world.random.random() < 0.5

    def cut() -> None:
        host.cut()
        world.struck(1)

    def join() -> None:
        if forgiven:
            host.join()

    try:
        with later(cutting, cut), later(cutting + world.moment(5), join):
            write(form, world.bare.model, store)
    finally:
        host.join()


def all_workers_cut_off(world: World, store: Location, form: str) -> None:
    """None is left on this side; the cable may be put back in time."""
    host = world.bare.other_host
    assert host is not None
    world.bare.roster(0, away=1)
    cutting, forgiven = world.moment(world.seconds["bare"][form]), world.random.random() < 0.5

    def cut() -> None:
        host.cut()
        world.struck(1)

    def join() -> None:
        if forgiven:
            host.join()

    try:
        with later(cutting, cut), later(cutting + world.moment(3), join):
            write(form, world.bare.model, store)
    finally:
        host.join()


def client_cut_off(world: World, store: Location, form: str) -> None:
    """A client on another host loses sight of its cluster; the cable may be put back before it has noticed."""
    host = world.bare.other_host
    assert host is not None
    world.bare.roster(2)
    spent, forgiven = world.seconds["bare"], world.random.random() < 0.5
    client = world.client(store, form, forks=world.bare.away, address=world.bare.address)
    time.sleep(0.3 + world.moment(spent["fit"] + spent[form]))
    try:
        if client.running:
            host.cut()
            world.struck(2)
        if forgiven:
            time.sleep(world.moment(3))
            host.join()
        said = client.ended()
    finally:
        host.join()
    _accept(said)


# -- stores ----------------------------------------------------------------------------------
def disk_full_of_scores(world: World, store: Location, form: str) -> None:
    """Less room than the output takes, at random; then there is room again."""
    needed = _taken(world, lambda: write(form, world.local, world.place(world.disk.folder)))
    world.disk.leave(int(world.moment(1.1 * needed)))
    try:
        write(form, world.random.choice([world.local, world.two.model]), store)
    except InfluenceError:
        world.struck()
        raise
    finally:
        world.disk.make_room()


def disk_full_of_artifacts(world: World, store: Location, form: str) -> None:
    """A fit whose artifacts and checkpoints find no room; then there is room, and it goes on."""

    def attempt(artifacts: Path) -> DirectInfluence:
        return unfitted(world.two.client, artifacts).fit(world.train)

    def place() -> Path:
        found = world.place(world.disk.folder).local_path
        assert found is not None
        return found

    needed = _taken(world, lambda: attempt(place()))
    artifacts = place()
    world.disk.leave(int(world.moment(1.1 * needed)))
    try:
        attempt(artifacts)
    except InfluenceError as error:
        world.struck()
        print(f"  {type(error).__name__}: {str(error)[:160]}", end="")
    finally:
        world.disk.make_room()
    write(form, attempt(artifacts), store)


def _taken(world: World, function: Callable[[], object]) -> int:
    """Bytes of the small disk that a call takes, which are given back."""
    for left in world.disk.folder.iterdir():
        shutil.rmtree(left)
    before = world.disk.used
    function()
    needed = world.disk.used - before
    for left in world.disk.folder.iterdir():
        shutil.rmtree(left)
    return needed


def s3_server_restarted(world: World, store: Location, form: str) -> None:
    """Stopped as by a loss of power, and back within the time that requests are repeated."""
    runner = world.random.choice(["here", world.two.name])

    def restart() -> None:
        world.s3.kill()
        world.struck()
        time.sleep(world.moment(2))
        world.s3.start()

    with later(world.moment(world.seconds[runner][form]), restart):
        write(form, world.local if runner == "here" else world.two.model, store)


def s3_server_away(world: World, store: Location, form: str) -> None:
    """Stopped for longer than requests are repeated; then it is back."""
    hasty = {"retry_config": {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}}
    impatient = Location(store.url, {**world.s3.options, **hasty})

    def stop() -> None:
        world.s3.kill()
        world.struck()

    try:
        with later(world.moment(world.seconds["here"][form]), stop):
            write(form, world.local, impatient)
    finally:
        world.s3.kill()
        world.s3.start()


def damage_repaired(world: World, store: Location, form: str) -> None:
    _copied(world, store, form)
    for _ in range(world.random.randint(1, 4)):
        print(" ", _damaged(world, store), end="")
    write(form, world.random.choice([world.local, world.two.model]), store, repair=True)


def damage_withdrawn(world: World, store: Location, form: str) -> None:
    _copied(world, store, form)
    print(" ", _damaged(world, store), end="")
    verify(store, repair=True)
    write(form, world.local, store)


def damage_in_a_run(world: World, store: Location, form: str) -> None:
    """Interrupted, damaged, and continued as if nothing had happened, or with ``repair=True``."""
    _interrupted(world, store, form)
    print(" ", _damaged(world, store, world.random.choice(["*", "*.safetensors", "*.json"])), end="")
    write(form, world.two.model, store, repair=world.random.random() < 0.5)
    found = verify(store)  # a flipped bit in a shard is no concern of a resume, which reads none
    if not found:
        raise CorruptStoreError(str(found))


def ledger_truncated(world: World, store: Location, form: str) -> None:
    """An entry of a run that was interrupted ends in the middle of a line."""
    _interrupted(world, store, form)
    folder = store.local_path
    assert folder is not None
    world.struck()
    entry = world.random.choice(sorted((folder / "_run" / "ledger").iterdir()))
    entry.write_bytes(entry.read_bytes()[: world.random.randrange(entry.stat().st_size)])
    write(form, world.local, store)


def _copied(world: World, store: Location, form: str) -> None:
    assert store.local_path is not None
    shutil.copytree(world.folder / f"reference-{form}", store.local_path)


def _interrupted(world: World, store: Location, form: str) -> None:
    until = world.random.randint(1, 4)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done == until:
            raise KeyboardInterrupt

    try:
        write(form, world.local, store, progress=stop)
    except KeyboardInterrupt:
        return


def _damaged(world: World, store: Location, among: str = "*") -> str:
    """Flip, truncate or delete a random file of the store; what was done."""
    assert store.local_path is not None
    world.struck()
    path = world.random.choice(sorted(p for p in store.local_path.rglob(among) if p.is_file()))
    how = world.random.choice(["flipped", "truncated", "deleted"])
    held = bytearray(path.read_bytes())
    path.unlink()  # a file may have a second name elsewhere, which is not to be hurt
    if how == "flipped":
        held[world.random.randrange(len(held))] ^= 1 << world.random.randrange(8)
        path.write_bytes(bytes(held))
    elif how == "truncated":
        path.write_bytes(bytes(held[: world.random.randrange(len(held))]))
    return f"{path.relative_to(store.local_path)} {how}"


# -- the threaded scheduler --------------------------------------------------------------------
def data_of_threads_away(world: World, store: Location, form: str) -> None:
    """Training data are dask arrays that Dask's threads compute, and what they are read from is away once."""
    x, y = (part.numpy() for part in world.train)
    failing, lock = [world.random.randrange(8)], threading.Lock()

    def block(part: np.ndarray[Any, Any], block_info: Any = None) -> np.ndarray[Any, Any]:
        with lock:
            if failing and block_info[0]["chunk-location"][0] == failing[0]:
                failing.clear()
                world.struck()
                raise ConnectionError("the source of the data is away")
        return part

    lazy = da.from_array(x, chunks=(5, -1)).map_blocks(block, dtype=x.dtype, meta=np.empty((0, 4), x.dtype))
    held = (lazy, da.from_array(y, chunks=5))
    with dask.config.set(scheduler="threads", pool=ThreadPoolExecutor(4)):
        try:
            write(form, world.local, store, train=held)
        except ConnectionError as error:  # of the user's own function, under its own name
            print(f"  {error}", end="")
        write(form, world.local, store, train=held)


@dataclass(frozen=True)
class Scenario:
    """One kind of harm.

    Attributes
    ----------
    harm : callable
        ``harm(world, store, form)`` ends with the form written, or raises.
    count : int
        How often it is done, of a hundred.
    forms : tuple of str
        What may be written meanwhile.
    on : str
        Where the store is: ``"folder"``, ``"disk"`` or ``"s3"``.
    uses : str, optional
        The cluster of the world that it needs.
    bounded : bool
        Whether each thread that is lost may cost one strip, and no more.
    """

    harm: Callable[[World, Location, str], None]
    count: int
    forms: tuple[str, ...] = FORMS
    on: str = "folder"
    uses: str | None = None
    bounded: bool = False

    @property
    def name(self) -> str:
        """Of its function."""
        return self.harm.__name__

    def lacking(self) -> str | None:
        """What this machine lacks for it; None where it can be done."""
        if self.harm in (worker_cut_off, all_workers_cut_off, client_cut_off) or self.on == "disk":
            if not machines.is_root():
                return machines.NEEDS_ROOT
            tool = "mount" if self.on == "disk" else "ip"
            return None if shutil.which(tool) else f"needs {tool}"
        if self.on == "s3":
            return None if program() else "needs SeaweedFS, the extra [s3]"
        return None

    def place(self, world: World) -> Location:
        """Where it writes; what it needs is there then."""
        if self.uses is not None:
            getattr(world, self.uses)
        if self.on == "s3":
            return world.s3.place(world.place().url.rpartition("/")[2])
        return world.place(world.disk.folder if self.on == "disk" else None)


SCENARIOS = (
    Scenario(worker_killed, 9, bounded=True, uses="two"),
    Scenario(worker_killed_in_fit, 4, uses="two"),
    Scenario(worker_of_four_threads_killed, 5, SCORED, bounded=True, uses="four"),
    Scenario(threads_of_this_process_leave, 3, SCORED, bounded=True, uses="inside"),
    Scenario(worker_of_adaptive_cluster_killed, 3, SCORED, bounded=True, uses="adaptive"),
    Scenario(worker_lost_with_what_it_held, 4, bounded=True, uses="bare"),
    Scenario(worker_retired_and_another_late, 3, bounded=True, uses="bare"),
    Scenario(worker_frozen, 3, SCORED, bounded=True, uses="bare"),
    Scenario(all_workers_gone, 3, bounded=True, uses="bare"),
    Scenario(client_killed, 8, bounded=True),
    Scenario(client_killed_twice, 4, bounded=True, uses="two"),
    Scenario(client_of_cluster_killed, 5, bounded=True, uses="two"),
    Scenario(client_and_worker_killed, 3, bounded=True, uses="two"),
    Scenario(scheduler_killed, 4, bounded=True, uses="two"),
    Scenario(two_clients, 5, uses="two"),
    Scenario(worker_cut_off, 4, bounded=True, uses="bare"),
    Scenario(all_workers_cut_off, 2, bounded=True, uses="bare"),
    Scenario(client_cut_off, 3, bounded=True, uses="bare"),
    Scenario(disk_full_of_scores, 5, on="disk", uses="two"),
    Scenario(disk_full_of_artifacts, 3, on="disk", uses="two"),
    Scenario(s3_server_restarted, 3, on="s3", uses="two"),
    Scenario(s3_server_away, 3, on="s3"),
    Scenario(damage_repaired, 5, uses="two"),
    Scenario(damage_withdrawn, 3),
    Scenario(damage_in_a_run, 3, SCORED, uses="two"),
    Scenario(ledger_truncated, 3, SCORED),
    Scenario(data_of_threads_away, 2, ("scores", "top", "groups")),
)
