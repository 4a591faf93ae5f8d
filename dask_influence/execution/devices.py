"""Devices: which one a process computes on."""

from __future__ import annotations

import torch

from dask_influence.errors import ConfigurationError


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where this process has it, else CPU; anything else must exist here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f'device={device!r} is not a torch device; use "auto", "cpu" or "cuda"'
        ) from error
    if resolved.type == "meta":
        raise ConfigurationError(f'device={device!r} computes nothing; use "auto", "cpu" or "cuda"')
    if not _usable(resolved):
        raise ConfigurationError(f'device={device!r} is not available in this process; use "auto" or "cpu"')
    return resolved


def _usable(device: torch.device) -> bool:
    """Whether this process has the device, and float64 on it."""
    if device.type == "cuda":  # a tensor would take hundreds of MB of a client that computes nothing
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, AssertionError, ImportError, TypeError):  # each backend has a kind of its own
        return False
    return True
