"""Validation: whether scores say what training again would show.

Every figure here is measured by training, on the cluster of the influence model or in this process,
and comes with an interval and, where training is noisy, with the highest value that any score could
reach. What has been trained is kept in ``store=`` and not trained again.

- :func:`leave_one_out`: predicted against actual change of the test losses, one training point
  left out at a time (Koh & Liang 2017, section 4.2).
- :func:`linear_datamodeling_score`: the same over random subsets of the training data (Park et al.
  2023, section 2).
- :func:`mislabel_detection`: whether self influence finds labels that are known to be wrong, beside
  the loss and the gradient norm (Koh & Liang 2017, section 5.4).
- :func:`stability`: how far scores depend on λ.

The user gives a training function; :class:`Training` is one, for plain supervised PyTorch.
"""

from __future__ import annotations

from dask_influence.validation.agreement import Agreement
from dask_influence.validation.datamodeling import linear_datamodeling_score
from dask_influence.validation.leave_one_out import leave_one_out
from dask_influence.validation.mislabels import Detection, flip_labels, mislabel_detection
from dask_influence.validation.stability import Stability, stability
from dask_influence.validation.training import Training, TrainingFunction

__all__ = [
    "Agreement",
    "Detection",
    "Stability",
    "Training",
    "TrainingFunction",
    "flip_labels",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_detection",
    "stability",
]
