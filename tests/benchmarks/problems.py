"""The two problems on which everything is measured, as plain arrays: weights and data.

``digits`` is an MLP 64-32-10 (P = 2,410) trained on 1,437 of scikit-learn's digits, 360 held back.
``large`` is an MLP 3072-256-128-10 (P = 820,874) on 4,096 samples: digits tiled to 3,072 pixels, with
noise so that no direction of the input is empty, trained for a few steps. The environments hold
different numpy and scikit-learn releases, so none trains its own model: weights and data are made once
and read by all. With ``BENCH_SMALL=1`` in the environment ``large`` is small, to see in a minute that everything runs.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SMALL = os.environ.get("BENCH_SMALL") == "1"
SIZES = {"digits": (64, 32, 10), "large": (192, 24, 16, 10) if SMALL else (3072, 256, 128, 10)}
TRAIN = {"digits": 1437, "large": 1024 if SMALL else 4096}
TESTS = {"digits": 360, "large": 512 if SMALL else 2048}
REGULARIZATIONS = {"digits": 0.01, "large": 0.05}
"""λ; both are above minus the smallest eigenvalue, so that every solver meets a definite system."""


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]


def make(folder: Path) -> None:
    """Write both problems to ``folder``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    _train_and_write(folder, "digits", images, labels, [slice(0, 1437)] * 300, lr=1e-2, weight_decay=1e-3)
    random = np.random.default_rng(0)
    picked = random.integers(0, len(images), TRAIN["large"] + TESTS["large"])
    pixels = np.tile(images[picked], SIZES["large"][0] // images.shape[1])
    pixels = (pixels + 0.3 * random.standard_normal(pixels.shape)).astype(np.float32)
    batches = [slice(start, start + 256) for _ in range(4) for start in range(0, TRAIN["large"], 256)]
    _train_and_write(folder, "large", pixels, labels[picked], batches[:60], lr=1e-3)


def _train_and_write(
    folder: Path, name: str, x: np.ndarray, y: np.ndarray, batches: list[slice], **adam: float
) -> None:
    torch.manual_seed(0)
    model = network(SIZES[name])
    optimizer = torch.optim.Adam(model.parameters(), **adam)
    inputs, classes = torch.from_numpy(x), torch.from_numpy(y)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs[batch]), classes[batch]).backward()
        optimizer.step()
    weights = {key: value.numpy() for key, value in model.state_dict().items()}
    np.savez(folder / f"{name}.npz", x=x, y=y, **weights)


class Setting:
    """Model, loss, data and λ of one problem, in one floating dtype."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        with np.load(folder / f"{name}.npz") as held:
            arrays: dict[str, Any] = {key: held[key] for key in held.files}
        x, y = torch.from_numpy(arrays.pop("x")), torch.from_numpy(arrays.pop("y"))
        self.dtype = getattr(torch, dtype)
        self.name, self.x, self.y = name, x.to(self.dtype), y
        self.samples = TRAIN[name]
        self.model = network(SIZES[name])
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
