"""Tasks: the functions a worker runs. Each is idempotent and returns a few hundred bytes.

They load artifacts by digest, differentiate under the process-wide lock on the process's
private copy of the module, write whole tiles, and only then the ledger entry.
"""

from __future__ import annotations

import itertools
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import optree
import torch
from torch import Tensor

from dask_influence.core import directional, double, sizes
from dask_influence.core.checks import check_samples
from dask_influence.core.estimators import estimates
from dask_influence.core.estimators.base import ChunkFunction, Inverse, without_rounds
from dask_influence.core.factored import Factored, directions_in
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree, sliced
from dask_influence.core.pairs import PairScores
from dask_influence.core.problem import OUT_OF_MEMORY, Problem, check_gradients, check_losses
from dask_influence.errors import DataError
from dask_influence.execution.artifacts import Artifact, Artifacts, let_pass
from dask_influence.execution.base import Sealed, Solver
from dask_influence.execution.job import Job, Missing, torch_threads
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.options import Found, Options
from dask_influence.execution.overlap import Ahead, Behind
from dask_influence.execution.plan import Plan, Strip
from dask_influence.storage.results import ShardRecord, read_index, write_region
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location

_Writing = Behind[list[ShardRecord]]


# -- fit -------------------------------------------------------------------------------
def sum_group(
    job: Sealed, function: ChunkFunction, operand: Artifact, chunks: Sequence[range], first: bool
) -> Moments:
    """Moments of consecutive chunks, added one after the other.

    The ``first`` pass over the data also looks at every loss; sums that are not finite, and
    what model and loss raise, are traced to the sample.
    """
    opened: Job = job.open()
    total: Moments | None = None
    with opened.running():
        for chunk in chunks:
            # loaded here: what a store raises is not the samples' fault
            sums = _Sums(function, operand.load(passing=True), opened.argument, chunk.start, first)
            part = opened.computed(sums, chunk.start, chunk.stop)
            total = part if total is None else total + part
    assert total is not None
    return total


@dataclass(frozen=True)
class _Sums:
    """What :func:`sum_group` makes of a chunk that begins with sample ``start``."""

    function: ChunkFunction
    operand: dict[str, Tensor]
    argument: str
    start: int
    first: bool

    def __call__(self, problem: Problem, x: Tree, y: Tree) -> Moments:
        if self.first:
            check_losses(problem, x, y, self.argument, self.start)
        part = self.function(problem, x, y, self.operand)
        # a sum takes one pass without a temporary; where that overflows, each entry counts
        if not all(value.sum().isfinite() or value.isfinite().all() for value in part.total.values()):
            check_gradients(problem.objective, x, y, self.argument, self.start)
        return part


# -- options ------------------------------------------------------------------------------
def try_options(job: Sealed, options: Options, curvature: str) -> Found:
    """What options cost in accuracy on the job's samples."""
    opened: Job = job.open()
    with torch_threads(opened.threads):
        return Found.of(*opened.batch(0, len(opened.source)), options, curvature)


# -- what a query brings -----------------------------------------------------------------
def sound_samples(job: Sealed) -> list[int]:
    """Places of the job's samples that :func:`check_samples` passes, alone and together.

    Raises
    ------
    DataError, LossError
        Where it passes none of them, or those that it passes alone do not go together.
    """
    opened: Job = job.open()
    with opened.running():
        problem, x, y = opened.batch(0, len(opened.source))
        places: Sequence[int] = range(len(opened.source))
        try:
            check_samples(problem.objective, x, y)
        except OUT_OF_MEMORY:
            raise
        except Exception:  # what the user's model or loss may raise of a sample
            places = [place for place in places if _is_sound(problem, x, y, place)]
            if not places:
                raise
            kept = optree.tree_map(lambda leaf: leaf[torch.tensor(places)], (x, y))
            check_samples(problem.objective, *kept)
    return list(places)


def _is_sound(problem: Problem, x: Tree, y: Tree, place: int) -> bool:
    one = slice(place, place + 1)
    try:
        check_samples(problem.objective, sliced(x, one), sliced(y, one))
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


# -- factors ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Factors:
    """What is known of a run of test points: factors, coefficients of the inverse's directions, or rows of pairs.

    ``rows`` (n, P) or (n, R) in the model's dtype, or (n, W) in that of pairs; ``residual`` (n,)
    float64, NaN where it was not computed. Of several λ there are as many rows for each test point.
    """

    rows: Tensor
    residual: np.ndarray

    @classmethod
    def of(cls, rows: Tensor, residual: Tensor | None = None) -> Factors:
        """With residuals (n,), or none that are known."""
        return cls(rows, np.full(len(rows), np.nan) if residual is None else residual.numpy())

    def without(self, missing: Mapping[int, str], start: int, stop: int) -> Factors:
        """NaN for the ``missing`` ones of test points ``start`` to ``stop``."""
        if not missing:
            return self
        copies = len(self.rows) // (stop - start)
        bad = np.isin(np.repeat(np.arange(start, stop), copies), list(missing))
        rows, residual = self.rows.clone(), self.residual.copy()
        rows[bad], residual[bad] = torch.nan, np.nan
        return Factors(rows, residual)


def query_gradients(job: Job, start: int, stop: int, batch: int, missing: Missing | None = None) -> Tensor:
    """∇θ ℓ of test points, (n, P), on CPU.

    What has no gradient, or none that is finite, is refused, or added to ``missing`` and given
    the gradient of another test point, so that solvers see numbers only.
    """
    return query_rows(job, directional.gradients, start, stop, batch, missing)


def precise_gradients(job: Job, start: int, stop: int, batch: int, missing: Missing | None = None) -> Tensor:
    """The same with the loss differentiated in float64, for solvers whose passes cost much more."""
    return query_rows(job, double.gradients, start, stop, batch, missing)


def query_rows(
    job: Job,
    function: Callable[[Problem, Tree, Tree], Tensor],
    start: int,
    stop: int,
    batch: int,
    missing: Missing | None = None,
) -> Tensor:
    """What ``function`` makes of test points instead of their gradients, in the same way."""
    parts = [job.computed(function, *bounds, missing).cpu() for bounds in pieces(range(start, stop), batch)]
    gradients = parts[0] if len(parts) == 1 else torch.cat(parts)
    bad = refuse_non_finite(gradients, job.argument, start, missing)
    if len(bad):
        finite = np.setdiff1d(np.arange(len(gradients)), bad)
        healthy = gradients[finite[0]].clone() if len(finite) else 0.0
        gradients = gradients.clone()
        gradients[bad] = healthy
    return gradients


def closed_factors(
    job: Job,
    inverse: Solver,
    start: int,
    stop: int,
    batch: int,
    *,
    project: bool,
    certify: bool,
    missing: Missing | None = None,
) -> Factors:
    """Factors of test points where the inverse needs no pass over the data; with ``project`` what stands for them."""
    with job.running():
        solver, bounds = inverse.inverse(), (start, stop, batch, missing)
        if project and solver.directions is None:
            rows = _weighted(job, solver, *bounds)
            factors = Factors.of(rows)
        else:
            found = _projected(job, solver, *bounds, certify=certify) if project else None
            factors = (
                _formed(job, solver, *bounds, project=project, certify=certify) if found is None else found
            )
    return factors.without(missing or {}, start, stop)


def _projected(
    job: Job, inverse: Inverse, start: int, stop: int, batch: int, missing: Missing | None, *, certify: bool
) -> Factors | None:
    """Coefficients of test points from projections of their gradients, which need not be formed.

    None where ``certify`` takes more than projections tell.
    """
    directions, certificate, residual = inverse.directions, inverse.certificate, None
    assert directions is not None
    if not certify:
        along = partial(directional.projections, directions=directions)
    elif certificate is None:
        return None
    else:
        along = partial(directional.certified, certificate=certificate, weighed=inverse.weighed)
    seen = query_rows(job, along, start, stop, batch, missing)
    if certify:
        residual = seen[:, len(directions) :].flatten()
        if (residual < 0).any():
            return None
    rows = inverse.weighed(seen[:, : len(directions)])
    return Factors.of(rows.to(job.model.problem().objective.dtype), residual)


def _formed(
    job: Job,
    inverse: Inverse,
    start: int,
    stop: int,
    batch: int,
    missing: Missing | None,
    *,
    project: bool,
    certify: bool,
) -> Factors:
    """From gradients and, where they are wanted, factors of size P; of coefficients as few as fit at a time."""
    step = stop - start
    if project:
        step = max(1, sizes.BUDGET // (8 * 8 * job.model.problem().objective.size))
    parts = []
    for low in range(start, stop, step):
        gradients = query_gradients(job, low, min(low + step, stop), batch, missing)
        parts.append(solved(inverse, gradients, project=project, certify=certify))
    if len(parts) == 1:
        return parts[0]
    return Factors(torch.cat([one.rows for one in parts]), np.concatenate([one.residual for one in parts]))


def solved(inverse: Inverse, gradients: Tensor, *, project: bool, certify: bool) -> Factors:
    """Factors of test points with these gradients (n, P), or their coefficients."""
    solution = None if project and not certify else without_rounds(inverse.solve(gradients))
    residual = solution.residuals() if certify and solution is not None else None
    rows = inverse.coefficients(gradients) if project or solution is None else solution.factors
    return Factors.of(rows.to(gradients.dtype), residual)


def _weighted(
    job: Job, inverse: Inverse, start: int, stop: int, batch: int, missing: Missing | None
) -> Tensor:
    """Rows of pairs of test points, with what the inverse makes of them, (n·L, W), on CPU."""
    assert inverse.form is not None
    pairs = inverse.form.pairs(job.model.problem())
    return pairs.weighted(query_rows(job, pairs.rows, start, stop, batch, missing))


@dataclass(frozen=True)
class Estimating:
    """What residuals are estimated by (:mod:`~dask_influence.core.estimators.estimates`).

    Attributes
    ----------
    blocks : tuple of Artifact
        ψ of each λ, each of some of the vectors, (L·k, P).
    count : int
        K, of all of them.
    copies : int
        L.
    """

    blocks: tuple[Artifact, ...]
    count: int
    copies: int

    def residuals(self, job: Job, start: int, stop: int, batch: int, missing: Missing) -> np.ndarray:
        """Of test points ``start`` to ``stop``, (n·L,)."""
        sums, lengths = torch.zeros(stop - start, self.copies, dtype=torch.float64), torch.zeros(0)
        with job.running():
            for block in self.blocks:
                along = partial(directional.squared, directions=block.load(passing=True)["vectors"])
                seen = query_rows(job, along, start, stop, batch, missing)
                sums += estimates.squares(seen[:, :-1], self.copies)
                lengths = seen[:, -1]
        return estimates.residuals(sums, lengths, self.count).numpy()


def factor_task(
    job: Sealed,
    start: int,
    stop: int,
    batch: int,
    location: Location,
    inverse: Solver,
    project: bool,
    estimating: Estimating | None = None,
) -> tuple[int, Artifact, list[float], Missing]:
    """:func:`closed_factors`, published; with residuals that are known, or estimated."""
    opened: Job = job.open()
    missing: Missing = {}
    certify = estimating is None
    factors = closed_factors(
        opened, inverse, start, stop, batch, project=project, certify=certify, missing=missing
    )
    if estimating is not None:
        residual = estimating.residuals(opened, start, stop, batch, missing)
        factors = Factors(factors.rows, residual).without(missing, start, stop)
    artifact = Artifacts(location).publish({"rows": factors.rows})
    return start, artifact, factors.residual.tolist(), missing


def gradient_task(
    job: Sealed, start: int, stop: int, batch: int, location: Location
) -> tuple[int, Artifact, Missing]:
    """:func:`precise_gradients`, published: for inverses that need passes, which the client drives."""
    opened: Job = job.open()
    missing: Missing = {}
    with opened.running():
        gradients = precise_gradients(opened, start, stop, batch, missing)
    return start, Artifacts(location).publish({"rows": gradients}), missing


def probe_gradient(sample: int, job: Sealed, *_: Any) -> None:
    """The gradient of one test point alone, of a call of :func:`factor_task` or :func:`gradient_task`."""
    opened: Job = job.open()
    with opened.running():
        query_gradients(opened, sample, sample + 1, 1, {})


# -- scores ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Query:
    """The test side of a strip: scores are ``coefficients`` @ E(``directions``)ᵀ, or products of ``pairs``.

    Attributes
    ----------
    directions : Tensor or Factored
        (D, P).
    coefficients : Tensor or None
        (rows, D), or rows of pairs (rows, W); None stands for the identity.
    missing : numpy array or None
        Which rows have no factors, so that their scores are NaN.
    pairs : PairScores, optional
        How pairs of samples are scored without factors.
    """

    directions: Tensor | Factored
    coefficients: Tensor | None
    missing: np.ndarray | None = None
    pairs: PairScores | None = None

    @classmethod
    def of(
        cls, rows: Tensor, inverse: Inverse | None, problem: Problem, missing: np.ndarray | None = None
    ) -> Query:
        """From factors (``inverse`` None), from coefficients of the inverse's own directions, or from rows of pairs.

        With fewer test points than directions their factors are the cheaper directions. Rows that
        are ``missing`` are taken for zero.
        """
        objective = problem.objective
        if missing is not None:
            rows = rows.clone()
            rows[missing] = 0.0
        # not the training samples' fault; one pass without a temporary, unless it overflows
        if not (rows.sum().isfinite() or rows.isfinite().all()):
            raise DataError("factors hold NaN or inf; compute them again")
        own = None if inverse is None else inverse.directions
        if inverse is not None and own is None:
            assert inverse.form is not None
            pairs = inverse.form.pairs(problem)
            return cls(pairs.directions, rows.to(objective.device, pairs.dtype), missing, pairs)
        if isinstance(own, Tensor) and len(rows) < len(own):
            rows, own = (rows.to(torch.float64) @ own.to(torch.float64)).to(objective.dtype), None
        if own is None:
            return cls(rows.to(objective.device, objective.dtype), None, missing)
        # factors of half precision would be wrong by more than their product
        wide = isinstance(own, Factored) and objective.dtype.itemsize < torch.float32.itemsize
        directions = directions_in(own, torch.float32 if wide else objective.dtype, objective.device)
        return cls(directions, rows.to(objective.device, objective.dtype), missing)


def derivatives_of(
    job: Job,
    query: Query,
    columns: range,
    batch: int,
    perturbation: bool,
    missing: Missing | None = None,
) -> Tensor:
    """E of training samples ``columns``: (n, D) or (n, D, *features); of pairs their rows (n, W).

    Samples without derivatives, or finite ones, are refused, or added to ``missing`` and NaN.
    """
    along: Callable[[Problem, Tree, Tree], Tensor]
    if query.pairs is not None:
        along = query.pairs.rows
    elif perturbation:
        assert isinstance(query.directions, Tensor)
        along = partial(directional.mixed_derivatives, directions=query.directions)
    else:
        along = partial(directional.directional_derivatives, directions=query.directions)
    parts = []
    for low, high in pieces(columns, batch):
        derivatives = job.computed(along, low, high, missing)
        refuse_non_finite(derivatives, job.argument, low, missing)
        bad = [sample - low for sample in missing or () if low <= sample < high]
        if bad:
            derivatives = derivatives.clone()
            derivatives[bad] = torch.nan
        parts.append(derivatives)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pieces(samples: range, most: int) -> Iterator[tuple[int, int]]:
    """Bounds of runs of at most so many samples."""
    return ((low, min(low + most, samples.stop)) for low in range(samples.start, samples.stop, most))


def refuse_non_finite(rows: Tensor, argument: str, start: int, missing: Missing | None = None) -> np.ndarray:
    """Places of the samples, counted from ``start``, whose row holds NaN or inf, as where their loss does.

    They are added to ``missing``; where that is None, the first one is refused by its name.
    """
    if rows.sum().isfinite():  # one pass without a temporary; an overflow only sends us on
        return np.empty(0, int)
    bad = np.flatnonzero((~rows.isfinite().flatten(1).all(dim=1)).cpu().numpy())
    if len(bad) and missing is None:
        raise DataError(
            f"{argument}: the gradient of sample {start + int(bad[0])} is not finite, or its loss is not; "
            "look at its input and its target, or leave the sample out"
        )
    for place in bad.tolist():
        assert missing is not None
        missing.setdefault(start + place, "its loss or gradient is not finite")
    return bad


def tile_of(query: Query, derivatives: Tensor, rows: slice) -> np.ndarray:
    """C Eᵀ for test points ``rows`` of the query: (rows, n) or (rows, n, *features)."""
    if query.pairs is not None:
        assert query.coefficients is not None
        tile = query.pairs.scores(query.coefficients[rows], derivatives)
    elif query.coefficients is None:
        tile = derivatives[:, rows].transpose(0, 1)
    else:
        tile = torch.einsum("rd,nd...->rn...", query.coefficients[rows], derivatives)
    if query.missing is not None and query.missing[rows].any():
        tile = tile.clone()
        tile[query.missing[rows]] = torch.nan
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
    missing : tuple of int
        Test points without factors.
    """

    plan: Plan
    factors: tuple[Artifact, ...]
    inverse: Solver | None
    perturbation: bool
    location: Location
    missing: tuple[int, ...] = ()

    def query(self, rows: range, problem: Problem) -> Query:
        """The query of test points ``rows``, made once per process and kept until another is wanted."""
        key = (tuple(artifact.digest for artifact in self.factors), rows, self.missing, self.location.url)
        return _QUERIES.get(key, lambda: self._query(rows, problem))

    def _query(self, rows: range, problem: Problem) -> Query:
        """From the chunks of factors that hold them, each read once and copied into place."""
        let_pass()
        inverse = None if self.inverse is None else self.inverse.inverse()
        chunks, copies = self.plan.factor_chunks, self.plan.work.copies
        held: Tensor | None = None
        for part in chunks.within(rows.start, rows.stop):
            index = part.start // chunks.size
            offset = chunks[index].start
            found = self.factors[index].mapped()["rows"]
            if held is None:
                held = torch.empty(len(rows) * copies, found.shape[1], dtype=found.dtype)
            low, high = ((end - rows.start) * copies for end in (part.start, part.stop))
            held[low:high] = found[(part.start - offset) * copies : (part.stop - offset) * copies]
        assert held is not None
        bad = None
        if self.missing:
            bad = np.isin(np.repeat(np.arange(rows.start, rows.stop), copies), self.missing)
        return Query.of(held, inverse, problem, bad)

    def ahead(self, source: Source, strip: Strip) -> Ahead:
        """The strip's training samples, read in the batches in which they are differentiated."""
        batches = (part for held in self.plan.together(strip) for part in pieces(held, self.plan.batch))
        return Ahead(source, batches)

    def tile(self, query: Query, derivatives: Tensor, strip: Strip, rows: range) -> np.ndarray:
        """Scores of test points ``rows``, (rows, n, *features); at each of several λ where there are some."""
        copies = self.plan.work.copies
        low, high = ((end - strip.rows.start) * copies for end in (rows.start, rows.stop))
        tile = tile_of(query, derivatives, slice(low, high))
        if self.plan.work.regularizations is not None:
            tile = tile.reshape(len(rows), copies, *tile.shape[1:]).swapaxes(0, 1)
        return np.ascontiguousarray(tile)  # of its own: the derivatives may go while it is written

    def write(self, tile: np.ndarray, rows: range, columns: range) -> list[ShardRecord]:
        """The tile of test points ``rows`` and training points ``columns``, one for each of several λ."""
        origin = (rows.start, columns.start, *([0] * len(self.plan.work.features)))
        if self.plan.work.regularizations is not None:
            origin = (0, *origin)
        return write_region(self.location, "influence", origin, tile)


def score_strip(job: Sealed, scoring: Sealed, index: int) -> Missing:
    """Differentiate the strip's training samples once, write its tiles, then its ledger entry.

    Columns of samples that cannot be used are NaN; they are in the entry, and returned. A strip whose
    entry is there is not computed again.
    """
    opened: Job = job.open()
    run: Scoring = scoring.open()
    began = time.perf_counter()
    strip = run.plan.strip(index)
    written = Ledger(run.location).read(strip.name)
    if written is not None:  # by a worker that was lost before it could say so, or for another client
        return {one["sample"]: one["reason"] for one in written.get("missing", ())}
    missing = Missing()
    with (
        opened.running(),
        closing(run.ahead(opened.source, strip)) as source,
        _Writing(run.plan.written_at_once) as writing,
    ):
        query, ahead = run.query(strip.rows, opened.model.problem()), replace(opened, source=source)
        for held in run.plan.together(strip):
            derivatives = derivatives_of(ahead, query, held, run.plan.batch, run.perturbation, missing)
            for rows, columns in run.plan.tiles_of(strip, held):
                own = derivatives[columns.start - held.start : columns.stop - held.start]
                writing.submit(partial(run.write, run.tile(query, own, strip, rows), rows, columns))
    records = itertools.chain.from_iterable(writing.results)
    entry: dict[str, Any] = {
        "rows": [strip.rows.start, strip.rows.stop],
        "columns": [strip.columns.start, strip.columns.stop],
        "shards": [[record.key, record.nbytes, record.checksum] for record in records],
        **effort(began),
    }
    if missing:
        ids = read_index(run.location, "train", sorted(missing))
        entry["missing"] = listed(missing, ids)
    Ledger(run.location).record(strip.name, entry)
    return missing


def effort(began: float) -> dict[str, Any]:
    """What a ledger entry says of the work itself: how long, until when, by whom, in a process of which peak memory.

    ``began`` is of ``time.perf_counter``; the peak is that of the process since it started.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(time.perf_counter() - began, 6),
        "ended": round(time.time(), 3),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def listed(missing: Missing, ids: Mapping[int, Any]) -> list[dict[str, Any]]:
    """Missing samples as the ledger holds them: position, id and reason."""
    return [{"sample": j, "id": ids[j], "reason": missing[j]} for j in sorted(missing)]


def probe_column(sample: int, job: Sealed, scoring: Sealed, index: int) -> None:
    """The derivatives of one training sample alone, of a call of :func:`score_strip`."""
    opened: Job = job.open()
    run: Scoring = scoring.open()
    with opened.running():
        query = run.query(run.plan.strip(index).rows, opened.model.problem())
        derivatives_of(opened, query, range(sample, sample + 1), 1, run.perturbation, {})


class _Latest:
    """The last value of this process, made once even by many threads; another takes its place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        with self._lock:
            if self._value is None or key != self._key:
                self._value = None  # freed before another is made
                self._key, self._value = key, make()
            return self._value


_QUERIES = _Latest()
