"""Derivatives along a chain of modules, against classic autograd, one sample and one direction at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dask_influence.core import chain, forms, gemm
from dask_influence.core.chain import Chain
from dask_influence.core.derivatives import choose_forms
from dask_influence.core.elementary import differentiation
from dask_influence.core.forms import Forms
from dask_influence.core.multiply import products
from dask_influence.core.objective import Objective
from dask_influence.errors import ConfigurationError
from tests import data, oracles


@dataclass(frozen=True)
class Specimen:
    """A chain, its loss, the shape of its input and its target."""

    build: Callable[[], nn.Module]
    features: tuple[int, ...] = (5,)
    target: tuple[int, ...] | int = 3
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy
    parameters: list[str] | None = None

    def objective(self) -> Objective:
        return Objective.of(data.seeded(self.build).double(), self.loss, self.parameters)

    def samples(self, n: int) -> tuple[Tensor, Tensor]:
        x = data.normal(1, n, *self.features)
        y = (
            data.classes(2, n, self.target)
            if isinstance(self.target, int)
            else data.normal(2, n, *self.target)
        )
        return x, y


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3))
    net[2].weight = net[0].weight
    return net


def twice() -> nn.Module:
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.SiLU(), nn.Linear(5, 3))


def thrice(self: nn.Linear, a: Tensor) -> Tensor:
    return 3 * F.linear(a, self.weight, self.bias)


def adapted() -> nn.Module:
    """Its last layer does otherwise than its class, as where an adapter was put on it."""
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2].forward = MethodType(thrice, net[2])  # type: ignore[method-assign]
    return net


def frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    net[0].register_forward_hook(lambda module, given, output: 2 * output)
    return net


def pairs_of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.flatten(1), target)


class Arranged(nn.Module):
    """What enters it, in another order."""

    def __init__(self, arrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.forward = arrange


CHAINS = {
    "one layer": Specimen(lambda: nn.Linear(5, 3)),
    "no bias": Specimen(lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Softplus(), nn.Linear(4, 3))),
    "perceptron": Specimen(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))),
    "rectified, in place": Specimen(
        lambda: nn.Sequential(
            nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 4), nn.ELU(inplace=True), nn.Linear(4, 3)
        )
    ),
    "activation at the end": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 2), nn.Softsign()),
        target=(2,),
        loss=F.mse_loss,
    ),
    "activation at the start": Specimen(lambda: nn.Sequential(nn.Tanh(), nn.Linear(5, 3))),
    "nested, dropped out": Specimen(
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5)),
            nn.Identity(),
            nn.Sequential(nn.Mish(), nn.Linear(6, 3)),
        )
    ),
    "tied": Specimen(tied),
    "twice": Specimen(twice),
    "frozen": Specimen(frozen),
    "adapted": Specimen(adapted, parameters=["0.*"]),
    "hooked": Specimen(lambda: nn.Sequential(hooked(), nn.SiLU(), nn.Linear(3, 3))),
    "subset": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), parameters=["0.bias", "2.weight"]
    ),
    "first layer": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), parameters=["0.weight"]
    ),
    "last bias": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), parameters=["2.bias"]
    ),
    "positions": Specimen(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), (3, 4), (6,), pairs_of_tokens
    ),
    "images": Specimen(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6, 6)),
            nn.Conv2d(1, 2, 3),
            nn.BatchNorm2d(2),
            nn.Tanh(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        (36,),
    ),
    "normalised": Specimen(
        lambda: nn.Sequential(
            nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3), nn.LogSoftmax(-1)
        ),
        loss=F.nll_loss,
    ),
    "turned images": Specimen(
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 3, 4)),
            Arranged(lambda a: a.permute(0, 3, 2, 1)),
            nn.Linear(2, 6),
            nn.Tanh(),
            nn.Linear(6, 2),
            Arranged(lambda a: a.transpose(1, 2)),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        (24,),
    ),
    "last position": Specimen(
        lambda: nn.Sequential(
            nn.Linear(4, 6),
            nn.Tanh(),
            Arranged(lambda a: a[:, -1]),
            nn.Linear(6, 5),
            nn.ReLU(),
            nn.Linear(5, 3),
        ),
        (3, 4),
    ),
    "some features": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 8), Arranged(lambda a: a[:, ::2]), nn.SiLU(), nn.Linear(4, 3))
    ),
    "repeated": Specimen(
        lambda: nn.Sequential(
            nn.Linear(5, 1), Arranged(lambda a: a.expand(-1, 6)), nn.ReLU(), nn.Linear(6, 3)
        )
    ),
    "many outputs": Specimen(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 70)), target=70),
    "piecewise linear loss": Specimen(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)), target=(2,), loss=F.l1_loss
    ),
}


def mixed(objective: Objective, x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    """∇x ⟨v, ∇θ ℓ⟩ by classic autograd, (n, D, *features)."""
    held = dict(objective.module.named_parameters())
    leaves = [held[name] for name in objective.names]
    rows = []
    for j in range(len(x)):
        leaf = x[j : j + 1].clone().requires_grad_()
        loss = objective.loss(objective.module(leaf), y[j : j + 1])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves, create_graph=True)])
        rows.append(
            torch.stack(
                [torch.autograd.grad(gradient @ v, leaf, retain_graph=True)[0][0] for v in directions]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("cache", [1, 2**20], ids=["one direction at a time", "all at once"])
@pytest.mark.parametrize("name", CHAINS)
def test_mixed_derivatives_equal_those_of_autograd(
    name: str, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "CACHE", cache)
    monkeypatch.setattr(chain, "ROWS", 1)
    specimen = CHAINS[name]
    objective, (x, y) = specimen.objective(), specimen.samples(4)
    directions = data.normal(3, 5, objective.size)
    value = Chain(objective, objective.parameters(), x, y).mixed_derivatives(directions)
    assert value.shape == (4, 5, *specimen.features)
    assert oracles.relative_error(value, mixed(objective, x, y, directions)) <= 1e-12


NO_PRODUCTS = {"hooked", "images", "normalised"}
"""Parameters in θ belong to another module than a linear layer."""


@pytest.mark.parametrize("name", sorted(CHAINS.keys() - NO_PRODUCTS))
def test_gradients_equal_those_of_autograd(name: str) -> None:
    specimen = CHAINS[name]
    objective, (x, y) = specimen.objective(), specimen.samples(7)
    held = dict(objective.module.named_parameters())
    leaves = [held[name] for name in objective.names]
    rows = []
    for j in range(7):
        loss = objective.loss(objective.module(x[j : j + 1]), y[j : j + 1])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, leaves)]))
    value = Chain(objective, objective.parameters(), x, y, twice=False).gradients()
    assert oracles.relative_error(value, torch.stack(rows)) <= 1e-13


@pytest.mark.parametrize("name", sorted(CHAINS.keys() - NO_PRODUCTS))
def test_products_equal_those_of_the_dense_hessian(name: str) -> None:
    specimen = CHAINS[name]
    objective, (x, y) = specimen.objective(), specimen.samples(7)
    directions = data.normal(3, 4, objective.size)
    chained = Chain(objective, objective.parameters(), x, y)
    several = name == "positions"  # outputs in rows, which the other oracle does not know
    for dense in (oracles.hessian, oracles.ggn)[: 1 if several else 2]:
        value = torch.full_like(directions, torch.nan)
        products(chained, directions, value, gauss_newton=dense is oracles.ggn)
        matrix = 7 * dense(objective.module, objective.loss, x, y, objective.names)
        assert matrix.any() or name == "piecewise linear loss"
        assert (value - directions @ matrix).norm() <= 1e-12 * (1 + matrix.norm())


def test_a_target_that_the_loss_ignores_makes_no_other_sample_count_more() -> None:
    """The loss is then the mean of the others; a sample alone has none."""
    specimen = CHAINS["perceptron"]
    objective, (x, y) = specimen.objective(), specimen.samples(7)
    expected = oracles.gradients(objective.module, objective.loss, x, y)
    y[[2, 5]] = -100
    found = Chain(objective, objective.parameters(), x, y, twice=False).gradients()
    counted = [0, 1, 3, 4, 6]
    assert oracles.relative_error(found[counted], expected[counted]) <= 1e-13
    assert found[[2, 5]].isnan().any(1).all()


def test_few_samples_take_few_directions_of_a_large_model_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are put in order, which takes as much memory as they do."""
    objective, (x, y) = CHAINS["perceptron"].objective(), CHAINS["perceptron"].samples(2)
    chained, seen = Chain(objective, objective.parameters(), x, y), list[int]()
    original = chained._write_mixed
    monkeypatch.setattr(
        chained,
        "_write_mixed",
        lambda along, into: seen.append(len(along["0.weight"])) or original(along, into),
    )
    monkeypatch.setattr(chain, "ORDERED", 3 * 8 * objective.size)
    directions = data.normal(3, 10, objective.size)
    value = chained.mixed_derivatives(directions)
    assert seen == [3, 3, 3, 1]
    assert oracles.relative_error(value, mixed(objective, x, y, directions)) <= 1e-12


@pytest.mark.parametrize("name", CHAINS)
def test_products_by_another_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product by oneDNN, as large ones are on processors of some makers."""
    monkeypatch.setattr(gemm, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(gemm, "WORTHWHILE", 1)
    monkeypatch.setattr(gemm, "FEW", 1)
    monkeypatch.setattr(gemm, "SINGLY", 1)
    specimen = CHAINS[name]
    objective, (x, y) = specimen.objective(), specimen.samples(7)
    directions = data.normal(3, 4, objective.size)
    narrow = objective.to(dtype=torch.float32), x.float(), y.float() if y.is_floating_point() else y
    exact, chained = (Chain(own, own.parameters(), *pair) for own, *pair in ((objective, x, y), narrow))
    expected = exact.mixed_derivatives(directions)
    value = chained.mixed_derivatives(directions.float())
    assert oracles.relative_error(value.double(), expected) <= 1e-5
    if name not in NO_PRODUCTS:
        expected, value = (
            products(one, directions, torch.empty_like(directions)) for one in (exact, chained)
        )
        assert (value - expected).norm() <= 1e-5 * (1 + expected.norm())


@pytest.mark.parametrize("name", sorted(NO_PRODUCTS))
def test_products_of_other_modules_are_refused(name: str) -> None:
    specimen = CHAINS[name]
    objective, (x, y) = specimen.objective(), specimen.samples(4)
    directions = data.normal(3, 2, objective.size)
    chained = Chain(objective, objective.parameters(), x, y)
    with pytest.raises(ConfigurationError, match="holds parameters in θ"):
        products(chained, directions, directions)
    forms, report = choose_forms(objective, x, y)
    assert forms.product == "reverse_over_reverse"
    assert "holds parameters" in report["product"]["rejected"]["chain"]


def test_result_goes_where_it_is_asked_for() -> None:
    specimen = CHAINS["perceptron"]
    objective, (x, y) = specimen.objective(), specimen.samples(4)
    directions = data.normal(3, 6, objective.size)
    whole = torch.zeros(6, 9, 5, dtype=torch.float64)
    along = Chain(objective, objective.parameters(), x, y)
    along.mixed_derivatives(directions, out=whole[:, 2:6])
    assert torch.equal(whole[:, 2:6].transpose(0, 1), along.mixed_derivatives(directions))
    assert not whole[:, :2].any()
    assert not whole[:, 6:].any()


@pytest.mark.parametrize("written", [1, 2**22])
@pytest.mark.parametrize("name", ["perceptron", "subset", "frozen", "one layer"])
def test_the_first_layer_writes_some_directions_at_a_time(
    name: str, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "WRITTEN", written)
    objective, (x, y) = CHAINS[name].objective(), CHAINS[name].samples(4)
    directions, whole = data.normal(3, 6, objective.size), torch.full((6, 9, 5), torch.nan).double()
    Chain(objective, objective.parameters(), x, y).mixed_derivatives(directions, out=whole[:, 2:6])
    expected = mixed(objective, x, y, directions).transpose(0, 1)
    torch.testing.assert_close(whole[:, 2:6], expected, rtol=1e-10, atol=1e-12)
    assert whole[:, :2].isnan().all()
    assert whole[:, 6:].isnan().all()


@pytest.mark.parametrize("name", ["perceptron", "images", "many outputs"])
def test_threads_share_a_chain(name: str) -> None:
    specimen = CHAINS[name]
    objective, (x, y) = specimen.objective(), specimen.samples(6)
    along = Chain(objective, objective.parameters(), x, y)
    parts = data.normal(3, 24, objective.size).split(3)
    together, threads = threading.Barrier(4), torch.get_num_threads()

    def one(part: Tensor) -> Tensor:
        torch.set_num_threads(threads)  # as tasks do, on which bits depend
        together.wait()
        return along.mixed_derivatives(part)

    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(one, parts))
    for part, value in zip(parts, values, strict=True):
        assert torch.equal(value, along.mixed_derivatives(part))


@pytest.mark.parametrize("form", ["gradient", "product", "mixed"])
def test_parameters_are_not_those_that_another_thread_has_put_in_their_place(form: str) -> None:
    """As derivatives at another θ do for a while, of the same module, on a worker of two threads."""
    inside, going_on = threading.Event(), threading.Event()

    def wait(a: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            going_on.wait(0.3)  # as long as the other one, who should wait, would take
        return a

    net = data.seeded(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), Arranged(wait), nn.Linear(4, 3)))
    objective, (x, y) = Objective.of(net.double(), F.cross_entropy), CHAINS["perceptron"].samples(4)
    theta, along = objective.parameters(), data.normal(3, 2, objective.size)
    elsewhere = {name: value + 1 for name, value in theta.items()}
    taken = Forms(gradient="chain", product="chain", mixed="chain")

    def differentiated() -> Tensor:
        if form == "gradient":
            return forms.sample_gradients(objective, x, y, taken)
        differentiate = forms.products if form == "product" else forms.mixed_derivatives
        return differentiate(objective, x, y, along, taken)

    expected = differentiated()

    def move() -> Tensor:
        with differentiation():
            return forms.total_gradient(objective, elsewhere, x, y)

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(move)
        inside.wait()
        found = differentiated()
        going_on.set()
        other.result()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("first", "features", "held"),
    [
        (lambda: nn.Linear(64, 2), (64,), False),
        (lambda: nn.Linear(64, 2), (3, 64), True),
        (lambda: nn.Conv1d(2, 1, 8, stride=8), (2, 64), True),
        (lambda: nn.Flatten(), (2, 32), True),
    ],
    ids=["features", "positions", "a convolution", "flattened"],
)
def test_blocks_are_as_wide_as_what_they_take(
    first: Callable[[], nn.Module],
    features: tuple[int, ...],
    held: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = nn.Sequential(first(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    net(data.normal(1, 2, *features))
    objective = Objective.of(net, F.cross_entropy)
    chained = Chain(
        objective, objective.parameters(), data.normal(1, 300, *features), data.classes(2, 300, 3)
    )
    widest = max(step.output.nbytes for step in chained.steps)
    taken = max(widest, chained.steps[0].input.nbytes) if held else widest
    monkeypatch.setattr(chain, "CACHE", 7 * taken)
    assert chained._block(100) == 7


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_taken_as_such(name: str) -> None:
    specimen = CHAINS[name]
    forms, report = choose_forms(specimen.objective(), *specimen.samples(4), perturbation=True)
    assert forms.mixed == "chain"
    assert (forms.product == "chain") is (name not in NO_PRODUCTS)
    assert report["mixed"]["error"] <= 1e-5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Plain(nn.Sequential):
    """Its forward could be anything."""


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(Residual(), nn.Tanh()), torch.ones(2, 5)),
        (Plain(nn.Linear(5, 3)), torch.ones(2, 5)),
        (nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)), torch.ones(2, 5, dtype=torch.int64)),
        (nn.Sequential(nn.Linear(5, 3)), (torch.ones(2, 5),)),
    ],
    ids=["no linear layer", "subclass", "integers", "tuple"],
)
def test_what_is_no_chain_is_refused(model: nn.Module, x: Any) -> None:
    objective = Objective.of(model, F.mse_loss)
    with pytest.raises(ConfigurationError, match=r"chain|floating tensor"):
        Chain(objective, objective.parameters(), x, torch.ones(2, 3))


def test_a_module_of_two_outputs_breaks_the_chain() -> None:
    objective = Objective.of(nn.Sequential(nn.Linear(5, 3), nn.GRU(3, 2)), F.mse_loss)
    with pytest.raises(ConfigurationError, match="GRU returns tuple"):
        Chain(objective, objective.parameters(), torch.ones(2, 5), torch.ones(2, 2))
