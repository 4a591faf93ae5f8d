"""Linear datamodeling score: whether scores add up to the effect of training on random subsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from dask_influence.errors import ConfigurationError
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.scalars import check_integer, check_number
from dask_influence.storage.stores import Location
from dask_influence.validation import statistics
from dask_influence.validation.agreement import Agreement
from dask_influence.validation.experiment import Experiment, check_training
from dask_influence.validation.training import TrainingFunction

LEAST = 10
"""Subsets without which a rank correlation has no interval to speak of."""


def linear_datamodeling_score(
    influence: InfluenceFunctionModel,
    train: Any,
    test: Any,
    training: TrainingFunction,
    *,
    subsets: int = 50,
    fraction: float = 0.5,
    seeds: Sequence[int] = (0, 1, 2),
    seed: int = 0,
    confidence: float = 0.95,
    store: str | PathLike[str] | Location | None = None,
    progress: bool | Callable[[str, int, int], None] | None = None,
) -> Agreement:
    """Spearman correlation, mean over test points, of summed scores with minus the loss after training.

    For random subsets A of the training data the prediction for test point i is Σ_{j∈A} s_ij, and the
    actual effect minus its loss after training on A, averaged over ``seeds`` (Park et al. 2023, TRAK,
    definition 2.3).

    Parameters
    ----------
    influence, train, test, training, seed, confidence, store, progress
        As for :func:`~dask_influence.validation.leave_one_out`.
    subsets : int
        How many, at least 10.
    fraction : float
        Share of the training data in each, between 0 and 1.
    seeds : sequence of int
        Seeds that each model is trained from: with two or more, ``ceiling`` says how far noise of
        training lets any score get.

    Returns
    -------
    Agreement
        Of summed scores with minus the losses.

    Raises
    ------
    ConfigurationError
        Fewer than ten subsets; a fraction that leaves none or all of the data; see also
        :func:`~dask_influence.validation.leave_one_out`.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import Training, linear_datamodeling_score
    >>> random = torch.Generator().manual_seed(0)
    >>> x, noise = (torch.randn(60, n, dtype=torch.float64, generator=random) for n in (3, 1))
    >>> train, loss = (x, x[:, :1] + noise), torch.nn.functional.mse_loss
    >>> optimizer = partial(torch.optim.LBFGS, max_iter=50, line_search_fn="strong_wolfe")
    >>> training = Training(lambda: torch.nn.Linear(3, 1).double(), loss, optimizer, steps=2, regularization=0.01)
    >>> influence = DirectInfluence(training(*train, seed=0), loss, 0.01).fit(train)
    >>> found = linear_datamodeling_score(influence, train, (x[::9], train[1][::9]), training, subsets=20)
    >>> found.value > 0.8
    True
    """
    check_integer("subsets", subsets, LEAST)
    check_number("fraction", fraction)
    check_training(training)
    experiment = Experiment.of(influence, train, test, seeds, seed, confidence, store, progress)
    size = int(fraction * experiment.trains) if math.isfinite(fraction) else 0
    if not 0 < size < experiment.trains:
        raise ConfigurationError(
            f"fraction={fraction!r} of {experiment.trains} training points are {size}; "
            "a subset must hold some of them, and not all"
        )
    random = np.random.default_rng(seed)
    members = [np.sort(random.permutation(experiment.trains)[:size]) for _ in range(subsets)]
    found = experiment.retrained(training, members, least=LEAST)
    actual = -found.losses.mean(1).T  # (N, S)
    scores = experiment.scores(np.arange(experiment.trains))
    predicted = np.stack([scores[:, members[n]].sum(1) for n in found.subsets], axis=1)
    rows = statistics.spearman(predicted, actual)
    value = statistics.mean(rows)
    return Agreement(
        "linear datamodeling score (Spearman)",
        value,
        experiment.interval(statistics.resampled_spearman(predicted, actual), predicted.shape, value),
        rows,
        predicted,
        actual,
        ceiling=experiment.ceiling(statistics.spearman, found.losses),
        noise=found.noise,
        failures=found.failures,
        seconds=found.seconds,
        settings={
            "subsets": subsets,
            "fraction": fraction,
            "seeds": experiment.seeds,
            "confidence": confidence,
        },
    )
