"""A warm cluster of one side, and what a stretch of work on it costs (Linux)."""

from __future__ import annotations

import socket
import struct

import processes
import psutil
from distributed import Client, LocalCluster


def warm_cluster() -> Client:
    """A client of two processes with one thread each; the scheduler runs in this process."""
    return Client(
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="2GiB", dashboard_address=":0")
    )


class ClusterMeter:
    """What a stretch of cluster work cost: bytes through the scheduler, peak memory of a worker."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.port = int(client.scheduler_info()["address"].rsplit(":", 1)[1])
        client.run(processes.reset_peak)
        self.before = scheduler_bytes(self.port)

    def read(self) -> dict[str, float]:
        """Bytes since this meter was made, and MiB at the peak of the larger worker."""
        peaks = self.client.run(processes.peak).values()
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
