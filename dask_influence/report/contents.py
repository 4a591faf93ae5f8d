"""Contents: what the page says, in the order in which it says it; the template only sets it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from dask_influence import __version__
from dask_influence.execution.units import format_bytes
from dask_influence.report import figures, trust
from dask_influence.report.asked import NAMES, Asked, Shown, seconds
from dask_influence.report.facts import Facts
from dask_influence.report.lists import Lists
from dask_influence.report.second_look import SecondLook
from dask_influence.report.svg import svg
from dask_influence.storage.results import FINAL

MISSING = 10
"""Samples without scores that are named."""


def page(asked: Asked) -> dict[str, Any]:
    """The template's variables."""
    facts, lists = asked.facts, Lists(asked)
    parts = {
        "cases": lists.section(),
        "distribution": _distribution(asked),
        "own": SecondLook(asked, lists).section(),
        "certificates": trust.certificates(asked),
        "run": trust.run(asked),
    }
    names = {
        "cases": ("points", parts["cases"]["title"] if parts["cases"] else ""),
        "distribution": ("scores", "All scores"),
        "own": ("own", "A second look"),
        "certificates": ("certificates", "Trust"),
        "run": ("run", "Time and memory"),
    }
    shown = [names[part] for part, content in parts.items() if content]
    done = f"{facts.state}: {facts.done:,} of {facts.total:,} done"
    return {
        **parts,
        "version": __version__,
        "store": facts.name,
        "title": asked.title or f"What the training data did: {facts.name}",
        "lead": _lead(facts),
        "state": facts.state if facts.state in FINAL else done,
        "complete": facts.state == "complete",
        "tiles": list(_tiles(facts)),
        "notes": [*_first_notes(asked), *asked.notes],
        "sections": [*shown, ("provenance", "Provenance")],
        "provenance": list(_provenance(facts)),
        "closing": f"Made by dask_influence {__version__} from {facts.location.url}. "
        "The file needs no network: everything it shows is in it.",
    }


# -- the head of the page ------------------------------------------------------------------
def _lead(facts: Facts) -> str:
    work, attributes = facts.plan.work, facts.dataset.attrs
    estimator = attributes.get("estimator", "An estimator")
    model = f"a model with {attributes.get('parameters_fitted', 0):,} parameters, at λ = {_damping(facts)}"
    if facts.fingerprint.get("kind") == "factors":
        return f"{estimator} solved the influence factors of {work.tests:,} test points of {model}."
    if work.diagonal:
        return f"{estimator} scored each of {work.trains:,} training points on itself, for {model}."
    each = "every input feature of " if work.features else ""
    return (
        f"{estimator} scored {each}{work.trains:,} training points for {work.tests:,} test points of {model}."
    )


def _damping(facts: Facts) -> str:
    value = facts.damping
    return f"{value:g}" if isinstance(value, int | float) else "one for each block"


def _tiles(facts: Facts) -> Iterator[tuple[str, str]]:
    work, effort = facts.plan.work, facts.effort
    if not work.diagonal:
        yield "test points", f"{work.tests:,}"
    if facts.fingerprint.get("kind") != "factors":
        yield "training points", f"{work.trains:,}"
    yield "parameters", f"{work.parameters:,}"
    worst = trust.worst_residual(facts)
    if worst is not None:
        yield "worst residual", f"{worst[1]:.1e}".replace("-", "−")
    if effort.total:
        yield "time of workers", seconds(effort.total)
    if effort.peak_bytes:
        yield "peak memory", format_bytes(effort.peak_bytes)
    yield "in the store", format_bytes(effort.nbytes)


def _first_notes(asked: Asked) -> Iterator[str]:
    facts = asked.facts
    if facts.state not in FINAL:
        yield (
            f"The run is {facts.state}: {facts.done:,} of {facts.total:,} pieces of work are done. What is not there "
            "yet is left out of every list and figure; the same call again goes on where it was."
        )
    for side, lacking in facts.missing.items():
        named = "; ".join(f"{one['id']} ({one['reason']})" for one in lacking[:MISSING])
        more = f"; and {len(lacking) - MISSING:,} more" if len(lacking) > MISSING else ""
        yield f"{len(lacking):,} {NAMES[side]}s could not be scored: {named}{more}."
    if len(facts.regularizations) > 1:
        others = ", ".join(f"{value:g}" for value in facts.regularizations if value != facts.regularization)
        yield f"The scores at other λ ({others}): regularization= chooses which are shown."
    for side, samples in asked.samples.items():
        if samples.source is not None and samples.doubtful(facts):
            yield (
                f"Whether the {side} samples drawn here are those that were scored: digests differ, as they do for "
                "other data and for the same data in another kind of store."
            )


# -- all scores ----------------------------------------------------------------------------
def _distribution(asked: Asked) -> dict[str, Any] | None:
    scores, kept = asked.scores, asked.facts.plan.work.kept
    if scores is None:
        return None
    if scores.layout.listed:
        what = kept.text if kept else "lists"
        asked.notes.append(f"How all scores are distributed: of what {what} leaves out nothing was written.")
        return None
    sample, features = scores.sample, scores.layout.features
    if len(sample.values) == 0:
        asked.notes.append("How scores are distributed: none is there yet.")
        return None
    if sample.share < 1:
        asked.notes.append(
            f"{1 - sample.share:.2%} of the scores in the distribution: stored chunks were drawn evenly."
        )
    low, middle, high = (
        f"{value:.3g}".replace("-", "−") for value in np.quantile(sample.values, [0.05, 0.5, 0.95])
    )
    caption = f"{len(sample.values):,} scores: half below {middle}, nine in ten from {low} to {high}."
    label = "‖score‖ over features" if features else "score"
    draw = partial(figures.histogram, values=sample.values, label=label)
    read = "All" if sample.share >= 1 else f"An even draw of {sample.share:.2%} of all:"
    signs = "" if features else f" {float(np.mean(sample.values > 0)):.0%} of them help."
    return {
        "text": f"{read} {sample.pairs:,} pairs, on an axis linear near zero and logarithmic beyond.{signs}",
        "figure": Shown(svg(draw, "scores", f"Histogram: {caption}"), caption),
    }


# -- provenance ----------------------------------------------------------------------------
def _provenance(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "store", facts.location.url
    for name, value in sorted(facts.fingerprint.items()):
        yield from _flat(name.replace("_", " "), value)


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A mapping entry by entry, everything else in one line; what is empty is left out."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            yield from _flat(f"{name} · {str(key).replace('_', ' ')}", held)
        return
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    yield name, text if len(text) <= 400 else f"{text[:400]} …"
