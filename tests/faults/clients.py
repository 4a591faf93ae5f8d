"""Clients to be killed: one process imports and fits, and forks a client for each store it is told of.

python -m tests.faults.clients     # then one path a line; prints the process id of each client
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests import data
from tests.faults.problem import score, unfitted


def main() -> None:
    """Serve until the input ends."""
    infl = unfitted().fit(data.mlp_classification().train)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            score(infl, Path(line.strip()))
            os._exit(0)
        print(child, flush=True)
        os.waitpid(child, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()
