"""Residuals by probes bound those of the factors from above, and not by much; of small systems they are the norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dask_influence.core import probes
from dask_influence.core.estimators.base import without_rounds
from dask_influence.core.estimators.direct import DirectInverse
from dask_influence.core.probes import Probes
from tests import data

SHIFT = 0.3
LARGE = 4 * probes.SMALL


def system(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric matrix, gradients of which one is zero, and their factors."""
    root = data.normal(1, size, size) / size**0.5
    matrix, gradients = root @ root.mT, data.normal(2, 9, size)
    gradients[4] = 0.0
    factors = torch.linalg.solve(matrix + SHIFT * torch.eye(size, dtype=torch.float64), gradients.mT).mT
    return matrix, gradients, factors


def norms(matrix: Tensor, gradients: Tensor, factors: Tensor) -> Tensor:
    """‖(A + λI) s − g‖ / ‖g‖."""
    left = factors @ matrix + SHIFT * factors - gradients
    scale = gradients.norm(dim=1)
    return left.norm(dim=1) / torch.where(scale > 0, scale, 1.0)


@pytest.mark.parametrize("off", [1e-9, 1e-3, 1.0])
def test_of_small_systems_they_are_the_norms(off: float) -> None:
    matrix, gradients, factors = system(probes.SMALL)
    factors += off * data.normal(3, *factors.shape)
    found = Probes.of(matrix, SHIFT).residuals(gradients, factors)
    torch.testing.assert_close(found, norms(matrix, gradients, factors), rtol=1e-6, atol=0)


@pytest.mark.parametrize("off", [1e-9, 1e-3, 1.0])
def test_of_large_systems_they_are_bounds(off: float) -> None:
    matrix, gradients, factors = system(LARGE)
    factors += off * data.normal(3, *factors.shape)
    ratios = Probes.of(matrix, SHIFT).residuals(gradients, factors) / norms(matrix, gradients, factors)
    assert float(ratios.min()) >= 1.5
    assert float(ratios.max()) <= 6


@pytest.mark.parametrize("size", [probes.SMALL, LARGE], ids=["small", "large"])
def test_one_wrong_entry_shows(size: int) -> None:
    """In the row it is in, and in no other; where factors are exact, rounding is all that is left."""
    matrix, gradients, factors = system(size)
    sound = Probes.of(matrix, SHIFT).residuals(gradients, factors)
    assert float(sound.max()) <= 1e-12
    factors[2, size // 2] += 1e-6
    found = Probes.of(matrix, SHIFT).residuals(gradients, factors)
    assert float(found[2]) >= float(norms(matrix, gradients, factors)[2]) > 1e-9
    assert torch.equal(found[3:], sound[3:])


def residuals(inverse: DirectInverse, gradients: Tensor) -> Tensor:
    """What a solve says of its factors."""
    found: Tensor = without_rounds(inverse.solve(gradients)).residuals()
    return found


def test_probes_travel_with_the_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """What certifies elsewhere multiplies by no matrix of its own, and says the same; states of before have none."""
    matrix, gradients, _ = system(LARGE)
    inverse = DirectInverse(matrix, SHIFT, 1e-16)
    expected = residuals(inverse, gradients)
    tensors, values = inverse.state()
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith("probe")}
    assert torch.equal(residuals(DirectInverse.from_state(bare, values), gradients), expected)
    monkeypatch.setattr(Probes, "of", None)
    assert torch.equal(residuals(DirectInverse.from_state(tensors, values), gradients), expected)
