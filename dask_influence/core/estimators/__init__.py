"""Estimators of (H + λI)⁻¹, one algorithm in one file."""

from dask_influence.core.estimators.arnoldi import Arnoldi
from dask_influence.core.estimators.base import INVERSES, Estimator, Inverse, Round, Solution, System
from dask_influence.core.estimators.blocks import BlockDiagonal, BlockInverse, BlockSystem
from dask_influence.core.estimators.cg import Cg, CgInverse
from dask_influence.core.estimators.datainf import DataInf
from dask_influence.core.estimators.direct import Direct
from dask_influence.core.estimators.ekfac import Ekfac
from dask_influence.core.estimators.gradient_dot import GradientDot
from dask_influence.core.estimators.lissa import Lissa, LissaInverse
from dask_influence.core.estimators.nystroem import NystroemSketch
from dask_influence.core.estimators.sweep import SweepInverse, SweepSystem

__all__ = [
    "INVERSES",
    "Arnoldi",
    "BlockDiagonal",
    "BlockInverse",
    "BlockSystem",
    "Cg",
    "CgInverse",
    "DataInf",
    "Direct",
    "Ekfac",
    "Estimator",
    "GradientDot",
    "Inverse",
    "Lissa",
    "LissaInverse",
    "NystroemSketch",
    "Round",
    "Solution",
    "SweepInverse",
    "SweepSystem",
    "System",
]
