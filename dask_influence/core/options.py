"""What compiled programs and products of rounded operands cost in accuracy, on a few samples before a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dask_influence.core import compiled, forms
from dask_influence.core.curvature import PRODUCTS
from dask_influence.core.objective import Tree, leading_size, sliced
from dask_influence.core.precision import matmul_precision
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError

SAMPLES = 4 * compiled.SAMPLES
"""Samples that are looked at, where there are as many and their gradients take no more than :data:`BUDGET`."""

BUDGET = 256 * 2**20

_POWER_STEPS = 8


@dataclass(frozen=True)
class Compiled:
    """Which derivatives torch can compile for a model.

    Attributes
    ----------
    kinds : tuple of str
        Those that it can.
    errors : dict
        How far they are from those without the compiler, relative, by kind.
    skipped : dict
        Why others need not be compiled, by kind.
    failures : dict
        Why torch cannot compile the rest.
    """

    kinds: tuple[str, ...]
    errors: dict[str, float]
    skipped: dict[str, str]
    failures: dict[str, str]


@dataclass(frozen=True)
class Rounded:
    """What rounded operands make of the derivatives of a model.

    Attributes
    ----------
    errors : dict
        How far each is from that with operands of float32, relative: ``"gradient"``, ``"directional"`` and
        ``"product"``, those with the curvature.
    largest : float
        Magnitude of the largest eigenvalue of the samples' curvature, estimated.
    """

    errors: dict[str, float]
    largest: float


def compiled_errors(problem: Problem, x: Tree, y: Tree) -> Compiled:
    """Compile each derivative whose form allows it, and compare.

    Examples
    --------
    >>> from dask_influence.core.objective import Objective
    >>> from dask_influence.core.problem import prepare
    >>> x, y = torch.ones(5, 2), torch.zeros(5, 1)
    >>> problem, _ = prepare(Objective.of(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss), x, y)
    >>> compiled_errors(problem, x, y).skipped["directional"]
    '5 samples are too few: the smallest program takes 16'
    """
    kinds, errors = list[str](), dict[str, float]()
    skipped, failures = dict[str, str](), dict[str, str]()
    for kind, derivative in _derivatives(problem, "hessian").items():
        form = getattr(problem.forms, kind)
        count = _count(problem, x, kind)
        if form not in forms.COMPILABLE[kind]:
            skipped[kind] = f"its form {form!r} has nothing to compile"
        elif count < compiled.SAMPLES:
            skipped[kind] = f"{count} samples are too few: the smallest program takes {compiled.SAMPLES}"
        else:
            own = replace(problem, forms=replace(problem.forms, compiled=(kind,)))
            part = sliced(x, slice(count)), sliced(y, slice(count))
            try:
                with matmul_precision("highest"):
                    errors[kind] = _relative(derivative(own, *part), derivative(problem, *part))
            except ConfigurationError as error:  # of a model that torch cannot compile
                failures[kind] = str(error)
            else:
                kinds.append(kind)
    return Compiled(tuple(kinds), errors, skipped, failures)


def rounding_errors(problem: Problem, x: Tree, y: Tree, curvature: str, precision: str) -> Rounded:
    """Each derivative in ``precision``, beside the same with operands of float32."""
    errors = {}
    for kind, derivative in _derivatives(problem, curvature).items():
        part = tuple(sliced(tree, slice(max(1, _count(problem, x, kind)))) for tree in (x, y))
        with matmul_precision("highest"):
            full = derivative(problem, *part)
        with matmul_precision(precision):
            errors[kind] = _relative(derivative(problem, *part), full)
    return Rounded(errors, _largest(problem, x, y, curvature))


def _derivatives(problem: Problem, curvature: str) -> dict[str, Callable[[Problem, Tree, Tree], Tensor]]:
    """Each kind along a few random directions, as functions of problem and samples."""
    objective = problem.objective
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(compiled.VECTORS, objective.size, generator=generator)
    vectors = (vectors / vectors.norm(dim=1, keepdim=True)).to(objective.device, objective.dtype)

    def directional(own: Problem, x: Tree, y: Tree) -> Tensor:
        return forms.directional_derivatives(own.objective, x, y, vectors, own.forms)

    return {
        "gradient": lambda own, x, y: forms.sample_gradients(own.objective, x, y, own.forms),
        "directional": directional,
        "product": lambda own, x, y: PRODUCTS[curvature](own, x, y, vectors),
    }


def _count(problem: Problem, x: Tree, kind: str) -> int:
    """Samples to look at; gradients only as fit the budget, in runs that have a program."""
    objective, count = problem.objective, min(SAMPLES, leading_size(x))
    if kind == "gradient":
        count = min(count, BUDGET // (objective.size * objective.dtype.itemsize))
    runs = [part.stop for part, known in compiled.pieces(count, compiled.SAMPLES) if known]
    return runs[0] if runs else count


def _largest(problem: Problem, x: Tree, y: Tree, curvature: str) -> float:
    """By power iteration with the curvature of the mean loss."""
    objective, count = problem.objective, leading_size(y)
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(1, objective.size, generator=generator).to(objective.device, objective.dtype)
    value = 0.0
    with matmul_precision("highest"):
        for _ in range(_POWER_STEPS):
            vector = vector / vector.norm().clamp_min(torch.finfo(objective.dtype).tiny)
            vector = PRODUCTS[curvature](problem, x, y, vector) / count
            value = float(vector.norm())
    return value


def _relative(found: Tensor, expected: Tensor) -> float:
    difference, scale = float((found - expected).double().norm()), float(expected.double().norm())
    return difference / scale if scale else difference
