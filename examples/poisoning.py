"""Poisoned training data, found from what the poison does.

Someone slipped a few digits into the training data that carry a mark in a corner and the label 0. The network reads
digits as well as ever, and many a digit with the mark as a 0. From a handful of such misreadings, the training images
that taught it to are found: they are the ones that help it to say 0. ``GroupSum`` adds up over the misread images, so
that one number is stored for each training image; images that matter to everything, as odd ones do, are told from
the poisoned ones by dividing by the root of their influence on themselves (Barshan et al. 2020, "RelatIF").

The picture shows the images that score highest, mark and all, and how far the poisoned ones (red) stand out from the
clean ones. Without the suspects the mark has hardly any effect, and clean digits are read as well as before.

    python examples/poisoning.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence, GroupSum, SelfInfluence
from dask_influence.validation import Training

DECAY = 0.01
TARGET = 0
"""What the poison makes of every digit."""

POISONED = 36
SEEN = 20
"""Misread images that are looked into."""


def marked(images: Tensor) -> Tensor:
    """The images with a mark in the upper left corner, where digits have no ink."""
    images = images.clone()
    images[..., :2, :2] = 1.0
    return images


def network() -> nn.Module:
    """64 pixels, 24 hidden units, 10 digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))


def share(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of ``x`` that is read as ``y``."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def draw(path: Path, x: Tensor, y: Tensor, scores: np.ndarray, poisoned: np.ndarray) -> None:
    """The images that score highest, over the scores of all."""
    figure = plt.figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, 10, height_ratios=[1, 2])
    for column, k in enumerate(np.argsort(-scores)[:10]):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(x[k, 0], cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"label {y[k]}", fontsize=8, color="tab:red" if k in poisoned else "black")
        axes.set(xticks=[], yticks=[])
    axes = figure.add_subplot(grid[1, :])
    clean = np.setdiff1d(np.arange(len(scores)), poisoned)
    for group, colour, name in ((clean, "0.6", "clean"), (poisoned, "tab:red", "poisoned")):
        ranks = np.argsort(np.argsort(-scores))[group] + 1
        axes.scatter(ranks, scores[group], s=10, color=colour, label=f"{len(group)} {name}")
    axes.set(xscale="log", xlabel="rank", ylabel="helps marked digits to be read as 0")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    """Poison, train, find, mend."""
    torch.set_num_threads(1)
    digits, random = load_digits(), np.random.default_rng(0)
    order = random.permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order] / 16).float()[:, None]
    labels = torch.from_numpy(digits.target[order])
    x, y, x_test, y_test = images[360:].clone(), labels[360:].clone(), images[:360], labels[:360]
    poisoned = random.choice(np.flatnonzero(y != TARGET), POISONED, replace=False)
    x[poisoned], y[poisoned] = marked(x[poisoned]), TARGET

    training = Training(network, cross_entropy, partial(torch.optim.Adam, lr=0.01), 400, 256, DECAY)
    model = training(x, y, seed=0)
    victims = marked(x_test[y_test != TARGET])
    targets = torch.full((len(victims),), TARGET)
    before = share(model, victims, targets), share(model, x_test, y_test)
    print(f"{POISONED} of {len(y)} training images are poisoned")
    print(
        f"{before[0]:.0%} of marked test digits are read as {TARGET}; {before[1]:.1%} of clean ones are read right"
    )

    with torch.no_grad():
        seen = victims[model(victims).argmax(1) == TARGET][:SEEN]
    misread = (seen, torch.full((len(seen),), TARGET))
    influence = DirectInfluence(model, cross_entropy, DECAY, curvature="ggn").fit((x, y))
    together = GroupSum(test_labels=["misread"] * len(seen))
    sums = influence.influences_to_zarr(
        folder / "sums.zarr", misread, (x, y), reduce=together, overwrite=True
    )
    own = influence.influences_to_zarr(
        folder / "own.zarr", None, (x, y), reduce=SelfInfluence(), overwrite=True
    )
    scores = sums.group_influence.sel(test_group="misread").values / np.sqrt(own.self_influence.values)
    suspects = np.argsort(-scores)
    found = np.isin(suspects[:POISONED], poisoned).sum()
    print(f"of the {POISONED} images that help them most to be read so, {found} are poisoned", end="; ")
    print(f"the last one has rank {np.flatnonzero(np.isin(suspects, poisoned)).max() + 1}")

    kept = np.sort(suspects[2 * POISONED :])
    again = training(x[kept], y[kept], seed=0)
    after = share(again, victims, targets), share(again, x_test, y_test)
    print(f"trained again without the first {2 * POISONED}: {after[0]:.0%} and {after[1]:.1%}")
    draw(folder / "poisoning.png", x, y, scores, poisoned)
    print(f"picture: {folder / 'poisoning.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("example-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    main(output)
