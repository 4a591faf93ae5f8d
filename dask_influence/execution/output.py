"""Output: the store of one run, begun, continued under the plan that it was begun with, or refused.

``_run/run.json`` holds fingerprint, plan and state; the ledger holds what is done. A run that is called
again lists the ledger and does the rest.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from dask_influence.errors import (
    CorruptStoreError,
    StoreError,
    StoreMismatchError,
)
from dask_influence.execution.base import Executor
from dask_influence.execution.ledger import STATUS_KEY, Ledger, compare_fingerprints
from dask_influence.execution.missing import MissingSamples, forget_missing
from dask_influence.execution.pieces import RESIDUAL, misfit, planned
from dask_influence.execution.plan import Plan
from dask_influence.execution.verify import same_metadata, verify_with
from dask_influence.storage.results import (
    FINAL,
    GROUP_KEY,
    RUN_KEY,
    ArrayTemplate,
    ShardRecord,
    checksum,
    create,
    finish,
    write_region,
)
from dask_influence.storage.stores import Location

RUN_FOLDER = "_run"
"""Everything a run keeps beside its arrays."""

WRITTEN = ("zarr.json", "influence", "factors", "factor_residual", "test", "train", "regularization")
"""All that a run of any kind puts into its store beside ``_run``."""


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
    names : dict
        Ids of samples by side, of dimensions too that the result has not.
    solves : bool
        Whether the run solves factors, rather than read them from another store.
    diagnostics : callable
        What is known of the inverse once everything is solved; readers find it among the attributes.
    """

    location: Location
    fingerprint: dict[str, Any]
    attributes: dict[str, Any]
    ids: dict[str, np.ndarray[Any, Any]]
    names: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    solves: bool = True
    diagnostics: Callable[[], Mapping[str, Any]] = dict
    ledger: Ledger = field(init=False)
    missing: MissingSamples = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ledger", Ledger(self.location))
        object.__setattr__(self, "missing", MissingSamples({**self.ids, **self.names}))

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
                standing = self.ledger.standing(templates, partial(misfit, begun))
                if repair is not None:
                    recorded, stored = stored.get("missing", {}), {**stored, "missing": {}}
                    self.ledger.write_run(stored)  # first: a reduction believes it
                    standing = forget_missing(self.ledger, begun, standing, recorded)
                elif (
                    begun.work.kept is not None
                ):  # entries that are lost may be made again with these samples
                    self.missing.add_recorded(stored.get("missing", {}))
                self.missing.add_entries(standing.missing)
                complete = stored["state"] in FINAL and pieces(begun) <= standing.done
                if not complete:  # also where it was: readers are to be warned until it is again
                    self.ledger.write_run({**stored, "state": "running"})
                self._restore(stored, empty)
                return begun, complete
        self.location.check_writable()
        # Whoever left the state "created" may be dead or at work. Writing the same objects once more is right
        # in both cases, and no tile is written before the state is "running".
        asked = {"fingerprint": self.fingerprint, "plan": plan.to_json(), "solves": self.solves}
        run = {**asked, **_recorded(empty)}
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
        foreign = sorted(coordinates.keys() - empty.keys())
        if foreign:
            raise CorruptStoreError(
                f"{RUN_KEY!r} of {self.location.url} names objects that its run does not write "
                f"({', '.join(foreign)}); pass overwrite=True to replace the run"
            )
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
        own = dict.fromkeys((*WRITTEN, *self._arrays_of_record(), *templates, *self.ids, RUN_FOLDER))
        held = (key.split("/") for key in self.location.list())
        foreign = sorted({parts[0] for parts in held if parts[-1] == GROUP_KEY and parts[0] not in own})
        if foreign:  # they would be in the group that readers open
            raise StoreMismatchError(
                f"{self.location.url} holds {', '.join(map(repr, foreign))} beside its run, which not even "
                "overwrite=True replaces; choose another store, or delete them yourself"
            )
        self.location.check_writable()
        # The folder of the run goes last: while it is there, a second overwrite knows whose data these are.
        for name in own:
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
        return planned(stored)

    def complete(self) -> None:
        """Consolidate metadata, then say that the run is complete, or which samples it lacks."""
        missing = self.missing.as_json()
        state = "incomplete" if missing else "complete"
        lacking = {side: [one["id"] for one in ones] for side, ones in missing.items()}
        said: dict[str, Any] = {"state": state, "diagnostics": dict(self.diagnostics())}
        if missing:
            said["missing"] = lacking
        finish(self.location, {**self.attributes, **said}, again=True)  # what was missing once may be there
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


def write_residuals(output: Output, residuals: np.ndarray[Any, Any]) -> None:
    """The residuals of all test points, and their ledger entry."""
    records = write_region(output.location, "factor_residual", (0,) * residuals.ndim, residuals)
    entry: dict[str, Any] = {"shards": as_json(records)}
    lacking = output.missing.listed("test", 0, residuals.shape[-1])
    output.ledger.record(RESIDUAL, {**entry, "missing": lacking} if lacking else entry)


def as_json(records: Iterable[ShardRecord]) -> list[list[Any]]:
    """Records of shards as ledger entries hold them."""
    return [[record.key, record.nbytes, record.checksum] for record in records]
