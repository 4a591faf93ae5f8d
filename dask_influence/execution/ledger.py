"""Ledger: what a run says about itself beside its arrays, and so what a resume may skip.

``_run/run.json`` holds the fingerprint, the plan and the state; ``_run/ledger/<name>.json`` one
entry for each piece of work, written *after* its data. Objects are whole or absent, so
an entry that can be read stands for data that were written. Each carries a checksum of itself:
what was flipped on the disk is named instead of believed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dask_influence.errors import CorruptStoreError, MissingObjectError
from dask_influence.storage.results import RUN_KEY, checksum
from dask_influence.storage.stores import Location

LEDGER = "_run/ledger"
"""Folder of the entries."""
STATUS_KEY = "_run/status.json"
"""What the client says of its progress; it may be there before the run, and nothing depends on it."""

_DONE, _FAILED = ".json", ".failed.json"
_REDO = "delete it and run the same call again"
_REPLACE = "pass overwrite=True to replace the run"
_CHECKSUM = "checksum"


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
            Where it is there but is not JSON.
        """
        try:
            return self._decode(RUN_KEY, self.location.get(RUN_KEY), _REPLACE)
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
            raise CorruptStoreError(
                f"{RUN_KEY!r} of {self.location.url} lacks {', '.join(lacking)}; {_REPLACE}"
            )
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
            Names the entry that is not JSON, and what to do about it.
        """
        listed = self._listed(prefix)
        fetched = self.location.get_many(listed.values())
        return {name: self._decode(key, fetched[key]) for name, key in listed.items() if key in fetched}

    def read(self, name: str) -> dict[str, Any] | None:
        """The entry of one piece of work that was done, or None."""
        key = entry_key(name)
        try:
            return self._decode(key, self.location.get(key))
        except MissingObjectError:
            return None

    def survey(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Entries that can be read, by name; and of those that cannot, what is wrong, by their key."""
        read: dict[str, dict[str, Any]] = {}
        torn: dict[str, str] = {}
        listed = self._listed("")
        fetched = self.location.get_many(listed.values())
        for name, key in listed.items():
            try:
                if key in fetched:
                    read[name] = self._decode(key, fetched[key])
            except CorruptStoreError as error:
                torn[key] = str(error)
        return read, torn

    def done(self, prefix: str = "") -> set[str]:
        """Names of the pieces whose data are stored, from one listing; nothing is read."""
        return {name for name, key in self._listed(prefix).items() if not key.endswith(_FAILED)}

    def forget(self, name: str) -> None:
        """Remove the entry of one piece of work, which so is to be done again."""
        self.location.delete(entry_key(name))

    def forget_damaged(self) -> dict[str, dict[str, Any]]:
        """Forget the pieces of which a shard is missing or has another length than was recorded.

        Entries are read and everything is listed once; no shard is read. What is left is returned.
        """
        entries = self.entries()  # before the listing, so that shards written meanwhile are not missed
        sizes = self.location.stat()
        for name, entry in list(entries.items()):
            shards = entry.get("shards", ())
            if any(sizes.get(key, (-1, ""))[0] != nbytes for key, nbytes, _ in shards):
                self.forget(name)
                del entries[name]
        return entries

    def _listed(self, prefix: str) -> dict[str, str]:
        """Key of each entry by its name; of a failure and a success, the success."""
        begin = f"{LEDGER}/{prefix}"
        keys = [k for k in self.location.list(LEDGER) if k.startswith(begin) and k.endswith(_DONE)]
        keys.sort(key=lambda key: not key.endswith(_FAILED))
        return {key.removeprefix(f"{LEDGER}/").partition(".")[0]: key for key in keys}

    def _decode(self, key: str, data: bytes, advice: str = _REDO) -> dict[str, Any]:
        try:
            value = dict(json.loads(data))
        except (ValueError, TypeError):
            raise CorruptStoreError(
                f"{key!r} of {self.location.url} is not a JSON object; {advice}"
            ) from None
        written = value.pop(_CHECKSUM, None)
        if written is not None and written != _self_checksum(value):
            raise CorruptStoreError(
                f"{key!r} of {self.location.url} is not what was written: its checksum differs; {advice}"
            )
        return value


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
    plain = json.loads(_encode(value))
    return _encode({**plain, _CHECKSUM: _self_checksum(plain)})


def _self_checksum(value: Mapping[str, Any]) -> str:
    # The state is a word of its own: a person may set it back to have a run looked at again.
    return checksum(_encode({name: held for name, held in value.items() if name != "state"}))


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()
