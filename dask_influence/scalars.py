"""Numbers and flags among arguments: what they must be, checked before anything is made of them.

Nothing here imports torch, so that a plan can be read without it.
"""

from __future__ import annotations

from numbers import Integral, Real

from dask_influence.errors import ConfigurationError


def plain_integers(configuration: object, *names: str) -> None:
    """Make integers of other kinds (numpy's) Python's own, which can be written as JSON.

    For ``__post_init__`` of frozen dataclasses; whatever is no integer is left to be refused.
    """
    for name in names:
        value = getattr(configuration, name)
        if isinstance(value, Integral) and not isinstance(value, bool):
            object.__setattr__(configuration, name, int(value))


def check_integer(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """``value`` as an int, or a ConfigurationError where it is none or out of range.

    Examples
    --------
    >>> check_integer("rank", 3)
    3
    >>> check_integer("rank", "3")
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: rank must be an integer ≥ 1; got '3' (str)
    """
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if is_integer and least <= int(value) and (most is None or int(value) <= most):  # type: ignore[call-overload]
        return int(value)  # type: ignore[call-overload]
    allowed = f"an integer ≥ {least}" if most is None else f"an integer from {least} to {most}"
    raise ConfigurationError(f"{name} must be {allowed}; got {value!r} ({type(value).__name__})")


def check_flag(name: str, value: object) -> None:
    """Refuse all but True and False: what else is true, as the text "no" is, is rarely meant.

    Examples
    --------
    >>> check_flag("resume", "no")
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: resume must be True or False; got 'no' (str)
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False; got {value!r} ({type(value).__name__})")


def check_number(name: str, value: object) -> None:
    """Refuse what has no order among numbers: text, None, tensors."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigurationError(f"{name} must be a number; got {value!r} ({type(value).__name__})")
