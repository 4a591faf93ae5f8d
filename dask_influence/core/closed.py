"""Closed forms: first and second derivatives of common functions and losses, written down.

To have them from a graph takes a dozen calls of a few microseconds each, which for small batches is most of
the time, and for losses loses digits. Of softmax probabilities p at a sample of class y,

    ∂ℓ/∂f = p − e_y,    A = ∂²ℓ/∂f² = diag p − p pᵀ,

where 1 − p_k is the sum of all others, which cancels nothing where p_k is next to 1. Products with A are those of
t less its entry of the likeliest class, which A does not see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.core.objective import hooked

_WIDE = (torch.float32, torch.float64)


# -- functions of one number ------------------------------------------------------------
class Function(NamedTuple):
    """h = φ(a), and derivatives in terms of h.

    Attributes
    ----------
    value : callable
        a → h.
    slope : callable
        h → φ'(a).
    bend : callable or None
        (h, φ'(a)) → φ''(a); None where it is zero.
    """

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    bend: Callable[[Tensor, Tensor], Tensor] | None


FUNCTIONS: dict[type[nn.Module], Function] = {
    nn.Tanh: Function(torch.tanh, lambda h: 1 - h * h, lambda h, slope: -2 * h * slope),
    nn.Sigmoid: Function(torch.sigmoid, lambda h: h * (1 - h), lambda h, slope: (1 - 2 * h) * slope),
    # torch's derivative at 0 is 0, and that of NaN is 1
    nn.ReLU: Function(torch.relu, lambda h: (h <= 0).logical_not().to(h.dtype), None),
}
"""By the exact class of the module: a subclass may do anything."""


# -- losses -------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class ClosedLoss:
    """Σ_j ℓ at the outputs of n samples.

    Attributes
    ----------
    total : Tensor
        Σ_j ℓ.
    adjoint : Tensor
        ∂ℓ/∂f of each sample, as the outputs.
    times : callable
        t (n, D, ...) → A t of each sample.
    matrices : callable or None
        → A of each sample, (n, C, C), where that may be formed and is no multiple of the identity.
    """

    total: Tensor
    adjoint: Tensor
    times: Callable[[Tensor], Tensor]
    matrices: Callable[[], Tensor] | None = None


def closed_loss(loss: Any, outputs: Tensor, targets: Any) -> ClosedLoss | None:
    """Of ``cross_entropy`` and ``mse_loss`` as they are without arguments; None for any other.

    Examples
    --------
    >>> found = closed_loss(functional.mse_loss, torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    >>> found.total, found.adjoint, found.times(torch.ones(1, 3, 1)).flatten()
    (tensor(1.), tensor([[2.]]), tensor([2., 2., 2.]))
    >>> closed_loss(functional.l1_loss, torch.ones(1, 1), torch.ones(1, 1)) is None
    True
    """
    if outputs.dtype not in _WIDE or not isinstance(targets, Tensor) or targets.device != outputs.device:
        return None
    if loss is functional.cross_entropy or _plain(loss, nn.CrossEntropyLoss):
        return _cross_entropy(outputs, targets)
    if loss is functional.mse_loss or _plain(loss, nn.MSELoss):
        return _mse(outputs, targets)
    return None


def _plain(loss: Any, kind: type[nn.Module]) -> bool:
    """Whether a loss is a module of this very class without hooks or anything that was asked of it."""
    if type(loss) is not kind or hooked(loss):
        return False
    own, usual = ({k: v for k, v in vars(one).items() if not k.startswith("_")} for one in (loss, kind()))
    return own | {"training": True} == usual and getattr(loss, "weight", None) is None


def _cross_entropy(outputs: Tensor, classes: Tensor) -> ClosedLoss | None:
    if outputs.dim() != 2 or classes.dtype != torch.int64 or classes.shape != outputs.shape[:1]:
        return None
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < outputs.shape[1]:
        return None  # ignored, or wrong
    own, logarithms = classes[:, None], outputs.log_softmax(1)
    probabilities = logarithms.exp()
    others = probabilities.scatter(1, own, 0.0)

    def times(tangents: Tensor) -> Tensor:
        likeliest = outputs.argmax(1)[:, None, None].expand(-1, tangents.shape[1], 1)
        apart, weights = tangents - tangents.gather(2, likeliest), probabilities[:, None]
        return apart.sub_(apart @ weights.mT).mul_(weights)

    def matrices() -> Tensor:
        formed = probabilities[:, :, None] * -probabilities[:, None]
        diagonal = formed.diagonal(dim1=1, dim2=2)
        diagonal.zero_()
        diagonal.copy_(-formed.sum(2))
        return formed

    adjoint = others.scatter(1, own, -others.sum(1, keepdim=True))
    return ClosedLoss(-logarithms.gather(1, own).sum(), adjoint, times, matrices)


def _mse(outputs: Tensor, targets: Tensor) -> ClosedLoss | None:
    if targets.shape != outputs.shape or targets.dtype != outputs.dtype or outputs.dim() < 2:
        return None
    difference, count = outputs - targets, max(1, outputs[:1].numel())
    return ClosedLoss(
        difference.square().sum() / count, difference * (2 / count), lambda tangents: tangents * (2 / count)
    )
