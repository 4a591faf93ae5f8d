"""Which samples are to blame where a computation raises: those that raise when they are alone."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.problem import OUT_OF_MEMORY, Problem
from dask_influence.errors import InfluenceError

MOST_POISON = 64
"""Samples of one task or batch that may fail; more of them are not the samples' fault."""

INNOCENT = (InfluenceError, *OUT_OF_MEMORY)
"""Ours name what they are about."""


def to_blame(
    function: Callable[[Problem, Tree, Tree], Any],
    problem: Problem,
    x: Tree,
    y: Tree,
    *,
    spared: Container[int] = (),
    most: int = MOST_POISON,
) -> dict[int, Exception]:
    """Places of the samples of which ``function`` alone raises, ``most`` of them at most, and what it raises.

    ``spared`` places are not tried.
    """
    found: dict[int, Exception] = {}
    problem = replace(problem, shelf=None)  # what is kept belongs to all the samples
    for place in range(leading_size(y)):
        if place in spared:
            continue
        one = slice(place, place + 1)
        try:
            function(problem, sliced(x, one), sliced(y, one))
        except INNOCENT:
            continue
        except Exception as error:  # noqa: BLE001 - the user's model or loss may raise anything
            found[place] = error
            if len(found) == most:
                break
    return found


def told(error: Exception, most: int = 300) -> str:
    r"""Kind and first line of an exception.

    >>> told(IndexError("Target 7 is out of bounds.\nAnd more"))
    'IndexError: Target 7 is out of bounds.'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:most]}" if lines else type(error).__name__
