"""Stability: how far scores, and the training points they put first, depend on λ or on the rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from dask_influence.errors import ConfigurationError
from dask_influence.execution.progress import check_progress, reporting
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.scalars import check_integer, check_number
from dask_influence.storage.sources import as_source
from dask_influence.validation import statistics
from dask_influence.validation.variants import variant

SYMBOLS = {"hessian_regularization": "λ", "rank": "rank"}


@dataclass(frozen=True)
class Stability:
    """Agreement of the scores at each λ, or at each rank, with those at each other one.

    Attributes
    ----------
    values : tuple of float
        The L values of λ, or ranks, ascending.
    correlation : numpy array
        (L, L): Spearman correlation of the scores of a test point, mean over test points.
    overlap : numpy array
        (L, L): share that the first k training points have in common, mean over test points.
    k : int
        As above.
    varied : str
        ``"hessian_regularization"`` or ``"rank"``.
    """

    values: tuple[float, ...]
    correlation: np.ndarray = field(repr=False)
    overlap: np.ndarray = field(repr=False)
    k: int
    varied: str = "hessian_regularization"

    @property
    def symbol(self) -> str:
        """What ``varied`` is called in tables and pictures."""
        return SYMBOLS[self.varied]

    def __str__(self) -> str:
        parts = (("rank correlation", self.correlation), (f"common among the first {self.k}", self.overlap))
        lines = []
        for title, matrix in parts:
            lines.append(f"{title:<24}" + "".join(f"{value:>10g}" for value in self.values))
            lines += [
                f"{f'{self.symbol} = {value:g}':<24}" + "".join(f"{entry:>10.3f}" for entry in row)
                for value, row in zip(self.values, matrix, strict=True)
            ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "varied": self.varied,
            "values": list(self.values),
            "correlation": self.correlation.tolist(),
            "overlap": self.overlap.tolist(),
            "k": self.k,
        }

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """The correlations as a picture.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.6, 3.8), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(self.correlation, vmin=0, vmax=1, cmap="viridis")
        labels = [f"{value:g}" for value in self.values]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(self.symbol)
        axes.set_ylabel(self.symbol)
        for row, values in enumerate(self.correlation):
            for column, value in enumerate(values):
                ink = "black" if value > 0.6 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
        figure.colorbar(image, label="rank correlation of scores")
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def stability(
    influence: InfluenceFunctionModel,
    train: Any,
    test: Any,
    *,
    regularizations: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
    k: int = 10,
    progress: bool | Callable[[str, int, int], None] | None = None,
) -> Stability:
    """Scores at several λ, or at several ranks, against each other.

    At several λ the fit is not repeated; at each rank it is.

    Parameters
    ----------
    influence : InfluenceFunctionModel
        Fitted on ``train``; of an estimator that can change λ, or for ``ranks`` has one.
    train, test
        Data as everywhere.
    regularizations : sequence of float, optional
        Values of λ; default a tenth of that of the fit, itself, and ten times as much.
    ranks : sequence of int, optional
        Ranks instead, of a low-rank estimator (Arnoldi, Nyström), at the λ of the fit.
    k : int
        How many training points count as the first.
    progress : bool or callable
        Show a bar, or call it with stage, done, total.

    Returns
    -------
    Stability
        Correlations and overlaps of each with each.

    Returns
    -------
    Stability
        (L, L) correlations and overlaps.

    Raises
    ------
    ConfigurationError
        Fewer than two different values, or both kinds; an estimator without a rank; k larger than the
        number of training points.
    NotFittedError
        ``influence`` is not fitted.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import ArnoldiInfluence
    >>> from dask_influence.validation import stability
    >>> train = torch.randn(30, 3), torch.randn(30, 1)
    >>> loss = torch.nn.functional.mse_loss
    >>> influence = ArnoldiInfluence(torch.nn.Linear(3, 1), loss, 0.1, rank=3).fit(train)
    >>> found = stability(influence, train, (train[0][:4], train[1][:4]))
    >>> found.values, found.correlation.shape, float(found.correlation[0, 0])
    ((0.01, 0.1, 1.0), (3, 3), 1.0)
    >>> stability(influence, train, (train[0][:4], train[1][:4]), ranks=(1, 2, 3)).varied
    'rank'
    """
    influence._require_fit()
    check_progress(progress)
    sources = as_source(train, "train"), as_source(test, "test")
    check_integer("k", k, 1, len(sources[0]))
    if ranks is not None and regularizations is not None:
        raise ConfigurationError("give regularizations or ranks, and leave the other out")
    if ranks is None:
        varied, values = (
            "hessian_regularization",
            _different("regularizations", _around(influence, regularizations)),
        )
        at = [influence.with_regularization(value) for value in values]
    else:
        varied, values = "rank", _different("ranks", ranks)
        at = [_at_rank(influence, value) for value in values]
    (x, y), (x_test, y_test) = (source.read(0, len(source)) for source in sources)
    scores = []
    with reporting(progress) as report:
        for model in at:
            if varied == "rank":
                model.fit(train)
            scores.append(np.asarray(model.influences(x_test, y_test, x, y), np.float64))
            report("stability", len(scores), len(at))
    first = [np.argsort(-part, axis=1, kind="stable")[:, :k] for part in scores]
    correlation = np.array([[statistics.mean(statistics.spearman(a, b)) for b in scores] for a in scores])
    overlap = np.array([[_common(a, b) for b in first] for a in first])
    return Stability(values, correlation, overlap, k, varied)


def _around(influence: InfluenceFunctionModel, given: Sequence[float] | None) -> Sequence[float]:
    if given is not None:
        return given
    own = influence.hessian_regularization
    if isinstance(own, Mapping):
        raise ConfigurationError("regularizations must be given where the model has a λ for each block")
    return (float(f"{own / 10:.12g}"), own, float(f"{own * 10:.12g}"))


def _different(name: str, given: Sequence[Any]) -> tuple[Any, ...]:
    if not isinstance(given, Sequence | np.ndarray):
        raise ConfigurationError(f"{name} must be a sequence of numbers; got {given!r}")
    for value in given:
        check_number(name, value)
    values = tuple(sorted(set(given)))
    if len(values) < 2:
        raise ConfigurationError(f"{name} must hold two or more different values; got {given!r}")
    return values


def _at_rank(influence: InfluenceFunctionModel, rank: int) -> InfluenceFunctionModel:
    """The same model at another rank, not fitted; refused where it has none, or cannot have this one."""
    if not hasattr(influence.configuration, "rank"):
        raise ConfigurationError(
            f"{type(influence).__name__} has no rank; take ArnoldiInfluence or NystroemSketchInfluence, or "
            "give regularizations"
        )
    check_integer("ranks", rank, 1, influence._require_fit().system.size - 1)
    return variant(influence, rank=rank)


def _common(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in zip(a, b, strict=True)]))
