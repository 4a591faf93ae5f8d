"""Derivatives that are right: the forms of each, and the check that chooses among them before a fit.

The floor's public face: :class:`Forms` and its evaluation live in ``forms``, the elementary
operations in ``elementary``; here is what decides which form a model gets.

No derivative is trusted unchecked. A few samples are run in float64 through each derivative
that the run will use:

- per-sample gradients G against central differences of the losses, taken with torch's fused
  kernels, so that the elementary forms are checked as well;
- the gradient of their sum, the same way: later differences are taken of it;
- directional derivatives against G·v;
- Hessian-vector products against central differences of the summed gradient, and ⟨u, H v⟩ = ⟨v, H u⟩;
- ∇x ℓ against differences of the losses, and mixed derivatives against differences of ∇x ℓ in θ.

Padding rows of embeddings are constants to autograd, and to the differences as well.

The first form that passes, in the order of ``forms.FORMS``, is the one the run takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dask_influence.core.elementary import differentiation, fused
from dask_influence.core.forms import (
    DIRECTIONAL,
    FORMS,
    GRADIENT,
    MIXED,
    PRODUCT,
    Forms,
    directional_derivatives,
    input_leaf,
    mixed_derivatives,
    products,
    sample_gradients,
    total_gradient,
    total_input_gradient,
    with_input,
)
from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.errors import DerivativeError

__all__ = [
    "Forms",
    "choose_forms",
    "differentiation",
    "directional_derivatives",
    "input_leaf",
    "mixed_derivatives",
    "products",
    "sample_gradients",
]

SAMPLES = 4
"""Samples that the check looks at; half as many where P is so large that gradients weigh."""

_LARGE = 10**6

_LABELS = {
    "gradient": "the per-sample gradient",
    "directional": "the directional derivative",
    "product": "the Hessian-vector product",
    "input": "the gradient in the input",
    "mixed": "the input gradient of the directional derivative",
}


def choose_forms(
    objective: Objective, x: Tree, y: Tree, *, perturbation: bool = False
) -> tuple[Forms, dict[str, Any]]:
    """The form of each derivative that agrees with finite differences on a few samples.

    Parameters
    ----------
    objective : Objective
        Model, loss and θ, in any floating dtype; the check works on a float64 copy.
    x, y : tree of Tensor
        Batched samples; the first four are used.
    perturbation : bool
        Check the derivatives in the input as well.

    Returns
    -------
    Forms
        What to pass to the functions of this module.
    dict
        JSON-able: the dtype and number of samples of the check and, for each derivative, the
        form taken, its relative error and why earlier forms were rejected.

    Raises
    ------
    DerivativeError
        Where no form of a derivative passes; names the module.
    ConfigurationError
        Where ``perturbation`` is asked for and x has not exactly one floating tensor.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    >>> objective = Objective.of(net, nn.functional.mse_loss)
    >>> forms, report = choose_forms(objective, torch.randn(5, 3), torch.randn(5, 4))
    >>> forms.product, report["product"]["error"] < 1e-5
    ('reverse_over_reverse', True)
    """
    if perturbation:
        input_leaf(x)
    kinds = ("gradient", "directional", "product", *(("input", "mixed") if perturbation else ()))
    with differentiation(), torch.no_grad():
        few = slice(SAMPLES if objective.size <= _LARGE else SAMPLES // 2)
        exact = _in_double(objective, sliced(x, few), sliced(y, few))
        points = _Points(exact)
        report: dict[str, Any] = {
            "dtype": str(exact.objective.dtype).removeprefix("torch."),
            "samples": leading_size(exact.y),
        }
        chosen = Forms()
        for kind in kinds:
            found = _first_that_passes(kind, points, chosen)
            if found.form is None:
                raise DerivativeError(_refusal(kind, found, exact))
            report[kind] = found.report()
            if kind in FORMS:
                own: dict[str, Any] = {kind: found.form}
                chosen = replace(chosen, **own)
    return chosen, report


# -- where the check is made -----------------------------------------------------------
@dataclass(frozen=True)
class _Precision:
    """How finely differences can be told from derivatives in one floating dtype.

    ``steps`` are relative to ‖θ‖. In float64 the small ones come first: they rarely step over
    the kink of a ReLU, and 1e-6 still resolves 1e-9. The large ones serve models that compute
    in float32 inside, and saturated losses, where small steps drown in rounding.
    """

    dtype: torch.dtype
    steps: tuple[float, ...]
    tolerance: float
    doubtful: float

    @property
    def noise(self) -> float:
        return 50 * torch.finfo(self.dtype).eps


_FINE = _Precision(torch.float64, (1e-6, 1e-7, 1e-8, 1e-4, 1e-3, 1e-2), 1e-5, 2e-3)
_COARSE = _Precision(torch.float32, (5e-3, 1e-3, 2e-2), 2e-3, 1e-2)


@dataclass(frozen=True)
class _Point:
    """A few samples and a θ at which to compare derivatives with differences."""

    objective: Objective
    theta: Tensor  # (P,)
    x: Tree
    y: Tree
    precision: _Precision

    def losses(self, theta: Tensor, x: Tree) -> Tensor:
        """Per-sample losses by the fused kernels, (n,)."""
        with fused():
            return self.objective.sample_losses(self.objective.unflatten(theta), x, self.y)

    @cached_property
    def directions(self) -> Tensor:
        """Two random directions, each about as long as θ, (2, P)."""
        return torch.stack([_random_like(self.theta, seed) for seed in (1, 2)])

    @cached_property
    def _projected(self) -> dict[str, Tensor]:
        return {}

    def projected(self, form: str) -> Tensor:
        """Per-sample gradients in ``form`` along the two directions, (n, 2)."""
        if form not in self._projected:
            rows = GRADIENT[form](self.objective, self.objective.unflatten(self.theta), self.x, self.y)
            self._projected[form] = rows @ self.directions.T
        return self._projected[form]

    @cached_property
    def steps(self) -> Tensor:
        """The two directions without the padding rows of embeddings, (2, P), for differences in θ.

        Autograd holds those rows fixed (``nn.Embedding.padding_idx``), so differences must too;
        but not where another layer uses the same weight, and gives them a gradient. Derivatives
        are taken along the whole directions all the same: a form that lets the entries of
        padding rows through disagrees.
        """
        padding, _ = _padding(self.objective)
        if not padding.any():
            return self.directions
        return self.directions.masked_fill(padding & (self.gradient(self.theta) == 0), 0.0)

    def gradient(self, theta: Tensor) -> Tensor:
        """Gradient of the summed loss, (P,)."""
        return total_gradient(self.objective, self.objective.unflatten(theta), self.x, self.y)

    def input_gradient(self, theta: Tensor) -> Tensor:
        return total_input_gradient(self.objective, self.objective.unflatten(theta), self.x, self.y)


def _padding(objective: Objective) -> tuple[Tensor, list[str]]:
    """Entries of θ, (P,), in padding rows of embeddings, and the paths of those embeddings."""
    held = dict(objective.module.named_parameters())
    mask = {name: torch.zeros_like(held[name], dtype=torch.bool) for name in objective.names}
    paths = []
    for path, module in objective.module.named_modules():
        if not isinstance(module, nn.Embedding) or module.padding_idx is None:
            continue
        for name, rows in mask.items():
            if held[name] is module.weight:
                rows[module.padding_idx] = True
                paths.append(path)
    return objective.flatten(mask), paths


def _random_like(tensor: Tensor, seed: int, least: float = 0.01) -> Tensor:
    """Normal numbers with the root mean square of ``tensor``, but at least ``least``."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
    size = tensor.square().mean().sqrt().clamp(min=least) if tensor.numel() else 0.0
    return normal * size


@dataclass(frozen=True)
class _Points:
    """Where to check, in order: beside the given θ and x, then at half of θ.

    Beside, because the given ones may sit exactly on kinks (zero pixels under zero biases, ties
    in pooling), where differences and derivatives rightly disagree. Half of θ takes a saturated
    classifier back to where its derivatives stand out of rounding.
    """

    exact: _Point

    def __iter__(self) -> Iterator[_Point]:
        yield self.beside
        yield self.halved

    @cached_property
    def beside(self) -> _Point:
        exact = self.exact
        theta = exact.theta + 1e-3 * _random_like(exact.theta, 11)
        return self._finite(replace(exact, theta=theta, x=optree.tree_map(_moved, exact.x)))

    @cached_property
    def halved(self) -> _Point:
        return self._finite(replace(self.beside, theta=self.beside.theta / 2))

    def _finite(self, point: _Point) -> _Point:
        """The point, or the given one where the loss is not defined there."""
        return point if point.losses(point.theta, point.x).isfinite().all() else self.exact


def _moved(leaf: Tensor) -> Tensor:
    return leaf + 1e-3 * _random_like(leaf, 12) if leaf.is_floating_point() else leaf


def _in_double(objective: Objective, x: Tree, y: Tree) -> _Point:
    """The check's own copy: float64, or as it is where the model insists on its own dtype."""
    double = objective.to(dtype=torch.float64)
    point = _Point(double, double.flatten(double.parameters()), _doubled(x), _doubled(y), _FINE)
    try:
        point.losses(point.theta, point.x)
    except (RuntimeError, TypeError, ValueError):  # tensors of a fixed dtype made in forward
        coarse = replace(_COARSE, dtype=objective.dtype)
        point = _Point(objective, objective.flatten(objective.parameters()), x, y, coarse)
    return point


def _doubled(tree: Tree) -> Tree:
    """Floating leaves in float64; all of them fresh, because autograd refuses inference tensors."""
    return optree.tree_map(
        lambda a: a.to(torch.float64 if a.is_floating_point() else a.dtype, copy=True), tree
    )


# -- agreement -------------------------------------------------------------------------
@dataclass(frozen=True)
class _Verdict:
    """Whether a derivative agrees with what it was compared to, and its relative error."""

    passed: bool
    error: float


def _compare(value: Tensor, path: Callable[[float], Tensor], precision: _Precision) -> _Verdict:
    """``value`` as the derivative of ``path`` at 0, against central differences.

    A step that went over a kink or drowned in rounding differs from its half: a form is
    rejected only when no step agrees with it, and a step that doubts itself by more than
    ``precision.doubtful`` agrees with nothing.
    """
    best = float("inf")
    magnitude = float(path(0.0).norm())
    for step in precision.steps:
        difference = _central(path, step)
        scale = float(torch.maximum(value.norm(), difference.norm()))
        error = float((value - difference).norm())
        relative = error / scale if scale else 0.0
        if error <= precision.tolerance * scale + precision.noise * magnitude / step:
            return _Verdict(True, relative)
        if error <= 2 * precision.doubtful * scale:
            doubt = float((difference - _central(path, step / 2)).norm())
            if doubt <= precision.doubtful * scale and error <= 2 * doubt:
                return _Verdict(True, relative)
        best = min(best, relative) if relative == relative else best  # NaN compares with nothing
    return _Verdict(False, best)


def _central(path: Callable[[float], Tensor], step: float) -> Tensor:
    return (path(step) - path(-step)) / (2 * step)


def _gradient_verdict(point: _Point, form: str, _chosen: Forms) -> _Verdict:
    direction = point.steps[0]
    total = point.gradient(point.theta) @ point.directions[0]
    value = torch.cat([point.projected(form)[:, 0], total.reshape(1)])

    def losses(t: float) -> Tensor:
        each = point.losses(point.theta + t * direction, point.x)
        return torch.cat([each, each.sum().reshape(1)])

    return _compare(value, losses, point.precision)


def _directional_verdict(point: _Point, form: str, chosen: Forms) -> _Verdict:
    if form == "gradients":
        return _Verdict(True, 0.0)
    expected = point.projected(chosen.gradient)
    named = point.objective.unflatten(point.theta)
    value = DIRECTIONAL[form](point.objective, named, point.x, point.y, point.directions)
    scale = float(torch.maximum(value.norm(), expected.norm()))
    error = float((value - expected).norm()) / scale if scale else 0.0
    return _Verdict(error <= point.precision.tolerance, error)


def _product_verdict(point: _Point, form: str, _chosen: Forms) -> _Verdict:
    u, v = point.directions
    named = point.objective.unflatten(point.theta)
    of_u, of_v = PRODUCT[form](point.objective, named, point.x, point.y, point.directions)
    lengths = float(u.norm() * of_v.norm() + v.norm() * of_u.norm())
    asymmetry = float((u @ of_v - v @ of_u).abs()) / lengths if lengths else 0.0
    both = point.steps.sum(0)  # one difference for both products
    verdict = _compare(of_u + of_v, lambda t: point.gradient(point.theta + t * both), point.precision)
    symmetric = asymmetry <= point.precision.tolerance
    return _Verdict(verdict.passed and symmetric, max(verdict.error, asymmetry))


def _input_verdict(point: _Point, _form: str, _chosen: Forms) -> _Verdict:
    leaf = input_leaf(point.x)
    direction = _random_like(leaf, 3)
    value = (point.input_gradient(point.theta) * direction).flatten(1).sum(1)

    def losses(t: float) -> Tensor:
        return point.losses(point.theta, with_input(point.x, leaf + t * direction))

    return _compare(value, losses, point.precision)


def _mixed_verdict(point: _Point, form: str, _chosen: Forms) -> _Verdict:
    named = point.objective.unflatten(point.theta)
    value = MIXED[form](point.objective, named, point.x, point.y, point.directions).sum(1)
    direction = point.steps.sum(0)
    return _compare(value, lambda t: point.input_gradient(point.theta + t * direction), point.precision)


_VERDICTS: dict[str, Callable[[_Point, str, Forms], _Verdict]] = {
    "gradient": _gradient_verdict,
    "directional": _directional_verdict,
    "product": _product_verdict,
    "input": _input_verdict,
    "mixed": _mixed_verdict,
}


# -- selection -------------------------------------------------------------------------
@dataclass(frozen=True)
class _Found:
    """The form that passed, or None, with what happened to the ones before it."""

    form: str | None
    error: float
    rejected: dict[str, str]

    def report(self) -> dict[str, Any]:
        return {"form": self.form, "error": self.error, "rejected": self.rejected}


def _first_that_passes(kind: str, points: _Points, chosen: Forms) -> _Found:
    rejected: dict[str, str] = {}
    for form in FORMS.get(kind, ("reverse",)):
        try:
            verdict = _best_verdict(kind, form, points, chosen)
        except Exception as failure:  # noqa: BLE001 - the user's own code runs in here
            rejected[form] = f"raises {type(failure).__name__}: {_first_line(failure)}"
            continue
        if verdict.passed:
            return _Found(form, verdict.error, rejected)
        rejected[form] = _reason(verdict.error)
    return _Found(None, float("inf"), rejected)


def _best_verdict(kind: str, form: str, points: _Points, chosen: Forms) -> _Verdict:
    """The verdict at the first point where the form passes, else the one with the least error."""
    verdicts = []
    for point in points:
        verdicts.append(_VERDICTS[kind](point, form, chosen))
        if verdicts[-1].passed:
            return verdicts[-1]
    return min(verdicts, key=lambda verdict: verdict.error)


def _reason(error: float) -> str:
    if error == float("inf"):
        return "is not finite"
    return f"is off by {error:.1%}" if error > 1e-3 else f"is off by {error:.0e}"


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [""])[0][:200]


# -- who is to blame -------------------------------------------------------------------
def _refusal(kind: str, found: _Found, point: _Point) -> str:
    reasons = "; ".join(f"{form} {reason}" for form, reason in found.rejected.items())
    _, padded = _padding(point.objective)
    tied = (
        f". Embedding {', '.join(map(repr, padded))} has a padding_idx, which keeps part of the gradient from the "
        "padding row if another layer is tied to its weight; then remove padding_idx, or untie the weights"
    )
    return (
        f"{_LABELS[kind]} of {_culprit(kind, point)} agrees with finite differences in no form ({reasons}). "
        "Write that part in elementary operations, replace it, or, where nothing before it is in θ, "
        f"leave its own parameters out with parameters={tied if padded else ''}"
    )


def _culprit(kind: str, point: _Point) -> str:
    """The innermost module whose derivative fails alone, at the inputs that it meets here."""
    for name, module, arguments in _calls(point):
        if _fails_alone(kind, module, arguments, point):
            return (
                f"module {name!r} ({type(module).__name__})"
                if name
                else f"the model ({type(module).__name__})"
            )
    return f"the loss {getattr(point.objective.loss, '__name__', type(point.objective.loss).__name__)!r}"


def _calls(point: _Point) -> Iterator[tuple[str, nn.Module, Any]]:
    """Each module with the arguments of its first call, innermost modules first."""
    met: dict[nn.Module, Any] = {}

    def remember(module: nn.Module, args: Any, kwargs: Any) -> None:
        met.setdefault(module, pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs)))

    modules = dict(point.objective.module.named_modules())
    hooks = [module.register_forward_pre_hook(remember, with_kwargs=True) for module in modules.values()]
    try:
        point.objective.outputs(point.objective.unflatten(point.theta), point.x)
    finally:
        for hook in hooks:
            hook.remove()
    depth = {name: name.count(".") + bool(name) for name in modules}
    for name in sorted(modules, key=lambda n: -depth[n]):
        if modules[name] in met:
            yield name, modules[name], met[modules[name]]


def _fails_alone(kind: str, module: nn.Module, arguments: Any, point: _Point) -> bool:
    probe = _Probe(module, arguments, point.objective.dtype)
    y = torch.zeros(1, 1, dtype=point.objective.dtype, device=point.objective.device)
    try:
        points = _Points(_in_double(Objective.of(probe, _probe_loss), probe.inputs(), y))
        gradient = _first_that_passes("gradient", points, Forms())
    except Exception:  # noqa: BLE001 - a module that cannot be called alone is not the one to name
        return False
    if gradient.form is None or kind in ("gradient", "input"):
        return gradient.form is None
    return _first_that_passes(kind, points, Forms(gradient=gradient.form)).form is None


class _Probe(nn.Module):
    """One module at given arguments, as a model of one sample: those arguments, flattened.

    Each floating argument is also shifted by a parameter, so that derivatives in θ include
    those that reach the module from above.
    """

    def __init__(self, module: nn.Module, arguments: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype
        self.leaves, structure = pytree.tree_flatten(arguments)
        # In a closure, because copying a module must not copy the structure: torch's own warns.
        self.rebuild = lambda leaves: pytree.tree_unflatten(leaves, structure)
        self.floating = [
            i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        self.shifts = nn.ParameterList([torch.zeros_like(self.leaves[i]) for i in self.floating])

    def inputs(self) -> Tensor:
        """The floating arguments as one row, (1, K)."""
        flat = [self.leaves[i].reshape(-1) for i in self.floating]
        return torch.cat(flat).unsqueeze(0) if flat else torch.zeros(1, 0, dtype=self.dtype)

    def forward(self, row: Tensor) -> Tensor:
        leaves = list(self.leaves)
        parts = row[0].split([shift.numel() for shift in self.shifts]) if self.floating else ()
        for i, part, shift in zip(self.floating, parts, self.shifts, strict=True):
            leaves[i] = part.reshape(shift.shape) + shift
        args, kwargs = self.rebuild(leaves)
        output = pytree.tree_leaves(self.module(*args, **kwargs))
        kept = [o.reshape(-1) for o in output if isinstance(o, Tensor) and o.is_floating_point()]
        return torch.cat(kept).unsqueeze(0)


def _probe_loss(output: Tensor, target: Tensor) -> Tensor:
    """A generic function of all outputs, with a first and a second derivative in each."""
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype, device=output.device))
    return (weights * output + output.square() / 2).sum() + 0 * target.sum()
