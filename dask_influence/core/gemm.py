"""Products of float32 matrices, by the library that is fast on this processor.

torch multiplies matrices by MKL, which uses half of the vector units of a processor that is not Intel's: on
an AMD EPYC with AVX-512 it reaches 100 GFLOP/s a core where oneDNN, which torch carries for its own layers,
reaches 230. Both add up products in float32. Which one multiplies depends on the processor and on the shapes
alone, hence the same bits from run to run.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

WORTHWHILE = 2**20
"""Multiplications m k n from which oneDNN is called: it takes 12 µs to begin, and once 0.4 ms for a new shape."""

_TRIED = 64
"""Rows and columns of the products that show whether both libraries agree."""


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left`` (..., m, k) times ``right`` (k, n), as ``torch.matmul`` has it; derivatives do not go through it.

    Examples
    --------
    >>> product(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    if left.dim() > 2 and out is None:
        return _stacked(left, right)
    if not _held_back(left, right):
        return torch.matmul(left, right, out=out)
    found = _by_onednn(left, right)
    return found if out is None else out.copy_(found)


def _stacked(left: Tensor, right: Tensor) -> Tensor:
    """The product of a stack: as one matrix where it lies like one, or one by one."""
    shape = *left.shape[:-1], right.shape[1]
    if left.is_contiguous() or left.shape[-2] == 1:
        return product(left.reshape(-1, left.shape[-1]), right).view(shape)
    if not _held_back(left[0], right):
        return torch.matmul(left, right)
    found, ready = left.new_empty(shape), dense(right)
    for one, own in zip(left, found, strict=True):
        product(one, ready, out=own)
    return found


def add_product(into: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``into`` (m, n), to which ``alpha`` times the product is added.

    Examples
    --------
    >>> add_product(torch.ones(2, 1), torch.ones(2, 3), torch.ones(3, 1), alpha=-1)
    tensor([[-2.],
            [-2.]])
    """
    if not _held_back(left, right):
        return into.addmm_(left, right, alpha=alpha)
    return into.add_(_by_onednn(left, right), alpha=alpha)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs`` (..., p) times ``weight`` (q, p) transposed, plus ``bias``, as ``torch.nn.functional.linear``."""
    if not _held_back(inputs, weight.mT):
        return nn.functional.linear(inputs, weight, bias)
    found = product(inputs, weight.mT)
    return found if bias is None else found.add_(bias)


def dense(right: Tensor) -> Tensor:
    """A matrix for many products from the left, without gaps, with which oneDNN takes a thousand times as long."""
    ready = right.is_contiguous() or right.mT.is_contiguous()
    return right if ready or right.dtype != torch.float32 or not onednn_is_faster() else right.contiguous()


def _held_back(left: Tensor, right: Tensor) -> bool:
    """Whether MKL would be slow with these: vectors are bound by reading the matrix."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and left.numel() * right.shape[1] >= WORTHWHILE
        and min(*left.shape[-2:], *right.shape) > 1
        and onednn_is_faster()
    )


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """The product. What stands to the left has to be in order, what stands to the right may be in that of columns."""
    if not left.is_contiguous() and (right.mT.is_contiguous() or right.numel() < left.numel()):
        return _by_onednn(right.mT, left.mT).mT
    return _times_transposed(left.contiguous(), dense(right).mT)


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """left rightᵀ: a linear layer without bias, fused with nothing."""
    return torch.ops.mkldnn._linear_pointwise.default(left, right, None, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and torch has both libraries, which agree."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not libraries or torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() == "GenuineIntel":
        return False
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, _TRIED, _TRIED, generator=generator)
    try:
        found = _times_transposed(left, right.mT)
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
    ):  # an operator of torch's own: it may be renamed
        return False
    return torch.allclose(found, left @ right, rtol=1e-4, atol=1e-4)


def _vendor() -> str:
    """Who made the processor, as Linux tells; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
