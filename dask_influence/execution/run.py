"""What a run writes to its store: factors, strips, then the consolidated metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from dask_influence.core import sizes
from dask_influence.core.estimators import estimates
from dask_influence.core.estimators.base import Inverse, System
from dask_influence.errors import (
    NotFittedError,
)
from dask_influence.execution import quarantine, tasks
from dask_influence.execution.artifacts import Artifact, Artifacts, whole
from dask_influence.execution.base import Executor, Model, Solver
from dask_influence.execution.drive import Passes, drive, iterated_factors
from dask_influence.execution.job import Job, Missing
from dask_influence.execution.output import Output, as_json, write_residuals
from dask_influence.execution.overlap import Behind
from dask_influence.execution.pieces import FACTORS, RESIDUAL, factor_name
from dask_influence.execution.plan import Plan
from dask_influence.execution.progress import Report, reporting
from dask_influence.execution.stored import StoredFactors, import_factors
from dask_influence.execution.work import Work
from dask_influence.storage.results import (
    ArrayTemplate,
    write_region,
)
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location


@dataclass(frozen=True)
class Fit:
    """What a run needs of a fitted model.

    Attributes
    ----------
    model : Model
        Loadable by every task.
    inverse, solver : Inverse, Solver
        The inverse, here and as tasks load it.
    scorer : Solver
        What tasks score by: the inverse, or an approximation of its directions.
    system : System
        What it inverts.
    passes : Passes or None
        Answers rounds over the fitted data, where they are still at hand.
    certify : bool
        Spend a pass on residuals that need one.
    threads : int
        torch threads per task.
    """

    model: Model
    inverse: Inverse
    solver: Solver
    scorer: Solver
    system: System
    passes: Passes | None
    certify: bool
    threads: int

    @property
    def score_dtype(self) -> np.dtype[Any]:
        """The model's floating dtype as numpy has it."""
        return tasks.stored_dtype(self.system.dtype)

    def answer(self) -> Passes:
        """What answers the rounds of factors that are solved by passes over the fitted data."""
        return required(self.passes)

    @property
    def needs_rounds(self) -> bool:
        """Whether factors are solved or certified by passes, which the client has to drive."""
        if self.inverse.needs_rounds:
            return True
        return self.certify and self.passes is not None and self.inverse.residuals_need_rounds


def required(passes: Passes | None) -> Passes:
    """The passes that solving takes.

    Raises
    ------
    NotFittedError
        The model was loaded without its training data.
    """
    if passes is None:
        raise NotFittedError(
            "factors of this estimator are solved by passes over the training data, and a loaded model holds none; "
            "give them as load(url, model, loss, train=...)"
        )
    return passes


def score_templates(
    plan: Plan, dtype: np.dtype[Any], feature_names: tuple[str, ...]
) -> dict[str, ArrayTemplate]:
    """Arrays of a store of scores."""
    work = plan.work
    swept = () if work.regularizations is None else (work.regularizations,)
    return {
        "influence": ArrayTemplate(
            dims=(*swept_dims(work), "test", "train", *feature_names),
            shape=(*swept, work.tests, work.trains, *work.features),
            tile=(*(1 for _ in swept), *plan.tile, *work.features),
            dtype=np.dtype(dtype),
        ),
        "factor_residual": residual_template(work),
    }


def swept_dims(work: Work) -> tuple[str, ...]:
    """The leading dimension of scores at several λ."""
    return () if work.regularizations is None else ("regularization",)


def residual_template(work: Work) -> ArrayTemplate:
    """‖(H + λI) s − g‖ / ‖g‖ for each test point, at each of several λ; says of estimates that they are some."""
    attrs: dict[str, Any] = {}
    if work.estimated:
        attrs["estimated_from"] = f"{work.estimated} random vectors"
        attrs["relative_standard_deviation"] = round(estimates.deviation(work.estimated), 3)
    swept = () if work.regularizations is None else (work.regularizations,)
    shape = (*swept, work.tests)
    return ArrayTemplate(
        dims=(*swept_dims(work), "test"),
        shape=shape,
        tile=shape,
        dtype=np.dtype("float64"),
        coordinate=True,
        attrs=attrs,
    )


def factor_templates(plan: Plan, dtype: np.dtype[Any]) -> dict[str, ArrayTemplate]:
    """Arrays of a store of factors."""
    work = plan.work
    return {
        "factors": ArrayTemplate(
            dims=("test", "parameter"),
            shape=(work.tests, work.parameters),
            tile=(plan.factor_rows, work.parameters),
            dtype=np.dtype(dtype),
        ),
        "factor_residual": residual_template(work),
    }


# -- factors ---------------------------------------------------------------------------
def solve_factors(
    executor: Executor,
    fit: Fit,
    source: Source,
    output: Output,
    plan: Plan,
    project: bool,
    progress: Report,
    beside: Behind[None],
) -> tuple[Artifact, ...]:
    """Factors of all test points, each solved once, kept in the run's artifacts; residuals are written ``beside``.

    Chunks that the ledger already lists are not solved again, unless their artifact is missing or damaged.
    """
    chunks = plan.factor_chunks
    known = _held_factors(output)
    missing = [index for index in range(len(chunks)) if factor_name(index) not in known]
    job = executor.seal(Job(fit.model, executor.reachable(source, chunks.size), "test", fit.threads))
    calls: list[tuple[Any, ...]] = [
        (job, chunks[index].start, chunks[index].stop, plan.batch, output.artifacts) for index in missing
    ]
    solver = fit.solver if plan.work.paired is None else fit.scorer
    estimating = _estimating(fit, plan.work) if missing and fit.needs_rounds else None
    by_rounds = fit.needs_rounds and estimating is None
    closed = [(*call, solver, project, estimating) for call in calls]
    if by_rounds and plan.work.paired is None:
        solved = _by_rounds(executor, fit, calls, output.artifacts)
    else:
        solved = surviving(executor, tasks.factor_task, quarantine.isolated_factors, closed, fit.threads)
    if by_rounds and plan.work.paired is not None:
        solved = _certified(executor, fit, solved, calls)
    done = len(chunks) - len(missing)
    progress("factors", done, len(chunks))
    for start, artifact, residual, bad in solved:
        index = start // chunks.size
        entry = {
            "rows": [start, chunks[index].stop],
            "digest": artifact.digest,
            "nbytes": artifact.nbytes,
            "residual": list(residual),
        }
        if bad:
            output.missing.add("test", bad)
            entry["missing"] = output.missing.listed("test", start, chunks[index].stop)
        output.ledger.record(factor_name(index), entry)
        known[factor_name(index)] = entry
        done += 1
        progress("factors", done, len(chunks))
    entries = [known[factor_name(index)] for index in range(len(chunks))]
    residuals = np.array([value for entry in entries for value in entry["residual"]], dtype=np.float64)
    if plan.work.regularizations is not None:  # rows are test-major
        residuals = residuals.reshape(-1, plan.work.regularizations).T
    if missing or output.ledger.read(RESIDUAL) is None:
        beside.submit(partial(write_residuals, output, residuals))
    return tuple(Artifact(entry["digest"], entry["nbytes"], output.artifacts) for entry in entries)


def _held_factors(output: Output) -> dict[str, dict[str, Any]]:
    """Entries of the factor tasks whose artifact is whole; what is left of another one is removed."""
    recorded = output.ledger.entries(FACTORS)
    entries = {name: entry for name, entry in recorded.items() if "digest" in entry}  # others were withdrawn
    artifacts = {
        name: Artifact(entry["digest"], entry["nbytes"], output.artifacts) for name, entry in entries.items()
    }
    held = whole(output.artifacts, artifacts.values())
    for artifact in artifacts.values():
        if artifact.digest not in held:  # or equal content would be taken for written
            output.artifacts.delete(artifact.key)
    return {name: entry for name, entry in entries.items() if artifacts[name].digest in held}


def _by_rounds(
    executor: Executor, fit: Fit, calls: list[tuple[Any, ...]], location: Location | None
) -> Iterator[tuple[int, Artifact, list[float], Missing]]:
    """Where solving or certifying takes passes: gradients by tasks, rounds driven from here.

    Factors are published at ``location``, if there is one.
    """
    answer = fit.answer()
    for start, gradients, missing in surviving(
        executor, tasks.gradient_task, quarantine.isolated_gradients, calls, fit.threads
    ):
        # torch's own memory: aligned the same wherever the rows came from, hence the same bits
        rows = gradients.read()["rows"].clone()
        solved = iterated_factors(fit.inverse, fit.system, answer, rows, certify=fit.certify)
        factors = solved.without(missing, start, start + len(rows))
        artifact = gradients if location is None else Artifacts(location).publish({"rows": factors.rows})
        yield start, artifact, factors.residual.tolist(), missing


_ESTIMATING = WeakKeyDictionary[Inverse, tasks.Estimating]()
"""Of inverses that have been asked for it: it costs as much as many scores, and does not depend on the run."""


def _estimating(fit: Fit, work: Work) -> tasks.Estimating | None:
    """What residuals are estimated by, published where the fit's passes publish; None where they are not."""
    if not work.estimated:
        return None
    made = _ESTIMATING.get(fit.inverse)
    if made is None or made.count != work.estimated or not all(map(_is_there, made.blocks)):
        passes = fit.answer()
        dtype = torch.promote_types(fit.system.dtype, torch.float32)
        blocks = sizes.estimating_blocks(work.estimated, work.parameters, work.copies)
        vectors = (drive(estimates.directions(fit.inverse, fit.system, block), passes) for block in blocks)
        published = tuple(passes.executor.publish({"vectors": block.to(dtype)}) for block in vectors)
        made = _ESTIMATING[fit.inverse] = tasks.Estimating(published, work.estimated, work.copies)
    return made


def _is_there(artifact: Artifact) -> bool:
    return artifact.location is None or artifact.location.exists(artifact.key)


def _certified(
    executor: Executor,
    fit: Fit,
    solved: Iterator[tuple[int, Artifact, list[float], Missing]],
    calls: list[tuple[Any, ...]],
) -> Iterator[tuple[int, Artifact, list[float], Missing]]:
    """Rows of pairs as they were solved, with the residuals of the factors that they stand for."""
    by_start = {call[1]: call for call in calls}
    for start, artifact, _, missing in solved:
        (found,) = _by_rounds(executor, fit, [by_start[start]], None)
        yield start, artifact, found[2], missing


def surviving(
    executor: Executor,
    task: Callable[..., Any],
    isolated: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
    threads: int,
) -> Iterator[Any]:
    """Results of ``task(*call)``; calls that lost their workers are made again by ``isolated``, at the end.

    Each takes ``threads`` torch threads.
    """
    suspects: list[tuple[Any, ...]] = []
    yield from executor.map(task, calls, suspects.append, threads=threads)
    if suspects:  # to ask a cluster how many it takes at once is a question to its scheduler
        yield from executor.map(isolated, suspects, threads=threads)


# -- scores ----------------------------------------------------------------------------
def score_strips(
    executor: Executor,
    fit: Fit,
    source: Source,
    output: Output,
    plan: Plan,
    factors: tuple[Artifact, ...],
    project: bool,
    perturbation: bool,
    progress: Report,
) -> None:
    """Every strip that the ledger does not list, each once workers can read its samples."""
    done = output.ledger.done()
    missing = [index for index in range(plan.strips) if plan.strip(index).name not in done]
    total = plan.strips
    progress("strips", total - len(missing), total)
    if not missing:
        return
    job = executor.seal(Job(fit.model, source, "train", fit.threads))
    scoring = executor.seal(
        tasks.Scoring(
            plan,
            factors,
            fit.scorer if project else None,
            perturbation,
            output.location,
            output.missing.positions("test"),
        )
    )

    def calls() -> Iterator[tuple[Any, ...]]:
        for index in missing:
            source.wait(plan.strip(index).columns.stop)
            yield job, scoring, index

    finished = total - len(missing)
    for bad in surviving(executor, tasks.score_strip, quarantine.isolated_strip, calls(), fit.threads):
        output.missing.add("train", bad)
        finished += 1
        progress("strips", finished, total)


def write_scores(
    executor: Executor,
    fit: Fit,
    test: Source | StoredFactors,
    train: Source,
    output: Output,
    plan: Plan,
    *,
    project: bool,
    perturbation: bool,
    progress: bool | Report | None,
) -> None:
    """Factors, strips and metadata into a prepared store; what the ledger lists is not done again."""
    with reporting(progress) as report, ThreadPoolExecutor(1) as beside, Behind[None]() as writing:
        reachable = executor.reachable(train, plan.tile[1], beside)
        if isinstance(test, StoredFactors):
            factors = import_factors(test, output, plan.factor_chunks)
        else:
            factors = solve_factors(executor, fit, test, output, plan, project, report, writing)
        score_strips(executor, fit, reachable, output, plan, factors, project, perturbation, report)
    output.complete()


def write_factors(
    executor: Executor,
    fit: Fit,
    test: Source,
    output: Output,
    plan: Plan,
    progress: bool | Report | None,
) -> None:
    """Factors of all test points as an array, one tile for each factor task."""
    with reporting(progress) as report, Behind[None]() as writing:
        factors = solve_factors(executor, fit, test, output, plan, False, report, writing)
        entries = output.ledger.entries(FACTORS)
        for index, (rows, artifact) in enumerate(zip(plan.factor_chunks, factors, strict=True)):
            block = tasks.stored(artifact.read()["rows"])
            records = write_region(output.location, "factors", (rows.start, 0), block)
            name = factor_name(index)
            output.ledger.record(name, {**entries[name], "shards": as_json(records)})
    output.complete()
