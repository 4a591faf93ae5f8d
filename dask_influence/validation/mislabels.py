"""Mislabelled training points: whether self influence finds them, and better than loss or gradient do."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dask_influence.core.objective import Objective
from dask_influence.errors import ConfigurationError, DataError
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.models import GradientDotInfluence
from dask_influence.reductions import SelfInfluence
from dask_influence.scalars import check_integer, check_number
from dask_influence.storage.results import open_influences
from dask_influence.storage.sources import Source, as_source
from dask_influence.storage.stores import Location
from dask_influence.validation import statistics
from dask_influence.validation.effects import losses_of
from dask_influence.validation.experiment import check_confidence, check_training
from dask_influence.validation.retraining import trained_on
from dask_influence.validation.statistics import Interval
from dask_influence.validation.training import TrainingFunction
from dask_influence.validation.variants import name_of, variant


@dataclass(frozen=True)
class Detection:
    """How well each quantity tells wrong labels from right ones.

    Attributes
    ----------
    areas : mapping of str to float
        Area under the receiver operating characteristic: the probability that a wrong label ranks
        before a right one; 0.5 is chance.
    intervals : mapping of str to (float, float)
        Bootstrap intervals, over training points.
    ranked : mapping of str to numpy array
        (M,): the quantity itself, large for suspects.
    wrong : numpy array
        (M,) bool.
    """

    areas: Mapping[str, float]
    intervals: Mapping[str, Interval]
    ranked: Mapping[str, np.ndarray] = field(repr=False)
    wrong: np.ndarray = field(repr=False)

    def found(self, name: str, checked: float) -> float:
        """Share of the wrong labels among the first ``checked`` share of the points."""
        first = np.argsort(-self.ranked[name], kind="stable")[: round(checked * len(self.wrong))]
        return float(self.wrong[first].sum() / self.wrong.sum())

    def __str__(self) -> str:
        width = max(map(len, self.areas))
        lines = [f"{'ranked by':<{width}}   AUC  interval        found in the first 10 %"]
        for name, area in self.areas.items():
            low, high = self.intervals[name]
            lines.append(f"{name:<{width}}  {area:.3f}  {low:.3f} to {high:.3f}  {self.found(name, 0.1):.0%}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """What is shown, for programs."""
        return {
            name: {
                "value": area,
                "interval": list(self.intervals[name]),
                "found_in_first_tenth": self.found(name, 0.1),
            }
            for name, area in self.areas.items()
        }

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Share of the wrong labels found against share of the data looked at (Koh & Liang 2017, figure 6).

        Returns
        -------
        matplotlib.figure.Figure
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.8, 4.0), layout="constrained")
        axes = figure.subplots()
        looked = np.arange(1, len(self.wrong) + 1) / len(self.wrong)
        for name, values in self.ranked.items():
            order = np.argsort(-values, kind="stable")
            axes.plot(
                looked,
                np.cumsum(self.wrong[order]) / self.wrong.sum(),
                label=f"{name} ({self.areas[name]:.3f})",
            )
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
        axes.set_xlabel("share of the training data looked at")
        axes.set_ylabel("share of the wrong labels found")
        axes.legend(title="ranked by (AUC)", frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def flip_labels(y: Any, fraction: float = 0.1, *, seed: int = 0) -> tuple[Any, np.ndarray]:
    """Labels of which a random share is wrong, and which ones: to plant noise and see whether it is found.

    Parameters
    ----------
    y : array of integers, (M,)
        Tensor or numpy array; classes are the values that occur.
    fraction : float
        Share to be changed, each to another class at random.
    seed : int
        Of the draw.

    Returns
    -------
    array
        Of the kind of ``y``.
    numpy array
        Positions changed, ascending.

    Raises
    ------
    DataError
        Labels that are no integers, or of one class.
    ConfigurationError
        A fraction that is none, or changes nothing.

    Examples
    --------
    >>> labels, wrong = flip_labels(np.array([0, 1, 2, 0, 1, 2, 0, 1]), 0.25)
    >>> len(wrong), bool((labels != [0, 1, 2, 0, 1, 2, 0, 1])[wrong].all())
    (2, True)
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"y must be a vector of integer labels; got {labels.dtype} {labels.shape}")
    classes = np.unique(labels)
    if len(classes) < 2:
        raise DataError("y holds one class; a label cannot be wrong")
    check_number("fraction", fraction)
    check_integer("seed", seed, 0)
    count = round(fraction * len(labels)) if math.isfinite(fraction) else 0
    if not 0 < count <= len(labels):
        raise ConfigurationError(
            f"fraction={fraction!r} of {len(labels)} labels are {count}; give one that changes some"
        )
    random = np.random.default_rng(seed)
    wrong = np.sort(random.choice(len(labels), count, replace=False))
    steps = random.integers(1, len(classes), count)
    changed = labels.copy()
    changed[wrong] = classes[(np.searchsorted(classes, labels[wrong]) + steps) % len(classes)]
    return (torch.from_numpy(changed).to(y.dtype) if isinstance(y, Tensor) else changed), wrong


def mislabel_detection(
    influence: InfluenceFunctionModel,
    train: Any,
    wrong: Sequence[int] | np.ndarray,
    *,
    store: str | PathLike[str] | Location | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Detection:
    """Area under the curve of self influence gⱼᵀ (C + λI)⁻¹ gⱼ, of the loss and of ‖gⱼ‖², for known wrong labels.

    Parameters
    ----------
    influence : InfluenceFunctionModel
        Fitted on ``train``, for a model trained on it, wrong labels included.
    train
        Data as everywhere.
    wrong : sequence of int, or M flags
        Positions of the wrong labels: see :func:`flip_labels`.
    store : path or URL, optional
        Folder in which self influences are written, resumable; default a temporary one. On a cluster
        of several machines it must be one that all of them see.
    confidence, seed : float, int
        Of the bootstrap.

    Returns
    -------
    Detection
        Areas with intervals, and the quantities themselves.

    Raises
    ------
    ConfigurationError
        Positions that are none, or of no or of all training points.
    NotFittedError
        ``influence`` is not fitted.

    Examples
    --------
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import Training, flip_labels, mislabel_detection
    >>> x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> y, wrong = flip_labels((x[:, 0] > 0).long(), 0.1)
    >>> loss = torch.nn.functional.cross_entropy
    >>> model = Training(lambda: torch.nn.Linear(4, 2), loss, steps=300, regularization=0.01)(x, y, seed=0)
    >>> found = mislabel_detection(DirectInfluence(model, loss, 0.01).fit((x, y)), (x, y), wrong)
    >>> found.areas["self influence"] > 0.8
    True
    """
    influence._require_fit()
    check_integer("seed", seed, 0)
    check_confidence(confidence)
    source = as_source(train, "train")
    flags = check_wrong(wrong, len(source))
    plain = GradientDotInfluence(
        influence.model,
        influence.loss,
        1.0,
        parameters=influence.parameters,
        client=influence.client,
        device=influence.device,
        artifacts=influence.artifacts,
        dtype=influence.dtype,
    ).fit(train)
    with nullcontext(store) if store is not None else tempfile.TemporaryDirectory() as folder:
        kept = Location.of(folder)
        ranked = {
            "self influence": _self_influence(influence, kept.child("self-influence"), train),
            "loss": _losses(influence, source),
            "gradient norm": _self_influence(plain, kept.child("gradient-norm"), train),
        }
    areas = {name: statistics.area_under_curve(values, flags) for name, values in ranked.items()}
    intervals = {name: _interval(values, flags, confidence, seed) for name, values in ranked.items()}
    return Detection(areas, intervals, ranked, flags)


def planted_mislabels(
    influence: InfluenceFunctionModel,
    train: Any,
    training: TrainingFunction,
    *,
    fraction: float = 0.1,
    seed: int = 0,
    store: str | PathLike[str] | Location | None = None,
    confidence: float = 0.95,
) -> Detection:
    """:func:`mislabel_detection` of labels that are made wrong, after training again on them.

    Parameters
    ----------
    influence : InfluenceFunctionModel
        Its estimator is fitted again, with the model that ``training`` gives on the changed labels.
    train
        Data as everywhere, with integer labels (M,).
    training : callable
        ``(x, y, seed) → model``: see :class:`~dask_influence.validation.TrainingFunction`; it runs where
        the influence model works.
    fraction : float
        Share of the labels to be changed, as by :func:`flip_labels`.
    seed : int
        Of the labels, of training and of the bootstrap.
    store : path or URL, optional
        Where weights and self influences are kept, below names of their own.
    confidence : float
        Of the bootstrap.

    Returns
    -------
    Detection
        With the labels that were made wrong.

    Raises
    ------
    ConfigurationError
        A fraction that is none; a training function that cannot be called, or makes another model.
    DataError
        Labels that are no integers, or of one class.
    IncompleteRunError
        Training failed.

    Examples
    --------
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import Training, planted_mislabels
    >>> x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    >>> y, loss = (x[:, 0] > 0).long(), torch.nn.functional.cross_entropy
    >>> training = Training(lambda: torch.nn.Linear(4, 2), loss, steps=300, regularization=0.01)
    >>> found = planted_mislabels(DirectInfluence(torch.nn.Linear(4, 2), loss, 0.01), (x, y), training)
    >>> int(found.wrong.sum()), found.areas["self influence"] > 0.8
    (8, True)
    """
    check_training(training)
    check_confidence(confidence)
    source = as_source(train, "train")
    x, y = source.read(0, len(source))
    labels, wrong = flip_labels(y, fraction, seed=seed)
    noisy = as_source((x, labels), "train")
    location = None if store is None else Location.of(store)
    model = trained_on(influence, noisy, training, seed, location)
    fitted = variant(influence, model).fit(noisy)
    kept = None if location is None else location.child("mislabels", name_of(fitted))
    return mislabel_detection(fitted, noisy, wrong, store=kept, confidence=confidence, seed=seed)


def _interval(values: np.ndarray, flags: np.ndarray, confidence: float, seed: int) -> Interval:
    def statistic(drawn: tuple[np.ndarray, ...]) -> float:
        return statistics.area_under_curve(values[drawn[0]], flags[drawn[0]])

    return statistics.bootstrap(statistic, (len(flags),), confidence=confidence, seed=seed)


def check_wrong(wrong: Sequence[int] | np.ndarray, count: int) -> np.ndarray:
    """Flags (M,) of the wrong labels, from their positions or from flags."""
    given = np.asarray(wrong)
    if given.dtype == bool and given.shape == (count,):
        flags = given
    elif (
        given.ndim == 1
        and given.dtype.kind in "iu"
        and len(given)
        and given.min() >= 0
        and given.max() < count
    ):
        flags = np.zeros(count, bool)
        flags[given] = True
    else:
        raise ConfigurationError(
            f"wrong must be positions from 0 to {count - 1}, or {count} flags; got {wrong!r}"
        )
    if not 0 < flags.sum() < count:
        raise ConfigurationError(
            f"wrong names {flags.sum()} of {count} training points; name some, and not all"
        )
    return flags


def _self_influence(influence: InfluenceFunctionModel, store: Location, train: Any) -> np.ndarray:
    influence.influences_to_zarr(store, None, train, reduce=SelfInfluence())
    with open_influences(store) as held:
        return np.asarray(held["self_influence"].to_numpy(), np.float64)


def _losses(influence: InfluenceFunctionModel, source: Source) -> np.ndarray:
    return losses_of(Objective.of(influence.model, influence.loss, dtype=influence.dtype), source)
