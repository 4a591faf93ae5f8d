"""Contents: what the page says, in the order in which it says it; the template only sets it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
from markupsafe import Markup

from dask_influence import __version__
from dask_influence.execution.plan import format_bytes, format_seconds
from dask_influence.report import figures
from dask_influence.report.data import Samples
from dask_influence.report.facts import Array, Facts
from dask_influence.report.samples import Drawing, Picture
from dask_influence.report.scores import Own, Ranked, Scored, Scores, Signal, twins
from dask_influence.report.svg import svg
from dask_influence.storage.results import FINAL

TESTS = 6
"""Test points that are shown where none are named."""

SUSPECTS, TWINS, CANDIDATES, WORKERS, MISSING = 12, 20, 400, 24, 10
"""At most so many are listed."""

ALONE, TOGETHER = 1e-6, 1e-5
"""Relative differences that rounding makes between copies: by one signal, by several."""

NAMES = {"test": "test point", "train": "training point", "group": "group", "test_group": "test group"}


@dataclass(frozen=True)
class Asked:
    """What a report is made of.

    Attributes
    ----------
    facts : Facts
        The store.
    scores : Scores or None
        Its scores, unless it has none of pairs.
    perturbation : Scores or None
        What each feature does: of another store, or of this one.
    own : Own or None
        Self influence: of another store, or of this one.
    samples : mapping of str to Samples
        By ``"test"`` and ``"train"``.
    tests : sequence or None
        Ids whose lists are shown.
    top : int
        Points of either side in a list.
    title : str or None
        Of the page.
    """

    facts: Facts
    scores: Scores | None
    perturbation: Scores | None
    own: Own | None
    samples: Mapping[str, Samples]
    tests: Sequence[Any] | None
    top: int
    title: str | None


@dataclass(frozen=True)
class Shown:
    """A figure with what it says."""

    svg: Markup
    caption: str


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
        return any(point.drawing is not None and point.drawing.kind != "image" for point in self.points)


@dataclass(frozen=True)
class Case:
    """One test point with its lists."""

    name: str
    target: str | None
    drawing: Drawing | None
    figure: Shown | None
    text: str | None
    sides: list[Side]


@dataclass(frozen=True)
class Twin:
    """Training points that are one and the same, or look so."""

    ids: str
    first: str
    targets: str
    drawing: Drawing | None


@dataclass
class Contents:
    """Everything that the template is given."""

    asked: Asked
    notes: list[str] = field(default_factory=list)

    # -- the whole ----------------------------------------------------------------------
    def page(self) -> dict[str, Any]:
        """The template's variables."""
        facts = self.asked.facts
        parts = {
            "cases": self._cases(),
            "distribution": self._distribution(),
            "own": self._own(),
            "certificates": self._certificates(),
            "run": self._run(),
        }
        names = {
            "cases": ("points", parts["cases"]["title"] if parts["cases"] else ""),
            "distribution": ("scores", "All scores"),
            "own": ("own", "A second look"),
            "certificates": ("certificates", "Trust"),
            "run": ("run", "Time and memory"),
        }
        shown = [names[part] for part, content in parts.items() if content]
        return {
            **parts,
            "version": __version__,
            "store": facts.name,
            "title": self.asked.title or f"What the training data did: {facts.name}",
            "lead": self._lead(),
            "state": facts.state
            if facts.state in FINAL
            else f"{facts.state}: {facts.done:,} of {facts.total:,} done",
            "complete": facts.state == "complete",
            "tiles": list(self._tiles()),
            "notes": [*self._first_notes(), *self.notes],
            "sections": [*shown, ("provenance", "Provenance")],
            "provenance": list(self._provenance()),
            "closing": f"Made by dask_influence {__version__} from {facts.location.url}. "
            "The file needs no network: everything it shows is in it.",
        }

    @cached_property
    def _sizes(self) -> dict[str, int]:
        work = self.asked.facts.plan.work
        return {"test": 0 if work.diagonal else work.tests, "train": work.trains}

    def _lead(self) -> str:
        facts, attributes = self.asked.facts, self.asked.facts.dataset.attrs
        estimator = attributes.get("estimator", "An estimator")
        damping = _damping(facts)
        fitted = f"a model with {attributes.get('parameters_fitted', 0):,} parameters, at λ = {damping}"
        if facts.fingerprint.get("kind") == "factors":
            return f"{estimator} solved the influence factors of {self._sizes['test']:,} test points of {fitted}."
        if facts.plan.work.diagonal:
            return f"{estimator} scored each of {self._sizes['train']:,} training points on itself, for {fitted}."
        each = "every input feature of " if facts.plan.work.features else ""
        return (
            f"{estimator} scored {each}{self._sizes['train']:,} training points for {self._sizes['test']:,} "
            f"test points of {fitted}."
        )

    def _tiles(self) -> Iterator[tuple[str, str]]:
        facts = self.asked.facts
        work, effort = facts.plan.work, facts.effort
        if self._sizes["test"]:
            yield "test points", f"{self._sizes['test']:,}"
        if facts.fingerprint.get("kind") != "factors":
            yield "training points", f"{self._sizes['train']:,}"
        yield "parameters", f"{work.parameters:,}"
        worst = _worst(facts)
        if worst is not None:
            yield "worst residual", f"{worst[1]:.1e}"
        if effort.total:
            yield "time of all workers", format_seconds(effort.total)
        if effort.peak_bytes:
            yield "peak memory", format_bytes(effort.peak_bytes)
        yield "in the store", format_bytes(effort.nbytes)

    def _first_notes(self) -> Iterator[str]:
        facts = self.asked.facts
        if facts.state not in FINAL:
            yield (
                f"The run is {facts.state}: {facts.done:,} of {facts.total:,} pieces of work are done. What is not "
                "there yet is left out of every list and figure; the same call again goes on where it was."
            )
        for side, lacking in facts.missing.items():
            named = "; ".join(f"{one['id']} ({one['reason']})" for one in lacking[:MISSING])
            more = f"; and {len(lacking) - MISSING:,} more" if len(lacking) > MISSING else ""
            yield f"{len(lacking):,} {NAMES[side]}s could not be scored: {named}{more}."
        if len(facts.regularizations) > 1:
            others = ", ".join(
                f"{value:g}" for value in facts.regularizations if value != facts.regularization
            )
            yield f"The scores at other λ ({others}): regularization= chooses which are shown."
        for side, samples in self.asked.samples.items():
            if samples.source is not None and samples.doubtful(facts):
                yield (
                    f"Whether the {side} samples drawn here are those that were scored: digests differ, as they do for "
                    "other data and for the same data in another kind of store."
                )

    # -- test points --------------------------------------------------------------------
    def _cases(self) -> dict[str, Any] | None:
        scores = self.asked.scores
        if scores is None:
            self.notes.append(f"Lists of training points: {_held(self.asked.facts)}")
            return None
        rows = self._rows
        ranked = self._ranked
        layout, named = scores.layout, self.asked.tests is not None
        left = len(scores.row_ids) - len(rows)
        if left:
            chosen = "named" if named else "those with the most harmful scores that were read"
            if layout.features and not named:
                chosen = "those with the strongest scores that were read"
            self.notes.append(
                f"{left:,} of {len(scores.row_ids):,} {NAMES[layout.rows]}s; shown are {chosen}. "
                "tests= (--test) names others."
            )
        if not layout.listed and scores.columns_read < 1:
            self.notes.append(
                f"{1 - scores.columns_read:.0%} of the {NAMES[layout.columns]}s in the lists: rows are too long to be "
                "read whole, and evenly drawn blocks of them are."
            )
        unnamed = [
            side for side in {layout.rows, layout.columns} & {"test", "train"} if not self._drawable(side)
        ]
        if unnamed:
            which = " and ".join(f"{side}=" for side in sorted(unnamed))
            self.notes.append(
                f"What the points look like: give the data as {which}, or the job file to the command."
            )
        cases = [self._case(row) for row in ranked]
        if not cases:
            return None
        return {"title": f"{NAMES[layout.rows].capitalize()}s", "text": self._reading(), "cases": cases}

    @cached_property
    def _rows(self) -> list[int]:
        scores, tests = self.asked.scores, self.asked.tests
        assert scores is not None
        return scores.harmed(TESTS) if tests is None else scores.positions(tests)

    @cached_property
    def _ranked(self) -> list[Ranked]:
        assert self.asked.scores is not None
        return self.asked.scores.ranked(self._rows, self.asked.top)

    def _drawable(self, side: str) -> bool:
        samples = self.asked.samples[side]
        return samples.source is not None or samples.tokens is not None

    def _reading(self) -> str:
        assert self.asked.scores is not None
        layout = self.asked.scores.layout
        if layout.features:
            return (
                "Ranked by the norm of the scores of all features: how far changing the training input would move its "
                "influence. Blue: raising the feature makes the point help more; red: less."
            )
        text = (
            "A positive score helps: left out of the training, the point would raise the test loss by about score / n, "
            f"n = {self._fitted:,}."
        )
        if self.asked.perturbation is not None:
            text += " Raising a blue part of an input makes it help more, a red one less, each input on its own scale."
        return text

    @property
    def _fitted(self) -> int:
        return int(self.asked.facts.dataset.attrs.get("samples_fitted", 0))

    def _case(self, row: Ranked) -> Case:
        scores = self.asked.scores
        assert scores is not None
        layout = scores.layout
        sides = [("helps", row.helpful), ("harms", row.harmful)]
        titles = {"helps": f"{NAMES[layout.columns].capitalize()}s that help most", "harms": "that harm most"}
        if layout.features:
            sides, titles = sides[:1], {"helps": f"{NAMES[layout.columns].capitalize()}s that matter most"}
        strongest = max((abs(one.score) for _, ones in sides for one in ones), default=0.0)
        listed = [
            Side(
                kind,
                titles[kind],
                NAMES[layout.columns],
                [self._point(one, layout.columns, strongest, row) for one in ones],
            )
            for kind, ones in sides
        ]
        samples = self.asked.samples.get(layout.rows)
        target = None if samples is None else samples.target(row.position)
        return Case(
            f"{NAMES[layout.rows].capitalize()} {row.id}",
            None if target is None else f"target {target}",
            None if samples is None else samples.drawing(row.position),
            self._row_figure(row),
            f"{row.missing:,} scores are not there." if row.missing else None,
            listed,
        )

    def _row_figure(self, row: Ranked) -> Shown | None:
        if row.values is None or len(row.values) < 2:
            return None
        marks = [one.score for one in (*row.helpful, *row.harmful)]
        label = "‖score‖" if self.asked.scores and self.asked.scores.layout.features else "score"
        below = float(np.mean(row.values < 0))
        text = f"{len(row.values):,} scores; {below:.0%} harm. Marks: the points listed."
        draw = partial(_histogram, values=row.values, label=label, marks=marks)
        return Shown(
            svg(draw, f"row{row.position}", f"Distribution of the scores of {row.id}", (3.2, 1.9)), text
        )

    def _point(self, one: Scored, side: str, strongest: float, row: Ranked | None) -> Point:
        samples = self.asked.samples.get(side)
        strength = None if row is None else self._strength(row, one)
        effect = None
        if row is not None and self._fitted and not (self.asked.scores and self.asked.scores.layout.features):
            effect = f"{one.score / self._fitted:+.1e} loss without it"
        return Point(
            str(one.id),
            None if samples is None else samples.target(one.position),
            f"{one.score:+.4g}",
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

    # -- all scores ---------------------------------------------------------------------
    def _distribution(self) -> dict[str, Any] | None:
        scores = self.asked.scores
        if scores is None or scores.layout.listed:
            if scores is not None:
                kept = self.asked.facts.plan.work.kept
                self.notes.append(
                    f"How all scores are distributed: the store keeps {kept.text if kept else 'lists'}, the others "
                    "were never written."
                )
            return None
        sample, features = scores.sample, scores.layout.features
        if len(sample.values) == 0:
            self.notes.append("How scores are distributed: none is there yet.")
            return None
        read = "All" if sample.share >= 1 else f"An even draw of {sample.share:.2%} of the"
        low, middle, high = np.quantile(sample.values, [0.05, 0.5, 0.95])
        signs = "" if features else f" {float(np.mean(sample.values > 0)):.0%} of them help."
        label = "‖score‖ over features" if features else "score"
        caption = f"{len(sample.values):,} scores: half below {middle:.3g}, nine in ten from {low:.3g} to {high:.3g}."
        if sample.share < 1:
            self.notes.append(
                f"{1 - sample.share:.2%} of the scores in the distribution: stored chunks were drawn evenly."
            )
        drawn = svg(
            partial(_histogram, values=sample.values, label=label),
            "scores",
            f"Histogram: {caption}",
            (5.2, 3.0),
        )
        return {
            "title": "All scores",
            "text": f"{read} {sample.pairs:,} pairs, on an axis linear near zero and logarithmic beyond.{signs}",
            "figures": [Shown(drawn, caption)],
        }

    # -- training points on themselves -----------------------------------------------------
    def _own(self) -> dict[str, Any] | None:
        own = self.asked.own
        found = self._twins()
        if own is None:
            self.notes.append(
                "Suspected mislabels: run with reduce=SelfInfluence() and give that store as self_influence=."
            )
            if not found:
                return None
        held = np.empty(0) if own is None else own.values[~np.isnan(own.values)]
        suspects, drawn, text = [], [], "Points that look the same to the model."
        if own is not None and len(held):
            first = max(1, len(held) // 100)
            order = np.sort(held)[::-1]
            total = float(order.sum())
            share = float(order[:first].sum()) / total if total > 0 else 0.0
            text = (
                "Self influence gⱼᵀ (H + λI)⁻¹ gⱼ is how much the model relies on a training point to get that very "
                f"point right. The first 1 % of {len(held):,} points hold {share:.0%} of it."
            )
            caption = f"From {order[0]:.3g} down to {order[-1]:.3g}; the median is {np.median(order):.3g}."
            curve = svg(
                partial(figures.ranked_curve, values=held), "own", f"Self influence: {caption}", (5.2, 3.0)
            )
            drawn = [Shown(curve, caption)]
            listed = own.largest(SUSPECTS)
            suspects = [self._point(one, "train", listed[0].score, None) for one in listed]
        sure = self.asked.samples["train"].source is not None
        return {
            "text": text,
            "figures": drawn,
            "suspects": suspects,
            "wide": Side("", "", "", suspects).wide,
            "twins_title": "Duplicates" if sure else "Possible duplicates",
            "twins_text": self._about_twins(found, sure),
            "twins": found,
        }

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
        rows = [] if scores is None or scores.layout.columns != "train" else self._ranked
        for row in rows:
            if row.values is not None and len(row.values) == self._sizes["train"]:
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
            if read > CANDIDATES or len(found) == TWINS:
                self.notes.append(f"Duplicates beyond the first {len(found):,} groups.")
                break
            found += [self._twin(same) for same in samples.same(group)]
        return found[:TWINS]

    def _twin(self, group: Sequence[int]) -> Twin:
        samples, own, scores = self.asked.samples["train"], self.asked.own, self.asked.scores
        named: Any = group
        if own is not None:
            named = own.ids[list(group)].tolist()
        elif scores is not None:
            named = [scores.column_id(at) for at in group]
        targets = [samples.target(at) or "" for at in group]
        return Twin(", ".join(map(str, named)), str(named[0]), ", ".join(targets), samples.drawing(group[0]))

    # -- certificates -------------------------------------------------------------------
    def _certificates(self) -> dict[str, Any]:
        facts = self.asked.facts
        known, drawn, text = facts.diagnostics, list[Shown](), ""
        damping = {} if facts.regularization is None else {"hessian_regularization": facts.regularization}
        dataset = facts.dataset.assign_attrs(damping)
        worst = _worst(facts)
        if worst is not None:
            text = (
                "Each test point's system (H + λI) s = g was solved, and what is left of it measured: "
                f"‖(H + λI) s − g‖ / ‖g‖ is at most {worst[1]:.2g}, at test point {worst[0]}."
            )
            curve = svg(lambda ax: figures.residuals(dataset, ax=ax), "residuals", "Histogram of residuals")
            drawn.append(
                Shown(
                    curve,
                    "Relative residuals. A sketch leaves out what it did not keep, and that shows here.",
                )
            )
        else:
            self.notes.append("Residuals of the factors: the store holds none.")
        if known.get("eigenvalues") or figures.eigenvalue_ranges(known):
            drawn.append(
                Shown(
                    svg(lambda ax: figures.spectrum(dataset, ax=ax), "spectrum", "Eigenvalues"),
                    _about_spectrum(known),
                )
            )
        elif known:
            self.notes.append("The spectrum: this estimator never sees it.")
        else:
            self.notes.append(
                "The spectrum and what was checked of the fit: known when the run has finished."
            )
        return {"text": text, "figures": drawn, "rows": list(_checked(known))}

    # -- time and memory ------------------------------------------------------------------
    def _run(self) -> dict[str, Any]:
        facts = self.asked.facts
        effort, plan = facts.effort, facts.plan
        pieces = len(effort.seconds)
        drawn = list[Shown]()
        if not pieces:
            text = "No piece of work whose time is known is done."
        else:
            wall = effort.wall
            text = (
                f"{pieces:,} tasks took {format_seconds(effort.total)} on {len(effort.workers):,} "
                f"process{'es' if len(effort.workers) > 1 else ''}"
                + (f", within {format_seconds(wall)}" if wall is not None else "")
                + f"; the longest took {format_seconds(float(effort.seconds.max()))}. "
                f"{format_bytes(effort.nbytes)} were written, compressed. Fit and factors are not in these times."
            )
            curve = svg(
                partial(figures.work_curve, effort=effort), "work", "Tasks at work over time", (5.2, 2.8)
            )
            drawn.append(
                Shown(
                    curve,
                    "Tasks that were being worked at. Gaps are pauses: of a run that was resumed, or waits.",
                )
            )
        workers = [
            (name, f"{count:,}", format_seconds(seconds), format_bytes(peak) if peak else "not known")
            for name, (count, seconds, peak) in list(effort.workers.items())[:WORKERS]
        ]
        left = len(effort.workers) - len(workers)
        return {
            "text": text,
            "figures": drawn,
            "workers": workers,
            "workers_title": "Processes that did the work"
            + (f"; {left:,} more are not listed" if left else ""),
            "plan": plan.table(),
        }

    # -- provenance -----------------------------------------------------------------------
    def _provenance(self) -> Iterator[tuple[str, str]]:
        yield "store", self.asked.facts.location.url
        for name, value in sorted(self.asked.facts.fingerprint.items()):
            yield from _flat(name.replace("_", " "), value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A mapping entry by entry, everything else in one line."""
    if isinstance(value, Mapping) and value:
        for key, held in value.items():
            yield from _flat(f"{name} · {str(key).replace('_', ' ')}", held)
        return
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    yield name, text if len(text) <= 400 else f"{text[:400]} …"


def _histogram(ax: Any, *, values: Array, label: str, marks: Sequence[float] = ()) -> None:
    figures.histogram(ax, values, label=label, marks=marks)


def _damping(facts: Facts) -> str:
    if facts.regularization is not None:
        return f"{facts.regularization:g}"
    value = facts.dataset.attrs.get("hessian_regularization")
    return f"{value:g}" if isinstance(value, int | float) else "one for each block"


def _held(facts: Facts) -> str:
    kept = facts.plan.work.kept
    if facts.fingerprint.get("kind") == "factors":
        return "the store holds influence factors, and no scores."
    return f"the store keeps {kept.text if kept else 'none'}, and no scores of pairs."


def _worst(facts: Facts) -> tuple[Any, float] | None:
    """Test point of the largest residual, and that."""
    if "factor_residual" not in facts.dataset.variables:
        return None
    values = np.asarray(facts.dataset["factor_residual"].values, dtype=np.float64)
    if np.isnan(values).all():
        return None
    at = int(np.nanargmax(values))
    ids = facts.dataset["test"].values if "test" in facts.dataset.coords else None
    return (at if ids is None else ids[at]), float(values[at])


def _about_spectrum(known: Mapping[str, Any]) -> str:
    values = known.get("eigenvalues")
    if values:
        text = f"The {len(values):,} eigenvalues that the sketch kept"
        share = known.get("captured_spectrum")
        if isinstance(share, int | float) and math.isfinite(share):
            text += f": {share:.1%} of the curvature, by the sum of squares"
        return f"{text}."
    parts = known.get("layers") or known.get("blocks")
    whose = "each of them" if parts else "H"
    return f"Smallest and largest eigenvalue of {whose}; red where H + λI is not positive definite."


CHECKED = {
    "samples": "training samples fitted",
    "parameters": "parameters fitted",
    "curvature": "curvature",
    "positive_definite": "H + λI is positive definite",
    "smallest_eigenvalue": "smallest eigenvalue",
    "largest_eigenvalue": "largest eigenvalue",
    "captured_spectrum": "captured share of the spectrum",
    "complement": "rest of the space kept at λ",
    "factorisation": "factorisation",
    "rank": "rank",
}
"""Diagnostics that are listed, and what they are called."""


def _checked(known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    words = {True: "yes", False: "no"}
    for name, title in CHECKED.items():
        value = known.get(name)
        if isinstance(value, bool):
            yield title, words[value]
        elif isinstance(value, int):
            yield title, f"{value:,}"
        elif isinstance(value, float):
            yield title, f"{value:.4g}"
        elif isinstance(value, str):
            yield title, value
    for name, value in dict(known.get("derivatives", {})).items():
        yield from _flat(f"derivatives · {name.replace('_', ' ')}", value)
