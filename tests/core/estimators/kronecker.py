"""Dense KFAC and EK-FAC from hooks on module calls and the dense GGN, sharing no code with the package."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests import data, oracles


def patches(module: nn.Module, image: Tensor) -> Tensor:
    """What each output place of a convolution reads, by loops, (T, g, p)."""
    pads = [w for width in reversed(module.padding) for w in (width, width)]
    image = functional.pad(image, pads)[0]
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    sizes = [
        (image.shape[1 + d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(len(kernel))
    ]
    rows = []
    for place in itertools.product(*map(range, sizes)):
        taps = [
            image[
                (
                    slice(None),
                    *(p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True)),
                )
            ]
            for tap in itertools.product(*map(range, kernel))
        ]
        rows.append(torch.stack(taps, 1).reshape(module.groups, -1))
    return torch.stack(rows)


def seen(module: nn.Module, into: Tensor) -> Tensor:
    """a of one call, (T, g, p)."""
    if isinstance(module, nn.Linear):
        return into.reshape(-1, 1, into.shape[-1])
    if isinstance(module, nn.Embedding):
        hot = functional.one_hot(into.reshape(-1), module.num_embeddings).double()
        if module.padding_idx is not None:
            hot[:, module.padding_idx] = 0
        return hot[:, None, :]
    if isinstance(module, nn.LayerNorm):
        centred = into - into.mean(-1, keepdim=True)
        standard = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return standard.reshape(-1, standard.shape[-1], 1)
    if isinstance(module, nn.BatchNorm2d):
        standard = (into.movedim(1, -1) - module.running_mean) / (module.running_var + module.eps).sqrt()
        return standard.reshape(-1, module.num_features, 1)
    if isinstance(module, nn.GroupNorm):
        parts = into.reshape(len(into), module.num_groups, -1)
        centred = parts - parts.mean(-1, keepdim=True)
        standard = centred / (centred.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return standard.reshape(into.shape).movedim(1, -1).reshape(-1, module.num_channels, 1)
    return patches(module, into)


def returned(module: nn.Module, delta: Tensor) -> Tensor:
    """δ of one call, (T, g, q)."""
    if isinstance(module, nn.LayerNorm):
        return delta.reshape(-1, delta.shape[-1], 1)
    if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        return delta.movedim(1, -1).reshape(-1, delta.shape[1], 1)
    groups = getattr(module, "groups", 1)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        delta = delta.movedim(1, -1)
    return delta.reshape(-1, groups, delta.shape[-1] // groups)


def roots(loss: oracles.Loss, output: Tensor, target: Any, observed: bool) -> Tensor:
    """Columns of the output's curvature, or the gradient at the target, as rows shaped like the output."""
    value = output.detach().requires_grad_()
    if observed:
        return torch.autograd.grad(loss(value, target), value)[0][None]
    inner = torch.autograd.functional.hessian(lambda f: loss(f, target), value).reshape(value.numel(), -1)
    values, vectors = torch.linalg.eigh(inner)
    return (vectors * values.clamp_min(0).sqrt()).T.reshape(-1, *value.shape)


def factors(model: nn.Module, loss: oracles.Loss, x: Any, y: Any, names: list[str], observed: bool) -> dict:
    """A (g, p, p) and B (g, q, q) of each module by its path, from hooks on module calls."""
    model = oracles.prepared(model)
    held = {path: m for path, m in model.named_modules() if any(n.rpartition(".")[0] == path for n in names)}
    sums: dict[str, list[Tensor]] = {}
    for j in range(len(y)):
        calls: list[tuple[str, Tensor, Tensor]] = []

        def note(m: nn.Module, into: tuple, out: Tensor, path: str, calls: list = calls) -> None:
            calls.append((path, into[0].detach(), out))

        hooks = [m.register_forward_hook(partial(note, path=path)) for path, m in held.items()]
        output = oracles.call(model, oracles.pick(x, slice(j, j + 1)))
        columns = roots(loss, output, y[j : j + 1], observed)
        deltas = [
            torch.autograd.grad(output, [c[2] for c in calls], col, retain_graph=True) for col in columns
        ]
        for hook in hooks:
            hook.remove()
        positions = {path: sum(len(seen(held[p], a)) for p, a, _ in calls if p == path) for path in held}
        for i, (path, into, _) in enumerate(calls):
            module = held[path]
            a = seen(module, into)
            parts = [a] if f"{path}.weight".lstrip(".") in names else []
            if f"{path}.bias".lstrip(".") in names:
                parts.append(torch.ones_like(a[..., :1]))
            a = torch.cat(parts, -1)
            b = torch.stack([returned(module, d[i]) for d in deltas])
            new = [torch.einsum("tgp,tgs->gps", a, a) / positions[path], torch.einsum("rtgq,rtgs->gqs", b, b)]
            sums[path] = [u + v for u, v in zip(sums[path], new, strict=True)] if path in sums else new
    return {path: [total / len(y) for total in pair] for path, pair in sums.items()}


def dense(
    model: nn.Module,
    loss: oracles.Loss,
    train: data.Pair,
    regularization: float,
    *,
    corrected: bool = True,
    names: list[str] | None = None,
    observed: bool = False,
    approximation: bool = False,
) -> Tensor:
    """(F̂ + λ)⁻¹ as a matrix (P, P), or F̂ itself, with Λ read off the dense Fisher matrix."""
    names = [n for n, p in model.named_parameters() if p.requires_grad and (names is None or n in names)]
    curvature = (oracles.empirical_fisher if observed else oracles.ggn)(model, loss, *train, names)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    index = dict(
        zip(names, torch.arange(len(curvature)).split([shapes[n].numel() for n in names]), strict=True)
    )
    result = torch.zeros_like(curvature)
    for path, (a, b) in factors(model, loss, *train, names, observed).items():
        weight, bias = (index.get(f"{path}.{kind}".lstrip(".")) for kind in ("weight", "bias"))
        module = model.get_submodule(path)
        if isinstance(module, nn.Embedding):
            places = weight.reshape(shapes[f"{path}.weight"]).T[None]  # type: ignore[union-attr]
        else:
            parts = [] if weight is None else [weight.reshape(len(b), b.shape[1], -1)]
            places = torch.cat(parts + ([] if bias is None else [bias.reshape(len(b), -1, 1)]), -1)
        for g in range(len(places)):
            (va, ua), (vb, ub) = torch.linalg.eigh(a[g]), torch.linalg.eigh(b[g])
            basis, at = torch.kron(ub, ua), places[g].reshape(-1)
            block = curvature[at[:, None], at]
            values = (basis.T @ block @ basis).diagonal() if corrected else torch.kron(vb, va)
            values = values if approximation else 1 / (values + regularization)
            result[at[:, None], at] = basis * values @ basis.T
    return result
