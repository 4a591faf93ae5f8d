"""Checkpoints of a fit: what was summed is not summed again, and nothing else changes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dask_influence.core.curvature import product_sums
from dask_influence.core.estimators.base import Round
from dask_influence.core.moments import Moments
from dask_influence.execution.checkpoints import Checkpoints
from dask_influence.storage.stores import Location

VECTORS = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)


class Counted:
    """A pass whose answer depends on its round, and the number of times it was made."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, request: Round, **how: Any) -> Moments:
        self.calls.append(how)
        part = request.operand["vectors"].T  # a view: what is stored must not depend on memory layout
        return Moments({"products": part * (1 / 3), "count": torch.tensor(2.0)}, len(self.calls))


def products(vectors: torch.Tensor = VECTORS, curvature: str = "hessian", **how: Any) -> Round:
    return Round(partial(product_sums, curvature=curvature), {"vectors": vectors}, **how)


def place(folder: Path, scheme: str) -> Location:
    return Location.of(str(folder) if scheme == "file" else f"memory://checkpoints{folder}")


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_second_fit_is_given_what_the_first_one_summed(tmp_path: Path, scheme: str) -> None:
    location, first, second = place(tmp_path, scheme), Counted(), Counted()
    made = Checkpoints(first, location, "fit")(products(), first=True)
    kept = Checkpoints(second, location, "fit")
    given = kept(products(), first=True)
    assert (len(first.calls), len(second.calls), kept.restored) == (1, 0, 1)
    assert first.calls == [{"first": True}]
    assert given.count == made.count == 1
    assert given.total.keys() == made.total.keys()
    assert all(torch.equal(given.total[name], made.total[name]) for name in made.total)


@pytest.mark.parametrize(
    ("identity", "request_"),
    [
        ("another fit", products()),
        ("fit", products(VECTORS + 1e-16 * 8)),
        ("fit", products(VECTORS.float())),
        ("fit", products(VECTORS.reshape(3, 2))),
        ("fit", products(curvature="ggn")),
        ("fit", products(samples=(range(4),))),
        ("fit", Round(partial(product_sums, "hessian"), {"vectors": VECTORS})),
    ],
)
def test_other_fits_and_rounds_are_summed(tmp_path: Path, identity: str, request_: Round) -> None:
    location, passes = place(tmp_path, "file"), Counted()
    Checkpoints(passes, location, "fit")(products())
    Checkpoints(passes, location, identity)(request_)
    assert len(passes.calls) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "lost"])
def test_a_damaged_checkpoint_is_made_again(tmp_path: Path, damage: str) -> None:
    location, passes = place(tmp_path, "file"), Counted()
    made = Checkpoints(passes, location, "fit")(products())
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
    path.write_bytes({"truncated": whole[:40], "flipped": flipped, "empty": b"", "lost": b""}[damage])
    if damage == "lost":
        path.unlink()
    kept = Checkpoints(passes, location, "fit")
    again = kept(products())
    assert (len(passes.calls), kept.restored) == (2, 0)
    assert torch.equal(again.total["products"], made.total["products"])
    kept(products())
    assert (len(passes.calls), kept.restored) == (2, 1)
