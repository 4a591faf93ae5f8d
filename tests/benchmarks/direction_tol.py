"""What ``direction_tol`` buys and costs: scores of an MLP of 820,874 parameters with it and without, in turn.

``python tests/benchmarks/direction_tol.py [tolerance]`` fits Arnoldi of rank 20 and prints seconds, processor
seconds and the relative error of the scores, with the complement dropped and kept.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import problems

from dask_influence import ArnoldiInfluence

ROUNDS, COUNTS = 5, (256, 2048)


def timed(infl: Any, tests: Any, train: Any) -> tuple[Any, float, float]:
    """Scores, seconds and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    scores = infl.influences(*tests, *train)
    return scores, time.perf_counter() - wall, time.process_time() - processor


def main(tolerance: float) -> None:
    """Both forms of the sketch, each against itself in factors."""
    with tempfile.TemporaryDirectory() as folder:
        problems.make(Path(folder))
        setting = problems.Setting(Path(folder), "large", "float32")
    train = setting.train
    for complement in (False, True):
        models, fits = [], []
        for asked in (None, tolerance):
            began = time.perf_counter()
            options = {"rank": 20, "tol": 1e-3, "complement": complement, "direction_tol": asked}
            model = ArnoldiInfluence(setting.model, setting.loss, setting.regularization, **options)
            models.append(model.fit(train))
            fits.append(time.perf_counter() - began)
        print(f"complement={complement}: fits {fits[0]:.1f} s, {fits[1]:.1f} s with factors")
        print(f"  ranks {models[1].diagnostics['direction_ranks']}")
        for count in COUNTS:
            x, y = setting.test(min(count, problems.TESTS["large"]))
            times = -(-count // len(x))
            tests = (x.repeat(times, 1)[:count], y.repeat(times)[:count])
            rounds = [[timed(model, tests, train) for model in models] for _ in range(ROUNDS)]
            exact, found = (scores for scores, _, _ in rounds[-1])
            error = float((found - exact).norm() / exact.norm())
            seconds = [
                [statistics.median(one[at][unit] for one in rounds) for at in (0, 1)] for unit in (1, 2)
            ]
            print(
                f"  {count:,} × {len(train[0]):,}: {seconds[0][0]:.2f} s, {seconds[0][1]:.2f} s with factors "
                f"(processor {seconds[1][0]:.2f}, {seconds[1][1]:.2f}), relative error {error:.1e}"
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1e-4)
