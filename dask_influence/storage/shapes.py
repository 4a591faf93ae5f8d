"""Shapes: what the fields of a stored JSON object look like, so that whoever reads them need not look again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Shape = Callable[[Any], bool]
"""Whether a value of JSON is of some shape."""


def misshapen(fields: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[str]:
    """Names of the ``fields`` that are not of their shape; what has none is not looked at.

    >>> misshapen({"rows": [0, 3], "shards": 5, "note": None}, {"rows": items(whole, whole), "shards": listed(record)})
    ['shards']
    """
    return [name for name, shape in shapes.items() if name in fields and not shape(fields[name])]


def anything(value: Any) -> bool:
    """Whatever there is."""
    return True


def text(value: Any) -> bool:
    """A string that can be stored."""
    return isinstance(value, str) and (
        value.isascii() or not any("\ud800" <= one <= "\udfff" for one in value)
    )


def name(value: Any) -> bool:
    """What an object of a store may be called, so that no other is touched in its place."""
    return (
        isinstance(value, str) and value.isprintable() and not {"", ".", ".."}.intersection(value.split("/"))
    )


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def number(value: Any) -> bool:
    """A number of any kind."""
    return type(value) in (int, float)


def whole(value: Any) -> bool:
    """A number from 0 on."""
    return type(value) is int and value >= 0


def count(value: Any) -> bool:
    """A number from 1 on."""
    return type(value) is int and value >= 1


def record(value: Any) -> bool:
    """Name, bytes and checksum of a stored object."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and name(value[0])
        and whole(value[1])
        and isinstance(value[2], str)
    )


def listed(of: Shape) -> Shape:
    """A list of any length."""
    return lambda value: isinstance(value, list) and all(map(of, value))


def items(*shapes: Shape) -> Shape:
    """A list of just these."""
    return lambda value: (
        isinstance(value, list)
        and len(value) == len(shapes)
        and all(shape(one) for shape, one in zip(shapes, value, strict=True))
    )


def holding(**shapes: Shape) -> Shape:
    """An object with these fields, and maybe others."""
    return lambda value: (
        isinstance(value, dict) and value.keys() >= shapes.keys() and not misshapen(value, shapes)
    )


def mapped(of: Shape) -> Shape:
    """An object of any names."""
    return lambda value: isinstance(value, dict) and all(map(of, value.values()))


def either(*choices: Any) -> Shape:
    """One of these values, or what is of one of these shapes."""
    return lambda value: any(
        choice(value) if callable(choice) else value is choice or (type(value) is str and value == choice)
        for choice in choices
    )
