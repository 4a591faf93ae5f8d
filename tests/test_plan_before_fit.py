"""A plan without a fit has the geometry of the one after it, whatever the estimator."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GradientDotInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from dask_influence.errors import ConfigurationError, MemoryLimitError, NotFittedError
from dask_influence.execution.plan import PROCESS_BYTES, Plan
from tests import data

ESTIMATORS = {
    "direct": lambda: DirectInfluence(*MODEL, 0.1),
    "low rank": lambda: ArnoldiInfluence(*MODEL, 0.1, rank=2),
    "woodbury": lambda: ArnoldiInfluence(*MODEL, 0.1, rank=2, complement=True),
    "cg": lambda: CgInfluence(*MODEL, 0.1),
    "lissa": lambda: LissaInfluence(*MODEL, 0.1),
    "ekfac": lambda: EkfacInfluence(*MODEL, 0.1),
    "nystroem": lambda: NystroemSketchInfluence(*MODEL, 0.1, rank=2),
    "datainf": lambda: InverseHarmonicMeanInfluence(*MODEL, 0.1),
    "gradient dot": lambda: GradientDotInfluence(*MODEL, 0.1),
    "blocks": lambda: ArnoldiInfluence(*MODEL, 0.1, rank=2, block_structure="parameter"),
}
MODEL = (torch.nn.Linear(4, 2), torch.nn.functional.mse_loss)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_plan_before_the_fit_is_that_after_it(name: str) -> None:
    x, y = data.normal(1, 23, 4).float(), data.normal(2, 23, 2).float()
    model = ESTIMATORS[name]()
    before = model.plan((x[:5], y[:5]), (x, y), before_fit=True)
    with pytest.raises(NotFittedError):
        model.plan((x[:5], y[:5]), (x, y))
    after = model.fit((x, y)).plan((x[:5], y[:5]), (x, y))
    for field in ("work", "query_rows", "tile", "strip_columns", "batch", "factor_rows"):
        assert getattr(before, field) == getattr(after, field), field
    assert (before.speed.factor is None) == (after.speed.factor is None)


@pytest.mark.parametrize(
    ("name", "solving"), [("cg", True), ("woodbury", False), ("direct", None), ("low rank", None)]
)
def test_plans_count_the_passes_that_factors_take(name: str, solving: bool | None) -> None:
    """Workers hold vectors and sums of their products, the client the blocks of an iteration; certifying takes time."""
    pair = data.normal(1, 23, 4).float(), data.normal(2, 23, 2).float()
    plan = ESTIMATORS[name]().plan(pair, pair, before_fit=True)
    own = Plan(plan.work, plan.query_rows, plan.tile, plan.strip_columns, plan.batch, plan.factor_rows)
    assert Plan.from_json(json.loads(json.dumps(own.to_json()))) == own
    passing, parameters = plan.work.passing, plan.work.parameters
    assert (passing and passing.solving) == solving
    without = dataclasses.replace(plan, work=dataclasses.replace(plan.work, passing=None))
    block = 8 * plan.factor_rows * parameters
    more = plan.client_bytes - without.client_bytes
    if solving is None:
        assert more == 0 == plan.certifying_seconds
        return
    assert more >= (10 if solving else 5) * block
    assert plan.work.passing_bytes(plan.factor_rows) >= 4 * block
    assert plan.worker_bytes() >= PROCESS_BYTES + plan.work.passing_bytes(plan.factor_rows)
    if solving:
        assert plan.certifying_seconds == 0
        return
    twice = dataclasses.replace(passing, fitted=2 * passing.fitted)
    longer = dataclasses.replace(plan, work=dataclasses.replace(plan.work, passing=twice))
    assert longer.certifying_seconds == pytest.approx(2 * plan.certifying_seconds)
    spent = plan.speed.derivatives * plan.certifying_seconds
    assert plan.factor_seconds - without.factor_seconds == pytest.approx(spent) != 0


def test_what_layers_put_out_takes_time() -> None:
    """Of models that share weights it is most of what a derivative takes."""
    pair = data.normal(1, 23, 4).float(), data.normal(2, 23, 2).float()
    plan = DirectInfluence(*MODEL, 0.1).plan(pair, pair, before_fit=True)
    wide = dataclasses.replace(plan, work=dataclasses.replace(plan.work, activations=10**6))
    assert wide.derivative_seconds >= 23 * 1e-9 * 10**6 > 100 * plan.derivative_seconds


def test_in_perturbation_mode_they_take_it_along_each_direction() -> None:
    pair = data.normal(1, 23, 4).float(), data.normal(2, 23, 2).float()
    plan = DirectInfluence(*MODEL, 0.1).plan(pair, pair, before_fit=True, mode="perturbation")
    wide = dataclasses.replace(plan, work=dataclasses.replace(plan.work, activations=10**6))
    few = dataclasses.replace(wide, query_rows=1)
    assert (wide.directions, few.directions) == (23, 1)
    assert 23 / 2 < wide.derivative_seconds / (few.derivative_seconds / few.passes) < 23


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("bandwidth", "1GB"),
        ("bandwidth", 0),
        ("bandwidth", True),
        ("memory_limit", 0),
        ("memory_limit", "1GB"),
    ],
)
@pytest.mark.parametrize("worker_memory", [None, 2**30])
def test_a_plan_of_the_wrong_limits_is_refused(
    argument: str, wrong: object, worker_memory: int | None
) -> None:
    pair = data.normal(1, 23, 4).float(), data.normal(2, 23, 2).float()
    plan = lambda value: DirectInfluence(*MODEL, 0.1).plan(  # noqa: E731
        pair, pair, before_fit=True, worker_memory=worker_memory, **{argument: value}
    )
    with pytest.raises(ConfigurationError, match=f"{argument}.*{wrong!r}"):
        plan(wrong)
    assert plan(2**30).strips


def test_a_plan_is_validated_against_bytes() -> None:
    pair = data.normal(1, 23, 4).float(), data.normal(2, 23, 2).float()
    plan = DirectInfluence(*MODEL, 0.1).plan(pair, pair, before_fit=True)
    for wrong in ("a", float("nan"), 0, -5, True):
        with pytest.raises(ConfigurationError, match="memory_limit"):
            plan.validate(wrong)  # type: ignore[arg-type]
    with pytest.raises(MemoryLimitError):
        plan.validate(1)
    assert plan.validate(plan.peak_bytes) is plan.validate(None) is plan
