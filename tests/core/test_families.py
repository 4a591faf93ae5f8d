"""Families of losses: recognised by their gradient, refused where they are no likelihood."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.core.families import Likelihood, named_family, recognise
from dask_influence.errors import ConfigurationError
from tests import data


def gradient_of(loss: Any, outputs: Tensor, target: Any) -> Tensor:
    leaf = outputs.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf, target) * len(outputs), leaf)[0]


def found(loss: Any, outputs: Tensor, target: Any) -> Likelihood:
    return recognise(loss, outputs, gradient_of(loss, outputs, target), target)


def output_hessian(loss: Any, outputs: Tensor, target: Any, j: int) -> Tensor:
    """∂²ℓ_j/∂f_j² by double backward, flattened to a matrix."""
    one = slice(j, j + 1)
    dense = torch.autograd.functional.hessian(lambda f: loss(f[None], target[one]), outputs[j])
    size = outputs[j].numel()
    return dense.reshape(size, size)


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(-1).mean()


def summed_elements(output: Tensor, target: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(output, target, reduction="none").sum(1).mean()


def last_axis(output: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def next_token(output: Tensor, target: Tensor) -> Tensor:
    """(n, T, C) scored against the tokens that follow."""
    return functional.cross_entropy(output[:, :-1].flatten(0, 1), target[:, 1:].flatten())


LOGITS, LABELS = 2 * data.normal(1, 5, 3), data.classes(2, 5, 3)
SEQUENCE, TOKENS = data.normal(3, 5, 3, 4), data.classes(4, 20, 3).reshape(5, 4)
BITS = torch.bernoulli(
    torch.full((5, 3), 0.4, dtype=torch.float64), generator=torch.Generator().manual_seed(6)
)
SOFT = data.normal(7, 5, 3).softmax(1)

RECOGNISED = {
    "cross_entropy": (functional.cross_entropy, LOGITS, LABELS, "categorical"),
    "module": (nn.CrossEntropyLoss(), LOGITS, LABELS, "categorical"),
    "partial": (functools.partial(functional.cross_entropy, reduction="mean"), LOGITS, LABELS, "categorical"),
    "soft_labels": (functional.cross_entropy, LOGITS, SOFT, "categorical"),
    "classes_on_axis_1": (functional.cross_entropy, SEQUENCE, TOKENS, "categorical"),
    "classes_on_the_last_axis": (last_axis, SEQUENCE.mT.contiguous(), TOKENS, "categorical"),
    "next_token": (next_token, SEQUENCE.mT.contiguous(), TOKENS, "categorical"),
    "bce": (functional.binary_cross_entropy_with_logits, LOGITS, BITS, "bernoulli"),
    "bce_summed": (summed_elements, LOGITS, BITS, "bernoulli"),
    "mse": (nn.MSELoss(), LOGITS, SOFT, "gaussian"),
    "half_square": (half_square, LOGITS, SOFT, "gaussian"),
}
CASES = pytest.mark.parametrize(("loss", "outputs", "target", "family"), RECOGNISED.values(), ids=RECOGNISED)


@CASES
def test_the_expectation_is_the_output_hessian(
    loss: Any, outputs: Tensor, target: Tensor, family: str
) -> None:
    likelihood = found(loss, outputs, target)
    assert likelihood.family == family
    u = data.normal(9, *outputs.shape)
    product = likelihood.multiply(u)
    factors = likelihood.factors().flatten(2)
    for j in range(len(outputs)):
        dense = output_hessian(loss, outputs, target, j)
        torch.testing.assert_close(product[j].flatten(), dense @ u[j].flatten(), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(factors[j].T @ factors[j], dense, rtol=1e-11, atol=1e-13)


@CASES
def test_outcomes_are_a_distribution_of_scores(
    loss: Any, outputs: Tensor, target: Tensor, family: str
) -> None:
    likelihood = found(loss, outputs, target)
    probability, mean, product = 0.0, 0.0, 0.0
    u = data.normal(9, *outputs.shape)
    for p, s in likelihood.outcomes():
        along = (s * u).sum(likelihood.axis, keepdim=True) if likelihood.categorical else s * u
        probability, mean, product = probability + p, mean + p * s, product + p * s * along
    torch.testing.assert_close(probability, torch.ones_like(outputs))
    torch.testing.assert_close(mean, torch.zeros_like(outputs))
    torch.testing.assert_close(likelihood.scale * product, likelihood.multiply(u))


@pytest.mark.parametrize("name", ["cross_entropy", "classes_on_axis_1", "bce", "half_square"])
def test_draws_have_the_fisher_matrix_as_second_moment(name: str) -> None:
    loss, outputs, target, _ = RECOGNISED[name]
    likelihood = found(loss, outputs, target)
    copies = replace(likelihood, outputs=outputs[:1].expand(20_000, *outputs.shape[1:]))
    copies = replace(copies, scale=likelihood.scale[:1] if likelihood.scale.ndim else likelihood.scale)
    draws = copies.sample(torch.Generator().manual_seed(0)).flatten(1)
    dense = output_hessian(loss, outputs, target, 0)
    assert ((draws.T @ draws) / len(draws) - dense).abs().max() < 0.05 * dense.abs().max()


def test_log_probabilities_have_the_fisher_matrix_of_their_logits() -> None:
    log_p = LOGITS.log_softmax(1)
    likelihood = found(functional.nll_loss, log_p, LABELS)
    assert likelihood.family == "log_categorical"
    u = data.normal(9, 5, 3)
    through = torch.stack(  # the Jacobian of log_softmax, δ_kl − p_l
        [torch.autograd.functional.jacobian(lambda f: f.log_softmax(0), f) for f in LOGITS]
    )
    pulled = torch.einsum("nkl,nk->nl", through, likelihood.multiply(torch.einsum("nkl,nl->nk", through, u)))
    torch.testing.assert_close(pulled, found(functional.cross_entropy, LOGITS, LABELS).multiply(u))
    with pytest.raises(ConfigurationError, match="likelihood"):
        found(functional.nll_loss, LOGITS, LABELS)  # no log-probabilities: they do not sum to one


def test_ignored_positions_do_not_count() -> None:
    tokens = TOKENS.clone()
    tokens[0, :3], tokens[2, 1] = -100, -100

    def loss(output: Tensor, target: Tensor) -> Tensor:  # each sample's mean over its own positions
        each = functional.cross_entropy(output, target, reduction="none").sum(1)
        return (each / (target != -100).sum(1)).mean()

    likelihood = found(loss, SEQUENCE, tokens)
    assert likelihood.scale[0, 0].tolist() == pytest.approx([0, 0, 0, 1])
    assert likelihood.scale[2, 0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    u = data.normal(9, 5, 3, 4)
    for j in (0, 2):
        dense = output_hessian(loss, SEQUENCE, tokens, j)
        torch.testing.assert_close(likelihood.multiply(u)[j].flatten(), dense @ u[j].flatten())


def test_confident_models_keep_their_precision() -> None:
    logits = torch.tensor([[40.0, 0.0, 1.0], [0.0, 60.0, -3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    likelihood = found(functional.cross_entropy, logits, labels)
    assert likelihood.scale.flatten().tolist() == pytest.approx([1.0, 1.0])
    sure = found(functional.cross_entropy, 30 * logits, labels)  # no gradient is left, and no curvature
    assert not sure.multiply(torch.ones_like(logits)).any()


REFUSED = {
    "smoothed": (functools.partial(functional.cross_entropy, label_smoothing=0.1), LOGITS, LABELS),
    "weighted": (
        lambda f, y: (
            (functional.cross_entropy(f, y, reduction="none") * f.detach()[:, 0].abs()).mean()
            + f.square().mean()
        ),
        LOGITS,
        LABELS,
    ),
    "pos_weight": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)), LOGITS, BITS),
    "absolute": (functional.l1_loss, LOGITS, SOFT),
    "huber": (functional.smooth_l1_loss, 3 * LOGITS, SOFT),
    "hinge": (functional.multi_margin_loss, LOGITS, LABELS),
}


@pytest.mark.parametrize(("loss", "outputs", "target"), REFUSED.values(), ids=REFUSED)
def test_other_losses_are_refused(loss: Any, outputs: Tensor, target: Tensor) -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)cross_entropy.*mse_loss.*'ggn'"):
        found(loss, outputs, target)


def test_names() -> None:
    assert named_family(nn.BCEWithLogitsLoss()) == "bernoulli"
    assert (
        named_family(functools.partial(functools.partial(functional.mse_loss), reduction="mean"))
        == "gaussian"
    )
    assert named_family(nn.NLLLoss()) == "log_categorical"
    assert named_family(half_square) is None


def test_an_exact_fit_has_the_scale_of_the_named_loss() -> None:
    likelihood = found(functional.mse_loss, LOGITS, LOGITS.clone())
    assert likelihood.scale.item() == pytest.approx(1 / 3)
    torch.testing.assert_close(likelihood.multiply(SOFT), 2 / 3 * SOFT)
