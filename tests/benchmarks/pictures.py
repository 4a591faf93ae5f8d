"""What was measured, drawn: ratios beside their targets, and times as sizes grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from results import Result

mpl.use("Agg")
from matplotlib import pyplot as plt

MET, MISSED = "#2a6f97", "#c1121f"


def targets(results: Sequence[Result], path: Path) -> None:
    """How many times faster than the peer each work is, and the target as a mark; a log axis."""
    rows = [result for result in reversed(results) if result.rule == "faster"]
    figure, ax = plt.subplots(figsize=(9, 0.8 + 0.36 * len(rows)), constrained_layout=True)
    names = [f"{row.title} | {row.against}" for row in rows]
    ax.barh(names, [row.ratio for row in rows], color=[MET if row.met else MISSED for row in rows])
    ax.plot([row.target for row in rows], range(len(rows)), "|", color="black", markersize=14)
    ax.set(xscale="log", xlabel="times as fast (bar), and the target (mark)")
    ax.axvline(1, color="0.6", linewidth=0.8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def growth(found: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """One panel for each size, both axes logarithmic, with a line of slope one for comparison."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), constrained_layout=True)
    for ax, (name, points) in zip(axes.flat, found.items(), strict=False):
        at, seconds = zip(*points, strict=True)
        ax.loglog(at, seconds, "o-", base=2, color=MET)
        ax.loglog(at, [seconds[0] * value / at[0] for value in at], "--", base=2, color="0.7")
        ax.set(title=name, ylabel="seconds")
    for ax in axes.flat[len(found) :]:
        ax.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)
