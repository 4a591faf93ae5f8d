"""Lists: for each test point that is shown, the training points that help and harm it most."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from dask_influence.report import figures
from dask_influence.report.asked import NAMES, Asked, Shown, signed
from dask_influence.report.facts import Array, Facts
from dask_influence.report.samples import Drawing, Picture
from dask_influence.report.scores import Layout, Ranked, Scored, Scores
from dask_influence.report.svg import svg

TESTS = 6
"""Test points that are shown where none are named."""


@dataclass(frozen=True)
class Point:
    """One entry of a list, as it is set."""

    id: str
    target: str | None
    score: str
    effect: str | None
    share: float
    positive: bool
    drawing: Drawing | None
    map: Picture | None


@dataclass(frozen=True)
class Side:
    """One list of a case."""

    kind: str
    title: str
    what: str
    points: list[Point]

    @property
    def wide(self) -> bool:
        """Whether its entries are wider than pictures."""
        return wide(self.points)


@dataclass(frozen=True)
class Case:
    """One test point with its lists."""

    name: str
    target: str | None
    drawing: Drawing | None
    figure: Shown | None
    text: str | None
    sides: list[Side]


def wide(points: list[Point]) -> bool:
    """Whether points are drawn wider than pictures."""
    return any(point.drawing is not None and point.drawing.kind != "image" for point in points)


@dataclass
class Lists:
    """The section of test points, and the points of others.

    Parameters
    ----------
    asked : Asked
        Its notes get what is left out.
    """

    asked: Asked

    def section(self) -> dict[str, Any] | None:
        """What the template is given, or None where the store has no such lists."""
        scores, notes = self.asked.scores, self.asked.notes
        if scores is None:
            notes.append(f"Lists of training points: {_held(self.asked.facts)}")
            return None
        layout = scores.layout
        cases = [self._case(row, layout) for row in self.ranked]
        self._leave_out(scores)
        if not cases:
            return None
        return {"title": f"{NAMES[layout.rows].capitalize()}s", "text": self._reading(layout), "cases": cases}

    @cached_property
    def ranked(self) -> list[Ranked]:
        """The rows that are shown."""
        scores, tests = self.asked.scores, self.asked.tests
        if scores is None:
            return []
        rows = scores.harmed(TESTS) if tests is None else scores.positions(tests)
        return scores.ranked(rows, self.asked.top)

    def _leave_out(self, scores: Scores) -> None:
        """Note what is not among the lists."""
        layout, notes, shown = scores.layout, self.asked.notes, len(self.ranked)
        left = len(scores.row_ids) - shown
        if left:
            strongest = "the strongest scores" if layout.features else "the most harmful scores"
            which = (
                f"those with {strongest} among the ones read"
                if self.asked.tests is None
                else "those asked for"
            )
            notes.append(
                f"{left:,} of {len(scores.row_ids):,} {NAMES[layout.rows]}s; shown are {which}. "
                "tests= (--test) asks for others."
            )
        if scores.columns_read < 1:
            notes.append(
                f"{1 - scores.columns_read:.0%} of the {NAMES[layout.columns]}s in the lists: rows are too long to be "
                "read whole, and evenly drawn blocks of them are."
            )
        sides = sorted({layout.rows, layout.columns} & set(self.asked.samples))
        unseen = [f"{side}=" for side in sides if not self.asked.samples[side].drawable]
        if unseen and shown:
            notes.append(
                f"What the points look like: give the data as {' and '.join(unseen)}, or the job file to the command."
            )

    def _reading(self, layout: Layout) -> str:
        if layout.features:
            return (
                "Ranked by the norm of the scores of all features: how far changing the training input would move its "
                "influence. Blue: raising the feature makes the point help more; red: less."
            )
        text = (
            "A positive score helps. Beside it: how the loss at the test point would change, to first order, if the "
            f"training point were left out: score / n, n = {self.asked.fitted:,}."
        )
        if self.asked.perturbation is not None:
            text += " Raising a blue part of an input makes it help more, a red one less, each input on its own scale."
        return text

    # -- one test point -----------------------------------------------------------------
    def _case(self, row: Ranked, layout: Layout) -> Case:
        what = f"{NAMES[layout.columns].capitalize()}s that"
        sides = [("helps", f"{what} help most", row.helpful), ("harms", f"{what} harm most", row.harmful)]
        if layout.features:
            sides = [("helps", f"{what} matter most", row.helpful)]
        strongest = max((abs(one.score) for _, _, ones in sides for one in ones), default=0.0)
        samples = self.asked.samples.get(layout.rows)
        target = None if samples is None else samples.target(row.position)
        return Case(
            f"{NAMES[layout.rows].capitalize()} {row.id}",
            None if target is None else f"target {target}",
            None if samples is None else samples.drawing(row.position),
            _row_figure(row, layout),
            f"{row.missing:,} scores are not there." if row.missing else None,
            [
                Side(
                    kind,
                    title,
                    NAMES[layout.columns],
                    [self._scored(one, strongest, row, layout) for one in ones],
                )
                for kind, title, ones in sides
            ],
        )

    def _scored(self, one: Scored, strongest: float, row: Ranked, layout: Layout) -> Point:
        if layout.features:
            return self.point(
                one, layout.columns, strongest, f"norm {one.score:.4g}", None, self._strength(row, one)
            )
        effect = f"loss {signed(one.score / self.asked.fitted, 2)}" if self.asked.fitted else None
        strength = self._strength(row, one) if (layout.rows, layout.columns) == ("test", "train") else None
        return self.point(one, layout.columns, strongest, signed(one.score), effect, strength)

    def point(
        self,
        one: Scored,
        side: str,
        strongest: float,
        score: str,
        effect: str | None = None,
        strength: Array | None = None,
    ) -> Point:
        """A point as it is set, with what each part of it does where that is known."""
        samples = self.asked.samples.get(side)
        return Point(
            str(one.id),
            None if samples is None else samples.target(one.position),
            score,
            effect,
            100 * abs(one.score) / strongest if strongest else 0.0,
            one.score >= 0,
            None if samples is None else samples.drawing(one.position, strength),
            None if samples is None else samples.map(one.position, strength),
        )

    def _strength(self, row: Ranked, one: Scored) -> Array | None:
        """What each feature of a training point does to its score for the test point of ``row``."""
        found = self.asked.perturbation
        if found is None or one.position is None:
            return None
        place = found.row_of(row.id)
        return None if place is None else found.features_of(place, one.position)


def _row_figure(row: Ranked, layout: Layout) -> Shown | None:
    if row.values is None or len(row.values) < 2:
        return None
    marks = [one.score for one in (*row.helpful, *row.harmful)]
    harm = "" if layout.features else f", of which {float(np.mean(row.values < 0)):.0%} harm"
    label = "‖score‖" if layout.features else "score"
    draw = partial(figures.histogram, values=row.values, label=label, marks=marks)
    drawn = svg(draw, f"row{row.position}", f"Distribution of the scores of {row.id}", (3.2, 1.9))
    return Shown(drawn, f"{len(row.values):,} scores{harm}. Marks: the points listed.")


def _held(facts: Facts) -> str:
    kept = facts.plan.work.kept
    if facts.fingerprint.get("kind") == "factors":
        return "the store holds influence factors, and no scores."
    return f"the store keeps {kept.text if kept else 'none'}, and no scores of pairs."
