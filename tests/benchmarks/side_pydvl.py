"""pyDVL's side of the comparisons, as its documentation would have it, at settings that serve it best.

It averages batch means without weights, so batches of a fit are all of one size where its products
depend on that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
import torch
import zarr
from distributed import Client
from metered import ClusterMeter, warm_cluster
from protocol import Measured, timed
from pydvl.influence import DaskInfluenceCalculator, InfluenceMode, SequentialInfluenceCalculator
from pydvl.influence import torch as pydvl
from pydvl.influence.torch.util import NestedTorchCatAggregator, TorchNumpyConverter
from side import Case, Side, serve
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

FIT_BATCH = {"digits": 1437, "large": 512}
DIRECT_FIT_BATCH = 500
"""It takes any batch size for its Hessian; with this one it is at its fastest here."""
SCORE_BATCH = 256


def loader(pair: tuple[Tensor, Tensor], batch_size: int) -> DataLoader:
    """In order."""
    return DataLoader(TensorDataset(*pair), batch_size=batch_size)


class PyDVL(Side):
    """Fitted once and kept; calculators are made outside of the timed part."""

    packages = ("pyDVL", "dask", "zarr")

    def __init__(self, *folders: Any) -> None:
        super().__init__(*folders)
        self._calculators: dict[str, DaskInfluenceCalculator] = {}

    @cached_property
    def client(self) -> Client:
        """Started at first use."""
        return warm_cluster()

    def fitting(self, case: Case) -> Callable[[], Any]:
        """From batches of one size."""
        setting, kind = case.setting, getattr(pydvl, case.estimator)
        batch = DIRECT_FIT_BATCH if case.estimator == "DirectInfluence" else FIT_BATCH[setting.name]
        data = loader(setting.train, batch)
        if case.estimator == "EkfacInfluence":
            options = {"hessian_regularization": setting.regularization, **case.options}
            return lambda: kind(setting.model, **options).fit(data)
        options = {"regularization": setting.regularization, **case.options}
        return lambda: kind(setting.model, setting.loss, **options).fit(data)

    def scores(self, case: Case, tests: int) -> Measured:
        """Factors of all test points in one call, once, times the training gradients of 256 samples at a time.

        Its calculators would solve the factors again for each chunk of training data.
        """

        def both() -> Tensor:
            factors = infl.influence_factors(*case.setting.test(tests))
            batches = loader(case.setting.train, SCORE_BATCH)
            return torch.cat([infl.influences_from_factors(factors, x, y) for x, y in batches], dim=1)

        infl = self.fitted(case)
        seconds, values = timed(both)
        return seconds, {"values": values.detach().numpy()}

    def scores_in_one_call(self, case: Case, tests: int) -> Measured:
        """Its model's own call, with everything in memory."""
        infl = self.fitted(case)
        seconds, values = timed(infl.influences, *case.setting.test(tests), *case.setting.train)
        return seconds, {"values": values.detach().numpy()}

    def chunked_scores(self, case: Case, tests: int, chunks: tuple[int, int]) -> Measured:
        """Its sequential calculator."""
        test, train = (case.setting.test(tests), case.setting.train)
        lazy = SequentialInfluenceCalculator(self.fitted(case)).influences(
            loader(test, chunks[0]), loader(train, chunks[1])
        )
        seconds, values = timed(lazy.compute, aggregator=NestedTorchCatAggregator())
        return seconds, {"values": values.detach().numpy()}

    def cluster_scores(self, case: Case, tests: int, chunks: tuple[int, int]) -> Measured:
        """Its Dask calculator, to Zarr."""
        if case.key not in self._calculators:
            converter = TorchNumpyConverter(device=torch.device("cpu"))
            self._calculators[case.key] = DaskInfluenceCalculator(self.fitted(case), converter, self.client)
        pairs = zip((case.setting.test(tests), case.setting.train), chunks, strict=True)
        test, train = (
            [da.from_array(a.numpy(), chunks=(size, *a.shape[1:])) for a in pair] for pair, size in pairs
        )
        calculator, store, meter = self._calculators[case.key], self.new_store(), ClusterMeter(self.client)
        seconds, _ = timed(lambda: calculator.influences(*test, *train).to_zarr(store))
        return seconds, {"values": zarr.open(store, mode="r")[:], **meter.read()}

    def perturbation(self, case: Case, tests: int, trains: int) -> Measured:
        """Of the first training samples, in memory."""
        infl, train = self.fitted(case), [a[:trains] for a in case.setting.train]
        mode = InfluenceMode.Perturbation
        seconds, values = timed(infl.influences, *case.setting.test(tests), *train, mode=mode)
        return seconds, {"values": values.detach().numpy()}

    def factors(self, case: Case, tests: int) -> Measured:
        """(H + λI)⁻¹ g of test points."""
        infl = self.fitted(case)
        seconds, values = timed(infl.influence_factors, *case.setting.test(tests))
        return seconds, {"values": values.detach().numpy()}

    def eigenpairs(self, case: Case) -> Measured:
        """θ and the eigenvectors as rows (R, 1 + P)."""
        (block,) = self.fitted(case).block_mapper.composable_block_dict.values()
        found = block.op.low_rank_representation
        return 0.0, {"values": np.column_stack([found.eigen_vals.numpy(), found.projections.numpy().T])}


if __name__ == "__main__":
    serve(PyDVL)
