"""Acceptance of object stores: runs on a cluster to an S3 server that enforces credentials.

Not collected by default: ``make test-s3`` runs it.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from dask_influence import DirectInfluence, open_influences, verify
from dask_influence.errors import StoreError
from dask_influence.storage.stores import Location
from tests import data
from tests.s3.server import KEY, SECRET, Server

TILE = 1_500
"""Bytes of a tile: 31 × 43 scores make several strips."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("s3"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    """Two workers that find credentials in their environment, as the client does: forks would not have them."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in server.environment.items():
            environment.setenv(name, value)
        with (
            dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}),
            LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit="2GiB"
            ) as cluster,
            Client(cluster) as connected,
        ):
            yield connected


def expected(case: data.Case, folder: Path) -> np.ndarray:
    """Scores of an undisturbed run in this process, to a folder."""
    return direct(case).influences_to_zarr(folder, case.test, case.train, tile_bytes=TILE)["influence"].values


def direct(case: data.Case, **how: object) -> DirectInfluence:
    return DirectInfluence(case.model, case.loss, case.regularization, **how).fit(case.train)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"secret_access_key": "not-the-secret"}, {"access_key_id": "NOBODY"}])
def test_the_server_enforces_credentials(server: Server, wrong: dict[str, str]) -> None:
    """Or the rest would say nothing."""
    server.place("right").check_writable()
    with pytest.raises(StoreError, match="cannot write"):
        server.place("wrong", **wrong).check_writable()


def test_a_run_of_a_cluster_lives_in_the_store_alone(server: Server, client: Client, tmp_path: Path) -> None:
    """Fit, artifacts, checkpoints and scores, credentials from the environment."""
    case = data.mlp_regression()
    model = direct(case, client=client, artifacts="s3://bucket/scratch")
    written = model.influences_to_zarr("s3://bucket/run", case.test, case.train, tile_bytes=TILE)
    assert written.attrs["state"] == "complete"
    np.testing.assert_array_equal(written["influence"].values, expected(case, tmp_path))
    again = direct(case, client=client, artifacts="s3://bucket/scratch")
    assert again.diagnostics["restored"] == again.diagnostics["passes"] > 0
    assert verify("s3://bucket/run").ok


@pytest.mark.parametrize("wrong", [{"secret_access_key": "not-the-secret"}, {"access_key_id": "NOBODY"}])
def test_wrong_credentials_are_refused_before_anything_runs(
    server: Server, client: Client, wrong: dict[str, str]
) -> None:
    case = data.mlp_regression()
    model = direct(case, client=client)
    with pytest.raises(StoreError) as refusal:
        model.influences_to_zarr(
            "s3://bucket/refused", case.test, case.train, storage_options=server.options | wrong
        )
    assert "credentials" in str(refusal.value) or "permission" in str(refusal.value)
    shown = "".join(traceback.format_exception(refusal.value))
    assert not any(secret in shown for secret in (SECRET, *wrong.values()))
    assert server.place("refused").list() == []


def test_secrets_are_written_and_shown_nowhere(
    server: Server, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    case = data.mlp_regression()
    model = direct(case, client=client)
    with caplog.at_level(logging.DEBUG):
        written = model.influences_to_zarr(
            "s3://bucket/secret", case.test, case.train, tile_bytes=TILE, storage_options=server.options
        )
    place = server.place("secret")
    stored = place.get_many(place.list())
    assert any(key.endswith("run.json") for key in stored)
    for key, content in stored.items():
        assert SECRET.encode() not in content, key
        assert KEY.encode() not in content, key
    shown = caplog.text + repr(place) + repr(written) + str(written.attrs) + repr(model)
    assert SECRET not in shown
    assert KEY not in shown
    for worker in client.get_worker_logs().values():
        assert SECRET not in str(worker)


def test_a_server_that_is_gone_for_a_while_delays_a_run(
    server: Server, client: Client, tmp_path: Path
) -> None:
    """Requests are repeated with growing pauses until it is back."""
    case = data.mlp_regression()
    model = direct(case, client=client, artifacts="s3://bucket/scratch")
    killed = threading.Event()

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done >= 1 and not killed.is_set():
            killed.set()
            server.kill()
            threading.Timer(3.0, server.start).start()

    written = model.influences_to_zarr(
        server.place("outage"), case.test, case.train, tile_bytes=TILE, progress=watch
    )
    assert killed.is_set()
    np.testing.assert_array_equal(written["influence"].values, expected(case, tmp_path))
    assert verify(server.place("outage")).ok


def test_a_server_that_stays_away_is_named_and_the_run_resumed(server: Server, tmp_path: Path) -> None:
    case = data.mlp_regression()
    model = direct(case)
    impatient = {"retry_config": {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}}
    place = server.place("gone", **impatient)

    def watch(stage: str, done: int, total: int) -> None:
        if stage == "strips" and done == 1:
            server.kill()

    try:
        with pytest.raises(StoreError, match="s3://bucket/gone"):
            model.influences_to_zarr(place, case.test, case.train, tile_bytes=TILE, progress=watch)
    finally:
        server.start()
    done: list[int] = []
    written = model.influences_to_zarr(
        server.place("gone"),
        case.test,
        case.train,
        tile_bytes=TILE,
        progress=lambda stage, now, total: done.append(now) if stage == "strips" else None,
    )
    assert done[0] >= 1
    np.testing.assert_array_equal(written["influence"].values, expected(case, tmp_path))


# zarr's warnings are silenced where they arise, but not in two threads at once
@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.filterwarnings("ignore:Failed to open Zarr store with consolidated:RuntimeWarning")
def test_two_clients_share_one_run(server: Server, tmp_path: Path) -> None:
    """Tiles are idempotent: both finish, and the store holds the scores once."""
    case = data.mlp_regression()
    place, failures = server.place("shared"), list[BaseException]()

    def run() -> None:
        try:
            direct(case).influences_to_zarr(place, case.test, case.train, tile_bytes=TILE)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    clients = [threading.Thread(target=run) for _ in range(2)]
    for thread in clients:
        thread.start()
        time.sleep(0.02)
    for thread in clients:
        thread.join()
    assert not failures
    np.testing.assert_array_equal(open_influences(place)["influence"].values, expected(case, tmp_path))
    assert verify(place).ok


def test_a_location_travels_with_its_credentials(server: Server) -> None:
    place = pickle.loads(pickle.dumps(server.place("travels")))
    place.put("a", b"1")
    assert Location.of("s3://bucket/travels", server.options).get("a") == b"1"
