"""Estimators of (H + λI)⁻¹, one algorithm in one file."""

from dask_influence.core.estimators.arnoldi import Arnoldi, LowRankInverse
from dask_influence.core.estimators.base import Estimator, Inverse, Round, System
from dask_influence.core.estimators.cg import Cg, CgInverse
from dask_influence.core.estimators.direct import Direct, DirectInverse
from dask_influence.core.estimators.lissa import Lissa, LissaInverse
from dask_influence.core.estimators.nystroem import NystroemSketch, SketchInverse

INVERSES: dict[str, type[Inverse]] = {
    inverse.kind: inverse
    for inverse in (DirectInverse, LowRankInverse, CgInverse, LissaInverse, SketchInverse)
}
"""What :meth:`Inverse.state` was saved from, by kind."""

__all__ = [
    "INVERSES",
    "Arnoldi",
    "Cg",
    "Direct",
    "Estimator",
    "Inverse",
    "Lissa",
    "NystroemSketch",
    "Round",
    "System",
]
