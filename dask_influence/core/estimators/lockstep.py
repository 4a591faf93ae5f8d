"""Computations in step: several generators of rounds whose requests of one step are one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dask_influence.core.estimators.base import ChunkFunction, Round
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Objective, Tree
from dask_influence.core.problem import Problem
from dask_influence.errors import InfluenceError, InfluenceWarning


def restricted(problem: Problem, names: Sequence[str]) -> Problem:
    """The same problem with θ narrowed to ``names``."""
    objective = problem.objective
    return replace(problem, objective=Objective(objective.module, objective.loss, names))


def joint_sums(
    problem: Problem,
    x: Tree,
    y: Tree,
    operand: dict[str, Tensor],
    parts: Sequence[tuple[str, tuple[str, ...], ChunkFunction]],
) -> Moments:
    """Chunk function: the sums that each computation asks for, under names of its own.

    ``parts`` holds (prefix, parameters, chunk function); what a part counts is a sum too.
    """
    total: dict[str, Tensor] = {}
    for prefix, names, function in parts:
        own = {key.removeprefix(prefix): value for key, value in operand.items() if key.startswith(prefix)}
        moments = function(restricted(problem, names), x, y, own)
        total |= {prefix + key: value for key, value in moments.total.items()}
        total[f"{prefix}*"] = torch.tensor(float(moments.count), dtype=torch.float64)
    return Moments(total, 1)


def _combined(requests: Mapping[int, Round], owners: Sequence[tuple[str, ...]]) -> Round:
    """One pass that answers all ``requests``, which are over the same samples."""
    parts = tuple((f"{i}.", owners[i], request.function) for i, request in requests.items())
    operand = {f"{i}.{key}": v for i, request in requests.items() for key, v in request.operand.items()}
    first = next(iter(requests.values()))
    size = sum(request.result_bytes for request in requests.values())
    return Round(partial(joint_sums, parts=parts), operand, size, first.samples)


def _answer(moments: Moments, index: int) -> Moments:
    prefix = f"{index}."
    own = {key.removeprefix(prefix): v for key, v in moments.total.items() if key.startswith(prefix)}
    return Moments(own, int(own.pop("*")))


def in_step(
    computations: Sequence[Generator[Round, Moments, Any]],
    owners: Sequence[tuple[str, ...]],
    within: Sequence[Callable[[], Any]] | None = None,
) -> Generator[Round, Moments, list[Any]]:
    """Results of all ``computations``, whose rounds of one step are one pass.

    Parameters
    ----------
    computations : sequence of generator
        What to run.
    owners : sequence of tuple of str
        The parameters that each is about.
    within : sequence of callable, optional
        Makes the context in which each is advanced.
    """
    results: list[Any] = [None] * len(computations)
    answers: dict[int, Moments | None] = dict.fromkeys(range(len(computations)))
    while answers:
        requests: dict[int, Round] = {}
        for index, answer in answers.items():
            with nullcontext() if within is None else within[index]():
                request, results[index] = _advanced(computations[index], answer)
            if request is not None:
                requests[index] = request
        answers = {}
        for alike in _over_the_same_samples(requests):
            moments = yield _combined(alike, owners)
            answers |= {index: _answer(moments, index) for index in alike}
    return results


def _advanced(
    computation: Generator[Round, Moments, Any], answer: Moments | None
) -> tuple[Round | None, Any]:
    """The next round of a computation, or None and its result."""
    try:
        return computation.send(answer), None  # type: ignore[arg-type]
    except StopIteration as finished:
        return None, finished.value


def _over_the_same_samples(requests: Mapping[int, Round]) -> Iterator[dict[int, Round]]:
    for samples in dict.fromkeys(request.samples for request in requests.values()):
        yield {index: request for index, request in requests.items() if request.samples == samples}


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Errors and warnings of this package begin with ``what`` they are about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", InfluenceWarning)
        try:
            yield
        except InfluenceError as error:
            raise type(error)(f"{what}: {error}") from error
    for warning in caught:
        warned = issubclass(warning.category, InfluenceWarning)
        message = f"{what}: {warning.message}" if warned else str(warning.message)
        warnings.warn(message, warning.category, stacklevel=2)
