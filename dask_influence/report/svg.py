"""Figures as inline SVG in the page's own colours and type, the same bytes for the same figure."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from dask_influence.report.palette import HARMS, HELPS, LINE, QUIET

INK = "#010203"
"""Stands for the colour of text until the page says which that is."""

THEMED = {INK: "--ink", QUIET: "--quiet", LINE: "--line", HELPS: "--helps", HARMS: "--harms"}
"""Colours of figures and the properties of the style sheet that take their place."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(
    draw: Callable[[Any], object], name: str, description: str, size: tuple[float, float] = (4.4, 2.9)
) -> Markup:
    """What ``draw(ax)`` draws.

    Parameters
    ----------
    draw : callable
        One of the figures, with its data.
    name : str
        Begins the ids in the picture; no two in a page are the same.
    description : str
        What a reader who does not see it is told.
    size : (float, float)
        Inches.
    """
    style: Any = {**STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        content = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(content, format="svg", metadata=nothing)
    return Markup(_inlined(content.getvalue(), name, description))


def _inlined(text: str, name: str, description: str) -> str:
    text = text[text.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>",
        r"<style[^>]*>.*?</style>",
        r"\s*<defs>\s*</defs>",
        r"<!--.*?-->",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    text = re.sub(r"\s(width|height)=\"[\d.]+pt\"", "", text, count=2)
    text = re.sub(r"(id=\"|url\(#|href=\"#)", rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]+;?\s*", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    for colour, property_name in THEMED.items():
        text = text.replace(colour, f"var({property_name})")
    text = re.sub(r"\n\s*", "\n", text)
    label = escape(description, {'"': "&quot;"})
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
