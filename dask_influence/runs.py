"""Runs to a store: each kind checked and planned in full before the first object is written.

A kind of run is a function here that makes a :class:`Run`: what it writes (arrays), in which
pieces (ledger entries), and how. All else (resuming, refusing, publishing) is the same for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from dask_influence import arguments, settings
from dask_influence.arguments import InfluenceMode
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError
from dask_influence.execution.base import Executor
from dask_influence.execution.missing import check_on_missing
from dask_influence.execution.output import Output
from dask_influence.execution.pieces import factor_names, score_names
from dask_influence.execution.plan import Plan
from dask_influence.execution.progress import Report, check_progress
from dask_influence.execution.reduce import Reduced, write_reduced
from dask_influence.execution.reducer import Reduction, Scores
from dask_influence.execution.resources import Resources
from dask_influence.execution.run import Fit, factor_templates, score_templates, write_factors, write_scores
from dask_influence.execution.stored import StoredFactors
from dask_influence.fitted import Fitted
from dask_influence.scalars import check_flag
from dask_influence.storage.results import ArrayTemplate, open_influences
from dask_influence.storage.sources import Source, as_source
from dask_influence.storage.stores import Location

Progress = bool | Report | None
"""``progress=``: True shows bars, a callable gets (stage, done, total)."""


@dataclass(frozen=True)
class Target:
    """Where a run writes, and within which limits.

    Attributes
    ----------
    location : Location
        The store.
    resources : Resources
        What does the work.
    executor : Executor
        Its cluster, or this process.
    memory_limit : int, optional
        Bytes that one task may hold; by default what the workers have.
    progress : bool or callable, optional
        Who is told.
    """

    location: Location
    resources: Resources
    executor: Executor
    memory_limit: int | None = None
    progress: Progress = None

    def __post_init__(self) -> None:
        check_progress(self.progress)

    def fitting(self, plan: Plan) -> Plan:
        """``plan``, refused where it takes more memory than there is."""
        return plan.validate(self.executor.memory_limit if self.memory_limit is None else self.memory_limit)

    def output(
        self,
        fitted: Fitted,
        kind: str,
        ids: dict[str, np.ndarray[Any, Any]],
        data: Mapping[str, str],
        **asked: Any,
    ) -> Output:
        """The store as one run sees it: fingerprint, provenance and coordinates.

        ``data`` are digests by side; ``asked`` is what else the numbers depend on, and is shown
        to readers too.
        """
        identity = fitted.identity()
        fingerprint = {
            **identity,
            "kind": kind,
            **asked,
            **data,
            **arguments.id_digests(ids),
        }
        attributes = {**fitted.provenance(identity), **asked}
        return Output(self.location, fingerprint, attributes, ids, diagnostics=fitted.recorded_diagnostics)


@dataclass(frozen=True)
class Run:
    """A run of which everything has been checked and nothing written.

    Attributes
    ----------
    target, output : Target, Output
        Where, and under which fingerprint.
    fitted, problem : Fitted, Problem
        The fit, and the problem with the derivatives that this run takes.
    plan : Plan
        How it is cut, unless the store was begun under another plan.
    templates : mapping
        Arrays that it writes.
    pieces : callable
        Ledger entries of a plan that make it complete.
    write : callable
        ``write(executor, fit, plan)`` does what the ledger does not list.
    """

    target: Target
    output: Output
    fitted: Fitted
    problem: Problem
    plan: Plan
    templates: Mapping[str, ArrayTemplate]
    pieces: Callable[[Plan], set[str]]
    write: Callable[[Executor, Fit, Plan], None]

    def carry_out(self, *, resume: bool, overwrite: bool, repair: bool, on_missing: str) -> xr.Dataset:
        """Begin or continue the store, do what is missing (and with ``repair`` what is damaged) and open it."""
        check_on_missing(on_missing)
        for name, flag in {"resume": resume, "overwrite": overwrite, "repair": repair}.items():
            check_flag(name, flag)
        self.target.executor.check_reach(self.target.location)
        plan, complete = self.output.prepare(
            self.plan,
            self.templates,
            self.pieces,
            resume=resume,
            overwrite=overwrite,
            repair=self.target.executor if repair else None,
        )
        if not complete:
            executor = self.target.executor.at(self.output.artifacts)
            self.write(executor, self.fitted.shipped(self.target.resources, executor, self.problem), plan)
        if on_missing == "raise":
            self.output.missing.refuse(self.target.location)
        return open_influences(self.target.location)


def score_run(
    target: Target,
    fitted: Fitted,
    test: Source | StoredFactors | None,
    train: Source,
    mode: InfluenceMode,
    reduction: Reduction | None,
    *,
    test_ids: Any = None,
    train_ids: Any = None,
    tile_bytes: int | None = None,
) -> Run:
    """Scores (N, M, *features) or what ``reduction`` keeps of them, from test data or from factors in a store."""
    ids = _ids(fitted, test, train, test_ids, train_ids)
    reduced = _reduced(fitted, test, train, mode, reduction, ids)
    limits = {
        "tile_bytes": tile_bytes,
        "memory_limit": target.memory_limit,
        "one_by_one": target.resources.one_by_one(fitted.problem),
        "certify": target.resources.certify,
    }
    plan = target.fitting(_plan(fitted, test, train, mode, reduced, **limits))
    digests = {"train": train.digest()} if test is None else {"test": test.digest(), "train": train.digest()}
    asked = {} if reduction is None else {"reduce": reduction.identity()}
    output = target.output(fitted, "scores", ids, digests, mode=mode.value, **asked)
    output = dataclasses.replace(output, names=ids, solves=isinstance(test, Source))
    if isinstance(test, Source):
        fitted.sound_samples(test, "test", target.resources, target.executor)
    sound = fitted.sound_samples(train, "train", target.resources, target.executor, mode)
    if reduced is None:
        features = tuple(f"feature_{axis}" for axis in range(len(plan.work.features)))
        templates = score_templates(plan, fitted.score_dtype, features)
    else:
        templates = reduced.templates(plan)
        output = dataclasses.replace(output, ids=_used({**ids, **reduced.coordinates}, templates))

    def write(executor: Executor, fit: Fit, plan: Plan) -> None:
        _writer(reduced)(
            executor,
            fit,
            test,
            train,
            output,
            plan,
            project=plan.projects,
            perturbation=mode is InfluenceMode.Perturbation,
            progress=target.progress,
        )

    pieces = partial(score_names, solves=output.solves)
    return Run(target, output, fitted, fitted.problem_of(mode, train, sound), plan, templates, pieces, write)


def score_plan(
    fitted: Fitted,
    test: Source | StoredFactors | None,
    train: Source,
    mode: InfluenceMode,
    reduction: Reduction | None,
    **limits: Any,
) -> Plan:
    """How :func:`score_run` would cut the work."""
    ids = _ids(fitted, test, train, None, None)
    return _plan(fitted, test, train, mode, _reduced(fitted, test, train, mode, reduction, ids), **limits)


def test_side(
    test: Any, train: Source, reduction: Reduction | None, storage_options: Mapping[str, Any] | None
) -> Source | StoredFactors | None:
    """Test data or factors in a store; None where the training points are scored on themselves.

    Raises
    ------
    ConfigurationError
        There are test data where none are used.
    """
    if reduction is None or not reduction.diagonal:
        return StoredFactors.found(test, storage_options) or as_source(test, "test", storage_options)
    if test is None or as_source(test, "test", storage_options).digest() == train.digest():
        return None
    raise ConfigurationError(
        f"reduce={reduction!r} scores each training point on itself, and test holds other data; give test=None"
    )


def _plan(
    fitted: Fitted,
    test: Source | StoredFactors | None,
    train: Source,
    mode: InfluenceMode,
    reduced: Reduced | None,
    **limits: Any,
) -> Plan:
    kept = None if reduced is None else reduced.kept
    if limits.get("tile_bytes") is None:
        limits["tile_bytes"] = settings.nbytes("tile.target-bytes")
    project = False if isinstance(test, StoredFactors) else None
    return fitted.plan(test, train, mode, project=project, kept=kept, **limits)


def _reduced(
    fitted: Fitted,
    test: Source | StoredFactors | None,
    train: Source,
    mode: InfluenceMode,
    reduction: Reduction | None,
    ids: Mapping[str, np.ndarray[Any, Any]],
) -> Reduced | None:
    """The reduction bound to these scores, or its refusal."""
    if reduction is None:
        return None
    perturbation = mode is InfluenceMode.Perturbation
    features = arguments.features(train) if perturbation else ()
    tests = 0 if test is None else len(test)
    scores = Scores(tests, len(train), features, perturbation, fitted.score_dtype, ids)
    return Reduced.of(reduction, scores)


def _writer(reduced: Reduced | None) -> Callable[..., None]:
    """What writes scores, or what is kept of them."""
    return write_scores if reduced is None else partial(write_reduced, reduced)


def _used(
    ids: Mapping[str, np.ndarray[Any, Any]], templates: Mapping[str, ArrayTemplate]
) -> dict[str, np.ndarray[Any, Any]]:
    """Coordinates of dimensions that some array has."""
    dims = {dim for template in templates.values() for dim in template.dims}
    return {name: values for name, values in ids.items() if name in dims}


def factor_run(target: Target, fitted: Fitted, test: Source, *, test_ids: Any = None) -> Run:
    """Influence factors (N, P) of test data."""
    plan = target.fitting(
        fitted.plan(
            test,
            test,
            InfluenceMode.Up,
            project=False,
            certify=target.resources.certify,
            memory_limit=target.memory_limit,
        )
    )
    ids = {"test": arguments.ids(test_ids, test, "test_ids")}
    output = target.output(fitted, "factors", ids, {"test": test.digest()})
    fitted.sound_samples(test, "test", target.resources, target.executor)

    def write(executor: Executor, fit: Fit, plan: Plan) -> None:
        write_factors(executor, fit, test, output, plan, target.progress)

    return Run(
        target,
        output,
        fitted,
        fitted.problem,
        plan,
        factor_templates(plan, fitted.score_dtype),
        factor_names,
        write,
    )


def _ids(
    fitted: Fitted, test: Source | StoredFactors | None, train: Source, test_ids: Any, train_ids: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """Coordinates by dimension: those given, those of factors in a store, or positions."""
    ids = {}
    if test is not None:
        ids["test"] = arguments.ids(test_ids, test, "test_ids")
    elif test_ids is not None:
        raise ConfigurationError("test_ids names points that are not scored; leave it out")
    ids["train"] = arguments.ids(train_ids, train, "train_ids")
    if fitted.sweep is not None:
        ids["regularization"] = np.array(fitted.sweep)
    if isinstance(test, StoredFactors):
        _check_held(test, fitted)
        if test_ids is None:
            ids["test"] = test.ids
    return ids


def _check_held(held: StoredFactors, fitted: Fitted) -> None:
    """Refuse factors of another fit, or of fewer λ than are asked for."""
    if fitted.sweep is not None:
        raise ConfigurationError(
            f"hessian_regularization={fitted.sweep} needs test data: {held.location.url} holds factors of one λ"
        )
    held.check(fitted.identity())
