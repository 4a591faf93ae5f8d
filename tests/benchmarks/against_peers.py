"""Times the package beside pyDVL: the same model, data and chunks, runs taken in turn.

Both sides run in processes of their own that stay warm. Their values are compared in float64
before any time counts: pyDVL's DirectInfluence is right, so the two must agree to rounding. Then
each piece of work is run once to warm up and ``--repeats`` times alternately; medians, smallest
and largest times and the ratio of the medians are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import problem
from protocol import Process
from rich.console import Console
from rich.table import Table

AGREEMENT = {"float64": 1e-8, "float32": 1e-3}
"""Largest relative error between the sides, in the norm of the whole result."""


@dataclass(frozen=True)
class Work:
    """One comparison: what ours is called, what the peer's is called, and how it is printed."""

    ours: str
    peers: str
    title: str
    has_values: bool = True


WORKS = (
    Work("fit", "fit", "exact Hessian, in this process", has_values=False),
    Work("cluster_fit", "fit", "exact Hessian, ours on the cluster (2 x 1)", has_values=False),
    Work("scores", "scores", "360 x 1,437 scores, chunks 60 / 128, in this process"),
    Work("scores_in_one_call", "scores", "the same, ours in one call"),
    Work("cluster_scores", "cluster_scores", "the same to Zarr, warm cluster (2 x 1)"),
    Work("perturbation", "perturbation", "perturbation 64 x 512 x 64, in memory"),
)


def run(process: Process, work: str, dtype: str, *, values: bool = False) -> dict[str, Any]:
    """Ask for one run; with ``values``, what it computed stands in the answer."""
    return process.ask(f"{work}-{dtype}", values=values, work=work, dtype=dtype)


def compare(ours: Process, peer: Process, works: list[Work]) -> dict[str, dict[str, float]]:
    """Relative error of our values against the peer's, in both dtypes; stops where they disagree."""
    errors: dict[str, dict[str, float]] = {}
    for dtype, allowed in AGREEMENT.items():
        for work in (w for w in works if w.has_values):
            got = run(ours, work.ours, dtype, values=True)["values"].astype(np.float64)
            expected = run(peer, work.peers, dtype, values=True)["values"].astype(np.float64)
            if got.shape != expected.shape:
                raise SystemExit(f"{work.ours}: shape {got.shape}, the peer has {expected.shape}")
            error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            errors.setdefault(work.ours, {})[dtype] = error
            print(f"{work.ours} in {dtype}: relative error {error:.1e}", flush=True)
            if not error <= allowed:
                raise SystemExit(f"{work.ours} ({dtype}): relative error {error:.1e}, allowed {allowed:.0e}")
    return errors


def measure(ours: Process, peer: Process, works: list[Work], repeats: int) -> dict[str, dict[str, Any]]:
    """Times in float32, taken in turn after one run of each that is not counted."""
    names = {(ours, work.ours) for work in works} | {(peer, work.peers) for work in works}
    order = sorted(names, key=lambda pair: (pair[1], pair[0].name))
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {ours.name: {}, peer.name: {}}
    for process, work in order:
        run(process, work, "float32")
    for number in range(1, repeats + 1):
        for process, work in order:
            measured = run(process, work, "float32")
            runs[process.name].setdefault(work, []).append(measured)
            print(f"run {number} of {repeats}: {process.name} {work} {measured['seconds']:.3f} s", flush=True)
    return {
        work.ours: {
            "title": work.title,
            "ours": summary(runs[ours.name][work.ours]),
            "peer": summary(runs[peer.name][work.peers]),
        }
        for work in works
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of the seconds, and the largest of whatever else was measured."""
    seconds = [run["seconds"] for run in runs]
    others = {key: max(run[key] for run in runs) for key in runs[0] if key != "seconds"}
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds), "seconds": seconds, **others}


def table(results: dict[str, dict[str, Any]], errors: dict[str, dict[str, float]]) -> Table:
    """Ratios of medians with their spreads."""
    out = Table(title="seconds: median (smallest to largest)")
    for heading in ("work", "pyDVL", "dask_influence", "ratio", "error f64"):
        out.add_column(heading, justify="left" if heading == "work" else "right")
    for name, result in results.items():
        ours, peer = result["ours"], result["peer"]
        error = errors.get(name, {}).get("float64")
        out.add_row(
            result["title"],
            _seconds(peer),
            _seconds(ours),
            f"{peer['median'] / ours['median']:.1f}",
            "" if error is None else f"{error:.0e}",
        )
    return out


def _seconds(measured: dict[str, Any]) -> str:
    return f"{measured['median']:.3f} ({measured['min']:.3f} to {measured['max']:.3f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer-python", required=True, help="interpreter of the environment with pyDVL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each process")
    parser.add_argument("--only", nargs="*", choices=[work.ours for work in WORKS], help="some of the works")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks/against-peers.json"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    works = [work for work in WORKS if not args.only or work.ours in args.only]
    console = Console(width=None if sys.stdout.isatty() else 130)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held = folder / "problem.npz"
        problem.make(held)
        peer = Process("pydvl", args.peer_python, "side_pydvl.py", folder, args.threads, held)
        ours = Process("dask_influence", sys.executable, "side_dask_influence.py", folder, args.threads, held)
        errors = compare(ours, peer, works)
        console.print("the values of both sides agree; now the times")
        results = measure(ours, peer, works, args.repeats)
        for process in (ours, peer):
            process.close()
    report = {
        "versions": {"ours": ours.versions, "peer": peer.versions},
        "repeats": args.repeats,
        "threads": args.threads,
        "cores": os.cpu_count(),
        "relative_errors": errors,
        "results": results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2))
    console.print(table(results, errors))
    console.print(f"written to {args.output}")


if __name__ == "__main__":
    main()
