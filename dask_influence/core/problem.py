"""Problem: an objective together with the derivative forms that were checked for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor, nn

from dask_influence.core.checks import check_loss, is_mean
from dask_influence.core.derivatives import choose_forms, differentiation
from dask_influence.core.forms import Forms, sample_gradients
from dask_influence.core.kept import Shelf
from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.core.sizes import bytes_of_a_vector, shares
from dask_influence.errors import DataError, DerivativeError, LossError

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
"""For which no sample and no dtype is to blame: memory is nobody's alone, and on a device that failed all fail."""


@dataclass(frozen=True)
class Pairing:
    """Layers whose gradient is known to be the product of inputs and output gradients (``core.pairs``).

    Attributes
    ----------
    layers : tuple of (str, int)
        Their paths, and their positions in one sample.
    sample : tuple of tuple of int
        Shapes of the leaves of that sample, without its leading axis.
    """

    layers: tuple[tuple[str, int], ...]
    sample: tuple[tuple[int, ...], ...]

    def fits(self, x: Tree) -> bool:
        """Whether the layers have these positions in samples ``x``: where a sequence is longer they have more."""
        return self.sample == tuple(tuple(leaf.shape[1:]) for leaf in optree.tree_leaves(x))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Pairing:
        """From what ``dataclasses.asdict`` makes of it, through JSON or not."""
        layers = tuple((str(path), int(positions)) for path, positions in values["layers"])
        return cls(layers, tuple(tuple(shape) for shape in values["sample"]))


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
    pairing : Pairing, optional
        Which layers may be taken in pairs; None where that is not known.
    matmul_precision : str
        In which its products are to be taken (``core.precision``).
    shelf : Shelf, optional
        What is kept of the samples at hand until the next pass; None where each pass begins anew.
    """

    objective: Objective
    forms: Forms
    activations: int = 1
    pairing: Pairing | None = None
    matmul_precision: str = "highest"
    shelf: Shelf | None = field(default=None, repr=False, compare=False)

    def pairs(self, x: Tree) -> bool:
        """Whether layers may be taken in pairs for samples ``x``."""
        return self.pairing is not None and self.pairing.fits(x)

    def block_of_vectors(self, samples: int, budget: int) -> int:
        """How many vectors fit ``budget`` bytes when pushed through ``samples`` samples at once.

        A derivative of first or second order keeps about six arrays as large as the
        activations, and one perturbed copy of θ, for each vector.
        """
        size, itemsize = self.objective.size, self.objective.dtype.itemsize
        per_vector = bytes_of_a_vector(samples, self.activations, size, itemsize)
        return max(1, int(budget // max(1, per_vector)))

    def shares(self, samples: int, vectors: int, budget: int) -> tuple[int, int]:
        """How many samples and vectors to multiply at once, which share a graph."""
        return shares(
            samples, vectors, self.activations, self.objective.size, self.objective.dtype.itemsize, budget
        )


def prepare(objective: Objective, x: Tree, y: Tree) -> tuple[Problem, dict[str, Any]]:
    """Check the loss and every derivative on a few samples; the second value is for diagnostics."""
    check_loss(objective, x, y)
    try:
        forms, report = choose_forms(objective, x, y)
    except DerivativeError:
        check_gradients(
            objective, x, y
        )  # a sample at which the loss has no gradient is no fault of the model
        raise
    return Problem(objective, forms, activation_size(objective, x, y)), report


def behaviour(objective: Objective, x: Tree, y: Tree) -> list[str]:
    """Loss and gradient norm of a few samples, to six digits: tells losses and models of one name apart.

    Computed in float64, so that the digits are the same on every machine, but for models
    that insist on a narrower dtype, of which two digits count.
    """
    few = slice(0, 4)
    x, y = sliced(x, few), sliced(y, few)
    try:
        return _behaviour(objective.to(dtype=torch.float64), _as_double(x), _as_double(y), ".6e")
    except RuntimeError:
        return _behaviour(objective, x, y, ".1e")


def _behaviour(objective: Objective, x: Tree, y: Tree, digits: str) -> list[str]:
    with torch.no_grad(), differentiation():
        losses = objective.sample_losses(objective.parameters(), x, y)
    norms = [
        sample_gradients(objective, sliced(x, one), sliced(y, one), Forms(gradient="loop")).norm()
        for one in (slice(j, j + 1) for j in range(len(losses)))
    ]
    return [format(value.item(), digits) for value in (*losses, *norms)]


def _as_double(tree: Tree) -> Tree:
    return optree.tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def check_gradients(objective: Objective, x: Tree, y: Tree, argument: str = "train", start: int = 0) -> None:
    """Refuse losses and gradients that are NaN or infinite, naming the sample and what it is a gradient of.

    Raises
    ------
    DataError
        Naming ``argument`` and the first such sample, counted from ``start``.
    """
    for j in range(leading_size(y)):
        one = slice(j, j + 1)
        gradient = sample_gradients(objective, sliced(x, one), sliced(y, one), Forms(gradient="loop"))
        if not gradient.isfinite().all():
            raise DataError(
                f"{argument}: the gradient of sample {start + j} is not finite; look at its loss and its inputs, "
                "or leave the sample out"
            )


def check_losses(problem: Problem, x: Tree, y: Tree, argument: str, start: int) -> None:
    """Refuse losses that are NaN or infinite, or that do not average to that of the chunk.

    Samples are counted from ``start``. The first samples of the data have passed :func:`check_loss`;
    class weights, say, show where classes meet.

    Raises
    ------
    DataError
        Names the first sample whose loss is not finite.
    LossError
        Names the samples of which the loss is no mean.
    """
    objective = problem.objective
    with torch.no_grad(), differentiation():
        outputs = objective.outputs(objective.parameters(), x)
        losses, whole = objective.losses(outputs, y), objective.loss(outputs, y)
    bad = ~losses.isfinite()
    if bad.any():
        first = int(bad.nonzero()[0])
        raise DataError(
            f"{argument}: the loss of sample {start + first} is {losses[first].item()}; look at its inputs and "
            "its target, or leave the sample out"
        )
    if not is_mean(whole, losses):
        raise LossError(
            f"loss is not a mean over samples {start} to {start + len(losses) - 1} of {argument}: it is "
            f"{whole:.6g} for them, and their own losses average {losses.mean():.6g} (class weights, ignore_index "
            "or a mean over a varying number of tokens weigh samples unequally)"
        )


def with_mixed_form(problem: Problem, x: Tree, y: Tree) -> Problem:
    """The same problem with the form of the input gradient checked too, for perturbation mode."""
    forms, _ = choose_forms(problem.objective, x, y, perturbation=True)
    return replace(problem, forms=replace(forms, compiled=problem.forms.compiled))


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
