"""Who does the work of a job: the workers of a scheduler that is there, those of this machine, or this process."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, LocalCluster, performance_report
from distributed.security import Security

from dask_influence.cli import job
from dask_influence.errors import ClusterError, ConfigurationError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = "30 s"
"""Until a scheduler that does not answer is given up."""


@dataclass(frozen=True)
class Scheduler:
    """How to reach a scheduler, from the command line; all None where none was given.

    Attributes
    ----------
    address : str, optional
        Such as ``tcp://host:8786`` or ``tls://host:8786``.
    file : str, optional
        What ``dask scheduler --scheduler-file`` wrote.
    tls_ca_file, tls_cert, tls_key : str, optional
        Of encrypted connections: all three or none.
    """

    address: str | None = None
    file: str | None = None
    tls_ca_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    def __post_init__(self) -> None:
        if self.address is not None and self.file is not None:
            raise ConfigurationError(
                "--scheduler-address and --scheduler-file were both given; leave one out"
            )
        tls = {
            "--tls-ca-file": self.tls_ca_file,
            "--tls-cert": self.tls_cert,
            "--tls-key": self.tls_key,
        }
        missing = [name for name, value in tls.items() if value is None]
        if missing and len(missing) < len(tls):
            raise ConfigurationError(f"TLS takes three files; {', '.join(missing)} was not given")
        if not missing and not self.given:
            raise ConfigurationError("TLS options are for a scheduler; give --scheduler-address too")

    @property
    def given(self) -> bool:
        """Whether there is one to join."""
        return self.address is not None or self.file is not None

    @property
    def _security(self) -> Security | None:
        if self.tls_ca_file is None:
            return None
        return Security(
            tls_ca_file=self.tls_ca_file,
            tls_client_cert=self.tls_cert,
            tls_client_key=self.tls_key,
            require_encryption=True,
        )

    def join(self) -> Client:
        """A client of it.

        Raises
        ------
        ClusterError
            It does not answer.
        """
        where = self.address or self.file
        try:
            return Client(
                self.address, scheduler_file=self.file, security=self._security, timeout=CONNECT_TIMEOUT
            )
        except (OSError, TimeoutError, ValueError, RuntimeError, TypeError) as error:
            raise ClusterError(
                f"no scheduler answers at {where} ({error}); start it, or check address and TLS files"
            ) from error


@contextmanager
def cluster(asked: job.Cluster, scheduler: Scheduler, report: str | None = None) -> Iterator[Client | None]:
    """A client for the job, None where this process does the work; closed again, with ours of the workers.

    ``report`` is where Dask's performance report goes.
    """
    if report is not None and importlib.util.find_spec("bokeh") is None:
        raise ConfigurationError(
            "--performance-report takes bokeh: pip install 'dask_influence[dashboard]', for the scheduler too"
        )
    with ExitStack() as stack:
        if scheduler.given:
            client = stack.enter_context(scheduler.join())
        elif asked.workers == 0:
            if report is not None:
                raise ConfigurationError("--performance-report needs workers; the job has cluster.workers: 0")
            yield None
            return
        else:
            # Of the processes started here none outlives this block, however it ends.
            local = stack.enter_context(
                LocalCluster(
                    n_workers=asked.workers,
                    threads_per_worker=asked.threads_per_worker,
                    memory_limit=asked.memory_limit or "auto",
                    dashboard_address=asked.dashboard_address,
                )
            )
            client = stack.enter_context(Client(local))
        log.info("%s; dashboard: %s", _described(client), client.dashboard_link or "none")
        if report is not None:
            stack.enter_context(_reported(report))
        yield client


@contextmanager
def _reported(file: str) -> Iterator[None]:
    """Dask's performance report of the block; what goes wrong with it is no fault of the run."""
    with ExitStack() as stack:
        try:
            report = performance_report(file)
            report.__enter__()
        except Exception as error:
            raise ClusterError(
                f"the scheduler makes no performance report ({error}); install bokeh there"
            ) from error

        @stack.push
        def finish(*outcome: Any) -> None:
            try:
                report.__exit__(*outcome)
            except Exception as error:  # noqa: BLE001
                log.warning("the performance report could not be written: %s", error)

        yield


def _described(client: Client) -> str:
    threads = client.nthreads()
    address = client.scheduler_info(n_workers=0).get("address", "that has just gone")
    return f"{len(threads)} workers, {sum(threads.values())} threads, scheduler {address}"


def memory(client: Any) -> tuple[int, int] | None:
    """Bytes that all workers hold, and may hold; None where there is no cluster or it does not answer."""
    if client is None:
        return None
    with suppress(OSError, TimeoutError, KeyError):
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        held = sum(worker["metrics"]["memory"] for worker in workers)
        return held, sum(worker["memory_limit"] or 0 for worker in workers)
    return None
