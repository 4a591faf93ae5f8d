# %% [markdown]
"""
# Planted label noise, found and mended

A tenth of the labels of scikit-learn's digits are changed at random before a small convolutional network is
trained on them. Two questions to its influence scores:

1. Which training images made it misread *this* test digit?
2. Which labels should a person look at first?

The influence of a training image *on itself* answers the second: it is large where the network had to bend
for that image alone, as it must for a wrong label. Nobody tells the scores which labels are wrong.

    python examples/label_noise.py [--output FOLDER]

[label_noise.ipynb](label_noise.ipynb) is the same as a notebook.
"""

# %%
import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import EkfacInfluence
from dask_influence.validation import Training, flip_labels, mislabel_detection

DECAY = 1e-3  # weight decay of the training, and λ of the influences
torch.set_num_threads(1)
parser = argparse.ArgumentParser(description="Planted label noise, found and mended")
parser.add_argument("--output", type=Path, default=Path("example-output"))
folder = parser.parse_known_args()[0].output  # a notebook's kernel has arguments of its own
folder.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## A network trained on labels of which a tenth are wrong

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
images = torch.from_numpy(digits.images[order] / 16).float()[:, None]
labels = torch.from_numpy(digits.target[order])
x_test, y_test, x, truth = images[:360], labels[:360], images[360:], labels[360:]
y, wrong = flip_labels(truth, 0.1, seed=0)


def network() -> nn.Module:
    """Two convolutions and a linear layer: 64 pixels, 10 digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


training = Training(
    network,
    cross_entropy,
    partial(torch.optim.Adam, lr=0.01),
    steps=400,
    batch_size=128,
    regularization=DECAY,
)


def accuracy(model: nn.Module) -> float:
    """Share of the test images that are read right."""
    with torch.no_grad():
        return float((model(x_test).argmax(1) == y_test).float().mean())


model = training(x, y, seed=0)
before = accuracy(model)
print(f"{len(wrong)} of {len(y)} labels are wrong; accuracy on {len(y_test)} test images: {before:.1%}")

# %% [markdown]
# ## What helped and harmed a misread digit
#
# A positive score helps: without that image the loss of the test digit would be higher. The images that harm
# most are those that say something else of the same shape, and most of them are wrong labels.

# %%
influence = EkfacInfluence(model, cross_entropy, hessian_regularization=DECAY).fit((x, y))
with torch.no_grad():
    losses = cross_entropy(model(x_test), y_test, reduction="none")
misread = int(losses.argmax())
scores = influence.influences(x_test[[misread]], y_test[[misread]], x, y)[0].numpy()
ranked = np.argsort(-scores)
helpful, harmful = ranked[:5], ranked[:-6:-1]
read = int(model(x_test[[misread]]).argmax())
share = np.isin(ranked[-20:], wrong).mean()
print(f"test digit {misread}, a {y_test[misread]}, is read as {read}")
print(f"of the 20 training images that harm it most, {share:.0%} have a wrong label")

# %% [markdown]
# ## Which labels to look at first
#
# The labels of the fifth of the images with most influence on themselves are looked at and, where they are
# wrong, mended. Loss and gradient norm find them nearly as well on data as easy as these.

# %%
detection = mislabel_detection(influence, (x, y), wrong)
print(detection)
suspects = np.argsort(-detection.ranked["self influence"])
looked = suspects[: len(y) // 5]
mended = y.clone()
mended[looked] = truth[looked]
again = training(x, mended, seed=0)
after = accuracy(again)
print(f"looking at {len(looked)} labels mends {np.isin(looked, wrong).sum()} of {len(wrong)}")
print(
    f"accuracy before {before:.1%}, after {after:.1%}, had no label been wrong {accuracy(training(x, truth, 0)):.1%}"
)
print(f"test digit {misread} is now read as {int(again(x_test[[misread]]).argmax())}")

# %% [markdown]
# ## The picture
#
# First row: the misread digit, what helps (blue) and what harms (red). Second row: the images with most
# influence on themselves; a red title is a wrong label. Below: how many wrong labels are found by looking.

# %%
figure = plt.figure(figsize=(10, 6.4), layout="constrained")
grid = figure.add_gridspec(3, 11, height_ratios=[1, 1, 2.4])
first = [(x_test[misread], f"a {y_test[misread]}, read {read}", "black")]
first += [(x[k], f"{y[k]}  {scores[k]:+.0f}", "tab:blue") for k in helpful]
first += [(x[k], f"{y[k]}  {scores[k]:+.0f}", "tab:red") for k in harmful]
second = [(x[k], f"a {y[k]}?", "tab:red" if k in wrong else "black") for k in suspects[:11]]
for row, shown in enumerate((first, second)):
    for column, (image, title, colour) in enumerate(shown):
        axes = figure.add_subplot(grid[row, column])
        axes.imshow(image[0], cmap="gray_r")
        axes.set_title(title, fontsize=8, color=colour)
        axes.set(xticks=[], yticks=[])
axes = figure.add_subplot(grid[2, :])
for name, values in detection.ranked.items():
    found = np.cumsum(np.isin(np.argsort(-values), wrong)) / len(wrong)
    axes.plot(np.arange(1, len(y) + 1) / len(y), found, label=f"{name} (AUC {detection.areas[name]:.3f})")
axes.axvline(len(looked) / len(y), color="0.6", linestyle=":")
axes.set(xlim=(0, 0.4), xlabel="share of the labels looked at", ylabel="share of the wrong ones found")
axes.legend(title="looked at in the order of", frameon=False)
figure.savefig(folder / "label_noise.png", dpi=110)
print(f"picture: {folder / 'label_noise.png'}")
