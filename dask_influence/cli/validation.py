"""The ``validation`` section of a job file: what is measured, and how the model is trained again."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from dask_influence.cli.estimators import Estimator
from dask_influence.cli.fields import Damping, Ids, Options, Reference, Section, short

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[list[Seed], Field(min_length=1)]
Points = Annotated[int, Field(ge=3)] | Annotated[list[Seed], Field(min_length=3)]


def _different(given: list[Any]) -> list[Any]:
    if len(set(given)) < 2:
        raise PydanticCustomError("different", "must hold two or more different values")
    return given


_Different = AfterValidator(_different)

# A part that is named without any field takes its defaults.
_Asked = BeforeValidator(lambda given: {} if given is None else given)


# -- training ------------------------------------------------------------------------------
class Factory(Section):
    """What makes an untrained model."""

    factory: Reference
    arguments: Options


class Optimizer(Section):
    """Plain supervised training: mean loss + regularization/2 ‖θ‖²."""

    name: Reference = "torch.optim:Adam"
    arguments: Options
    """Keyword arguments of the optimizer, such as lr."""
    steps: Annotated[int, Field(ge=1)] = 1000
    batch_size: Annotated[int, Field(ge=1)] | None = None
    regularization: Damping = 0.0
    build: Annotated[Factory, short(Factory, "factory")] | None = None
    """Makes an untrained model; by default the factory of ``model``, whose weights are not loaded then."""


class Newton(Section):
    """The minimum of mean loss + regularization/2 ‖θ‖², for losses that are convex in θ."""

    regularization: Damping
    tolerance: Positive = 1e-10
    """Norm of the gradient at the end."""


class Training(Section):
    """How the model is trained again: exactly one of function, optimizer and newton."""

    function: Reference | None = None
    """``module:name`` of ``(x, y, seed) → model``."""
    arguments: Options
    """Keyword arguments of ``function``; a class is called with them, a function is bound to them."""
    optimizer: Annotated[Optimizer | None, _Asked] = None
    newton: Newton | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Training:
        given = [name for name in ("function", "optimizer", "newton") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "kind",
                "must have exactly one of function, optimizer and newton; has {given}",
                {"given": " and ".join(given) or "none"},
            )
        return self


# -- parts ---------------------------------------------------------------------------------
class LeaveOneOut(Section):
    """Training again without one training point at a time."""

    points: Points = 50
    """How many, drawn at random, or their positions."""
    seeds: Seeds = Field(default=[0])


class Datamodeling(Section):
    """Training again on random subsets."""

    subsets: Annotated[int, Field(ge=10)] = 50
    fraction: Share = 0.5
    """Share of the training data in each."""
    seeds: Seeds = Field(default=[0, 1, 2])


class FiniteDifference(Section):
    """More and less weight on one training point at a time, for losses that are convex in θ."""

    points: Points = 50
    weight: Positive | None = None
    tolerance: Positive = 1e-8


class ProximalBregman(Section):
    """The proximal Bregman response of removing one training point at a time, for networks."""

    points: Points = 50
    steps: Annotated[int, Field(ge=1)] = 500
    tolerance: Positive = 1e-4


class Mislabels(Section):
    """Whether self influence finds wrong labels: those that are known, or some that are planted."""

    wrong: Ids | None = None
    """Positions of the wrong labels: a list, or a ``.npy`` file."""
    flip: Share | None = None
    """Share of the labels that are changed, before the model is trained again on them."""

    @model_validator(mode="after")
    def _one_kind(self) -> Mislabels:
        if (self.wrong is None) == (self.flip is None):
            raise PydanticCustomError("kind", "must have exactly one of wrong and flip")
        return self


class Stability(Section):
    """Scores at several λ, or at several ranks, against each other."""

    regularizations: Annotated[list[Damping], _Different] | None = None
    ranks: Annotated[list[Annotated[int, Field(ge=1)]], _Different] | None = None
    k: Annotated[int, Field(ge=1)] = 10

    @model_validator(mode="after")
    def _one_kind(self) -> Stability:
        if self.regularizations is not None and self.ranks is not None:
            raise PydanticCustomError("kind", "must have regularizations or ranks, not both")
        return self


PARTS = (
    "leave_one_out",
    "linear_datamodeling_score",
    "finite_difference_response",
    "proximal_bregman_response",
    "mislabel_detection",
    "stability",
)
"""In the order in which they are done and shown."""


class Validation(Section):
    """Whether the scores are true: what ``dask-influence validate`` measures."""

    store: str
    """Path or URL; what has been trained is kept there, and the same command goes on where it was."""
    storage_options: Options
    training: Annotated[Training, short(Training, "function")] | None = None
    leave_one_out: Annotated[LeaveOneOut | None, _Asked] = None
    linear_datamodeling_score: Annotated[Datamodeling | None, _Asked] = None
    finite_difference_response: Annotated[FiniteDifference | None, _Asked] = None
    proximal_bregman_response: Annotated[ProximalBregman | None, _Asked] = None
    mislabel_detection: Mislabels | None = None
    stability: Annotated[Stability | None, _Asked] = None
    estimators: dict[str, Estimator] = Field(default_factory=dict)
    """Estimators that are compared, by names of yours, instead of the job's own."""
    references: dict[str, dict[str, float | list[float]]] = Field(default_factory=dict)
    """Figures to be shown beside: estimator → part → figure, or one for each λ."""
    seed: Seed = 0
    """Of what is drawn."""
    confidence: Share = 0.95
    """Of the intervals."""

    @property
    def parts(self) -> dict[str, Any]:
        """Sections of the parts that are asked for, by name."""
        return {name: getattr(self, name) for name in PARTS if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _complete(self) -> Validation:
        if not self.parts:
            raise PydanticCustomError("parts", f"names nothing to measure; add one of {', '.join(PARTS)}")
        planted = self.mislabel_detection is not None and self.mislabel_detection.flip is not None
        if self.training is None and (self.leave_one_out or self.linear_datamodeling_score or planted):
            raise PydanticCustomError(
                "training",
                "must have training: leaving out, subsets and planted labels train the model again",
            )
        return self
