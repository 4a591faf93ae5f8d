"""Settings: every one has a default in influence.yaml, can be overridden, and is refused where it makes no sense."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import pytest
import torch
import yaml
from distributed import Client, LocalCluster

import dask_influence
from dask_influence import DirectInfluence, settings
from dask_influence.errors import ConfigurationError

PACKAGE = Path(settings.__file__).parent


def keys(tree: dict[str, Any], above: str = "") -> set[str]:
    return {
        key
        for name, value in tree.items()
        for key in (keys(value, f"{above}{name}.") if isinstance(value, dict) else {f"{above}{name}"})
    }


def asked_for() -> set[str]:
    """Names that the package asks its settings for."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "settings"
                and node.func.attr in ("text", "count", "nbytes", "seconds")
            ):
                found.add(ast.literal_eval(node.args[0]))
    return found


def test_every_setting_has_a_default_and_every_default_is_used() -> None:
    defaults = yaml.safe_load(settings.DEFAULTS.read_text())["influence"]
    assert keys(defaults) == asked_for()


def test_every_default_has_a_comment() -> None:
    lines = settings.DEFAULTS.read_text().splitlines()
    values = [line for line in lines if re.match(r"\s*[\w-]+: +\S", line)]
    assert len(values) >= 9
    assert all("#" in line for line in values)


def test_only_settings_read_the_configuration() -> None:
    readers = [path for path in PACKAGE.rglob("*.py") if "dask.config" in path.read_text()]
    assert [path.name for path in readers if path.name != "__init__.py"] == ["settings.py"]


def test_the_environment_overrides_a_default() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from dask_influence import settings; print(settings.nbytes('tile.target-bytes'))",
        ],
        env={**os.environ, "DASK_INFLUENCE__TILE__TARGET_BYTES": "3 MiB"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == [str(3 * 2**20)]


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("window", "many", settings.count),
        ("window", 0, settings.count),
        ("window", True, settings.count),
        ("tile.target-bytes", "3 apples", settings.nbytes),
        ("tile.target-bytes", -1, settings.nbytes),
        ("tile.target-bytes", 10**40, settings.nbytes),
        ("tile.target-bytes", "1e400 B", settings.nbytes),
        ("status-interval", "soon", settings.seconds),
        ("status-interval", "-1 s", settings.seconds),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_its_name(name: str, value: Any, read: Any) -> None:
    with dask.config.set({f"influence.{name}": value}), pytest.raises(ConfigurationError, match=name):
        read(name)


def problem() -> tuple[DirectInfluence, tuple[torch.Tensor, torch.Tensor]]:
    data = torch.randn(40, 3), torch.randn(40, 1)
    return DirectInfluence(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, 0.1), data


def test_the_tile_is_that_of_the_configuration_unless_the_call_says() -> None:
    infl, data = problem()
    infl.fit(data)
    with dask.config.set({"influence.tile.target-bytes": "800 B"}):
        assert infl.plan(data, data).tile_bytes <= 800
        assert infl.plan(data, data, tile_bytes=1600).tile_bytes > 800
    assert infl.plan(data, data).tile_bytes == 40 * 40 * 4


def test_chunks_are_those_of_the_configuration() -> None:
    infl, data = problem()
    reported: list[int] = []
    with dask.config.set({"influence.chunk.samples": 15}):
        infl.fit(data, progress=lambda stage, done, total: reported.append(total))
    assert set(reported) == {3}  # ⌈40 / 15⌉


def test_workers_follow_the_client_whatever_their_own_configuration(tmp_path: Path) -> None:
    torch_threads = {"DASK_INFLUENCE__TORCH_THREADS": "nonsense"}
    infl, data = problem()
    alone = infl.fit(data).influences_to_zarr(tmp_path / "alone", data, data).influence.values
    with (
        LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=None, env=torch_threads, memory_limit="2GiB"
        ) as cluster,
        Client(cluster) as client,
    ):
        said = client.run(lambda: os.environ["DASK_INFLUENCE__TORCH_THREADS"])
        assert set(said.values()) == {"nonsense"}
        there = DirectInfluence(infl.model, infl.loss, 0.1, client=client).fit(data)
        np.testing.assert_array_equal(there.influences(*data, *data), alone)


def test_names_are_imported_when_they_are_used() -> None:
    assert set(dask_influence.__all__) <= set(dir(dask_influence))
    for name in dask_influence.__all__:
        assert getattr(dask_influence, name).__module__.startswith("dask_influence.")
    with pytest.raises(AttributeError, match="no attribute 'ArnoldyInfluence'"):
        dask_influence.ArnoldyInfluence  # noqa: B018
