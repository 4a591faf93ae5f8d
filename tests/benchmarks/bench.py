"""The benchmark command: everything that has a target, in one session, in one table.

Works that a peer has too run in warm processes, one for each package, each in its environment. Values are
compared before any time counts (in float64 where the peer computes the same to rounding, otherwise on what
was timed, or by true residuals); then both sides are timed in turn, in float32. A peer that takes long
is run once. The other parts are commands of their own: the floor under scores, peak memory of a large perturbation,
workers and growing sizes. What has been measured is kept, with the digest of the package it was measured of,
so that an interrupted run goes on; a table, JSON and pictures are left in the output folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import checks
import numpy as np
import pictures
import problems
import results
from protocol import HERE, SideError
from results import Result
from rich.console import Console
from sides import OURS, Sides
from targets import TARGETS, Strict, Target

import dask_influence

PARTS = {
    "memory": ("perturbation_memory.py", 2),
    "floor": ("floor.py", 2),
    "workers": ("workers.py", 1),
    "growth": ("growth.py", 2),
}
"""Commands of their own, each with the threads that torch has there."""
ROUNDING = 1.25
"""What true residuals may differ by, where both sides end at what float32 can hold."""
PEER_BY_ITSELF = 1
"""Runs of a peer that takes long."""


class Session:
    """Targets measured beside peers; a peer's work that several rows share is run once."""

    def __init__(self, sides: Sides, repeats: int) -> None:
        self.sides, self.repeats = sides, repeats
        self._shared: dict[str, tuple[list[float], np.ndarray | None]] = {}

    def measure(self, target: Target) -> Result:
        """Compare, time in turn, check what was timed."""
        if target.check == "eigenpairs":
            target = self.as_true(target)
        strictly = self.compare(target, target.strict) if target.strict else ""
        ours, theirs, values = self.times(target)
        scaled = f"peer: {target.scaled} x the first 1/{target.scaled}" if target.scaled > 1 else ""
        checked = ", ".join(filter(None, [strictly, self.check(target, *values), scaled]))
        theirs = [seconds * target.scaled for seconds in theirs]
        return Result(target.name, target.title, target.peer, ours, theirs, target.factor, note=checked)

    def compare(self, target: Target, strict: Strict) -> str:
        """In float64, on this problem or another; stops where the sides disagree."""
        problem = strict.problem or target.problem
        asks = target.ours.at(strict.ours), target.theirs.at(strict.theirs)
        if strict.tests:
            asks = tuple(
                dataclasses.replace(ask, arguments={**ask.arguments, "tests": strict.tests}) for ask in asks
            )
        sides = zip((OURS, target.peer), asks, strict=True)
        got, expected = (
            self.sides.run(side, problem, ask, "float64", values=True)["values"] for side, ask in sides
        )
        error = checks.relative_error(got, expected)
        _refuse_above(target, "relative error in float64", error, strict.allowed)
        return f"{error:.0e} in float64" + (f" ({problem})" if problem != target.problem else "")

    def as_true(self, target: Target) -> Target:
        """With our tolerance at the true residual that the peer's one fit has: its start is random, and so is that."""
        found = self.sides.run(target.peer, target.problem, target.theirs)
        self._shared[_shared(target)] = [found["seconds"]], None
        asked = dataclasses.replace(target.theirs, work="eigenpairs")
        pairs = self.sides.run(target.peer, target.problem, asked, values=True)["values"]
        setting = problems.Setting(self.sides.folder, target.problem, "float64")
        (residual,) = checks.eigenpairs(setting, [pairs])
        return dataclasses.replace(target, ours=target.ours.at({"tol": residual}))

    def times(self, target: Target) -> tuple[list[float], list[float], tuple[Any, Any]]:
        """Seconds of all runs of ours and of the peer's, and the values of the last ones."""
        timed: dict[str, list[float]] = {OURS: [], target.peer: []}
        values: dict[str, Any] = {}
        asks = {OURS: target.ours, target.peer: target.theirs}
        shared = _shared(target)
        if shared in self._shared:
            timed[target.peer], values[target.peer] = self._shared[shared]
        fits_for_long = target.once and target.ours.work == "fit"
        for number in range(fits_for_long, self.repeats + 1):  # run 0 warms up
            for side, ask in asks.items():
                by_itself = side != OURS and target.once
                if (by_itself and number != PEER_BY_ITSELF) or (side != OURS and shared in self._shared):
                    continue
                wanted = number == (PEER_BY_ITSELF if by_itself else self.repeats) and ask.work != "fit"
                found = self.sides.run(side, target.problem, ask, values=wanted)
                if number:
                    timed[side].append(found["seconds"])
                values[side] = found.get("values", values.get(side))
        self._shared[shared] = timed[target.peer], values[target.peer]
        return timed[OURS], timed[target.peer], (values[OURS], values[target.peer])

    def check(self, target: Target, ours: Any, theirs: Any) -> str:
        """What was timed, by the target's kind of check; stops where it fails."""
        if target.check == "values":
            error = checks.relative_error(ours[: len(theirs)], theirs)
            _refuse_above(target, "relative error", error, target.allowed)
            return f"{error:.0e} in float32"
        if target.check == "tolerance":
            options = {k: v for k, v in target.ours.options.items() if k != target.loosened}
            full = dataclasses.replace(target.ours, options=options)
            exact = self.sides.run(OURS, target.problem, full, values=True)["values"]
            error = checks.relative_error(ours, exact)
            _refuse_above(target, f"relative error by {target.loosened}", error, target.allowed)
            return f"{error:.0e} beside full directions"
        if target.check in ("eigenpairs", "systems"):
            return self.residuals(target, ours, theirs)
        return ""

    def residuals(self, target: Target, ours: Any, theirs: Any) -> str:
        """True residuals of both sides; ours is to be no larger."""
        if target.check == "eigenpairs":
            asks = {OURS: target.ours, target.peer: target.theirs}
            ours, theirs = (
                self.sides.run(
                    side, target.problem, dataclasses.replace(ask, work="eigenpairs"), values=True
                )["values"]
                for side, ask in asks.items()
            )
        setting = problems.Setting(self.sides.folder, target.problem, "float64")
        mine, peers = getattr(checks, target.check)(setting, [ours, theirs])
        _refuse_above(target, "true residual", mine, ROUNDING * peers)
        return f"true residual {mine:.1e}, theirs {peers:.1e}"


def _shared(target: Target) -> str:
    """What rows have in common whose peer does the same work."""
    return f"{target.peer} {target.problem} {target.theirs}"


def _refuse_above(target: Target, what: str, found: float, allowed: float) -> None:
    if not found <= allowed:
        raise checks.DisagreementError(
            f"{what} {found:.1e}, allowed {allowed:.1e}: its times count for nothing"
        )


def chosen(only: Sequence[str], quick: bool, pythons: Mapping[str, str]) -> list[Target]:
    """The targets asked for, where their peer is installed and the package has what they ask of it."""
    known = inspect.signature(dask_influence.ArnoldiInfluence).parameters
    found = []
    for target in (t for t in TARGETS if not only or t.name in only):
        if quick and target.minutes:
            print(f"{target.name}: left out, its peer takes minutes")
        elif target.peer not in pythons:
            print(f"{target.name}: left out, no environment of {target.peer}")
        elif target.loosened and target.loosened not in known:
            print(f"{target.name}: left out, there is no {target.loosened}=")
        else:
            found.append(target)
    return found


def part(name: str, output: Path, repeats: int) -> None:
    """Run a command of its own; its rows and what it draws stand in ``output``."""
    script, threads = PARTS[name]
    print(f"{name}: {script}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(HERE / script), "--output", str(output), "--repeats", str(repeats)]
    subprocess.run(command, env=environment, check=True)


def digest() -> str:
    """Of the package's code: times of other code are none of this one's."""
    root = Path(dask_influence.__file__).parent
    code = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(code).hexdigest()[:16]


def arguments() -> argparse.Namespace:
    names = [target.name for target in TARGETS] + list(PARTS)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pydvl-python", help="interpreter of the environment with pyDVL")
    parser.add_argument("--kronfluence-python", help="interpreter of the environment with kronfluence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each side")
    parser.add_argument("--only", nargs="+", default=[], choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="leave out what takes a peer minutes")
    parser.add_argument("--again", action="store_true", help="measure again what has been measured")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    pythons = {"pydvl": args.pydvl_python, "kronfluence": args.kronfluence_python}
    pythons = {OURS: sys.executable} | {name: python for name, python in pythons.items() if python}
    kept = args.output / (digest() + "-small" * problems.SMALL)
    kept.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        problems.make(Path(name))
        session = Session(sides := Sides(pythons, Path(name), args.threads), args.repeats)
        # clusters last: workers that are idle take turns on the cores, too
        for target in sorted(chosen(args.only, args.quick, pythons), key=Target.on_cluster):
            file = kept / f"{target.name}.json"
            if args.again or not file.exists():
                print(f"{target.name}: {target.title}", flush=True)
                began = time.perf_counter()
                try:
                    results.write(file, [session.measure(target)])
                except (checks.DisagreementError, SideError) as error:
                    failed[target.name] = str(error)
                    print(f"    {error}", flush=True)
                print(f"    {time.perf_counter() - began:.0f} s in all", flush=True)
        sides.close()
    for name in (name for name in PARTS if not args.only or name in args.only):
        if args.again or not (kept / f"{name}.json").exists():
            try:
                part(name, kept, args.repeats)
            except subprocess.CalledProcessError as error:
                failed[name] = f"ended with code {error.returncode}"
    order = [*(target.name for target in TARGETS), *PARTS]
    files = [kept / f"{name}.json" for name in order if (kept / f"{name}.json").exists()]
    rows = [row for file in files for row in results.read(file)]
    results.write(args.output / "results.json", rows)
    pictures.targets(rows, args.output / "targets.png")
    Console(width=None if sys.stdout.isatty() else 200).print(results.table(rows))
    print(
        f"written to {args.output}: results.json, targets.png; runs, growth.json and growth.png in {kept.name}/"
    )


if __name__ == "__main__":
    main()
