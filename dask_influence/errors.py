"""Every exception and warning the package raises, so that a caller can catch one kind.

Each class also derives from the built-in exception of the same meaning; code that
already catches ``ValueError`` or ``MemoryError`` keeps working.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class InfluenceError(Exception):
    """Base of all errors raised by dask_influence on purpose."""


class NotFittedError(InfluenceError, RuntimeError):
    """A model is used before its ``fit`` has run."""


class ConfigurationError(InfluenceError, ValueError):
    """An argument, mode, rank, λ, parameter or block name cannot be used."""


class DataError(InfluenceError, ValueError):
    """The data cannot be used: lengths, dtypes, chunks, emptiness, NaN or inf."""


class LossError(InfluenceError, ValueError):
    """The loss is not a scalar mean over the leading axis, or fails on this data."""


class SampleMixingError(InfluenceError, ValueError):
    """The output for one sample depends on the other samples of its batch."""


class DerivativeError(InfluenceError, ArithmeticError):
    """No form of a derivative agrees with finite differences; names the module."""


class SingularCurvatureError(InfluenceError, ArithmeticError):
    """H + λI cannot be inverted; says which λ would do."""


class ConvergenceError(InfluenceError, ArithmeticError):
    """An iteration did not reach its tolerance."""


class StoreError(InfluenceError, OSError):
    """A store cannot be read or written: missing, unwritable, incomplete, no credentials."""


class MissingObjectError(StoreError, FileNotFoundError):
    """A store holds no object of the name asked for."""


class StoreMismatchError(StoreError):
    """A store holds another run: names every entry of the fingerprint that differs."""


class CorruptStoreError(StoreError):
    """Stored bytes do not match the checksum that was written for them."""


class MemoryLimitError(InfluenceError, MemoryError):
    """The plan needs more memory than allowed; quotes both and the nearest setting that fits."""


class ClusterError(InfluenceError, RuntimeError):
    """The cluster cannot run the job: no workers, wrong versions, lost scheduler."""


class IncompleteRunError(InfluenceError, RuntimeError):
    """Some strips failed for good; names what is missing from the store."""


class PoisonedSamplesError(IncompleteRunError, DataError):
    """Some samples have no finite gradient, raise, or crash the process; names them, and the rest is written.

    Attributes
    ----------
    missing : dict
        ``{"train": [{"sample": position, "id": id, "reason": why}], "test": […]}``.
    """

    def __init__(self, message: str, missing: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.missing = dict(missing or {})


class InfluenceWarning(UserWarning):
    """Base of all warnings issued by dask_influence."""


class IndefiniteCurvatureWarning(InfluenceWarning):
    """H + λI is not positive definite; names the λ that would make it so."""


class ConvergenceWarning(InfluenceWarning):
    """An iteration stopped above its tolerance; says the residual it reached."""


class DataWarning(InfluenceWarning):
    """The data are used in another way than they were given (order, chunks, batches)."""
