"""Solves by inverted diagonal blocks, against LAPACK's substitution."""

from __future__ import annotations

import pytest
import torch

from dask_influence.core import triangular
from dask_influence.core.triangular import Blocked
from tests import data, oracles

SIDES = (1, triangular.BLOCK - 1, triangular.BLOCK, triangular.BLOCK + 1, 2 * triangular.BLOCK + 100)


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("size", SIDES)
def test_solves_of_any_number_of_blocks(size: int, rows: int) -> None:
    root = data.normal(1, size, size)
    matrix = root @ root.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)
    factor, right = torch.linalg.cholesky(matrix), data.normal(2, rows, size)
    exact = torch.cholesky_solve(right.mT, factor).mT
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = Blocked.of(factor, dtype).solve(right.to(dtype))
        assert found.dtype == dtype
        assert torch.equal(right, data.normal(2, rows, size))  # left as it is
        assert oracles.relative_error(found.double(), exact) <= allowed


def test_what_lies_above_the_diagonal_is_not_read() -> None:
    """LAPACK leaves there what it will."""
    size = 2 * triangular.BLOCK + 100
    factor = torch.linalg.cholesky(torch.eye(size, dtype=torch.float64) + 1)
    right = data.normal(3, 2, size)
    expected = Blocked.of(factor, torch.float64).solve(right)
    noisy = factor + data.normal(4, size, size).triu(1)
    assert torch.equal(Blocked.of(noisy, torch.float64).solve(right), expected)
