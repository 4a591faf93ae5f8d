"""The shortest way in: a DataLoader, an exact Hessian, and both kinds of influence, without a cluster.

python examples/quickstart.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_wine
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from dask_influence import DirectInfluence, InfluenceMode


def main() -> None:
    """Score the training wines for a few test wines."""
    torch.manual_seed(0)
    wine = load_wine()
    order = torch.randperm(len(wine.target))
    x = torch.from_numpy((wine.data - wine.data.mean(0)) / wine.data.std(0)).float()[order]
    y = torch.from_numpy(wine.target)[order]
    x_test, y_test, x, y = x[:20], y[:20], x[20:], y[20:]

    # weight decay d in the optimiser is λ = d in the influence: λ = 0.01 here
    model, loss = nn.Linear(13, 3), cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    training_data_loader = DataLoader(
        TensorDataset(x, y), batch_size=48
    )  # 158 samples: the last batch is ragged
    infl = DirectInfluence(model, loss, hessian_regularization=0.01)
    infl = infl.fit(training_data_loader)

    scores = infl.influences(x_test, y_test, x, y)
    helps, harms = scores[0].argmax(), scores[0].argmin()
    print(f"{scores.shape[0]} × {scores.shape[1]} scores, one row for each test wine")
    print(f"test wine 0 (class {y_test[0]}):", end=" ")
    print(f"helped most by training wine {helps} (class {y[helps]}, {scores[0, helps]:+.2f}),", end=" ")
    print(f"harmed most by {harms} (class {y[harms]}, {scores[0, harms]:+.2f})")

    features = infl.influences(x_test, y_test, x, y, mode=InfluenceMode.Perturbation)
    strongest = features[0, harms].abs().argmax()
    print(
        f"{tuple(features.shape)} perturbation influences; in wine {harms} the feature that matters most",
        end=" ",
    )
    print(f"to test wine 0 is {wine.feature_names[strongest]} ({features[0, harms, strongest]:+.2f})")


if __name__ == "__main__":
    main()
