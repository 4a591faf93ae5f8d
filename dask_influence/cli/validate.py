"""What ``dask-influence validate`` does: each part of a validation for each estimator at each λ."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dask_influence import validation
from dask_influence.cli import loading
from dask_influence.cli.findings import HEADINGS, Finding, Findings, Found
from dask_influence.cli.job import Job
from dask_influence.cli.validation import Optimizer, Stability, Validation
from dask_influence.errors import ConfigurationError
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.storage.sources import Source, as_source
from dask_influence.storage.stores import Location
from dask_influence.validation import Detection, TrainingFunction
from dask_influence.validation.mislabels import check_wrong
from dask_influence.validation.variants import name_of

Report = Callable[[str, int, int], None]
RESULT = "validation.json"
"""In the store of a validation: what was printed."""


@dataclass(frozen=True)
class Validator:
    """A validation that is known to be possible, before anything is fitted."""

    asked: Job
    section: Validation
    store: Location
    train: Source
    test: Source | None
    training: TrainingFunction | None
    module: nn.Module
    loss: Callable[..., torch.Tensor]
    estimators: dict[str, Any]

    @classmethod
    def of(cls, asked: Job) -> Validator:
        """What the job asks for.

        Raises
        ------
        JobError, ConfigurationError, DataError, StoreError
            It cannot be done; names the line and the field.
        """
        section = asked.validation
        if section is None:
            raise asked.document.refusal(
                (), "the job has no section validation; add one, with store: and a part"
            )
        with loading.at(asked, "validation", "store"):
            store = loading.location(asked, section.store, section.storage_options)
            store.check_writable()
        train, test = (_samples(asked, side) for side in ("train", "test"))
        assert train is not None
        if test is None and set(section.parts) - {"mislabel_detection"}:
            raise asked.document.refusal(
                ("data", "test"), "is missing; what is compared are losses of test points"
            )
        _check_sizes(asked, section, len(train))
        estimators = dict(section.estimators) or {asked.estimator.name: asked.estimator}
        _check_references(asked, section, estimators)
        module, loss = loading.model(asked), loading.loss(asked)
        if section.stability is not None:
            _check_stability(asked, section.stability, estimators, module)
        again = training(asked, section, module, loss)
        found = cls(asked, section, store, train, test, again, module, loss, estimators)
        for name in estimators:
            found._influence(name, None)
        return found

    def findings(self, client: Any, report: Report) -> Iterator[Finding]:
        """Measure everything, one finding after the other."""
        models = [(name, self._influence(name, client)) for name in self.estimators]
        for name, model in models:
            model.fit(self.train, progress=report)
            for place, fitted in enumerate(self._at_each_regularization(model)):
                for part, asked in self.section.parts.items():
                    if part != "stability" or self._compares(name, place):
                        found = self._measure(part, asked, fitted, report)
                        reference = self._reference(name, part, place)
                        yield Finding(name, fitted.hessian_regularization, part, found, reference)

    def keep(self, found: Findings) -> None:
        """Leave in the store what was found."""
        self.store.put(RESULT, json.dumps(found.to_json(), indent=1).encode())

    def _influence(self, name: str, client: Any) -> InfluenceFunctionModel:
        key = ("validation", "estimators", name) if self.section.estimators else ("estimator",)
        return loading.influence_of(
            self.asked, self.estimators[name], *key, module=self.module, function=self.loss, client=client
        )

    def _compares(self, name: str, place: int) -> bool:
        """Whether scores of this estimator are compared with its own: once, and at ranks where it has one."""
        asked = self.section.stability
        return (
            place == 0
            and asked is not None
            and (asked.ranks is None or hasattr(self.estimators[name], "rank"))
        )

    def _at_each_regularization(self, model: InfluenceFunctionModel) -> list[InfluenceFunctionModel]:
        values = self.asked.hessian_regularizations
        return [model] if values is None else [model.with_regularization(value) for value in values]

    def _measure(self, part: str, asked: Any, fitted: InfluenceFunctionModel, report: Report) -> Found:
        drawn = {"seed": self.section.seed, "confidence": self.section.confidence}
        given = {name: getattr(asked, name) for name in type(asked).model_fields}
        with loading.at(self.asked, "validation", part):
            if part == "stability":
                return validation.stability(fitted, self.train, self.test, **given, progress=report)
            if part == "mislabel_detection":
                return self._mislabels(asked, fitted, drawn)
            function: Any = getattr(validation, part)
            again = (self.training,) if part in ("leave_one_out", "linear_datamodeling_score") else ()
            found: Found = function(
                fitted, self.train, self.test, *again, **given, **drawn, store=self.store, progress=report
            )
            return found

    def _mislabels(self, asked: Any, fitted: InfluenceFunctionModel, drawn: dict[str, Any]) -> Detection:
        if asked.flip is not None:
            assert self.training is not None
            return validation.planted_mislabels(
                fitted, self.train, self.training, fraction=asked.flip, store=self.store, **drawn
            )
        wrong = _positions(self.asked, self.section)
        store = self.store.child("mislabels", name_of(fitted))
        return validation.mislabel_detection(fitted, self.train, wrong, store=store, **drawn)

    def _reference(self, estimator: str, part: str, place: int) -> float | None:
        given = self.section.references.get(estimator, {}).get(part)
        return given[place] if isinstance(given, list) else given


def _samples(asked: Job, side: str) -> Source | None:
    given = loading.data(asked, side)
    if given is None:
        return None
    with loading.at(asked, "data", side):
        return as_source(given, side)


def _positions(asked: Job, section: Validation) -> Any:
    """Of the labels that are known to be wrong."""
    assert section.mislabel_detection is not None
    wrong = section.mislabel_detection.wrong
    if isinstance(wrong, str):
        with loading.at(asked, "validation", "mislabel_detection", "wrong"):
            return loading.array(loading.location(asked, wrong, section.storage_options))
    return wrong


def _check_sizes(asked: Job, section: Validation, count: int) -> None:
    """Refuse numbers that the training data cannot have, before the first fit."""
    for part, given in section.parts.items():
        points = getattr(given, "points", 0)
        for name, value, most in (
            ("points", points if isinstance(points, int) else max(points) + 1, count),
            ("points", 0 if isinstance(points, int) else len(points) - len(set(points)), 0),
            ("k", getattr(given, "k", 0), count),
        ):
            if value > most:
                raise asked.document.refusal(
                    ("validation", part, name),
                    f"must be different points of the {count} training points, or fewer",
                )
        seeds = getattr(given, "seeds", [])
        if len(set(seeds)) < len(seeds):
            raise asked.document.refusal(
                ("validation", part, "seeds"), "must be different; one is given twice"
            )
    subsets = section.linear_datamodeling_score
    if subsets is not None and int(subsets.fraction * count) == 0:
        key = ("validation", "linear_datamodeling_score", "fraction")
        raise asked.document.refusal(key, f"leaves none of the {count} training points")
    flip = None if section.mislabel_detection is None else section.mislabel_detection.flip
    if flip is not None and round(flip * count) in (0, count):
        key = ("validation", "mislabel_detection", "flip")
        what = "all" if flip > 0.5 else "none"
        raise asked.document.refusal(key, f"changes {what} of the {count} labels")
    if section.mislabel_detection is not None and section.mislabel_detection.wrong is not None:
        with loading.at(asked, "validation", "mislabel_detection", "wrong"):
            check_wrong(_positions(asked, section), count)


def _check_stability(asked: Job, given: Stability, estimators: dict[str, Any], module: nn.Module) -> None:
    """Refuse ranks that no estimator can have, and a λ that there is no other one around."""
    key = ("validation", "stability")
    if given.ranks is not None:
        if not any(hasattr(one, "rank") for one in estimators.values()):
            raise asked.document.refusal(
                (*key, "ranks"), "are for estimators that have one: Arnoldi, Nyström"
            )
        size = sum(parameter.numel() for parameter in module.parameters())
        if max(given.ranks) >= size:
            raise asked.document.refusal(
                (*key, "ranks"), f"must be below the {size:,} parameters of the model"
            )
    elif given.regularizations is None:
        for name, one in estimators.items():
            first = (asked.hessian_regularizations or [one.hessian_regularization])[0]
            if not isinstance(first, float | int) or first == 0:
                what = "is 0" if first == 0 else "differs between blocks"
                raise asked.document.refusal(
                    key, f"must have regularizations: that of {name} {what}, and there is none around it"
                )


def _check_references(asked: Job, section: Validation, estimators: dict[str, Any]) -> None:
    count = 1 if asked.hessian_regularizations is None else len(asked.hessian_regularizations)
    for name, figures in section.references.items():
        key = ("validation", "references", name)
        if name not in estimators:
            raise asked.document.refusal(key, f"is no estimator of this validation: {', '.join(estimators)}")
        for part, given in figures.items():
            if part not in HEADINGS or part not in section.parts:
                raise asked.document.refusal((*key, part), "is no part of this validation that has a figure")
            if isinstance(given, list) and len(given) != count:
                raise asked.document.refusal((*key, part), f"must be {count} figures, one for each λ")


def training(
    asked: Job, section: Validation, module: nn.Module, loss: Callable[..., torch.Tensor]
) -> TrainingFunction | None:
    """The training function that the section describes."""
    given, key = section.training, ("validation", "training")
    if given is None:
        return None
    if given.newton is not None:
        return validation.Newton(module, loss, **given.newton.model_dump())
    if given.optimizer is not None:
        return _optimized(asked, given.optimizer, loss)
    assert given.function is not None
    function = loading.named(asked, given.function, *key, "function")
    arguments = given.arguments
    if isinstance(function, type):
        function, arguments = loading.called(asked, function, arguments, *key, "function"), {}
    try:
        inspect.signature(function).bind(None, None, seed=0, **arguments)
    except TypeError as error:
        more = f", {', '.join(arguments)}" if arguments else ""
        raise asked.document.refusal(
            (*key, "function"), f"must be callable as (x, y, seed{more}): {error}"
        ) from error
    return functools.partial(function, **arguments) if arguments else function


def _optimized(asked: Job, given: Optimizer, loss: Callable[..., torch.Tensor]) -> validation.Training:
    key = ("validation", "training", "optimizer")
    made_by, place = (asked.model, ("model",)) if given.build is None else (given.build, (*key, "build"))
    factory = loading.named(asked, made_by.factory, *place, "factory")
    made = loading.called(asked, factory, made_by.arguments, *place, "factory")
    if not isinstance(made, nn.Module):
        raise asked.document.refusal((*place, "factory"), "must make a torch.nn.Module")
    optimizer = loading.named(asked, given.name, *key, "name")
    with loading.at(asked, *key):
        try:
            optimizer([nn.Parameter(torch.zeros(1))], **given.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{given.name} does not take these arguments: {error}") from error
        dtype = asked.estimator.dtype
        return validation.Training(
            functools.partial(_built, functools.partial(factory, **made_by.arguments), dtype),
            loss,
            functools.partial(optimizer, **given.arguments),
            given.steps,
            given.batch_size,
            given.regularization,
        )


def _built(factory: Callable[[], nn.Module], dtype: str | None) -> nn.Module:
    """An untrained model in the dtype of the job."""
    made = factory()
    return made if dtype is None else made.to(getattr(torch, dtype))
