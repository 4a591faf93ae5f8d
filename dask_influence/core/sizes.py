"""What parts of a model take, as integers: all that a plan knows of them. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from dask_influence.grid import Chunks, balanced

BUDGET = 128 * 2**20
"""Bytes that one call may keep alive beside its result, unless the caller says otherwise."""

ESTIMATING = 2**29
"""Bytes of the random vectors that estimate residuals, as far as they are made at once, and of what makes them."""

VECTORS = 2**28
"""Bytes that the vectors pushed through a chain at once may keep alive, and rows of factors."""

SHARED = 2**29
"""The same of vectors that share a graph, which is made anew for each call: what a chunk may take by default."""

_COPIES = 6
"""Times that making them holds as many numbers, beside those for each λ."""

# Costs in nanoseconds per (sample × parameter), measured on one core; only their ratio
# matters. A direction pushed forward costs two products with the weights; a gradient
# costs its backward pass and, above all, being written and read again. Those per activation are by
# (sample × element that a layer puts out), of which models that share weights have many.
FORWARD_PER_DIRECTION = 0.12
FORWARD_PER_ACTIVATION = 5.0
PASSES_PER_ACTIVATION = 10.0
GRADIENT = 2.5
PRODUCT_PER_DIRECTION = 0.04


SHARING, FEWEST_SHARED = 8, 8
"""Vectors beyond which sharing a graph saves little more, and samples below which calls cost more than it saves."""


@dataclass(frozen=True)
class Size:
    """What rows of pairs take.

    Attributes
    ----------
    numbers : int
        Held of one sample.
    products : int
        Multiplications for one pair of samples.
    itemsize : int
        Bytes of a number.
    rotated : int
        Multiplications that make one row out of what layers see, beside projections.
    held : int
        Bytes that a process keeps to make them, beside directions.
    """

    numbers: int
    products: int
    itemsize: int
    rotated: int = 0
    held: int = 0


def bytes_of_a_vector(samples: int, activations: int, parameters: int, itemsize: int) -> int:
    """Bytes that one vector keeps alive while it is pushed through ``samples`` samples.

    >>> bytes_of_a_vector(samples=10, activations=3, parameters=20, itemsize=4)
    1200
    """
    return 6 * itemsize * (samples * activations + parameters)


def shares(
    samples: int, vectors: int, activations: int, parameters: int, itemsize: int, budget: int
) -> tuple[int, int]:
    """How many samples and vectors are best multiplied at once: vectors share the graph of their samples' gradient.

    Up to ``SHARING`` vectors come first, as long as ``FEWEST_SHARED`` samples go with them; where all
    samples do, there are as many vectors as fit.

    >>> shares(117, 8, 143_370, 608_650, 4, 2**29), shares(117, 1, 143_370, 608_650, 4, 2**29)
    ((15, 8), (117, 1))
    >>> shares(256, 1000, 100, 5000, 4, 2**29)
    (256, 731)
    """
    block = min(vectors, SHARING)
    while True:
        fitting = (budget // block - bytes_of_a_vector(0, activations, parameters, itemsize)) // (
            bytes_of_a_vector(1, activations, 0, itemsize)
        )
        if fitting >= min(samples, FEWEST_SHARED) or block == 1:
            break
        block = -(-block // 2)
    if fitting >= samples:
        return samples, max(
            1, min(vectors, budget // bytes_of_a_vector(samples, activations, parameters, itemsize))
        )
    return max(1, fitting), block


def passing_bytes(
    samples: int, vectors: int, activations: int, parameters: int, itemsize: int, *, chained: bool
) -> int:
    """Bytes that a task takes which multiplies ``vectors`` by the curvature of its samples, and adds up the products.

    The vectors are there in float64, and so are products of some samples, those of all before, and their sum.

    >>> [passing_bytes(1024, 64, 532, 68_362, 4, chained=chained) >> 20 for chained in (True, False)]
    [386, 638]
    """
    if chained:
        each = bytes_of_a_vector(samples, activations, parameters, itemsize)
        working = each * min(vectors, max(1, VECTORS // each))
    else:
        some, block = shares(samples, vectors, activations, parameters, itemsize, SHARED)
        working = block * bytes_of_a_vector(some, activations, parameters, itemsize)
    return 4 * 8 * vectors * parameters + working


def estimating_blocks(count: int, parameters: int, copies: int = 1) -> Chunks:
    """Which of ``count`` vectors that estimate residuals are made and projected on at once, for ``copies`` λs.

    >>> [len(block) for block in estimating_blocks(32, 820_874)], len(estimating_blocks(8, 10_000_000))
    ([11, 11, 10], 8)
    """
    return balanced(count, max(1, ESTIMATING // making_bytes(1, parameters, copies)))


def making_bytes(count: int, parameters: int, copies: int = 1) -> int:
    """Bytes that making so many of them takes at once."""
    return 8 * count * parameters * (_COPIES + copies)


def working_bytes(
    samples: int,
    activations: int,
    parameters: int,
    itemsize: int,
    directions: int,
    *,
    features: int | None = None,
    budget: int = BUDGET,
) -> int:
    """Bytes that one call keeps alive beside its result: for plans, which have no model at hand.

    ``features`` are those of one input where the derivatives are mixed. A single vector, or the gradient
    of a single sample, may exceed ``budget``; results of several blocks of directions are there twice while
    they are joined.

    >>> few, many = (working_bytes(1024, 100, 5000, 4, directions) for directions in (1, 1000))
    >>> few, many
    (2577600, 43417600)
    """
    if features is None and gradients_are_cheaper(directions, parameters, activations):
        rows = min(samples, gradients_at_once(parameters, itemsize, budget))
        return itemsize * rows * (2 * parameters + 6 * activations)
    each = bytes_of_a_vector(samples, activations, parameters, itemsize)
    block = min(directions, max(1, budget // each))
    joined = itemsize * samples * directions * (features or 1)
    return max(each * block, joined if block < directions else 0)


def gradients_at_once(parameters: int, itemsize: int, budget: int) -> int:
    """Gradients that fit: each is there twice while its parts are joined."""
    return max(1, int(budget // (2 * itemsize * parameters)))


def forward_cost(directions: int, parameters: int, activations: int) -> float:
    """Of pushing so many directions forward, per sample."""
    return directions * (FORWARD_PER_DIRECTION * parameters + FORWARD_PER_ACTIVATION * activations)


def gradient_cost(directions: int, parameters: int, activations: int) -> float:
    """Of forming a gradient and multiplying it with so many directions."""
    product = GRADIENT + PRODUCT_PER_DIRECTION * directions
    return product * parameters + PASSES_PER_ACTIVATION * activations


def gradients_are_cheaper(directions: int, parameters: int, activations: int) -> bool:
    """Whether forming gradients and multiplying takes less time than pushing so many directions forward."""
    given = directions, parameters, activations
    return forward_cost(*given) > gradient_cost(*given)
