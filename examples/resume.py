"""A run that was killed continues where it stopped: call it again.

The first run is interrupted after a few strips of scores; the second finds them in the store's ledger and
does the rest. A third run, at another λ, is refused, because the store holds something else.

    python examples/resume.py [STORE]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence
from dask_influence.errors import StoreMismatchError


def fitted() -> tuple[DirectInfluence, tuple, tuple]:
    """A model with its test and training data."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    test, training = (x[1437:], y[1437:]), (x[:1437], y[:1437])
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(training[0]), training[1]).backward()
        optimizer.step()
    return DirectInfluence(model, cross_entropy, 0.01).fit(training), test, training


def main(store: Path) -> None:
    """Interrupt, continue, be refused."""
    infl, test, training = fitted()

    def power_cut(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done == 3:
            raise KeyboardInterrupt

    def tell(stage: str, done: int, total: int) -> None:
        print(f"  {stage:<8} {done} of {total} done")

    # so little work would be two strips: smaller tiles make more
    cut = {"tile_bytes": 2**18}
    try:
        infl.influences_to_zarr(store, test, training, progress=power_cut, **cut)
    except KeyboardInterrupt:
        print("interrupted after 3 strips; calling it again:")
    scores = infl.influences_to_zarr(store, test, training, progress=tell, **cut)
    missing = int(scores["influence"].isnull().sum())
    print(f"state: {scores.attrs['state']}, {scores['influence'].shape} scores, {missing} missing")

    try:
        infl.with_regularization(0.1).influences_to_zarr(store, test, training)
    except StoreMismatchError as error:
        print(f"another λ is refused: {error}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch) / "scores.zarr")
