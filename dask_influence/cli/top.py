"""The most helpful and the most harmful training points, read from a store: all scores, or those of TopK."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from dask_influence.errors import ConfigurationError

SCORES = "influence"
LISTED = ("helpful_score", "helpful_train", "harmful_score", "harmful_train")


@dataclass(frozen=True)
class Top:
    """Lists of one test point, the strongest first.

    Attributes
    ----------
    test : int or str
        Its id.
    helpful, harmful : list of (id, score)
        Training points by largest, and by smallest score.
    missing : int
        Scores that are not there yet.
    """

    test: Any
    helpful: list[tuple[Any, float]]
    harmful: list[tuple[Any, float]]
    missing: int = 0

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        sides = {"helpful": self.helpful, "harmful": self.harmful}
        named = {
            side: [{"train": train, "score": score} for train, score in found]
            for side, found in sides.items()
        }
        return {"test": self.test, **named, "missing": self.missing}

    def __str__(self) -> str:
        helpful = [f"{train}  {score:+.6g}" for train, score in self.helpful]
        harmful = [f"{train}  {score:+.6g}" for train, score in self.harmful]
        width = max(map(len, (*helpful, "helpful")))
        rows = [f"  {h:<{width}}  {m}" for h, m in zip(helpful, harmful, strict=True)]
        return "\n".join([f"test {self.test}", f"  {'helpful':<{width}}  harmful", *rows])


def top(
    scores: xr.Dataset, tests: Sequence[str], count: int, regularization: float | None = None
) -> list[Top]:
    """The ``count`` most helpful and most harmful training points of each of the ``tests``.

    Parameters
    ----------
    scores : xarray.Dataset
        As ``open_influences`` returns it.
    tests : sequence of str
        Ids of test points, as text.
    count : int
        Points of each kind.
    regularization : float, optional
        Which λ, of a store that holds several.

    Raises
    ------
    ConfigurationError
        The store holds no such test point, no scores that have an order, or fewer than ``count``.

    Examples
    --------
    >>> scores = xr.Dataset(
    ...     {"influence": (("test", "train"), [[3.0, -1.0, 2.0]])},
    ...     coords={"test": [7], "train": ["a", "b", "c"]},
    ... )
    >>> print(*top(scores, ["7"], 2))
    test 7
      helpful  harmful
      a  +3    b  -1
      c  +2    c  +2
    """
    chosen = _at(scores, regularization)
    full = SCORES in chosen
    if not full and not all(name in chosen for name in LISTED):
        held = ", ".join(map(str, chosen.data_vars)) or "nothing"
        raise ConfigurationError(
            f"the store holds {held}, and no scores of test points; write all scores, or reduce to TopK per test"
        )
    if full and chosen[SCORES].dims != ("test", "train"):
        raise ConfigurationError(
            f"the scores have the dimensions {', '.join(map(str, chosen[SCORES].dims))}: those of perturbation "
            "have no order; open them with open_influences"
        )
    read = _of_scores if full else _of_lists
    return [read(chosen.sel(test=_id(chosen["test"], text)), count) for text in tests]


def _at(scores: xr.Dataset, regularization: float | None) -> xr.Dataset:
    """One λ of several."""
    if "regularization" not in scores.dims:
        if regularization is not None:
            raise ConfigurationError("--regularization is for a store of several; this one holds one λ")
        return scores
    held = scores["regularization"].values
    if regularization is None or not np.isclose(held, regularization).any():
        found = ", ".join(f"{value:g}" for value in held)
        raise ConfigurationError(f"--regularization must be one of {found}; got {regularization}")
    return scores.isel(regularization=int(np.isclose(held, regularization).argmax()))


def _id(coordinate: xr.DataArray, text: str) -> Any:
    """The id that ``text`` stands for."""
    for value in coordinate.values.tolist():
        if str(value) == text:
            return value
    few = ", ".join(map(str, coordinate.values[:5].tolist()))
    raise ConfigurationError(
        f"--test {text} is not in the store, which holds {coordinate.size:,} test points: {few} …"
    )


def _of_scores(row: xr.Dataset, count: int) -> Top:
    values, trains = row[SCORES].values, row["train"].values
    present = np.flatnonzero(~np.isnan(values))
    order = present[np.argsort(-values[present], kind="stable")]
    return Top(
        row["test"].item(),
        [(trains[at].item(), float(values[at])) for at in order[:count]],
        [(trains[at].item(), float(values[at])) for at in order[::-1][:count]],
        len(values) - len(present),
    )


def _of_lists(row: xr.Dataset, count: int) -> Top:
    held = row.sizes["rank"]
    if count > held:
        raise ConfigurationError(f"--count {count} is more than the store holds: TopK({held})")
    row = row.isel(rank=slice(0, count)).load()
    helpful, harmful = (
        [
            (train, float(score))
            for train, score in zip(
                row[f"{side}_train"].values.tolist(), row[f"{side}_score"].values.tolist(), strict=True
            )
        ]
        for side in ("helpful", "harmful")
    )
    missing = int(np.isnan(row["helpful_score"].values).sum())
    return Top(row["test"].item(), helpful, harmful, missing)
