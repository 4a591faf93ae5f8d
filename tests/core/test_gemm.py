"""Products of matrices by either of torch's libraries, against products in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dask_influence.core import gemm
from dask_influence.core.precision import matmul_precision
from tests import data, oracles

CLOSE = 1e-6
"""Relative error of a product in float32."""

SHAPES = [(96, 200, 80), (80, 200, 96), (2, 700, 1000), (1000, 700, 2), (1, 1000, 1100), (1100, 1000, 1)]

LAYOUTS = ["rows", "columns", "gaps between rows", "gaps between columns"]


@pytest.fixture(params=[False, True], ids=["MKL", "oneDNN"])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Both libraries, whatever the processor; shapes that oneDNN was given."""
    seen = list[tuple[int, ...]]()
    original = gemm._times_transposed

    def times(left: Tensor, right: Tensor) -> Tensor:
        assert left.is_contiguous()
        assert right.is_contiguous() or right.mT.is_contiguous()
        seen.append((*left.shape, len(right)))
        return original(left, right)

    monkeypatch.setattr(gemm, "_times_transposed", times)
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: request.param)
    yield seen
    assert request.param or not seen


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same matrix, otherwise in memory."""
    if layout.endswith("columns"):
        return laid_out(values.mT, layout.replace("columns", "rows")).mT
    return (
        torch.cat([values, values], dim=1)[:, : values.shape[1]] if "gaps" in layout else values.contiguous()
    )


@pytest.mark.parametrize("right_layout", LAYOUTS)
@pytest.mark.parametrize("left_layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_any_layout(
    shape: tuple[int, int, int], left_layout: str, right_layout: str, taken: list[tuple[int, ...]]
) -> None:
    rows, inner, columns = shape
    left, right = data.normal(1, rows, inner), data.normal(2, inner, columns)
    expected = left @ right
    narrow = laid_out(left.float(), left_layout), laid_out(right.float(), right_layout)
    out = torch.full((columns, rows), torch.nan).mT
    into = torch.ones(rows, columns)
    assert gemm.product(*narrow).is_contiguous()
    for found in (gemm.product(*narrow), gemm.product(*narrow, out=out)):
        assert found.shape == expected.shape
        assert oracles.relative_error(found.double(), expected) <= CLOSE
    assert found is out
    assert gemm.add_product(into, *narrow, alpha=-2) is into
    assert oracles.relative_error(into.double(), 1 - 2 * expected) <= CLOSE


@pytest.mark.parametrize("gaps", [False, True])
def test_stacks_of_matrices(gaps: bool, taken: list[tuple[int, ...]]) -> None:
    """As parts of directions are: each in order, with other parts between them."""
    held, right = data.normal(1, 3, 120, 200), data.normal(2, 200, 150)
    left = torch.cat([held, held], dim=1).float()[:, :120] if gaps else held.float()
    for given, by in ((left, held), (left.mT, held.mT)):
        other = right if by is held else data.normal(3, 120, 150)
        assert oracles.relative_error(gemm.product(given, other.float()).double(), by @ other) <= CLOSE


@pytest.mark.parametrize("shape", [(3, 300, 200, 150), (2, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("shared", [0, 1], ids=["left shared", "right shared"])
def test_several_products_at_once(
    shared: int, shape: tuple[int, ...], taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one matrix with each of a stack, into memory with gaps; large ones one by one where oneDNN is faster."""
    monkeypatch.setattr(gemm, "SINGLY", 2**20)
    count, rows, inner, columns = shape
    sides = [data.normal(1, count, rows, inner), data.normal(2, count, inner, columns)]
    sides[shared] = data.normal(3, *sides[shared].shape[1:])
    expected, into = sides[0] @ sides[1], torch.full((count, rows + 2, columns), torch.nan)[:, 1:-1]
    narrow = [side.float() for side in sides]
    assert gemm.products(*narrow, into) is into
    assert oracles.relative_error(into.double(), expected) <= CLOSE
    gemm.products(*narrow, into, add=True)
    assert oracles.relative_error(into.double(), 2 * expected) <= CLOSE
    large = rows * inner * columns >= gemm.SINGLY
    assert len(taken) == (2 * count if large and gemm.onednn_is_faster() else 0)


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 3, 2, 1), (2, 0, 1, 3)], ids=str)
def test_stacks_of_more_axes(order: tuple[int, ...], taken: list[tuple[int, ...]]) -> None:
    """As of images whose channels a linear layer takes."""
    held = data.normal(1, 3, 64, 24, 24).permute(order)
    right = data.normal(2, held.shape[-1], 256)
    found = gemm.product(held.float(), right.float())
    assert found.is_contiguous()
    assert oracles.relative_error(found.double(), held @ right) <= CLOSE


def test_large_shallow_products_go_straight_to_the_memory_they_are_given(
    taken: list[tuple[int, ...]],
) -> None:
    left, right = data.normal(1, 800, 20).float(), data.normal(2, 20, 900).float()
    gemm.product(left, right, out=torch.empty(800, 900))
    gemm.add_product(torch.zeros(800, 900), left, right)
    assert not taken
    assert gemm.product(left.mT.contiguous().mT, right).is_contiguous()


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer(bias: bool, taken: list[tuple[int, ...]]) -> None:
    layer, inputs = nn.Linear(200, 120, bias=bias), data.normal(1, 7, 13, 200).float()
    with torch.no_grad():
        found = gemm.linear(inputs, layer.weight, layer.bias)
        torch.testing.assert_close(found, layer(inputs))


@pytest.mark.parametrize("taken", [True], indirect=True)
def test_what_onednn_is_given(taken: list[tuple[int, ...]]) -> None:
    """Large products of float32 on a CPU, and of what is not in order the smaller side to be copied."""
    wide, narrow = torch.ones(300, 200), torch.ones(200, 100)
    gemm.product(wide, narrow)
    gemm.product(wide.mT.contiguous().mT, narrow)  # the other side is copied
    assert taken == [(300, 200, 100), (100, 200, 300)]
    taken.clear()
    gemm.product(wide.double(), narrow.double())
    gemm.product(wide.bfloat16(), narrow.bfloat16())
    gemm.product(wide, narrow[:, :1])
    gemm.product(wide[:8, :8], narrow[:8, :8])
    gemm.product(wide.to("meta"), narrow.to("meta"))
    gemm.product(
        torch.ones(gemm.FEW - 1, 400), torch.ones(400, 200)[:, :100]
    )  # more to be put in order than gained
    assert not taken


def test_a_library_that_is_not_there_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(gemm, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(gemm, "_times_transposed", missing)
    assert not gemm.onednn_is_faster.__wrapped__()


def test_what_the_caller_has_set_does_not_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once in a process, wherever that is."""
    monkeypatch.setattr(gemm, "_vendor", lambda: "AuthenticAMD")
    expected = gemm.onednn_is_faster.__wrapped__()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
            assert gemm.onednn_is_faster.__wrapped__() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_library_that_multiplies_wrongly_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(gemm, "_times_transposed", lambda left, right: 1.01 * (left @ right.mT))
    assert not gemm.onednn_is_faster.__wrapped__()


def test_processors_of_intel_keep_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "_vendor", lambda: "GenuineIntel")
    assert not gemm.onednn_is_faster.__wrapped__()


def test_stacks_of_rounded_products_copy_nothing_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each large one is a product of matrices of its own; small ones and full ones stay together."""
    seen = list[tuple[int, ...]]()
    multiply = torch.matmul

    def matmul(left: Tensor, right: Tensor, **how: Tensor) -> Tensor:
        seen.append(tuple(left.shape))
        return multiply(left, right, **how)

    monkeypatch.setattr(torch, "matmul", matmul)
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: False)
    stack = data.normal(1, 5, 20_007).float()[:, :20_000].unflatten(1, (200, 100))
    right = data.normal(2, 100, 80)
    expected, into = stack.double() @ right, torch.ones(5, 200, 80)
    for precision, shapes in (("medium", [(200, 100)] * 5), ("highest", [(5, 200, 100)])):
        seen.clear()
        with matmul_precision(precision):
            assert oracles.relative_error(gemm.product(stack, right.float()), expected) <= 2**-7
            assert seen == shapes
            gemm.product(stack[:, :2], right.float())
            assert seen[len(shapes) :] == [(5, 2, 100)]
    seen.clear()
    with matmul_precision("medium"):
        assert oracles.relative_error(gemm.products(stack, right.float(), into), expected) <= 2**-7
        gemm.products(stack, right.float(), into, add=True)
    assert oracles.relative_error(into, 2 * expected) <= 2**-7
    assert seen == [(200, 100)] * 5
