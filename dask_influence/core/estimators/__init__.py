"""Estimators of (H + λI)⁻¹, one algorithm in one file."""

from dask_influence.core.estimators.arnoldi import Arnoldi, LowRankInverse
from dask_influence.core.estimators.base import Estimator, Inverse, Round, System
from dask_influence.core.estimators.direct import Direct, DirectInverse

INVERSES: dict[str, type[Inverse]] = {inverse.kind: inverse for inverse in (DirectInverse, LowRankInverse)}
"""What :meth:`Inverse.state` was saved from, by kind."""

__all__ = ["INVERSES", "Arnoldi", "Direct", "Estimator", "Inverse", "Round", "System"]
