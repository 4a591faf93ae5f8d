"""What a report is made of, and how it says numbers: shared by all sections of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from dask_influence.execution.units import format_seconds
from dask_influence.report.data import Samples
from dask_influence.report.facts import Facts
from dask_influence.report.scores import Own, Scores

NAMES = {"test": "test point", "train": "training point", "group": "group", "test_group": "test group"}
"""Dimensions, in words."""


@dataclass(frozen=True)
class Asked:
    """The store, what else was given, and what cannot be shown.

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
    notes : list of str
        What is not shown, and why; sections add to it.
    """

    facts: Facts
    scores: Scores | None
    perturbation: Scores | None
    own: Own | None
    samples: Mapping[str, Samples]
    tests: Sequence[Any] | None
    top: int
    title: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def fitted(self) -> int:
        """n: samples of the fit; 0 where the store does not say."""
        return int(self.facts.dataset.attrs.get("samples_fitted", 0))

    @property
    def trains(self) -> int:
        """M."""
        return self.facts.plan.work.trains


@dataclass(frozen=True)
class Shown:
    """A figure with what it says."""

    svg: Markup
    caption: str


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, as people write it.

    >>> signed(-0.25), signed(3.0), signed(0.00012345, 2)
    ('−0.25', '+3', '+0.00012')
    """
    return f"{value:+.{digits}g}".replace("-", "−")


def seconds(value: float) -> str:
    """Time, milliseconds where it is short.

    >>> seconds(0.012), seconds(75)
    ('12 ms', '1.2 min')
    """
    return f"{1000 * value:.0f} ms" if value < 0.1 else format_seconds(value)
