"""How a fit goes: read and check, before any task; then the estimator's passes over the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch

from dask_influence.configuration import Configuration
from dask_influence.core.curvature import check_curvature
from dask_influence.core.estimators import Round
from dask_influence.core.layers import layout_of
from dask_influence.core.moments import Moments
from dask_influence.core.problem import Problem, behaviour, prepare
from dask_influence.execution import persistence, tasks
from dask_influence.execution.checkpoints import Checkpoints
from dask_influence.execution.drive import Passes, drive
from dask_influence.execution.forecast import calibrate
from dask_influence.execution.progress import Report, reporting
from dask_influence.execution.resources import Resources
from dask_influence.fitted import Fitted, first_samples
from dask_influence.storage.sources import Source


def fit(
    configuration: Configuration, resources: Resources, source: Source, progress: bool | Report | None = None
) -> Fitted:
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
    shown = behaviour(objective, *sample)
    passes = resources.passes(executor, problem, source)
    kept = None
    if resources.kept is not None:
        identity = _identity(configuration, problem, source, passes, shown)
        kept = Checkpoints(passes, resources.kept.child("rounds"), identity)
    with reporting(progress) as reported:
        rounds = _Counted(kept or passes, reported)
        inverse = drive(estimator.fit(system), rounds)
    counts = {
        "samples": len(source),
        "parameters": system.size,
        "curvature": configuration.curvature,
        "passes": rounds.count,
        "restored": 0 if kept is None else kept.restored,
        "derivatives": report,
    }
    digest = persistence.inverse_digest(inverse)
    if inverse.needs_rounds:  # its factors depend on the data beyond what it holds
        digest = f"{digest}-{source.digest()}"
    with tasks.torch_threads(1):
        speed = calibrate(problem, inverse, *sample)
    return Fitted(configuration, problem, system, inverse, passes, digest, counts, shown, speed)


def _identity(
    configuration: Configuration, problem: Problem, source: Source, passes: Passes, shown: list[str]
) -> str:
    """Digest of all that the bits of a sum over the data depend on, beside what is summed."""
    objective = problem.objective
    depends = {
        "model": persistence.model_digest(objective.module),
        "loss": configuration.described()["loss"],
        "behaviour": shown,
        "parameters": list(objective.names),
        "forms": vars(problem.forms),
        "dtype": str(objective.dtype),
        "device": objective.device.type,
        "data": source.digest(),
        "chunks": [passes.chunks.total, passes.chunks.size],
        "versions": [version("dask_influence"), str(torch.__version__)],
    }
    return hashlib.blake2b(json.dumps(depends, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Counted:
    """Passes that are counted, for the diagnostics of a fit, and reported."""

    def __init__(self, answer: Callable[..., Moments], report: Report) -> None:
        self._answer, self._report, self.count = answer, report, 0

    def __call__(self, request: Round) -> Moments:
        self.count += 1
        report = partial(self._report, f"pass {self.count}")
        return self._answer(request, first=self.count == 1, report=report)
