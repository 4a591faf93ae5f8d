"""A report as tests see it: parsed with the standard library's own parser, and held against what HTML asks for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = {"meta", "link", "img", "br", "hr", "input"}
DRAWN = {"path", "use", "rect", "circle", "line", "polygon", "polyline", "clippath", "defs", "g"}


@dataclass
class Element:
    """One element: its tag, its attributes, what is in it."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    inside: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for one in self.inside:
            if isinstance(one, Element):
                yield from one.walk()

    def all(self, tag: str, kind: str | None = None) -> list[Element]:
        """Elements of a tag, of a class where one is given."""
        return [
            one
            for one in self.walk()
            if one.tag == tag and (kind is None or kind in one.attributes.get("class", "").split())
        ]

    def one(self, tag: str, kind: str | None = None) -> Element:
        (found,) = self.all(tag, kind)
        return found

    @property
    def text(self) -> str:
        """All text in it, blanks as one."""
        words = "".join(one if isinstance(one, str) else f" {one.text} " for one in self.inside)
        return " ".join(words.split())


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document", {})
        self._at = self.root

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        fresh = Element(tag, {name: value or "" for name, value in attrs}, self._at)
        self._at.inside.append(fresh)
        if tag not in VOID:
            self._at = fresh

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._at.tag == tag, f"</{tag}> closes <{self._at.tag}>"
        assert self._at.parent is not None
        self._at = self._at.parent

    def handle_data(self, data: str) -> None:
        self._at.inside.append(data)

    def finished(self) -> Element:
        assert self._at is self.root, f"<{self._at.tag}> is never closed"
        return self.root


def parsed(text: str) -> Element:
    """The document, every element of which is closed where it has to be."""
    assert text.startswith("<!DOCTYPE html>")
    parser = _Parser()
    parser.feed(text)
    parser.close()
    return parser.finished()


def check(document: Element) -> None:
    """What every report keeps: nothing from outside, nothing that runs, and names for all that can be pointed at."""
    elements = list(document.walk())
    assert not document.all("script")
    assert not [name for one in elements for name in one.attributes if name.startswith("on")]
    for one in elements:
        for name in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            target = one.attributes.get(name, "#")
            assert target.startswith(("#", "data:")), f"<{one.tag} {name}={target[:60]!r}> leads outside"
        if "url(" in one.attributes.get("style", ""):
            assert "url(#" in one.attributes["style"]
    (style,) = document.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (policy,) = [one for one in document.all("meta") if "http-equiv" in one.attributes]
    assert policy.attributes["content"].startswith("default-src 'none'")
    ids = [one.attributes["id"] for one in elements if "id" in one.attributes]
    assert len(ids) == len(set(ids)), sorted({one for one in ids if ids.count(one) > 1})
    pointed = [
        one.attributes[name].removeprefix("#")
        for one in elements
        for name in ("href", "xlink:href", "aria-labelledby")
        if one.attributes.get(name, "data:,").startswith("#")
        or (name == "aria-labelledby" and name in one.attributes)
    ]
    assert set(pointed) <= set(ids), set(pointed) - set(ids)
    assert all(one.attributes.get("alt") for one in document.all("img"))
    assert all(one.attributes.get("aria-label") for one in document.all("svg"))
    assert all(table.all("caption") for table in document.all("table"))
    levels = [int(one.tag[1]) for one in elements if one.tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert document.one("html").attributes["lang"] == "en"


# -- what a report says ----------------------------------------------------------------------
def notes(document: Element) -> str:
    """What it does not show."""
    return " ".join(one.text for one in document.all("div", "notes"))


def cases(document: Element) -> dict[str, Element]:
    """Each test point by its heading."""
    return {one.one("h3").text: one for one in document.all("article", "case")}


def listed(case: Element) -> list[list[str]]:
    """Ids in each list of one case."""
    return [[name.all("b")[0].text for name in side.all("p", "name")] for side in case.all("div", "side")]
