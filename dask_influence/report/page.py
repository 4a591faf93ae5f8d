"""Page: the template filled, everything escaped but the figures that this package draws itself."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

TEMPLATES = files("dask_influence.report") / "templates"


def rendered(content: Mapping[str, Any]) -> str:
    """The whole document."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string((TEMPLATES / "report.html").read_text("utf-8"))
    css = (TEMPLATES / "report.css").read_text("utf-8")
    return template.render(css=Markup(css), **content)
