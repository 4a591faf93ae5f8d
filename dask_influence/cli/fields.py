"""What sections of a job file are made of: a model that refuses what it does not know, and types of fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

from dask.utils import parse_bytes
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from dask_influence.grid import MOST_BYTES


class Section(BaseModel):
    """A mapping of the job file; a field that it does not know is refused, with those it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            unknown = [name for name in given if name not in cls.model_fields]
            if unknown:
                raise PydanticCustomError(
                    "unknown",
                    "no such field; this section has {allowed}",
                    {"field": unknown[0], "allowed": ", ".join(cls.model_fields)},
                )
        return given


def _bytes(given: Any) -> Any:
    if isinstance(given, str):
        try:
            return parse_bytes(given)
        except (ValueError, OverflowError):
            raise PydanticCustomError("bytes", "must be a number of bytes, such as 64 MiB") from None
    return given


def _reference(given: str) -> str:
    module, colon, name = given.partition(":")
    if not (colon and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))):
        raise PydanticCustomError(
            "reference", "must be module:name, such as torch.nn.functional:cross_entropy"
        )
    return given


def short(section: Any, name: str) -> BeforeValidator:
    """A section of which a text alone stands for the field ``name``."""
    return BeforeValidator(
        lambda given: {name: given} if isinstance(given, str) else given,
        json_schema_input_type=str | section,
    )


Bytes = Annotated[int, Field(gt=0, le=MOST_BYTES), BeforeValidator(_bytes, json_schema_input_type=int | str)]
Reference = Annotated[str, AfterValidator(_reference)]
Options = Annotated[dict[str, Any], Field(default_factory=dict, repr=False)]
Arrays = Union[str, dict[str, str]]  # noqa: UP007 - pydantic names its members
Damping = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ids = Union[str, list[int], list[str]]  # noqa: UP007
