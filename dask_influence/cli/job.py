"""The job file: its sections as pydantic models, and errors that name line and field.

``Job.read`` gives a job of which everything is known to be well formed; what its strings mean (a
module, a file, a store) is found out by ``cli.loading``.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from dask.utils import parse_bytes
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from dask_influence import models
from dask_influence.cli.document import Document, JobError, Key, Secrets
from dask_influence.core.curvature import PRODUCTS
from dask_influence.grid import MOST_BYTES
from dask_influence.influence import InfluenceFunctionModel

HIDDEN = ("storage_options", "arguments")
"""Fields whose values are never shown."""

SHOWN_OPTIONS = ("endpoint", "endpoint_url", "region", "region_name", "base_url", "account_name")
"""Options of a store that are no secret."""


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


# -- what fields are made of ---------------------------------------------------------------
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


def _short(section: Any, name: str) -> BeforeValidator:
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


# -- model, loss ---------------------------------------------------------------------------
class Weights(Section):
    """Where the model's weights are."""

    path: str
    """A ``.safetensors`` file, or a checkpoint of ``torch.save`` that holds tensors alone (weights_only)."""
    key: str | None = None
    """Of a checkpoint that holds more than the weights: their name in it."""
    storage_options: Options


class Model(Section):
    """The model whose training data are scored."""

    factory: Reference
    """``module:name`` of what makes it: a class or a function, in the job's folder or installed."""
    arguments: Options
    """Keyword arguments of the factory."""
    weights: Annotated[Weights, _short(Weights, "path")] | None = None
    """None: the factory loads them."""


class Loss(Section):
    """The loss, mean-reduced over its leading axis."""

    function: Reference
    """``module:name`` of ``loss(output, target)``."""
    arguments: Options
    """Keyword arguments; a class is called with them, a function is bound to them."""


# -- data ----------------------------------------------------------------------------------
class Npy(Section):
    """Arrays in ``.npy`` files."""

    x: Arrays
    """One file, or a mapping of names to files."""
    y: Arrays


class Parquet(Section):
    """Columns of a Parquet file, or of all in a folder."""

    path: str
    x: str | list[str]
    """One column of lists of numbers, or columns that become features."""
    y: str | list[str]


class Data(Section):
    """Samples: exactly one of zarr, npy, parquet and dataset."""

    zarr: str | None = None
    """A Zarr group with arrays x and y; for test, also a store of factors."""
    npy: Npy | None = None
    parquet: Parquet | None = None
    dataset: Reference | None = None
    """``module:name`` of a function or class that makes a pair, a Dataset or a DataLoader."""
    arguments: Options
    """Of ``dataset``."""
    storage_options: Options
    """Credentials and client settings."""

    @model_validator(mode="after")
    def _one_kind(self) -> Data:
        given = [name for name in ("zarr", "npy", "parquet", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "kind",
                "must have exactly one of zarr, npy, parquet and dataset; has {given}",
                {"given": " and ".join(given) or "none"},
            )
        return self


class Datasets(Section):
    """Training data; and test data, unless each training point is scored on itself."""

    train: Annotated[Data, _short(Data, "zarr")]
    test: Annotated[Data, _short(Data, "zarr")] | None = None


# -- estimators: one section each, made from their own arguments ----------------------------
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


# -- reductions ----------------------------------------------------------------------------
class TopK(Section):
    """The k most helpful and most harmful points of each point."""

    name: Literal["TopK"]
    k: Annotated[int, Field(ge=1)]
    per: Literal["test", "train"] = "test"


class SelfInfluence(Section):
    """Each training point on itself; the job has no test data."""

    name: Literal["SelfInfluence"]


class GroupSum(Section):
    """Sums over groups of training points, of test points, or of both."""

    name: Literal["GroupSum"]
    labels: Ids | None = None
    """Group of each training point: a list, or a ``.npy`` file."""
    test_labels: Ids | None = None


Reduction = Annotated[TopK | SelfInfluence | GroupSum, Discriminator("name")]


# -- output and machines -------------------------------------------------------------------
class Output(Section):
    """Where scores go."""

    store: str
    """Path or URL (file, s3, gs, az)."""
    storage_options: Options
    test_ids: Ids | None = None
    """Coordinates: a list, or a ``.npy`` file."""
    train_ids: Ids | None = None
    overwrite: bool = False
    """Delete first what the store holds."""
    tile_bytes: Bytes | None = None
    memory_limit: Bytes | None = None
    """Bytes that one task may hold."""
    on_missing: Literal["raise", "warn"] = "raise"
    """What becomes of a run in which some samples could not be used."""


class Cluster(Section):
    """Workers on this machine, where no scheduler is given."""

    workers: Annotated[int, Field(ge=0)] = 1
    """Processes; 0 works in this one, without Dask."""
    threads_per_worker: Annotated[int, Field(ge=1)] = 1
    memory_limit: Bytes | None = None
    """Of each worker; by default its share of the machine."""
    dashboard_address: str | None = ":0"
    """Port of Dask's dashboard; null for none."""


class Artifacts(Section):
    """What the fit publishes and keeps, so that a killed fit goes on."""

    url: str
    storage_options: Options


class Logging(Section):
    """What is said on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Job(Section):
    """An influence job: what to fit, what to score, where to write."""

    model: Annotated[Model, _short(Model, "factory")]
    loss: Annotated[Loss, _short(Loss, "function")]
    data: Datasets
    estimator: Estimator
    mode: Literal["up", "perturbation"] = "up"
    reduce: Reduction | None = None
    """What is kept of the scores; None keeps all."""
    hessian_regularizations: list[Damping] | None = None
    """Several λ instead of the estimator's own: scores have the dimension ``regularization`` in front."""
    output: Output
    cluster: Cluster = Cluster()
    artifacts: Annotated[Artifacts, _short(Artifacts, "url")] | None = None
    logging: Logging = Logging()

    _document: Document = PrivateAttr()
    _secrets: Secrets = PrivateAttr(default_factory=Secrets)

    @classmethod
    def read(cls, path: str | os.PathLike[str], environment: Mapping[str, str] | None = None) -> Job:
        """The job in the file ``path``, with variables of the ``environment``, by default this process's.

        Raises
        ------
        JobError
            Names the line and the field of everything that is wrong, and what is allowed.
        """
        return cls.of(Document.read(path), os.environ if environment is None else environment)

    @classmethod
    def of(cls, document: Document, environment: Mapping[str, str]) -> Job:
        """The job that a document describes.

        Examples
        --------
        >>> text = "model: mine:net, loss: torch.nn:MSELoss, data: train.zarr, output: {store: a.zarr}"
        >>> text = text.replace(", ", chr(10)) + chr(10) + "estimator: {name: DirectInfluence, rank: 3}"
        >>> Job.of(Document.parse(text), {})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        dask_influence.cli.document.JobError: job, line 3: data: must be a mapping; got 'train.zarr'
        job, line 5: estimator.rank: no such field; this section has name, hessian_regularization, curvature, ...
        """
        values, secrets = document.resolved(environment)
        try:
            job = cls.model_validate(values)
        except ValidationError as error:
            raise _refusal(document, error.errors(include_url=False)) from None
        job._document, job._secrets = document, secrets.and_values(_secret_values(values))
        return job

    @property
    def document(self) -> Document:
        """The file."""
        return self._document

    @property
    def secrets(self) -> Secrets:
        """What must not be shown."""
        return self._secrets


def _secret_values(values: Any) -> list[Any]:
    """Everything that stands under ``storage_options``, but for places."""
    if isinstance(values, list):
        return [found for value in values for found in _secret_values(value)]
    if not isinstance(values, dict):
        return []
    options = values.get("storage_options")
    held = _without_places(options) if isinstance(options, dict) else []
    return [held, *(found for value in values.values() for found in _secret_values(value))]


def _without_places(options: Mapping[str, Any]) -> list[Any]:
    return [
        _without_places(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if name not in SHOWN_OPTIONS
    ]


# -- errors --------------------------------------------------------------------------------
def _refusal(document: Document, errors: list[ErrorDetails]) -> JobError:
    """One line for each field that is wrong; what several types said of one field is one line."""
    found: dict[Key, list[str]] = {}
    for error in errors:
        key, message = _described(document, error)
        if message not in found.setdefault(key, []):
            found[key].append(message)
    lines = []
    for key, messages in sorted(found.items(), key=lambda one: document.lines[document.place(one[0])]):
        arrived = _arrived(document, key)
        lines.append(str(document.refusal(key, f"{' or '.join(messages)}{arrived}")))
    return JobError("\n".join(lines))


def _described(document: Document, error: ErrorDetails) -> tuple[Key, str]:
    key = document.place(error["loc"])
    if error["type"] == "missing":
        return (*key, error["loc"][-1]), "is missing"
    if error["type"] == "unknown":
        return (*key, error["ctx"]["field"]), error["msg"]
    if error["type"] == "union_tag_not_found":
        return (*key, "name"), f"is missing; it is one of {_names(key)}"
    if error["type"] == "union_tag_invalid":
        return (*key, "name"), f"must be one of {_names(key)}"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return key, "must be a mapping"
    message = error["msg"].removeprefix("Input ")
    return key, message if message.startswith("must") else message.replace("should", "must", 1)


def _names(key: Key) -> str:
    """What the ``name`` of a section may be."""
    return ", ".join(ESTIMATORS if key == ("estimator",) else ("TopK", "SelfInfluence", "GroupSum"))


def _arrived(document: Document, key: Key) -> str:
    """What the file holds there, as it is written: variables by their names, secrets not at all."""
    if key != document.place(key) or any(part in HIDDEN for part in key):
        return ""
    value = document.shown(key)
    return "" if isinstance(value, dict | list) else f"; got {value!r}"


def schema() -> dict[str, Any]:
    """JSON schema of job files, for editors and for checks elsewhere."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}
