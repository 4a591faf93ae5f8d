"""Dask arrays in, a lazy Dask array out: scores that never have to be in memory at once.

The digits stand in for training data on disk. They are written to Zarr, opened as Dask arrays, and scored
lazily; then only the three most helpful training images for each test image are kept.

    python examples/larger_than_memory.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import dask.array as da
import torch
import zarr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import ArnoldiInfluence


def write_data(path: Path) -> None:
    """Digits as a Zarr group with arrays ``x`` and ``y``, as data too large for memory would be kept."""
    digits = load_digits()
    group = zarr.open_group(path, mode="w")
    group.create_array("x", data=(digits.data / 16).astype("float32"), chunks=(200, 64))
    group.create_array("y", data=digits.target, chunks=(200,))


def train(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """Multinomial logistic regression."""
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def main(folder: Path) -> None:
    """Fit, score lazily, keep the best three."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    write_data(folder / "digits.zarr")
    x, y = da.from_zarr(folder / "digits.zarr", "x"), da.from_zarr(folder / "digits.zarr", "y")
    x_test, y_test, x_train, y_train = x[1437:], y[1437:], x[:1437], y[:1437]

    model = train(torch.from_numpy(x_train.compute()), torch.from_numpy(y_train.compute()))
    infl = ArnoldiInfluence(model, cross_entropy, hessian_regularization=0.01, rank=40, complement=True)
    infl = infl.fit((x_train, y_train))

    scores = infl.influences(x_test, y_test, x_train, y_train)
    print(f"lazy: {scores}")  # nothing has been computed
    best = da.argtopk(scores, 3, axis=1).compute()
    labels = y_train.compute()[best]
    print(
        f"the 3 training images that help most, for the first test images (which are {y_test[:4].compute()}):"
    )
    for row, classes in zip(best[:4], labels[:4], strict=True):
        print(f"  images {row}, which are {classes}")
    agree = (labels == y_test.compute()[:, None]).mean()
    print(f"{agree:.0%} of all helpful images have the label of their test image")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
