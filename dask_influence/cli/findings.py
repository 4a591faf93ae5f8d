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

from rich.console import Console
from rich.table import Table

from dask_influence.errors import ConfigurationError
from dask_influence.validation import Agreement, Detection, Stability

Found = Agreement | Detection | Stability

HEADINGS = {
    "leave_one_out": "leave-one-out r",
    "linear_datamodeling_score": "LDS",
    "finite_difference_response": "finite difference r",
    "proximal_bregman_response": "proximal Bregman r",
    "mislabel_detection": "mislabel AUC",
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
        return where if self.value is None else f"{where} {_cell(self)}"

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
        told = [self._table(parts)] if parts else []
        told += [line for part in parts for line in self._notes(part)]
        for one in self.all:
            if isinstance(one.found, Stability):
                told.append(f"\n{one.estimator}, scores of which are compared\n{one.found}")
        return "\n".join(told)

    def _table(self, parts: list[str]) -> str:
        referred = {one.part for one in self.all if one.reference is not None}
        table = Table()
        table.add_column("estimator")
        table.add_column("λ", justify="right")
        for part in parts:
            table.add_column(HEADINGS[part], justify="right")
            if part in referred:
                table.add_column("reference", justify="right")
        rows: dict[tuple[str, str], dict[str, Finding]] = {}
        for one in self.all:
            rows.setdefault((one.estimator, _lambda(one.regularization)), {})[one.part] = one
        for (estimator, value), found in rows.items():
            if not found.keys() & set(parts):
                continue
            cells = []
            for part in parts:
                cells.append(_cell(found.get(part)))
                if part in referred:
                    reference = found[part].reference if part in found else None
                    cells.append("" if reference is None else f"{reference:g}")
            table.add_row(estimator, value, *cells)
        stream = io.StringIO()
        Console(file=stream, width=200, no_color=True).print(table)
        return stream.getvalue().rstrip()

    def _notes(self, part: str) -> Iterator[str]:
        """What is the same for all estimators, and what a reader has to know beside the figures."""
        here = [one for one in self.all if one.part == part]
        first = here[0].found
        if isinstance(first, Agreement):
            yield f"{HEADINGS[part]}: {', '.join(_measured(first))}"
            slopes = [
                f"{one.estimator} {one.found.slope:.3f}"
                for one in here
                if isinstance(one.found, Agreement) and one.found.slope is not None
            ]
            if slopes:
                yield f"  slope of measured on predicted effects: {', '.join(slopes)}"
            if first.failures:
                number, reason = next(iter(first.failures.items()))
                yield f"  failed and left out: {len(first.failures)}, such as number {number}: {reason}"
        elif isinstance(first, Detection):
            others = ", ".join(
                f"{name} {area:.3f}" for name, area in first.areas.items() if name != "self influence"
            )
            yield f"{HEADINGS[part]}: {int(first.wrong.sum())} wrong of {len(first.wrong)} labels; baselines: {others}"


def _measured(found: Agreement) -> Iterator[str]:
    tests, effects = found.predicted.shape
    yield f"{tests} test points × {effects} effects"
    if "seeds" in found.settings:
        seeds = len(found.settings["seeds"])
        yield f"{seeds} seed{'s' if seeds > 1 else ''}"
        yield "ceiling unknown, of one seed" if found.ceiling is None else f"ceiling {found.ceiling:.4f}"
    yield "deterministic" if not found.noise > 0 else f"noise {found.noise:.1e} of two from one seed"
    yield f"{found.seconds:.0f} s of work"


def _cell(one: Finding | None) -> str:
    if one is None or one.value is None:
        return ""
    value, (low, high) = one.value
    return f"{value:.4f} ({low:.3f} to {high:.3f})"


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
