"""Derivatives as compiled programs: traced to torch's basic operations, then handed to torch's compiler.

A derivative of a batch is traced with all transforms of ``torch.func`` resolved (``make_fx``), so that
what is compiled is a plain list of operations on tensors of known shapes. Shapes are few: samples are
taken in runs of 16, 64, 256, … and vectors in blocks of 4, 16, 64, …, which also is why the numbers of a
batch depend on its size alone. What remains of either is computed as without the compiler.

One program for each derivative and shape, made where it is first needed and kept with the model; torch
keeps the compiled code on disk, for other processes of the machine.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import sysconfig
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor, nn

from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.errors import ConfigurationError

SAMPLES = 16
"""Samples of the smallest program."""

VECTORS = 4
"""Vectors of the smallest one."""

Derivative = Callable[..., Tensor]
"""(objective, θ, x, y) or (objective, θ, x, y, vectors) → derivative."""

Program = Callable[..., list[Tensor]]

_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Program]] = weakref.WeakKeyDictionary()


def check_compiler(device: torch.device) -> None:
    """Refuse a process in which nothing can be compiled for ``device``.

    Raises
    ------
    ConfigurationError
        No working C++ compiler, or on CUDA no Triton; says which.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ConfigurationError(
                "compile=True needs Triton on CUDA, which this process has not; install triton or use compile=False"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
        if sys.platform != "win32":
            command = [compiler, "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
            subprocess.run(command, input=b"#include <Python.h>\n", check=True, capture_output=True)
    except Exception as error:
        detail = getattr(error, "stderr", b"") or str(error).encode()
        raise ConfigurationError(
            "compile=True needs a C++ compiler and Python's headers, and this process has none that work "
            f"({detail.decode(errors='replace').strip().splitlines()[0][:200]}); install them (g++, python3-dev) "
            "or use compile=False"
        ) from error


# -- batches in pieces of known shapes ---------------------------------------------------
def pieces(count: int, least: int) -> Iterator[tuple[slice, bool]]:
    """Runs of ``least``, 4·``least``, 16·``least``, … that make up ``count``, the longest first, then the rest.

    The flag says whether there is a program of that length.

    Examples
    --------
    >>> [(part.stop - part.start, known) for part, known in pieces(157, 16)]
    [(64, True), (64, True), (16, True), (13, False)]
    """
    length, start = least, 0
    while 4 * length <= count:
        length *= 4
    while length >= least:
        while start + length <= count:
            yield slice(start, start + length), True
            start += length
        length //= 4
    if start < count:
        yield slice(start, count), False


def per_sample(
    function: Derivative, objective: Objective, theta: Any, x: Tree, y: Tree, *vectors: Tensor
) -> Tensor:
    """``function`` with one row for each sample (n, ...), or of D vectors (n, D)."""
    found = [
        torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        for parts in _in_pieces(function, objective, theta, x, y, *vectors)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def summed(
    function: Derivative, objective: Objective, theta: Any, x: Tree, y: Tree, vectors: Tensor
) -> Tensor:
    """``function`` that adds up over samples, (B, ...) of B vectors."""
    total: Tensor | None = None
    for parts in _in_pieces(function, objective, theta, x, y, vectors):
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        total = found if total is None else total + found
    assert total is not None
    return total


def _in_pieces(
    function: Derivative, objective: Objective, theta: Any, x: Tree, y: Tree, *vectors: Tensor
) -> Iterator[list[Tensor]]:
    """For each run of samples, what the function makes of each block of vectors."""
    for samples, enough in pieces(leading_size(y), SAMPLES):
        part = sliced(x, samples), sliced(y, samples)
        if not vectors:
            yield [_one(function, enough, objective, theta, *part)]
            continue
        yield [
            _one(function, enough and known, objective, theta, *part, vectors[0][block])
            for block, known in pieces(len(vectors[0]), VECTORS)
        ]


def _one(function: Derivative, known: bool, objective: Objective, theta: Any, *batch: Any) -> Tensor:
    if not known:
        return function(objective, theta, *batch)
    batch = optree.tree_map(Tensor.contiguous, batch)
    leaves, structure = optree.tree_flatten((theta, *batch))
    shapes = tuple((leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves)
    # code for many threads has their number in it
    key = function, objective.names, structure, shapes, torch.get_num_threads()
    programs = _PROGRAMS.setdefault(objective.module, {})
    if key not in programs:

        def flat(*given: Tensor) -> list[Tensor]:
            return [function(objective, *optree.tree_unflatten(structure, given))]

        programs[key] = _program(flat, leaves)
    return programs[key](*leaves)[0]


def _program(flat: Program, leaves: list[Tensor]) -> Program:
    from torch._inductor import compile as compile_graph  # a second to import
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of itself
            graph = make_fx(flat)(*leaves)
            # one process: a pool of compilers would outlive a worker that dies
            made: Program = compile_graph(graph, [*leaves], options={"compile_threads": 1})
            made(*leaves)
    except Exception as error:
        flat(*leaves)  # where the samples are at fault, it says so in the user's own terms
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigurationError(
            f"compile=True: torch cannot compile a derivative of this model on {socket.gethostname()} "
            f"({type(error).__name__}: {reason}); use compile=False"
        ) from error
    return made
