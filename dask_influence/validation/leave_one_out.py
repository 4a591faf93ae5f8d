"""Leave-one-out: predicted against actual change of the test losses when one training point is missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import numpy as np

from dask_influence.influence import InfluenceFunctionModel
from dask_influence.storage.stores import Location
from dask_influence.validation import statistics
from dask_influence.validation.agreement import Agreement
from dask_influence.validation.experiment import Experiment, check_training
from dask_influence.validation.training import TrainingFunction

LEAST = 3
"""Points without which a correlation is none."""


def leave_one_out(
    influence: InfluenceFunctionModel,
    train: Any,
    test: Any,
    training: TrainingFunction,
    *,
    points: int | Sequence[int] = 50,
    seeds: Sequence[int] = (0,),
    seed: int = 0,
    confidence: float = 0.95,
    store: str | PathLike[str] | Location | None = None,
    progress: bool | Callable[[str, int, int], None] | None = None,
) -> Agreement:
    """Pearson correlation, mean over test points, of predicted with actual change of the test loss.

    Leaving training point j out changes the loss of test point i by about s_ij / M, with the scores s
    of ``mode="up"`` and M training points; the actual change is that of the mean loss over ``seeds``
    (Koh & Liang 2017, section 4.2 and figure 2).

    Parameters
    ----------
    influence : InfluenceFunctionModel
        Fitted on ``train``, for a model trained by ``training``.
    train, test
        Data as everywhere; ``training`` gets all of ``train`` as tensors, so it must fit a worker.
    training : callable
        ``(x, y, seed) → model``: see :class:`~dask_influence.validation.TrainingFunction`.
    points : int or sequence of int
        How many training points are left out, drawn at random, or their positions.
    seeds : sequence of int
        Seeds that each model is trained from.
    seed : int
        Of the draw, and of the bootstrap.
    confidence : float
        Of the interval, which is over test points and points left out.
    store : path or URL, optional
        Where losses after training are kept; the same call goes on where it was.
    progress : bool or callable
        Show a bar, or call it with stage, done, total.

    Returns
    -------
    Agreement
        With the slope of actual on predicted changes.

    Raises
    ------
    ConfigurationError
        Fewer than three points; positions or seeds that are none; a training function that cannot be called.
    NotFittedError
        ``influence`` is not fitted.
    IncompleteRunError
        Training failed on so many subsets that fewer than three points are left.

    Warns
    -----
    DataWarning
        Training failed on some subset, or is not deterministic.

    Examples
    --------
    >>> import torch
    >>> from functools import partial
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import Training, leave_one_out
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at ...>
    >>> x, noise = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 1, dtype=torch.float64)
    >>> y = x.sum(1, keepdim=True) + noise
    >>> train, test = (x[:40], y[:40]), (x[40:], y[40:])
    >>> loss = torch.nn.functional.mse_loss
    >>> exactly = {"max_iter": 200, "tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    >>> optimizer = partial(torch.optim.LBFGS, **exactly)
    >>> training = Training(lambda: torch.nn.Linear(3, 1).double(), loss, optimizer, steps=2, regularization=0.01)
    >>> influence = DirectInfluence(training(*train, seed=0), loss, 0.01).fit(train)
    >>> found = leave_one_out(influence, train, test, training, points=10)
    >>> found.value > 0.99
    True
    """
    check_training(training)
    experiment = Experiment.of(influence, train, test, seeds, seed, confidence, store, progress)
    left_out = experiment.picked(points, least=LEAST)
    everything = np.arange(experiment.trains)
    subsets = [everything, *(np.delete(everything, j) for j in left_out)]
    found = experiment.retrained(training, subsets, least=1 + LEAST, needed=(0,))
    losses = found.losses.mean(1)  # (1 + points, N)
    kept = left_out[np.array(found.subsets[1:]) - 1]
    actual = (losses[1:] - losses[0]).T
    predicted = experiment.scores(kept) / experiment.trains
    rows = statistics.pearson(predicted, actual)
    value = statistics.mean(rows)
    interval = experiment.interval(statistics.resampled_pearson(predicted, actual), predicted.shape, value)
    return Agreement(
        "leave-one-out Pearson correlation",
        value,
        interval,
        rows,
        predicted,
        actual,
        ceiling=experiment.ceiling(statistics.pearson, (found.losses[1:] - found.losses[:1])),
        slope=statistics.slope(predicted, actual),
        noise=found.noise,
        failures=found.failures,
        seconds=found.seconds,
        settings={"points left out": len(left_out), "seeds": experiment.seeds, "confidence": confidence},
    )
