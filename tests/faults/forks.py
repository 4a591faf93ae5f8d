"""Clients and workers to be killed: one process imports and fits, and forks as many as it is asked for.

python -m tests.faults.forks     # an order in JSON a line; prints the process id of each fork
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from distributed import Client, Worker

from dask_influence import DirectInfluence
from dask_influence.errors import InfluenceError
from dask_influence.storage.stores import Location
from tests import data
from tests.faults import watch
from tests.faults.problem import unfitted, write

_DIES_WITH_PARENT = 1


def client(
    local: DirectInfluence,
    store: str,
    form: str,
    outcome: str,
    address: str | None = None,
    artifacts: str | None = None,
) -> None:
    """Write ``form`` to ``store``, on the cluster at ``address`` after a fit there, and leave word of how it ended."""
    try:
        if address is not None:
            connected = Client(address, timeout=10)
            local = unfitted(connected, None if artifacts is None else Path(artifacts))
            local.fit(data.mlp_classification().train)
        write(form, local, Location.of(store))
        said = "done"
    except InfluenceError as error:
        said = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: BLE001 - whoever waits for it tells
        said = f"LOST {traceback.format_exc()}"
    Path(outcome).write_text(said)


def worker(local: DirectInfluence, address: str, name: str) -> None:
    """Serve a scheduler with one thread, without a nanny."""

    async def serve() -> None:
        async with Worker(
            address, nthreads=1, name=name, memory_limit="2GiB", local_directory=os.environ["TMPDIR"]
        ) as served:
            await served.finished()

    asyncio.run(serve())


def main() -> None:
    """Serve until the input ends."""
    watch.install()
    local = unfitted().fit(data.mlp_classification().train)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are not to be waited for
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _serve(local, json.loads(line))
        print(child, flush=True)


def _serve(local: DirectInfluence, order: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    try:
        {"client": client, "worker": worker}[order.pop("do")](local, **order)
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
