"""Jobs in folders of their own: a factory, weights, data and the job file, as a user keeps them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config
import distributed  # noqa: F401 - its defaults are there before any test's configuration is kept
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
import zarr

from tests import data
from tests.cli.jobs import FACTORY, Folder

TEST, TRAIN = 7, 53


@pytest.fixture(autouse=True)
def _configuration() -> Iterator[None]:
    """Dask's configuration as it was: a client that finds no scheduler leaves itself in it, and its process ends."""
    before = copy.deepcopy(dask.config.config)
    yield
    dask.config.config.clear()
    dask.config.config.update(before)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A small classifier of digits, 53 training points in Zarr, 7 test points in npy files."""
    x, y = (tensor.numpy() for tensor in data.digits())
    x = x.astype(np.float32)
    group = zarr.create_group(tmp_path / "train.zarr")
    group.create_array("x", data=x[:TRAIN], chunks=(11, 64))
    group.create_array("y", data=y[:TRAIN], chunks=(11,))
    np.save(tmp_path / "x.npy", x[TRAIN : TRAIN + TEST])
    np.save(tmp_path / "y.npy", y[TRAIN : TRAIN + TEST])
    (tmp_path / "cli_job_model.py").write_text(FACTORY)
    torch.manual_seed(0)
    safetensors.torch.save_file(torch.nn.Linear(64, 10).state_dict(), tmp_path / "weights.safetensors")
    return Folder(tmp_path, x, y)


@pytest.fixture
def job(folder: Folder) -> Callable[..., Path]:
    """Writes the job file of the folder, with sections replaced."""

    def write(**sections: Any) -> Path:
        content = {
            "model": {"factory": "cli_job_model:net", "weights": "weights.safetensors"},
            "loss": "torch.nn.functional:cross_entropy",
            "data": {"train": "train.zarr", "test": {"npy": {"x": "x.npy", "y": "y.npy"}}},
            "estimator": {"name": "DirectInfluence", "hessian_regularization": 0.5, "curvature": "ggn"},
            "output": {"store": "scores.zarr", "tile_bytes": 600},
            "cluster": {"workers": 0},
        }
        path = folder.path / "job.yaml"
        path.write_text(yaml.safe_dump(content | sections))
        return path

    return write
