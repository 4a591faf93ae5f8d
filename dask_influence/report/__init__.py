"""Report: one HTML file of what a store holds, and the figures in it as matplotlib functions.

:mod:`~dask_influence.report.facts` reads record and ledger, :mod:`~dask_influence.report.scores` the few scores
that are shown, :mod:`~dask_influence.report.data` and :mod:`~dask_influence.report.samples` draw samples as what
they are; :mod:`~dask_influence.report.contents` decides what is said, the template in ``templates/`` how it is set.
Everything that is no figure of this package's own is escaped, and the page loads nothing.

Extra ``report``: Jinja and matplotlib.
"""

from __future__ import annotations

from dask_influence.report.figures import (
    residuals,
    score_distribution,
    self_influence,
    spectrum,
    timing,
    top_scores,
)
from dask_influence.report.writing import report

__all__ = [
    "report",
    "residuals",
    "score_distribution",
    "self_influence",
    "spectrum",
    "timing",
    "top_scores",
]
