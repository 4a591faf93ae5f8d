"""Estimators of (H + λI)⁻¹, one algorithm in one file."""

from dask_influence.core.estimators.arnoldi import Arnoldi, LowRankInverse
from dask_influence.core.estimators.base import Estimator, Inverse, Round, System
from dask_influence.core.estimators.blocks import BlockDiagonal, BlockInverse, BlockSystem
from dask_influence.core.estimators.cg import Cg, CgInverse
from dask_influence.core.estimators.datainf import DataInf, DataInfInverse
from dask_influence.core.estimators.direct import Direct, DirectInverse
from dask_influence.core.estimators.ekfac import Ekfac, EkfacInverse
from dask_influence.core.estimators.gradient_dot import GradientDot, IdentityInverse
from dask_influence.core.estimators.lissa import Lissa, LissaInverse
from dask_influence.core.estimators.nystroem import NystroemSketch, SketchInverse

INVERSES: dict[str, type[Inverse]] = {
    inverse.kind: inverse
    for inverse in (
        DirectInverse,
        LowRankInverse,
        CgInverse,
        LissaInverse,
        SketchInverse,
        EkfacInverse,
        DataInfInverse,
        IdentityInverse,
        BlockInverse,
    )
}
"""What :meth:`Inverse.state` was saved from, by kind."""

__all__ = [
    "INVERSES",
    "Arnoldi",
    "BlockDiagonal",
    "BlockInverse",
    "BlockSystem",
    "Cg",
    "DataInf",
    "Direct",
    "Ekfac",
    "Estimator",
    "GradientDot",
    "Inverse",
    "Lissa",
    "NystroemSketch",
    "Round",
    "System",
]
