"""Job files as text: YAML with the line of every field, and values from the environment.

Values are put in after parsing, so that what they hold is never taken for YAML, and an error shows
the file as it is written: ``${NAME}``, not what NAME stands for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dask_influence.errors import ConfigurationError

Key = tuple[str | int, ...]
"""Where a field is: ``("data", "train", "zarr")``."""

_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})")

_SHORTEST_SECRET = 4
"""Characters: what is shorter ("up", "10") hides nothing, and would be found in every other word."""


class JobError(ConfigurationError):
    """A job file cannot be used; begins with its name and the line."""


@dataclass(frozen=True)
class Document:
    """A job file before it is known to be one.

    Attributes
    ----------
    name : str
        Of the file, as errors call it.
    folder : Path
        Relative paths of the job start here.
    raw : mapping
        What the file says, variables as they are written.
    lines : mapping
        Line of each field, from 1.
    """

    name: str
    folder: Path
    raw: Mapping[str, Any]
    lines: Mapping[Key, int] = field(repr=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Document:
        """The document in the file ``path``.

        Raises
        ------
        JobError
            There is none, or it is no YAML mapping; names the line.
        """
        path = Path(path)
        try:
            written = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise JobError(f"cannot read the job file {path}: {error}") from error
        return cls.parse(written, str(path), path.absolute().parent)

    @classmethod
    def parse(cls, written: str, name: str = "job", folder: Path = Path()) -> Document:
        """The document of a text.

        Examples
        --------
        >>> document = Document.parse("cluster: {workers: 2}")
        >>> document.raw, document.lines[("cluster", "workers")]
        ({'cluster': {'workers': 2}}, 1)
        """
        try:
            loader = yaml.SafeLoader(written)
            node = loader.get_single_node()
            lines: dict[Key, int] = {(): 1}
            _collect(node, (), lines, name)
            raw = None if node is None else loader.construct_document(node)
        except RecursionError:
            raise JobError(f"{name}: an anchor (&) holds an alias (*) of itself; write it out") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = "" if mark is None else f", line {mark.line + 1}"
            raise JobError(
                f"{name}{line}: this is not YAML: {error.problem}; quote what holds : {{ }} [ ] or #"
            ) from None
        except yaml.YAMLError as error:  # a control character, which has no line
            raise JobError(f"{name}: this is not YAML: {type(error).__name__}") from None
        if not isinstance(raw, dict):
            found = "nothing" if raw is None else type(raw).__name__
            raise JobError(
                f"{name}, line 1: a job is a mapping with the sections model, loss, data …; got {found}"
            )
        return cls(name, folder, raw, lines)

    def place(self, key: Key) -> Key:
        """The part of ``key`` that the file holds, without what a schema put between its names.

        >>> document = Document.parse("estimator: {name: Cg, rank: 2}")
        >>> document.place(("estimator", "Cg", "rank")), document.place(("data", "train"))
        (('estimator', 'rank'), ())
        """
        found: Key = ()
        for part in key:
            if (*found, part) in self.lines:
                found = (*found, part)
        return found

    def refusal(self, key: Key, message: str) -> JobError:
        """The error that says ``message`` of the field ``key``, with its line."""
        place = ".".join(map(str, key))
        return JobError(
            f"{self.name}, line {self.lines[self.place(key)]}: {place + ': ' if place else ''}{message}"
        )

    def shown(self, key: Key) -> Any:
        """What the file holds at ``key``, as it is written."""
        value: Any = self.raw
        for part in key:
            value = value[part]
        return value

    def resolved(self, environment: Mapping[str, str]) -> tuple[dict[str, Any], Secrets]:
        """The values, variables replaced, and what came from the environment.

        Raises
        ------
        JobError
            A variable is not set, and has no default; names the line, the field and the variable.
        """
        hidden: dict[str, str] = {}

        def replaced(value: Any, key: Key) -> Any:
            if isinstance(value, dict):
                return {name: replaced(below, (*key, name)) for name, below in value.items()}
            if isinstance(value, list):
                return [replaced(below, (*key, index)) for index, below in enumerate(value)]
            return (
                _VARIABLE.sub(lambda match: look_up(match, key), value) if isinstance(value, str) else value
            )

        def look_up(match: re.Match[str], key: Key) -> str:
            escaped, name, default = match.groups()
            if escaped:
                return "$"
            found = environment.get(name)
            if found:
                hidden[found] = f"${{{name}}}"
                return found
            if default is None:
                raise self.refusal(
                    key,
                    f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}",
                )
            return str(default)

        return replaced(self.raw, ()), Secrets(hidden)


@dataclass(frozen=True)
class Secrets:
    """What must not be shown, and what is shown in its place.

    Examples
    --------
    >>> secrets = Secrets({"hunter2": "${PASSWORD}"})
    >>> secrets.hide("denied: hunter2"), secrets
    ('denied: ${PASSWORD}', Secrets(1))
    """

    shown_as: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Secrets({len(self.shown_as)})"

    def __or__(self, other: Secrets) -> Secrets:
        return Secrets({**self.shown_as, **other.shown_as})

    def and_values(self, tree: Any) -> Secrets:
        """These, and every text in ``tree``, shown as an ellipsis."""
        found = dict.fromkeys(_texts(tree), "…")
        return Secrets({**found, **self.shown_as})

    def hide(self, text: str) -> str:
        """``text`` without any of them."""
        for value in sorted(self.shown_as, key=len, reverse=True):  # one may hold another
            if len(value) >= _SHORTEST_SECRET:
                for form in {value, repr(value)[1:-1]}:
                    text = text.replace(form, self.shown_as[value])
        return text


def _texts(tree: Any) -> list[str]:
    if isinstance(tree, Mapping):
        return [text for value in tree.values() for text in _texts(value)]
    if isinstance(tree, list | tuple):
        return [text for value in tree for text in _texts(value)]
    return [tree] if isinstance(tree, str) else []


def _collect(node: yaml.Node | None, key: Key, lines: dict[Key, int], name: str) -> None:
    """Lines of everything below ``node``; refuses a name that is given twice, of which YAML keeps the last."""
    if isinstance(node, yaml.MappingNode):
        for named, value in node.value:
            if not isinstance(named, yaml.ScalarNode):
                continue  # refused where the document is constructed
            below = (*key, named.value)
            if below in lines:
                place, line = ".".join(map(str, below)), named.start_mark.line + 1
                raise JobError(
                    f"{name}, line {line}: {place} is given twice, first in line {lines[below]}; remove one"
                )
            lines[below] = named.start_mark.line + 1
            _collect(value, below, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*key, index)] = value.start_mark.line + 1
            _collect(value, (*key, index), lines, name)
