"""Layers whose gradient is a sum of products of what enters them and what comes back.

For a layer with weights W the gradient of one sample is G = Σ_t δ_t a_tᵀ over positions t:
a (p) is the layer's input, δ (q) the derivative by its output, and a trailing 1 in a stands for
the bias (the homogeneous coordinate). A convolution's positions are the places of its output
and a is the patch read there; a token sequence's positions are its tokens.

A kind of layer is two entries: in :data:`GEOMETRY`, which matrices a module holds, and in
:data:`CALLS`, how its functional call reads its inputs.

Notation: T positions, g groups, q × p the matrix of one group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.core.objective import Objective


# -- geometry: which parameters form which matrix ----------------------------------------
@dataclass(frozen=True)
class Layer:
    """One matrix of weights in θ, as g groups of q × p, with or without its bias.

    Attributes
    ----------
    path : str
        Module path, and the projection within an attention layer.
    weight, bias : str or None
        Names of the parameters in θ; None where that one is not.
    key : tuple of (str, int)
        Name of the weight tensor, in θ or frozen, and the first of its rows that is meant.
    bias_start : int
        First entry of the bias that is meant.
    groups, rows, columns : int
        g, q and p, without the bias.
    indexed : bool
        The input is an index and the group is what it picks (embedding).
    """

    path: str
    weight: str | None
    bias: str | None
    key: tuple[str, int]
    bias_start: int
    groups: int
    rows: int
    columns: int
    indexed: bool = False

    @property
    def width(self) -> int:
        """Columns of the matrix in θ: p, and 1 for the bias."""
        return (self.columns if self.weight else 0) + (1 if self.bias else 0)

    @property
    def size(self) -> int:
        """Parameters in θ."""
        return self.groups * self.rows * self.width

    def homogeneous(self, inputs: Tensor) -> Tensor:
        """Inputs (…, p) with the 1 of the bias; the 1 alone where only the bias is in θ."""
        parts = [inputs] if self.weight else []
        if self.bias:
            parts.append(torch.ones_like(inputs[..., :1]))
        return torch.cat(parts, dim=-1)

    def restricted(self, names: Sequence[str]) -> Layer | None:
        """The part whose parameters are among ``names``, or None."""
        part = replace(
            self,
            weight=self.weight if self.weight in names else None,
            bias=self.bias if self.bias in names else None,
        )
        return part if part.width else None


@dataclass(frozen=True)
class Layout:
    """θ in layers.

    Attributes
    ----------
    layers : tuple of Layer
        In the order of the modules.
    unsupported : tuple of (str, str)
        Parameters that are in no layer, and the module they belong to with its class.
    """

    layers: tuple[Layer, ...]
    unsupported: tuple[tuple[str, str], ...]

    def restricted(self, names: Sequence[str]) -> Layout:
        """The layers of a subset of θ."""
        parts = (layer.restricted(names) for layer in self.layers)
        return Layout(
            tuple(part for part in parts if part is not None),
            tuple(entry for entry in self.unsupported if entry[0] in names),
        )


Shapes = tuple[tuple[str, str, str, int, int, int, int, int], ...]
"""(projection, weight, bias, first row of each, groups, rows, columns) of each matrix in a module."""


def _linear(module: nn.Module) -> Shapes:
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (("", "weight", "bias", 0, 0, 1, int(rows), int(columns)),)


def _convolution(module: nn.Module) -> Shapes:
    groups, weight = int(module.groups), module.weight  # type: ignore[arg-type]
    rows = int(weight.shape[0]) // groups  # type: ignore[index]
    return (("", "weight", "bias", 0, 0, groups, rows, int(weight[0].numel())),)  # type: ignore[index]


def _embedding(module: nn.Module) -> Shapes:
    vocabulary, width = module.weight.shape  # type: ignore[misc]
    return (("", "weight", "", 0, 0, int(vocabulary), int(width), 1),)


def _norm(module: nn.Module) -> Shapes:
    """Scale and shift of each channel."""
    if module.weight is None:
        return ()
    return (("", "weight", "bias", 0, 0, int(module.weight.numel()), 1, 1),)  # type: ignore[operator]


def _attention(module: nn.Module) -> Shapes:
    """Query, key, value and output projection, each a matrix of its own."""
    width = int(module.embed_dim)  # type: ignore[arg-type]
    shapes = []
    for i, name in enumerate("qkv"):
        packed = module.in_proj_weight is not None
        weight = "in_proj_weight" if packed else f"{name}_proj_weight"
        columns = int(getattr(module, weight).shape[1])
        start = i * width
        shapes.append(
            (f"{name}_proj", weight, "in_proj_bias", start if packed else 0, start, 1, width, columns)
        )
    return tuple(shapes)


NORMS: tuple[type[nn.Module], ...] = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
"""They scale what they have standardised; of a batch norm that is running statistics' work, or samples mix."""

GEOMETRY: dict[type[nn.Module], Callable[[nn.Module], Shapes]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    **dict.fromkeys(NORMS, _norm),
    nn.MultiheadAttention: _attention,
}
"""Kinds of modules and the matrices in them; transposed convolutions are kinds of their own."""


def layout_of(objective: Objective) -> Layout:
    """θ in layers, and what is in none.

    A parameter that several modules share is in none: its gradient is a sum over kinds of use. Nor is the bias
    beside a shared weight, since calls are told apart by their weight.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.PReLU())
    >>> layout = layout_of(Objective.of(net, nn.functional.mse_loss))
    >>> layout.layers[0].path, layout.layers[0].width, layout.unsupported
    ('0', 3, (('1.weight', '1 (PReLU)'),))
    """
    shared = _shared(objective.module)
    twice = {name for owners in shared.values() for name in owners}
    layers = [
        layer
        for path, module in objective.module.named_modules()
        for layer in _layers_in(path, module, set(objective.names) - shared.keys())
        if layer.key[0] not in twice
    ]
    held = {name for layer in layers for name in (layer.weight, layer.bias)}
    unsupported = tuple(
        (
            name,
            f"shared by {' and '.join(shared[name])}" if name in shared else _owner(objective.module, name),
        )
        for name in objective.names
        if name not in held
    )
    return Layout(tuple(layers), unsupported)


def _layers_in(path: str, module: nn.Module, names: set[str]) -> Iterator[Layer]:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    geometry = next((of for kind, of in GEOMETRY.items() if isinstance(module, kind)), None)
    if geometry is None or not own:
        return
    if "weight" not in own and not isinstance(module, nn.MultiheadAttention):
        return  # a parametrised weight (weight_norm, spectral_norm) is no parameter
    prefix = f"{path}." if path else ""
    for projection, weight, bias, start, bias_start, groups, rows, columns in geometry(module):
        full = (f"{prefix}{weight}", f"{prefix}{bias}")
        layer = Layer(
            ".".join(part for part in (path, projection) if part) or type(module).__name__,
            full[0] if full[0] in names else None,
            full[1] if full[1] in names else None,
            (full[0], start),
            bias_start,
            groups,
            rows,
            columns,
            isinstance(module, nn.Embedding),
        )
        if layer.width:
            yield layer


def _shared(module: nn.Module) -> dict[str, list[str]]:
    """Parameters held by more than one module, and all their names."""
    owners: dict[int, list[str]] = {}
    for path, part in module.named_modules():
        for name, parameter in part.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return {names[0]: names for names in owners.values() if len(names) > 1}


def _owner(module: nn.Module, name: str) -> str:
    path = name.rpartition(".")[0]
    return f"{path or 'the model'} ({type(module.get_submodule(path)).__name__})"


# -- calls: what a layer is when the model runs ------------------------------------------
@dataclass(frozen=True)
class Call:
    """How a functional call reads its inputs.

    Attributes
    ----------
    inputs : callable
        Arguments of the call → a as (T, g, p), or (T,) indices.
    outputs : callable
        (g, derivative by the call's output) → δ as (T, g, q).
    """

    inputs: Callable[..., Tensor]
    outputs: Callable[[int, Tensor], Tensor]


def _linear_inputs(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return input.reshape(-1, 1, input.shape[-1])


def _trailing(groups: int, out: Tensor) -> Tensor:
    return out.reshape(-1, groups, out.shape[-1] // groups)


def _patches(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The patch that each place of the output reads, (T, g, channels of the group × kernel)."""
    kernel = weight.shape[2:]
    dims = len(kernel)
    spread, step = ((v,) * dims if isinstance(v, int) else tuple(v) for v in (dilation, stride))
    step = step * dims if len(step) == 1 else step
    spread = spread * dims if len(spread) == 1 else spread
    patches = functional.pad(input, _padding(padding, kernel, spread))
    for axis in range(dims):  # (B, C, D1 …) → (B, C, T1, k1, T2, k2 …)
        at, reach = 2 + 2 * axis, spread[axis] * (kernel[axis] - 1)
        starts = torch.arange(0, patches.shape[at] - reach, step[axis], device=input.device)
        index = starts[:, None] + spread[axis] * torch.arange(kernel[axis], device=input.device)
        shape = (*patches.shape[:at], *index.shape, *patches.shape[at + 1 :])
        patches = patches.index_select(at, index.reshape(-1)).reshape(shape)
    places, taps = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    patches = patches.permute(0, *places, 1, *taps)  # (B, T1, T2 …, C, k1, k2 …)
    return patches.reshape(-1, groups, weight[0].numel())


def _padding(padding: Any, kernel: Sequence[int], spread: Sequence[int]) -> list[int]:
    """For ``functional.pad``: last axis first, before and after."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, kernel, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    elif padding == "valid":
        sides = [(0, 0)] * len(kernel)
    else:
        widths = (padding,) * len(kernel) if isinstance(padding, int) else tuple(padding)
        widths = widths * len(kernel) if len(widths) == 1 else widths
        sides = [(w, w) for w in widths]
    return [width for side in reversed(sides) for width in side]


def _channels(groups: int, out: Tensor) -> Tensor:
    return _trailing(groups, out.movedim(1, -1))


def _tokens(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows picked; the padding row, which torch gives no gradient, as one past the last."""
    ids = input.reshape(-1)
    return ids if padding_idx is None else torch.where(ids == padding_idx % len(weight), len(weight), ids)


def _rows(groups: int, out: Tensor) -> Tensor:
    return out.reshape(-1, 1, out.shape[-1])


def _normalised(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The standardised input: each channel is a group, scale and shift its 1 × 2 matrix."""
    standard = functional.layer_norm(input, normalized_shape, None, None, eps)
    return standard.reshape(-1, math.prod(normalized_shape), 1)


def _divided(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """The same of a norm that only divides by the root mean square."""
    standard = functional.rms_norm(input, normalized_shape, None, eps)
    return standard.reshape(-1, math.prod(normalized_shape), 1)


def _standardised(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of a ``norm`` whose channels are the second axis."""

    def inputs(*args: Any, weight: Tensor | None = None, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        standard = norm(*args, **kwargs)
        return standard.movedim(1, -1).reshape(-1, standard.shape[1], 1)

    return inputs


def _units(groups: int, out: Tensor) -> Tensor:
    return out.reshape(-1, groups, 1)


CALLS: dict[Callable[..., Any], Call] = {
    functional.linear: Call(_linear_inputs, _trailing),
    torch.conv1d: Call(_patches, _channels),
    torch.conv2d: Call(_patches, _channels),
    torch.conv3d: Call(_patches, _channels),
    functional.embedding: Call(_tokens, _rows),
    functional.layer_norm: Call(_normalised, _units),
    functional.rms_norm: Call(_divided, _units),
    functional.group_norm: Call(_standardised(functional.group_norm), _channels),
    functional.batch_norm: Call(_standardised(functional.batch_norm), _channels),
    functional.instance_norm: Call(_standardised(functional.instance_norm), _channels),
}
"""The functional calls that are recognised, by the function torch dispatches on."""
