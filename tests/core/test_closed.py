"""Closed forms of derivatives, against those that autograd takes from a graph, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.core.closed import FUNCTIONS, closed_loss
from tests import data, oracles

LOGITS, CLASSES = 3 * data.normal(1, 7, 4), data.classes(2, 7, 4)
VALUES, TARGETS = data.normal(3, 7, 2, 3), data.normal(4, 7, 2, 3)
KNOWN: dict[str, tuple[Any, Tensor, Tensor]] = {
    "cross_entropy": (functional.cross_entropy, LOGITS, CLASSES),
    "its module": (nn.CrossEntropyLoss().eval(), LOGITS, CLASSES),
    "one class": (functional.cross_entropy, LOGITS[:, :1], torch.zeros_like(CLASSES)),
    "mse_loss": (functional.mse_loss, VALUES, TARGETS),
    "the module of it": (nn.MSELoss(), VALUES[:, 0], TARGETS[:, 0]),
}


def hooked() -> nn.Module:
    loss = nn.CrossEntropyLoss()
    loss.register_forward_hook(lambda module, given, output: 2 * output)
    return loss


def replaced() -> nn.Module:
    loss: Any = nn.MSELoss()
    loss.forward = lambda output, target: (output - target).abs().mean()
    return loss


class Doubled(nn.MSELoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return 2 * super().forward(input, target)


OTHERS: dict[str, tuple[Any, Tensor, Any]] = {
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), LOGITS, CLASSES),
    "weighted": (nn.CrossEntropyLoss(weight=torch.ones(4).double()), LOGITS, CLASSES),
    "another class ignored": (nn.CrossEntropyLoss(ignore_index=2), LOGITS, CLASSES),
    "hooked": (hooked(), LOGITS, CLASSES),
    "by another forward": (replaced(), VALUES, TARGETS),
    "a subclass": (Doubled(), VALUES, TARGETS),
    "with arguments": (functools.partial(functional.cross_entropy, ignore_index=0), LOGITS, CLASSES),
    "an ignored sample": (functional.cross_entropy, LOGITS, CLASSES.index_fill(0, torch.tensor([3]), -100)),
    "a class too many": (functional.cross_entropy, LOGITS, CLASSES.index_fill(0, torch.tensor([3]), 4)),
    "probabilities": (functional.cross_entropy, LOGITS, LOGITS.softmax(1)),
    "positions": (functional.cross_entropy, LOGITS.view(7, 2, 2), CLASSES[:, None].expand(-1, 2) // 2),
    "a sum": (nn.MSELoss(reduction="sum"), VALUES, TARGETS),
    "targets of another shape": (functional.mse_loss, VALUES, TARGETS[:, :1]),
    "targets of another dtype": (functional.mse_loss, VALUES, TARGETS.float()),
    "a tree": (lambda output, target: functional.mse_loss(output, target["y"]), VALUES, {"y": TARGETS}),
    "narrow": (functional.cross_entropy, LOGITS.bfloat16(), CLASSES),
    "absolute": (functional.l1_loss, VALUES, TARGETS),
}


@pytest.mark.parametrize("name", KNOWN)
def test_losses(name: str) -> None:
    loss, outputs, targets = KNOWN[name]
    found = closed_loss(loss, outputs, targets)
    assert found is not None

    def total(at: Tensor) -> Tensor:
        return loss(at, targets) * len(outputs)

    adjoint, along = torch.func.grad(total), data.normal(5, 3, *outputs.shape)
    second = torch.func.vjp(adjoint, outputs)[1]
    times = torch.stack([second(one)[0] for one in along], dim=1)
    torch.testing.assert_close(found.total, total(outputs), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.adjoint, adjoint(outputs), rtol=1e-13, atol=1e-14)
    kept = along.transpose(0, 1).contiguous()
    torch.testing.assert_close(found.times(kept), times, rtol=1e-12, atol=1e-14)
    assert torch.equal(kept, along.transpose(0, 1))  # it is not what is written to
    if found.matrices is not None:
        torch.testing.assert_close(kept @ found.matrices(), times, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_are_left_alone(name: str) -> None:
    assert closed_loss(*OTHERS[name]) is None


@pytest.mark.parametrize("right", [True, False])
def test_nothing_is_lost_of_classes_that_are_next_to_certain(right: bool) -> None:
    outputs, along = 40 * data.normal(1, 20, 5), data.normal(5, 20, 3, 5)
    classes = outputs.argmax(1) if right else outputs.argmin(1)
    exact = closed_loss(functional.cross_entropy, outputs.float().double(), classes)
    found = closed_loss(functional.cross_entropy, outputs.float(), classes)
    assert exact is not None
    assert found is not None
    assert found.matrices is not None
    uncertain = 1 - outputs.softmax(1).amax(1)
    assert uncertain.min() < 1e-15
    for value, expected in (
        (found.adjoint, exact.adjoint),
        (found.times(along.float()), exact.times(along.float().double())),
        (along.float() @ found.matrices(), exact.times(along.float().double())),
    ):
        lost = (value.double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert lost.max() < 1e-4  # of logits up to 100, whose exponentials lose as much


def test_a_loss_that_is_not_finite_is_said_to_be() -> None:
    outputs = LOGITS.index_fill(0, torch.tensor([2]), torch.inf)
    found = closed_loss(functional.cross_entropy, outputs, CLASSES)
    assert found is not None
    assert not found.total.isfinite()


@pytest.mark.parametrize("kind", FUNCTIONS, ids=lambda kind: kind.__name__)
def test_functions(kind: type[nn.Module]) -> None:
    at = torch.cat([3 * data.normal(1, 50), torch.tensor([0.0, -0.0, 40.0, -40.0, torch.nan]).double()])
    function, module = FUNCTIONS[kind], kind()
    slope = torch.func.grad(lambda a: module(a).sum())
    h = function.value(at)
    torch.testing.assert_close(h, module(at), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(function.slope(h), slope(at), rtol=1e-12, atol=1e-15, equal_nan=True)
    bend = torch.func.grad(lambda a: slope(a)[:-1].sum())(at)[:-1]
    known = torch.zeros_like(h) if function.bend is None else function.bend(h, function.slope(h))
    assert oracles.relative_error(known[:-1] + 1, bend + 1) < 1e-12
