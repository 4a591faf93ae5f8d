"""Blocks: any estimator applied to the diagonal blocks of the curvature, each with its own λ.

The curvature between parameters of different blocks is taken as zero: C_B + Λ is block diagonal,
and every block is fitted by the same algorithm on its own parameters. All blocks share each pass
over the data: their generators run in step, and what they ask for at a step is one round.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from dask_influence.core.certificate import Certificate
from dask_influence.core.curvature import product_sums
from dask_influence.core.estimators.base import (
    INVERSES,
    Estimator,
    Inverse,
    Round,
    Solution,
    System,
    check_regularization,
)
from dask_influence.core.estimators.lockstep import in_step, naming, restricted
from dask_influence.core.moments import Moments
from dask_influence.core.objective import Tree
from dask_influence.core.problem import Problem
from dask_influence.errors import ConfigurationError

Structure = str | Mapping[str, Sequence[str]] | None
"""``block_structure=``: None, ``"layer"``, ``"parameter"``, or parameter names (or globs) by block name."""

Regularization = float | Mapping[str, float]
"""``hessian_regularization=``: one λ, or one for each block by its name."""


# -- which parameters form which block ---------------------------------------------------
def check_structure(structure: Any) -> None:
    """Raise :class:`ConfigurationError` where ``structure`` is of no kind that is known."""
    mapping = isinstance(structure, Mapping) and len(structure) > 0
    known = structure is None or (isinstance(structure, str) and structure in ("layer", "parameter"))
    if not known and not mapping:
        raise ConfigurationError(
            'block_structure must be None (the full matrix), "layer", "parameter" or a mapping of block name to '
            f"parameter names; got {structure!r}"
        )
    for block, names in structure.items() if mapping else ():
        if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
            raise ConfigurationError(
                f"block_structure: block {block!r} must be a list of names or glob patterns of parameters; "
                f"got {names!r}"
            )


def blocks_of(structure: Structure, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parameters of each block, in the order of θ.

    Parameters
    ----------
    structure : str or mapping
        ``"parameter"``: one block for each name; ``"layer"``: one for each module that owns
        parameters, under the module's path (``""`` is the model itself, as in torch); or a
        mapping of block name to names or glob patterns.
    names : sequence of str
        θ in flat order.

    Raises
    ------
    ConfigurationError
        A name matches nothing, or a parameter is in two blocks or in none; names it.

    Examples
    --------
    >>> names = ("0.weight", "0.bias", "2.weight")
    >>> blocks_of("layer", names)
    {'0': ('0.weight', '0.bias'), '2': ('2.weight',)}
    >>> blocks_of({"first": ["0.*"], "last": ["2.weight"]}, names)
    {'first': ('0.weight', '0.bias'), 'last': ('2.weight',)}
    """
    check_structure(structure)
    if structure is None:
        raise ConfigurationError("block_structure=None has no blocks")
    if isinstance(structure, str):
        own = (lambda name: name) if structure == "parameter" else _module_of
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(own(name), []).append(name)
        return {block: tuple(held) for block, held in found.items()}
    return _given_blocks(structure, names)


def _module_of(name: str) -> str:
    path, marked, _ = name.partition(".parametrizations.")  # of a weight_norm and the like
    return path if marked else name.rpartition(".")[0]


def _given_blocks(structure: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    owners: dict[str, str] = {}
    for block, patterns in structure.items():
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigurationError(
                    f"block_structure: {pattern!r} of block {block!r} is no parameter in θ; "
                    f"θ has {', '.join(names)}"
                )
        held = [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
        if not held:
            raise ConfigurationError(f"block_structure: block {block!r} is empty; name its parameters")
        for name in held:
            if name in owners:
                raise ConfigurationError(
                    f"block_structure: {name!r} is in two blocks, {owners[name]!r} and {block!r}; they may not overlap"
                )
            owners[name] = str(block)
    missing = [name for name in names if name not in owners]
    if missing:
        raise ConfigurationError(
            f"block_structure: {', '.join(map(repr, missing))} in no block; add it to one, or leave it out of θ "
            "with parameters="
        )
    return {str(block): tuple(n for n in names if owners[n] == str(block)) for block in structure}


def check_regularizations(value: Any, structure: Structure) -> Any:
    """``hessian_regularization`` as a float, or as a dictionary of floats where there are blocks."""
    if not isinstance(value, Mapping):
        return check_regularization(value)
    if structure is None:
        raise ConfigurationError(
            f"hessian_regularization is a mapping of blocks ({', '.join(map(repr, value))}), but block_structure is "
            "None; give block_structure, or one number"
        )
    return {str(block): check_regularization(number) for block, number in value.items()}


def regularization_by_block(value: Regularization, blocks: Iterable[str]) -> dict[str, float]:
    """λ of each block.

    Raises
    ------
    ConfigurationError
        A mapping names a block that does not exist, or leaves one out.

    Examples
    --------
    >>> regularization_by_block(0.5, ["a", "b"])
    {'a': 0.5, 'b': 0.5}
    """
    names = list(blocks)
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, check_regularization(value))
    known = f"the blocks are {', '.join(map(repr, names))}"
    unknown = [block for block in value if block not in names]
    missing = [block for block in names if block not in value]
    if unknown:
        raise ConfigurationError(f"hessian_regularization: {unknown[0]!r} is no block; {known}")
    if missing:
        raise ConfigurationError(
            f"hessian_regularization has no value for {', '.join(map(repr, missing))}; {known}"
        )
    return {block: check_regularization(value[block]) for block in names}


# -- the system --------------------------------------------------------------------------
@dataclass(frozen=True)
class BlockSystem(System):
    """The block diagonal system (C_B + Λ) s = g; ``regularization`` is the smallest λ.

    Attributes
    ----------
    blocks : dict
        Parameters of each block, by its name.
    regularizations : dict
        λ of each block.
    """

    blocks: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    regularizations: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, system: System, structure: Structure, regularization: Regularization) -> BlockSystem:
        """``system`` cut into blocks."""
        blocks = blocks_of(structure, system.names)
        own = {f.name: getattr(system, f.name) for f in dataclasses.fields(System)}
        values = regularization_by_block(regularization, blocks)
        return cls(**{**own, "regularization": min(values.values())}, blocks=blocks, regularizations=values)

    @property
    def parts(self) -> dict[str, System]:
        """The system of each block."""
        shapes = dict(zip(self.names, self.shapes, strict=True))
        return {
            block: System(
                names,
                tuple(shapes[name] for name in names),
                self.regularizations[block],
                self.curvature,
                self.samples,
                self.dtype,
                None if self.layout is None else self.layout.restricted(names),
                rounded=self.rounded,
            )
            for block, names in self.blocks.items()
        }

    @property
    def columns(self) -> dict[str, Tensor]:
        """Where each block's parameters are in θ."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        own = dict(zip(self.names, torch.arange(self.size).split(sizes), strict=True))
        return {block: torch.cat([own[name] for name in names]) for block, names in self.blocks.items()}

    def products(self, vectors: Tensor) -> Round:
        """The pass that multiplies (B, P) vectors by the block diagonal curvature."""
        blocks = tuple((names, self.columns[block]) for block, names in self.blocks.items())
        function = partial(block_products, blocks=blocks, curvature=self.curvature)
        return Round(function, {"vectors": vectors}, result_bytes=8 * vectors.numel())

    def damped(self, vectors: Tensor) -> Tensor:
        """Λ s for rows s (n, P)."""
        damping = torch.empty(self.size, dtype=torch.float64)
        for block, columns in self.columns.items():
            damping[columns] = self.regularizations[block]
        return vectors * damping

    def with_regularization(self, regularization: Regularization) -> BlockSystem:
        """The same system at other λ."""
        values = regularization_by_block(regularization, self.blocks)
        return replace(self, regularization=min(values.values()), regularizations=values)


# -- the chunk function ------------------------------------------------------------------
def block_products(
    problem: Problem,
    x: Tree,
    y: Tree,
    operand: dict[str, Tensor],
    blocks: Sequence[tuple[tuple[str, ...], Tensor]],
    curvature: str,
) -> Moments:
    """Chunk function: Σ_j C_B(z_j) v_b for ``operand["vectors"]`` (B, P), as ``"products"``."""
    vectors = operand["vectors"]
    total, count = torch.empty(vectors.shape, dtype=torch.float64), 0
    for names, columns in blocks:
        part = product_sums(
            restricted(problem, names), x, y, {"vectors": vectors[:, columns]}, curvature=curvature
        )
        total[:, columns], count = part.total["products"], part.count
    return Moments({"products": total}, count)


# -- the inverse -------------------------------------------------------------------------
class BlockInverse(Inverse):
    """(C_B + Λ)⁻¹ as one inverse for each block.

    Parameters
    ----------
    names : tuple of str
        Of the blocks.
    parts : tuple of Inverse
        The inverse of each.
    columns : tuple of Tensor
        Where its parameters are in θ.
    parameters : tuple of tuple of str
        What they are called.
    """

    kind: ClassVar[str] = "blocks"

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[Inverse],
        columns: Sequence[Tensor],
        parameters: Sequence[tuple[str, ...]],
    ) -> None:
        self.names, self.parts = tuple(names), tuple(parts)
        self.columns, self.parameters = tuple(columns), tuple(parameters)
        self.size = sum(map(len, self.columns))
        self.regularization = min(part.regularization for part in self.parts)
        self._directions = self._gathered_directions()

    @property
    def needs_rounds(self) -> bool:  # type: ignore[override]
        """Whether any block does."""
        return any(part.needs_rounds for part in self.parts)

    @property
    def residuals_need_rounds(self) -> bool:
        """Whether any block's do."""
        return any(part.residuals_need_rounds for part in self.parts)

    @property
    def directions(self) -> Tensor | None:
        """Those of all blocks, zero outside their own, (ΣR_b, P); None where a block has none."""
        return self._directions

    def _gathered_directions(self) -> Tensor | None:
        found = [part.directions for part in self.parts]
        held = [directions for directions in found if isinstance(directions, Tensor)]
        return self._gathered(held) if len(held) == len(found) else None

    def _gathered(self, parts: Sequence[Tensor]) -> Tensor:
        """Rows of each block (R_b, P_b), zero outside their own: (ΣR_b, P)."""
        rows = torch.zeros(sum(map(len, parts)), self.size, dtype=torch.float64)
        start = 0
        for own, columns in zip(parts, self.columns, strict=True):
            rows[start : start + len(own), columns] = own.to(torch.float64)
            start += len(own)
        return rows

    @cached_property
    def certificate(self) -> Certificate | None:
        """That of all blocks; None where a block has none."""
        found = [part.certificate for part in self.parts]
        held = [own for own in found if own is not None]
        if self._directions is None or len(held) < len(found):
            return None
        values = torch.cat([own.values for own in held])
        return Certificate(self._directions, self._gathered([own.images for own in held]), values)

    def coefficients(self, gradients: Tensor) -> Tensor:
        """Those of all blocks side by side, (n, ΣR_b)."""
        return torch.cat([part.coefficients(rows) for part, rows in self._split(gradients)], dim=1)

    def weighed(self, projections: Tensor) -> Tensor:
        """Those of all blocks side by side, (n, ΣR_b)."""
        counts = [len(part.directions) for part in self.parts if part.directions is not None]
        own = projections.split(counts, dim=1)
        return torch.cat([part.weighed(rows) for part, rows in zip(self.parts, own, strict=True)], dim=1)

    def _split(self, rows: Tensor) -> Iterator[tuple[Inverse, Tensor]]:
        return ((p, rows[:, columns]) for p, columns in zip(self.parts, self.columns, strict=True))

    def solve(self, gradients: Tensor) -> Generator[Round, Moments, Solution]:
        """Factors of each block from its part of the gradients, in step where they take passes."""
        rows = gradients.to(torch.float64)
        solves = [part.solve(own) for part, own in self._split(rows)]
        # no naming here: warnings cannot be caught while other threads of a worker warn
        solved = yield from in_step(solves, self.parameters)
        factors = torch.empty_like(rows)
        for columns, own in zip(self.columns, solved, strict=True):
            factors[:, columns] = own.factors
        return Solution(factors, partial(self._residuals, rows, solved))

    def _residuals(self, gradients: Tensor, solved: Sequence[Solution]) -> Tensor | None:
        """Of the block diagonal system: squares of the blocks' residuals add up."""
        squares = torch.zeros(len(gradients), dtype=torch.float64)
        for (_, own), solution in zip(self._split(gradients), solved, strict=True):
            relative = solution.residuals()
            if relative is None:
                return None
            norms = own.norm(dim=1)
            squares += (relative * torch.where(norms > 0, norms, 1.0)).square()
        scale = gradients.norm(dim=1)
        return squares.sqrt() / torch.where(scale > 0, scale, 1.0)

    def with_regularization(self, regularization: Regularization) -> BlockInverse:
        """Every block at its own λ of a mapping, or all at one."""
        values = regularization_by_block(regularization, self.names)
        parts = []
        for name, part in zip(self.names, self.parts, strict=True):
            with naming(f"block {name!r}"):
                parts.append(part.with_regularization(values[name]))
        return BlockInverse(self.names, parts, self.columns, self.parameters)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Those of all blocks, with their columns."""
        tensors: dict[str, Tensor] = {}
        blocks = []
        for i, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            own, values = part.state()
            tensors |= {f"{i}.{key}": tensor for key, tensor in own.items()}
            tensors[f"{i}*columns"] = self.columns[i]
            parameters = list(self.parameters[i])
            blocks.append({"name": name, "kind": part.kind, "values": values, "parameters": parameters})
        return tensors, {"blocks": blocks}

    @classmethod
    def from_state(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> BlockInverse:
        """Each block by the kind it was saved under."""
        blocks, parts = values["blocks"], []
        for i, block in enumerate(blocks):
            prefix = f"{i}."
            own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            parts.append(INVERSES[block["kind"]].from_state(own, block["values"]))
        columns = [tensors[f"{i}*columns"] for i in range(len(blocks))]
        return cls(
            [block["name"] for block in blocks],
            parts,
            columns,
            [tuple(block["parameters"]) for block in blocks],
        )

    def diagnostics(self) -> dict[str, Any]:
        """Of each block under ``blocks``; extreme eigenvalues over all where every block knows them."""
        return self._joined([part.diagnostics() for part in self.parts])

    def recorded(self) -> dict[str, Any]:
        """The same of what the blocks record."""
        return self._joined([part.recorded() for part in self.parts])

    def _joined(self, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
        blocks = dict(zip(self.names, parts, strict=True))
        report: dict[str, Any] = {}
        for key, over in (
            ("smallest_eigenvalue", min),
            ("largest_eigenvalue", max),
            ("positive_definite", all),
            ("worst_residual", max),
        ):
            if all(own.get(key) is not None for own in blocks.values()):
                report[key] = over(own[key] for own in blocks.values())
        return {**report, "blocks": blocks}


# -- the estimator -----------------------------------------------------------------------
@dataclass(frozen=True)
class BlockDiagonal(Estimator):
    """``estimator`` on each block of a :class:`BlockSystem`.

    A rank is cut to the size of a block that is smaller: such a block is inverted exactly.

    Parameters
    ----------
    estimator : Estimator
        The algorithm of every block.
    """

    estimator: Estimator

    def _of(self, size: int) -> Estimator:
        rank = getattr(self.estimator, "rank", None)
        if rank is None or rank <= size:
            return self.estimator
        return replace(self.estimator, rank=size)  # type: ignore[call-arg]

    @property
    def solves_by_rounds(self) -> bool:  # type: ignore[override]
        """That of every block."""
        return self.estimator.solves_by_rounds

    @property
    def certifies_by_rounds(self) -> bool:  # type: ignore[override]
        """What that of the blocks does."""
        return self.estimator.certifies_by_rounds

    @property
    def by_layers(self) -> bool:  # type: ignore[override]
        """What that of the blocks is."""
        return self.estimator.by_layers

    def directions(self, system: System) -> int | None:
        """Those of all blocks; None where a block has none."""
        assert isinstance(system, BlockSystem)
        found = [self._of(part.size).directions(part) for part in system.parts.values()]
        held = [count for count in found if count is not None]
        return sum(held) if len(held) == len(found) else None

    def inverse_bytes(self, system: System, regularizations: int = 1) -> int:
        """Those of all blocks."""
        assert isinstance(system, BlockSystem)
        parts = system.parts.values()
        return sum(self._of(part.size).inverse_bytes(part, regularizations) for part in parts)

    def validate(self, system: System) -> None:
        """The configuration against all of θ, and against each block that does not cut its rank."""
        assert isinstance(system, BlockSystem)
        self.estimator.validate(system)
        if self.estimator.tolerance is not None:
            raise ConfigurationError(
                f"direction_tol={self.estimator.tolerance:g} factors directions of all of θ, and block_structure gives "
                "each block its own; leave out one of them"
            )
        rank = getattr(self.estimator, "rank", None)
        for name, part in system.parts.items():
            if rank is None or rank < part.size:
                with naming(f"block {name!r}"):
                    self.estimator.validate(part)

    def examine(self, system: System, problem: Problem, x: Tree, y: Tree) -> None:
        """Every block, with the objective of its own parameters."""
        assert isinstance(system, BlockSystem)
        for name, part in system.parts.items():
            with naming(f"block {name!r}"):
                self._of(part.size).examine(part, restricted(problem, part.names), x, y)

    def fit(self, system: System) -> Generator[Round, Moments, BlockInverse]:
        """All blocks in step."""
        assert isinstance(system, BlockSystem)
        parts = system.parts
        fits = [self._of(part.size).fit(part) for part in parts.values()]
        owners = tuple(part.names for part in parts.values())
        inverses = yield from in_step(fits, owners, [partial(naming, f"block {name!r}") for name in parts])
        columns = system.columns
        return BlockInverse(tuple(parts), inverses, [columns[name] for name in parts], owners)
