"""Bytes and seconds for people."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Bytes for people.

    >>> format_bytes(1536), format_bytes(5 * 2**30)
    ('1.5 KiB', '5.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"


def format_seconds(seconds: float) -> str:
    """Seconds for people.

    >>> format_seconds(0.25), format_seconds(75), format_seconds(7200)
    ('0.2 s', '1.2 min', '2.0 h')
    """
    for limit, unit, size in ((60, "s", 1), (3600, "min", 60), (86400, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"
