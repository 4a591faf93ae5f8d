"""This package's side of the comparison, through its public interface alone."""

from __future__ import annotations

from pathlib import Path

import dask.array as da
from problem import PERTURBED_TEST, PERTURBED_TRAIN, REGULARIZATION, TEST_CHUNK, TRAIN_CHUNK, Problem
from protocol import Measured, timed
from side import ClusterMeter, Side, serve

from dask_influence import DirectInfluence, open_influences


class DaskInfluence(Side):
    """Fitted once in this process and once on the cluster; settings are the defaults."""

    packages = ("dask_influence", "dask", "zarr")

    def __init__(self, problem: Problem, folder: Path) -> None:
        super().__init__(problem, folder)
        self.model = self._unfitted().fit(problem.train)
        self._on_cluster: DirectInfluence | None = None

    def _unfitted(self, **options: object) -> DirectInfluence:
        model, loss = self.problem.model, self.problem.loss
        return DirectInfluence(model, loss, REGULARIZATION, **options)

    def fit(self) -> Measured:
        seconds, _ = timed(lambda: self._unfitted().fit(self.problem.train))
        return seconds, {}

    def cluster_fit(self) -> Measured:
        """The same sum over the warm cluster."""
        meter = ClusterMeter(self.client)
        seconds, self._on_cluster = timed(lambda: self._unfitted(client=self.client).fit(self.problem.train))
        return seconds, meter.read()

    def scores(self) -> Measured:
        test, train = self._chunked()
        lazy = self.model.influences(*test, *train)
        seconds, values = timed(lazy.compute, scheduler="synchronous")
        return seconds, {"values": values}

    def scores_in_one_call(self) -> Measured:
        """The same scores from tensors, in one call."""
        seconds, values = timed(self.model.influences, *self.problem.test, *self.problem.train)
        return seconds, {"values": values.numpy()}

    def cluster_scores(self) -> Measured:
        if self._on_cluster is None:
            self._on_cluster = self._unfitted(client=self.client).fit(self.problem.train)
        store, meter = self.new_store(), ClusterMeter(self.client)
        seconds, _ = timed(self._on_cluster.influences_to_zarr, store, self.problem.test, self.problem.train)
        measured = meter.read()
        return seconds, {"values": open_influences(store)["influence"].to_numpy(), **measured}

    def perturbation(self) -> Measured:
        test = [a[:PERTURBED_TEST] for a in self.problem.test]
        train = [a[:PERTURBED_TRAIN] for a in self.problem.train]
        seconds, values = timed(self.model.influences, *test, *train, mode="perturbation")
        return seconds, {"values": values.numpy()}

    def _chunked(self) -> tuple[list[da.Array], list[da.Array]]:
        """Test and training data as dask arrays at the peer's chunks."""
        pairs = ((self.problem.test, TEST_CHUNK), (self.problem.train, TRAIN_CHUNK))
        test, train = ([da.from_array(a.numpy(), chunks=(n, *a.shape[1:])) for a in p] for p, n in pairs)
        return test, train


if __name__ == "__main__":
    serve(DaskInfluence)
