"""Matrices of curvature of perceptrons, from what enters their layers and what comes back.

A change V_l of a layer's weights acts on the loss of a sample through the shift c_l = V_l a_l of the
layer's output alone. With δ_l = ∂ℓ/∂c_l, B_lm = ∂²ℓ/∂c_l∂c_m and J_ml = ∂a_m/∂c_l, the Hessian of a
sample between the weights (q, p) of layer l and (q', p') of layer m is

    B_lm[q, q'] a_l[p] a_m[p']  +  δ_m[q'] J_ml[p', q] a_l[p]  +  δ_l[q] J_lm[p, q'] a_m[p'],

where a ends with a 1 for the bias. The Gauss-Newton matrix and the Fisher information are the first
term alone, with B_lm = Σ_r ± (L_r ∂f/∂c_l)ᵀ (L_r ∂f/∂c_m) for a curvature Σ_r ± L_rᵀ L_r in the outputs f.
So as many derivatives are taken as the layers have outputs, not as they have weights, and the sum over
samples is a matrix product. Schraudolph 2002; Martens & Grosse 2015, §2.

Notation: n samples, S outputs of all layers together, K outputs of the model, r rows of a factor,
q × p the matrix of one layer, p with the bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from dask_influence.core.capture import Response, capture, perceptron, responses
from dask_influence.core.layers import Layer, Layout
from dask_influence.core.objective import Tree
from dask_influence.core.outputs import Outputs
from dask_influence.core.problem import Problem

BUDGET = 128 * 2**20
"""Bytes that the outer products of a block of samples may take."""

Factors = Callable[[Outputs], tuple[Tensor, Tensor]]
"""Outputs of n samples → L (n, r, K) and the sign of each row (n, r)."""


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
    layout = perceptron(problem, x)
    if layout is None:
        return None
    total = _Total(problem, layout)
    step = max(1, BUDGET // (total.elements * problem.objective.dtype.itemsize))
    found = responses(problem, x, y, layout, step)
    if found is None:
        return None
    for response in found:
        for first, second in total.pairs:
            total.add(first, second, response.inputs, response.curvature[first][second])
            if first != second:
                total.add_bent(response, first, second)
                total.add_bent(response, second, first)
    return total.symmetric()


def gauss_newton_sum(problem: Problem, x: Tree, y: Tree, factors: Factors) -> Tensor | None:
    """Σ_j J_jᵀ A_j J_j with A_j = Σ_r ± L_rᵀ L_r, as :func:`hessian_sum`; products are float64's.

    So it has no more negative eigenvalues than A, up to the rounding of float64.
    """
    layout = perceptron(problem, x)
    if layout is None:
        return None
    total, signs, done = _Total(problem, layout), list[Tensor](), 0

    def columns(outputs: Outputs) -> Tensor:
        factor, sign = factors(outputs)
        signs.append(sign)
        return factor.to(outputs.flat)

    for seen in capture(problem, x, y, layout, columns):
        layers = [layer for layer in seen if layer is not None]  # all of them: each is called
        derivatives = [layer.derivatives[:, :, 0, 0].to(torch.float64) for layer in layers]  # (n, r, q)
        inputs = [layer.inputs[:, 0, 0].to(torch.float64) for layer in layers]
        sign = torch.cat(signs)[done : done + len(inputs[0]), :, None]
        done += len(inputs[0])
        for first, second in total.pairs:
            curvature = derivatives[first].mT @ (sign * derivatives[second])
            total.add(first, second, inputs, curvature)
    return total.symmetric()


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


class _Total:
    """The sum over samples, layer by layer, l ≤ m: as what the products over samples give, until all are in.

    So a block of samples costs its products and one addition, and the matrix is written once.
    """

    def __init__(self, problem: Problem, layout: Layout) -> None:
        self.size, self._device = problem.objective.size, problem.objective.device
        self.blocks = [_Block(layer, problem) for layer in layout.layers]
        self.pairs = list(itertools.combinations_with_replacement(range(len(self.blocks)), 2))
        self._sums: dict[tuple[int, int], Tensor] = {}
        """Of l with itself (q ≤ q', p · r), of l before m (q · q', p · r)."""
        self._bent: dict[tuple[int, int], Tensor] = {}
        """(q' · p' · q, p) where the input p' of layer m bends with the output q of layer l, at [l, m]."""

    @property
    def elements(self) -> int:
        """Elements that a sample takes: its outer products, and what derivatives keep for each output."""
        rows, width = (max(getattr(block, name) for block in self.blocks) for name in ("rows", "width"))
        outputs, inputs = (sum(getattr(block, name) for block in self.blocks) for name in ("rows", "width"))
        return max(rows * rows * width, width * width, 6 * outputs * (outputs + inputs))

    def add(self, first: int, second: int, inputs: list[Tensor], curvature: Tensor) -> None:
        """Σ_j B[q, q'] a_l[p] a_m[p'] between two layers, for B (n, q, q')."""
        left, right = self.blocks[first], self.blocks[second]
        if first == second:  # half of B is enough
            upper = _upper(left.rows, curvature.device)
            curvature = curvature[:, upper[0], upper[1]]
        step = max(1, BUDGET // (left.width * right.width * curvature.element_size()))
        for part in (slice(start, start + step) for start in range(0, len(curvature), step)):
            a = left.layer.homogeneous(inputs[first][part])
            b = right.layer.homogeneous(inputs[second][part])
            outer = torch.einsum("np,nr->npr", a, b).flatten(1)
            _add(self._sums, (first, second), curvature[part].flatten(1).mT @ outer)

    def add_bent(self, seen: Response, first: int, second: int) -> None:
        """Σ_j δ_m[q'] J_ml[p', q] a_l[p], where m's input depends on l's output."""
        left, right = self.blocks[first], self.blocks[second]
        moved = seen.jacobians[second][first]  # (n, p', q)
        if moved is None or right.layer.weight is None:
            return
        outer = torch.einsum("ns,nrq->nsrq", seen.derivatives[second], moved)
        a = left.layer.homogeneous(seen.inputs[first])
        _add(self._bent, (first, second), outer.flatten(1).mT @ a)

    def symmetric(self) -> Tensor:
        """The whole matrix, on CPU."""
        # every entry is written: the layers hold all of θ
        matrix = torch.empty(self.size, self.size, dtype=torch.float64, device=self._device)
        for (first, second), total in self._sums.items():
            left, right = self.blocks[first], self.blocks[second]
            pairs = total.unflatten(1, (left.width, right.width))
            if first == second:
                self._place_own(matrix, left, pairs)
            else:
                part = pairs.unflatten(0, (left.rows, right.rows)).transpose(1, 2)
                _place(matrix, left, right, part, Tensor.copy_)
        for (first, second), total in self._bent.items():
            left, right = self.blocks[first], self.blocks[second]
            part = total.unflatten(0, (right.rows, -1, left.rows))  # (q', p', q, p)
            if first < second:
                _place(matrix, left, right, part.permute(2, 3, 0, 1), Tensor.add_)
            else:
                _place(matrix, right, left, part, Tensor.add_)
        for first, second in self.pairs:
            if first != second:
                for rows, _ in self.blocks[first].parts:
                    for columns, _ in self.blocks[second].parts:
                        matrix[columns, rows] = matrix[rows, columns].mT
        return matrix.cpu()

    @staticmethod
    def _place_own(matrix: Tensor, block: _Block, pairs: Tensor) -> None:
        """Blocks (q ≤ q', p, r) of a layer with itself, symmetric to the last bit when they stand."""
        upper = _upper(block.rows, matrix.device)
        own = upper[0] == upper[1]
        pairs[own] = (pairs[own] + pairs[own].mT) / 2
        for rows, p in block.parts:
            for columns, r in block.parts:
                target = matrix[rows, columns].unflatten(0, (block.rows, -1)).unflatten(2, (block.rows, -1))
                target[upper[0], :, upper[1], :] = pairs[:, p, r]
                target[upper[1], :, upper[0], :] = pairs[:, r, p].mT


def _upper(rows: int, device: torch.device) -> Tensor:
    return torch.triu_indices(rows, rows, device=device)


def _add(sums: dict[tuple[int, int], Tensor], key: tuple[int, int], part: Tensor) -> None:
    if key in sums:
        sums[key] += part
    else:
        sums[key] = part.to(torch.float64)


def _place(
    matrix: Tensor, left: _Block, right: _Block, part: Tensor, write: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Copy or add (q, p, q', p') to the rows of one layer and the columns of another; p' may lack the bias."""
    for rows, p in left.parts:
        for columns, r in right.parts:
            source = part[:, p, :, r]
            if source.shape[1] and source.shape[3]:
                target = matrix[rows, columns]
                write(target.unflatten(0, source.shape[:2]).unflatten(2, source.shape[2:]), source)
