"""Capture: what is made of what layers saw does not keep other threads from differentiating."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from dask_influence.core.capture import capture
from dask_influence.core.elementary import differentiation
from dask_influence.core.layers import layout_of
from dask_influence.core.objective import Objective
from dask_influence.core.outputs import Outputs
from dask_influence.core.problem import prepare
from tests import data


def test_another_thread_differentiates_while_a_capture_is_used() -> None:
    case = data.mlp_classification()
    problem, _ = prepare(Objective.of(case.model, case.loss), *(leaf[:4] for leaf in case.train))

    def columns(outputs: Outputs) -> torch.Tensor:
        return torch.ones(len(outputs.flat), 1, outputs.flat.shape[1], dtype=outputs.flat.dtype)

    def differentiates() -> bool:
        with differentiation():
            return torch.is_grad_enabled()

    pool = ThreadPoolExecutor(1)
    seen = capture(problem, *case.train, layout_of(problem.objective), columns)
    next(seen)
    other = pool.submit(differentiates)
    try:
        assert other.result(timeout=30)
    finally:
        seen.close()
        pool.shutdown()
