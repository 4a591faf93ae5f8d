"""Stability: how far scores, and the training points they put first, depend on λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import numpy as np

from dask_influence.errors import ConfigurationError
from dask_influence.influence import InfluenceFunctionModel
from dask_influence.scalars import check_integer
from dask_influence.validation import statistics


@dataclass(frozen=True)
class Stability:
    """Agreement of the scores at each λ with those at each other one.

    Attributes
    ----------
    regularizations : tuple of float
        The L values of λ, ascending.
    correlation : numpy array
        (L, L): Spearman correlation of the scores of a test point, mean over test points.
    overlap : numpy array
        (L, L): share that the first k training points have in common, mean over test points.
    k : int
        As above.
    """

    regularizations: tuple[float, ...]
    correlation: np.ndarray = field(repr=False)
    overlap: np.ndarray = field(repr=False)
    k: int

    def __str__(self) -> str:
        parts = (("rank correlation", self.correlation), (f"common among the first {self.k}", self.overlap))
        lines = []
        for title, matrix in parts:
            lines.append(f"{title:<24}" + "".join(f"{value:>10g}" for value in self.regularizations))
            lines += [
                f"{'λ = ' + format(value, 'g'):<24}" + "".join(f"{entry:>10.3f}" for entry in row)
                for value, row in zip(self.regularizations, matrix, strict=True)
            ]
        return "\n".join(lines)

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
        labels = [f"{value:g}" for value in self.regularizations]
        axes.set_xticks(range(len(labels)), labels)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("λ")
        axes.set_ylabel("λ")
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
    k: int = 10,
) -> Stability:
    """Scores at several λ against each other; the fit is not repeated.

    Parameters
    ----------
    influence : InfluenceFunctionModel
        Fitted; of an estimator that can change λ.
    train, test : pairs of arrays
        Data as for :meth:`~dask_influence.InfluenceFunctionModel.influences`.
    regularizations : sequence of float, optional
        Values of λ; default a tenth of that of the fit, itself, and ten times as much.
    k : int
        How many training points count as the first.

    Returns
    -------
    Stability
        (L, L) correlations and overlaps.

    Raises
    ------
    ConfigurationError
        Fewer than two different values; k larger than the number of training points.
    NotFittedError
        ``influence`` is not fitted.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import DirectInfluence
    >>> from dask_influence.validation import stability
    >>> train = torch.randn(30, 3), torch.randn(30, 1)
    >>> loss = torch.nn.functional.mse_loss
    >>> influence = DirectInfluence(torch.nn.Linear(3, 1), loss, 0.1).fit(train)
    >>> found = stability(influence, train, (train[0][:4], train[1][:4]))
    >>> found.regularizations, found.correlation.shape, float(found.correlation[0, 0])
    ((0.01, 0.1, 1.0), (3, 3), 1.0)
    """
    influence._require_fit()
    own = influence.hessian_regularization
    if regularizations is None:
        regularizations = (float(f"{own / 10:.12g}"), own, float(f"{own * 10:.12g}"))
    values = tuple(sorted(set(regularizations)))
    if len(values) < 2:
        raise ConfigurationError(
            f"regularizations must hold two or more different values; got {regularizations!r}"
        )
    check_integer("k", k, 1, len(train[1]))
    scores = [
        np.asarray(influence.with_regularization(value).influences(*test, *train), np.float64)
        for value in values
    ]
    first = [np.argsort(-part, axis=1, kind="stable")[:, :k] for part in scores]
    correlation = np.array([[statistics.mean(statistics.spearman(a, b)) for b in scores] for a in scores])
    overlap = np.array([[_common(a, b) for b in first] for a in first])
    return Stability(values, correlation, overlap, k)


def _common(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in zip(a, b, strict=True)]))
