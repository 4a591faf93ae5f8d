"""Rows of the one table: what was measured on both sides, the ratio, the target, and whether it is met."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from dask_influence.execution.units import format_bytes


@dataclass(frozen=True)
class Result:
    """One row.

    Attributes
    ----------
    name, title : str
        For ``--only``, and as printed.
    against : str
        What ours is measured beside.
    ours, theirs : list of float
        Every run, in seconds; bytes where the rule is ``"bytes"``.
    target : float
        As the rule has it.
    rule : str
        ``"faster"``: theirs / ours, at least the target; ``"within"``: ours / theirs, at most the target;
        ``"bytes"``: the largest of ours, at most the target.
    note : str
        How the values were checked, and what the times are made of.
    """

    name: str
    title: str
    against: str
    ours: list[float]
    theirs: list[float]
    target: float
    rule: str = "faster"
    note: str = ""

    @property
    def ratio(self) -> float:
        """Of medians, the way round that the rule has it; of bytes, to the target."""
        if self.rule == "bytes":
            return max(self.ours) / self.target
        ratio = median(self.theirs) / median(self.ours)
        return ratio if self.rule == "faster" else 1 / ratio

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return {"faster": self.ratio >= self.target, "within": self.ratio <= self.target}.get(
            self.rule, self.ratio <= 1
        )


def write(path: Path, results: Sequence[Result]) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1))


def read(path: Path) -> list[Result]:
    """What :func:`write` wrote."""
    return [Result(**held) for held in json.loads(path.read_text())]


def table(results: Sequence[Result]) -> Table:
    """Medians with their spreads, ratios of medians, targets."""
    out = Table(title="seconds: median (smallest to largest)", row_styles=["", "dim"])
    for heading in ("work", "ours", "beside", "theirs", "ratio", "target", "met", "checked"):
        side = "left" if heading in ("work", "beside", "checked") else "right"
        out.add_column(heading, justify=side, overflow="fold")
    for result in results:
        shown = [spread(result.ours), result.against, spread(result.theirs), f"{result.ratio:.2f}"]
        sign = {"faster": "≥ {:g}", "within": "≤ {:g}"}.get(result.rule, "")
        target = sign.format(result.target)
        if result.rule == "bytes":
            shown = [format_bytes(max(result.ours)), result.against, "", ""]
            target = f"≤ {format_bytes(result.target)}"
        out.add_row(result.title, *shown, target, "yes" if result.met else "NO", result.note)
    return out


def spread(seconds: Sequence[float]) -> str:
    """Median, and the smallest and largest where there are several."""
    if not seconds:
        return ""
    middle = f"{median(seconds):.3g}"
    return middle if len(seconds) == 1 else f"{middle} ({min(seconds):.3g} to {max(seconds):.3g})"
