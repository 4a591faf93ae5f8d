"""Every estimator on every device that is there: the same scores as the dense oracle's, in the same precision.

Where there is no CUDA its half is skipped. A loss with tensors of its own follows the model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GradientDotInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
    SelfInfluence,
    TopK,
)
from dask_influence.core.objective import Objective, loss_on
from dask_influence.errors import ConfigurationError
from dask_influence.execution.devices import resolve_device
from dask_influence.execution.options import Options
from tests import data, oracles

ESTIMATORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "direct": (DirectInfluence, {}),
    "arnoldi": (ArnoldiInfluence, {"rank": 20}),
    "woodbury": (ArnoldiInfluence, {"rank": 20, "complement": True}),
    "cg": (CgInfluence, {"rtol": 1e-10}),
    "lissa": (LissaInfluence, {"rtol": 0.3}),
    "nystroem": (NystroemSketchInfluence, {"rank": 20}),
    "ekfac": (EkfacInfluence, {}),
    "datainf": (InverseHarmonicMeanInfluence, {}),
    "gradient dot": (GradientDotInfluence, {}),
}
EXACT = {"direct": 1e-9, "cg": 1e-7}
"""Those that solve the system itself, and how well."""


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)),
        nn.Conv2d(1, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )


def case_of(kind: str) -> data.Case:
    if kind == "perceptron":
        return data.mlp_classification()
    train, test = (
        (data.normal(seed, count, 9), data.classes(seed + 1, count, 3))
        for seed, count in ((51, 37), (53, 13))
    )
    model = data.seeded(convolution).double()
    return data.Case(model, nn.functional.cross_entropy, train, test, 0.05)


@pytest.mark.parametrize("kind", ["perceptron", "convolution"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_scores_are_the_same_on_every_device(device: str, name: str, kind: str) -> None:
    """Against the oracle where the system is solved, else against this package on the CPU."""
    case, (estimator, own) = case_of(kind), ESTIMATORS[name]
    curvature = {} if name == "direct" and kind == "perceptron" else {"curvature": "ggn"}

    def fitted(where: str) -> Any:
        options: dict[str, Any] = {**curvature, **own, "device": where}
        return estimator(case.model, case.loss, case.regularization, **options).fit(case.train)

    found = fitted(device)
    moved = [tensor.to(device) for tensor in (*case.test, *case.train)]
    scores = found.influences(*moved)
    assert scores.device.type == device
    perturbed = found.influences(*moved, mode="perturbation")
    if name in EXACT:
        matrix = (
            oracles.ggn(case.model, case.loss, *case.train)
            if curvature
            else oracles.hessian(case.model, case.loss, *case.train)
        )
        inverse = oracles.inverse(matrix, case.regularization)
        expected, expected_perturbed = case.up(inverse), case.perturbation(inverse)
        tolerance = EXACT[name]
    else:
        plain = fitted("cpu")
        expected = plain.influences(*case.test, *case.train)
        expected_perturbed = plain.influences(*case.test, *case.train, mode="perturbation")
        tolerance = 1e-7
    assert oracles.relative_error(scores.cpu(), expected) <= tolerance
    assert oracles.relative_error(perturbed.cpu(), expected_perturbed) <= tolerance


@pytest.mark.parametrize("reduce", [None, TopK(3), SelfInfluence()])
@pytest.mark.parametrize("name", ["direct", "woodbury", "ekfac"])
def test_stores_are_the_same_on_every_device(device: str, name: str, reduce: Any, tmp_path: Path) -> None:
    case, (estimator, own) = case_of("convolution"), ESTIMATORS[name]
    written = {}
    for where in {"cpu", device}:
        made = estimator(case.model, case.loss, case.regularization, curvature="ggn", device=where, **own)
        test = None if isinstance(reduce, SelfInfluence) else case.test
        written[where] = made.fit(case.train).influences_to_zarr(
            tmp_path / f"run-{where}", test, case.train, reduce=reduce
        )
    for variable in written["cpu"].data_vars:
        ours, theirs = (torch.from_numpy(written[where][variable].values) for where in (device, "cpu"))
        if ours.is_floating_point():
            assert oracles.relative_error(ours.nan_to_num(), theirs.nan_to_num()) <= 1e-7, variable
        else:
            assert torch.equal(ours, theirs), variable


def test_a_fit_of_one_device_scores_on_another(device: str, tmp_path: Path) -> None:
    case = data.mlp_classification()
    fitted = ArnoldiInfluence(case.model, case.loss, case.regularization, rank=20, device=device)
    fitted.fit(case.train).save(tmp_path / "fit")
    model = copy.deepcopy(case.model).cpu()
    loaded = ArnoldiInfluence.load(tmp_path / "fit", model, case.loss, device="cpu")
    found = loaded.influences(*case.test, *case.train)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), found) <= 1e-9


def test_auto_takes_cuda_where_a_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert resolve_device("auto").type == ("cuda" if there else "cpu")
        assert resolve_device("cpu").type == "cpu"
    lacks = Options(device="cuda").lacking()
    assert lacks is not None
    assert "device='cuda' is not available in this process" in lacks
    with pytest.raises(ConfigurationError, match="not available"):
        Options(device="cuda").check()


@pytest.mark.parametrize("device", ["mps", "xpu", "hpu", "privateuseone", "cuda:99"])
def test_devices_that_are_not_there_are_refused_by_name(device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        device = "xpu"
    with pytest.raises(ConfigurationError, match=f"device='{device}' is not available"):
        DirectInfluence(nn.Linear(2, 1), nn.functional.mse_loss, 0.1, device=device)


def test_a_loss_with_tensors_follows_the_model_and_the_one_given_stays() -> None:
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0]))
    objective = Objective.of(nn.Linear(2, 1), loss)
    assert objective.loss is loss
    moved = objective.to("meta")
    assert {tensor.device.type for tensor in moved.loss.buffers()} == {"meta"}  # type: ignore[attr-defined]
    assert loss.pos_weight is not None
    assert loss.pos_weight.device.type == "cpu"
    assert loss_on(nn.functional.mse_loss, "meta") is nn.functional.mse_loss
