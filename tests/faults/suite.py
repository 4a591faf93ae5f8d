"""Random faults, from a seed: each scenario ends in the bits of an undisturbed run, or in a named error.

    python -m tests.faults.suite --scenarios 100 --seed 0 [--only NAME ...]

While all scores, factors, or a reduction of the scores (TopK, GroupSum, SelfInfluence) are written:

- *workers* are killed by SIGKILL at random moments of fits, factors, strips and merges: of one and of four
  threads, with a nanny and without one (so that results that only they held are gone), in an adaptive
  cluster that comes from no worker; they are closed in this process, retired, frozen by SIGSTOP, join late, and all of
  them go;
- *clients* are killed once and twice, on a cluster too and during a fit with ``artifacts=``, together with a
  worker, and two of them write to one store; *schedulers* are killed with their workers;
- the *network* to some or all workers, or to the client, is cut (namespaces, veth), and joined again or not;
- the *disk* of the store, or of the artifacts, is full (tmpfs); the *S3 server* (SeaweedFS) is killed, and back within
  the time of retries or not;
- files of finished and of interrupted stores are flipped, truncated or deleted, and mended by ``repair=True`` or
  ``verify(store, repair=True)``; ledger entries end in the middle of a line;
- data that Dask's threads compute are away once.

A fault that comes when all is done counts for nothing, and another scenario takes its place. After a named error the
same call is made again (with repair=True), and must then give the bits. Anything else is a failure: other bits, an
exception that is none of ours, no end, or more strips done again than threads were lost. The last lines say what was
tried, what it cost and what was lost, and name what this machine has no means for.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import random
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dask_influence.errors import InfluenceError, InfluenceWarning
from dask_influence.storage.stores import Location
from tests.faults.problem import write
from tests.faults.scenarios import SCENARIOS, Scenario
from tests.faults.watch import repeated
from tests.faults.world import Lost, World

PATIENCE = 120
"""Seconds after which a call that has not ended counts as one that never does."""

MOST_MISSES = 2
"""Faults that may come too late, for each scenario that is asked for."""

AT_ONCE, NAMED, LOST = "at once", "after a named error", "lost"


@dataclass
class Tally:
    """What was tried, and how it ended.

    Attributes
    ----------
    ends : Counter
        Scenarios by name and end.
    missed : Counter
        Scenarios by name whose fault came after all was done; others took their places.
    again : list of (int, int)
        Strips that were done again, and threads that were lost, where the one bounds the other.
    lost : list of str
        Scenarios that failed.
    """

    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    again: list[tuple[int, int]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def count(self, end: str) -> int:
        """Scenarios that ended so."""
        return sum(count for (_, found), count in self.ends.items() if found == end)

    def lines(self, world: World, seed: int, lacking: dict[str, str]) -> Iterator[str]:
        """The summary, its last line being the shortest one."""
        names = sorted({name for name, _ in self.ends})
        yield "by kind (at once + after a named error + lost):"
        for name in names:
            yield "  {}: {}".format(
                name, " + ".join(str(self.ends[name, end]) for end in (AT_ONCE, NAMED, LOST))
            )
        missed = ", ".join(f"{count} {name}" for name, count in sorted(self.missed.items()))
        yield f"beside them, faults that came when all was done: {missed or 'none'}"
        yield f"by what was written: {', '.join(f'{n} {form}' for form, n in sorted(self.forms.items()))}"
        for killed, seconds in sorted(world.resumed.items()):
            middle, mean, most = statistics.median(seconds), statistics.mean(seconds), max(seconds)
            yield (
                f"seconds that a killed {killed} cost beyond an undisturbed run: "
                f"median {middle:.2f}, mean {mean:.2f}, max {most:.2f} ({len(seconds)} kills)"
            )
        each = [strips / threads for strips, threads in self.again]
        if each:
            yield (
                f"strips done again for each thread of a lost worker or client: mean {statistics.mean(each):.2f}, "
                f"max {max(each):.2f}, of at most 1 ({sum(threads for _, threads in self.again)} threads lost)"
            )
        skipped = "; ".join(f"{name} ({why})" for name, why in sorted(lacking.items()))
        yield f"skipped: {skipped or 'none'}"
        yield (
            f"{sum(self.ends.values())} scenarios of {len(names)} kinds from seed {seed}: {self.count(AT_ONCE)} "
            f"ended in the bits of an undisturbed run at once, {self.count(NAMED)} after a named error and the same "
            f"call again, {len(self.lost)} lost{': ' if self.lost else ''}{'; '.join(self.lost)}"
        )


def attempt(world: World, scenario: Scenario, form: str, tally: Tally) -> str:
    """Run one scenario to its end: ``"at once"`` or ``"after a named error"``.

    Raises
    ------
    Lost
        It ended otherwise, or could not begin.
    """
    world.strikes = world.threads_lost = 0
    try:
        store = scenario.place(world)
    except Exception as error:
        raise Lost(f"what it needs could not be begun: {error}\n{traceback.format_exc()}") from error
    outcome = AT_ONCE
    try:
        try:
            _in_time(scenario.harm, world, store, form)
        except InfluenceError as error:
            outcome = NAMED
            world.threads_lost *= 2  # what those who came instead had begun ended with the call
            print(f"  {type(error).__name__}: {str(error)[:160]}", end="")
            _again(world, store, form)
        world.compare(store, form)
    except Lost:
        raise
    except Exception as error:
        raise Lost(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from error
    if scenario.bounded and world.threads_lost:
        strips = repeated(store)
        tally.again.append((strips, world.threads_lost))
        if strips > world.threads_lost:
            raise Lost(f"{strips} strips were done again for {world.threads_lost} threads that were lost")
    store.delete()
    return outcome


def _again(world: World, store: Location, form: str) -> None:
    """The same call; where the run's own record is lost, from the beginning."""
    try:
        _in_time(write, form, world.local, store, repair=True)
    except InfluenceError as error:
        if "overwrite=True" not in str(error):
            raise
        _in_time(write, form, world.local, store, overwrite=True)


def _in_time(function: Callable[..., Any], *arguments: object, **how: object) -> Any:
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function, *arguments, **how).result(PATIENCE)
    except TimeoutError:
        faulthandler.dump_traceback()
        raise Lost(f"no end after {PATIENCE} s") from None
    finally:
        pool.shutdown(wait=False)


def tried(world: World, scenario: Scenario, tally: Tally) -> None:
    """Run one scenario, and note how it ended, unless its fault came too late for anything."""
    form, index = world.random.choice(scenario.forms), sum(tally.ends.values()) + 1
    print(f"{index:4} {scenario.name} ({form})", end="", flush=True)
    began = time.perf_counter()
    try:
        world.settle()
        end = attempt(world, scenario, form, tally)
    except Exception as error:  # noqa: BLE001 # whatever it is: neither the same bits nor a named error
        end = LOST
        tally.lost.append(f"{index} {scenario.name} ({form})")
        print(f"\n{error if isinstance(error, Lost) else traceback.format_exc()}")
    if end == AT_ONCE and not world.strikes:
        tally.missed[scenario.name] += 1
        end = "missed"
    else:
        tally.ends[scenario.name, end] += 1
        tally.forms[form] += 1
    print(f"  {end}, {time.perf_counter() - began:.1f} s", flush=True)


def deck(scenarios: Sequence[Scenario], chance: random.Random) -> Iterator[Scenario]:
    """Scenarios as often as they ask for, in any order, again and again."""
    while True:
        cards = [scenario for scenario in scenarios for _ in range(scenario.count)]
        chance.shuffle(cards)
        yield from cards


def main(scenarios: int, seed: int, only: Sequence[str]) -> int:
    """Run them all; how many were lost."""
    for name in ("distributed", "distributed.client", "distributed.nanny", "distributed.scheduler"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore", InfluenceWarning)
    warnings.filterwarnings("ignore", r"\s*Port \d+ is already in use")
    asked = [scenario for scenario in SCENARIOS if not only or scenario.name in only]
    lacking = {scenario.name: why for scenario in asked if (why := scenario.lacking()) is not None}
    possible = [scenario for scenario in asked if scenario.name not in lacking]
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="dask-influence-faults-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder), seed)
        try:
            cards = deck(possible, world.random)
            most = MOST_MISSES * scenarios if possible else 0
            while sum(tally.ends.values()) < scenarios and sum(tally.missed.values()) < most:
                tried(world, next(cards), tally)
        finally:
            world.close()
    print(*tally.lines(world, seed, lacking), sep="\n")
    return len(tally.lost)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenarios", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=[scenario.name for scenario in SCENARIOS])
    options = parser.parse_args()
    sys.exit(1 if main(options.scenarios, options.seed, options.only) else 0)
