"""Sweep: one fit at several λ, so that one pass over the training data scores them all.

What (C + λI)⁻¹ shares at all λ (a spectrum, the directions, the passes of an iterative solver)
is used once. Rows are test-major: row i·L + l belongs to test point i and the l-th λ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.certificate import Certificate
from dask_influence.core.estimators.base import (
    INVERSES,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.estimators.factored import FactoredInverse
from dask_influence.core.estimators.lockstep import in_step
from dask_influence.core.factored import Factored
from dask_influence.core.moments import Moments
from dask_influence.core.pairs import Form
from dask_influence.errors import ConfigurationError


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """L arrays (n, ...) as one (n·L, ...), the index of the array running fastest.

    Examples
    --------
    >>> interleaved([torch.tensor([1, 2]), torch.tensor([10, 20])]).tolist()
    [1, 10, 2, 20]
    """
    return torch.stack(list(parts), dim=1).flatten(0, 1)


def _residuals(solved: Sequence[Solution]) -> Tensor | None:
    """Those of every λ, (n·L,), where all are known."""
    found = [own.residuals() for own in solved]
    known = [own for own in found if own is not None]
    return interleaved(known) if len(known) == len(found) else None


def check_sweep(regularizations: Any) -> list[float]:
    """Several λ, each once.

    Raises
    ------
    ConfigurationError
        They are no sequence of numbers ≥ 0, none at all, or one occurs twice.

    Examples
    --------
    >>> check_sweep((0.1, 1))
    [0.1, 1.0]
    """
    if isinstance(regularizations, (str, Mapping)) or not isinstance(regularizations, Iterable):
        raise ConfigurationError(
            "hessian_regularization must be a sequence of numbers here, one for each result (for one other λ: "
            f"with_regularization); got {regularizations!r}"
        )
    values = [check_regularization(value) for value in regularizations]
    if not values or len(set(values)) < len(values):
        raise ConfigurationError(f"hessian_regularization must hold distinct numbers; got {values}")
    return values


@dataclass(frozen=True)
class SweepSystem(System):
    """The systems (C + λ_l I) s = g of one curvature, as one with L rows for each test point.

    Attributes
    ----------
    systems : tuple of System
        One for each λ.
    """

    systems: tuple[System, ...] = ()

    @classmethod
    def of(cls, systems: Sequence[System]) -> SweepSystem:
        """From systems that differ in λ alone."""
        first = systems[0]
        own = {f.name: getattr(first, f.name) for f in dataclasses.fields(System)}
        return cls(**own, systems=tuple(systems))

    def products(self, vectors: Tensor) -> Round:
        """The pass that multiplies vectors by the curvature, which is the same at every λ."""
        return self.systems[0].products(vectors)

    def residuals(self, products: Tensor, gradients: Tensor, factors: Tensor) -> Tensor:
        """Those of every λ, for products and factors (n·L, P) and gradients (n, P): (n·L,)."""
        count = len(self.systems)
        return interleaved(
            [
                system.residuals(products[at::count], gradients, factors[at::count])
                for at, system in enumerate(self.systems)
            ]
        )


class SweepInverse(Inverse):
    """(C + λ_l I)⁻¹ for L values of λ; rows of its results are (n·L, ...), test-major.

    Parameters
    ----------
    parts : sequence of Inverse
        One for each λ, of one fit.
    names : tuple of str
        Parameters of θ.
    """

    kind: ClassVar[str] = "sweep"

    def __init__(self, parts: Sequence[Inverse], names: Sequence[str]) -> None:
        self.parts, self.names = tuple(parts), tuple(names)
        self.regularization = min(part.regularization for part in self.parts)

    @property
    def needs_rounds(self) -> bool:  # type: ignore[override]
        """Whether solving takes passes, at every λ alike."""
        return self.parts[0].needs_rounds

    @property
    def residuals_need_rounds(self) -> bool:
        """Whether certifying does."""
        return self.parts[0].residuals_need_rounds

    @property
    def directions(self) -> Tensor | Factored | None:
        """Those of the fit, which do not depend on λ."""
        return self.parts[0].directions

    def coefficients(self, gradients: Tensor) -> Tensor:
        """Those of every λ, (n·L, R)."""
        return interleaved([part.coefficients(gradients) for part in self.parts])

    def weighed(self, projections: Tensor) -> Tensor:
        """Those of every λ, (n·L, R)."""
        return interleaved([part.weighed(projections) for part in self.parts])

    @property
    def certificate(self) -> Certificate | None:
        """That of the fit, which does not depend on λ."""
        return self.parts[0].certificate

    @property
    def approximate(self) -> SweepInverse | None:
        """Factored directions that are accurate enough at every λ, with the least of their limits."""
        found = [part.approximate for part in self.parts]
        held = [part for part in found if isinstance(part, FactoredInverse)]
        if len(held) < len(found):
            return None
        limit = min(part.factored.limit for part in held)
        return SweepInverse([part.limited(limit) for part in held], self.names)

    def backed_by(self, exact: Callable[[], Inverse]) -> SweepInverse:
        """Every λ, whose directions are the same."""

        def first() -> Inverse:
            whole = exact()
            assert isinstance(whole, SweepInverse)
            return whole.parts[0]

        return SweepInverse([part.backed_by(first) for part in self.parts], self.names)

    @cached_property
    def form(self) -> Form | None:
        """That of all λ."""
        forms = [part.form for part in self.parts]
        held = [form for form in forms if form is not None]
        return None if len(held) < len(forms) else held[0].joined(held[1:])

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Factors at every λ, (n·L, P); where that takes passes, all λ share them."""
        solved = yield from in_step(
            [part.solve(gradients) for part in self.parts], [self.names] * len(self.parts)
        )
        return Solution(interleaved([own.factors for own in solved]), partial(_residuals, solved))

    def with_regularization(self, regularization: float) -> Inverse:
        """One λ of the same fit."""
        return self.parts[0].with_regularization(regularization)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Those of every λ; what they share is held once."""
        tensors: dict[str, Tensor] = {}
        names: dict[tuple[Any, ...], str] = {}
        parts = []
        for at, part in enumerate(self.parts):
            own, values = part.state()
            keys = {}
            for key, tensor in own.items():
                place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                keys[key] = names.setdefault(place, f"{at}.{key}")
                tensors.setdefault(keys[key], tensor)
            parts.append({"kind": part.kind, "values": values, "tensors": keys})
        return tensors, {"parts": parts, "names": list(self.names)}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> SweepInverse:
        """Each λ by the kind it was saved under."""
        parts = [
            INVERSES[part["kind"]].from_state(
                {key: tensors[name] for key, name in part["tensors"].items()}, part["values"]
            )
            for part in values["parts"]
        ]
        return cls(parts, values["names"])
