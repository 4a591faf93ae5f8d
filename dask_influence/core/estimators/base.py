"""The contract of an estimator: a generator of rounds that returns an inverse curvature.

The mathematics says *what* to sum over the data and never knows who sums it. A round is
one pass over the fitted chunks; its answer is the merged :class:`Moments`. Executors
drive the generators (``execution.drive``), so that the sequential and the distributed
run execute the same code.

An estimator splits by lifetime: :class:`Estimator` is the configuration, its ``fit`` runs
once, the :class:`Inverse` it returns is applied many times, on any process.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.certificate import Certificate
from dask_influence.core.curvature import product_sums
from dask_influence.core.factored import Factored
from dask_influence.core.layers import Layout
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree
from dask_influence.core.pairs import Form
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError

ChunkFunction = Callable[[Problem, Tree, Tree, dict[str, Tensor]], Moments]
"""(problem, x, y, operand) → sums over the chunk's samples. Picklable: a module's function or a partial of one."""


@dataclass(frozen=True)
class Round:
    """One pass over the fitted data.

    Attributes
    ----------
    function : callable
        Chunk function, picklable by reference.
    operand : dict of Tensor
        What every chunk needs beside its samples; published once, CPU tensors.
    result_bytes : int
        Size of the sums of one chunk, so that an executor can bound what is in flight.
    samples : tuple of range, optional
        Sum over these runs of samples only; None stands for all. The estimator draws them,
        so that a sampled round is the same whoever sums it and however the data are cut.
    whole : bool
        Whether the function takes any number of samples that fit memory better than fewer of them.
    """

    function: ChunkFunction
    operand: dict[str, Tensor] = field(default_factory=dict)
    result_bytes: int = 0
    samples: tuple[range, ...] | None = None
    whole: bool = False


@dataclass(frozen=True)
class System:
    """The linear system (C + λI) s = g that an estimator is asked to invert.

    Attributes
    ----------
    names, shapes : tuple
        Parameters of θ in flat order, and their shapes.
    regularization : float
        λ ≥ 0, added to the curvature of the mean loss.
    curvature : str
        ``"hessian"``, ``"ggn"``, ``"fisher"`` or ``"empirical_fisher"``.
    samples : int
        Number of samples fitted.
    dtype : torch.dtype
        The model's floating dtype.
    layout : Layout, optional
        θ in layers, for estimators that are built from layers; known where the model is at hand.
    pass_cost : float
        What a pass over the data costs beside its products with single vectors, in such products.
    rounded : float
        Distance from 1 to the next operand of products, where those are rounded for speed; 0 where they are not.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    regularization: float
    curvature: str
    samples: int
    dtype: torch.dtype
    layout: Layout | None = None
    pass_cost: float = 1.0
    rounded: float = 0.0

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    def products(self, vectors: Tensor) -> Round:
        """The pass that multiplies (B, P) vectors by the curvature: ``"products"`` (B, P)."""
        function = partial(product_sums, curvature=self.curvature)
        return Round(function, {"vectors": vectors}, result_bytes=8 * vectors.numel(), whole=True)

    def damped(self, vectors: Tensor) -> Tensor:
        """λ s for rows s (n, P): what the system adds to the curvature."""
        return self.regularization * vectors

    def residuals(self, products: Tensor, gradients: Tensor, factors: Tensor) -> Tensor:
        """‖(C + λI) s − g‖ / ‖g‖ for each row s of ``factors``, whose C s are ``products``."""
        return relative_residuals(products + self.damped(factors), 0.0, gradients, factors)

    def with_regularization(self, regularization: Any) -> System:
        """The same system at another λ."""
        return replace(self, regularization=check_regularization(regularization))

    def to_json(self) -> dict[str, Any]:
        """Values for :meth:`from_json`: an inverse that asks for rounds later has to keep its system."""
        values = asdict(replace(self, layout=None)) | {"dtype": str(self.dtype).removeprefix("torch.")}
        del values["layout"], values["pass_cost"], values["rounded"]  # of one fit, on one machine
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> System:
        """Inverse of :meth:`to_json`."""
        own = {
            "names": tuple(values["names"]),
            "shapes": tuple(tuple(shape) for shape in values["shapes"]),
            "dtype": getattr(torch, values["dtype"]),
        }
        return cls(**{**values, **own})


Rounds = Generator[Round, Moments, Any]
"""A computation that asks for passes over the data and returns its result."""


def _unknown() -> None:
    """Residuals that take a pass over the data."""


@dataclass(frozen=True, eq=False)
class Solution:
    """Influence factors, and what is known of them without a pass over the data.

    Attributes
    ----------
    factors : Tensor
        (C + λI)⁻¹ g_i as rows (n, P), in float64, or in the arithmetic of gradients that hold fewer digits.
    residuals : callable
        ‖(C + λI) s_i − g_i‖ / ‖g_i‖ (n,), or None where that needs a pass; computed where it is asked for.
    """

    factors: Tensor
    residuals: Callable[[], Tensor | None] = _unknown

    @classmethod
    def measured(cls, factors: Tensor, residuals: Tensor) -> Solution:
        """Factors whose residuals are at hand."""
        return cls(factors, lambda: residuals)


INVERSES: dict[str, type[Inverse]] = {}
"""What :meth:`Inverse.state` was saved from, by kind: every subclass that names its kind."""


class Inverse(ABC):
    """(C + λI)⁻¹ as an estimator knows it: arrays and numbers, no model, no data.

    Attributes
    ----------
    kind : str
        Name under which it is saved.
    needs_rounds : bool
        Whether :meth:`solve` asks for passes over the data.
    """

    kind: ClassVar[str]
    needs_rounds: ClassVar[bool] = False
    regularization: float

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Make the class known by its kind, to whoever restores a saved inverse."""
        super().__init_subclass__(**arguments)
        if "kind" in vars(cls):
            INVERSES[cls.kind] = cls

    @abstractmethod
    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Influence factors (C + λI)⁻¹ g_i for rows g_i of any precision: (n, P) → (n, P)."""

    @property
    def residuals_need_rounds(self) -> bool:
        """Whether some residuals are not known from a solve, but take a pass over the data."""
        return False

    @property
    def directions(self) -> Tensor | Factored | None:
        """(R, P) directions that all scores are combinations of, or None (then the factors are)."""
        return None

    def coefficients(self, gradients: Tensor) -> Tensor:
        """C (n, R), so that influence factors are C @ directions."""
        raise NotImplementedError(f"{type(self).__name__} has no directions of its own")

    def weighed(self, projections: Tensor) -> Tensor:
        """Coefficients (n, R) of gradients whose products with the directions are ``projections`` (n, R)."""
        raise NotImplementedError(f"{type(self).__name__} has no directions of its own")

    @property
    def certificate(self) -> Certificate | None:
        """What tells residuals of combinations of :attr:`directions` without forming them, where that is known."""
        return None

    def approximated(self, problem: Problem, x: Tree, y: Tree, tolerance: float) -> Inverse:
        """The same with its directions in factors beside them, measured on samples to ``tolerance``."""
        raise NotImplementedError(f"{type(self).__name__} has no directions of its own")

    @property
    def approximate(self) -> Inverse | None:
        """What scores by factored directions, where there are some that are accurate enough."""
        return None

    def backed_by(self, exact: Callable[[], Inverse]) -> Inverse:
        """The same, knowing where ``exact`` directions are, if its own are not."""
        return self

    @property
    def form(self) -> Form | None:
        """Itself as something of which pairs of samples are scored without factors; or None."""
        return None

    @abstractmethod
    def with_regularization(self, regularization: float) -> Inverse:
        """The same fit at another λ, equal to a refit."""

    @abstractmethod
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values from which :meth:`from_state` makes an equal inverse."""

    @classmethod
    @abstractmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Inverse:
        """Inverse of :meth:`state`."""

    def diagnostics(self) -> dict[str, Any]:
        """What a user should know before trusting it: eigenvalues, captured spectrum, iterations."""
        return {}

    def recorded(self) -> dict[str, Any]:
        """What a store keeps of :meth:`diagnostics`: what is quickly known, and the same whatever has been solved."""
        return {} if self.needs_rounds else self.diagnostics()


@dataclass(frozen=True)
class Estimator(ABC):
    """Configuration of one algorithm; a frozen dataclass of its own arguments.

    Attributes
    ----------
    solves_by_rounds : bool
        What ``needs_rounds`` of its inverse will be, known before a fit.
    certifies_by_rounds : bool
        What ``residuals_need_rounds`` of it will be.
    inverts_products : bool
        Its inverse is one of products with the curvature, so that their error counts beside λ.
    by_layers : bool
        Its curvature is made of what layers see, which :meth:`examine` compares with gradients.
    """

    solves_by_rounds: ClassVar[bool] = False
    certifies_by_rounds: ClassVar[bool] = False
    inverts_products: ClassVar[bool] = True
    by_layers: ClassVar[bool] = False

    @property
    def tolerance(self) -> float | None:
        """Relative error of scores that factored directions may make; None takes directions as they are."""
        return None

    def directions(self, system: System) -> int | None:
        """R, the number of directions that its inverse will have of its own, or None; known before a fit."""
        return None

    def inverse_bytes(self, system: System, regularizations: int = 1) -> int:
        """Bytes of its inverse at so many λ, about, where that is more than a few gradients; known before a fit."""
        return 0

    def form(self, system: System) -> Form | None:
        """That of its inverse, without numbers; known before a fit."""
        return None

    def validate(self, system: System) -> None:  # noqa: B027 - most estimators accept any system
        """Raise :class:`ConfigurationError` where this configuration cannot be fitted to ``system``."""

    def examine(self, system: System, problem: Problem, x: Tree, y: Tree) -> None:  # noqa: B027 - most need not
        """Raise where this configuration cannot be fitted to the model, seen on a few samples."""

    @abstractmethod
    def fit(self, system: System) -> Generator[Round, Moments, Inverse]:
        """Ask for passes over the data, then return the inverse."""


def relative_residuals(products: Tensor, regularization: float, gradients: Tensor, factors: Tensor) -> Tensor:
    """‖C s + λ s − g‖ / ‖g‖ row by row, 0 where g = 0; ``products`` holds C s."""
    residual = (products + regularization * factors - gradients).norm(dim=1)
    scale = gradients.norm(dim=1)
    return torch.where(scale > 0, residual / scale, residual)


def check_regularization(value: float) -> float:
    """λ as a float, or a :class:`ConfigurationError` for a negative or non-finite one."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ConfigurationError(f"hessian_regularization must be a finite number ≥ 0; got {value!r}")
    return number


def without_rounds(computation: Generator[Round, Moments, Any]) -> Any:
    """The result of a computation that asks for no pass over the data."""
    try:
        next(computation)
    except StopIteration as finished:
        return finished.value
    raise RuntimeError("a pass over the data was asked for where none can be made; needs_rounds must say so")
