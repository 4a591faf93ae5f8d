"""The forms a derivative of the per-sample loss can take, and their evaluation.

A derivative here is one of four: per-sample gradients, products of the summed Hessian with
vectors, directional derivatives of the per-sample losses, and the gradient of those in the
input. Each can be differentiated in more than one order, for all vectors at once or in a loop;
which of the orders are right depends on the model, so a :class:`Forms` says which to take.

Samples of a batch are independent, so nearly everything is a derivative of Σ_j ℓ(z_j) for the
whole batch: no vmap over samples, which many models do not allow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jvp, vjp, vmap

from dask_influence.core import compiled, multiply
from dask_influence.core.chain import Chain
from dask_influence.core.elementary import differentiation, undisturbed
from dask_influence.core.objective import Objective, Tree, leading_size
from dask_influence.errors import ConfigurationError

Theta = Mapping[str, Tensor]


@dataclass(frozen=True)
class Forms:
    """Which form each derivative takes for a model: picklable, chosen by ``choose_forms``.

    ``_loop`` stands for one vector at a time and classic autograd where the plain name batches
    all vectors with ``vmap``: slower, and right for code that ``torch.func`` cannot transform.

    Parameters
    ----------
    gradient : {"chain", "vmap", "loop"}
        Per-sample gradients: module by module along a chain, all samples at once, or one at a time.
    product : {"chain", "forward_over_reverse", "reverse_over_reverse"}, the latter two with "_loop"
        H·v: module by module along a chain; the directional derivative of the gradient; or the
        gradient of ⟨v, gradient⟩.
    directional : {"forward", "dummy_weights", "gradients"} and the first two with "_loop"
        ⟨v, ∇θ ℓ(z_j)⟩: forward mode; ∂/∂u_j of ⟨v, ∇θ Σ u_j ℓ(z_j)⟩; per-sample gradients
        formed and multiplied.
    mixed : {"chain", "reverse_over_reverse", "forward_over_reverse", "reverse_over_forward"}, "_loop"
        ∇x ⟨v, ∇θ ℓ(z_j)⟩: module by module along a chain; gradient in x of ⟨v, ∇θ⟩;
        directional derivative in θ of ∇x; gradient in x of the directional derivative.
    compiled : sequence of {"gradient", "product", "directional"}
        Which of them run as compiled programs (``core.compiled``).

    Examples
    --------
    >>> Forms(gradient="loop").gradient
    'loop'
    >>> Forms(product="sideways")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: product='sideways' is no form; take one of ...
    """

    gradient: str = "vmap"
    product: str = "forward_over_reverse"
    directional: str = "forward"
    mixed: str = "reverse_over_reverse"
    compiled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "compiled", tuple(self.compiled))  # a list, as JSON has it
        for kind, known in FORMS.items():
            if getattr(self, kind) not in known:
                raise ConfigurationError(
                    f"{kind}={getattr(self, kind)!r} is no form; take one of {', '.join(known)}"
                )


# -- the input a perturbation differentiates ------------------------------------------
def input_leaf(x: Tree) -> Tensor:
    """The one floating tensor in x, the input that a perturbation differentiates.

    Raises
    ------
    ConfigurationError
        Where x holds no floating tensor, or more than one; names what it holds.

    Examples
    --------
    >>> input_leaf({"ids": torch.tensor([[1]]), "scale": torch.tensor([0.5])})
    tensor([0.5000])
    """
    return optree.tree_leaves(x)[_input_index(x)]


def _input_index(x: Tree) -> int:
    leaves = optree.tree_leaves(x)
    floating = [i for i, leaf in enumerate(leaves) if leaf.is_floating_point()]
    if len(floating) == 1:
        return floating[0]
    held = ", ".join(
        f"x{path} {tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        for path, leaf in zip(map(_path, optree.tree_paths(x)), leaves, strict=True)
    )
    if not floating:
        raise ConfigurationError(
            f"mode='perturbation' differentiates the input, but x holds only integers ({held}); "
            "use mode='up', or pass embedded inputs as x"
        )
    raise ConfigurationError(
        f"mode='perturbation' needs exactly one floating input, but x holds {len(floating)} ({held}); "
        "wrap the model so that it takes one, or use mode='up'"
    )


def _path(path: tuple[object, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)


def with_input(x: Tree, leaf: Tensor) -> Tree:
    """x with its one floating tensor replaced by ``leaf``.

    Examples
    --------
    >>> with_input((torch.tensor([1]), torch.tensor([2.0])), torch.tensor([3.0]))
    (tensor([1]), tensor([3.]))
    """
    leaves, structure = optree.tree_flatten(x)
    leaves[_input_index(x)] = leaf
    return optree.tree_unflatten(structure, leaves)


# -- public functions ------------------------------------------------------------------
def sample_gradients(objective: Objective, x: Tree, y: Tree, forms: Forms) -> Tensor:
    """∇θ ℓ(z_j) for each sample, shape (n, P).

    Examples
    --------
    >>> net = torch.nn.Linear(2, 1)
    >>> objective = Objective.of(net, torch.nn.functional.mse_loss)
    >>> sample_gradients(objective, torch.ones(4, 2), torch.zeros(4, 1), Forms()).shape
    torch.Size([4, 3])
    """
    run = compiled.per_sample if "gradient" in forms.compiled else _plainly
    with _differentiating(forms.gradient), torch.no_grad():
        return run(GRADIENT[forms.gradient], objective, objective.parameters(), x, y)


def products(objective: Objective, x: Tree, y: Tree, vectors: Tensor, forms: Forms) -> Tensor:
    """Σ_j ∇²θ ℓ(z_j) v_b for each of the B ``vectors`` (B, P), shape (B, P).

    A sum over the n samples, not a mean. Memory: activations of n samples for each of the B
    vectors (one at a time in the ``_loop`` forms).
    """
    run = compiled.summed if "product" in forms.compiled else _plainly
    with _differentiating(forms.product), torch.no_grad():
        return run(PRODUCT[forms.product], objective, objective.parameters(), x, y, vectors)


def directional_derivatives(objective: Objective, x: Tree, y: Tree, vectors: Tensor, forms: Forms) -> Tensor:
    """E[j, d] = ⟨v_d, ∇θ ℓ(z_j)⟩ for ``vectors`` (D, P), shape (n, D)."""
    if forms.directional == "gradients":
        return sample_gradients(objective, x, y, forms) @ vectors.T
    run = compiled.per_sample if "directional" in forms.compiled else _plainly
    with differentiation(), torch.no_grad():
        return run(DIRECTIONAL[forms.directional], objective, objective.parameters(), x, y, vectors)


def mixed_derivatives(objective: Objective, x: Tree, y: Tree, vectors: Tensor, forms: Forms) -> Tensor:
    """E[j, d, :] = ∇x ⟨v_d, ∇θ ℓ(z_j)⟩ for ``vectors`` (D, P), shape (n, D, *features).

    x is differentiated in its one floating tensor; see :func:`input_leaf` for what it raises.
    """
    input_leaf(x)
    with _differentiating(forms.mixed), torch.no_grad():
        return MIXED[forms.mixed](objective, objective.parameters(), x, y, vectors)


def _differentiating(form: str) -> contextlib.AbstractContextManager[None]:
    """For forms that differentiate; a chain sees to it itself, where it has to."""
    return undisturbed() if form == "chain" else differentiation()


def _plainly(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    return function(*arguments)


# -- classic autograd, for the loops ---------------------------------------------------
@contextlib.contextmanager
def _recording(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Fresh leaves of classic autograd with the values of ``tensors``."""
    with torch.enable_grad():
        yield [tensor.detach().requires_grad_() for tensor in tensors]


def _backward(
    value: Tensor, inputs: list[Tensor], seed: Tensor | None = None, keep: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of ⟨seed, value⟩; ``keep`` leaves it differentiable and its graph in place."""
    if not value.requires_grad:
        return tuple(torch.zeros_like(tensor) for tensor in inputs)
    return torch.autograd.grad(
        value, inputs, seed, create_graph=keep, retain_graph=keep, materialize_grads=True
    )


def _named(objective: Objective, leaves: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(objective.names, leaves, strict=True))


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def total_gradient(objective: Objective, theta: Theta, x: Tree, y: Tree) -> Tensor:
    """Σ_j ∇θ ℓ(z_j) by one backward pass, shape (P,); call within :func:`differentiation`."""
    with _recording(*theta.values()) as leaves:
        loss = objective.total_loss(_named(objective, leaves), x, y)
        return _flat(_backward(loss, leaves)).detach()


def total_input_gradient(objective: Objective, theta: Theta, x: Tree, y: Tree) -> Tensor:
    """∇x ℓ(z_j) by one backward pass, shape (n, *features); call within :func:`differentiation`."""
    with _recording(input_leaf(x)) as leaves:
        loss = objective.total_loss(theta, with_input(x, leaves[0]), y)
        return _backward(loss, leaves)[0].detach()


# -- per-sample gradients --------------------------------------------------------------
def _gradient_chain(objective: Objective, theta: Theta, x: Tree, y: Tree) -> Tensor:
    return Chain(objective, theta, x, y, twice=False).gradients()


def _gradient_vmap(objective: Objective, theta: Theta, x: Tree, y: Tree) -> Tensor:
    of_each = vmap(grad_and_value(objective.sample_loss), in_dims=(None, 0, 0))
    per_sample, losses = of_each(theta, x, y)
    return _marked(objective.flatten(per_sample, 1), losses)


def _gradient_loop(objective: Objective, theta: Theta, x: Tree, y: Tree) -> Tensor:
    rows, losses = [], []
    for j in range(leading_size(y)):
        one_x, one_y = (optree.tree_map(lambda a, j=j: a[j : j + 1], tree) for tree in (x, y))
        with _recording(*theta.values()) as leaves:
            loss = objective.total_loss(_named(objective, leaves), one_x, one_y)
            rows.append(_flat(_backward(loss, leaves)).detach())
        losses.append(loss.detach())
    return _marked(torch.stack(rows), torch.stack(losses))


def _marked(rows: Tensor, losses: Tensor) -> Tensor:
    """``rows`` (n, ...), of which those are not finite whose loss is not: its derivatives may be nevertheless.

    One number of each, in place: what is made of a row is not finite then either.
    """
    rows[:, :1] += 0 * losses[:, None]
    return rows


def _added(rows: Tensor, losses: Tensor) -> Tensor:
    """The same of short rows, out of place: columns that depend on no direction may be one in memory."""
    return rows + 0 * losses[:, None]


def _pullback(function: Callable[[Any], Tensor], at: Any) -> tuple[Tensor, Callable[[Any], Any]]:
    """Value and vector-Jacobian product of ``function``; vjp's own type has a third, optional part."""
    result: Any = vjp(function, at)
    return result[0], result[1]


# -- products with the summed Hessian --------------------------------------------------
def _tangents(objective: Objective, vectors: Tensor) -> list[dict[str, Tensor]]:
    return [objective.unflatten(vector) for vector in vectors]


def _product_forward(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    gradient = grad(lambda p: objective.total_loss(p, x, y))
    product = vmap(lambda v: jvp(gradient, (theta,), (v,))[1])
    return objective.flatten(product(objective.unflatten(vectors)), 1)


def _product_forward_loop(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    gradient = grad(lambda p: objective.total_loss(p, x, y))
    rows = [jvp(gradient, (theta,), (v,))[1] for v in _tangents(objective, vectors)]
    return torch.stack([objective.flatten(row) for row in rows])


def _product_reverse(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    _, pull = _pullback(grad(lambda p: objective.total_loss(p, x, y)), theta)
    return objective.flatten(vmap(lambda v: pull(v)[0])(objective.unflatten(vectors)), 1)


def _product_reverse_loop(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    rows = []
    for vector in vectors:  # a graph per vector: retaining one holds its buffers for all of them
        with _recording(*theta.values()) as leaves:
            loss = objective.total_loss(_named(objective, leaves), x, y)
            gradient = _flat(_backward(loss, leaves, keep=True))
            rows.append(_flat(_backward(gradient, leaves, vector)).detach())
    return torch.stack(rows)


def _product_chain(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    return multiply.products(Chain(objective, theta, x, y), vectors, torch.empty_like(vectors))


# -- directional derivatives -----------------------------------------------------------
def _directional_forward(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    def losses(p: Theta) -> Tensor:
        return objective.sample_losses(p, x, y)

    along = vmap(lambda v: jvp(losses, (theta,), (v,)), out_dims=(None, 1))  # type: ignore[arg-type]
    found: Any = along(objective.unflatten(vectors))
    return _added(found[1], found[0])


def _directional_forward_loop(
    objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor
) -> Tensor:
    def losses(p: Theta) -> Tensor:
        return objective.sample_losses(p, x, y)

    found: list[Any] = [jvp(losses, (theta,), (v,)) for v in _tangents(objective, vectors)]
    return _marked(torch.stack([column for _, column in found], 1), found[0][0])


def _directional_weights(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    losses, pull = _pullback(lambda p: objective.sample_losses(p, x, y), theta)
    _, push = _pullback(lambda u: pull(u)[0], torch.zeros_like(losses))
    return _added(vmap(lambda v: push(v)[0], out_dims=1)(objective.unflatten(vectors)), losses)


def _directional_weights_loop(
    objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor
) -> Tensor:
    columns, losses = [], vectors.new_zeros(leading_size(y))
    for vector in vectors:
        with _recording(*theta.values()) as leaves:
            losses = objective.sample_losses(_named(objective, leaves), x, y)
            weights = torch.zeros_like(losses, requires_grad=True)
            gradient = _flat(_backward(losses, leaves, weights, keep=True))
            columns.append(_backward(gradient, [weights], vector)[0].detach())
    return _marked(torch.stack(columns, 1), losses.detach())


# -- their gradients in the input ------------------------------------------------------
_Valued = tuple[Tensor, Tensor]
"""What is wanted, and the loss on the way to it."""


def _input_loss(objective: Objective, x: Tree, y: Tree) -> Callable[[Theta, Tensor], _Valued]:
    """The loss as a function of θ and the input, twice: to be differentiated, and to be looked at."""

    def loss(p: Theta, leaf: Tensor) -> _Valued:
        value = objective.total_loss(p, with_input(x, leaf), y)
        return value, value.detach()

    return loss


def _mixed_of(objective: Objective, theta: Theta, x: Tree, y: Tree) -> dict[str, Callable[[Theta], _Valued]]:
    """For each order, the function v ↦ ∇x ⟨v, ∇θ Σ_j ℓ(z_j)⟩, shape (n, *features)."""
    loss, leaf = _input_loss(objective, x, y), input_leaf(x)

    def pushed(function: Callable[[Theta], _Valued], v: Theta) -> _Valued:
        result: Any = jvp(function, (theta,), (v,), has_aux=True)
        return result[1], result[2]

    def forward_over_reverse(v: Theta) -> _Valued:
        return pushed(lambda p: grad(loss, argnums=1, has_aux=True)(p, leaf), v)

    def reverse_over_forward(v: Theta) -> _Valued:
        result: _Valued = grad(lambda a: pushed(lambda p: loss(p, a), v), has_aux=True)(leaf)
        return result

    return {"forward_over_reverse": forward_over_reverse, "reverse_over_forward": reverse_over_forward}


def _mixed_batched(order: str) -> Callable[..., Tensor]:
    def form(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
        of = _mixed_of(objective, theta, x, y)[order]
        rows, total = vmap(of, out_dims=(1, None))(objective.unflatten(vectors))  # type: ignore[arg-type]
        return _without_losses(rows, total, objective, theta, x, y)

    return form


def _mixed_looped(order: str) -> Callable[..., Tensor]:
    def form(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
        of = _mixed_of(objective, theta, x, y)[order]
        parts = [of(v) for v in _tangents(objective, vectors)]
        rows = torch.stack([part for part, _ in parts], 1)
        return _without_losses(rows, parts[0][1], objective, theta, x, y)

    return form


def _mixed_reverse(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    loss = _input_loss(objective, x, y)
    result: Any = vjp(lambda leaf: grad(loss, has_aux=True)(theta, leaf), input_leaf(x), has_aux=True)
    _, pull, total = result
    rows = vmap(lambda v: pull(v)[0], out_dims=1)(objective.unflatten(vectors))
    return _without_losses(rows, total, objective, theta, x, y)


def _mixed_reverse_loop(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    columns, total = [], vectors.new_zeros(())
    for vector in vectors:
        with _recording(input_leaf(x), *theta.values()) as (leaf, *leaves):
            loss, total = _input_loss(objective, x, y)(_named(objective, leaves), leaf)
            gradient = _flat(_backward(loss, leaves, keep=True))
            columns.append(_backward(gradient, [leaf], vector)[0].detach())
    return _without_losses(torch.stack(columns, 1), total, objective, theta, x, y)


def _without_losses(
    rows: Tensor, total: Tensor, objective: Objective, theta: Theta, x: Tree, y: Tree
) -> Tensor:
    """NaN in the rows of samples whose loss is not finite, whatever its derivatives are; their ``total`` tells."""
    if total.isfinite():
        return rows
    bad = ~objective.sample_losses(theta, x, y).isfinite()
    return rows.masked_fill(bad.reshape(-1, *(1,) * (rows.dim() - 1)), torch.nan)


def _mixed_chain(objective: Objective, theta: Theta, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    return Chain(objective, theta, x, y).mixed_derivatives(vectors)


# In order of preference. Reverse over reverse comes first for second derivatives in general: it builds the
# graph of the gradient once for all vectors, where forward over reverse carries a tangent of every
# activation for each of them. Measured on 2 cores, forward / reverse: products of 64 vectors with an
# MLP 64-32-10, 512 samples, 18 / 10 ms; 16 with an MLP of 820k parameters 255 / 209 ms; GRU 30 / 26;
# TransformerEncoderLayer 41 / 32; the mixed derivative is 3 to 10 % apart in the same direction. Along a
# chain it takes a quarter less time on one thread, and its blocks of vectors can go to several.
GRADIENT: dict[str, Callable[..., Tensor]] = {
    "chain": _gradient_chain,
    "vmap": _gradient_vmap,
    "loop": _gradient_loop,
}
PRODUCT: dict[str, Callable[..., Tensor]] = {
    "chain": _product_chain,
    "reverse_over_reverse": _product_reverse,
    "forward_over_reverse": _product_forward,
    "forward_over_reverse_loop": _product_forward_loop,
    "reverse_over_reverse_loop": _product_reverse_loop,
}
DIRECTIONAL: dict[str, Callable[..., Tensor]] = {
    "forward": _directional_forward,
    "dummy_weights": _directional_weights,
    "forward_loop": _directional_forward_loop,
    "dummy_weights_loop": _directional_weights_loop,
}
MIXED: dict[str, Callable[..., Tensor]] = {
    "chain": _mixed_chain,
    "reverse_over_reverse": _mixed_reverse,
    "forward_over_reverse": _mixed_batched("forward_over_reverse"),
    "reverse_over_forward": _mixed_batched("reverse_over_forward"),
    "forward_over_reverse_loop": _mixed_looped("forward_over_reverse"),
    "reverse_over_reverse_loop": _mixed_reverse_loop,
    "reverse_over_forward_loop": _mixed_looped("reverse_over_forward"),
}
FORMS: dict[str, tuple[str, ...]] = {
    "gradient": tuple(GRADIENT),
    "product": tuple(PRODUCT),
    "directional": (*DIRECTIONAL, "gradients"),
    "mixed": tuple(MIXED),
}
"""The forms of each derivative, in the order in which the check tries them."""

COMPILABLE: dict[str, tuple[str, ...]] = {
    "gradient": ("vmap",),
    "directional": ("forward", "dummy_weights"),
    "product": ("reverse_over_reverse", "forward_over_reverse"),
}
"""Forms that a compiler can make faster. A chain's are matrix products already; a loop is as many traces."""
