"""Blocks: every estimator on the diagonal blocks, against dense algebra block by block."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from dask_influence import ArnoldiInfluence, CgInfluence, DirectInfluence, NystroemSketchInfluence
from dask_influence.core.estimators.blocks import blocks_of, regularization_by_block
from dask_influence.errors import (
    ConfigurationError,
    ConvergenceWarning,
    IndefiniteCurvatureWarning,
    SingularCurvatureError,
)
from tests import data, oracles

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
CROSSED = {"a": ["0.weight", "2.bias"], "b": ["0.bias", "2.weight"]}
BY_LAYER = {"0": 0.03, "2": 0.2}


@cache
def curvature(name: str = "hessian") -> Tensor:
    case = data.mlp_classification()
    return getattr(oracles, name)(case.model, case.loss, *case.train)


def labels(structure: Any) -> list[str]:
    """Block of each entry of θ, written out by hand."""
    owner = {
        "layer": dict(zip(NAMES, ("0", "0", "2", "2"), strict=True)),
        "parameter": dict(zip(NAMES, NAMES, strict=True)),
    }.get(str(structure), dict(zip(NAMES, "abba", strict=True)))
    held = data.mlp_classification().model.named_parameters()
    return [owner[name] for name, p in held for _ in range(p.numel())]


def blocked(dense: Tensor, structure: Any) -> Tensor:
    of = labels(structure)
    mask = torch.tensor([[a == b for b in of] for a in of])
    return torch.where(mask, dense, 0.0)


def inverse(dense: Tensor, structure: Any, regularization: Any) -> Tensor:
    of = labels(structure)
    damping = [regularization[block] if isinstance(regularization, dict) else regularization for block in of]
    return torch.linalg.inv(
        blocked(dense, structure) + torch.diag(torch.tensor(damping, dtype=torch.float64))
    )


def fitted(
    kind: Any = DirectInfluence, structure: Any = "layer", regularization: Any = 0.05, **how: Any
) -> Any:
    case = data.mlp_classification()
    model = kind(case.model, case.loss, regularization, block_structure=structure, **how)
    return model.fit(case.train)


def scores(model: Any, **how: Any) -> Tensor:
    case = data.mlp_classification()
    return model.influences(*case.test, *case.train, **how)


STRUCTURES = pytest.mark.parametrize(
    "structure", ["layer", "parameter", CROSSED], ids=["layer", "parameter", "given"]
)


# -- values -----------------------------------------------------------------------------------------
@STRUCTURES
@pytest.mark.parametrize("name", ["hessian", "ggn", "empirical_fisher"])
def test_direct(structure: Any, name: str) -> None:
    case = data.mlp_classification()
    expected = case.up(inverse(curvature(name), structure, 0.05))
    full = case.up(oracles.inverse(curvature(name), 0.05))
    assert oracles.relative_error(full, expected) > 0.05  # the blocks left out matter
    assert oracles.weight_of_curvature(expected, case.up(torch.eye(51, dtype=torch.float64) / 0.05)) > 0.5
    for size in (37, 10):
        model = fitted(structure=structure, curvature=name, chunk_size=size)
        assert oracles.relative_error(scores(model), expected) < 1e-9
    changed = scores(model, mode="perturbation")
    expected = case.perturbation(inverse(curvature(name), structure, 0.05))
    assert oracles.relative_error(changed, expected) < 1e-9


def test_a_regularization_for_each_block() -> None:
    case = data.mlp_classification()
    expected = case.up(inverse(curvature(), "layer", BY_LAYER))
    model = fitted(regularization=BY_LAYER)
    assert oracles.relative_error(scores(model), expected) < 1e-9
    assert oracles.relative_error(scores(fitted().with_regularization(BY_LAYER)), expected) < 1e-9
    same = model.with_regularization(0.05)
    assert oracles.relative_error(scores(same), scores(fitted())) < 1e-12
    assert model.hessian_regularization == BY_LAYER  # the first is as it was
    assert oracles.relative_error(scores(model), expected) < 1e-9


@pytest.mark.parametrize("complement", [False, True])
def test_arnoldi(complement: bool) -> None:
    """Rank 5 of the layer of 30 parameters and of that of 21."""
    case = data.mlp_classification()
    of, dense = labels("layer"), curvature()
    expected = torch.zeros_like(dense)
    for block, damping in BY_LAYER.items():
        own = torch.tensor([i for i, label in enumerate(of) if label == block])
        part = oracles.low_rank_inverse(dense[own][:, own], damping, 5, complement)
        expected[own[:, None], own] = part
    model = fitted(ArnoldiInfluence, regularization=BY_LAYER, rank=5, complement=complement, tol=1e-11)
    assert oracles.relative_error(scores(model), case.up(expected)) < 1e-9
    assert (model._fitted.inverse.directions is None) == complement


def test_a_block_smaller_than_the_rank_is_inverted_exactly() -> None:
    case = data.mlp_classification()
    model = fitted(ArnoldiInfluence, "parameter", rank=24, tol=1e-11)
    assert oracles.relative_error(scores(model), case.up(inverse(curvature(), "parameter", 0.05))) < 1e-8
    with pytest.raises(ConfigurationError, match=r"rank.*P − 1 = 50"):
        fitted(ArnoldiInfluence, "parameter", rank=51)


def test_cg_solves_all_blocks_in_the_same_passes() -> None:
    case = data.mlp_classification()
    model = fitted(CgInfluence, regularization=BY_LAYER, rtol=1e-11, curvature="ggn")
    expected = case.up(inverse(curvature("ggn"), "layer", BY_LAYER))
    assert oracles.relative_error(scores(model), expected) < 1e-8
    assert 0 < model.diagnostics["worst_residual"] < 1e-11
    assert model.diagnostics["worst_residual"] == max(
        own["worst_residual"] for own in model.diagnostics["blocks"].values()
    )


def test_nystroem_of_full_rank_is_exact() -> None:
    case = data.mlp_classification()
    model = fitted(NystroemSketchInfluence, rank=30, curvature="ggn")
    assert oracles.relative_error(scores(model), case.up(inverse(curvature("ggn"), "layer", 0.05))) < 1e-8


def test_one_pass_for_all_blocks() -> None:
    assert fitted(structure="parameter").diagnostics["passes"] == 1


# -- stores, certificates, saving -------------------------------------------------------------------
@pytest.mark.parametrize("kind", [DirectInfluence, ArnoldiInfluence, CgInfluence])
def test_factor_residual_is_of_the_block_system(kind: Any, tmp_path: Path) -> None:
    case = data.mlp_classification()
    own = {"rank": 5} if kind is ArnoldiInfluence else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = fitted(kind, regularization=BY_LAYER, curvature="ggn", **own)
        dataset = model.influences_to_zarr(tmp_path / "run", case.test, case.train)
        factors = model.influence_factors(*case.test)
    gradients = oracles.gradients(case.model, case.loss, *case.test)
    damping = torch.tensor([BY_LAYER[block] for block in labels("layer")], dtype=torch.float64)
    residual = factors @ blocked(curvature("ggn"), "layer") + factors * damping - gradients
    expected = residual.norm(dim=1) / gradients.norm(dim=1)
    stored = torch.as_tensor(dataset["factor_residual"].values)
    torch.testing.assert_close(stored, expected, rtol=1e-6, atol=1e-12)
    direct = oracles.relative_error(dataset["influence"].values, scores(model))
    assert direct < 1e-9


def test_save_and_load(tmp_path: Path) -> None:
    case = data.mlp_classification()
    for kind, own in ((DirectInfluence, {}), (ArnoldiInfluence, {"rank": 5})):
        model = fitted(kind, CROSSED, {"a": 0.03, "b": 0.2}, **own)
        model.save(tmp_path / kind.__name__)
        loaded = kind.load(tmp_path / kind.__name__, case.model, case.loss)
        assert loaded.block_structure == CROSSED
        assert oracles.relative_error(scores(loaded), scores(model)) < 1e-14
        again, expected = (m.with_regularization(0.07) for m in (loaded, model))
        assert oracles.relative_error(scores(again), scores(expected)) < 1e-14


def test_diagnostics_of_each_block() -> None:
    report = fitted().diagnostics
    dense, of = curvature(), labels("layer")
    for block, own in report["blocks"].items():
        index = torch.tensor([i for i, label in enumerate(of) if label == block])
        lowest = torch.linalg.eigvalsh(dense[index][:, index])[0].item()
        assert own["smallest_eigenvalue"] == pytest.approx(lowest, abs=1e-9)
    assert report["smallest_eigenvalue"] == min(b["smallest_eigenvalue"] for b in report["blocks"].values())


# -- names ------------------------------------------------------------------------------------------
def test_blocks_by_layer() -> None:
    model = nn.Sequential(
        weight_norm(nn.Linear(2, 3)), nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
    )
    names = [name for name, _ in model.named_parameters()]
    assert {block: len(held) for block, held in blocks_of("layer", names).items()} == {
        "0": 3,
        "1.0": 1,
        "1.1": 2,
    }
    assert list(blocks_of("layer", ["weight", "bias"])) == [""]
    assert list(blocks_of("parameter", names)) == names


@pytest.mark.parametrize(
    ("structure", "named"),
    [
        ({"a": ["0.weight", "1.*"], "b": ["*"]}, r"'1\.\*' of block 'a'.*2\.bias"),
        ({"a": ["0.*", "2.bias"], "b": ["2.*"]}, r"'2\.bias'.*'a' and 'b'"),
        ({"a": ["0.*"], "b": ["2.weight"]}, r"'2\.bias' in no block"),
        ({"a": ["*"], "b": []}, r"'b' is empty"),
        ({}, r"block_structure.*\{\}"),
        ("layers", r"'layers'"),
    ],
    ids=["unknown", "twice", "missing", "empty", "none", "word"],
)
def test_structures_that_are_refused(structure: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        blocks_of(structure, NAMES)


def test_structures_that_are_taken() -> None:
    assert blocks_of({"last": "2.*", "first": ["0.bias", "0.weight"]}, NAMES) == {
        "last": ("2.weight", "2.bias"),
        "first": ("0.weight", "0.bias"),
    }
    assert regularization_by_block({"a": 1, "b": 0.0}, ["b", "a"]) == {"b": 0.0, "a": 1.0}


@pytest.mark.parametrize(
    "value", [{"0": -0.1, "2": 0.1}, {"0": float("nan"), "2": 0.1}, {"0": "much", "2": 1.0}]
)
def test_regularizations_that_are_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="hessian_regularization"):
        fitted(regularization=value)


def test_a_mapping_needs_blocks() -> None:
    with pytest.raises(ConfigurationError, match="block_structure"):
        fitted(structure=None, regularization=BY_LAYER)
    with pytest.raises(ConfigurationError, match="'4'"):
        fitted().with_regularization({"0": 0.1, "2": 0.1, "4": 0.1})
    with pytest.raises(ConfigurationError, match="block_structure"):
        fitted(structure=None).with_regularization(BY_LAYER)


# -- blocks that cannot be inverted -----------------------------------------------------------------
def test_warnings_and_errors_name_the_block() -> None:
    x = torch.cat([data.normal(1, 23, 3), torch.zeros(23, 1, dtype=torch.float64)], 1)
    y = data.normal(2, 23, 1)
    model = data.seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))).double()
    loss = nn.functional.mse_loss
    singular = DirectInfluence(model, loss, {"0": 0.0, "2": 0.1}, block_structure="layer")
    with pytest.raises(SingularCurvatureError, match="block '0'"):
        singular.fit((x, y))
    dense = oracles.hessian(model, loss, x, y)[:15, :15]
    lowest = torch.linalg.eigvalsh(dense)[0].item()
    assert lowest < 0
    with pytest.warns(IndefiniteCurvatureWarning, match=rf"block '0': .*{-lowest:.4g}"):
        DirectInfluence(model, loss, {"0": -lowest / 2, "2": 0.1}, block_structure="layer").fit((x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DirectInfluence(model, loss, {"0": -2 * lowest, "2": 0.1}, block_structure="layer").fit((x, y))
