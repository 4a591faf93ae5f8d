"""ArnoldiInfluence against a dense eigendecomposition, with and without the complement."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dask_influence import ArnoldiInfluence, DirectInfluence
from dask_influence.core.estimators.arnoldi import NEAR, _block
from dask_influence.core.estimators.decomposition import Decomposition
from tests import data, oracles

RANKS = {
    "linear_regression": 4,
    "logistic_regression": 7,
    "mlp_regression": 11,
    "mlp_classification": 17,
    "digits_mlp": 23,
}
EIGENVALUES, SCORES = 1e-8, 1e-6


def fit(case: data.Case, rank: int, complement: bool = False, **how: object) -> ArnoldiInfluence:
    model = ArnoldiInfluence(
        case.model, case.loss, case.regularization, rank=rank, complement=complement, tol=1e-11, **how
    )
    return model.fit(case.train)


def expected_inverse(case: data.Case, rank: int, complement: bool) -> Tensor:
    """The dense low-rank inverse, where the choice of the leading eigenpairs is not a matter of rounding."""
    values, _ = oracles.leading_eigenpairs(case.hessian, rank + 1)
    assert float(values[-2].abs() - values[-1].abs()) > 1e-4 * float(values[0].abs())
    return oracles.low_rank_inverse(case.hessian, case.regularization, rank, complement)


@pytest.mark.parametrize("complement", [False, True], ids=["dropped", "woodbury"])
@pytest.mark.parametrize("name", RANKS)
def test_up_against_dense_eigendecomposition(name: str, complement: bool) -> None:
    case, rank = data.ALL[name](), RANKS[name]
    inverse = expected_inverse(case, rank, complement)
    scores = fit(case, rank, complement).influences(*case.test, *case.train)
    expected = case.up(inverse)
    assert scores.dtype == torch.float64
    assert oracles.relative_error(scores, expected) <= SCORES
    plain = case.up(torch.eye(len(inverse), dtype=torch.float64) / case.regularization)
    assert oracles.weight_of_curvature(expected, plain) > 0.5


@pytest.mark.parametrize("complement", [False, True], ids=["dropped", "woodbury"])
@pytest.mark.parametrize("name", ["linear_regression", "mlp_regression", "mlp_classification"])
def test_perturbation_against_dense_eigendecomposition(name: str, complement: bool) -> None:
    case, rank = data.SMALL[name](), RANKS[name]
    expected = case.perturbation(expected_inverse(case, rank, complement))
    values = fit(case, rank, complement).influences(*case.test, *case.train, mode="perturbation")
    assert oracles.relative_error(values, expected) <= SCORES


def operator_of(fitted: ArnoldiInfluence, case: data.Case, samples: data.Pair) -> Tensor:
    """The matrix A of s = A g, read off factors of more test points than parameters."""
    rows = oracles.gradients(case.model, case.loss, *samples)
    assert torch.linalg.matrix_rank(rows) == rows.shape[1]
    operator = torch.linalg.lstsq(rows, fitted.influence_factors(*samples)).solution
    return (operator + operator.T) / 2


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_eigenvalues_read_off_the_factors(rank: int) -> None:
    """With the complement dropped, A has R eigenvalues 1/(Λ + λ) and P − R zeros."""
    case = data.linear_regression()
    samples = data.normal(71, 47, 4), data.normal(72, 47, 2)
    values = torch.linalg.eigvalsh(operator_of(fit(case, rank), case, samples))
    values = values[values.abs().argsort(descending=True)]
    expected, _ = oracles.leading_eigenpairs(case.hessian, rank)
    assert float(values[rank:].abs().max()) <= 1e-12 * float(values[0])
    found = (1 / values[:rank] - case.regularization).sort(descending=True).values
    assert float(((found - expected) / expected).abs().max()) <= EIGENVALUES


def test_eigenvalues_of_largest_magnitude_include_negative_ones() -> None:
    """An untrained network has an indefinite Hessian; λ above its lowest eigenvalue, so no warning."""
    case = data.mlp_regression()
    model = data.seeded(lambda: oracles.copy.deepcopy(case.model))
    for parameter in model.parameters():
        parameter.data.copy_(1.5 * data.normal(parameter.numel(), *parameter.shape))
    hessian = oracles.hessian(model, case.loss, *case.train)
    spectrum, _ = oracles.leading_eigenpairs(hessian, 8)
    negative = int((spectrum < 0).sum())
    assert negative >= 1
    damping = 1.5 * float(-torch.linalg.eigvalsh(hessian)[0])
    fitted = ArnoldiInfluence(model, case.loss, damping, rank=8, tol=1e-11).fit(case.train)
    inverse = oracles.low_rank_inverse(hessian, damping, 8, complement=False)
    expected = oracles.up(model, case.loss, inverse, case.test, case.train)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), expected) <= SCORES


@pytest.mark.parametrize("rank", [12, 14, 17])
def test_whole_range_of_a_singular_hessian_with_complement_is_the_inverse(rank: int) -> None:
    """P = 18, rank of H 12: the complement has eigenvalue λ in truth as well, up to R = P − 1."""
    case = data.logistic_regression()
    scores = fit(case, rank, complement=True).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(case.inverse)) <= SCORES


def test_higher_rank_comes_closer_to_the_exact_scores() -> None:
    case = data.mlp_classification()
    exact = DirectInfluence(case.model, case.loss, case.regularization).fit(case.train)
    exact = exact.influences(*case.test, *case.train)
    errors = [
        oracles.relative_error(fit(case, rank, complement=True).influences(*case.test, *case.train), exact)
        for rank in (3, 12, 40)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_same_seed_same_scores_and_any_seed_same_values() -> None:
    case = data.mlp_classification()
    first, again, other = (fit(case, 17, seed=seed).influences(*case.test, *case.train) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert oracles.relative_error(other, first) <= SCORES


@pytest.mark.parametrize("krylov_dimension", [31, 47])
def test_krylov_dimension_does_not_change_converged_values(krylov_dimension: int) -> None:
    case = data.mlp_classification()
    fitted = fit(case, 11, krylov_dimension=krylov_dimension)
    inverse = expected_inverse(case, 11, complement=False)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(inverse)) <= SCORES


def test_default_rank_and_tolerance() -> None:
    case = data.logistic_regression()
    fitted = ArnoldiInfluence(case.model, case.loss, case.regularization).fit(case.train)
    inverse = expected_inverse(case, 10, complement=False)
    assert oracles.relative_error(fitted.influences(*case.test, *case.train), case.up(inverse)) <= 1e-4


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
def test_other_curvatures(kind: str) -> None:
    case = data.mlp_classification()
    dense = getattr(oracles, kind)(case.model, case.loss, *case.train)
    inverse = oracles.low_rank_inverse(dense, case.regularization, 13, complement=True)
    scores = fit(case, 13, complement=True, curvature=kind).influences(*case.test, *case.train)
    assert oracles.relative_error(scores, case.up(inverse)) <= SCORES


@pytest.mark.parametrize("complement", [False, True], ids=["dropped", "woodbury"])
def test_float32_within_what_it_allows(complement: bool) -> None:
    case = data.mlp_classification()
    model = oracles.copy.deepcopy(case.model).float()
    test, train = ((x.float(), y) for x, y in (case.test, case.train))
    fitted = ArnoldiInfluence(
        model, case.loss, case.regularization, rank=17, complement=complement, tol=1e-5
    ).fit(train)
    scores = fitted.influences(*test, *train)
    assert scores.dtype == torch.float32
    expected = case.up(expected_inverse(case, 17, complement))
    assert oracles.relative_error(scores, expected) <= 1e-3


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-9])
def test_the_residual_reported_is_that_of_the_eigenpairs(tol: float) -> None:
    case = data.digits_mlp()
    model = ArnoldiInfluence(case.model, case.loss, case.regularization, rank=23, tol=tol).fit(case.train)
    inverse = model._fitted.inverse
    vectors, values = inverse.vectors, inverse.values
    left = (vectors @ case.hessian - values[:, None] * vectors).norm(dim=1)
    worst = float(left.max() / values[0].abs())
    assert worst <= tol
    assert model.diagnostics["eigenpair_residual"] == pytest.approx(worst, rel=1e-2, abs=1e-13)
    assert (vectors @ vectors.mT - torch.eye(23, dtype=torch.float64)).abs().max() <= 1e-13


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_a_basis_in_float32_holds_pairs_to_a_coarse_tolerance(tol: float) -> None:
    """Their residual is that of the dense float64 Hessian, and V is orthonormal in float64."""
    case = data.digits_mlp()
    model, (x, y) = oracles.copy.deepcopy(case.model).float(), case.train
    fitted = ArnoldiInfluence(model, case.loss, case.regularization, rank=23, tol=tol).fit((x.float(), y))
    inverse = fitted._fitted.inverse
    vectors, values = inverse.vectors, inverse.values
    assert vectors.dtype == values.dtype == inverse.images.dtype == torch.float64
    left = (vectors @ case.hessian - values[:, None] * vectors).norm(dim=1)
    worst = float(left.max() / values[0].abs())
    assert worst <= tol
    assert fitted.diagnostics["eigenpair_residual"] == pytest.approx(worst, rel=1e-2, abs=min(1e-5, tol / 5))
    assert (vectors @ vectors.mT - torch.eye(23, dtype=torch.float64)).abs().max() <= 1e-13
    assert fitted.diagnostics["krylov_dimension"] == 2 * fit(case, 23).diagnostics["krylov_dimension"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_captured_spectrum_comes_close_to_the_share_of_squares(seed: int) -> None:
    case = data.digits_mlp()
    fitted = ArnoldiInfluence(case.model, case.loss, case.regularization, rank=10, seed=seed).fit(case.train)
    squares = torch.linalg.eigvalsh(case.hessian).square().sort(descending=True).values
    truth = float(squares[:10].sum() / squares.sum())
    assert 1 - fitted.diagnostics["captured_spectrum"] == pytest.approx(1 - truth, rel=0.6)


@pytest.mark.parametrize("block_size", [1, 2])
def test_eigenvalues_of_larger_multiplicity_than_the_block_are_found(block_size: int) -> None:
    """Under squared error those of a linear layer have one copy for each of its five outputs."""
    net = data.seeded(lambda: torch.nn.Linear(6, 5)).double()
    x, y = 3.0 * data.normal(81, 43, 6), data.normal(82, 43, 5)
    hessian = oracles.hessian(net, torch.nn.functional.mse_loss, x, y)
    expected, _ = oracles.leading_eigenpairs(hessian, 15)
    assert float((expected[:5] - expected[0]).abs().max()) <= 1e-12  # five copies
    fitted = ArnoldiInfluence(
        net, torch.nn.functional.mse_loss, 0.1, rank=15, tol=1e-9, block_size=block_size
    ).fit((x, y))
    assert fitted.diagnostics["eigenvalues"] == pytest.approx(expected.tolist(), rel=1e-8)


def test_small_blocks_take_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single vectors take the fewest products and blocks the fewest passes; either finds the same pairs."""
    case, taken = data.digits_mlp(), []
    advance = Decomposition.advance

    def counting(self: Decomposition, images: Tensor, *divisor: int) -> None:
        taken[-1].append(len(images))
        advance(self, images, *divisor)

    monkeypatch.setattr(Decomposition, "advance", counting)
    values = []
    for block_size in (1, 4):
        taken.append([])
        fitted = ArnoldiInfluence(
            case.model, case.loss, case.regularization, rank=20, tol=1e-4, block_size=block_size
        ).fit(case.train)
        values.append(fitted.diagnostics["eigenvalues"])
        assert fitted.diagnostics["passes"] == len(taken[-1])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    single, blocks = taken
    assert sum(single) < 0.85 * sum(blocks)
    assert len(blocks) < 0.5 * len(single)
    assert sum(single) <= 5 * 20


def test_missed_pairs_are_looked_for_when_the_last_ones_have_nearly_converged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Begun much earlier, the search is over before pairs that are close to each other have parted."""
    case, tol, residuals = data.digits_mlp(), 1e-4, []
    add_random = Decomposition.add_random

    def watching(self: Decomposition, count: int) -> None:
        if self.multiplied:
            ritz = self.ritz()
            residuals.append(float(ritz.residuals[:20].max() / ritz.values[0].abs()))
        add_random(self, count)

    monkeypatch.setattr(Decomposition, "add_random", watching)
    fitted = ArnoldiInfluence(case.model, case.loss, case.regularization, rank=20, tol=tol, block_size=1).fit(
        case.train
    )
    (began,) = residuals
    assert tol < began <= NEAR * tol  # the search's own passes do the rest
    assert fitted.diagnostics["eigenpair_residual"] <= tol


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [6, 8, 12, 20])
def test_pairs_beyond_the_rank_of_the_curvature(rank: int, dtype: torch.dtype) -> None:
    """Forty features that span five dimensions, and a bias: the Krylov space ends early."""
    x = (data.normal(85, 200, 5) @ data.normal(86, 5, 40)).to(dtype)
    y, model = data.normal(87, 200, 1).to(dtype), data.seeded(lambda: torch.nn.Linear(40, 1)).to(dtype)
    how = (model, torch.nn.functional.mse_loss, 1e-2)
    exact = DirectInfluence(*how).fit((x, y)).influences(x[:20], y[:20], x, y)
    for tol in (1e-3, 1e-6):
        fitted = ArnoldiInfluence(*how, rank=rank, complement=True, tol=tol).fit((x, y))
        found = fitted.influences(x[:20], y[:20], x, y)
        assert oracles.relative_error(found, exact) <= (1e-9 if dtype == torch.float64 else 1e-5)
        assert fitted.diagnostics["positive_definite"]


@pytest.mark.parametrize(
    ("rank", "pass_cost", "block"), [(20, 0.1, 1), (20, 1.0, 3), (1, 1.0, 1), (100, 1.0, 7), (600, 4.0, 16)]
)
def test_blocks_are_as_large_as_passes_cost(rank: int, pass_cost: float, block: int) -> None:
    assert _block(rank, pass_cost) == block


def test_a_large_chain_in_this_process_is_multiplied_by_single_vectors() -> None:
    """Elsewhere a pass costs as much as a product, and small models are fitted alike everywhere."""
    x, y = data.normal(83, 9, 300).float(), data.normal(84, 9, 1).float()

    def block_of(hidden: int) -> int:
        net = data.seeded(
            lambda: torch.nn.Sequential(
                torch.nn.Linear(300, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1)
            )
        )
        fitted = ArnoldiInfluence(net.float(), torch.nn.functional.mse_loss, 30.0, rank=8, tol=1e-2).fit(
            (x, y)
        )
        return int(fitted.diagnostics["block_size"])

    assert [block_of(220), block_of(20)] == [1, 2]
