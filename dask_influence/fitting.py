"""How a fit goes: read and check, before any task; then the estimator's passes over the data."""

from __future__ import annotations

from dask_influence.configuration import Configuration
from dask_influence.core.curvature import check_curvature
from dask_influence.core.estimators import Round
from dask_influence.core.layers import layout_of
from dask_influence.core.moments import Moments
from dask_influence.core.problem import behaviour, prepare
from dask_influence.execution import persistence
from dask_influence.execution.drive import Passes, drive
from dask_influence.execution.resources import Resources
from dask_influence.fitted import Fitted, first_samples
from dask_influence.storage.sources import Source


def fit(configuration: Configuration, resources: Resources, source: Source) -> Fitted:
    """Estimate the curvature of the mean loss over ``source``."""
    executor = resources.executor()
    objective = configuration.objective(resources.torch_device)
    sample = first_samples(objective, source, "train")
    system = configuration.system(objective, len(source), layout_of(objective))
    estimator = configuration.estimator
    estimator.validate(system)
    problem, report = prepare(objective, *sample)
    check_curvature(problem, *sample, configuration.curvature)
    estimator.examine(system, problem, *sample)
    passes = _Counted(resources.passes(executor, problem, source))
    inverse = drive(estimator.fit(system), passes)
    counts = {
        "samples": len(source),
        "parameters": system.size,
        "curvature": configuration.curvature,
        "passes": passes.count,
        "derivatives": report,
    }
    digest = persistence.inverse_digest(inverse)
    if inverse.needs_rounds:  # its factors depend on the data beyond what it holds
        digest = f"{digest}-{source.digest()}"
    shown = behaviour(objective, *sample)
    return Fitted(configuration, problem, system, inverse, passes.answer, digest, counts, shown)


class _Counted:
    """Passes that are counted, for the diagnostics of a fit."""

    def __init__(self, answer: Passes) -> None:
        self.answer, self.count = answer, 0

    def __call__(self, request: Round) -> Moments:
        self.count += 1
        return self.answer(request, first=self.count == 1)
