"""Colours of figures: legible on white, and replaced by the page's own in a report."""

from __future__ import annotations

HELPS, HARMS = "#2166ac", "#b2182b"
QUIET = "#6f7680"
LINE = "#d0d4da"
