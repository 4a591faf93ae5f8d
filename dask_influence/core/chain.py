"""Derivatives along a chain of modules, each step of which is known: matrix products and little else.

Where the model is a sequence of modules, what enters a module is a, what leaves it h, and ā, h̄ are
the derivatives of the loss by them. A direction v in θ moves all four: ȧ, ḣ on the way forward, the
derivatives of a and h along v, and ā̇, h̄̇ on the way back. The last of these is the mixed derivative
∇x ⟨v, ∇θ ℓ⟩, and what they leave in a layer is the product of the Hessian with v. (Pearlmutter 1994,
the R operator.) Of a linear layer with weights W and V the part of v that belongs to them,

    ḣ = W ȧ + V a,        ā̇ = Wᵀ h̄̇ + Vᵀ h̄,        (H v)_W = h̄̇ aᵀ + h̄ ȧᵀ;

of an elementwise function φ

    ḣ = φ'(a) ∘ ȧ,        ā̇ = φ'(a) ∘ h̄̇ + φ''(a) ∘ h̄ ∘ ȧ;

and of the loss, whose second derivative A is small, h̄̇ = A ḣ. Everything without a dot is the same
for all directions and is computed once. Directions stand next to the samples, ȧ (n, D, ...), so that what
they have in common is one matrix product for all of them: V a for the rows of all V, W ȧ for all samples and
directions. They go through in blocks that stay in the cache.

A kind of module is one class here; any other module takes its derivatives from ``torch.func``, and a loss that is not
written down in :mod:`~dask_influence.core.closed` from a graph.

Products with the Hessian go the same way in :mod:`~dask_influence.core.multiply`.

Notation: n samples, D directions, F input features.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from dask_influence.core.closed import FUNCTIONS, closed_loss
from dask_influence.core.elementary import alone, differentiation
from dask_influence.core.gemm import add_product, linear, product, products
from dask_influence.core.objective import Objective, Substituted, Tree, hooked
from dask_influence.errors import ConfigurationError

Along = Mapping[str, Tensor]
"""Directions by the names of θ, each (D, *shape)."""

Moved = Tensor | None
"""A derivative along D directions, (n, D, ...); None stands for zero."""

CACHE = 2**21
"""Bytes that the widest array of a block of directions may take."""

WRITTEN = 2**22
"""Bytes of what is written in two steps at a time."""

ROWS = 256
"""Rows that a matrix product should have, whatever the cache holds."""

ORDERED = 2**25
"""Bytes that the directions of a block may take themselves."""

SMALL_OUTPUT = 64
"""Outputs of a sample up to which the loss's second derivative is formed."""


class Chain:
    """One batch of samples along the chain: all that does not depend on a direction.

    Parameters
    ----------
    objective : Objective
        Its module is a sequence of modules with one tensor between each two.
    theta : mapping of str to Tensor
        θ by name.
    x, y : Tensor and tree
        The samples.
    twice : bool
        Whether second derivatives are wanted too.

    Raises
    ------
    ConfigurationError
        Where the model is no chain.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> objective = Objective.of(net, nn.functional.mse_loss)
    >>> chain = Chain(objective, objective.parameters(), torch.ones(5, 3), torch.zeros(5, 2))
    >>> chain.mixed_derivatives(torch.ones(7, objective.size)).shape
    torch.Size([5, 7, 3])
    """

    def __init__(
        self, objective: Objective, theta: Mapping[str, Tensor], x: Tree, y: Tree, *, twice: bool = True
    ) -> None:
        self.objective = objective
        modules = list(_links(objective.module))
        with differentiation() if any(map(_differentiated, modules)) else alone(), torch.no_grad():
            self.steps = list(_steps(objective, modules, theta, x, twice))
            output = self.steps[-1].output
            self.loss = Loss(objective, output, y, twice)
            adjoint = self.loss.adjoint
            used = next((i for i, step in enumerate(self.steps) if not isinstance(step, Reshaped)), 0)
            for step in reversed(self.steps[used + 1 :]):
                adjoint = step.back(adjoint)
            self.steps[used].end(adjoint)

    def gradients(self) -> Tensor:
        """∇θ ℓ(z_j), (n, P): of each linear layer h̄ aᵀ, added up over positions and uses of its weights."""
        entering = self.steps[0].input
        result = entering.new_empty(len(entering), self.objective.size)
        rows, written = self.objective.unflatten(result), set[str]()
        with torch.no_grad():
            for step in self.moving:
                if isinstance(step, Linear):
                    step.write_gradients(rows, written)
            for name in rows.keys() - written:
                rows[name].zero_()
            self.loss.mark(result)
        return result

    def mixed_derivatives(self, directions: Tensor, out: Tensor | None = None) -> Tensor:
        """∇x ⟨v_d, ∇θ ℓ(z_j)⟩ for ``directions`` (D, P): (n, D, *features).

        ``out`` (D, n, *features) is memory to take for it. Several threads may call this at once.
        """
        first = self.steps[0].input
        result = first.new_empty(len(directions), *first.shape) if out is None else out
        samples_first, block = result.transpose(0, 1), self._block(len(directions))
        with torch.no_grad():
            for start in range(0, len(directions), block):
                part = slice(start, start + block)
                self._write_mixed(self.objective.unflatten(directions[part]), result[part])
            self.loss.mark(samples_first)
        return samples_first

    def _write_mixed(self, along: Along, into: Tensor) -> None:
        """ā̇ of the first step, into (D, n, *features)."""
        moved: list[Moved] = [None]
        for step in self.steps:
            moved.append(step.push(along, moved[-1]))
        output = moved.pop()
        adjoint = None if output is None else self.loss.pull(output)
        for step in reversed(self.steps[1:]):
            adjoint = step.pull(along, moved.pop(), adjoint)
        self.steps[0].write_pulled(along, adjoint, into)

    @cached_property
    def moving(self) -> list[Step]:
        """The steps from the first with parameters in θ: none before it moves.

        Raises
        ------
        ConfigurationError
            Where parameters in θ belong to another module than a linear layer.
        """
        for step, module in zip(self.steps, _links(self.objective.module), strict=True):
            if isinstance(step, General) and step.names:
                raise ConfigurationError(
                    f"{type(module).__name__} holds parameters in θ and is no linear layer"
                )
        held = (i for i, step in enumerate(self.steps) if isinstance(step, Linear) and step.names)
        return self.steps[next(held, len(self.steps) - 1) :]

    @property
    def nbytes(self) -> int:
        """Bytes of what it holds beside its samples, about: values and derivatives of what each step returns."""
        return 4 * sum(step.output.nbytes for step in self.steps)

    def _block(self, directions: int) -> int:
        """Directions at a time: what the cache holds, but enough for products of a fair size.

        They are put in order, those of a layer at a time, for which few samples should not take much memory.
        """
        samples, size = len(self.steps[0].input), self.objective.size * self.objective.dtype.itemsize
        widest = max(step.output.nbytes for step in self.steps)
        if not self.steps[0].writes:
            widest = max(widest, self.steps[0].input.nbytes)
        block = max(CACHE // max(1, widest), ROWS // max(1, samples))
        return max(1, min(directions, block, ORDERED // size))


# -- the steps -------------------------------------------------------------------------
class Step(abc.ABC):
    """One module, at what enters it here.

    Attributes
    ----------
    input, output : Tensor
        a and h, (n, ...).
    adjoint : Tensor
        h̄, known after :meth:`back`.
    """

    def __init__(self, entering: Tensor, output: Tensor) -> None:
        self.input, self.output = entering, output

    def back(self, adjoint: Tensor) -> Tensor:
        """ā of h̄, which is remembered."""
        self.adjoint = adjoint
        return self._back(adjoint)

    def end(self, adjoint: Tensor) -> None:
        """:meth:`back` where nobody asks for ā."""
        self.back(adjoint)

    @abc.abstractmethod
    def _back(self, adjoint: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def push(self, along: Along, tangent: Moved) -> Moved:
        """ḣ of ȧ, whose memory it may take where the way back does without it."""

    @abc.abstractmethod
    def pull(self, along: Along, tangent: Moved, adjoint: Moved) -> Moved:
        """ā̇ of ȧ and h̄̇, whose memory it may take."""

    @property
    def writes(self) -> bool:
        """Whether :meth:`write_pulled` takes no memory of the size of what it writes."""
        return False

    def write_pulled(self, along: Along, adjoint: Moved, into: Tensor) -> None:
        """:meth:`pull` of the first step, which nothing has moved before, into (D, n, ...)."""
        moved = self.pull(along, None, adjoint)
        if moved is None:
            into.zero_()
        else:
            into.copy_(moved.transpose(0, 1))


class Linear(Step):
    """h = W a + b."""

    def __init__(self, module: nn.Module, theta: _Own, entering: Tensor, twice: bool) -> None:
        self.names = theta.names
        self.weight = theta.values["weight"]
        super().__init__(entering, linear(entering, self.weight, theta.values.get("bias")))

    def end(self, adjoint: Tensor) -> None:
        """h̄ alone."""
        self.adjoint = adjoint

    def _back(self, adjoint: Tensor) -> Tensor:
        return product(adjoint, self.weight)

    def write_gradients(self, rows: Along, written: set[str]) -> None:
        """h̄ aᵀ and h̄ of each sample into ``rows`` (n, *shape), added to what was ``written`` there before."""
        adjoint, entering = (a.reshape(len(a), -1, a.shape[-1]) for a in (self.adjoint, self.input))
        for own, name in self.names.items():
            into, again = rows[name], name in written
            if own == "bias":
                into.copy_(into + adjoint.sum(1) if again else adjoint.sum(1))
            elif again or adjoint.shape[1] > 1:
                torch.baddbmm(into, adjoint.mT, entering, beta=int(again), out=into)
            else:
                torch.mul(adjoint.mT, entering, out=into)
            written.add(name)

    def push(self, along: Along, tangent: Moved) -> Moved:
        """ḣ = W ȧ + V a, and the direction of the bias."""
        weights, biases = self.of(along, "weight"), self.of(along, "bias")
        moved = None
        if weights is not None:
            moved = self._spread(product(matrix(self.input), weights.flatten(0, 1).mT), len(weights))
        moved = _added(moved, tangent, self.weight.mT)
        if biases is not None:
            if moved is None:
                moved = biases.new_zeros(len(self.output), len(biases), *self.output.shape[1:])
            moved += biases.reshape(len(biases), *(1,) * (self.output.dim() - 2), -1)
        return moved

    def pull(self, along: Along, tangent: Moved, adjoint: Moved) -> Moved:
        """ā̇ = Wᵀ h̄̇ + Vᵀ h̄."""
        weights = self.of(along, "weight")
        moved = None
        if weights is not None:
            side_by_side = weights.transpose(0, 1).flatten(1)  # (q, D p)
            moved = self._spread(product(matrix(self.adjoint), side_by_side), len(weights))
        return _added(moved, adjoint, self.weight)

    @property
    def writes(self) -> bool:
        """Where samples have one position each."""
        return self.input.dim() == 2

    def write_pulled(self, along: Along, adjoint: Moved, into: Tensor) -> None:
        """:meth:`pull` without a copy: where samples have one position each, a matrix product for each direction."""
        weights = self.of(along, "weight")
        if not self.writes or (weights is None and adjoint is None):
            super().write_pulled(along, adjoint, into)
            return
        # both products of some directions while the cache holds them
        several = max(1, WRITTEN // max(1, into[:1].nbytes))
        for low in range(0, len(into), several):
            part = slice(low, low + several)
            if weights is not None:
                products(self.adjoint, weights[part], into[part])
            if adjoint is not None:
                products(adjoint[:, part].transpose(0, 1), self.weight, into[part], add=weights is not None)

    def _spread(self, rows: Tensor, count: int) -> Tensor:
        """(n, D, ..., p), in order, of rows (n S, D p) for the S positions of each sample."""
        leading = self.input.shape[:-1]
        if len(leading) == 1:
            return rows.unflatten(1, (count, -1))
        apart = rows.reshape(leading[0], -1, count, rows.shape[1] // count).transpose(1, 2)  # (n, D, S, p)
        return apart.contiguous().view(leading[0], count, *leading[1:], -1)

    def of(self, along: Along, name: str) -> Tensor | None:
        """The part of ``along`` that belongs to the parameter; None where it is not in θ."""
        return along.get(self.names[name]) if name in self.names else None


class Elementwise(Step):
    """h = φ(a), entry by entry."""

    def __init__(self, module: nn.Module, theta: _Own, entering: Tensor, twice: bool) -> None:
        self._module, self._twice = module, twice
        super().__init__(entering, module(entering.clone()))  # some work in place

    def _back(self, adjoint: Tensor) -> Tensor:
        with torch.enable_grad():
            entering = self.input.detach().requires_grad_()
            slope = _derivative(self._module(entering.clone()).sum(), entering, keep=self._twice)
            bend = _derivative((slope * adjoint).sum(), entering) if self._twice else None
        self.slope = slope.detach()
        self.bend = bend if bend is not None and bend.any() else None  # piecewise linear ones have none
        return self.slope * adjoint

    def push(self, along: Along, tangent: Moved) -> Moved:
        """ḣ = φ'(a) ∘ ȧ."""
        if tangent is None:
            return None
        slope = self.slope[:, None]
        return tangent.mul_(slope) if self.bend is None else slope * tangent

    def pull(self, along: Along, tangent: Moved, adjoint: Moved) -> Moved:
        """ā̇ = φ'(a) ∘ h̄̇ + φ''(a) ∘ h̄ ∘ ȧ."""
        moved = None if adjoint is None else adjoint.mul_(self.slope[:, None])
        if tangent is None or self.bend is None:
            return moved
        bend = self.bend[:, None]
        return bend * tangent if moved is None else moved.addcmul_(bend, tangent)


class Closed(Elementwise):
    """One of those whose derivatives are written down."""

    def __init__(self, module: nn.Module, theta: _Own, entering: Tensor, twice: bool) -> None:
        self._function, self._twice = FUNCTIONS[type(module)], twice
        Step.__init__(self, entering, self._function.value(entering))

    def _back(self, adjoint: Tensor) -> Tensor:
        self.slope, self.bend = self._function.slope(self.output), None
        if self._twice and self._function.bend is not None:
            self.bend = self._function.bend(self.output, self.slope) * adjoint
        return self.slope * adjoint


class Reshaped(Step):
    """h holds the entries of a in their order."""

    def __init__(self, module: nn.Module, theta: _Own, entering: Tensor, twice: bool) -> None:
        super().__init__(entering, module(entering))

    def _back(self, adjoint: Tensor) -> Tensor:
        return adjoint.reshape(self.input.shape)

    def push(self, along: Along, tangent: Moved) -> Moved:
        """ḣ of ȧ."""
        return None if tangent is None else tangent.reshape(*tangent.shape[:2], *self.output.shape[1:])

    def pull(self, along: Along, tangent: Moved, adjoint: Moved) -> Moved:
        """ā̇ of ȧ and h̄̇."""
        return None if adjoint is None else adjoint.reshape(*adjoint.shape[:2], *self.input.shape[1:])


class General(Step):
    """Any module of one tensor, by ``torch.func``."""

    def __init__(self, module: nn.Module, theta: _Own, entering: Tensor, twice: bool) -> None:
        self.names, self._theta = theta.names, {name: theta.values[name] for name in theta.names}
        self._call = Substituted(module)
        super().__init__(entering, self._call(self._theta, entering))
        if not isinstance(self.output, Tensor):
            raise ConfigurationError(
                f"{type(module).__name__} returns {type(self.output).__name__}, no tensor"
            )

    def _back(self, adjoint: Tensor) -> Tensor:
        return self._pulled(self._theta, self.input, adjoint)

    def _pulled(self, own: Mapping[str, Tensor], entering: Tensor, adjoint: Tensor) -> Tensor:
        result: Any = vjp(lambda a: self._call(own, a), entering)
        return result[1](adjoint)[0]

    def push(self, along: Along, tangent: Moved) -> Moved:
        """ḣ of ȧ."""
        return self._moved(self._call, along, (self.input, tangent))

    def pull(self, along: Along, tangent: Moved, adjoint: Moved) -> Moved:
        """ā̇ of ȧ and h̄̇."""
        return self._moved(self._pulled, along, (self.input, tangent), (self.adjoint, adjoint))

    def _moved(
        self, function: Callable[..., Tensor], along: Along, *pairs: tuple[Tensor, Tensor | None]
    ) -> Tensor | None:
        """The derivative of ``function`` of θ and values, along directions and the values' tangents."""
        own = {name: along[full] for name, full in self.names.items()}
        given = [tangent for _, tangent in pairs if tangent is not None]
        if not own and not given:
            return None
        count = len(next(iter(own.values()))) if own else given[0].shape[1]
        values = [value for value, _ in pairs]
        tangents = [
            torch.zeros_like(value)[:, None].expand(-1, count, *value.shape[1:])
            if tangent is None
            else tangent
            for value, tangent in pairs
        ]

        def of(direction: Mapping[str, Tensor], *moved: Tensor) -> Tensor:
            result: Any = jvp(function, (self._theta, *values), (direction, *moved))
            return result[1]

        with differentiation(), torch.no_grad():
            return vmap(of, in_dims=(0, *(1,) * len(tangents)), out_dims=1)(own, *tangents).contiguous()


class Loss:
    """Σ_j ℓ as a function of the chain's output."""

    def __init__(self, objective: Objective, output: Tensor, y: Tree, twice: bool) -> None:
        self._each = partial(objective.losses, output, y)
        self._closed = closed_loss(objective.loss, output, y)
        self._matrices: Tensor | None = None
        if self._closed is not None:
            self._total, self.adjoint = self._closed.total, self._closed.adjoint
            if twice and output[:1].numel() <= SMALL_OUTPUT and self._closed.matrices is not None:
                self._matrices = self._closed.matrices()
            return
        with differentiation(), torch.no_grad():
            self._differentiate(objective, output, y, twice)

    def _differentiate(self, objective: Objective, output: Tensor, y: Tree, twice: bool) -> None:
        with torch.enable_grad():
            self._output = output.detach().requires_grad_()
            # not the mean times n: a loss that leaves out some of its samples is the mean of the others
            total = objective.losses(self._output, y).sum()
            self._adjoint = _derivative(total, self._output, keep=twice)
        self._total = total.detach()
        # in memory of its own: the gradient of a sum is one number for all samples, and they may be marked
        self.adjoint = self._adjoint.detach().clone(memory_format=torch.contiguous_format)
        size = math.prod(output.shape[1:])
        if twice and size <= SMALL_OUTPUT:
            unit = torch.eye(size, dtype=output.dtype, device=output.device)
            seeds = unit[:, None].expand(-1, len(output), -1).reshape(size, *output.shape)
            self._matrices = self._times(seeds).reshape(size, len(output), size).transpose(0, 1).contiguous()

    def mark(self, rows: Tensor) -> None:
        """NaN in the ``rows`` (n, ...) of samples whose loss is not finite, whatever its derivatives are."""
        if not self._total.isfinite():
            with differentiation():
                rows[~self._each().isfinite()] = torch.nan

    def _times(self, tangents: Tensor) -> Tensor:
        return _derivative(self._adjoint, self._output, seeds=tangents)

    def pull(self, tangent: Tensor) -> Tensor:
        """h̄̇ = A ḣ, (n, D, ...)."""
        if self._matrices is not None:
            return torch.bmm(tangent.flatten(2), self._matrices).reshape(tangent.shape)
        if self._closed is not None:
            return self._closed.times(tangent)
        with differentiation():
            return self._times(tangent.transpose(0, 1)).transpose(0, 1)


def _derivative(value: Tensor, at: Tensor, *, keep: bool = False, seeds: Tensor | None = None) -> Tensor:
    """∇ of a scalar, differentiable if it is to be kept; or products with each of the ``seeds``."""
    shape = at.shape if seeds is None else (len(seeds), *at.shape)
    if not value.requires_grad:  # a linear function's second derivative
        return at.new_zeros(shape)
    (found,) = torch.autograd.grad(
        value,
        at,
        seeds,
        create_graph=keep,
        retain_graph=keep or seeds is not None,
        is_grads_batched=seeds is not None,
        allow_unused=True,
    )
    return at.new_zeros(shape) if found is None else found


def matrix(values: Tensor) -> Tensor:
    """All but the last axis as one: samples and their positions as rows."""
    return values.reshape(-1, values.shape[-1])


def _added(moved: Moved, tangent: Moved, weight: Tensor) -> Moved:
    """``tangent`` (n, D, ..., p) times ``weight`` (p, q), added to what has ``moved`` (n, D, ..., q)."""
    if tangent is None:
        return moved
    rows = matrix(tangent)
    if moved is None:
        return product(rows, weight).reshape(*tangent.shape[:-1], -1)
    add_product(moved.view(-1, moved.shape[-1]), rows, weight)
    return moved


# -- which step a module is ------------------------------------------------------------
class _Own:
    """A module's own parameters: those in θ by name, and the values of all."""

    def __init__(self, module: nn.Module, theta: Mapping[str, Tensor], known: Mapping[int, str]) -> None:
        held = dict(module.named_parameters())
        self.names = {name: known[id(value)] for name, value in held.items() if id(value) in known}
        self.values = {
            name: theta[self.names[name]] if name in self.names else value.detach()
            for name, value in held.items()
        }


_Maker = Callable[[nn.Module, _Own, Tensor, bool], Step]

_KINDS: dict[type[nn.Module], _Maker] = {
    nn.Linear: Linear,
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.Identity), Reshaped),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), Reshaped),
    **dict.fromkeys(FUNCTIONS, Closed),
    **dict.fromkeys(
        (
            nn.CELU,
            nn.ELU,
            nn.GELU,
            nn.Hardtanh,
            nn.LeakyReLU,
            nn.LogSigmoid,
            nn.Mish,
            nn.ReLU6,
            nn.SELU,
            nn.SiLU,
            nn.Softplus,
            nn.Softsign,
            nn.Tanhshrink,
        ),
        Elementwise,
    ),
}
"""Modules by their exact class: a subclass may do anything. (Dropout is the identity in eval mode.)"""


def _steps(
    objective: Objective, modules: Sequence[nn.Module], theta: Mapping[str, Tensor], x: Tree, twice: bool
) -> Iterator[Step]:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise ConfigurationError("the model's input is not one floating tensor with features")
    if nn.Linear not in map(type, modules):
        raise ConfigurationError("the model is no chain of modules with linear layers")
    known = {id(value): name for name, value in objective.module.named_parameters() if name in theta}
    entering = x
    for module in modules:
        step = _kind(module)(module, _Own(module, theta, known), entering, twice)
        yield step
        entering = step.output


def _kind(module: nn.Module) -> _Maker:
    return General if hooked(module) else _KINDS.get(type(module), General)


def _differentiated(module: nn.Module) -> bool:
    """Whether its step takes derivatives from torch."""
    return _kind(module) in (Elementwise, General)


def _links(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of nested sequences, in order."""
    if type(module) is nn.Sequential and not hooked(module):
        for part in module:
            yield from _links(part)
    else:
        yield module
