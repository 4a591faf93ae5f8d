"""Tabular data, feature by feature: the measurements of training cases that speak for or against a test case.

Logistic regression on scikit-learn's breast cancer data. For the benign or malignant tumour that it misreads worst,
perturbation influence says how the loss of that tumour would change if one measurement of one training
tumour were different. Then it is made different, the model is trained again, and both numbers are compared.

The picture shows the measurements of the most helpful and of the most harmful training tumour (a bar to the right:
raising it would make the misread tumour look more like what it is), and the comparison: points on the diagonal.

    python examples/tabular.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence
from dask_influence.validation import Training

DECAY = 0.01
"""Of the training, and λ: H + λI is then the curvature of what was minimised."""

STEP = 0.1
"""Standard deviations by which a measurement is changed for the comparison."""

Data = tuple[Tensor, Tensor]


def tumours() -> tuple[Data, Data, list[str]]:
    """Standardised measurements and diagnoses, 455 to train on and 114 to test on."""
    data = load_breast_cancer()
    x, y = torch.from_numpy(data.data), torch.from_numpy(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x, y = ((x - x.mean(0)) / x.std(0))[order], y[order]
    return (x[114:], y[114:]), (x[:114], y[:114]), [str(name) for name in data.feature_names]


def classifier() -> nn.Module:
    """30 measurements, malignant or benign."""
    return nn.Linear(30, 2).double()


def loss_with(train: Data, case: Data, training: Training, point: int, feature: int) -> float:
    """Loss of ``case`` after training with one measurement of one training tumour a step larger."""
    x = train[0].clone()
    x[point, feature] += STEP
    with torch.no_grad():
        return float(cross_entropy(training(x, train[1], seed=0)(case[0]), case[1]))


def draw(
    path: Path, bars: dict[str, np.ndarray], names: list[str], said: np.ndarray, seen: np.ndarray
) -> None:
    """Measurements of two tumours as bars, and predicted against actual changes."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=[1.2, 1.2, 1])
    for axes, (title, values) in zip(panels, bars.items(), strict=False):
        strongest = np.argsort(np.abs(values))[-10:]
        colours = np.where(values[strongest] > 0, "tab:blue", "tab:red")
        axes.barh([names[k] for k in strongest], values[strongest], color=colours)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(title=title, xlabel="influence per standard deviation")
    panels[2].axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    panels[2].scatter(said, seen, s=16)
    panels[2].set(
        title="one measurement changed", xlabel="change of the loss, predicted", ylabel="trained again"
    )
    figure.savefig(path, dpi=110)


def main(folder: Path) -> None:
    """Train, find the worst misreading, explain it, and see whether the explanation holds."""
    torch.set_num_threads(1)
    train, test, names = tumours()
    optimizer = partial(torch.optim.LBFGS, max_iter=200, tolerance_grad=1e-11, line_search_fn="strong_wolfe")
    training = Training(classifier, cross_entropy, optimizer, steps=2, regularization=DECAY)
    model = training(*train, seed=0)
    with torch.no_grad():
        losses = cross_entropy(model(test[0]), test[1], reduction="none")
    worst = int(losses.argmax())
    case = (test[0][[worst]], test[1][[worst]])
    kinds = ("malignant", "benign")
    print(
        f"test tumour {worst} is {kinds[int(case[1])]}; the model gives that {float(torch.exp(-losses[worst])):.1%}"
    )

    influence = DirectInfluence(model, cross_entropy, hessian_regularization=DECAY).fit(train)
    scores = influence.influences(*case, *train)[0].numpy()
    features = influence.influences(*case, *train, mode="perturbation")[0].numpy()  # (455, 30)
    bars = {}
    for word, point in (("most helpful", scores.argmax()), ("most harmful", scores.argmin())):
        strongest = int(np.abs(features[point]).argmax())
        kind = kinds[int(train[1][point])]
        print(f"{word}: training tumour {point}, {kind}, score {scores[point]:+.1f};", end=" ")
        print(
            f"its {names[strongest]} matters most ({features[point, strongest]:+.1f} per standard deviation)"
        )
        bars[f"{word}: tumour {point}, {kind}"] = features[point]

    # a change of a training input by δ changes the test loss by −δ · influence / n, to first order
    pairs = [divmod(int(k), features.shape[1]) for k in np.argsort(-np.abs(features), axis=None)[:200:20]]
    said = np.array([-STEP * features[pair] / len(train[1]) for pair in pairs])
    seen = np.array([loss_with(train, case, training, *pair) for pair in pairs]) - float(losses[worst])
    print(
        f"{len(pairs)} measurements changed by {STEP} and trained again: predicted and actual changes of the loss"
    )
    print(f"correlate by {np.corrcoef(said, seen)[0, 1]:.4f}, slope {said @ seen / (said @ said):.3f}")
    draw(folder / "tabular.png", bars, names, said, seen)
    print(f"picture: {folder / 'tabular.png'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("example-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    main(output)
