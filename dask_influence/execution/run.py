"""A run that writes to a store: plan, validate, factors, strips, consolidate; and resume.

``_run/run.json`` holds fingerprint, plan and state; the ledger holds what is done. A run
that is called again lists the ledger and does the rest.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch

from dask_influence.core.estimators.base import Inverse, System
from dask_influence.errors import (
    CorruptStoreError,
    InfluenceWarning,
    NotFittedError,
    StoreError,
    StoreMismatchError,
)
from dask_influence.execution import quarantine, tasks
from dask_influence.execution.artifacts import Artifact, Artifacts, whole
from dask_influence.execution.base import Executor, Model, Solver
from dask_influence.execution.drive import Passes, iterated_factors
from dask_influence.execution.ledger import STATUS_KEY, Ledger, compare_fingerprints
from dask_influence.execution.missing import MissingSamples, forget_missing
from dask_influence.execution.plan import FACTORS, RESIDUAL, Plan, factor_name
from dask_influence.execution.progress import Report, reporting
from dask_influence.execution.verify import same_metadata, verify_with
from dask_influence.execution.work import Work
from dask_influence.grid import Chunks
from dask_influence.storage.results import (
    FINAL,
    GROUP_KEY,
    RUN_KEY,
    ArrayTemplate,
    ShardRecord,
    checksum,
    create,
    finish,
    open_influences,
    unfinished,
    write_region,
)
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location

RUN_FOLDER = "_run"
"""Everything a run keeps beside its arrays."""

WRITTEN = ("zarr.json", "influence", "factors", "factor_residual", "test", "train", "regularization")
"""All that a run of any kind puts into its store beside ``_run``."""


@dataclass(frozen=True)
class Fit:
    """What a run needs of a fitted model.

    Attributes
    ----------
    model : Model
        Loadable by every task.
    inverse, solver : Inverse, Solver
        The inverse, here and as tasks load it.
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


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it must not overwrite.

    Attributes
    ----------
    location : Location
        The store.
    fingerprint : dict
        Everything that the stored numbers depend on.
    attributes : dict
        Provenance, readable by people.
    ids : dict
        Coordinates by dimension name.
    """

    location: Location
    fingerprint: dict[str, Any]
    attributes: dict[str, Any]
    ids: dict[str, np.ndarray[Any, Any]]
    ledger: Ledger = field(init=False)
    missing: MissingSamples = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ledger", Ledger(self.location))
        object.__setattr__(self, "missing", MissingSamples(self.ids))

    @property
    def artifacts(self) -> Location:
        """Artifacts of this run."""
        return self.location.child(RUN_FOLDER, "artifacts")

    def prepare(
        self,
        plan: Plan,
        templates: Mapping[str, ArrayTemplate],
        pieces: Callable[[Plan], set[str]],
        *,
        resume: bool,
        overwrite: bool,
        repair: Executor | None = None,
    ) -> tuple[Plan, bool]:
        """Make the store ready and return the plan to follow, and whether it is already complete.

        A store of the same fingerprint is continued under the plan that it was begun with. It
        is complete when it says so, the ledger lists all ``pieces`` of that plan and their
        shards are there; with ``repair``, whose workers then read everything, when they are also
        what was written, and samples that were missing are tried again. Lost metadata and
        coordinates are written again.

        Raises
        ------
        StoreMismatchError
            The store holds something else, or may not be resumed.
        CorruptStoreError
            The record of the run that it holds is damaged.
        StoreError
            It cannot be written.
        """
        empty = self._template(templates)
        cleared = overwrite and self._cleared(templates)
        stored = self.ledger.read_begun()
        if stored is None and not cleared:
            stored = self._begun_elsewhere()
        if stored is not None:
            begun = self._resumed(stored, resume)
            if stored["state"] != "created":
                if repair is not None:
                    verify_with(self.location, repair, repair=True)
                    stored = self.ledger.read_begun() or stored
                entries = self.ledger.forget_damaged()
                if repair is not None:
                    forget_missing(self.ledger, begun, entries)
                self.missing.add_entries(entries)
                complete = stored["state"] in FINAL and pieces(begun) <= self.ledger.done()
                if not complete:  # also where it was: readers are to be warned until it is again
                    self.ledger.write_run({**stored, "state": "running"})
                self._restore(stored, empty)
                return begun, complete
        self.location.check_writable()
        # Whoever left the state "created" may be dead or at work. Writing the same objects once more is right
        # in both cases, and no tile is written before the state is "running".
        run = {"fingerprint": self.fingerprint, "plan": plan.to_json(), **_recorded(empty)}
        self.ledger.write_run({**run, "state": "created"})
        for key, data in empty.items():
            self.location.put(key, data)
        self.ledger.write_run({**run, "state": "running"})
        return plan, False

    def _template(self, templates: Mapping[str, ArrayTemplate]) -> dict[str, bytes]:
        """Objects of the empty store, made in memory, so that clients that begin at once write the same."""
        scratch = Location.of(f"memory://dask-influence-templates/{uuid.uuid4().hex}")
        try:
            create(scratch, templates, coordinates=self.ids, attributes=self.attributes)
            return scratch.get_many(scratch.list())
        finally:
            scratch.delete()

    def _restore(self, run: Mapping[str, Any], empty: Mapping[str, bytes]) -> None:
        """Metadata that are lost, as the run recorded them, and coordinates, which the call has."""
        metadata = run.get("metadata", {})
        held = self.location.get_many(metadata)
        for key, text in metadata.items():
            if key not in held or not same_metadata(run, key, held[key]):
                self.location.put(key, text.encode())
        coordinates = {key: written for key, _, written in run.get("objects", ()) if key not in metadata}
        held = self.location.get_many(coordinates)
        for key, written in coordinates.items():
            if key not in held or checksum(held[key]) != written:
                self.location.put(key, empty[key])

    def _begun_elsewhere(self) -> dict[str, Any] | None:
        """The record of a client that began a moment ago, if what is there is its work; else None if empty."""
        held = [key for key in self.location.list() if key != STATUS_KEY]
        if all(key.rpartition("/")[2].startswith(".probe-") for key in held):
            return None  # empty, but for what check_writable of another client tries
        stored = self.ledger.read_begun()  # the first object that a run writes
        if stored is None and self.location.list(RUN_FOLDER):
            raise CorruptStoreError(
                f"{RUN_KEY!r} of {self.location.url}, the record of the run that it holds, is lost; "
                "pass overwrite=True to replace the run"
            )
        if stored is None:
            raise StoreMismatchError(
                f"{self.location.url} holds data that no run of dask_influence wrote, which not even "
                "overwrite=True replaces; choose another store, or delete them yourself"
            )
        return stored

    def _cleared(self, templates: Mapping[str, ArrayTemplate]) -> bool:
        """Remove what an earlier run wrote, and nothing else; False where there was no run."""
        if not self.location.list(RUN_FOLDER):
            return False
        with suppress(CorruptStoreError):  # a damaged record is what overwrite=True replaces
            self._refuse_own_factors(self.ledger.read_begun())
        self.location.check_writable()
        # The folder of the run goes last: while it is there, a second overwrite knows whose data these are.
        for name in dict.fromkeys((*WRITTEN, *self._arrays_of_record(), *templates, *self.ids, RUN_FOLDER)):
            self.location.delete(name)
        return True

    def _arrays_of_record(self) -> list[str]:
        """Arrays whose metadata the record of an earlier run holds, such as those of a reduction."""
        try:
            stored = self.ledger.read_run() or {}
        except CorruptStoreError:
            return []
        return [name for name in (key.rpartition("/")[0] for key in stored.get("metadata", {})) if name]

    def _refuse_own_factors(self, stored: dict[str, Any] | None) -> None:
        """Scores must not replace the factors that they may be read from."""
        held = {} if stored is None else stored["fingerprint"]
        if (
            held.get("kind") == "factors"
            and self.fingerprint.get("kind") != "factors"
            and held.get("test") == self.fingerprint.get("test")
        ):
            raise StoreMismatchError(
                f"{self.location.url} holds the influence factors of these test data, which overwrite=True does not "
                "replace by their scores; choose another store"
            )

    def _resumed(self, stored: dict[str, Any], resume: bool) -> Plan:
        differing = compare_fingerprints(stored["fingerprint"], self.fingerprint)
        if differing:
            raise StoreMismatchError(
                f"{self.location.url} holds another run: {'; '.join(differing)}. "
                "Choose another store, or pass overwrite=True to replace it"
            )
        if not resume:
            raise StoreMismatchError(
                f"{self.location.url} already holds this run ({stored['state']}) and resume=False; "
                "pass resume=True to continue it or overwrite=True to replace it"
            )
        return Plan.from_json(stored["plan"])

    def complete(self) -> None:
        """Consolidate metadata, then say that the run is complete, or which samples it lacks."""
        missing = self.missing.as_json()
        state = "incomplete" if missing else "complete"
        lacking = {side: [one["id"] for one in ones] for side, ones in missing.items()}
        said = {"state": state, "missing": lacking} if missing else {"state": state}
        self.location.put(
            GROUP_KEY, unfinished(self.location.get(GROUP_KEY))
        )  # what was missing once may be there
        finish(self.location, {**self.attributes, **said})
        run = self.ledger.read_run()
        if run is None:
            raise StoreError(f"{self.location.url}: _run/run.json vanished while the run was going on")
        group = self.location.get(GROUP_KEY).decode()
        metadata = {**run.get("metadata", {}), GROUP_KEY: group}
        self.ledger.write_run({**run, "metadata": metadata, "missing": missing, "state": state})


def _recorded(objects: Mapping[str, bytes]) -> dict[str, Any]:
    """What a run remembers of the objects of its empty store: checksums, and metadata as they are."""
    return {
        "objects": [[key, len(data), checksum(data)] for key, data in sorted(objects.items())],
        "metadata": {key: data.decode() for key, data in objects.items() if key.endswith(GROUP_KEY)},
    }


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
    """‖(H + λI) s − g‖ / ‖g‖ for each test point, at each of several λ."""
    swept = () if work.regularizations is None else (work.regularizations,)
    shape = (*swept, work.tests)
    return ArrayTemplate(
        dims=(*swept_dims(work), "test"), shape=shape, tile=shape, dtype=np.dtype("float64"), coordinate=True
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
) -> tuple[Artifact, ...]:
    """Factors of all test points, each solved once, kept in the run's artifacts, with residuals written.

    Chunks that the ledger already lists are not solved again, unless their artifact is missing or damaged.
    """
    chunks = plan.factor_chunks
    known = _held_factors(output)
    missing = [index for index in range(len(chunks)) if factor_name(index) not in known]
    job = executor.seal(tasks.Job(fit.model, executor.reachable(source, chunks.size), "test", fit.threads))
    calls: list[tuple[Any, ...]] = [
        (job, chunks[index].start, chunks[index].stop, plan.batch, output.artifacts) for index in missing
    ]
    if fit.needs_rounds:
        solved = _by_rounds(executor, fit, calls, output.artifacts)
    else:
        calls = [(*call, fit.solver, project) for call in calls]
        solved = surviving(executor, tasks.factor_task, quarantine.isolated_factors, calls)
    done = len(chunks) - len(missing)
    progress("factors", done, len(chunks))
    for start, artifact, residual, bad in solved:
        index = start // chunks.size
        entry = {"digest": artifact.digest, "nbytes": artifact.nbytes, "residual": list(residual)}
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
    if missing or RESIDUAL not in output.ledger.done():
        write_residuals(output, residuals)
    return tuple(Artifact(entry["digest"], entry["nbytes"], output.artifacts) for entry in entries)


def write_residuals(output: Output, residuals: np.ndarray[Any, Any]) -> None:
    """The residuals of all test points, and their ledger entry."""
    records = write_region(output.location, "factor_residual", (0,) * residuals.ndim, residuals)
    entry: dict[str, Any] = {"shards": as_json(records)}
    lacking = output.missing.listed("test", 0, residuals.shape[-1])
    output.ledger.record(RESIDUAL, {**entry, "missing": lacking} if lacking else entry)


def as_json(records: Iterable[ShardRecord]) -> list[list[Any]]:
    """Records of shards as ledger entries hold them."""
    return [[record.key, record.nbytes, record.checksum] for record in records]


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
    executor: Executor, fit: Fit, calls: list[tuple[Any, ...]], location: Location
) -> Iterator[tuple[int, Artifact, list[float], tasks.Missing]]:
    """Where solving or certifying takes passes: gradients by tasks, rounds driven from here."""
    answer = fit.answer()
    for start, gradients, missing in surviving(
        executor, tasks.gradient_task, quarantine.isolated_gradients, calls
    ):
        # torch's own memory: aligned the same wherever the rows came from, hence the same bits
        rows = gradients.read()["rows"].clone()
        solved = iterated_factors(fit.inverse, fit.system, answer, rows, certify=fit.certify)
        factors = solved.without(missing, start, start + len(rows))
        artifact = Artifacts(location).publish({"rows": factors.rows})
        yield start, artifact, factors.residual.tolist(), missing


def surviving(
    executor: Executor,
    task: Callable[..., Any],
    isolated: Callable[..., Any],
    calls: Iterable[tuple[Any, ...]],
) -> Iterator[Any]:
    """Results of ``task(*call)``; calls that lost their workers are made again by ``isolated``, at the end."""
    suspects: list[tuple[Any, ...]] = []
    yield from executor.map(task, calls, suspects.append)
    yield from executor.map(isolated, suspects)


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
    """Every strip that the ledger does not list."""
    done = output.ledger.done()
    missing = [index for index in range(plan.strips) if plan.strip(index).name not in done]
    total = plan.strips
    progress("strips", total - len(missing), total)
    if not missing:
        return
    job = executor.seal(tasks.Job(fit.model, executor.reachable(source, plan.tile[1]), "train", fit.threads))
    scoring = executor.seal(
        tasks.Scoring(
            plan,
            factors,
            fit.solver if project else None,
            perturbation,
            output.location,
            output.missing.positions("test"),
        )
    )
    finished = total - len(missing)
    calls = ((job, scoring, index) for index in missing)
    for bad in surviving(executor, tasks.score_strip, quarantine.isolated_strip, calls):
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
    with reporting(progress) as report:
        if isinstance(test, StoredFactors):
            factors = import_factors(test, output, plan.factor_chunks)
        else:
            factors = solve_factors(executor, fit, test, output, plan, project, report)
        score_strips(executor, fit, train, output, plan, factors, project, perturbation, report)
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
    with reporting(progress) as report:
        factors = solve_factors(executor, fit, test, output, plan, False, report)
        entries = output.ledger.entries(FACTORS)
        for index, (rows, artifact) in enumerate(zip(plan.factor_chunks, factors, strict=True)):
            block = tasks.stored(artifact.read()["rows"])
            records = write_region(output.location, "factors", (rows.start, 0), block)
            name = factor_name(index)
            output.ledger.record(name, {**entries[name], "shards": as_json(records)})
    output.complete()


@dataclass(frozen=True)
class StoredFactors:
    """Factors that an earlier run wrote, in place of test data."""

    location: Location
    fingerprint: dict[str, Any]
    ids: np.ndarray[Any, Any]
    missing: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def found(cls, test: Any, storage_options: Mapping[str, Any] | None) -> StoredFactors | None:
        """The factors at ``test``, or None where it is not the path of a store of factors.

        Raises
        ------
        StoreError
            The store is one of factors, but its run never completed.
        """
        if not isinstance(test, (str, PathLike, Location)):
            return None
        location = Location.of(test, storage_options)
        run = Ledger(location).read_begun()
        if run is None or run["fingerprint"].get("kind") != "factors":
            return None
        if run["state"] not in FINAL:
            raise StoreError(
                f"{location.url} holds factors of a run that is {run['state']}; call influence_factors_to_zarr again"
            )
        with warnings.catch_warnings():  # the run that uses them says what they lack
            warnings.simplefilter("ignore", InfluenceWarning)
            ids = np.asarray(open_influences(location)["test"])
        return cls(location, run["fingerprint"], ids, run.get("missing", {}).get("test", []))

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """Digest of what the factors were computed from."""
        return str(self.fingerprint["test"])

    def check(self, identity: Mapping[str, Any]) -> None:
        """Refuse factors of another model, estimator or λ."""
        differing = compare_fingerprints(
            {name: self.fingerprint.get(name) for name in identity}, dict(identity)
        )
        if differing:
            raise StoreMismatchError(
                f"{self.location.url} holds factors of another fit: {'; '.join(differing)}. "
                "Score them with the model they were computed with"
            )


def import_factors(stored: StoredFactors, output: Output, chunks: Chunks) -> tuple[Artifact, ...]:
    """Factors of an earlier run as artifacts of this one, with their residuals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InfluenceWarning)
        dataset = open_influences(stored.location)
    artifacts = Artifacts(output.artifacts)
    output.missing.add("test", {one["sample"]: one["reason"] for one in stored.missing})
    write_residuals(output, np.asarray(dataset["factor_residual"]))
    return tuple(
        artifacts.publish({"rows": torch.from_numpy(np.asarray(dataset["factors"][rows.start : rows.stop]))})
        for rows in chunks
    )
