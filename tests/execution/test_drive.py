"""What drives rounds: a fit that no worker could hold is refused before a task runs."""

from __future__ import annotations

from typing import Any, cast

import pytest

from dask_influence.core.estimators.base import Round
from dask_influence.core.moments import Moments
from dask_influence.errors import MemoryLimitError
from dask_influence.execution.drive import Passes
from dask_influence.execution.local import LocalExecutor
from dask_influence.grid import Chunks


class Small(LocalExecutor):
    """One process of which a task may hold 1,000 bytes; counts the passes that it was asked for."""

    passes = 0

    @property
    def memory_limit(self) -> int | None:
        return 1_000

    def reduce(self, *arguments: Any, **how: Any) -> Moments:
        self.passes += 1
        return Moments({}, 1)


def never(*arguments: Any) -> Moments:
    raise AssertionError("no chunk is summed here")


@pytest.mark.parametrize(("result_bytes", "fits"), [(500, True), (501, False)])
def test_sums_that_no_task_can_hold_are_refused(result_bytes: int, fits: bool) -> None:
    executor = Small()
    passes = Passes(executor, cast(Any, None), Chunks(7, 3))
    if fits:
        passes(Round(never, result_bytes=result_bytes))
    else:
        with pytest.raises(MemoryLimitError, match=r"1002 bytes.*1000 bytes.*ArnoldiInfluence"):
            passes(Round(never, result_bytes=result_bytes))
    assert executor.passes == fits


@pytest.mark.parametrize(
    ("chunk", "result_bytes", "pieces"),
    [
        (256, 10**9, [768, 669]),  # two at least, of nearly as many chunks
        (8, 10**9, [720, 717]),
        (8, 500 * 64 // 4, [480, 480, 477]),  # samples that take four times what the sums do
        (256, 100, [256] * 5 + [157]),
        (1437, 10**9, [1437]),
    ],
)
def test_chunks_are_joined_where_their_sums_are_large(
    chunk: int, result_bytes: int, pieces: list[int]
) -> None:
    assert pieces_of(Round(never, result_bytes=result_bytes), chunk) == pieces


@pytest.mark.parametrize(
    ("chunk", "whole", "pieces"),
    [
        (256, 10**6, [1437]),
        (256, 800, [768, 669]),  # of nearly as many chunks
        (256, 100, [256] * 5 + [157]),
        (256, 0, [256] * 5 + [157]),
    ],
)
def test_tasks_that_run_alone_take_the_samples_that_fit_at_once(
    chunk: int, whole: int, pieces: list[int]
) -> None:
    assert pieces_of(Round(never, result_bytes=100, whole=True), chunk, whole) == pieces
    assert pieces_of(Round(never, result_bytes=100), chunk, whole) == [256] * 5 + [157]


@pytest.mark.parametrize(
    ("left", "pieces"), [(10**9, [480, 480, 477]), (480 * 64, [480, 480, 477]), (0, [8] * 179 + [5])]
)
def test_joined_samples_fit_beside_their_sums(left: int, pieces: list[int]) -> None:
    sums = 500 * 64 // 4
    assert pieces_of(Round(never, result_bytes=sums), 8, limit=2 * sums + left) == pieces


def pieces_of(request: Round, chunk: int, whole: int = 0, limit: int | None = None) -> list[int]:
    """How many of 1,437 samples of 64 bytes each task of a pass takes."""
    seen: list[range] = []

    class Watched(LocalExecutor):
        memory_limit = limit

        def reduce(self, function: Any, calls: Any, *arguments: Any, **how: Any) -> Moments:
            seen.extend(piece for call in calls for piece in call[3])
            return Moments({}, 1)

    Passes(Watched(), cast(Any, None), Chunks(1437, chunk), sample_bytes=64, whole=whole)(request)
    assert [n for piece in seen for n in piece] == [*range(1437)]
    return [len(piece) for piece in seen]
