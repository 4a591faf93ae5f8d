"""An S3 server of its own processes that enforces credentials: SeaweedFS over a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from dask_influence.errors import StoreError
from dask_influence.storage.stores import Location

KEY, SECRET = "EXAMPLEKEYOFTHESUITE", "a-secret-that-nobody-may-ever-see"


class Server:
    """``weed server -s3`` on this host; can be killed and started again with its data.

    Parameters
    ----------
    folder : Path
        Holds its data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports = dict(zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True))
        identity = {
            "name": "suite",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['s3']}"

    @property
    def options(self) -> dict[str, object]:
        return {
            "endpoint": self.endpoint,
            "access_key_id": KEY,
            "secret_access_key": SECRET,
            "region": "us-east-1",
            "virtual_hosted_style_request": False,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The same as variables, for processes that are to find their credentials there."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
        }

    def place(self, name: str, **changed: object) -> Location:
        return Location.of(f"s3://bucket/{name}", self.options | changed)

    def start(self) -> None:
        weed = program()
        assert weed is not None, "install the extra [s3]: make test-s3 does"
        ports = [f"-{name}.port={port}" for name, port in self._ports.items()]
        # gRPC ports are 10,000 above these unless they are given, which may be beyond 65,535
        grpc = [
            f"-{name}.port.grpc={port}"
            for name, port in zip(("master", "volume", "filer", "s3"), _free_ports(4), strict=True)
        ]
        self._process = subprocess.Popen(
            [
                *(weed, "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
                *(
                    "-filer",
                    "-s3",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    f"-s3.config={self.folder / 's3.json'}",
                    *ports,
                    *grpc,
                ),
                *("-master.volumeSizeLimitMB=64", "-volume.max=50", "-master.telemetry=false"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(StoreError):
                self.place("ready").check_writable()
                return
            time.sleep(0.2)
        raise TimeoutError(f"{self.endpoint} did not answer in 60 s")

    def kill(self) -> None:
        """As if its machine had lost power."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def program() -> str | None:
    """Where SeaweedFS is, if it is installed."""
    return shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [taken.getsockname()[1] for taken in held]
    finally:
        for taken in held:
            taken.close()
