"""Whether two sides computed the same: relative errors, and true residuals by products in float64."""

from __future__ import annotations

import numpy as np
import torch
from problems import Setting
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap

BATCH = 512
AT_ONCE = 10
"""Vectors whose products are formed at once."""

Array = np.ndarray


class DisagreementError(Exception):
    """The sides did not compute the same."""


def relative_error(got: Array, expected: Array) -> float:
    """In the norm of the whole result; shapes have to agree."""
    if got.shape != expected.shape:
        raise DisagreementError(f"results differ in shape: ours {got.shape}, theirs {expected.shape}")
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - wide) / np.linalg.norm(wide))


def eigenpairs(setting: Setting, sides: list[Array]) -> list[float]:
    """max ‖Hv − θv‖ / |θ_max| over the pairs (θ, v) of each side, rows (R, 1 + P)."""
    pairs = torch.from_numpy(np.concatenate(sides)).double()
    values, vectors = pairs[:, :1], pairs[:, 1:]
    found = (hessian_products(setting, vectors) - values * vectors).norm(dim=1)
    parts = zip(found.split([len(s) for s in sides]), values.split([len(s) for s in sides]), strict=True)
    return [(residual.max() / value.abs().max()).item() for residual, value in parts]


def systems(setting: Setting, sides: list[Array]) -> list[float]:
    """‖(H + λI)S − G‖ / ‖G‖ of the factors S of each side, rows (N, P), in the norm of the whole.

    Of a test point that the model is sure of, float32 holds the gradient itself to 3e-4 at best.
    """
    factors = torch.from_numpy(np.concatenate(sides)).double()
    gradients = sample_gradients(setting, len(sides[0]))
    products = hessian_products(setting, factors) + setting.regularization * factors
    parts = products.split(len(gradients))
    return [((part - gradients).norm() / gradients.norm()).item() for part in parts]


def hessian_products(setting: Setting, vectors: Tensor) -> Tensor:
    """H v for rows (n, P), H of the mean loss over the training data; by torch.func alone."""
    x, y = setting.train
    total = torch.zeros_like(vectors)
    for inputs, targets in zip(x.split(BATCH), y.split(BATCH), strict=True):
        gradient = grad(lambda theta, a=inputs, b=targets: _loss(setting, theta, a, b))
        product = vmap(lambda v, g=gradient: jvp(g, (_theta(setting),), (v,))[1])
        parts = torch.cat([product(block) for block in vectors.split(AT_ONCE)])
        total += parts * len(inputs)
    return total / len(x)


def sample_gradients(setting: Setting, count: int) -> Tensor:
    """∇θ ℓ of the first test points, (n, P)."""
    theta = _theta(setting)
    return torch.stack(
        [
            grad(lambda t, a=a, b=b: _loss(setting, t, a[None], b[None]))(theta)
            for a, b in zip(*setting.test(count), strict=True)
        ]
    )


def _theta(setting: Setting) -> Tensor:
    return torch.cat([part.detach().flatten() for part in setting.model.parameters()])


def _loss(setting: Setting, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
    named = dict(setting.model.named_parameters())
    parts = theta.split([part.numel() for part in named.values()])
    held = {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}
    return setting.loss(functional_call(setting.model, held, (x,)), y)
