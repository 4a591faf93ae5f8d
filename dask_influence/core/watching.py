"""Watching: what enters layers and what comes back, at the targets given, by the fewest passes that will do.

Along a chain one pass forward and one back leave both with every linear layer; any other model is traced, asked for
its outputs and then pulled back (:mod:`~dask_influence.core.capture`).

Notation: n samples, T positions, q × p the matrix of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dask_influence.core.capture import CAPTURE_BUDGET, Captured, capture
from dask_influence.core.chain import Chain, Linear
from dask_influence.core.layers import Layer, Layout
from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.predictive import Expectation
from dask_influence.core.problem import Problem
from dask_influence.errors import DerivativeError

_AT_TARGETS = Expectation("empirical_fisher")
"""Columns whose pullback is the gradient at the targets given."""


def watched(problem: Problem, x: Tree, y: Tree, layout: Layout) -> Iterator[list[Captured]]:
    """Inputs and output gradients of each layer, some samples at a time.

    What is made of them is made while other threads may differentiate.

    Raises
    ------
    DerivativeError
        The model does not call one of them for these samples.
    """
    for part in layers_seen(problem, x, y, layout):
        called = [one for one in part if one is not None]
        if len(called) < len(part):
            path = layout.layers[part.index(None)].path
            raise DerivativeError(f"layer {path} is called for some samples only")
        yield called


def layers_seen(problem: Problem, x: Tree, y: Tree, layout: Layout) -> Iterator[list[Captured | None]]:
    """The same, with None for a layer that the model never calls."""
    if along_a_chain(problem):
        return _along(problem, x, y, layout)
    return capture(problem, x, y, layout, _AT_TARGETS.columns)


def along_a_chain(problem: Problem) -> bool:
    """Whether it takes no more than the passes of a chain."""
    return problem.forms.gradient == "chain"


def _along(problem: Problem, x: Tree, y: Tree, layout: Layout) -> Iterator[list[Captured | None]]:
    objective = problem.objective
    step = max(1, CAPTURE_BUDGET // (4 * problem.activations * objective.dtype.itemsize))
    for start in range(0, leading_size(y), step):
        own = slice(start, start + step)
        chain = Chain(objective, objective.parameters(), sliced(x, own), sliced(y, own), twice=False)
        seen = [_of_layer(chain, layer) for layer in layout.layers]
        del chain  # or it would be there beside the next one
        yield seen
        del seen


def _of_layer(chain: Chain, layer: Layer) -> Captured | None:
    """Positions of all calls of ``layer``, one after the other."""
    kind, name = ("weight", layer.weight) if layer.weight is not None else ("bias", layer.bias)
    calls = [step for step in chain.steps if isinstance(step, Linear) and step.names.get(kind) == name]
    if not calls:
        return None
    for call in calls:
        chain.loss.mark(call.adjoint)
    inputs, adjoints = (_joined(parts) for parts in zip(*((c.input, c.adjoint) for c in calls), strict=True))
    return Captured(inputs[:, :, None], adjoints[:, None, :, None])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """(n, T, ·) of (n, ..., ·) each."""
    rows = [part.reshape(len(part), -1, part.shape[-1]) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)
