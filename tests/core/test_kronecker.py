"""Pairs under EK-FAC, against factors from the dense bases and gradients formed one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import EkfacInfluence
from dask_influence.core import expansion, kronecker
from dask_influence.core.estimators.ekfac import EkfacInverse
from dask_influence.core.estimators.sweep import SweepInverse
from dask_influence.core.kronecker import Kronecker
from dask_influence.errors import DataError
from tests import data, oracles
from tests.core.test_pairs import MODELS

SAME = 1e-11
TAKEN = {
    "wide": {"_Rotated"},
    "images": {"_Rotated", "_Formed"},
    "positions": {"_Rotated", "_Formed"},
    "twice": {"_Rotated", "_Formed"},
    "tokens": {"_Rotated", "_Formed"},
    "many tokens": {"_Picked", "_Rotated", "_Formed"},
    "few tokens of a large layer": {"_Picked", "_Rotated"},
}


class Wide(nn.Module):
    """Two tokens through a layer so large that their pairs are the smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(500, 260), nn.Linear(260, 300)
        self.head = nn.Linear(600, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(x))).flatten(1))


LARGE = {"few tokens of a large layer": (Wide, lambda seed, n: data.classes(seed, n * 2, 500).reshape(n, 2))}


class Held:
    """EK-FAC of 29 samples, fitted, and 7 test samples; the dense factors of their gradients."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64) -> None:
        build, inputs = {**MODELS, **LARGE}[name]
        self.model = data.seeded(build).double()
        self.train = inputs(301, 29), data.classes(302, 29, 3)
        self.test = inputs(303, 7), data.classes(304, 7, 3)
        skip = name.endswith("tokens")  # a scale that is in no layer
        self.infl = EkfacInfluence(
            self.model, functional.cross_entropy, 0.01, skip_unsupported=skip, dtype=dtype
        ).fit(self.train)
        problem = self.infl._fitted.problem
        assert problem.pairing is not None
        self.problem = problem
        floating = self.train[0].is_floating_point()
        self.cast = [(x.to(dtype) if floating else x, y) for x, y in (self.train, self.test)]

    def inverses(self) -> Iterator[EkfacInverse]:
        inverse = self.infl._fitted.inverse
        assert isinstance(inverse, EkfacInverse)
        for value in (0.01, 0.3):
            yield inverse.with_regularization(value)

    def form(self) -> Kronecker:
        form = SweepInverse(list(self.inverses()), self.problem.objective.names).form
        assert isinstance(form, Kronecker)
        return form

    def expected(self, left: data.Pair, right: data.Pair) -> Tensor:
        """Scores of both λ through factors, (L, N, n)."""
        rows, others = (
            oracles.gradients(self.model, functional.cross_entropy, *side) for side in (left, right)
        )
        found = []
        for inverse in self.inverses():
            with pytest.raises(StopIteration) as solved:
                next(inverse.solve(rows))
            found.append(solved.value.value.factors @ others.mT)
        return torch.stack(found)

    def scores(self) -> Tensor:
        pairs = self.form().pairs(self.problem)
        train, test = self.cast
        tests = pairs.weighted(pairs.rows(self.problem, *test))
        found = pairs.scores(tests, pairs.rows(self.problem, *train))
        return found.reshape(len(self.test[1]), 2, -1).swapaxes(0, 1)


@pytest.mark.parametrize("name", TAKEN)
def test_scores_against_factors_of_dense_gradients(name: str) -> None:
    held = Held(name)
    pairs = held.form().pairs(held.problem)
    assert {type(part).__name__ for part in pairs.parts} == TAKEN[name]
    expected = held.expected(held.test, held.train)
    assert oracles.relative_error(expected[0], expected[1]) > 0.1  # λ matters
    assert oracles.relative_error(held.scores(), expected) <= SAME


@pytest.mark.parametrize("name", [name for name in TAKEN if name not in LARGE])
def test_one_sample_and_one_product_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(name)
    monkeypatch.setattr(kronecker, "BUDGET", 1)
    monkeypatch.setattr(expansion, "BLOCK", 1)
    assert oracles.relative_error(held.scores(), held.expected(held.test, held.train)) <= SAME


@pytest.mark.parametrize("name", TAKEN)
def test_samples_on_themselves(name: str) -> None:
    held = Held(name)
    pairs = held.form().pairs(held.problem)
    expected = torch.stack([scores.diagonal() for scores in held.expected(held.train, held.train)])
    actual = pairs.alone(pairs.rows(held.problem, *held.cast[0]))
    assert oracles.relative_error(actual, expected) <= SAME


@pytest.mark.parametrize("name", TAKEN)
def test_the_size_is_known_without_a_fit(name: str) -> None:
    held = Held(name)
    size, pairs = Kronecker((), (0.5,)).size(held.problem), held.form().pairs(held.problem)
    assert size.numbers == pairs.rows(held.problem, *held.cast[0]).shape[1]
    assert (size.itemsize, held.form().size(held.problem)) == (8, size)
    if name != "twice":  # which holds bases of a layer that is never called
        assert size.held >= sum(tensor.nbytes for tensor in held.infl._fitted.inverse.state()[0].values())


@pytest.mark.parametrize("name", ["wide", "positions"])
def test_single_precision(name: str) -> None:
    held = Held(name, torch.float32)
    found = held.scores()
    assert found.dtype == torch.float32
    assert oracles.relative_error(found.double(), held.expected(held.test, held.train)) <= 1e-4


def test_half_precision() -> None:
    held = Held("wide", torch.bfloat16)
    found = held.scores()
    assert found.dtype == torch.bfloat16
    assert oracles.relative_error(found.double(), held.expected(held.test, held.train)) <= 5e-2


def large(dtype: torch.dtype) -> data.Case:
    """A layer for which terms pay."""
    model = data.seeded(lambda: nn.Sequential(nn.Linear(150, 90), nn.Tanh(), nn.Linear(90, 4))).to(dtype)
    scale = torch.logspace(-2, 1, 150).to(dtype)
    train = data.normal(311, 211, 150).to(dtype) * scale, data.classes(312, 211, 4)
    test = data.normal(313, 17, 150).to(dtype) * scale, data.classes(314, 17, 4)
    return data.Case(model, functional.cross_entropy, train, test, 0.01)


def test_terms_that_pay_are_certified() -> None:
    case = large(torch.float32)
    infl = EkfacInfluence(case.model, case.loss, case.regularization).fit(case.train)
    report = infl.diagnostics
    assert set(report["score_terms"]) == {"0", "2"}
    assert 0 < report["score_bound"] <= expansion.tolerated(90, 151, torch.float32)
    form = infl._fitted.inverse.form
    found = form.expansion(0, 0, torch.empty(0))
    assert found.products < expansion.entry_by_entry(90, 151)
    assert report["score_products"]["0"] == found.multiplications < found.products
    wide = data.Case(
        case.model.double(),
        case.loss,
        *((x.double(), y) for x, y in (case.train, case.test)),
        case.regularization,
    )
    tensors, values = infl._fitted.inverse.state()
    exact = EkfacInverse.from_state(tensors, {**values, "dtype": "float64"})
    gradients = [oracles.gradients(wide.model, wide.loss, *side) for side in (wide.test, wide.train)]
    with pytest.raises(StopIteration) as solved:
        next(exact.solve(torch.cat(gradients)))
    factors, count = solved.value.value.factors, len(case.test[1])
    own = (factors * torch.cat(gradients)).sum(1).sqrt()
    allowed = torch.outer(own[:count], own[count:])
    error = infl.influences(*case.test, *case.train).double() - factors[:count] @ gradients[1].mT
    assert (error.abs() / allowed).max() <= 1e-6  # far below the bound, with all that float32 rounds


@pytest.mark.parametrize("argument", ["test", "x, y"])
def test_samples_whose_gradient_is_not_finite_are_named(argument: str) -> None:
    def pair(seed: int) -> data.Pair:
        return data.normal(seed, 80, 20), data.classes(seed + 1, 80, 3)

    model = data.seeded(lambda: nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3))).double()
    model[0].weight.data *= 10
    infl = EkfacInfluence(model, functional.cross_entropy, 0.1).fit(pair(207))
    sides = {"test": pair(209), "x, y": pair(211)}
    sides[argument][0][71] = 1e308  # the first layer overflows; behind the samples looked at before
    assert infl.plan(sides["test"], sides["x, y"]).work.paired is not None
    with pytest.raises(DataError, match="sample 71"):
        infl.influences(*sides["test"], *sides["x, y"])


def test_what_is_made_of_a_layer_is_made_once_in_a_process() -> None:
    """Each task opens its own inverse, of tensors that the process holds."""
    tensors, values = Held("wide").infl._fitted.inverse.state()
    first, second = (EkfacInverse.from_state(tensors, values).form for _ in range(2))
    like = torch.empty(0, dtype=torch.float32)
    assert first.expansion(0, 0, like) is second.expansion(0, 0, like)
    assert all(one is two for one, two in zip(first.bases(0, like), second.bases(0, like), strict=True))
    other = EkfacInverse.from_state(tensors, {**values, "regularization": 0.5}).form
    assert other.expansion(0, 0, like) is not first.expansion(0, 0, like)
    assert torch.equal(other.bases(0, like)[0], first.bases(0, like)[0])
