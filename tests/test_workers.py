"""Workers that cannot do the work: without the package, with another version, without this host's files."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from distributed import Client, LocalCluster

from dask_influence import DirectInfluence
from dask_influence.errors import ClusterError, ConfigurationError
from dask_influence.execution import dask as cluster_side
from tests import data

CASE = data.mlp_regression()


@pytest.fixture
def worker() -> Iterator[Client]:
    """A client of one worker process, which the test may spoil."""
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def fit(client: Client, **how: Any) -> DirectInfluence:
    return DirectInfluence(CASE.model, CASE.loss, 0.7, client=client, **how).fit(CASE.train)


def forget() -> None:
    """Make this process one in which the package is not installed."""

    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> None:
            if name.partition(".")[0] == "dask_influence":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    for name in [name for name in sys.modules if name.partition(".")[0] == "dask_influence"]:
        del sys.modules[name]
    sys.meta_path.insert(0, Missing())


def test_a_worker_without_the_package_is_refused(worker: Client) -> None:
    assert fit(worker).diagnostics["samples"] == len(CASE.train[1])
    worker.run(forget)
    with pytest.raises(
        ClusterError, match=r"worker tcp://\S+ cannot import 'dask_influence.*install dask_influence"
    ):
        fit(worker)


def test_a_worker_of_another_version_is_refused_by_its_address(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = cluster_side.versions()
    fit(client)
    with monkeypatch.context() as patched:
        patched.setattr(cluster_side, "version", lambda name: "99.0")
        cluster_side.versions.cache_clear()
        with pytest.raises(
            ClusterError, match=r"worker tcp://\S+ has dask_influence \S+ and this process has 99\.0"
        ):
            fit(client)
    cluster_side.versions.cache_clear()
    assert cluster_side.versions() == theirs


def test_workers_of_other_hosts_need_a_place_for_artifacts(
    client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(cluster_side.DaskExecutor, "_blind_to", lambda self, folder: ["tcp://elsewhere:1"])
    with pytest.raises(ConfigurationError, match=r"tcp://elsewhere:1 do not share.*artifacts= is needed"):
        fit(client)
    assert fit(client, artifacts=tmp_path / "artifacts").diagnostics["samples"] == len(CASE.train[1])
