"""What a plan costs on a cluster that does not exist, and what limits it first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.objective import Objective
from dask_influence.core.problem import prepare
from dask_influence.core.sizes import Size
from dask_influence.errors import ConfigurationError, MemoryLimitError
from dask_influence.execution.forecast import TASKS_PER_SECOND, Cluster, Forecast, Speed, calibrate
from dask_influence.execution.plan import (
    BATCHES,
    HELD_BYTES,
    LONGEST_SECONDS,
    MOST_WRITTEN,
    PROCESS_BYTES,
    WRITTEN_BYTES,
    Plan,
    arrange,
)
from dask_influence.execution.work import Kept, Work

LARGE = Work(
    tests=1_000,
    trains=10**9,
    features=(),
    parameters=10**7,
    rank=100,
    itemsize=4,
    activations=10**5,
    sample_bytes=3_072,
)


NORMAL = Speed(1.0, 1e-3)


def forecast(work: Work = LARGE, speed: Speed = NORMAL, **cluster: float) -> Forecast:
    return Forecast.of(arrange(work), speed, Cluster(**cluster))  # type: ignore[arg-type]


def test_a_forecast_is_its_plan() -> None:
    plan = arrange(LARGE)
    costed = Forecast.of(plan, Speed(), Cluster(7))
    assert {name: getattr(costed, name) for name in asdict(plan)} == {
        name: getattr(plan, name) for name in asdict(plan)
    }
    assert isinstance(costed, Plan)
    assert str(costed).splitlines()[:7] == str(plan).splitlines()[:7]


def test_twice_the_workers_take_half_the_time_until_something_else_limits() -> None:
    few, more = forecast(workers=100), forecast(workers=200)
    assert few.run_seconds == pytest.approx(2 * more.run_seconds)
    assert "computing" in few.first_limit
    threads = forecast(workers=100, threads=2)
    assert threads.run_seconds == pytest.approx(more.run_seconds)


@pytest.mark.parametrize(("seconds", "solved"), [(0.15, [1, 6]), (0.0, [1, 32, 32]), (1.1, [1, 1])])
def test_as_many_factors_are_timed_together_as_may_take_a_second(seconds: float, solved: list[int]) -> None:
    rows: list[int] = []

    class Watched:
        needs_rounds = False

        def solve(self, gradients: Tensor) -> Generator[Any, Any, Tensor]:
            rows.append(len(gradients))
            time.sleep(seconds)
            return gradients
            yield

    speed = Speed(3.0, gradient=0.5).solving(Watched(), 7)  # type: ignore[arg-type]
    assert rows == solved
    assert speed.derivatives == 3
    assert speed.factor is not None
    assert seconds / solved[-1] <= speed.factor - 0.5 < seconds / solved[-1] + 0.05


@pytest.mark.parametrize(("seconds", "samples"), [(0.1, [32]), (0.02, [32, 32]), (0.0, [32, 32, 512, 512])])
def test_derivatives_are_timed_until_a_call_costs_more_than_to_begin(
    monkeypatch: pytest.MonkeyPatch, seconds: float, samples: list[int]
) -> None:
    net, x, y = torch.nn.Linear(6, 1), torch.ones(11, 6), torch.ones(11, 1)
    problem, _ = prepare(Objective.of(net, torch.nn.functional.mse_loss), x, y)
    seen: list[int] = []

    def differentiate(_: Any, x: Tensor, y: Tensor, directions: Tensor) -> None:
        seen.append(len(x))
        time.sleep(seconds)

    monkeypatch.setattr(directional, "directional_derivatives", differentiate)

    speed = calibrate(problem, x, y)
    assert seen == samples
    assert speed.factor is None
    assert speed.gradient > 0


def test_slower_machines_take_longer() -> None:
    slow = forecast(speed=Speed(3.0, 1e-3))
    assert slow.compute_seconds == pytest.approx(3 * slow.derivative_seconds + slow.product_seconds)
    assert slow.run_seconds > 2 * forecast().run_seconds
    solving = forecast(speed=Speed(1.0, 5.0)).run_seconds - forecast(speed=Speed(1.0, 0.0)).run_seconds
    assert solving == pytest.approx(5.0 * LARGE.tests)
    assert "passes that solve" in str(forecast(speed=Speed(1.0, None)))
    assert "passes that solve" not in str(forecast())


def test_a_store_that_is_too_slow_is_named_with_what_would_do() -> None:
    bound = forecast(workers=10_000, bandwidth=1e9)
    moved = LARGE.trains * LARGE.sample_bytes + bound.output_bytes + 10_000 * 101 * LARGE.parameters * 4
    assert bound.moved_bytes == moved
    assert bound.run_seconds == pytest.approx(moved / 1e9)
    assert "store" in bound.first_limit
    assert "store" not in forecast(workers=10_000, bandwidth=1e15).first_limit


def test_a_scheduler_that_is_too_slow_is_named() -> None:
    tiny = Work(1, 10**6, (), 10, None, 4, 10, 40)
    plan = replace(arrange(tiny), tile=(1, 20), strip_columns=20)
    bound = Forecast.of(plan, Speed(1.0, 0.0), Cluster(1_000))
    assert bound.tasks == 50_001
    assert bound.run_seconds == pytest.approx(50_001 / TASKS_PER_SECOND)
    assert "scheduler" in bound.first_limit


def test_more_threads_than_strips_are_told() -> None:
    work = replace(LARGE, trains=10_000, tests=10)
    assert "too few tasks" in forecast(work, workers=10_000).first_limit


def test_a_sketch_that_fits_no_worker_is_refused_with_the_rank_that_would() -> None:
    work = replace(LARGE, parameters=10**8, tests=200)
    limit = Cluster(1_000, memory=16 * 10**9).memory_limit
    assert limit == 16 * 10**9 * 4 // 5 - PROCESS_BYTES
    with pytest.raises(MemoryLimitError, match=r"rank=(\d+) instead of 100") as refusal:
        arrange(work, memory_limit=limit).validate(limit)
    rank = int(str(refusal.value).split("rank=")[1].split()[0])
    assert rank < 100
    arrange(replace(work, rank=rank), tile_bytes=2**18, memory_limit=limit).validate(limit)
    with pytest.raises(MemoryLimitError):
        arrange(replace(work, rank=rank + 1), tile_bytes=2**18, memory_limit=limit).validate(limit)


@pytest.mark.parametrize("tests", [3, 1437])
def test_small_tiles_share_a_product(tests: int) -> None:
    """Strips are cut into runs of whole tiles, each tile once, whose derivatives fit what may be held."""
    plan = arrange(Work(tests, 1437, (), 2410, None, 4, 42, 264), tile_bytes=2**18)
    assert plan.held_columns % plan.tile[1] == 0
    assert plan.held_columns * plan.directions * 4 <= HELD_BYTES
    assert tests == 3 or plan.held_columns > plan.tile[1]
    tiles = []
    for strip in map(plan.strip, range(plan.strips)):
        runs = [*plan.together(strip)]
        assert [*itertools.chain(*runs)] == [*strip.columns]
        assert max(map(len, runs)) <= plan.held_columns
        tiles += [tile for run in runs for tile in plan.tiles_of(strip, run)]
    assert len({(rows.start, columns.start) for rows, columns in tiles}) == len(tiles) == plan.tiles
    assert sum(len(rows) * len(columns) for rows, columns in tiles) == tests * 1437


def test_coefficients_are_solved_for_more_test_points_at_a_time_than_factors() -> None:
    """No gradient of theirs is held, but those of a few samples."""
    sketch = replace(LARGE, tests=5_000)
    projecting, forming = arrange(sketch), arrange(replace(sketch, rank=None))
    assert projecting.factor_rows > 10 * forming.factor_rows
    assert projecting.solving_bytes < forming.solving_bytes


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"threads": 1.5},
        {"memory": -1},
        {"memory": 10**40},
        {"bandwidth": 0},
        {"bandwidth": float("nan")},
    ],
    ids=str,
)
def test_clusters_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Cluster(**wrong)  # type: ignore[arg-type]


def test_a_reduction_moves_its_parts_and_not_its_tiles() -> None:
    work = replace(LARGE, trains=10**7)
    kept = Kept("TopK(10)", "test", work.tests * 10 * 2 * 12, diagonal=False)
    cluster = Cluster(workers=16, bandwidth=1e9)
    whole, lists = (
        Forecast.of(arrange(replace(work, kept=reduction)), Speed(), cluster) for reduction in (None, kept)
    )
    assert lists.output_bytes == 240_000
    assert lists.merges > 0
    assert lists.tasks == lists.strips + lists.merges + len(lists.factor_chunks)
    parts = 2 * lists.strips * lists.part_bytes
    saved = whole.output_bytes - lists.output_bytes - parts
    workers = (min(16, whole.tasks) * whole.published_bytes, min(16, lists.tasks) * lists.published_bytes)
    assert whole.moved_bytes - lists.moved_bytes == saved + workers[0] - workers[1]
    assert "to join them" in str(lists)
    assert "to join them" not in str(whole)


def test_a_diagonal_costs_a_factor_for_each_training_sample() -> None:
    kept = Kept("SelfInfluence()", "train", 4 * 10**7, diagonal=True)
    work = replace(LARGE, tests=1, trains=10**7, rank=None, parameters=10**4, kept=kept)
    forecast = Forecast.of(arrange(work), Speed(factor=1e-3), Cluster(workers=100))
    assert forecast.factor_seconds == 0
    assert forecast.compute_seconds == pytest.approx(10**4 + forecast.derivative_seconds)
    assert forecast.tasks == forecast.strips
    assert sum(len(forecast.strip(i).columns) for i in range(forecast.strips)) == 10**7


SKETCHED = Work(2_048, 4_096, (), 820_874, 20, 4, 1_482, 2**20)


def test_strips_that_nobody_waits_for_are_of_several_batches() -> None:
    shared, own = arrange(SKETCHED), arrange(SKETCHED, one_by_one=True)
    assert own.strip_columns > (BATCHES - 1) * own.batch > 2 * shared.strip_columns
    assert replace(own, strip_columns=shared.strip_columns) == shared
    assert [*itertools.chain.from_iterable(own.strip(at).columns for at in range(own.strips))] == [
        *range(SKETCHED.trains)
    ]
    few = replace(SKETCHED, trains=100)
    assert arrange(few, one_by_one=True).strips == 1


def test_strips_are_no_longer_than_memory_allows() -> None:
    shared, own = arrange(SKETCHED), arrange(SKETCHED, one_by_one=True)
    assert shared.peak_bytes < own.peak_bytes
    limit = shared.peak_bytes
    assert arrange(SKETCHED, memory_limit=limit, one_by_one=True) == arrange(SKETCHED, memory_limit=limit)
    limit = own.peak_bytes - 1
    less = arrange(SKETCHED, memory_limit=limit, one_by_one=True)
    assert less.peak_bytes <= limit
    assert shared.strip_columns < less.strip_columns < own.strip_columns
    assert arrange(SKETCHED, memory_limit=own.peak_bytes, one_by_one=True) == own


def test_strips_that_nobody_waits_for_take_seconds() -> None:
    """A killed process loses one of them."""
    work = Work(128, 10_000, (784,), 10**6, None, 4, 2_000, 3_136)
    shared, own = arrange(work), arrange(work, one_by_one=True)
    seconds = own.seconds / own.strips
    assert shared.seconds / shared.strips < seconds <= 1.1 * LONGEST_SECONDS


def test_test_points_of_pairs_whose_residuals_are_estimated_take_few_tasks() -> None:
    """No factor of size P is formed of them."""
    exact = replace(SKETCHED, sample_bytes=2_312, paired=Size(1_500, 3_000, 4))
    estimated = replace(exact, estimated=32)
    assert len(arrange(exact).factor_chunks) > 100
    assert len(arrange(estimated).factor_chunks) == 2
    assert arrange(estimated).solving_bytes < 64 * 2**20
    # a factor that nobody solves takes no time, but the passes that estimate what it would leave do
    slow = Forecast.of(arrange(estimated), Speed(1.0, factor=10.0), Cluster())
    assert slow.factor_seconds < 0.1 * estimated.tests
    assert "passes that estimate residuals" in str(slow)
    assert (
        Forecast.of(arrange(exact), Speed(1.0, factor=10.0), Cluster()).factor_seconds == 10.0 * exact.tests
    )


def test_few_bytes_are_written_at_once() -> None:
    small, large = (arrange(SKETCHED, tile_bytes=size) for size in (2**18, 2**25))
    assert small.written_at_once == MOST_WRITTEN
    assert large.written_at_once == 1
    assert small.written_at_once * small.tile_bytes <= WRITTEN_BYTES
    reduced = Kept("TopK(10)", "test", 2_048 * 10 * 12, diagonal=False)
    assert arrange(replace(SKETCHED, kept=reduced)).written_at_once == 1
