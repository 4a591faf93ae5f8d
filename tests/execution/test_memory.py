"""Perturbations in memory: chunks of test points and batches of training samples, in lanes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dask_influence import DirectInfluence
from dask_influence.core import directional
from dask_influence.errors import DataError
from dask_influence.execution import memory, tasks
from dask_influence.execution.plan import Plan
from dask_influence.execution.run import Fit
from dask_influence.storage.sources import Source
from tests import data, oracles

CASE = data.mlp_classification()


@pytest.fixture(scope="module")
def fitted() -> DirectInfluence:
    return DirectInfluence(CASE.model, CASE.loss, 0.05).fit(CASE.train)


@pytest.fixture
def in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three test points and five training samples at a time."""
    whole = memory._perturbations_by_chain

    def cut(fit: Fit, test: Source, train: Source, plan: Plan, check: Callable[[], None]) -> np.ndarray:
        return whole(fit, test, train, dataclasses.replace(plan, factor_rows=3, batch=5), check)

    monkeypatch.setattr(memory, "_perturbations_by_chain", cut)


@pytest.mark.usefixtures("in_small_parts")
@pytest.mark.parametrize("threads", [1, 2])
def test_parts_are_put_together_and_threads_given_back(
    fitted: DirectInfluence, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chains = []
    monkeypatch.setattr(
        directional, "chain_of", lambda *a, of=directional.chain_of: chains.append(a) or of(*a)
    )
    test, train = ((x[:n], y[:n]) for (x, y), n in ((CASE.test, 7), (CASE.train, 13)))
    inverse = oracles.inverse(oracles.hessian(CASE.model, CASE.loss, *CASE.train), 0.05)
    expected = oracles.perturbation(CASE.model, CASE.loss, inverse, test, train)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value = fitted.influences(*test, *train, mode="perturbation")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert oracles.relative_error(value, expected) <= 1e-9
    assert len(chains) == 3  # each training sample once, whatever the chunks of test points


@pytest.mark.usefixtures("in_small_parts")
def test_a_sample_without_a_finite_derivative_is_named(
    fitted: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(rows: torch.Tensor, *args: object) -> object:
        if args[:2] == ("x, y", 5):  # the second batch
            rows[2] = torch.nan
        return refuse(rows, *args)

    refuse = tasks.refuse_non_finite
    monkeypatch.setattr(tasks, "refuse_non_finite", spoiled)
    test = tuple(a[:7] for a in CASE.test)
    with pytest.raises(DataError, match="x, y: the gradient of sample 7 is not finite"):
        fitted.influences(*test, *(a[:13] for a in CASE.train), mode="perturbation")


@pytest.mark.usefixtures("in_small_parts")
def test_no_lane_goes_on_after_an_error(fitted: DirectInfluence, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training data are refused while other lanes solve."""
    running: list[str] = []

    def slow(*arguments: object, **how: object) -> object:
        running.append("begun")
        time.sleep(0.05)
        found = solved(*arguments, **how)
        running.append("done")
        return found

    solved, (x, y), test = tasks.solved, (a[:13] for a in CASE.train), [a[:7] for a in CASE.test]
    monkeypatch.setattr(tasks, "solved", slow)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(DataError, match="x, y"):
            fitted.influences(*test, x[:, :2], y, mode="perturbation")
        assert running.count("begun") == running.count("done")
    finally:
        torch.set_num_threads(before)


# -- scores ----------------------------------------------------------------------------
def test_scores_of_small_models_are_cut_the_same_whatever_the_threads(
    fitted: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a strip go side by side where there are threads, and each sample is differentiated once."""
    seen: list[int] = []

    def counted(problem: object, x: torch.Tensor, y: torch.Tensor, **more: object) -> torch.Tensor:
        seen.append(len(y))
        return whole(problem, x, y, **more)

    whole = directional.directional_derivatives
    monkeypatch.setattr(directional, "directional_derivatives", counted)
    monkeypatch.setattr(memory, "FEWEST_SAMPLES", 5)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fitted.influences(*CASE.test, *CASE.train).numpy())
    finally:
        torch.set_num_threads(before)
    size = -(-len(CASE.train[1]) // 4)
    pieces = [size] * 3 + [len(CASE.train[1]) - 3 * size]
    assert sorted(seen) == sorted(2 * pieces)
    np.testing.assert_array_equal(*found)
