"""What the job file digits.yaml names: a model and its data. Run as a script, it trains and saves the weights.

python examples/digits_job.py && dask-influence run examples/digits.yaml
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy


def classifier() -> torch.nn.Module:
    """A linear model of 64 pixels and 10 digits."""
    return torch.nn.Linear(64, 10)


def split(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 360 images for ``"test"``, the others for ``"train"``."""
    data, labels = load_digits(return_X_y=True)
    chosen = slice(0, 360) if part == "test" else slice(360, None)
    return torch.tensor(data[chosen] / 16).float(), torch.tensor(labels[chosen])


def main() -> None:
    """Train, and save the weights beside this file."""
    x, y = split("train")
    model = classifier()
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    safetensors.torch.save_file(model.state_dict(), Path(__file__).with_name("digits.safetensors"))


if __name__ == "__main__":
    main()
