"""EK-FAC: the Fisher matrix, block by layer, in a Kronecker-factored eigenbasis.

For a layer whose per-sample gradient is G = Σ_t δ_t a_tᵀ (q × p; a holds a trailing 1 for the
bias), the mean over samples of A = (1/T) Σ_t a_t a_tᵀ and of B = Σ_t δ_t δ_tᵀ give eigenvectors
U_A and U_B. In the basis U_B ⊗ U_A the block is taken as diagonal, with

    Λ = mean over samples of (U_Bᵀ G U_A)²     (EK-FAC, the exact diagonal in that basis)
    Λ = λ_B λ_Aᵀ                               (KFAC, ``update_diagonal=False``)

and an influence factor is U_B [ (U_Bᵀ G U_A) / (Λ + λ) ] U_Aᵀ: λ is added to every eigenvalue
as it is, without a heuristic for each layer. The expectation over targets is that of the
model's own predictions (:mod:`dask_influence.core.predictive`).

Weights shared over positions (convolutions, token sequences) are treated in the *expand*
setting of Eschenhagen et al. 2023: A and B count every position as one sample, as if positions
were independent. The corrected Λ sums a sample's gradient over positions before it is squared,
and is exact in its basis. Grouped convolutions have A and B for each group. An embedding has
the diagonal A of token frequencies and one B. Norms have a 1 × 2 matrix (scale, shift)
for each channel.

Martens & Grosse 2015 (KFAC); George et al. 2018 (eigenvalue correction); Grosse et al. 2023
(influence functions).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.capture import Captured, capture
from dask_influence.core.checks import SEEDS
from dask_influence.core.curvature import add_gram, mirrored
from dask_influence.core.elementary import differentiation
from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.kronecker import Factored, Kronecker, rotated_inputs
from dask_influence.core.layers import Layer, Layout, layout_of
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree, leading_size
from dask_influence.core.outputs import Outputs
from dask_influence.core.pairs import rounding
from dask_influence.core.predictive import EXPECTATIONS, Expectation
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError, DataError, DerivativeError, SingularCurvatureError
from dask_influence.scalars import check_flag, check_integer

CORRECTION_BUDGET = 128 * 2**20
"""Bytes that the per-sample gradients of one layer may take where they have to be formed."""


LARGE = 256
"""Rows from which a matrix is decomposed by itself."""


# -- sums over a chunk -------------------------------------------------------------------
def covariance_sums(
    problem: Problem, x: Tree, y: Tree, operand: dict[str, Tensor], expectation: Expectation
) -> Moments:
    """Chunk function: Σ_j of A as ``"i.inputs"`` (g, p, p) and of B as ``"i.outputs"`` (g, q, q) for layer i."""
    layout = layout_of(problem.objective)
    sums = {}
    for i, layer in enumerate(layout.layers):
        a, b = _factor_shapes(layer)
        sums[f"{i}.inputs"] = torch.zeros(a, dtype=torch.float64, device=problem.objective.device)
        sums[f"{i}.outputs"] = torch.zeros(b, dtype=torch.float64, device=problem.objective.device)
    for captured in capture(problem, x, y, layout, expectation.columns):
        for i, (layer, seen) in enumerate(zip(layout.layers, captured, strict=True)):
            if seen is None:
                continue
            _add_covariance(sums[f"{i}.outputs"], seen.derivatives.flatten(0, 2))
            if layer.indexed:
                sums[f"{i}.inputs"] += _frequencies(layer, seen.inputs)
            else:
                rows = layer.homogeneous(seen.inputs).flatten(0, 1)
                _add_covariance(sums[f"{i}.inputs"], rows, 1 / seen.inputs.shape[1])
    return Moments({name: mirrored(total) for name, total in sums.items()}, leading_size(y))


def correction_sums(
    problem: Problem, x: Tree, y: Tree, operand: dict[str, Tensor], expectation: Expectation
) -> Moments:
    """Chunk function: Σ_j (U_Bᵀ G_j U_A)² as ``"i.eigenvalues"`` (g, q, p), bases in ``operand``."""
    layout, device = layout_of(problem.objective), problem.objective.device
    sums = {
        f"{i}.eigenvalues": torch.zeros(_matrix_shape(layer), dtype=torch.float64, device=device)
        for i, layer in enumerate(layout.layers)
    }
    # Samples are rotated in their own dtype; their squares are added up in float64.
    dtype = torch.promote_types(problem.objective.dtype, torch.float32)
    # torch's own memory: aligned the same wherever the operand came from, hence the same bits
    bases = {name: value.to(device, dtype, copy=True) for name, value in operand.items()}
    for captured in capture(problem, x, y, layout, expectation.columns):
        for i, (layer, seen) in enumerate(zip(layout.layers, captured, strict=True)):
            if seen is None:
                continue
            delta = torch.einsum("nrtgq,gqs->nrtgs", seen.derivatives.to(dtype), bases[f"{i}.outputs"])
            delta = delta.to(torch.float64)
            if layer.indexed:
                sums[f"{i}.eigenvalues"] += _indexed_squares(layer, seen.inputs, delta)
            else:
                a = _rotated(layer, seen.inputs.to(dtype), bases[f"{i}.inputs"])
                sums[f"{i}.eigenvalues"] += _squares(a.to(torch.float64), delta)
    return Moments(sums, leading_size(y))


def _factor_shapes(layer: Layer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B; an embedding has one B for all its rows."""
    groups = 1 if layer.indexed else layer.groups
    return (layer.groups, layer.width, layer.width), (groups, layer.rows, layer.rows)


def _matrix_shape(layer: Layer) -> tuple[int, int, int]:
    return layer.groups, layer.rows, layer.width


def _add_covariance(total: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Add scale Σ_m r_m r_mᵀ of rows (m, g, p) to the upper triangles of (g, p, p)."""
    wide = rows.to(torch.float64)
    if len(total) == 1:
        add_gram(total[0], wide[:, 0], scale)
    else:
        total += scale * torch.einsum("mgp,mgs->gps", wide, wide)


def _frequencies(layer: Layer, ids: Tensor) -> Tensor:
    """Σ_j (1/T) of the positions that pick each row of an embedding, (g, 1, 1)."""
    counts = torch.bincount(ids.reshape(-1), minlength=layer.groups + 1)[: layer.groups]
    return counts.to(torch.float64)[:, None, None] / ids.shape[1]


def _rotated(layer: Layer, inputs: Tensor, basis: Tensor) -> Tensor:
    """U_Aᵀ a of inputs (n, T, g, p), with the 1 of the bias."""
    if layer.groups == 1:
        return rotated_inputs(layer, inputs[:, :, 0], basis[0])[:, :, None]
    return torch.einsum("ntgp,gps->ntgs", layer.homogeneous(inputs), basis)


def _squares(a: Tensor, delta: Tensor) -> Tensor:
    """Σ_j Σ_r (Σ_t δ_t a_tᵀ)² from a (n, T, g, p) and δ (n, r, T, g, q): (g, q, p)."""
    if a.shape[1] == 1:  # one position: the square of a product is the product of squares
        return torch.einsum("ngq,ngp->gqp", delta[:, :, 0].square().sum(1), a[:, 0].square())
    columns = delta.shape[1]
    one = 8 * columns * delta.shape[3] * delta.shape[4] * a.shape[3]
    step = max(1, CORRECTION_BUDGET // one)
    total = torch.zeros(a.shape[2], delta.shape[4], a.shape[3], dtype=a.dtype, device=a.device)
    for part_a, part_delta in zip(a.split(step), delta.split(step), strict=True):
        total += torch.einsum("nrtgq,ntgp->nrgqp", part_delta, part_a).square().sum((0, 1))
    return total


def _indexed_squares(layer: Layer, ids: Tensor, delta: Tensor) -> Tensor:
    """The same where a_t picks a row: positions of one sample that pick the same row add up first."""
    same = (ids[:, :, None] == ids[:, None, :]).to(delta.dtype)  # (n, T, T)
    summed = torch.einsum("nts,nrsgq->nrtq", same, delta).square().sum(1)  # (n, T, q)
    share = summed / same.sum(2, keepdim=True)  # each of the m positions holds 1/m of the square
    total = torch.zeros(layer.groups + 1, layer.rows, dtype=delta.dtype, device=delta.device)
    total.index_add_(0, ids.reshape(-1), share.reshape(-1, layer.rows))
    return total[: layer.groups, :, None]


def _gradients(layer: Layer, seen: Captured) -> Tensor:
    """Σ_t δ_t a_tᵀ of each sample, (n, g, q, p), for one column."""
    delta = seen.derivatives[:, 0].to(torch.float64)  # (n, T, g, q)
    if not layer.indexed:
        return torch.einsum("ntgq,ntgp->ngqp", delta, layer.homogeneous(seen.inputs.to(torch.float64)))
    total = torch.zeros(len(delta), layer.groups + 1, layer.rows, dtype=delta.dtype, device=delta.device)
    index = seen.inputs[..., None].expand(-1, -1, layer.rows)
    return total.scatter_add_(1, index, delta[:, :, 0])[:, : layer.groups, :, None]


# -- the inverse -------------------------------------------------------------------------
@dataclass(frozen=True)
class Block:
    """Where one layer's matrix (g, q, p) lies in the flat θ.

    Attributes
    ----------
    path : str
        Of the layer.
    weight, bias : int or None
        First entry of each in θ; None where it is not in it.
    groups, rows, columns : int
        g, q, and p with the bias.
    """

    path: str
    weight: int | None
    bias: int | None
    groups: int
    rows: int
    columns: int

    @classmethod
    def of(cls, layer: Layer, system: System) -> Block:
        """From the offsets of the parameters."""
        starts = dict(zip(system.names, accumulate(map(prod, system.shapes), initial=0), strict=False))
        weight = None if layer.weight is None else starts[layer.weight] + layer.key[1] * layer.columns
        bias = None if layer.bias is None else starts[layer.bias] + layer.bias_start
        return cls(layer.path, weight, bias, layer.groups, layer.rows, layer.width)

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.groups, self.rows, self.columns - (self.bias is not None)

    def gather(self, vectors: Tensor) -> Tensor:
        """Matrices (n, g, q, p) out of (n, P)."""
        parts = []
        if self.weight is not None:
            stop = self.weight + prod(self._shape)
            parts.append(vectors[:, self.weight : stop].reshape(-1, *self._shape))
        if self.bias is not None:
            stop = self.bias + self.groups * self.rows
            parts.append(vectors[:, self.bias : stop].reshape(-1, self.groups, self.rows, 1))
        return torch.cat(parts, dim=-1)

    def scatter(self, matrices: Tensor, vectors: Tensor) -> None:
        """Write matrices (n, g, q, p) into (n, P)."""
        width = self._shape[2]
        if self.weight is not None:
            stop = self.weight + prod(self._shape)
            vectors[:, self.weight : stop] = matrices[..., :width].flatten(1)
        if self.bias is not None:
            stop = self.bias + self.groups * self.rows
            vectors[:, self.bias : stop] = matrices[..., -1].flatten(1)


class EkfacInverse(Inverse):
    """Block by layer: U_B [ (U_Bᵀ G U_A) / (Λ + λ) ] U_Aᵀ; zero for parameters left out.

    Parameters
    ----------
    blocks : tuple of Block
        The layers.
    tensors : mapping
        For layer i ``"i.inputs"`` U_A (g, p, p), ``"i.outputs"`` U_B (g or 1, q, q) and
        ``"i.eigenvalues"`` Λ (g, q, p), float64.
    regularization : float
        λ.
    dtype : torch.dtype
        Of the products with the bases: the model's, as the gradients are known to no more.
    report : mapping
        For diagnostics.
    """

    kind: ClassVar[str] = "ekfac"

    def __init__(
        self,
        blocks: tuple[Block, ...],
        tensors: Mapping[str, Tensor],
        regularization: float,
        dtype: torch.dtype,
        report: Mapping[str, Any],
    ) -> None:
        self.blocks, self.tensors = blocks, dict(tensors)
        self.regularization, self.dtype, self.report = regularization, dtype, dict(report)

    def checked(self) -> EkfacInverse:
        """Itself, unless Λ + λ vanishes somewhere.

        Raises
        ------
        SingularCurvatureError
            Names the layer and a λ that would do.
        """
        largest = max(value.max().item() for value in self._eigenvalues())
        floor = torch.finfo(torch.float64).eps * largest
        for block, values in zip(self.blocks, self._eigenvalues(), strict=True):
            if values.min().item() + self.regularization <= floor:
                raise SingularCurvatureError(
                    f"the Fisher matrix of layer {block.path} has the eigenvalue {values.min():.2g} beside a "
                    f"largest of {largest:.2g}, and hessian_regularization={self.regularization:g} does not lift "
                    f"it; use a larger one, for example {max(1e-3 * largest, 1e-12):.2g}"
                )
        return self

    def _eigenvalues(self) -> list[Tensor]:
        return [self.tensors[f"{i}.eigenvalues"] for i in range(len(self.blocks))]

    @property
    def residuals_need_rounds(self) -> bool:
        """The curvature that the blocks approximate is known only by its products."""
        return True

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Rotate, divide, rotate back, layer by layer."""
        rows = gradients.to(self.dtype)
        factors = torch.zeros_like(rows, dtype=torch.float64)
        for i, block in enumerate(self.blocks):
            inputs, outputs = self.form.bases(i, rows)
            rotated = outputs.mT @ block.gather(rows) @ inputs  # (n, g, q, p)
            rotated /= (self.tensors[f"{i}.eigenvalues"] + self.regularization).to(self.dtype)
            block.scatter(outputs @ rotated @ inputs.mT, factors)
        return Solution(factors)
        yield  # no round is needed, but the contract is a generator

    @cached_property
    def form(self) -> Kronecker:
        """Bases and Λ of each layer; what is made of them is kept."""
        layers = (
            Factored(
                block.path, *(self.tensors[f"{i}.{name}"] for name in ("inputs", "outputs", "eigenvalues"))
            )
            for i, block in enumerate(self.blocks)
        )
        return Kronecker(tuple(layers), (self.regularization,))

    def with_regularization(self, regularization: float) -> EkfacInverse:
        """λ is added to the eigenvalues: nothing is recomputed."""
        regularization = check_regularization(regularization)
        return EkfacInverse(self.blocks, self.tensors, regularization, self.dtype, self.report).checked()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Bases, eigenvalues, and where the layers lie in θ."""
        values = {
            "blocks": [asdict(block) for block in self.blocks],
            "regularization": self.regularization,
            "dtype": str(self.dtype).removeprefix("torch."),
            "report": self.report,
        }
        return self.tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> EkfacInverse:
        """Take the arrays as they are."""
        blocks = tuple(Block(**block) for block in values["blocks"])
        dtype = getattr(torch, values["dtype"])
        return cls(blocks, tensors, values["regularization"], dtype, values["report"])

    def diagnostics(self) -> dict[str, Any]:
        """Layers with their extreme eigenvalues, parameters left out, and how targets were taken."""
        layers = {
            block.path: {
                "parameters": block.groups * block.rows * block.columns,
                "smallest_eigenvalue": values.min().item(),
                "largest_eigenvalue": values.max().item(),
            }
            for block, values in zip(self.blocks, self._eigenvalues(), strict=True)
        }
        return {
            "layers": layers,
            "smallest_eigenvalue": min(layer["smallest_eigenvalue"] for layer in layers.values()),
            "largest_eigenvalue": max(layer["largest_eigenvalue"] for layer in layers.values()),
            "positive_definite": True,
            **self.report,
        }


# -- the estimator -----------------------------------------------------------------------
@dataclass(frozen=True)
class Ekfac(Estimator):
    """Kronecker-factored eigenbasis of the Fisher matrix: two passes over the data.

    Parameters
    ----------
    update_diagonal : bool
        Correct the eigenvalues by a second pass (EK-FAC); False is KFAC in the same basis.
    skip_unsupported : bool
        Leave parameters without a Kronecker form out: their factors are zero, so that they
        contribute nothing to a score, and ``diagnostics`` names them. False refuses them.
    expectation : {"auto", "exact", "sampled"}
        Over targets, by the model's own predictions: exactly, with one backward pass for each
        of the K outputs, or from draws. ``"auto"`` is exact up to ``exact_outputs``.
    draws : int
        Draws for each sample where they are sampled.
    exact_outputs : int
        K up to which ``"auto"`` is exact.
    seed : int
        Of the draws, which depend on the sample and on nothing else.
    """

    certifies_by_rounds: ClassVar[bool] = True
    inverts_products: ClassVar[bool] = False
    by_layers: ClassVar[bool] = True

    update_diagonal: bool = True
    skip_unsupported: bool = False
    expectation: str = "auto"
    draws: int = 1
    exact_outputs: int = 64
    seed: int = 0

    def form(self, system: System) -> Kronecker:
        """Of whatever layers the model calls."""
        return Kronecker((), (system.regularization,))

    def inverse_bytes(self, system: System, regularizations: int = 1) -> int:
        """Bases and eigenvalues, float64."""
        layout = system.layout
        if layout is None:
            return 0
        shapes = [_factor_shapes(layer) for layer in self._layout(system).layers]
        return 8 * (sum(prod(shape) for pair in shapes for shape in pair) + system.size)

    def validate(self, system: System) -> None:
        """Arguments, and whether every parameter lies in a layer with a Kronecker form."""
        if self.expectation not in EXPECTATIONS:
            raise ConfigurationError(
                f"expectation must be one of {', '.join(map(repr, EXPECTATIONS))}; got {self.expectation!r}"
            )
        for name in ("update_diagonal", "skip_unsupported"):
            check_flag(name, getattr(self, name))
        for name in ("draws", "exact_outputs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigurationError(f"{name} must be a positive integer; got {value!r}")
        check_integer("seed", self.seed, *SEEDS)
        layout = self._layout(system)
        if layout.unsupported and not self.skip_unsupported:
            listed = "; ".join(f"{name} of {owner}" for name, owner in layout.unsupported)
            raise ConfigurationError(
                f"EK-FAC has no Kronecker form for {listed}; leave those parameters out with skip_unsupported=True "
                "(their factors are zero) or with parameters=, or use another estimator"
            )
        if not layout.layers:
            raise ConfigurationError(
                "EK-FAC finds no layer with a Kronecker form in θ; use another estimator"
            )

    def examine(self, system: System, problem: Problem, x: Tree, y: Tree) -> None:
        """Compare Σ_t δ_t a_tᵀ with the per-sample gradients, and look at the loss's curvature.

        Raises
        ------
        DerivativeError
            A layer's parameters act otherwise than through its own kind of call.
        ConfigurationError, LossError
            The loss has no Fisher matrix.
        """
        with differentiation():
            self._expectation(system.curvature).check(Outputs.of(problem.objective, x, y))
        layout = self._layout(system)
        true = directional.gradients(problem, x, y).to(torch.float64)
        offset = 0
        for captured in capture(problem, x, y, layout, Expectation("empirical_fisher").columns):
            count = max(len(seen.inputs) for seen in captured if seen is not None)
            rows = true[offset : offset + count]
            offset += count
            for layer, seen in zip(layout.layers, captured, strict=True):
                expected = Block.of(layer, system).gather(rows)
                found = torch.zeros_like(expected) if seen is None else _gradients(layer, seen)
                if not (found - expected).norm() <= rounding(expected, true, problem.objective.dtype):
                    raise DerivativeError(
                        f"the gradient of layer {layer.path} is not the sum of products of its inputs and output "
                        "gradients: its parameters are used in another way too. Leave them out with parameters=, "
                        "or use another estimator"
                    )

    def fit(self, system: System) -> Generator[Round, Moments, EkfacInverse]:
        """One pass for A and B, one for Λ."""
        layout, expectation = self._layout(system), self._expectation(system.curvature)
        shapes = [_factor_shapes(layer) for layer in layout.layers]
        size = sum(prod(shape) for pair in shapes for shape in pair)
        moments = yield Round(partial(covariance_sums, expectation=expectation), result_bytes=8 * size)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # LAPACK lets other threads run
            parts = {name: pool.submit(_eigh, moments.mean(name), name, layout) for name in moments.total}
        spectra = {name: part.result()[0] for name, part in parts.items()}
        tensors = {name: part.result()[1] for name, part in parts.items()}
        if self.update_diagonal:
            function = partial(correction_sums, expectation=expectation)
            size = sum(layer.size for layer in layout.layers)
            corrected = yield Round(function, tensors, result_bytes=8 * size)
            tensors = tensors | {name: corrected.mean(name) for name in corrected.total}
        else:
            for i in range(len(layout.layers)):
                a, b = spectra[f"{i}.inputs"], spectra[f"{i}.outputs"]
                tensors[f"{i}.eigenvalues"] = b[:, :, None] * a[:, None, :]
        report = {
            "fitted_curvature": "empirical_fisher" if system.curvature == "empirical_fisher" else "fisher",
            "weight_sharing": "expand",
            "update_diagonal": self.update_diagonal,
            "left_out": [name for name, _ in layout.unsupported],
        }
        blocks = tuple(Block.of(layer, system) for layer in layout.layers)
        dtype = torch.promote_types(system.dtype, torch.float32)  # never in half precision
        return EkfacInverse(blocks, tensors, system.regularization, dtype, report).checked()

    def _layout(self, system: System) -> Layout:
        assert system.layout is not None
        return system.layout.restricted(system.names)

    def _expectation(self, curvature: str) -> Expectation:
        return Expectation(curvature, self.expectation, self.draws, self.exact_outputs, self.seed)


def _eigh(matrix: Tensor, name: str, layout: Layout) -> tuple[Tensor, Tensor]:
    """Eigenvalues, not negative, and eigenvectors of a sum of squares."""
    if not torch.isfinite(matrix).all():
        layer = layout.layers[int(name.partition(".")[0])]
        raise DataError(
            f"layer {layer.path}: the covariance of its {name.partition('.')[2]} is not finite; look for NaN, "
            "inf or overflow in the model's activations, or for a loss that is not convex in the outputs"
        )
    # its LAPACK takes two thirds of the time of torch's, which has a batch of small ones in one call
    if matrix.shape[-1] >= LARGE and matrix.device.type == "cpu":
        values, vectors = map(torch.from_numpy, np.linalg.eigh(matrix.numpy()))
    else:
        values, vectors = torch.linalg.eigh(matrix)
    return values.clamp_min(0), vectors.contiguous()  # as they are after a journey
