"""Stores that are made once, and reports of them that are held against what every report keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dask_influence.report import report
from tests.report.document import Element, check, parsed
from tests.report.stores import Stores, written


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return written(tmp_path_factory.mktemp("report"))


@pytest.fixture
def made(stores: Stores, tmp_path: Path) -> Callable[..., Element]:
    """A report of one of the stores, parsed and checked."""

    def make(store: str | Path, **options: object) -> Element:
        path = report(
            stores / store if isinstance(store, str) else store, tmp_path / "report.html", **options
        )
        document = parsed(path.read_text())
        check(document)
        return document

    return make
