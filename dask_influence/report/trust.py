"""Certificates of the numbers, and what the run took: residuals, spectrum, derivatives; time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from dask_influence.execution.units import format_bytes
from dask_influence.report import figures
from dask_influence.report.asked import Asked, Shown, seconds
from dask_influence.report.facts import Facts
from dask_influence.report.svg import svg

WORKERS = 24
"""Processes that are listed."""

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

SYSTEM, RESIDUAL = (text.replace(" ", "\u00a0") for text in ("(H + λI) s = g", "‖(H + λI) s − g‖ / ‖g‖"))

DERIVATIVES = {
    "gradient": "gradient of each sample",
    "directional": "derivatives along directions",
    "product": "products with the curvature",
    "mixed": "their gradients in the input",
}


def certificates(asked: Asked) -> dict[str, Any]:
    """The section on whether the numbers can be trusted."""
    facts, notes = asked.facts, asked.notes
    known, drawn, text = facts.diagnostics, list[Shown](), ""
    damping = {} if facts.regularization is None else {"hessian_regularization": facts.regularization}
    dataset = facts.dataset.assign_attrs(damping)
    worst = worst_residual(facts)
    if worst is None:
        notes.append("Residuals of the factors: the store holds none.")
    else:
        attrs = dataset["factor_residual"].attrs
        told = "estimated" if "estimated_from" in attrs else "measured"
        text = (
            f"Each test point's system {SYSTEM} was solved, and what is left of it {told}: "
            f"{RESIDUAL} is at most {worst[1]:.2g}, at test point {worst[0]}."
        )
        curve = svg(lambda ax: figures.residuals(dataset, ax=ax), "residuals", "Histogram of residuals")
        about = "Relative residuals. A sketch leaves out what it did not keep, and that shows here."
        if "estimated_from" in attrs:
            deviation = attrs["relative_standard_deviation"]
            about += f" Estimated from {attrs['estimated_from']}, each right to about {deviation:.0%}."
        drawn.append(Shown(curve, about))
    if known.get("eigenvalues") or figures.eigenvalue_ranges(known):
        curve = svg(lambda ax: figures.spectrum(dataset, ax=ax), "spectrum", "Eigenvalues")
        drawn.append(Shown(curve, _about_spectrum(known)))
    elif known:
        notes.append("The spectrum: this estimator never sees it.")
    else:
        notes.append("The spectrum, and what was checked before the fit: known when the run has finished.")
    return {"text": text, "figures": drawn, "rows": list(_checked(known))}


def worst_residual(facts: Facts) -> tuple[Any, float] | None:
    """Test point of the largest residual, and that; None where there are none."""
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


def _checked(known: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, title in CHECKED.items():
        value = known.get(name)
        if isinstance(value, bool):
            yield title, "yes" if value else "no"
        elif isinstance(value, int):
            yield title, f"{value:,}"
        elif isinstance(value, float):
            yield title, f"{value:.4g}".replace("-", "−")
        elif isinstance(value, str):
            yield title, value
    checks = known.get("derivatives", {})
    for name, title in DERIVATIVES.items():
        check = checks.get(name)
        if isinstance(check, Mapping) and "form" in check:
            refused = ", ".join(check.get("rejected", {}))
            instead = f"; refused: {refused}" if refused else ""
            error = check.get("error")
            off = "" if error is None else f", off finite differences by {error:.1e}"
            yield title, f"{str(check['form']).replace('_', ' ')}{off}{instead}"


def run(asked: Asked) -> dict[str, Any]:
    """The section on time and memory."""
    facts = asked.facts
    effort = facts.effort
    if len(effort.seconds) == 0:
        return {
            "text": "No piece of work whose time is known is done.",
            "figure": None,
            "workers": [],
            "workers_title": "",
            "plan": facts.plan.table(),
        }
    curve = svg(partial(figures.work_curve, effort=effort), "work", "Tasks at work over time")
    listed = [
        (name, f"{count:,}", seconds(spent), format_bytes(peak) if peak else "not known")
        for name, (count, spent, peak) in list(effort.workers.items())[:WORKERS]
    ]
    left = len(effort.workers) - len(listed)
    return {
        "text": _about_run(facts),
        "figure": Shown(
            curve, "Tasks that were being worked at. Gaps are waits, or pauses of a run that was resumed."
        ),
        "workers": listed,
        "workers_title": "Processes that did the work" + (f"; {left:,} more are not listed" if left else ""),
        "plan": facts.plan.table(),
    }


def _about_run(facts: Facts) -> str:
    effort = facts.effort
    tasks, processes = len(effort.seconds), len(effort.workers)
    within = "" if effort.wall is None else f", within {seconds(effort.wall)}"
    return (
        f"{tasks:,} task{'s' if tasks > 1 else ''} took {seconds(effort.total)} on {processes:,} "
        f"process{'es' if processes > 1 else ''}{within}; the longest took {seconds(float(effort.seconds.max()))}. "
        f"{format_bytes(effort.nbytes)} were written, compressed. Fit and factors are not in these times."
    )
