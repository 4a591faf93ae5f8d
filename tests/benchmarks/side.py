"""One side of a comparison: what it can be asked for. This file runs in every environment."""

from __future__ import annotations

import json
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import protocol
from problems import Setting
from protocol import Measured


@dataclass(frozen=True)
class Case:
    """An estimator with its arguments on a problem; what has been fitted is kept under it."""

    setting: Setting
    estimator: str
    options: Mapping[str, Any]

    @property
    def key(self) -> str:
        """The same for equal cases."""
        return json.dumps([self.setting.name, str(self.setting.dtype), self.estimator, dict(self.options)])


class Side(ABC):
    """A package under measurement. Each public method that takes a case is one piece of work."""

    packages: ClassVar[tuple[str, ...]]

    def __init__(self, folder: Path, problems: Path) -> None:
        self.folder, self._problems = folder, problems
        self._settings: dict[tuple[str, str], Setting] = {}
        self._fitted: dict[str, Any] = {}

    def answer(self, request: dict[str, Any]) -> Measured:
        """What the work named in a request measured."""
        problem = request["problem"], request["dtype"]
        if problem not in self._settings:
            self._settings[problem] = Setting(self._problems, *problem)
        case = Case(self._settings[problem], request["estimator"], request["options"])
        return getattr(self, request["work"])(case, **request["arguments"])

    def fit(self, case: Case) -> Measured:
        """Fit in this process, and keep what was fitted."""
        seconds, self._fitted[case.key] = protocol.timed(self.fitting(case))
        return seconds, {}

    def fitted(self, case: Case) -> Any:
        """What was fitted last, or is now, outside of the timed part."""
        if case.key not in self._fitted:
            self.fit(case)
        return self._fitted[case.key]

    @abstractmethod
    def fitting(self, case: Case) -> Any:
        """The function of no argument that fits and is timed."""

    @abstractmethod
    def scores(self, case: Case, tests: int) -> Measured:
        """All scores in this process, the way that serves the package best."""

    def new_store(self) -> str:
        """A path that does not exist yet."""
        return tempfile.mkdtemp(dir=self.folder) + "/scores.zarr"


def serve(kind: type[Side]) -> None:
    """Answer requests for work by what that method of the side measures."""
    folder, problems = (Path(argument) for argument in sys.argv[1:3])
    protocol.serve(kind.packages, kind(folder, problems).answer)
