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
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f'device={device!r} is not available in this process; use "auto" or "cpu"')
    return resolved
