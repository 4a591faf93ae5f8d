"""Sphinx configuration of the reference that ``make docs`` builds (see build.py).

A cross reference that leads nowhere is a warning, and warnings fail the build: what has no page must exist at least.
"""

from __future__ import annotations

import builtins
import pkgutil
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import dask_influence

project = "dask_influence"
author = "The dask_influence contributors"
copyright = author  # noqa: A001 - Sphinx's name for it
version = release = dask_influence.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["examples/*.ipynb", "reference/commands.md"]
nitpicky = True
myst_heading_anchors = 3

# Types stand in the docstrings, in words: a signature shows names and defaults alone.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = f"dask_influence {version}"
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def elsewhere(
    app: Sphinx, environment: BuildEnvironment, node: nodes.Element, text: nodes.TextElement
) -> nodes.Node | None:
    """Where a name leads that Sphinx does not find by itself; None makes it a warning.

    A docstring may leave the module of one of our names out. What has no page, of this package or of another, is
    shown without a link, but it must exist.
    """
    if node.get("refdomain") != "py":
        return None
    name, domain = node["reftarget"], environment.get_domain("py")
    ours = [known for known, kind, *_ in domain.get_objects() if known.endswith(f".{name}")]
    if len(ours) == 1:
        document = node.get("refdoc", environment.docname)
        return domain.resolve_xref(environment, document, app.builder, node["reftype"], ours[0], node, text)
    near = ".".join(part for part in (node.get("py:module"), node.get("py:class")) if part)
    within = (f"{prefix}.{name}" for prefix in (near, node.get("py:module")) if prefix)
    return text if any(map(exists, (name, *within))) else None


def exists(name: str) -> bool:
    """Whether it can be imported, or is built in."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        return hasattr(builtins, name)
    return True


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx calls."""
    app.connect("missing-reference", elsewhere)
    return {"parallel_read_safe": True}
