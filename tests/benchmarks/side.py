"""One side of a comparison: what it can be asked for, a cluster, and what work on that costs."""

from __future__ import annotations

import re
import socket
import struct
import sys
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import protocol
import psutil
from distributed import Client, LocalCluster
from problem import Problem
from protocol import Measured


class Side(ABC):
    """A package under measurement. Each public method named in the driver is one piece of work."""

    packages: tuple[str, ...]

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.problem, self.folder = problem, folder
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        """A warm cluster of two processes with one thread each, started at first use."""
        if self._client is None:
            cluster = LocalCluster(
                n_workers=2, threads_per_worker=1, memory_limit="2GiB", dashboard_address=":0"
            )
            self._client = Client(cluster)
        return self._client

    @abstractmethod
    def fit(self) -> Measured:
        """The exact Hessian in this process, until it can be used."""

    @abstractmethod
    def scores(self) -> Measured:
        """360 × 1,437 scores at chunks 60 / 128, in this process."""

    @abstractmethod
    def cluster_scores(self) -> Measured:
        """The same on the warm cluster, to Zarr."""

    @abstractmethod
    def perturbation(self) -> Measured:
        """64 × 512 × 64 derivatives with respect to the input, in memory."""

    def new_store(self) -> str:
        """A path that does not exist yet."""
        return tempfile.mkdtemp(dir=self.folder) + "/scores.zarr"


class ClusterMeter:
    """What a stretch of cluster work cost: bytes through the scheduler, peak memory of a worker."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.port = int(client.scheduler_info()["address"].rsplit(":", 1)[1])
        client.run(reset_peak_memory)
        self.before = scheduler_bytes(self.port)

    def read(self) -> dict[str, float]:
        """Bytes since this meter was made, and MiB at the peak of the larger worker."""
        peaks = self.client.run(peak_memory).values()
        return {
            "scheduler_bytes": scheduler_bytes(self.port) - self.before,
            "worker_peak_mib": round(max(peaks) / 2**20, 1),
        }


def scheduler_bytes(port: int) -> int:
    """Bytes sent and received so far by the scheduler, which runs in this process, on ``port``."""
    total = 0
    for connection in psutil.Process().net_connections("tcp"):
        if connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED:
            with socket.fromfd(connection.fd, socket.AF_INET, socket.SOCK_STREAM) as accepted:
                # tcp_info of linux/tcp.h: bytes_acked and bytes_received stand at offset 120.
                info = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                total += sum(struct.unpack_from("QQ", info, 120))
    return total


def reset_peak_memory() -> None:
    """Forget this process's high-water mark (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Largest resident size of this process since the mark was reset, in bytes (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def serve(side_class: type[Side]) -> None:
    """Answer ``{"work": name, "dtype": dtype}`` by what that method of the side measures."""
    folder, problem_path = (Path(argument) for argument in sys.argv[1:3])
    sides: dict[str, Side] = {}

    def answer(request: dict[str, Any]) -> Measured:
        dtype = request["dtype"]
        if dtype not in sides:
            sides[dtype] = side_class(Problem(problem_path, dtype), folder)
        return getattr(sides[dtype], request["work"])()

    protocol.serve(side_class.packages, answer)
