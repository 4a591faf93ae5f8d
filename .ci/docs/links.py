"""Follows the links of built pages: what they lead to must be there, and addresses elsewhere must be well formed."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

ATTRIBUTES = {"a": "href", "link": "href", "img": "src", "script": "src"}


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what matters of one tag."""
        values = dict(attrs)
        if link := values.get(ATTRIBUTES.get(tag, "")):
            self.links.append(link)
        self.anchors |= {name for key in ("id", "name") if (name := values.get(key))}


def broken(folder: Path) -> list[str]:
    """Every link of a page in ``folder`` that leads nowhere, with its page."""
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    return [
        f"{path.relative_to(folder.resolve())}: {link} {wrong}"
        for path, page in pages.items()
        for link in page.links
        if (wrong := fault(link, path, pages)) is not None
    ]


def fault(link: str, path: Path, pages: dict[Path, Page]) -> str | None:
    """What is wrong with a ``link`` of the page at ``path``, if anything."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return None if well_formed(parts) else "is no address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return "leads to no file"
    anchors = pages[target].anchors if target in pages else {parts.fragment}
    return (
        None if not parts.fragment or unquote(parts.fragment) in anchors else "leads to no place on that page"
    )


def well_formed(parts: SplitResult) -> bool:
    """Whether an address can be one: it is not asked for."""
    if parts.scheme in ("data", "mailto"):
        return bool(parts.path)
    return parts.scheme in ("http", "https") and "." in parts.netloc and " " not in parts.geturl()
