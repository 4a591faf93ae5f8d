"""Responses: scores against what the fitted parameters do, without training again from the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch

from dask_influence.errors import ConfigurationError
from dask_influence.execution import persistence
from dask_influence.execution.base import Model
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.scalars import check_integer, check_number
from dask_influence.storage.stores import Location
from dask_influence.validation import statistics
from dask_influence.validation.agreement import Agreement
from dask_influence.validation.effects import digest_of
from dask_influence.validation.experiment import Experiment
from dask_influence.validation.proximal import FiniteDifference, ProximalBregman, Response

LEAST = 3
"""Points without which a correlation is none."""

MOST_PARAMETERS = 20_000
"""Up to which the Hessian is formed and factorised: 3.2 GB."""

Progress = bool | Callable[[str, int, int], None] | None


def finite_difference_response(
    influence: InfluenceFunctionModel,
    train: Any,
    test: Any,
    *,
    points: int | Sequence[int] = 50,
    weight: float | None = None,
    tolerance: float = 1e-8,
    seed: int = 0,
    confidence: float = 0.95,
    store: str | PathLike[str] | Location | None = None,
    progress: Progress = None,
) -> Agreement:
    """Pearson correlation, mean over test points, of scores with central differences in a training point's weight.

    For each training point k drawn, the objective

        mean ℓ(θ) − ⟨∇ mean ℓ(θ*), θ⟩ + λ/2 ‖θ − θ*‖² ± w ℓ(z_k; θ)

    is minimised by Newton's method from the fitted parameters θ*, and the test losses at both minima give
    (L(−w) − L(+w)) / 2wM, the effect of removing the point; the prediction is s_ik / M. For w → 0 that is
    the score with the exact Hessian. Where θ* minimises mean ℓ + λ/2 ‖θ‖², the objective is that one, and
    the response what training again would show. Made for losses that are convex in θ, such as heads
    (``parameters=``) over frozen features; elsewhere it holds where H + λI is positive definite at θ*.

    Parameters
    ----------
    influence : InfluenceFunctionModel
        Fitted on ``train``, with one λ.
    train, test
        Data as everywhere; all of ``train`` must fit a worker.
    points : int or sequence of int
        How many training points are weighed, drawn at random, or their positions.
    weight : float, optional
        w; default 1 / M, the weight that a point has.
    tolerance : float
        Of each minimum: its gradient as a share of the gradient of w ℓ(z_k) at θ*, or of that of a typical
        training point where it is larger.
    seed : int
        Of the draw, and of the bootstrap.
    confidence : float
        Of the interval, which is over test points and points weighed.
    store : path or URL, optional
        Where what is measured is kept; the same call goes on where it was.
    progress : bool or callable
        Show a bar, or call it with stage, done, total.

    Returns
    -------
    Agreement
        Effects of removing a point; ``slope`` is 1 where the scores have the right size too.

    Raises
    ------
    ConfigurationError
        Fewer than three points, positions that are none; a λ for each block; numbers out of range; more
        parameters than a dense Hessian allows.
    NotFittedError
        ``influence`` is not fitted.
    IncompleteRunError
        H + λI is not positive definite, or for another reason fewer than three points were measured.

    Warns
    -----
    DataWarning
        Some points could not be measured.

    References
    ----------
    Koh & Liang 2017, section 2.1, of which it is the definition; Cook & Weisberg 1982.

    Examples
    --------
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import finite_difference_response
    >>> random = torch.Generator().manual_seed(0)
    >>> x = torch.randn(40, 3, dtype=torch.float64, generator=random)
    >>> y, loss = (x[:, 0] > 0).long(), torch.nn.functional.cross_entropy
    >>> influence = DirectInfluence(torch.nn.Linear(3, 2).double(), loss, 0.1).fit((x, y))
    >>> found = finite_difference_response(influence, (x, y), (x[:5], y[:5]), points=8, weight=1e-4)
    >>> round(found.value, 6), round(found.slope, 4)
    (1.0, 1.0)
    """
    experiment = Experiment.of(influence, train, test, (0,), seed, confidence, store, progress)
    regularization = _regularization(influence)
    size = influence._require_fit().system.size
    if size > MOST_PARAMETERS:
        raise ConfigurationError(
            f"finite_difference_response factorises the Hessian of up to {MOST_PARAMETERS:,} parameters; the model "
            f"has {size:,} in θ. Name those of its head with parameters=, or take proximal_bregman_response"
        )
    weight = _positive("weight", 1 / experiment.trains if weight is None else weight)
    job = FiniteDifference(
        experiment.train,
        experiment.test,
        *_problem(experiment),
        regularization,
        _positive("tolerance", tolerance),
        weight,
    )
    return _agreement(
        experiment, job, points, "finite-difference response (Pearson)", {"weight": f"{weight:.3g}"}
    )


def proximal_bregman_response(
    influence: InfluenceFunctionModel,
    train: Any,
    test: Any,
    *,
    points: int | Sequence[int] = 50,
    steps: int = 500,
    tolerance: float = 1e-4,
    seed: int = 0,
    confidence: float = 0.95,
    store: str | PathLike[str] | Location | None = None,
    progress: Progress = None,
) -> Agreement:
    """Pearson correlation, mean over test points, of scores with the proximal Bregman response of removing a point.

    For each training point k drawn, the proximal Bregman objective

        1/M Σ_j [ℓ(f_j) − ℓ(f*_j) − ⟨∇_f ℓ(f*_j), f_j − f*_j⟩] + λ/2 ‖θ − θ*‖² − 1/M ℓ(z_k; θ),

    with f the outputs and a star at the fitted parameters, is minimised from θ*, and the change of the
    test losses compared with s_ik / M. This, not training again from another start, is what scores of
    networks approximate (Bae et al. 2022): it does not ask that θ* be a minimum, nor how training would go.
    Its linearisation is gᵀ (G + λI)⁻¹ g with the Gauss-Newton matrix G: ``curvature="ggn"``.

    Parameters
    ----------
    influence, train, test, points, seed, confidence, store, progress
        As for :func:`finite_difference_response`; λ must be > 0.
    steps : int
        Most steps of L-BFGS, each one or more passes over all of ``train``; dozens do where the model has
        at most 5,000 parameters, whose curvature is then used to choose coordinates.
    tolerance : float
        As there, below about 1e-5 rounding may be in the way; also where ten steps bring less than a
        hundredth of it of all that was gained, as at a kink of relu.

    Returns
    -------
    Agreement
        Effects of removing a point.

    Raises
    ------
    ConfigurationError
        λ = 0; see also :func:`finite_difference_response`.
    NotFittedError
        ``influence`` is not fitted.
    IncompleteRunError
        Fewer than three minima were found.

    Warns
    -----
    DataWarning
        Of some points the minimum was not found in ``steps``.

    References
    ----------
    Bae, Ng, Lo, Ghassemi & Grosse 2022, "If Influence Functions are the Answer, Then What is the
    Question?", section 4.

    Examples
    --------
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import proximal_bregman_response
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(40, 3, dtype=torch.float64)
    >>> y, loss = x[:, :1] * x[:, 1:2], torch.nn.functional.mse_loss
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    >>> influence = DirectInfluence(net, loss, 0.5, curvature="ggn").fit((x, y))
    >>> found = proximal_bregman_response(influence, (x, y), (x[:5], y[:5]), points=8)
    >>> found.value > 0.9
    True
    """
    experiment = Experiment.of(influence, train, test, (0,), seed, confidence, store, progress)
    regularization = _regularization(influence, positive=True)
    job = ProximalBregman(
        experiment.train,
        experiment.test,
        *_problem(experiment),
        regularization,
        _positive("tolerance", tolerance),
        check_integer("steps", steps),
    )
    return _agreement(experiment, job, points, "proximal Bregman response (Pearson)", {"λ": regularization})


def _agreement(
    experiment: Experiment,
    job: Response,
    points: int | Sequence[int],
    name: str,
    settings: Mapping[str, Any],
) -> Agreement:
    chosen = experiment.picked(points, least=LEAST)
    found = experiment.measured(job, [np.array([j]) for j in chosen], LEAST)
    predicted = experiment.scores(chosen[list(found.subsets)]) / experiment.trains
    actual = found.losses[:, 0].T  # (N, points)
    rows = statistics.pearson(predicted, actual)
    value = statistics.mean(rows)
    return Agreement(
        name,
        value,
        experiment.interval(statistics.resampled_pearson(predicted, actual), predicted.shape, value),
        rows,
        predicted,
        actual,
        slope=statistics.slope(predicted, actual),
        noise=found.noise,
        failures=found.failures,
        seconds=found.seconds,
        settings={"points": len(chosen), **settings, "confidence": experiment.confidence},
    )


def _problem(experiment: Experiment) -> tuple[Model, str]:
    """The fitted problem in float64, as tasks can carry it, and what names it."""
    fitted = experiment.influence._require_fit()
    objective = fitted.problem.objective
    exact = replace(fitted.problem, objective=objective.to("cpu", torch.float64))
    model = experiment.executor.model(exact, "cpu")
    return model, digest_of(
        fitted.content.digest, persistence.model_digest(objective.module), objective.names
    )


def _regularization(influence: InfluenceFunctionModel, *, positive: bool = False) -> float:
    """λ, one number."""
    value = influence.hessian_regularization
    if isinstance(value, Mapping):
        raise ConfigurationError(
            "a response takes one λ; the model has one for each block. Give hessian_regularization as a number"
        )
    if positive and not value > 0:
        raise ConfigurationError(
            f"the proximal Bregman objective takes hessian_regularization > 0, which keeps θ near; got {value!r}"
        )
    return float(value)


def _positive(name: str, value: object) -> float:
    check_number(name, value)
    number = float(value)  # type: ignore[arg-type]
    if not 0 < number < float("inf"):
        raise ConfigurationError(f"{name} must be > 0 and finite; got {value!r}")
    return number
