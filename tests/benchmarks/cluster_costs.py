"""What a run costs the cluster: bytes through the scheduler, and peak memory of the workers.

Run it by itself: ``python tests/benchmarks/cluster_costs.py``. A scheduler and two workers of
one thread are started as processes of their own; the scheduler counts the frames it sends
and receives. The work is the digits MLP 64-32-10 with Direct: fit, then 360 × 1,437 scores
to Zarr. Memory is the workers' resident peak, and the share of it that they had after importing.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from distributed import Client
from problems import Setting, make

from dask_influence import DirectInfluence

COUNTER = '''
"""Preloaded into the scheduler: counts the bytes of what it sends and receives."""
from distributed.comm import tcp
from distributed.utils import nbytes

TRAFFIC = {"sent": 0, "received": 0}
_to_frames, _from_frames = tcp.to_frames, tcp.from_frames


async def to_frames(*args, **kwargs):
    frames = await _to_frames(*args, **kwargs)
    TRAFFIC["sent"] += sum(map(nbytes, frames))
    return frames


async def from_frames(frames, *args, **kwargs):
    frames = list(frames)
    TRAFFIC["received"] += sum(map(nbytes, frames))
    return await _from_frames(frames, *args, **kwargs)


def dask_setup(scheduler):
    tcp.to_frames, tcp.from_frames = to_frames, from_frames
    scheduler.traffic = TRAFFIC
'''


@contextmanager
def cluster(folder: Path) -> Iterator[Client]:
    """A client of one scheduler that counts and two workers of one thread."""
    counter, contact = folder / "counter.py", folder / "scheduler.json"
    counter.write_text(COUNTER)
    dask, contact_of = [sys.executable, "-m", "dask"], ["--scheduler-file", str(contact)]
    counted = ["--port", "0", "--host", "127.0.0.1", "--no-dashboard", "--preload", str(counter)]
    alike = ["--nthreads", "1", "--memory-limit", "4GiB", "--no-dashboard", "--local-directory", str(folder)]
    commands = [
        [*dask, "scheduler", *contact_of, *counted],
        *([*dask, "worker", *contact_of, *alike] for _ in range(2)),
    ]
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    try:
        with Client(scheduler_file=str(contact), timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            yield client
    finally:
        for process in running:
            process.terminate()


def traffic(client: Client) -> int:
    """Bytes that have gone through the scheduler so far."""
    counted = client.run_on_scheduler(lambda dask_scheduler: dict(dask_scheduler.traffic))
    return counted["sent"] + counted["received"]


def peak() -> float:
    """Resident peak of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def imported() -> float:
    """Resident peak once everything that a task needs has been imported."""
    import dask_influence.execution.run  # noqa: F401

    return peak()


def main() -> None:
    """Fit and score, and print what each cost."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, cluster(Path(folder)) as client:
        make(Path(folder))
        setting = Setting(Path(folder), "digits", "float32")
        before = client.run(imported)
        infl = DirectInfluence(setting.model, setting.loss, setting.regularization, client=client)
        steps = {
            "fit": lambda: infl.fit(setting.train),
            "scores": lambda: infl.influences_to_zarr(Path(folder) / "run", setting.test(360), setting.train),
        }
        for name, step in steps.items():
            bytes_before, began = traffic(client), time.perf_counter()
            step()
            seconds = time.perf_counter() - began
            print(
                f"{name:<8} {seconds:6.2f} s  {(traffic(client) - bytes_before) / 2**10:8.0f} KiB through the scheduler"
            )
        after = client.run(peak)
    for address, was in before.items():
        print(f"worker   {after[address]:6.0f} MiB at most, {was:.0f} MiB of it after importing")


if __name__ == "__main__":
    main()
