"""The two problems on which all estimators are measured, as plain arrays: weights and data.

``digits`` is the trained digits MLP of :mod:`problem`. ``large`` is an MLP 3072-256-128-10 on 4,096
samples: digits tiled to 3,072 pixels, with noise so that no direction of the input is empty,
trained for a few steps. Runs in every environment.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import problem
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LARGE = (3072, 256, 128, 10)
LARGE_TRAIN, LARGE_TEST = 4096, 256
REGULARIZATIONS = {"digits": 0.01, "large": 0.05}
"""λ; both are above minus the smallest eigenvalue, so that every solver meets a definite system."""


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]


def make(folder: Path) -> None:
    """Write both problems to ``folder``."""
    problem.make(folder / "digits.npz")
    with np.load(folder / "digits.npz") as held:
        images, labels = held["x"], held["y"]
    random = np.random.default_rng(0)
    picked = random.integers(0, len(images), LARGE_TRAIN + LARGE_TEST)
    pixels = np.tile(images[picked], LARGE[0] // images.shape[1])
    x = torch.from_numpy((pixels + 0.3 * random.standard_normal(pixels.shape)).astype(np.float32))
    y = torch.from_numpy(labels[picked])
    torch.manual_seed(0)
    model = network(LARGE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(60):
        batch = torch.arange(step * 256, (step + 1) * 256) % LARGE_TRAIN
        optimizer.zero_grad()
        cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(folder / "large.npz", x=x.numpy(), y=y.numpy(), **weights)


class Setting:
    """Model, loss, data and λ of one problem, in one floating dtype."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        with np.load(folder / f"{name}.npz") as held:
            arrays: dict[str, Any] = {key: held[key] for key in held.files}
        x, y = torch.from_numpy(arrays.pop("x")), torch.from_numpy(arrays.pop("y"))
        self.dtype = getattr(torch, dtype)
        self.name, self.x, self.y = name, x.to(self.dtype), y
        self.samples = LARGE_TRAIN if name == "large" else 1437
        self.model = network(LARGE if name == "large" else problem.SIZES)
        self.model.load_state_dict({key: torch.from_numpy(value) for key, value in arrays.items()})
        self.model.to(self.dtype).eval()
        self.loss = cross_entropy
        self.regularization = REGULARIZATIONS[name]

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """1,437 or 4,096 samples."""
        return self.x[: self.samples], self.y[: self.samples]

    def test(self, count: int) -> tuple[Tensor, Tensor]:
        """The first ``count`` test samples."""
        held = slice(self.samples, self.samples + count)
        return self.x[held], self.y[held]


def residuals(setting: Setting, factors: np.ndarray) -> list[float]:
    """‖(H + λI) s − g‖ / ‖g‖ for the factors s of the first test samples, H in the setting's dtype by autograd."""
    model, loss = setting.model, setting.loss
    parameters = list(model.parameters())

    def flat(parts: Iterable[Tensor]) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])

    x, y = setting.train
    slope = flat(torch.autograd.grad(loss(model(x), y), parameters, create_graph=True))
    found = []
    for row, a, b in zip(
        torch.from_numpy(factors).to(setting.dtype), *setting.test(len(factors)), strict=True
    ):
        g = flat(torch.autograd.grad(loss(model(a[None]), b[None]), parameters))
        product = flat(torch.autograd.grad(slope, parameters, row, retain_graph=True))
        found.append(float((product + setting.regularization * row - g).norm() / g.norm()))
    return found


class Settings:
    """Problems that have been asked for, and the model fitted last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], Setting] = {}
        self.fitted: Any = None

    def of(self, request: dict[str, Any]) -> Setting:
        """The setting that a request names."""
        key = request["problem"], request["dtype"]
        if key not in self._made:
            self._made[key] = Setting(self._folder, *key)
        return self._made[key]
