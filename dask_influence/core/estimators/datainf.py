"""DataInf: the mean of inverses in place of the inverse of the mean, block by block.

For each block of parameters the empirical Fisher matrix mean_j g_j g_jᵀ + λI is inverted as if
the mean could be taken last,

    mean_j (g_j g_jᵀ + λI)⁻¹ v = ( v − mean_j g_j ⟨g_j, v⟩ / (λ + ‖g_j‖²) ) / λ,

by the formula of Sherman & Morrison for each training sample j. Norms and inner products are
those of the block. The mean is over training samples. Kwon et al. 2023, "DataInf: Efficiently
Estimating Data Influence in LoRA-tuned LLMs and Diffusion Models", equation 5, with one λ for all
blocks. Nothing is fitted: every block of right-hand sides takes one pass over the data, in which
gradients of perceptrons stay outer products (:mod:`~dask_influence.core.outer`).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core import directional
from dask_influence.core.estimators.base import (
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.outer import OuterGradients, outer_gradients
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError

GRADIENT_BUDGET = 128 * 2**20
"""Bytes that the per-sample gradients formed at once may take."""

BLOCKS = ("layer", "parameter", "model")

Ranges = tuple[tuple[int, int], ...]
"""First entry and end of consecutive runs of θ."""


def sherman_morrison_sums(
    problem: Problem,
    x: Tree,
    y: Tree,
    operand: dict[str, Tensor],
    blocks: tuple[Ranges, ...],
    regularization: float,
) -> Moments:
    """Chunk function: Σ_j g_j ⟨g_j, v_b⟩ / (λ + ‖g_j‖²), block by block, as ``"corrections"`` (B, P).

    ``operand["vectors"]`` holds v (B, P).
    """
    objective = problem.objective
    vectors = operand["vectors"].to(objective.device, torch.float64)
    corrections = torch.zeros_like(vectors)
    count = leading_size(y)
    held = outer_gradients(problem, x, y)
    if held is not None:
        for outer in held:
            _add_outer(corrections, vectors, outer, blocks, regularization)
        return Moments({"corrections": corrections}, count)
    step = max(1, GRADIENT_BUDGET // (3 * 8 * objective.size))
    for start in range(0, count, step):
        part = slice(start, start + step)
        gradients = directional.gradients(problem, sliced(x, part), sliced(y, part)).to(torch.float64)
        for block in blocks:
            inner = torch.zeros(len(vectors), len(gradients), dtype=torch.float64, device=vectors.device)
            norms = torch.zeros(len(gradients), dtype=torch.float64, device=vectors.device)
            for low, high in block:
                inner += vectors[:, low:high] @ gradients[:, low:high].mT
                norms += gradients[:, low:high].square().sum(1)
            weights = inner / (regularization + norms)  # (B, n)
            for low, high in block:
                corrections[:, low:high] += weights @ gradients[:, low:high]
    return Moments({"corrections": corrections}, count)


def _add_outer(
    corrections: Tensor,
    vectors: Tensor,
    outer: OuterGradients,
    blocks: tuple[Ranges, ...],
    regularization: float,
) -> None:
    """The same of gradients that are outer products."""
    for block in blocks:
        spans = [span for span in outer.spans if any(low <= span[0] < high for low, high in block)]
        inner, norms = outer.inner(vectors, spans[0]), outer.norms(spans[0])
        for span in spans[1:]:
            inner, norms = inner + outer.inner(vectors, span), norms + outer.norms(span)
        weights = inner / (regularization + norms)  # (B, n)
        for span in spans:
            corrections[:, slice(*span)] += outer.combined(weights, span)


class DataInfInverse(Inverse):
    """mean_j (g_j g_jᵀ + λI)⁻¹ for each block; a pass over the data multiplies by it.

    Parameters
    ----------
    blocks : tuple
        Runs of θ that form each block.
    regularization : float
        λ > 0.
    """

    kind: ClassVar[str] = "datainf"
    needs_rounds: ClassVar[bool] = True

    def __init__(self, blocks: tuple[Ranges, ...], regularization: float) -> None:
        self.blocks, self.regularization = blocks, regularization

    @property
    def residuals_need_rounds(self) -> bool:
        """The curvature itself is known only by its products."""
        return True

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Factors of all rows by one pass."""
        rows = gradients.to(torch.float64)
        function = partial(sherman_morrison_sums, blocks=self.blocks, regularization=self.regularization)
        moments = yield Round(function, {"vectors": rows}, result_bytes=8 * rows.numel())
        return Solution((rows - moments.mean("corrections")) / self.regularization)

    def with_regularization(self, regularization: float) -> DataInfInverse:
        """The same blocks at another λ."""
        return DataInfInverse(self.blocks, _positive(check_regularization(regularization)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Blocks and λ: nothing is fitted."""
        blocks = [[list(run) for run in block] for block in self.blocks]
        return {}, {"blocks": blocks, "regularization": self.regularization}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> DataInfInverse:
        """Take blocks and λ as they are."""
        blocks = tuple(tuple((low, high) for low, high in block) for block in values["blocks"])
        return cls(blocks, values["regularization"])

    def diagnostics(self) -> dict[str, Any]:
        """Number of blocks; the matrix approximated."""
        return {"blocks": len(self.blocks), "fitted_curvature": "empirical_fisher", "positive_definite": True}


@dataclass(frozen=True)
class DataInf(Estimator):
    """Mean of inverses by Sherman-Morrison: no pass to fit, one for every block of factors.

    The matrix is the empirical Fisher whatever ``curvature`` says, which then names the system
    that ``factor_residual`` measures against.

    Parameters
    ----------
    blocks : {"layer", "parameter", "model"}
        What a block is: the parameters of one module (the paper's choice), one tensor, or θ.
    """

    solves_by_rounds: ClassVar[bool] = True
    certifies_by_rounds: ClassVar[bool] = True
    inverts_products: ClassVar[bool] = False

    blocks: str = "layer"

    def validate(self, system: System) -> None:
        """The kind of blocks, and λ > 0."""
        if self.blocks not in BLOCKS:
            raise ConfigurationError(
                f"blocks must be one of {', '.join(map(repr, BLOCKS))}; got {self.blocks!r}"
            )
        _positive(system.regularization)

    def fit(self, system: System) -> Generator[Round, Moments, DataInfInverse]:
        """Nothing but the geometry of the blocks."""
        return DataInfInverse(self._ranges(system), system.regularization)
        yield  # no round is needed, but the contract is a generator

    def _ranges(self, system: System) -> tuple[Ranges, ...]:
        ends = list(accumulate(map(prod, system.shapes), initial=0))
        if self.blocks == "model":
            return (((0, ends[-1]),),)
        blocks: dict[str, list[tuple[int, int]]] = {}
        for name, low, high in zip(system.names, ends, ends[1:], strict=False):
            block = name if self.blocks == "parameter" else name.rpartition(".")[0]
            blocks.setdefault(block, []).append((low, high))
        return tuple(map(tuple, blocks.values()))


def _positive(regularization: float) -> float:
    if regularization == 0:
        raise ConfigurationError(
            "DataInf inverts g gᵀ + λI, which has rank one at hessian_regularization=0; "
            "give hessian_regularization > 0"
        )
    return regularization
