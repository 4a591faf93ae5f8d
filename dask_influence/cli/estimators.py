"""Sections of a job file that name an estimator: one for each, made from its own arguments."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Discriminator, Field, create_model

from dask_influence import models
from dask_influence.cli.fields import Damping, Section
from dask_influence.core.curvature import PRODUCTS
from dask_influence.core.precision import PRECISIONS
from dask_influence.influence import InfluenceFunctionModel


class _Estimator(Section):
    name: str
    hessian_regularization: Damping | dict[str, float] = 0.0
    """λ, or one for each block of block_structure."""
    curvature: Literal[tuple(PRODUCTS)] = "hessian"  # type: ignore[valid-type]
    block_structure: Literal["layer", "parameter"] | dict[str, list[str]] | None = None
    parameters: list[str] | None = None
    """Names or glob patterns of the parameters in θ."""
    device: str = "auto"
    dtype: Literal["float32", "float64", "bfloat16"] | None = None
    compile: bool = False
    matmul_precision: Literal[PRECISIONS] = "highest"  # type: ignore[valid-type]
    """Operands of float32 products: "high" in TF32, "medium" in bfloat16."""
    chunk_size: Annotated[int, Field(ge=1)] | None = None
    certify: bool = True
    """Write factor_residual even where it takes a pass over the training data."""

    def constructor_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model, dtype by its name."""
        return {name: getattr(self, name) for name in type(self).model_fields if name != "name"}


_IN_YAML = (int, float, str, bool, dict, list, type(None))


def _yaml_type(annotation: Any) -> Any:
    """What a file can hold of a type."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is Union:
        kept = [_yaml_type(part) for part in typing.get_args(annotation)]
        return Union[tuple(part for part in kept if part is not None)]  # noqa: UP007
    origin = typing.get_origin(annotation) or annotation
    if origin is Mapping:
        return dict[str, Any]
    return annotation if origin in _IN_YAML else None


def _section(model: type[InfluenceFunctionModel]) -> type[_Estimator]:
    hints = typing.get_type_hints(model.estimator)
    own = {f.name: (_yaml_type(hints[f.name]), f.default) for f in dataclasses.fields(model.estimator)}
    name = (Literal[model.__name__], ...)
    fields: dict[str, Any] = {"name": name, **own}
    return create_model(model.__name__, __base__=_Estimator, __doc__=model.__doc__, **fields)


ESTIMATORS = {
    name: value
    for name, value in vars(models).items()
    if isinstance(value, type)
    and issubclass(value, InfluenceFunctionModel)
    and value is not InfluenceFunctionModel
}
"""The models a job may name."""

if TYPE_CHECKING:
    Estimator = _Estimator
else:
    Estimator = Annotated[Union[tuple(map(_section, ESTIMATORS.values()))], Discriminator("name")]  # noqa: UP007
