"""Precision of float32 matrix products: TF32 and bfloat16 operands where the hardware has them.

By torch's own names (``torch.set_float32_matmul_precision``): ``"highest"`` multiplies in float32,
``"high"`` rounds operands to TF32 (10 bits), ``"medium"`` to bfloat16 (7 bits) on CPUs and to TF32 on
CUDA, which has no such products of float32 operands. Products are added up in float32 either way, and
sums over samples in float64.

torch keeps the setting for the process, not for a thread. :func:`matmul_precision` puts it in place
while it is open, and lets in only one precision at a time.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from dask_influence.errors import ConfigurationError

PRECISIONS = ("highest", "high", "medium")
"""As torch names them."""

_UNITS = {"high": 2.0**-10, "medium": 2.0**-7}
"""The distance from 1 to the next operand."""

_CPU = {"highest": "ieee", "high": "tf32", "medium": "bf16"}
_CUDA = {"highest": "ieee", "high": "tf32", "medium": "tf32"}

_PROBED = 256
"""Rows and columns of a product that shows whether operands are rounded: small ones never are."""

_ROUNDED = 2e-5
"""Relative error of a product of rounded operands, at least; one in float32 has a hundredth of it."""


def check_precision(name: str) -> None:
    """Refuse what is no precision.

    Examples
    --------
    >>> check_precision("bf16")
    Traceback (most recent call last):
    dask_influence.errors.ConfigurationError: matmul_precision must be one of 'highest', 'high', 'medium'; got 'bf16'
    """
    if not isinstance(name, str) or name not in PRECISIONS:
        raise ConfigurationError(
            f"matmul_precision must be one of {', '.join(map(repr, PRECISIONS))}; got {name!r}"
        )


# -- the setting of this process ---------------------------------------------------------
class _Setting:
    """Who computes in which precision, and what the process had before."""

    def __init__(self) -> None:
        self.free = threading.Condition()
        self.users, self.name = 0, "highest"
        self.before: list[str] = []
        self.own = threading.local()


_SETTING = _Setting()


def _operations() -> list[tuple[Any, dict[str, str]]]:
    """Where torch keeps a precision, and what it calls each of ours there."""
    cpu, cuda, cudnn = torch.backends.mkldnn, torch.backends.cuda, torch.backends.cudnn
    return [
        *((place, _CPU) for place in (cpu.matmul, cpu.conv, cpu.rnn)),  # type: ignore[attr-defined]
        *((place, _CUDA) for place in (cuda.matmul, cudnn.conv, cudnn.rnn)),  # type: ignore[attr-defined]
    ]


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Multiply float32 matrices in precision ``name`` for as long as it is open; what was set before comes back.

    Other threads may open the same precision meanwhile, and wait for their turn with another one. So the
    numbers of a task depend on its own precision alone, and not on what the caller's process has set: cuDNN
    convolves in TF32 unless told otherwise.

    Raises
    ------
    RuntimeError
        This thread has another precision open, for which it would wait forever.

    Examples
    --------
    >>> with matmul_precision("highest"):
    ...     torch.backends.cudnn.conv.fp32_precision
    'ieee'
    """
    setting = _SETTING
    depth = getattr(setting.own, "depth", 0)
    if depth and setting.name != name:
        raise RuntimeError(f"matmul_precision({name!r}) within {setting.name!r}")
    with setting.free:
        setting.free.wait_for(lambda: not setting.users or setting.name == name)
        if not setting.users:
            setting.before = [place.fp32_precision for place, _ in _operations()]
            setting.name = name
            for place, names in _operations():
                place.fp32_precision = names[name]
        setting.users += 1
    setting.own.depth = depth + 1
    try:
        yield
    finally:
        setting.own.depth = depth
        with setting.free:
            setting.users -= 1
            if not setting.users:
                for (place, _), before in zip(_operations(), setting.before, strict=True):
                    place.fp32_precision = before
                setting.name = "highest"
                setting.free.notify_all()


def spacing(name: str) -> float:
    """The distance from 1 to the next operand of a precision that rounds them; 0 of the one that does not.

    Examples
    --------
    >>> spacing("medium"), spacing("highest")
    (0.0078125, 0.0)
    """
    return _UNITS.get(name, 0.0)


def rounding(dtype: torch.dtype) -> float:
    """The distance from 1 to the next operand of a product of ``dtype``, as it is multiplied now.

    Examples
    --------
    >>> rounding(torch.float32) == torch.finfo(torch.float32).eps
    True
    """
    own = float(torch.finfo(dtype).eps)
    return max(own, spacing(_SETTING.name)) if dtype == torch.float32 else own


# -- what the hardware has ---------------------------------------------------------------
def check_products(name: str, device: torch.device) -> None:
    """Refuse a precision that makes no difference on ``device``, in this process.

    Raises
    ------
    ConfigurationError
        Says what the hardware lacks.
    """
    if name == "highest" or _rounds(name, device.type):
        return
    if device.type == "cuda":
        lacks = f"{torch.cuda.get_device_name(device)} has no TF32 (CUDA capability 8.0 and above do)"
    elif name == "high":
        lacks = "this CPU has no TF32 products (AMX-FP16 is needed)"
    else:
        lacks = (
            "this CPU has no bfloat16 products of float32 operands (AMX is needed, AVX512-BF16 is not enough)"
        )
    raise ConfigurationError(
        f"matmul_precision={name!r} does nothing here: {lacks}; use matmul_precision='highest'"
    )


@functools.cache
def _rounds(name: str, kind: str) -> bool:
    """Whether a product shows rounded operands: flags of processors do not say what torch makes of them."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, _PROBED, _PROBED)
    left, right = torch.randn(shape, generator=generator, dtype=torch.float64)
    with matmul_precision(name):
        found = (left.to(kind, torch.float32) @ right.to(kind, torch.float32)).to("cpu", torch.float64)
    exact = left @ right
    return bool((found - exact).norm() > _ROUNDED * exact.norm())
