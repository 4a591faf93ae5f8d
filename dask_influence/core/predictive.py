"""Columns in the output space of a model whose pullbacks have a Fisher matrix as second moment.

For a sample with outputs f (K) the rows S (r, K) returned here satisfy S ᵀS = A, exactly or in
expectation, where A is the Fisher matrix of the outputs in the scale of the loss
(:mod:`dask_influence.core.families`), or ∂²ℓ/∂f² for a loss that is no known likelihood but
convex in f. The gradients Jᵀ S_r then sum to the sample's Fisher (or Gauss-Newton) matrix.

Draws are a function of the sample and the seed, never of the chunk that holds it: equal samples
get equal draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import optree
import torch
from torch import Tensor
from torch.func import grad_and_value

from dask_influence.core.content import octets
from dask_influence.core.families import Likelihood, recognise
from dask_influence.core.objective import leading_size, sliced
from dask_influence.core.outputs import Outputs
from dask_influence.errors import ConfigurationError, LossError

DENSE_OUTPUTS = 1024
"""Outputs K up to which a K × K matrix is formed for each sample."""

EXPECTATIONS = ("auto", "exact", "sampled")

_NOISE, _ROUNDINGS = 1e-5, 8
"""Negative eigenvalues of ∂²ℓ/∂f², relative to the largest, that rounding may make in float32; in a
shorter dtype, so many times its eps."""


@runtime_checkable
class PredictiveLoss(Protocol):
    """A loss that can draw targets from the distribution whose negative log-likelihood it is.

    The hook for any loss: its Fisher matrix is the second moment of ∇θ ℓ at the targets drawn,
    in the scale that this loss has for one sample.

    Examples
    --------
    >>> class Laplace:
    ...     def __call__(self, output, target):
    ...         return (output - target).abs().sum(-1).mean()
    ...
    ...     def sample_targets(self, output, generator):
    ...         u = torch.rand(output.shape, generator=generator, dtype=torch.float64) - 0.5
    ...         return output - (u.sign() * torch.log1p(-2 * u.abs())).to(output)
    >>> isinstance(Laplace(), PredictiveLoss)
    True
    """

    def __call__(self, output: Any, target: Any) -> Tensor:
        """Mean loss over the leading axis."""

    def sample_targets(self, output: Any, generator: torch.Generator) -> Any:
        """Targets drawn for ``output`` (1, …), on its device, from numbers of the CPU ``generator``."""


@dataclass(frozen=True)
class Expectation:
    """Over which targets a Fisher matrix averages, and how.

    Parameters
    ----------
    curvature : str
        ``"empirical_fisher"`` takes the targets of the data; ``"fisher"`` the model's own
        predictions, and refuses a loss that is no known likelihood; ``"ggn"`` and ``"hessian"``
        fall back on ∂²ℓ/∂f² for such a loss.
    how : {"auto", "exact", "sampled"}
        ``"auto"`` is exact up to ``exact_outputs`` outputs, and sampled beyond and for a
        :class:`PredictiveLoss`.
    draws : int
        Draws for each sample.
    exact_outputs : int
        K up to which ``"auto"`` is exact: that many backward passes.
    seed : int
        Of the draws.
    """

    curvature: str = "fisher"
    how: str = "auto"
    draws: int = 1
    exact_outputs: int = 64
    seed: int = 0

    def columns(self, outputs: Outputs) -> Tensor:
        """S (n, r, K) of each sample; call within ``differentiation``.

        Raises
        ------
        ConfigurationError
            Draws are needed, of a loss that is no known likelihood.
        LossError
            The loss is neither a known likelihood nor convex in the outputs.
        """
        if self.curvature == "empirical_fisher":
            return _gradient(outputs)[:, None]
        loss, (n, size) = outputs.objective.loss, outputs.flat.shape
        if isinstance(loss, PredictiveLoss) and self.how != "exact":
            return self._at_targets(outputs, loss)
        exact = self.how == "exact" or (self.how == "auto" and size <= self.exact_outputs)
        likelihood = self._likelihood(outputs)
        if likelihood is not None and not exact:
            return self._drawn(outputs, likelihood)
        if size > DENSE_OUTPUTS:
            raise ConfigurationError(
                f"the model has {size} outputs for a sample, too many for an exact expectation over targets, and "
                "its loss is no known likelihood to draw them from; give the loss a method "
                "sample_targets(output, generator), or use curvature='empirical_fisher'"
            )
        rows = _roots(outputs) if likelihood is None else likelihood.factors().reshape(n, -1, size)
        rows = rows.to(outputs.flat)
        return rows if exact else self._combined(outputs, rows)

    def check(self, outputs: Outputs) -> None:
        """Refuse a loss without a Fisher matrix, on a few samples.

        Raises
        ------
        ConfigurationError, LossError
            As :meth:`columns`; also where a loss that is no known likelihood is linear in the
            outputs of all of them, so that its Gauss-Newton matrix vanishes.
        """
        columns = self.columns(outputs)
        if self.curvature == "empirical_fisher" or isinstance(outputs.objective.loss, PredictiveLoss):
            return
        if not columns.any() and self._likelihood(outputs) is None:
            raise _without_curvature(outputs, "is zero")

    def _likelihood(self, outputs: Outputs) -> Likelihood | None:
        try:
            shaped = outputs.only()
            # In half precision rounding hides the family; losses may hold float32 of their own.
            wide = outputs.in_double() if outputs.flat.itemsize < 4 else outputs
            gradient = _gradient(wide).reshape(shaped.shape)
            found = recognise(outputs.objective.loss, shaped, gradient, wide.y)
        except ConfigurationError:
            if self.curvature == "fisher":
                raise
            return None
        # log-probabilities: linear in f, so that its Gauss-Newton matrix of them is zero
        return None if self.curvature == "ggn" and found.family == "log_categorical" else found

    def _drawn(self, outputs: Outputs, likelihood: Likelihood) -> Tensor:
        """√c s at targets drawn from the likelihood."""
        scale = likelihood.scale.expand_as(likelihood.outputs)
        rows = []
        for j, generator in enumerate(self._generators(outputs)):
            one = Likelihood(
                likelihood.family, likelihood.outputs[j : j + 1], scale[j : j + 1], likelihood.axis
            )
            rows.append(torch.cat([one.sample(generator).reshape(1, -1) for _ in range(self.draws)]))
        return (torch.stack(rows) / self.draws**0.5).to(outputs.flat)

    def _combined(self, outputs: Outputs, rows: Tensor) -> Tensor:
        """Sums of the exact rows (n, r, K) with random signs: (n, draws, K)."""
        shape = (self.draws, rows.shape[1])
        signs = [torch.randint(2, shape, generator=g) * 2 - 1 for g in self._generators(outputs)]
        return torch.stack(signs).to(rows) @ rows / self.draws**0.5

    def _at_targets(self, outputs: Outputs, loss: PredictiveLoss) -> Tensor:
        """∂ℓ/∂f at targets that the loss draws."""
        objective, rows = outputs.objective, []
        for j, generator in enumerate(self._generators(outputs)):
            x = sliced(outputs.x, slice(j, j + 1))
            output = objective.outputs(objective.parameters(), x)
            drawn = (loss.sample_targets(output, generator) for _ in range(self.draws))
            rows.append(torch.cat([_gradient(Outputs.of(objective, x, target)) for target in drawn]))
        return torch.stack(rows) / self.draws**0.5

    def _generators(self, outputs: Outputs) -> list[torch.Generator]:
        """One generator for each sample, seeded by its content."""
        leaves = [leaf.detach().cpu().contiguous() for leaf in optree.tree_leaves((outputs.x, outputs.y))]
        generators = []
        for j in range(leading_size(outputs.y)):
            digest = hashlib.blake2b(str(self.seed).encode(), digest_size=8)
            for leaf in leaves:
                digest.update(octets(leaf[j]).tobytes())
            seed = int.from_bytes(digest.digest(), "little") >> 1  # torch takes 63 bits
            generators.append(torch.Generator().manual_seed(seed))
        return generators


def _gradient(outputs: Outputs) -> Tensor:
    """∂ℓ_j/∂f_j at the targets given, (n, K); NaN where ℓ_j is not finite."""
    of: Callable[[Tensor], tuple[Tensor, Tensor]] = grad_and_value(outputs.loss)
    rows, total = of(outputs.flat)
    if not total.isfinite():
        rows = rows.clone()
        rows[~outputs.losses().isfinite()] = torch.nan
    return rows


def _roots(outputs: Outputs) -> Tensor:
    """Rows √Λ Vᵀ of ∂²ℓ/∂f² = V Λ Vᵀ, (n, K, K) float64."""
    inner = outputs.curvature()
    # 0·u: vmap wants a result that depends on u, which that of a piecewise linear loss does not
    values, vectors = torch.linalg.eigh(outputs.matrices(lambda u: inner(u) + 0.0 * u))
    noise = max(_NOISE, _ROUNDINGS * torch.finfo(outputs.flat.dtype).eps)
    bad = values[:, 0] < -noise * values[:, -1].clamp_min(torch.finfo(torch.float64).tiny)
    if bad.any():
        raise _without_curvature(outputs, f"has the eigenvalue {values[bad, 0].min().item():.3g}")
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]).mT


def _without_curvature(outputs: Outputs, fault: str) -> LossError:
    loss = outputs.objective.loss
    return LossError(
        f"the second derivative of {getattr(loss, '__name__', type(loss).__name__)} in the model's outputs {fault}, "
        "so that it gives no Gauss-Newton matrix; give the loss a method sample_targets(output, generator), "
        "or use curvature='empirical_fisher'"
    )
