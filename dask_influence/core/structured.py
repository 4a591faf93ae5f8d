"""The exact Hessian of perceptrons, from what enters their layers and what comes back.

A change V_l of a layer's weights acts on the loss of a sample through the shift c_l = V_l a_l of the
layer's output alone. With δ_l = ∂ℓ/∂c_l, B_lm = ∂²ℓ/∂c_l∂c_m and J_ml = ∂a_m/∂c_l, the Hessian of a
sample between the weights (q, p) of layer l and (q', p') of layer m is

    B_lm[q, q'] a_l[p] a_m[p']  +  δ_m[q'] J_ml[p', q] a_l[p]  +  δ_l[q] J_lm[p, q'] a_m[p'],

where a ends with a 1 for the bias. (The last two terms are what the Gauss-Newton matrix leaves out,
beside the part of B.) So as many derivatives are taken as the layers have outputs, not as they have
weights, and the sum over samples is a matrix product. Schraudolph 2002; Martens & Grosse 2015, §2.

Notation: n samples, S outputs of all layers together, q × p the matrix of one layer, p with the bias.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dask_influence.core.capture import Response, responses
from dask_influence.core.layers import Layer, layout_of
from dask_influence.core.objective import Tree
from dask_influence.core.problem import Problem

BUDGET = 128 * 2**20
"""Bytes that the outer products of a block of samples may take."""


def hessian_sum(problem: Problem, x: Tree, y: Tree) -> Tensor | None:
    """Σ_j ∇²θ ℓ(z_j) as a symmetric (P, P) matrix in float64, or None where a layer is of another kind.

    Examples
    --------
    >>> from dask_influence.core.objective import Objective
    >>> from dask_influence.core.problem import prepare
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    >>> x, y = torch.ones(5, 3), torch.zeros(5, 1)
    >>> problem, _ = prepare(Objective.of(net, torch.nn.functional.mse_loss), x, y)
    >>> hessian_sum(problem, x, y).shape
    torch.Size([21, 21])
    """
    layout = layout_of(problem.objective)
    if layout.unsupported or any(layer.indexed or layer.groups > 1 for layer in layout.layers):
        return None
    blocks = [_Block(layer, problem) for layer in layout.layers]
    size = problem.objective.size
    step = max(1, BUDGET // (_elements(blocks) * problem.objective.dtype.itemsize))
    total: dict[tuple[int, int], Tensor] = {}
    found = responses(problem, x, y, layout, step)
    if found is None:
        return None
    for response in found:
        for first, second in itertools.combinations_with_replacement(range(len(blocks)), 2):
            part = _between(blocks, response, first, second)
            key = (first, second)
            total[key] = total[key].add_(part) if key in total else part
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for (first, second), part in total.items():
        _place(matrix, blocks[first], blocks[second], part)
    return matrix


def _elements(blocks: list[_Block]) -> int:
    """Elements that a sample takes: its outer products, and what derivatives keep for each output."""
    rows, width = (max(getattr(block, name) for block in blocks) for name in ("rows", "width"))
    outputs, inputs = (sum(getattr(block, name) for block in blocks) for name in ("rows", "width"))
    return max(rows * rows * width, width * width, 6 * outputs * (outputs + inputs))


class _Block:
    """Where the weights of a layer stand in θ."""

    def __init__(self, layer: Layer, problem: Problem) -> None:
        objective = problem.objective
        starts = dict(zip(objective.names, itertools.accumulate(objective.sizes, initial=0), strict=False))
        self.layer, self.rows, self.width = layer, layer.rows, layer.width
        self.parts: list[tuple[slice, slice]] = []
        """Entries of θ, and the columns of (q, p) that they are."""
        if layer.weight:
            start = starts[layer.weight] + layer.key[1] * layer.columns
            self.parts.append((slice(start, start + layer.rows * layer.columns), slice(0, layer.columns)))
        if layer.bias:
            start = starts[layer.bias] + layer.bias_start
            self.parts.append((slice(start, start + layer.rows), slice(self.width - 1, self.width)))


def _between(blocks: list[_Block], seen: Response, first: int, second: int) -> Tensor:
    """Σ_j of the Hessian between two layers, (q, p, q', p')."""
    left, right = blocks[first], blocks[second]
    a, b = (block.layer.homogeneous(seen.inputs[i]) for i, block in ((first, left), (second, right)))
    shape = (left.rows, right.rows, left.width, right.width)
    outer = torch.einsum("np,nr->npr", a, b).flatten(1)
    curvature = seen.curvature[first][second]  # (n, q, q')
    if first == second:
        upper = torch.triu_indices(left.rows, left.rows, device=a.device)
        pairs = curvature[:, upper[0], upper[1]].mT @ outer
        result = a.new_empty(shape)
        shaped = pairs.unflatten(1, shape[2:])
        own = upper[0] == upper[1]
        shaped[own] = (shaped[own] + shaped[own].mT) / 2  # to the last bit
        result[upper[0], upper[1]] = shaped
        result[upper[1], upper[0]] = shaped.mT
        return result.transpose(1, 2)
    result = (curvature.flatten(1).mT @ outer).reshape(shape).transpose(1, 2)
    _add_bent(blocks, result, seen, first, second, a)
    _add_bent(blocks, result.permute(2, 3, 0, 1), seen, second, first, b)
    return result


def _add_bent(
    blocks: list[_Block], result: Tensor, seen: Response, first: int, second: int, entering: Tensor
) -> None:
    """Add δ_m[q'] J_ml[p', q] a_l[p] to (q, p, q', p'), where m's input depends on l's output."""
    moved = seen.jacobians[second][first]  # (n, p', q)
    if moved is None or blocks[second].layer.weight is None:
        return
    outer = torch.einsum("ns,nrq->nsrq", seen.derivatives[second], moved)
    part = outer.flatten(1).mT @ entering
    result[..., : moved.shape[1]] += part.unflatten(0, outer.shape[1:]).permute(2, 3, 0, 1)


def _place(matrix: Tensor, left: _Block, right: _Block, part: Tensor) -> None:
    for rows, p in left.parts:
        for columns, r in right.parts:
            entries = part[:, p, :, r].reshape(rows.stop - rows.start, -1).to("cpu", torch.float64)
            matrix[rows, columns] = entries
            if left is not right:
                matrix[columns, rows] = entries.mT
