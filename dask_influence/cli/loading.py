"""What the strings of a job mean: modules, weights, samples, stores. Nothing is ever unpickled.

Every error is that of the job file: its line, the field, and what to do.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cloudpickle
import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dask_influence.cli import job as schema
from dask_influence.cli.document import JobError
from dask_influence.cli.estimators import ESTIMATORS, Estimator
from dask_influence.cli.job import Data, Job, Npy, Parquet, Weights
from dask_influence.errors import (
    ConfigurationError,
    DataError,
    InfluenceError,
    MissingObjectError,
    StoreError,
)
from dask_influence.execution.reducer import Reduction
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.reductions import GroupSum, SelfInfluence, TopK
from dask_influence.storage.sources import ArraySource, Source, as_source
from dask_influence.storage.stores import Location


@contextmanager
def at(job: Job, *key: str) -> Iterator[None]:
    """Give the errors of the field ``key`` its line, whatever kind they are of."""
    try:
        yield
    except JobError:
        raise
    except MissingObjectError as error:
        raise job.document.refusal(key, str(error)) from error
    except InfluenceError as error:
        raise type(error)(str(job.document.refusal(key, str(error)))) from error


def location(job: Job, path: str, storage_options: Mapping[str, Any]) -> Location:
    """The place that ``path`` means in the job's folder, or the URL that it is.

    Raises
    ------
    ConfigurationError
        It is no URL of a kind that is known.
    """
    if "://" not in path:
        path = str(job.document.folder / Path(path).expanduser())
    try:
        return Location.of(path, storage_options)
    except StoreError as error:
        raise ConfigurationError(str(error)) from error


def output(job: Job) -> Location:
    """The store that the job writes."""
    with at(job, "output", "store"):
        return location(job, job.output.store, job.output.storage_options)


# -- modules -------------------------------------------------------------------------------
def named(job: Job, reference: str, *key: str) -> Any:
    """What ``module:name`` is; modules of the job's folder come first, and travel to workers by value.

    Raises
    ------
    ConfigurationError
        There is no such module, it cannot be imported, or has no such name.
    """
    module_name, _, name = reference.partition(":")
    folder = str(job.document.folder)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise job.document.refusal(
            key,
            f"cannot import {module_name!r} ({type(error).__name__}: {error}); install it, or put it in {folder}",
        ) from error
    origin = getattr(module, "__file__", None)
    if origin is not None and Path(origin).is_relative_to(folder) and "site-packages" not in origin:
        with suppress(ValueError):  # a module that is none, such as __main__
            cloudpickle.register_pickle_by_value(module)  # workers need not have it
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise job.document.refusal(key, f"module {module_name!r} has no {name!r}; name what it defines")
        value = getattr(value, part)
    return value


def called(job: Job, made_by: Any, arguments: Mapping[str, Any], *key: str) -> Any:
    """What a factory of the user's makes, or the error of its call at the line of the field."""
    if not callable(made_by):
        raise job.document.refusal(
            key, f"must be a function or a class; {type(made_by).__name__} cannot be called"
        )
    try:
        inspect.signature(made_by).bind(**arguments)
    except TypeError as error:
        raise job.document.refusal(key, f"does not take these arguments: {error}") from error
    except ValueError:
        pass  # built in, without a signature: the call itself will tell
    try:
        return made_by(**arguments)
    except InfluenceError:
        raise
    except Exception as error:
        raise job.document.refusal(key, f"raised {type(error).__name__}: {error}") from error


# -- model and loss ------------------------------------------------------------------------
def model(job: Job) -> nn.Module:
    """The model with its weights."""
    made_by = named(job, job.model.factory, "model", "factory")
    made = called(job, made_by, job.model.arguments, "model", "factory")
    if not isinstance(made, nn.Module):
        raise job.document.refusal(
            ("model", "factory"), f"must make a torch.nn.Module; it made a {type(made).__name__}"
        )
    if job.model.weights is not None:
        with at(job, "model", "weights"):
            _load_weights(job, made, job.model.weights)
    return made


def _load_weights(job: Job, module: nn.Module, weights: Weights) -> None:
    place = location(job, weights.path, weights.storage_options)
    content = _content(place)
    read = _safetensors if weights.path.endswith(".safetensors") else _checkpoint
    held = read(content, place)
    if weights.key is not None:
        if not isinstance(held, Mapping) or weights.key not in held:
            raise ConfigurationError(f"{place.url} holds no {weights.key!r}; {_holds(held)}")
        held = held[weights.key]
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ConfigurationError(
            f"{place.url} is no mapping of names to tensors; {_holds(held)}. Name the weights in it with key:"
        )
    try:
        module.load_state_dict(held)
    except RuntimeError as error:
        raise ConfigurationError(
            f"{place.url} does not fit the model: {' '.join(str(error).split())}"
        ) from error


def _safetensors(content: bytes, place: Location) -> Any:
    try:
        return safetensors.torch.load(content)
    except SafetensorError as error:
        raise ConfigurationError(f"{place.url} is no safetensors file: {error}") from error


def _checkpoint(content: bytes, place: Location) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigurationError(
            f"{place.url} cannot be loaded with weights_only=True, and nothing else is ever unpickled; save "
            "model.state_dict(), with torch.save or safetensors.torch.save_file"
        ) from error


def _holds(held: Any) -> str:
    if isinstance(held, Mapping):
        return "it holds " + ", ".join(map(str, list(held)[:8]))
    return f"it holds a {type(held).__name__}"


def loss(job: Job) -> Callable[..., Tensor]:
    """``loss(output, target)``: a function, bound to its arguments, or an object of a class."""
    function = named(job, job.loss.function, "loss")
    arguments = job.loss.arguments
    if job.secrets.hide(repr(arguments)) != repr(arguments):
        raise job.document.refusal(
            ("loss", "arguments"),
            "hold what comes from the environment, and a loss's arguments are written to the store; write them out",
        )
    if isinstance(function, type):
        return called(job, function, arguments, "loss")
    return functools.partial(function, **arguments) if arguments else function


def influence(job: Job, client: Any = None) -> InfluenceFunctionModel:
    """The unfitted model of influence that the job describes."""
    return influence_of(job, job.estimator, "estimator", module=model(job), function=loss(job), client=client)


def influence_of(
    job: Job,
    estimator: Estimator,
    *key: str,
    module: nn.Module,
    function: Callable[..., Tensor],
    client: Any = None,
) -> InfluenceFunctionModel:
    """The same for the estimator of the section ``key``."""
    given = estimator.constructor_arguments()
    if given["dtype"] is not None:
        given["dtype"] = getattr(torch, given["dtype"])
    kept = job.artifacts
    with at(job, "artifacts"):
        artifacts = None if kept is None else location(job, kept.url, kept.storage_options)
    with at(job, *key):
        return ESTIMATORS[estimator.name](module, function, client=client, artifacts=artifacts, **given)


# -- samples -------------------------------------------------------------------------------
def data(job: Job, side: str) -> Source | Location | None:
    """The samples of ``data.train`` or ``data.test``; a Zarr place as it is, which may hold factors."""
    given: Data | None = getattr(job.data, side)
    if given is None:
        return None
    with at(job, "data", side):
        return _of_kind(job, given, side)


def _of_kind(job: Job, given: Data, side: str) -> Source | Location:
    options = given.storage_options
    if given.zarr is not None:
        place = location(job, given.zarr, options)
        if not any(place.exists(key) for key in ("zarr.json", ".zgroup")):
            raise ConfigurationError(
                f"no Zarr group is at {place.url}; write one with arrays x and y, or check the path"
            )
        return place
    if given.npy is not None:
        return _npy(job, given.npy, options, side)
    if given.parquet is not None:
        return _parquet(job, given.parquet, options, side)
    assert given.dataset is not None
    made_by = named(job, given.dataset, "data", side, "dataset")
    return as_source(called(job, made_by, given.arguments, "data", side, "dataset"), side)


def _npy(job: Job, given: Npy, options: Mapping[str, Any], side: str) -> Source:
    def read(files: str | dict[str, str]) -> Any:
        if isinstance(files, dict):
            return {name: array(location(job, file, options)) for name, file in files.items()}
        return array(location(job, files, options))

    return ArraySource(read(given.x), read(given.y), argument=side)


def array(place: Location) -> np.ndarray[Any, Any]:
    """The array in an ``.npy`` file, mapped where it is on this machine; one of objects is refused."""
    try:
        if place.local_path is not None and place.local_path.is_file():
            return np.asarray(np.load(place.local_path, mmap_mode="r", allow_pickle=False))
        return np.asarray(np.load(io.BytesIO(_content(place)), allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise DataError(f"{place.url} is no .npy file of numbers: {error}") from error


def _parquet(job: Job, given: Parquet, options: Mapping[str, Any], side: str) -> Source:
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError as error:
        raise ConfigurationError(
            "reading Parquet takes pyarrow: pip install 'dask_influence[parquet]'"
        ) from error
    place = location(job, given.path, options)
    wanted = list(dict.fromkeys((*_listed(given.x), *_listed(given.y))))
    tables = []
    for content in _parts(place):
        try:
            held = parquet.read_schema(BufferReader(content)).names
            missing = [name for name in wanted if name not in held]
            if missing:
                raise DataError(f"{place.url} has no column {missing[0]!r}; it has {', '.join(held)}")
            tables.append(parquet.read_table(BufferReader(content), columns=wanted))
        except (ArrowException, OSError) as error:
            raise DataError(f"{place.url} cannot be read as Parquet: {error}") from error

    def read(names: str | list[str]) -> np.ndarray[Any, Any]:
        columns = [np.concatenate([_column(t[n], n) for t in tables]) for n in _listed(names)]
        return columns[0] if isinstance(names, str) else np.stack(columns, axis=1)

    return ArraySource(read(given.x), read(given.y), argument=side)


def _column(column: Any, name: str) -> np.ndarray[Any, Any]:
    """Numbers (n,) of a column, or (n, F) of one of lists of F numbers."""
    if column.null_count:
        raise DataError(f"column {name!r} holds {column.null_count} missing values; drop or fill those rows")
    values = column.to_numpy(zero_copy_only=False) if hasattr(column, "chunks") else np.asarray(column)
    if values.dtype.kind != "O":
        return np.asarray(values)
    try:
        return np.stack([np.asarray(value) for value in values])
    except ValueError as error:
        raise DataError(f"column {name!r} holds lists of different lengths; they must be of one") from error


def _parts(place: Location) -> Iterable[bytes]:
    """The file, or every ``.parquet`` in the folder, by name."""
    files = [key for key in place.list() if key.endswith(".parquet")]
    return (place.get(key) for key in files) if files else iter([_content(place)])


def _listed(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else names


def _content(place: Location) -> bytes:
    """The bytes of the object at ``place``."""
    folder, _, name = place.url.rpartition("/")
    return Location.of(folder, place.storage_options).get(unquote(name) if place.scheme == "file" else name)


def reduction(job: Job) -> Reduction | None:
    """What is kept of the scores."""
    given = job.reduce
    with at(job, "reduce"):
        if isinstance(given, schema.TopK):
            return TopK(given.k, given.per)
        if isinstance(given, schema.GroupSum):
            return GroupSum(
                _labels(job, given.labels, "labels"),
                test_labels=_labels(job, given.test_labels, "test_labels"),
            )
        return None if given is None else SelfInfluence()


def _labels(job: Job, given: Any, field: str) -> Any:
    with at(job, "reduce", field):
        return array(location(job, given, job.output.storage_options)) if isinstance(given, str) else given


def ids(job: Job, side: str) -> Any:
    """The coordinates that ``output.test_ids`` or ``output.train_ids`` give."""
    field = f"{side}_ids"
    given = getattr(job.output, field)
    if not isinstance(given, str):
        return given
    with at(job, "output", field):
        return array(location(job, given, job.output.storage_options))
