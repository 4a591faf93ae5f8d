"""Expansions of 1/(Λ + λ) in rank-one terms and entries, against the matrix itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dask_influence.core import expansion as module
from dask_influence.core.expansion import Expansion
from tests import data


def products(q: int, p: int, decades: float) -> Tensor:
    """λ_B λ_Aᵀ over so many decades each, ascending, as KFAC has it."""
    sides = (10 ** torch.linspace(-decades, 0, size, dtype=torch.float64) for size in (q, p))
    return torch.outer(*sides)


def corrected(q: int, p: int, decades: float, noise: float) -> Tensor:
    """The same as means of few samples scatter."""
    return products(q, p, decades) * (1 + noise * data.normal(501, q, p)).abs()


SPECTRA: dict[str, Callable[[], Tensor]] = {
    "products": lambda: products(60, 90, 3) + 1e-3,
    "far below λ": lambda: products(40, 120, 2) + 1e3,
    "corrected": lambda: corrected(60, 200, 2, 0.1) + 1e-2,
    "upright": lambda: corrected(70, 20, 2, 0.1) + 1e-2,
    "scattered": lambda: 10 ** (3 * data.normal(502, 30, 40)),
    "one row": lambda: products(1, 50, 3) + 1e-3,
    "one column": lambda: products(50, 1, 3) + 1e-3,
    "one entry": lambda: products(1, 1, 3) + 1e-3,
    "descending": lambda: products(60, 90, 3).flip(0, 1) + 1e-3,
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def dense(found: Expansion, shape: torch.Size) -> Tensor:
    """Ŵ, of which no two blocks, and no two entries, hold the same."""
    total, covered = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape)
    for block in found.blocks:
        total[block.rows, block.columns] = block.left.double().mT @ block.right.double()
        covered[block.rows, block.columns] += 1
    assert covered.max() <= 1
    entries = found.entries
    assert len(set(zip(entries.rows.tolist(), entries.columns.tolist(), strict=True))) == len(entries)
    total[entries.rows, entries.columns] += entries.values.double()
    return total


@DTYPES
@pytest.mark.parametrize("name", SPECTRA)
def test_the_bound_is_the_largest_relative_error(name: str, dtype: torch.dtype) -> None:
    spectrum = SPECTRA[name]()
    found = Expansion.of(spectrum, dtype)
    error = float((dense(found, spectrum.shape) * spectrum - 1).abs().max())
    assert error == pytest.approx(found.bound, rel=1e-3, abs=1e-13)
    assert error <= module.tolerated(*spectrum.shape, dtype)
    assert found.products <= module.entry_by_entry(*spectrum.shape)


def test_few_terms_where_there_is_structure_and_entries_where_there_is_none() -> None:
    wide, scattered = SPECTRA["far below λ"](), SPECTRA["scattered"]()
    found = Expansion.of(wide, torch.float32)
    assert found.terms <= 3
    assert len(found.entries) == 0
    found = Expansion.of(scattered, torch.float32)
    assert (found.terms, len(found.entries)) == (0, 30 * 40)
    assert found.bound <= torch.finfo(torch.float32).eps
    smooth = Expansion.of(products(200, 300, 3) + 1e-3, torch.float32)
    assert smooth.products < 0.2 * module.entry_by_entry(200, 300)


def test_what_scatters_is_in_entries() -> None:
    """Terms alone would be as many as a block has rows."""
    spectrum = corrected(150, 400, 3, 0.03) + 100
    found = Expansion.of(spectrum, torch.float32)
    assert 0 < len(found.entries) < 0.2 * spectrum.numel()
    assert found.terms <= 8
    assert found.products < 0.3 * module.entry_by_entry(150, 400)
    smooth = replace(found, entries=replace(found.entries, values=0 * found.entries.values))
    missed = float((dense(smooth, spectrum.shape) * spectrum - 1).abs().max())
    assert missed > module.tolerated(150, 400, torch.float32)


@DTYPES
def test_terms_do_not_cancel(dtype: torch.dtype) -> None:
    spectrum = products(80, 80, 4) + 1e-6
    for block in Expansion.of(spectrum, dtype).blocks:
        sizes = block.left.double().abs().mT @ block.right.double().abs()
        assert (sizes * spectrum[block.rows, block.columns]).max() <= module.CANCELLATION


class TestScores:
    spectrum = corrected(12, 31, 2, 1e-3) + 1e-2
    tests = data.normal(503, 9, 12), data.normal(504, 9, 31)
    trains = data.normal(505, 23, 12), data.normal(506, 23, 31)

    @staticmethod
    def gradients(side: tuple[Tensor, Tensor]) -> Tensor:
        return torch.einsum("nq,np->nqp", *side)

    def exact(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        return self.weighted(1 / self.spectrum, left, right)

    def weighted(self, weights: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        return (self.gradients(left) * weights).flatten(1) @ self.gradients(right).flatten(1).mT

    @pytest.mark.parametrize("block", [1, 50, 2**17])
    @pytest.mark.parametrize("tolerance", [None, 1e-2])
    def test_equal_those_of_the_matrix(
        self, block: int, tolerance: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "BLOCK", block)
        monkeypatch.setattr(module, "GATHERED", 40 * block)
        expansion = Expansion.of(self.spectrum, torch.float64, tolerance)
        assert len(expansion.entries) > 0
        assert (len(expansion.blocks) > 0) == (tolerance is not None)
        found = expansion.scores(self.tests, self.trains)
        expected = self.weighted(dense(expansion, self.spectrum.shape), self.tests, self.trains)
        assert (found - expected).norm() <= 1e-12 * expected.norm()

    def test_are_within_the_bound(self) -> None:
        """|ŝ_ij − s_ij| ≤ ε √(s_ii s_jj), and not by much where a sample is all in the worst entry."""
        found = Expansion.of(self.spectrum, torch.float64, tolerance=1e-2)
        assert 1e-4 < found.bound <= 1e-2
        error = (found.scores(self.tests, self.trains) - self.exact(self.tests, self.trains)).abs()
        own = [self.exact(side, side).diagonal() for side in (self.tests, self.trains)]
        allowed = found.bound * torch.outer(*own).sqrt()
        assert (error <= allowed).all()
        assert error.max() > 0
        relative = (dense(found, self.spectrum.shape) * self.spectrum - 1).abs()
        i, j = divmod(int(relative.argmax()), 31)
        worst = torch.eye(12, dtype=torch.float64)[i : i + 1], torch.eye(31, dtype=torch.float64)[j : j + 1]
        score, exact = found.scores(worst, worst), self.exact(worst, worst)
        assert float((score - exact).abs() / exact) == pytest.approx(found.bound, rel=1e-6)
