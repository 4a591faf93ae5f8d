"""EK-FAC and KFAC against dense constructions of the same approximation, from hooks and the dense GGN."""

from __future__ import annotations

import copy
import fnmatch
import math
import pickle
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dask_influence import EkfacInfluence, InfluenceFunctionModel
from dask_influence.core.estimators import Ekfac, System
from dask_influence.core.estimators.ekfac import covariance_sums
from dask_influence.core.forms import Forms
from dask_influence.core.layers import layout_of
from dask_influence.core.objective import Objective
from dask_influence.core.outputs import Outputs
from dask_influence.core.predictive import Expectation
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError, DerivativeError, LossError, SingularCurvatureError
from tests import data, oracles
from tests.core.estimators.kronecker import dense

EXACT = 1e-8
SAME = 1e-10


# -- models ----------------------------------------------------------------------------
class Tokens(nn.Module):
    """Embedding with padding, LayerNorm, a layer called twice, positions folded into the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(ids))
        hidden = torch.tanh(self.mix(torch.tanh(self.mix(hidden))))
        return self.head(hidden.mean(1))


class Attention(nn.Module):
    """One block of attention over five positions, its sample axis second."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **how)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        other = x[..., : self.attention.kdim] * 0.5
        return self.head(self.attention(x, other, other, need_weights=False)[0].mean(0))


class Spelled(nn.Module):
    """The same in four Linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(width, 4), nn.Linear(width, 4)
        self.out, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        other = x[..., : self.k.in_features] * 0.5
        q, k, v = (
            part.unflatten(-1, (2, 2)).transpose(1, 2) for part in (self.q(x), self.k(other), self.v(other))
        )
        weights = (q @ k.mT / math.sqrt(2)).softmax(-1)
        return self.head(self.out((weights @ v).transpose(1, 2).flatten(2)).mean(1))


def conv(dims: int, **how: Any) -> nn.Module:
    """Two convolutions and a Linear; inputs have side 5, 3 in three dimensions."""
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    return nn.Sequential(
        kind(2, 4, 2, **how), nn.Tanh(), kind(4, 2, 2, groups=2), nn.Flatten(), nn.LazyLinear(3)
    )


def normed() -> nn.Module:
    """A convolutional network as they are: a batch norm after its training, a group norm."""
    batch = nn.BatchNorm2d(4)
    nn.init.normal_(batch.running_mean, std=0.3)
    nn.init.uniform_(batch.running_var, 0.5, 2.0)
    layers = (
        nn.Conv2d(2, 4, 2, bias=False),
        batch,
        nn.Tanh(),
        nn.Conv2d(4, 4, 2),
        nn.GroupNorm(2, 4),
        nn.Tanh(),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).eval()


def images(seed: int, dims: int, n: int = 17) -> data.Pair:
    return data.normal(seed, n, 2, *[5 if dims < 3 else 4] * dims), data.classes(seed + 1, n, 3)


def tokens(seed: int, n: int = 19) -> data.Pair:
    ids = torch.randint(1, 7, (n, 5), generator=torch.Generator().manual_seed(seed))
    return ids, data.classes(seed + 1, n, 3)


def case(build: Callable[[], nn.Module], loss: Any, train: data.Pair, test: data.Pair, λ: float) -> data.Case:
    model = data.seeded(build).double()
    model(train[0])  # lazy layers
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.3
    return data.Case(model, loss, train, test, λ)


def _bernoulli() -> data.Case:
    def pair(seed: int) -> data.Pair:
        return data.normal(seed, 17, 4), data.classes(seed + 1, 34, 2).reshape(17, 2).double()

    loss = functional.binary_cross_entropy_with_logits
    return case(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), loss, pair(41), pair(43), 0.01
    )


CASES: dict[str, Callable[[], data.Case]] = {
    "linear_regression": data.linear_regression,
    "mlp_regression": data.mlp_regression,
    "mlp_classification": data.mlp_classification,
    "bernoulli": _bernoulli,
    "conv1d": lambda: case(
        lambda: conv(1, dilation=2, padding=1), functional.cross_entropy, images(51, 1), images(53, 1), 0.01
    ),
    "conv2d": lambda: case(
        lambda: conv(2, stride=2, padding=(1, 0)),
        functional.cross_entropy,
        images(55, 2),
        images(57, 2),
        0.01,
    ),
    "conv3d": lambda: case(lambda: conv(3), functional.cross_entropy, images(59, 3), images(61, 3), 0.01),
    "norms": lambda: case(normed, functional.cross_entropy, images(67, 2), images(69, 2), 0.01),
    "tokens": lambda: case(Tokens, functional.cross_entropy, tokens(63), tokens(65), 0.005),
}
CASES = {name: cache(build) for name, build in CASES.items()}


def fitted(held: data.Case, **how: Any) -> InfluenceFunctionModel:
    return EkfacInfluence(held.model, held.loss, held.regularization, **how).fit(held.train)


def scores(held: data.Case, **how: Any) -> Tensor:
    return fitted(held, **how).influences(*held.test, *held.train)


# -- values ----------------------------------------------------------------------------
@pytest.mark.parametrize("corrected", [True, False], ids=["ekfac", "kfac"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_construction(name: str, corrected: bool) -> None:
    held = CASES[name]()
    inverse = dense(held.model, held.loss, held.train, held.regularization, corrected=corrected)
    expected = held.up(inverse)
    plain = held.up(torch.eye(len(inverse), dtype=torch.float64) / held.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5
    actual = scores(held, update_diagonal=corrected, chunk_size=7)
    assert oracles.relative_error(actual, expected) <= EXACT


@pytest.mark.parametrize("names", [["*.bias"], ["*.weight"], ["0.weight", "2.bias"]])
def test_part_of_the_parameters(names: list[str]) -> None:
    """A weight without its bias has no homogeneous coordinate; a bias alone has nothing but that."""
    held = data.mlp_classification()
    own = [n for n, _ in held.model.named_parameters() if any(fnmatch.fnmatchcase(n, p) for p in names)]
    inverse = dense(held.model, held.loss, held.train, held.regularization, names=own)
    expected = oracles.up(held.model, held.loss, inverse, held.test, held.train, own)
    assert oracles.relative_error(scores(held, parameters=names), expected) <= EXACT


def test_empirical_fisher() -> None:
    held = data.mlp_classification()
    expected = held.up(dense(held.model, held.loss, held.train, held.regularization, observed=True))
    model = fitted(held, curvature="empirical_fisher")
    assert oracles.relative_error(model.influences(*held.test, *held.train), expected) <= EXACT
    assert oracles.relative_error(scores(held), expected) > 0.05
    assert model.diagnostics["fitted_curvature"] == "empirical_fisher"


def test_uniform_predictions_have_an_output_factor() -> None:
    """Zero logits: a pseudo-loss of the mean class has no gradient there, the Fisher matrix has."""
    model = nn.Linear(4, 3).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    train, test = (
        (data.normal(1, 13, 4), data.classes(2, 13, 3)),
        (data.normal(3, 5, 4), data.classes(4, 5, 3)),
    )
    held = data.Case(model, functional.cross_entropy, train, test, 0.01)
    expected = held.up(dense(model, held.loss, train, 0.01))
    assert oracles.relative_error(scores(held), expected) <= EXACT
    assert fitted(held).diagnostics["largest_eigenvalue"] > 0.1


@pytest.mark.parametrize("name", ["mlp_classification", "conv2d", "digits_mlp"])
def test_the_correction_is_nearer_to_the_fisher_matrix(name: str) -> None:
    held = data.digits_mlp() if name == "digits_mlp" else CASES[name]()
    train = oracles.pick(held.train, slice(0, 37))
    true = oracles.ggn(held.model, held.loss, *train)
    sizes = [
        sum(p.numel() for p in m.parameters(recurse=False))
        for m in held.model.modules()
        if any(True for _ in m.parameters(recurse=False))
    ]
    blocks = oracles.block_diagonal(true, sizes)
    build = partial(dense, held.model, held.loss, train, 0.0, approximation=True)
    assert oracles.relative_error(build(), blocks) < oracles.relative_error(build(corrected=False), blocks)
    part = data.Case(held.model, held.loss, train, held.test, held.regularization)
    assert (
        oracles.relative_error(
            scores(part), held.up(dense(held.model, held.loss, train, held.regularization), train=train)
        )
        <= EXACT
    )


@pytest.mark.parametrize("separate", [False, True], ids=["packed", "separate"])
def test_attention_is_its_four_projections(separate: bool) -> None:
    width = 3 if separate else 4
    how = {"kdim": 3, "vdim": 3} if separate else {}
    packed, spelled = data.seeded(lambda: Attention(**how)).double(), Spelled(width).double()
    attention = packed.attention
    with torch.no_grad():
        attention.in_proj_bias += data.normal(9, 12)
        weights = (
            (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
            if separate
            else attention.in_proj_weight.chunk(3)
        )
        for part, w, b in zip(
            (spelled.q, spelled.k, spelled.v), weights, attention.in_proj_bias.chunk(3), strict=True
        ):
            part.weight.copy_(w)
            part.bias.copy_(b)
        spelled.out.load_state_dict(attention.out_proj.state_dict())
        spelled.head.load_state_dict(packed.head.state_dict())
    train, test = (
        (data.normal(1, 13, 5, 4), data.classes(2, 13, 3)),
        (data.normal(3, 6, 5, 4), data.classes(4, 6, 3)),
    )
    left, right = (data.Case(m, functional.cross_entropy, train, test, 1e-3) for m in (packed, spelled))
    expected = right.up(dense(spelled, right.loss, train, 1e-3))
    assert oracles.relative_error(scores(right), expected) <= EXACT
    assert oracles.relative_error(scores(left), expected) <= EXACT


class Encoder(nn.Module):
    """torch's own transformer layers, a mapping in and out, a loss at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1]).to(self.head.weight)
        return {"logits": self.head(self.encoder(self.embedding(ids), mask=mask))}


def next_token(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return functional.cross_entropy(output["logits"].flatten(0, 1), target.flatten())


def test_a_transformer_encoder() -> None:
    """Λ is the diagonal of the dense Fisher matrix in each layer's eigenbasis; the model is torch's own."""
    ids = torch.randint(5, (7, 3), generator=torch.Generator().manual_seed(1))
    model = data.seeded(Encoder).double()
    held = data.Case(model, next_token, ({"ids": ids}, ids.flip(0)), ({"ids": ids}, ids), 0.01)
    inverse = fitted(held, chunk_size=3)._fitted.inverse  # type: ignore[union-attr]
    assert len(inverse.blocks) == 18
    flat = nn.Sequential(model, Logits()).double()
    loss = lambda f, y: functional.cross_entropy(f.unflatten(1, (5, 3)), y)  # noqa: E731
    curvature = oracles.ggn(flat, loss, ids, ids.flip(0))
    places = torch.arange(len(curvature), dtype=torch.float64)[None]
    for i, block in enumerate(inverse.blocks):
        inputs, outputs, values = (
            inverse.tensors[f"{i}.{part}"] for part in ("inputs", "outputs", "eigenvalues")
        )
        for g, at in enumerate(block.gather(places)[0].flatten(1).long()):
            basis = torch.kron(outputs[min(g, len(outputs) - 1)], inputs[g])
            expected = (basis.T @ curvature[at[:, None], at] @ basis).diagonal()
            assert (values[g].flatten() - expected).abs().max() <= 1e-12 * curvature.diagonal().max()


class Logits(nn.Module):
    """(n, T, C) → (n, C·T)."""

    def forward(self, output: dict[str, Tensor]) -> Tensor:
        return output["logits"].transpose(1, 2).flatten(1)


def test_blocks_by_layer_are_its_own_blocks() -> None:
    held = data.mlp_classification()
    by_layer = EkfacInfluence(
        held.model, held.loss, {"0": 0.05, "2": 0.05}, block_structure="layer", chunk_size=7
    ).fit(held.train)
    assert oracles.relative_error(by_layer.influences(*held.test, *held.train), scores(held)) <= SAME


# -- losses ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda f, y: functional.cross_entropy(f, y) + 0.1 * f.square().mean(),
    ],
    ids=["module", "smoothed", "own"],
)
def test_losses_convex_in_the_outputs(loss: Any) -> None:
    base = data.mlp_classification()
    held = data.Case(base.model, loss, base.train, base.test, base.regularization)
    assert (
        oracles.relative_error(
            scores(held), held.up(dense(held.model, loss, held.train, held.regularization))
        )
        <= EXACT
    )


huber = partial(functional.huber_loss, delta=0.05)


def test_fisher_by_name_needs_a_likelihood() -> None:
    base = data.mlp_regression()
    held = data.Case(base.model, huber, base.train, base.test, 0.01)
    with pytest.raises(ConfigurationError, match="curvature='fisher'"):
        fitted(held, curvature="fisher")
    expected = held.up(dense(held.model, huber, held.train, 0.01))
    assert oracles.relative_error(scores(held, curvature="ggn"), expected) <= EXACT


def test_fisher_by_name_is_recognised_in_half_precision() -> None:
    base = data.mlp_classification()
    held = data.Case(base.model, functional.cross_entropy, base.train, base.test, 0.05)
    rounded = scores(held, dtype=torch.bfloat16, curvature="fisher").double()
    assert oracles.relative_error(rounded, scores(held)) <= 0.1


def concave(output: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(output, target) - 2 * output.square().mean()


@pytest.mark.parametrize(
    ("loss", "said"), [(functional.l1_loss, "is zero"), (concave, "eigenvalue -2")], ids=["linear", "concave"]
)
def test_a_loss_without_curvature_in_the_outputs_is_refused(loss: Any, said: str) -> None:
    base = data.mlp_regression()
    held = data.Case(base.model, loss, base.train, base.test, 0.01)
    with pytest.raises(LossError, match=f"{said}.*sample_targets"):
        fitted(held)
    assert torch.isfinite(scores(held, curvature="empirical_fisher")).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["categorical", "of no family"])
def test_rounding_of_a_short_dtype_is_no_negative_curvature(smoothing: float, dtype: torch.dtype) -> None:
    base = data.mlp_classification()
    loss = partial(functional.cross_entropy, label_smoothing=smoothing)
    held = data.Case(base.model, loss, base.train, base.test, 0.05)
    rounded = scores(held, dtype=dtype).double()
    assert oracles.relative_error(rounded, scores(held)) <= 8 * torch.finfo(dtype).eps ** 0.9
    steep = data.Case(
        base.model, lambda o, t: loss(o, t) - 0.2 * o.square().mean(), held.train, held.test, 0.05
    )
    with pytest.raises(LossError, match="eigenvalue -"):
        scores(steep, dtype=dtype)


class Laplace:
    """Σ|f − y|: the second moment of its gradient is the identity."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum(-1).mean()

    def sample_targets(self, output: Tensor, generator: torch.Generator) -> Tensor:
        u = torch.rand(output.shape, generator=generator, dtype=torch.float64) - 0.5
        return output + u.sign().to(output) * torch.log1p(-2 * u.abs()).to(output)


def test_a_loss_that_draws_its_targets() -> None:
    """One output: the gradient is ±1 whatever is drawn, as for half a square."""
    base = data.mlp_regression()
    held = data.Case(base.model, Laplace(), base.train, base.test, 0.05)
    inverse = dense(base.model, lambda f, y: functional.mse_loss(f, y) / 2, base.train, 0.05)
    assert oracles.relative_error(scores(held), held.up(inverse)) <= EXACT


# -- draws -----------------------------------------------------------------------------
def _per_position() -> data.Case:
    """Cross-entropy at three positions, (n, C, T)."""
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3)))  # noqa: E731
    pairs = [(data.normal(s, 17, 4), data.classes(s, 51, 2).reshape(17, 3)) for s in (71, 72)]
    return case(build, functional.cross_entropy, *pairs, 0.05)


def _drawn(name: str) -> data.Case:
    if name == "positions":
        return _per_position()
    if name == "smoothed":
        base = data.mlp_classification()
        return data.Case(base.model, nn.CrossEntropyLoss(label_smoothing=0.1), base.train, base.test, 0.05)
    return CASES[name]()


@pytest.mark.parametrize(
    "name", ["mlp_classification", "linear_regression", "bernoulli", "positions", "smoothed"]
)
def test_draws_have_the_exact_second_moment(name: str) -> None:
    """SᵀS of many draws is the output's Fisher matrix to within the error of a mean."""
    held, draws = _drawn(name), 4000
    x, y = oracles.pick(held.train, slice(0, 3))
    outputs = Outputs.of(Objective.of(held.model, held.loss), x, y)
    exact = Expectation(how="exact", curvature="ggn").columns(outputs)
    drawn = Expectation(how="sampled", curvature="ggn", draws=draws).columns(outputs)
    assert drawn.shape == (3, draws, exact.shape[2])
    products = draws * drawn[..., :, None] * drawn[..., None, :]  # (n, draws, K, K)
    error = (products.mean(1) - exact.mT @ exact).abs()
    assert (error <= 5 * products.std(1) / draws**0.5 + 1e-12).all()


@pytest.mark.parametrize("name", ["mlp_classification", "positions"])
def test_draws_are_seeded_and_tend_to_the_expectation(name: str) -> None:
    held = _drawn(name)
    exact = scores(held)
    few, many = (scores(held, expectation="sampled", draws=d) for d in (1, 64))
    assert 1e-6 < oracles.relative_error(many, exact) < min(0.2, oracles.relative_error(few, exact))
    assert torch.equal(few, scores(held, expectation="sampled", draws=1))
    assert not torch.equal(few, scores(held, expectation="sampled", draws=1, seed=1))


def test_auto_draws_beyond_the_exact_outputs() -> None:
    held = data.mlp_classification()
    drawn = scores(held, exact_outputs=2)
    assert torch.equal(drawn, scores(held, expectation="sampled"))
    assert torch.equal(scores(held, exact_outputs=3), scores(held, expectation="exact"))


def test_too_many_outputs_without_a_likelihood() -> None:
    train = (data.normal(1, 5, 3), data.normal(2, 5, 1100))
    held = data.Case(nn.Linear(3, 1100).double(), functional.huber_loss, train, train, 0.1)
    with pytest.raises(ConfigurationError, match="1100 outputs"):
        fitted(held)
    squares = data.Case(held.model, functional.mse_loss, train, train, 0.1)
    assert torch.isfinite(scores(squares)).all()


# -- chunks and sizes ------------------------------------------------------------------
@pytest.mark.parametrize("how", [{}, {"expectation": "sampled", "draws": 2}, {"update_diagonal": False}])
@pytest.mark.parametrize("name", ["mlp_classification", "tokens", "conv2d"])
def test_any_chunks(name: str, how: dict[str, Any]) -> None:
    held = CASES[name]()
    whole = scores(held, chunk_size=1000, **how)
    for size in (1, 5, 11):
        assert oracles.relative_error(scores(held, chunk_size=size, **how), whole) <= SAME


def test_small_batches_inside_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    held = CASES["conv2d"]()
    whole = scores(held)
    monkeypatch.setattr("dask_influence.core.capture.CAPTURE_BUDGET", 1)
    monkeypatch.setattr("dask_influence.core.estimators.ekfac.CORRECTION_BUDGET", 1)
    assert oracles.relative_error(scores(held), whole) <= SAME


def test_one_sample_and_more_test_points_than_parameters() -> None:
    base = data.linear_regression()
    one = oracles.pick(base.train, slice(0, 1))
    held = data.Case(base.model, base.loss, one, base.test, 0.05)
    assert len(base.test[1]) > 10
    assert oracles.relative_error(scores(held), held.up(dense(base.model, base.loss, one, 0.05))) <= EXACT


class Branching(nn.Sequential):
    """Cannot be batched by vmap."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > -1e9 else -x)


def test_a_model_that_vmap_cannot_batch() -> None:
    base = data.mlp_classification()
    held = data.Case(
        Branching(*copy.deepcopy(base.model)), base.loss, base.train, base.test, base.regularization
    )
    assert oracles.relative_error(scores(held), scores(base)) <= SAME


def test_padding_rows_receive_nothing() -> None:
    """torch gives the padding row no gradient, and neither do its covariances."""
    held = CASES["tokens"]()
    objective = Objective.of(held.model, held.loss)
    problem = Problem(objective, Forms())
    ids, y = held.train[0].clone(), held.train[1]
    ids[:, 2:4] = 0
    names, shapes = objective.names, tuple(map(tuple, objective.shapes))
    system = System(names, shapes, 0.1, "hessian", len(y), torch.float64, layout_of(objective))
    Ekfac().examine(system, problem, ids, y)  # captured = per-sample gradients, repeated ids included
    frequencies = covariance_sums(problem, ids, y, {}, Expectation()).mean("0.inputs").flatten()
    assert frequencies[0] == 0
    assert frequencies.sum().item() == pytest.approx(3 / 5)


# -- what has no Kronecker form ---------------------------------------------------------
def _with_prelu() -> data.Case:
    base = data.mlp_classification()
    layers = copy.deepcopy(base.model)
    model = nn.Sequential(layers[0], nn.PReLU().double(), layers[2])
    return data.Case(model, base.loss, base.train, base.test, base.regularization)


def test_unsupported_layers_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"1\.weight of 1 \(PReLU\)"):
        fitted(_with_prelu())


def test_unsupported_layers_are_left_out_on_request() -> None:
    held = _with_prelu()
    model = fitted(held, skip_unsupported=True)
    assert model.diagnostics["left_out"] == ["1.weight"]
    factors = model.influence_factors(*held.test)
    assert (factors[:, 30] == 0).all()
    assert (factors[:, 29] != 0).all()
    without = scores(held, parameters=["0.*", "2.*"])
    assert oracles.relative_error(model.influences(*held.test, *held.train), without) <= SAME
    with pytest.raises(ConfigurationError, match="no layer"):
        fitted(held, parameters=["1.weight"], skip_unsupported=True)


def test_tied_weights_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    pair = (data.normal(1, 9, 4), data.classes(2, 9, 4))
    held = data.Case(model, functional.cross_entropy, pair, pair, 0.1)
    with pytest.raises(ConfigurationError, match=r"shared by 0\.weight and 2\.weight"):
        fitted(held)


def test_tied_layers_are_left_out_on_request() -> None:
    """With their biases: of two layers of one weight, calls cannot be told apart."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model[2].weight = model[0].weight
    pair = (data.normal(1, 9, 4), data.classes(2, 9, 3))
    held = data.Case(model, functional.cross_entropy, pair, pair, 0.1)
    skipping = fitted(held, skip_unsupported=True)
    assert skipping.diagnostics["left_out"] == ["0.weight", "0.bias", "2.bias"]
    without = scores(held, parameters=["4.*"])
    assert oracles.relative_error(skipping.influences(*pair, *pair), without) <= SAME


def test_parametrised_weights_are_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))).double()
    pair = (data.normal(1, 9, 4), data.classes(2, 9, 3))
    with pytest.raises(ConfigurationError, match="original0"):
        fitted(data.Case(model, functional.cross_entropy, pair, pair, 0.1))


class Penalised(nn.Linear):
    """Uses its weight outside of its call as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.weight.square().sum()


def test_a_weight_that_is_used_in_another_way_is_refused() -> None:
    held = data.mlp_regression()
    model = nn.Sequential(Penalised(3, 2), nn.Linear(2, 1)).double()
    with pytest.raises(DerivativeError, match="layer 0 is not the sum"):
        fitted(data.Case(model, held.loss, held.train, held.test, 0.1))


# -- configuration, λ, state -------------------------------------------------------------
@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"expectation": "mean"}, "expectation"),
        ({"draws": 0}, "draws"),
        ({"exact_outputs": True}, "exact_outputs"),
    ],
)
def test_arguments_are_checked(own: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        fitted(data.mlp_regression(), **own)


def test_another_regularization_is_a_refit() -> None:
    held = data.mlp_classification()
    moved = fitted(held).with_regularization(0.3)
    other = data.Case(held.model, held.loss, held.train, held.test, 0.3)
    assert oracles.relative_error(moved.influences(*held.test, *held.train), scores(other)) <= SAME


def test_zero_regularization_is_singular() -> None:
    held = data.mlp_classification()
    with pytest.raises(SingularCurvatureError, match="layer 2"):
        fitted(data.Case(held.model, held.loss, held.train, held.test, 0.0))
    with pytest.raises(SingularCurvatureError):
        fitted(held).with_regularization(0.0)


def test_zero_regularization_of_a_regular_matrix() -> None:
    held = data.linear_regression()
    exact = data.Case(held.model, held.loss, held.train, held.test, 0.0)
    expected = exact.up(dense(held.model, held.loss, held.train, 0.0))
    assert oracles.relative_error(scores(exact), expected) <= EXACT


def test_saved_and_loaded(tmp_path: Any) -> None:
    held = CASES["tokens"]()
    model = fitted(held)
    model.save(tmp_path / "fit")
    loaded = EkfacInfluence.load(tmp_path / "fit", held.model, held.loss)
    assert torch.equal(loaded.influences(*held.test, *held.train), model.influences(*held.test, *held.train))
    assert loaded.diagnostics["layers"] == model.diagnostics["layers"]


def test_two_passes_or_one_and_functions_that_travel() -> None:
    held = data.mlp_classification()
    assert fitted(held).diagnostics["passes"] == 2
    assert fitted(held, update_diagonal=False).diagnostics["passes"] == 1
    function = partial(covariance_sums, expectation=Expectation())
    assert pickle.loads(pickle.dumps(function)).func is covariance_sums
