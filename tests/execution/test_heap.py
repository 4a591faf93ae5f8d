"""What workers do with memory that they have freed, in processes of their own: a heap is the process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

GLIBC = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")

LIVE = 6 * 8 * 4 / 4
"""MiB that the program goes on to hold, of tensors of 256 KiB."""

FREED = f"""
import threading, time
import psutil, torch
from dask_influence.execution import heap

held = lambda: psutil.Process().memory_info().rss / 2**20

def work():
    heap.at_work()
    between = []
    for _ in range(8):  # freed but for what lies between: a heap keeps the rest in the middle
        parts = [torch.ones(2**16) for _ in range(100)]
        between += parts[::25]
    return between

torch.ones(10) @ torch.ones(10)
assert heap.steady() is True
threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(6)]
results, before = [], held()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
kept = held() - before
for _ in range(50):
    time.sleep(0.1)
    if held() - before < {LIVE} + 30:
        break
print(kept, held() - before)
"""


def run(program: str) -> list[float]:
    answer = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    return [float(number) for number in answer.stdout.split()]


@GLIBC
def test_a_process_that_has_nothing_to_do_hands_back_what_it_has_freed() -> None:
    kept, left = run(FREED)
    assert kept > LIVE + 100
    assert left < LIVE + 30
