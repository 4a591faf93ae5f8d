"""Only a large model alone in its process takes all threads and as many samples at once as fit."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from dask_influence import settings
from dask_influence.execution import resources
from dask_influence.execution.resources import LARGE_MODEL, Resources


@pytest.mark.parametrize(
    ("size", "with_client", "asked", "alone"),
    [
        (LARGE_MODEL, False, None, True),
        (LARGE_MODEL - 1, False, None, False),
        (LARGE_MODEL, True, None, False),
        (LARGE_MODEL, False, "1", False),
    ],
    ids=["alone", "small", "cluster", "threads"],
)
@pytest.mark.usefixtures("two_threads")
def test_who_takes_the_whole_machine(
    size: int, with_client: bool, asked: str | None, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "text", lambda name: asked if name == "torch-threads" else None)
    monkeypatch.setattr(settings, "count", lambda _: int(asked or 0))
    monkeypatch.setattr(resources, "check_client", lambda _: None)
    own, problem = Resources(Mock() if with_client else None, "cpu", None, None, False), Mock()
    problem.objective.size = size
    assert own.one_by_one(problem) is alone
    assert own.threads(problem) == (torch.get_num_threads() if alone else 1)
