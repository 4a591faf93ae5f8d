"""Compiled derivatives: traced right, in pieces of any batch, and honest where they cannot be compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dask_influence.core import compiled, forms
from dask_influence.core.compiled import check_compiler, pieces
from dask_influence.core.forms import Forms
from dask_influence.core.objective import Objective
from dask_influence.core.options import compiled_errors
from dask_influence.core.problem import Problem, prepare
from dask_influence.errors import ConfigurationError
from tests import oracles

KINDS = ("gradient", "directional", "product")


class Fenced(nn.Module):
    """Asks for the value of a parameter, which no trace knows; ``vmap`` and ``grad`` do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (self.scale if self.scale.item() > 0 else 1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Traces run as they are, without the compiler; the list holds each one's inputs."""
    made: list[Any] = []

    def keep(graph: Any, inputs: Any, options: Any) -> Any:
        made.append([tuple(leaf.shape) for leaf in inputs])
        return graph

    monkeypatch.setattr("torch._inductor.compile", keep)
    return made


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, 3)
    )


def problem_of(model: nn.Module, count: int, *shape: int) -> tuple[Problem, Tensor, Tensor]:
    x, y = torch.randn(count, *shape).double(), torch.randint(0, 3, (count,))
    return prepare(Objective.of(model.double(), nn.functional.cross_entropy), x, y)[0], x, y


@given(st.integers(0, 3000), st.integers(1, 20))
def test_pieces_cover_a_batch_in_order_and_few_lengths(count: int, least: int) -> None:
    found = list(pieces(count, least))
    assert [i for part, _ in found for i in range(part.start, part.stop)] == list(range(count))
    lengths = {part.stop - part.start for part, known in found if known}
    assert all(length in {least * 4**k for k in range(12)} for length in lengths)
    assert all(part.stop - part.start < least for part, known in found if not known)


@pytest.mark.parametrize(("samples", "directions"), [(3, 7), (16, 1), (23, 4), (37, 7)])
def test_derivatives_are_those_without_the_compiler(graphs: list[Any], samples: int, directions: int) -> None:
    problem, x, y = problem_of(convolution(), samples, 1, 3, 3)
    objective, plain = problem.objective, problem.forms
    assert all(getattr(plain, kind) in forms.COMPILABLE[kind] for kind in KINDS)
    vectors = torch.randn(directions, objective.size).double()

    def derivatives(own: Forms) -> list[Tensor]:
        return [
            forms.sample_gradients(objective, x, y, own),
            forms.directional_derivatives(objective, x, y, vectors, own),
            forms.products(objective, x, y, vectors, own),
        ]

    expected = derivatives(plain)
    for _ in range(2):
        for found, right in zip(derivatives(replace(plain, compiled=KINDS)), expected, strict=True):
            assert found.shape == right.shape
            assert oracles.relative_error(found, right) <= 1e-12
    programs = compiled._PROGRAMS.get(objective.module, {})
    kinds = 0 if samples < compiled.SAMPLES else 1 if directions < compiled.VECTORS else 3
    assert len({function for function, *_ in programs}) == kinds
    assert len(graphs) == len(programs)  # each traced once


@pytest.mark.usefixtures("graphs")
def test_a_program_does_not_take_the_place_of_another() -> None:
    """Another θ of the same module, another layout in memory, other values: the numbers are their own."""
    problem, x, y = problem_of(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), 32, 4)
    whole = problem.objective
    part = Objective(whole.module, whole.loss, ("2.weight", "2.bias"))
    own = Forms(compiled=("gradient",))
    strided = torch.randn(4, 32).double().T
    for objective, inputs in [(whole, x), (part, x), (whole, strided), (part, 2 * x), (whole, x)]:
        expected = forms.sample_gradients(objective, inputs, y, Forms())
        found = forms.sample_gradients(objective, inputs, y, own)
        assert oracles.relative_error(found, expected) <= 1e-12


@pytest.mark.usefixtures("graphs")
def test_samples_at_fault_say_so_in_the_words_of_the_model() -> None:
    problem, x, y = problem_of(nn.Linear(4, 3), 16, 4)
    own = Forms(compiled=("gradient",))
    y[5] = 17
    with pytest.raises((RuntimeError, IndexError), match="17") as plain:
        forms.sample_gradients(problem.objective, x, y, Forms())
    with pytest.raises(type(plain.value), match="17"):
        forms.sample_gradients(problem.objective, x, y, own)


def test_a_model_that_cannot_be_traced_is_named_with_the_reason() -> None:
    problem, x, y = problem_of(Fenced(), 20, 3)
    assert problem.forms.gradient == "vmap"
    with pytest.raises(ConfigurationError, match=r"torch cannot compile a derivative .*; use compile=False"):
        forms.sample_gradients(problem.objective, x, y, Forms(compiled=("gradient",)))
    found = compiled_errors(problem, x, y)
    assert found.kinds == ()
    assert found.errors == {}
    assert set(found.failures) == {
        kind for kind in KINDS if getattr(problem.forms, kind) in forms.COMPILABLE[kind]
    }


@pytest.mark.usefixtures("graphs")
def test_chains_and_few_samples_need_no_compiler() -> None:
    problem, x, y = problem_of(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), 40, 4)
    assert problem.forms.gradient == problem.forms.product == "chain"
    found = compiled_errors(problem, x, y)
    assert found.kinds == ("directional",)
    assert all("chain" in found.skipped[kind] for kind in ("gradient", "product"))
    assert max(found.errors.values()) <= 1e-12
    assert set(compiled_errors(problem, x[:15], y[:15]).skipped) == set(KINDS)


def test_a_compiler_that_is_missing_or_does_not_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cpp_builder

    cpu = torch.device("cpu")
    try:
        check_compiler(cpu)
    except ConfigurationError:
        pytest.skip("no compiler on this machine")
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\ncase $1 in --version) echo g++;; *) echo no headers >&2; exit 1;; esac\n")
    broken.chmod(0o755)
    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigurationError, match=r"none that work .*no headers.*compile=False"):
            check_compiler(cpu)
        broken.unlink()
        cpp_builder.cpp_compiler_search.cache_clear()
        with pytest.raises(ConfigurationError, match=r"needs a C\+\+ compiler"):
            check_compiler(cpu)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


def test_torch_compiles_it() -> None:
    """The compiler itself, of one small program: one of the slower tests."""
    try:
        check_compiler(torch.device("cpu"))
    except ConfigurationError as lacking:
        pytest.skip(str(lacking))
    problem, x, y = problem_of(nn.Linear(4, 3), 19, 4)
    expected = forms.sample_gradients(problem.objective, x, y, Forms())
    found = forms.sample_gradients(problem.objective, x, y, Forms(compiled=("gradient",)))
    assert oracles.relative_error(found, expected) <= 1e-12
    (program,) = compiled._PROGRAMS[problem.objective.module].values()
    assert not isinstance(program, torch.fx.GraphModule)
