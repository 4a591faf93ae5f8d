"""Float32's digits are solved in float32 where nothing is lost by it, and every row that would lose in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dask_influence.core import probes, triangular
from dask_influence.core.estimators import direct
from dask_influence.core.estimators.base import without_rounds
from dask_influence.core.estimators.direct import Direct, DirectInverse
from dask_influence.core.estimators.sweep import SweepInverse
from tests import data
from tests.core.estimators import dense

SIZE = 2 * probes.SMALL
SINGLE, DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
DAMPING = 1e-2
ROWS = direct.FEWEST_NARROW


def curvature(smallest: float) -> tuple[Tensor, Tensor]:
    """A matrix with eigenvalues from 1 down to ``smallest`` − λ, the least only once, and its eigenvectors as rows."""
    vectors = torch.linalg.qr(data.normal(1, SIZE, SIZE)).Q
    values = torch.linspace(1.0, 0.1, SIZE, dtype=torch.float64)
    values[-1] = smallest - DAMPING
    return vectors @ values.diag() @ vectors.mT, vectors.mT


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each solve in float64."""
    counted: list[int] = []
    original = DirectInverse._solve_rows

    def solve(self: DirectInverse, rows: Tensor) -> Tensor:
        counted.append(len(rows))
        return original(self, rows)

    monkeypatch.setattr(DirectInverse, "_solve_rows", solve)
    return counted


def exact(matrix: Tensor, rows: Tensor) -> Tensor:
    return torch.linalg.solve(matrix + DAMPING * torch.eye(SIZE, dtype=torch.float64), rows.mT).mT


def test_what_is_known_to_float32_is_solved_in_it(wide: list[int]) -> None:
    matrix, _ = curvature(1e-1)
    inverse, rows = DirectInverse(matrix, DAMPING, SINGLE), data.normal(2, ROWS, SIZE).float()
    solution = without_rounds(inverse.solve(rows))
    factors = solution.factors
    assert wide == []
    assert factors.dtype == torch.float32
    off = (factors.double() - exact(matrix, rows.double())).norm(dim=1) / factors.norm(dim=1)
    assert 1e-9 < float(off.max()) < 2e-6
    assert float(solution.residuals().max()) <= direct.NARROW_RESIDUAL
    again = without_rounds(inverse.solve(rows.double()))
    assert torch.equal(again.factors, factors.double())
    assert torch.equal(again.residuals(), solution.residuals())


def test_a_row_that_loses_more_is_solved_in_float64(wide: list[int]) -> None:
    """Along the one small eigenvalue, 10⁵ times smaller than the largest."""
    matrix, vectors = curvature(1e-5)
    rows = data.normal(2, ROWS, SIZE).float()
    rows -= (rows @ vectors[-1:].mT.float()) * vectors[-1:].float()
    rows[3] = vectors[-1].float()
    inverse = DirectInverse(matrix, DAMPING, SINGLE)
    solution = without_rounds(inverse.solve(rows))
    factors = solution.factors
    assert wide == [1]
    torch.testing.assert_close(factors[3], exact(matrix, rows[3:4].double())[0], rtol=1e-8, atol=1e-8)
    assert float(solution.residuals()[3]) <= 1e-9
    assert float(solution.residuals().max()) <= direct.NARROW_RESIDUAL


@pytest.mark.parametrize("why", ["digits", "size", "condition", "few"])
def test_float64_where_float32_would_not_do(wide: list[int], why: str) -> None:
    matrix, _ = curvature(1e-9 if why == "condition" else 1e-1)
    if why == "condition":
        matrix = matrix * 1e-3 + torch.ones(SIZE, SIZE, dtype=torch.float64)
    if why == "size":
        matrix = matrix[: probes.SMALL, : probes.SMALL]
    inverse = DirectInverse(matrix, DAMPING, DOUBLE if why == "digits" else SINGLE)
    rows = data.normal(2, ROWS - 1 if why == "few" else ROWS, len(matrix)).float()
    solution = without_rounds(inverse.solve(rows))
    assert wide == [len(rows)]
    assert float(solution.residuals().max()) <= 1e-8


def test_gradients_of_zero_have_factors_of_zero() -> None:
    matrix, _ = curvature(1e-1)
    inverse, rows = DirectInverse(matrix, DAMPING, SINGLE), torch.zeros(3, SIZE)
    solution = without_rounds(inverse.solve(rows))
    factors = solution.factors
    assert not factors.any()
    assert not solution.residuals().any()


def test_a_row_that_float32_cannot_hold_is_solved_in_float64(wide: list[int]) -> None:
    matrix, _ = curvature(1e-1)
    rows = data.normal(2, ROWS, SIZE)
    rows[3] *= 1e60
    inverse = DirectInverse(matrix, DAMPING, SINGLE)
    solution = without_rounds(inverse.solve(rows))
    assert wide == [1]
    torch.testing.assert_close(solution.factors[3], exact(matrix, rows)[3], rtol=1e-10, atol=0)
    assert float(solution.residuals().max()) <= direct.NARROW_RESIDUAL


def test_residuals_are_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that tell which rows float32 loses are the ones that certify."""
    matrix, _ = curvature(1e-1)
    inverse, rows = DirectInverse(matrix, DAMPING, SINGLE), data.normal(2, ROWS, SIZE).float()
    without_rounds(inverse.solve(rows))
    taken, original = list[int](), probes.Probes.residuals

    def residuals(self: probes.Probes, gradients: Tensor, factors: Tensor) -> Tensor:
        taken.append(len(factors))
        return original(self, gradients, factors)

    monkeypatch.setattr(probes.Probes, "residuals", residuals)
    solution = without_rounds(inverse.solve(rows))
    assert len(solution.residuals()) == ROWS
    assert taken == [ROWS]


def test_extreme_eigenvalues_take_no_longer_than_all_of_them(wide: list[int]) -> None:
    """Also where many come close to the smallest one, as of a network with inputs that are hardly ever on."""
    vectors = torch.linalg.qr(data.normal(1, SIZE, SIZE)).Q
    values = torch.linspace(0, 1, SIZE, dtype=torch.float64) ** 4
    found = DirectInverse(vectors @ values.diag() @ vectors.mT, DAMPING, DOUBLE).diagnostics()
    assert found["smallest_eigenvalue"] == pytest.approx(0.0, abs=1e-6)
    assert found["largest_eigenvalue"] == pytest.approx(1.0, rel=1e-6)
    assert sum(wide) < SIZE / 2


def test_a_process_prepares_float32_once_for_all_inverses_of_one_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each task opens its own, of tensors that the process holds."""
    matrix, _ = curvature(1e-1)
    tensors, values = DirectInverse(matrix, DAMPING, SINGLE).state()
    prepared, original = list[int](), triangular.Blocked.of

    def of(factor: Tensor, dtype: torch.dtype) -> triangular.Blocked:
        prepared.append(len(factor))
        return original(factor, dtype)

    monkeypatch.setattr(triangular.Blocked, "of", of)
    rows = data.normal(2, ROWS, SIZE).float()
    first, second = (without_rounds(DirectInverse.from_state(tensors, values).solve(rows)) for _ in range(2))
    assert prepared == [SIZE]
    assert torch.equal(first.factors, second.factors)


def test_plans_know_what_a_process_holds_of_an_inverse() -> None:
    matrix, _ = curvature(1e-1)
    inverse = DirectInverse(matrix, DAMPING, SINGLE)
    narrow = inverse._narrow
    assert narrow is not None
    blocks = [step.matrix for step in narrow.forward]
    assert {step.matrix.data_ptr() for step in narrow.back} == {block.data_ptr() for block in blocks}
    held = sum(tensor.nbytes for tensor in (matrix, inverse._factor, *blocks))
    assert held <= Direct().inverse_bytes(dense.system(SIZE, DAMPING, torch.float32)) <= 1.1 * held


def test_a_sweep_tells_the_residuals_of_each_regularization() -> None:
    """Those of float32 solves differ from one to the next."""
    matrix, _ = curvature(1e-1)
    parts = [DirectInverse(matrix, value, SINGLE) for value in (DAMPING, 1.0)]
    rows = data.normal(2, ROWS, SIZE).float()
    each = [without_rounds(part.solve(rows)) for part in parts]
    swept = without_rounds(SweepInverse(parts, ["weight"]).solve(rows))
    for at, alone in enumerate(each):
        assert torch.equal(swept.factors[at :: len(parts)], alone.factors)
        assert torch.equal(swept.residuals()[at :: len(parts)], alone.residuals())
    assert not torch.equal(each[0].residuals(), each[1].residuals())
