"""Tasks: the functions a worker runs. Each is idempotent and returns a few hundred bytes.

They load artifacts by digest, differentiate under the process-wide lock on the process's
private copy of the module, write whole tiles, and only then the ledger entry.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.estimators.base import ChunkFunction, without_rounds
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Objective, Tree
from dask_influence.core.problem import Problem, check_gradients, check_losses
from dask_influence.errors import DataError
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.base import Model, Sealed, Solver
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.plan import Plan, Strip
from dask_influence.storage.results import ShardRecord, write_region
from dask_influence.storage.sources import Source, check_finite
from dask_influence.storage.stores import Location


@dataclass(frozen=True)
class Job:
    """What every task of one computation shares: opened once per process.

    Attributes
    ----------
    model : Model
        Model, loss, θ and forms.
    source : Source
        The data this job reads.
    argument : str
        Name of those data in the call, for errors.
    threads : int
        torch threads per task; part of the job, because the bits may depend on it.
    """

    model: Model
    source: Source
    argument: str
    threads: int

    def batch(self, start: int, stop: int) -> tuple[Problem, Tree, Tree]:
        """The problem, and samples ``start`` to ``stop`` as tensors in its dtype, on its device."""
        problem = self.model.problem()
        batch = self.source.read(start, stop)
        check_finite(batch, self.argument, start)
        x, y = to_tensors(batch, problem.objective)
        return problem, x, y


def to_tensors(batch: Any, objective: Objective) -> Any:
    """Arrays as tensors on the model's device: floats in the model's dtype, integers as they are."""

    def convert(array: np.ndarray) -> Tensor:
        # torch's own memory: aligned the same wherever the array came from, hence the same bits
        tensor = torch.tensor(array)
        return tensor.to(objective.device, objective.dtype if tensor.is_floating_point() else None)

    return optree.tree_map(convert, batch)


# -- fit -------------------------------------------------------------------------------
def sum_group(
    job: Sealed, function: ChunkFunction, operand: Artifact, chunks: Sequence[range], first: bool
) -> Moments:
    """Moments of consecutive chunks, added one after the other.

    The ``first`` pass over the data also looks at every loss; sums that are not finite are
    traced to the sample.
    """
    opened: Job = job.open()
    total: Moments | None = None
    with torch_threads(opened.threads):
        for chunk in chunks:
            problem, x, y = opened.batch(chunk.start, chunk.stop)
            if first:
                check_losses(problem, x, y, opened.argument, chunk.start)
            part = function(problem, x, y, operand.load())
            if not all(value.isfinite().all() for value in part.total.values()):
                check_gradients(problem.objective, x, y, opened.argument, chunk.start)
            total = part if total is None else total + part
    assert total is not None
    return total


# -- factors ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Factors:
    """What is known of a run of test points: factors, or coefficients of the inverse's directions.

    ``rows`` (n, P) or (n, R) in the model's dtype; ``residual`` (n,) float64, NaN where it
    was not computed. Of several λ there are as many rows for each test point.
    """

    rows: Tensor
    residual: np.ndarray


def query_gradients(job: Job, start: int, stop: int, batch: int) -> Tensor:
    """∇θ ℓ of test points, (n, P), on CPU; NaN and inf are refused by sample."""
    parts = []
    for low in range(start, stop, batch):
        problem, x, y = job.batch(low, min(low + batch, stop))
        parts.append(directional.gradients(problem, x, y).cpu())
    gradients = torch.cat(parts)
    refuse_non_finite(gradients, job.argument, start)
    return gradients


def closed_factors(
    job: Job, inverse: Solver, start: int, stop: int, batch: int, *, project: bool, certify: bool
) -> Factors:
    """Factors of test points where the inverse needs no pass over the data."""
    with torch_threads(job.threads):
        solver = inverse.inverse()
        gradients = query_gradients(job, start, stop, batch)
        wide = gradients.to(torch.float64)
        factors = without_rounds(solver.solve(wide)) if certify or not project else None
        residual = solver.residuals(wide, factors) if certify and factors is not None else None
        rows = solver.coefficients(wide) if project or factors is None else factors
    measured = torch.full((len(rows),), torch.nan, dtype=torch.float64) if residual is None else residual
    return Factors(rows.to(gradients.dtype), measured.numpy())


def factor_task(
    job: Sealed, start: int, stop: int, batch: int, location: Location, inverse: Solver, project: bool
) -> tuple[int, Artifact, list[float]]:
    """:func:`closed_factors`, published."""
    factors = closed_factors(job.open(), inverse, start, stop, batch, project=project, certify=True)
    artifact = Artifacts(location).publish({"rows": factors.rows})
    return start, artifact, factors.residual.tolist()


def gradient_task(job: Sealed, start: int, stop: int, batch: int, location: Location) -> tuple[int, Artifact]:
    """:func:`query_gradients`, published: for inverses that need passes, which the client drives."""
    opened: Job = job.open()
    with torch_threads(opened.threads):
        gradients = query_gradients(opened, start, stop, batch)
    return start, Artifacts(location).publish({"rows": gradients})


# -- scores ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Query:
    """The test side of a strip: scores are ``coefficients`` @ E(``directions``)ᵀ.

    Attributes
    ----------
    directions : Tensor
        (D, P).
    coefficients : Tensor or None
        (rows, D); None stands for the identity.
    """

    directions: Tensor
    coefficients: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, own: Tensor | None, problem: Problem) -> Query:
        """From factors (``own`` None), or from coefficients of the inverse's ``own`` directions.

        With fewer test points than directions their factors are the cheaper directions.
        """
        objective = problem.objective
        if not rows.isfinite().all():  # not the training samples' fault
            raise DataError("factors hold NaN or inf; compute them again")
        if own is not None and len(rows) < len(own):
            rows, own = (rows.to(torch.float64) @ own.to(torch.float64)).to(objective.dtype), None
        if own is None:
            return cls(rows.to(objective.device, objective.dtype), None)
        directions = own.to(objective.device, objective.dtype)
        return cls(directions, rows.to(objective.device, objective.dtype))


def derivatives_of(job: Job, query: Query, columns: range, batch: int, perturbation: bool) -> Tensor:
    """E of training samples ``columns``: (n, D) or (n, D, *features)."""
    primitive = directional.mixed_derivatives if perturbation else directional.directional_derivatives
    parts = []
    for low in range(columns.start, columns.stop, batch):
        problem, x, y = job.batch(low, min(low + batch, columns.stop))
        derivatives = primitive(problem, x, y, query.directions)
        refuse_non_finite(derivatives, job.argument, low)
        parts.append(derivatives)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def refuse_non_finite(rows: Tensor, argument: str, start: int) -> None:
    """Name the first sample, counted from ``start``, whose row holds NaN or inf."""
    if rows.sum().isfinite():  # one pass without a temporary; an overflow only sends us on
        return
    bad = ~rows.isfinite().flatten(1).all(dim=1)
    if bad.any():
        raise DataError(
            f"{argument}: the gradient of sample {start + int(bad.nonzero()[0])} is not finite; "
            "look at its loss, or leave the sample out"
        )


def tile_of(query: Query, derivatives: Tensor, rows: slice) -> np.ndarray:
    """C Eᵀ for test points ``rows`` of the query: (rows, n) or (rows, n, *features)."""
    if query.coefficients is None:
        tile = derivatives[:, rows].transpose(0, 1)
    else:
        tile = torch.einsum("rd,nd...->rn...", query.coefficients[rows], derivatives)
    return stored(tile)


def stored(tensor: Tensor) -> np.ndarray:
    """As numpy; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def stored_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """What :func:`stored` makes of a tensor of that dtype."""
    return stored(torch.empty(0, dtype=dtype)).dtype


@dataclass(frozen=True)
class Scoring:
    """What the strips of one run share beside the job.

    Attributes
    ----------
    plan : Plan
        Its geometry.
    factors : tuple of Artifact
        Rows of the test points, by factor chunk.
    inverse : Solver or None
        Holds the directions, where the rows are coefficients.
    perturbation : bool
        Mode.
    location : Location
        The output store.
    """

    plan: Plan
    factors: tuple[Artifact, ...]
    inverse: Solver | None
    perturbation: bool
    location: Location

    def query(self, rows: range, problem: Problem) -> Query:
        """The query of test points ``rows``, from the chunks that hold them."""
        own = None if self.inverse is None else self.inverse.inverse().directions
        chunks, copies = self.plan.factor_chunks, self.plan.work.copies
        parts = []
        for part in chunks.within(rows.start, rows.stop):
            index = part.start // chunks.size
            offset = chunks[index].start
            held = slice((part.start - offset) * copies, (part.stop - offset) * copies)
            parts.append(self.factors[index].load()["rows"][held])
        return Query.of(torch.cat(parts), own, problem)

    def write(
        self, query: Query, derivatives: Tensor, strip: Strip, rows: range, columns: range
    ) -> list[ShardRecord]:
        """The tile of test points ``rows`` and training points ``columns``, one for each of several λ."""
        copies = self.plan.work.copies
        low, high = ((end - strip.rows.start) * copies for end in (rows.start, rows.stop))
        tile = tile_of(query, derivatives, slice(low, high))
        origin = (rows.start, columns.start, *([0] * (tile.ndim - 2)))
        if self.plan.work.regularizations is not None:
            tile = tile.reshape(len(rows), copies, *tile.shape[1:]).swapaxes(0, 1)
            origin = (0, *origin)
        return write_region(self.location, "influence", origin, tile)


def score_strip(job: Sealed, scoring: Sealed, index: int) -> str:
    """Differentiate the strip's training samples once, write its tiles, then its ledger entry."""
    opened: Job = job.open()
    run: Scoring = scoring.open()
    began = time.perf_counter()
    strip = run.plan.strip(index)
    records = []
    with torch_threads(opened.threads):
        query = run.query(strip.rows, opened.model.problem())
        for columns in run.plan.columns(strip):
            derivatives = derivatives_of(opened, query, columns, run.plan.batch, run.perturbation)
            for rows in run.plan.rows(strip):
                records += run.write(query, derivatives, strip, rows, columns)
    entry = {
        "rows": [strip.rows.start, strip.rows.stop],
        "columns": [strip.columns.start, strip.columns.stop],
        "shards": [[record.key, record.nbytes, record.checksum] for record in records],
        "seconds": round(time.perf_counter() - began, 6),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
    }
    Ledger(run.location).record(strip.name, entry)
    return strip.name


# -- torch's threads -------------------------------------------------------------------
_THREADS_LOCK = threading.Lock()
_THREADS_DEPTH = 0
_THREADS_BEFORE = 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch's thread count while tasks run, restored when the last one of the process ends."""
    global _THREADS_DEPTH, _THREADS_BEFORE
    with _THREADS_LOCK:
        if _THREADS_DEPTH == 0:
            _THREADS_BEFORE = torch.get_num_threads()
        torch.set_num_threads(count)  # in each thread: OpenMP keeps a count for every one of them
        _THREADS_DEPTH += 1
    try:
        yield
    finally:
        with _THREADS_LOCK:
            _THREADS_DEPTH -= 1
            if _THREADS_DEPTH == 0:
                torch.set_num_threads(_THREADS_BEFORE)
