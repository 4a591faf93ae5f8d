"""Small problems with known sizes: trained models, ragged data, one λ where curvature matters.

Sizes are primes or nearly so, and never divide each other, so that a mean taken over batches
instead of samples, or a transposed pair of axes, cannot go unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tests import oracles

Pair = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class Case:
    """A trained model with its loss, training and test data, and λ."""

    model: nn.Module
    loss: oracles.Loss
    train: Pair
    test: Pair
    regularization: float

    @cached_property
    def hessian(self) -> Tensor:
        """Dense Hessian of the mean training loss."""
        return oracles.hessian(self.model, self.loss, *self.train)

    def up(self, inverse: Tensor, test: Pair | None = None, train: Pair | None = None) -> Tensor:
        """Oracle scores under a dense inverse, shape (N, M)."""
        return oracles.up(self.model, self.loss, inverse, test or self.test, train or self.train)

    def perturbation(self, inverse: Tensor, test: Pair | None = None, train: Pair | None = None) -> Tensor:
        """Oracle perturbation influences under a dense inverse, shape (N, M, *features)."""
        return oracles.perturbation(self.model, self.loss, inverse, test or self.test, train or self.train)

    @cached_property
    def inverse(self) -> Tensor:
        """(H + λI)⁻¹."""
        return oracles.inverse(self.hessian, self.regularization)


def trained(
    model: nn.Module, loss: oracles.Loss, data: Pair, decay: float = 1e-3, steps: int = 200
) -> nn.Module:
    """Minimise mean loss + decay‖θ‖² with L-BFGS; the decay only keeps the minimiser finite."""
    model = model.double()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(oracles.call(model, data[0]), data[1])
        value = value + decay * sum((p**2).sum() for p in model.parameters() if p.requires_grad)
        value.backward()
        return value

    optimizer.step(closure)
    model.zero_grad(set_to_none=True)
    return model


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 numbers from a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(seed: int, n: int, k: int) -> Tensor:
    """Random labels 0…k−1."""
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


def seeded(build: Any) -> nn.Module:
    """A module built with torch's global generator seeded, and the generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return build()


@cache
def linear_regression() -> Case:
    """4 features, 2 outputs, P = 10; N = 19 > P; quadratic, so closed forms exist."""
    x = normal(1, 23, 4)
    y = x @ normal(2, 4, 2) + 0.3 * normal(3, 23, 2)
    train, test = (x, y), (normal(4, 19, 4), normal(5, 19, 2))
    model = trained(seeded(lambda: nn.Linear(4, 2)), nn.functional.mse_loss, train)
    return Case(model, nn.functional.mse_loss, train, test, 0.05)


@cache
def logistic_regression() -> Case:
    """5 features, 3 classes, P = 18; the Hessian is singular without λ."""
    train, test = (normal(11, 29, 5), classes(12, 29, 3)), (normal(13, 11, 5), classes(14, 11, 3))
    model = trained(seeded(lambda: nn.Linear(5, 3)), nn.functional.cross_entropy, train)
    return Case(model, nn.functional.cross_entropy, train, test, 0.01)


@cache
def mlp_regression() -> Case:
    """3-5-1 tanh, P = 26, N = 31 > P."""
    x = normal(21, 43, 3)
    train = (x, torch.sin(x.sum(1, keepdim=True)) + 0.1 * normal(22, 43, 1))
    test = (normal(23, 31, 3), normal(24, 31, 1))
    build = lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # noqa: E731
    return Case(
        trained(seeded(build), nn.functional.mse_loss, train), nn.functional.mse_loss, train, test, 0.05
    )


@cache
def mlp_classification() -> Case:
    """4-6-3 tanh, P = 51."""
    train, test = (normal(31, 37, 4), classes(32, 37, 3)), (normal(33, 13, 4), classes(34, 13, 3))
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    model = trained(seeded(build), nn.functional.cross_entropy, train, decay=1e-2)
    return Case(model, nn.functional.cross_entropy, train, test, 0.05)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, pixels in [0, 1], shuffled with seed 0."""
    from sklearn.datasets import load_digits  # here: each worker imports this file, and few need digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(bunch.data / 16.0)[order], torch.from_numpy(bunch.target).long()[order]


@cache
def digits_mlp() -> Case:
    """64-8-10 tanh on handwritten digits, P = 610; M = 401, N = 37."""
    x, y = digits()
    train, test = (x[:401], y[:401]), (x[1437:1474], y[1437:1474])
    build = lambda: nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))  # noqa: E731
    return Case(
        trained(seeded(build), nn.functional.cross_entropy, train),
        nn.functional.cross_entropy,
        train,
        test,
        0.02,
    )


SMALL = {f.__name__: f for f in (linear_regression, logistic_regression, mlp_regression, mlp_classification)}
ALL = SMALL | {"digits_mlp": digits_mlp}
