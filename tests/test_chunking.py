"""Results do not depend on how training or test data are cut: any chunks, ragged, one sample, one chunk."""

from __future__ import annotations

import dask
import dask.array as da
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dask_influence import ArnoldiInfluence, DirectInfluence, InfluenceFunctionModel, NystroemSketchInfluence
from tests import data, oracles

SAME = 1e-10
ESTIMATORS = {
    "direct": lambda case, **how: DirectInfluence(case.model, case.loss, case.regularization, **how),
    "dropped": lambda case, **how: ArnoldiInfluence(
        case.model, case.loss, case.regularization, rank=7, tol=1e-12, **how
    ),
    "woodbury": lambda case, **how: ArnoldiInfluence(
        case.model, case.loss, case.regularization, rank=7, complement=True, tol=1e-12, **how
    ),
}
WHOLE: dict[tuple[str, str], Tensor] = {}


def whole(estimator: str, mode: str) -> Tensor:
    """Scores of the case below from one chunk of everything."""
    if (estimator, mode) not in WHOLE:
        case = data.logistic_regression()
        fitted = ESTIMATORS[estimator](case, chunk_size=10_000).fit(case.train)
        WHOLE[estimator, mode] = fitted.influences(*case.test, *case.train, mode=mode)
    return WHOLE[estimator, mode]


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(chunk_size=st.integers(1, 40))
@settings(max_examples=7)
def test_any_chunk_size(estimator: str, mode: str, chunk_size: int) -> None:
    case = data.logistic_regression()
    fitted = ESTIMATORS[estimator](case, chunk_size=chunk_size).fit(case.train)
    scores = fitted.influences(*case.test, *case.train, mode=mode)
    assert oracles.relative_error(scores, whole(estimator, mode)) <= SAME


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(batch_size=st.integers(1, 31))
@settings(max_examples=7)
def test_any_batch_size_of_a_data_loader(estimator: str, batch_size: int) -> None:
    case = data.logistic_regression()
    fitted = ESTIMATORS[estimator](case).fit(DataLoader(TensorDataset(*case.train), batch_size=batch_size))
    scores = fitted.influences(*case.test, *case.train)
    assert oracles.relative_error(scores, whole(estimator, "up")) <= SAME


def cuts(total: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Compositions of ``total``: dask chunks of any sizes."""
    inner = st.sets(st.integers(1, total - 1), max_size=4)
    return inner.map(
        lambda at: tuple(b - a for a, b in zip([0, *sorted(at)], [*sorted(at), total], strict=True))
    )


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@given(train_cuts=cuts(29), test_cuts=cuts(11), fit_cuts=cuts(29))
@settings(max_examples=6)
def test_any_dask_chunks(
    mode: str, train_cuts: tuple[int, ...], test_cuts: tuple[int, ...], fit_cuts: tuple[int, ...]
) -> None:
    case = data.logistic_regression()

    def lazily(pair: data.Pair, sizes: tuple[int, ...]) -> data.Pair:
        x, y = (a.numpy() for a in pair)
        return da.from_array(x, chunks=(sizes, -1)), da.from_array(y, chunks=(sizes,))

    fitted = ESTIMATORS["direct"](case).fit(lazily(case.train, fit_cuts))
    scores = fitted.influences(*lazily(case.test, test_cuts), *lazily(case.train, train_cuts), mode=mode)
    assert scores.chunks[:2] == (test_cuts, train_cuts)
    assert oracles.relative_error(scores.compute(), whole("direct", mode)) <= SAME


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@given(n=st.integers(1, 11), m=st.integers(1, 29), chunk_size=st.integers(1, 13))
@settings(max_examples=8)
def test_any_part_of_the_data(mode: str, n: int, m: int, chunk_size: int) -> None:
    """Scores of some points are the same whatever else is asked for with them, one point included."""
    case = data.logistic_regression()
    fitted = fitted_once(chunk_size)
    test, train = oracles.pick(case.test, slice(0, n)), oracles.pick(case.train, slice(0, m))
    scores = fitted.influences(*test, *train, mode=mode)
    assert oracles.relative_error(scores, whole("direct", mode)[:n, :m]) <= SAME


FITTED: dict[int, InfluenceFunctionModel] = {}


def fitted_once(chunk_size: int) -> InfluenceFunctionModel:
    """Direct, fitted with this chunk size."""
    if chunk_size not in FITTED:
        case = data.logistic_regression()
        FITTED[chunk_size] = ESTIMATORS["direct"](case, chunk_size=chunk_size).fit(case.train)
    return FITTED[chunk_size]


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("name", ["linear_regression", "mlp_regression"])
def test_more_test_points_than_training_points_and_parameters(name: str, mode: str) -> None:
    """N > M, N > P."""
    case = data.SMALL[name]()
    few = oracles.pick(case.train, slice(0, 5))
    for size in (3, 7):
        fitted = DirectInfluence(case.model, case.loss, case.regularization, chunk_size=size).fit(case.train)
        scores = fitted.influences(*case.test, *few, mode=mode)
        expected = getattr(case, mode)(case.inverse, case.test, few)
        assert oracles.relative_error(scores, expected) <= 1e-9


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(chunk_size=st.integers(1, 13))
@settings(max_examples=4)
def test_symmetric_case(estimator: str, mode: str, chunk_size: int) -> None:
    """influences(x, y) is influences(x, y, x, y), under any chunks."""
    case = data.logistic_regression()
    fitted = ESTIMATORS[estimator](case, chunk_size=chunk_size).fit(case.train)
    alone = fitted.influences(*case.test, mode=mode)
    assert oracles.relative_error(alone, fitted.influences(*case.test, *case.test, mode=mode)) <= SAME


def test_fit_on_one_sample() -> None:
    case = data.logistic_regression()
    one = oracles.pick(case.train, slice(0, 1))
    inverse = oracles.inverse(oracles.hessian(case.model, case.loss, *one), case.regularization)
    for chunk_size in (None, 1, 5):
        fitted = DirectInfluence(case.model, case.loss, case.regularization, chunk_size=chunk_size).fit(one)
        scores = fitted.influences(*case.test, *case.train)
        assert oracles.relative_error(scores, case.up(inverse)) <= 1e-9


def test_a_mean_of_batch_means_would_be_noticed() -> None:
    """The peers' mistake: with chunks of 7 in 29, unweighted means of chunks are another Hessian."""
    case = data.logistic_regression()
    parts = [oracles.pick(case.train, slice(i, i + 7)) for i in range(0, 29, 7)]
    wrong = torch.stack([oracles.hessian(case.model, case.loss, *part) for part in parts]).mean(0)
    scores = case.up(oracles.inverse(wrong, case.regularization))
    assert oracles.relative_error(scores, case.up(case.inverse)) > 1e-2


@pytest.mark.parametrize(("asked", "tasks"), [({}, {1}), ({"influence.torch-threads": 1}, {5, 7})])
def test_a_large_model_in_this_process_is_multiplied_by_all_samples_at_once(
    asked: dict[str, int], tasks: set[int]
) -> None:
    """Tasks that have all threads take what fits; those that run side by side share the samples.

    Products with two vectors have larger sums, and so fewer tasks, than those with one.
    """
    model = torch.nn.Sequential(torch.nn.Linear(300, 220), torch.nn.Tanh(), torch.nn.Linear(220, 1))
    train, told = (torch.randn(1_300, 300), torch.randn(1_300, 1)), set[int]()
    fitted = ArnoldiInfluence(model, torch.nn.functional.mse_loss, 30.0, rank=2, tol=1e-2, chunk_size=100)
    with dask.config.set(asked):
        fitted.fit(train, progress=lambda stage, done, total: told.add(total))
    assert told == tasks


def test_chunks_of_large_models_are_joined() -> None:
    """The sums of a chunk are as large as θ, so that small chunks of a large model would cost mostly sums."""
    x, y = torch.randn(1_300, 40), torch.randn(1_300, 1)
    told: dict[int, int] = {}
    for width, wanted in ((8, 41), (8_000, 3)):
        model = torch.nn.Sequential(torch.nn.Linear(40, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
        loader = DataLoader(TensorDataset(x, y), batch_size=32)
        NystroemSketchInfluence(model, torch.nn.functional.mse_loss, 1.0, rank=1, curvature="ggn").fit(
            loader, progress=lambda stage, done, total, width=width: told.update({width: total})
        )
        assert told[width] == wanted
