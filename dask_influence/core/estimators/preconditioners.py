"""Preconditioners: cheap approximations of C + λI that make conjugate gradient converge sooner.

A configuration (:class:`Preconditioner`) splits off what is fitted once from C alone
(:class:`Preconditioning`), so that λ can change without another pass. The Nyström sketch is
shared with the estimator of the same name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.checks import SEEDS
from dask_influence.core.estimators.base import Round, System
from dask_influence.core.moments import Moments
from dask_influence.errors import ConfigurationError
from dask_influence.scalars import check_integer, plain_integers


class Preconditioning(ABC):
    """A fitted preconditioner: multiplies rows by an approximation of (C + λI)⁻¹.

    Attributes
    ----------
    kind : str
        Name under which it is saved.
    """

    kind: ClassVar[str]

    @abstractmethod
    def apply(self, rows: Tensor, regularization: float) -> Tensor:
        """M⁻¹ r for rows (B, P), with M symmetric and positive definite."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What :meth:`from_tensors` takes."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Preconditioning:
        """Inverse of :meth:`tensors`."""


class Diagonal(Preconditioning):
    """1 / (diag(C) + λ).

    Parameters
    ----------
    values : Tensor
        Estimate of diag(C), (P,). What it says of small and negative entries is noise: they
        are raised to a hundredth of the mean magnitude, which keeps M positive definite.
    """

    kind: ClassVar[str] = "jacobi"

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._floor = max(0.01 * values.abs().mean().item(), torch.finfo(torch.float64).tiny)

    def apply(self, rows: Tensor, regularization: float) -> Tensor:
        """Divide each entry."""
        return rows / (self.values.clamp_min(self._floor) + regularization)

    def tensors(self) -> dict[str, Tensor]:
        """The diagonal."""
        return {"diagonal": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Diagonal:
        """From the diagonal."""
        return cls(tensors["diagonal"])


@dataclass(frozen=True)
class Sketch:
    """A low-rank approximation V Λ Vᵀ of C.

    Attributes
    ----------
    vectors : Tensor
        V as rows (R, P), orthonormal, float64.
    values : Tensor
        Λ (R,), falling.
    """

    vectors: Tensor
    values: Tensor

    def inverse_times(self, rows: Tensor, regularization: float, complement: float) -> Tensor:
        """V (Λ + λ)⁻¹ Vᵀ r + (I − V Vᵀ) r / complement for rows (B, P)."""
        inside = rows @ self.vectors.mT  # (B, R)
        weights = 1 / (self.values + regularization) - 1 / complement
        return (inside * weights) @ self.vectors + rows / complement


class LowRank(Preconditioning):
    """A Nyström sketch as a preconditioner, with its smallest eigenvalue for the complement.

    Parameters
    ----------
    sketch : Sketch
        Its negative eigenvalues are left out.
    """

    kind: ClassVar[str] = "nystroem"

    def __init__(self, sketch: Sketch) -> None:
        positive = sketch.values > 0
        self.sketch = Sketch(sketch.vectors[positive], sketch.values[positive])

    def apply(self, rows: Tensor, regularization: float) -> Tensor:
        """V (Λ + λ)⁻¹ Vᵀ r + (I − V Vᵀ) r / (Λ_R + λ): equation 1.3 of the paper, unscaled."""
        if len(self.sketch.values) == 0:
            return rows
        tail = self.sketch.values.min().item() + regularization
        return self.sketch.inverse_times(rows, regularization, tail)

    def tensors(self) -> dict[str, Tensor]:
        """Vectors and values of the sketch."""
        return {"sketch_vectors": self.sketch.vectors, "sketch_values": self.sketch.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LowRank:
        """From vectors and values."""
        return cls(Sketch(tensors["sketch_vectors"], tensors["sketch_values"]))


@dataclass(frozen=True)
class Preconditioner(ABC):
    """Configuration of a preconditioner; subclass it to bring one of your own.

    A frozen dataclass whose field ``kind`` names it, with the :class:`Preconditioning` that
    :meth:`fit` returns registered in ``PRECONDITIONINGS`` if it is to be saved.
    """

    def validate(self, system: System) -> None:  # noqa: B027 - most accept any system
        """Raise :class:`ConfigurationError` where it cannot be fitted to ``system``."""

    @abstractmethod
    def fit(self, system: System) -> Generator[Round, Moments, Preconditioning]:
        """Ask for passes over the data, then return the preconditioning."""


def _check_integers(preconditioner: Any, count: str) -> None:
    """Refuse a ``count`` that is not positive, and a seed that torch does not take."""
    kind = type(preconditioner).__name__
    plain_integers(preconditioner, count, "seed")
    check_integer(f"{count} of {kind}", getattr(preconditioner, count))
    check_integer(f"seed of {kind}", preconditioner.seed, *SEEDS)


@dataclass(frozen=True)
class JacobiPreconditioner(Preconditioner):
    """The diagonal of C by Hutchinson's estimator: mean of z ⊙ C z over random signs z; one pass.

    Parameters
    ----------
    probes : int
        Vectors z, multiplied in the one pass.
    seed : int
        Of the signs.

    Raises
    ------
    ConfigurationError
        A number that is none, or no positive one.

    Examples
    --------
    >>> JacobiPreconditioner(probes=8)
    JacobiPreconditioner(probes=8, seed=0, kind='jacobi')

    References
    ----------
    Bekas, Kokiopoulou & Saad 2007, "An estimator for the diagonal of a matrix".
    """

    probes: int = 32
    seed: int = 0
    kind: str = field(default="jacobi", init=False)

    def __post_init__(self) -> None:
        """At least one probe."""
        _check_integers(self, "probes")

    def fit(self, system: System) -> Generator[Round, Moments, Diagonal]:
        """One pass."""
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.probes, system.size), generator=generator).to(torch.float64)
        signs = 2 * signs - 1
        moments = yield system.products(signs)
        return Diagonal((signs * moments.mean("products")).mean(dim=0))


@dataclass(frozen=True)
class NystroemPreconditioner(Preconditioner):
    """A randomised Nyström sketch of C; one pass.

    Parameters
    ----------
    rank : int
        R, products taken in the one pass; at most P.
    seed : int
        Of the test matrix.

    Raises
    ------
    ConfigurationError
        A number that is none, or no positive rank.

    Examples
    --------
    >>> NystroemPreconditioner(rank=50)
    NystroemPreconditioner(rank=50, seed=0, kind='nystroem')

    References
    ----------
    Frangella, Tropp & Udell 2023, "Randomized Nyström Preconditioning".
    """

    rank: int = 20
    seed: int = 0
    kind: str = field(default="nystroem", init=False)

    def __post_init__(self) -> None:
        """A positive rank; one above P is taken as P, where the sketch is the whole of C."""
        _check_integers(self, "rank")

    def fit(self, system: System) -> Generator[Round, Moments, LowRank]:
        """One pass."""
        return LowRank((yield from nystroem_sketch(system, min(self.rank, system.size), self.seed)))


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "jacobi": JacobiPreconditioner,
    "nystroem": NystroemPreconditioner,
}
"""What ``preconditioner=`` takes by name."""

PRECONDITIONINGS: dict[str, type[Preconditioning]] = {kind.kind: kind for kind in (Diagonal, LowRank)}
"""What a fitted preconditioner is loaded as, by kind."""


def as_preconditioner(given: Any) -> Preconditioner | None:
    """A configuration from its name, from the mapping that it is saved as, or from itself.

    Raises
    ------
    ConfigurationError
        None of these.

    Examples
    --------
    >>> as_preconditioner("jacobi")
    JacobiPreconditioner(probes=32, seed=0, kind='jacobi')
    >>> as_preconditioner({"kind": "nystroem", "rank": 7, "seed": 1})
    NystroemPreconditioner(rank=7, seed=1, kind='nystroem')
    """
    if given is None or isinstance(given, Preconditioner):
        return given
    values = dict(given) if isinstance(given, Mapping) else {"kind": given}
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in PRECONDITIONERS:
        raise ConfigurationError(
            f"preconditioner must be None, {', '.join(map(repr, PRECONDITIONERS))} or a Preconditioner such as "
            f"NystroemPreconditioner(rank=50); got {given!r}"
        )
    known = [field.name for field in fields(PRECONDITIONERS[kind]) if field.init]
    unknown = [name for name in values if name not in known]
    if unknown:
        raise ConfigurationError(
            f"preconditioner {kind!r} has no argument {unknown[0]!r}; its own are {', '.join(known)}"
        )
    return PRECONDITIONERS[kind](**values)


LONG = 1000
"""P / R from which random rows need not be made orthogonal."""


def nystroem_sketch(system: System, rank: int, seed: int) -> Generator[Round, Moments, Sketch]:
    """Ĉ = Y (Ωᵀ Y)⁺ Yᵀ with Y = C Ω, by one pass, as its eigenpairs.

    Ω (P, R) has the range of ``torch.randn(R, P)ᵀ`` from a generator seeded with ``seed``, in
    float64. For an indefinite C the formula still holds, with negative eigenvalues.
    """
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(rank, system.size, generator=generator, dtype=torch.float64)
    # Only the range of Ω counts, and long random rows are as good as orthogonal ones.
    test = test / system.size**0.5 if system.size >= LONG * rank else torch.linalg.qr(test.mT).Q.mT
    # Rounded to the model's dtype here, so that Y belongs to the Ω that is multiplied below.
    test = test.to(system.dtype).to(torch.float64)
    moments = yield system.products(test)
    return sketch_of(test, moments.mean("products"), torch.finfo(system.dtype).eps)


def sketch_of(test: Tensor, images: Tensor, precision: float) -> Sketch:
    """Eigenpairs of Y (Ωᵀ Y)⁺ Yᵀ from Ω and Y = C Ω, both as rows (R, P).

    Directions of Ω on which C vanishes to ``precision`` carry no information and are left out. The rows of
    Ω are (all but) orthonormal: what rounding adds to Ωᵀ Y is about ``precision`` of its largest eigenvalue,
    however many rows there are; decomposing it in float64 adds that epsilon for each row.
    """
    core = test @ images.mT
    values, rotation = torch.linalg.eigh((core + core.mT) / 2)
    noise = max(2 * precision, len(test) * torch.finfo(torch.float64).eps)
    kept = values.abs() > noise * values.abs().max()
    half = (rotation[:, kept].mT @ images) / values[kept].abs().sqrt()[:, None]  # Ĉ = halfᵀ diag(sign) half
    orthonormal, triangle = torch.linalg.qr(half.mT)
    small = (triangle * values[kept].sign()) @ triangle.mT
    eigenvalues, vectors = torch.linalg.eigh((small + small.mT) / 2)
    return Sketch((orthonormal @ vectors).mT.flip(0).contiguous(), eigenvalues.flip(0))
