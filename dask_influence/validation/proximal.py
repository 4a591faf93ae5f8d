"""Responses of a fitted model to the weight of one training point, in this process: what the tasks of
:mod:`~dask_influence.validation.response` compute.

Both are minima of an objective that the fitted parameters θ* minimise while no weight w is changed,

    Q(θ) = D(θ, θ*) + λ/2 ‖θ − θ*‖² + w ℓ(z_k; θ),

with D the Bregman divergence of the mean loss: as a function of θ, mean ℓ(θ) − mean ℓ(θ*) −
⟨∇ mean ℓ(θ*), θ − θ*⟩, whose second derivative at θ* is the Hessian; or sample by sample as a function of
the outputs f_j, ℓ(f_j) − ℓ(f*_j) − ⟨∇_f ℓ(f*_j), f_j − f*_j⟩, whose second derivative at θ* is the
Gauss-Newton matrix (the proximal Bregman objective of Bae et al. 2022). Of a model that is linear in θ
they are the same; of one that minimises mean ℓ + λ/2 ‖θ‖², the first is that very objective with the
weight of z_k changed. Everything is in float64.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from dask_influence.core.elementary import differentiation
from dask_influence.core.objective import Objective, Tree
from dask_influence.core.outputs import Outputs, Theta
from dask_influence.core.problem import Problem
from dask_influence.execution.base import Model
from dask_influence.validation.effects import Job, digest_of, tensors
from dask_influence.validation.newton import (
    Batch,
    cut,
    damped,
    flat,
    mean_curvature,
    mean_gradient,
    minimum,
    moved,
)

ROUNDING = 1e-13
"""Share of the gradients at θ* below which a sum of them is rounding."""

DENSE = 5000
"""Parameters up to which the proximal Bregman objective is minimised in coordinates that its curvature is I in."""

AT_ONCE = 10
"""Steps after which it is asked whether they helped."""

TYPICAL = 32
"""Training points whose gradients say how large one is."""


@dataclass(frozen=True)
class Response(Job):
    """The effect on each test loss of removing one training point, as a response to its weight.

    Attributes
    ----------
    model : Model
        The problem, in float64.
    named : str
        Digest of the model, its loss and θ.
    regularization : float
        λ.
    tolerance : float
        Norm of the gradient of Q at the end, as a share of that of w ℓ(z_k) at θ*, or of a typical
        training point's where that is larger: of a point without a gradient there is nothing to resolve.
    """

    doing: ClassVar[str] = "response"
    each: ClassVar[str] = "points"
    remedy: ClassVar[str] = "Give another λ, tolerance or number of steps"

    model: Model
    named: str
    regularization: float
    tolerance: float

    @property
    def identity(self) -> str:
        """Of the model, the data and the numbers."""
        return digest_of(
            type(self).__name__,
            self.named,
            self.train.digest(),
            self.test.digest(),
            self.regularization,
            self.tolerance,
            *self._own(),
        )

    @abstractmethod
    def _own(self) -> tuple[float, ...]:
        """Numbers beside λ and tolerance that the figures depend on."""

    # -- what all calls in a process share ---------------------------------------------
    @cached_property
    def problem(self) -> Problem:
        """The model in this process."""
        return self.model.problem()

    @property
    def objective(self) -> Objective:
        """Of the fitted model."""
        return self.problem.objective

    @cached_property
    def samples(self) -> Batch:
        """All training data."""
        return tensors(self.train.read(0, len(self.train)), torch.float64)

    @cached_property
    def batches(self) -> list[Batch]:
        """The same in batches."""
        return list(cut(*self.samples))

    @cached_property
    def start(self) -> Tensor:
        """θ*, (P,)."""
        return flat(self.objective)

    @cached_property
    def slope(self) -> Tensor:
        """∇ mean ℓ(θ*), (P,)."""
        return mean_gradient(self.objective, self.start, self.batches)

    @cached_property
    def before(self) -> np.ndarray:
        """Test losses at θ*, (N,)."""
        return self.test_losses(self.objective)

    def after(self, theta: Tensor) -> np.ndarray:
        """Test losses at θ, (N,)."""
        return self.test_losses(moved(self.objective, theta))

    def point(self, members: np.ndarray) -> Batch:
        """The training point alone."""
        return tensors(self.train.read(int(members[0]), int(members[0]) + 1), torch.float64)

    @cached_property
    def typical(self) -> float:
        """Root mean square of ‖∇ℓ(z_j; θ*)‖ over some training points."""
        places = np.unique(np.linspace(0, len(self.train) - 1, TYPICAL).astype(int))
        points = (self.point(places[[at]]) for at in range(len(places)))
        norms = [float(mean_gradient(self.objective, self.start, [point]).norm()) for point in points]
        return float(np.sqrt(np.mean(np.square(norms))))

    def goal(self, force: Tensor, weight: float) -> float:
        """Norm of the gradient at which a minimum counts as found; ``force`` is w ∇ℓ(z_k; θ*)."""
        scale = self.slope.norm() + self.regularization * self.start.norm() + force.norm()
        size = max(float(force.norm()), abs(weight) * self.typical)
        return max(self.tolerance * size, ROUNDING * float(scale))


@dataclass(frozen=True)
class FiniteDifference(Response):
    """(L(−w) − L(w)) / 2wM, where L(w) are the test losses at the minimum with weight w on the point.

    The limit for small w is + gᵀ (H + λI)⁻¹ g_k / M.
    """

    weight: float

    def _own(self) -> tuple[float, ...]:
        return (self.weight,)

    @cached_property
    def factor(self) -> Tensor:
        """Of H + λI at θ*, which serves all points as long as it serves them well."""
        matrix = damped(
            mean_curvature(self.problem, self.start, self.batches, "hessian"), self.regularization
        )
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise ArithmeticError(
                "H + λI is not positive definite at the fitted parameters, so that they are no minimum; raise λ"
            )
        return factor

    def measured(self, members: np.ndarray, seed: int) -> np.ndarray:
        """Central difference; the seed changes nothing."""
        point = [self.point(members)]
        there, back = (self.after(self._minimum(point, w)) for w in (self.weight, -self.weight))
        return (back - there) / (2 * self.weight * len(self.train))

    def _minimum(self, point: list[Batch], weight: float) -> Tensor:
        def gradient(theta: Tensor) -> Tensor:
            whole = mean_gradient(self.objective, theta, self.batches) - self.slope
            pull = self.regularization * (theta - self.start)
            return whole + pull + weight * mean_gradient(self.objective, theta, point)

        def hessian(theta: Tensor) -> Tensor:
            whole = mean_curvature(self.problem, theta, self.batches, "hessian")
            return damped(
                whole + weight * mean_curvature(self.problem, theta, point, "hessian"), self.regularization
            )

        force = weight * mean_gradient(self.objective, self.start, point)
        return minimum(gradient, hessian, self.start, self.goal(force, weight), self.factor)


@dataclass(frozen=True)
class ProximalBregman(Response):
    """Test losses at the minimum of the proximal Bregman objective without the point (w = −1/M), less those at θ*.

    Minimised from θ* by L-BFGS over all of the data, deterministic, in coordinates u with θ = θ* + L⁻ᵀ u and
    L Lᵀ = G + λI, the curvature at θ*, where P × P numbers are few enough; they change the path, not its end.
    """

    steps: int

    def _own(self) -> tuple[float, ...]:
        return (self.steps,)

    @cached_property
    def divergences(self) -> list[Callable[[Theta], Tensor]]:
        """Of each batch."""
        return [_divergence(self.objective, x, y) for x, y in self.batches]

    @cached_property
    def factor(self) -> Tensor | None:
        """L, (P, P)."""
        if len(self.start) > DENSE:
            return None
        matrix = damped(mean_curvature(self.problem, self.start, self.batches, "ggn"), self.regularization)
        return torch.linalg.cholesky(matrix)

    def theta(self, u: Tensor) -> Tensor:
        """θ of coordinates u, (P,)."""
        if self.factor is None:
            return self.start + u
        return self.start + torch.linalg.solve_triangular(self.factor.mT, u[:, None], upper=True)[:, 0]

    def slope_in_coordinates(self, gradient: Tensor) -> Tensor:
        """Gradient in u of one in θ, (P,)."""
        if self.factor is None:
            return gradient
        return torch.linalg.solve_triangular(self.factor, gradient[:, None], upper=False)[:, 0]

    def measured(self, members: np.ndarray, seed: int) -> np.ndarray:
        """The response; the seed changes nothing."""
        x, y = self.point(members)
        weight = -1 / len(self.train)
        force = weight * mean_gradient(self.objective, self.start, [(x, y)])
        goal = self.goal(force, weight)
        # In units in which Q(θ*) has a gradient of norm 1: L-BFGS takes products below 1e-10 for zero.
        unit = float(self.slope_in_coordinates(force).norm()) or 1.0
        path = _Path(
            lambda u: self._value(self.theta(unit * u), x, y, weight),
            lambda gradient: self.slope_in_coordinates(gradient) / unit,
            unit**2,
            goal,
            torch.zeros_like(self.start),
        )
        if not path.descend(self.steps, self.tolerance / 100):
            raise ArithmeticError(
                f"{self.steps} steps leave a gradient of {path.left:.1e}, above {goal:.1e}; give more steps or a "
                "larger tolerance"
            )
        return self.after(self.theta(unit * path.best)) - self.before

    def _value(self, theta: Tensor, x: Tree, y: Tree, weight: float) -> tuple[Tensor, Tensor]:
        """Q(θ) and its gradient, (P,)."""
        at, count = theta.requires_grad_(), len(self.train)
        total, gradient = torch.zeros((), dtype=theta.dtype), torch.zeros_like(theta)
        parts = [
            lambda theta, d=divergence: d(self.objective.unflatten(theta)) / count
            for divergence in self.divergences
        ]

        def rest(theta: Tensor) -> Tensor:
            near = self.regularization / 2 * (theta - self.start).square().sum()
            return near + weight * self.objective.total_loss(self.objective.unflatten(theta), x, y)

        for part in (*parts, rest):
            with differentiation():
                value = part(at)
                gradient += torch.autograd.grad(value, at)[0]
            total += value.detach()
        return total, gradient


class _Path:
    """Descent by L-BFGS, from zero.

    Parameters
    ----------
    evaluate : callable
        Coordinates (P,) → value and gradient, (P,), in other coordinates.
    pulled : callable
        Such a gradient → that in these coordinates.
    unit : float
        Of the value.
    goal : float
        Norm of the gradient, in the other coordinates, at which nothing is left to do.
    start : Tensor
        (P,).
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
        pulled: Callable[[Tensor], Tensor],
        unit: float,
        goal: float,
        start: Tensor,
    ) -> None:
        self._evaluate, self._pulled, self._unit, self._goal = evaluate, pulled, unit, goal
        self._at = start.clone().requires_grad_()
        self.best, self.least, self.left = start, float("inf"), float("inf")

    def descend(self, steps: int, share: float) -> bool:
        """Whether it ended: at the goal, or where ten steps bring no more than ``share`` of what was gained.

        The latter at a kink, as relu has them, where the gradient does not vanish.
        """
        at_once = min(steps, AT_ONCE)
        optimizer = self._optimizer(at_once)
        first = last = float(self._closure())
        for _ in range(0, steps, at_once):
            optimizer.step(self._closure)
            if not float(self._closure()) <= last:  # a line search that went astray, at a kink too
                self._at = self.best.clone().requires_grad_()
                optimizer = self._optimizer(at_once)
                self._closure()
            if self.left <= self._goal or last - self.least <= share * (first - self.least):
                return True
            last = self.least
        return False

    def _optimizer(self, at_once: int) -> torch.optim.LBFGS:
        return torch.optim.LBFGS(
            [self._at],
            max_iter=at_once,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=30,
            line_search_fn="strong_wolfe",
        )

    def _closure(self) -> Tensor:
        at = self._at.detach().clone()
        value, gradient = self._evaluate(at)
        value = value / self._unit
        self.left = float(gradient.norm())
        self._at.grad = torch.zeros_like(at) if self.left <= self._goal else self._pulled(gradient)
        if float(value) < self.least:
            self.best, self.least = at, float(value)
        return value


def _divergence(objective: Objective, x: Tree, y: Tree) -> Callable[[Theta], Tensor]:
    """θ ↦ Σ_j ℓ(f_j) − ⟨∇_f ℓ(f*_j), f_j − f*_j⟩: the Bregman divergence of a batch, but for a constant."""
    with differentiation():
        with torch.no_grad():
            at = Outputs.of(objective, x, y)
        outputs = at.flat.clone().requires_grad_()
        slopes = torch.autograd.grad(at.loss(outputs), outputs)[0]

    def value(theta: Theta) -> Tensor:
        f = at.at(theta)
        return at.loss(f) - (slopes * (f - at.flat)).sum()

    return value
