"""Validation: whether scores say what training again would show.

Every figure here is measured, on the cluster of the influence model or in this process, and comes
with an interval and, where training is noisy, with the highest value that any score could reach.
What has been measured is kept in ``store=`` and not measured again. The command line has all of it as
``dask-influence validate``.

- :func:`leave_one_out`: predicted against actual change of the test losses, one training point
  left out at a time (Koh & Liang 2017, section 4.2).
- :func:`linear_datamodeling_score`: the same over random subsets of the training data (Park et al.
  2023, section 2).
- :func:`finite_difference_response`: predicted against actual change when a training point gets more or
  less weight, without training again; for models whose loss is convex in θ.
- :func:`proximal_bregman_response`: the same for networks: what scores of networks approximate (Bae et
  al. 2022).
- :func:`mislabel_detection`: whether self influence finds labels that are known to be wrong, beside
  the loss and the gradient norm (Koh & Liang 2017, section 5.4); :func:`planted_mislabels` makes some
  wrong, and trains on them, first.
- :func:`stability`: how far scores depend on λ, or on the rank.

The user gives a training function; :class:`Training` is one, for plain supervised PyTorch, and
:class:`Newton` another, for models that are linear in their parameters.
"""

from __future__ import annotations

from dask_influence.validation.agreement import Agreement
from dask_influence.validation.datamodeling import linear_datamodeling_score
from dask_influence.validation.leave_one_out import leave_one_out
from dask_influence.validation.mislabels import Detection, flip_labels, mislabel_detection, planted_mislabels
from dask_influence.validation.newton import Newton
from dask_influence.validation.response import finite_difference_response, proximal_bregman_response
from dask_influence.validation.stability import Stability, stability
from dask_influence.validation.training import Training, TrainingFunction

__all__ = [
    "Agreement",
    "Detection",
    "Newton",
    "Stability",
    "Training",
    "TrainingFunction",
    "finite_difference_response",
    "flip_labels",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_detection",
    "planted_mislabels",
    "proximal_bregman_response",
    "stability",
]
