"""Content: what a loss or a model computes, as digests that are the same in every session.

Names and weights do not tell two of them apart: a closure may hold other class weights, an activation
another slope. Code is compared by its byte code, constants, defaults, closures and the globals it
reads; objects attribute by attribute, so that what a call itself changes (a counter, the last
attention map) can be left out; what is installed is named, and known by its version.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INSTALLED = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_FOLDERS = frozenset({"site-packages", "dist-packages"})
"""Names of folders that packages are installed in: an environment may see those of another one."""

_OWN = __name__.partition(".")[0]
_PRIVATE = frozenset({"training", "_parameters", "_buffers", "_modules"})
_Within = tuple[Any, ...]
"""The modules and objects that what is read is an attribute of."""

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def contents(module: nn.Module, loss: Any) -> dict[str, str]:
    """Digest of each part of a model and its loss by its path: classes, attributes, tensors of the loss.

    Parameters and buffers of the model are left to whoever digests weights, and its code goes by its
    name: what a model computes is mended, and shows in losses and gradients.

    Examples
    --------
    >>> one, other = (contents(nn.LeakyReLU(slope), nn.functional.mse_loss) for slope in (0.1, 0.2))
    >>> [path for path in one if one[path] != other[path]]
    ['model.negative_slope']
    """
    return dict([*_parts("model", module, weights=False), *_parts("loss", loss, weights=True)])


def octets(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Its bytes, in the order of its entries; a copy only where it is not laid out so.

    Examples
    --------
    >>> octets(torch.tensor([[1, 256]], dtype=torch.int16))
    array([1, 0, 0, 1], dtype=uint8)
    """
    flat = tensor.detach().cpu().contiguous().view(-1)
    if len(flat) == 1:  # contiguous at any stride, but not for this view
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy()


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], more: str = "") -> str:
    """Names ``more`` and the tensors: their names, dtypes, shapes and content.

    Examples
    --------
    >>> one, other = (tensors_digest([("weight", torch.full((2,), value))]) for value in (1.0, 2.0))
    >>> len(one), one == other
    (32, False)
    """
    digest = hashlib.sha256(more.encode())
    update_digest(digest, tensors)
    return named(digest)


def update_digest(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, dtypes, shapes and content of ``tensors``."""
    for name, value in tensors:
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(octets(value).data)


def named(digest: hashlib._Hash) -> str:
    """The first half of a SHA-256, as text.

    Processors have instructions for SHA-256: it is twice as fast as blake2b.
    """
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Content:
    """What a model and its loss compute, but for what calling them changes.

    Attributes
    ----------
    parts : dict
        Digests by path: of the part once it has been called, and of what it was before where that differs.
    """

    parts: dict[str, list[str]]

    @classmethod
    def of(cls, fresh: Mapping[str, str], called: Mapping[str, str], again: Mapping[str, str]) -> Content:
        """From :func:`contents` before the first call, after some, and after more of them."""
        steady = {path: digest for path, digest in called.items() if again.get(path) == digest}
        return cls(
            {path: list(dict.fromkeys([digest, fresh.get(path, digest)])) for path, digest in steady.items()}
        )

    @property
    def digest(self) -> str:
        """One digest of all parts."""
        called = sorted((path, digests[0]) for path, digests in self.parts.items())
        return hashlib.blake2b(repr(called).encode(), digest_size=16).hexdigest()

    def differing(self, fresh: Mapping[str, str]) -> list[str]:
        """Paths at which another model and loss, not called yet, are others."""
        return sorted(p for p, digests in self.parts.items() if fresh.get(p, digests[0]) not in digests)


def _parts(path: str, value: Any, weights: bool, within: _Within = ()) -> Iterator[tuple[str, str]]:
    held = _attributes(value)
    if held is None:
        yield path, _digest(value, within)
        return
    within = (*within, value)
    kind = type(value)
    yield f"{path}()", _digest(kind if weights else f"{kind.__module__}.{kind.__qualname__}")
    if isinstance(value, nn.Module):
        held |= {**value._parameters, **value._buffers} if weights else {}
        for name, child in value._modules.items():
            yield from _parts(f"{path}.{name}", child, weights, within)
    for name, attribute in held.items():
        yield f"{path}.{name}", _digest(attribute, within)


def _attributes(value: Any) -> dict[str, Any] | None:
    """Attributes of a module or of an object of a user's class; None for everything else."""
    if isinstance(value, nn.Module):
        # empty tables of hooks say nothing, and releases differ in which there are
        return {k: v for k, v in vars(value).items() if not (k in _PRIVATE or _is_empty_table(k, v))}
    whole = isinstance(value, type | types.FunctionType | types.MethodType | functools.partial | Tensor)
    return None if whole or not hasattr(value, "__dict__") or _is_library(type(value)) else dict(vars(value))


def _is_empty_table(name: str, value: Any) -> bool:
    if not name.startswith("_"):
        return False
    return value is None or value is False or (isinstance(value, dict | set | list) and not value)


def _is_library(value: Any) -> bool:
    """Whether its code is installed, and so goes by its name."""
    return _installed(str(getattr(value, "__module__", None) or "builtins"))


@functools.cache
def _installed(name: str) -> bool:
    root = name.partition(".")[0]
    if root == "__main__":
        return False
    if root == _OWN or root in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(name) or sys.modules.get(root), "__file__", None)
    return file is not None and (file.startswith(_INSTALLED) or not _FOLDERS.isdisjoint(file.split(os.sep)))


def _digest(value: Any, within: _Within = ()) -> str:
    reader = _Reader(within)
    reader.read(value)
    return reader.digest.hexdigest()


class _Reader:
    """Adds a value to a digest, whatever it is; what was read before is named by its turn."""

    def __init__(self, within: _Within) -> None:
        self._within = within
        self.digest = hashlib.blake2b(digest_size=16)
        self._turns: dict[int, int] = {}
        self._alive: list[Any] = []  # or the identity of what is gone would be given to another

    def read(self, value: Any) -> None:
        """Add ``value``."""
        if isinstance(value, str | bytes | int | float | complex | bool | None):
            self._say(type(value).__name__, repr(value))
            return
        if id(value) in self._turns:
            self._say("again", str(self._turns[id(value)]))
            return
        self._turns[id(value)] = len(self._turns)
        self._alive.append(value)
        self._say(type(value).__qualname__)
        self._read_kind(value)

    def _say(self, *words: str) -> None:
        for word in words:
            self.digest.update(f"{len(word)}:{word}".encode())

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.read(value)

    def _read_kind(self, value: Any) -> None:
        match value:
            case Tensor() if torch._C._functorch.is_functorch_wrapped_tensor(value):
                self._say("left by a derivative")  # a call kept what it computed; its values are gone
            case Tensor():
                self._array(octets(value), value)
            case np.ndarray() if not value.dtype.hasobject:
                self._array(np.ascontiguousarray(value), value)
            case Mapping():
                self._all(item for pair in value.items() for item in pair)
            case set() | frozenset():
                self._all(sorted(_digest(item) for item in value))
            case tuple() | list() | np.ndarray():
                self._all(value)
            case nn.Module():
                self._module(value)
            case _:
                self._read_code(value)

    def _read_code(self, value: Any) -> None:
        match value:
            case functools.partial():
                self._all((value.func, value.args, value.keywords))
            case types.MethodType():
                self._all((value.__func__, value.__self__))
            case types.FunctionType():
                self._function(value)
            case types.CodeType():
                self.digest.update(value.co_code)
                self._all((value.co_names, value.co_consts))
            case type():
                self._class(value)
            case staticmethod() | classmethod():
                self.read(value.__func__)
            case property():
                self._all((value.fget, value.fset))
            case _:
                self._object(value)

    def _module(self, value: nn.Module) -> None:
        for turn, outer in enumerate(self._within):
            if outer is value:  # a module that holds a method of its own, or what holds it
                self._say("within", str(turn))
                return
        self._all(_parts("", value, weights=True, within=self._within))

    def _array(self, content: np.ndarray[Any, Any], value: Any) -> None:
        self._say(str(value.dtype), str(tuple(value.shape)))
        self.digest.update(content.data if content.size else b"")

    def _function(self, value: types.FunctionType) -> None:
        self._say(value.__module__ or "", value.__qualname__)
        if _is_library(value):
            return
        self._all((value.__code__, value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:  # not filled yet: a function that refers to itself
                self._say("empty")
        for name in sorted(_names(value.__code__) & value.__globals__.keys()):
            held = value.__globals__[name]
            self._say(name)
            if not isinstance(held, types.ModuleType):
                self.read(held)

    def _class(self, value: type) -> None:
        self._say(value.__module__, value.__qualname__)
        for base in value.__mro__:
            if not _is_library(base):
                self._say(base.__qualname__)
                for name, held in sorted(vars(base).items()):
                    if not (name.startswith("__") and not callable(held)):
                        self._say(name)
                        self.read(held)

    def _object(self, value: Any) -> None:
        if hasattr(value, "__wrapped__"):
            self.read(value.__wrapped__)
        elif not hasattr(value, "__dict__"):  # a dtype, a device, a pattern
            self._say(getattr(value, "__qualname__", ""), _ADDRESS.sub("", repr(value)))
        elif not _is_library(type(value)):
            self.read(type(value))
            self._all(item for pair in sorted(vars(value).items()) for item in pair)


def _names(code: types.CodeType) -> set[str]:
    """Names that the code, or code within it, may read from its module."""
    within = (_names(held) for held in code.co_consts if isinstance(held, types.CodeType))
    return set(code.co_names).union(*within)
