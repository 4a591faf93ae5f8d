"""Scoring beside the floor measured in the same run: what no way of scoring can do without.

The floor is one forward and backward pass of the mean loss over test and training samples, the matrix
products that the estimator's formula leaves, each at the speed that a product of its very shape has here
by the faster of torch's libraries, and the write of as many bytes as the scores take. The products of a sum
over layers of q × p numbers are

* low rank: V a, (R·q × p) by (p × n), for test and training samples; then N × R × M;
* with the complement: the same, and ⟨g_i, g_j⟩ by layers, N × (q + p) × M;
* EK-FAC: a and δ turned into the eigenbasis, n × p × p and n × q × q, for test and training samples; then
  N × C × M for the C multiplications of a pair in the expansion at its certified bound;
* Direct: H⁻¹ g of the test points, N × P × P; then N × P × M, both in the arithmetic that is used, float32.

Nothing elementwise is counted, no certificate, no start of a task. Ours and the floor are timed in turn.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import problems
import results
import torch
from results import Result
from torch import Tensor

import dask_influence
from dask_influence.core import gemm

BATCH = 1024
WITHIN = 1.5

Shape = tuple[int, int, int]
"""Rows, inner size and columns of a product."""


@dataclass(frozen=True)
class Work:
    """One estimator on one problem, N test points, to Zarr or in memory."""

    name: str
    title: str
    problem: str
    estimator: str
    tests: int
    to_zarr: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> int:
        """M."""
        return problems.TRAIN[self.problem]

    @property
    def layers(self) -> list[tuple[int, int]]:
        """q and p of each layer, p with the bias."""
        return [(q, p + 1) for p, q in itertools.pairwise(problems.SIZES[self.problem])]

    def products(self, pairs: Sequence[int]) -> Iterator[tuple[Shape, torch.dtype]]:
        """What the module's docstring lists; ``pairs`` are the multiplications of a pair, layer by layer."""
        n, m = self.tests, self.trains
        if self.estimator == "DirectInfluence":
            size = sum(q * p for q, p in self.layers)
            yield (n, size, size), torch.float32
            yield (n, size, m), torch.float32
            return
        if rank := self.options.get("rank"):
            yield from (((rank * q, p, n + m), torch.float32) for q, p in self.layers)
            yield (n, rank, m), torch.float32
        else:
            yield from (((n + m, side, side), torch.float32) for layer in self.layers for side in layer)
        yield from (((n, count, m), torch.float32) for count in pairs)


SKETCH = {"rank": 20, "tol": 1e-2, "curvature": "ggn"}
KEPT = SKETCH | {"complement": True}
LOW_RANK = "ArnoldiInfluence"
WORKS = (
    Work("direct", "Direct 1,437 x 1,437", "digits", "DirectInfluence", 1437),
    Work("direct-zarr", "the same to Zarr", "digits", "DirectInfluence", 1437, to_zarr=True),
    Work("low-rank-256", "Arnoldi 20, 256 x 4,096", "large", LOW_RANK, 256, options=SKETCH),
    Work("low-rank-2048", "Arnoldi 20, 2,048 x 4,096", "large", LOW_RANK, 2048, options=SKETCH),
    Work("low-rank-zarr", "the same to Zarr", "large", LOW_RANK, 2048, to_zarr=True, options=SKETCH),
    Work("complement-256", "complement kept, 256 x 4,096", "large", LOW_RANK, 256, options=KEPT),
    Work("complement-2048", "complement kept, 2,048 x 4,096", "large", LOW_RANK, 2048, options=KEPT),
    Work("ekfac", "EK-FAC, 256 x 4,096", "large", "EkfacInfluence", 256),
)


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def passes(setting: problems.Setting, data: tuple[Tensor, ...]) -> None:
    """Loss and its gradient, batch by batch."""
    for x, y in zip(*(part.split(BATCH) for part in data), strict=True):
        setting.model.zero_grad(set_to_none=True)
        setting.loss(setting.model(x), y).backward()


def product(shape: Shape, dtype: torch.dtype) -> float:
    """Seconds of one matrix product, into memory that is there."""
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    out = torch.empty(rows, columns, dtype=dtype).zero_()
    return seconds_of(lambda: gemm.product(left, right, out=out))


def floor(
    work: Work, setting: problems.Setting, test: tuple[Tensor, ...], pairs: Sequence[int], folder: Path
) -> dict[str, float]:
    """Seconds of each part of the floor."""
    found = {"passes": seconds_of(lambda: (passes(setting, test), passes(setting, setting.train)))}
    found["products"] = sum(product(shape, dtype) for shape, dtype in work.products(pairs))
    if work.to_zarr:
        scores = torch.randn(work.tests, work.trains).numpy().tobytes()
        found["write"] = seconds_of(lambda: (folder / "floor").write_bytes(scores))
    return found


def measure(work: Work, folder: Path, repeats: int) -> Result:
    """Ours and its floor in turn, after one run of each that is not counted."""
    setting = problems.Setting(folder, work.problem, "float32")
    # the digits problem holds 360 test points; training points serve as well
    test = tuple(part[: work.tests] for part in (setting.x, setting.y))
    kind = getattr(dask_influence, work.estimator)
    infl = kind(setting.model, setting.loss, setting.regularization, **work.options).fit(setting.train)

    def score() -> None:
        if work.to_zarr:
            infl.influences_to_zarr(f"{tempfile.mkdtemp(dir=folder)}/scores", test, setting.train)
        else:
            infl.influences(*test, *setting.train)

    kept = [side for layer in work.layers for side in layer] if work.options.get("complement") else []
    pairs = list(infl.diagnostics.get("score_products", {}).values()) or kept
    both = [(seconds_of(score), floor(work, setting, test, pairs, folder)) for _ in range(repeats + 1)][1:]
    ours, floors = [one for one, _ in both], [two for _, two in both]
    parts = ", ".join(f"{part} {median(one[part] for one in floors):.3f}" for part in floors[0])
    sums = [sum(one.values()) for one in floors]
    return Result(f"floor-{work.name}", work.title, "its floor", ours, sums, WITHIN, "within", parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[work.name for work in WORKS], help="some of the works")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        problems.make(Path(name))
        for work in (work for work in WORKS if not args.only or work.name in args.only):
            row = measure(work, Path(name), args.repeats)
            rows.append(row)
            print(
                f"    {row.title}: {results.spread(row.ours)} s, floor {results.spread(row.theirs)} s "
                f"({row.note}), {row.ratio:.2f} times",
                flush=True,
            )
    results.write(args.output / "floor.json", rows)


if __name__ == "__main__":
    main()
