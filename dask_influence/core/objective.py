"""Objective: the model and its loss as functions of the parameters θ.

Notation used below ``core``: n samples in a chunk, P parameters in θ, B vectors in a
block, D directions, F features of one input.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from dask_influence.core.elementary import alone
from dask_influence.errors import ConfigurationError

Tree = Any
"""A tensor, or a tuple or mapping of tensors that share one leading sample axis."""

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, target)``, mean-reduced over the leading axis."""


def select_parameters(module: nn.Module, patterns: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of θ in the order of ``module.named_parameters()``.

    Frozen parameters are left out; ``patterns`` (names or globs) narrow the rest.

    Raises
    ------
    ConfigurationError
        Where a pattern matches no trainable parameter, or nothing is left.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> select_parameters(net, ["1.*"])
    ('1.weight', '1.bias')
    """
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise ConfigurationError("model has no parameter with requires_grad=True; unfreeze at least one")
    if patterns is None:
        return tuple(trainable)
    if isinstance(patterns, str):
        patterns = [patterns]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in trainable):
            raise ConfigurationError(
                f"parameters={pattern!r} matches no trainable parameter; the model has {', '.join(trainable)}"
            )
    selected = tuple(name for name in trainable if any(fnmatch.fnmatchcase(name, p) for p in patterns))
    if not selected:
        raise ConfigurationError("parameters=[] selects nothing; name at least one parameter or pattern")
    return selected


class Substituted:
    """Calls of a module with other values of its parameters, which are its own again afterwards.

    A parameter is put in one place of each module that holds it: torch would put it in place, and back, once for each
    path to a module, and of one that is registered twice what was put in place would stay.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        places = dict[int, list[str]]()
        for path, owner in module.named_modules():
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                places.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
        self._places = {name: places.get(id(own), [name]) for name, own in module.named_parameters()}

    def __call__(self, parameters: Mapping[str, Tensor], /, *args: Any, **named: Any) -> Any:
        """What the module returns with ``parameters``, by their names."""
        held = {place: value for name, value in parameters.items() for place in self._places[name]}
        return functional_call(self._module, held, args, named, tie_weights=False)


class Objective:
    """The per-sample loss ℓ(θ; z) of one model, with θ as a flat vector of P entries.

    Parameters
    ----------
    module : torch.nn.Module
        Used as it is: :meth:`of` makes the private copy in eval mode.
    loss : callable
        ``loss(output, target)``, mean-reduced over the leading axis.
    names : sequence of str
        Parameters in θ, in the order of ``module.named_parameters()``.

    Examples
    --------
    >>> net = nn.Linear(2, 1)
    >>> objective = Objective.of(net, nn.functional.mse_loss)
    >>> objective.size, objective.names
    (3, ('weight', 'bias'))
    >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
    >>> objective.sample_losses(objective.parameters(), x, y).shape
    torch.Size([4])
    """

    def __init__(self, module: nn.Module, loss: Loss, names: Sequence[str]) -> None:
        self.module = module
        self.loss = loss
        self.names = tuple(names)
        held = dict(module.named_parameters())
        self.shapes = tuple(held[name].shape for name in self.names)
        self.sizes = tuple(math.prod(shape) for shape in self.shapes)
        self.size = sum(self.sizes)
        first = held[self.names[0]]
        self.dtype, self.device = first.dtype, first.device
        self._call = Substituted(module)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: Loss,
        parameters: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Objective:
        """Objective of a private copy of ``module``: eval mode, on ``device``, in ``dtype``."""
        names = select_parameters(module, parameters)
        private = copy.deepcopy(module).eval()
        if dtype is not None:
            private = private.to(dtype)
        if device is not None:
            private, loss = private.to(device), loss_on(loss, device)
        return cls(private, loss, names)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Objective:
        """The same objective on another device or in another floating dtype."""
        module = copy.deepcopy(self.module)
        module = module.to(dtype) if dtype is not None else module
        if device is None:
            return Objective(module, self.loss, self.names)
        return Objective(module.to(device), loss_on(self.loss, device), self.names)

    # -- θ as dictionary and as vector ------------------------------------------------
    def parameters(self) -> dict[str, Tensor]:
        """θ by name, detached from the module; never what another thread puts in its place for a while."""
        with alone():
            held = dict(self.module.named_parameters())
            return {name: held[name].detach() for name in self.names}

    def flatten(self, tangents: Mapping[str, Tensor], batch_dims: int = 0) -> Tensor:
        """Concatenate tensors of θ's shapes, after ``batch_dims`` leading axes, to (..., P)."""
        parts = (tangents[name] for name in self.names)  # reshape, because a parameter may have no axis
        return torch.cat([part.reshape(*part.shape[:batch_dims], -1) for part in parts], dim=-1)

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Split (..., P) into views by parameter name."""
        parts = vectors.split(self.sizes, dim=-1)
        leading = vectors.shape[:-1]
        return {
            name: part.reshape((*leading, *shape))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    # -- values -----------------------------------------------------------------------
    def outputs(self, parameters: Mapping[str, Tensor], x: Tree) -> Any:
        """model(x) at ``parameters``: tuples are positional, mappings keyword arguments."""
        if isinstance(x, Mapping):
            return self._call(parameters, **x)
        return self._call(parameters, *(x if isinstance(x, tuple) else (x,)))

    def total_loss(self, parameters: Mapping[str, Tensor], x: Tree, y: Tree) -> Tensor:
        """Σ_j ℓ(θ; z_j), a scalar."""
        return self.loss(self.outputs(parameters, x), y) * leading_size(y)

    def sample_losses(self, parameters: Mapping[str, Tensor], x: Tree, y: Tree) -> Tensor:
        """ℓ(θ; z_j) for each sample from one batched forward pass, shape (n,)."""
        return self.losses(self.outputs(parameters, x), y)

    def losses(self, outputs: Any, y: Tree) -> Tensor:
        """Loss of each row of ``outputs`` alone, shape (n,)."""
        try:
            return vmap(self._loss_of_one)(outputs, y)
        except RuntimeError:
            # Not every loss can be vmapped (boolean masks, .item()); where the loss itself is at
            # fault, the loop raises the error again, in the user's own terms.
            return self._losses_one_by_one(outputs, y)

    def sample_loss(self, parameters: Mapping[str, Tensor], x: Tree, y: Tree) -> Tensor:
        """ℓ(θ; z) of one sample given *without* its leading axis, a scalar."""
        x, y = (optree.tree_map(lambda a: a.unsqueeze(0), tree) for tree in (x, y))
        return self.loss(self.outputs(parameters, x), y)

    def _loss_of_one(self, output: Any, target: Any) -> Tensor:
        # torch registers ModelOutput-like containers with its own pytree, not with optree,
        # so a leading axis is added where vmap has already unpacked them.
        output, target = (torch.utils._pytree.tree_map(lambda a: a.unsqueeze(0), t) for t in (output, target))
        return self.loss(output, target)

    def _losses_one_by_one(self, outputs: Any, y: Tree) -> Tensor:
        rows = []
        for j in range(leading_size(y)):
            one = (torch.utils._pytree.tree_map(lambda a, j=j: a[j : j + 1], tree) for tree in (outputs, y))
            rows.append(self.loss(*one))
        return torch.stack(rows)


def loss_on(loss: Loss, device: torch.device | str) -> Loss:
    """A loss that is a module with tensors of its own, such as weights, on ``device``; the one given stays."""
    if not isinstance(loss, nn.Module):
        return loss
    wanted = torch.device(device).type
    if all(tensor.device.type == wanted for tensor in (*loss.parameters(), *loss.buffers())):
        return loss
    return copy.deepcopy(loss).to(device)


def hooked(module: nn.Module) -> bool:
    """Whether more than its own ``forward`` makes what it returns, or what is derived of it."""
    return bool(
        "forward" in vars(module)  # put in the place of its class's, as adapters do
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or nn.utils.parametrize.is_parametrized(module)
    )


def leading_size(tree: Tree) -> int:
    """Number of samples along the leading axis."""
    return int(optree.tree_leaves(tree)[0].shape[0])


def sliced(tree: Tree, part: slice | Tensor) -> Tree:
    """The samples ``part`` of every leaf, or those of such numbers."""
    return optree.tree_map(lambda leaf: leaf[part], tree)
