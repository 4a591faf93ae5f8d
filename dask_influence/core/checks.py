"""Whether model and loss are what the mathematics assumes: a mean over independent samples.

Everything downstream rests on ℓ(θ; batch) = 1/n Σ_j ℓ(θ; z_j). :func:`check_loss` runs a few
samples forward, no derivative, and refuses by name what breaks that.
"""

from __future__ import annotations

import warnings
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from dask_influence.core.elementary import differentiation, fused
from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.errors import ConfigurationError, DataError, LossError, SampleMixingError

_BATCH = 64
"""Samples that the loss is checked on."""

SEEDS = (0, 2**64 - 1)
"""The least and the largest seed; torch takes negative ones too, each for another name of a large one."""

_ALONE = 3
"""Samples that are also run through the model one at a time."""


def check_loss(objective: Objective, x: Tree, y: Tree) -> None:
    """Refuse a loss that is not the mean of per-sample losses, or a model that mixes samples.

    Parameters
    ----------
    objective : Objective
        Model, loss and θ.
    x, y : tree of Tensor
        Batched samples on the objective's device; at most 64 are looked at.

    Raises
    ------
    DataError
        Where the model does not take x, the loss does not take the dtype of y, or the loss is
        NaN or infinite; names the argument, or the samples.
    LossError
        Where the loss is no scalar tensor, is summed, or is not a mean over samples.
    SampleMixingError
        Where the output for one sample depends on the other samples; names the module.
    ConfigurationError
        Where the model gives another output when called again, or is of a kind that cannot be
        differentiated in its parameters.

    Examples
    --------
    >>> objective = Objective.of(nn.Linear(2, 1), nn.MSELoss(reduction="sum"))
    >>> check_loss(objective, torch.ones(3, 2), torch.zeros(3, 1))
    Traceback (most recent call last):
    dask_influence.errors.LossError: loss is a sum over samples; use reduction='mean'
    """
    check_kind(objective.module)
    samples = leading_size(y)
    x, y = _few(x, y)
    with differentiation(), fused(), torch.no_grad():
        output = _output(objective, x)
        value = _scalar(objective, output, y)
        _check_repeatable(objective, x, output)
        _check_mean(objective, y, output, value, samples)
        _check_independent(objective, x, output)


def check_samples(objective: Objective, x: Tree, y: Tree) -> None:
    """Refuse other samples that :func:`check_loss` would refuse, of an objective that has passed it.

    One forward pass: that the model is repeatable and keeps samples apart is known of the model,
    and only what depends on x and y is looked at.

    Parameters
    ----------
    objective, x, y
        As for :func:`check_loss`.

    Raises
    ------
    DataError, LossError
        As :func:`check_loss` does.

    Examples
    --------
    >>> objective = Objective.of(nn.Linear(2, 1), nn.MSELoss())
    >>> check_samples(objective, torch.ones(3, 2), torch.full((3, 1), torch.nan))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    dask_influence.errors.DataError: loss is NaN or infinite for samples [0, 1, 2]; look for NaN or inf in ...
    """
    samples = leading_size(y)
    x, y = _few(x, y)
    with differentiation(), fused(), torch.no_grad():
        output = _output(objective, x)
        _check_mean(objective, y, output, _scalar(objective, output, y), samples)


def _few(x: Tree, y: Tree) -> tuple[Tree, Tree]:
    x, y = sliced(x, slice(_BATCH)), sliced(y, slice(_BATCH))
    if leading_size(y) > 1:
        return x, y
    # One sample cannot tell a sum from a mean: take it twice.
    x, y = (optree.tree_map(lambda a: torch.cat([a, a]), tree) for tree in (x, y))
    return x, y


# -- the loss --------------------------------------------------------------------------
def _output(objective: Objective, x: Tree) -> Any:
    try:
        return objective.outputs(objective.parameters(), x)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as failure:
        raise DataError(
            f"x: the model cannot be called on {_described(x)} ({_first_line(failure)}); "
            "pass x as the model takes it: a tensor, a tuple of positional or a mapping of keyword arguments"
        ) from failure


def _scalar(objective: Objective, output: Any, y: Tree) -> Tensor:
    try:
        with warnings.catch_warnings():
            # torch's losses only warn when they broadcast output against target: never a score
            warnings.filterwarnings("error", "Using a target size", UserWarning)
            value = objective.loss(output, y)
    except UserWarning as broadcast:
        raise DataError(
            f"y: its shape {_described(y)} is broadcast against an output of {_described(output)}; "
            "give y the shape of the output"
        ) from broadcast
    except Exception as failure:
        raise _explained(objective, output, y, failure) from failure
    if not isinstance(value, Tensor):
        raise LossError(f"loss returned {type(value).__name__}; it must return a scalar tensor")
    if value.shape != ():
        raise LossError(
            f"loss is not reduced: it has shape {tuple(value.shape)} for {leading_size(y)} samples; "
            "use reduction='mean'"
        )
    if not value.is_floating_point():
        raise LossError(f"loss has dtype {_dtype(value)}; it must be floating to be differentiated")
    return value


def _explained(objective: Objective, output: Any, y: Tree, failure: Exception) -> Exception:
    """A DataError where another dtype of y would do, else a LossError."""
    first = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
    held = {_dtype(leaf) for leaf in optree.tree_leaves(y)}
    for dtype in (torch.int64, objective.dtype if first is None else first.dtype):
        try:
            objective.loss(output, optree.tree_map(lambda a, dtype=dtype: a.to(dtype), y))
        except Exception:  # noqa: BLE001 - the user's loss may raise anything
            continue
        expected = str(dtype).removeprefix("torch.")
        return DataError(
            f"y: dtype {', '.join(sorted(held))} does not suit the loss {_loss_name(objective)!r}, "
            f"which takes {expected} here ({_first_line(failure)}); pass y as {expected}"
        )
    return LossError(
        f"loss {_loss_name(objective)!r} fails on an output of {_described(output)} and "
        f"y of {_described(y)}: {_first_line(failure)}"
    )


def _check_mean(objective: Objective, y: Tree, output: Any, value: Tensor, samples: int) -> None:
    count = leading_size(y)
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if any(leaf.dim() == 0 or len(leaf) != count for leaf in leaves):
        raise SampleMixingError(
            f"model returns {_described(output)} for {count} samples, and the first axis of each must count samples; "
            "wrap the model in a module that returns only what the loss uses, batch first (of a recurrent layer its "
            "output without the state)"
        )
    each = objective.losses(output, y)
    if each.shape != (leading_size(y),):
        raise LossError(f"loss of one sample has shape {tuple(each.shape[1:])}; it must be a scalar")
    if not (value.isfinite() & each.isfinite().all()):
        bad = torch.nonzero(~each[:samples].isfinite()).flatten().tolist()  # of one sample there are two
        where = f"for samples {bad[:8]}" if bad else f"for the batch of the first {len(each)} samples"
        raise DataError(
            f"loss is NaN or infinite {where}; look for NaN or inf in x, y and the model's weights there"
        )
    if is_mean(value, each):
        return
    if is_mean(value / len(each), each):
        raise LossError("loss is a sum over samples; use reduction='mean'")
    raise LossError(
        f"loss is not a mean over samples: {value:.6g} for {len(each)} samples whose own losses average "
        f"{each.mean():.6g} (class weights, ignore_index or a mean over a varying number of tokens weigh "
        f"samples unequally; output of {_described(output)} and y of {_described(y)} may broadcast)"
    )


def is_mean(value: Tensor, each: Tensor) -> bool:
    """Whether ``value`` is the mean of ``each`` (n,), to rounding."""
    scale = each.abs().mean() + each.std(unbiased=False)
    return bool((value - each.mean()).abs() <= _tolerance(value.dtype) * scale)


# -- the model -------------------------------------------------------------------------
def check_kind(module: nn.Module) -> None:
    """Refuse modules without weights, and those that torch cannot call with other parameters than their own.

    Examples
    --------
    >>> check_kind(nn.DataParallel(nn.Linear(2, 1)))
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: model is an nn.DataParallel; pass model.module
    """
    for name, parameter in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(parameter):
            raise ConfigurationError(
                f"model has {name!r} of a lazy layer that has not seen data; call the model once on a sample before"
            )
        if parameter.is_meta:
            raise ConfigurationError(
                f"model has {name!r} on the meta device, without values; load its weights before (model.to_empty "
                "and load_state_dict)"
            )
    for name, part in module.named_modules():
        where = f"model has an {{}} at {name!r}" if name else "model is an {}"
        if isinstance(part, nn.DataParallel):
            inner = f"model.{name}.module in its place" if name else "model.module"
            raise ConfigurationError(f"{where.format('nn.DataParallel')}; pass {inner}")
        if isinstance(part, torch.jit.ScriptModule):
            raise ConfigurationError(
                f"{where.format('torch.jit.ScriptModule')}, whose parameters cannot be exchanged; pass the "
                "nn.Module that it was scripted or traced from"
            )


def _check_repeatable(objective: Objective, x: Tree, output: Any) -> None:
    before = optree.tree_map(torch.clone, x)
    for first, second in zip(_floating(output), _floating(_output(objective, x)), strict=True):
        if not _equal(first, second, _tolerance(first.dtype)):
            if not all(map(torch.equal, optree.tree_leaves(x), optree.tree_leaves(before))):
                raise ConfigurationError(
                    "model writes to its input x, so that it gives another output when called again; let its first "
                    "operation leave x alone (inplace=False)"
                )
            raise ConfigurationError(
                "model gives another output when called again on the same x in eval mode; remove its "
                "randomness (dropout called with training=True, noise) and its state"
            )


def _check_independent(objective: Objective, x: Tree, output: Any) -> None:
    count = leading_size(x)
    for j in range(min(_ALONE, count)):
        try:
            alone = _output(objective, sliced(x, slice(j, j + 1)))
        except DataError as failure:
            raise SampleMixingError(
                f"the model takes {count} samples but not one alone ({_first_line(failure)}): "
                f"a layer needs the others{_batch_statistics(objective)}"
            ) from failure
        rows = zip(_floating(output), _floating(alone), strict=True)
        verdicts = [_same_row(batched, single, j, count) for batched, single in rows]
        # Leaves without a sample axis (a recurrent state) are judged by the ones that have one.
        judged = [verdict for verdict in verdicts if verdict is not None]
        if not all(judged):
            raise SampleMixingError(_mixing(objective, x, j))
        if verdicts and not judged:
            shapes = f"{_described(output)} for {count} samples and {_described(alone)} for one"
            raise SampleMixingError(
                f"output has no sample axis: {shapes}; the first axis must count samples "
                "(squeeze(-1) rather than squeeze(), batch_first=True)"
            )


def _batch_statistics(objective: Objective) -> str:
    """The normalisations that take their statistics from the batch even in eval mode, named."""
    found = [
        f"{name} ({type(module).__name__})"
        for name, module in objective.module.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is None
    ]
    return f"; {', '.join(found)} keeps no running statistics (track_running_stats=False)" if found else ""


def _same_row(batched: Tensor, single: Tensor, j: int, count: int) -> bool | None:
    """Whether row j of a batch equals the row computed alone; None where there is no such row."""
    if batched.dim() == 0 or batched.shape[0] != count or single.shape != (1, *batched.shape[1:]):
        return None
    return _equal(batched[j], single[0], _tolerance(batched.dtype))


def _mixing(objective: Objective, x: Tree, j: int) -> str:
    together = _records(objective, x)
    alone = _records(objective, sliced(x, slice(j, j + 1)))
    count = leading_size(x)
    culprit = "the model itself"
    for name, (module, outputs) in together.items():
        pairs = zip(outputs, alone[name][1] if name in alone else [], strict=False)
        if any(_same_row(batched, single, j, count) is False for batched, single in pairs):
            culprit = f"module {name!r} ({type(module).__name__})" if name else culprit
            break
    return (
        f"output for sample {j} depends on the other samples of its batch, by {culprit}; influences need "
        "independent samples: let BatchNorm keep running statistics, attention and recurrent layers "
        "have batch_first=True"
    )


def _records(objective: Objective, x: Tree) -> dict[str, tuple[nn.Module, list[Tensor]]]:
    """Floating outputs of the first call of each module, in the order in which they finish."""
    records: dict[str, tuple[nn.Module, list[Tensor]]] = {}
    names = {module: name for name, module in objective.module.named_modules()}

    def remember(module: nn.Module, _arguments: Any, output: Any) -> None:
        records.setdefault(names[module], (module, _floating(output)))

    hooks = [module.register_forward_hook(remember) for module in names]
    try:
        _output(objective, x)
    finally:
        for hook in hooks:
            hook.remove()
    return records


# -- words and numbers -----------------------------------------------------------------
def _tolerance(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps) ** 0.6  # 4e-10 in float64, 7e-5 in float32


def _equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    finite = torch.cat([a.reshape(-1), b.reshape(-1)])
    finite = finite[finite.isfinite()]  # NaN and inf are the loss check's to name
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True))


def _floating(tree: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _described(tree: Any) -> str:
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return ", ".join(f"{_dtype(leaf)} {tuple(leaf.shape)}" for leaf in leaves) or type(tree).__name__


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loss_name(objective: Objective) -> str:
    return getattr(objective.loss, "__name__", type(objective.loss).__name__)


def _first_line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0][:200]
