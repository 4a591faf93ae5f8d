"""The status of a client in the store: what it says, how often, and over what it is never written."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dask.config
import pytest

from dask_influence.cli.progress import Lines, Metrics, Relay, shown
from dask_influence.cli.session import Exit, exit_code
from dask_influence.cli.status import NOT_BEGUN, Report, Status, StatusFile
from dask_influence.errors import ConfigurationError, PoisonedSamplesError, StoreError
from dask_influence.execution.ledger import STATUS_KEY
from dask_influence.storage.stores import Location


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Location:
    return Location.of(f"memory://cli-status/{request.node.name}")


def test_a_fit_is_shown_in_an_empty_store_before_its_run_has_begun(store: Location) -> None:
    StatusFile(store, "r1", "job").progress("pass 2", 3, 8, 1.5)
    found = Report.of(store)
    assert found.state == NOT_BEGUN
    assert not found.complete
    assert f"on {socket.gethostname()}" in str(found)
    assert "stage   pass 2: 3 of 8, 1.5/s, 3.3 s left" in str(found)


def test_nothing_is_written_over_other_data_until_the_run_has_begun(store: Location) -> None:
    store.put("zarr.json", b"{}")
    status = StatusFile(store, "r1", "job")
    status.progress("pass 1", 1, 2, None)
    assert store.list() == ["zarr.json"]
    status.progress("factors", 0, 2, None)  # the fingerprint was checked by now
    assert Status.read(store) is not None


def test_the_status_of_another_job_stays_and_that_of_the_same_job_goes_on(store: Location) -> None:
    StatusFile(store, "r1", "job").progress("pass 1", 1, 2, None)
    StatusFile(store, "r2", "other").progress("pass 1", 1, 2, None)
    assert Status.read(store).run == "r1"  # type: ignore[union-attr]
    StatusFile(store, "r3", "job").progress("pass 1", 1, 2, None)
    assert Status.read(store).run == "r3"  # type: ignore[union-attr]


def test_it_is_written_every_few_seconds_and_at_the_end(store: Location) -> None:
    with dask.config.set({"influence.status-interval": "1 h"}):
        status = StatusFile(store, "r1", "job", hide=lambda text: text.replace("secret", "…"))
        status.progress("pass 1", 1, 9, None)
        status.progress("pass 1", 5, 9, 2.0)
        assert Status.read(store).done == 1  # type: ignore[union-attr]
        status.end("failed", "ValueError: secret")
    ended = Status.read(store)
    assert ended is not None
    assert (ended.state, ended.done, ended.error) == ("failed", 5, "ValueError: …")
    with dask.config.set({"influence.status-interval": "0 s"}):
        status = StatusFile(store, "r1", "job")
        for done in (1, 2):
            status.progress("pass 1", done, 9, None)
            assert Status.read(store).done == done  # type: ignore[union-attr]


def test_a_refused_job_leaves_nothing(store: Location) -> None:
    status = StatusFile(store, "r1", "job")
    status.end("failed", "before anything was written")
    assert store.list() == []
    status.progress("pass 1", 1, 9, None)
    status.end("failed", "refused after the fit")
    assert store.list() == [STATUS_KEY]
    status.withdraw()
    assert store.list() == []


def test_a_client_that_is_silent_may_be_dead(store: Location) -> None:
    StatusFile(store, "r1", "job").progress("pass 1", 1, 9, None)
    assert "may be dead" not in str(Report.of(store))
    held = json.loads(store.get(STATUS_KEY))
    held["updated"] = (datetime.now(UTC) - timedelta(minutes=7)).isoformat()
    store.put(STATUS_KEY, json.dumps(held).encode())
    assert "7.0 min ago" in str(Report.of(store))
    assert "may be dead: run the same job again" in str(Report.of(store))


def test_what_is_no_status_is_none_and_no_store_is_an_error(store: Location) -> None:
    with pytest.raises(StoreError, match="holds no run"):
        Report.of(store)
    store.put(STATUS_KEY, b"[1]")
    assert Status.read(store) is None


def test_a_store_that_is_away_does_not_end_a_run(
    store: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*arguments: object) -> None:
        raise StoreError("away")

    monkeypatch.setattr(Location, "put", away)
    StatusFile(store, "r1", "job").progress("pass 1", 1, 9, None)
    assert "the status could not be written: away" in caplog.text


def test_bars_show_stage_rate_and_what_the_workers_hold(capsys: pytest.CaptureFixture[str]) -> None:
    with shown([], lambda: (3 * 2**30, 8 * 2**30), terminal=True) as report:
        report("strips", 1, 8)
        report("strips", 8, 8)
    said = capsys.readouterr().err
    assert "strips" in said
    assert "8/8" in said
    assert "workers 3.0 GiB" in said


def test_lines_are_few_and_hold_their_fields(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with dask.config.set({"influence.log-interval": "1 h"}):
        report = Relay([Lines()])
        for number in range(1, 6):
            for done in range(1, 4):
                report(f"pass {number}", done, 3)
        for done in range(4):
            report("strips", done, 3)
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "pass 1: 1 of 3",
        "strips: 0 of 3",
        "strips: 3 of 3",
    ]
    assert caplog.records[-1].fields["strip"] == 3  # type: ignore[attr-defined]


def test_a_port_that_is_taken_is_refused() -> None:
    pytest.importorskip("prometheus_client", reason="the extra [metrics]")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(ConfigurationError, match="--metrics-port"):
            Metrics(taken.getsockname()[1], "r1")


def test_missing_samples_are_an_incomplete_run() -> None:
    assert exit_code(PoisonedSamplesError("sample 3")) is Exit.INCOMPLETE


STATUS_ALONE = """
import sys
from dask_influence.cli import cli

try:
    cli(sys.argv[1:])
finally:
    print("torch" in sys.modules)
"""


def test_a_status_does_not_load_torch(tmp_path: Path) -> None:
    """It is asked often, and torch takes seconds."""
    StatusFile(Location.of(tmp_path / "scores.zarr"), "run", "job").progress("pass 1", 1, 2, None)
    asked = subprocess.run(
        [sys.executable, "-c", STATUS_ALONE, "status", tmp_path / "scores.zarr"],
        capture_output=True,
        text=True,
    )
    assert "pass 1: 1 of 2" in asked.stdout, asked.stderr
    assert asked.returncode == Exit.INCOMPLETE
    assert asked.stdout.split()[-1] == "False"
