"""What job.yaml names: a model and its data, both made from a seed, so that the job runs on any cluster as it is.

Put your own in its place; what the factory makes has to be importable with what the image holds.
"""

from __future__ import annotations

import torch


def classifier() -> torch.nn.Module:
    """A perceptron of 20 features and 5 classes; weights of your own come from ``model.weights``."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 24), torch.nn.Tanh(), torch.nn.Linear(24, 5)).double()


def samples(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of five classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(5, (count,), generator=generator)
    centers = torch.randn(5, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return centers[y] + torch.randn(count, 20, generator=generator, dtype=torch.float64), y
