"""Every form of every derivative is right or refuses, and the check tells which is which.

Expected values come from plain first-order autograd, which is right for all of these models, and
from differences of it in float64; where an elementary re-implementation is short, from that.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.parametrizations import weight_norm

from dask_influence.core import derivatives, elementary, forms
from dask_influence.core.derivatives import Forms, choose_forms, differentiation
from dask_influence.core.objective import Objective
from dask_influence.errors import ConfigurationError, DerivativeError
from tests import data, oracles
from tests.core.zoo import ZOO, Classifier, Specimen

SAMPLES = 5  # divides no other size of the zoo's data but sequence lengths
STENCIL = oracles.STENCIL


# -- oracles ---------------------------------------------------------------------------
def along(
    specimen: Specimen, vectors: Tensor, value: Callable[[nn.Module], Tensor], step: float = 1e-4
) -> Tensor:
    """d/dt value(θ + t v) for each vector, by differences, (D, ...)."""
    model = specimen.model()
    start = torch.nn.utils.parameters_to_vector(oracles.theta(model)).detach().clone()
    rows = []
    for vector in vectors:
        total = torch.zeros(())
        for shift, weight in STENCIL:
            torch.nn.utils.vector_to_parameters(start + shift * step * vector, oracles.theta(model))
            total = total + weight / step * value(model)
        rows.append(total)
    return torch.stack(rows)


def gradients(specimen: Specimen, model: nn.Module) -> Tensor:
    return oracles.gradients(model, specimen.loss, *specimen.samples(SAMPLES))


def input_gradients(specimen: Specimen, model: nn.Module) -> Tensor:
    rows = []
    for j in range(SAMPLES):
        x, y = oracles.pick(specimen.samples(SAMPLES), slice(j, j + 1))
        leaf = oracles.floating_leaf(x).clone().requires_grad_()
        loss = specimen.loss(oracles.call(model, oracles.with_leaf(x, leaf)), y)
        rows.append(torch.autograd.grad(loss, leaf)[0][0])
    return torch.stack(rows)


def directions(objective: Objective) -> Tensor:
    return data.normal(7, 3, objective.size)


@cache
def chosen_for(name: str) -> tuple[Forms, dict[str, Any]]:
    specimen = ZOO[name]
    return choose_forms(specimen.objective(), *specimen.samples(7), perturbation=specimen.perturbable)


def raises_or(call: Callable[[], Tensor]) -> Tensor | None:
    try:
        return call()
    except (RuntimeError, ConfigurationError):  # the second where the model is no chain
        return None


# -- values ----------------------------------------------------------------------------
@pytest.mark.parametrize("name", ZOO)
def test_every_form_is_right_or_raises_and_the_chosen_ones_are_right(name: str) -> None:
    specimen = ZOO[name]
    objective, (x, y) = specimen.objective(), specimen.samples(SAMPLES)
    vectors = directions(objective)
    rows = gradients(specimen, specimen.model())
    expected = {
        "gradient": rows,
        "directional": rows @ vectors.T,
        "product": along(specimen, vectors, lambda model: gradients(specimen, model).sum(0)),
    }
    calls: dict[str, Callable[[Forms], Tensor]] = {
        "gradient": lambda f: derivatives.sample_gradients(objective, x, y, f),
        "directional": lambda f: derivatives.directional_derivatives(objective, x, y, vectors, f),
        "product": lambda f: derivatives.products(objective, x, y, vectors, f),
    }
    if specimen.perturbable:
        mixed = along(specimen, vectors, lambda model: input_gradients(specimen, model))
        expected["mixed"] = mixed.transpose(0, 1)
        calls["mixed"] = lambda f: derivatives.mixed_derivatives(objective, x, y, vectors, f)
    chosen, _ = chosen_for(name)
    for kind, call in calls.items():
        tolerance = specimen.rounding if kind in ("gradient", "directional") else max(1e-8, specimen.rounding)
        assert oracles.relative_error(call(chosen), expected[kind]) <= tolerance
        for form in forms.FORMS[kind]:
            if form == "gradients" and chosen.gradient == "loop":
                continue
            value = raises_or(lambda call=call, kind=kind, form=form: call(Forms(**{kind: form})))
            assert value is None or oracles.relative_error(value, expected[kind]) <= tolerance, (kind, form)


BATCHED = sorted(set(ZOO) - {"packed", "old_style_function"})


@pytest.mark.parametrize("name", BATCHED)
def test_no_model_of_ordinary_layers_needs_a_slow_form(name: str) -> None:
    specimen = ZOO[name]
    chosen, report = chosen_for(name)
    assert chosen == Forms(gradient=chosen.gradient, product=chosen.product, mixed=chosen.mixed)
    assert not report["directional"]["rejected"]
    assert chosen.gradient in ("chain", "vmap")
    assert chosen.product in ("chain", "reverse_over_reverse")
    assert all(set(report[kind]["rejected"]) <= {"chain"} for kind in ("gradient", "product"))
    assert chosen.mixed in (
        ("chain", "reverse_over_reverse") if specimen.perturbable else ("reverse_over_reverse",)
    )


def test_models_that_vmap_refuses_take_the_loops() -> None:
    chosen, report = chosen_for("old_style_function")
    assert chosen == Forms(
        "loop", "reverse_over_reverse_loop", "dummy_weights_loop", "reverse_over_reverse_loop"
    )
    assert "raises RuntimeError" in report["gradient"]["rejected"]["vmap"]
    chosen, _ = chosen_for("packed")
    assert chosen.gradient == "loop"


def elementary_layer_norm(theta: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = x @ theta["0.weight"].T + theta["0.bias"]
    mean = hidden.mean(-1, keepdim=True)
    deviation = ((hidden - mean) ** 2).mean(-1, keepdim=True) + 1e-5
    normal = (hidden - mean) / deviation**0.5 * theta["1.weight"] + theta["1.bias"]
    return torch.tanh(normal) @ theta["3.weight"].T + theta["3.bias"]


def elementary_weight_norm(theta: dict[str, Tensor], x: Tensor) -> Tensor:
    g, v = (theta[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
    weight = g * v / (v**2).sum(1, keepdim=True) ** 0.5
    return torch.tanh(x @ weight.T + theta["0.bias"]) @ theta["2.weight"].T + theta["2.bias"]


def elementary_prelu(theta: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = x @ theta["0.weight"].T + theta["0.bias"]
    hidden = hidden.clamp(min=0) - theta["1.weight"] * (-hidden).clamp(min=0)
    return hidden @ theta["2.weight"].T + theta["2.bias"]


@pytest.mark.parametrize(
    ("name", "forward"),
    [
        ("layer_norm", elementary_layer_norm),
        ("weight_norm", elementary_weight_norm),
        ("prelu", elementary_prelu),
    ],
)
def test_dense_hessian_equals_that_of_an_elementary_model(
    name: str, forward: Callable[[dict[str, Tensor], Tensor], Tensor]
) -> None:
    specimen = ZOO[name]
    objective, (x, y) = specimen.objective(), specimen.samples(7)

    def total(theta: Tensor) -> Tensor:
        return specimen.loss(forward(objective.unflatten(theta), x), y) * 7

    theta = objective.flatten(objective.parameters())
    expected = torch.autograd.functional.hessian(total, theta)
    chosen, _ = choose_forms(objective, x, y)
    hessian = derivatives.products(objective, x, y, torch.eye(objective.size, dtype=torch.float64), chosen)
    assert oracles.relative_error(hessian, expected) <= 1e-12


def test_float32_agrees_with_float64_to_its_own_rounding() -> None:
    specimen = ZOO["transformer"]
    double, (x, y) = specimen.objective(), specimen.samples(7)
    single = double.to(dtype=torch.float32)
    vectors = directions(double)
    chosen, _ = choose_forms(single, x.float(), y, perturbation=True)
    for function in (
        derivatives.products,
        derivatives.mixed_derivatives,
        derivatives.directional_derivatives,
    ):
        rough = function(single, x.float(), y, vectors.float(), chosen)
        assert rough.dtype == torch.float32
        assert oracles.relative_error(rough, function(double, x, y, vectors, chosen)) <= 1e-5


# -- elementary operations -------------------------------------------------------------
def _recurrent_layers() -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for depth in (1, 2):
        for both in (False, True):
            for bias in (False, True):
                how: dict[str, Any] = {
                    "num_layers": depth,
                    "bidirectional": both,
                    "bias": bias,
                    "batch_first": bias,
                }
                layers[f"rnn_{depth}_{both}_{bias}"] = nn.RNN(4, 3, **how)
                layers[f"gru_{depth}_{both}_{bias}"] = nn.GRU(4, 3, **how)
                layers[f"lstm_{depth}_{both}_{bias}"] = nn.LSTM(4, 3, **how)
                layers[f"projected_{depth}_{both}_{bias}"] = nn.LSTM(4, 3, proj_size=2, **how)
    return layers


class PairedWithItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "layer_norm": (nn.LayerNorm((3, 4)), (2, 3, 4)),
    "instance_norm": (nn.InstanceNorm2d(3, affine=True), (2, 3, 4, 5)),
    "instance_norm_unbatched": (nn.InstanceNorm1d(3), (3, 4)),
    "weight_norm": (weight_norm(nn.Conv1d(3, 5, 2)), (2, 3, 4)),
    "weight_norm_1": (weight_norm(nn.Conv1d(3, 5, 2), dim=1), (2, 3, 4)),
    "weight_norm_all": (weight_norm(nn.Conv1d(3, 5, 2), dim=None), (2, 3, 4)),
    "weight_norm_last": (weight_norm(nn.Linear(3, 5), dim=-1), (2, 3)),
    "glu": (nn.GLU(1), (2, 6, 3)),
    "hardsigmoid": (nn.Hardsigmoid(), (2, 3)),
    "rrelu": (nn.RReLU(), (2, 3)),
    "bilinear": (PairedWithItself(), (2, 3, 4)),
    "prelu": (nn.PReLU(3), (2, 3, 4)),
    "prelu_scalar": (nn.PReLU(), (3,)),
    **{name: (layer, (5, 2, 4)) for name, layer in _recurrent_layers().items()},
    "rnn_unbatched": (nn.RNN(4, 3, nonlinearity="relu"), (5, 4)),
    "gru_cell": (nn.GRUCell(4, 3), (2, 4)),
    "lstm_cell": (nn.LSTMCell(4, 3, bias=False), (2, 4)),
    "rnn_cell": (nn.RNNCell(4, 3, nonlinearity="relu"), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_elementary_forms_equal_the_fused_kernels_to_rounding(name: str) -> None:
    layer, shape = LAYERS[name]
    layer = layer.double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = 3 + 2 * data.normal(3, *shape)
    expected = layer(x)
    with differentiation():
        actual = layer(x)
        with elementary.fused():
            again = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (7, 5, 3), (7, 5, 2, 3)], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"ignore_index": 2},
        {"ignore_index": 2, "reduction": "none"},
        {"label_smoothing": 0.1},
        {"weight": torch.arange(1.0, 6.0, dtype=torch.float64)},
    ],
    ids=str,
)
def test_elementary_cross_entropy(shape: tuple[int, ...], how: dict[str, Any]) -> None:
    x = (30 * data.normal(5, *shape)).requires_grad_()
    rest = () if len(shape) == 1 else shape[:1] + shape[2:]
    y = torch.randint(5, rest, generator=torch.Generator().manual_seed(4))
    if rest:
        y.view(-1)[:2] = torch.tensor([2, 0])
    elif "ignore_index" in how:
        y = torch.tensor(3)
    expected = torch.nn.functional.cross_entropy(x, y, **how)
    slope = torch.autograd.grad(expected.sum(), x)[0]
    with differentiation():
        actual = torch.nn.functional.cross_entropy(x, y, **how)
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
        found = torch.autograd.grad(actual.sum(), x)[0]
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-14)


def test_elementary_cross_entropy_leaves_other_targets_to_torch() -> None:
    x = data.normal(6, 4, 3)
    probabilities = data.normal(7, 4, 3).softmax(1)
    for given, target in ((x, probabilities), (x.bfloat16(), torch.tensor([0, 1, 2, 0]))):
        expected = torch.nn.functional.cross_entropy(given, target)
        with differentiation():
            assert torch.equal(torch.nn.functional.cross_entropy(given, target), expected)
    with differentiation(), pytest.raises((RuntimeError, IndexError)):
        torch.nn.functional.cross_entropy(x, torch.tensor([0, 1, 3, 0]))


@pytest.mark.parametrize("how", [{}, {"mode": "sum"}, {"mode": "max"}, {"padding_idx": 2}])
def test_bags_of_tokens_equal_the_fused_kernel(how: dict[str, Any]) -> None:
    bag = nn.EmbeddingBag(7, 3, **how).double()
    ids = ZOO["token_bags"].samples(5)[0]
    with differentiation():
        actual = bag(ids)
    torch.testing.assert_close(actual, bag(ids), rtol=1e-14, atol=1e-14)


def test_settings_hold_inside_and_are_restored_even_after_an_error() -> None:
    def settings() -> tuple[bool, bool]:
        return torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()

    before = settings()
    with differentiation():
        for _ in range(2):  # an error in a nested use leaves the outer one in place
            with contextlib.suppress(KeyError), differentiation():
                raise KeyError
            assert settings() == (False, False)
    assert settings() == before
    with contextlib.suppress(KeyError), differentiation():
        raise KeyError
    assert settings() == before


def test_threads_give_the_values_of_one_thread() -> None:
    specimen = ZOO["transformer"]
    x, y = specimen.samples(7)
    objective = specimen.objective()
    vectors = directions(objective)
    chosen, _ = choose_forms(objective, x, y, perturbation=True)

    def work() -> list[Tensor]:
        return [
            derivatives.sample_gradients(objective, x, y, chosen),
            derivatives.directional_derivatives(objective, x, y, vectors, chosen),
            derivatives.mixed_derivatives(objective, x, y, vectors, chosen),
        ]

    expected, results = work(), []
    threads = [threading.Thread(target=lambda: results.append(work())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, expected, strict=True))


def test_nothing_is_left_on_an_outer_graph_or_in_an_inference_mode() -> None:
    specimen = ZOO["mlp"]
    objective = Objective.of(specimen.model(), specimen.loss, ["2.*"])  # the rest still requires grad
    x, y = specimen.samples(7)
    with torch.inference_mode():
        chosen, _ = choose_forms(objective, *ZOO["mlp"].samples(7))
    for form in forms.FORMS["product"]:
        value = derivatives.products(objective, x, y, directions(objective), Forms(product=form))
        assert not value.requires_grad
    assert not derivatives.sample_gradients(objective, x, y, chosen).requires_grad
    assert not derivatives.sample_gradients(objective, x, y, Forms(gradient="loop")).requires_grad


# -- the check -------------------------------------------------------------------------
def test_report_is_json_and_forms_are_picklable() -> None:
    specimen = ZOO["layer_norm"]
    chosen, report = choose_forms(specimen.objective(), *specimen.samples(7), perturbation=True)
    assert json.loads(json.dumps(report)) == report
    assert report["dtype"] == "float64"
    assert report["samples"] == 4
    assert set(report) == {"dtype", "samples", "gradient", "directional", "product", "input", "mixed"}
    assert all(
        0 < report[kind]["error"] < 1e-5 for kind in ("gradient", "directional", "product", "input", "mixed")
    )
    assert pickle.loads(pickle.dumps(chosen)) == chosen


def test_one_sample_is_enough() -> None:
    specimen = ZOO["gru"]
    _, report = choose_forms(specimen.objective(), *specimen.samples(1), perturbation=True)
    assert report["samples"] == 1


@pytest.fixture
def _fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own derivatives, as if nothing were routed to elementary forms."""
    monkeypatch.setattr(elementary, "ELEMENTARY", {})


@pytest.mark.usefixtures("_fused_kernels")
def test_the_check_refuses_fused_layer_norm_in_the_order_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    specimen = ZOO["layer_norm"]
    choose_forms(
        specimen.objective(), *specimen.samples(7), perturbation=True
    )  # reverse over reverse is right
    monkeypatch.setattr(derivatives, "FORMS", forms.FORMS | {"mixed": ("reverse_over_forward",)})
    with pytest.raises(DerivativeError, match=r"module '1' \(LayerNorm\).*off by \d"):
        choose_forms(specimen.objective(), *specimen.samples(7), perturbation=True)
    choose_forms(specimen.objective(), *specimen.samples(7))  # not asked for, not refused


@pytest.mark.usefixtures("_fused_kernels")
def test_the_check_refuses_fused_weight_norm_by_name() -> None:
    specimen = ZOO["weight_norm"]
    with pytest.raises(DerivativeError, match=r"'0\.parametrizations\.weight\.0' \(_WeightNorm\)"):
        choose_forms(specimen.objective(), *specimen.samples(7))


@pytest.mark.usefixtures("_fused_kernels")
def test_the_check_names_the_layer_inside_a_whole_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    specimen = ZOO["transformer"]
    monkeypatch.setattr(derivatives, "FORMS", forms.FORMS | {"mixed": ("reverse_over_forward",)})
    with pytest.raises(DerivativeError, match=r"module 'body\.norm[12]' \(LayerNorm\)"):
        choose_forms(specimen.objective(), *specimen.samples(7), perturbation=True)


@pytest.mark.usefixtures("_fused_kernels")
def test_glu_falls_back_to_an_order_that_torch_has() -> None:
    specimen = ZOO["glu"]
    value = derivatives.choose_forms(specimen.objective(), *specimen.samples(7), perturbation=True)[0]
    assert "reverse_over_forward" not in value.mixed


class Blind(torch.autograd.Function):
    """x³ whose backward is right but does not know that it depends on x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.slope = 3 * inputs[0].detach() ** 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.slope


class Flipped(torch.autograd.Function):
    """Identity whose gradient has the wrong sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class Hidden(nn.Module):
    """The wrong derivative is in this module's own forward, not in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return Blind.apply(self.inner(x))


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (lambda: Applied(Blind), r"Hessian-vector product of module '1' \(Applied\)"),
        (lambda: Applied(Flipped), r"per-sample gradient of module '1' \(Applied\)"),
        (Hidden, r"Hessian-vector product of module '1' \(Hidden\)"),
    ],
)
def test_wrong_derivatives_are_refused_by_name(module: Callable[[], nn.Module], named: str) -> None:
    net = nn.Sequential(nn.Linear(6, 5), module(), nn.Linear(5, 3))
    with pytest.raises(DerivativeError, match=named):
        choose_forms(Objective.of(net, F.cross_entropy), *ZOO["mlp"].samples(7))


def test_a_wrong_derivative_in_the_loss_is_refused_by_name() -> None:
    def cubic_error(output: Tensor, target: Tensor) -> Tensor:
        return Blind.apply(output - F.one_hot(target, 3)).mean()

    with pytest.raises(DerivativeError, match="the loss 'cubic_error'"):
        choose_forms(Objective.of(nn.Linear(6, 3), cubic_error), *ZOO["mlp"].samples(7))


# -- no false alarms -------------------------------------------------------------------
@pytest.mark.parametrize("activation", [nn.ReLU, nn.PReLU, nn.LeakyReLU, nn.Hardtanh, nn.Softshrink])
def test_kinks_are_no_error(activation: Callable[[], nn.Module]) -> None:
    """Zero rows under zero biases sit exactly on the kink."""
    net = nn.Sequential(nn.Linear(6, 50), activation(), nn.Linear(50, 50), activation(), nn.Linear(50, 3))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    x, y = ZOO["mlp"].samples(7)
    choose_forms(Objective.of(net, F.cross_entropy), torch.zeros_like(x), y, perturbation=True)
    choose_forms(Objective.of(net, F.cross_entropy), x, y, perturbation=True)


def test_many_kinks_are_no_error() -> None:
    """2·10⁴ activations a sample: a difference nearly always steps over one."""
    net = nn.Sequential(nn.Conv2d(2, 800, 1), nn.ReLU(), nn.Flatten(), nn.Linear(800 * 25, 3))
    choose_forms(Objective.of(net, F.cross_entropy), *ZOO["conv2d"].samples(7), perturbation=True)


def test_ties_in_pooling_are_no_error() -> None:
    x, y = ZOO["conv2d"].samples(7)
    net = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    choose_forms(Objective.of(net, F.cross_entropy), x.sign(), y, perturbation=True)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_saturated_classifiers_are_no_error(scale: float) -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        net[2].weight.mul_(scale)
    x, _ = ZOO["mlp"].samples(7)
    choose_forms(Objective.of(net, F.cross_entropy), x, net(x.float()).argmax(1), perturbation=True)


def test_a_model_initialised_to_zero_and_a_constant_loss_are_no_error() -> None:
    net = nn.Linear(6, 3)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    choose_forms(Objective.of(net, F.cross_entropy), *ZOO["mlp"].samples(7), perturbation=True)
    constant = Objective.of(net, lambda output, target: (0 * output).mean())
    choose_forms(constant, *ZOO["mlp"].samples(7), perturbation=True)


class Narrow(nn.Module):
    """A softmax in float32 whatever the model's dtype, as language models have it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1, dtype=torch.float32).to(x.dtype)


def test_single_precision_inside_is_no_error() -> None:
    net = nn.Sequential(nn.Linear(6, 5), Narrow(), nn.Linear(5, 3))
    choose_forms(Objective.of(net, F.cross_entropy), *ZOO["mlp"].samples(7), perturbation=True)


class Stubborn(nn.Module):
    """Multiplies by a float32 matrix of its own making: it cannot run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(5)


def test_a_model_that_insists_on_float32_is_checked_in_float32() -> None:
    x, y = ZOO["mlp"].samples(7)
    net = nn.Sequential(nn.Linear(6, 5), Stubborn(), nn.Tanh(), nn.Linear(5, 3))
    _, report = choose_forms(Objective.of(net, F.cross_entropy), x.float(), y, perturbation=True)
    assert report["dtype"] == "float32"
    wrong = nn.Sequential(nn.Linear(6, 5), Stubborn(), Applied(Blind), nn.Linear(5, 3))
    with pytest.raises(DerivativeError, match="Applied"):
        choose_forms(Objective.of(wrong, F.cross_entropy), x.float(), y)


# -- losses and inputs -----------------------------------------------------------------
def test_a_loss_that_cannot_be_vmapped_is_taken_sample_by_sample() -> None:
    def masked(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output[target >= 0], target[target >= 0])

    x, y = ZOO["mlp"].samples(7)
    net = ZOO["mlp"].model()
    plain, objective = Objective.of(net, F.cross_entropy), Objective.of(net, masked)
    theta = objective.parameters()
    assert torch.equal(objective.sample_losses(theta, x, y), plain.sample_losses(theta, x, y))
    vectors = directions(plain)
    chosen, _ = choose_forms(objective, x, y)
    expected = derivatives.directional_derivatives(plain, x, y, vectors, Forms())
    actual = derivatives.directional_derivatives(objective, x, y, vectors, chosen)
    assert oracles.relative_error(actual, expected) <= 1e-12


def poisson(output: Tensor, target: Tensor) -> Tensor:
    """NaN below zero, where its derivatives 1 − y/f and y/f² are finite."""
    return F.poisson_nll_loss(output, target, log_input=False)


@pytest.mark.parametrize(
    ("derivative", "form"),
    [(name, form) for name in ("gradient", "directional", "mixed") for form in forms.FORMS[name]],
)
def test_a_sample_whose_loss_is_not_finite_has_no_finite_derivative(derivative: str, form: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1.0)
    net[2].bias.data.fill_(0.0)
    objective = Objective.of(net, poisson)
    x, y = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, 1.0]]).double(), torch.ones(3, 1).double()
    vectors, chosen = data.normal(3, 2, objective.size), Forms(**{derivative: form})

    def value(bad: bool) -> Tensor:
        own = x if bad else x[[0, 0, 2]]  # of as many samples, or rounding might differ
        if derivative == "gradient":
            return forms.sample_gradients(objective, own, y, chosen)
        function = {"directional": forms.directional_derivatives, "mixed": forms.mixed_derivatives}[
            derivative
        ]
        return function(objective, own, y, vectors, chosen)

    found, healthy = value(bad=True), value(bad=False)
    assert healthy.isfinite().all()
    assert found.flatten(1).isfinite().all(1).tolist() == [True, False, True]
    assert torch.equal(found[[0, 2]], healthy[[0, 2]])


def test_input_leaf_is_the_one_floating_tensor() -> None:
    dense, ids = torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)
    assert derivatives.input_leaf(dense) is dense
    assert derivatives.input_leaf((ids, dense)) is dense
    assert derivatives.input_leaf({"a": ids, "b": dense}) is dense
    with pytest.raises(ConfigurationError, match=r"only integers \(x\['a'\] \(3,\) int64\)"):
        derivatives.input_leaf({"a": ids})
    with pytest.raises(
        ConfigurationError, match=r"holds 2 \(x\[0\] \(3, 2\) float32, x\[1\] \(3, 2\) float32\)"
    ):
        derivatives.input_leaf((dense, dense))


def test_perturbation_of_token_ids_is_refused() -> None:
    specimen = ZOO["tied_tokens"]
    objective, (x, y) = specimen.objective(), specimen.samples(7)
    with pytest.raises(ConfigurationError, match="only integers"):
        choose_forms(objective, x, y, perturbation=True)
    with pytest.raises(ConfigurationError, match="only integers"):
        derivatives.mixed_derivatives(objective, x, y, directions(objective), Forms())


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="gradient='sideways' is no form; take one of chain, vmap, loop"
    ):
        Forms(gradient="sideways")


def test_classifier_of_the_zoo_reads_sequences() -> None:
    assert Classifier(nn.Identity(), 20)(torch.zeros(2, 5, 4)).shape == (2, 3)


# -- padding rows of embeddings --------------------------------------------------------
class Bag(nn.Module):
    """Sum of padded tokens, scaled by a floating input; the head may be tied to the embedding."""

    def __init__(self, tied: str | None = None) -> None:
        super().__init__()
        self.table, self.head, self.tied = nn.Embedding(7, 3, padding_idx=2), nn.Linear(3, 7), tied
        nn.init.normal_(self.table.weight)  # the padding row as well: it is a constant, not zero
        if tied == "parameter":
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor, scale: Tensor) -> Tensor:
        hidden = torch.tanh(self.table(tokens).sum(1) * scale)
        return F.linear(hidden, self.table.weight) if self.tied == "call" else self.head(hidden)


def padded(occurs: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    tokens = data.classes(91, 28, 7).view(7, 4)
    tokens[tokens == 2] = 3
    if occurs:
        tokens[:3, 2:] = 2
    return (tokens, 1 + data.normal(92, 7, 1).square()), data.classes(93, 7, 7)


@pytest.mark.parametrize("occurs", [True, False])
def test_padding_rows_are_constants(occurs: bool) -> None:
    """Products and directional derivatives do not see what a direction says of the padding row."""
    x, y = padded(occurs)
    objective = Objective.of(data.seeded(Bag).double(), F.cross_entropy)
    chosen, _ = choose_forms(objective, x, y, perturbation=True)
    vectors = directions(objective)
    without = vectors.clone()
    without[:, 2 * 3 : 3 * 3] = 0
    for function in (
        derivatives.products,
        derivatives.directional_derivatives,
        derivatives.mixed_derivatives,
    ):
        assert oracles.relative_error(
            function(objective, x, y, vectors, chosen), function(objective, x, y, without, chosen)
        ) <= (1e-12)


@pytest.mark.parametrize("tied", ["parameter", "call"])
def test_a_padding_row_that_another_layer_uses_is_no_constant(tied: str) -> None:
    objective = Objective.of(data.seeded(lambda: Bag(tied)).double(), F.cross_entropy)
    choose_forms(objective, *padded(occurs=False))
    with pytest.raises(DerivativeError, match=r"'table' has a padding_idx"):
        choose_forms(objective, *padded(occurs=True))


def test_a_wrong_derivative_is_refused_beside_a_padding_row() -> None:
    net = nn.Sequential(nn.Embedding(7, 3, padding_idx=2), nn.Flatten(), Applied(Flipped), nn.Linear(12, 7))
    (tokens, _), y = padded(occurs=True)
    with pytest.raises(DerivativeError, match=r"module '2' \(Applied\)"):
        choose_forms(Objective.of(net, F.cross_entropy), tokens, y)
