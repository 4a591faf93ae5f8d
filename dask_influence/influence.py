"""The models a user holds: configure, fit once, ask many times.

:class:`InfluenceFunctionModel` is the one interface; what differs between estimators is
their configuration (``core.estimators``), so each model here is a name, a docstring and
one line that says which estimator it drives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import version
from os import PathLike
from typing import Any, ClassVar, Self

import dask.config
import numpy as np
import torch
import xarray as xr
from torch import nn

from dask_influence import arguments
from dask_influence.core.checks import check_kind, check_loss
from dask_influence.core.curvature import PRODUCTS, check_curvature
from dask_influence.core.estimators import (
    Estimator,
    Inverse,
    Round,
    SweepInverse,
    SweepSystem,
    System,
)
from dask_influence.core.estimators.blocks import (
    BlockDiagonal,
    BlockSystem,
    Regularization,
    Structure,
    check_regularizations,
    check_structure,
)
from dask_influence.core.estimators.sweep import check_sweep
from dask_influence.core.forms import Forms
from dask_influence.core.layers import Layout, layout_of
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Loss, Objective
from dask_influence.core.problem import Problem, behaviour, prepare, with_mixed_form
from dask_influence.errors import (
    ConfigurationError,
    DataError,
    DataWarning,
    LossError,
    NotFittedError,
    SampleMixingError,
    StoreError,
    StoreMismatchError,
)
from dask_influence.execution import memory, persistence, tasks
from dask_influence.execution.base import Executor
from dask_influence.execution.dask import DaskExecutor
from dask_influence.execution.drive import Passes, drive
from dask_influence.execution.lazy import Blocks, lazy_factors, lazy_rows, lazy_scores, row_blocks
from dask_influence.execution.local import LocalExecutor
from dask_influence.execution.plan import Plan, Work, arrange, factor_names, strip_names
from dask_influence.execution.run import (
    Fit,
    Output,
    StoredFactors,
    factor_templates,
    required,
    score_templates,
    write_factors,
    write_scores,
)
from dask_influence.execution.shipping import resolve_device
from dask_influence.grid import Chunks
from dask_influence.storage.results import open_influences
from dask_influence.storage.sources import DaskSource, Source, as_source, check_finite
from dask_influence.storage.stores import Location

LARGE_MODEL = 2**16
"""Parameters from which one process uses all its torch threads."""

DEFAULT_CHUNK = 256
"""Training samples summed in one call, unless data or caller say otherwise."""

CHUNK_BYTES = 512 * 2**20
"""Bytes that the activations of one chunk may take, whatever chunks the data come in."""

SAMPLES_CHECKED = 64
"""Samples on which the loss is checked before a fit; derivatives are checked on a few of them."""


class InfluenceMode(StrEnum):
    """What a score measures: the effect of removing a sample, or of perturbing its input."""

    Up = "up"
    Perturbation = "perturbation"


class InfluenceFunctionModel:
    """Influence of training points on test points: + g_testᵀ (C + λI)⁻¹ g_train.

    C is the curvature of the *mean* loss over the fitted data. A positive score says that
    the training point helps the test point: leaving it out raises the test loss by about
    score / n. In perturbation mode a score is ∇x ⟨(C + λI)⁻¹ g_test, ∇θ ℓ(z_train)⟩, one
    number for each feature of the training input.

    Parameters
    ----------
    model : torch.nn.Module
        Copied at :meth:`fit` and put in eval mode; the one given is never changed.
    loss : callable
        ``loss(output, target)``, mean-reduced over the leading axis, as in
        :mod:`torch.nn.functional`.
    hessian_regularization : float or mapping
        λ ≥ 0, added to the curvature of the mean loss; with ``block_structure`` also a λ for
        each block, by its name.
    curvature : str
        ``"hessian"``: the second derivative of the mean loss; ``"ggn"``: the generalised
        Gauss-Newton matrix; ``"fisher"``: the expectation under the model's own predictions,
        for losses that are a likelihood; ``"empirical_fisher"``: the mean of g gᵀ.
    block_structure : None, str or mapping
        None is the full matrix. Otherwise only its diagonal blocks count: ``"layer"``, one for
        each module that owns parameters, by its path; ``"parameter"``, one for each
        parameter; or parameter names (or glob patterns) by block name.
    parameters : sequence of str, optional
        Names or glob patterns of the parameters in θ; by default all that require gradients.
    device : str
        ``"auto"`` is CUDA where a process has it.
    dtype : torch.dtype, optional
        Floating dtype to compute in; by default the model's own.
    chunk_size : int, optional
        Training samples summed in one call; by default that of the data, or 256. Results
        do not depend on it beyond rounding.
    client : distributed.Client, optional
        Cluster that does the work; None works in this process.
    artifacts : str or path, optional
        URL that every worker can read and write, for what is published to them. By default
        (and config ``influence.artifacts.url``) a temporary folder, where all workers share
        this host's files.
    certify : bool
        Write ``factor_residual`` even where it takes a pass over the training data.

    Raises
    ------
    ConfigurationError
        An argument cannot be used; names it, what arrived and what to do.

    References
    ----------
    Koh & Liang 2017, "Understanding Black-box Predictions via Influence Functions", with the
    sign and the scale of pyDVL.
    """

    estimator: ClassVar[type[Estimator]]

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        hessian_regularization: Regularization = 0.0,
        *,
        curvature: str = "hessian",
        block_structure: Structure = None,
        parameters: Sequence[str] | None = None,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        client: Any = None,
        artifacts: str | PathLike[str] | None = None,
        certify: bool = True,
        **own: Any,
    ) -> None:
        if type(self) is InfluenceFunctionModel:
            raise TypeError(
                "InfluenceFunctionModel is abstract; use DirectInfluence or another of its models"
            )
        self.configuration = self._configured(own)
        check_structure(block_structure)
        self.hessian_regularization = check_regularizations(hessian_regularization, block_structure)
        if not isinstance(model, nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module; got {type(model).__name__}")
        check_kind(model)
        if not callable(loss):
            raise ConfigurationError(
                f"loss must be callable as loss(output, target); got {type(loss).__name__}"
            )
        if curvature not in PRODUCTS:
            raise ConfigurationError(
                f"curvature must be one of {', '.join(map(repr, PRODUCTS))}; got {curvature!r}"
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ConfigurationError(
                f"dtype must be a floating torch dtype such as torch.float64; got {dtype!r}"
            )
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ConfigurationError(f"chunk_size must be a positive integer; got {chunk_size!r}")
        resolve_device(device)
        self.model, self.loss, self.curvature = model, loss, curvature
        self.block_structure = (
            {
                str(block): [names] if isinstance(names, str) else list(names)
                for block, names in block_structure.items()
            }
            if isinstance(block_structure, Mapping)
            else block_structure
        )
        self.parameters, self.device, self.dtype = parameters, device, dtype
        self.chunk_size, self.client, self.artifacts, self.certify = chunk_size, client, artifacts, certify
        self._fitted: _Fitted | None = None
        self._cluster: DaskExecutor | None = None
        self._mixed: Problem | None = None  # the fitted problem, its input gradient checked too

    def __init_subclass__(cls, estimator: type[Estimator], **kwargs: Any) -> None:
        """Give the model its estimator, and a signature that shows the estimator's arguments."""
        super().__init_subclass__(**kwargs)
        cls.estimator = estimator
        shared = inspect.signature(InfluenceFunctionModel.__init__).parameters.values()
        names = [p for p in shared if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
        own = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in dataclasses.fields(estimator)
        ]
        cls.__signature__ = inspect.Signature(names[:3] + own + names[3:])  # type: ignore[attr-defined]

    @classmethod
    def _configured(cls, own: Mapping[str, Any]) -> Estimator:
        known = [f.name for f in dataclasses.fields(cls.estimator)]
        unknown = sorted(set(own) - set(known))
        if unknown:
            raise TypeError(
                f"{cls.__name__} has no argument {unknown[0]!r}; its own are {', '.join(known) or 'none'}, "
                f"see help({cls.__name__})"
            )
        return cls.estimator(**own)

    def __getstate__(self) -> dict[str, Any]:
        # A client belongs to its process; what needs it again (passes over the data) stays behind with it.
        state = {**self.__dict__, "client": None, "_cluster": None}
        if self.client is not None and self._fitted is not None:
            state["_fitted"] = dataclasses.replace(self._fitted, passes=None)
        return state

    def __repr__(self) -> str:
        fitted = "fitted" if self._fitted else "not fitted"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, λ={self.hessian_regularization}, {fitted})"
        )

    # -- fit --------------------------------------------------------------------------
    def fit(self, train: Any) -> Self:
        """Estimate the curvature of the mean loss over ``train``; returns self.

        Parameters
        ----------
        train : pair, Dataset, DataLoader, or path
            ``(x, y)`` of tensors, numpy or dask arrays (each may be a tuple or mapping of
            them); a map-style torch Dataset; a DataLoader (order and ``drop_last`` ignored);
            the path or URL of a Zarr group with arrays ``x`` and ``y``.

        Raises
        ------
        DataError, LossError, SampleMixingError, DerivativeError
            Data, loss or model cannot be used; nothing has run on the cluster then.
        SingularCurvatureError
            C + λI cannot be inverted.
        """
        source = as_source(train, "train")
        executor = self._executor()
        objective = self._objective()
        sample = self._sample(objective, source, "train")
        system, estimator = self._system(objective, len(source), layout_of(objective)), self._estimator()
        estimator.validate(system)
        problem, report = prepare(objective, *sample)
        check_curvature(problem, *sample, self.curvature)
        estimator.examine(system, problem, *sample)
        passes = _Counted(self._passes(executor, problem, source))
        inverse = drive(estimator.fit(system), passes)
        counts = {
            "samples": len(source),
            "parameters": system.size,
            "curvature": self.curvature,
            "passes": passes.count,
            "derivatives": report,
        }
        digest = persistence.inverse_digest(inverse)
        if inverse.needs_rounds:  # its factors depend on the data beyond what it holds
            digest = f"{digest}-{source.digest()}"
        self._fitted = _Fitted(
            problem, system, inverse, passes.answer, digest, counts, behaviour(objective, *sample)
        )
        return self

    def with_regularization(self, hessian_regularization: Regularization) -> Self:
        """A new fitted model at another λ that shares this fit; equal to a refit."""
        fitted = self._require_fit()
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.hessian_regularization = check_regularizations(hessian_regularization, self.block_structure)
        other._fitted = dataclasses.replace(
            fitted,
            system=fitted.system.with_regularization(other.hessian_regularization),
            inverse=fitted.inverse.with_regularization(other.hessian_regularization),
        )
        return other

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What a user should know before trusting the scores.

        Samples, parameters, λ, passes over the data, the form of each derivative and how it
        was checked; extreme eigenvalues, spectrum, iterations and residuals as the estimator
        knows them.
        """
        fitted = self._require_fit()
        return {
            **fitted.counts,
            "hessian_regularization": self.hessian_regularization,
            **fitted.inverse.diagnostics(),
        }

    # -- in memory, or lazily ---------------------------------------------------------
    def influences(
        self,
        x_test: Any,
        y_test: Any,
        x: Any = None,
        y: Any = None,
        mode: InfluenceMode | str = InfluenceMode.Up,
    ) -> Any:
        """Scores of every training point for every test point.

        Parameters
        ----------
        x_test, y_test : arrays
            N test points: tensors, numpy or dask arrays, or tuples or mappings of them.
        x, y : arrays, optional
            M training points; by default the test points themselves.
        mode : InfluenceMode or str
            ``"up"`` or ``"perturbation"``.

        Returns
        -------
        scores
            (N, M), or (N, M, *features) in perturbation mode, of the kind of ``x_test``; a
            lazy dask array where any input is one, chunked like the inputs. Its dtype is
            the model's floating dtype.
        """
        fitted, mode = self._require_fit(), _mode(mode)
        test = as_source((x_test, y_test), "x_test, y_test")
        train = self._train_source(x, y, test)
        sources = (test, train)
        if any(isinstance(source, DaskSource) for source in sources):
            return self._lazy_influences(fitted, test, train, mode)
        self._check_query(fitted, test, "x_test, y_test")
        if train is not test:
            self._check_query(fitted, train, "x, y")
        if self.client is not None:
            return arguments.like(self._through_store(test, train, mode), x_test, fitted.system.dtype)
        fit = self._fit(fitted, LocalExecutor(), self._problem(fitted, mode, train))
        plan, project = self._plan(fitted, test, train, mode, alone=True), self._projects()
        factors = memory.factors_in_memory(
            fit, test, test.argument, plan.factor_rows, plan.batch, project=project
        )
        scores = memory.scores_in_memory(
            fit,
            factors,
            train,
            train.argument,
            plan,
            project=project,
            perturbation=mode is InfluenceMode.Perturbation,
        )
        return arguments.like(scores, x_test, fitted.system.dtype)

    def influence_factors(self, x: Any, y: Any) -> Any:
        """Influence factors (C + λI)⁻¹ g_i, shape (N, P), of the kind of ``x``.

        Columns are in the order of the model's named parameters in θ.
        """
        fitted = self._require_fit()
        test = as_source((x, y), "test (x, y)")
        plan = self._plan(fitted, test, test, InfluenceMode.Up)
        if isinstance(test, DaskSource):
            blocks = Blocks.of(test)
            fit = self._fit(fitted, self._executor(), fitted.problem)
            parts = lazy_factors(fit, blocks, plan.batch, project=False)
            return lazy_rows(fit, parts, blocks.sizes, fitted.system.size)
        self._check_query(fitted, test, "test (x, y)")
        fit = self._fit(fitted, LocalExecutor(), fitted.problem)
        factors = memory.factors_in_memory(fit, test, "x, y", plan.factor_rows, plan.batch, project=False)
        return arguments.like(tasks.stored(factors), x, fitted.system.dtype)

    def influences_from_factors(
        self, factors: Any, x: Any, y: Any, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> Any:
        """Scores (N, M) or (N, M, *features) from factors (N, P) of :meth:`influence_factors`."""
        fitted, mode = self._require_fit(), _mode(mode)
        train = as_source((x, y), "x, y")
        shape = tuple(getattr(factors, "shape", ()))
        if len(shape) != 2 or shape[1] != fitted.system.size:
            raise DataError(
                f"factors must have shape (N, P = {fitted.system.size}), as influence_factors returns; got {shape}"
            )
        if isinstance(train, DaskSource) or hasattr(factors, "dask"):
            return self._lazy_from_factors(fitted, factors, train, mode)
        self._check_query(fitted, train, "x, y")
        fit = self._fit(fitted, LocalExecutor(), self._problem(fitted, mode, train))
        rows = torch.as_tensor(factors).detach().cpu().to(fitted.system.dtype)
        if not torch.isfinite(rows).all():
            raise DataError("factors hold NaN or inf; compute them again")
        plan = arrange(self._work(fitted, len(rows), train, mode, rank=None), alone=True)
        scores = memory.scores_in_memory(
            fit, rows, train, "x, y", plan, project=False, perturbation=mode is InfluenceMode.Perturbation
        )
        return arguments.like(scores, factors, fitted.system.dtype)

    # -- to a store -------------------------------------------------------------------
    def influences_to_zarr(
        self,
        store: str | PathLike[str] | Location,
        test: Any,
        train: Any,
        *,
        mode: InfluenceMode | str = InfluenceMode.Up,
        reduce: None = None,
        hessian_regularization: Sequence[float] | None = None,
        test_ids: Any = None,
        train_ids: Any = None,
        resume: bool = True,
        overwrite: bool = False,
        memory_limit: int | None = None,
        tile_bytes: int | None = None,
        progress: bool | Callable[[str, int, int], None] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Write the scores to a Zarr group and open it: planned, windowed, resumable.

        Parameters
        ----------
        store : str or path
            Path or URL (``file``, ``s3``, ``gs``, ``az``, ``memory``).
        test : data, or path
            As for :meth:`fit`; or the path of a store of factors that
            :meth:`influence_factors_to_zarr` wrote.
        train : data
            As for :meth:`fit`.
        mode : InfluenceMode or str
            ``"up"`` or ``"perturbation"``.
        hessian_regularization : sequence of float, optional
            Several λ instead of the model's own: the result has one more dimension in front,
            ``regularization``, and the training data are differentiated for all of them at once.
        test_ids, train_ids : array of int or str, optional
            Coordinates of the result; by default positions.
        resume : bool
            Continue what the store already holds of this same run.
        overwrite : bool
            Delete whatever the store holds first.
        memory_limit : int, optional
            Bytes that one task may hold; by default what the workers have.
        tile_bytes : int, optional
            Bytes of one tile, the unit of writing.
        progress : bool or callable, optional
            True shows bars; a callable gets (stage, done, total).
        storage_options : mapping, optional
            Credentials and endpoint of the store; never written or shown.

        Returns
        -------
        xarray.Dataset
            As :func:`open_influences` returns it.

        Raises
        ------
        StoreMismatchError
            The store holds something else; names what differs.
        MemoryLimitError
            The plan does not fit; quotes the bytes needed and allowed.
        DataError, StoreError, ClusterError
            Nothing has been written then.
        """
        fitted, mode = self._swept(hessian_regularization), _mode(mode)
        if reduce is not None:
            raise ConfigurationError(f"reduce must be None (keep every score); got {reduce!r}")
        location = Location.of(store, storage_options)
        train_source = as_source(train, "train", storage_options)
        held = StoredFactors.found(test, storage_options)
        if held is None:
            fitted.check_solvable()
        test_source = held or as_source(test, "test", storage_options)
        executor = self._executor()
        project = self._projects() and held is None
        plan = self._plan(
            fitted,
            test_source,
            train_source,
            mode,
            tile_bytes=tile_bytes,
            memory_limit=memory_limit,
            project=project,
        ).validate(memory_limit or executor.memory_limit)
        ids = {
            "test": arguments.ids(test_ids, test_source, "test_ids"),
            "train": arguments.ids(train_ids, train_source, "train_ids"),
        }
        if fitted.sweep is not None:
            ids["regularization"] = np.array(fitted.sweep)
        if held is not None:
            if fitted.sweep is not None:
                raise ConfigurationError(
                    f"hessian_regularization={fitted.sweep} needs test data: {held.location.url} holds factors of one λ"
                )
            held.check(self._identity(fitted))
            if test_ids is None:
                ids["test"] = held.ids
        output = Output(
            location,
            {
                **self._identity(fitted),
                "kind": "scores",
                "mode": mode.value,
                "test": test_source.digest(),
                "train": train_source.digest(),
                **arguments.id_digests(ids),
            },
            {**self._provenance(fitted), "mode": mode.value},
            ids,
        )
        names = tuple(f"feature_{axis}" for axis in range(len(plan.work.features)))
        templates = score_templates(plan, self._score_dtype(fitted), names)
        if isinstance(test_source, Source):
            self._check_query(fitted, test_source, "test")
        self._check_query(fitted, train_source, "train")
        problem = self._problem(fitted, mode, train_source)
        executor.check_reach(location)
        plan, complete = output.prepare(plan, templates, strip_names, resume=resume, overwrite=overwrite)
        if not complete:
            executor = executor.at(output.artifacts)
            write_scores(
                executor,
                self._fit(fitted, executor, problem),
                test_source,
                train_source,
                output,
                plan,
                project=project,
                perturbation=mode is InfluenceMode.Perturbation,
                progress=progress,
            )
        return open_influences(location)

    def influence_factors_to_zarr(
        self,
        store: str | PathLike[str] | Location,
        test: Any,
        *,
        test_ids: Any = None,
        resume: bool = True,
        overwrite: bool = False,
        memory_limit: int | None = None,
        progress: bool | Callable[[str, int, int], None] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Write the influence factors (N, P) of ``test`` to a Zarr group, to be scored any number of times.

        Arguments are those of :meth:`influences_to_zarr`, which takes the store in place of
        test data.
        """
        fitted = self._require_fit()
        fitted.check_solvable()
        location = Location.of(store, storage_options)
        source = as_source(test, "test", storage_options)
        executor = self._executor()
        plan = self._plan(
            fitted, source, source, InfluenceMode.Up, memory_limit=memory_limit, project=False
        ).validate(memory_limit or executor.memory_limit)
        ids = {"test": arguments.ids(test_ids, source, "test_ids")}
        output = Output(
            location,
            {
                **self._identity(fitted),
                "kind": "factors",
                "test": source.digest(),
                **arguments.id_digests(ids),
            },
            self._provenance(fitted),
            ids,
        )
        templates = factor_templates(plan, self._score_dtype(fitted))
        self._check_query(fitted, source, "test")
        executor.check_reach(location)
        plan, complete = output.prepare(plan, templates, factor_names, resume=resume, overwrite=overwrite)
        if not complete:
            executor = executor.at(output.artifacts)
            fit = self._fit(fitted, executor, fitted.problem)
            write_factors(executor, fit, source, output, plan, progress)
        return open_influences(location)

    def plan(
        self,
        test: Any,
        train: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
        reduce: None = None,
        *,
        hessian_regularization: Sequence[float] | None = None,
        tile_bytes: int | None = None,
        memory_limit: int | None = None,
    ) -> Plan:
        """How :meth:`influences_to_zarr` would cut the work; pure, no task runs.

        ``str(plan)`` is a table of tiles, strips, passes, bytes and time;
        ``plan.validate(memory_limit)`` raises where it does not fit.
        """
        fitted = self._swept(hessian_regularization)
        held = StoredFactors.found(test, None)
        source = held or as_source(test, "test")
        return self._plan(
            fitted,
            source,
            as_source(train, "train"),
            _mode(mode),
            tile_bytes=tile_bytes,
            memory_limit=memory_limit,
            project=self._projects() and held is None,
        )

    # -- saving -----------------------------------------------------------------------
    def save(self, url: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        """Write the fit as arrays and JSON, never a pickle; model and loss are given again to :meth:`load`."""
        fitted = self._require_fit()
        record = {
            "class": type(self).__name__,
            "model": persistence.model_digest(fitted.problem.objective.module),
            "parameters": list(fitted.system.names),
            "curvature": self.curvature,
            "hessian_regularization": self.hessian_regularization,
            "block_structure": self.block_structure,
            "configuration": dataclasses.asdict(self.configuration),
            "samples": fitted.system.samples,
            "dtype": str(fitted.system.dtype).removeprefix("torch."),
            "forms": dataclasses.asdict(fitted.problem.forms),
            "activations": fitted.problem.activations,
            "fit": fitted.digest,
            "counts": fitted.counts,
            "loss": arguments.described(self.loss),
            "behaviour": fitted.behaviour,
        }
        persistence.save(Location.of(url, storage_options), fitted.inverse, record)

    @classmethod
    def load(
        cls,
        url: str | PathLike[str],
        model: nn.Module,
        loss: Loss,
        client: Any = None,
        storage_options: Mapping[str, Any] | None = None,
        train: Any = None,
        **options: Any,
    ) -> Self:
        """A fitted model from what :meth:`save` wrote and the same ``model`` and ``loss``.

        ``train``, the data that the model was fitted on, is needed where factors are solved or
        certified by passes over them (:class:`CgInfluence`, :class:`LissaInfluence`).
        ``options`` are those of the constructor that a fit does not depend on (``device``,
        ``artifacts``, ``certify``).

        Raises
        ------
        StoreError
            Nothing is saved there, or by another class.
        StoreMismatchError
            The model has other weights or parameters than the one that was fitted.
        DataError
            ``train`` has another number of samples than the data fitted.
        """
        location = Location.of(url, storage_options)
        saved = persistence.load(location)
        record = saved.record
        if record["class"] != cls.__name__:
            raise StoreError(
                f"{location.url} was saved by {record['class']}; load it with {record['class']}.load"
            )
        dtype: torch.dtype = getattr(torch, record["dtype"])
        loaded = cls(
            model,
            loss,
            record["hessian_regularization"],
            curvature=record["curvature"],
            block_structure=record["block_structure"],
            parameters=record["parameters"],
            dtype=dtype,
            client=client,
            **record["configuration"],
            **options,
        )
        objective = loaded._objective()
        persistence.check_model(location, record, objective)
        if arguments.described(loss) != record["loss"]:
            raise StoreMismatchError(
                f"{location.url} was fitted with the loss {record['loss']}; got {arguments.described(loss)}"
            )
        system = loaded._system(objective, record["samples"])
        problem = Problem(objective, Forms(**record["forms"]), record["activations"])
        loaded._fitted = _Fitted(
            problem, system, saved.inverse, None, record["fit"], record["counts"], record["behaviour"]
        )
        if train is not None:
            source = as_source(train, "train", storage_options)
            loaded._check_fitted_data(source)
            passes = loaded._passes(loaded._executor(), problem, source)
            loaded._fitted = dataclasses.replace(loaded._fitted, passes=passes)
        return loaded

    def _check_fitted_data(self, source: Source) -> None:
        """Refuse training data of another length than those fitted; warn where they may differ."""
        fitted = self._require_fit()
        if len(source) != fitted.system.samples:
            raise DataError(
                f"train holds {len(source)} samples, and the model was fitted on {fitted.system.samples}; "
                "give the data that it was fitted on"
            )
        objective = fitted.problem.objective
        shown = behaviour(objective, *self._sample(objective, source, "train"))
        if shown != fitted.behaviour:
            raise StoreMismatchError(
                f"loss and gradient norm of the first samples of train are {', '.join(shown)}, and were "
                f"{', '.join(fitted.behaviour)} when the model was fitted; give the loss, the model and the data "
                "of that fit"
            )
        fitted_data = fitted.digest.partition("-")[2]
        if fitted_data and fitted_data != source.digest():
            warnings.warn(
                DataWarning(
                    "train is not known to be the data that the model was fitted on: their digests differ, as they do "
                    "for other data and for the same data in a Zarr store"
                ),
                stacklevel=3,
            )

    # -- what the methods above share -------------------------------------------------
    def _require_fit(self) -> _Fitted:
        if self._fitted is None:
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call .fit(train) first")
        return self._fitted

    def _swept(self, regularizations: Sequence[float] | None) -> _Fitted:
        """The fit at the model's own λ, or at several."""
        fitted = self._require_fit()
        if regularizations is None:
            return fitted
        values = check_sweep(regularizations)
        inverses = [fitted.inverse.with_regularization(value) for value in values]
        systems = [fitted.system.with_regularization(value) for value in values]
        return dataclasses.replace(
            fitted, inverse=SweepInverse(inverses, fitted.system.names), system=SweepSystem.of(systems)
        )

    def _objective(self) -> Objective:
        return Objective.of(
            self.model, self.loss, self.parameters, device=resolve_device(self.device), dtype=self.dtype
        )

    def _system(self, objective: Objective, samples: int, layout: Layout | None = None) -> System:
        """The system asked for; λ of the blocks is in the block system alone."""
        mapping = isinstance(self.hessian_regularization, Mapping)
        system = System(
            objective.names,
            tuple(tuple(shape) for shape in objective.shapes),
            0.0 if mapping else self.hessian_regularization,
            self.curvature,
            samples,
            objective.dtype,
            layout,
        )
        if self.block_structure is None:
            return system
        return BlockSystem.of(system, self.block_structure, self.hessian_regularization)

    def _estimator(self) -> Estimator:
        return self.configuration if self.block_structure is None else BlockDiagonal(self.configuration)

    def _executor(self) -> Executor:
        if self.client is None:
            return LocalExecutor()
        if self._cluster is None or self._cluster.client is not self.client:
            url = self.artifacts or dask.config.get("influence.artifacts.url", None)
            self._cluster = DaskExecutor(self.client, None if url is None else Location.of(url))
        self._cluster.check()
        return self._cluster

    def _passes(self, executor: Executor, problem: Problem, source: Source) -> Passes:
        """What answers rounds over ``source``."""
        chunks = Chunks(len(source), self._chunk_size(source, problem))
        reachable = executor.reachable(source, chunks.size)
        job = tasks.Job(executor.model(problem, self.device), reachable, "train", self._threads(problem))
        return Passes(executor, executor.seal(job), chunks)

    def _threads(self, problem: Problem) -> int:
        """torch threads per task: one on a cluster and for small models, what the process owns otherwise.

        It is the same wherever a small model runs, so that its scores are the same bits.
        """
        configured = dask.config.get("influence.torch-threads", None)
        if configured is not None:
            return int(configured)
        if self.client is not None or problem.objective.size < LARGE_MODEL:
            return 1
        return torch.get_num_threads()

    def _chunk_size(self, source: Source, problem: Problem) -> int:
        if self.chunk_size is not None:
            return min(self.chunk_size, len(source))
        most = max(1, CHUNK_BYTES // (8 * problem.activations * problem.objective.dtype.itemsize))
        return min(source.chunk_size or DEFAULT_CHUNK, most, len(source))

    def _sample(self, objective: Objective, source: Source, argument: str) -> tuple[Any, Any]:
        batch = source.read(0, min(SAMPLES_CHECKED, len(source)))
        check_finite(batch, argument)
        x, y = tasks.to_tensors(batch, objective)
        return x, y

    def _check_query(self, fitted: _Fitted, source: Source, argument: str) -> None:
        """Refuse data of a query that a fit would refuse, by their first samples and before anything runs."""
        objective = fitted.problem.objective
        sample = self._sample(objective, source, argument)
        try:
            check_loss(objective, *sample)
        except (DataError, LossError, SampleMixingError) as error:
            raise type(error)(f"{argument}: {error}") from error

    def _train_source(self, x: Any, y: Any, test: Source) -> Source:
        if (x is None) != (y is None):
            raise DataError("x and y must be given together, or neither (then the test data are both sides)")
        return test if x is None else as_source((x, y), "x, y")

    def _projects(self) -> bool:
        return self._require_fit().inverse.directions is not None

    def _score_dtype(self, fitted: _Fitted) -> np.dtype[Any]:
        return tasks.stored(torch.empty(0, dtype=fitted.system.dtype)).dtype

    def _problem(self, fitted: _Fitted, mode: InfluenceMode, train: Source) -> Problem:
        """The fitted problem, its input gradient checked on training data where the mode needs it."""
        if mode is InfluenceMode.Up:
            return fitted.problem
        if self._mixed is None or self._mixed.objective is not fitted.problem.objective:
            sample = self._sample(fitted.problem.objective, train, train.argument)
            self._mixed = with_mixed_form(fitted.problem, *sample)
        return self._mixed

    def _fit(self, fitted: _Fitted, executor: Executor, problem: Problem) -> Fit:
        """The fit in the form that tasks of ``executor`` can carry."""
        return Fit(
            executor.model(problem, self.device),
            fitted.inverse,
            executor.inverse(fitted.inverse, fitted.published),
            fitted.system,
            fitted.passes,
            self.certify,
            self._threads(problem),
        )

    def _work(
        self, fitted: _Fitted, tests: int, train: Source, mode: InfluenceMode, *, rank: int | None
    ) -> Work:
        features = arguments.features(train) if mode is InfluenceMode.Perturbation else ()
        return Work(
            tests=tests,
            trains=len(train),
            features=features,
            parameters=fitted.system.size,
            rank=rank,
            itemsize=self._score_dtype(fitted).itemsize,
            activations=fitted.problem.activations,
            sample_bytes=train.nbytes_per_sample,
            regularizations=None if fitted.sweep is None else len(fitted.sweep),
        )

    def _plan(
        self,
        fitted: _Fitted,
        test: Any,
        train: Source,
        mode: InfluenceMode,
        *,
        project: bool | None = None,
        **limits: Any,
    ) -> Plan:
        project = self._projects() if project is None else project
        own = fitted.inverse.directions if project else None
        rank = None if own is None else len(own)
        work = self._work(fitted, len(test), train, mode, rank=rank)
        return arrange(work, spread=not fitted.inverse.needs_rounds, **limits)

    def _through_store(self, test: Source, train: Source, mode: InfluenceMode) -> np.ndarray[Any, Any]:
        """In-memory answer of a cluster: a run into its artifacts, read back and deleted."""
        scratch = self._executor().location
        assert scratch is not None
        location = scratch.child(f"scores-{secrets.token_hex(8)}")
        try:
            return np.asarray(self.influences_to_zarr(location, test, train, mode=mode)["influence"])
        finally:
            location.delete()

    def _lazy_influences(self, fitted: _Fitted, test: Source, train: Source, mode: InfluenceMode) -> Any:
        fit, project = (
            self._fit(fitted, self._executor(), self._problem(fitted, mode, train)),
            self._projects(),
        )
        plan = self._plan(fitted, test, train, mode)
        blocks = Blocks.of(test)
        factors = lazy_factors(fit, blocks, plan.batch, project=project)
        return lazy_scores(
            fit,
            factors,
            blocks.sizes,
            Blocks.of(train),
            plan.batch,
            plan.work.features,
            project=project,
            perturbation=mode is InfluenceMode.Perturbation,
        )

    def _lazy_from_factors(self, fitted: _Fitted, factors: Any, train: Source, mode: InfluenceMode) -> Any:
        fit = self._fit(fitted, self._executor(), self._problem(fitted, mode, train))
        work = self._work(fitted, len(factors), train, mode, rank=None)
        parts, sizes = row_blocks(factors)
        return lazy_scores(
            fit,
            parts,
            sizes,
            Blocks.of(train),
            arrange(work).batch,
            work.features,
            project=False,
            perturbation=mode is InfluenceMode.Perturbation,
        )

    def _identity(self, fitted: _Fitted) -> dict[str, Any]:
        """What factors depend on beside the test data."""
        return {
            "model": persistence.model_digest(fitted.problem.objective.module),
            "loss": arguments.described(self.loss),
            "behaviour": fitted.behaviour,
            "parameters": list(fitted.system.names),
            "estimator": type(self).__name__,
            "curvature": self.curvature,
            "hessian_regularization": fitted.sweep or self.hessian_regularization,
            "block_structure": self.block_structure,
            "configuration": dataclasses.asdict(self.configuration),
            "fit": fitted.digest,
            "dtype": str(fitted.system.dtype).removeprefix("torch."),
            "versions": {"dask_influence": version("dask_influence"), "torch": str(torch.__version__)},
        }

    def _provenance(self, fitted: _Fitted) -> dict[str, Any]:
        return {
            **{name: value for name, value in self._identity(fitted).items() if name != "parameters"},
            "samples_fitted": fitted.system.samples,
            "parameters_fitted": fitted.system.size,
        }


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """What a fit leaves behind.

    ``passes`` answers further rounds over the fitted data; a loaded fit has none.
    ``digest`` names the inverse in fingerprints.
    """

    problem: Problem
    system: System
    inverse: Inverse
    passes: Passes | None
    digest: str
    counts: dict[str, Any]
    behaviour: list[str]

    @property
    def sweep(self) -> list[float] | None:
        """The several λ of a sweep."""
        return (
            [part.regularization for part in self.inverse.parts]
            if isinstance(self.inverse, SweepInverse)
            else None
        )

    @property
    def published(self) -> str:
        """Names the inverse for workers, who keep what they have read: other numbers, as λ, other name."""
        values = json.dumps(self.inverse.state()[1], sort_keys=True, default=str)
        return hashlib.blake2b(f"{self.digest}:{values}".encode(), digest_size=16).hexdigest()

    def check_solvable(self) -> None:
        """Refuse to begin where factors take passes over data that are not at hand."""
        if self.inverse.needs_rounds:
            required(self.passes)


class _Counted:
    """Passes that are counted, for the diagnostics of a fit."""

    def __init__(self, answer: Passes) -> None:
        self.answer, self.count = answer, 0

    def __call__(self, request: Round) -> Moments:
        self.count += 1
        return self.answer(request, first=self.count == 1)


def _mode(mode: InfluenceMode | str) -> InfluenceMode:
    try:
        return InfluenceMode(mode)
    except ValueError:
        raise ConfigurationError(f'mode must be "up" or "perturbation"; got {mode!r}') from None
