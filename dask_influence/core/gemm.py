"""Products of float32 matrices, by the library that is fast on this processor.

torch multiplies matrices by MKL, which uses half of the vector units of a processor that is not Intel's: on
an AMD EPYC with AVX-512 it reaches 100 GFLOP/s a core where oneDNN, which torch carries for its own layers,
reaches 230. Both add up products in float32. Which one multiplies depends on the processor and on the shapes
alone, hence the same bits from run to run.

Where operands are to be rounded (:mod:`~dask_influence.core.precision`), torch goes to oneDNN by itself. It is let,
but for stacks of products, of which it would copy what they share.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from dask_influence.core.precision import rounding

WORTHWHILE = 2**20
"""Multiplications m k n from which oneDNN is called: it takes 12 µs to begin, and once 0.4 ms for a new shape."""

SINGLY = 2**23
"""Multiplications m k n from which products that MKL makes all at once go to oneDNN one by one."""

LARGE, DEEP = 2**19, 160
"""Numbers of a product beyond a cache, which go to memory that is there only by a copy, and k that is worth it."""

FEW = 32
"""Rows m below which it is not worth to put k n numbers in order."""

_TRIED = 64
"""Rows and columns of the products that show whether both libraries agree."""


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``left`` (..., m, k) times ``right`` (k, n), as ``torch.matmul`` has it; derivatives do not go through it.

    The result is in the order of its rows, unless ``out`` (m, n), memory to take for a single product, is not.

    Examples
    --------
    >>> product(torch.ones(2, 3), torch.ones(3, 1))
    tensor([[3.],
            [3.]])
    """
    if left.dim() > 2 and out is None:
        return _stacked(left, right)
    if not _held_back(left, right, into=out is not None):
        return torch.matmul(left, right, out=out)
    found = _by_onednn(left, right)
    return found.contiguous() if out is None else out.copy_(found)


def _stacked(left: Tensor, right: Tensor) -> Tensor:
    """The product of a stack: as one matrix where it lies like one, or one by one."""
    shape = *left.shape[:-1], right.shape[1]
    if left.dim() > 3 or left.is_contiguous() or left.shape[-2] == 1:
        return product(left.reshape(-1, left.shape[-1]), right).view(shape)
    if not (_held_back(left[0], right, into=True) or _copied(left, right)):
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
    if not _held_back(left, right, into=True):
        return into.addmm_(left, right, alpha=alpha)
    return into.add_(_by_onednn(left, right), alpha=alpha)


def products(left: Tensor, right: Tensor, into: Tensor, *, add: bool = False) -> Tensor:
    """``into`` (b, m, n) filled with products, or with products added: of (b, m, k) or (m, k) with (b, k, n) or (k, n).

    Examples
    --------
    >>> products(torch.ones(2, 3), torch.ones(2, 3, 1), torch.ones(2, 2, 1), add=True).flatten()
    tensor([4., 4., 4., 4.])
    """
    lefts, rights = left.expand(len(into), *left.shape[-2:]), right.expand(len(into), *right.shape[-2:])
    count = left.shape[-2] * left.shape[-1] * right.shape[-1]
    if len(into) and (
        (count >= SINGLY and _held_back(lefts[0], rights[0], into=True)) or _copied(lefts, rights[0])
    ):
        for one, own, to in zip(lefts, rights, into, strict=True):
            if add:
                add_product(to, one, own)
            else:
                product(one, own, out=to)
        return into
    return into.baddbmm_(lefts, rights) if add else torch.bmm(lefts, rights, out=into)


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``inputs`` (..., p) times ``weight`` (q, p) transposed, plus ``bias``, as ``torch.nn.functional.linear``."""
    if not _held_back(inputs, weight.mT):
        return nn.functional.linear(inputs, weight, bias)
    found = product(inputs, weight.mT)
    return found if bias is None else found.add_(bias)


def dense(right: Tensor) -> Tensor:
    """A matrix for many products from the left, without gaps where oneDNN takes them, which is slow with gaps."""
    narrow = right.dtype == torch.float32 and right.device.type == "cpu"
    return right.contiguous() if narrow and not _without_gaps(right) and onednn_is_faster() else right


def _without_gaps(matrix: Tensor) -> bool:
    return matrix.is_contiguous() or matrix.mT.is_contiguous()


def _held_back(left: Tensor, right: Tensor, *, into: bool = False) -> bool:
    """Whether MKL would be slow with these, for a result in new memory or ``into`` some that is there."""
    if not onednn_is_faster() or left.dtype != torch.float32 or right.dtype != torch.float32:
        return False
    rows, inner, columns = left.numel() // max(1, left.shape[-1]), *right.shape
    return (
        left.device.type == right.device.type == "cpu"
        and rows * inner * columns >= WORTHWHILE
        and min(rows, inner, columns) > 1  # vectors are bound by reading the matrix
        and (inner >= DEEP or not into or rows * columns <= LARGE)
        and (rows >= FEW or _without_gaps(right))
    )


def _copied(stack: Tensor, right: Tensor) -> bool:
    """Whether torch would copy what the products of a stack share, once for each: where it rounds operands."""
    return (
        stack.device.type == "cpu"
        and rounding(stack.dtype) > torch.finfo(stack.dtype).eps
        and stack.shape[-2] * stack.shape[-1] * right.shape[-1] >= WORTHWHILE
    )


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    """The product, of which the result may be in the order of columns.

    What stands to the left has to be in order; what stands to the right may be in that of columns, but with gaps it
    takes a thousand times as long. The sides change places where that copies less.
    """
    if not left.is_contiguous():
        copied = (0 if right.mT.is_contiguous() else right.numel()) + left.shape[0] * right.shape[1]
        if copied < left.numel():
            return _times_transposed(right.mT.contiguous(), dense(left.mT).mT).mT
    return _times_transposed(left.contiguous(), dense(right).mT)


def _times_transposed(left: Tensor, right: Tensor) -> Tensor:
    """left rightᵀ of matrices: a linear layer without bias, fused with nothing. Shapes are not looked at."""
    return torch.ops.mkldnn._linear_pointwise.default(left, right, None, "none", [], "")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's, and torch has both libraries, which agree."""
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not libraries or torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() == "GenuineIntel":
        return False
    # whatever the caller has set: it is asked once in a process
    own, generator = {"dtype": torch.float32, "device": "cpu"}, torch.Generator().manual_seed(0)
    left, right = (torch.randn(_TRIED, _TRIED, generator=generator, **own) for _ in range(2))  # type: ignore[call-overload]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return torch.allclose(_times_transposed(left, right.mT), left @ right, rtol=1e-4, atol=1e-4)
    except (AttributeError, RuntimeError):  # an operator of torch's own: it may be renamed
        return False


def _vendor() -> str:
    """Who made the processor, as Linux tells; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
