"""Families: which likelihood a loss is the negative logarithm of, recognised by its derivative.

A Fisher matrix is an expectation over targets that the model itself predicts, so it exists only
for a loss ℓ = −c log p(y | f) + constant of the output f. The names of torch's losses suggest
the family; what decides is the gradient ∂ℓ/∂f of the very samples at hand, which must equal
c times the gradient of the family's −log p. So a user's own function around ``cross_entropy`` is
recognised, with its masks and shifts, and ``label_smoothing`` or class weights are not.

===================  =========================================  ============================
family               p(y | f)                                   torch's loss
===================  =========================================  ============================
``categorical``      softmax(f)_y along one axis                ``cross_entropy``
``log_categorical``  exp(f)_y, f log-probabilities              ``nll_loss``
``bernoulli``        σ(f) for each element                      ``binary_cross_entropy_with_logits``
``gaussian``         N(y; f, 1/2) for each element              ``mse_loss``
===================  =========================================  ============================

The scale c is what the reduction within a sample leaves: 1/K for a mean over K elements or
positions, 1/2 for half a square. Elements and positions are independent given the input, so with
s the gradient of −log p, the Fisher matrix of the outputs is c E[s sᵀ] term by term: the
convention in which it equals the Hessian of ℓ in f (Martens 2020, "New insights and
perspectives on the natural gradient method", section 9; the scale as in Dangel et al.,
curvlinops).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.errors import ConfigurationError

KNOWN: dict[Any, str] = {
    functional.cross_entropy: "categorical",
    nn.CrossEntropyLoss: "categorical",
    functional.nll_loss: "log_categorical",
    nn.NLLLoss: "log_categorical",
    functional.binary_cross_entropy_with_logits: "bernoulli",
    nn.BCEWithLogitsLoss: "bernoulli",
    functional.mse_loss: "gaussian",
    nn.MSELoss: "gaussian",
}
"""Families of torch's losses, functions and modules."""

_NAMES = "cross_entropy, nll_loss of log-probabilities, mse_loss, binary_cross_entropy_with_logits"
_TOLERANCE = 1e-6


def named_family(loss: Any) -> str | None:
    """Family that the name of ``loss`` suggests, through ``functools.partial``; None for other names.

    Examples
    --------
    >>> named_family(functools.partial(functional.cross_entropy, ignore_index=0))
    'categorical'
    >>> named_family(nn.MSELoss()), named_family(functional.l1_loss)
    ('gaussian', None)
    """
    while isinstance(loss, functools.partial):
        loss = loss.func
    return KNOWN.get(type(loss) if isinstance(loss, nn.Module) else loss)


@dataclass(frozen=True)
class Likelihood:
    """p(y | f) of a family at the outputs of a few samples, with the scale of the loss.

    Attributes
    ----------
    family : str
        ``"categorical"``, ``"log_categorical"``, ``"bernoulli"`` or ``"gaussian"``.
    outputs : Tensor
        f, (n, ...), float64.
    scale : Tensor
        c, broadcastable to ``outputs``: ℓ = −c log p. Zero where the loss ignores a position.
    axis : int
        The axis of ``outputs`` that holds the classes; of no meaning for the other families.
    """

    family: str
    outputs: Tensor
    scale: Tensor
    axis: int = 1

    def outcomes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(probability, s) for each outcome of one term, both shaped like the outputs.

        The sum over outcomes of probability · s sᵀ is E[s sᵀ] of a term: over the C classes of
        a categorical, the two values of a Bernoulli, and the points f ± σ of a Gaussian, whose
        mean is exact for the square that is averaged.
        """
        f = self.outputs
        if self.family == "gaussian":
            for sign in (1.0, -1.0):
                yield torch.full_like(f, 0.5), torch.full_like(f, sign * 2 * 0.5**0.5)
        elif self.family == "bernoulli":
            p = torch.sigmoid(f)
            yield p, -torch.sigmoid(-f)  # σ(f) − 1 without its cancellation
            yield torch.sigmoid(-f), p
        else:
            p = self.probabilities
            for k in range(f.shape[self.axis]):
                yield p.narrow(self.axis, k, 1).expand_as(f), self._score(p, k)

    @property
    def probabilities(self) -> Tensor:
        """Of the classes, along :attr:`axis`."""
        return self.outputs.exp() if self.family == "log_categorical" else self.outputs.softmax(self.axis)

    @property
    def categorical(self) -> bool:
        """Whether a term couples the entries along :attr:`axis`; otherwise each entry is one."""
        return self.family.endswith("categorical")

    def _score(self, p: Tensor, k: int) -> Tensor:
        """∂(−log p_k)/∂f for class k at every position."""
        score = torch.zeros_like(p) if self.family == "log_categorical" else p.clone()
        score.narrow(self.axis, k, 1).sub_(1.0)
        return score

    def multiply(self, tangents: Tensor) -> Tensor:
        """c E[s ⟨s, u⟩] for tangents u shaped like the outputs: the Fisher matrix of the outputs times u.

        Summed over classes without forming the C scores: ⟨s_k, u⟩ = ⟨p, u⟩ − u_k.
        """
        if not self.categorical:
            expected = sum((p * s.square() for p, s in self.outcomes()), torch.zeros_like(self.outputs))
            return self.scale * expected * tangents
        p = self.probabilities
        if self.family == "log_categorical":
            return self.scale * p * tangents
        weighted = p * ((p * tangents).sum(self.axis, keepdim=True) - tangents)  # p_k ⟨s_k, u⟩
        return self.scale * (p * weighted.sum(self.axis, keepdim=True) - weighted)

    def factors(self) -> Tensor:
        """Rows L (n, Q, ...) with c E[s sᵀ] = Σ_q L_q L_qᵀ for each sample, all terms apart.

        One row for each class of each position, √(c p_k) s_k there and zero elsewhere; one for
        each element of the other families, √(c E[s²]). Q is the number K of outputs of a sample.
        """
        n, size = len(self.outputs), self.outputs[0].numel()
        if not self.categorical:
            diagonal = self.multiply(torch.ones_like(self.outputs)).sqrt()
            return torch.diag_embed(diagonal.reshape(n, size)).reshape(n, size, *self.outputs.shape[1:])
        axis, classes = self.axis, self.outputs.shape[self.axis]
        rows = torch.stack(
            [(self.scale * p).sqrt() * s for p, s in self.outcomes()], dim=1
        )  # (n, C, ..., classes at axis + 1, ...)
        rows = rows.movedim(axis + 1, -1).reshape(n, classes, size // classes, classes)  # (n, k, t, class)
        apart = torch.diag_embed(rows.movedim(2, -1), dim1=2, dim2=4)  # (n, k, t, class, t)
        shape = self.outputs.movedim(axis, -1).shape[1:-1]
        apart = apart.movedim(3, 4).reshape(n, size, *shape, classes)
        return apart.movedim(-1, axis + 1).contiguous()

    def sample(self, generator: torch.Generator) -> Tensor:
        """√c s for targets drawn from the model, shaped like the outputs.

        The expectation of its outer product is c E[s sᵀ], terms apart.
        """
        f, root = self.outputs, self.scale.sqrt()
        if self.family == "gaussian":
            noise = torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f.device)
            return root * noise * 2**0.5
        shape = f.narrow(self.axis, 0, 1).shape if self.categorical else f.shape
        uniform = torch.rand(shape, generator=generator, dtype=f.dtype).to(f.device)
        if self.family == "bernoulli":
            p = torch.sigmoid(f)
            return root * (p - (uniform < p).to(f.dtype))
        p = self.probabilities
        drawn = (p.cumsum(self.axis) < uniform).sum(self.axis, keepdim=True).clamp(max=p.shape[self.axis] - 1)
        score = torch.zeros_like(p) if self.family == "log_categorical" else p.clone()
        return root * score.scatter_add(self.axis, drawn, -torch.ones_like(p))


def recognise(loss: Any, outputs: Tensor, gradient: Tensor, target: Any) -> Likelihood:
    """The likelihood whose −c log p has ``gradient`` as its derivative in ``outputs``.

    Parameters
    ----------
    loss : callable
        Only its name is looked at, for the order of trials and for the message.
    outputs, gradient : Tensor
        f and ∂ℓ_j/∂f_j of each sample, (n, ...).
    target : Tensor or tree
        Where it is one floating tensor, targets of the elementwise families or class
        probabilities; classes are read from the gradient, so that masks and shifts inside the
        loss are followed.

    Raises
    ------
    ConfigurationError
        Where no family fits.

    Examples
    --------
    >>> f = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    >>> g, = torch.autograd.grad(functional.cross_entropy(f, torch.tensor([1])), f)
    >>> found = recognise(functional.cross_entropy, f.detach(), g, torch.tensor([1]))
    >>> found.family, found.scale.item()
    ('categorical', 1.0)
    """
    outputs, gradient = outputs.detach().to(torch.float64), gradient.detach().to(torch.float64)
    named = named_family(loss)
    for family in sorted(_TRIALS, key=lambda name: name != named):  # stable: the named one first
        found = _TRIALS[family](outputs, gradient, target)
        if found is not None:
            return found
    name = getattr(loss, "__name__", type(loss).__name__)
    raise ConfigurationError(
        f"curvature='fisher' needs a loss that is a multiple of a known negative log-likelihood ({_NAMES}); the "
        f"gradient of {name!r} in the model's output is that of none of them"
        + (" (label_smoothing, weight and pos_weight change it)" if named else "")
        + "; use curvature='ggn', which is defined for every loss, or 'empirical_fisher'"
    )


def _agrees(gradient: Tensor, expected: Tensor) -> bool:
    return bool((gradient - expected).abs().max() <= _TOLERANCE * gradient.abs().max())


def _elementwise(
    family: str, score: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor, Any], Likelihood | None]:
    """The trial of a family whose elements are independent, all on one scale."""

    def trial(f: Tensor, gradient: Tensor, target: Any) -> Likelihood | None:
        if not (isinstance(target, Tensor) and target.numel() == f.numel() and len(target) == len(f)):
            return None
        s = score(f, target.detach().to(f).reshape(f.shape))
        squares = s.square().sum()
        scale = (gradient * s).sum() / squares if squares > 0 else 1.0 / torch.tensor(f[0].numel()).to(f)
        return Likelihood(family, f, scale) if scale > 0 and _agrees(gradient, scale * s) else None

    return trial


def _categorical(f: Tensor, gradient: Tensor, target: Any) -> Likelihood | None:
    # cross_entropy has classes on axis 1; a loss that flattens positions first, on the last one.
    for axis in dict.fromkeys((1, f.ndim - 1)) if f.ndim > 1 else ():
        p = f.softmax(axis)
        scale = _scale_of_classes(p, gradient, axis)
        if isinstance(target, Tensor) and target.is_floating_point() and target.shape == f.shape:
            s = p * target.sum(axis, keepdim=True) - target.to(p)
            scale = ((gradient * s).sum() / s.square().sum()).expand_as(scale)
            agrees = _agrees(gradient, scale * s)
        else:
            drawn = torch.zeros_like(p).scatter_(axis, gradient.argmin(axis, keepdim=True), 1.0)
            agrees = _agrees(gradient, scale * (p - drawn))
        # A model sure beyond rounding has no gradient, and no Fisher matrix, at classes.
        saturated = not gradient.any() and isinstance(target, Tensor) and not target.is_floating_point()
        if agrees and (scale >= 0).all() and ((scale > 0).any() or saturated):
            return Likelihood("categorical", f, scale, axis)
    return None


def _scale_of_classes(p: Tensor, gradient: Tensor, axis: int) -> Tensor:
    """c of each position from the classes that were not observed, whose gradient is c p_k.

    The observed one, c (p_y − 1), is negative, and would cancel for a confident model.
    """
    observed = torch.zeros_like(p, dtype=torch.bool).scatter_(axis, gradient.argmin(axis, keepdim=True), True)
    mass = p.masked_fill(observed, 0.0).sum(axis, keepdim=True)
    received = gradient.masked_fill(observed, 0.0).sum(axis, keepdim=True)
    return torch.where(mass > 0, received / mass.clamp_min(torch.finfo(p.dtype).tiny), 0.0)


def _log_categorical(f: Tensor, gradient: Tensor, target: Any) -> Likelihood | None:
    for axis in dict.fromkeys((1, f.ndim - 1)) if f.ndim > 1 else ():
        normalised = (f.exp().sum(axis) - 1).abs().max() <= 1e-4
        observed = torch.zeros_like(f).scatter_(axis, gradient.argmin(axis, keepdim=True), 1.0)
        scale = -gradient.sum(axis, keepdim=True)
        if normalised and (scale >= 0).all() and (scale > 0).any() and _agrees(gradient, -scale * observed):
            return Likelihood("log_categorical", f, scale, axis)
    return None


_TRIALS: dict[str, Callable[[Tensor, Tensor, Any], Likelihood | None]] = {
    "categorical": _categorical,
    "log_categorical": _log_categorical,
    "bernoulli": _elementwise("bernoulli", lambda f, y: torch.sigmoid(f) - y),
    "gaussian": _elementwise("gaussian", lambda f, y: 2 * (f - y)),
}
