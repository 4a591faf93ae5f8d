"""pyDVL's side of the comparison, as its documentation would have it."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
import torch
import zarr
from problem import (
    PEER_FIT_CHUNK,
    PERTURBED_TEST,
    PERTURBED_TRAIN,
    REGULARIZATION,
    TEST_CHUNK,
    TRAIN_CHUNK,
    Problem,
)
from protocol import Measured, timed
from pydvl.influence import DaskInfluenceCalculator, InfluenceMode, SequentialInfluenceCalculator
from pydvl.influence.torch import DirectInfluence
from pydvl.influence.torch.util import NestedTorchCatAggregator, TorchNumpyConverter
from side import ClusterMeter, Side, serve
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def loader(pair: tuple[Tensor, Tensor], batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(*pair), batch_size=batch_size)


class PyDVL(Side):
    """Fitted once and kept; the calculators are made outside of the timed part."""

    packages = ("pyDVL", "dask", "zarr")

    def __init__(self, problem: Problem, folder: Path) -> None:
        super().__init__(problem, folder)
        self._calculator: DaskInfluenceCalculator | None = None
        self.model = self._fitted()

    def _fitted(self) -> DirectInfluence:
        unfitted = DirectInfluence(self.problem.model, self.problem.loss, REGULARIZATION)
        return unfitted.fit(loader(self.problem.train, PEER_FIT_CHUNK))

    def fit(self) -> Measured:
        seconds, _ = timed(self._fitted)
        return seconds, {}

    def scores(self) -> Measured:
        lazy = SequentialInfluenceCalculator(self.model).influences(
            loader(self.problem.test, TEST_CHUNK), loader(self.problem.train, TRAIN_CHUNK)
        )
        seconds, values = timed(lazy.compute, aggregator=NestedTorchCatAggregator())
        return seconds, {"values": values.numpy()}

    def cluster_scores(self) -> Measured:
        if self._calculator is None:
            converter = TorchNumpyConverter(device=torch.device("cpu"))
            self._calculator = DaskInfluenceCalculator(self.model, converter, self.client)
        x_test, y_test = (
            da.from_array(a.numpy(), chunks=(TEST_CHUNK, *a.shape[1:])) for a in self.problem.test
        )
        x, y = (da.from_array(a.numpy(), chunks=(TRAIN_CHUNK, *a.shape[1:])) for a in self.problem.train)
        store, meter = self.new_store(), ClusterMeter(self.client)
        seconds, _ = timed(lambda: self._calculator.influences(x_test, y_test, x, y).to_zarr(store))
        return seconds, {"values": zarr.open(store, mode="r")[:], **meter.read()}

    def perturbation(self) -> Measured:
        test = [a[:PERTURBED_TEST] for a in self.problem.test]
        train = [a[:PERTURBED_TRAIN] for a in self.problem.train]
        seconds, values = timed(self.model.influences, *test, *train, mode=InfluenceMode.Perturbation)
        return seconds, {"values": values.detach().numpy()}


if __name__ == "__main__":
    serve(PyDVL)
