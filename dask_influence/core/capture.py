"""Capture: what enters each layer and what comes back, for each sample, in one forward pass.

A :class:`_Recorder` watches the functional calls of the model and recognises those of
:data:`~dask_influence.core.layers.CALLS` by the very weight tensor they receive. So a layer that
is called twice, or by functional code, is captured as well, and attention is, whose projections
never call a module. Samples are told apart by ``vmap``, wherever a model keeps its sample axis.

Notation: n samples, T positions, g groups, q × p the matrix of one group, K outputs of the
model, r columns in the output space that are pulled back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dask_influence.core.elementary import differentiation
from dask_influence.core.layers import CALLS, Layer, Layout, layout_of
from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.outputs import Outputs
from dask_influence.core.problem import Problem

CAPTURE_BUDGET = 256 * 2**20
"""Bytes that the captured inputs and output gradients of one batch may take."""

TYPICAL_COLUMNS = 8
"""Columns that outputs are computed ahead for; with more of them a batch is cut again."""


@dataclass(frozen=True)
class Captured:
    """What one layer saw of n samples.

    Attributes
    ----------
    inputs : Tensor
        a (n, T, g, p), or (n, T) indices with g for "none".
    derivatives : Tensor
        δ (n, r, T, g, q), one for each column of the output's factor.
    """

    inputs: Tensor
    derivatives: Tensor


@dataclass(frozen=True)
class Response:
    """How n samples respond to shifts c of the outputs of their layers, each called once in one position.

    Attributes
    ----------
    inputs : list of Tensor
        a (n, p) of each layer.
    derivatives : list of Tensor
        δ = ∂ℓ/∂c (n, q) of each.
    curvature : list of list of Tensor
        ∂²ℓ/∂c_l∂c_m (n, q, q') at [l][m].
    jacobians : list of list of (Tensor or None)
        ∂a_m/∂c_l (n, p', q) at [m][l]; None where the model calls m before l.
    """

    inputs: list[Tensor]
    derivatives: list[Tensor]
    curvature: list[list[Tensor]]
    jacobians: list[list[Tensor | None]]


Columns = Callable[[Outputs], Tensor]
"""Outputs of n samples → S (n, r, K), what is pulled back through the model for each."""


def capture(
    problem: Problem, x: Tree, y: Tree, layout: Layout, columns: Columns
) -> Iterator[list[Captured | None]]:
    """Inputs and output gradients of each layer, for as many samples at a time as the budget allows.

    What is made of them is made outside of :func:`differentiation`: other threads differentiate meanwhile.

    Yields
    ------
    list of (Captured or None)
        One entry for each layer of ``layout``; None for one that the model never calls.
    """
    tracer = _Tracer(problem, layout)
    per_sample = tracer.examined(x) * problem.objective.dtype.itemsize
    step = max(1, CAPTURE_BUDGET // (per_sample * TYPICAL_COLUMNS))
    for low in range(0, leading_size(y), step):
        block = slice(low, low + step)
        with differentiation(), torch.no_grad():
            outputs = Outputs.of(problem.objective, sliced(x, block), sliced(y, block))
            pulled = columns(outputs)
        inner = max(1, CAPTURE_BUDGET // (per_sample * (pulled.shape[1] + 2)))
        for start in range(0, len(pulled), inner):
            part = slice(start, start + inner)
            with differentiation(), torch.no_grad():
                seen = tracer.capture(outputs, sliced(outputs.x, part), pulled[part])
            yield seen


def responses(problem: Problem, x: Tree, y: Tree, layout: Layout, step: int) -> Iterator[Response] | None:
    """First and second derivatives in the layers' outputs, ``step`` samples at a time.

    None where a layer of ``layout`` is no linear one, is not called just once, or has several positions.
    """
    tracer = _Tracer(problem, layout)
    tracer.examined(x)
    order = tracer.single_calls()
    if order is None or not tracer.reverses:
        return None
    starts = range(0, leading_size(y), step)
    parts = (slice(start, start + step) for start in starts)
    return (tracer.response(sliced(x, part), sliced(y, part), order) for part in parts)


def perceptron(problem: Problem, x: Tree) -> Layout | None:
    """The layers, if they hold all of θ and are linear ones that a sample enters once, in one position; else None."""
    layout = layout_of(problem.objective)
    if layout.unsupported or any(layer.indexed or layer.groups > 1 for layer in layout.layers):
        return None
    tracer = _Tracer(problem, layout)
    tracer.examined(x)
    return None if tracer.single_calls() is None else layout


class _Tracer:
    """The calls of one model, found by a forward pass of one sample."""

    def __init__(self, problem: Problem, layout: Layout) -> None:
        self.objective, self.layout = problem.objective, layout
        self.batched = problem.forms.gradient != "loop"
        self.reverses = problem.forms.product in ("chain", "reverse_over_reverse")
        self.theta = self.objective.parameters()
        wanted = {layer.key[0] for layer in layout.layers}
        held = {**dict(self.objective.module.named_parameters()), **self.theta}
        self.watched = {id(tensor): name for name, tensor in held.items() if name in wanted}
        self.trace = _Recorder(self.watched)

    def examined(self, x: Tree) -> int:
        """Elements of inputs and outputs of one sample."""
        with differentiation(), torch.no_grad(), self.trace:
            self.objective.outputs(self.theta, sliced(x, slice(0, 1)))
        return 1 + sum(a.numel() for a in self.trace.inputs) + sum(s.numel() for s in self.trace.shapes)

    def single_calls(self) -> list[int] | None:
        """Which call is that of each layer, if those are linear ones of one position and there are no others."""
        keys, layers = self.trace.keys, self.layout.layers
        if not self.batched or sorted(keys) != sorted(layer.key for layer in layers):
            return None
        order = [keys.index(layer.key) for layer in layers]
        single = all(
            self.trace.functions[i] is functional.linear and self.trace.shapes[i].numel() == layer.rows
            for i, layer in zip(order, layers, strict=True)
        )
        return order if single else None

    def response(self, x: Tree, y: Tree, order: Sequence[int]) -> Response:
        """Of samples ``x`` and ``y``: reverse over reverse, a pullback for each output and each later input."""
        zeros = [torch.zeros(shape).to(self.theta[self.objective.names[0]]) for shape in self.trace.shapes]
        later = range(1, len(zeros))  # what enters the first call depends on no shift

        def of_one(x: Tree, y: Tree) -> Any:
            def loss(shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
                with _Recorder(self.watched, shifts) as recorder:
                    return self.objective.sample_loss(self.theta, x, y), recorder.inputs

            def first(shifts: list[Tensor]) -> tuple[Tensor, ...]:
                derivatives, inputs = grad(loss, has_aux=True)(shifts)
                return (*derivatives, *inputs)

            found, pull = vjp(first, zeros)  # type: ignore[misc] # two without has_aux
            seeds = _unit_seeds(found, [*range(len(zeros)), *(len(zeros) + i for i in later)])
            return found, vmap(lambda seed: pull(seed)[0])(seeds)

        with differentiation(), torch.no_grad():
            found, pulled = vmap(of_one)(x, y)
        derivatives, inputs = (
            [part.flatten(1) for part in half] for half in (found[: len(zeros)], found[len(zeros) :])
        )
        sizes = [part.shape[1] for part in (*derivatives, *(inputs[i] for i in later))]
        # [l] is by the shift of call l; its rows are those of all seeds
        by_shift = [part.flatten(2).split(sizes, 1) for part in pulled]
        return Response(
            [inputs[i] for i in order],
            [derivatives[i] for i in order],
            [[by_shift[m][i] for m in order] for i in order],
            [[by_shift[i][len(zeros) + m - 1] if m > i else None for i in order] for m in order],
        )

    def capture(self, outputs: Outputs, x: Tree, columns: Tensor) -> list[Captured | None]:
        """Of samples ``x``, pulling ``columns`` (n, r, K) back."""
        of_one = partial(self._of_one, outputs)
        if self.batched:
            inputs, derivatives = vmap(of_one)(x, columns)
        else:
            samples = [
                of_one(optree.tree_map(lambda a, j=j: a[j], x), rows) for j, rows in enumerate(columns)
            ]
            inputs, derivatives = (
                [torch.stack(parts) for parts in zip(*side, strict=True)]
                for side in zip(*samples, strict=True)
            )
        return [self._of_layer(layer, inputs, derivatives) for layer in self.layout.layers]

    def _of_one(self, outputs: Outputs, x: Tree, columns: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Of one sample without its leading axis: a, and δ for each of the columns (r, K)."""
        single = optree.tree_map(lambda a: a.unsqueeze(0), x)

        def run(shifts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with _Recorder(self.watched, shifts) as recorder:
                return outputs.at(self.theta, single)[0], recorder.inputs

        shifts = [torch.zeros(shape).to(columns) for shape in self.trace.shapes]
        _, pull, inputs = vjp(run, shifts, has_aux=True)  # type: ignore[misc] # three with has_aux
        if self.batched:
            return inputs, vmap(lambda column: pull(column)[0])(columns)
        pulled = [pull(column)[0] for column in columns]
        return inputs, [torch.stack(parts) for parts in zip(*pulled, strict=True)]

    def _of_layer(self, layer: Layer, inputs: list[Tensor], derivatives: list[Tensor]) -> Captured | None:
        """Positions of all calls of ``layer``, one after the other."""
        calls = [i for i, key in enumerate(self.trace.keys) if key == layer.key]
        if not calls:
            return None
        rows = []
        for i in calls:
            outputs = partial(CALLS[self.trace.functions[i]].outputs, layer.groups)
            rows.append(vmap(vmap(outputs))(derivatives[i]))
        if len(calls) == 1:
            return Captured(inputs[calls[0]], rows[0])
        return Captured(torch.cat([inputs[i] for i in calls], dim=1), torch.cat(rows, dim=2))


def _unit_seeds(values: Sequence[Tensor], wanted: Sequence[int]) -> tuple[Tensor, ...]:
    """A unit vector for each entry of the ``wanted`` ones of ``values``, with zeros for all the others."""
    sizes = [values[i].numel() for i in wanted]
    unit = torch.eye(sum(sizes)).to(values[0])
    parts = dict(zip(wanted, unit.split(sizes, 1), strict=True))
    none = unit[:, :1] * 0
    return tuple(
        (parts[i] if i in parts else none.expand(-1, value.numel())).reshape(-1, *value.shape)
        for i, value in enumerate(values)
    )


class _Recorder(TorchFunctionMode):
    """Records the calls that use a watched weight, and adds ``shifts`` to their outputs.

    The derivative by a shift is that by the output: δ.
    """

    def __init__(self, watched: Mapping[int, str], shifts: Sequence[Tensor] | None = None) -> None:
        super().__init__()
        self._watched, self._shifts = watched, shifts
        self.keys: list[tuple[str, int]] = []
        self.functions: list[Callable[..., Any]] = []
        self.inputs: list[Tensor] = []
        self.shapes: list[torch.Size] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._attend(func, *args, **kwargs)
        if func in CALLS:
            weight = kwargs["weight"] if "weight" in kwargs else args[1]
            name = self._watched.get(id(weight))
            if name is not None:
                return self._noted((name, 0), func, *args, **kwargs)
        return func(*args, **kwargs)

    def _noted(self, key: tuple[str, int], func: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        output = func(*args, **kwargs)
        self.keys.append(key)
        self.functions.append(func)
        self.inputs.append(CALLS[func].inputs(*args, **kwargs))
        self.shapes.append(output.shape)
        return output if self._shifts is None else output + self._shifts[len(self.keys) - 1]

    def _attend(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Projections made here, where they can be watched; attention gets identities in their place."""
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        width = given["embed_dim_to_check"]
        biases = [None] * 3 if given["in_proj_bias"] is None else given["in_proj_bias"].split(width)
        for i, source in enumerate(("query", "key", "value")):
            if given["use_separate_proj_weight"]:
                weight = given[f"{source[0]}_proj_weight"]
                name, start = self._watched.get(id(weight)), 0
            else:
                start = i * width
                name = self._watched.get(id(given["in_proj_weight"]))
                weight = given["in_proj_weight"][start : start + width]
            given[source] = self._projected(name, start, given[source], weight, biases[i])
        unit = torch.eye(width, dtype=given["query"].dtype, device=given["query"].device)
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        given.update(
            in_proj_weight=torch.cat([unit] * 3),
            in_proj_bias=None,
            use_separate_proj_weight=False,
            out_proj_weight=unit,
            out_proj_bias=None,
        )
        attended, weights = func(*bound.args, **bound.kwargs)
        return self._projected(self._watched.get(id(weight)), 0, attended, weight, bias), weights

    def _projected(self, name: str | None, start: int, *operands: Tensor | None) -> Tensor:
        if name is None:
            return functional.linear(*operands)  # type: ignore[arg-type]
        return self._noted((name, start), functional.linear, *operands)
