"""Training data larger than the memory of the worker that scores them, as dask arrays.

A worker process may hold less than the data take. The data are a dask array that nobody ever holds:
each block of images is made where it is needed, as it would be read from disk or from an object store. The
scores are a lazy dask array too; what is computed of them is the three training images that help each test
image most.

The picture shows the memory of the worker while this goes on: it stays below the limit, and far below the data.

    python examples/larger_than_memory.py [--images 24000] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import logging
from functools import cache, partial
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import torch
from dask.utils import format_bytes
from distributed import Client, LocalCluster
from distributed.diagnostics import MemorySampler
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence
from dask_influence.validation import Training

ZOOM = 16
"""Side of a digit's pixel: images of 128 × 128, 64 KiB each."""

LIMIT = 2**30 * 9 // 8
"""Bytes of the worker, of which Python, torch and dask take half."""


@cache
def digits() -> Bunch:
    """Scikit-learn's 1,797 digits, read once by each process."""
    return load_digits()


def images(numbers: np.ndarray) -> np.ndarray:
    """Images (n, 1, 128, 128) of these numbers: digits under light that differs from one to the next."""
    light = 0.5 + (0.618 * numbers[:, None, None]) % 1
    pixels = digits().images[numbers % 1797] / 16 * light
    return pixels.astype("float32").repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)[:, None]


def labels(numbers: np.ndarray) -> np.ndarray:
    """The digits that they show."""
    return digits().target[numbers % 1797]


def lazily(count: int) -> tuple[da.Array, da.Array]:
    """All images and labels, in blocks of 16 MiB that are made when they are asked for."""
    numbers = da.arange(count, chunks=256)
    side = 8 * ZOOM
    x = numbers.map_blocks(
        images, dtype="float32", new_axis=[1, 2, 3], chunks=(numbers.chunks[0], (1,), (side,), (side,))
    )
    return x, numbers.map_blocks(labels, dtype="int64")


def network() -> nn.Module:
    """64 means over squares of 16 × 16 pixels, 10 digits."""
    return nn.Sequential(nn.AvgPool2d(ZOOM), nn.Flatten(), nn.Linear(64, 10))


def score(client: Client, x: da.Array, y: da.Array) -> np.ndarray:
    """Positions of the three training images that help each of 50 test images most."""
    few = tuple(torch.from_numpy(part[:512].compute()) for part in (x, y))
    optimizer = partial(torch.optim.Adam, lr=0.05)
    model = Training(network, cross_entropy, optimizer, steps=60, regularization=0.01)(*few, seed=0)
    influence = DirectInfluence(model, cross_entropy, hessian_regularization=0.01, client=client)
    influence.fit((x[50:], y[50:]))
    scores = influence.influences(x[:50], y[:50], x[50:], y[50:])
    print(f"lazy scores: {scores}")  # nothing of them has been computed
    return da.argtopk(scores, 3, axis=1).compute()


def draw(path: Path, memory: pd.Series, data: int) -> None:
    """Memory of the worker, over time, beside its limit and the data."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    seconds = (memory.index - memory.index[0]).total_seconds()
    axes.plot(seconds, memory / 2**30, label="worker")
    axes.axhline(LIMIT / 2**30, color="0.6", linestyle=":", label="its limit")
    axes.axhline(data / 2**30, color="tab:red", label="training data")
    axes.set(xlabel="seconds", ylabel="GiB", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(folder: Path, count: int) -> None:
    """Make the arrays, start a small worker, fit, score, show its memory."""
    torch.set_num_threads(1)
    x, y = lazily(count)
    print(f"{count:,} images, {format_bytes(x.nbytes)}; a worker of {format_bytes(LIMIT)}")
    sampler = MemorySampler()
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        memory_limit=LIMIT,
        dashboard_address=":0",
        silence_logs=logging.CRITICAL,  # that a worker uses most of what it may is no news here
    )
    with cluster, Client(cluster) as client, sampler.sample("process", interval=0.2):
        best = score(client, x, y)
    memory = sampler.to_pandas()["process"]
    print(f"the worker took {format_bytes(int(memory.max()))} at most")

    every = labels(np.arange(count))
    same = (every[50:][best] == every[:50, None]).mean()
    print(f"{same:.0%} of the images that help have the label of their test image")
    draw(folder / "larger_than_memory.png", memory, x.nbytes)
    print(f"picture: {folder / 'larger_than_memory.png'}")


if __name__ == "__main__":  # worker processes import this file: only the first one runs it
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=24_000)
    parser.add_argument("--output", type=Path, default=Path("example-output"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    main(arguments.output, arguments.images)
