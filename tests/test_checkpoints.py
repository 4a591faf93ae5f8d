"""A fit that was killed goes on with the pass that it had not finished, and gives the same bits."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import Client

from dask_influence import ArnoldiInfluence, DirectInfluence, EkfacInfluence, NystroemSketchInfluence
from dask_influence.execution.drive import Passes
from tests import data

KILLED = """
import os, sys
from dask_influence import ArnoldiInfluence
from tests import data

def watch(stage, done, total):
    if stage == "pass {last}" and done == {done}:
        os.kill(os.getpid(), 9)

case = data.mlp_regression()
ArnoldiInfluence(case.model, case.loss, case.regularization, rank=6, chunk_size=7, artifacts=sys.argv[1]).fit(
    case.train, progress=watch
)
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each pass that is really made."""
    passes: list[int] = []
    call = Passes.__call__

    def counting(self: Passes, *args: object, **how: object) -> object:
        passes.append(1)
        return call(self, *args, **how)

    monkeypatch.setattr(Passes, "__call__", counting)
    return passes


def arnoldi(artifacts: Path | None, case: data.Case, **how: object) -> ArnoldiInfluence:
    model = ArnoldiInfluence(
        case.model, case.loss, case.regularization, rank=6, chunk_size=7, artifacts=artifacts, **how
    )
    return model.fit(case.train)


@pytest.mark.parametrize(("last", "done"), [(1, 1), (3, 2), (5, 7)])
def test_a_killed_fit_makes_the_passes_that_are_missing(
    tmp_path: Path, made: list[int], last: int, done: int
) -> None:
    script = KILLED.format(last=last, done=done)
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "kept")], cwd=Path(__file__).parents[1], check=False
    )
    assert killed.returncode == -9
    case = data.mlp_regression()
    fitted = arnoldi(tmp_path / "kept", case)
    resumed = len(made)
    undisturbed = arnoldi(None, case)
    passes = undisturbed.diagnostics["passes"]
    assert (resumed, len(made) - resumed) == (passes - (last - 1), passes)
    assert fitted.diagnostics["passes"] == passes
    assert fitted.diagnostics["restored"] == last - 1
    assert undisturbed.diagnostics["restored"] == 0
    scores = [model.influences(*case.test, *case.train) for model in (fitted, undisturbed)]
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    "build",
    [
        lambda case, **how: DirectInfluence(case.model, case.loss, 2.0, **how),
        lambda case, **how: NystroemSketchInfluence(case.model, case.loss, 2.0, rank=5, **how),
        lambda case, **how: EkfacInfluence(case.model, case.loss, 2.0, **how),
        lambda case, **how: ArnoldiInfluence(
            case.model, case.loss, 2.0, rank=3, block_structure="layer", **how
        ),
    ],
    ids=["direct", "nystroem", "ekfac", "blocks"],
)
def test_a_second_fit_makes_no_pass_on_a_cluster(
    tmp_path: Path, client: Client, made: list[int], build: object
) -> None:
    case = data.mlp_regression()
    first, second = (
        build(case, client=client, artifacts=tmp_path).fit(case.train)  # type: ignore[operator]
        for _ in range(2)
    )
    assert first.diagnostics["passes"] == second.diagnostics["passes"] == len(made) > 0
    assert second.diagnostics["restored"] == len(made)
    scores = [model.influences(*case.test, *case.train) for model in (first, second)]
    assert torch.equal(*scores)


def test_other_data_weights_losses_and_chunks_are_summed(tmp_path: Path, made: list[int]) -> None:
    case = data.mlp_regression()
    x, y = case.train

    def fit(loss: object = case.loss, train: object = (x, y), scale: float = 1.0, **how: object) -> None:
        model = copy.deepcopy(case.model)
        with torch.no_grad():
            next(model.parameters()).mul_(scale)
        DirectInfluence(model, loss, 2.0, artifacts=tmp_path, **how).fit(train)  # type: ignore[arg-type]

    fit()
    assert len(made) == 1
    fit()
    assert len(made) == 1
    for change in (
        {"train": (x.flip(0), y.flip(0))},
        {"loss": torch.nn.functional.l1_loss},
        {"scale": 1.5},
        {"chunk_size": 5},
        {"curvature": "ggn"},
        {"parameters": ["0.*"]},
    ):
        before = len(made)
        fit(**change)  # type: ignore[arg-type]
        assert len(made) == before + 1, change


def test_another_regularization_takes_the_sums_that_are_there(tmp_path: Path, made: list[int]) -> None:
    case = data.mlp_regression()
    for damping in (2.0, 3.0):
        fitted = DirectInfluence(case.model, case.loss, damping, artifacts=tmp_path).fit(case.train)
    assert len(made) == 1
    fresh = DirectInfluence(case.model, case.loss, 3.0).fit(case.train)
    assert torch.equal(*(model.influences(*case.test, *case.train) for model in (fitted, fresh)))


@pytest.mark.parametrize("where", ["process", "cluster"])
def test_a_fit_reports_its_passes(client: Client, where: str) -> None:
    case = data.mlp_regression()
    told: list[tuple[str, int, int]] = []
    fitted = ArnoldiInfluence(
        case.model, case.loss, 2.0, rank=3, chunk_size=9, client=client if where == "cluster" else None
    ).fit(case.train, progress=lambda *seen: told.append(seen))
    stages = list(dict.fromkeys(stage for stage, _, _ in told))
    assert stages == [f"pass {i + 1}" for i in range(fitted.diagnostics["passes"])]
    assert [seen[1:] for seen in told if seen[0] == "pass 1"] == [(i + 1, 5) for i in range(5)]
