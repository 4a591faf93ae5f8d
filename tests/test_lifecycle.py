"""One fit, many uses: another λ, saved and loaded, what it says of itself, and the plan of a run."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dask_influence import ArnoldiInfluence, DirectInfluence, GradientDotInfluence, open_influences
from dask_influence.errors import (
    ConfigurationError,
    CorruptStoreError,
    IndefiniteCurvatureWarning,
    InfluenceError,
    MemoryLimitError,
    NotFittedError,
    StoreError,
    StoreMismatchError,
)
from tests import data, oracles

ESTIMATORS = {
    "direct": (DirectInfluence, {}),
    "dropped": (ArnoldiInfluence, {"rank": 17, "tol": 1e-12}),
    "woodbury": (ArnoldiInfluence, {"rank": 17, "tol": 1e-12, "complement": True}),
}
EACH = pytest.mark.parametrize("name", ESTIMATORS)


def build(name: str, case: data.Case, damping: float | None = None, **how: Any) -> Any:
    kind, configuration = ESTIMATORS[name]
    return kind(case.model, case.loss, damping or case.regularization, **configuration, **how)


class Counted:
    """A loss that counts how often it is called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(output, target)

    def __deepcopy__(self, memo: Any) -> Counted:
        return self


# -- another λ ------------------------------------------------------------------------------------
@EACH
def test_with_regularization_equals_a_refit(name: str) -> None:
    case = data.mlp_classification()
    fitted = build(name, case).fit(case.train)
    before = fitted.influences(*case.test, *case.train)
    for damping in (0.021, 0.4, 30.0):
        refit = build(name, case, damping).fit(case.train)
        for mode in ("up", "perturbation"):
            shared = fitted.with_regularization(damping).influences(*case.test, *case.train, mode=mode)
            expected = refit.influences(*case.test, *case.train, mode=mode)
            assert oracles.relative_error(shared, expected) <= 1e-10
    assert torch.equal(fitted.influences(*case.test, *case.train), before)


@EACH
def test_with_regularization_reads_no_data(name: str) -> None:
    case = data.mlp_classification()
    loss = Counted()
    fitted = build(name, data.Case(case.model, loss, case.train, case.test, 0.05)).fit(case.train)
    calls = loss.calls
    assert calls > 0
    again = fitted.with_regularization(0.2)
    assert loss.calls == calls
    assert type(again) is type(fitted)


def test_with_regularization_is_checked_like_the_argument() -> None:
    case = data.mlp_classification()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ConfigurationError, match=r"regularization"):
            fitted.with_regularization(wrong)
    with pytest.raises(NotFittedError):
        DirectInfluence(case.model, case.loss, 0.1).with_regularization(0.2)


# -- saved and loaded -----------------------------------------------------------------------------
PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04", b"(dp", b"cposix")


@EACH
def test_save_and_load_give_the_same_bits(tmp_path: Path, name: str) -> None:
    case = data.mlp_classification()
    fitted = build(name, case).fit(case.train)
    fitted.save(tmp_path / "saved")
    loaded = type(fitted).load(tmp_path / "saved", copy.deepcopy(case.model), case.loss)
    for mode in ("up", "perturbation"):
        expected = fitted.influences(*case.test, *case.train, mode=mode)
        assert torch.equal(loaded.influences(*case.test, *case.train, mode=mode), expected)
    expected = fitted.with_regularization(0.3).influences(*case.test, *case.train)
    actual = loaded.with_regularization(0.3).influences(*case.test, *case.train)
    assert oracles.relative_error(actual, expected) <= 1e-12
    assert loaded.diagnostics == fitted.diagnostics


@EACH
def test_saved_files_are_arrays_and_json(tmp_path: Path, name: str) -> None:
    case = data.mlp_classification()
    build(name, case).fit(case.train).save(str(tmp_path / "saved"))
    files = [p for p in (tmp_path / "saved").rglob("*") if p.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        assert not content.startswith(PICKLES), file
        assert b"torch._utils" not in content, file
        assert file.suffix not in {".pkl", ".pickle", ".pt", ".pth", ".npy"}, file
        if file.suffix == ".json":
            json.loads(content)
    assert any(file.suffix == ".json" for file in files)


def test_loading_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    case = data.mlp_classification()
    DirectInfluence(case.model, case.loss, 0.05).fit(case.train).save(tmp_path / "saved")
    with pytest.raises(StoreError, match="absent"):
        DirectInfluence.load(tmp_path / "absent", case.model, case.loss)
    with pytest.raises(InfluenceError, match=r"(?i)direct"):
        ArnoldiInfluence.load(tmp_path / "saved", case.model, case.loss)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    with pytest.raises(InfluenceError, match=r"(?i)model|parameter"):
        DirectInfluence.load(tmp_path / "saved", other, case.loss)
    with pytest.raises(NotFittedError):
        DirectInfluence(case.model, case.loss, 0.05).save(tmp_path / "unfitted")
    assert not (tmp_path / "unfitted").exists()


def test_a_loaded_model_keeps_its_choices(tmp_path: Path) -> None:
    case = data.mlp_classification()
    fitted = DirectInfluence(
        case.model, case.loss, 0.07, parameters=["2.*"], curvature="ggn", chunk_size=5
    ).fit(case.train)
    fitted.save(tmp_path / "saved")
    loaded = DirectInfluence.load(tmp_path / "saved", case.model, case.loss)
    expected = fitted.influences(*case.test, *case.train)
    assert torch.equal(loaded.influences(*case.test, *case.train), expected)


# -- diagnostics ----------------------------------------------------------------------------------
def numbers(tree: Any) -> Iterator[float]:
    """Every number in a tree of mappings and lists."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from numbers(item)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool):
        yield float(tree)


@EACH
def test_diagnostics(name: str) -> None:
    case = data.mlp_classification()
    diagnostics = build(name, case, chunk_size=8).fit(case.train).diagnostics
    json.dumps(diagnostics)
    assert diagnostics["samples"] == 37
    assert diagnostics["parameters"] == 51
    (damping,) = [value for key, value in diagnostics.items() if key.endswith("regularization")]
    assert damping == case.regularization
    (passes,) = [value for key, value in diagnostics.items() if "passes" in key]
    assert passes >= 1
    assert any("derivative" in key for key in diagnostics)
    found = np.array(list(numbers({k: v for k, v in diagnostics.items() if "eigen" in k})))
    spectrum = torch.linalg.eigvalsh(case.hessian)
    assert np.abs(found / float(spectrum[-1]) - 1).min() < 0.01
    if name == "direct":
        assert np.abs(found / float(spectrum[0]) - 1).min() < 0.01
    else:
        captured, _ = oracles.leading_eigenpairs(case.hessian, 17)
        assert all(np.abs(found / value - 1).min() <= 1e-8 for value in captured.tolist())
        (residual,) = [value for key, value in diagnostics.items() if "residual" in key]
        assert 0 < residual <= 1e-10


def test_diagnostics_of_an_unfitted_model_are_refused() -> None:
    case = data.mlp_classification()
    with pytest.raises(NotFittedError, match="fit"):
        _ = DirectInfluence(case.model, case.loss, 0.1).diagnostics


def test_passes_of_arnoldi_are_those_of_a_block_method() -> None:
    """Many products in one pass: far fewer passes than eigenpairs."""
    case = data.digits_mlp()
    fitted = ArnoldiInfluence(case.model, case.loss, case.regularization, rank=31).fit(case.train)
    (passes,) = [value for key, value in fitted.diagnostics.items() if "passes" in key]
    assert passes < 31


# -- indefinite curvature -------------------------------------------------------------------------
def indefinite() -> data.Case:
    """An untrained network with λ far below the magnitude of its lowest eigenvalue."""
    case = data.mlp_regression()
    model = copy.deepcopy(case.model)
    for parameter in model.parameters():
        parameter.data.copy_(1.5 * data.normal(parameter.numel(), *parameter.shape))
    return data.Case(model, case.loss, case.train, case.test, 0.013)


@EACH
def test_indefinite_curvature_warns_with_a_regularization_that_cures_it(name: str) -> None:
    case = indefinite()
    lowest = float(torch.linalg.eigvalsh(case.hessian)[0])
    assert lowest < -1
    how = {} if name == "direct" else {"rank": 9}
    kind, configuration = ESTIMATORS[name]
    configuration = {**configuration, **how}
    with pytest.warns(IndefiniteCurvatureWarning) as caught:
        kind(case.model, case.loss, case.regularization, **configuration).fit(case.train)
    message = str(caught[0].message)
    named = [float(n) for n in re.findall(r"(?<![\w.])\d+\.?\d*(?:e[-+]?\d+)?", message)]
    cures = [value for value in named if -lowest < value < -4 * lowest]
    assert cures, message
    with warnings.catch_warnings():
        warnings.simplefilter("error", IndefiniteCurvatureWarning)
        kind(case.model, case.loss, max(cures), **configuration).fit(case.train)


def test_direct_solves_an_indefinite_system_all_the_same() -> None:
    case = indefinite()
    with pytest.warns(IndefiniteCurvatureWarning):
        fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    scores = fitted.influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= 1e-9
    with pytest.warns(IndefiniteCurvatureWarning):
        fitted.with_regularization(0.5)


# -- a store that lives as long as the process --------------------------------------------------
def test_store_in_memory() -> None:
    case = data.mlp_regression()
    fitted = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    written = fitted.influences_to_zarr("memory://lifecycle", case.test, case.train, tile_bytes=1_500)
    for dataset in (written, open_influences("memory://lifecycle")):
        assert oracles.relative_error(dataset.influence.values, case.up(case.inverse)) <= 1e-9


# -- the plan -------------------------------------------------------------------------------------
@EACH
def test_plan_runs_nothing_and_tells_all(name: str) -> None:
    case = data.mlp_classification()
    loss = Counted()
    fitted = build(name, data.Case(case.model, loss, case.train, case.test, 0.05)).fit(case.train)
    calls = loss.calls
    plan = fitted.plan(case.test, case.train, mode="perturbation")
    assert loss.calls == calls
    text = str(plan).lower()
    for word in ("tiles", "strips", "passes", "bytes", "time", "13", "37"):
        assert word in text, word
    assert len(text.splitlines()) >= 5


def test_plan_is_refused_with_both_numbers_when_memory_is_short() -> None:
    case = data.mlp_classification()
    plan = DirectInfluence(case.model, case.loss, 0.05).fit(case.train).plan(case.test, case.train)
    with pytest.raises(MemoryLimitError, match="12345") as caught:
        plan.validate(12_345)
    others = [int(n) for n in re.findall(r"\d+", str(caught.value).replace(",", "")) if int(n) > 12_345]
    assert others
    plan.validate(64 * 2**30)
    plan.validate(max(others))


def test_a_run_that_does_not_fit_writes_nothing(tmp_path: Path) -> None:
    case = data.mlp_classification()
    fitted = DirectInfluence(case.model, case.loss, 0.05).fit(case.train)
    with pytest.raises(MemoryLimitError, match="12345"):
        fitted.influences_to_zarr(tmp_path / "run", case.test, case.train, memory_limit=12_345)
    assert not list(tmp_path.iterdir())
    written = fitted.influences_to_zarr(tmp_path / "run", case.test, case.train, memory_limit=8 * 2**30)
    assert written.influence.shape == (13, 37)


def test_fit_returns_the_model_and_may_be_called_again() -> None:
    case = data.mlp_classification()
    model = DirectInfluence(case.model, case.loss, 1.0)
    few = oracles.pick(case.train, slice(0, 11))
    assert model.fit(few) is model
    expected = case.up(oracles.inverse(oracles.hessian(case.model, case.loss, *few), 1.0))
    assert oracles.relative_error(model.influences(*case.test, *case.train), expected) <= 1e-9
    expected = case.up(oracles.inverse(case.hessian, 1.0))
    assert oracles.relative_error(model.fit(case.train).influences(*case.test, *case.train), expected) <= 1e-9


def test_another_loss_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    """Closures of one factory share a name, and a loss module's repr shows no arguments."""
    case = data.mlp_regression()

    def scaled(factor: float) -> Any:
        return lambda output, target: factor * torch.nn.functional.mse_loss(output, target)

    one = GradientDotInfluence(case.model, scaled(1.0)).fit(case.train)
    hundred = GradientDotInfluence(case.model, scaled(100.0)).fit(case.train)
    one.influences_to_zarr(tmp_path / "run", case.test, case.train)
    with pytest.raises(StoreMismatchError, match="behaviour"):
        hundred.influences_to_zarr(tmp_path / "run", case.test, case.train)
    again = GradientDotInfluence(case.model, scaled(1.0)).fit(case.train)
    again.influences_to_zarr(tmp_path / "run", case.test, case.train)


def test_loading_with_another_loss_is_refused(tmp_path: Path) -> None:
    case = data.mlp_regression()
    DirectInfluence(case.model, case.loss, 0.7).fit(case.train).save(tmp_path / "saved")
    with pytest.raises(StoreMismatchError, match="l1_loss"):
        DirectInfluence.load(tmp_path / "saved", case.model, torch.nn.functional.l1_loss)
    DirectInfluence.load(tmp_path / "saved", case.model, case.loss, train=case.train)


def test_buffers_that_are_not_persistent_count(tmp_path: Path) -> None:
    case = data.mlp_regression()
    width = case.train[0].shape[1]

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(width, 1).double()
            self.register_buffer("mean", torch.zeros(width, dtype=torch.float64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x - self.mean)

    first, second = Centred(), Centred()
    second.load_state_dict(first.state_dict())
    fitted = DirectInfluence(first, case.loss, 0.7).fit(case.train)
    fitted.save(tmp_path / "saved")
    DirectInfluence.load(tmp_path / "saved", second, case.loss)
    second.mean += 1
    with pytest.raises(StoreMismatchError, match="weights"):
        DirectInfluence.load(tmp_path / "saved", second, case.loss)


@pytest.mark.parametrize("name", ["influence.json", "inverse.safetensors"])
def test_a_damaged_save_is_named(tmp_path: Path, name: str) -> None:
    case = data.mlp_regression()
    DirectInfluence(case.model, case.loss, 0.7).fit(case.train).save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CorruptStoreError, match=name):
        DirectInfluence.load(tmp_path / "saved", case.model, case.loss)


def test_a_fitted_model_survives_a_pickle() -> None:
    case = data.mlp_regression()
    fitted = DirectInfluence(case.model, case.loss, 0.7).fit(case.train)
    copied = pickle.loads(pickle.dumps(fitted))
    assert torch.equal(copied.influences(*case.test, *case.train), fitted.influences(*case.test, *case.train))


def test_arguments_are_read_under_their_names_and_belong_to_the_fit() -> None:
    case = data.mlp_regression()
    given = {
        "curvature": "ggn",
        "block_structure": {"all": ["*"]},
        "parameters": ["0.*"],
        "device": "cpu",
        "dtype": torch.float64,
        "chunk_size": 5,
        "client": None,
        "artifacts": "memory://artifacts",
        "certify": False,
    }
    model = DirectInfluence(case.model, case.loss, 0.7, **given)
    assert (model.model, model.loss, model.hessian_regularization) == (case.model, case.loss, 0.7)
    assert {name: getattr(model, name) for name in given} == given
    with pytest.raises(AttributeError, match="hessian_regularization"):
        model.hessian_regularization = 0.1  # with_regularization is how
    assert repr(model) == "DirectInfluence(Sequential, λ=0.7, not fitted)"
