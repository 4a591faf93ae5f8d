"""The model's outputs as a function of θ: products with their Jacobian J, and its rows.

Curvatures that live in the outputs, C = Σ_j J_jᵀ A_j J_j with a small A_j (K, K) for each sample,
are computed here. The outputs the loss depends on, whatever tree the model returns them in, are
laid out as one array f (n, K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.utils import _pytree as pytree

from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError

Theta = Mapping[str, Tensor]

Inner = Callable[[Tensor], Tensor]
"""u ↦ A_j u_j for every sample, (n, K) → (n, K); must allow ``vmap``."""


@dataclass(frozen=True)
class Outputs:
    """f (n, K) of a few samples, with the way back to what the model returns.

    Attributes
    ----------
    objective : Objective
        Model and loss.
    x, y : tree
        The samples.
    flat : Tensor
        f (n, K), detached.
    used : tuple of int
        Leaves of the model's output that the loss depends on.
    leaves, structure
        The model's whole output, detached, as leaves of a tree.
    """

    objective: Objective
    x: Tree
    y: Tree
    flat: Tensor
    used: tuple[int, ...]
    leaves: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, objective: Objective, x: Tree, y: Tree) -> Outputs:
        """One forward pass; call within :func:`~dask_influence.core.elementary.differentiation`.

        Raises
        ------
        ConfigurationError
            Where an output that the loss depends on has no leading sample axis.
        """
        leaves, structure = pytree.tree_flatten(objective.outputs(objective.parameters(), x))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        floating = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        with torch.enable_grad():
            fresh = {i: leaves[i].clone().requires_grad_() for i in floating}
            value = objective.loss(
                pytree.tree_unflatten([fresh.get(i, leaf) for i, leaf in enumerate(leaves)], structure), y
            )
            found = torch.autograd.grad(value, list(fresh.values()), allow_unused=True)
        used = tuple(i for i, part in zip(floating, found, strict=True) if part is not None)
        count = leading_size(y)
        for i in used:
            if leaves[i].ndim == 0 or len(leaves[i]) != count:
                raise ConfigurationError(
                    f"the loss uses an output of shape {tuple(leaves[i].shape)} that has no leading axis of the "
                    f"{count} samples; curvature='hessian' does not ask for one"
                )
        flat = torch.cat([leaves[i].reshape(count, -1) for i in used], dim=1)
        return cls(objective, x, y, flat, used, tuple(leaves), structure)

    def at(self, parameters: Theta, x: Tree | None = None) -> Tensor:
        """f (n, K) at ``parameters``, of these samples or of others."""
        leaves = pytree.tree_leaves(self.objective.outputs(parameters, self.x if x is None else x))
        return torch.cat([leaves[i].reshape(len(leaves[i]), -1) for i in self.used], dim=1)

    def loss(self, flat: Tensor) -> Tensor:
        """Σ_j ℓ(f_j, y_j) at other outputs."""
        shapes = [self.leaves[i].shape for i in self.used]
        parts = flat.split([shape[1:].numel() for shape in shapes], dim=1)
        leaves = list(self.leaves)
        for i, part, shape in zip(self.used, parts, shapes, strict=True):
            leaves[i] = part.reshape(shape)
        return self.objective.loss(pytree.tree_unflatten(leaves, self.structure), self.y) * len(flat)

    def losses(self) -> Tensor:
        """ℓ(f_j, y_j) of each sample, (n,)."""
        return self.objective.losses(pytree.tree_unflatten(self.leaves, self.structure), self.y)

    def in_double(self) -> Outputs:
        """The same outputs in float64, where the gradient of the loss tells one family from another."""

        def cast(value: object) -> object:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        leaves = tuple(cast(leaf) for leaf in self.leaves)
        return replace(self, y=optree.tree_map(cast, self.y), flat=self.flat.double(), leaves=leaves)

    def only(self) -> Tensor:
        """The one output that the loss depends on, in its own shape.

        Raises
        ------
        ConfigurationError
            Where it depends on several.
        """
        if len(self.used) != 1:
            shapes = ", ".join(str(tuple(self.leaves[i].shape)) for i in self.used)
            raise ConfigurationError(
                f"curvature='fisher' needs a loss of one model output; this one uses {len(self.used)} ({shapes}). "
                "Use curvature='ggn' or 'empirical_fisher'"
            )
        return self.leaves[self.used[0]]

    def curvature(self) -> Inner:
        """u ↦ (∂²ℓ_j/∂f_j²) u_j for each sample: the derivative of the gradient, which is symmetric."""
        pull = _pullback(grad(self.loss), self.flat)
        return lambda u: pull(u)[0]

    def matrices(self, inner: Inner) -> Tensor:
        """A_j of every sample, (n, K, K) float64, from products with the K unit vectors."""
        n, size = self.flat.shape
        units = torch.eye(size, dtype=self.flat.dtype, device=self.flat.device)

        def column(unit: Tensor) -> Tensor:
            # of a loss without curvature it depends on no unit, and vmap would not know it for a column
            return torch.zeros_like(unit) + inner(unit)

        columns = vmap(column, out_dims=2)(units[:, None, :].expand(size, n, size)).to(torch.float64)
        return (columns + columns.mT) / 2


# -- products with vectors -------------------------------------------------------------
def products(problem: Problem, outputs: Outputs, vectors: Tensor, inner: Inner) -> Tensor:
    """Σ_j J_jᵀ A_j J_j v_b for ``vectors`` (B, P), shape (B, P).

    Call within :func:`~dask_influence.core.elementary.differentiation`.

    J v takes the form that the directional derivatives of the losses were checked in.
    """
    return _FORMS[problem.forms.directional](problem, outputs, vectors, inner)


def pushed(problem: Problem, outputs: Outputs, vector: Tensor) -> Tensor:
    """J_j v for one vector (P,), shape (n, K), in the form that products take."""
    held: list[Tensor] = []

    def inner(u: Tensor) -> Tensor:
        held.append(u)
        return u

    form = problem.forms.directional
    looped = form if form in ("gradients", "dummy_weights_loop") else "forward_loop"
    if form == "dummy_weights":
        looped = "dummy_weights_loop"
    _FORMS[looped](problem, outputs, vector[None], inner)
    return held[0]


def pulled(outputs: Outputs, cotangent: Tensor) -> Tensor:
    """Σ_j J_jᵀ u_j by one backward pass, shape (P,)."""
    with torch.enable_grad():
        leaves = {name: value.requires_grad_() for name, value in outputs.objective.parameters().items()}
        return _backward(outputs.at(leaves), leaves, cotangent).detach()


def _backward(value: Tensor, leaves: Theta, seed: Tensor | None = None, keep: bool = False) -> Tensor:
    """Gradient of ⟨seed, value⟩ by classic autograd, (P,); ``keep`` leaves it differentiable."""
    parts = torch.autograd.grad(
        value, list(leaves.values()), seed, create_graph=keep, retain_graph=True, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


def _pullback(function: Callable[[Any], Any], at: Any) -> Callable[[Any], Any]:
    result: Any = vjp(function, at)  # its own type has a third, optional part
    return result[1]


def _forward_product(outputs: Outputs, inner: Inner) -> Callable[[Theta], Theta]:
    theta = outputs.objective.parameters()
    pull = _pullback(outputs.at, theta)
    return lambda v: pull(inner(jvp(outputs.at, (theta,), (v,))[1]))[0]


def _forward(problem: Problem, outputs: Outputs, vectors: Tensor, inner: Inner) -> Tensor:
    objective = problem.objective
    return objective.flatten(vmap(_forward_product(outputs, inner))(objective.unflatten(vectors)), 1)


def _forward_loop(problem: Problem, outputs: Outputs, vectors: Tensor, inner: Inner) -> Tensor:
    objective, product = problem.objective, _forward_product(outputs, inner)
    return torch.stack([objective.flatten(product(objective.unflatten(v))) for v in vectors])


def _reverse(problem: Problem, outputs: Outputs, vectors: Tensor, inner: Inner) -> Tensor:
    objective = problem.objective
    pull = _pullback(outputs.at, objective.parameters())
    push = _pullback(lambda u: pull(u)[0], torch.zeros_like(outputs.flat))  # linear in u: J is its transpose
    product = vmap(lambda v: pull(inner(push(v)[0]))[0])
    return objective.flatten(product(objective.unflatten(vectors)), 1)


def _reverse_loop(problem: Problem, outputs: Outputs, vectors: Tensor, inner: Inner) -> Tensor:
    """One vector at a time by classic autograd, for code that ``torch.func`` cannot transform."""
    rows = []
    for vector in vectors:  # a graph per vector: retaining one holds its buffers for all of them
        with torch.enable_grad():
            leaves = {name: value.requires_grad_() for name, value in problem.objective.parameters().items()}
            f = outputs.at(leaves)
            weights = torch.zeros_like(f, requires_grad=True)
            back = _backward(f, leaves, weights, keep=True)
            (along,) = torch.autograd.grad(back, weights, vector, retain_graph=True)
            rows.append(_backward(f, leaves, inner(along.detach()).detach()).detach())
    return torch.stack(rows)


def _by_rows(problem: Problem, outputs: Outputs, vectors: Tensor, inner: Inner) -> Tensor:
    rows = jacobian(problem, outputs)
    curved = [inner(rows @ vector) for vector in vectors]
    return torch.stack([torch.einsum("nk,nkp->p", u, rows) for u in curved])


_FORMS: dict[str, Callable[[Problem, Outputs, Tensor, Inner], Tensor]] = {
    "forward": _forward,
    "forward_loop": _forward_loop,
    "dummy_weights": _reverse,
    "dummy_weights_loop": _reverse_loop,
    "gradients": _by_rows,
}
"""By the form of the directional derivatives (``core.forms``)."""


# -- rows of the Jacobian --------------------------------------------------------------
def jacobian(problem: Problem, outputs: Outputs) -> Tensor:
    """J_j of each sample, (n, K, P).

    Call within :func:`~dask_influence.core.elementary.differentiation`.
    """
    if problem.forms.gradient == "loop":
        return torch.stack([_jacobian_of_one(outputs, j) for j in range(len(outputs.flat))])
    objective = problem.objective
    theta = objective.parameters()
    units = torch.eye(outputs.flat.shape[1], dtype=outputs.flat.dtype, device=outputs.flat.device)

    def rows(x: Tree) -> Tensor:
        single = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), x)
        pull = _pullback(lambda p: outputs.at(p, single)[0], theta)
        return objective.flatten(vmap(lambda u: pull(u)[0])(units), 1)

    return vmap(rows)(outputs.x)


def _jacobian_of_one(outputs: Outputs, j: int) -> Tensor:
    with torch.enable_grad():
        leaves = {name: value.requires_grad_() for name, value in outputs.objective.parameters().items()}
        f = outputs.at(leaves, sliced(outputs.x, slice(j, j + 1)))[0]
        return torch.stack([_backward(entry, leaves).detach() for entry in f])
