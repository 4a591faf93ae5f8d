"""Training points to look at again: suspected mislabels by self influence, and duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from dask_influence.report import figures
from dask_influence.report.asked import Asked, Shown, signed
from dask_influence.report.lists import Lists, Point, wide
from dask_influence.report.samples import Drawing
from dask_influence.report.scores import Own, Signal, twins
from dask_influence.report.svg import svg

SUSPECTS, TWINS, CANDIDATES = 12, 20, 400
"""Points, groups of copies, and samples that are read to find these: at most so many."""

ALONE, TOGETHER = 1e-6, 1e-5
"""Relative differences that rounding makes between copies: by one signal, by several."""


@dataclass(frozen=True)
class Twin:
    """Training points that are one and the same, or look so."""

    ids: str
    first: str
    targets: str
    drawing: Drawing | None


@dataclass
class SecondLook:
    """The section of training points.

    Parameters
    ----------
    asked : Asked
        Its notes get what is left out.
    lists : Lists
        The rows that are shown: copies have equal scores in them.
    """

    asked: Asked
    lists: Lists

    def section(self) -> dict[str, Any] | None:
        """What the template is given, or None where nothing is known of training points alone."""
        own, found = self.asked.own, self._twins()
        if own is None:
            self.asked.notes.append(
                "Suspected mislabels: run with reduce=SelfInfluence() and give that store as self_influence=."
            )
            if not found:
                return None
        suspects, drawn, text = self._suspects(own) if own is not None else ([], None, "")
        sure = self.asked.samples["train"].source is not None
        return {
            "text": text or "Points that look the same to the model.",
            "figure": drawn,
            "suspects": suspects,
            "wide": wide(suspects),
            "twins_title": "Duplicates" if sure else "Possible duplicates",
            "twins_text": self._about_twins(found, sure),
            "twins": found,
        }

    def _suspects(self, own: Own) -> tuple[list[Point], Shown | None, str]:
        held = np.sort(own.values[~np.isnan(own.values)])[::-1]
        if len(held) == 0:
            return [], None, "No self influence is there yet."
        first, total = max(1, len(held) // 100), float(held.sum())
        share = float(held[:first].sum()) / total if total > 0 else 0.0
        which = f"The first {first:,} of {len(held):,} points hold {share:.0%} of it."
        text = (
            "Self influence gⱼᵀ (H + λI)⁻¹ gⱼ is how much the model relies on a training point to get that very point "
            f"right. {which if first > 1 else which.replace('first 1 of', 'first of').replace('hold', 'holds')}"
        )
        caption = f"From {held[0]:.3g} down to {held[-1]:.3g}; the median is {np.median(held):.3g}."
        curve = svg(partial(figures.ranked_curve, values=held), "own", f"Self influence: {caption}")
        listed = own.largest(SUSPECTS)
        points = [self.lists.point(one, "train", listed[0].score, signed(one.score)) for one in listed]
        return points, Shown(curve, caption), text

    # -- copies -------------------------------------------------------------------------
    def _about_twins(self, found: Sequence[Twin], sure: bool) -> str:
        if not self._signals:
            return "Not looked for: this takes self influence, or scores of two test points."
        if not found:
            return "None found among the points whose scores agree up to rounding."
        if sure:
            return "Their scores agree up to rounding, and their inputs byte by byte: the training counts them twice."
        return "Their scores agree up to rounding; the training data (train=) would tell whether they are copies."

    @cached_property
    def _signals(self) -> list[Signal]:
        own, scores = self.asked.own, self.asked.scores
        found = [] if own is None else [Signal(own.values)]
        rows = [] if scores is None or scores.layout.columns != "train" else self.lists.ranked
        for row in rows:
            if row.values is not None and len(row.values) == self.asked.trains:
                size = float(np.sqrt(np.mean(np.square(row.values))))
                found.append(Signal(row.values, 1e-6 * size))
        return found if own is not None or len(found) > 1 else []

    def _twins(self) -> list[Twin]:
        if not self._signals:
            return []
        candidates = twins(self._signals, ALONE if len(self._signals) == 1 else TOGETHER)
        samples, found, read = self.asked.samples["train"], list[Twin](), 0
        for group in candidates:
            read += len(group)
            if read > CANDIDATES or len(found) >= TWINS:
                self.asked.notes.append(f"Duplicates beyond the first {len(found):,} groups.")
                break
            found += [self._twin(same) for same in samples.same(group)]
        return found

    def _twin(self, group: Sequence[int]) -> Twin:
        samples, own, scores = self.asked.samples["train"], self.asked.own, self.asked.scores
        if own is not None:
            named = [own.id_of(at) for at in group]
        else:
            named = [at if scores is None else scores.column_id(at) for at in group]
        targets = [samples.target(at) or "" for at in group]
        return Twin(", ".join(map(str, named)), str(named[0]), ", ".join(targets), samples.drawing(group[0]))
