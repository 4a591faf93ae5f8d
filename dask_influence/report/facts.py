"""Facts: what a store says of its run without a score being read: record, ledger, certificates."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import xarray as xr

from dask_influence.errors import ConfigurationError, InfluenceWarning, StoreError
from dask_influence.execution.ledger import Ledger
from dask_influence.execution.pieces import expected_pieces
from dask_influence.execution.plan import Plan
from dask_influence.storage.results import open_influences
from dask_influence.storage.stores import Location

Array = np.ndarray[Any, Any]

WORK = ("strip-", "merge-")
"""Ledger entries of work whose time is known."""


@dataclass(frozen=True)
class Effort:
    """Time and memory of the pieces of work in a ledger.

    Attributes
    ----------
    seconds, ended : numpy array
        Of each piece, in the order in which they ended; ``ended`` is Unix time, NaN where an older version wrote it.
    workers : mapping of str to (int, float, int)
        Pieces, seconds and peak bytes (0 where unknown) of each process, by the time it spent.
    nbytes : int
        Bytes of all shards, as stored.
    """

    seconds: Array
    ended: Array
    workers: Mapping[str, tuple[int, float, int]]
    nbytes: int

    @classmethod
    def of(cls, ledger: Ledger) -> Effort:
        """Read every entry, a few MiB at a time; of each two numbers are kept."""
        seconds, ended, nbytes = list[float](), list[float](), 0
        pieces, spent, peaks = Counter[str](), Counter[str](), dict[str, int]()
        for name, entry in ledger.stream():
            nbytes += sum(shard[1] for shard in entry.get("shards", ()))
            if not name.startswith(WORK) or "seconds" not in entry:
                continue
            worker = str(entry.get("worker", "unknown"))
            seconds.append(entry["seconds"])
            ended.append(entry.get("ended", math.nan))
            pieces[worker] += 1
            spent[worker] += entry["seconds"]
            peaks[worker] = max(peaks.get(worker, 0), entry.get("peak_bytes", 0))
        order = np.lexsort((seconds, ended))
        named = sorted(pieces, key=lambda worker: (-spent[worker], worker))
        workers = {worker: (pieces[worker], float(spent[worker]), peaks[worker]) for worker in named}
        return cls(np.array(seconds)[order], np.array(ended)[order], workers, nbytes)

    @property
    def total(self) -> float:
        """Seconds of all workers together."""
        return float(self.seconds.sum())

    @property
    def peak_bytes(self) -> int:
        """Of the process that held most; 0 where unknown."""
        return max((peak for _, _, peak in self.workers.values()), default=0)

    @property
    def wall(self) -> float | None:
        """Seconds from the first piece's start to the last one's end, pauses included; None where unknown."""
        known = ~np.isnan(self.ended)
        if not known.any():
            return None
        return float(self.ended[known].max() - (self.ended - self.seconds)[known].min())

    def at_work(self, bins: int = 120) -> tuple[Array, Array] | None:
        """Pieces that were being worked at, on average over each of ``bins`` equal times; None where unknown.

        Returns
        -------
        edges : numpy array
            (bins + 1,) seconds since the first began.
        working : numpy array
            (bins,)
        """
        wall = self.wall
        if not wall:
            return None
        known = ~np.isnan(self.ended)
        stop = self.ended[known] - self.ended[known].max() + wall
        start = stop - self.seconds[known]
        edges = np.linspace(0.0, wall, bins + 1)
        # time that was worked before each edge, summed over pieces, by their sorted ends and starts
        before = _worked_before(np.sort(start), edges) - _worked_before(np.sort(stop), edges)
        return edges, np.diff(before) / np.diff(edges)


def _worked_before(times: Array, edges: Array) -> Array:
    """Σ max(0, edge − t) over sorted ``times``, for each edge."""
    count = np.searchsorted(times, edges)
    sums = np.concatenate([[0.0], np.cumsum(times)])
    return count * edges - sums[count]


@dataclass(frozen=True)
class Facts:
    """One store, opened.

    Attributes
    ----------
    location : Location
        Where it is.
    dataset : xarray.Dataset
        As ``open_influences`` returns it, at one λ.
    run : mapping
        Its record: state, fingerprint, plan, missing samples.
    regularizations : tuple of float
        All λ that it holds, where they are several.
    regularization : float or None
        The one that is shown, where they are several.
    effort : Effort
        What its ledger tells.
    done, total : int
        Pieces of work.
    """

    location: Location
    dataset: xr.Dataset = field(repr=False)
    run: Mapping[str, Any] = field(repr=False)
    regularizations: tuple[float, ...]
    regularization: float | None
    effort: Effort = field(repr=False)
    done: int
    total: int

    @classmethod
    def of(
        cls,
        store: str | PathLike[str] | Location,
        regularization: float | None = None,
        storage_options: Mapping[str, Any] | None = None,
        argument: str = "store",
    ) -> Facts:
        """What the ``store`` says.

        Raises
        ------
        StoreError
            No run of this package is there, or it has not begun to write.
        CorruptStoreError
            Its record or its ledger is damaged.
        ConfigurationError
            It holds no such λ.
        """
        location = Location.of(store, storage_options)
        ledger = Ledger(location)
        run = ledger.read_begun()
        if run is None:
            raise StoreError(f"{argument}: {location.url} holds no run of dask_influence; check the URL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InfluenceWarning)  # the report says what is missing
            dataset = open_influences(location)
        held = tuple(dataset["regularization"].values.tolist()) if "regularization" in dataset.dims else ()
        chosen = _chosen(held, regularization, argument)
        if chosen is not None:
            dataset = dataset.isel(regularization=held.index(chosen))
        expected = expected_pieces(run)
        done = len(expected & ledger.done())
        return cls(location, dataset, run, held, chosen, Effort.of(ledger), done, len(expected))

    @property
    def name(self) -> str:
        """Last part of its URL."""
        return self.location.url.rstrip("/").rpartition("/")[2]

    @property
    def plan(self) -> Plan:
        """How the work was cut."""
        return Plan.from_json(self.run["plan"])

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """All that the numbers depend on."""
        return dict(self.run["fingerprint"])

    @property
    def state(self) -> str:
        """``"complete"``, ``"incomplete"`` (it lacks samples), or how far the run is."""
        return str(self.run["state"])

    @property
    def damping(self) -> Any:
        """λ: the one shown of several, or that of the run; a mapping where blocks have their own."""
        own = self.dataset.attrs.get("hessian_regularization")
        return own if self.regularization is None else self.regularization

    @property
    def diagnostics(self) -> Mapping[str, Any]:
        """Of the fit; empty until the run has finished."""
        return dict(self.dataset.attrs.get("diagnostics", {}))

    @property
    def missing(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Samples without results, by side."""
        return dict(self.run.get("missing", {}))

    def digest(self, side: str) -> str | None:
        """Of the test or the training data."""
        return self.fingerprint.get(side)


def _chosen(held: Sequence[float], asked: float | None, argument: str) -> float | None:
    """The λ that is shown: the one asked for, or the first of several."""
    if asked is not None and not held:
        raise ConfigurationError(
            f"regularization={asked} chooses among several λ, and {argument} holds one; leave it out"
        )
    if asked is None:
        return held[0] if held else None
    close = [value for value in held if math.isclose(value, asked, rel_tol=1e-9)]
    if not close:
        listed = ", ".join(f"{value:g}" for value in held)
        raise ConfigurationError(f"regularization must be one of {listed}; got {asked}")
    return close[0]
