"""Rounds answered from a dense matrix: any spectrum, any failure, no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dask_influence.core.estimators import Inverse, Round, Solution, System
from dask_influence.core.moments import Moments
from dask_influence.execution.drive import drive
from tests import data

SAMPLES = 11


class Answer:
    """Answers product rounds with one (P, P) matrix for each sample, and counts the passes."""

    def __init__(self, per_sample: Tensor, poison: int | None = None) -> None:
        self.per_sample, self.poison = per_sample, poison
        self.passes, self.vectors, self.drawn = 0, 0, list[tuple[range, ...] | None]()

    def __call__(self, request: Round) -> Moments:
        self.passes += 1
        self.drawn.append(request.samples)
        vectors = request.operand["vectors"]
        self.vectors += len(vectors)
        runs: Sequence[range] = request.samples or (range(len(self.per_sample)),)
        indices = torch.tensor([index for run in runs for index in run])
        products = vectors @ self.per_sample[indices].sum(0)
        if self.passes == self.poison:
            products[0, 0] = torch.nan
        return Moments({"products": products}, len(indices))


def system(size: int, regularization: float, dtype: torch.dtype = torch.float64) -> System:
    return System(("weight",), ((size,),), regularization, "hessian", SAMPLES, dtype)


def with_spectrum(values: Sequence[float], noise: float = 0.0) -> Tensor:
    """``SAMPLES`` symmetric matrices whose mean has these eigenvalues."""
    size = len(values)
    basis = torch.linalg.qr(data.normal(81, size, size)).Q
    mean = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T
    deviation = data.normal(82, SAMPLES, size, size)
    deviation = noise * (deviation + deviation.mT)
    return mean + deviation - deviation.mean(0)


def solution(inverse: Inverse, gradients: Tensor, answer: Answer) -> Solution:
    found: Solution = drive(inverse.solve(gradients), answer)
    return found


def solve(inverse: Inverse, gradients: Tensor, answer: Answer) -> Tensor:
    return solution(inverse, gradients, answer).factors


def exact(per_sample: Tensor, regularization: float, gradients: Tensor) -> Tensor:
    mean = per_sample.mean(0)
    return torch.linalg.solve(mean + regularization * torch.eye(len(mean), dtype=mean.dtype), gradients.T).T


def residuals(per_sample: Tensor, regularization: float, gradients: Tensor, factors: Tensor) -> Tensor:
    difference = factors @ per_sample.mean(0) + regularization * factors - gradients
    return difference.norm(dim=1) / gradients.norm(dim=1)
