"""What every experiment shares: checks, scores, measured effects, interval and ceiling.

Notation: M training and N test points, S subsets, K seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import numpy as np
import optree

from dask_influence.errors import ConfigurationError, IncompleteRunError
from dask_influence.execution.base import Executor
from dask_influence.execution.progress import Report, check_progress, reporting
from dask_influence.execution.resources import Resources
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.scalars import check_integer, check_number
from dask_influence.storage.sources import Source, as_source
from dask_influence.storage.stores import Location
from dask_influence.validation import statistics
from dask_influence.validation.effects import Job, Measured, effects
from dask_influence.validation.retraining import Retraining, dtype_of
from dask_influence.validation.training import TrainingFunction

Correlation = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of two arrays (N, S), by row: (N,)."""


@dataclass(frozen=True)
class Experiment:
    """One validation of a fitted model, its arguments checked."""

    influence: InfluenceFunctionModel
    train: Source
    test: Source
    seeds: tuple[int, ...]
    seed: int
    confidence: float
    store: Location | None
    progress: bool | Report | None
    executor: Executor

    @classmethod
    def of(
        cls,
        influence: InfluenceFunctionModel,
        train: Any,
        test: Any,
        seeds: Sequence[int],
        seed: int,
        confidence: float,
        store: str | PathLike[str] | Location | None,
        progress: bool | Callable[[str, int, int], None] | None,
    ) -> Self:
        """Refuse what cannot be run, before anything is measured."""
        if not isinstance(influence, InfluenceFunctionModel):
            raise ConfigurationError(
                f"influence must be a fitted influence model; got {type(influence).__name__}"
            )
        influence._require_fit()
        given = tuple(seeds) if isinstance(seeds, Sequence | np.ndarray) else (seeds,)
        seeds = tuple(check_integer("seeds", value, 0) for value in given)
        if not seeds or len(set(seeds)) < len(seeds):
            raise ConfigurationError(f"seeds must be one or more different integers; got {given!r}")
        check_integer("seed", seed, 0)
        check_confidence(confidence)
        check_progress(progress)
        location = None if store is None else Location.of(store)
        if location is not None:
            location.check_writable()
        executor = Resources(influence.client, influence.device, influence.artifacts).executor()
        sources = as_source(train, "train"), as_source(test, "test")
        return cls(influence, *sources, seeds, seed, confidence, location, progress, executor)

    @property
    def trains(self) -> int:
        """M."""
        return len(self.train)

    def picked(self, points: int | Sequence[int], least: int) -> np.ndarray:
        """Positions of training points: those given, or as many drawn at random."""
        if isinstance(points, Sequence | np.ndarray):
            chosen = np.asarray(points)
            if (
                chosen.ndim != 1
                or chosen.dtype.kind not in "iu"
                or len(set(chosen.tolist())) < max(least, len(chosen))
            ):
                raise ConfigurationError(
                    f"points must be {least} or more different positions; got {points!r}"
                )
            if chosen.min() < 0 or chosen.max() >= self.trains:
                raise ConfigurationError(
                    f"points must be positions from 0 to {self.trains - 1}; got {points!r}"
                )
            return chosen
        count = check_integer("points", points, least, self.trains)
        return np.random.default_rng(self.seed).choice(self.trains, count, replace=False)

    def scores(self, columns: np.ndarray) -> np.ndarray:
        """Scores (N, len(columns)) of ``mode="up"``."""
        batch = self.train.read(0, self.trains)
        train = _at(batch, columns)
        return np.asarray(self.influence.influences(*self.test.read(0, len(self.test)), *train), np.float64)

    def retrained(
        self,
        training: TrainingFunction,
        subsets: Sequence[np.ndarray],
        least: int,
        needed: Sequence[int] = (),
    ) -> Measured:
        """Test losses after training on ``subsets``, of which those ``needed`` may not fail."""
        job = Retraining(self.train, self.test, training, self.influence.loss, dtype_of(self.influence))
        found = self.measured(job, subsets, least)
        for number in needed:
            if number in found.failures:
                raise IncompleteRunError(
                    f"training failed on all of the training data ({found.failures[number]}); "
                    "mend the training function"
                )
        return found

    def measured(self, job: Job, subsets: Sequence[np.ndarray], least: int) -> Measured:
        """What ``job`` measures of ``subsets``, of which ``least`` may not fail."""
        with reporting(self.progress) as report:
            return effects(self.executor, job, subsets, self.seeds, self.store, report, least)

    def interval(
        self, resampled: statistics.Resampled, shape: tuple[int, ...], value: float
    ) -> statistics.Interval:
        """Around ``value``, the mean correlation, over test points and subsets (N, S) drawn anew."""

        def statistic(drawn: tuple[np.ndarray, ...]) -> float:
            rows, columns = drawn
            return statistics.mean(resampled(np.bincount(columns, minlength=shape[1]))[rows])

        low, high = statistics.bootstrap(
            statistic, shape, confidence=self.confidence, seed=self.seed, center=value
        )
        return max(low, -1.0), min(high, 1.0)

    def ceiling(self, correlation: Correlation, losses: np.ndarray) -> float | None:
        """What the mean over seeds would reach against the truth, from losses (S, K, N) of half the seeds each.

        With r the correlation of the halves, the mean over all seeds has reliability 2r / (1 + r)
        (Spearman 1910, Brown 1910), and a perfect score reaches its square root.
        """
        half = losses.shape[1] // 2
        if half == 0:
            return None
        first, second = losses[:, :half].mean(1).T, losses[:, half : 2 * half].mean(1).T
        r = np.clip(correlation(first, second), 0, 1)
        factor = losses.shape[1] / half
        return statistics.mean(np.sqrt(factor * r / (1 + (factor - 1) * r)))


def _at(batch: Any, columns: np.ndarray) -> Any:
    return optree.tree_map(lambda leaf: np.asarray(leaf)[columns], batch)


def check_confidence(confidence: float) -> None:
    """Refuse what is no share."""
    check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ConfigurationError(f"confidence must lie between 0 and 1; got {confidence!r}")


def check_training(training: object) -> None:
    """Refuse what cannot be called."""
    if not callable(training):
        raise ConfigurationError(f"training must be callable as (x, y, seed); got {training!r}")
