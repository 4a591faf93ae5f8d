"""Factored directions: V layer by layer as thin matrices, and what they cost in accuracy.

For a layer of weights q × p (p with the bias) all directions share two bases, A (p, r) and Q (q, s), and each keeps
a small core:

    V_d ≈ Q C_d Aᵀ,        ⟨V_d, G_j⟩ ≈ Σ_t (Qᵀ δ_jt)ᵀ C_d (Aᵀ a_jt).

That takes p·r + q·s multiplications of a sample, once, and r·s for each direction in place of q·p. How far scores
are off by it is measured (``core.factoring``) on samples of the data fitted, and again on some of whatever is scored:
K random combinations of what the factors leave out, Σ_d ±s_d (V_d − Q C_d Aᵀ), are kept dense, and the mean square of
their products with a gradient is that of the errors of all its projections (Hutchinson 1990). Where it is
too large the dense directions are taken instead.

Notation: D directions, P parameters, n samples, T positions, K combinations, w and μ as in ``core.pairs``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dask_influence.core.derived import held_in
from dask_influence.core.gemm import product

Span = tuple[int, int]
"""First and one past the last entry of θ."""

CHECKED = 128
"""Samples of a call on which the factors are compared with what they leave out."""


@dataclass(frozen=True, eq=False)
class Block:
    """The directions within one layer.

    Attributes
    ----------
    cores : Tensor
        C (D, s, r).
    inputs : Tensor
        A (p, r).
    outputs : Tensor or None
        Q (q, s); None stands for the identity.
    """

    cores: Tensor
    inputs: Tensor
    outputs: Tensor | None

    def along(self, delta: Tensor, inputs: Tensor) -> Tensor:
        """⟨V_d, Σ_t δ_t a_tᵀ⟩ of δ (n, T, q) and a (n, T, p): (n, D)."""
        if delta.shape[1] > 1:
            left, right = self._rotated(delta, inputs)
            return product(torch.einsum("nts,ntr->nsr", left, right).flatten(1), self.cores.flatten(1).mT)
        left, right = self._rotated(delta[:, 0], inputs[:, 0])  # not as batches of one row each
        if self.cores.shape[1] <= self.cores.shape[2]:  # the longer side is the one to contract first
            return product(self.cores, right.mT).mul_(left.mT).sum(1).mT
        return product(self.cores.mT, left.mT).mul_(right.mT).sum(1).mT

    def _rotated(self, delta: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Qᵀδ and Aᵀa of δ (…, q) and a (…, p)."""
        turned = delta if self.outputs is None else product(delta, self.outputs)
        return turned, product(inputs, self.inputs)

    @property
    def written(self) -> int:
        """Numbers that :meth:`along` makes of one sample on its way."""
        return min(self.cores.shape[1:]) * len(self.cores) + sum(self.cores.shape[1:])

    def combined(self, weights: Tensor) -> Tensor:
        """Σ_d weights_kd V_d of weights (K, D): (K, q, p)."""
        cores = torch.einsum("kd,dsr->ksr", weights, self.cores)
        return (cores if self.outputs is None else self.outputs @ cores) @ self.inputs.mT

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        outputs = {} if self.outputs is None else {"outputs": self.outputs}
        return {"cores": self.cores, "inputs": self.inputs, **outputs}

    def to(self, *where: Any) -> Block:
        """The same in another dtype or on another device."""
        outputs = None if self.outputs is None else self.outputs.to(*where)
        return Block(self.cores.to(*where), self.inputs.to(*where), outputs)


@dataclass(frozen=True, eq=False)
class Factored:
    """Directions (D, P) of which some layers are factored.

    Attributes
    ----------
    blocks : mapping of str to Block
        The layers that are, by path.
    rest : Tensor
        All else of V, (D, P').
    spans : tuple of (int, int)
        Which entries of θ those are, in order.
    left_out : Tensor
        Combinations of what the factors leave out, (K, P).
    scales : Tensor
        s (D,): how much a projection counts in a score, √|w|.
    limit : float
        Largest ‖(Ê − E) s‖ / ‖E s‖ of samples of which the factors may be taken.
    exact : callable, optional
        → V (D, P), where it is at hand.
    """

    blocks: Mapping[str, Block]
    rest: Tensor
    spans: tuple[Span, ...]
    left_out: Tensor
    scales: Tensor
    limit: float
    exact: Callable[[], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rest)

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.rest.dtype

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in self.state()[0].values())

    def places(self) -> dict[Span, Span]:
        """Where ``rest`` has each of its spans."""
        found, start = {}, 0
        for low, high in self.spans:
            found[low, high] = start, start + high - low
            start += high - low
        return found

    def agrees(self, projections: Tensor, left_out: Tensor) -> bool:
        """Whether projections (n, D) of samples are near enough, by products (n, K) with what is left out."""
        sound = projections.isfinite().all(1)
        size = (projections[sound] * self.scales).square().sum()
        error = left_out[sound].square().sum() / left_out.shape[1]
        return bool(error <= self.limit**2 * size)

    def dense(self) -> Tensor:
        """V (D, P).

        Raises
        ------
        RuntimeError
            Nobody has said where it is.
        """
        if self.exact is None:
            raise RuntimeError("factored directions that are not backed by dense ones")
        return self.exact()

    def to(self, device: torch.device, dtype: torch.dtype) -> Factored:
        """The same on another device and in another dtype."""
        return replace(
            self,
            blocks={path: block.to(device, dtype) for path, block in self.blocks.items()},
            **{name: getattr(self, name).to(device, dtype) for name in ("rest", "left_out", "scales")},
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values for :meth:`from_state`."""
        tensors = {"rest": self.rest, "left_out": self.left_out, "scales": self.scales}
        for place, block in enumerate(self.blocks.values()):
            tensors |= {f"{place}.{name}": tensor for name, tensor in block.tensors.items()}
        values = {
            "paths": list(self.blocks),
            "spans": [list(span) for span in self.spans],
            "limit": self.limit,
        }
        return tensors, values

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Factored:
        """Inverse of :meth:`state`."""
        blocks = {
            path: Block(
                tensors[f"{place}.cores"], tensors[f"{place}.inputs"], tensors.get(f"{place}.outputs")
            )
            for place, path in enumerate(values["paths"])
        }
        spans = tuple((low, high) for low, high in values["spans"])
        own = (tensors[name] for name in ("rest", "left_out", "scales"))
        rest, left_out, scales = own
        return cls(blocks, rest, spans, left_out, scales, values["limit"])


def directions_in(
    directions: Tensor | Factored, dtype: torch.dtype, device: torch.device
) -> Tensor | Factored:
    """Directions in another dtype and on another device; of dense ones a narrower copy is kept beside them."""
    if isinstance(directions, Factored):
        return directions.to(device, dtype)
    return held_in(directions, dtype, device)


@dataclass(frozen=True, eq=False)
class Approximation:
    """Factored directions with what is known of their accuracy, at any λ.

    Half of the n samples that it was measured on are taken for test points, the others for training points.

    Attributes
    ----------
    tolerance : float
        ``direction_tol``.
    factored : Factored or None
        None where no layer is worth it: nothing is approximated then.
    exact, found : Tensor
        E and Ê (n, D), float64.
    plain : Tensor
        ⟨g_i, g_j⟩ of test and training points, (n/2, n/2).
    """

    tolerance: float
    factored: Factored | None
    exact: Tensor
    found: Tensor
    plain: Tensor

    def error(self, weights: Tensor, plain: float) -> float:
        """‖Ŝ − S‖ / ‖S‖ of the scores Σ_d w_d E_id E_jd + μ ⟨g_i, g_j⟩."""
        return score_error(self.exact, self.found, weights, plain, self.plain)

    def allows(self, weights: Tensor, plain: float) -> bool:
        """Whether scores at these w and μ are as accurate as asked for."""
        return self.error(weights, plain) <= self.tolerance

    def at(self, weights: Tensor, plain: float) -> Factored | None:
        """The factored directions with their limit at these w and μ; None where dense ones have to be taken."""
        if self.factored is None or not self.allows(weights, plain):
            return None
        own = projection_error(self.exact, self.found, self.factored.scales)
        error = self.error(weights, plain)
        limit = own * self.tolerance / error if error else self.tolerance  # both grow alike
        return replace(self.factored, limit=limit)

    def report(self, weights: Tensor, plain: float) -> dict[str, Any]:
        """For diagnostics and certificate."""
        factored = self.at(weights, plain)
        blocks = {} if factored is None else factored.blocks
        ones = torch.ones_like(weights)
        return {
            "direction_tol": self.tolerance,
            "direction_error": 0.0 if factored is None else projection_error(self.exact, self.found, ones),
            "direction_score_error": 0.0 if factored is None else self.error(weights, plain),
            "direction_ranks": {path: [*block.cores.shape[1:]] for path, block in blocks.items()},
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values for :meth:`from_state`."""
        tensors = {f"measured.{name}": getattr(self, name) for name in ("exact", "found", "plain")}
        own, values = ({}, None) if self.factored is None else self.factored.state()
        tensors |= {f"factored.{name}": tensor for name, tensor in own.items()}
        return tensors, {"tolerance": self.tolerance, "factored": values}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None
    ) -> Approximation | None:
        """Inverse of :meth:`state`; other tensors are let be."""
        if values is None:
            return None
        factored = None
        if values["factored"] is not None:
            prefix = "factored."
            own = {key.removeprefix(prefix): held for key, held in tensors.items() if key.startswith(prefix)}
            factored = Factored.from_state(own, values["factored"])
        measured = (tensors[f"measured.{name}"] for name in ("exact", "found", "plain"))
        return cls(values["tolerance"], factored, *measured)


def projection_error(exact: Tensor, found: Tensor, scales: Tensor) -> float:
    """‖(Ê − E) s‖ / ‖E s‖ of projections (n, D), 0 where there is nothing to project on."""
    scales = scales.to(exact)
    size = ((exact * scales).norm()).item()
    return ((found - exact) * scales).norm().item() / size if size else 0.0


def score_error(exact: Tensor, found: Tensor, weights: Tensor, plain: float, products: Tensor) -> float:
    """‖Ŝ − S‖ / ‖S‖ between one half of the samples and the other.

    Examples
    --------
    >>> exact, none = torch.eye(2, dtype=torch.float64) + 1, torch.zeros(1, 1)
    >>> round(score_error(exact, 1.01 * exact, torch.ones(2), 0.0, none), 4)
    0.0201
    """
    half, weights = len(products), weights.to(exact)
    true = (exact[:half] * weights) @ exact[half:].mT
    off = ((found[:half] * weights) @ found[half:].mT - true).norm().item()
    size = (true + plain * products.to(exact)).norm().item()
    return off / size if size else (0.0 if off == 0 else float("inf"))
