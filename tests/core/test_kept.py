"""What is kept between passes: the same values, made once, within bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dask_influence import ArnoldiInfluence, CgInfluence
from dask_influence.core import curvature, directional
from dask_influence.core.chain import Chain
from dask_influence.core.kept import Kept, Shelf
from dask_influence.execution.local import LocalExecutor
from dask_influence.storage.sources import ArraySource
from tests import data


def test_what_fits_is_made_once_and_the_rest_each_time() -> None:
    kept, made = Kept(budget=10), list[str]()

    def make(name: str) -> str:
        made.append(name)
        return name

    for _ in range(2):
        for name, size in (("small", 6), ("large", 11), ("one more", 5), ("last", 4)):
            assert kept.get(name, lambda name=name: make(name), lambda _, size=size: size) == name
    assert made == ["small", "large", "one more", "last", "large", "one more"]


def test_chunks_have_shelves_of_their_own() -> None:
    kept = Kept()
    first, second = (Shelf(kept, range(low, low + 3)) for low in (0, 3))
    assert first.get("key", lambda: 1, lambda _: 1) == 1
    assert second.get("key", lambda: 2, lambda _: 1) == 2
    assert first.get("key", lambda: 3, lambda _: 1) == 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Chains made, products taken from them, and reads of data."""
    counts = {"chains": 0, "products": 0, "reads": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **how: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **how)

        return call

    monkeypatch.setattr(directional, "Chain", counting("chains", Chain))
    monkeypatch.setattr(curvature.multiply, "products", counting("products", curvature.multiply.products))
    monkeypatch.setattr(ArraySource, "_read", counting("reads", ArraySource._read))
    return counts


def test_a_solve_differentiates_each_chunk_once(counted: dict[str, int]) -> None:
    case = data.mlp_classification()
    fitted = CgInfluence(case.model, case.loss, case.regularization, chunk_size=7).fit(case.train)
    chunks = 2  # of so little data, whatever was asked
    counted.update(dict.fromkeys(counted, 0))
    for solves in (1, 2):  # nothing outlives a solve: data and model are the caller's again
        fitted.influence_factors(*case.test)
        passes = fitted.diagnostics["solver_passes"]
        assert passes > 2 * solves
        assert counted["products"] == chunks * passes
        assert counted["chains"] == chunks * solves
        assert chunks * solves < counted["reads"] < (chunks + 5) * solves


def test_bits_are_those_of_passes_that_keep_nothing(
    counted: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = data.mlp_classification()
    fitted = CgInfluence(case.model, case.loss, case.regularization, chunk_size=7).fit(case.train)
    factors = fitted.influence_factors(*case.test)
    monkeypatch.setattr(LocalExecutor, "keeping", lambda self, job: job)
    counted["chains"] = counted["products"] = 0
    assert torch.equal(factors, fitted.influence_factors(*case.test))
    assert counted["chains"] == counted["products"] > 0


def test_a_fit_differentiates_each_chunk_once(counted: dict[str, int]) -> None:
    case = data.mlp_classification()
    fitted = ArnoldiInfluence(case.model, case.loss, case.regularization, rank=3, chunk_size=7).fit(
        case.train
    )
    chunks, passes = -(-len(case.train[1]) // 7), fitted.diagnostics["passes"]
    assert passes > 2
    assert counted["products"] == chunks * passes + 1  # and that of the check before it
    assert counted["chains"] == chunks
