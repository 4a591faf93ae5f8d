"""The job file: its sections as pydantic models, and errors that name line and field.

``Job.read`` gives a job of which everything is known to be well formed; what its strings mean (a
module, a file, a store) is found out by ``cli.loading``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from dask_influence.cli.document import Document, JobError, Key, Secrets
from dask_influence.cli.estimators import ESTIMATORS, Estimator
from dask_influence.cli.fields import Arrays, Bytes, Damping, Ids, Options, Reference, Section, short
from dask_influence.cli.validation import Validation

HIDDEN = ("storage_options", "arguments")
"""Fields whose values are never shown."""

SHOWN_OPTIONS = ("endpoint", "endpoint_url", "region", "region_name", "base_url", "account_name")
"""Options of a store that are no secret."""


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
    weights: Annotated[Weights, short(Weights, "path")] | None = None
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

    train: Annotated[Data, short(Data, "zarr")]
    test: Annotated[Data, short(Data, "zarr")] | None = None


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

    model: Annotated[Model, short(Model, "factory")]
    loss: Annotated[Loss, short(Loss, "function")]
    data: Datasets
    estimator: Estimator
    mode: Literal["up", "perturbation"] = "up"
    reduce: Reduction | None = None
    """What is kept of the scores; None keeps all."""
    hessian_regularizations: list[Damping] | None = None
    """Several λ instead of the estimator's own: scores have the dimension ``regularization`` in front."""
    output: Output
    cluster: Cluster = Cluster()
    artifacts: Annotated[Artifacts, short(Artifacts, "url")] | None = None
    validation: Validation | None = None
    """Of ``dask-influence validate`` alone."""
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
    return ", ".join(("TopK", "SelfInfluence", "GroupSum") if key[0] == "reduce" else ESTIMATORS)


def _arrived(document: Document, key: Key) -> str:
    """What the file holds there, as it is written: variables by their names, secrets not at all."""
    if key != document.place(key) or any(part in HIDDEN for part in key):
        return ""
    value = document.shown(key)
    return "" if isinstance(value, dict | list) else f"; got {value!r}"


def schema() -> dict[str, Any]:
    """JSON schema of job files, for editors and for checks elsewhere."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}
