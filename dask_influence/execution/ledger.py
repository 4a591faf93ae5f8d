"""Ledger: what a run says about itself beside its arrays, and so what a resume may skip.

``_run/run.json`` holds the fingerprint, the plan and the state; ``_run/ledger/<name>.json`` one
entry for each piece of work, written *after* its data. Objects are whole or absent, so
an entry that can be read stands for data that were written. Each carries a checksum of itself:
what was flipped on the disk is named instead of believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_influence.errors import CorruptStoreError, MissingObjectError
from dask_influence.storage import shapes
from dask_influence.storage.results import MISSING, RUN_KEY, checksum
from dask_influence.storage.stores import Location

LEDGER = "_run/ledger"
"""Folder of the entries."""
STATUS_KEY = "_run/status.json"
"""What the client says of its progress; it may be there before the run, and nothing depends on it."""

_DONE, _FAILED = ".json", ".failed.json"
_REDO = "delete it and run the same call again"
_REPLACE = "pass overwrite=True to replace the run"
_CHECKSUM = "checksum"

_RUN: dict[str, shapes.Shape] = {
    "solves": shapes.flag,
    "objects": shapes.listed(shapes.record),
    "metadata": shapes.mapped(shapes.text),
    "missing": lambda sides: shapes.mapped(MISSING)(sides) and sides.keys() <= {"test", "train"},
}
_ENTRY: dict[str, shapes.Shape] = {
    "shards": shapes.listed(shapes.record),
    "part": shapes.record,
    "rows": shapes.items(shapes.whole, shapes.whole),
    "columns": shapes.items(shapes.whole, shapes.whole),
    "merged": shapes.listed(shapes.text),
    "digest": shapes.name,
    "nbytes": shapes.whole,
    "residual": shapes.listed(shapes.number),
    "missing": shapes.listed(shapes.holding(sample=shapes.whole, reason=shapes.text)),
    "seconds": shapes.number,
    "ended": shapes.number,
    "peak_bytes": shapes.whole,
    "error": shapes.text,
}
"""What a run's record and its entries hold beside what is for people."""

Misfit = Callable[[str, Mapping[str, Any]], str | None]
"""What shows that an entry is not the one that was written under this name; None where nothing does."""


_BATCH_ENTRIES, _BATCH_BYTES = 512, 4 * 2**20
"""What is read at once where all entries are."""


@dataclass(frozen=True)
class Standing:
    """How far a run is.

    Attributes
    ----------
    done : set of str
        Names of the pieces whose data are stored.
    missing : dict of str to list
        Of those that lack samples, what their entries say of these.
    """

    done: set[str]
    missing: dict[str, list[dict[str, Any]]]

    def without(self, names: Iterable[str]) -> Standing:
        """The same with those pieces still to be done."""
        gone = set(names)
        return Standing(self.done - gone, {n: held for n, held in self.missing.items() if n not in gone})


class _Seen:
    """Names and sizes of objects, eight bytes for each: a hash, by which one in 10¹³ may be taken for another."""

    def __init__(self, objects: Iterable[tuple[str, int]]) -> None:
        self._hashes = np.fromiter((self._hash(*found) for found in objects), np.uint64)
        self._hashes.sort()

    def __contains__(self, found: tuple[str, int]) -> bool:
        wanted = np.uint64(self._hash(*found))
        place = int(np.searchsorted(self._hashes, wanted))
        return place < len(self._hashes) and bool(self._hashes[place] == wanted)

    @staticmethod
    def _hash(key: str, size: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{size} {key}".encode(), digest_size=8).digest(), "little")


def _name(key: str) -> str:
    return key.removeprefix(f"{LEDGER}/").partition(".")[0]


def _any(name: str, entry: Mapping[str, Any]) -> None:
    """Every entry fits."""


def entry_key(name: str) -> str:
    """Where the entry of one piece of work is."""
    return f"{LEDGER}/{name}{_DONE}"


class Ledger:
    """Run record and entries of the store at one location.

    Parameters
    ----------
    location : Location
        Root of the output store, or of a fit's own folder.

    Examples
    --------
    >>> ledger = Ledger(Location.of("memory://ledger-example"))
    >>> ledger.read_run() is None
    True
    >>> ledger.write_run({"state": "running", "fingerprint": {"rank": 10}})
    >>> ledger.record("strip-0", {"seconds": 1.5})
    >>> ledger.record("strip-1", {"error": "KilledWorker"})
    >>> ledger.entries()["strip-0"], sorted(ledger.done())
    ({'seconds': 1.5}, ['strip-0'])
    """

    def __init__(self, location: Location) -> None:
        self.location = location

    def read_run(self) -> dict[str, Any] | None:
        """The run record, or None where no run has begun.

        Raises
        ------
        CorruptStoreError
            Where it is there but is not JSON, or not of the shape that a run writes.
        """
        try:
            return self._decode(RUN_KEY, self.location.get(RUN_KEY), _RUN, _REPLACE)
        except MissingObjectError:
            return None

    def read_begun(self) -> dict[str, Any] | None:
        """The run record with all that a resume needs: state, fingerprint and plan.

        Raises
        ------
        CorruptStoreError
            Where it is there but lacks one of them.
        """
        run = self.read_run()
        if run is None:
            return None
        kinds = {"state": str, "fingerprint": dict, "plan": dict}
        lacking = [name for name, kind in kinds.items() if not isinstance(run.get(name), kind)]
        if lacking:
            raise self._corrupt(RUN_KEY, f"lacks {', '.join(lacking)}", _REPLACE)
        return run

    def write_run(self, run: Mapping[str, Any]) -> None:
        """Replace the run record as a whole."""
        self.location.put(RUN_KEY, _signed(run))

    def record(self, name: str, entry: Mapping[str, Any]) -> None:
        """Write the entry of one piece of work; call it after the data are stored.

        An entry with the key ``"error"`` records a failure: it goes to ``<name>.failed.json``, does not count
        as done, and is superseded by a later success.
        """
        if not name or "/" in name or "." in name:
            raise ValueError(
                f"a ledger entry's name has neither slash nor dot and is not empty; got {name!r}"
            )
        suffix = _FAILED if "error" in entry else _DONE
        self.location.put(f"{LEDGER}/{name}{suffix}", _signed(entry))

    def entries(self, prefix: str = "") -> dict[str, dict[str, Any]]:
        """Entries by name, all of them or those whose name begins with ``prefix``.

        Raises
        ------
        CorruptStoreError
            Names the entry that is not one, and what to do about it.
        """
        keys = self._listed(prefix)
        fetched = self.location.get_many(keys.values())
        return {name: self._decode(key, fetched[key]) for name, key in keys.items() if key in fetched}

    def read(self, name: str) -> dict[str, Any] | None:
        """The entry of one piece of work that was done, or None."""
        key = entry_key(name)
        try:
            return self._decode(key, self.location.get(key))
        except MissingObjectError:
            return None

    def survey(self, misfit: Misfit = _any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Entries that can be read, by name; and of those that cannot, or are a ``misfit``, what is wrong, by key."""
        read: dict[str, dict[str, Any]] = {}
        torn: dict[str, str] = {}
        keys = self._listed("")
        fetched = self.location.get_many(keys.values())
        for name, key in keys.items():
            try:
                if key in fetched:
                    entry = self._decode(key, fetched[key])
                    if not key.endswith(_FAILED):
                        self._check(name, entry, misfit)
                    read[name] = entry
            except CorruptStoreError as error:
                torn[key] = str(error)
        return read, torn

    def done(self, prefix: str = "") -> set[str]:
        """Names of the pieces whose data are stored, from one listing; nothing is read."""
        return {_name(key) for key, _ in self._found(prefix) if not key.endswith(_FAILED)}

    def forget(self, name: str) -> None:
        """Remove the entry of one piece of work, which so is to be done again."""
        self.location.delete(entry_key(name))

    def standing(self, folders: Iterable[str] = ("",), misfit: Misfit = _any) -> Standing:
        """What is done and what of it lacks samples; pieces that lost a shard are forgotten.

        A shard is lost where it is missing or has another length than was recorded. Objects below
        ``folders``, where shards are to be looked for, are listed once and entries read a few
        MiB at a time: of a million shards next to nothing is held. No shard is read.

        Raises
        ------
        CorruptStoreError
            Names the entry that is not one, or is a ``misfit``, and what to do about it.
        """
        seen = _Seen((key, size) for folder in folders for key, size in self.location.sizes(folder))
        found = Standing(set(), {})
        for name, entry in self.stream():
            self._check(name, entry, misfit)
            # what the listing does not show may have been written since
            if all((k, n) in seen or self.location.size(k) == n for k, n, _ in entry.get("shards", ())):
                found.done.add(name)
                if entry.get("missing"):
                    found.missing[name] = entry["missing"]
            else:
                self.forget(name)
        return found

    def stream(self, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """:meth:`entries` of what was done, in no order, of which a few MiB are held at a time."""
        for batch in self._batches(prefix):
            fetched = self.location.get_many(batch)
            while fetched:
                key, data = fetched.popitem()
                yield _name(key), self._decode(key, data)

    def _batches(self, prefix: str) -> Iterator[list[str]]:
        batch: list[str] = []
        nbytes = 0
        for key, size in self._found(prefix):
            if key.endswith(_FAILED):
                continue
            if len(batch) == _BATCH_ENTRIES or nbytes + size > _BATCH_BYTES:
                yield batch
                batch, nbytes = [], 0
            batch.append(key)
            nbytes += size
        yield batch

    def _found(self, prefix: str) -> Iterator[tuple[str, int]]:
        begin = f"{LEDGER}/{prefix}"
        found = self.location.sizes(LEDGER)
        return ((key, size) for key, size in found if key.startswith(begin) and key.endswith(_DONE))

    def _listed(self, prefix: str) -> dict[str, str]:
        """Key of each entry by its name; of a failure and a success, the success."""
        keys = sorted(
            (key for key, _ in self._found(prefix)), key=lambda key: (not key.endswith(_FAILED), key)
        )
        return {_name(key): key for key in keys}

    def _check(self, name: str, entry: Mapping[str, Any], misfit: Misfit) -> None:
        wrong = misfit(name, entry)
        if wrong is not None:
            raise self._corrupt(entry_key(name), wrong)

    def _decode(
        self, key: str, data: bytes, expected: Mapping[str, shapes.Shape] = _ENTRY, advice: str = _REDO
    ) -> dict[str, Any]:
        try:
            value = json.loads(data)
            if not isinstance(value, dict):
                raise TypeError
            written = value.pop(_CHECKSUM, None)
            signed = written is None or any(written == _self_checksum(value, indent) for indent in _INDENTS)
        except (ValueError, TypeError, RecursionError):
            raise self._corrupt(key, "is not a JSON object", advice) from None
        if not signed:
            raise self._corrupt(key, "is not what was written: its checksum differs", advice)
        wrong = shapes.misshapen(value, expected)
        if wrong:
            raise self._corrupt(key, f"is not what a run writes: look at its {', '.join(wrong)}", advice)
        return value

    def _corrupt(self, key: str, wrong: str, advice: str = _REDO) -> CorruptStoreError:
        return CorruptStoreError(f"{key!r} of {self.location.url} {wrong}; {advice}")


def compare_fingerprints(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """Every entry in which two fingerprints differ, as a readable line; empty where they agree.

    Nested mappings are compared entry by entry. Both sides are compared as the JSON they are stored as,
    so that a tuple equals the list it was written as.

    Examples
    --------
    >>> compare_fingerprints({"lambda": 0.01, "data": {"x": "a"}}, {"lambda": 0.1, "data": {"x": "a"}})
    ['lambda: stored 0.01, asked 0.1']
    >>> compare_fingerprints({"data": {"x": "a"}}, {"data": {"x": "b"}, "rank": 5})
    ["data.x: stored 'a', asked 'b'", 'rank: stored nothing, asked 5']
    """
    return _differences(json.loads(_encode(stored)), json.loads(_encode(asked)), "")


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any], above: str) -> list[str]:
    lines = []
    for name in sorted({*stored, *asked}):
        held, wanted = stored.get(name, _NOTHING), asked.get(name, _NOTHING)
        if isinstance(held, dict) and isinstance(wanted, dict):
            lines += _differences(held, wanted, f"{above}{name}.")
        elif held != wanted:
            lines.append(f"{above}{name}: stored {held!r}, asked {wanted!r}")
    return lines


class _Nothing:
    def __repr__(self) -> str:
        return "nothing"


_NOTHING = _Nothing()


def _signed(value: Mapping[str, Any]) -> bytes:
    """As it is written: a line for each name, for people to read; indented, lists would be written in slow Python."""
    plain = json.loads(_encode(value))
    signed = {**plain, _CHECKSUM: _self_checksum(plain)}
    lines = (f" {json.dumps(name)}: {_encode(held).decode()}" for name, held in sorted(signed.items()))
    return "{{\n{}\n}}".format(",\n".join(lines)).encode()


_INDENTS = (None, 1)
"""Of what a checksum is taken; records that were begun before were indented throughout."""


def _self_checksum(value: Mapping[str, Any], indent: int | None = None) -> str:
    # The state is a word of its own: a person may set it back to have a run looked at again.
    return checksum(_encode({name: held for name, held in value.items() if name != "state"}, indent))


def _encode(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, sort_keys=True, indent=indent).encode()
