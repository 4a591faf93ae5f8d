"""Bad input gets a named error before anything runs, and writes nothing; good input beside it is taken.

Each test looks at both sides of its check. Messages must name the argument and quote what arrived.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    GroupSum,
    JacobiPreconditioner,
    NystroemPreconditioner,
    open_influences,
)
from dask_influence.errors import (
    ConfigurationError,
    DataError,
    DataWarning,
    LossError,
    MemoryLimitError,
    NotFittedError,
    PoisonedSamplesError,
    SampleMixingError,
    SingularCurvatureError,
    StoreError,
    StoreMismatchError,
)
from tests import data, oracles

BOTH = pytest.mark.parametrize("estimator", [DirectInfluence, ArnoldiInfluence])


def case() -> data.Case:
    return data.mlp_classification()


def fit(train: Any = None, estimator: Any = DirectInfluence, **how: Any) -> Any:
    """A model of the case above, with one argument or the data exchanged."""
    model, loss = how.pop("model", case().model), how.pop("loss", case().loss)
    fitted = estimator(model, loss, how.pop("hessian_regularization", 0.05), **how)
    return fitted.fit(case().train if train is None else train)


def replaced(pair: data.Pair, index: tuple[int, ...], value: float) -> data.Pair:
    x = pair[0].clone()
    x[index] = value
    return x, pair[1]


def nothing_written(folder: Path) -> None:
    assert [p for p in folder.rglob("*") if p.is_file()] == []


# -- unfitted -------------------------------------------------------------------------------------
@BOTH
def test_unfitted_model(tmp_path: Path, estimator: Any) -> None:
    model = estimator(case().model, case().loss, 0.05)
    test, train = case().test, case().train
    factors = torch.zeros(3, 51, dtype=torch.float64)
    for ask in (
        lambda: model.influences(*test, *train),
        lambda: model.influence_factors(*test),
        lambda: model.influences_from_factors(factors, *train),
        lambda: model.influences_to_zarr(tmp_path / "run", test, train),
        lambda: model.influence_factors_to_zarr(tmp_path / "factors", test),
        lambda: model.plan(test, train),
        lambda: model.save(tmp_path / "saved"),
    ):
        with pytest.raises(NotFittedError, match=r"fit"):
            ask()
    nothing_written(tmp_path)
    assert model.fit(train).influences(*test, *train).shape == (13, 37)


# -- x and y --------------------------------------------------------------------------------------
def test_training_data_of_different_lengths() -> None:
    x, y = case().train
    with pytest.raises(DataError, match=r"(?s)train.*37.*36|train.*36.*37"):
        fit((x, y[:-1]))
    with pytest.raises(DataError, match=r"(?s)train.*37.*36|train.*36.*37"):
        fit((x[:-1].numpy(), y.numpy()))


def test_queries_of_different_lengths(tmp_path: Path) -> None:
    (x_test, y_test), (x, y) = case().test, case().train
    fitted = fit()
    with pytest.raises(DataError, match=r"(?s)test.*13.*12|test.*12.*13"):
        fitted.influences(x_test, y_test[:-1], x, y)
    with pytest.raises(DataError, match=r"(?s)37.*30|30.*37"):
        fitted.influences(x_test, y_test, x[:30], y)
    with pytest.raises(DataError, match=r"(?s)13.*12|12.*13"):
        fitted.influence_factors(x_test, y_test[:-1])
    with pytest.raises(DataError, match=r"(?s)train.*37.*30|train.*30.*37"):
        fitted.influences_to_zarr(tmp_path / "run", case().test, (x[:30], y))
    nothing_written(tmp_path)


def test_leaves_of_different_lengths() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    (x, y), model = case().train, Sum()
    with pytest.raises(DataError, match=r"(?s)37.*36|36.*37"):
        fit(((x, x[:-1]), y), model=model)
    fit(((x, x), y), model=model)


def test_x_without_y_in_the_training_part_of_a_query() -> None:
    (x_test, y_test), (x, y) = case().test, case().train
    with pytest.raises((DataError, ConfigurationError), match=r"\by\b"):
        fit().influences(x_test, y_test, x)
    with pytest.raises((DataError, ConfigurationError), match=r"\bx\b"):
        fit().influences(x_test, y_test, y=y)


def test_empty_data(tmp_path: Path) -> None:
    x, y = case().train
    with pytest.raises(DataError, match=r"(?i)train.*(empty|no sample|0 sample)"):
        fit((x[:0], y[:0]))
    fitted = fit()
    with pytest.raises(DataError, match=r"(?i)(empty|no sample|0 sample)"):
        fitted.influences(x[:0], y[:0], x, y)
    with pytest.raises(DataError, match=r"(?i)test.*(empty|no sample|0 sample)"):
        fitted.influences_to_zarr(tmp_path / "run", (x[:0], y[:0]), (x, y))
    nothing_written(tmp_path)
    assert fitted.influences(x[:1], y[:1], x, y).shape == (1, 37)


@pytest.mark.parametrize(
    "wrong",
    [None, 3, "only x", "three", [1, 2], {"x": 1}],
    ids=["none", "number", "only x", "triple", "list", "mapping"],
)
def test_what_is_no_data_at_all(wrong: Any) -> None:
    x, y = case().train
    given = {"only x": x, "three": (x, y, y)}.get(wrong, wrong) if isinstance(wrong, str) else wrong
    model = DirectInfluence(case().model, case().loss, 0.05)
    with pytest.raises((DataError, ConfigurationError), match="train"):
        model.fit(given)


def test_a_dataset_without_length_is_refused() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from zip(*case().train, strict=True)

    with pytest.raises(DataError, match=r"(?i)iterable|map-style|length"):
        fit(DataLoader(Stream(), batch_size=8))
    fit(DataLoader(TensorDataset(*case().train), batch_size=8))


def test_a_path_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises((StoreError, DataError), match="nowhere"):
        fit(str(tmp_path / "nowhere.zarr"))
    nothing_written(tmp_path)


def test_complex_and_object_arrays_are_refused() -> None:
    x, y = (a.numpy() for a in case().train)
    for wrong in (x.astype(complex), x.astype(object)):
        with pytest.raises(DataError, match=r"(?s)train.*(complex128|object)"):
            fit((wrong, y))
    fit((x, y))


def test_wrong_number_of_features_names_the_shape() -> None:
    x, y = case().train
    with pytest.raises((DataError, ConfigurationError, LossError), match=r"\b3\b"):
        fit((x[:, :3], y))


# -- dask chunks ----------------------------------------------------------------------------------
def test_misaligned_chunks_are_rechunked_with_a_warning_or_refused() -> None:
    x, y = (a.numpy() for a in case().train)
    with pytest.warns(DataWarning, match=r"rechunk"):
        fitted = fit((da.from_array(x, chunks=(8, -1)), da.from_array(y, chunks=(9,))))
    scores = fitted.influences(*case().test, *case().train)
    assert oracles.relative_error(scores, case().up(case().inverse)) <= 1e-9
    fit((da.from_array(x, chunks=(8, -1)), da.from_array(y, chunks=(8,))))


def test_chunks_along_features_are_rechunked_with_a_warning_or_refused() -> None:
    x, y = (a.numpy() for a in case().train)
    fitted = fit()
    with pytest.warns(DataWarning, match=r"rechunk"):
        scores = fitted.influences(
            da.from_array(x, chunks=(8, 2)),
            da.from_array(y, chunks=8),
            *(da.from_array(a.numpy(), chunks=(5, *a.shape[1:])) for a in case().test),
        ).compute()
    expected = case().up(case().inverse, case().train, case().test)
    assert oracles.relative_error(scores, expected) <= 1e-9


def test_unknown_chunk_sizes_are_refused_with_the_call_that_helps() -> None:
    x, y = (da.from_array(a.numpy(), chunks=(9, *a.shape[1:])) for a in case().train)
    kept = y >= 0
    with pytest.raises(DataError, match=r"compute_chunk_sizes"):
        fit((x[kept], y[kept]))
    fit((x[kept].compute_chunk_sizes(), y[kept].compute_chunk_sizes()))


# -- not finite -----------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sample", [0, 23, 36])
def test_non_finite_training_inputs_are_named_by_sample(value: float, sample: int) -> None:
    with pytest.raises(DataError, match=rf"(?s)train.*\b{sample}\b"):
        fit(replaced(case().train, (sample, 2), value), chunk_size=8)


def test_non_finite_inputs_of_a_query_are_named_by_sample() -> None:
    fitted, wrong = fit(), replaced(case().test, (7, 0), float("nan"))
    with pytest.raises(DataError, match=r"\b7\b"):
        fitted.influences(*wrong, *case().train)
    with pytest.raises(DataError, match=r"\b7\b"):
        fitted.influence_factors(*wrong)
    with pytest.raises(DataError, match=r"\b7\b"):
        fitted.influences(*case().test, *wrong)


@pytest.mark.parametrize("side", ["test", "train"])
def test_non_finite_inputs_of_a_run_are_named_by_sample_and_nothing_is_written(
    tmp_path: Path, side: str
) -> None:
    pairs = {"test": case().test, "train": case().train}
    pairs[side] = replaced(pairs[side], (11, 1), float("inf"))
    with pytest.raises(DataError, match=rf"(?s){side}.*\b11\b"):
        fit().influences_to_zarr(tmp_path / "run", pairs["test"], pairs["train"])
    nothing_written(tmp_path / "run")


def test_non_finite_targets_are_named_by_sample() -> None:
    regression = data.mlp_regression()
    y = regression.train[1].clone()
    y[17] = float("nan")
    with pytest.raises(DataError, match=r"(?s)train.*\b17\b"):
        DirectInfluence(regression.model, regression.loss, 0.05).fit((regression.train[0], y))


@pytest.mark.parametrize("sample", [2, 19])
def test_overflow_is_named_by_sample(sample: int) -> None:
    """Finite inputs, but the square of 1e200 in loss, gradient and Hessian is infinite."""
    regression = data.linear_regression()
    model = DirectInfluence(regression.model, regression.loss, 0.05, chunk_size=10).fit(regression.train)
    wrong = replaced(regression.train, (sample, 1), 1e200)
    with pytest.raises(DataError, match=rf"\b{sample}\b"):
        model.influences(*regression.test, *wrong)
    with pytest.raises(DataError, match=rf"\b{sample}\b"):
        model.influence_factors(*wrong)
    with pytest.raises(DataError, match=rf"\b{sample}\b"):
        model.fit(wrong)


def rooted(output: Tensor, target: Tensor) -> Tensor:
    """Mean of √(w d²), weights beside the targets: at w = 0 the loss is 0 and its gradient 0/0."""
    return (target[:, 1:] * (output - target[:, :1]) ** 2).sum(-1).sqrt().mean()


@pytest.mark.parametrize("sample", [1, 31])
def test_non_finite_gradients_are_named_by_sample(sample: int) -> None:
    regression = data.mlp_regression()
    (x, y), (x_test, y_test) = regression.train, regression.test
    weighted, weighted_test = (torch.cat([t, torch.ones_like(t)], dim=1) for t in (y, y_test))
    model = DirectInfluence(regression.model, rooted, 50.0, chunk_size=10)
    scores = model.fit((x, weighted)).influences(x_test, weighted_test, x, weighted)
    assert torch.isfinite(scores).all()
    weighted = weighted.clone()
    weighted[sample, 1] = 0.0
    with pytest.raises(DataError, match=rf"\b{sample}\b"):
        model.influences(x_test, weighted_test, x, weighted)
    with pytest.raises(DataError, match=rf"\b{sample}\b"):
        model.influence_factors(x, weighted)
    with pytest.raises(DataError, match=rf"\b{sample}\b"):
        model.fit((x, weighted))


@pytest.mark.parametrize("estimator", [DirectInfluence, CgInfluence])
def test_a_label_out_of_range_is_named_by_sample(estimator: Any) -> None:
    x, y = data.normal(71, 90, 4), data.classes(72, 90, 3)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    wrong = y.clone()
    wrong[77] = 7  # beyond the samples that are looked at first; CG makes its first pass for a query
    right = estimator(model, nn.functional.cross_entropy, 5.0).fit((x, y))
    assert torch.isfinite(right.influences(x[:3], y[:3], x, y)).all()
    with pytest.raises(DataError, match=r"train: sample 77 raises"):
        right.fit((x, wrong)).influences(x[:3], y[:3], x, y)


@pytest.mark.parametrize("estimator", [DirectInfluence, CgInfluence])
def test_samples_of_later_dask_chunks_are_named_by_their_place_in_all_of_them(estimator: Any) -> None:
    x, y = (array.numpy() for array in case().train)
    wrong_x, wrong_y = x.copy(), np.where(np.arange(37) == 31, 7, y)
    wrong_x[31, 0] = np.nan
    fitted, (x_test, y_test) = fit(estimator=estimator), (array.numpy() for array in case().test)
    chunked = lambda array: da.from_array(array, chunks=(8, *array.shape[1:]))  # noqa: E731
    assert np.isfinite(fitted.influences(x_test, y_test, chunked(x), chunked(y)).compute()).all()
    for pair, told in (
        ((wrong_x, y), "x of sample 31 holds"),
        ((x, wrong_y), "sample 31 raises .*: .*7 is out"),
    ):
        lazy = [chunked(array) for array in pair]
        for ask in (
            lambda lazy=lazy: fitted.influences(x_test, y_test, *lazy),
            lambda lazy=lazy: fitted.influences(*lazy, x, y),
            lambda lazy=lazy: fitted.influence_factors(*lazy),
        ):
            with pytest.raises(DataError, match=told):
                ask().compute(scheduler="synchronous")


def positive() -> tuple[Any, data.Pair, data.Pair]:
    """A Poisson model, data on which it is positive, and the same with sample 4 where it is negative: a loss of NaN."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.4)
    x, y = data.normal(31, 23, 3).abs(), torch.ones(23, 1).double()
    bad = x.clone()
    bad[4] = -9.0
    return net, (x, y), (bad, y)


@pytest.mark.parametrize("mode", ["up", "perturbation"])
@pytest.mark.parametrize(
    "estimator",
    [DirectInfluence, ArnoldiInfluence, CgInfluence, EkfacInfluence],
    ids=lambda kind: kind.__name__,
)
def test_a_loss_that_is_nan_where_its_gradient_is_not(tmp_path: Path, estimator: Any, mode: str) -> None:
    """Scores refuse what a fit refuses, at no pass more: also after samples of their shape have been seen."""
    net, good, bad = positive()
    how = {"curvature": "empirical_fisher", **({"rank": 3} if estimator is ArnoldiInfluence else {})}
    loss = nn.PoissonNLLLoss(log_input=False)
    with pytest.raises(DataError, match=r"nan|NaN"):
        estimator(net, loss, 1.0, **how).fit(bad)
    model = estimator(net, loss, 1.0, **how).fit(good)
    for test, train, side in ((good, bad, "train"), (bad, good, "test")):
        model.influences(*good, *good, mode=mode)
        with pytest.raises(DataError, match="sample 4 is not finite, or its loss is not"):
            model.influences(*test, *train, mode=mode)
        with pytest.raises(
            PoisonedSamplesError, match="sample 4: its loss or gradient is not finite"
        ) as refused:
            model.influences_to_zarr(tmp_path / side, test, train, mode=mode)
        assert [one["sample"] for one in refused.value.missing[side]] == [4]


# -- the loss -------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_unreduced_and_summed_losses(reduction: str) -> None:
    loss = nn.CrossEntropyLoss(reduction=reduction)
    with pytest.raises(LossError, match=r"(?i)loss.*mean"):
        fit(loss=loss)
    fit(loss=nn.CrossEntropyLoss(reduction="mean"))


def test_shape_of_an_unreduced_loss_is_quoted() -> None:
    with pytest.raises(LossError, match=r"\[\d+\]|\(\d+,\)"):
        fit(loss=nn.CrossEntropyLoss(reduction="none"))


def test_a_loss_that_is_no_mean_over_samples() -> None:
    """Class weights make PyTorch divide by the weights of a batch, which depends on its other samples."""
    with pytest.raises(LossError, match=r"(?i)mean"):
        fit(loss=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 9.0], dtype=torch.float64)))


@pytest.mark.parametrize("failure", [KeyError, ZeroDivisionError])
def test_a_loss_that_fails_in_a_way_of_its_own(failure: type[Exception]) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise failure("of its own")

    with pytest.raises(LossError, match=r"'loss' fails.*of its own"):
        fit(loss=loss)


def test_a_loss_that_returns_no_tensor() -> None:
    with pytest.raises(LossError, match=r"loss"):
        fit(loss=lambda output, target: 1.0)


def test_targets_of_the_wrong_dtype_name_what_arrived() -> None:
    x, y = case().train
    with pytest.raises(DataError, match=r"(?s)\by\b.*(int32|float64)"):
        fit((x, y.double()))
    fit((x, y))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_of_the_wrong_shape_for_a_regression() -> None:
    """mse_loss broadcasts (n, 1) against (n,) to n × n with a warning: never a silent score."""
    regression = data.mlp_regression()
    x, y = regression.train
    with pytest.raises((LossError, DataError, SampleMixingError)):
        DirectInfluence(regression.model, regression.loss, 0.05).fit((x, y[:, 0]))


# -- the model ------------------------------------------------------------------------------------
def test_a_layer_that_mixes_samples_is_named() -> None:
    build = lambda layer: nn.Sequential(nn.Linear(4, 6), layer, nn.Tanh(), nn.Linear(6, 3)).double()  # noqa: E731
    with pytest.raises(SampleMixingError, match=r"BatchNorm1d|'1'"):
        fit(model=build(nn.BatchNorm1d(6, track_running_stats=False)), hessian_regularization=10.0)
    fit(model=build(nn.BatchNorm1d(6)), hessian_regularization=10.0)


def test_a_mixing_layer_of_the_users_own_is_named() -> None:
    class Centered(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Centered(), nn.Linear(6, 3)).double()
    with pytest.raises(SampleMixingError, match=r"Centered|'2'"):
        fit(model=model, hessian_regularization=10.0)


@BOTH
def test_no_parameter_selected(estimator: Any) -> None:
    frozen = copy.deepcopy(case().model).requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"requires_grad"):
        fit(estimator=estimator, model=frozen)
    with pytest.raises(ConfigurationError, match=r"parameters"):
        fit(estimator=estimator, parameters=[])


def test_unknown_parameters_are_quoted_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"(?s)parameters.*3\.\*.*0\.weight"):
        fit(parameters=["3.*"])
    frozen = copy.deepcopy(case().model)
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"0\.weight"):
        fit(model=frozen, parameters=["0.weight"])
    fit(parameters=["2.*"])


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ("layers", r"layers"),
        ({"a": ["0.weight", "nowhere"], "b": ["2.*"]}, r"nowhere"),
        ({"a": ["0.weight", "0.bias", "2.weight"], "b": ["2.weight", "2.bias"]}, r"2\.weight"),
    ],
    ids=["structure", "parameter", "twice"],
)
def test_unknown_blocks(blocks: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        fit(block_structure=blocks)


def test_regularization_of_unknown_blocks() -> None:
    blocks = {"a": ["0.weight", "0.bias"], "b": ["2.weight", "2.bias"]}
    with pytest.raises(ConfigurationError, match=r"'c'|\bc\b"):
        fit(block_structure=blocks, hessian_regularization={"a": 0.1, "c": 0.1})
    with pytest.raises(ConfigurationError, match=r"\bb\b"):
        fit(block_structure=blocks, hessian_regularization={"a": 0.1})
    with pytest.raises(ConfigurationError, match=r"block_structure"):
        fit(hessian_regularization={"a": 0.1, "b": 0.1})
    fit(block_structure=blocks, hessian_regularization={"a": 0.1, "b": 0.1})


# -- configuration --------------------------------------------------------------------------------
@BOTH
@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "much", None])
def test_regularization_that_is_no_number_from_zero(estimator: Any, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"hessian_regularization"):
        fit(estimator=estimator, hessian_regularization=value)


@pytest.mark.parametrize("rank", [0, -3, 51, 52, 1000])
def test_rank_out_of_range_is_quoted(rank: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"rank.*{rank}"):
        fit(estimator=ArnoldiInfluence, rank=rank)


@pytest.mark.parametrize("rank", [1, 50])
def test_rank_at_the_ends_of_its_range(rank: int) -> None:
    scores = fit(estimator=ArnoldiInfluence, rank=rank).influences(*case().test, *case().train)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("curvature", "gauss_newton"),
        ("tol", -1.0),
        ("krylov_dimension", 3),
        ("chunk_size", 0),
        ("device", "tpu7"),
    ],
)
def test_other_arguments_out_of_range(argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=argument):
        fit(estimator=ArnoldiInfluence, rank=7, **{argument: value})


LAYERS = {"first": ["0.*"], "last": ("2.weight", "2.bias")}


@pytest.mark.parametrize(
    ("estimator", "argument", "wrong", "named", "right"),
    [
        (DirectInfluence, "client", "tcp://host:8786", r"distributed\.Client\('tcp://host:8786'\)", None),
        (DirectInfluence, "client", 3, r"int.*distributed\.Client", None),
        (DirectInfluence, "device", None, "None", "cpu"),
        (DirectInfluence, "device", "meta", "'meta'", torch.device("cpu")),
        (DirectInfluence, "parameters", 3, "3", ("2.*",)),
        (DirectInfluence, "parameters", [3], r"\[3\]", "2.*"),
        (DirectInfluence, "block_structure", {**LAYERS, "last": 3}, "'last'.*3", LAYERS),
        (DirectInfluence, "block_structure", {**LAYERS, "last": None}, "'last'.*None", LAYERS),
        (DirectInfluence, "block_structure", {**LAYERS, "last": [3]}, r"'last'.*\[3\]", LAYERS),
        (DirectInfluence, "curvature", ["ggn"], r"\['ggn'\]", "ggn"),
        (DirectInfluence, "hessian_regularization", 10**400, "1000", 10),
        (DirectInfluence, "certify", 3, "3", False),
        (DirectInfluence, "chunk_size", True, "True", np.int64(8)),
        (
            CgInfluence,
            "preconditioner",
            {"kind": "jacobi", "x": 1},
            "'jacobi'.*'x'.*probes",
            {"kind": "jacobi"},
        ),
        (CgInfluence, "strict", "no", "'no'", False),
        (ArnoldiInfluence, "complement", "yes", "'yes'", True),
        (EkfacInfluence, "update_diagonal", 3, "3", False),
        (EkfacInfluence, "seed", -1, "-1", 0),
        (ArnoldiInfluence, "seed", -1, "-1", 2**64 - 1),
        (EkfacInfluence, "skip_unsupported", "no", "'no'", False),
    ],
)
def test_arguments_of_the_wrong_kind(
    estimator: Any, argument: str, wrong: Any, named: str, right: Any
) -> None:
    with pytest.raises(ConfigurationError, match=rf"(?s){argument}.*{named}"):
        fit(estimator=estimator, **{argument: wrong})
    fit(estimator=estimator, **{argument: right})


@pytest.mark.parametrize(
    ("kind", "count"), [(NystroemPreconditioner, "rank"), (JacobiPreconditioner, "probes")]
)
def test_preconditioners_of_nothing(kind: Any, count: str) -> None:
    for wrong in ({count: 0}, {count: "a"}, {count: True}, {"seed": "b"}, {"seed": 2**70}, {"seed": -1}):
        with pytest.raises(ConfigurationError, match=rf"{next(iter(wrong))} of {kind.__name__}.*"):
            kind(**wrong)
    assert getattr(kind(**{count: np.int64(1)}), count) == 1


class Recurrent(nn.Module):
    """An LSTM whose output is that of torch: with the state, of which samples are the second axis."""

    def __init__(self, state: bool) -> None:
        super().__init__()
        self.inner, self.state = nn.LSTM(4, 3, batch_first=True).double(), state

    def forward(self, x: Tensor) -> Any:
        found = self.inner(x)
        return found if self.state else found[:1]


def test_a_state_beside_the_output_is_named() -> None:
    pair = data.normal(97, 9, 2, 4), data.normal(98, 9, 2, 3)
    loss = lambda output, target: nn.functional.mse_loss(output[0], target)  # noqa: E731
    with pytest.raises(SampleMixingError, match=r"(?s)\(9, 2, 3\).*\(1, 9, 3\).*only what the loss uses"):
        fit(pair, model=Recurrent(state=True), loss=loss, hessian_regularization=1.0)
    fit(pair, model=Recurrent(state=False), loss=loss, hessian_regularization=1.0)


def test_models_and_data_without_values(tmp_path: Path) -> None:
    (x, y), fitted = case().train, fit()
    with pytest.raises(ConfigurationError, match=r"'weight'.*lazy"):
        fit(model=nn.LazyLinear(3).double())
    with pytest.raises(ConfigurationError, match=r"'weight'.*meta"):
        fit(model=nn.Linear(4, 3, device="meta"))
    with pytest.raises(DataError, match=r"train: x.*meta"):
        fit((x.to("meta"), y))
    with pytest.raises(DataError, match=r"train: x.*meta"):
        fitted.influences_to_zarr(tmp_path / "run", case().test, (x.to("meta"), y))
    nothing_written(tmp_path)
    seen = nn.LazyLinear(3).double()
    seen(x)
    fit(model=seen)


@pytest.mark.parametrize(
    ("argument", "wrong", "right"),
    [
        ("storage_options", 3, None),
        ("storage_options", "a", {}),
        ("storage_options", [1], None),
        ("progress", 3, False),
        ("progress", "yes", lambda stage, done, total: None),
        ("resume", "no", True),
        ("overwrite", 3, False),
        ("repair", "x", False),
        ("memory_limit", 0, 2**30),
        ("tile_bytes", 0, 2**20),
    ],
)
def test_arguments_of_a_run_of_the_wrong_kind(tmp_path: Path, argument: str, wrong: Any, right: Any) -> None:
    fitted, pairs = fit(), (case().test, case().train)
    with pytest.raises(ConfigurationError, match=argument):
        fitted.influences_to_zarr(tmp_path / "run", *pairs, **{argument: wrong})
    if argument != "tile_bytes":
        with pytest.raises(ConfigurationError, match=argument):
            fitted.influence_factors_to_zarr(tmp_path / "run", pairs[0], **{argument: wrong})
    nothing_written(tmp_path)
    fitted.influences_to_zarr(tmp_path / "run", *pairs, **{argument: right})


def test_progress_of_a_fit_of_the_wrong_kind() -> None:
    model = DirectInfluence(case().model, case().loss, 0.05)
    with pytest.raises(ConfigurationError, match=r"progress.*3"):
        model.fit(case().train, progress=3)
    stages: list[str] = []
    model.fit(case().train, progress=lambda stage, done, total: stages.append(stage))
    assert stages


@pytest.mark.parametrize("path", ["\0a", b"run"])
def test_paths_that_name_no_store(path: Any) -> None:
    fitted = fit()
    for ask in (
        lambda: fitted.influences_to_zarr(path, case().test, case().train),
        lambda: fitted.influence_factors_to_zarr(path, case().test),
        lambda: fitted.save(path),
        lambda: DirectInfluence.load(path, case().model, case().loss),
        lambda: open_influences(path),
    ):
        with pytest.raises(StoreError, match="store"):
            ask()


def test_load_takes_what_a_fit_does_not_depend_on(tmp_path: Path) -> None:
    fit().save(tmp_path / "saved")
    load = lambda **how: DirectInfluence.load(tmp_path / "saved", case().model, case().loss, **how)  # noqa: E731
    for wrong in ({"foo": 3}, {"curvature": "ggn"}, {"hessian_regularization": 1.0}):
        with pytest.raises(ConfigurationError, match=rf"'{next(iter(wrong))}'.*device.*with_regularization"):
            load(**wrong)
    assert load(device="cpu", certify=False, chunk_size=4).chunk_size == 4


@pytest.mark.parametrize("mode", ["sideways", "Up!", None, 3])
def test_unknown_mode_is_quoted_with_the_known_ones(tmp_path: Path, mode: Any) -> None:
    fitted = fit()
    for ask in (
        lambda: fitted.influences(*case().test, *case().train, mode=mode),
        lambda: fitted.influences_from_factors(
            fitted.influence_factors(*case().test), *case().train, mode=mode
        ),
        lambda: fitted.influences_to_zarr(tmp_path / "run", case().test, case().train, mode=mode),
        lambda: fitted.plan(case().test, case().train, mode=mode),
    ):
        with pytest.raises(ConfigurationError, match=r"(?s)mode.*perturbation"):
            ask()
    nothing_written(tmp_path)


def test_unknown_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="regularisation"):
        DirectInfluence(case().model, case().loss, regularisation=0.1)
    with pytest.raises(TypeError, match="rank"):
        DirectInfluence(case().model, case().loss, 0.1, rank=3)


def tokens() -> tuple[nn.Module, data.Pair]:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3)).double()
    return model, (data.classes(95, 33, 5).view(11, 3), data.classes(96, 11, 3))


def test_perturbation_of_integer_inputs(tmp_path: Path) -> None:
    model, pair = tokens()
    fitted = DirectInfluence(model, nn.functional.cross_entropy, 5.0).fit(pair)
    factors = fitted.influence_factors(*pair)
    for ask in (
        lambda: fitted.influences(*pair, *pair, mode="perturbation"),
        lambda: fitted.influences_from_factors(factors, *pair, mode="perturbation"),
        lambda: fitted.influences_to_zarr(tmp_path / "run", pair, pair, mode="perturbation"),
        lambda: fitted.plan(pair, pair, mode="perturbation"),
    ):
        with pytest.raises(ConfigurationError, match=r"(?i)perturbation.*(integer|int64|floating)"):
            ask()
    nothing_written(tmp_path)
    assert fitted.influences(*pair, *pair, mode="up").shape == (11, 11)


def test_factors_of_another_width() -> None:
    fitted = fit()
    factors = fitted.influence_factors(*case().test)
    with pytest.raises((DataError, ConfigurationError), match=r"(?s)factors.*50.*51|factors.*51.*50"):
        fitted.influences_from_factors(factors[:, :50], *case().train)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (torch.ones(2, 51, dtype=torch.complex128), "real numbers.*complex128"),
        (np.ones((2, 51)) * 1j, "real numbers.*complex128"),
        (da.ones((2, 51), dtype=complex), "real numbers.*complex128"),
        (np.full((2, 51), None), "real numbers.*object"),
        (np.full((2, 51), "1"), "real numbers.*<U1"),
        (torch.ones(0, 51), r"at least one row.*\(0, 51\)"),
        (np.ones((0, 51)), r"at least one row.*\(0, 51\)"),
        (da.ones((0, 51)), r"at least one row.*\(0, 51\)"),
        (da.ones((2, 51))[da.ones(2) > 0], r"known number.*\(nan, 51\)"),
        ([[0.0] * 51], r"shape \(N, P = 51\)"),
    ],
)
def test_factors_that_are_no_rows_of_real_numbers(wrong: Any, named: str) -> None:
    with pytest.raises(DataError, match=f"factors must.*{named}"):
        fit().influences_from_factors(wrong, *case().train)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_factors_of_other_real_numbers(dtype: str) -> None:
    fitted, factors = fit(), np.arange(102).reshape(2, 51)
    scores = np.asarray(fitted.influences_from_factors(factors.astype(dtype), *case().train))
    expected = factors @ oracles.gradients(case().model, case().loss, *case().train).numpy().T
    np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-9)


# -- singular curvature ---------------------------------------------------------------------------
def overparametrized() -> data.Case:
    """4 samples in 5 dimensions, bias included, for each of 2 outputs: rank 8 of 10."""
    whole = data.linear_regression()
    train = oracles.pick(whole.train, slice(0, 4))
    return data.Case(whole.model, whole.loss, train, whole.test, 1e-2)


def test_singular_curvature_without_regularization_says_which_would_do() -> None:
    few = overparametrized()
    assert torch.linalg.matrix_rank(few.hessian) < 10
    with pytest.raises(SingularCurvatureError, match=r"regularization"):
        DirectInfluence(few.model, few.loss).fit(few.train).influences(*few.test, *few.train)
    fitted = DirectInfluence(few.model, few.loss, 1e-2).fit(few.train)
    assert oracles.relative_error(fitted.influences(*few.test, *few.train), few.up(few.inverse)) <= 1e-9


def test_regular_curvature_needs_no_regularization() -> None:
    whole = data.linear_regression()
    fitted = DirectInfluence(whole.model, whole.loss).fit(whole.train)
    expected = whole.up(torch.linalg.inv(whole.hessian))
    assert oracles.relative_error(fitted.influences(*whole.test, *whole.train), expected) <= 1e-9


def test_complement_without_regularization_is_refused() -> None:
    """(I − VVᵀ)/λ does not exist at λ = 0."""
    whole = data.linear_regression()
    with pytest.raises((ConfigurationError, SingularCurvatureError), match=r"regularization"):
        ArnoldiInfluence(whole.model, whole.loss, 0.0, rank=4, complement=True).fit(whole.train).influences(
            *whole.test, *whole.train
        )
    dropped = ArnoldiInfluence(whole.model, whole.loss, 0.0, rank=4, tol=1e-11).fit(whole.train)
    inverse = oracles.low_rank_inverse(whole.hessian, 0.0, 4, complement=False)
    assert oracles.relative_error(dropped.influences(*whole.test, *whole.train), whole.up(inverse)) <= 1e-6


# -- stores ---------------------------------------------------------------------------------------
def test_unwritable_stores(tmp_path: Path) -> None:
    fitted = fit()
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(StoreError, match="file"):
        fitted.influences_to_zarr(tmp_path / "file" / "run", case().test, case().train)
    with pytest.raises(StoreError, match="file"):
        fitted.influence_factors_to_zarr(tmp_path / "file" / "run", case().test)
    assert (tmp_path / "file").read_text() == "a file, not a folder"
    with pytest.raises(StoreError, match="ftp"):
        fitted.influences_to_zarr("ftp://host/run", case().test, case().train)
    fitted.influences_to_zarr(tmp_path / "run", case().test, case().train)


def test_a_folder_with_something_else_in_it_is_not_written_into(tmp_path: Path) -> None:
    precious = tmp_path / "run" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years of work")
    fitted = fit()
    with pytest.raises(StoreError, match="run"):
        fitted.influences_to_zarr(tmp_path / "run", case().test, case().train)
    with pytest.raises(StoreError, match="run"):
        fitted.influences_to_zarr(tmp_path / "run", case().test, case().train, overwrite=True)
    assert precious.read_text() == "years of work"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_overwrite_keeps_its_hands_off_an_array_of_others(tmp_path: Path) -> None:
    """In the group of a run it would be opened with the scores."""
    fitted, where = fit(), (tmp_path / "run", case().test, case().train)
    fitted.influences_to_zarr(*where)
    zarr.open_group(tmp_path / "run", mode="a").create_array("mine", data=np.arange(3))
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(StoreMismatchError, match="'mine'"):
        fitted.influences_to_zarr(*where, overwrite=True, reduce=GroupSum([0, 1] * 18 + [0]))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before
    zarr.open_group(tmp_path / "run", mode="a").__delitem__("mine")
    fitted.influences_to_zarr(*where, overwrite=True, reduce=GroupSum([0, 1] * 18 + [0]))


@pytest.mark.parametrize("nowhere", ["", "file://"])
def test_stores_without_a_name_are_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    fitted = fit()
    monkeypatch.chdir(tmp_path)
    for ask in (
        lambda: fitted.influences_to_zarr(nowhere, case().test, case().train),
        lambda: fitted.influence_factors_to_zarr(nowhere, case().test),
        lambda: fitted.save(nowhere),
        lambda: DirectInfluence.load(nowhere, case().model, case().loss),
    ):
        with pytest.raises(StoreError, match="names no folder"):
            ask()
    nothing_written(tmp_path)
    fitted.save(".")
    assert DirectInfluence.load(".", case().model, case().loss).diagnostics["parameters"] == 51


def test_opening_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="absent"):
        open_influences(tmp_path / "absent")


@pytest.mark.parametrize("side", ["test", "train"])
def test_ids_of_the_wrong_number_or_twice(tmp_path: Path, side: str) -> None:
    fitted, total = fit(), {"test": 13, "train": 37}[side]
    with pytest.raises((DataError, ConfigurationError), match=rf"(?s){side}_ids.*{total - 1}"):
        fitted.influences_to_zarr(
            tmp_path / "run", case().test, case().train, **{f"{side}_ids": np.arange(total - 1)}
        )
    nothing_written(tmp_path)


def test_not_enough_memory_for_one_tile(tmp_path: Path) -> None:
    with pytest.raises(MemoryLimitError, match=r"memory_limit"):
        fit().influences_to_zarr(tmp_path / "run", case().test, case().train, memory_limit=1_000)
    nothing_written(tmp_path)


def test_queries_that_a_fit_would_refuse_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    regression = data.mlp_regression()
    (x_test, y_test), (x, y) = regression.test, regression.train
    fitted = DirectInfluence(regression.model, regression.loss, 0.05).fit(regression.train)
    with pytest.raises(DataError, match=r"x_test, y_test.*y"):
        fitted.influences(x_test, y_test[:, 0], x, y)
    with pytest.raises(DataError, match=r"x, y: y"):
        fitted.influences(x_test, y_test, x, y[:, 0])
    with pytest.raises(DataError, match=r"test: x"):
        fitted.influences_to_zarr(tmp_path / "run", (x_test[:, :2], y_test), (x, y))
    with pytest.raises(DataError, match=r"train: x"):
        fitted.influences_to_zarr(tmp_path / "run", (x_test, y_test), (x[:, :2], y))
    with pytest.raises(DataError, match=r"test: x"):
        fitted.influence_factors_to_zarr(tmp_path / "run", (x_test[:, :2], y_test))
    nothing_written(tmp_path)


def test_a_loss_that_is_no_mean_where_classes_meet_is_refused() -> None:
    """The first samples, all of one class, do not show the class weights."""
    x, y = torch.randn(200, 3, dtype=torch.float64), torch.tensor([0] * 150 + [1] * 50)
    weighted = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0], dtype=torch.float64))
    model = torch.nn.Linear(3, 2).double()
    with pytest.raises(LossError, match=r"not a mean over samples 120 to 159 of train"):
        DirectInfluence(model, weighted, 0.1, chunk_size=40).fit((x, y))
    DirectInfluence(model, torch.nn.CrossEntropyLoss(), 0.1, chunk_size=40).fit((x, y))


def test_a_sample_without_a_gradient_is_named_and_nothing_else_is_said() -> None:
    """The curvature layer by layer has nothing to be compared with, which is no fault of the model."""

    def distance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.square().sum(1).sqrt() - target).square().mean()

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    x = torch.ones(200, 3)
    x[150] = 0.0
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(DataError, match="gradient of sample 150 is not finite"),
    ):
        DirectInfluence(model, distance, 0.1).fit((x, torch.zeros(200)))
