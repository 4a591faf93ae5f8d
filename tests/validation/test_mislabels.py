"""Wrong labels: planted, and found by self influence; and how scores depend on λ."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from dask_influence import (
    ArnoldiInfluence,
    DirectInfluence,
    InfluenceFunctionModel,
    NystroemSketchInfluence,
)
from dask_influence.errors import ConfigurationError, DataError, IncompleteRunError
from dask_influence.validation import (
    Training,
    flip_labels,
    mislabel_detection,
    planted_mislabels,
    stability,
)

LOSS = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def noisy() -> tuple[DirectInfluence, tuple[Tensor, Tensor], np.ndarray]:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(150, 5, dtype=torch.float64, generator=random)
    y, wrong = flip_labels((2 * x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] > 1).long(), 0.1, seed=3)
    model = Training(
        lambda: nn.Linear(5, 3).double(),
        LOSS,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        steps=300,
        regularization=0.01,
    )(x, y, seed=0)
    return DirectInfluence(model, LOSS, 0.01).fit((x, y)), (x, y), wrong


def test_areas_are_those_of_the_diagonal(noisy: Any) -> None:
    influence, train, wrong = noisy
    found = mislabel_detection(influence, train, wrong)
    diagonal = influence.influences(*train).diagonal().numpy()
    flags = np.isin(np.arange(150), wrong)
    assert np.allclose(found.ranked["self influence"], diagonal, rtol=1e-10)
    assert found.areas["self influence"] == pytest.approx(roc_auc_score(flags, diagonal))
    with torch.no_grad():
        each = LOSS(influence.model(train[0]), train[1], reduction="none").numpy()
    assert np.allclose(found.ranked["loss"], each, rtol=1e-12)
    assert found.areas["loss"] == pytest.approx(roc_auc_score(flags, each))
    assert found.areas["self influence"] > 0.85
    for name, (low, high) in found.intervals.items():
        assert low < found.areas[name] < high
    assert found.found("self influence", 1.0) == 1
    assert found.found("self influence", 0.2) > 0.5


def test_labels_that_are_called_wrong_at_random_are_not_found(noisy: Any) -> None:
    influence, train, _ = noisy
    chosen = np.random.default_rng(5).choice(150, 40, replace=False)
    found = mislabel_detection(influence, train, chosen)
    for name, (low, high) in found.intervals.items():
        assert low < 0.5 < high, name


def test_flags_do_as_well_and_it_is_resumed(noisy: Any, tmp_path: Path) -> None:
    influence, train, wrong = noisy
    flags = np.isin(np.arange(150), wrong)
    first = mislabel_detection(influence, train, flags, store=tmp_path / "kept")
    again = mislabel_detection(influence, train, wrong, store=tmp_path / "kept")
    assert first.areas == again.areas
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == ["gradient-norm", "self-influence"]
    first.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").stat().st_size > 5000
    assert "self influence" in str(first)


@pytest.mark.parametrize(
    "wrong", [[], [150], [-1], np.zeros(150, bool), np.ones(150, bool), [0.5], range(150)]
)
def test_positions_that_are_none_are_refused(noisy: Any, wrong: Any) -> None:
    influence, train, _ = noisy
    with pytest.raises(ConfigurationError, match="wrong"):
        mislabel_detection(influence, train, wrong)


def test_a_confidence_that_is_none_is_refused_before_any_training(noisy: Any) -> None:
    influence, train, _ = noisy
    with pytest.raises(ConfigurationError, match="confidence must lie between 0 and 1; got 95"):
        mislabel_detection(influence, train, [1, 2], confidence=95)
    with pytest.raises(ConfigurationError, match="confidence must lie between 0 and 1; got 95"):
        planted_mislabels(influence, train, lambda x, y, seed: 1 / 0, confidence=95)  # type: ignore[arg-type,return-value]


def test_flips_change_the_share_asked_for_and_nothing_else() -> None:
    y = np.repeat([2, 5, 9], 20)
    changed, wrong = flip_labels(y, 0.25, seed=1)
    assert len(wrong) == 15
    assert np.array_equal(np.flatnonzero(changed != y), wrong)
    assert set(changed) == {2, 5, 9}
    tensor, same = flip_labels(torch.from_numpy(y), 0.25, seed=1)
    assert isinstance(tensor, Tensor)
    assert np.array_equal(tensor.numpy(), changed)
    assert np.array_equal(same, wrong)


@pytest.mark.parametrize(
    ("y", "fraction", "error"),
    [
        (np.ones(5, int), 0.5, DataError),
        (np.ones(5), 0.5, DataError),
        (np.eye(3, dtype=int), 0.5, DataError),
        (np.arange(5), 0.0, ConfigurationError),
        (np.arange(5), 1.5, ConfigurationError),
        (np.arange(5), float("nan"), ConfigurationError),
    ],
)
def test_flips_that_cannot_be_are_refused(y: np.ndarray, fraction: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        flip_labels(y, fraction)


def test_stability_compares_each_regularization_with_each(noisy: Any, tmp_path: Path) -> None:
    influence, train, _ = noisy
    test = train[0][:6], train[1][:6]
    found = stability(influence, train, test, regularizations=(1.0, 0.01, 100.0), k=5)
    assert found.values == (0.01, 1.0, 100.0)
    assert np.allclose(np.diag(found.correlation), 1)
    assert np.allclose(found.correlation, found.correlation.T)
    assert found.correlation[0, 2] < found.correlation[0, 1] < 1
    low, high = (influence.with_regularization(v).influences(*test, *train).numpy() for v in (0.01, 1.0))
    common = [
        len(set(np.argsort(-a)[:5]) & set(np.argsort(-b)[:5])) / 5 for a, b in zip(low, high, strict=True)
    ]
    assert found.overlap[0, 1] == pytest.approx(np.mean(common))
    assert "rank correlation" in str(found)
    found.plot(tmp_path / "stability.png")
    assert (tmp_path / "stability.png").stat().st_size > 3000


@pytest.mark.parametrize("kind", [ArnoldiInfluence, NystroemSketchInfluence])
def test_stability_compares_ranks(noisy: Any, kind: type[InfluenceFunctionModel], tmp_path: Path) -> None:
    influence, train, _ = noisy
    test = train[0][:6], train[1][:6]
    sketch = kind(influence.model, LOSS, 0.01, rank=9, curvature="ggn").fit(train)
    found = stability(sketch, train, test, ranks=(17, 2, 9), k=5)
    assert (found.varied, found.values) == ("rank", (2, 9, 17))
    refitted = kind(influence.model, LOSS, 0.01, rank=2, curvature="ggn").fit(train).influences(*test, *train)
    own = sketch.influences(*test, *train)
    rows = [spearmanr(a, b).statistic for a, b in zip(refitted, own, strict=True)]
    assert found.correlation[0, 1] == pytest.approx(np.mean(rows), abs=1e-6)
    assert found.correlation[0, 2] < 1
    assert np.allclose(np.diag(found.correlation), 1)
    assert sketch.configuration.rank == 9
    assert "rank = 17" in str(found)
    assert found.to_json()["varied"] == "rank"
    found.plot(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 3000


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"regularizations": (0.1,)}, "two or more different values"),
        ({"regularizations": (0.1, "much")}, "regularizations must be a number"),
        ({"regularizations": 0.1}, "regularizations must be a sequence"),
        ({"k": 0}, "k must be an integer"),
        ({"k": 151}, "k must be an integer"),
        ({"ranks": (2, 3)}, "DirectInfluence has no rank"),
        ({"ranks": (2, 3), "regularizations": (0.1, 1.0)}, "leave the other out"),
    ],
)
def test_stability_refuses_what_it_cannot_compare(noisy: Any, given: dict[str, Any], match: str) -> None:
    influence, train, _ = noisy
    with pytest.raises(ConfigurationError, match=match):
        stability(influence, train, train, **given)


def test_ranks_that_cannot_be_are_refused_before_a_fit(noisy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    influence, train, _ = noisy
    sketch = ArnoldiInfluence(influence.model, LOSS, 0.01, rank=2).fit(train)
    monkeypatch.setattr(ArnoldiInfluence, "fit", None)
    for ranks in ((3, 18), (0, 3)):
        with pytest.raises(ConfigurationError, match="ranks must be an integer from 1 to 17"):
            stability(sketch, train, train, ranks=ranks)


# -- planted ---------------------------------------------------------------------------
TRAINING = Training(
    partial(nn.Linear, 5, 3, dtype=torch.float64),
    LOSS,
    optimizer=partial(torch.optim.Adam, lr=0.1),
    steps=120,
    regularization=0.01,
)


def test_planted_labels_are_those_of_training_on_them(noisy: Any, tmp_path: Path) -> None:
    influence, (x, y), _ = noisy
    found = planted_mislabels(influence, (x, y), TRAINING, fraction=0.2, seed=4, store=tmp_path)
    labels, wrong = flip_labels(y, 0.2, seed=4)
    model = TRAINING(x, labels, seed=4)
    expected = mislabel_detection(
        DirectInfluence(model, LOSS, 0.01).fit((x, labels)), (x, labels), wrong, seed=4
    )
    assert np.array_equal(found.wrong, expected.wrong)
    assert found.areas == pytest.approx(expected.areas)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = planted_mislabels(influence, (x, y), TRAINING, fraction=0.2, seed=4, store=tmp_path)
    assert again.areas == found.areas
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    (weights,) = tmp_path.glob("weights/*")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # damaged: trained again
    assert (
        planted_mislabels(influence, (x, y), TRAINING, fraction=0.2, seed=4, store=tmp_path).areas
        == found.areas
    )
    assert weights.stat().st_mtime_ns != kept.get(weights)


def broken(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    raise FloatingPointError("diverged")


def other(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    return nn.Linear(5, 4).double()


def test_planting_refuses_training_that_fails_or_makes_something_else(noisy: Any) -> None:
    influence, train, _ = noisy
    with pytest.raises(IncompleteRunError, match="FloatingPointError: diverged"):
        planted_mislabels(influence, train, broken)
    with pytest.raises(ConfigurationError, match="another model than the one that is validated"):
        planted_mislabels(influence, train, other)
    with pytest.raises(ConfigurationError, match="training must be callable"):
        planted_mislabels(influence, train, None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="integer labels"):
        planted_mislabels(influence, (train[0], train[0][:, :1]), TRAINING)
