"""An S3 server in this process, and an empty place in it for every test."""

from __future__ import annotations

import itertools
import urllib.request
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.contracts.sources", "tests.contracts.stores")

from moto.server import ThreadedMotoServer  # noqa: E402

from dask_influence.storage.stores import Location  # noqa: E402

KEY, SECRET = "AKIAEXAMPLEKEYID", "an-example-secret-access-key"
_serial = itertools.count()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT")).close()
    yield endpoint
    server.stop()


@pytest.fixture
def s3(s3_endpoint: str) -> Location:
    options = {
        "endpoint": s3_endpoint,
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
    }
    return Location.of(f"s3://bucket/place-{next(_serial)}", options)
