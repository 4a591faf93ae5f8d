"""Curvature: sums over a chunk of products with blocks of vectors, and of whole matrices.

The curvature of the *mean* loss; what is computed here for one chunk is the sum over its
samples, and :class:`~dask_influence.core.moments.Moments` forms the mean. By their names in
``curvature=``:

======================  ================================================================
``"hessian"``           Σ_j ∇²θ ℓ(z_j)
``"ggn"``               Σ_j J_jᵀ (∂²ℓ/∂f²) J_j, the generalised Gauss-Newton matrix
``"fisher"``            Σ_j J_jᵀ c E[s sᵀ] J_j under the model's own predictions
``"empirical_fisher"``  Σ_j g_j g_jᵀ at the observed targets: not a Gauss-Newton matrix
======================  ================================================================

with f the outputs, J = ∂f/∂θ, g = ∇θ ℓ, and s the gradient of −log p(y | f) where the loss is
c (−log p); see :mod:`~dask_influence.core.families`. Schraudolph 2002, "Fast curvature
matrix-vector products"; Martens 2020, "New insights and perspectives on the natural gradient
method"; Kunstner et al. 2019, "Limitations of the empirical Fisher approximation".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import optree
import torch
from torch import Tensor

from dask_influence.core import forms, multiply, outputs, sizes
from dask_influence.core.directional import chain_of, directional_derivatives, gradients
from dask_influence.core.elementary import differentiation
from dask_influence.core.families import Likelihood, recognise
from dask_influence.core.gemm import product
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Objective, Tree, leading_size, sliced
from dask_influence.core.outputs import Inner, Outputs
from dask_influence.core.precision import rounding
from dask_influence.core.problem import Problem
from dask_influence.core.structured import gauss_newton_sum, hessian_sum
from dask_influence.errors import ConfigurationError, DerivativeError, InfluenceWarning

FEW_VECTORS = 8
"""Up to as many, weighted sums of gradients cost less than forming the gradients."""

_GRAM_COLUMNS = 512

Products = Callable[[Problem, Tree, Tree, Tensor], Tensor]
"""Σ_j C(z_j) v_b for a block of vectors (B, P) → (B, P)."""


def product_sums(problem: Problem, x: Tree, y: Tree, operand: dict[str, Tensor], curvature: str) -> Moments:
    """Chunk function: Σ_j C(z_j) v_b for ``operand["vectors"]`` (B, P), as ``"products"``."""
    vectors, count = operand["vectors"], leading_size(y)
    products = torch.empty(vectors.shape, dtype=torch.float64)
    if curvature in ("hessian", "ggn") and problem.forms.product == "chain":
        chain, block = chain_of(problem, x, y), problem.block_of_vectors(count, sizes.VECTORS)
        for part, into in zip(vectors.split(block), products.split(block), strict=True):
            multiply.products(chain, part, into, gauss_newton=curvature == "ggn")
    else:
        _write_shared(problem, x, y, vectors, products, PRODUCTS[curvature])
    return Moments({"products": products}, count)


def _write_shared(
    problem: Problem, x: Tree, y: Tree, vectors: Tensor, into: Tensor, products: Products
) -> None:
    """Products of ``vectors`` (B, P), some of them with some samples at a time, which share a graph."""
    objective = problem.objective
    samples, block = problem.shares(leading_size(y), len(vectors), sizes.SHARED)
    for part, rows in zip(vectors.split(block), into.split(block), strict=True):
        # torch's own memory, in order: the same wherever the operand came from, hence the same bits
        own = part.to(objective.device, objective.dtype, copy=True, memory_format=torch.contiguous_format)
        rows.zero_()
        for some in _parts(x, y, samples):
            rows += products(problem, *some, own).to(rows)


def matrix_sums(problem: Problem, x: Tree, y: Tree, operand: dict[str, Tensor], curvature: str) -> Moments:
    """Chunk function: Σ_j C(z_j) as a symmetric (P, P) matrix, as ``"matrix"``.

    From the responses of the layers where they are linear. Else the Hessian from products with the
    unit vectors; the others from the rows of a factor, which are first derivatives, unless those
    would not fit.
    """
    count = leading_size(y)
    structured = _structured(problem, x, y, curvature)
    if structured is not None:
        return Moments({"matrix": structured}, count)
    rows = _factor_rows(problem, x, y, curvature)
    if rows is None:
        return Moments({"matrix": _matrix_of_products(problem, x, y, PRODUCTS[curvature])}, count)
    size, device = problem.objective.size, problem.objective.device
    total = torch.zeros(size, size, dtype=torch.float64, device=device)
    for positive, negative in rows:
        add_gram(total, positive, 1.0)
        add_gram(total, negative, -1.0)
    return Moments({"matrix": mirrored(total)}, count)


# -- products --------------------------------------------------------------------------
def hessian_products(problem: Problem, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    """Σ_j ∇²ℓ(z_j) v_b, shape (B, P)."""
    return forms.products(problem.objective, x, y, vectors, problem.forms)


def ggn_products(problem: Problem, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    """Σ_j J_jᵀ (∂²ℓ/∂f²) J_j v_b, shape (B, P)."""
    with differentiation(), torch.no_grad():
        at = Outputs.of(problem.objective, x, y)
        return outputs.products(problem, at, vectors, at.curvature())


def fisher_products(problem: Problem, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    """Σ_j J_jᵀ c E[s ⟨s, J_j v_b⟩], the expectation over the targets that the model predicts, (B, P)."""
    with differentiation(), torch.no_grad():
        at = Outputs.of(problem.objective, x, y)
        return outputs.products(problem, at, vectors, _expectation(likelihood(at)))


def empirical_fisher_products(problem: Problem, x: Tree, y: Tree, vectors: Tensor) -> Tensor:
    """Σ_j g_j ⟨g_j, v_b⟩, shape (B, P).

    For few vectors, weighted sums of gradients, which one backward pass each gives without
    forming a gradient; for many, or where samples can only be differentiated together, the gradients.
    """
    if len(vectors) <= FEW_VECTORS or problem.forms.gradient == "loop":
        weights = directional_derivatives(problem, x, y, vectors)  # (n, B)
        return weighted_gradients(problem, x, y, weights)
    total = torch.zeros_like(vectors)
    for part_x, part_y in _parts(x, y, _samples_at_once(problem, 1)):
        rows = gradients(problem, part_x, part_y)  # (n, P)
        total += product(product(vectors, rows.mT), rows)
    return total


PRODUCTS: dict[str, Products] = {
    "hessian": hessian_products,
    "ggn": ggn_products,
    "fisher": fisher_products,
    "empirical_fisher": empirical_fisher_products,
}
"""The curvatures by their name in ``curvature=``."""


def likelihood(at: Outputs) -> Likelihood:
    """The likelihood behind the loss, recognised on these very samples; see ``families.recognise``.

    Its outputs are those of the model in their own shape; call within :func:`differentiation`.
    """
    f = at.only()
    wide = at.in_double()
    with torch.enable_grad():
        leaf = wide.flat.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(wide.loss(leaf), leaf)
    targets = optree.tree_leaves(wide.y)
    return recognise(
        at.objective.loss, f, gradient.reshape(f.shape), targets[0] if len(targets) == 1 else wide.y
    )


def _expectation(found: Likelihood) -> Inner:
    def inner(tangents: Tensor) -> Tensor:
        shaped = tangents.to(torch.float64).reshape(found.outputs.shape)
        return found.multiply(shaped).reshape(tangents.shape).to(tangents.dtype)

    return inner


def weighted_gradients(problem: Problem, x: Tree, y: Tree, weights: Tensor) -> Tensor:
    """Σ_j w_jb g_j for weights (n, B), shape (B, P): one backward pass for each column."""
    objective = problem.objective
    with differentiation(), torch.enable_grad():
        leaves = {name: value.requires_grad_() for name, value in objective.parameters().items()}
        losses = objective.sample_losses(leaves, x, y)
        rows = [
            torch.autograd.grad(
                losses, list(leaves.values()), column, retain_graph=True, materialize_grads=True
            )
            for column in weights.mT.contiguous()
        ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).detach()


# -- matrices --------------------------------------------------------------------------
def _structured(problem: Problem, x: Tree, y: Tree, curvature: str) -> Tensor | None:
    """Σ_j C(z_j) layer by layer, compared with one product; None where that is no way or not the right one."""
    if curvature == "empirical_fisher":
        return None  # one row of each sample: as cheap as the layers'
    objective = problem.objective
    try:
        if curvature == "hessian":
            matrix = hessian_sum(problem, x, y)
        else:
            matrix = gauss_newton_sum(problem, x, y, partial(_factors, curvature=curvature))
    except (RuntimeError, NotImplementedError) as failure:  # the model has operations without the derivatives
        found = f"raises {type(failure).__name__} ({str(failure).splitlines()[0][:100]})"
    else:
        if matrix is None:
            return None
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(1, objective.size, generator=generator, dtype=torch.float64)
        vector /= vector.norm()  # or its product would overflow in half precision
        expected = PRODUCTS[curvature](problem, x, y, vector.to(objective.device, objective.dtype))
        expected = expected.to("cpu", torch.float64)
        error, scale = float((vector @ matrix - expected).norm()), float(expected.norm())
        if not math.isfinite(scale):
            return matrix  # of bad samples, which are named where sums are looked at
        if error <= 4 * max(torch.finfo(objective.dtype).eps ** 0.5, 4 * rounding(objective.dtype)) * scale:
            return matrix
        found = f"is off by {error:.1e} of {scale:.1e}"
    warnings.warn(
        f"the curvature {curvature!r} layer by layer {found} for this model; it is computed in the general way, "
        "which is slower",
        InfluenceWarning,
        stacklevel=2,
    )
    return None


def _matrix_of_products(problem: Problem, x: Tree, y: Tree, products: Products) -> Tensor:
    """Columns are products with the unit vectors, a block at a time."""
    objective = problem.objective
    block = problem.block_of_vectors(leading_size(y), sizes.VECTORS)
    matrix = torch.empty(objective.size, objective.size, dtype=torch.float64)
    for start in range(0, objective.size, block):
        rows = range(start, min(start + block, objective.size))
        units = torch.zeros(len(rows), objective.size, dtype=objective.dtype, device=objective.device)
        units[torch.arange(len(rows)), torch.arange(rows.start, rows.stop)] = 1
        matrix[rows.start : rows.stop] = products(problem, x, y, units)
    # Rounding makes the two triangles differ in the last bits; a symmetric factorisation
    # must not depend on which one it reads.
    return (matrix + matrix.mT) / 2


def _factor_rows(
    problem: Problem, x: Tree, y: Tree, curvature: str
) -> Iterator[tuple[Tensor, Tensor]] | None:
    """Float64 rows (M₊, M₋), some samples at a time, with Σ_j C(z_j) = M₊ᵀM₊ − M₋ᵀM₋; None to use products."""
    if curvature == "hessian":
        return None
    if curvature == "empirical_fisher":
        return (
            (gradients(problem, *part).to(torch.float64), torch.empty(0))
            for part in _parts(x, y, _samples_at_once(problem, 1))
        )
    with differentiation(), torch.no_grad():
        width = Outputs.of(problem.objective, sliced(x, slice(1)), sliced(y, slice(1))).flat.shape[1]
    step = _samples_at_once(problem, width)
    if width > problem.objective.size or step < 1:
        return None
    return (_rows_of_outputs(problem, *part, curvature) for part in _parts(x, y, step))


def _rows_of_outputs(problem: Problem, x: Tree, y: Tree, curvature: str) -> tuple[Tensor, Tensor]:
    """L J for A = L₊ᵀL₊ − L₋ᵀL₋ of each sample, as rows (·, P)."""
    with differentiation(), torch.no_grad():
        at = Outputs.of(problem.objective, x, y)
        rows = outputs.jacobian(problem, at).to(torch.float64)  # (n, K, P)
        factors, signs = _factors(at, curvature)
    rows = (factors @ rows).flatten(0, 1)
    return rows[signs.flatten() > 0], rows[signs.flatten() < 0]


def _factors(at: Outputs, curvature: str) -> tuple[Tensor, Tensor]:
    """L (n, r, K) float64 with A = Σ_r ± L_rᵀ L_r in the outputs of each sample, and the signs (n, r), 0 for none."""
    if curvature == "fisher":
        factors = likelihood(at).factors().reshape(len(at.flat), -1, at.flat.shape[1])
        return factors, factors.new_ones(factors.shape[:2])
    values, vectors = torch.linalg.eigh(at.matrices(at.curvature()))  # (n, K), (n, K, K)
    factors = values.abs().sqrt()[..., None] * vectors.mT
    negligible = values.shape[1] * torch.finfo(torch.float64).eps * values.abs().max()
    return factors, values.sign() * (values.abs() > negligible)


def add_gram(total: Tensor, rows: Tensor, sign: float = 1.0) -> None:
    """total += sign · rowsᵀ rows, in the upper triangle (in blocks: half of the products)."""
    if len(rows) == 0:
        return
    for start in range(0, len(total), _GRAM_COLUMNS):
        stop = start + _GRAM_COLUMNS
        total[start:stop, start:].addmm_(rows[:, start:stop].mT, rows[:, start:], alpha=sign)


def mirrored(total: Tensor) -> Tensor:
    """The symmetric matrix of an upper triangle."""
    return total.triu() + total.triu(1).mT


def _samples_at_once(problem: Problem, width: int) -> int:
    """Samples whose ``width`` rows of length P fit the budget in the model's dtype and in float64."""
    itemsize = problem.objective.dtype.itemsize
    return int(sizes.VECTORS // (width * problem.objective.size * (3 * itemsize + 16)))


def _parts(x: Tree, y: Tree, size: int) -> Iterator[tuple[Tree, Tree]]:
    for start in range(0, leading_size(y), max(1, size)):
        part = slice(start, start + max(1, size))
        yield sliced(x, part), sliced(y, part)


# -- the check before a fit ------------------------------------------------------------
def check_curvature(problem: Problem, x: Tree, y: Tree, curvature: str) -> None:
    """Refuse a curvature that this loss does not have, or whose parts disagree with each other.

    J v against its transpose, ⟨u, J v⟩ = ⟨Jᵀu, v⟩, and ∂²ℓ/∂f² against central differences of
    ∂ℓ/∂f, in float64 on the few samples given. The Hessian, and the gradients that make the
    empirical Fisher, have been checked by ``derivatives.choose_forms``.

    Raises
    ------
    ConfigurationError
        Fisher: the loss is no known likelihood. GGN: it is linear in the output.
    DerivativeError
        The parts disagree.
    """
    if curvature not in ("ggn", "fisher"):
        return
    objective, cast = _double_objective(problem.objective, x)
    x, y = optree.tree_map(cast, x), optree.tree_map(cast, y)
    with differentiation(), torch.no_grad():
        at = Outputs.of(objective, x, y)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(objective.size, generator=generator, dtype=torch.float64).to(at.flat)
        u = torch.randn(at.flat.shape, generator=generator, dtype=torch.float64).to(at.flat)
        tolerance = 1e-8 if at.flat.dtype == torch.float64 else 1e-2
        along = outputs.pushed(Problem(objective, problem.forms, problem.activations), at, v)
        back = outputs.pulled(at, u)
        if not (error := float(((u * along).sum() - back @ v).abs())) <= tolerance * float(
            u.norm() * along.norm()
        ):
            raise DerivativeError(
                f"⟨u, J v⟩ and ⟨Jᵀu, v⟩ of the model's outputs f (J = ∂f/∂θ) differ by {error:.2g}: its forward and "
                "reverse derivatives disagree; curvature='hessian' or 'empirical_fisher' do not use them"
            )
        if curvature == "fisher":
            likelihood(at)
        else:
            _check_output_curvature(at, u)


def _double_objective(objective: Objective, x: Tree) -> tuple[Objective, Callable[[Tensor], Tensor]]:
    """The objective in float64, or as it is where the model insists on its own dtype."""

    def cast(leaf: Tensor) -> Tensor:
        return leaf.to(torch.float64) if leaf.is_floating_point() else leaf

    double = objective.to(dtype=torch.float64)
    try:
        with torch.no_grad():
            double.outputs(double.parameters(), optree.tree_map(cast, x))
    except (RuntimeError, TypeError, ValueError):  # tensors of a fixed dtype made in forward
        return objective, lambda leaf: leaf
    return double, cast


def _check_output_curvature(at: Outputs, u: Tensor) -> None:
    def gradient(shift: float) -> Tensor:
        with torch.enable_grad():
            leaf = (at.flat + shift * u).detach().requires_grad_()
            return torch.autograd.grad(at.loss(leaf), leaf)[0]

    curved, here = at.curvature()(u), gradient(0.0)
    if not curved.any() and torch.equal(here, gradient(1.0)) and torch.equal(here, gradient(-10.0)):
        raise ConfigurationError(
            "curvature='ggn' is zero for a loss that is linear in the model's output (nll_loss of "
            "log-probabilities is); let the model return logits and use cross_entropy, or use "
            "curvature='fisher' or 'hessian'"
        )
    if at.flat.dtype != torch.float64:
        return  # differences of float32 gradients say nothing
    size = max(1.0, float(at.flat.abs().max()))
    excess = []
    for step in (1e-5 * size, 1e-7 * size):  # the larger one may step over the kink of a piecewise loss
        difference = (gradient(step) - gradient(-step)) / (2 * step)
        allowed = 1e-4 * float(curved.norm()) + 1e-13 * float(here.norm()) / step
        excess.append(float((curved - difference).norm()) - allowed)
    if not min(excess) <= 0:
        raise DerivativeError(
            f"∂²ℓ/∂f² of the loss {getattr(at.objective.loss, '__name__', type(at.objective.loss).__name__)!r} is "
            f"off by {min(excess):.2g} from differences of ∂ℓ/∂f; write the loss in elementary operations"
        )
