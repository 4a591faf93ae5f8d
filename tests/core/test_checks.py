"""What a loss and a model must be, on both sides of every check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dask_influence.core.checks import check_loss, check_samples
from dask_influence.core.objective import Objective
from dask_influence.errors import ConfigurationError, DataError, LossError, SampleMixingError
from dask_influence.scalars import check_integer, check_number
from tests import data
from tests.core.zoo import ZOO

X, LABELS = data.normal(201, 11, 6), data.classes(202, 11, 3)
CLASSIFIER = data.seeded(lambda: nn.Linear(6, 3)).double()


def check(model: nn.Module, loss: Callable[[Any, Any], Any], x: Any = X, y: Any = LABELS) -> None:
    check_loss(Objective.of(model.double(), loss), x, y)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("samples", [1, 7])
def test_sound_models_and_losses_pass(name: str, samples: int) -> None:
    specimen = ZOO[name]
    check_loss(specimen.objective(), *specimen.samples(samples))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_float32_rounding_passes(scale: float) -> None:
    specimen = ZOO["transformer"]
    x, y = specimen.samples(7)
    check_loss(specimen.objective().to(dtype=torch.float32), scale * x.float(), y)


@pytest.mark.parametrize("checked", [check_loss, check_samples])
def test_one_sample_is_named_once(checked: Callable[..., None]) -> None:
    """It is looked at twice, since one alone cannot tell a sum from a mean."""
    objective = Objective.of(nn.Linear(6, 1).double(), F.mse_loss)
    with pytest.raises(DataError, match=r"samples \[0\];"):
        checked(objective, X[:1], torch.full((1, 1), torch.nan).double())
    checked(objective, X[:1], torch.ones(1, 1).double())


# -- other samples of an objective that has passed -----------------------------------------
def check_more(model: nn.Module, loss: Callable[[Any, Any], Any], x: Any = X, y: Any = LABELS) -> None:
    check_samples(Objective.of(model.double(), loss), x, y)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("samples", [1, 7])
def test_sound_samples_pass(name: str, samples: int) -> None:
    specimen = ZOO[name]
    check_samples(specimen.objective(), *specimen.samples(samples))


def test_samples_that_model_or_loss_do_not_take_are_named() -> None:
    with pytest.raises(DataError, match=r"x: the model cannot be called on float64 \(11, 5\)"):
        check_more(CLASSIFIER, F.cross_entropy, X[:, :5])
    with pytest.raises(DataError, match=r"y: dtype float64 does not suit the loss 'cross_entropy', .* int64"):
        check_more(CLASSIFIER, F.cross_entropy, X, LABELS.double())
    with pytest.raises(DataError, match=r"y: its shape float64 \(11,\) is broadcast"):
        check_more(nn.Linear(6, 1), F.mse_loss, X, X[:, 0])
    with pytest.raises(LossError, match=r"fails on an output .*out of bounds"):
        check_more(CLASSIFIER, F.cross_entropy, X, LABELS + 3)
    with pytest.raises(LossError, match="not a mean over samples"):
        check_more(nn.Linear(6, 1), lambda output, target: (output - target).square().mean(), X, X[:, 0])


@pytest.mark.parametrize("sample", [0, 10])
def test_samples_of_infinite_loss_are_named(sample: int) -> None:
    targets = LABELS.clone()
    targets[sample] = -100  # ignored: the mean over no sample at all
    with pytest.raises(DataError, match=rf"NaN or infinite for samples \[{sample}\]"):
        check_more(CLASSIFIER, F.cross_entropy, X, targets)


def test_samples_cost_one_forward_pass() -> None:
    """What is known of the model is not looked for again in every query."""
    calls: list[Any] = []
    objective = Objective.of(CLASSIFIER, F.cross_entropy)
    objective.module.register_forward_hook(lambda *call: calls.append(call))
    check_samples(objective, X, LABELS)
    assert len(calls) == 1
    check_loss(objective, X, LABELS)
    assert len(calls) > 2


# -- the loss --------------------------------------------------------------------------
@pytest.mark.parametrize("samples", [1, 11])
def test_reduction(samples: int) -> None:
    x, y = X[:samples], LABELS[:samples]
    check(CLASSIFIER, nn.CrossEntropyLoss(), x, y)
    with pytest.raises(LossError, match="is a sum over samples; use reduction='mean'"):
        check(CLASSIFIER, nn.CrossEntropyLoss(reduction="sum"), x, y)
    with pytest.raises(LossError, match=r"not reduced: it has shape \(\d+,\) .*reduction='mean'"):
        check(CLASSIFIER, nn.CrossEntropyLoss(reduction="none"), x, y)


def test_a_loss_must_be_a_floating_tensor() -> None:
    with pytest.raises(LossError, match="returned float"):
        check(CLASSIFIER, lambda output, target: F.cross_entropy(output, target).item())
    with pytest.raises(LossError, match="dtype int64"):
        check(CLASSIFIER, lambda output, target: (output.argmax(1) == target).sum())


def test_a_weighted_mean_is_not_a_mean_over_samples() -> None:
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    with pytest.raises(LossError, match="not a mean over samples"):
        check(CLASSIFIER, weighted)
    # weights that count every sample once are a mean again
    check(CLASSIFIER, lambda o, t: (F.cross_entropy(o, t, reduction="none") * weighted.weight[t]).mean())


def test_a_mean_over_a_varying_number_of_tokens_is_not_a_mean_over_samples() -> None:
    targets = LABELS.unsqueeze(1).repeat(1, 2)
    targets[::3, 1] = -100
    model = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (3, 2)))
    with pytest.raises(LossError, match="not a mean over samples"):
        check(model, F.cross_entropy, X, targets)
    check(model, F.cross_entropy, X, LABELS.unsqueeze(1).repeat(1, 2))


def test_a_regularised_loss_passes() -> None:
    """A term that every sample shares is a mean over samples."""
    check(CLASSIFIER, lambda output, target: F.cross_entropy(output, target) + 0.1 * output.square().mean())


def test_target_dtypes_are_named() -> None:
    with pytest.raises(DataError, match=r"y: dtype float64 does not suit the loss 'cross_entropy', .* int64"):
        check(CLASSIFIER, F.cross_entropy, X, LABELS.double())
    one = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0))
    with pytest.raises(DataError, match=r"y: dtype int64 does not suit .*'binary_cross_entropy.* float64"):
        check(one, F.binary_cross_entropy_with_logits, X, LABELS.clamp(max=1))
    check(one, F.binary_cross_entropy_with_logits, X, LABELS.clamp(max=1).double())


def test_a_loss_that_fails_for_another_reason_quotes_shapes() -> None:
    with pytest.raises(LossError, match=r"output of float64 \(11, 3\) and y of int64 \(11, 2\)"):
        check(CLASSIFIER, F.nll_loss, X, torch.zeros(11, 2, dtype=torch.int64))


def test_targets_that_broadcast_are_refused() -> None:
    with pytest.raises((DataError, LossError), match=r"broadcast"):
        check(nn.Linear(6, 1), F.mse_loss, X, X[:, 0])
    with pytest.raises(LossError, match="not a mean over samples"):
        check(nn.Linear(6, 1), lambda output, target: (output - target).square().mean(), X, X[:, 0])
    check(nn.Linear(6, 1), F.mse_loss, X, X[:, :1])


def test_inputs_that_the_model_does_not_take_are_named() -> None:
    with pytest.raises(DataError, match=r"x: the model cannot be called on int64 \(11,\)"):
        check(CLASSIFIER, F.cross_entropy, LABELS)
    with pytest.raises(DataError, match="x: the model cannot be called on"):
        check(CLASSIFIER, F.cross_entropy, {"unknown": X})


def test_nan_and_infinite_losses_are_named_by_sample() -> None:
    for value in (float("nan"), float("inf")):
        x = X.clone()
        x[4, 2] = value
        with pytest.raises(DataError, match=r"NaN or infinite for samples \[4\]"):
            check(CLASSIFIER, F.cross_entropy, x)


# -- the model -------------------------------------------------------------------------
class Squeezed(nn.Module):
    """Drops the sample axis of a single sample."""

    def __init__(self, *axis: int) -> None:
        super().__init__()
        self.linear, self.axis = nn.Linear(6, 1), axis

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(*self.axis)


class Noisy(nn.Module):
    """Dropout that does not know of eval mode."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.linear, self.active = nn.Linear(6, 3), active

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x), 0.5, training=self.active)


class Last(nn.Module):
    """The last state of a recurrent layer, which takes the first axis for time by default."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.recurrent, self.head = nn.GRU(4, 3, batch_first=batch_first), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Centred(nn.Module):
    """Mixes samples in its own forward, by a little."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) - 1e-4 * x.mean()


def test_batch_norm_without_running_statistics_mixes_samples() -> None:
    def net(tracking: bool) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=tracking), nn.Linear(5, 3)
        )

    check(net(True), F.cross_entropy)
    with pytest.raises(SampleMixingError, match=r"1.* \(BatchNorm1d\)"):
        check(net(False), F.cross_entropy)


def test_batch_norm_over_images_that_allows_one_sample_is_found_by_value() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(27, 3)
    )
    with pytest.raises(SampleMixingError, match=r"depends on the other samples .*'1' \(BatchNorm2d\)"):
        check(net, F.cross_entropy, *ZOO["conv2d"].samples(7))


def test_time_first_layers_mix_samples() -> None:
    x, y = ZOO["gru"].samples(7)
    check(Last(True), F.cross_entropy, x, y)
    with pytest.raises(SampleMixingError, match=r"'recurrent' \(GRU\).*batch_first=True"):
        check(Last(False), F.cross_entropy, x, y)


def test_a_model_that_mixes_by_itself_is_refused() -> None:
    with pytest.raises(SampleMixingError, match="by the model itself"):
        check(Centred(), F.cross_entropy)


def test_a_lost_sample_axis_is_refused() -> None:
    check(Squeezed(-1), F.mse_loss, X, X[:, 0])
    with pytest.raises(SampleMixingError, match=r"no sample axis.*squeeze\(-1\)"):
        check(Squeezed(), F.mse_loss, X, X[:, 0])


@pytest.mark.parametrize("first", [nn.ELU, nn.SiLU])
def test_a_model_that_writes_to_its_input_is_refused_by_that_name(first: type[nn.Module]) -> None:
    with pytest.raises(ConfigurationError, match=r"writes to its input x.*inplace=False"):
        check(nn.Sequential(first(inplace=True), nn.Linear(6, 3)), F.cross_entropy, X.clone())


def test_randomness_in_eval_mode_is_refused() -> None:
    check(Noisy(False), F.cross_entropy)
    with pytest.raises(ConfigurationError, match="training=True"):
        check(Noisy(True), F.cross_entropy)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrapped_models_are_refused_with_what_to_pass() -> None:
    net = nn.Sequential(nn.Linear(6, 3))
    check(net, F.cross_entropy)
    with pytest.raises(ConfigurationError, match=r"model is an nn\.DataParallel; pass model\.module"):
        check(nn.DataParallel(net), F.cross_entropy)
    with pytest.raises(
        ConfigurationError, match=r"nn\.DataParallel at '0'; pass model\.0\.module in its place"
    ):
        check(nn.Sequential(nn.DataParallel(net)), F.cross_entropy)
    with pytest.raises(ConfigurationError, match=r"torch\.jit\.ScriptModule.*scripted or traced from"):
        check(torch.jit.trace(net, X), F.cross_entropy)


# -- numbers among the arguments -------------------------------------------------------
@pytest.mark.parametrize("value", ["3", 3.0, True, None, 0, 11, torch.tensor(3)])
def test_integers_are_checked_by_kind_and_range(value: Any) -> None:
    assert check_integer("rank", np.int64(3), most=10) == 3
    with pytest.raises(
        ConfigurationError, match=rf"rank must be an integer from 1 to 10; got .*{type(value).__name__}"
    ):
        check_integer("rank", value, most=10)


@pytest.mark.parametrize("value", ["1e-3", None, True, [0.1]])
def test_numbers_are_checked_by_kind(value: Any) -> None:
    check_number("tol", np.float32(0.1))
    check_number("tol", 1)
    with pytest.raises(ConfigurationError, match=rf"tol must be a number; got .*{type(value).__name__}"):
        check_number("tol", value)
