"""The geometry of layers: which parameters form which matrix, and what is in none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from dask_influence.core.layers import CALLS, GEOMETRY, Layout, layout_of
from dask_influence.core.objective import Objective
from tests import data


def layout(module: nn.Module, names: list[str] | None = None) -> Layout:
    return layout_of(Objective.of(module, functional.mse_loss, names))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 5), (1, 5, 3, 4)),
        (nn.Linear(3, 5, bias=False), (1, 5, 3, 3)),
        (nn.Conv1d(4, 6, 3, groups=2), (2, 3, 6, 7)),
        (nn.Conv2d(4, 6, (3, 2)), (1, 6, 24, 25)),
        (nn.Conv3d(2, 3, 2, bias=False), (1, 3, 16, 16)),
        (nn.Embedding(7, 4), (7, 4, 1, 1)),
        (nn.LayerNorm((2, 3)), (6, 1, 1, 2)),
        (nn.RMSNorm(6), (6, 1, 1, 1)),
        (nn.GroupNorm(2, 6), (6, 1, 1, 2)),
        (nn.BatchNorm2d(6), (6, 1, 1, 2)),
        (nn.InstanceNorm1d(6, affine=True), (6, 1, 1, 2)),
    ],
)
def test_matrices_of_each_kind(module: nn.Module, expected: tuple[int, int, int, int]) -> None:
    (layer,) = layout(module).layers
    assert (layer.groups, layer.rows, layer.columns, layer.width) == expected
    assert layer.size == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("how", [{}, {"kdim": 3, "vdim": 2}])
def test_attention_is_four_matrices(how: dict[str, int]) -> None:
    found = layout(nn.Sequential(nn.MultiheadAttention(4, 2, **how)))
    assert [part.path for part in found.layers] == ["0.q_proj", "0.k_proj", "0.v_proj", "0.out_proj"]
    assert [part.bias_start for part in found.layers] == [0, 4, 8, 0]
    assert not found.unsupported


def test_added_keys_of_attention_are_in_no_matrix() -> None:
    found = layout(nn.MultiheadAttention(4, 2, add_bias_kv=True))
    assert [name for name, _ in found.unsupported] == ["bias_k", "bias_v"]


def test_every_parameter_is_in_one_place() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.GRU(4, 2), nn.ConvTranspose1d(1, 1, 2))
    found = layout(model)
    held = [n for part in found.layers for n in (part.weight, part.bias) if n]
    assert sorted(held + [n for n, _ in found.unsupported]) == sorted(n for n, _ in model.named_parameters())
    assert dict(found.unsupported)["1.weight"] == "1 (PReLU)"
    assert held == ["0.weight", "0.bias"]


def test_restricted_to_some_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2))
    part = layout(model).restricted(["0.bias", "1.weight"])
    assert [(p.weight, p.bias, p.width) for p in part.layers] == [(None, "0.bias", 1)]
    assert part.unsupported == (("1.weight", "1 (PReLU)"),)
    assert layout(model, ["0.bias"]).layers == part.layers


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_patches_times_weights_are_the_convolution(padding: str | int, mode: str) -> None:
    x, weight = data.normal(1, 2, 3, 7, 6), data.normal(2, 4, 3, 2, 3)
    if mode == "circular":
        x = functional.pad(x, (1, 1, 1, 1), mode="circular")
    for dilation in (1, 2):
        args = (x, weight, None, 1, padding, dilation)
        a = CALLS[torch.conv2d].inputs(*args)
        b = CALLS[torch.conv2d].outputs(1, torch.conv2d(*args))
        assert torch.allclose(a[:, 0] @ weight.flatten(1).mT, b[:, 0])


def test_a_kind_of_module_has_its_geometry() -> None:
    assert nn.ConvTranspose2d not in GEOMETRY
    assert not isinstance(nn.ConvTranspose2d(1, 1, 1), tuple(GEOMETRY))
