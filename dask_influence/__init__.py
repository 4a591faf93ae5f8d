"""dask_influence tells which training points made a model do this.

A distributed engine for influence functions: a coordinator builds the regularized
curvature of a trained PyTorch model (or a low-rank sketch of it) from sums over data
chunks, publishes it once, and maps strips of test × train scores over a Dask cluster into
one Zarr group.

Names are imported when they are first used: every ``dask`` command, a scheduler's among them, loads
the entry point in ``dask_influence.cli``, and must not load torch for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dask_influence import settings

if TYPE_CHECKING:
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

_ELSEWHERE = {
    "GroupSum": "reductions",
    "InfluenceFunctionModel": "influence",
    "InfluenceMode": "arguments",
    "JacobiPreconditioner": "core.estimators.preconditioners",
    "NystroemPreconditioner": "core.estimators.preconditioners",
    "SelfInfluence": "reductions",
    "TopK": "reductions",
    "open_influences": "storage.results",
    "verify": "execution.verify",
}
"""Modules of the names that are not in ``models``."""

settings.install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'models')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
