"""Verify: every stored object of a run against what was recorded of it, and what is damaged withdrawn.

Records are those that the tasks wrote: the ledger for shards, ``run.json`` for the metadata of the
arrays and their coordinates, the header of an artifact for its tensors. Objects are read in
pieces and by many readers, so verification takes as long as reading and next to no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from typing import Any

from dask_influence.errors import CorruptStoreError, StoreError
from dask_influence.execution.artifacts import damaged_artifact
from dask_influence.execution.base import Executor
from dask_influence.execution.dask import DaskExecutor
from dask_influence.execution.ledger import Ledger, entry_key
from dask_influence.execution.pieces import expected_pieces, misfit, planned
from dask_influence.execution.plan import Plan
from dask_influence.execution.units import format_bytes
from dask_influence.storage.results import FINAL, GROUP_KEY, RUN_KEY, ShardRecord, damage, unfinished
from dask_influence.storage.stores import Location

ARTIFACTS = "_run/artifacts"
DAMAGED = "damaged"
"""State of a run from which damaged pieces were withdrawn; readers are warned, and the same call again mends it."""

THREADS = 16
"""Readers of this process."""

GROUP_BYTES = 256 * 2**20
GROUP_OBJECTS = 256
"""What one reader takes at a time."""

SHOWN = 20
"""Damaged objects that the text of a verification lists."""


@dataclass(frozen=True)
class Damage:
    """One object that is not what was written.

    Attributes
    ----------
    key : str
        Its name in the store.
    piece : str
        What it belongs to: the strip or factor task that wrote it, ``"metadata"``, ``"coordinates"``,
        ``"artifacts"``, ``"ledger"`` or ``"run"``.
    wrong : str
        What is wrong with it.
    """

    key: str
    piece: str
    wrong: str

    def __str__(self) -> str:
        return f"{self.key} ({self.piece}) {self.wrong}"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; true where nothing is damaged.

    Attributes
    ----------
    url : str
        The store.
    state : str
        Of its run, as it is now.
    objects, nbytes : int
        Objects that were read, and their bytes as recorded.
    damaged : tuple of Damage
        Every object that is not what was written.
    unfinished : int
        Pieces of work that the run has not done yet: no damage, but not there either.
    repaired : bool
        Whether what is damaged was rebuilt or withdrawn.
    """

    url: str
    state: str
    objects: int
    nbytes: int
    damaged: tuple[Damage, ...] = ()
    unfinished: int = 0
    repaired: bool = False

    @property
    def ok(self) -> bool:
        """Whether everything that was written is what was written."""
        return not self.damaged

    def __bool__(self) -> bool:
        return self.ok

    @property
    def pieces(self) -> tuple[str, ...]:
        """What the damaged objects belong to, each named once, sorted."""
        return tuple(sorted({found.piece for found in self.damaged}))

    def __str__(self) -> str:
        read = f"{self.url} ({self.state}): {self.objects:,} objects, {format_bytes(self.nbytes)} read"
        rest = f"; {self.unfinished:,} pieces of work are not done yet" if self.unfinished else ""
        if self.ok:
            return f"{read}; all as written{rest}"
        lines = [f"  {found}" for found in self.damaged[:SHOWN]]
        if len(self.damaged) > SHOWN:
            lines.append(f"  and {len(self.damaged) - SHOWN:,} more")
        return "\n".join([f"{read}; {len(self.damaged):,} damaged{rest}", *lines, self._advice()])

    def _advice(self) -> str:
        if any(found.piece == "run" for found in self.damaged):
            return "The record of the run is lost: make the call that wrote it again with overwrite=True."
        if not self.repaired:
            return "verify(store, repair=True), then the call that wrote it, recomputes just these."
        if self.state == DAMAGED:
            return "Withdrawn: make the call that wrote the store again, and it recomputes just these."
        return "Repaired; no score was damaged."


def verify(
    store: str | PathLike[str] | Location,
    *,
    repair: bool = False,
    client: Any = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Verification:
    """Read everything that a run wrote again, and compare it with what was recorded when it was written.

    Shards, coordinates, metadata of the arrays, the run's record, its ledger and its artifacts are
    looked at; a flipped byte, a truncated file and a missing one are each found and named.

    Parameters
    ----------
    store : path or URL
        What ``influences_to_zarr`` or ``influence_factors_to_zarr`` wrote.
    repair : bool
        Rebuild metadata, and withdraw what else is damaged from the ledger, so that the call that wrote the
        store recomputes just that (``influences_to_zarr(..., repair=True)`` does both). Until then readers are
        warned, and the scores concerned read as NaN. Not to be used while a run is writing to the store.
    client : distributed.Client, optional
        Its workers read; by default threads of this process.
    storage_options : mapping, optional
        Credentials and client settings.

    Returns
    -------
    Verification
        True where all is as written; its text says what is not.

    Raises
    ------
    StoreError
        No run wrote to that place, or it cannot be read.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import DirectInfluence
    >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
    >>> model = torch.nn.Linear(3, 2)
    >>> infl = DirectInfluence(model, torch.nn.functional.cross_entropy, 0.1).fit((x, y))
    >>> scores = infl.influences_to_zarr("memory://verify-example", (x, y), (x, y))
    >>> verify("memory://verify-example").ok
    True
    >>> Location.of("memory://verify-example").delete("influence/c/0/0")
    >>> print(*verify("memory://verify-example").damaged)
    influence/c/0/0 (strip-000000) is missing
    """
    location = Location.of(store, storage_options)
    executor = None if client is None else DaskExecutor(client, location.child(ARTIFACTS))
    if executor is not None:
        executor.check_reach(location)  # or all would be missing, and withdrawn with repair
    return verify_with(location, executor, repair=repair)


def verify_with(location: Location, executor: Executor | None, *, repair: bool = False) -> Verification:
    """:func:`verify` by an executor's workers, or by threads of this process."""
    ledger = Ledger(location)
    try:
        run = ledger.read_begun()
        plan = None if run is None else planned(run)
    except CorruptStoreError as error:
        return Verification(location.url, "unknown", 1, 0, (Damage(RUN_KEY, "run", str(error)),))
    if run is None or plan is None:
        if not location.list("_run"):
            raise StoreError(f"{location.url} holds no run of dask_influence; check the URL")
        return Verification(location.url, "unknown", 1, 0, (Damage(RUN_KEY, "run", "is missing"),))
    found = _Survey.of(location, ledger, run, plan)
    damaged = [*found.damaged, *_examined(location, executor, found)]
    damaged.sort(key=lambda one: one.key)
    report = Verification(
        location.url,
        run["state"],
        found.read + len(found.records) + len(found.artifacts),
        found.read_bytes + sum(record.nbytes for record in found.records.values()) + found.artifact_bytes,
        tuple(damaged),
        len(found.unfinished),
    )
    if report.ok or not repair:
        return report
    return replace(report, state=_repair(location, ledger, run, found, damaged), repaired=True)


# -- what there should be --------------------------------------------------------------
@dataclass
class _Survey:
    """What the records say, and what is seen to be damaged without reading a shard.

    Attributes
    ----------
    records : dict of str to ShardRecord
        What is to be read, by key.
    owners : dict of str to str
        The piece that wrote it.
    artifacts : dict of str to list of str
        Ledger entries that need each artifact, by its key.
    """

    entries: dict[str, dict[str, Any]]
    records: dict[str, ShardRecord] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    artifact_bytes: int = 0
    read: int = 0
    read_bytes: int = 0
    unfinished: set[str] = field(default_factory=set)
    damaged: list[Damage] = field(default_factory=list)

    @classmethod
    def of(cls, location: Location, ledger: Ledger, run: Mapping[str, Any], plan: Plan) -> _Survey:
        entries, torn = ledger.survey(partial(misfit, plan))
        survey = cls(entries)
        survey.read = 1 + len(entries) + len(torn)
        survey.damaged += [Damage(key, "ledger", wrong) for key, wrong in torn.items()]
        for name, entry in entries.items():
            for shard in entry.get("shards", ()):
                survey._expect(ShardRecord(*shard), name)
        for key, nbytes, written in run.get("objects", ()):
            if key not in run.get("metadata", ()):
                survey._expect(ShardRecord(key, nbytes, written), "coordinates")
        survey._look_at_metadata(location, run)
        survey._list_artifacts(location)
        lost = expected_pieces(run) - ledger.done() - {key.split("/")[-1].partition(".")[0] for key in torn}
        if run["state"] in FINAL:
            survey.damaged += [Damage(entry_key(name), name, "is missing") for name in lost]
        else:
            survey.unfinished = lost
        return survey

    def _expect(self, record: ShardRecord, piece: str) -> None:
        self.records[record.key] = record
        self.owners[record.key] = piece

    def _look_at_metadata(self, location: Location, run: Mapping[str, Any]) -> None:
        expected = dict(run.get("metadata", {}))
        stored = location.get_many(expected)
        for key, text in expected.items():
            self.read, self.read_bytes = self.read + 1, self.read_bytes + len(text.encode())
            if key not in stored:
                self.damaged.append(Damage(key, "metadata", "is missing"))
            elif not same_metadata(run, key, stored[key]):
                self.damaged.append(Damage(key, "metadata", "is not what was written"))

    def _list_artifacts(self, location: Location) -> None:
        held = location.child(ARTIFACTS).stat()
        self.artifacts = {key: [] for key in held if key.endswith(".safetensors") and "/" not in key}
        self.artifact_bytes = sum(held[key][0] for key in self.artifacts)
        for name, entry in self.entries.items():
            if "digest" in entry:
                self.artifacts.setdefault(f"{entry['digest']}.safetensors", []).append(name)


def same_metadata(run: Mapping[str, Any], key: str, stored: bytes) -> bool:
    """Whether the metadata of a group or an array are those that the run wrote."""
    text = run["metadata"][key].encode()
    if key != GROUP_KEY or stored == text:
        return stored == text
    # A run that was interrupted while it finished has added to its group what it adds at the end.
    try:
        return run["state"] not in FINAL and unfinished(stored) == unfinished(text)
    except ValueError:
        return False


# -- reading ---------------------------------------------------------------------------
def _examined(location: Location, executor: Executor | None, found: _Survey) -> Iterator[Damage]:
    """What is wrong with the objects that have to be read."""
    calls = [(location, tuple(group)) for group in _groups(found.records.values())]
    tensors = [(location.child(ARTIFACTS), (key,)) for key in found.artifacts]
    if executor is None or executor.location is None:
        with ThreadPoolExecutor(THREADS) as pool:
            records = list(pool.map(lambda call: damaged_records(*call), calls))
            artifacts = list(pool.map(lambda call: damaged_artifacts(*call), tensors))
    else:
        records = list(executor.map(damaged_records, calls))
        artifacts = list(executor.map(damaged_artifacts, tensors))
    for key, wrong in (one for group in records for one in group):
        yield Damage(key, found.owners[key], wrong)
    for key, wrong in (one for group in artifacts for one in group):
        yield Damage(f"{ARTIFACTS}/{key}", "artifacts", wrong)


def _groups(records: Iterable[ShardRecord]) -> Iterator[list[ShardRecord]]:
    """Runs of records that one reader takes: few enough bytes, and few enough objects."""
    group: list[ShardRecord] = []
    nbytes = 0
    for record in records:
        if group and (nbytes + record.nbytes > GROUP_BYTES or len(group) == GROUP_OBJECTS):
            yield group
            group, nbytes = [], 0
        group.append(record)
        nbytes += record.nbytes
    if group:
        yield group


def damaged_records(location: Location, records: Sequence[ShardRecord]) -> list[tuple[str, str]]:
    """Keys of the objects that are not what was recorded, with what is wrong."""
    found = ((record.key, damage(location, record)) for record in records)
    return [(key, wrong) for key, wrong in found if wrong is not None]


def damaged_artifacts(location: Location, keys: Sequence[str]) -> list[tuple[str, str]]:
    """Keys of the artifacts whose tensors are not what was published, with what is wrong."""
    found = ((key, damaged_artifact(location, key)) for key in keys)
    return [(key, wrong) for key, wrong in found if wrong is not None]


# -- repair ----------------------------------------------------------------------------
def _repair(
    location: Location, ledger: Ledger, run: dict[str, Any], found: _Survey, damaged: Sequence[Damage]
) -> str:
    """Rebuild or withdraw what is damaged; the state of the run after it.

    The state goes first: whoever is killed in here leaves a store that says so.
    """
    scores = [one for one in damaged if one.piece not in ("metadata", "artifacts")]
    if scores:
        run = {**run, "state": DAMAGED}
        ledger.write_run(run)
    for one in damaged:
        if one.piece == "metadata":
            location.put(one.key, run["metadata"][one.key].encode())
            continue
        location.delete(one.key)
        if one.piece == "artifacts":
            for name in found.artifacts[one.key.rpartition("/")[2]]:
                kept = {k: value for k, value in found.entries[name].items() if k not in ("digest", "nbytes")}
                ledger.record(name, kept)
        elif one.piece in found.entries:
            ledger.forget(one.piece)
    if scores and location.exists(GROUP_KEY):  # whoever opens the group without this package is to see it too
        location.put(GROUP_KEY, unfinished(location.get(GROUP_KEY)))
    return str(run["state"])
