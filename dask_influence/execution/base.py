"""The contract of an executor: publish, sum over chunks in a fixed order, map tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dask_influence.core.estimators import Inverse
from dask_influence.core.moments import Moments
from dask_influence.core.problem import Problem
from dask_influence.execution.artifacts import Artifact
from dask_influence.execution.forecast import Cluster
from dask_influence.execution.options import Options
from dask_influence.storage.sources import Source
from dask_influence.storage.stores import Location


class Sealed(Protocol):
    """A value that tasks open once per process."""

    def open(self) -> Any:
        """The value."""


class Model(Protocol):
    """A model in a form that tasks can carry."""

    def problem(self) -> Problem:
        """The problem, in this process."""


class Solver(Protocol):
    """An inverse curvature in a form that tasks can carry."""

    def inverse(self) -> Inverse:
        """The inverse, in this process."""


@dataclass(frozen=True)
class Approximated:
    """A solver that scores by approximate directions, and loads the ``exact`` ones only where they are wanted."""

    approximate: Solver
    exact: Solver

    def inverse(self) -> Inverse:
        """The approximate inverse, backed by the exact one."""
        return self.approximate.inverse().backed_by(self.exact.inverse)


class Executor(ABC):
    """Runs the functions of ``execution.tasks``; what they compute does not depend on it."""

    location: Location | None = None
    """Where it publishes; None is this process."""

    @property
    def memory_limit(self) -> int | None:
        """Bytes that one task may hold, where that is known."""
        return None

    @property
    def cluster(self) -> Cluster:
        """The machines that it has."""
        return Cluster()

    @abstractmethod
    def at(self, location: Location) -> Executor:
        """The same executor, with what it publishes kept at ``location``."""

    @abstractmethod
    def check_reach(self, location: Location) -> None:
        """Refuse an output store that tasks cannot write to, before anything is written."""

    @abstractmethod
    def check_options(self, options: Options) -> None:
        """Refuse options that the hardware or the software of a process that runs tasks lacks.

        Raises
        ------
        ConfigurationError
            Names the process and what it lacks.
        """

    @abstractmethod
    def publish(self, tensors: dict[str, Tensor]) -> Artifact:
        """Make tensors loadable by every task."""

    @abstractmethod
    def seal(self, value: Any) -> Sealed:
        """Wrap what all tasks of one computation share."""

    def keeping(self, job: Sealed) -> Sealed:
        """The same job for many passes, whose chunks keep what they share where tasks run in this process."""
        return job

    @abstractmethod
    def model(self, problem: Problem, device: str) -> Model:
        """Make a model available to every task."""

    @abstractmethod
    def inverse(self, inverse: Inverse, digest: Callable[[], str]) -> Solver:
        """Make an inverse curvature available to every task; its digest is made where it is needed."""

    @abstractmethod
    def reachable(self, source: Source, chunk_size: int, beside: ThreadPoolExecutor | None = None) -> Source:
        """``source`` in a form that every task can read, staged once where need be.

        With ``beside`` that goes on there while the caller does: tasks may read what :meth:`Source.wait` has
        waited for.
        """

    @abstractmethod
    def reduce(
        self,
        function: Callable[..., Moments],
        calls: Sequence[tuple[Any, ...]],
        report: Callable[[int, int], None] | None = None,
        threads: int = 1,
    ) -> Moments:
        """Σ function(*call), added in a tree whose shape depends on the number of calls alone.

        ``report`` is told how many calls are done, and how many there are; a call takes ``threads``
        torch threads.
        """

    @abstractmethod
    def map(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        lost: Callable[[tuple[Any, ...]], None] | None = None,
        threads: int | None = None,
    ) -> Iterator[Any]:
        """Results of function(*call) as they complete, in any order.

        Calls of which the workers died are handed to ``lost``, where it is given, and the rest goes on. A
        call takes ``threads`` torch threads; None stands for all that there are.
        """
