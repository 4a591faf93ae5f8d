"""Elementary forms of torch's fused operations, and the setting that puts them in place.

torch's fused kernels carry hand-written derivatives, and some of those are wrong or missing
beyond the first order (torch 2.13, against central differences: ``jacrev∘jacrev`` of LayerNorm
is 5–9 % off, its derivative in x of a directional derivative 18–42 %, weight_norm's classic
double backward 19 %; hardsigmoid and EmbeddingBag have no second derivative, RNNs cannot be
vmapped over samples). The same operations written in additions, products and pointwise functions
differentiate correctly in any order, because each of those is right.

:func:`differentiation` routes calls to these forms for as long as it is open, also calls made
by functional code of a user's model; a plain forward pass outside of it keeps the fused kernel.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_RNN_OPERATIONS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


# -- normalisation ---------------------------------------------------------------------
def _standardise(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """``torch.nn.functional.layer_norm`` in elementary operations.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 3.0]])
    >>> torch.allclose(layer_norm(x, (2,)), functional.layer_norm(x, (2,)))
    True
    """
    result = _standardise(input, tuple(range(-len(normalized_shape), 0)), eps)
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """``torch.nn.functional.instance_norm`` in elementary operations."""
    if running_mean is not None:
        # With running statistics it is a batch norm, whose derivatives are right.
        return functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    result = _standardise(input, tuple(range(2, input.dim())), eps)
    per_channel = (-1,) + (1,) * (input.dim() - 2)
    result = result if weight is None else result * weight.reshape(per_channel)
    return result if bias is None else result + bias.reshape(per_channel)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: g · v / ‖v‖, the norm over all axes but ``dim`` (-1: over all)."""
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


# -- activations -----------------------------------------------------------------------
def glu(input: Tensor, dim: int = -1) -> Tensor:
    """``torch.nn.functional.glu``: first half times the sigmoid of the second."""
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.prelu``: x where it is positive, weight · x elsewhere."""
    if weight.numel() > 1 and input.dim() > 1:
        weight = weight.reshape((-1,) + (1,) * (input.dim() - 2))
    return torch.where(input > 0, input, weight * input)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``torch.nn.functional.hardsigmoid``, whose fused backward has no derivative."""
    return (input + 3).clamp(0, 6) / 6


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """``torch.nn.functional.rrelu`` in eval mode: a leaky ReLU of the mean slope."""
    if training:
        return functional.rrelu(input, lower, upper, training, inplace)
    return functional.leaky_relu(input, (lower + upper) / 2)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag`` of equally long bags without padding."""
    if input.dim() != 2 or max_norm is not None or padding_idx is not None or mode not in ("sum", "mean"):
        return functional.embedding_bag(
            input,
            weight,
            offsets,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            per_sample_weights,
            include_last_offset,
            padding_idx,
        )
    rows = functional.embedding(input, weight)  # (n, bag, width)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    return rows.sum(1) if mode == "sum" else rows.mean(1)


def bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.bilinear``; the fused kernel has no batching rule under ``vmap``."""
    result = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return result if bias is None else result + bias


# -- losses ----------------------------------------------------------------------------
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``torch.nn.functional.cross_entropy`` of class indices, whose fused kernels ``vmap`` takes apart slowly."""
    axis = 0 if input.dim() == 1 else 1
    indices = target.dtype == torch.int64 and target.shape == input.shape[:axis] + input.shape[axis + 1 :]
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0
    wide = input.dtype in (torch.float32, torch.float64)  # the fused kernel sums narrower ones in float32
    if not (indices and plain and wide):
        return functional.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    counted = target != ignore_index
    shifted = input - input.detach().amax(axis, keepdim=True)
    chosen = shifted.gather(axis, torch.where(counted, target, 0).unsqueeze(axis)).squeeze(axis)
    losses = torch.where(counted, shifted.exp().sum(axis).log() - chosen, 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


# -- recurrent cells and layers --------------------------------------------------------
def _gates(x: Tensor, h: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    w_ih, w_hh, *biases = cast("tuple[Tensor, ...]", weights)
    b_ih, b_hh = biases or (None, None)
    return functional.linear(x, w_ih, b_ih), functional.linear(h, w_hh, b_hh)


def gru_cell(input: Tensor, hx: Tensor, *weights: Tensor | None) -> Tensor:
    """One step of a gated recurrent unit; ``weights``: w_ih, w_hh and, if any, b_ih, b_hh."""
    of_input, of_state = _gates(input, hx, weights)
    i_reset, i_update, i_new = of_input.chunk(3, -1)
    h_reset, h_update, h_new = of_state.chunk(3, -1)
    update = torch.sigmoid(i_update + h_update)
    new = torch.tanh(i_new + torch.sigmoid(i_reset + h_reset) * h_new)
    return new + update * (hx - new)


def lstm_cell(input: Tensor, hx: Sequence[Tensor], *weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of a long short-term memory; state (h, c)."""
    hidden, cell = hx
    of_input, of_state = _gates(input, hidden, weights)
    i, f, g, o = (of_input + of_state).chunk(4, -1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def rnn_tanh_cell(input: Tensor, hx: Tensor, *weights: Tensor | None) -> Tensor:
    """One step of an Elman network with tanh."""
    return torch.tanh(torch.add(*_gates(input, hx, weights)))


def rnn_relu_cell(input: Tensor, hx: Tensor, *weights: Tensor | None) -> Tensor:
    """One step of an Elman network with ReLU."""
    return torch.relu(torch.add(*_gates(input, hx, weights)))


def _lstm_step(x: Tensor, state: tuple[Tensor, ...], *weights: Tensor) -> tuple[Tensor, ...]:
    if len(weights) % 2 == 0:
        return lstm_cell(x, state, *weights)
    hidden, cell = lstm_cell(x, state, *weights[:-1])  # proj_size: the last weight projects h
    return functional.linear(hidden, weights[-1]), cell


def _single(cell: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda x, state, *weights: (cell(x, state[0], *weights),)


_STEPS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": _lstm_step,
    "gru": _single(gru_cell),
    "rnn_tanh": _single(rnn_tanh_cell),
    "rnn_relu": _single(rnn_relu_cell),
}


def _scan(
    step: Callable[..., tuple[Tensor, ...]],
    sequence: list[Tensor],
    state: tuple[Tensor, ...],
    weights: Sequence[Tensor],
    reverse: bool,
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    hidden = []
    for x in reversed(sequence) if reverse else sequence:
        state = step(x, state, *weights)
        hidden.append(state[0])
    return (hidden[::-1] if reverse else hidden), state


def _recurrent(
    operation: str,
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """A stack of recurrent layers in eval mode; returns the sequence, then the last state(s)."""
    initial = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    directions = 2 if bidirectional else 1
    per_direction = len(params) // (num_layers * directions)
    sequence = list(input.unbind(1 if batch_first else 0))
    last: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * per_direction : (index + 1) * per_direction]
            state = tuple(s[index] for s in initial)
            hidden, state = _scan(_STEPS[operation], sequence, state, weights, direction == 1)
            outputs.append(hidden)
            last.append(state)
        sequence = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    final = tuple(torch.stack(states) for states in zip(*last, strict=True))
    return (torch.stack(sequence, 1 if batch_first else 0), *final)


def _recurrent_form(operation: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def form(*args: Any) -> Any:
        dense = len(args) == 9 and isinstance(args[3], bool)
        if not dense:  # packed sequences have no elementary form here
            return original(*args)
        input, hx, params, _has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        if train and dropout:
            return original(*args)
        return _recurrent(operation, input, hx, params, num_layers, bidirectional, batch_first)

    return form


_functions = torch._C._VariableFunctions
ELEMENTARY: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    functional.instance_norm: instance_norm,
    torch._weight_norm: weight_norm,
    functional.glu: glu,
    torch._C._nn.glu: glu,
    torch.prelu: prelu,
    Tensor.prelu: prelu,
    torch.bilinear: bilinear,
    functional.hardsigmoid: hardsigmoid,
    functional.rrelu: rrelu,
    functional.embedding_bag: embedding_bag,
    functional.cross_entropy: cross_entropy,
    _functions.gru_cell: gru_cell,
    _functions.lstm_cell: lstm_cell,
    _functions.rnn_tanh_cell: rnn_tanh_cell,
    _functions.rnn_relu_cell: rnn_relu_cell,
    **{
        getattr(_functions, name): _recurrent_form(name, getattr(_functions, name))
        for name in _RNN_OPERATIONS
    },
}
"""Fused operation to its elementary form."""


class ElementaryMode(TorchFunctionMode):
    """Routes the operations of :data:`ELEMENTARY` for code run under it in this thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return ELEMENTARY.get(func, func)(*args, **(kwargs or {}))


_lock = threading.RLock()
_depth = 0


@functools.cache
def _load_forward_mode() -> None:
    """Have torch load its forward-mode rules, a part of torch that warns of torch's own age.

    Where warnings are errors, the load would fail at every derivative that comes first, and the
    check would turn forward mode down.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Run the body outside of any inference mode and autocast of the caller's, which would change its numbers.

    Both belong to a thread: beside it, in a worker or a pool, the same work would not see them.

    Examples
    --------
    >>> with torch.autocast("cpu", dtype=torch.bfloat16), undisturbed():
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    kinds = ("cpu", "cuda")
    if not (torch.is_inference_mode_enabled() or any(map(torch.is_autocast_enabled, kinds))):
        yield  # as nearly always: to enter them takes a tenth of what a small batch does
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Run the body while no other thread is inside :func:`differentiation`: for what reads the module's parameters.

    Examples
    --------
    >>> with alone():
    ...     weight = torch.nn.Linear(1, 2).weight.detach()
    """
    with _lock, undisturbed():
        yield


@contextlib.contextmanager
def differentiation() -> Iterator[None]:
    """Run the body alone in this process, with derivatives that are right.

    ``functional_call`` swaps parameters in place and forward mode is process-global, so two
    threads that differentiate at once give silently wrong results: a re-entrant process-wide
    lock lets one in at a time. Inside, fused operations take their elementary forms, attention
    takes the maths kernel and transformers leave their fast path; all is restored on exit.

    Examples
    --------
    >>> with differentiation():
    ...     y = functional.glu(torch.ones(1, 2))
    """
    global _depth
    with _lock:
        if _depth:  # the settings are in place
            yield
            return
        _load_forward_mode()
        _depth += 1
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                undisturbed(),
                torch.enable_grad(),
                sdpa_kernel(SDPBackend.MATH),
                ElementaryMode(),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            _depth -= 1


@contextlib.contextmanager
def fused() -> Iterator[None]:
    """Inside :func:`differentiation`, take torch's own kernels again: the values to check against."""
    with torch._C.DisableTorchFunction():
        yield
