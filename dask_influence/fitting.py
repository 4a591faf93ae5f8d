"""How a fit goes: read and check, before any task; then the estimator's passes over the data."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from dask_influence.configuration import Configuration
from dask_influence.core.content import Content, contents
from dask_influence.core.curvature import check_curvature
from dask_influence.core.estimators import Inverse, Round, Solution, System
from dask_influence.core.factoring import PROBES
from dask_influence.core.layers import layout_of
from dask_influence.core.moments import Moments
from dask_influence.core.pairs import Form, paired
from dask_influence.core.precision import matmul_precision, spacing
from dask_influence.core.problem import Problem, behaviour, prepare
from dask_influence.errors import NotFittedError
from dask_influence.execution import persistence, tasks
from dask_influence.execution.base import Executor
from dask_influence.execution.checkpoints import Checkpoints
from dask_influence.execution.drive import Passes, drive
from dask_influence.execution.forecast import Speed, calibrate
from dask_influence.execution.job import Job, computing
from dask_influence.execution.options import Options
from dask_influence.execution.progress import Report, check_progress, reporting
from dask_influence.execution.resources import Resources
from dask_influence.execution.shipping import Held
from dask_influence.fitted import SAMPLES_CHECKED, Fitted, first_samples, probes, with_last
from dask_influence.storage.sources import ArraySource, Source


@dataclass(frozen=True)
class _Checked:
    """What is known before the first pass: the samples looked at, and what they showed."""

    sample: tuple[Any, Any]
    system: System
    problem: Problem
    report: dict[str, Any]
    behaviour: list[str]
    content: Content

    @classmethod
    def of(cls, configuration: Configuration, resources: Resources, source: Source) -> _Checked:
        """Read a few samples, and refuse what cannot be fitted; products are full ones, whatever is asked for."""
        with matmul_precision("highest"):
            return cls._of(configuration, resources, source)

    @classmethod
    def _of(cls, configuration: Configuration, resources: Resources, source: Source) -> _Checked:
        objective = configuration.objective(resources.torch_device)
        fresh = contents(objective.module, objective.loss)
        sample = first_samples(objective, source, "train")
        system = configuration.system(objective, len(source), layout_of(objective))
        estimator = configuration.estimator
        estimator.validate(system)
        problem, report = prepare(objective, *sample)
        check_curvature(problem, *sample, configuration.curvature)
        pairing = estimator.form(system) is not None or estimator.directions(system) is not None
        spread = with_last(objective, source, sample) if pairing or estimator.by_layers else sample
        estimator.examine(system, problem, *spread)
        if pairing:
            problem, report["pairs"] = paired(problem, *spread)
        called = contents(objective.module, objective.loss)
        shown = behaviour(objective, *sample)
        content = Content.of(fresh, called, contents(objective.module, objective.loss))
        return cls(sample, system, problem, report, shown, content)

    def speed(self, inverse: Inverse) -> Speed:
        """Of one core of this machine."""
        with computing(Held(self.problem), 1):
            return calibrate(self.problem, *self.sample, solved=not inverse.needs_rounds)


def fit(
    configuration: Configuration, resources: Resources, source: Source, progress: bool | Report | None = None
) -> Fitted:
    """Estimate the curvature of the mean loss over ``source``."""
    check_progress(progress)
    executor = resources.executor()
    options = resources.options(
        compiled=configuration.compile, matmul_precision=configuration.matmul_precision
    )
    executor.check_options(options)
    known = _Checked.of(configuration, resources, source)
    problem, told = _with_options(options, configuration, resources, executor, source, known.problem)
    passes = resources.passes(executor, problem, source)
    kept, answering = None, passes.keeping()
    if resources.kept is not None:
        kept = Checkpoints(
            answering, resources.kept.child("rounds"), _identity(known, problem, source, passes)
        )
    with reporting(progress) as reported:
        rounds = _Counted(kept or answering, reported)
        rounded = spacing(configuration.matmul_precision)
        system = replace(known.system, pass_cost=resources.pass_cost(problem), rounded=rounded)
        inverse = drive(configuration.estimator.fit(system), rounds)
        tolerance = configuration.estimator.tolerance
        if tolerance is not None:
            samples = probes(known.problem.objective, source, PROBES)
            with computing(Held(known.problem), resources.threads(known.problem)):
                inverse = inverse.approximated(known.problem, *samples, tolerance)
    counts = {
        "samples": len(source),
        "parameters": known.system.size,
        "curvature": configuration.curvature,
        "passes": rounds.count,
        "restored": 0 if kept is None else kept.restored,
        "derivatives": known.report,
        **told,
    }
    named = None
    if inverse.needs_rounds:  # its factors depend on the data beyond what it holds
        named = f"{persistence.inverse_digest(inverse)}-{source.digest()}"
    return _fitted(configuration, known, problem, inverse, passes, named, counts)


def _with_options(
    options: Options,
    configuration: Configuration,
    resources: Resources,
    executor: Executor,
    source: Source,
    problem: Problem,
) -> tuple[Problem, dict[str, Any]]:
    """The problem with the options that were asked for, and what they cost on a few samples.

    A process that runs tasks finds out: this one need not have what they need.
    """
    if not (options.compile or options.matmul_precision != "highest"):
        return problem, {}
    few = ArraySource(*source.read(0, min(SAMPLES_CHECKED, len(source))), argument=source.argument)
    job = Job(
        executor.model(problem, resources.device),
        executor.reachable(few, len(few)),
        source.argument,
        resources.threads(problem),
    )
    (found,) = executor.map(tasks.try_options, [(executor.seal(job), options, configuration.curvature)])
    regularization = configuration.hessian_regularization
    least = min(regularization.values()) if isinstance(regularization, Mapping) else regularization
    found.warn(least, inverts_products=configuration.own.inverts_products)
    return found.applied(problem, options), found.report(options)


def foreseen(configuration: Configuration, resources: Resources, source: Source) -> Fitted:
    """What :func:`fit` would leave, as far as a plan depends on it: sizes, and the speed of this machine.

    The data of a few samples are read, and derivatives checked on them; no pass is made.
    """
    known, estimator = _Checked.of(configuration, resources, source), configuration.estimator
    inverse = _Foreseen(
        known.system,
        estimator.directions(known.system),
        estimator.form(known.system),
        estimator.solves_by_rounds,
        estimator.certifies_by_rounds,
    )
    counts = {"derivatives": known.report}
    return _fitted(configuration, known, known.problem, inverse, None, "", counts)


def _fitted(
    configuration: Configuration,
    known: _Checked,
    problem: Problem,
    inverse: Inverse,
    passes: Passes | None,
    named: str | None,
    counts: dict[str, Any],
) -> Fitted:
    return Fitted(
        configuration,
        problem,
        known.system,
        inverse,
        passes,
        named,
        counts,
        known.behaviour,
        known.content,
        known.speed(inverse),
    )


class _Foreseen(Inverse):
    """An inverse that is not there yet: what is known of its directions, and zero for every factor."""

    def __init__(
        self,
        system: System,
        rank: int | None,
        form: Form | None,
        solves_by_rounds: bool,
        certifies_by_rounds: bool,
    ) -> None:
        self.regularization, self._rank, self._size = system.regularization, rank, system.size
        self._form, self._certifies = form, certifies_by_rounds
        self.needs_rounds = solves_by_rounds  # type: ignore[misc]

    @property
    def residuals_need_rounds(self) -> bool:
        return self._certifies

    @property
    def directions(self) -> Tensor | None:
        return None if self._rank is None else torch.empty(self._rank, self._size, device="meta")

    @property
    def form(self) -> Form | None:
        return self._form

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        return Solution(torch.zeros_like(gradients))
        yield  # a generator that asks for no pass

    def with_regularization(self, regularization: float) -> _Foreseen:
        other = copy.copy(self)
        other.regularization = regularization
        return other

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        raise NotFittedError("a plan made before the fit has no inverse; call .fit(train) first")

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> _Foreseen:
        raise NotFittedError("a plan made before the fit is never saved; call .fit(train) first")


def _identity(known: _Checked, problem: Problem, source: Source, passes: Passes) -> str:
    """Digest of all that the bits of a sum over the data depend on, beside what is summed."""
    objective = problem.objective
    depends = {
        "model": persistence.model_digest(objective.module),
        "content": known.content.digest,
        "behaviour": known.behaviour,
        "parameters": list(objective.names),
        "forms": vars(problem.forms),
        "matmul_precision": problem.matmul_precision,
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
