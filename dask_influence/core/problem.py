"""Problem: an objective together with the derivative forms that were checked for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dask_influence.core.checks import check_loss
from dask_influence.core.derivatives import choose_forms, differentiation
from dask_influence.core.forms import Forms
from dask_influence.core.objective import Objective, Tree, leading_size


@dataclass(frozen=True)
class Problem:
    """What every computation below needs: ℓ(θ; z) and how to differentiate it.

    Attributes
    ----------
    objective : Objective
        Model, loss and θ.
    forms : Forms
        The form of each derivative that passed the check for this model.
    activations : int
        Elements that one forward pass keeps per sample; bounds how many vectors are
        pushed through the model at once.
    """

    objective: Objective
    forms: Forms
    activations: int = 1

    def block_of_vectors(self, samples: int, budget: int) -> int:
        """How many vectors fit ``budget`` bytes when pushed through ``samples`` samples at once.

        A derivative of first or second order keeps about six arrays as large as the
        activations, and one perturbed copy of θ, for each vector.
        """
        itemsize = self.objective.dtype.itemsize
        per_vector = 6 * itemsize * (samples * self.activations + self.objective.size)
        return max(1, int(budget // max(1, per_vector)))


def prepare(objective: Objective, x: Tree, y: Tree) -> tuple[Problem, dict[str, Any]]:
    """Check the loss and every derivative on a few samples; the second value is for diagnostics."""
    check_loss(objective, x, y)
    forms, report = choose_forms(objective, x, y)
    return Problem(objective, forms, activation_size(objective, x, y)), report


def with_mixed_form(problem: Problem, x: Tree, y: Tree) -> Problem:
    """The same problem with the form of the input gradient checked too, for perturbation mode."""
    forms, _ = choose_forms(problem.objective, x, y, perturbation=True)
    return Problem(problem.objective, forms, problem.activations)


def activation_size(objective: Objective, x: Tree, y: Tree) -> int:
    """Elements that the outputs of all layers hold for one sample."""
    elements = 0

    def count(module: nn.Module, arguments: Any, output: Any) -> None:
        nonlocal elements
        tensors = output if isinstance(output, (tuple, list)) else (output,)
        elements += sum(value.numel() for value in tensors if isinstance(value, Tensor))

    leaves = [module for module in objective.module.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(count) for module in leaves]
    try:
        with torch.no_grad(), differentiation():  # elementary forms: fused kernels would skip modules
            objective.outputs(objective.parameters(), x)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, elements // leading_size(y))
