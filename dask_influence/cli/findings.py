"""Findings of a validation: as a table, as JSON, and as pictures."""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dask_influence.errors import ConfigurationError
from dask_influence.validation import Agreement, Detection, Stability

Found = Agreement | Detection | Stability

TITLES = {
    "leave_one_out": "leave-one-out: Pearson correlation with the change of the test losses",
    "linear_datamodeling_score": "linear datamodeling score: Spearman correlation over random subsets",
    "finite_difference_response": "finite-difference response: Pearson correlation with the effect of a weight",
    "proximal_bregman_response": "proximal Bregman response: Pearson correlation with the effect of removal",
    "mislabel_detection": "wrong labels found by self influence: area under the curve",
}
"""Of the parts that have a figure."""

HEADINGS = {
    "leave_one_out": "LOO",
    "linear_datamodeling_score": "LDS",
    "finite_difference_response": "r",
    "proximal_bregman_response": "r",
    "mislabel_detection": "AUC",
}


@dataclass(frozen=True)
class Finding:
    """One part for one estimator at one λ.

    Attributes
    ----------
    estimator : str
        As the job calls it.
    regularization : float or mapping
        λ.
    part : str
        Its name in the job file.
    found : Agreement, Detection or Stability
        The result.
    reference : float, optional
        A figure to be shown beside.
    """

    estimator: str
    regularization: Any
    part: str
    found: Found
    reference: float | None = None

    @property
    def value(self) -> tuple[float, tuple[float, float]] | None:
        """The figure of the table and its interval; a stability has none."""
        if isinstance(self.found, Agreement):
            return self.found.value, self.found.interval
        if isinstance(self.found, Detection):
            return self.found.areas["self influence"], self.found.intervals["self influence"]
        return None

    def told(self) -> str:
        """One line of the log."""
        where = f"{self.estimator}, λ = {_lambda(self.regularization)}: {self.part.replace('_', ' ')}"
        if self.value is None:
            return where
        value, (low, high) = self.value
        return f"{where} {value:.4f} ({low:.4f} to {high:.4f})"

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "estimator": self.estimator,
            "hessian_regularization": self.regularization,
            "part": self.part,
            "reference": self.reference,
            "result": self.found.to_json(),
        }

    def plot(self, folder: Path) -> None:
        """Draw it into ``folder``, under the name of the part and the estimator."""
        label = re.sub(r"\W+", "-", f"{self.part} {self.estimator} {_lambda(self.regularization)}").strip("-")
        self.found.plot(folder / f"{label}.png")


@dataclass
class Findings:
    """Everything that was found, in the order in which it was.

    Attributes
    ----------
    all : list of Finding
        As above.
    """

    all: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {"findings": [_plain(finding.to_json()) for finding in self.all]}

    def __str__(self) -> str:
        parts = [part for part in HEADINGS if any(one.part == part for one in self.all)]
        told = [text for part in parts for text in (self._table(part), *self._notes(part), "")]
        for one in self.all:
            if isinstance(one.found, Stability):
                told += [f"stability of the scores of {one.estimator}", str(one.found), ""]
        return "\n".join(told).rstrip()

    def _table(self, part: str) -> str:
        """One part: a row for each estimator and λ."""
        here = [one for one in self.all if one.part == part]
        sloped = any(isinstance(one.found, Agreement) and one.found.slope is not None for one in here)
        referred = any(one.reference is not None for one in here)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("estimator")
        shown = ("λ", HEADINGS[part], "interval", *["slope"] * sloped, *["reference"] * referred)
        for heading in shown:
            table.add_column(heading, justify="right")
        for one in here:
            value, (low, high) = one.value or (math.nan, (math.nan, math.nan))
            cells = [_lambda(one.regularization), f"{value:.4f}", f"{low:.4f} to {high:.4f}"]
            if sloped:
                slope = one.found.slope if isinstance(one.found, Agreement) else None
                cells.append("" if slope is None else f"{slope:.3f}")
            if referred:
                cells.append("" if one.reference is None else f"{one.reference:g}")
            table.add_row(one.estimator, *cells)
        stream = io.StringIO()
        Console(file=stream, width=120, no_color=True).print(table)
        lines = [line.rstrip() for line in stream.getvalue().splitlines()]
        return "\n".join([TITLES[part], *filter(None, lines)])

    def _notes(self, part: str) -> Iterator[str]:
        """What is the same for all estimators, and what a reader has to know beside the figures."""
        first = next(one.found for one in self.all if one.part == part)
        if isinstance(first, Agreement):
            yield ", ".join(_measured(first))
            if first.failures:
                number, reason = next(iter(first.failures.items()))
                yield f"failed and left out: {len(first.failures)}, such as number {number}: {reason}"
        elif isinstance(first, Detection):
            others = ", ".join(
                f"{name} {area:.4f}" for name, area in first.areas.items() if name != "self influence"
            )
            yield f"{int(first.wrong.sum())} wrong of {len(first.wrong)} labels; without influence: {others}"


def _measured(found: Agreement) -> Iterator[str]:
    tests, effects = found.predicted.shape
    yield f"{tests} test points × {effects} effects"
    if "seeds" in found.settings:
        seeds = len(found.settings["seeds"])
        yield f"{seeds} seed{'s' if seeds > 1 else ''}"
        yield "ceiling unknown, of one seed" if found.ceiling is None else f"ceiling {found.ceiling:.4f}"
    yield "deterministic" if not found.noise > 0 else f"noise {found.noise:.1e} of two from one seed"
    yield f"{found.seconds:.0f} s of work"


def _plain(value: Any) -> Any:
    """``value`` with None where JSON has no number: what is undefined, as the correlation of a constant."""
    if isinstance(value, dict):
        return {name: _plain(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lambda(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float | int) else "by block"


def folder_for_plots(given: str | None) -> Path | None:
    """Where pictures go, known to be writable.

    Raises
    ------
    ConfigurationError
        Without matplotlib, or where no folder can be made.
    """
    if given is None:
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigurationError("--plots takes matplotlib: pip install 'dask_influence[demo]'")
    folder = Path(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"--plots {given} cannot be made: {error}") from error
    return folder
