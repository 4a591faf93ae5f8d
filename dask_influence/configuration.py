"""What a user asks for: the constructor arguments that scores depend on, checked.

What they do not depend on (client, device, chunk size …) is in ``execution.resources``.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dask_influence import arguments
from dask_influence.core.checks import check_kind
from dask_influence.core.curvature import PRODUCTS
from dask_influence.core.estimators import Estimator, System
from dask_influence.core.estimators.blocks import (
    BlockDiagonal,
    BlockSystem,
    Regularization,
    Structure,
    check_regularizations,
    check_structure,
)
from dask_influence.core.layers import Layout
from dask_influence.core.objective import Loss, Objective
from dask_influence.core.precision import check_precision
from dask_influence.errors import ConfigurationError
from dask_influence.scalars import check_flag


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Model, loss, λ, estimator and curvature, as a user's model was made with them.

    Attributes
    ----------
    name : str
        Of the user's model, such as ``"DirectInfluence"``.
    own : Estimator
        The estimator with its own arguments.
    model, loss, hessian_regularization, curvature, block_structure, parameters, dtype, compile, matmul_precision
        As for :class:`~dask_influence.InfluenceFunctionModel`.

    Raises
    ------
    ConfigurationError
        An argument cannot be used; names it, what arrived and what to do.
    """

    name: str
    own: Estimator
    model: nn.Module
    loss: Loss
    hessian_regularization: Regularization
    curvature: str
    block_structure: Structure
    parameters: Sequence[str] | None
    dtype: torch.dtype | None
    compile: bool = False
    matmul_precision: str = "highest"

    def __post_init__(self) -> None:
        check_structure(self.block_structure)
        regularization = check_regularizations(self.hessian_regularization, self.block_structure)
        if not isinstance(self.model, nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module; got {type(self.model).__name__}")
        check_kind(self.model)
        if self.parameters is not None and not _names(self.parameters):
            raise ConfigurationError(
                "parameters must be None or a list of names or glob patterns of the model's parameters, such as "
                f"['layer.*']; got {self.parameters!r}"
            )
        if not callable(self.loss):
            raise ConfigurationError(
                f"loss must be callable as loss(output, target); got {type(self.loss).__name__}"
            )
        if not isinstance(self.curvature, str) or self.curvature not in PRODUCTS:
            raise ConfigurationError(
                f"curvature must be one of {', '.join(map(repr, PRODUCTS))}; got {self.curvature!r}"
            )
        if self.dtype is not None and not (
            isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        ):
            raise ConfigurationError(
                f"dtype must be a floating torch dtype such as torch.float64; got {self.dtype!r}"
            )
        check_flag("compile", self.compile)
        check_precision(self.matmul_precision)
        object.__setattr__(self, "hessian_regularization", regularization)
        object.__setattr__(self, "block_structure", _listed(self.block_structure))

    def with_regularization(self, hessian_regularization: Regularization) -> Configuration:
        """The same at another λ."""
        return dataclasses.replace(self, hessian_regularization=hessian_regularization)

    @property
    def estimator(self) -> Estimator:
        """The estimator of the full matrix, or of each of its blocks."""
        return self.own if self.block_structure is None else BlockDiagonal(self.own)

    def objective(self, device: torch.device) -> Objective:
        """Loss of a private copy of the model on ``device``, as a function of θ."""
        found = Objective.of(self.model, self.loss, self.parameters, device=device, dtype=self.dtype)
        if self.matmul_precision != "highest" and found.dtype != torch.float32:
            dtype = str(found.dtype).removeprefix("torch.")
            raise ConfigurationError(
                f"matmul_precision={self.matmul_precision!r} is one of float32 products, and the model computes in "
                f"{dtype}; use matmul_precision='highest', or dtype=torch.float32"
            )
        return found

    def system(self, objective: Objective, samples: int, layout: Layout | None = None) -> System:
        """The system asked for; λ of the blocks is in the block system alone."""
        regularization = self.hessian_regularization
        system = System(
            objective.names,
            tuple(tuple(shape) for shape in objective.shapes),
            0.0 if isinstance(regularization, Mapping) else regularization,
            self.curvature,
            samples,
            objective.dtype,
            layout,
        )
        if self.block_structure is None:
            return system
        return BlockSystem.of(system, self.block_structure, regularization)

    def described(self) -> dict[str, Any]:
        """Everything that JSON can say of it, the same in every session; the model's weights are not in it."""
        return {
            "loss": arguments.described(self.loss),
            "estimator": self.name,
            "curvature": self.curvature,
            "hessian_regularization": self.hessian_regularization,
            "block_structure": self.block_structure,
            "compile": self.compile,
            "matmul_precision": self.matmul_precision,
            "configuration": dataclasses.asdict(self.own),
        }


def _names(given: object) -> bool:
    return isinstance(given, Collection) and all(isinstance(name, str) for name in given)


def _listed(structure: Structure) -> Structure:
    """Blocks as lists of names, which a record of JSON gives back unchanged."""
    if not isinstance(structure, Mapping):
        return structure
    return {
        str(block): [names] if isinstance(names, str) else list(names) for block, names in structure.items()
    }


# -- the estimator's own arguments ---------------------------------------------------------
def configured(name: str, estimator: type[Estimator], own: Mapping[str, Any]) -> Estimator:
    """The estimator with its ``own`` arguments; a TypeError where the model ``name`` has no such."""
    known = [field.name for field in dataclasses.fields(estimator)]
    unknown = sorted(set(own) - set(known))
    if unknown:
        raise TypeError(
            f"{name} has no argument {unknown[0]!r}; its own are {', '.join(known) or 'none'}, see help({name})"
        )
    return estimator(**own)


def signature(constructor: Callable[..., None], estimator: type[Estimator]) -> inspect.Signature:
    """Signature of a user's model: that of ``constructor``, the estimator's arguments after the first three."""
    shared = inspect.signature(constructor).parameters.values()
    names = [p for p in shared if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in dataclasses.fields(estimator)
    ]
    return inspect.Signature(names[:3] + own + names[3:])
