"""The Krylov decomposition: C Q = [Q F] M after anything that is done to it, and what follows from that."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dask_influence.core.estimators.arnoldi import Arnoldi, LowRankInverse
from dask_influence.core.estimators.base import System
from dask_influence.core.estimators.decomposition import Decomposition, _overlap
from dask_influence.core.moments import Moments
from tests import data

SIZE = 41
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-5}


def symmetric(seed: int = 5, size: int = SIZE) -> Tensor:
    """Eigenvalues of both signs, from 1 down to 1e-3."""
    vectors, _ = torch.linalg.qr(data.normal(seed, size, size))
    values = torch.logspace(0, -3, size, dtype=torch.float64)
    values[1::3] *= -1
    return (vectors * values) @ vectors.mT


def begun(dtype: torch.dtype = torch.float64, rows: int = SIZE, size: int = SIZE) -> Decomposition:
    return Decomposition(size, rows, dtype, torch.Generator().manual_seed(3))


def grow(basis: Decomposition, matrix: Tensor, count: int, passes: int = 1) -> None:
    for _ in range(passes):
        basis.advance(basis.next(count).to(torch.float64) @ matrix)


def check(basis: Decomposition, matrix: Tensor, dtype: torch.dtype = torch.float64) -> None:
    """The rows are orthonormal, and the decomposition is one of ``matrix``."""
    rows = basis._rows[: basis.multiplied + basis.pending].to(torch.float64)
    unit = torch.eye(len(rows), dtype=torch.float64)
    assert (rows @ rows.mT - unit).abs().max() <= TOLERANCES[dtype]
    images = rows[: basis.multiplied] @ matrix
    assert (basis.coefficients.mT @ rows - images).abs().max() <= TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("block", [1, 2, 3])
def test_it_stays_a_decomposition_whatever_is_done(block: int, dtype: torch.dtype) -> None:
    matrix, basis = symmetric(), begun(dtype)
    basis.add_random(block)
    grow(basis, matrix, block, 4)
    check(basis, matrix, dtype)
    basis.add_random(2)  # beside what is pending
    grow(basis, matrix, 1)
    basis.favour(basis.ritz().outside[:, -1:], 0.0)
    grow(basis, matrix, 2, 2)
    check(basis, matrix, dtype)
    before = basis.ritz()
    assert basis.favour(before.outside[:, :3], 1e-6) >= 1
    check(basis, matrix, dtype)
    assert basis.ritz().residuals == pytest.approx(before.residuals, rel=1e-3, abs=1e-6)
    basis.restart(before.rotation[:, :5])
    assert basis.multiplied == 5
    check(basis, matrix, dtype)
    assert basis.ritz().values == pytest.approx(before.values[:5], rel=1e-5)
    grow(basis, matrix, block, 3)
    check(basis, matrix, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("panel", [7, SIZE])
def test_it_grows_the_same_in_panels(panel: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With columns left beside the panels, and without."""
    monkeypatch.setattr("dask_influence.core.estimators.decomposition.PANEL", panel)
    matrix, basis = symmetric(), begun(dtype)
    basis.add_random(2)
    grow(basis, matrix, 2, 5)
    check(basis, matrix, dtype)


def test_rows_that_come_one_by_one_are_subtracted_from_in_twos(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read Q is what that costs: half as often as there are rows, and a row that waits is no worse for it."""
    matrix, basis, read = symmetric(size=200), begun(size=200), []

    def overlap(held: Tensor, rows: Tensor) -> Tensor:
        read.append(len(held))
        return _overlap(held, rows)

    monkeypatch.setattr("dask_influence.core.estimators.decomposition._overlap", overlap)
    basis.add_random(1)
    grow(basis, matrix, 1, 30)
    assert sum(held for held in read if held > 1) <= 0.55 * sum(range(1, 31))
    check(basis, matrix)
    grow(basis, matrix, 1)  # now one waits
    basis.restart(basis.ritz().rotation[:, -9:])
    grow(basis, matrix, 1, 2)
    check(basis, matrix)
    basis.add_random(2)
    check(basis, matrix)


def test_it_stays_a_decomposition_where_a_row_that_waits_has_much_inside() -> None:
    """As of products that are symmetric to a few digits only: what is taken from it later stands in M."""
    size = 120
    matrix, basis = symmetric(size=size) + 1e-4 * data.normal(7, size, size), begun(size=size)
    basis.add_random(1)
    for _ in range(6):
        grow(basis, matrix, 1)
        rows = basis._rows[: basis.multiplied + 1]
        assert 1e-6 < (rows[:-1] @ rows[-1]).abs().max() < 1e-1 or basis.multiplied == 1
        assert (basis.coefficients.mT @ rows - rows[:-1] @ matrix).abs().max() <= 1e-13
        grow(basis, matrix, 1)
        check(basis, matrix)
    grow(basis, matrix, 1)
    basis.add_random(1)
    check(basis, matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tail", [0.0, 1e-12, 1e-8, 1e-6])
def test_rows_that_are_mostly_rounding_do_not_wait(tail: float, dtype: torch.dtype) -> None:
    """What is left of the image of a row that C makes little of may lie inside Q, all of it."""
    vectors = torch.linalg.qr(data.normal(6, SIZE, SIZE))[0]
    values = tail * torch.linspace(1, 0.5, SIZE, dtype=torch.float64)
    values[:3] = torch.tensor([3.0, 2.0, 1.0])
    matrix, basis = (vectors * values) @ vectors.mT, begun(dtype)
    for _ in range(20):
        if basis.pending == 0:
            basis.add_random(1)
        grow(basis, matrix, 1)
        check(basis, matrix, dtype)
    assert basis.ritz().values[:3] == pytest.approx([3.0, 2.0, 1.0], rel=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_residuals_and_images_are_those_of_the_pairs(dtype: torch.dtype) -> None:
    matrix, basis = symmetric(), begun(dtype)
    basis.add_random(2)
    grow(basis, matrix, 2, 8)
    ritz = basis.ritz()
    vectors, values, images, residuals = basis.pairs(ritz.rotation[:, :6])
    truth = (vectors @ matrix - values[:, None] * vectors).norm(dim=1)
    assert truth.max() > 1e-3  # they are far from converged
    assert residuals == pytest.approx(truth, rel=1e-4, abs=1e-7)
    assert ritz.residuals[:6] == pytest.approx(truth, rel=1e-4, abs=1e-7)
    assert (images - vectors @ matrix).abs().max() <= TOLERANCES[dtype]
    assert (vectors @ vectors.mT - torch.eye(6, dtype=torch.float64)).abs().max() <= 1e-14


def test_rows_favoured_are_those_along_which_residuals_are_longest() -> None:
    matrix, basis = symmetric(), begun()
    basis.add_random(3)
    grow(basis, matrix, 3, 4)
    ritz = basis.ritz()
    one = ritz.outside[:, 2:3]
    assert basis.favour(one, 1e-9) == 1  # one residual is one direction
    turned = basis.ritz().outside[:, 2]
    assert float(turned[0].abs()) == pytest.approx(float(one.norm()))
    assert float(turned[1:].abs().max()) <= 1e-14


def test_a_space_that_is_exhausted_has_nothing_pending() -> None:
    """Two of four start rows are enough for a matrix of rank 2 with a block of 4, and nothing of rounding is kept."""
    left = torch.linalg.qr(data.normal(4, SIZE, 2))[0]
    matrix, basis = left @ torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) @ left.mT, begun()
    basis.add_random(4)
    grow(basis, matrix, 4)
    assert basis.pending == 2
    check(basis, matrix)
    grow(basis, matrix, 4)
    assert basis.pending == 0
    assert basis.multiplied == 6
    assert basis.ritz().values[:3] == pytest.approx([3.0, 1.0, 0.0], abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_ends_with_all_dimensions(dtype: torch.dtype) -> None:
    size = 7
    matrix, basis = symmetric(6, size), begun(dtype, size=size)
    basis.add_random(3)
    while basis.pending:
        grow(basis, matrix, 2)
    assert basis.multiplied == size
    basis.add_random(2)  # there is no room
    assert basis.pending == 0
    expected = torch.linalg.eigvalsh(matrix)
    assert basis.ritz().values.sort().values == pytest.approx(expected, abs=TOLERANCES[dtype])


def test_nearly_dependent_images_lose_nothing() -> None:
    """Of a block whose images differ in the seventh digit, in float32, by which inner products tell nothing."""
    matrix, basis = symmetric(), begun(torch.float32)
    basis.add_random(2)
    first = basis.next(2).to(torch.float64)
    images = first @ matrix
    images[1] = images[0] + 3e-5 * images[1]
    basis.advance(images)
    rows = basis._rows[: basis.multiplied + basis.pending].to(torch.float64)
    assert (rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)).abs().max() <= 1e-6
    assert (basis.coefficients.mT @ rows - images).abs().max() <= 1e-6


def test_memory_is_taken_where_more_rows_come() -> None:
    matrix, basis = symmetric(), begun(rows=4)
    basis.add_random(2)
    grow(basis, matrix, 2, 5)
    assert basis.multiplied + basis.pending == 12
    check(basis, matrix)


def test_panels_cover_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, basis = symmetric(), begun()
    basis.add_random(2)
    grow(basis, matrix, 2, 5)
    rotation = basis.ritz().rotation[:, :4]
    whole = basis.pairs(rotation)
    monkeypatch.setattr("dask_influence.core.estimators.decomposition.PANEL", 7)
    assert math.gcd(7, SIZE) == 1
    for got, expected in zip(basis.pairs(rotation), whole, strict=True):
        assert got.abs().numpy() == pytest.approx(expected.abs().numpy(), abs=1e-13)  # vectors of either sign
    basis.restart(rotation)
    check(basis, matrix)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_of_zero_nothing_is_pending(dtype: torch.dtype) -> None:
    matrix, basis = torch.zeros(SIZE, SIZE, dtype=torch.float64), begun(dtype)
    for _ in range(3):
        basis.add_random(2)
        grow(basis, matrix, 2)
        assert basis.pending == 0
    assert basis.multiplied == 6
    check(basis, matrix, dtype)
    assert not basis.ritz().values.any()


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_images_may_be_of_any_size(scale: float) -> None:
    """In float32, where their squares are zero or infinite."""
    matrix, basis = symmetric(), begun(torch.float32)
    basis.add_random(2)
    grow(basis, scale * matrix, 2, 6)
    rows = basis._rows[: basis.multiplied + basis.pending].to(torch.float64)
    assert (rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)).abs().max() <= 2e-5
    assert (basis.coefficients.mT / scale @ rows - rows[:12] @ matrix).abs().max() <= 2e-5


def test_random_rows_see_what_is_pending() -> None:
    """What is pending may be what is looked for: here an eigenvector that nothing in Q is coupled with."""
    basis = begun()
    basis.add_random(1)
    basis.advance(torch.zeros(1, SIZE, dtype=torch.float64))
    basis.add_random(3)
    pending = basis.next(3).clone()
    basis.add_random(2)
    assert (basis.next(2) @ pending.mT).norm(dim=0).min() > 0.1


# -- the fit --------------------------------------------------------------------------------------
def fitted(matrix: Tensor, rank: int, dtype: torch.dtype, **how: float) -> LowRankInverse:
    """What passes over nothing but ``matrix`` find, where they cost no more than their products."""
    system = System(("w",), ((len(matrix),),), 1e-3, "hessian", 1, dtype, pass_cost=0.0)
    rounds = Arnoldi(rank=rank, **how).fit(system)
    wanted = next(rounds)
    while True:
        products = wanted.operand["vectors"].to(torch.float64) @ matrix
        try:
            wanted = rounds.send(Moments({"products": products}, 1))
        except StopIteration as end:
            found: LowRankInverse = end.value
            return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_zero_has_as_many_eigenpairs_as_are_asked_for(dtype: torch.dtype) -> None:
    found = fitted(torch.zeros(SIZE, SIZE, dtype=torch.float64), 5, dtype, tol=1e-3)
    assert not found.values.any()
    assert not found.images.any()
    unit = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(found.vectors @ found.vectors.mT, unit, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "tol", "missed"),
    [(torch.float64, 1e-6, 0), (torch.float32, 1e-3, 2), (torch.float64, 1e-3, 4)],
    ids=str,
)
def test_every_copy_of_a_multiple_eigenvalue_is_found(dtype: torch.dtype, tol: float, missed: int) -> None:
    """As of a linear layer under squared error, with vectors one by one, each of which holds one copy of each.

    Loose pairs are found so soon that a start may hide one; without another look 15 of 100 starts do at 1e-3.
    """
    values = (1 / torch.arange(1, 101, dtype=torch.float64)).repeat_interleave(4)
    wrong = []
    for seed in range(40):
        found = fitted(values.diag(), 16, dtype, tol=tol, seed=seed)
        assert found.report["block_size"] == 1
        if found.values != pytest.approx(values[:16], abs=tol):
            wrong.append(seed)
    assert len(wrong) <= missed


@pytest.mark.parametrize(("tol", "least"), [(1e-6, 1e-6), (1e-9, 4 * torch.finfo(torch.float32).eps)])
def test_pairs_of_a_narrow_model_are_as_true_as_its_products(tol: float, least: float) -> None:
    """Asked for less than four roundoffs they have those; the true residual is that of the matrix itself."""
    values = (
        1 - torch.arange(600, dtype=torch.float64) / 600
    )  # pairs are found slowly, and so no truer than asked for
    for seed in range(3):
        found = fitted(values.diag(), 8, torch.float32, tol=tol, seed=seed, block_size=4)
        true = (found.vectors * values - found.values[:, None] * found.vectors).norm(dim=1)
        assert found.report["eigenpair_residual"] <= least
        assert true.max() <= 1.1 * least


@pytest.mark.parametrize("seed", range(6))
def test_copies_at_the_edge_of_the_rank_are_found(seed: int) -> None:
    """The last of three copies is taken for the next value, a twentieth smaller, unless it is looked for."""
    largest, rest = (
        torch.linspace(2.0, 1.1, 9, dtype=torch.float64),
        torch.arange(1, 289, dtype=torch.float64),
    )
    values = torch.cat([largest, torch.ones(3, dtype=torch.float64), 0.95 / rest**0.7])
    found = fitted(values.diag(), 12, torch.float64, seed=seed)
    assert found.report["block_size"] == 1
    assert found.values == pytest.approx(values[:12], abs=1e-5)
