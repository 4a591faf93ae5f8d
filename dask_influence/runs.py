"""Runs to a store: each kind checked and planned in full before the first object is written.

A kind of run is a function here that makes a :class:`Run`: what it writes (arrays), in which
pieces (ledger entries), and how. All else (resuming, refusing, publishing) is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dask_influence import arguments
from dask_influence.arguments import InfluenceMode
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError
from dask_influence.execution.base import Executor
from dask_influence.execution.missing import check_on_missing
from dask_influence.execution.plan import Plan, factor_names, strip_names
from dask_influence.execution.progress import Report
from dask_influence.execution.resources import Resources
from dask_influence.execution.run import (
    Fit,
    Output,
    StoredFactors,
    factor_templates,
    score_templates,
    write_factors,
    write_scores,
)
from dask_influence.fitted import Fitted
from dask_influence.storage.results import ArrayTemplate, open_influences
from dask_influence.storage.sources import Source
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

    def fitting(self, plan: Plan) -> Plan:
        """``plan``, refused where it takes more memory than there is."""
        return plan.validate(self.memory_limit or self.executor.memory_limit)

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
        fingerprint = {
            **fitted.identity(),
            "kind": kind,
            **asked,
            **data,
            **arguments.id_digests(ids),
        }
        return Output(self.location, fingerprint, {**fitted.provenance(), **asked}, ids)


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
    test: Source | StoredFactors,
    train: Source,
    mode: InfluenceMode,
    *,
    test_ids: Any = None,
    train_ids: Any = None,
    tile_bytes: int | None = None,
) -> Run:
    """Scores (N, M, *features), from test data or from factors in a store."""
    held = test if isinstance(test, StoredFactors) else None
    project = fitted.projects and held is None
    plan = target.fitting(
        fitted.plan(
            test, train, mode, project=project, tile_bytes=tile_bytes, memory_limit=target.memory_limit
        )
    )
    ids = {
        "test": arguments.ids(test_ids, test, "test_ids"),
        "train": arguments.ids(train_ids, train, "train_ids"),
    }
    if fitted.sweep is not None:
        ids["regularization"] = np.array(fitted.sweep)
    if held is not None:
        _check_held(held, fitted)
        if test_ids is None:
            ids["test"] = held.ids
    digests = {"test": test.digest(), "train": train.digest()}
    output = target.output(fitted, "scores", ids, digests, mode=mode.value)
    features = tuple(f"feature_{axis}" for axis in range(len(plan.work.features)))
    if isinstance(test, Source):
        fitted.check_query(test, "test")
    fitted.check_query(train, "train")

    def write(executor: Executor, fit: Fit, plan: Plan) -> None:
        write_scores(
            executor,
            fit,
            test,
            train,
            output,
            plan,
            project=project,
            perturbation=mode is InfluenceMode.Perturbation,
            progress=target.progress,
        )

    return Run(
        target,
        output,
        fitted,
        fitted.problem_of(mode, train),
        plan,
        score_templates(plan, fitted.score_dtype, features),
        strip_names,
        write,
    )


def factor_run(target: Target, fitted: Fitted, test: Source, *, test_ids: Any = None) -> Run:
    """Influence factors (N, P) of test data."""
    plan = target.fitting(
        fitted.plan(test, test, InfluenceMode.Up, project=False, memory_limit=target.memory_limit)
    )
    ids = {"test": arguments.ids(test_ids, test, "test_ids")}
    output = target.output(fitted, "factors", ids, {"test": test.digest()})
    fitted.check_query(test, "test")

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


def _check_held(held: StoredFactors, fitted: Fitted) -> None:
    """Refuse factors of another fit, or of fewer λ than are asked for."""
    if fitted.sweep is not None:
        raise ConfigurationError(
            f"hessian_regularization={fitted.sweep} needs test data: {held.location.url} holds factors of one λ"
        )
    held.check(fitted.identity())
