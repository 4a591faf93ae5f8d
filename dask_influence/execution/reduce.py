"""A run that keeps a reduction: strips and merges as their parts become ready, then the metadata.

Merges run while strips do, so few parts wait at a time. A resume asks each cell for its last node and
descends only where something is missing: what a merge took up is not made again. Entries that are lost below a
node that is done are written again, a strip's by its task, which knows what it is missing.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from dask_influence.execution import quarantine, tasks
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.base import Executor
from dask_influence.execution.drive import iterated_factors
from dask_influence.execution.job import Job
from dask_influence.execution.missing import MissingSamples
from dask_influence.execution.output import Output
from dask_influence.execution.overlap import Behind
from dask_influence.execution.plan import Plan
from dask_influence.execution.progress import Report, reporting
from dask_influence.execution.reduce_tasks import (
    PARTIALS,
    Reducing,
    Table,
    entry_of,
    part_of,
    partial_of,
    products,
    reduce_node,
)
from dask_influence.execution.reducer import Array, Reducer, Reduction, Scores
from dask_influence.execution.run import Fit, residual_template, solve_factors, surviving, swept_dims
from dask_influence.execution.stored import StoredFactors, import_factors
from dask_influence.execution.tree import Node, Tree
from dask_influence.execution.work import Kept
from dask_influence.storage.results import ArrayTemplate, ShardRecord
from dask_influence.storage.sources import Source


@dataclass(frozen=True)
class Reduced:
    """A reduction as a run needs it: bound to its scores, with what it looks things up in.

    Attributes
    ----------
    reducer : Reducer
        What tasks carry.
    tables, coordinates : mapping of str to array
        What they look things up in, and index arrays of the result.
    kept : Kept
        What a plan has to know.
    """

    reducer: Reducer
    tables: Mapping[str, Array]
    coordinates: Mapping[str, Array]
    kept: Kept

    @classmethod
    def of(cls, reduction: Reduction, scores: Scores) -> Reduced:
        """``reduction`` bound to ``scores``, or its refusal."""
        reducer = reduction.bind(scores)
        nbytes = sum(math.prod(a.shape) * a.dtype.itemsize for a in reducer.arrays.values())
        kept = Kept(repr(reduction), reducer.axis, nbytes, reduction.diagonal)
        return cls(reducer, reduction.tables(scores), reduction.coordinates(), kept)

    def templates(self, plan: Plan) -> dict[str, ArrayTemplate]:
        """Arrays of a store of this reduction: one tile for each cell."""
        work = plan.work
        swept = () if work.regularizations is None else (work.regularizations,)
        size = {"test": plan.query_rows, "train": plan.strip_columns, None: 0}[self.reducer.axis]
        found = {
            name: replace(
                array,
                dims=(*swept_dims(work), *array.dims),
                shape=(*swept, *array.shape),
                tile=(
                    *swept,
                    *(
                        size if dim == self.reducer.axis else extent
                        for dim, extent in zip(array.dims, array.shape, strict=True)
                    ),
                ),
            )
            for name, array in self.reducer.arrays.items()
        }
        return found if work.diagonal else {**found, "factor_residual": residual_template(work)}


# -- what is left to do ------------------------------------------------------------------
class Schedule:
    """Nodes that are still to be done, in an order in which few parts wait.

    Parameters
    ----------
    tree : Tree
        All nodes.
    held : mapping of str to ShardRecord or None
        By ledger entry: parts that are there, None for arrays that are written.
    recorded : collection of str
        All ledger entries, also those whose part was taken up.

    Attributes
    ----------
    lost : list of Node
        Merges below a node that is done, of which the entry is not there.
    """

    def __init__(self, tree: Tree, held: Mapping[str, ShardRecord | None], recorded: Collection[str]) -> None:
        self._tree, self.lost = tree, list[Node]()
        self._parts: dict[Node, ShardRecord | None] = {}
        self._strips: deque[Node] = deque()
        self._ready: deque[Node] = deque()
        self._waiting: dict[Node, int] = {}  # of merges, parts that are not there
        self._recorded = recorded
        for root in tree.roots():
            self._descend(root, held)
        self.left = len(self._strips)

    def _descend(self, node: Node, held: Mapping[str, ShardRecord | None]) -> bool:
        """Whether ``node`` is done; what it lacks is scheduled."""
        name = self._tree.name(node)
        if name in held:
            self._parts[node] = held[name]
            lost = [below for below in self._tree.below(node) if self._tree.name(below) not in self._recorded]
            self._strips += [below for below in lost if below.level == 0]
            self.lost += [below for below in lost if below.level]
            return True
        children = self._tree.children(node)
        lacking = sum(not self._descend(child, held) for child in children)
        if not children:
            self._strips.append(node)
        elif lacking:
            self._waiting[node] = lacking
        else:
            self._ready.append(node)
        return False

    def __bool__(self) -> bool:
        return bool(self._strips or self._ready)

    def ready(self) -> Iterator[tuple[Node, list[ShardRecord]]]:
        """Nodes that can be done now, with their parts; merges first, since they make room."""
        while self:
            node = self._ready.popleft() if self._ready else self._strips.popleft()
            parts = [self._parts.pop(child) for child in self._tree.children(node)]
            yield node, [part for part in parts if part is not None]

    def finished(self, node: Node, part: ShardRecord | None) -> None:
        """Note that ``node`` is done, which may make its parent ready."""
        self.left -= node.level == 0
        if part is None:  # the last of its cell
            return
        parent = self._tree.parent(node)
        if parent not in self._waiting:  # it is done: the entry alone was lost
            return
        self._parts[node] = part
        self._waiting[parent] -= 1
        if not self._waiting[parent]:
            del self._waiting[parent]
            self._ready.append(parent)


def _held(output: Output, plan: Plan) -> dict[str, ShardRecord | None]:
    """Nodes that the ledger lists and whose part, if they left one, is there in its length."""
    sizes = dict(output.location.sizes(PARTIALS))  # few: a merge takes parts away
    roots = {plan.tree.name(root) for root in plan.tree.roots()}
    found = {}
    for prefix in ("strip-", "merge-"):
        for name, entry in output.ledger.stream(prefix):
            part = part_of(entry)
            if name in roots if part is None else sizes.get(part.key) == part.nbytes:
                found[name] = part
    return found


# -- the run -----------------------------------------------------------------------------
def write_reduced(
    reduced: Reduced,
    executor: Executor,
    fit: Fit,
    test: Source | StoredFactors | None,
    train: Source,
    output: Output,
    plan: Plan,
    *,
    project: bool,
    perturbation: bool,
    progress: bool | Report | None,
) -> None:
    """Factors, strips, merges and metadata into a prepared store; what the ledger lists is not done again."""
    with reporting(progress) as report, Behind[None]() as writing:
        factors = _factors(executor, fit, test, output, plan, project, report, writing)
        schedule = Schedule(plan.tree, _held(output, plan), output.ledger.done())
        for node in schedule.lost:
            merged = [plan.tree.name(child) for child in plan.tree.children(node)]
            output.ledger.record(plan.tree.name(node), {"merged": merged})
        if schedule:
            solver = None
            if project or plan.work.diagonal:
                solver = fit.solver if plan.work.diagonal and plan.work.paired is None else fit.scorer
            lacking = output.missing.positions("test")
            scoring = tasks.Scoring(plan, factors, solver, perturbation, output.location, lacking)
            artifacts = Artifacts(output.artifacts)
            tables = {name: Table.publish(artifacts, array) for name, array in reduced.tables.items()}
            source = executor.reachable(train, plan.tile[1])
            run = _Run(
                executor,
                fit,
                Job(fit.model, source, "train", fit.threads),
                Reducing(scoring, reduced.reducer, tables),
                schedule,
                output.missing,
                report,
            )
            run.solve_diagonal() if plan.work.diagonal and fit.inverse.needs_rounds else run.map()
    output.location.delete(PARTIALS)  # left by whoever was killed between an entry and its tidying up
    output.complete()


def _factors(
    executor: Executor,
    fit: Fit,
    test: Source | StoredFactors | None,
    output: Output,
    plan: Plan,
    project: bool,
    report: Report,
    beside: Behind[None],
) -> tuple[Artifact, ...]:
    if test is None:
        return ()
    if isinstance(test, StoredFactors):
        return import_factors(test, output, plan.factor_chunks)
    return solve_factors(executor, fit, test, output, plan, project, report, beside)


@dataclass(frozen=True)
class _Run:
    """One run's nodes on their way."""

    executor: Executor
    fit: Fit
    job: Job
    reducing: Reducing
    schedule: Schedule
    missing: MissingSamples
    report: Report

    @property
    def _plan(self) -> Plan:
        return self.reducing.scoring.plan

    def _tell(self) -> None:
        self.report("strips", self._plan.strips - self.schedule.left, self._plan.strips)

    def map(self) -> None:
        """Every node by a task."""
        job, reducing = self.executor.seal(self.job), self.executor.seal(self.reducing)
        self._tell()
        while self.schedule:  # more than once: the last strips of a map make merges ready
            calls = ((job, reducing, node, parts) for node, parts in self.schedule.ready())
            for node, part, bad in surviving(
                self.executor, reduce_node, quarantine.isolated_node, calls, self.job.threads
            ):
                self.missing.add("train", bad)
                self.schedule.finished(node, part)
                self._tell()

    def solve_diagonal(self) -> None:
        """Where a factor takes passes, which are driven from here: strip by strip, gradients by a task."""
        plan, job = self._plan, self.executor.seal(self.job)
        scratch = self.reducing.location.child(PARTIALS)
        self._tell()
        for node, _ in self.schedule.ready():
            began, strip = time.perf_counter(), plan.strip(plan.tree.strip(node))
            call = (job, strip.columns.start, strip.columns.stop, plan.batch, scratch)
            ((_, gradients, bad),) = surviving(
                self.executor, tasks.gradient_task, quarantine.isolated_gradients, [call], self.job.threads
            )
            self.missing.add("train", bad)
            lacking = {"test": (), "train": tuple(bad)}
            scores = self._self_scores(gradients)
            part = partial_of(self.reducing.reducer, scores, strip.rows, strip.columns, lacking, {})
            entry = {**entry_of(strip, bad), **tasks.effort(began)}
            self.schedule.finished(node, self.reducing.emit(node, part, entry))
            scratch.delete(gradients.key)
            self._tell()

    def _self_scores(self, gradients: Artifact) -> Array:
        rows, fit = gradients.read()["rows"], self.fit
        factors = iterated_factors(fit.inverse, fit.system, fit.answer(), rows, certify=False)
        return products(factors.rows, rows, self._plan.work.copies)
