"""Leave-one-out and datamodeling scores of models whose training has a closed form."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dask_influence import DirectInfluence, GradientDotInfluence
from dask_influence.errors import (
    ConfigurationError,
    DataWarning,
    IncompleteRunError,
    NotFittedError,
)
from dask_influence.validation import Agreement, leave_one_out, linear_datamodeling_score

LAMBDA = 0.05
LOSS = nn.functional.mse_loss


def samples(seed: int, n: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=random)
    noise = torch.randn(n, 1, dtype=torch.float64, generator=random)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]], dtype=torch.float64) + noise


TRAIN, TEST = samples(0, 60), samples(1, 7)


def ridge(x: Tensor, y: Tensor, seed: int = 0) -> nn.Module:
    """The minimum of mean squared error + λ/2 ‖θ‖², bias included."""
    a = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    matrix = 2 * a.mT @ a / len(a) + LAMBDA * torch.eye(a.shape[1], dtype=a.dtype)
    theta = torch.linalg.solve(matrix, 2 * a.mT @ y / len(a))
    model = nn.Linear(x.shape[1], 1, dtype=x.dtype)
    model.weight.data, model.bias.data = theta[:-1].mT.clone(), theta[-1].clone()
    return model


def losses(model: nn.Module, at: tuple[Tensor, Tensor] = TEST) -> np.ndarray:
    with torch.no_grad():
        return (model(at[0]) - at[1]).square()[:, 0].numpy()


@pytest.fixture(scope="module")
def exact() -> DirectInfluence:
    return DirectInfluence(ridge(*TRAIN), LOSS, LAMBDA).fit(TRAIN)


# -- values ----------------------------------------------------------------------------
def test_leave_one_out_is_what_leaving_one_out_shows(exact: DirectInfluence) -> None:
    chosen = [3, 59, 0, 17, 21, 40]
    found = leave_one_out(exact, TRAIN, TEST, ridge, points=chosen)
    before = losses(ridge(*TRAIN))
    actual = []
    for j in chosen:
        keep = torch.arange(60) != j
        actual.append(losses(ridge(TRAIN[0][keep], TRAIN[1][keep])) - before)
    assert np.allclose(found.actual, np.stack(actual, 1), rtol=0, atol=1e-13)
    scores = exact.influences(*TEST, *TRAIN).numpy()[:, chosen] / 60
    assert np.allclose(found.predicted, scores, rtol=0, atol=1e-13)
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(scores, np.stack(actual, 1), strict=True)]
    assert found.value == pytest.approx(np.mean(rows), abs=1e-12)
    assert found.value > 0.999
    assert found.slope == pytest.approx(1, abs=0.2)
    assert found.interval[0] <= found.value <= found.interval[1] + 1e-12
    assert found.noise == 0
    assert found.ceiling is None


def test_datamodeling_score_is_the_rank_correlation_of_sums(exact: DirectInfluence) -> None:
    found = linear_datamodeling_score(exact, TRAIN, TEST, ridge, subsets=12, seeds=(0, 1), fraction=0.4)
    assert found.value > 0.9
    assert found.ceiling == pytest.approx(1)  # the seed changes nothing
    assert found.interval[0] < found.value < found.interval[1] <= 1
    assert found.predicted.shape == found.actual.shape == (7, 12)
    plain = GradientDotInfluence(exact.model, LOSS, 1.0).fit(TRAIN)
    other = linear_datamodeling_score(plain, TRAIN, TEST, ridge, subsets=12, seeds=(0,), fraction=0.4)
    assert np.array_equal(other.actual, found.actual)
    assert other.value < found.value


def test_scores_of_something_else_have_a_score_about_zero(
    exact: DirectInfluence, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = np.random.default_rng(0).normal(size=(7, 60))
    monkeypatch.setattr(DirectInfluence, "influences", lambda *args: scores)
    found = linear_datamodeling_score(exact, TRAIN, TEST, ridge, subsets=40, seeds=(0,))
    assert found.interval[0] < 0 < found.interval[1]
    assert abs(found.value) < 0.2
    monkeypatch.setattr(DirectInfluence, "influences", lambda *args: scores[:, :40])
    one = leave_one_out(exact, TRAIN, TEST, ridge, points=40)
    assert one.interval[0] < 0 < one.interval[1]
    assert abs(one.value) < 0.2


@dataclass
class Noisy:
    """Ridge regression with noise that the seed decides, or that nothing does."""

    size: float
    seeded: bool = True

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        model = ridge(x, y)
        random = torch.Generator()
        if self.seeded:
            random.manual_seed(1000 * seed + len(x))
        else:
            random.seed()
        model.weight.data += self.size * torch.randn(1, 4, generator=random, dtype=torch.float64)
        return model


def test_noise_of_training_lowers_the_ceiling(exact: DirectInfluence) -> None:
    run: Callable[[Any], Agreement] = lambda training: linear_datamodeling_score(  # noqa: E731
        exact, TRAIN, TEST, training, subsets=20, seeds=range(4)
    )
    steady, loud = run(Noisy(0.0)), run(Noisy(0.3))
    assert steady.ceiling == pytest.approx(1)
    assert loud.noise == 0  # every seed gives the same model again


def test_training_that_is_not_deterministic_is_measured_and_told(exact: DirectInfluence) -> None:
    with pytest.warns(DataWarning, match="not deterministic"):
        found = linear_datamodeling_score(
            exact, TRAIN, TEST, Noisy(0.3, seeded=False), subsets=20, seeds=range(4)
        )
    assert found.noise > 1e-3
    assert found.ceiling is not None
    assert found.ceiling < 0.9
    assert "noise" in str(found)


# -- failures, resumption, the cluster --------------------------------------------------
@dataclass
class Counting:
    """Ridge regression that leaves a file for each training, and fails without some sample."""

    folder: str
    needs: float | None = None

    def __call__(self, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        Path(self.folder, f"{os.getpid()}-{len(os.listdir(self.folder))}").touch()
        if self.needs is not None and self.needs not in x[:, 0]:
            raise FloatingPointError("diverged")
        return ridge(x, y)


def test_a_second_call_trains_nothing_again(exact: DirectInfluence, tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    training = Counting(str(tmp_path / "count"))
    first = leave_one_out(exact, TRAIN, TEST, training, points=4, store=tmp_path / "store")
    assert len(os.listdir(tmp_path / "count")) == 6  # all, four without one, all once more
    kept = sorted((tmp_path / "store" / "trained").iterdir())
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-1] + b"x")
    again = leave_one_out(exact, TRAIN, TEST, training, points=4, store=tmp_path / "store")
    assert len(os.listdir(tmp_path / "count")) == 8
    assert np.array_equal(first.actual, again.actual)
    leave_one_out(exact, TRAIN, samples(2, 3), training, points=4, store=tmp_path / "store")
    assert len(os.listdir(tmp_path / "count")) == 14  # other test points are another experiment


def test_a_subset_that_cannot_be_trained_on_is_left_out(exact: DirectInfluence, tmp_path: Path) -> None:
    training = Counting(str(tmp_path), needs=float(TRAIN[0][5, 0]))
    with pytest.warns(
        DataWarning, match=r"failed on 1 of 6 subsets; on number 2: FloatingPointError: diverged"
    ):
        found = leave_one_out(exact, TRAIN, TEST, training, points=[3, 5, 7, 9, 11])
    assert list(found.failures) == [2]
    whole = leave_one_out(exact, TRAIN, TEST, ridge, points=[3, 7, 9, 11])
    assert np.array_equal(found.actual, whole.actual)
    assert np.array_equal(found.predicted, whole.predicted)


def test_too_many_failures_end_it(exact: DirectInfluence, tmp_path: Path) -> None:
    training = Counting(str(tmp_path), needs=float(TRAIN[0][5, 0]))
    with pytest.raises(IncompleteRunError, match=r"training failed on .* of 20 subsets.* 10 are needed"):
        linear_datamodeling_score(exact, TRAIN, TEST, training, subsets=20, seeds=(0,), fraction=0.3)
    with pytest.raises(IncompleteRunError, match="failed on 6 of 6 subsets; on number 0: TypeError"):
        leave_one_out(exact, TRAIN, TEST, lambda x, y, seed: None, points=5)


def test_a_cluster_trains_to_the_same_bits(exact: DirectInfluence, cluster: Any) -> None:
    here = leave_one_out(exact, TRAIN, TEST, ridge, points=5, seeds=(0, 1))
    there = DirectInfluence(exact.model, LOSS, LAMBDA, client=cluster).fit(TRAIN)
    seen: list[tuple[str, int, int]] = []
    found = leave_one_out(
        there, TRAIN, TEST, ridge, points=5, seeds=(0, 1), progress=lambda *state: seen.append(state)
    )
    assert np.array_equal(found.actual, here.actual)
    assert seen[-1] == ("training", 13, 13)


# -- bad input -------------------------------------------------------------------------
@pytest.mark.parametrize("seeds", [3, np.array([3]), range(3, 4)])
def test_seeds_of_every_kind(exact: DirectInfluence, seeds: Any) -> None:
    found = leave_one_out(exact, TRAIN, TEST, ridge, points=3, seeds=seeds)
    assert found.settings["seeds"] == (3,)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"points": 2}, "points must be an integer from 3 to 60; got 2"),
        ({"points": 61}, "points must be an integer from 3 to 60"),
        ({"points": [1, 2, 60]}, "points must be positions from 0 to 59"),
        ({"points": [1, 1, 2]}, "points must be 3 or more different positions"),
        ({"seeds": ()}, "seeds must be one or more different integers"),
        ({"seeds": (1, 1)}, "seeds must be one or more different integers"),
        ({"seeds": (-1,)}, "seeds must be an integer"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1; got 1.0"),
        ({"progress": "yes"}, "progress must be True, False or a callable"),
    ],
)
def test_bad_arguments_are_named(exact: DirectInfluence, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        leave_one_out(exact, TRAIN, TEST, ridge, **given)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"subsets": 9}, "subsets must be an integer ≥ 10; got 9"),
        ({"fraction": 1.0}, "fraction=1.0 of 60"),
        ({"fraction": 0.001}, "are 0"),
        ({"fraction": float("nan")}, "fraction=nan of 60"),
    ],
)
def test_bad_subsets_are_named(exact: DirectInfluence, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        linear_datamodeling_score(exact, TRAIN, TEST, ridge, **given)


def test_what_cannot_be_validated_is_refused(exact: DirectInfluence) -> None:
    with pytest.raises(NotFittedError):
        leave_one_out(DirectInfluence(exact.model, LOSS, LAMBDA), TRAIN, TEST, ridge)
    with pytest.raises(ConfigurationError, match="influence must be a fitted influence model; got int"):
        leave_one_out(3, TRAIN, TEST, ridge)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="training must be callable"):
        leave_one_out(exact, TRAIN, TEST, None)  # type: ignore[arg-type]


def test_text_and_picture(exact: DirectInfluence, tmp_path: Path) -> None:
    found = leave_one_out(exact, TRAIN, TEST, ridge, points=4)
    assert f"{found.value:.4f}" in str(found)
    found.plot(tmp_path / "loo.png")
    assert (tmp_path / "loo.png").stat().st_size > 5000
