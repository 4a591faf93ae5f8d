"""Times every estimator, fit and then scores, beside the peers that have it.

Two problems (:mod:`problems`): the digits MLP 64-32-10 with 360 × 1,437 scores, and an
MLP 3072-256-128-10 with 256 × 4,096 (16 test points for the solvers that go by passes). Each
package runs in a warm process of its own, in its environment. Where a peer computes the same
quantity correctly, values are compared in float64 before any time counts; then each piece of
work is run in turn, in float32, and medians are printed and written as JSON. Work that takes a
peer minutes is run once, without warming up.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import problems
from rich.console import Console
from rich.table import Table
from sides import Sides
from targets import Ask

NOTHING = 5e-3
"""Seconds below which a fit has done nothing yet."""

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """The same work, as a peer has it.

    Attributes
    ----------
    name : str
        Package.
    estimator : str
        Its class.
    options : mapping
        Its arguments.
    strict : (mapping, mapping, float), optional
        Ours and the peer's arguments at which the two have to agree, and the relative error
        allowed; None where the peer computes something else, and then says ``differs``.
    differs : str
        Why values are not compared.
    """

    name: str
    estimator: str
    options: Options = field(default_factory=dict)
    strict: tuple[Options, Options, float] | None = None
    differs: str = ""


@dataclass(frozen=True)
class Work:
    """One estimator on one problem."""

    problem: str
    title: str
    estimator: str
    options: Options = field(default_factory=dict)
    peers: tuple[Peer, ...] = ()
    tests: int | None = None
    once: bool = False

    @property
    def name(self) -> str:
        """For ``--only``."""
        return f"{self.problem}-{self.title.split(',')[0].lower().replace(' ', '-')}"

    @property
    def count(self) -> int:
        """Test points."""
        return self.tests or (360 if self.problem == "digits" else 256)


ARNOLDI = {"rank": 20, "tol": 1e-3}
TIGHT_ARNOLDI = {"rank": 20, "tol": 1e-10}
CG = {"rtol": 1e-4}
BLOCK_CG = {"solve_simultaneously": True}
PEER_CG = {"rtol": 1e-2, "atol": 0.0, **BLOCK_CG}
"""It goes on until ‖r‖ ≤ rtol² ‖g‖."""
TIGHT_CG = {"rtol": 1e-9}, {"rtol": 1e-9, "atol": 0.0, **BLOCK_CG}, 1e-6
LISSA = {"rtol": 1e-2}
PEER_LISSA = {"rtol": 1e-2, "scale": 100.0, "maxiter": 2000}
RANDOM = "its own random directions"
KRONFLUENCE = Peer("kronfluence", "", {}, ({"curvature": "empirical_fisher"}, {"empirical": True}, 1e-6))
PEER_EKFAC = Peer(
    "pydvl", "EkfacInfluence", {"update_diagonal": True}, differs="its pseudo-loss is no Fisher"
)
PEER_DATAINF = Peer("pydvl", "InverseHarmonicMeanInfluence", differs="weights by right-hand sides")

WORKS = (
    Work(
        "digits",
        "exact Hessian",
        "DirectInfluence",
        peers=(Peer("pydvl", "DirectInfluence", strict=({}, {}, 1e-8)),),
    ),
    Work("digits", "exact GGN", "DirectInfluence", {"curvature": "ggn"}),
    Work(
        "digits",
        "Arnoldi, rank 20",
        "ArnoldiInfluence",
        ARNOLDI,
        (Peer("pydvl", "ArnoldiInfluence", ARNOLDI, (TIGHT_ARNOLDI, TIGHT_ARNOLDI, 1e-6)),),
    ),
    Work(
        "digits",
        "CG",
        "CgInfluence",
        CG,
        (Peer("pydvl", "CgInfluence", PEER_CG, TIGHT_CG),),
    ),
    Work(
        "digits",
        "LiSSA",
        "LissaInfluence",
        LISSA,
        (Peer("pydvl", "LissaInfluence", PEER_LISSA, differs="its own draws"),),
        tests=20,
    ),
    Work(
        "digits",
        "Nyström, rank 20",
        "NystroemSketchInfluence",
        {"rank": 20},
        (Peer("pydvl", "NystroemSketchInfluence", {"rank": 20}, differs=RANDOM),),
    ),
    Work("digits", "EK-FAC", "EkfacInfluence", peers=(PEER_EKFAC, KRONFLUENCE)),
    Work("digits", "DataInf", "InverseHarmonicMeanInfluence", peers=(PEER_DATAINF,)),
    Work("digits", "gradient dot", "GradientDotInfluence"),
    Work(
        "large",
        "Arnoldi, rank 20",
        "ArnoldiInfluence",
        ARNOLDI,
        (Peer("pydvl", "ArnoldiInfluence", ARNOLDI, differs="compared on digits"),),
        once=True,
    ),
    Work(
        "large",
        "CG",
        "CgInfluence",
        CG,
        (Peer("pydvl", "CgInfluence", PEER_CG, differs="compared on digits"),),
        tests=16,
        once=True,
    ),
    Work("large", "LiSSA", "LissaInfluence", LISSA, tests=16, once=True),
    Work(
        "large",
        "Nyström, rank 20",
        "NystroemSketchInfluence",
        {"rank": 20},
        (Peer("pydvl", "NystroemSketchInfluence", {"rank": 20}, differs=RANDOM),),
        once=True,
    ),
    Work(
        "large",
        "EK-FAC",
        "EkfacInfluence",
        peers=(Peer("kronfluence", "", differs="compared on digits"),),
        once=True,
    ),
    Work("large", "DataInf", "InverseHarmonicMeanInfluence", peers=(PEER_DATAINF,), tests=16, once=True),
    Work("large", "gradient dot", "GradientDotInfluence"),
)


def run(
    sides: Sides, side: str, work: Work, estimator: str, options: Options, dtype: str, *, values: bool = False
) -> dict[str, Any]:
    """Fit, then scores: seconds of each, and the scores where asked for."""
    fit = sides.run(side, work.problem, Ask("fit", estimator, options), dtype)
    scoring = Ask("scores", estimator, options, {"tests": work.count})
    scores = sides.run(side, work.problem, scoring, dtype, values=values)
    held = {"fit": fit["seconds"], "scores": scores["seconds"]}
    passes = {"passes": (fit["passes"], scores["passes"])} if "passes" in fit else {}
    return held | passes | ({"values": scores["values"]} if values else {})


def compare(sides: Sides, work: Work, peer: Peer) -> float | None:
    """Relative error of our scores against the peer's in float64; stops where they disagree."""
    if peer.strict is None:
        return None
    ours, theirs, allowed = peer.strict
    got = run(sides, "dask_influence", work, work.estimator, ours, "float64", values=True)["values"]
    expected = run(sides, peer.name, work, peer.estimator, theirs, "float64", values=True)["values"]
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    print(f"{work.name} against {peer.name}: relative error {error:.1e}", flush=True)
    if not error <= allowed:
        raise SystemExit(
            f"{work.name} against {peer.name}: relative error {error:.1e}, allowed {allowed:.0e}"
        )
    return error


def measure(sides: Sides, work: Work, repeats: int) -> dict[str, dict[str, Any]]:
    """Medians by package, taken in turn after one run of each that is not counted."""
    runs: dict[str, list[dict[str, Any]]] = {}
    columns = [("dask_influence", work.estimator, work.options)]
    columns += [(peer.name, peer.estimator, peer.options) for peer in work.peers]
    for number in range(1 if work.once else 0, 1 + (1 if work.once else repeats)):
        for side, estimator, options in columns:
            found = run(sides, side, work, estimator, options, "float32")
            if number:
                runs.setdefault(side, []).append(found)
            which = f"run {number}" if number else "warm-up"
            print(
                f"{work.name}, {which}: {side} fit {found['fit']:.3f} s, scores {found['scores']:.3f} s",
                flush=True,
            )
    return {side: summary(found) for side, found in runs.items()}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and every time."""
    times = {part: [run[part] for run in runs] for part in ("fit", "scores")}
    passes = {"passes": runs[0]["passes"]} if "passes" in runs[0] else {}
    return {**passes, **{part: median(found) for part, found in times.items()}, "seconds": times}


def table(works: list[Work], results: Mapping[str, Any], problem: str) -> Table:
    """One line for each estimator and peer."""
    out = Table(title=f"{problem}: seconds, medians")
    for heading in (
        "estimator",
        "tests",
        "passes",
        "fit",
        "scores",
        "peer",
        "fit",
        "scores",
        "fit ×",
        "scores ×",
        "values",
    ):
        out.add_column(heading, justify="left" if heading in ("estimator", "peer", "values") else "right")
    for work in (work for work in works if work.problem == problem and work.name in results):
        measured = results[work.name]["seconds"]
        own = measured["dask_influence"]
        cells = [work.title, str(work.count), "{} + {}".format(*own["passes"])]
        cells += [f"{own[part]:.3f}" for part in ("fit", "scores")]
        for peer in work.peers or (None,):
            if peer is None:
                out.add_row(*cells)
                continue
            theirs, error = measured[peer.name], results[work.name]["errors"][peer.name]
            times = [f"{theirs[part]:.3f}" for part in ("fit", "scores")]
            both = sum(theirs[part] for part in ("fit", "scores")) / sum(
                own[part] for part in ("fit", "scores")
            )
            ratios = [_ratio(theirs[part], own[part]) for part in ("fit", "scores")] + [f"{both:.1f}"]
            out.add_row(*cells, peer.name, *times, *ratios, peer.differs if error is None else f"{error:.0e}")
    return out


def _ratio(theirs: float, ours: float) -> str:
    """How many times faster; nothing where a side only puts its work off until scores are asked for."""
    return "" if min(theirs, ours) < NOTHING else f"{theirs / ours:.1f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pydvl-python", help="interpreter of the environment with pyDVL")
    parser.add_argument("--kronfluence-python", help="interpreter of the environment with kronfluence")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each process")
    parser.add_argument("--only", nargs="+", choices=[work.name for work in WORKS], help="some of the works")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/estimators.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    pythons = {
        "dask_influence": sys.executable,
        "pydvl": args.pydvl_python,
        "kronfluence": args.kronfluence_python,
    }
    present = {name: python for name, python in pythons.items() if python}
    works = [
        Work(**{**vars(work), "peers": tuple(peer for peer in work.peers if peer.name in present)})
        for work in WORKS
        if not args.only or work.name in args.only
    ]
    console = Console(width=None if sys.stdout.isatty() else 150)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problems.make(folder)
        sides = Sides(present, folder, args.threads)
        for work in works:
            errors = {peer.name: compare(sides, work, peer) for peer in work.peers}
            results[work.name] = {"errors": errors, "seconds": measure(sides, work, args.repeats)}
        versions = sides.versions
        sides.close()
    report = {
        "versions": versions,
        "repeats": args.repeats,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2))
    for problem in dict.fromkeys(work.problem for work in works):
        console.print(table(works, results, problem))
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
