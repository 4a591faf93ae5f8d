"""The plan of a run: tiles, strips, bytes and passes, as integers. No task runs here.

A *tile* is what is written at once (one shard). A *strip* is one task: the tiles of one
run of training samples for one *query block* of test points. Each training sample is
differentiated once for each query block, and there is one block wherever its directions
fit the budget.

The plan depends on sizes alone, never on the workers that happen to be there, so that the
same plan gives the same bits on any cluster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from dask_influence.core import sizes
from dask_influence.core.sizes import Size
from dask_influence.errors import ConfigurationError, MemoryLimitError
from dask_influence.execution.tree import Tree, strip_name
from dask_influence.execution.units import format_bytes, format_seconds
from dask_influence.execution.work import Kept, Passing, Work
from dask_influence.grid import MOST_BYTES, Chunks, balanced
from dask_influence.scalars import check_integer

DIRECTION_BYTES = 512 * 2**20
"""Bytes of directions that one query block may hold, unless a memory limit says less."""

FACTOR_BYTES, FEWEST_FACTORS = 64 * 2**20, 32
"""Bytes of one factor task, and rows that it takes however large they are, so that solving is matrix products."""

SOLVED_TOGETHER = 48
"""Rows that triangular solves take in one go: a task of some multiple of them leaves none to be solved slowly."""

LARGEST_TILE = 64 * 2**20
LARGEST_REDUCED_TILE = (
    8 * 2**20
)  # never written: as large as the product needs, and near the processor's caches
SMALLEST_TILE = 2**18
MODEST_TILE = 2**21
"""Tiles of a short run are as large as its strips up to here, where writing one more object costs little."""
HELD_BYTES = 32 * 2**20
"""Bytes of derivatives up to which small tiles share a product: each product reads all directions."""
WRITTEN_BYTES, MOST_WRITTEN = 8 * 2**20, 4
"""Bytes of tiles that a task writes at once, and how many of them, at the most: each mostly waits for the store."""
FEWEST_COLUMNS = 16
MOST_STRIPS = 50_000
STRIP_SECONDS, FEWEST_STRIPS = 2.0, 16
"""What a strip takes at most, and strips of work that takes less: the last one is what other workers wait for."""
BATCHES, LONGEST_SECONDS = 4, 8 * STRIP_SECONDS
"""Batches of a strip that no other worker waits for: all tiles but the last batch's are written beside computing.

And what it takes at most: a process that is killed loses it."""
FEWEST_TILES, SHORTEST_SECONDS = 8, 0.1
"""Tiles of a short run, so that workers share it, unless each were a task that takes little beside what it costs to
start, write and list one: a hundredth of a second."""
PROCESS_BYTES = 480 * 2**20
"""What a worker takes before it has done anything: interpreter, torch, Dask, Zarr (CPU build of torch 2.13, Linux)."""

CLIENT_BYTES = 64 * 2**20
"""What a client takes for a run beside its process: messages of a window of tasks, opening the result."""

# One core, nanoseconds: a training sample costs its gradient and its directions, a score its
# product and its write. They only set how coarse strips are and the estimate shown to people.
_NS_PER_PARAMETER = 2.5
_NS_PER_DIRECTION = 0.05
_NS_PER_MIXED_ACTIVATION = 15.0  # along a direction, in perturbation mode
_NS_PER_FORWARD_DIRECTION = 0.12  # pushed through the model instead, where there are few of them
_NS_CAPTURED = 1.0  # a gradient's backward pass, of which only what layers see is written
_NS_PER_PROJECTION = 0.1  # in float64
_NS_PER_ROTATED = 0.05
_NS_PER_SCORE_DIRECTION = 0.05
_NS_PER_BYTE_WRITTEN = 1.5
_NS_PER_TILE = 1e6  # an object of its own, whatever its size
_NS_PER_SCORE_REDUCED = 3.0
_NS_PER_SOLVED_NUMBER = 0.2
_FORWARD_PER_PRODUCT = 3.0  # directions pushed forward that take as long as one product with the curvature
_LARGEST_SOLVED = 20_000
"""P up to which a factor may cost a dense product with P × P numbers."""


def training_seconds(
    parameters: int, activations: int, samples: int, directions: int, perturbation: bool = False
) -> float:
    """Rough time of one core for the derivatives of ``samples`` along ``directions``."""
    along = _NS_PER_DIRECTION * directions * (3 if perturbation else 1)
    passes = sizes.PASSES_PER_ACTIVATION + (_NS_PER_MIXED_ACTIVATION * directions if perturbation else 0)
    return 1e-9 * samples * (parameters * (_NS_PER_PARAMETER + along) + passes * activations)


@dataclass(frozen=True)
class Strip:
    """One task: test points ``rows`` (a query block) against training points ``columns``."""

    index: int
    block: int
    rows: range
    columns: range

    @property
    def name(self) -> str:
        """Name of its ledger entry."""
        return strip_name(self.index)


@dataclass(frozen=True)
class Plan:
    """How a run is cut, and what it needs.

    Attributes
    ----------
    work : Work
        What is asked for.
    query_rows : int
        Test points of one query block.
    tile : (int, int)
        Test points × training points of one tile.
    strip_columns : int
        Training points of one strip, a multiple of the tile's.
    batch : int
        Training samples differentiated in one call.
    factor_rows : int
        Test points whose factors are solved in one task.
    """

    work: Work
    query_rows: int
    tile: tuple[int, int]
    strip_columns: int
    batch: int
    factor_rows: int

    # -- geometry ---------------------------------------------------------------------
    @property
    def query_blocks(self) -> Chunks:
        """Test points, by query block."""
        return Chunks(self.work.tests, self.query_rows)

    @property
    def factor_chunks(self) -> Chunks:
        """Test points, by factor task."""
        return Chunks(self.work.tests, self.factor_rows)

    @property
    def strips(self) -> int:
        """Number of strips."""
        return len(self.query_blocks) * len(self._runs)

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        rows = sum(-(-len(block) // self.tile[0]) for block in self.query_blocks)
        return self.work.copies * rows * -(-self.work.trains // self.tile[1])

    @property
    def _runs(self) -> Chunks:
        return Chunks(self.work.trains, self.strip_columns)

    def strip(self, index: int) -> Strip:
        """Strip ``index``; those of one query block follow each other."""
        block, run = divmod(index, len(self._runs))
        return Strip(index, block, self.query_blocks[block], self._runs[run])

    def columns(self, strip: Strip) -> Iterator[range]:
        """Training points of the strip's tiles, one column of tiles after the other."""
        return Chunks(self.work.trains, self.tile[1]).within(strip.columns.start, strip.columns.stop)

    def together(self, strip: Strip) -> Iterator[range]:
        """Training points of the strip that are differentiated before any of their tiles is written."""
        first, runs = strip.columns.start, Chunks(len(strip.columns), self.held_columns)
        return (range(first + run.start, first + run.stop) for run in runs)

    def tiles_of(self, strip: Strip, columns: range) -> Iterator[tuple[range, range]]:
        """Test and training points of the strip's tiles in these ``columns``."""
        for own in Chunks(self.work.trains, self.tile[1]).within(columns.start, columns.stop):
            for rows in self.rows(strip):
                yield rows, own

    @property
    def held_columns(self) -> int:
        """Training points whose derivatives are held at once: whole tiles, several of them where they are small.

        Those of a reduction are taken one tile at a time.
        """
        work, columns = self.work, self.tile[1]
        if work.kept is not None or work.diagonal:
            return columns
        each = self.directions * work.width * work.itemsize
        if work.paired is not None:
            each = work.paired.numbers * work.paired.itemsize
        tiles = -(-self.strip_columns // columns)
        most = max(1, min(self.batch, HELD_BYTES // each) // columns)
        return columns * balanced(tiles, most).size

    def rows(self, strip: Strip) -> Iterator[range]:
        """Test points of the strip's tiles."""
        return Chunks(self.work.tests, self.tile[0]).within(strip.rows.start, strip.rows.stop)

    @property
    def tree(self) -> Tree:
        """In which order the parts of a reduction meet."""
        assert self.work.kept is not None
        return Tree(len(self.query_blocks), len(self._runs), self.work.kept.axis)

    @property
    def merges(self) -> int:
        """Tasks that join what strips of a reduction keep."""
        return 0 if self.work.kept is None else self.tree.nodes - self.strips

    # -- cost -------------------------------------------------------------------------
    @property
    def projects(self) -> bool:
        """Whether the test side is coefficients or rows of pairs, rather than factors."""
        return self.work.rank is not None

    @property
    def directions(self) -> int:
        """D: directions that one strip differentiates along."""
        if self.work.paired is not None:
            assert self.work.rank is not None
            return self.work.rank
        block = min(self.query_rows, self.work.tests) * self.work.copies
        return block if self.work.rank is None else min(self.work.rank, block)

    @property
    def passes(self) -> int:
        """Times that each training sample is differentiated."""
        return len(self.query_blocks)

    @property
    def output_bytes(self) -> int:
        """Bytes of what is written before compression."""
        work = self.work
        if work.kept is not None:
            return work.copies * work.kept.nbytes
        return work.copies * work.tests * work.trains * work.width * work.itemsize

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile before compression."""
        return self.tile[0] * self.tile[1] * self.work.width * self.work.itemsize

    @property
    def resident_bytes(self) -> int:
        """Bytes that a process keeps from task to task: weights, twice, the inverse, and what witnesses for it."""
        work = self.work
        directions = 0 if work.rank is None else 8 * work.rank * work.parameters
        weights = 2 * work.parameters * work.itemsize
        return weights + max(work.inverse_bytes, directions) + work.narrow_bytes

    @property
    def query_bytes(self) -> int:
        """Bytes of the test side of one query block, which the tasks of a process share."""
        work = self.work
        if work.diagonal:
            return 0
        rows = min(self.query_rows, work.tests) * work.copies
        coefficients = 0 if work.rank is None else rows * work.rank * work.itemsize
        return self.directions * work.parameters * work.itemsize + coefficients

    @property
    def strip_bytes(self) -> int:
        """Bytes of one strip's own work, beside what its process keeps and shares."""
        work, directions = self.work, self.directions
        if work.diagonal:
            return self.solving_bytes
        columns = self.held_columns
        samples = min(self.batch, columns)
        derivatives = columns * directions * work.width * work.itemsize
        of_call = (samples, work.activations, work.parameters, work.itemsize, directions)
        differentiating = 3 * samples * work.sample_bytes + sizes.working_bytes(
            *of_call, features=work.width if work.features else None
        )
        joining = derivatives if columns > samples else 0
        writing = self._tiles_bytes + 3 * self.part_bytes
        return derivatives + max(self._written_behind_bytes + max(differentiating, joining), writing)

    @property
    def written_at_once(self) -> int:
        """Tiles that one task has on their way to the store at once."""
        if self.work.kept is not None:
            return 1
        rows, columns = min(self.query_rows, self.work.tests), min(self.strip_columns, self.work.trains)
        tiles = -(-rows // self.tile[0]) * -(-columns // self.tile[1])
        return max(1, min(tiles, MOST_WRITTEN, WRITTEN_BYTES // (self.work.copies * self.tile_bytes)))

    @property
    def _tiles_bytes(self) -> int:
        """Tiles, their bytes on their way through the codecs, and the product that makes the next one.

        Of a reduction the tile, its copy in another order, and the product.
        """
        return (1 + 2 * self.written_at_once) * self.work.copies * self.tile_bytes

    @property
    def _written_behind_bytes(self) -> int:
        """The last tiles of a column, and their bytes, on their way to the store while the next is differentiated."""
        columns = min(self.strip_columns, self.work.trains)
        if self.work.kept is not None or columns <= self.tile[1]:
            return 0
        return 2 * self.written_at_once * self.work.copies * self.tile_bytes

    @property
    def scoring_bytes(self) -> int:
        """Bytes that one strip holds at once, beside the interpreter and its libraries."""
        if self.work.paired is not None:
            return self._paired_bytes(self.work.paired)
        return self.resident_bytes + self.query_bytes + max(self.strip_bytes, self._chunk_bytes)

    @property
    def _chunk_bytes(self) -> int:
        """Factors of one factor task, from which a query is put together."""
        work = self.work
        width = work.parameters if work.rank is None else work.rank
        return self.factor_rows * work.copies * width * work.itemsize

    @property
    def peak_bytes(self) -> int:
        """Bytes that one task holds at once, of a strip or of factors."""
        return max(self.scoring_bytes, self.factor_bytes)

    def worker_bytes(self, threads: int = 1) -> int:
        """Peak resident bytes of a worker that runs ``threads`` tasks at once, its interpreter and libraries included.

        Interpreter and libraries are taken as ``PROCESS_BYTES``.
        """
        work = self.work
        passing = threads * work.passing_bytes(self.factor_rows)
        if work.paired is not None:
            return PROCESS_BYTES + max(threads * self.peak_bytes, self.resident_bytes + passing)
        strips = self.query_bytes + threads * self.strip_bytes
        factors = work.narrow_bytes + work.estimating_bytes + threads * self.solving_bytes
        return PROCESS_BYTES + self.resident_bytes + max(strips, factors, passing, work.making_bytes)

    @property
    def client_bytes(self) -> int:
        """Peak resident bytes of the process that makes the call, beside its own data and what a fit in it left.

        Scores are never among them. The model is there twice, and in float64 while derivatives are checked; the
        inverse is, and is put in order and written out where it is published. Ids are also written and opened. What
        residuals are estimated by is made there, and stays where there are no workers; and iterations are driven.
        """
        work = self.work
        ids = 3 * 8 * (work.tests + work.trains)
        estimating = work.estimated_bytes + work.making_bytes
        driving = work.iterating_bytes(self.factor_rows)
        held = 3 * self.resident_bytes + 8 * work.parameters + ids + max(estimating, driving)
        return PROCESS_BYTES + CLIENT_BYTES + held

    def _paired_bytes(self, size: Size) -> int:
        """The same of pairs: weights, directions and a layer of them in order, rows of both sides, tiles."""
        work, numbers = self.work, size.numbers * size.itemsize
        each = (
            6 * work.activations * work.itemsize + 4 * numbers
        )  # what layers see of a sample, and what is made of it
        columns = self.held_columns
        watching = min(sizes.BUDGET, min(self.batch, columns) * each)
        held = work.parameters * (work.itemsize + 2 * 8 * self.directions) + size.held
        reading = 3 * columns * work.sample_bytes
        if work.diagonal:
            return (
                held + max(self.factor_bytes, (2 + work.copies) * self.tile[1] * numbers) + reading + watching
            )
        # of the test side as they are mapped from the store, and put together
        rows = 2 * (self.query_rows * work.copies + columns) * numbers
        wide = (
            2 * self.tile[0] * self.tile[1] * work.copies * size.itemsize
        )  # a part of the product, and their sum
        return held + rows + reading + self._tiles_bytes + wide + 3 * self.part_bytes + watching

    @property
    def part_bytes(self) -> int:
        """Bytes of what a reduction keeps of one strip; joining takes two parts and their union."""
        work = self.work
        if work.kept is None:
            return 0
        extent, total = {
            "test": (self.query_rows, work.tests),
            "train": (self.strip_columns, work.trains),
            None: (1, 1),
        }[work.kept.axis]
        return -(-work.copies * work.kept.nbytes * min(extent, total) // total)

    @property
    def solving_bytes(self) -> int:
        """Bytes of one factor task's own work: gradients, factors, residuals in float64, or projections."""
        own = self.factor_rows * self.work.point_bytes
        return own + self.work.projecting_bytes(min(self.batch, self.factor_rows))

    @property
    def factor_bytes(self) -> int:
        """Bytes that one factor task holds at once, beside the interpreter and its libraries."""
        work = self.work
        solving = work.narrow_bytes + work.estimating_bytes + self.solving_bytes
        return self.resident_bytes + max(solving, work.making_bytes)

    @property
    def derivative_seconds(self) -> float:
        """Rough time of one core for all derivatives of the training side."""
        work = self.work
        if work.paired is not None:
            return 1e-9 * self.passes * work.trains * self._row_ns
        directions = 0 if work.diagonal else self.directions
        return self.passes * training_seconds(
            work.parameters, work.activations, work.trains, directions, work.width > 1
        )

    @property
    def _row_ns(self) -> float:
        """Nanoseconds that one row of pairs takes."""
        work = self.work
        assert work.paired is not None
        each = _NS_CAPTURED + _NS_PER_PROJECTION * self.directions
        return (
            work.parameters * each
            + _NS_PER_ROTATED * work.paired.rotated
            + sizes.PASSES_PER_ACTIVATION * work.activations
        )

    @property
    def product_seconds(self) -> float:
        """Rough time of one core for all products C Eᵀ, or factors of a diagonal, and for encoding what is written."""
        work = self.work
        scores = work.copies * work.tests * work.trains * work.width
        multiplied = self.directions if work.paired is None else work.paired.products
        each = _NS_PER_SCORE_DIRECTION * multiplied
        if work.diagonal and work.paired is None:
            solved = min(work.parameters, _LARGEST_SOLVED) if work.rank is None else work.rank
            each = _NS_PER_SOLVED_NUMBER * work.parameters * solved
        elif work.kept is not None:
            each += _NS_PER_SCORE_REDUCED
        written = _NS_PER_BYTE_WRITTEN * self.output_bytes + _NS_PER_TILE * self.tiles
        return 1e-9 * (scores * each + written)

    @property
    def certifying_seconds(self) -> float:
        """Rough time of one core for the products with the curvature that certify factors; 0 where none do.

        Of those that solve them the number is not known before.
        """
        work, passing = self.work, self.work.passing
        if passing is None or passing.solving:
            return 0.0
        points = work.copies * (work.trains if work.diagonal else work.tests)
        each = _FORWARD_PER_PRODUCT * sizes.forward_cost(1, work.parameters, work.activations)
        return 1e-9 * points * passing.fitted * each

    def beats(self, general: Plan) -> bool:
        """Whether pairs, of which this is the plan, cost a training sample less than the ``general`` way."""
        work, directions = self.work, general.directions
        assert work.paired is not None
        if 2 * work.paired.numbers * work.paired.itemsize > work.parameters * work.itemsize:
            return False  # rows as long as factors save nothing
        if work.diagonal:
            return True
        along = min(
            _NS_PER_FORWARD_DIRECTION * directions, _NS_PER_PARAMETER + _NS_PER_DIRECTION * directions
        )
        own = self.passes * self._row_ns
        own += _NS_PER_SCORE_DIRECTION * work.copies * work.tests * work.paired.products
        each = work.parameters * along + sizes.PASSES_PER_ACTIVATION * work.activations
        return own < general.passes * each

    @property
    def seconds(self) -> float:
        """Rough time on one core."""
        return self.derivative_seconds + self.product_seconds

    def validate(self, memory_limit: int | None) -> Plan:
        """Return the plan, or refuse it before the first task.

        Parameters
        ----------
        memory_limit : int or None
            Bytes that one task may hold; None accepts.

        Raises
        ------
        ConfigurationError
            ``memory_limit`` is no number of bytes.
        MemoryLimitError
            Quoting the bytes needed and allowed, and the setting that would fit.
        """
        if memory_limit is not None:
            memory_limit = _bytes("memory_limit", memory_limit)
        needed = self.peak_bytes
        if memory_limit is not None and needed > memory_limit:
            raise MemoryLimitError(
                f"a task needs {format_bytes(needed)} ({needed} bytes) but memory_limit allows "
                f"{format_bytes(memory_limit)} ({memory_limit} bytes); {self._nearest(memory_limit)}"
            )
        return self

    def _nearest(self, memory_limit: int) -> str:
        floor = arrange(self.work, tile_bytes=SMALLEST_TILE, memory_limit=memory_limit)
        if floor.peak_bytes <= memory_limit:
            return f"tile_bytes={floor.tile_bytes} fits ({format_bytes(floor.peak_bytes)})"
        least = floor.peak_bytes
        advice = f"no tile fits: the least is memory_limit={least} ({format_bytes(least)})"
        fitting = floor._fitting_rank(memory_limit)
        return advice if fitting is None else f"{advice}, or rank={fitting} instead of {self.work.rank}"

    def _fitting_rank(self, memory_limit: int) -> int | None:
        """The rank with which this plan, which takes too much, would fit."""
        work = self.work
        if not work.rank or self.directions != work.rank:
            return None
        narrow = work.narrow_bytes // work.rank
        stays = narrow + max(8 * work.parameters, work.inverse_bytes // work.rank)
        query = work.parameters * work.itemsize
        shares = ((self.scoring_bytes, stays + query), (self.factor_bytes, stays + narrow))
        fitting = min((memory_limit - total) // each + work.rank for total, each in shares)
        if fitting <= 0:
            return None
        thinner = replace(work, rank=fitting, inverse_bytes=work.inverse_bytes * fitting // work.rank)
        found = arrange(thinner, tile_bytes=SMALLEST_TILE, memory_limit=memory_limit)
        # few directions are pushed forward, which may take more than forming gradients
        return fitting if found.peak_bytes <= memory_limit else found._fitting_rank(memory_limit)

    # -- as data and as text ----------------------------------------------------------
    def to_json(self) -> dict[str, Any]:
        """The plan as JSON-able values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """Inverse of :meth:`to_json`."""
        kept = values["work"].get("kept")
        paired, passing = (values["work"].get(name) for name in ("paired", "passing"))
        own = {
            "features": tuple(values["work"]["features"]),
            "kept": None if kept is None else Kept(**kept),
            "paired": None if paired is None else Size(**paired),
            "passing": None if passing is None else Passing(**passing),
        }
        work = Work(**{**values["work"], **own})
        return cls(**{**values, "work": work, "tile": tuple(values["tile"])})

    def table(self) -> list[tuple[str, str]]:
        """What people read: names and values."""
        work = self.work
        return [
            *self._scores_text(),
            (
                "strips (tasks)",
                f"{self.strips:,} of {min(self.strip_columns, work.trains):,} training samples"
                + (f", {self.merges:,} to join them" if self.merges else ""),
            ),
            *self._factors_text(),
            ("passes over training data", f"{self.passes:,}"),
            ("peak bytes per task", format_bytes(self.peak_bytes)),
            ("estimated time", f"{format_seconds(self.seconds)} on one core"),
        ]

    def __str__(self) -> str:
        rows = self.table()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _scores_text(self) -> list[tuple[str, str]]:
        work, written = self.work, format_bytes(self.output_bytes)
        swept = () if work.regularizations is None else (work.regularizations,)
        shape = (*swept, work.trains) if work.diagonal else (*swept, work.tests, work.trains, *work.features)
        scores = " × ".join(f"{n:,}" for n in shape)
        tile = f"{self.tile[0]:,} × {self.tile[1]:,}, {format_bytes(self.tile_bytes)} each"
        if work.kept is None:
            return [("scores", f"{scores}, {written}"), ("tiles", f"{self.tiles:,} of {tile}")]
        lines = [("scores", f"{scores}, of which is kept"), ("kept", f"{work.kept.text}, {written}")]
        return lines if work.diagonal else [*lines, ("tiles", f"{self.tiles:,} of {tile}, not written")]

    def _factors_text(self) -> list[tuple[str, str]]:
        work, chunks, paired = self.work, self.factor_chunks, self.work.paired
        lines = [("factor tasks", f"{len(chunks):,} of {min(self.factor_rows, work.tests):,} test points")]
        if paired is not None:
            held = f"{paired.numbers:,} of each sample, {self.directions:,} of them projections"
            return [*([] if work.diagonal else lines), ("in place of factors", held)]
        if work.diagonal:
            return [("factors", f"of {self.tile[1]:,} training samples at a time")]
        return [*lines, ("directions", f"{self.directions:,} of P = {work.parameters:,}")]


def arrange(
    work: Work,
    *,
    tile_bytes: int | None = None,
    memory_limit: int | None = None,
    spread: bool = True,
    alone: bool = False,
    one_by_one: bool = False,
) -> Plan:
    """Cut ``work`` into query blocks, tiles and strips.

    Parameters
    ----------
    work : Work
        Sizes of the run.
    tile_bytes : int, optional
        Bytes of one tile; by default a 64th of the output, from 256 KiB to 64 MiB, and of short runs a strip.
    memory_limit : int, optional
        Bytes one task may hold; a quarter of it goes to directions.
    spread : bool
        Let workers share the factors of a small test set. Factors that are solved by passes
        are better taken in as few blocks as fit, since a block shares its passes.
    alone : bool
        One process does the work and keeps the scores: tiles as large as they may be, a
        strip for each, since nobody waits for a share.
    one_by_one : bool
        Strips are computed one after the other: several batches each, where one task may hold as much.

    Examples
    --------
    >>> work = Work(360, 1437, (), 2410, None, 4, 42, 264)
    >>> plan = arrange(work)
    >>> plan.passes, plan.tile[0], sum(len(plan.strip(i).columns) for i in range(plan.strips))
    (1, 360, 1437)
    """
    if tile_bytes is not None:
        tile_bytes = _bytes("tile_bytes", tile_bytes)
    if memory_limit is not None:
        memory_limit = _bytes("memory_limit", memory_limit)
    if work.diagonal:
        return _arrange_diagonal(work, tile_bytes, memory_limit, spread=spread)
    score_bytes = work.width * work.itemsize
    share = DIRECTION_BYTES if memory_limit is None else min(DIRECTION_BYTES, memory_limit // 4)
    per_row = work.row_bytes
    if work.kept is not None and work.kept.axis == "test":  # lists of a query block are held at once
        per_row = max(per_row, work.kept_bytes(work.tests))
    query_rows = min(work.tests, max(1, share // per_row))
    if alone:
        tile_bytes = LARGEST_TILE
    target = tile_bytes or _tile_bytes(work, query_rows)
    per_tile = max(1, target // score_bytes)  # scores of one tile
    columns = min(work.trains, FEWEST_COLUMNS)
    rows = min(query_rows, max(math.isqrt(per_tile), per_tile // work.trains, 1))
    if work.kept is not None:  # nothing is written: long rows and long columns are cheaper to reduce
        rows = balanced(query_rows, max(1, math.isqrt(per_tile))).size
    elif query_rows * columns <= per_tile:
        rows = query_rows
    tile = (rows, balanced(work.trains, min(work.trains, max(1, per_tile // rows))).size)
    if len(Chunks(work.tests, query_rows)) > 1 and query_rows % rows:
        query_rows = max(rows, query_rows // rows * rows)  # no tile straddles two query blocks
    # in one process nothing certifies rows of pairs, so that no factor is formed
    each = work.row_bytes if alone and work.paired is not None else work.point_bytes
    factor_rows = _factor_rows(work, share, each, spread)
    plan = Plan(work, query_rows, tile, tile[1], _batch(work), balanced(work.tests, factor_rows).size)
    rows_of_factors = _spread(plan.factor_rows, work.tests) if spread else plan.factor_rows
    strip_columns = tile[1] if alone else _strip_columns(plan)
    if work.kept is not None and work.kept.axis == "train":
        most = share // work.kept_bytes(work.trains)
        strip_columns = min(strip_columns, max(1, most // tile[1]) * tile[1])
    plan = Plan(work, query_rows, tile, strip_columns, plan.batch, rows_of_factors)
    return _longer(plan, memory_limit) if one_by_one and work.kept is None else plan


def _arrange_diagonal(work: Work, tile_bytes: int | None, memory_limit: int | None, *, spread: bool) -> Plan:
    """Cut training points alone: factors of ``tile[1]`` of them are held at once."""
    share = DIRECTION_BYTES if memory_limit is None else min(DIRECTION_BYTES, memory_limit // 4)
    share = min(share, tile_bytes or (LARGEST_TILE if spread else share))
    columns = balanced(work.trains, min(work.trains, max(1, share // work.point_bytes))).size
    if spread:
        columns = _spread(columns, work.trains)
    plan = Plan(work, 1, (1, columns), columns, _batch(work), columns)
    return replace(plan, strip_columns=_strip_columns(plan) if spread else columns)


def _bytes(name: str, value: object) -> int:
    try:
        count = check_integer(name, value)
        return count if count <= MOST_BYTES else check_integer(name, value, most=MOST_BYTES)
    except ConfigurationError as refusal:
        raise ConfigurationError(f"{refusal}; it counts bytes, such as {name}=2**30") from None


def _batch(work: Work) -> int:
    """Samples per derivative call: enough to feed the matrix products, few enough to bound memory."""
    return int(min(1024, max(16, sizes.BUDGET // (24 * work.activations * work.itemsize))))


def _tile_bytes(work: Work, query_rows: int) -> int:
    """Bytes of one tile where none are asked for."""
    column = work.width * work.itemsize * query_rows
    output = work.copies * work.tests * work.trains * work.width * work.itemsize
    if work.kept is not None:
        return min(LARGEST_REDUCED_TILE, max(SMALLEST_TILE, output // 16))
    whole = Plan(work, query_rows, (query_rows, work.trains), work.trains, _batch(work), work.tests)
    few = min(FEWEST_TILES, 2 * math.ceil(whole.seconds / (2 * SHORTEST_SECONDS)))
    strip = min(MODEST_TILE, column * -(-work.trains // few))
    return min(LARGEST_TILE, max(SMALLEST_TILE, strip, output // 64))


def _strips_wanted(plan: Plan) -> int:
    """Strips of about two seconds of work, and a few of less work."""
    return max(FEWEST_STRIPS, math.ceil(plan.seconds / STRIP_SECONDS))


def _strip_columns(plan: Plan) -> int:
    """Columns of one strip: as many strips as are wanted where there are tiles for them."""
    columns = -(-plan.work.trains // plan.tile[1])
    runs = min(columns, -(-_strips_wanted(plan) // plan.passes), max(1, MOST_STRIPS // plan.passes))
    return plan.tile[1] * -(-columns // runs)


def _longer(plan: Plan, memory_limit: int | None) -> Plan:
    """With strips of several batches, as far as memory allows and an interrupt should cost."""
    columns = -(-plan.work.trains // plan.tile[1])
    most = min(columns, int(LONGEST_SECONDS * columns * plan.passes / plan.seconds))
    for batches in range(BATCHES, 0, -1):
        tiles = min(most, batches * plan.batch // plan.tile[1])
        longer = replace(plan, strip_columns=max(plan.strip_columns, tiles * plan.tile[1]))
        if memory_limit is None or longer.peak_bytes <= memory_limit:
            return longer
    return plan


def _factor_rows(work: Work, share: int, each: int, spread: bool) -> int:
    """Rows of ``each`` bytes of a task that takes at most ``share``, and where work is shared out no more than pay."""
    rows = share // each
    if spread:
        rows = min(rows, max(FEWEST_FACTORS, FACTOR_BYTES // each))
    if work.by_coefficients:  # a call for each batch anyway
        rows = min(rows, _batch(work))
    return min(work.tests, max(1, rows))


def factors_at_once(work: Work) -> int:
    """Test points that one task may solve without much memory, where it need not leave some to others."""
    return max(FEWEST_FACTORS, FACTOR_BYTES // work.point_bytes)


def _spread(factor_rows: int, tests: int) -> int:
    """Rows of a factor task: small enough that a few workers share even a small test set."""
    half = -(-tests // 2)
    whole = -(-half // SOLVED_TOGETHER) * SOLVED_TOGETHER if half > SOLVED_TOGETHER else half
    return min(factor_rows, max(FEWEST_FACTORS, whole))
