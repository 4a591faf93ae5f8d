"""Kinds of data and of models: what goes in comes out, and the user's model is left as it was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from distributed import Client, LocalCluster
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dask_influence import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    InfluenceMode,
    LissaInfluence,
    NystroemSketchInfluence,
)
from dask_influence.errors import ConfigurationError, DataError, DataWarning
from dask_influence.execution import lazy, tasks
from tests import data, oracles

EXACT = 1e-9
MODES = pytest.mark.parametrize("mode", ["up", "perturbation"])


def fit(case: data.Case, train: Any = None, **how: Any) -> DirectInfluence:
    model = DirectInfluence(case.model, case.loss, case.regularization, **how)
    return model.fit(case.train if train is None else train)


def as_numpy(pair: data.Pair) -> tuple[np.ndarray, np.ndarray]:
    x, y = pair
    return x.numpy(), y.numpy()


def as_dask(pair: data.Pair, chunk: int) -> tuple[da.Array, da.Array]:
    x, y = as_numpy(pair)
    return da.from_array(x, chunks=(chunk, -1)), da.from_array(y, chunks=(chunk, *y.shape[1:]))


# -- what goes in comes out -----------------------------------------------------------------------
@MODES
def test_numpy_in_numpy_out(mode: str) -> None:
    case = data.mlp_regression()
    fitted = fit(case, as_numpy(case.train))
    values = fitted.influences(*as_numpy(case.test), *as_numpy(case.train), mode=mode)
    assert type(values) is np.ndarray
    assert values.dtype == np.float64
    assert oracles.relative_error(values, getattr(case, mode)(case.inverse)) <= EXACT
    factors = fitted.influence_factors(*as_numpy(case.test))
    assert type(factors) is np.ndarray
    again = fitted.influences_from_factors(factors, *as_numpy(case.train), mode=mode)
    assert type(again) is np.ndarray
    assert oracles.relative_error(again, torch.from_numpy(values)) <= 1e-10


@MODES
def test_tensor_in_tensor_out(mode: str) -> None:
    case = data.mlp_regression()
    values = fit(case).influences(*case.test, *case.train, mode=mode)
    assert type(values) is Tensor
    assert not values.requires_grad


@MODES
def test_dask_in_lazy_dask_out_chunked_like_its_inputs(mode: str) -> None:
    case = data.mlp_regression()
    fitted = fit(case, as_dask(case.train, 10))
    values = fitted.influences(*as_dask(case.test, 9), *as_dask(case.train, 13), mode=mode)
    expected = getattr(case, mode)(case.inverse)
    assert isinstance(values, da.Array)
    assert values.shape == expected.shape
    assert values.dtype == np.float64
    assert values.chunks[:2] == ((9, 9, 9, 4), (13, 13, 13, 4))
    assert all(len(sizes) == 1 for sizes in values.chunks[2:])
    assert oracles.relative_error(values.compute(scheduler="threads"), expected) <= EXACT
    part = values[3:5, 20:31].compute(scheduler="sync")
    assert oracles.relative_error(part, expected[3:5, 20:31]) <= EXACT


def test_dask_symmetric_case() -> None:
    case = data.mlp_regression()
    values = fit(case).influences(*as_dask(case.test, 9))
    assert values.chunks == ((9, 9, 9, 4), (9, 9, 9, 4))
    assert oracles.relative_error(values.compute(), case.up(case.inverse, train=case.test)) <= EXACT


def test_dask_factors_and_scores_from_them() -> None:
    case = data.mlp_regression()
    fitted = fit(case)
    factors = fitted.influence_factors(*as_dask(case.test, 9))
    assert isinstance(factors, da.Array)
    assert factors.shape == (31, 26)
    assert factors.chunks[0] == (9, 9, 9, 4)
    values = fitted.influences_from_factors(factors, *as_dask(case.train, 13))
    assert isinstance(values, da.Array)
    assert oracles.relative_error(values.compute(), case.up(case.inverse)) <= EXACT


class CountedInput:
    """Blocks of a dask array that note each time one of them is computed."""

    def __init__(self, array: Tensor, chunk: int) -> None:
        self.reads: list[int] = []
        self.array, self.chunk = array.numpy(), chunk

    def __array__(self) -> np.ndarray:
        raise AssertionError("read as a whole")

    def _block(self, block_info: Any = None) -> np.ndarray:
        start, stop = block_info[None]["array-location"][0]
        self.reads.append(start)
        return self.array[start:stop]

    def lazy(self) -> da.Array:
        total, *rest = self.array.shape
        sizes = tuple(min(self.chunk, total - i) for i in range(0, total, self.chunk))
        chunks = (sizes, *((n,) for n in rest))
        return da.map_blocks(self._block, chunks=chunks, dtype=self.array.dtype, meta=self.array[:0])


def test_dask_graph_reads_nothing_when_built_and_each_chunk_once_when_computed() -> None:
    case = data.mlp_regression()
    fitted = fit(case)
    x_test, x = CountedInput(case.test[0], 9), CountedInput(case.train[0], 13)
    y_test, y = as_dask(case.test, 9)[1], as_dask(case.train, 13)[1]
    values = fitted.influences(x_test.lazy(), y_test, x.lazy(), y)
    assert x_test.reads == []
    assert x.reads == []
    assert oracles.relative_error(values.compute(scheduler="sync"), case.up(case.inverse)) <= EXACT
    assert sorted(x_test.reads) == [0, 9, 18, 27]
    assert sorted(x.reads) == [0, 13, 26, 39]


class Counted:
    """A loss that counts its calls, through copies and pickles within this process."""

    calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        Counted.calls += 1
        return nn.functional.mse_loss(output, target)


@MODES
@pytest.mark.parametrize("together", [True, False])
def test_dask_graph_does_the_work_of_each_chunk_once(
    mode: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is a sum over chunks of either side, not over their pairs; of small ones that over all samples."""
    if not together:
        monkeypatch.setattr(lazy, "COLUMNS_AT_ONCE", 1)
        monkeypatch.setattr(lazy, "factors_at_once", lambda work: 1)
    case = data.mlp_regression()
    fitted = DirectInfluence(case.model, Counted(), case.regularization).fit(case.train)

    def work(test_chunk: int, train_chunk: int) -> int:
        before = Counted.calls
        values = fitted.influences(
            *as_dask(case.test, test_chunk), *as_dask(case.train, train_chunk), mode=mode
        )
        values.compute(scheduler="sync")
        return Counted.calls - before

    work(31, 43)  # the first query of a mode also checks the derivative that it needs
    whole, many_tests, many_trains, many = work(31, 43), work(4, 43), work(31, 6), work(4, 6)
    if together:
        assert whole == many_tests == many_trains == many
        return
    assert whole < many_tests < many
    assert whole < many_trains < many
    assert many - many_tests == many_trains - whole


def test_chunks_are_joined_up_to_some_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few parameters many gradients fit, and yet samples may be large."""
    case, joined, original = data.mlp_regression(), list[int](), lazy._joined

    def noted(blocks: Any) -> Any:
        joined.append(len(blocks))
        return original(blocks)

    monkeypatch.setattr(lazy, "_joined", noted)
    each = sum(part[0].numpy().nbytes for part in case.train)
    monkeypatch.setattr(lazy, "JOINED_BYTES", 10 * each)
    values = fit(case).influences(*as_dask(case.test, 4), *as_dask(case.train, 5))
    assert oracles.relative_error(values.compute(scheduler="sync"), case.up(case.inverse)) <= EXACT
    assert set(joined) <= {1, 2}
    assert joined.count(2) >= 5


def test_small_chunks_of_a_dask_graph_share_a_solve_and_tiles_are_its_last_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved: list[int] = []

    def counted(inverse: Any, gradients: Tensor, **more: Any) -> Any:
        solved.append(len(gradients))
        return whole(inverse, gradients, **more)

    whole = tasks.solved
    monkeypatch.setattr(tasks, "solved", counted)
    case = data.mlp_regression()
    fitted = fit(case)
    values = fitted.influences(*as_dask(case.test, 9), *as_dask(case.train, 13))
    last = values.dask.layers[values.name]
    assert set(last) == {(values.name, row, column) for row in range(4) for column in range(4)}
    assert oracles.relative_error(values.compute(scheduler="sync"), case.up(case.inverse)) <= EXACT
    assert solved == [31]
    monkeypatch.setattr(lazy, "factors_at_once", lambda work: 20)  # chunks of 9, 9 | 9, 4
    monkeypatch.setattr(lazy, "COLUMNS_AT_ONCE", 30)
    factors = fitted.influence_factors(*as_dask(case.test, 9))
    expected = fitted.influence_factors(*case.test)
    solved.clear()
    assert factors.chunks[0] == (9, 9, 9, 4)
    values = fitted.influences(*as_dask(case.test, 9), *as_dask(case.train, 13))
    assert oracles.relative_error(factors.compute(scheduler="sync"), expected) <= EXACT
    assert oracles.relative_error(values.compute(scheduler="sync"), case.up(case.inverse)) <= EXACT
    assert sorted(solved) == [13, 13, 18, 18]


@pytest.mark.parametrize("sizes", [(0, 700, 0), (5, 0, 695), (600, 0, 100)], ids=str)
def test_dask_chunks_may_be_empty(sizes: tuple[int, ...]) -> None:
    """As those of an array from which a mask has taken all samples of a chunk."""
    x, y = np.random.default_rng(0).normal(size=(2, 700, 2))
    net = torch.nn.Linear(2, 2).double()
    model = DirectInfluence(net, torch.nn.functional.mse_loss, 1.0).fit((x, y))
    lazy = [da.from_array(array, chunks=(sizes, 2)) for array in (x, y)]
    found = model.influences(*lazy, *lazy)
    assert found.chunks == (sizes, sizes)
    np.testing.assert_allclose(
        found.compute(scheduler="sync"), model.influences(x, y, x, y), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_dask_result_composes_with_dask(scheduler: str) -> None:
    case = data.mlp_regression()
    values = fit(case).influences(*as_dask(case.test, 9), *as_dask(case.train, 13))
    best, total = dask.compute(values.argmax(axis=1), values.sum(), scheduler=scheduler)
    expected = case.up(case.inverse).numpy()
    np.testing.assert_array_equal(best, expected.argmax(axis=1))
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-8)


# -- other containers to fit on -------------------------------------------------------------------
class Squares(Dataset):
    """A map-style data set without tensors of its own: items are made when asked for."""

    def __init__(self, pair: data.Pair) -> None:
        self.pair = pair

    def __len__(self) -> int:
        return len(self.pair[0])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pair[0][index], self.pair[1][index]


def test_fit_on_a_map_style_dataset() -> None:
    case = data.mlp_classification()
    scores = fit(case, Squares(case.train)).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= EXACT


def test_fit_on_a_tensor_dataset_with_a_collate_function() -> None:
    """The loader's own collate function makes the batches: here it swaps (label, image) items."""
    case = data.mlp_classification()
    swapped = Squares((case.train[1], case.train[0]))

    def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        labels, inputs = zip(*items, strict=True)
        return torch.stack(inputs), torch.stack(labels)

    loader = DataLoader(swapped, batch_size=8, collate_fn=collate)
    scores = fit(case, loader).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= EXACT


@pytest.mark.parametrize(
    ("option", "named"), [({"shuffle": True}, "shuffl|RandomSampler"), ({"drop_last": True}, "drop_last")]
)
def test_order_and_ragged_end_of_a_loader_are_kept_with_a_warning(
    option: dict[str, bool], named: str
) -> None:
    case = data.mlp_classification()
    loader = DataLoader(TensorDataset(*case.train), batch_size=8, **option)
    with pytest.warns(DataWarning, match=named):
        fitted = fit(case, loader)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(case.inverse)) <= EXACT


def test_documentation_snippet_with_a_ragged_last_batch() -> None:
    case = data.logistic_regression()
    model, loss = case.model, case.loss
    training_data_loader = DataLoader(TensorDataset(*case.train), batch_size=8)
    assert len(case.train[0]) % 8 == 5
    (x_test, y_test), (x, y) = case.test, case.train
    # fmt: off
    influences = DirectInfluence(model, loss, hessian_regularization=0.01).fit(training_data_loader).influences(x_test, y_test, x, y, mode=InfluenceMode.Perturbation)  # noqa: E501
    # fmt: on
    inverse = oracles.inverse(case.hessian, 0.01)
    assert influences.shape == (11, 29, 5)
    assert oracles.relative_error(influences, case.perturbation(inverse)) <= EXACT


@pytest.mark.parametrize("kind", [str, Path])
def test_fit_on_a_zarr_group(tmp_path: Path, kind: Any) -> None:
    case = data.mlp_classification()
    group = zarr.open_group(tmp_path / "train.zarr", mode="w")
    for name, array in zip("xy", as_numpy(case.train), strict=True):
        group.create_array(name, data=array, chunks=(10, *array.shape[1:]))
    scores = fit(case, kind(tmp_path / "train.zarr")).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= EXACT


def test_fit_on_a_zarr_group_of_several_inputs(tmp_path: Path) -> None:
    case = mapping_case()
    group = zarr.open_group(tmp_path / "train.zarr", mode="w")
    for name, array in case.train[0].items():
        group.create_array(f"x/{name}", data=array.numpy(), chunks=(10, *array.shape[1:]))
    group.create_array("y", data=case.train[1].numpy(), chunks=(10,))
    scores = fit(case, str(tmp_path / "train.zarr")).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= EXACT


# -- models beyond Sequential ---------------------------------------------------------------------
class Gated(nn.Module):
    """Numbers and tokens in: a linear layer gated by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(7, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, values: Tensor, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(values)) * self.table(tokens))


def gated_case(train: tuple[Any, Tensor], test: tuple[Any, Tensor]) -> data.Case:
    model = data.trained(data.seeded(Gated), nn.functional.cross_entropy, train, decay=1e-2)
    return data.Case(model, nn.functional.cross_entropy, train, test, 0.05)


def tuple_case() -> data.Case:
    train = ((data.normal(41, 31, 4), data.classes(42, 31, 7)), data.classes(43, 31, 2))
    test = ((data.normal(44, 11, 4), data.classes(45, 11, 7)), data.classes(46, 11, 2))
    return gated_case(train, test)


def mapping_case() -> data.Case:
    """The keywords in another order than the signature's."""
    case = tuple_case()
    (train, test) = (({"tokens": x[1], "values": x[0]}, y) for x, y in (case.train, case.test))
    return gated_case(train, test)


@MODES
@pytest.mark.parametrize("build", [tuple_case, mapping_case])
def test_tuples_are_positional_and_mappings_keyword_arguments(build: Any, mode: str) -> None:
    case = build()
    expected = getattr(case, mode)(case.inverse)
    values = fit(case, chunk_size=8).influences(*case.test, *case.train, mode=mode)
    assert oracles.relative_error(values, expected) <= EXACT


def test_tuple_of_numpy_arrays_in_numpy_out() -> None:
    case = tuple_case()
    train, test = ((tuple(a.numpy() for a in x), y.numpy()) for x, y in (case.train, case.test))
    values = fit(case, train).influences(*test, *train)
    assert type(values) is np.ndarray
    assert oracles.relative_error(values, case.up(case.inverse)) <= EXACT


def token_case(dtype: torch.dtype = torch.float64) -> data.Case:
    build = lambda: nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(12, 3))  # noqa: E731
    train = data.classes(51, 124, 9).view(31, 4), data.classes(52, 31, 3)
    test = data.classes(53, 44, 9).view(11, 4), data.classes(54, 11, 3)
    model = data.trained(data.seeded(build), nn.functional.cross_entropy, train, decay=1e-2)
    return data.Case(model.to(dtype), nn.functional.cross_entropy, train, test, 0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["tensor", "numpy", "dask"])
def test_scores_of_integer_inputs_are_floating(dtype: torch.dtype, kind: str) -> None:
    """The score dtype is the model's, whatever the dtype of x and y."""
    case = token_case(dtype)
    convert = {"tensor": lambda p: p, "numpy": as_numpy, "dask": lambda p: as_dask(p, 7)}[kind]
    train, test = convert(case.train), convert(case.test)
    scores = fit(case, train).influences(*test, *train)
    if kind == "dask":
        assert scores.dtype == np.dtype(str(dtype).removeprefix("torch."))
        scores = scores.compute()
    assert torch.as_tensor(scores).dtype == dtype
    tolerance = EXACT if dtype == torch.float64 else 1e-4
    assert oracles.relative_error(scores, case.up(case.inverse)) <= tolerance


def test_perturbation_of_integer_inputs_is_refused() -> None:
    case = token_case()
    with pytest.raises(ConfigurationError, match=r"(?is)perturbation.*int64"):
        fit(case).influences(*case.test, *case.train, mode="perturbation")


def test_frozen_parameters_are_not_in_theta() -> None:
    case = data.mlp_classification()
    model = copy.deepcopy(case.model)
    model[0].weight.requires_grad_(False)
    frozen = data.Case(model, case.loss, case.train, case.test, case.regularization)
    fitted = fit(frozen)
    assert fitted.influence_factors(*case.test).shape == (13, 27)
    for mode in ("up", "perturbation"):
        values = fitted.influences(*case.test, *case.train, mode=mode)
        assert oracles.relative_error(values, getattr(frozen, mode)(frozen.inverse)) <= EXACT


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["2.*"], ["2.weight", "2.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
    ],
)
def test_parameters_by_name_and_glob_in_the_order_of_the_model(patterns: list[str], names: list[str]) -> None:
    case = data.mlp_classification()
    fitted = fit(case, parameters=patterns)
    arguments = (case.model, case.loss)
    inverse = oracles.inverse(oracles.hessian(*arguments, *case.train, names), case.regularization)
    expected = oracles.gradients(*arguments, *case.test, names) @ inverse
    assert oracles.relative_error(fitted.influence_factors(*case.test), expected) <= EXACT
    for mode in ("up", "perturbation"):
        values = fitted.influences(*case.test, *case.train, mode=mode)
        expected = getattr(oracles, mode)(*arguments, inverse, case.test, case.train, names)
        assert oracles.relative_error(values, expected) <= EXACT


class Tied(nn.Module):
    """One weight used twice: as an encoder and, transposed, as a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 3), nn.Linear(3, 4)
        self.decoder.weight = nn.Parameter(torch.empty(4, 3))
        self.again = nn.Linear(4, 3)
        self.again.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)) + torch.tanh(self.again(x)))


def tied_case() -> data.Case:
    model = data.seeded(Tied)
    nn.init.normal_(model.decoder.weight)
    train = (data.normal(61, 37, 4), data.normal(62, 37, 4))
    test = (data.normal(63, 11, 4), data.normal(64, 11, 4))
    model = data.trained(model, nn.functional.mse_loss, train, decay=1e-2)
    return data.Case(model, nn.functional.mse_loss, train, test, 0.1)


@MODES
def test_tied_weights_count_once_and_in_both_places(mode: str) -> None:
    case = tied_case()
    values = fit(case).influences(*case.test, *case.train, mode=mode)
    assert len(case.hessian) == 12 + 3 + 12 + 4 + 3
    assert oracles.relative_error(values, getattr(case, mode)(case.inverse)) <= EXACT


def normalised_case() -> data.Case:
    """BatchNorm with running statistics and dropout, handed over in training mode."""
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 2)
    )
    model = data.seeded(build).double()
    train = data.normal(65, 37, 4), data.classes(66, 37, 2)
    test = data.normal(67, 11, 4), data.classes(68, 11, 2)
    model.train()
    for _ in range(5):
        model(train[0] + 1.0)
    data.trained(model.eval(), nn.functional.cross_entropy, train, decay=1e-2)
    return data.Case(model.train(), nn.functional.cross_entropy, train, test, 0.05)


@MODES
def test_dropout_and_batch_norm_are_put_in_eval_mode(mode: str) -> None:
    case = normalised_case()
    values = fit(case, chunk_size=7).influences(*case.test, *case.train, mode=mode)
    assert oracles.relative_error(values, getattr(case, mode)(case.inverse)) <= EXACT
    alone = oracles.pick(case.test, slice(2, 3))
    single = fit(case, chunk_size=1).influences(*alone, *case.train, mode=mode)
    assert oracles.relative_error(single, values[2:3]) <= 1e-10


@pytest.mark.parametrize("estimator", [DirectInfluence, ArnoldiInfluence])
def test_the_users_model_is_untouched(estimator: Any) -> None:
    case = normalised_case()
    case.model[0].bias.requires_grad_(False)
    case.model[4].eval()
    state = copy.deepcopy(case.model.state_dict())
    flags = [p.requires_grad for p in case.model.parameters()]
    modes = [module.training for module in case.model.modules()]
    identities = [id(p) for p in case.model.parameters()]
    fitted = estimator(case.model, case.loss, 0.05).fit(case.train)
    fitted.influences(*case.test, *case.train, mode="perturbation")
    assert [module.training for module in case.model.modules()] == modes
    assert [p.requires_grad for p in case.model.parameters()] == flags
    assert [id(p) for p in case.model.parameters()] == identities
    assert all(p.grad is None for p in case.model.parameters())
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_fitted_model_does_not_follow_later_training() -> None:
    case = data.mlp_classification()
    model = copy.deepcopy(case.model)
    fitted = DirectInfluence(model, case.loss, case.regularization).fit(case.train)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(case.inverse)) <= EXACT


def test_inputs_are_untouched_and_keep_no_graph() -> None:
    case = data.mlp_classification()
    x = case.train[0].clone().requires_grad_()
    kept = x.detach().clone()
    fitted = fit(case, (x, case.train[1]))
    values = fitted.influences(*case.test, x, case.train[1], mode="perturbation")
    assert torch.equal(x.detach(), kept)
    assert x.requires_grad
    assert x.grad is None
    assert not values.requires_grad


def test_global_random_state_and_grad_mode_are_left_alone() -> None:
    case = data.mlp_classification()
    state = torch.random.get_rng_state()
    with torch.no_grad():
        scores = fit(case).influences(*case.test, *case.train)
        assert not torch.is_grad_enabled()
    ArnoldiInfluence(case.model, case.loss, 0.05, rank=5).fit(case.train)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= EXACT


def test_float32_data_with_a_float64_model() -> None:
    """Inputs are cast to the model's dtype; integer labels stay what they are."""
    case = data.mlp_classification()
    train, test = ((x.float(), y) for x, y in (case.train, case.test))
    scores = fit(case, train).influences(*test, *train)
    assert scores.dtype == torch.float64
    exact = data.Case(
        case.model,
        case.loss,
        *((x.double(), y) for x, y in (train, test)),
        regularization=case.regularization,
    )
    assert oracles.relative_error(scores, exact.up(exact.inverse)) <= EXACT


# -- numbers among the arguments ------------------------------------------------------------------
@pytest.mark.parametrize("argument", ["tile_bytes", "memory_limit"])
def test_bytes_are_integers(tmp_path: Path, argument: str) -> None:
    case = data.mlp_classification()
    fitted = fit(case)
    for value in (1e6, "1MiB", True, 0, -1):
        with pytest.raises(ConfigurationError, match=rf"{argument} must be an integer ≥ 1; got {value!r}"):
            fitted.influences_to_zarr(tmp_path / "run", case.test, case.train, **{argument: value})
    with pytest.raises(ConfigurationError, match=rf"{argument} must be an integer from 1 to {2**63 - 1}"):
        fitted.influences_to_zarr(tmp_path / "run", case.test, case.train, **{argument: 10**40})
    assert not (tmp_path / "run").exists()
    scores = fitted.influences_to_zarr(tmp_path / "run", case.test, case.train, **{argument: np.int64(2**30)})
    assert oracles.relative_error(scores.influence.values, case.up(case.inverse)) <= EXACT


@pytest.mark.parametrize(
    ("estimator", "argument", "value"),
    [
        (ArnoldiInfluence, "rank", "3"),
        (ArnoldiInfluence, "rank", 3.0),
        (ArnoldiInfluence, "seed", "x"),
        (ArnoldiInfluence, "seed", 2**64),
        (ArnoldiInfluence, "maxiter", 1.5),
        (ArnoldiInfluence, "block_size", "2"),
        (ArnoldiInfluence, "krylov_dimension", "20"),
        (ArnoldiInfluence, "tol", "1e-6"),
        (NystroemSketchInfluence, "rank", "3"),
        (NystroemSketchInfluence, "seed", "x"),
        (LissaInfluence, "seed", "x"),
        (LissaInfluence, "maxiter", "10"),
        (LissaInfluence, "scale", "2"),
        (LissaInfluence, "rtol", None),
        (CgInfluence, "rtol", "1e-6"),
        (CgInfluence, "atol", None),
        (CgInfluence, "maxiter", "10"),
    ],
)
def test_settings_of_another_kind_are_quoted(estimator: Any, argument: str, value: Any) -> None:
    case = data.mlp_classification()
    with pytest.raises(ConfigurationError, match=rf"{argument} must be .*{value!r}"):
        estimator(case.model, case.loss, 0.05, **{argument: value}).fit(case.train)


@pytest.mark.parametrize("estimator", [ArnoldiInfluence, NystroemSketchInfluence])
def test_integers_of_numpy_are_integers(tmp_path: Path, estimator: Any) -> None:
    case = data.mlp_classification()
    ours, plain = (
        estimator(case.model, case.loss, 0.05, rank=kind(5), seed=kind(1)).fit(case.train)
        for kind in (np.int64, int)
    )
    assert torch.equal(ours.influences(*case.test), plain.influences(*case.test))
    ours.save(tmp_path / "fit")  # its record is JSON


# -- lazy arrays ----------------------------------------------------------------------------------
def test_factors_that_are_not_finite_are_not_blamed_on_the_training_data() -> None:
    case = data.mlp_classification()
    fitted, train = fit(case), as_dask(case.train, 10)
    factors = da.from_array(fitted.influence_factors(*case.test).numpy(), chunks=(5, -1))
    scores = fitted.influences_from_factors(factors, *train).compute()
    assert oracles.relative_error(scores, case.up(case.inverse)) <= EXACT
    with pytest.raises(DataError, match="factors hold NaN or inf"):
        fitted.influences_from_factors(da.where(factors > 0, np.nan, factors), *train).compute()


OUTER: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("mode", OUTER)
def test_modes_of_the_caller_change_nothing(mode: str) -> None:
    case = data.mlp_classification()
    model, (x, y), (x_test, y_test) = copy.deepcopy(case.model).float(), case.train, case.test
    train, test = (x.float(), y), (x_test.float(), y_test)
    lazy = as_dask(train, 10)

    def scores() -> list[Any]:
        fitted = DirectInfluence(model, case.loss, 0.1).fit(train)
        factors = fitted.influence_factors(*test)
        return [
            fitted.influences(*test, *train),
            fitted.influences(*test, *train, mode="perturbation"),
            fitted.influences_from_factors(factors, *train),
            torch.from_numpy(fitted.influences(*test, *lazy).compute(scheduler="synchronous")),
        ]

    expected = scores()
    with OUTER[mode]():
        found = scores()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_lazy_scores_outlive_the_model_but_not_the_client() -> None:
    case = data.mlp_classification()
    train, test = as_dask(case.train, 10), as_dask(case.test, 5)
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        fitted = fit(case, client=client)
        folder = fitted._resources.executor().location.local_path
        scores = fitted.influences(*test, *train)
        del fitted
        gc.collect()
        assert oracles.relative_error(scores.compute(), case.up(case.inverse)) <= EXACT
        assert folder.exists()
    del client, cluster, scores
    gc.collect()
    assert not folder.exists()
