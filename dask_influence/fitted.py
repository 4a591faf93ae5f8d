"""What a fit leaves behind, and all that can be said of it without running a task."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import optree
import torch

from dask_influence import arguments
from dask_influence.arguments import InfluenceMode
from dask_influence.configuration import Configuration
from dask_influence.core.checks import check_samples
from dask_influence.core.content import Content
from dask_influence.core.elementary import differentiation
from dask_influence.core.estimators import Inverse, SweepInverse, SweepSystem, System, estimates
from dask_influence.core.estimators.blocks import Regularization
from dask_influence.core.estimators.sweep import check_sweep
from dask_influence.core.objective import Objective, leading_size
from dask_influence.core.problem import Problem, behaviour, with_mixed_form
from dask_influence.errors import DataError, DataWarning, LossError, StoreMismatchError
from dask_influence.execution import persistence, tasks
from dask_influence.execution.base import Approximated, Executor
from dask_influence.execution.dask import versions
from dask_influence.execution.drive import Passes, most_joined
from dask_influence.execution.forecast import Speed
from dask_influence.execution.job import Job, computing, to_tensors
from dask_influence.execution.plan import Plan, arrange
from dask_influence.execution.resources import Resources
from dask_influence.execution.run import Fit, required
from dask_influence.execution.shipping import Held
from dask_influence.execution.stored import StoredFactors
from dask_influence.execution.work import Kept, Passing, Work
from dask_influence.grid import Chunks
from dask_influence.storage.sources import ArraySource, Source, check_finite, non_finite

SAMPLES_CHECKED = 64
"""Samples on which the loss is checked before a fit; derivatives are checked on a few of them."""

LAST_CHECKED = 16
"""Samples from the end of the data on which layers are checked, too."""

PROBED_RUNS = 16
"""Runs of samples that are looked at where the first ones may not be like the rest."""


def first_samples(objective: Objective, source: Source, argument: str) -> tuple[Any, Any]:
    """The samples that checks look at, as tensors; refused where they hold NaN or inf."""
    batch = source.read(0, min(SAMPLES_CHECKED, len(source)))
    check_finite(batch, argument)
    x, y = to_tensors(batch, objective)
    return x, y


def with_last(objective: Objective, source: Source, sample: tuple[Any, Any]) -> tuple[Any, Any]:
    """The same with the last samples behind: of sorted data the first ones may all be alike.

    Without them where one has no finite loss, or fails: it is named where it is met in its turn.
    """
    start = max(len(source) - LAST_CHECKED, leading_size(sample[1]))
    if start >= len(source):
        return sample
    try:
        last = to_tensors(source.read(start, len(source)), objective)
        with differentiation(), torch.no_grad():
            losses = objective.sample_losses(objective.parameters(), *last)
    except Exception:  # noqa: BLE001 - the user's own code runs in here
        return sample
    if not losses.isfinite().all():
        return sample
    joined: tuple[Any, Any] = optree.tree_map(lambda *parts: torch.cat(parts), sample, last)
    return joined


def probes(objective: Objective, source: Source, count: int) -> tuple[Any, Any]:
    """About ``count`` samples, in a few runs from all over the data, as tensors."""
    runs = Chunks(len(source), max(1, -(-len(source) // PROBED_RUNS)))
    each = -(-count // len(runs))
    batches = [source.read(run.start, min(run.start + each, run.stop)) for run in runs]
    leaves = [optree.tree_leaves(batch) for batch in batches]
    joined = [np.concatenate(parts) for parts in zip(*leaves, strict=True)]
    x, y = to_tensors(optree.tree_unflatten(optree.tree_structure(batches[0]), joined), objective)
    return x, y


@dataclasses.dataclass
class Learned:
    """What has been found out since the fit, once for all that share it.

    Attributes
    ----------
    mixed : Problem or None
        The problem with its input gradient checked too.
    specs : set of str
        Shapes and dtypes of queries that went well.
    speed : Speed or None
        With the time of factors, which a plan asks for.
    """

    mixed: Problem | None = None
    specs: set[str] = dataclasses.field(default_factory=set)
    speed: Speed | None = None


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fit: the inverse curvature, and what is needed to use and to name it.

    Attributes
    ----------
    configuration : Configuration
        What was asked for.
    problem, system, inverse
        Loss and derivative forms, what is inverted, its inverse.
    passes : Passes or None
        Answers further rounds over the fitted data; a loaded fit has none.
    named : str or None
        The digest, where it is known already.
    counts : dict
        Of the fit, for diagnostics.
    behaviour : list of str
        Losses and gradient norms of the first samples, to be told from other fits.
    content : Content
        What model and loss compute, to be told from others of their names.
    differentiating : Speed
        Of this machine at this problem, for forecasts; a guess where nothing was timed.
    learned : Learned
        What has been found out since the fit.
    """

    configuration: Configuration
    problem: Problem
    system: System
    inverse: Inverse
    passes: Passes | None
    named: str | None
    counts: dict[str, Any]
    behaviour: list[str]
    content: Content
    differentiating: Speed = dataclasses.field(default_factory=Speed, repr=False)
    learned: Learned = dataclasses.field(default_factory=Learned, repr=False)

    @property
    def speed(self) -> Speed:
        """Of one core of this machine, its factors timed when they are first asked for."""
        if self.learned.speed is None:
            with computing(Held(self.problem), 1):
                self.learned.speed = self.differentiating.solving(self.inverse, self.problem.objective.size)
        return self.learned.speed

    # -- λ ----------------------------------------------------------------------------
    def with_regularization(self, hessian_regularization: Regularization) -> Fitted:
        """The same fit at another λ."""
        configuration = self.configuration.with_regularization(hessian_regularization)
        checked: Any = configuration.hessian_regularization  # a mapping where the inverse is one of blocks
        return dataclasses.replace(
            self,
            named=self.digest,
            configuration=configuration,
            system=self.system.with_regularization(checked),
            inverse=self.inverse.with_regularization(checked),
        )

    def swept(self, regularizations: Sequence[float] | None) -> Fitted:
        """The fit at its own λ, or at several."""
        if regularizations is None:
            return self
        values = check_sweep(regularizations)
        inverses = [self.inverse.with_regularization(value) for value in values]
        systems = [self.system.with_regularization(value) for value in values]
        return dataclasses.replace(
            self,
            named=self.digest,
            inverse=SweepInverse(inverses, self.system.names),
            system=SweepSystem.of(systems),
        )

    @property
    def sweep(self) -> list[float] | None:
        """The several λ of a sweep."""
        return (
            [part.regularization for part in self.inverse.parts]
            if isinstance(self.inverse, SweepInverse)
            else None
        )

    def recorded_diagnostics(self) -> dict[str, Any]:
        """What the store keeps of the diagnostics: JSON, the same from every client that may finish the run.

        Of several λ the curvature is one, and so is its spectrum. Numbers have six digits.
        """
        inverse = self.inverse.parts[0] if isinstance(self.inverse, SweepInverse) else self.inverse
        known = {name: value for name, value in self.counts.items() if name not in ("passes", "restored")}
        return _six_digits({**known, **inverse.recorded()})

    # -- names ------------------------------------------------------------------------
    @cached_property
    def digest(self) -> str:
        """Names the fit in fingerprints; made when it is asked for, since digesting a large inverse takes a while."""
        return persistence.inverse_digest(self.inverse) if self.named is None else self.named

    @property
    def dtype(self) -> str:
        """Floating dtype of the scores, by its name in torch."""
        return str(self.system.dtype).removeprefix("torch.")

    @property
    def score_dtype(self) -> np.dtype[Any]:
        """The same as numpy has it."""
        return tasks.stored_dtype(self.system.dtype)

    def _published(self, inverse: Inverse) -> str:
        """Names an inverse for workers, who keep what they have read: other numbers, as λ, other name."""
        values = json.dumps([inverse.kind, inverse.state()[1]], sort_keys=True, default=str)
        return hashlib.blake2b(f"{self.digest}:{values}".encode(), digest_size=16).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What factors depend on beside the test data."""
        asked = self.configuration.described()
        return {
            "model": persistence.model_digest(self.problem.objective.module),
            "loss": asked["loss"],
            "model_and_loss": self.content.digest,
            "behaviour": self.behaviour,
            "parameters": list(self.system.names),
            **asked,
            "hessian_regularization": self.sweep or asked["hessian_regularization"],
            **({"fit": self.digest} if self.digest else {}),  # one that is foreseen has none yet
            "dtype": self.dtype,
            "versions": versions(),
        }

    def provenance(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Attributes of a store that say where its numbers come from, of its :meth:`identity`."""
        return {
            **{name: value for name, value in identity.items() if name != "parameters"},
            "samples_fitted": self.system.samples,
            "parameters_fitted": self.system.size,
        }

    # -- checks of what a query brings ------------------------------------------------
    def check_solvable(self) -> None:
        """Refuse to begin where factors take passes over data that are not at hand."""
        if self.inverse.needs_rounds:
            required(self.passes)

    def check_query(self, source: Source, argument: str) -> None:
        """Refuse data of a query that a fit would refuse, by their first samples and before anything runs.

        Of shapes and dtypes that have been looked at, what may still be wrong is some sample's fault, and
        is named where it shows.
        """
        objective, spec = self.problem.objective, repr(source.spec)
        if spec in self.learned.specs:
            return
        sample = first_samples(objective, source, argument)
        try:
            check_samples(objective, *sample)
        except (DataError, LossError) as error:
            raise type(error)(f"{argument}: {error}") from error
        self.learned.specs.add(spec)

    def sound_samples(
        self,
        source: Source,
        argument: str,
        resources: Resources,
        executor: Executor,
        mode: InfluenceMode = InfluenceMode.Up,
    ) -> list[int] | None:
        """Places among the first samples of a run's data that can be used; refuses data of which none can.

        What a fit would refuse of all of them is refused; single ones are left to the run, which names
        what it leaves out. Workers look at them, so that a sample that kills its process kills none of
        this one's; then nothing is known of any of them, and the list is empty. None where samples of
        these shapes and dtypes have been looked at, and no derivative of ``mode`` is to be checked on them.
        """
        spec, few = repr(source.spec), min(SAMPLES_CHECKED, len(source))
        if spec in self.learned.specs and (mode is InfluenceMode.Up or self.learned.mixed is not None):
            return None
        batch = source.read(0, few)
        bad = non_finite(batch)
        places = [place for place in range(few) if place not in bad]
        if not places:
            check_finite(batch, argument)
        kept = ArraySource(*optree.tree_map(lambda leaf: leaf[places], batch), argument=argument)
        job = Job(
            executor.model(self.problem, resources.device),
            executor.reachable(kept, len(kept)),
            argument,
            resources.threads(self.problem),
        )
        try:
            for sound in executor.map(tasks.sound_samples, [(executor.seal(job),)], lambda _: None):
                self.learned.specs.add(spec)
                return [places[place] for place in sound]
        except (DataError, LossError) as error:
            raise type(error)(f"{argument}: {error}") from error
        return []

    def check_fitted_data(self, source: Source) -> None:
        """Refuse training data of another length than those fitted; warn where they may differ."""
        if len(source) != self.system.samples:
            raise DataError(
                f"train holds {len(source)} samples, and the model was fitted on {self.system.samples}; "
                "give the data that it was fitted on"
            )
        objective = self.problem.objective
        shown = behaviour(objective, *first_samples(objective, source, "train"))
        if shown != self.behaviour:
            raise StoreMismatchError(
                f"loss and gradient norm of the first samples of train are {', '.join(shown)}, and were "
                f"{', '.join(self.behaviour)} when the model was fitted; give the loss, the model and the data "
                "of that fit"
            )
        fitted_data = self.digest.partition("-")[2]
        if fitted_data and fitted_data != source.digest():
            warnings.warn(
                DataWarning(
                    "train is not known to be the data that the model was fitted on: their digests differ, as they do "
                    "for other data and for the same data in a Zarr store"
                ),
                stacklevel=3,
            )

    # -- what runs need ---------------------------------------------------------------
    @property
    def projects(self) -> bool:
        """Whether the inverse has directions of its own, so that scores need no factors."""
        return self.inverse.directions is not None

    def problem_of(self, mode: InfluenceMode, train: Source, sound: Sequence[int] | None = None) -> Problem:
        """The fitted problem, its input gradient checked on training data where the mode needs it.

        ``sound`` are places of samples that can be used, where some cannot; none of them leaves the check
        to samples after the first ones.
        """
        if mode is InfluenceMode.Up:
            return self.problem
        if self.learned.mixed is None:
            if sound is None:
                self.check_query(train, train.argument)  # or shapes that do not fit are found by torch
                sample = first_samples(self.problem.objective, train, train.argument)
            else:
                sample = self._picked(train, sound)
            self.learned.mixed = with_mixed_form(self.problem, *sample)
        return self.learned.mixed

    def _picked(self, train: Source, sound: Sequence[int]) -> tuple[Any, Any]:
        start = 0 if sound else min(SAMPLES_CHECKED, len(train) - 1)
        batch = train.read(start, min(start + SAMPLES_CHECKED, len(train)))
        bad = non_finite(batch)
        places = list(sound) or [p for p in range(min(SAMPLES_CHECKED, len(train) - start)) if p not in bad]
        x, y = to_tensors(optree.tree_map(lambda leaf: leaf[places], batch), self.problem.objective)
        return x, y

    @property
    def pair_report(self) -> dict[str, Any]:
        """How far scores without factors may be from those with them, where pairs may be taken."""
        form = self.inverse.form
        return {} if form is None or self.problem.pairing is None else form.report(self.problem)

    @property
    def _inverse_bytes(self) -> int:
        estimator, system = self.configuration.estimator, self.system
        approximate = self.inverse.approximate
        held = 0 if approximate is None else sum(part.nbytes for part in approximate.state()[0].values())
        if isinstance(system, SweepSystem):
            return held + estimator.inverse_bytes(system.systems[0], len(system.systems))
        return held + estimator.inverse_bytes(system)

    def shipped(self, resources: Resources, executor: Executor, problem: Problem | None = None) -> Fit:
        """The fit in the form that tasks of ``executor`` can carry."""
        problem = self.problem if problem is None else problem
        asked = bool(problem.forms.compiled), problem.matmul_precision
        executor.check_options(resources.options(compiled=asked[0], matmul_precision=asked[1]))
        solver = executor.inverse(self.inverse, partial(self._published, self.inverse))
        scorer, approximate = solver, self.inverse.approximate
        if approximate is not None and problem is self.problem:  # perturbation takes dense directions
            thin = executor.inverse(approximate, partial(self._published, approximate))
            scorer = Approximated(thin, solver)
        return Fit(
            executor.model(problem, resources.device),
            self.inverse,
            solver,
            scorer,
            self.system,
            self.passes,
            resources.certify,
            resources.threads(problem),
        )

    def work(self, tests: int, train: Source, mode: InfluenceMode, *, project: bool) -> Work:
        """Sizes of the scores of ``tests`` test points, from factors or (``project``) from coefficients."""
        directions = self.inverse.directions if project else None
        return Work(
            tests=tests,
            trains=len(train),
            features=arguments.features(train) if mode is InfluenceMode.Perturbation else (),
            parameters=self.system.size,
            rank=None if directions is None else len(directions),
            itemsize=self.score_dtype.itemsize,
            activations=self.problem.activations,
            sample_bytes=train.nbytes_per_sample,
            inverse_bytes=self._inverse_bytes,
            regularizations=None if self.sweep is None else len(self.sweep),
        )

    def plan(
        self,
        test: Source | StoredFactors | None,
        train: Source,
        mode: InfluenceMode,
        *,
        project: bool | None = None,
        kept: Kept | None = None,
        certify: bool = False,
        **limits: Any,
    ) -> Plan:
        """How scores of ``test`` and ``train`` are cut; ``project`` wherever the inverse allows it, by default.

        Without test data (None), training points are scored on themselves. To ``certify`` factors residuals are
        estimated where each of many would take a product with the curvature. Where the inverse and the model's
        layers allow it, and it is cheaper, pairs of samples are scored without factors.
        """
        tests = 1 if test is None else len(test)
        work = self.work(tests, train, mode, project=self.projects if project is None else project)
        estimated = self._estimated(test) if certify else 0
        passing = self._passing(certify=certify and not estimated)
        work = dataclasses.replace(work, kept=kept, estimated=estimated, passing=passing)
        limits["spread"] = not self.inverse.needs_rounds
        general, form = arrange(work, **limits), self.inverse.form
        if project is False or form is None or not self._pairs(test, train, mode):
            return general
        work = dataclasses.replace(work, rank=form.rank, paired=form.size(self.problem))
        pairs = arrange(work, **limits)
        return pairs if pairs.beats(general) else general

    def _estimated(self, test: Source | StoredFactors | None) -> int:
        """Random vectors from which residuals of the test points are estimated."""
        if not self._certifies or self.inverse.needs_rounds or not isinstance(test, Source):
            return 0
        multiplied = self.problem.forms.product == "chain" or self.system.curvature == "empirical_fisher"
        activations = 0 if multiplied else self.problem.activations
        return estimates.count_for(len(test), self.system.samples, self.system.size, activations)

    @property
    def _certifies(self) -> bool:
        """Whether residuals take passes that can be made: not of a loaded fit, but of one that is yet to be made."""
        return self.inverse.residuals_need_rounds and (self.passes is not None or self.named == "")

    def _passing(self, *, certify: bool) -> Passing | None:
        """The passes that factors take, to be solved or to ``certify`` them."""
        solving = self.inverse.needs_rounds
        if not (solving or (certify and self._certifies)):
            return None
        samples = self.system.samples
        return Passing(samples, most_joined(samples), self.problem.forms.product == "chain", solving)

    def _pairs(self, test: Source | StoredFactors | None, train: Source, mode: InfluenceMode) -> bool:
        """Whether samples of both sides are such as pairs were found for."""
        pairing = self.problem.pairing
        if pairing is None or mode is not InfluenceMode.Up or isinstance(test, StoredFactors):
            return False
        sides = [source.spec[0] for source in (test, train) if source is not None]
        return all(
            tuple(tuple(leaf.shape) for leaf in optree.tree_leaves(side)) == pairing.sample for side in sides
        )


def _six_digits(value: Any) -> Any:
    """Mappings, lists, numbers and texts as JSON has them, floats with six digits."""
    if isinstance(value, Mapping):
        return {str(name): _six_digits(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [_six_digits(held) for held in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return value if value is None or isinstance(value, bool | int | str) else str(value)
