"""What this process adds up itself: small sums leave the cores to the tasks of the next pass."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dask_influence.core.moments import Moments, merge
from dask_influence.execution import local


@pytest.mark.parametrize(("numbers", "threads"), [(local.SMALL, 1), (local.SMALL + 1, 2)])
@pytest.mark.usefixtures("two_threads")
def test_small_sums_are_added_in_one_thread(
    numbers: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(parts: Sequence[Moments]) -> Moments:
        seen.append(torch.get_num_threads())
        return merge(parts)

    monkeypatch.setattr(local, "merge", watched)
    calls = [(1.0,), (2.0,), (4.0,)]
    total = local.LocalExecutor().reduce(
        lambda value: Moments({"sum": torch.full((numbers,), value)}, 1), calls
    )
    assert seen == [threads]
    assert torch.get_num_threads() == 2
    assert total.count == 3
    assert bool((total.total["sum"] == 7).all())
