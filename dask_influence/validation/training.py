"""Training functions: how a user trains the model again, and a ready one for plain supervised PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import optree
import torch
from torch import Tensor, nn

from dask_influence.core.objective import Loss, Tree, leading_size
from dask_influence.errors import ConfigurationError
from dask_influence.scalars import check_integer, check_number


class TrainingFunction(Protocol):
    """What trains a model on some of the data.

    It must be picklable, so that a cluster's workers can call it, and give the same model for the same
    arguments: all of its randomness from ``seed``.
    """

    def __call__(self, x: Tree, y: Tree, seed: int) -> nn.Module:
        """The model trained on samples ``x`` and ``y``, tensors or trees of them on the CPU."""
        ...


@dataclass(frozen=True)
class Training:
    """Minimises mean loss + regularization/2 ‖θ‖² over the samples given.

    Parameters
    ----------
    build : callable
        () → untrained model; it is called with torch's generator at the seed.
    loss : callable
        Mean-reduced, as for the influence model.
    optimizer : callable
        Parameters → optimizer; default Adam with torch's own settings. One that takes a closure
        (``torch.optim.LBFGS``) gets it.
    steps : int
        Steps of the optimizer.
    batch_size : int, optional
        Samples of a step, in an order shuffled anew for every pass; default all of them.
    regularization : float
        Of the penalty, whose second derivative it is: the ``hessian_regularization`` that suits a
        model trained so.

    Raises
    ------
    ConfigurationError
        Numbers out of range; something that cannot be called.

    Examples
    --------
    >>> training = Training(lambda: nn.Linear(2, 1), nn.functional.mse_loss, steps=3)
    >>> one, other = (training(torch.ones(4, 2), torch.zeros(4, 1), seed=7) for _ in range(2))
    >>> torch.equal(one.weight, other.weight)
    True
    """

    build: Callable[[], nn.Module]
    loss: Loss
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.Adam
    steps: int = 1000
    batch_size: int | None = None
    regularization: float = 0.0

    def __post_init__(self) -> None:
        for name in ("build", "loss", "optimizer"):
            if not callable(getattr(self, name)):
                raise ConfigurationError(f"{name} must be callable; got {getattr(self, name)!r}")
        check_integer("steps", self.steps)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size)
        check_number("regularization", self.regularization)
        if not 0 <= self.regularization < float("inf"):
            raise ConfigurationError(f"regularization must be ≥ 0 and finite; got {self.regularization!r}")

    def __call__(self, x: Tree, y: Tree, seed: int) -> nn.Module:
        """The model trained on all of ``x`` and ``y``."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            model = self.build().train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = self.optimizer(trained)
            order = _Order(leading_size(y), self.batch_size)
            for _ in range(self.steps):
                part = order.next()
                batch_x, batch_y = (x, y) if part is None else (_picked(x, part), _picked(y, part))

                def closure(batch_x: Tree = batch_x, batch_y: Tree = batch_y) -> Tensor:
                    optimizer.zero_grad()
                    value = self.loss(_called(model, batch_x), batch_y)
                    if self.regularization:
                        squares = torch.stack([p.square().sum() for p in trained]).sum()
                        value = value + self.regularization / 2 * squares
                    value.backward()
                    return value

                optimizer.step(closure)  # type: ignore[arg-type] # all take tensors as well
        return model.eval()


class _Order:
    """Batches of an order that is shuffled for every pass."""

    def __init__(self, count: int, size: int | None) -> None:
        self._count, self._size = count, size
        self._left: list[Tensor] = []

    def next(self) -> Tensor | None:
        """Indices of the next batch; None stands for all samples."""
        if self._size is None or self._size >= self._count:
            return None
        if not self._left:
            self._left = list(torch.randperm(self._count).split(self._size))
        return self._left.pop(0)


def _picked(tree: Tree, part: Tensor) -> Tree:
    return optree.tree_map(lambda leaf: leaf[part], tree)


def _called(model: nn.Module, x: Tree) -> Any:
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)
