"""Missing samples: those that a run could not use, which its store names and its caller is told of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dask_influence.errors import ConfigurationError, PoisonedSamplesError
from dask_influence.execution.ledger import Ledger, Standing
from dask_influence.execution.pieces import FACTORS, RESIDUAL
from dask_influence.execution.plan import Plan
from dask_influence.storage.results import described
from dask_influence.storage.stores import Location

CHOICES = ("raise", "warn")

Missing = Mapping[str, Sequence[Mapping[str, Any]]]
"""Position, id and reason of samples, by side."""


class MissingSamples:
    """Test points and training samples of one run that have no result.

    Parameters
    ----------
    ids : mapping
        Coordinates by dimension name.

    Examples
    --------
    >>> missing = MissingSamples({"train": np.array(["a", "b"])})
    >>> missing.add("train", {1: "its gradient is not finite"})
    >>> missing.as_json()
    {'train': [{'sample': 1, 'id': 'b', 'reason': 'its gradient is not finite'}]}
    """

    def __init__(self, ids: Mapping[str, np.ndarray[Any, Any]]) -> None:
        self._ids = ids
        self._reasons: dict[str, dict[int, str]] = {"test": {}, "train": {}}

    def add(self, side: str, reasons: Mapping[int, str]) -> None:
        """Samples of one side, by position."""
        self._reasons[side].update(reasons)

    def add_entries(self, missing: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """What ledger entries say is missing from them, by their name."""
        for name, ones in missing.items():
            self.add(_side(name), {one["sample"]: one["reason"] for one in ones})

    def add_recorded(self, recorded: Missing) -> None:
        """What the record of the run says is missing."""
        for side, ones in recorded.items():
            self.add(side, {one["sample"]: one["reason"] for one in ones})

    def positions(self, side: str) -> tuple[int, ...]:
        """Positions of the missing samples of one side."""
        return tuple(sorted(self._reasons[side]))

    def listed(self, side: str, start: int, stop: int) -> list[dict[str, Any]]:
        """Position, id and reason of those from ``start`` to ``stop``."""
        reasons, ids = self._reasons[side], self._ids.get(side)
        return [
            {"sample": j, "id": j if ids is None else np.asarray(ids[j]).item(), "reason": reasons[j]}
            for j in sorted(reasons)
            if start <= j < stop
        ]

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """All of them by side; empty where nothing is missing."""
        return {
            side: self.listed(side, 0, max(reasons) + 1) for side, reasons in self._reasons.items() if reasons
        }

    def refuse(self, location: Location) -> None:
        """Raise where anything is missing.

        Raises
        ------
        PoisonedSamplesError
            Names the samples, and why.
        """
        missing = self.as_json()
        if missing:
            raise PoisonedSamplesError(
                f"{location.url} was written without {described(missing)}. Everything else is there, and what "
                "belongs to these samples is NaN, or left out of a reduction: leave them out or mend them, take "
                'the store as it is with on_missing="warn", or try them again with repair=True',
                missing,
            )


def check_on_missing(value: object) -> None:
    """Refuse anything but ``"raise"`` and ``"warn"``."""
    if value not in CHOICES:
        raise ConfigurationError(f'on_missing must be "raise" or "warn"; got {value!r}')


def forget_missing(ledger: Ledger, plan: Plan, standing: Standing, recorded: Missing) -> Standing:
    """Forget the pieces that lack samples, so that these are tried again; what is left.

    Those are in their entries, and in the run's record, ``recorded``, where an entry is lost.
    """
    without = set(standing.missing)
    lacking = {side: {one["sample"] for one in recorded.get(side, ())} for side in ("test", "train")}
    for name, ones in standing.missing.items():
        lacking[_side(name)].update(one["sample"] for one in ones)
    for index in range(plan.strips if any(lacking.values()) else 0):
        strip = plan.strip(index)
        if _any_in(lacking["test"], strip.rows) or _any_in(lacking["train"], strip.columns):
            without.add(strip.name)
    # what joined them goes first: while it is there, it stands for parts that are gone
    above = [] if plan.work.kept is None else plan.tree.above(without)
    gone = [name for name in [*above, *without] if name in standing.done]
    for name in gone:
        ledger.forget(name)
    return standing.without(gone)


def _any_in(samples: Iterable[int], among: range) -> bool:
    return any(sample in among for sample in samples)


def _side(name: str) -> str:
    return "test" if name == RESIDUAL or name.startswith(FACTORS) else "train"
