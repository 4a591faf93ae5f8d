"""Tasks of a reduction: score a strip and keep little of it, or join the parts that others kept.

A task that is not the last of its cell leaves its part as one object under ``_run/partials``; the
last one writes the arrays. Either way the ledger entry comes after the data, and the parts that
a merge has taken up go only when its own entry is there.

A sample that cannot be used is left out: of what is kept of the others it has no share, and where it is
itself one of the kept points, its part carries a mark, of which the last task makes NaN.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from dask_influence.core.estimators import Inverse
from dask_influence.core.estimators.base import without_rounds
from dask_influence.errors import CorruptStoreError, DataError, MissingObjectError
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.base import Sealed
from dask_influence.execution.job import Job, Missing
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.plan import Strip
from dask_influence.execution.reducer import Array, Part, Reducer
from dask_influence.execution.shipping import Held
from dask_influence.execution.tasks import (
    Scoring,
    derivatives_of,
    effort,
    probe_column,
    probe_gradient,
    query_gradients,
    query_rows,
    stored,
    tile_of,
)
from dask_influence.execution.tree import Axis, Node
from dask_influence.storage.results import ShardRecord, checksum, fill_of, write_region
from dask_influence.storage.stores import Location

PARTIALS = "_run/partials"
"""Where parts wait for the merge that takes them up."""

LACKING = "lacking"
"""In every part: which of its kept points are missing samples, (1, kept)."""


@dataclass(frozen=True)
class Table:
    """An array that every task can look things up in, published as bytes: of strings too."""

    artifact: Artifact
    dtype: str

    @classmethod
    def publish(cls, artifacts: Artifacts, array: Array) -> Table:
        """Publish a 1-D array."""
        flat = np.ascontiguousarray(array if array.dtype.kind in "iuf" else np.array(array.tolist()))
        octets = torch.from_numpy(np.frombuffer(flat.tobytes(), dtype=np.uint8).copy())
        return cls(artifacts.publish({"bytes": octets}), flat.dtype.str)

    def load(self) -> Array:
        """The array, one per process."""
        return self.artifact.load()["bytes"].numpy().view(self.dtype)


@dataclass(frozen=True)
class Reducing:
    """What the tasks of one reduction share.

    Attributes
    ----------
    scoring : Scoring
        Plan, factors and the store.
    reducer : Reducer
        What is kept.
    tables : mapping of str to Table
        What it looks things up in.
    """

    scoring: Scoring
    reducer: Reducer
    tables: Mapping[str, Table]

    @property
    def location(self) -> Location:
        """The output store."""
        return self.scoring.location

    def loaded(self) -> dict[str, Array]:
        """The tables, in this process."""
        return {name: table.load() for name, table in self.tables.items()}

    def emit(self, node: Node, part: Part, entry: Mapping[str, Any]) -> ShardRecord | None:
        """Store the part of ``node``, or the arrays where it is the last of its cell, then its ledger entry.

        Returns the record of the part, None where the arrays were written.
        """
        tree = self.scoring.plan.tree
        last = node == tree.root(node.cell)
        records = self._write(node, part) if last else [self._keep(node, part)]
        written = [[record.key, record.nbytes, record.checksum] for record in records]
        own: dict[str, Any] = {"shards": written} if last else {"part": written[0]}
        Ledger(self.location).record(tree.name(node), {**entry, **own})
        return None if last else records[0]

    def _keep(self, node: Node, part: Part) -> ShardRecord:
        data = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in part.items()})
        key = f"{PARTIALS}/{self.scoring.plan.tree.name(node)}.safetensors"
        self.location.put(key, data)
        return ShardRecord(key, len(data), checksum(data))

    def _write(self, node: Node, part: Part) -> list[ShardRecord]:
        plan, axis = self.scoring.plan, self.reducer.axis
        size = {"test": plan.query_rows, "train": plan.strip_columns, None: 0}[axis]
        own = {name: array for name, array in part.items() if name != LACKING}
        records = []
        for name, array in self.reducer.finish(own, self.loaded()).items():
            dims = self.reducer.arrays[name].dims
            array = _without(array, dims, axis, part[LACKING][0])
            origin = tuple(node.cell * size if dim == axis else 0 for dim in dims)
            if plan.work.regularizations is None:
                records += write_region(self.location, name, origin, array[0])
            else:
                records += write_region(self.location, name, (0, *origin), array)
        return records

    def merged(self, first: Part, second: Part) -> Part:
        """One part of two, and what either lacks."""
        part = self.reducer.merge(first, second)
        return {**part, LACKING: first[LACKING] | second[LACKING]}

    def read(self, record: ShardRecord) -> Part:
        """A part that another task kept.

        Raises
        ------
        CorruptStoreError
            It is not what was written; it is removed then, so that a resume makes it again.
        MissingObjectError
            It is gone.
        """
        data = self.location.get(record.key)
        if (len(data), checksum(data)) != (record.nbytes, record.checksum):
            self.location.delete(record.key)
            raise CorruptStoreError(
                f"{record.key!r} of {self.location.url} is damaged and was removed; run the same call again, "
                "which computes it anew"
            )
        return safetensors.numpy.load(data)


# -- a strip -----------------------------------------------------------------------------
def reduce_node(
    job: Sealed, reducing: Sealed, node: Node, parts: Sequence[ShardRecord]
) -> tuple[Node, ShardRecord | None, Missing]:
    """Do the work of one node of the tree: score a strip, or join ``parts``; and what is missing of a strip.

    What was done before is not done again.
    """
    run: Reducing = reducing.open()
    began, tree = time.perf_counter(), run.scoring.plan.tree
    missing = Missing()
    written = Ledger(run.location).read(tree.name(node))
    if written is not None:  # by a worker that was lost before it could say so, or for another client
        held = part_of(written)
        if node == tree.root(node.cell) if held is None else run.location.size(held.key) == held.nbytes:
            missing = {one["sample"]: one["reason"] for one in written.get("missing", ())}
            return node, held, missing
    if node.level == 0:
        strip = run.scoring.plan.strip(run.scoring.plan.tree.strip(node))
        part = _scored(job.open(), run, strip, missing)
        entry = entry_of(strip, missing)
    else:
        try:
            part = _joined(run, parts)
        except MissingObjectError as gone:
            return node, _joined_before(run, node, gone), missing
        entry = {"merged": [run.scoring.plan.tree.name(n) for n in run.scoring.plan.tree.children(node)]}
    record = run.emit(node, part, {**entry, **effort(began)})
    for taken_up in parts:
        run.location.delete(taken_up.key)
    return node, record, missing


def probe_node(sample: int, job: Sealed, reducing: Sealed, node: Node, _: Sequence[ShardRecord]) -> None:
    """The derivatives of one training sample alone, of a call of :func:`reduce_node`."""
    scoring: Scoring = reducing.open().scoring
    if scoring.plan.work.diagonal:
        probe_gradient(sample, job)
    else:
        probe_column(sample, job, Held(scoring), scoring.plan.tree.strip(node))


def _scored(job: Job, run: Reducing, strip: Strip, missing: Missing) -> Part:
    """What is kept of a strip, tile by tile; training samples that cannot be used are added to ``missing``."""
    axis, tables = run.reducer.axis, run.loaded()
    kept: dict[int, Part] = {}  # by the first kept point, in order
    diagonal = run.scoring.plan.work.diagonal
    with job.running():
        blocks = _diagonal(job, run, strip, missing) if diagonal else _tiles(job, run, strip, missing)
        for rows, columns, scores in blocks:
            lacking = {"test": run.scoring.missing, "train": tuple(missing)}
            part = partial_of(run.reducer, scores, rows, columns, lacking, tables)
            at = {"test": rows.start, "train": columns.start, None: 0}[axis]
            kept[at] = run.merged(kept[at], part) if at in kept else part
    names = next(iter(kept.values()))
    return {name: np.concatenate([part[name] for part in kept.values()], axis=1) for name in names}


def partial_of(
    reducer: Reducer,
    scores: Array,
    rows: range,
    columns: range,
    lacking: Mapping[str, Sequence[int]],
    tables: Mapping[str, Array],
) -> Part:
    """What is kept of ``scores`` (λ, rows, columns, *features), or (λ, columns) of a diagonal.

    Points that are ``lacking``, by side, have no share in what is kept of others; where they are kept
    themselves, they are marked, and their scores taken for zero.
    """
    positions = {"test": np.arange(rows.start, rows.stop), "train": np.arange(columns.start, columns.stop)}
    marked = np.zeros(len(positions[reducer.axis]) if reducer.axis else 1, dtype=bool)
    for axis, side in enumerate(("train",) if scores.ndim == 2 else ("test", "train"), start=1):
        bad = np.isin(positions[side], lacking[side])
        if not bad.any():
            continue
        if side == reducer.axis:
            marked, scores = bad, scores.copy()
            scores[(slice(None),) * axis + (bad,)] = 0.0
        else:
            scores, positions[side] = scores.compress(~bad, axis=axis), positions[side][~bad]
    _refuse_nan(scores, positions["test"], positions["train"])
    part = reducer.partial(scores, positions["test"], positions["train"], tables)
    return {**part, LACKING: marked[None]}


def _without(array: Array, dims: Sequence[str], axis: Axis, lacking: Array) -> Array:
    """``array`` (λ, *dims) with nothing in the places of missing samples."""
    if axis not in dims or not lacking.any():
        return array
    array = array.copy()
    array[(slice(None),) * (1 + dims.index(axis)) + (lacking,)] = fill_of(array.dtype)
    return array


def entry_of(strip: Strip, missing: Missing) -> dict[str, Any]:
    """What the ledger says of a strip beside its data."""
    entry: dict[str, Any] = {
        "rows": [strip.rows.start, strip.rows.stop],
        "columns": [strip.columns.start, strip.columns.stop],
    }
    if missing:  # without their ids, which the store of a reduction need not hold
        entry["missing"] = [{"sample": j, "reason": missing[j]} for j in sorted(missing)]
    return entry


def _tiles(job: Job, run: Reducing, strip: Strip, missing: Missing) -> Iterator[tuple[range, range, Array]]:
    """Tiles (λ, rows, columns, *features) of a strip, whose training samples are differentiated once."""
    scoring, copies = run.scoring, run.scoring.plan.work.copies
    query = scoring.query(strip.rows, job.model.problem())
    for columns in scoring.plan.columns(strip):
        derivatives = derivatives_of(job, query, columns, scoring.plan.batch, scoring.perturbation, missing)
        for rows in scoring.plan.rows(strip):
            low, high = ((end - strip.rows.start) * copies for end in (rows.start, rows.stop))
            tile = tile_of(query, derivatives, slice(low, high))
            yield rows, columns, tile.reshape(len(rows), copies, *tile.shape[1:]).swapaxes(0, 1)


def _diagonal(
    job: Job, run: Reducing, strip: Strip, missing: Missing
) -> Iterator[tuple[range, range, Array]]:
    """Scores (λ, n) of the strip's training points on themselves."""
    plan, solver = run.scoring.plan, run.scoring.inverse
    assert solver is not None
    inverse = solver.inverse()
    form = inverse.form if plan.work.paired is not None else None
    pairs = None if form is None else form.pairs(job.model.problem())
    for columns in plan.columns(strip):
        if pairs is not None:
            held = query_rows(job, pairs.rows, columns.start, columns.stop, plan.batch, missing)
            yield strip.rows, columns, stored(pairs.alone(held))
            continue
        gradients = query_gradients(job, columns.start, columns.stop, plan.batch, missing)
        yield strip.rows, columns, self_scores(inverse, gradients, plan.work.copies)


def self_scores(inverse: Inverse, gradients: Tensor, copies: int) -> Array:
    """gⱼᵀ (C + λI)⁻¹ gⱼ for gradients (n, P) at L = ``copies`` λ: (L, n)."""
    wide = gradients.to(torch.float64)
    directions = inverse.directions
    if not isinstance(directions, Tensor):
        return products(without_rounds(inverse.solve(wide)).factors, gradients, copies)
    along = wide @ directions.to(torch.float64).mT  # (n, R)
    return products(inverse.coefficients(wide), along, copies, gradients.dtype)


def products(rows: Tensor, others: Tensor, copies: int, dtype: torch.dtype | None = None) -> Array:
    """⟨row, other⟩ for rows (n·L, d), sample by sample, and others (n, d): (L, n)."""
    own = rows.to(torch.float64).reshape(len(others), copies, -1)
    scores = torch.einsum("nld,nd->ln", own, others.to(torch.float64))
    return stored(scores.to(dtype or others.dtype))


def _refuse_nan(scores: Array, rows: Array, columns: Array) -> None:
    if np.isfinite(scores.sum()):  # one pass without a temporary; an overflow only sends us on
        return
    bad = np.argwhere(np.isnan(scores))
    if len(bad):
        row = f"test point {rows[bad[0][1]]} and " if scores.ndim > 2 else ""
        column = columns[bad[0][2 if scores.ndim > 2 else 1]]
        raise DataError(
            f"the score of {row}training point {column} is NaN, as where infinities cancel; look at their gradients, "
            "or compute in dtype=torch.float64"
        )


# -- a merge -----------------------------------------------------------------------------
def _joined(run: Reducing, parts: Sequence[ShardRecord]) -> Part:
    """The parts as one, taken up in their order."""
    total = run.read(parts[0])
    for record in parts[1:]:
        total = run.merged(total, run.read(record))
    return total


def _joined_before(run: Reducing, node: Node, missing: MissingObjectError) -> ShardRecord | None:
    """The record of a merge that ran before, its parts being gone: a task may run twice."""
    entry = Ledger(run.location).read(run.scoring.plan.tree.name(node))
    if entry is None:
        raise CorruptStoreError(
            f"{missing}: a part of the reduction; run the same call again, which computes it anew"
        ) from None
    return part_of(entry)


def part_of(entry: Mapping[str, Any]) -> ShardRecord | None:
    """The record of the part that a ledger entry stands for, None where its task wrote arrays."""
    return ShardRecord(*entry["part"]) if "part" in entry else None
