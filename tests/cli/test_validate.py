"""``dask-influence validate``: its figures are those of the functions; refused, stopped and resumed as jobs are."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dask_influence import DirectInfluence, EkfacInfluence
from dask_influence.cli.progress import Lines
from dask_influence.cli.session import Stopped
from dask_influence.validation import Newton, Training, leave_one_out, linear_datamodeling_score
from tests.cli.jobs import Folder, invoke

Write = Callable[..., Path]

TRAININGS = """
import time
import torch
from dask_influence.validation import Training

def net():
    return torch.nn.Linear(64, 10)

def plain(x, y, seed, steps=20, noisy=False, needs=None):
    if needs is not None and not (x == torch.tensor(needs)).all(1).any():
        raise FloatingPointError("diverged")
    if noisy:
        seed += time.perf_counter_ns() % 10**6
    return Training(net, torch.nn.functional.cross_entropy, steps=steps)(x, y, seed)

number = 3
"""
LOSS = torch.nn.functional.cross_entropy
LOO = {"points": [1, 5, 9, 30]}
PLAIN = {"function": "cli_job_training:plain"}


@pytest.fixture
def validating(folder: Folder, job: Write) -> Write:
    """Writes a job with the section ``validation``."""
    (folder.path / "cli_job_training.py").write_text(TRAININGS)

    def write(sections: dict[str, Any] | None = None, **fields: Any) -> Path:
        return job(**(sections or {}), validation={"store": "kept", **fields})

    return write


def samples(folder: Folder) -> tuple[Any, Any]:
    x, y = torch.from_numpy(folder.x), torch.from_numpy(folder.y)
    return (x[:53], y[:53]), (x[53:60], y[53:60])


def model(folder: Folder) -> torch.nn.Module:
    made = torch.nn.Linear(64, 10)
    made.load_state_dict(safetensors.torch.load_file(folder.path / "weights.safetensors"))
    return made


def figures(stdout: str) -> dict[tuple[str, str], Any]:
    findings = json.loads(stdout)["findings"]
    return {(one["estimator"], one["part"]): one["result"] for one in findings}


# -- figures -----------------------------------------------------------------------------
def test_the_figures_are_those_of_the_functions(folder: Folder, validating: Write) -> None:
    optimizer = {"name": "torch.optim:SGD", "arguments": {"lr": 0.1}, "steps": 12, "batch_size": 20}
    path = validating(
        training={"optimizer": {**optimizer, "regularization": 0.5}},
        leave_one_out=LOO,
        linear_datamodeling_score={"subsets": 10, "seeds": [0, 3]},
        estimators={
            "exact": {"name": "DirectInfluence", "hessian_regularization": 0.5, "curvature": "ggn"},
            "Kronecker": {"name": "EkfacInfluence", "hessian_regularization": 0.5},
        },
        references={"exact": {"leave_one_out": 0.777}},
        seed=2,
    )
    result = invoke("validate", path, "--json")
    assert result.exit_code == 0, result.stderr
    found = figures(result.stdout)

    train, test = samples(folder)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    training = Training(lambda: torch.nn.Linear(64, 10), LOSS, sgd, 12, 20, 0.5)
    exact = DirectInfluence(model(folder), LOSS, 0.5, curvature="ggn").fit(train)
    kronecker = EkfacInfluence(model(folder), LOSS, 0.5).fit(train)
    for name, influence in (("exact", exact), ("Kronecker", kronecker)):
        one = leave_one_out(influence, train, test, training, points=LOO["points"], seed=2)
        assert found[name, "leave_one_out"]["value"] == pytest.approx(one.value, abs=1e-5)
        assert found[name, "leave_one_out"]["slope"] == pytest.approx(one.slope, rel=1e-4)
        two = linear_datamodeling_score(influence, train, test, training, subsets=10, seeds=(0, 3), seed=2)
        assert found[name, "linear_datamodeling_score"]["value"] == pytest.approx(two.value, abs=1e-5)
        assert found[name, "linear_datamodeling_score"]["ceiling"] == pytest.approx(two.ceiling, abs=1e-5)
    assert json.loads((folder.path / "kept" / "validation.json").read_text()) == json.loads(result.stdout)

    shown = invoke("validate", path)
    assert shown.exit_code == 0
    assert f"{found['exact', 'leave_one_out']['value']:.4f}" in shown.stdout
    assert "0.777" in shown.stdout
    assert "2 seeds" in shown.stdout


def test_responses_and_stability_of_each_estimator_and_regularization(
    folder: Folder, validating: Write
) -> None:
    path = validating(
        {"hessian_regularizations": [0.1, 1.0]},
        finite_difference_response={"points": 3, "weight": 1e-4},
        proximal_bregman_response={"points": [0, 1, 2], "tolerance": 1e-3},
        stability=None,
        references={"DirectInfluence": {"finite_difference_response": [0.5, 0.25]}},
    )
    result = invoke("validate", path, "--json", "--plots", folder.path / "drawn")
    assert result.exit_code == 0, result.stderr
    findings = json.loads(result.stdout)["findings"]
    asked = [(one["part"], one["hessian_regularization"], one["reference"]) for one in findings]
    assert asked == [
        ("finite_difference_response", 0.1, 0.5),
        ("proximal_bregman_response", 0.1, None),
        ("stability", 0.1, None),
        ("finite_difference_response", 1.0, 0.25),
        ("proximal_bregman_response", 1.0, None),
    ]
    # of a linear model with cross-entropy Gauss-Newton scores are exact, and both responses theirs
    assert all(one["result"]["value"] > 0.999 for one in findings if one["part"] != "stability")
    assert findings[0]["result"]["slope"] == pytest.approx(1, abs=1e-3)
    assert findings[2]["result"]["values"] == [0.01, 0.1, 1.0]
    drawn = sorted(path.name for path in (folder.path / "drawn").iterdir())
    assert len(drawn) == 5
    assert drawn[-1].startswith("stability-DirectInfluence")
    assert all((folder.path / "drawn" / name).stat().st_size > 3000 for name in drawn)
    shown = invoke("validate", path).stdout
    assert "rank correlation" in shown
    assert "slope" in shown


def test_ranks_are_compared_of_the_estimators_that_have_one(validating: Write) -> None:
    path = validating(
        stability={"ranks": [2, 4], "k": 3},
        estimators={
            "exact": {"name": "DirectInfluence", "hessian_regularization": 0.5},
            "sketch": {"name": "ArnoldiInfluence", "hessian_regularization": 0.5, "rank": 3},
        },
    )
    result = invoke("validate", path, "--json")
    assert result.exit_code == 0, result.stderr
    ((name, _),) = figures(result.stdout)
    assert name == "sketch"


def test_wrong_labels_known_and_planted(folder: Folder, validating: Write) -> None:
    np.save(folder.path / "wrong.npy", np.array([3, 8, 20]))
    train_alone = {"data": {"train": "train.zarr"}}
    known = invoke("validate", validating(train_alone, mislabel_detection={"wrong": "wrong.npy"}), "--json")
    assert known.exit_code == 0, known.stderr
    (found,) = figures(known.stdout).values()
    assert set(found) == {"self influence", "loss", "gradient norm"}
    planted = validating(
        train_alone, mislabel_detection={"flip": 0.1}, training={"newton": {"regularization": 0.5}}
    )
    result = invoke("validate", planted)
    assert result.exit_code == 0, result.stderr
    assert "5 wrong of 53 labels; without influence: loss 0." in result.stdout


def test_workers_train_with_modules_of_the_job(folder: Folder, validating: Write) -> None:
    sections = {"cluster": {"workers": 2, "dashboard_address": None}}
    result = invoke("validate", validating(sections, training=PLAIN, leave_one_out=LOO), "--json")
    assert result.exit_code == 0, result.stderr
    here = invoke("validate", validating(training=PLAIN, leave_one_out=LOO, store="another"), "--json")
    one, other = (figures(run.stdout)["DirectInfluence", "leave_one_out"] for run in (result, here))
    assert one["value"] == pytest.approx(other["value"], abs=1e-9)
    assert one["failures"] == {}


# -- resumed, stopped ---------------------------------------------------------------------
def test_it_is_stopped_and_goes_on(
    folder: Folder, validating: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = validating(training=PLAIN, leave_one_out=LOO)

    def stop(self: Lines, stage: str, done: int, *rest: Any) -> None:
        if stage == "training" and done == 3:
            raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Lines, "progress", stop)
        assert invoke("validate", path).exit_code == 143
    kept = {one: one.stat().st_mtime_ns for one in (folder.path / "kept" / "trained").iterdir()}
    assert len(kept) == 3
    assert not (folder.path / "kept" / "validation.json").exists()
    assert invoke("validate", path).exit_code == 0
    assert {one: one.stat().st_mtime_ns for one in kept} == kept
    assert len(list((folder.path / "kept" / "trained").iterdir())) == 6


# -- training that is not as it should be ---------------------------------------------------
@pytest.mark.filterwarnings("default::dask_influence.errors.DataWarning")
def test_training_that_is_not_deterministic_is_told(validating: Write) -> None:
    noisy = {**PLAIN, "arguments": {"noisy": True}}
    asked = {"subsets": 10, "seeds": [0, 1]}
    result = invoke("validate", validating(training=noisy, linear_datamodeling_score=asked))
    assert result.exit_code == 0, result.stderr
    assert "training is not deterministic" in result.stderr
    assert "ceiling 0." in result.stdout
    assert "noise" in result.stdout


@pytest.mark.filterwarnings("default::dask_influence.errors.DataWarning")
def test_training_that_fails_is_told(folder: Folder, validating: Write) -> None:
    some = {**PLAIN, "arguments": {"needs": folder.x[5].tolist()}}
    result = invoke("validate", validating(training=some, leave_one_out={"points": [5, 9, 30, 31]}))
    assert result.exit_code == 0, result.stderr
    assert "training failed on 1 of 5 subsets; on number 1: FloatingPointError: diverged" in result.stderr
    assert "failed and left out: 1, such as number 1" in result.stdout

    every = {**PLAIN, "arguments": {"needs": [-7.0] * 64}}
    result = invoke("validate", validating(training=every, linear_datamodeling_score={"subsets": 10}))
    assert result.exit_code == 3
    assert "training failed on 10 of 10 subsets" in result.stderr
    assert "job.yaml, line" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_was_found_before_something_failed_is_shown(validating: Write) -> None:
    never = {"points": 3, "steps": 1, "tolerance": 1e-12}
    path = validating(finite_difference_response={"points": 3}, proximal_bregman_response=never)
    result = invoke("validate", path, "--json")
    assert result.exit_code == 3
    assert "response failed on 3 of 3 points" in result.stderr
    ((_, part),) = figures(result.stdout)
    assert part == "finite_difference_response"


# -- refused --------------------------------------------------------------------------------
TRAINED = {"training": PLAIN}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing to measure": ({}, "validation: names nothing to measure; add one of leave_one_out"),
    "no training": ({"leave_one_out": LOO}, "validation: must have training"),
    "too few points": (
        {**TRAINED, "leave_one_out": {"points": 2}},
        "points: must be greater than or equal to 3",
    ),
    "too few subsets": (
        {**TRAINED, "linear_datamodeling_score": {"subsets": 9}},
        "linear_datamodeling_score.subsets: must be greater than or equal to 10; got 9",
    ),
    "all of the data": (
        {**TRAINED, "linear_datamodeling_score": {"fraction": 1.0}},
        "fraction: must be less than 1",
    ),
    "an empty subset": (
        {**TRAINED, "linear_datamodeling_score": {"fraction": 0.001}},
        "linear_datamodeling_score.fraction: leaves none of the 53 training points",
    ),
    "more points than there are": (
        {**TRAINED, "leave_one_out": {"points": 54}},
        "leave_one_out.points: must be different points of the 53 training points",
    ),
    "a point twice": ({**TRAINED, "leave_one_out": {"points": [1, 1, 2]}}, "must be different points"),
    "seeds twice": (
        {**TRAINED, "leave_one_out": {"seeds": [1, 1]}},
        "leave_one_out.seeds: must be different",
    ),
    "no such function": (
        {**TRAINED, "training": "cli_job_training:none", "leave_one_out": LOO},
        "has no 'none'",
    ),
    "a number that trains": (
        {"training": "cli_job_training:number", "leave_one_out": LOO},
        "training.function: must be callable as (x, y, seed)",
    ),
    "two ways of training": (
        {"training": {**PLAIN, "newton": {"regularization": 1}}, "leave_one_out": LOO},
        "training: must have exactly one of function, optimizer and newton; has function and newton",
    ),
    "an optimizer's argument": (
        {"training": {"optimizer": {"arguments": {"rate": 1}}}, "leave_one_out": LOO},
        "training.optimizer: torch.optim:Adam does not take these arguments",
    ),
    "unknown field": ({**TRAINED, "leave_on_out": {}}, "validation.leave_on_out: no such field"),
    "no estimator of that name": (
        {"stability": {}, "estimators": {"mine": {"name": "Direct"}}},
        "validation.estimators.mine.name: must be one of DirectInfluence",
    ),
    "reference of nobody": (
        {"finite_difference_response": {}, "references": {"exact": {"finite_difference_response": 1.0}}},
        "validation.references.exact: is no estimator of this validation: DirectInfluence",
    ),
    "reference of no part": (
        {"finite_difference_response": {}, "references": {"DirectInfluence": {"leave_one_out": 1.0}}},
        "references.DirectInfluence.leave_one_out: is no part of this validation",
    ),
    "references of several λ": (
        {"stability": {}, "finite_difference_response": {}}
        | {"references": {"DirectInfluence": {"finite_difference_response": [1.0, 2.0]}}},
        "must be 1 figures, one for each λ",
    ),
    "ranks of none": ({"stability": {"ranks": [1, 2]}}, "stability.ranks: are for estimators that have one"),
    "ranks beyond the parameters": (
        {"stability": {"ranks": [2, 650]}, "estimators": {"s": {"name": "ArnoldiInfluence", "rank": 3}}},
        "stability.ranks: must be below the 650 parameters",
    ),
    "one λ": (
        {"stability": {"regularizations": [0.1, 0.1]}},
        "stability.regularizations: must hold two or more different values",
    ),
    "λ and ranks": (
        {"stability": {"regularizations": [0.1, 1.0], "ranks": [1, 2]}},
        "validation.stability: must have regularizations or ranks, not both",
    ),
    "around no λ": (
        {"stability": {}, "estimators": {"plain": {"name": "EkfacInfluence"}}},
        "validation.stability: must have regularizations: that of plain is 0",
    ),
    "no label to flip": (
        {**TRAINED, "mislabel_detection": {"flip": 0.001}},
        "mislabel_detection.flip: changes none of the 53 labels",
    ),
    "an argument that the function does not take": (
        {"training": {**PLAIN, "arguments": {"stepz": 3}}, "leave_one_out": LOO},
        "training.function: must be callable as (x, y, seed, stepz): got an unexpected keyword argument 'stepz'",
    ),
    "wrong labels that are none": (
        {"mislabel_detection": {"wrong": [53]}},
        "mislabel_detection.wrong: wrong must be",
    ),
    "two kinds of labels": (
        {**TRAINED, "mislabel_detection": {"wrong": [1], "flip": 0.1}},
        "mislabel_detection: must have exactly one of wrong and flip",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_with_its_line_before_anything_is_fitted(
    folder: Folder, validating: Write, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    fits: list[object] = []
    monkeypatch.setattr("dask_influence.fitting.fit", lambda *arguments: fits.append(arguments))
    fields, message = REFUSED[case]
    result = invoke("validate", validating(**fields))
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert "job.yaml, line" in result.stderr
    assert "Traceback" not in result.stderr
    assert not fits
    assert not list((folder.path / "kept").rglob("*.*"))


def test_a_job_without_the_section_or_test_data_is_refused(
    folder: Folder, job: Write, validating: Write
) -> None:
    result = invoke("validate", job())
    assert result.exit_code == 2
    assert "the job has no section validation" in result.stderr
    result = invoke("validate", validating({"data": {"train": "train.zarr"}}, stability={}))
    assert result.exit_code == 2
    assert "data.test: is missing" in result.stderr
    (folder.path / "file").write_text("")
    result = invoke("validate", validating(stability={}), "--plots", folder.path / "file" / "below")
    assert result.exit_code == 2
    assert "--plots" in result.stderr


def test_a_job_with_the_section_runs_as_before(validating: Write) -> None:
    assert invoke("run", validating(stability={})).exit_code == 0


def test_newton_takes_the_weights_of_the_job(folder: Folder, validating: Write) -> None:
    path = validating(training={"newton": {"regularization": 0.5}}, leave_one_out=LOO)
    result = invoke("validate", path, "--json")
    assert result.exit_code == 0, result.stderr
    train, test = samples(folder)
    exact = DirectInfluence(model(folder), LOSS, 0.5, curvature="ggn").fit(train)
    expected = leave_one_out(exact, train, test, Newton(model(folder), LOSS, 0.5), points=LOO["points"])
    found = figures(result.stdout)["DirectInfluence", "leave_one_out"]
    assert found["value"] == pytest.approx(expected.value, abs=1e-5)
