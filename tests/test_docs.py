"""Docstrings say what the house asks of them, names in them exist, and the reference lists every public name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dask_influence
from dask_influence import DirectInfluence, InfluenceFunctionModel, open_influences

DOCS = Path(__file__).parents[1] / ".ci" / "docs"
PUBLIC = ("dask_influence", "dask_influence.report", "dask_influence.validation")
HEADING = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`~?([\w.]+)`")


def public() -> Iterator[tuple[str, Any]]:
    """Every name that is promised, and what it stands for."""
    for name in PUBLIC:
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            yield from ((f"{name}.{one}", getattr(module, one)) for one in module.__all__)


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class has of its own."""
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        function = value.fget if isinstance(value, property) else function
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


def sections(documented: Any) -> dict[str, str]:
    """Text of each section of its docstring, by heading."""
    parts = HEADING.split(inspect.cleandoc(documented.__doc__ or ""))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def told(documented: Any) -> set[str]:
    """Arguments that its docstring describes."""
    text = sections(documented).get("Parameters", "") + "\n" + sections(documented).get("Attributes", "")
    lines = (line.partition(" :")[0] for line in text.splitlines() if re.match(r"\w", line))
    return {name.strip() for line in lines for name in line.split(",")}


def scope(documented: Any) -> list[Any]:
    """Where a name in its docstring is looked up."""
    module = sys.modules[documented.__module__] if hasattr(documented, "__module__") else documented
    path, found = getattr(documented, "__qualname__", "").split("."), [module]
    for part in path:
        found.append(getattr(found[-1], part, None))
    return found[::-1]


def resolved(name: str, scopes: list[Any]) -> Any:
    """What a role names, in the innermost scope that has it, or by its full path; None where nothing is."""
    for where in (*scopes, dask_influence):
        value = where
        for part in name.split("."):
            value = (
                inspect.getattr_static(value, part, None)
                if inspect.isclass(value)
                else getattr(value, part, None)
            )
        if value is not None:
            return value
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return None


def referred(documented: Any) -> list[Any]:
    """What its docstring names by a role, itself first."""
    names = ROLE.findall(documented.__doc__ or "")
    return [documented, *(resolved(name, scope(documented)) for name in names)]


def arguments(documented: Any) -> set[str]:
    """The arguments that it takes."""
    return set(inspect.signature(documented).parameters) - {"self", "cls"}


def faults(documented: Any, *, example: bool) -> list[str]:
    """What a docstring lacks, in words; arguments and errors may be described where it refers to."""
    if not inspect.getdoc(documented):
        return ["no docstring"]
    if inspect.isclass(documented) and (
        issubclass(documented, Enum) or getattr(documented, "_is_protocol", False)
    ):
        return []
    near, takes, result = referred(documented), arguments(documented), "Attributes" in sections(documented)
    found = [f"no word on {name}" for name in sorted(takes - set().union(*map(told, near)))]
    if inspect.isfunction(documented):
        found += [f"{name} is no argument" for name in sorted(told(documented) - takes)]
        returns = inspect.signature(documented).return_annotation
        if returns not in ("None", None, "Self") and "Returns" not in sections(documented):
            found.append("no Returns")
    if takes and not result and not any("Raises" in sections(one) for one in near):
        found.append("no Raises")
    if example and not result and ">>>" not in documented.__doc__:
        found.append("no Examples")
    return found


@pytest.mark.parametrize(("name", "documented"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_public_names_are_documented(name: str, documented: Any) -> None:
    assert not faults(documented, example=documented is not InfluenceFunctionModel)
    if inspect.isclass(documented):
        undocumented = [method for method, function in methods(documented) if not inspect.getdoc(function)]
        assert not undocumented


@pytest.mark.parametrize("name", [name for name, _ in methods(InfluenceFunctionModel)])
def test_methods_of_models_are_documented(name: str) -> None:
    if isinstance(inspect.getattr_static(InfluenceFunctionModel, name), property):
        assert inspect.getdoc(getattr(InfluenceFunctionModel, name))
    else:
        function = getattr(InfluenceFunctionModel, name)
        assert not faults(getattr(function, "__func__", function), example=False)


def test_what_a_docstring_lacks_is_found() -> None:
    def scores(x: int, y: int) -> int:
        """Scores.

        Parameters
        ----------
        x, z : int
            Data.
        """
        return x + y

    missing = ["no word on y", "z is no argument", "no Returns", "no Raises", "no Examples"]
    assert faults(scores, example=True) == missing
    assert not faults(open_influences, example=True)
    assert "rank" not in arguments(DirectInfluence) | told(InfluenceFunctionModel)


# -- names in docstrings ------------------------------------------------------------------
def modules() -> list[ModuleType]:
    found = pkgutil.walk_packages(dask_influence.__path__, "dask_influence.")
    return [
        dask_influence,
        *(importlib.import_module(one.name) for one in found if not one.name.endswith("__main__")),
    ]


def texts(tree: ast.AST, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every string that stands by itself, docstrings among them, with the names around it."""
    for node in ast.iter_child_nodes(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield path, node.value.value
        inner = (node.name,) if isinstance(node, ast.ClassDef | ast.FunctionDef) else ()
        yield from texts(node, path + inner)


def lost(module: ModuleType, source: str) -> list[str]:
    """Roles in ``source`` that name nothing."""
    found = []
    for path, text in texts(ast.parse(source)):
        scopes = [module]
        for part in path:
            scopes.append(getattr(scopes[-1], part, None))
        found += [name for name in ROLE.findall(text) if resolved(name, scopes[::-1]) is None]
    return found


def test_names_in_docstrings_exist() -> None:
    found = {module.__name__: lost(module, inspect.getsource(module)) for module in modules()}
    assert len(found) > 80
    assert not {name: names for name, names in found.items() if names}


def test_a_name_that_does_not_exist_is_found() -> None:
    source = (
        'class DirectInfluence:\n    """:meth:`fit`, :meth:`fitt`, :mod:`torch.nn`, :func:`torch.nope`"""\n'
    )
    assert lost(dask_influence, source) == ["fitt", "torch.nope"]


# -- the reference ------------------------------------------------------------------------
def test_the_reference_lists_every_public_name() -> None:
    pages = "\n".join(path.read_text() for path in (DOCS / "reference").glob("*.rst"))
    listed = set(re.findall(r"^\.\. auto(?:class|function):: (\S+)$", pages, re.MULTILINE))
    missing = [name for name, _ in public() if name.rpartition(".")[2] not in listed and name not in listed]
    assert not missing


@pytest.fixture
def links() -> ModuleType:
    spec = importlib.util.spec_from_file_location("links", DOCS / "links.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_broken_links_of_pages_are_found(links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "picture.png").touch()
    good = (
        '<a href="sub/b.html#there">b</a> <img src="picture.png"> <a href="https://example.org/x?y#z">e</a>'
    )
    (tmp_path / "a.html").write_text(
        f'{good} <a href="#top">t</a> <p id="top"> <a href="mailto:a@example.org">m</a>'
    )
    (tmp_path / "sub" / "b.html").write_text('<p id="there"> <a href="../a.html">a</a>')
    assert links.broken(tmp_path) == []

    bad = '<a href="sub/b.html#here">b</a> <img src="sub"> <a href="c.html">c</a> <a href="http:/example.org">e</a>'
    (tmp_path / "a.html").write_text(bad)
    assert links.broken(tmp_path) == [
        "a.html: sub/b.html#here leads to no place on that page",
        "a.html: sub leads to no file",
        "a.html: c.html leads to no file",
        "a.html: http:/example.org is no address",
    ]
