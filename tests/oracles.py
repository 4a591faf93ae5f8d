"""Dense float64 oracles: influence by definition, sharing no code with the package.

Everything is written for tens of samples and hundreds of parameters: one ``autograd.grad`` per
sample, per row of the Hessian, per output. Two routes lead to every second derivative, double
backward and central differences of first-order gradients, because torch's second derivatives
of some layers (LayerNorm among them) are wrong; ``test_oracles.py`` compares the two.

Notation: N test points, M training points, P parameters, K outputs of the model, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]

STENCIL = ((1, 2 / 3), (-1, -2 / 3), (2, -1 / 12), (-2, 1 / 12))
"""Shifts and weights of the central first difference whose error is of fourth order in the step."""


# -- trees of arrays, written out so that nothing of the package is used --------------------------
def pick(tree: Any, index: Any) -> Any:
    """Index the leading axis of every leaf of a tensor, tuple or mapping."""
    if isinstance(tree, Mapping):
        return {key: pick(value, index) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(pick(value, index) for value in tree)
    return tree[index]


def leaves(tree: Any) -> list[Tensor]:
    """Tensors of a tree, in order."""
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def count(tree: Any) -> int:
    """Samples along the leading axis."""
    return leaves(tree)[0].shape[0]


def floating_leaf(tree: Any) -> Tensor:
    """The one input with derivatives."""
    (leaf,) = [leaf for leaf in leaves(tree) if leaf.is_floating_point()]
    return leaf


def with_leaf(tree: Any, leaf: Tensor) -> Any:
    """The same tree with its one floating leaf replaced."""
    if isinstance(tree, Mapping):
        return {key: with_leaf(value, leaf) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(with_leaf(value, leaf) for value in tree)
    return leaf if tree.is_floating_point() else tree


def call(model: nn.Module, x: Any) -> Any:
    """Tuples are positional arguments, mappings keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def prepared(model: nn.Module) -> nn.Module:
    """A float64 copy in eval mode."""
    return copy.deepcopy(model).double().eval()


def theta(model: nn.Module, names: Iterable[str] | None = None) -> list[Tensor]:
    """Trainable parameters in the model's own order, narrowed to ``names``."""
    wanted = None if names is None else set(names)
    held = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [p for name, p in held if wanted is None or name in wanted]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of P entries."""
    return torch.cat([t.reshape(-1) for t in tensors])


def _gradient(value: Tensor, wrt: Sequence[Tensor], **how: bool) -> Tensor:
    return flat(torch.autograd.grad(value, wrt, materialize_grads=True, **how))


# -- first derivatives ----------------------------------------------------------------------------
def gradients(model: nn.Module, loss: Loss, x: Any, y: Any, names: Iterable[str] | None = None) -> Tensor:
    """∇θ ℓ(z_j) for every sample, one backward pass each, shape (n, P)."""
    model = prepared(model)
    wrt = theta(model, names)
    one = [slice(j, j + 1) for j in range(count(x))]
    return torch.stack([_gradient(loss(call(model, pick(x, j)), pick(y, j)), wrt) for j in one])


def mean_gradient(model: nn.Module, loss: Loss, x: Any, y: Any, names: Iterable[str] | None = None) -> Tensor:
    """Gradient of the mean loss, shape (P,)."""
    model = prepared(model)
    return _gradient(loss(call(model, x), y), theta(model, names))


# -- curvature of the mean loss -------------------------------------------------------------------
def hessian(model: nn.Module, loss: Loss, x: Any, y: Any, names: Iterable[str] | None = None) -> Tensor:
    """∇²θ of the mean loss, one backward pass a row, shape (P, P)."""
    model = prepared(model)
    wrt = theta(model, names)
    gradient = _gradient(loss(call(model, x), y), wrt, create_graph=True)
    return torch.stack([_gradient(entry, wrt, retain_graph=True) for entry in gradient])


def hessian_by_differences(
    model: nn.Module, loss: Loss, x: Any, y: Any, names: Iterable[str] | None = None, step: float = 1e-4
) -> Tensor:
    """∇²θ of the mean loss from central differences of its gradient, symmetrised, shape (P, P)."""
    model = prepared(model)
    rows = []
    for parameter in theta(model, names):
        entries = parameter.data.view(-1)
        for i in range(len(entries)):
            kept = entries[i].item()
            total = torch.zeros(())
            for shift, weight in STENCIL:
                entries[i] = kept + shift * step
                total = total + weight / step * _gradient(loss(call(model, x), y), theta(model, names))
            entries[i] = kept
            rows.append(total)
    dense = torch.stack(rows)
    return (dense + dense.T) / 2


def output_jacobian(model: nn.Module, x: Any, names: Iterable[str] | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (n, K) and their Jacobian in θ (n, K, P), for models of one (n, K) output."""
    model = prepared(model)
    wrt = theta(model, names)
    outputs = call(model, x)
    rows = [[_gradient(entry, wrt, retain_graph=True) for entry in output] for output in outputs]
    return outputs.detach(), torch.stack([torch.stack(row) for row in rows])


def ggn(model: nn.Module, loss: Loss, x: Any, y: Any, names: Iterable[str] | None = None) -> Tensor:
    """Generalised Gauss-Newton matrix: mean of J_jᵀ (∂²ℓ/∂f²) J_j, shape (P, P)."""
    outputs, jacobian = output_jacobian(model, x, names)
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1], dtype=torch.float64)
    for j, (output, rows) in enumerate(zip(outputs, jacobian, strict=True)):
        target = pick(y, slice(j, j + 1))
        inner = torch.autograd.functional.hessian(lambda f, t=target: loss(f[None], t), output)
        total += rows.T @ inner @ rows
    return total / len(outputs)


def fisher_of_categorical(model: nn.Module, x: Any, names: Iterable[str] | None = None) -> Tensor:
    """Fisher matrix of softmax(f(x)): mean over x of Σ_k p_k g_k g_kᵀ with g_k = ∇θ(−log p_k)."""
    outputs, jacobian = output_jacobian(model, x, names)
    total = torch.zeros(jacobian.shape[-1], jacobian.shape[-1], dtype=torch.float64)
    for probabilities, rows in zip(outputs.softmax(-1), jacobian, strict=True):
        for k, p in enumerate(probabilities):
            score = (probabilities - torch.eye(len(probabilities), dtype=torch.float64)[k]) @ rows
            total += p * torch.outer(score, score)
    return total / len(outputs)


def empirical_fisher(
    model: nn.Module, loss: Loss, x: Any, y: Any, names: Iterable[str] | None = None
) -> Tensor:
    """Mean of g gᵀ over the samples, at the observed targets, shape (P, P)."""
    rows = gradients(model, loss, x, y, names)
    return rows.T @ rows / len(rows)


def block_diagonal(curvature: Tensor, sizes: Sequence[int]) -> Tensor:
    """Curvature with everything outside consecutive diagonal blocks of ``sizes`` set to zero."""
    block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return torch.where(block[:, None] == block[None, :], curvature, 0.0)


# -- inverses -------------------------------------------------------------------------------------
def inverse(curvature: Tensor, regularization: float) -> Tensor:
    """(H + λI)⁻¹, shape (P, P)."""
    return torch.linalg.inv(curvature + regularization * torch.eye(len(curvature), dtype=torch.float64))


def leading_eigenpairs(curvature: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` eigenvalues of largest magnitude, descending, and their vectors (P, R)."""
    values, vectors = torch.linalg.eigh((curvature + curvature.T) / 2)
    order = values.abs().argsort(descending=True)[:rank]
    return values[order], vectors[:, order]


def low_rank_inverse(curvature: Tensor, regularization: float, rank: int, complement: bool) -> Tensor:
    """V(Λ+λ)⁻¹Vᵀ of the leading eigenpairs, plus (I − VVᵀ)/λ where the complement is kept."""
    values, vectors = leading_eigenpairs(curvature, rank)
    dense = vectors / (values + regularization) @ vectors.T
    if complement:
        dense = dense + (torch.eye(len(dense), dtype=torch.float64) - vectors @ vectors.T) / regularization
    return dense


# -- influences -----------------------------------------------------------------------------------
def up(model: nn.Module, loss: Loss, inverse: Tensor, test: Any, train: Any, names: Any = None) -> Tensor:
    """+ g_testᵀ A g_train, shape (N, M)."""
    return gradients(model, loss, *test, names) @ inverse @ gradients(model, loss, *train, names).T


def perturbation(
    model: nn.Module, loss: Loss, inverse: Tensor, test: Any, train: Any, names: Any = None
) -> Tensor:
    """∇x ⟨A g_test, ∇θ ℓ(z_train)⟩ by double backward, shape (N, M, *features)."""
    factors = gradients(model, loss, *test, names) @ inverse
    private = prepared(model)
    wrt = theta(private, names)
    columns = []
    for j in range(count(train[0])):
        x, y = pick(train[0], slice(j, j + 1)), pick(train[1], slice(j, j + 1))
        leaf = floating_leaf(x).double().requires_grad_()
        gradient = _gradient(loss(call(private, with_leaf(x, leaf)), y), wrt, create_graph=True)
        columns.append(
            torch.cat([torch.autograd.grad(s @ gradient, leaf, retain_graph=True)[0] for s in factors])
        )
    return torch.stack(columns, dim=1)


def perturbation_by_differences(
    model: nn.Module,
    loss: Loss,
    inverse: Tensor,
    test: Any,
    train: Any,
    names: Any = None,
    step: float = 1e-4,
) -> Tensor:
    """The same from central differences, along every feature, of per-sample gradients."""
    factors = gradients(model, loss, *test, names) @ inverse
    leaf = floating_leaf(train[0]).double()
    features = leaf[0].numel()
    result = torch.empty(len(factors), len(leaf), features, dtype=torch.float64)
    for f in range(features):
        shift = torch.zeros_like(leaf)
        shift.view(len(leaf), -1)[:, f] = step
        total = torch.zeros(())
        for at, weight in STENCIL:
            moved = with_leaf(train[0], leaf + at * shift)
            total = total + weight / step * gradients(model, loss, moved, train[1], names)
        result[:, :, f] = factors @ total.T
    return result.reshape(len(factors), *leaf.shape)


def relative_error(actual: Any, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in the Frobenius norm; shapes must agree."""
    actual = torch.as_tensor(actual).double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    return float((actual - expected).norm() / expected.norm())


def weight_of_curvature(scores: Tensor, plain: Tensor) -> float:
    """How far scores are from those without any curvature, g·g/λ, relative to the scores."""
    return float((scores - plain).norm() / scores.norm())
