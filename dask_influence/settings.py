"""Settings: what ``influence.yaml`` holds, as dask.config has it now, checked where it is used.

They are read by the client alone, which sends what they say with its tasks: a worker may have other
settings, or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.config
import yaml
from dask.utils import parse_bytes, parse_timedelta

from dask_influence.errors import ConfigurationError
from dask_influence.grid import MOST_BYTES

DEFAULTS = Path(__file__).with_name("influence.yaml")


def install() -> None:
    """Merge the defaults into dask.config, below what the user's files and environment say."""
    dask.config.ensure_file(source=str(DEFAULTS))  # a copy to change, all of it commented out
    dask.config.update_defaults(yaml.safe_load(DEFAULTS.read_text()))


def text(name: str) -> str | None:
    """The setting ``influence.<name>`` as text, or None where there is none."""
    value = _value(name)
    return None if value is None else str(value)


def count(name: str, least: int = 1) -> int:
    """A whole number.

    Raises
    ------
    ConfigurationError
        It is something else, or smaller than ``least``.

    Examples
    --------
    >>> with dask.config.set({"influence.window": 5}):
    ...     count("window")
    5
    >>> with dask.config.set({"influence.window": "many"}):
    ...     count("window")
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: config influence.window must be a whole number ≥ 1; got 'many'
    """
    value = _value(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"config influence.{name} must be a whole number ≥ {least}; got {value!r}")
    return value


def nbytes(name: str) -> int | None:
    """A number of bytes, given as one or as text such as ``"64 MiB"``; None where there is none.

    >>> with dask.config.set({"influence.tile.target-bytes": "1 MiB"}):
    ...     nbytes("tile.target-bytes")
    1048576
    """
    value = _value(name)
    if value is None:
        return None
    try:
        found = int(parse_bytes(value))
    except (ValueError, TypeError, AttributeError, OverflowError):
        found = 0
    if not 1 <= found <= MOST_BYTES:
        raise ConfigurationError(
            f"config influence.{name} must be a number of bytes, such as '64 MiB'; got {value!r}"
        )
    return found


def seconds(name: str) -> float:
    """A time, given in seconds or as text such as ``"2 s"``."""
    value = _value(name)
    try:
        found = float(parse_timedelta(value))
    except (ValueError, TypeError, AttributeError, KeyError):
        found = -1.0
    if found < 0:
        raise ConfigurationError(f"config influence.{name} must be a time, such as '2 s'; got {value!r}")
    return found


def _value(name: str) -> Any:
    return dask.config.get(f"influence.{name}", None)
