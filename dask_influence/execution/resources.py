"""What a fitted model works with: who runs its tasks, on which device, with how many threads, in what pieces.

Results do not depend on any of it beyond rounding.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch

from dask_influence import settings
from dask_influence.core.kept import BUDGET
from dask_influence.core.problem import Problem
from dask_influence.execution.base import Executor
from dask_influence.execution.dask import DaskExecutor, check_client
from dask_influence.execution.devices import resolve_device
from dask_influence.execution.drive import Passes
from dask_influence.execution.forecast import Cluster
from dask_influence.execution.job import Job
from dask_influence.execution.local import LocalExecutor
from dask_influence.execution.options import Options
from dask_influence.grid import Chunks
from dask_influence.scalars import check_flag, check_integer
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location

LARGE_MODEL = 2**16
"""Parameters from which one process uses all its torch threads."""

KEPT_PASS = 0.1
"""Products with one vector that a pass costs beside its own, where all that they share is kept."""

PARAMETERS_PER_SAMPLE, LARGEST_CHUNK = 512, 2048
"""Chunks of data are joined for large models: a sample for so many parameters, up to so many samples."""


class Resources:
    """Client, device, place of artifacts and chunk size, as a user gave them.

    Parameters
    ----------
    client, device, artifacts, chunk_size, certify
        As for :class:`~dask_influence.InfluenceFunctionModel`.

    Raises
    ------
    ConfigurationError
        No such device, a client that is none, or a chunk size that is no positive integer.
    """

    def __init__(
        self,
        client: Any = None,
        device: str = "auto",
        artifacts: str | PathLike[str] | Location | None = None,
        chunk_size: int | None = None,
        certify: bool = True,
    ) -> None:
        if chunk_size is not None:
            chunk_size = check_integer("chunk_size", chunk_size)
        check_flag("certify", certify)
        check_client(client)
        resolve_device(device)
        self.client, self.device, self.artifacts = client, device, artifacts
        self.chunk_size, self.certify = chunk_size, certify
        self._cluster: DaskExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A client belongs to its process.
        return {**self.__dict__, "client": None, "_cluster": None}

    @property
    def kept(self) -> Location | None:
        """The place of artifacts that a user named, which outlives this process."""
        url = self.artifacts or settings.text("artifacts.url")
        return None if url is None else Location.of(url)

    @property
    def torch_device(self) -> torch.device:
        """The device in this process."""
        return resolve_device(self.device)

    def executor(self) -> Executor:
        """The cluster, checked to be there, or this process."""
        if self.client is None:
            return LocalExecutor()
        if self._cluster is None or self._cluster.client is not self.client:
            self._cluster = DaskExecutor(self.client, self.kept)
        self._cluster.check()
        return self._cluster

    def cluster(
        self, workers: int | None, threads: int | None, memory: int | None, bandwidth: float | None
    ) -> Cluster:
        """The cluster at hand, or the one that is asked about, for forecasts."""
        there = self.executor().cluster
        return Cluster(
            there.workers if workers is None else workers,
            there.threads if threads is None else threads,
            there.memory if memory is None and workers is None else memory,
            bandwidth,
        )

    def passes(self, executor: Executor, problem: Problem, source: Source) -> Passes:
        """What answers rounds over ``source``."""
        chunks = Chunks(len(source), self._samples_at_once(problem, source))
        reachable = executor.reachable(source, chunks.size)
        threads = self.threads(problem)
        job = Job(executor.model(problem, self.device), reachable, "train", threads)
        held = _sample_bytes(problem)
        whole = BUDGET // (held + source.nbytes_per_sample) if self.one_by_one(problem) else 0
        return Passes(executor, executor.seal(job), chunks, threads, held, whole)

    def options(self, *, compiled: bool, matmul_precision: str) -> Options:
        """What is asked of every process that runs tasks."""
        return Options(self.device, compiled, matmul_precision)

    def threads(self, problem: Problem) -> int:
        """torch threads per task: one on a cluster and for small models, what the process owns otherwise.

        It is the same wherever a small model runs, so that its scores are the same bits.
        """
        if settings.text("torch-threads") is not None:
            return settings.count("torch-threads")
        return torch.get_num_threads() if self.one_by_one(problem) else 1

    def one_by_one(self, problem: Problem) -> bool:
        """Whether tasks run one after the other in this process, each with all of its torch threads."""
        asked = settings.text("torch-threads") is not None
        return not asked and self.client is None and problem.objective.size >= LARGE_MODEL

    def pass_cost(self, problem: Problem) -> float:
        """What a pass costs beside its products, in products with one vector; for estimators that choose a block.

        Next to nothing where chunks keep what products share. Else forward values are made anew in each pass, and
        workers wait for each other; for small models everywhere, so that their fits are the same bits.
        """
        kept = (
            self.client is None and problem.forms.product == "chain" and problem.objective.size >= LARGE_MODEL
        )
        return KEPT_PASS if kept else 1.0

    def _samples_at_once(self, problem: Problem, source: Source) -> int:
        if self.chunk_size is not None:
            return min(self.chunk_size, len(source))
        held, most = settings.nbytes("chunk.bytes"), len(source)
        if held is not None:
            most = max(1, held // _sample_bytes(problem))
        natural = source.chunk_size or settings.count("chunk.samples")
        # Each chunk's sums are as large as θ, whatever its samples: many samples share their cost.
        worthwhile = min(problem.objective.size // PARAMETERS_PER_SAMPLE, LARGEST_CHUNK, most)
        return min(natural * max(1, worthwhile // natural), most, len(source))


def _sample_bytes(problem: Problem) -> int:
    """What a sample takes when a vector is pushed through the model."""
    return 8 * problem.activations * problem.objective.dtype.itemsize
