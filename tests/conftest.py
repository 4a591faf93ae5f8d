"""What every test starts from: fixed seeds, sober thread counts, examples that come back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import dask
import pytest
import torch
from distributed import Client, LocalCluster
from distributed.utils import get_mp_context
from hypothesis import HealthCheck, settings

# Before --doctest-modules imports them: suites and oracles that other tests call explain themselves
# where they fail.
pytest.register_assert_rewrite("tests.contracts", "tests.oracles")

# Several pytest processes, each with worker processes of its own, share the machine: torch's
# default of one thread per core in each of them is slower than one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Workers of the tests are forks of one process without threads, which has imported once what takes each
# worker seconds of processor time. Those that the command line and the examples start are not: they are
# started as users start them.
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
get_mp_context().set_forkserver_preload(
    ["distributed", "torch._dynamo", "dask_influence.execution.quarantine"]
)

# The time of one example says nothing on a shared machine, and a failure must come back.
settings.register_profile(
    "dask_influence",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("dask_influence")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch with one thread, whatever the environment says: tasks of this process run one after the other."""
    yield from _torch_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch with two threads, whatever the environment says."""
    yield from _torch_threads(2)


def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Two worker processes of one thread."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit="2GiB"
        ) as cluster,
        Client(cluster) as connected,
    ):
        yield connected


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that is here."""
    return str(request.param)
