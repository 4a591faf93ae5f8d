"""The problem that both sides are measured on: a trained digits MLP, as plain arrays in one file.

The two environments hold different numpy and scikit-learn releases, so neither trains its own
model: weights and data are made once and read by both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SIZES = (64, 32, 10)
REGULARIZATION = 0.01
TEST_CHUNK, TRAIN_CHUNK = 60, 128
PEER_FIT_CHUNK = 500
"""The peer takes any batch size for its Hessian; with this one it is at its fastest here."""

PERTURBED_TEST, PERTURBED_TRAIN = 64, 512


def network() -> nn.Sequential:
    """64-32-10 with tanh: P = 2,410."""
    return nn.Sequential(nn.Linear(*SIZES[:2]), nn.Tanh(), nn.Linear(*SIZES[1:]))


def make(path: Path) -> None:
    """Train on 1,437 of scikit-learn's digits, hold 360 back, and write all of it to ``path``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1437]), y[:1437]).backward()
        optimizer.step()
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    np.savez(path, x=x.numpy(), y=y.numpy(), **weights)


class Problem:
    """The trained model, 360 test and 1,437 training samples, in one floating dtype."""

    def __init__(self, path: Path, dtype: str) -> None:
        with np.load(path) as held:
            arrays: dict[str, Any] = {name: held[name] for name in held.files}
        x, y = torch.from_numpy(arrays.pop("x")), torch.from_numpy(arrays.pop("y"))
        self.dtype = getattr(torch, dtype)
        x = x.to(self.dtype)
        self.train, self.test = (x[:1437], y[:1437]), (x[1437:], y[1437:])
        self.model = network()
        self.model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})
        self.model.to(self.dtype).eval()
        self.loss = nn.functional.cross_entropy
