"""The models a user holds: configure, fit once, ask many times.

:class:`InfluenceFunctionModel` is the one interface; what differs between estimators is
their configuration (``core.estimators``), so each model is a name, a docstring and one line
that says which estimator it drives (``models``). Below its methods are ``configuration`` (what
was asked for), ``fitting`` and ``fitted`` (how a fit goes, what it leaves), ``runs`` (to a store)
and ``saved`` (on disk); ``execution.memory`` and ``execution.lazy`` answer in this process or as a
dask array.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from os import PathLike
from typing import Any, ClassVar, Self

import numpy as np
import torch
import xarray as xr
from torch import nn

from dask_influence import arguments, fitting, runs, saved
from dask_influence.arguments import InfluenceMode, mode_of
from dask_influence.configuration import Configuration, configured, signature
from dask_influence.core.elementary import undisturbed
from dask_influence.core.estimators import Estimator
from dask_influence.core.estimators.blocks import Regularization, Structure
from dask_influence.core.objective import Loss
from dask_influence.errors import ConfigurationError, DataError, NotFittedError, PoisonedSamplesError
from dask_influence.execution import persistence, tasks
from dask_influence.execution.forecast import Forecast
from dask_influence.execution.lazy import (
    lazy_influence_factors,
    lazy_influences,
    lazy_influences_from_factors,
)
from dask_influence.execution.local import LocalExecutor
from dask_influence.execution.memory import factors_in_memory, influences_in_memory, scores_in_memory
from dask_influence.execution.plan import arrange
from dask_influence.execution.reducer import Reduction
from dask_influence.execution.resources import Resources
from dask_influence.execution.stored import StoredFactors
from dask_influence.fitted import Fitted
from dask_influence.reductions import check_reduction
from dask_influence.storage.results import described
from dask_influence.storage.sources import DaskSource, Source, as_source
from dask_influence.storage.stores import Location


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
    compile : bool
        Compile per-sample gradients, directional derivatives and Hessian products with torch's compiler, for
        batches of 16 samples and more. Each alone takes a quarter to all of its time, after seconds for each shape of
        a batch; what is contracted layer by layer instead, as most scores of perceptrons and convolutions are, gains
        nothing. Needs a C++ compiler (on CUDA Triton) on all workers. What it changes in the numbers stands in
        ``diagnostics["compiled_error"]``. A derivative that torch cannot compile for this model is named by a
        warning and runs as without.
    matmul_precision : str
        Operands of float32 products, by torch's names: ``"highest"`` as they are; ``"high"`` in TF32; ``"medium"``
        in bfloat16 (CUDA: TF32). Products add up in float32, sums over samples in float64. Refused where the
        hardware has no such products; ``diagnostics["matmul_error"]`` says what it costs. While tasks run it holds for
        their whole process.
    chunk_size : int, optional
        Training samples summed in one call; by default that of the data, or 256, and several
        times that for large models. Results do not depend on it beyond rounding.
    client : distributed.Client, optional
        Cluster that does the work; None works in this process.
    artifacts : str or path, optional
        URL that every worker can read and write, for what is published to them. By default
        (and config ``influence.artifacts.url``) a temporary folder, where all workers share
        this host's files. One that is given also keeps the sums of finished passes, so that
        a killed fit goes on; delete it when they are no longer wanted.
    certify : bool
        Write ``factor_residual`` even where it takes a pass over the training data. Where residuals of
        many test points of a large model would take a product with the curvature each (EK-FAC, Nyström, Arnoldi with
        its complement), they are estimated from 8 to 32 random vectors, with a relative standard deviation of a
        quarter to an eighth; the array's attributes say so.
    own
        Arguments of the estimator, by name: each model says where they are described.

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
        compile: bool = False,
        matmul_precision: str = "highest",
        chunk_size: int | None = None,
        client: Any = None,
        artifacts: str | PathLike[str] | Location | None = None,
        certify: bool = True,
        **own: Any,
    ) -> None:
        if type(self) is InfluenceFunctionModel:
            raise TypeError(
                "InfluenceFunctionModel is abstract; use DirectInfluence or another of its models"
            )
        self._configuration = Configuration(
            type(self).__name__,
            configured(type(self).__name__, self.estimator, own),
            model,
            loss,
            hessian_regularization,
            curvature,
            block_structure,
            parameters,
            dtype,
            compile,
            matmul_precision,
        )
        self._resources = Resources(client, device, artifacts, chunk_size, certify)
        self._fitted: Fitted | None = None

    # What it was made with, by the names of the arguments.
    configuration = property(attrgetter("_configuration.own"))
    model = property(attrgetter("_configuration.model"))
    loss = property(attrgetter("_configuration.loss"))
    hessian_regularization = property(attrgetter("_configuration.hessian_regularization"))
    curvature = property(attrgetter("_configuration.curvature"))
    block_structure = property(attrgetter("_configuration.block_structure"))
    parameters = property(attrgetter("_configuration.parameters"))
    dtype = property(attrgetter("_configuration.dtype"))
    compile = property(attrgetter("_configuration.compile"))
    matmul_precision = property(attrgetter("_configuration.matmul_precision"))
    client = property(attrgetter("_resources.client"))
    device = property(attrgetter("_resources.device"))
    artifacts = property(attrgetter("_resources.artifacts"))
    chunk_size = property(attrgetter("_resources.chunk_size"))
    certify = property(attrgetter("_resources.certify"))

    def __init_subclass__(cls, estimator: type[Estimator], **kwargs: Any) -> None:
        """Give the model its estimator, and a signature that shows the estimator's arguments."""
        super().__init_subclass__(**kwargs)
        cls.estimator = estimator
        cls.__signature__ = signature(InfluenceFunctionModel.__init__, estimator)  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        # A client belongs to its process, and passes over the data, which need it, stay behind with it.
        state = dict(self.__dict__)
        if self.client is not None and self._fitted is not None:
            state["_fitted"] = dataclasses.replace(self._fitted, passes=None)
        return state

    def __repr__(self) -> str:
        fitted = "fitted" if self._fitted else "not fitted"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, λ={self.hessian_regularization}, {fitted})"
        )

    # -- fit --------------------------------------------------------------------------
    @undisturbed()
    def fit(self, train: Any, *, progress: bool | Callable[[str, int, int], None] | None = None) -> Self:
        """Estimate the curvature of the mean loss over ``train``; returns self.

        Where ``artifacts`` were given, each pass over the data leaves its sums there: a fit that
        was killed goes on with the first pass that it had not finished.

        Parameters
        ----------
        train : pair, Dataset, DataLoader, or path
            ``(x, y)`` of tensors, numpy or dask arrays (each may be a tuple or mapping of
            them); a map-style torch Dataset; a DataLoader (order and ``drop_last`` ignored);
            the path or URL of a Zarr group with arrays ``x`` and ``y``.
        progress : bool or callable, optional
            True shows bars; a callable gets (pass, done, total).

        Raises
        ------
        DataError, LossError, SampleMixingError, DerivativeError
            Data, loss or model cannot be used; nothing has run on the cluster then.
        SingularCurvatureError
            C + λI cannot be inverted.
        """
        source = as_source(train, "train")
        self._fitted = fitting.fit(self._configuration, self._resources, source, progress)
        return self

    def with_regularization(self, hessian_regularization: Regularization) -> Self:
        """A new fitted model at another λ that shares this fit; equal to a refit.

        Parameters
        ----------
        hessian_regularization : float or mapping
            λ ≥ 0, as for the constructor.

        Raises
        ------
        NotFittedError
            :meth:`fit` has not run.
        ConfigurationError
            A λ that cannot be used.
        SingularCurvatureError
            C + λI cannot be inverted.
        """
        fitted = self._require_fit().with_regularization(hessian_regularization)
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._fitted, other._configuration = fitted, fitted.configuration
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
            **fitted.pair_report,
        }

    # -- in memory, or lazily ---------------------------------------------------------
    @undisturbed()
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
            (N, M), or ``(N, M, *features)`` in perturbation mode, of the kind of ``x_test``; a
            lazy dask array where any input is one, chunked like the inputs. Its dtype is
            the model's floating dtype.

        Raises
        ------
        NotFittedError
            :meth:`fit` has not run.
        ConfigurationError
            An unknown mode, or perturbation of inputs that are integers.
        DataError, DerivativeError
            Data cannot be used; a sample has no finite gradient; no form of a derivative is right.
        """
        fitted, mode = self._require_fit(), mode_of(mode)
        test = as_source((x_test, y_test), "x_test, y_test")
        if (x is None) != (y is None):
            raise DataError("x and y must be given together, or neither (then the test data are both sides)")
        train = test if x is None else as_source((x, y), "x, y")
        perturbation = mode is InfluenceMode.Perturbation
        if isinstance(test, DaskSource) or isinstance(train, DaskSource):
            problem = fitted.problem_of(mode, train)
            fit = fitted.shipped(self._resources, self._resources.executor(), problem)
            plan = fitted.plan(test, train, mode)
            return lazy_influences(fit, test, train, plan, project=plan.projects, perturbation=perturbation)
        fitted.check_query(test, "x_test, y_test")
        check = (lambda: None) if train is test else partial(fitted.check_query, train, "x, y")
        if self.client is not None:
            check()
            return arguments.like(self._through_store(test, train, mode), x_test, fitted.system.dtype)
        fit = fitted.shipped(self._resources, LocalExecutor(), fitted.problem_of(mode, train))
        plan = fitted.plan(test, train, mode, alone=True)
        scores = influences_in_memory(
            fit, test, train, plan, check, project=plan.projects, perturbation=perturbation
        )
        return arguments.like(scores, x_test, fitted.system.dtype)

    @undisturbed()
    def influence_factors(self, x: Any, y: Any) -> Any:
        """Influence factors (C + λI)⁻¹ g_i, to be scored against any training data.

        Parameters
        ----------
        x, y : arrays
            N test points, as for :meth:`influences`.

        Returns
        -------
        factors
            (N, P), of the kind of ``x``; columns are in the order of the model's named parameters in θ.

        Raises
        ------
        NotFittedError, DataError
            As for :meth:`influences`.
        """
        fitted = self._require_fit()
        test = as_source((x, y), "test (x, y)")
        plan = fitted.plan(test, test, InfluenceMode.Up, project=False)
        if isinstance(test, DaskSource):
            return lazy_influence_factors(
                fitted.shipped(self._resources, self._resources.executor()), test, plan
            )
        fitted.check_query(test, "test (x, y)")
        fit = fitted.shipped(self._resources, LocalExecutor())
        factors = factors_in_memory(fit, test, "x, y", plan.factor_rows, plan.batch, project=False)
        return arguments.like(tasks.stored(factors), x, fitted.system.dtype)

    @undisturbed()
    def influences_from_factors(
        self, factors: Any, x: Any, y: Any, mode: InfluenceMode | str = InfluenceMode.Up
    ) -> Any:
        """Scores from factors of :meth:`influence_factors`.

        Parameters
        ----------
        factors : array
            (N, P).
        x, y : arrays
            M training points, as for :meth:`influences`.
        mode : InfluenceMode or str
            ``"up"`` or ``"perturbation"``.

        Returns
        -------
        scores
            (N, M) or ``(N, M, *features)``, of the kind of ``factors``.

        Raises
        ------
        NotFittedError, ConfigurationError, DataError, DerivativeError
            As for :meth:`influences`; DataError also where factors are not (N, P) and finite.
        """
        fitted, mode = self._require_fit(), mode_of(mode)
        train = as_source((x, y), "x, y")
        arguments.check_factors(factors, fitted.system.size)
        perturbation = mode is InfluenceMode.Perturbation
        if isinstance(train, DaskSource) or hasattr(factors, "dask"):
            problem = fitted.problem_of(mode, train)
            fit = fitted.shipped(self._resources, self._resources.executor(), problem)
            plan = arrange(fitted.work(len(factors), train, mode, project=False))
            return lazy_influences_from_factors(fit, factors, train, plan, perturbation=perturbation)
        fitted.check_query(train, "x, y")
        fit = fitted.shipped(self._resources, LocalExecutor(), fitted.problem_of(mode, train))
        rows = torch.as_tensor(factors).detach().cpu().to(fitted.system.dtype)
        if not torch.isfinite(rows).all():
            raise DataError("factors hold NaN or inf; compute them again")
        plan = arrange(fitted.work(len(rows), train, mode, project=False), alone=True)
        scores = scores_in_memory(fit, rows, train, "x, y", plan, project=False, perturbation=perturbation)
        return arguments.like(scores, factors, fitted.system.dtype)

    # -- to a store -------------------------------------------------------------------
    @undisturbed()
    def influences_to_zarr(
        self,
        store: str | PathLike[str] | Location,
        test: Any,
        train: Any,
        *,
        mode: InfluenceMode | str = InfluenceMode.Up,
        reduce: Reduction | None = None,
        hessian_regularization: Sequence[float] | None = None,
        test_ids: Any = None,
        train_ids: Any = None,
        resume: bool = True,
        overwrite: bool = False,
        repair: bool = False,
        on_missing: str = "raise",
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
            :meth:`influence_factors_to_zarr` wrote; None with ``reduce=SelfInfluence()``.
        train : data
            As for :meth:`fit`.
        mode : InfluenceMode or str
            ``"up"`` or ``"perturbation"``.
        reduce : TopK, SelfInfluence or GroupSum, optional
            Keep this of the scores instead of all of them; they are then never stored, and tiles only
            bound what a task computes at once.
        hessian_regularization : sequence of float, optional
            Several λ instead of the model's own: the result has one more dimension in front,
            ``regularization``, and the training data are differentiated for all of them at once.
        test_ids, train_ids : array of int or str, optional
            Coordinates of the result; by default positions.
        resume : bool
            Continue what the store already holds of this same run.
        overwrite : bool
            Delete whatever the store holds first.
        repair : bool
            Of a store that holds this run: read everything again, as :func:`~dask_influence.verify` does,
            and recompute what is damaged, and just that; samples that were missing are tried again.
        on_missing : str
            What happens where samples have no finite gradient, make the model or the loss raise, or
            crash the process that works on them. The rest is written, their scores are NaN, and at the
            end ``"raise"`` raises an error that names them; ``"warn"`` warns and returns the result.
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
        PoisonedSamplesError
            Some samples are missing from the result; everything else has been written.
        """
        fitted, mode = self._require_fit().swept(hessian_regularization), mode_of(mode)
        reduction = check_reduction(reduce)
        location = Location.of(store, storage_options)
        train_source = as_source(train, "train", storage_options)
        test_side = runs.test_side(test, train_source, reduction, storage_options)
        if not isinstance(test_side, StoredFactors):
            fitted.check_solvable()
        run = runs.score_run(
            self._target(location, memory_limit, progress),
            fitted,
            test_side,
            train_source,
            mode,
            reduction,
            test_ids=test_ids,
            train_ids=train_ids,
            tile_bytes=tile_bytes,
        )
        return run.carry_out(resume=resume, overwrite=overwrite, repair=repair, on_missing=on_missing)

    @undisturbed()
    def influence_factors_to_zarr(
        self,
        store: str | PathLike[str] | Location,
        test: Any,
        *,
        test_ids: Any = None,
        resume: bool = True,
        overwrite: bool = False,
        repair: bool = False,
        on_missing: str = "raise",
        memory_limit: int | None = None,
        progress: bool | Callable[[str, int, int], None] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> xr.Dataset:
        """Write the influence factors (N, P) of ``test`` to a Zarr group, to be scored any number of times.

        Arguments are those of :meth:`influences_to_zarr`, which takes the store in place of
        test data.

        Returns
        -------
        xarray.Dataset
            ``factors`` (test, parameter), as :func:`open_influences` returns it.
        """
        fitted = self._require_fit()
        fitted.check_solvable()
        location = Location.of(store, storage_options)
        source = as_source(test, "test", storage_options)
        run = runs.factor_run(
            self._target(location, memory_limit, progress), fitted, source, test_ids=test_ids
        )
        return run.carry_out(resume=resume, overwrite=overwrite, repair=repair, on_missing=on_missing)

    @undisturbed()
    def plan(
        self,
        test: Any,
        train: Any,
        mode: InfluenceMode | str = InfluenceMode.Up,
        reduce: Reduction | None = None,
        *,
        hessian_regularization: Sequence[float] | None = None,
        tile_bytes: int | None = None,
        memory_limit: int | None = None,
        workers: int | None = None,
        threads_per_worker: int | None = None,
        worker_memory: int | None = None,
        bandwidth: float | None = None,
        before_fit: bool = False,
    ) -> Forecast:
        """How :meth:`influences_to_zarr` would cut the work, and what that costs; pure, no task runs.

        Parameters
        ----------
        test, train, mode, hessian_regularization, tile_bytes, memory_limit
            As for :meth:`influences_to_zarr`.
        workers, threads_per_worker, worker_memory : int, optional
            A cluster to plan for, which need not exist; by default the one of ``client``.
        bandwidth : float, optional
            Bytes a second between the store and all workers together.
        before_fit : bool
            Plan without a fit, after the checks that a fit would make of model, loss and data. The time is then
            that of derivatives and products alone: what the fit and the solving of factors take is not known.

        Returns
        -------
        Plan
            ``str(plan)`` is a table of tiles, strips, passes, bytes, time (at the speed that
            derivatives had after the fit, and factors have now), and of what limits the run first;
            ``plan.validate(memory_limit)`` raises where it does not fit.
        """
        fitted = None if before_fit else self._require_fit()
        reduction, train_source = check_reduction(reduce), as_source(train, "train")
        if fitted is None:
            fitted = fitting.foreseen(self._configuration, self._resources, train_source)
        one, fitted = fitted, fitted.swept(hessian_regularization)
        test_side = runs.test_side(test, train_source, reduction, None)
        if before_fit and isinstance(test_side, Source):
            fitted.check_query(test_side, "test")
        cluster = self._resources.cluster(workers, threads_per_worker, worker_memory, bandwidth)
        plan = runs.score_plan(
            fitted,
            test_side,
            train_source,
            mode_of(mode),
            reduction,
            tile_bytes=tile_bytes,
            memory_limit=memory_limit
            if worker_memory is None or memory_limit is not None
            else cluster.memory_limit,
            one_by_one=workers is None and self._resources.one_by_one(fitted.problem),
            certify=self._resources.certify,
        )
        return Forecast.of(plan, one.speed, cluster)  # timed once all has been checked

    # -- saving -----------------------------------------------------------------------
    def save(self, url: str | PathLike[str], storage_options: Mapping[str, Any] | None = None) -> None:
        """Write the fit as arrays and JSON, never a pickle; model and loss are given again to :meth:`load`.

        Parameters
        ----------
        url : str or path
            Folder of its own (``file``, ``s3``, ``gs``, ``az``, ``memory``).
        storage_options : mapping, optional
            Credentials and endpoint; never written or shown.

        Raises
        ------
        NotFittedError
            :meth:`fit` has not run.
        StoreError
            The place cannot be written.
        """
        saved.save(self._require_fit(), Location.of(url, storage_options))

    @classmethod
    @undisturbed()
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

        Parameters
        ----------
        url : str or path
            Where :meth:`save` wrote.
        model, loss
            Those that were fitted.
        client : distributed.Client, optional
            As for the constructor.
        storage_options : mapping, optional
            Credentials and endpoint.
        train : data, optional
            What the model was fitted on: needed where factors are solved or certified by passes over them
            (``CgInfluence``, ``LissaInfluence``).
        options
            Those of the constructor that a fit does not depend on: ``device``, ``chunk_size``, ``artifacts``,
            ``certify``.

        Raises
        ------
        ConfigurationError
            ``options`` holds another argument.
        StoreError
            Nothing is saved there, or by another class.
        StoreMismatchError
            The model has other weights or parameters than the one that was fitted.
        DataError
            ``train`` has another number of samples than the data fitted.
        """
        free = ("device", "chunk_size", "artifacts", "certify")
        fixed = [name for name in options if name not in free]
        if fixed:
            raise ConfigurationError(
                f"load takes no {fixed[0]!r}: of the constructor's arguments it takes {', '.join(free)}, and "
                "the fit has the others (for another λ: with_regularization)"
            )
        location = Location.of(url, storage_options)
        held = persistence.load(location)
        made_with = saved.constructor_arguments(held, location, cls.__name__)
        loaded = cls(model, loss, client=client, **made_with, **options)
        resources = loaded._resources
        objective = loaded._configuration.objective(resources.torch_device)
        fitted = saved.restored(held, location, loaded._configuration, objective)
        if train is not None:
            source = as_source(train, "train", storage_options)
            fitted.check_fitted_data(source)
            passes = resources.passes(resources.executor(), fitted.problem, source)
            fitted = dataclasses.replace(fitted, passes=passes)
        loaded._fitted = fitted
        return loaded

    # -- what the methods above share -------------------------------------------------
    def _require_fit(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError(f"this {type(self).__name__} is not fitted; call .fit(train) first")
        return self._fitted

    def _target(self, location: Location, memory_limit: int | None, progress: runs.Progress) -> runs.Target:
        return runs.Target(location, self._resources, self._resources.executor(), memory_limit, progress)

    def _through_store(self, test: Source, train: Source, mode: InfluenceMode) -> np.ndarray[Any, Any]:
        """In-memory answer of a cluster: a run into its artifacts, read back and deleted."""
        scratch = self._resources.executor().location
        assert scratch is not None
        location = scratch.child(f"scores-{secrets.token_hex(8)}")
        try:
            return np.asarray(self.influences_to_zarr(location, test, train, mode=mode)["influence"])
        except PoisonedSamplesError as error:
            raise DataError(f"scores need every sample: {described(error.missing)}; leave them out") from None
        finally:
            location.delete()
