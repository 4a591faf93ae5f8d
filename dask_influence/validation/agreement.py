"""Agreement: what scores predicted against what was measured, with interval and ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from dask_influence.validation.statistics import Interval


@dataclass(frozen=True)
class Agreement:
    """Correlation of predicted with actual effects, by test point.

    Attributes
    ----------
    name : str
        Which correlation it is.
    value : float
        Its mean over test points; NaN ones (nothing changed) are left out.
    interval : (float, float)
        Bootstrap interval of ``value``.
    per_test : numpy array
        (N,).
    predicted, actual : numpy array
        (N, S): effect on each test point of each subset, or of each point left out.
    ceiling : float or None
        What the actual effects themselves would reach against another set of seeds: no score can be
        expected above. None where one seed tells nothing about noise.
    slope : float or None
        Of actual on predicted effects, where both are changes of a loss.
    noise : float
        Relative difference of measuring twice from one seed; 0 where that is deterministic.
    failures : mapping of int to str
        Subsets or points that could not be measured, and why.
    seconds : float
        Spent on measuring, on all workers together.
    settings : mapping
        What was asked for.
    """

    name: str
    value: float
    interval: Interval
    per_test: np.ndarray = field(repr=False)
    predicted: np.ndarray = field(repr=False)
    actual: np.ndarray = field(repr=False)
    ceiling: float | None = None
    slope: float | None = None
    noise: float = 0.0
    failures: Mapping[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        tests, count = self.predicted.shape
        rows = [
            (self.name, f"{self.value:.4f}"),
            ("interval (bootstrap)", f"{self.interval[0]:.4f} to {self.interval[1]:.4f}"),
        ]
        if "seeds" in self.settings:
            known = "unknown, of one seed" if self.ceiling is None else f"{self.ceiling:.4f}"
            rows.append(("ceiling (noise of training)", known))
        if self.slope is not None:
            rows.append(("slope, actual on predicted", f"{self.slope:.3f}"))
        rows += [
            ("test points × effects", f"{tests} × {count}"),
            ("failed, and left out", f"{len(self.failures)}"),
            ("measured twice", "the same" if not self.noise > 0 else f"noise {self.noise:.1e} from one seed"),
            ("seconds of work", f"{self.seconds:.1f}"),
            *((name, str(value)) for name, value in self.settings.items()),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def to_json(self) -> dict[str, Any]:
        """What is shown, for programs; effects themselves are in ``predicted`` and ``actual``."""
        return {
            "name": self.name,
            "value": self.value,
            "interval": list(self.interval),
            "ceiling": self.ceiling,
            "slope": self.slope,
            "noise": self.noise,
            "failures": {str(number): reason for number, reason in self.failures.items()},
            "seconds": self.seconds,
            "test_points": self.predicted.shape[0],
            "effects": self.predicted.shape[1],
        }

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Actual against predicted effects, a point for each pair (Koh & Liang 2017, figure 2).

        Parameters
        ----------
        path : path, optional
            Where the picture is written.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        ImportError
            Without matplotlib (``pip install dask-influence[demo]``).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.8, 4.4), layout="constrained")
        axes = figure.subplots()
        axes.scatter(self.predicted.ravel(), self.actual.ravel(), s=4, alpha=0.4, linewidths=0)
        if self.slope is not None:
            axes.axline((0, 0), slope=1, color="0.5", linewidth=0.8)
        axes.set_xlabel("predicted effect")
        axes.set_ylabel("measured effect")
        low, high = self.interval
        axes.set_title(f"{self.name}\n{self.value:.3f} ({low:.3f} to {high:.3f})", fontsize=10)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
