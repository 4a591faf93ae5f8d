"""Products and projections of pairs of samples, against gradients formed one by one."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence.core import chain, directional, layers
from dask_influence.core import pairs as module
from dask_influence.core.forms import Forms
from dask_influence.core.objective import Objective
from dask_influence.core.pairs import Pairs, Spectral, paired
from dask_influence.core.problem import Problem
from dask_influence.errors import InfluenceWarning
from tests import data, oracles

SAME = 1e-12
RANK = 4


class Tokens(nn.Module):
    """An embedding with a padding row, a norm, attention, and a scale that is in no layer."""

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, 4, padding_idx=2)
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.table(x))
        return self.head((hidden + self.attention(hidden, hidden, hidden)[0]).sum(1) * self.scale)


class Twice(nn.Module):
    """A layer that is called twice, one that is never called, and a bias without its weight in θ."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.never = nn.Linear(5, 9), nn.Linear(9, 9), nn.Linear(2, 2)
        self.head = nn.Linear(9, 3)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(torch.tanh(self.again(torch.tanh(self.first(x)))))))


class Astray(nn.Module):
    """A weight that also acts outside of its layer's own call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x))) * self.first.weight.square().sum()


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 2), nn.Tanh(), nn.Linear(2, 3))


def images() -> nn.Module:
    convolutions = nn.Conv1d(1, 4, 2), nn.Tanh(), nn.Conv1d(4, 6, 3, groups=2)
    return nn.Sequential(nn.Unflatten(1, (1, 5)), *convolutions, nn.Flatten(), nn.Linear(12, 3))


def norms() -> nn.Module:
    """One of each that scales its channels; the batch norm with statistics of its own, as it has after a training."""
    batch = nn.BatchNorm1d(4)
    nn.init.normal_(batch.running_mean, std=0.3)
    nn.init.uniform_(batch.running_var, 0.5, 2.0)
    scaled = batch, nn.GroupNorm(2, 4), nn.Tanh(), nn.InstanceNorm1d(4, affine=True), nn.RMSNorm(6)
    for part in scaled:
        for parameter in part.parameters():
            nn.init.normal_(parameter, 1.0, 0.5)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv1d(1, 4, 3),
        *scaled,
        nn.Flatten(),
        nn.Linear(24, 3),
        nn.BatchNorm1d(3),
    )
    return net.eval()


def positions() -> nn.Module:
    """Two positions of a matrix so large that the pair is the smaller."""
    return nn.Sequential(nn.Unflatten(1, (2, 5)), nn.Linear(5, 40), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Tensor]]] = {
    "wide": (wide, lambda seed, n: data.normal(seed, n, 5)),
    "images": (images, lambda seed, n: data.normal(seed, n, 5)),
    "norms": (norms, lambda seed, n: data.normal(seed, n, 8)),
    "positions": (positions, lambda seed, n: data.normal(seed, n, 10)),
    "twice": (Twice, lambda seed, n: data.normal(seed, n, 5)),
    "tokens": (Tokens, lambda seed, n: data.classes(seed, n * 3, 11).reshape(n, 3)),
    "many tokens": (lambda: Tokens(300), lambda seed, n: data.classes(seed, n * 3, 9).reshape(n, 3)),
}
TAKEN = {
    "wide": {"Product"},
    "images": {"Product", "_Matrix"},
    "norms": {"_Matrix", "Product"},
    "positions": {"Product"},
    "twice": {"Product", "_Matrix", "_Rest"},
    "tokens": {"_Matrix", "Product", "_Rest"},
    "many tokens": {"_Picked", "_Matrix", "Product", "_Rest"},
}


class Held:
    """A model as a problem with its pairing, 17 training and 7 test samples and their dense gradients."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, **forms: str) -> None:
        build, inputs = MODELS[name]
        self.model = data.seeded(build).double()
        self.train = inputs(301, 17), data.classes(302, 17, 3)
        self.test = inputs(303, 7), data.classes(304, 7, 3)
        objective = Objective.of(self.model, functional.cross_entropy, dtype=dtype)
        cast = [(x.to(dtype) if x.is_floating_point() else x, y) for x, y in (self.train, self.test)]
        self.cast_train, self.cast_test = cast
        self.problem, self.report = paired(Problem(objective, Forms(**forms)), *cast[0])
        size = objective.size
        self.form = Spectral(
            data.normal(305, RANK, size), data.normal(306, 2, RANK), torch.tensor([0.7, 3.0]).double()
        )

    def gradients(self, pair: data.Pair) -> Tensor:
        return oracles.gradients(self.model, functional.cross_entropy, *pair)

    def expected(self) -> Tensor:
        """Dense scores of both λ, (L, N, n)."""
        tests, trains, along = self.gradients(self.test), self.gradients(self.train), self.form.directions
        return torch.stack(
            [
                (tests @ along.mT * weights) @ (trains @ along.mT).mT + plain * tests @ trains.mT
                for weights, plain in zip(self.form.weights, self.form.plain, strict=True)
            ]
        )

    def scores(self) -> Tensor:
        pairs = self.form.pairs(self.problem)
        tests = pairs.weighted(pairs.rows(self.problem, *self.cast_test))
        found = pairs.scores(tests, pairs.rows(self.problem, *self.cast_train))
        return found.reshape(len(self.test[1]), 2, -1).swapaxes(0, 1)


@pytest.mark.parametrize("name", MODELS)
def test_scores_against_dense_gradients(name: str) -> None:
    held = Held(name)
    parts = Pairs(held.problem, held.form.directions).parts
    assert {type(part).__name__ for part in parts} == TAKEN[name]
    assert oracles.relative_error(held.scores(), held.expected()) <= SAME


@pytest.mark.parametrize("name", MODELS)
def test_one_sample_and_one_product_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(name)
    monkeypatch.setattr(module, "BUDGET", 1)
    assert oracles.relative_error(held.scores(), held.expected()) <= SAME


@pytest.mark.parametrize("name", MODELS)
def test_samples_on_themselves(name: str) -> None:
    held = Held(name)
    pairs = held.form.pairs(held.problem)
    gradients = held.gradients(held.train)
    along = gradients @ held.form.directions.mT
    expected = held.form.weights @ along.square().mT + held.form.plain[:, None] * gradients.square().sum(1)
    actual = pairs.alone(pairs.rows(held.problem, *held.train))
    assert oracles.relative_error(actual, expected) <= SAME


@pytest.mark.parametrize("name", ["wide", "tokens"])
def test_without_directions(name: str) -> None:
    held = Held(name)
    pairs = Pairs(held.problem, torch.empty(0, 0))
    found = pairs.scores(pairs.rows(held.problem, *held.test), pairs.rows(held.problem, *held.train))
    expected = held.gradients(held.test) @ held.gradients(held.train).mT
    assert oracles.relative_error(found, expected) <= SAME


@pytest.mark.parametrize("name", ["wide", "images", "many tokens"])
def test_samples_one_at_a_time_where_the_model_needs_it(name: str) -> None:
    held = Held(name, gradient="loop")
    assert oracles.relative_error(held.scores(), held.expected()) <= SAME


def test_what_projections_cancel_is_exact_in_single_precision() -> None:
    """In the span of V a millionth of either part is left of a score."""
    held = Held("wide", torch.float32)
    gradients = held.gradients(held.train)
    own = torch.linalg.qr(gradients.mT).Q.mT  # every gradient lies in its span
    one = torch.ones(2, dtype=torch.float64)
    held.form = Spectral(own, (1e-3 - 1e3) * one[:, None].expand(2, len(own)), 1e3 * one)
    held.test, held.cast_test = held.train, held.cast_train
    found = held.scores()
    assert found.dtype == torch.float32
    assert oracles.relative_error(found[0].double(), 1e-3 * gradients @ gradients.mT) <= 1e-5


def cancelling(vectors: Tensor, *factors: float) -> Spectral:
    """An inverse with eigenvalue 1 in the span of ``vectors``, and μ beside it, for each μ."""
    plain = torch.tensor(factors, dtype=torch.float64)
    return Spectral(vectors, (1 - plain)[:, None].expand(len(plain), len(vectors)), plain)


@pytest.mark.parametrize("factor", [1.0, module.CANCELLATION])
def test_what_cancels_a_little_takes_single_precision(factor: float) -> None:
    """Off by κ roundoffs of √(s_ii s_jj) at most, where every gradient lies in the span of V."""
    held = Held("wide", torch.float32)
    gradients = held.gradients(held.train)
    held.form = cancelling(torch.linalg.qr(gradients.mT).Q.mT, factor)
    held.test, held.cast_test = held.train, held.cast_train
    pairs = held.form.pairs(held.problem)
    rows = pairs.rows(held.problem, *held.cast_train)
    assert rows.dtype == torch.float32
    expected = gradients @ gradients.mT
    size = expected.diagonal().sqrt()
    found = pairs.scores(pairs.weighted(rows), rows).double()
    allowed = 8 * factor * torch.finfo(torch.float32).eps
    assert ((found - expected).abs() <= allowed * size[:, None] * size).all()
    assert ((pairs.alone(rows)[0].double() - expected.diagonal()).abs() <= allowed * size.square()).all()


@pytest.mark.parametrize(
    ("dtype", "factors", "expected"),
    [
        (torch.float32, (2.0, module.CANCELLATION), torch.float32),
        (torch.float32, (2.0, 1.01 * module.CANCELLATION), torch.float64),  # one λ of a sweep
        (torch.float32, (1e-9,), torch.float32),  # what is in the span is the larger part, and adds up
        (torch.float32, (-2.0,), torch.float64),  # no metric
        (torch.float32, (0.0,), torch.float64),
        (torch.bfloat16, (1e6,), torch.float32),
        (torch.bfloat16, (1e7,), torch.float64),
        (torch.float64, (1.0,), torch.float64),
    ],
)
def test_precision_of_rows(dtype: torch.dtype, factors: tuple[float, ...], expected: torch.dtype) -> None:
    form = cancelling(torch.eye(3, 9, dtype=torch.float64), *factors)
    assert form.precision(dtype) == expected


@pytest.mark.parametrize("block", [(1, 1), (3, 5), (7, 17)])
def test_blocks_of_pairs(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held("positions")
    monkeypatch.setattr(module, "BLOCK", block)
    assert oracles.relative_error(held.scores(), held.expected()) <= SAME


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_directions_contracted_with_layers(name: str, dtype: torch.dtype) -> None:
    held = Held(name, dtype)
    along = held.form.directions.to(dtype)
    contracted = Pairs(held.problem, along, dtype)
    expected = held.gradients(held.train) @ held.form.directions.mT
    for budget in (1, 2**20):
        found = directional._by_layers(
            contracted.projections, contracted.size, held.problem, *held.cast_train, dtype, budget
        )
        assert found.dtype == dtype
        assert oracles.relative_error(found.double(), expected) <= (SAME if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("width", "directions", "taken"), [(300, 20, True), (300, 2, False), (4, 20, False)])
def test_directions_are_contracted_with_layers_where_it_is_cheaper(
    width: int, directions: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = data.seeded(lambda: nn.Sequential(nn.Linear(50, width), nn.Tanh(), nn.Linear(width, 60)))
    objective = Objective.of(model, functional.cross_entropy)
    samples = data.normal(309, 500, 50).float(), data.classes(310, 500, 60)
    problem, _ = paired(Problem(objective, Forms()), *samples)
    calls = []
    original = Pairs.projections
    monkeypatch.setattr(Pairs, "projections", lambda *given: calls.append(1) or original(*given))
    along = data.normal(311, directions, objective.size).float()
    found = directional.directional_derivatives(problem, *samples, along)
    assert bool(calls) is taken
    plain = dataclasses.replace(problem, pairing=None)
    expected = directional.directional_derivatives(plain, *samples, along)
    assert oracles.relative_error(found.double(), expected.double()) <= 1e-5


@pytest.mark.parametrize(
    ("model", "features", "form", "expected"),
    [
        ("perceptron", (64,), "chain", directional.Way.LAYERS),  # passes of its own: nothing is traced
        ("perceptron", (64,), "vmap", directional.Way.FORWARD),
        ("positions", (4, 64), "chain", directional.Way.FORWARD),  # a gradient of each sample would be formed
    ],
)
def test_the_way_that_is_measured_to_be_fastest_is_chosen(
    model: str, features: tuple[int, ...], form: str, expected: directional.Way
) -> None:
    """``tests/benchmarks/choices.py`` measures."""
    nets = {
        "perceptron": lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
        "positions": lambda: nn.Sequential(
            nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.Flatten(), nn.Linear(4 * 64, 10)
        ),
    }
    objective = Objective.of(data.seeded(nets[model]), functional.cross_entropy)
    x, y = data.normal(317, 512, *features).float(), data.classes(318, 512, 10)
    activations = {"perceptron": 2 * 32 + 10, "positions": 4 * (2 * 128 + 2 * 64) + 10}[model]
    problem, _ = paired(Problem(objective, Forms(gradient=form), activations), x, y)
    assert problem.pairing is not None
    directions = torch.zeros(2 if model == "perceptron" else 4, objective.size)
    assert directional.chosen(problem, x, directions) is expected


def test_layers_of_a_chain_are_not_compared_with_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which the chain knows something else than it does: here of a part put on it afterwards."""
    objective = Objective.of(data.seeded(wide).double(), functional.cross_entropy)
    monkeypatch.setattr(chain, "hooked", lambda module: False)
    objective.module[2].register_forward_hook(lambda module, given, output: 1.5 * output)
    train = data.normal(307, 9, 5), data.classes(308, 9, 3)
    with pytest.warns(InfluenceWarning, match=r"layer 0, 2.* is not the product"):
        _, report = paired(Problem(objective, Forms(gradient="chain")), *train)
    assert "0" not in report["layers"]


class Averaged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(30, 30), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).mean(1))


@pytest.mark.parametrize(("positions", "taken"), [(2, True), (4, False)])
def test_samples_of_another_length_are_not_contracted(
    positions: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Objective.of(data.seeded(Averaged).double(), functional.cross_entropy)
    few = data.normal(312, 3, 2, 30), data.classes(313, 3, 3)
    problem, _ = paired(Problem(objective, Forms()), *few)
    monkeypatch.setattr(directional, "_CAPTURE", 0)
    calls = []
    original = Pairs.projections
    monkeypatch.setattr(Pairs, "projections", lambda *given: calls.append(1) or original(*given))
    samples = data.normal(314, 7, positions, 30), data.classes(315, 7, 3)
    along = data.normal(316, 40, objective.size)
    found = directional.directional_derivatives(problem, *samples, along)
    assert bool(calls) is taken
    gradients = oracles.gradients(objective.module, functional.cross_entropy, *samples)
    assert oracles.relative_error(found, gradients @ along.mT) <= SAME


def test_half_precision() -> None:
    held = Held("wide", torch.bfloat16)
    found = held.scores()
    assert found.dtype == torch.bfloat16
    assert oracles.relative_error(found.double(), held.expected()) <= 5e-2


def test_a_layer_used_in_another_way_too_is_formed_with_a_warning() -> None:
    model = data.seeded(Astray).double()
    objective = Objective.of(model, functional.cross_entropy)
    train = data.normal(307, 9, 5), data.classes(308, 9, 3)
    with pytest.warns(InfluenceWarning, match="layer first is not the product"):
        problem, report = paired(Problem(objective, Forms()), *train)
    assert report == {"layers": ["head"], "formed": ["first"]}
    pairs = Pairs(problem, torch.empty(0, 0))
    gradients = oracles.gradients(model, functional.cross_entropy, *train)
    rows = pairs.rows(problem, *train)
    assert oracles.relative_error(pairs.scores(rows, rows), gradients @ gradients.mT) <= SAME


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared; exactly zero where the right output is the largest by 1."""
    own = outputs.gather(1, targets[:, None])[:, 0]
    others = outputs.scatter(1, targets[:, None], -torch.inf).amax(1)
    return torch.relu(1 + others - own).square().mean()


@pytest.mark.parametrize("place", [0, 8, 16])
def test_it_is_found_by_samples_whose_gradients_are_not_zero(place: int) -> None:
    """Zeros agree with anything."""
    objective = Objective.of(data.seeded(Astray).double(), hinge)
    x = data.normal(307, 17, 5)
    with torch.no_grad():
        objective.module.head.weight.mul_(1e4)  # far beyond the margin
        y = objective.module(x).argmax(1)
        y[place] = (y[place] + 1) % 3
        assert objective.sample_losses(objective.parameters(), x, y).nonzero()[:, 0].tolist() == [place]
    with pytest.warns(InfluenceWarning, match="layer first is not the product"):
        _, report = paired(Problem(objective, Forms()), x, y)
    assert report == {"layers": ["head"], "formed": ["first"]}


def test_of_gradients_that_are_all_zero_nothing_is_known() -> None:
    net = data.seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))).double()
    with torch.no_grad():
        net[0].bias.sub_(1e3)  # nothing gets through
    train = data.normal(307, 9, 5), data.classes(308, 9, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = paired(Problem(Objective.of(net, functional.cross_entropy), Forms()), *train)
    assert report == {"layers": ["2"], "formed": ["0"]}


def test_a_kind_of_layer_that_reads_its_input_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is what stands between a wrong entry of ``layers.CALLS`` and a wrong score."""
    wrong = layers.Call(
        lambda input, weight, bias=None: 2 * input.reshape(-1, 1, input.shape[-1]), layers._trailing
    )
    monkeypatch.setitem(layers.CALLS, functional.linear, wrong)
    with pytest.warns(InfluenceWarning, match="layer 0, 2, 4 is not the product"):
        held = Held("wide")
    assert held.problem.pairing is None


def test_models_that_cannot_be_watched_have_no_pairing() -> None:
    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                raise RuntimeError("no transforms")
            return super().forward(x)

    objective = Objective.of(data.seeded(lambda: Broken(5, 3)).double(), functional.cross_entropy)
    problem = Problem(objective, Forms(gradient="loop"))
    train = data.normal(307, 9, 5), data.classes(308, 9, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, report = paired(Problem(objective, Forms()), *train)
    assert found.pairing is None
    assert "no transforms" in report["reason"]
    assert problem.pairing is None


@pytest.mark.parametrize("way", ["call", "inner", "along", "alone"])
def test_a_formula_that_is_slightly_wrong_is_not_taken(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By three thousandths in float32, also in a layer of which the gradient is a hundredth of the whole."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 3))
    with torch.no_grad():
        net[3].weight.mul_(1e-2)
    objective = Objective.of(net, functional.mse_loss)
    x, y = torch.randn(7, 6), torch.randn(7, 3)
    gradients = torch.func.vmap(torch.func.grad(objective.sample_loss), in_dims=(None, 0, 0))
    found = gradients(objective.parameters(), x, y)
    small, large = (found[f"{i}.weight"][:2].norm() for i in (0, 3))
    assert small < 0.05 * large
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, report = paired(Problem(objective, Forms()), x, y)
    assert report["layers"] == ["0", "2", "3"]
    if way == "call":
        own = layers.CALLS[nn.functional.linear]
        wrong = dataclasses.replace(own, outputs=lambda groups, out: own.outputs(groups, out) * (1 + 3e-3))
        monkeypatch.setitem(layers.CALLS, nn.functional.linear, wrong)
    else:
        right = getattr(module.Product, way)
        monkeypatch.setattr(module.Product, way, lambda *given: right(*given) * (1 + 3e-3))
    with pytest.warns(InfluenceWarning, match=r"0, 2, 3 is not the product"):
        _, report = paired(Problem(objective, Forms()), x, y)
    assert report["layers"] == []
