"""dask_influence tells which training points made a model do this.

A distributed engine for influence functions: a coordinator builds the regularized
curvature of a trained PyTorch model (or a low-rank sketch of it) from sums over data
chunks, publishes it once, and maps strips of test × train scores over a Dask cluster into
one Zarr group.
"""

from dask_influence.arguments import InfluenceMode
from dask_influence.core.estimators.preconditioners import JacobiPreconditioner, NystroemPreconditioner
from dask_influence.execution.verify import verify
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.models import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GradientDotInfluence,
    InverseHarmonicMeanInfluence,
    LissaInfluence,
    NystroemSketchInfluence,
)
from dask_influence.reductions import GroupSum, SelfInfluence, TopK
from dask_influence.storage.results import open_influences

__version__ = "0.1.0"

__all__ = [
    "ArnoldiInfluence",
    "CgInfluence",
    "DirectInfluence",
    "EkfacInfluence",
    "GradientDotInfluence",
    "GroupSum",
    "InfluenceFunctionModel",
    "InfluenceMode",
    "InverseHarmonicMeanInfluence",
    "JacobiPreconditioner",
    "LissaInfluence",
    "NystroemPreconditioner",
    "NystroemSketchInfluence",
    "SelfInfluence",
    "TopK",
    "open_influences",
    "verify",
]
