"""Factors that an earlier run wrote, in place of test data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np
import torch

from dask_influence.errors import (
    InfluenceWarning,
    StoreError,
    StoreMismatchError,
)
from dask_influence.execution.artifacts import Artifact, Artifacts
from dask_influence.execution.ledger import Ledger, compare_fingerprints
from dask_influence.execution.output import Output, write_residuals
from dask_influence.grid import Chunks
from dask_influence.storage.results import (
    FINAL,
    open_influences,
)
from dask_influence.storage.stores import Location


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
