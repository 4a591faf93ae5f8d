"""Newton's method, for models whose loss is convex in their parameters: the minimum, to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import optree
import torch
from torch import Tensor, nn

from dask_influence.core.curvature import matrix_sums
from dask_influence.core.elementary import alone, differentiation
from dask_influence.core.moments import merge
from dask_influence.core.objective import Loss, Objective, Tree, leading_size, sliced
from dask_influence.core.problem import Problem, prepare
from dask_influence.errors import ConfigurationError
from dask_influence.scalars import check_number
from dask_influence.validation.effects import BATCH

ENOUGH = 0.3
"""A Hessian is kept for as long as each step leaves no more than this share of the gradient."""

MOST_STEPS = 200
SHORTEST = 2.0**-30
CHECKED = 16
"""Samples on which derivatives are checked."""

Batch = tuple[Tree, Tree]


@dataclass(frozen=True)
class Newton:
    """Minimises mean loss + regularization/2 ‖θ‖² by Newton's method, for losses that are convex in θ.

    A training function, as :class:`~dask_influence.validation.Training` is, for models that are linear in
    their parameters: it ends where the norm of the gradient is below ``tolerance``, so that the change that
    one training point makes is no noise of the optimizer. The Hessian is dense, P × P, and is kept while the
    gradient falls fast with it; steps are halved until the gradient falls. Everything is in float64.

    Parameters
    ----------
    model : torch.nn.Module
        Where it starts: the fitted model, which spares steps. Frozen parameters stay as they are.
    loss : callable
        Mean-reduced, as for the influence model.
    regularization : float
        Of the penalty, whose second derivative it is: the ``hessian_regularization`` that suits a model
        trained so.
    tolerance : float
        Norm of the gradient at the end.

    Raises
    ------
    ConfigurationError
        Numbers out of range; a model that is no module, a loss that cannot be called.

    References
    ----------
    Boyd & Vandenberghe 2004, "Convex Optimization", section 9.5; Hessians that are kept for several
    steps: Shamanskii 1967.

    Examples
    --------
    >>> x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0], [5.0]])
    >>> train = Newton(nn.Linear(1, 1), nn.functional.mse_loss)
    >>> model = train(x, y, seed=0)
    >>> round(model.weight.item(), 9), round(model.bias.item(), 9)
    (2.0, 1.0)
    """

    model: nn.Module
    loss: Loss
    regularization: float = 0.0
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ConfigurationError(f"model must be a torch.nn.Module; got {type(self.model).__name__}")
        if not callable(self.loss):
            raise ConfigurationError(f"loss must be callable; got {self.loss!r}")
        for name, least in (("regularization", "≥"), ("tolerance", ">")):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 <= value < float("inf") or (least == ">" and value == 0):
                raise ConfigurationError(f"{name} must be {least} 0 and finite; got {value!r}")

    def __call__(self, x: Tree, y: Tree, seed: int) -> nn.Module:
        """The model at the minimum over ``x`` and ``y``; the seed changes nothing."""
        batches = list(cut(*in_double(x, y)))
        objective = Objective.of(self.model, self.loss, dtype=torch.float64)
        problem = _PROBLEMS.get(self.model)
        if problem is None or problem.objective.loss is not self.loss:
            few = (sliced(tree, slice(0, CHECKED)) for tree in batches[0])
            problem = _PROBLEMS[self.model] = prepare(objective, *few)[0]
        problem = replace(problem, objective=objective)

        def gradient(theta: Tensor) -> Tensor:
            return mean_gradient(objective, theta, batches) + self.regularization * theta

        def hessian(theta: Tensor) -> Tensor:
            return damped(mean_curvature(problem, theta, batches, "hessian"), self.regularization)

        found = minimum(gradient, hessian, flat(objective), self.tolerance)
        return moved(objective, found).module


_PROBLEMS: WeakKeyDictionary[nn.Module, Problem] = WeakKeyDictionary()
"""Derivatives are checked once in a process."""


def minimum(
    gradient: Callable[[Tensor], Tensor],
    hessian: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float,
    factor: Tensor | None = None,
) -> Tensor:
    """θ (P,) with ‖gradient(θ)‖ ≤ tolerance, where ``hessian`` is positive definite on the way.

    Parameters
    ----------
    gradient, hessian : callable
        θ (P,) → (P,) and → (P, P).
    start : Tensor
        (P,).
    tolerance : float
        As above.
    factor : Tensor, optional
        Lower Cholesky factor of a Hessian nearby, to begin with.

    Raises
    ------
    ArithmeticError
        The Hessian is not positive definite, or the gradient does not fall any more.

    Examples
    --------
    >>> theta = minimum(lambda t: t.exp() - 2, lambda t: t.exp().diag(), torch.zeros(1).double(), 1e-12)
    >>> round(theta.exp().item(), 12)
    2.0
    """
    theta, slope, fresh, size = start, gradient(start), False, float("nan")
    for _ in range(MOST_STEPS):
        size = float(slope.norm())
        if size <= tolerance:
            return theta
        if factor is None:
            factor, fresh = _factor(hessian(theta)), True
        direction = torch.cholesky_solve(slope[:, None], factor)[:, 0]
        length = 1.0
        while True:
            found = gradient(theta - length * direction)
            if float(found.norm()) <= (1 - 1e-4 * length if fresh else ENOUGH) * size:
                theta, slope, fresh = theta - length * direction, found, False
                break
            if not fresh:
                factor = None
                break
            length /= 2
            if length < SHORTEST:
                raise ArithmeticError(
                    f"Newton's method stopped at a gradient of norm {size:.1e}, above {tolerance:.1e}"
                )
    raise ArithmeticError(
        f"Newton's method made {MOST_STEPS} steps, to a gradient of norm {size:.1e}, above {tolerance:.1e}"
    )


def _factor(matrix: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        raise ArithmeticError(
            "the Hessian, regularization included, is not positive definite; Newton's method is for losses that "
            "are convex in the parameters"
        )
    return factor


# -- sums over batches -----------------------------------------------------------------
def cut(x: Tree, y: Tree) -> Iterator[Batch]:
    """Batches of at most ``BATCH`` samples."""
    for start in range(0, leading_size(y), BATCH):
        part = slice(start, start + BATCH)
        yield sliced(x, part), sliced(y, part)


def in_double(x: Tree, y: Tree) -> Batch:
    """The same with floats in float64."""
    return optree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, (x, y))


def flat(objective: Objective) -> Tensor:
    """θ of the objective's module as a vector (P,)."""
    return objective.flatten(objective.parameters())


def moved(objective: Objective, theta: Tensor) -> Objective:
    """The objective of a copy of its module with parameters ``theta`` (P,)."""
    with alone():
        module = copy.deepcopy(objective.module)
    parts = objective.unflatten(theta)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in parts:
                parameter.copy_(parts[name])
    return Objective(module, objective.loss, objective.names)


def mean_gradient(objective: Objective, theta: Tensor, batches: Sequence[Batch]) -> Tensor:
    """(1/n) Σ_j ∇ℓ(θ; z_j), shape (P,), by one backward pass for each batch."""
    total, count = torch.zeros_like(theta), 0
    for x, y in batches:
        with differentiation():
            at = theta.detach().requires_grad_()
            value = objective.total_loss(objective.unflatten(at), x, y)
            total += torch.autograd.grad(value, at)[0]
        count += leading_size(y)
    return total / count


def mean_curvature(problem: Problem, theta: Tensor, batches: Sequence[Batch], curvature: str) -> Tensor:
    """The Hessian or another ``curvature`` of the mean loss at θ, shape (P, P)."""
    there = replace(problem, objective=moved(problem.objective, theta))
    parts = [matrix_sums(there, x, y, {}, curvature) for x, y in batches]
    return merge(parts).mean("matrix")


def damped(matrix: Tensor, regularization: float) -> Tensor:
    """C + λI."""
    return matrix + regularization * torch.eye(len(matrix), dtype=matrix.dtype)
