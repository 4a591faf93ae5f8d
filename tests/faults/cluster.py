"""A cluster to be killed as a whole: scheduler and workers of one process.

python -m tests.faults.cluster     # prints the scheduler's address; ends with its input
"""

from __future__ import annotations

import sys

from distributed import LocalCluster


def main() -> None:
    """Serve until the input ends."""
    with LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=None, preload="tests.faults.watch"
    ) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
