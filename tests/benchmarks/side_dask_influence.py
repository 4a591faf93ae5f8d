"""This package's side of the comparisons, through its public interface; settings are the defaults."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client
from metered import ClusterMeter, warm_cluster
from protocol import Measured, timed
from safetensors.numpy import load_file
from side import Case, Side, serve
from torch import Tensor

import dask_influence


class DaskInfluence(Side):
    """One fitted model for each case, another for each case on the cluster."""

    packages = ("dask_influence", "dask", "zarr")

    @cached_property
    def client(self) -> Client:
        """Started at first use."""
        return warm_cluster()

    def fitting(self, case: Case, client: Client | None = None) -> Callable[[], Any]:
        """The fit, here or on the cluster."""
        kind, setting = getattr(dask_influence, case.estimator), case.setting
        options = {**case.options, "client": client}
        return lambda: kind(setting.model, setting.loss, setting.regularization, **options).fit(setting.train)

    def fit(self, case: Case) -> Measured:
        """With the passes over the data that it took."""
        seconds, _ = super().fit(case)
        return seconds, {"passes": self._fitted[case.key].diagnostics["passes"]}

    def cluster_fit(self, case: Case) -> Measured:
        """The same sums over the warm cluster."""
        fitting, meter = self.fitting(case, self.client), ClusterMeter(self.client)
        seconds, self._fitted[f"cluster {case.key}"] = timed(fitting)
        return seconds, meter.read()

    def scores(self, case: Case, tests: int) -> Measured:
        """From tensors, in one call."""
        infl, test, train = self.fitted(case), case.setting.test(tests), case.setting.train
        seconds, scores = timed(infl.influences, *test, *train)
        # one pass for the training derivatives, and those in which factors were solved
        plan, found = infl.plan(test, train), infl.diagnostics
        solving = len(plan.factor_chunks) if "blocks" in found else found.get("solver_passes", 0)
        return seconds, {"values": scores.numpy(), "passes": plan.passes + solving}

    def chunked_scores(self, case: Case, tests: int, chunks: tuple[int, int]) -> Measured:
        """From dask arrays at these chunks of test and training data, in this process."""
        infl = self.fitted(case)
        pairs = zip((case.setting.test(tests), case.setting.train), chunks, strict=True)
        test, train = ([_in_chunks(a, size) for a in pair] for pair, size in pairs)
        lazy = infl.influences(*test, *train)
        seconds, values = timed(lazy.compute, scheduler="synchronous")
        return seconds, {"values": values}

    def cluster_scores(self, case: Case, tests: int) -> Measured:
        """To Zarr, on the warm cluster."""
        if f"cluster {case.key}" not in self._fitted:
            self.cluster_fit(case)
        infl, store, meter = self._fitted[f"cluster {case.key}"], self.new_store(), ClusterMeter(self.client)
        seconds, _ = timed(infl.influences_to_zarr, store, case.setting.test(tests), case.setting.train)
        measured = meter.read()
        return seconds, {"values": dask_influence.open_influences(store)["influence"].to_numpy(), **measured}

    def perturbation(self, case: Case, tests: int, trains: int) -> Measured:
        """Of the first training samples, in memory."""
        infl, train = self.fitted(case), [a[:trains] for a in case.setting.train]
        seconds, values = timed(infl.influences, *case.setting.test(tests), *train, mode="perturbation")
        return seconds, {"values": values.numpy()}

    def factors(self, case: Case, tests: int) -> Measured:
        """(H + λI)⁻¹ g of test points."""
        infl = self.fitted(case)
        seconds, values = timed(infl.influence_factors, *case.setting.test(tests))
        return seconds, {"values": values.numpy()}

    def eigenpairs(self, case: Case) -> Measured:
        """θ and the eigenvectors as rows (R, 1 + P), from what a fit saves."""
        store = Path(self.new_store())
        seconds, _ = timed(self.fitted(case).save, str(store))
        (file,) = store.rglob("*.safetensors")
        held = load_file(file)
        return seconds, {"values": np.column_stack([held["values"], held["vectors"]])}


def _in_chunks(a: Tensor, size: int) -> da.Array:
    return da.from_array(a.numpy(), chunks=(size, *a.shape[1:]))


if __name__ == "__main__":
    serve(DaskInfluence)
