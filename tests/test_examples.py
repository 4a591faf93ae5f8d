"""Every script of examples/ runs as a user runs it, without a warning, and says what it is there to say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dask_influence import DirectInfluence, open_influences

EXAMPLES = Path(__file__).parents[1] / "examples"
DEMO = EXAMPLES / "digits_demo.py"


def run(script: Path, *arguments: str, cwd: Path) -> str:
    """Standard output of a script; anything on standard error fails."""
    pytest.importorskip("matplotlib", reason="the demo's picture needs the extra [demo]")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(cwd)}
    answer = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert answer.returncode == 0, answer.stderr
    assert not answer.stderr
    return answer.stdout


def test_every_example_is_run_by_a_test() -> None:
    # digits_job.py is what digits.yaml names: tests/test_readme.py runs both; digits_validation.py is what
    # digits_logistic.yaml and digits_network.yaml name: tests/test_accuracy.py runs them
    tested = {
        "digits_demo.py",
        "digits_job.py",
        "digits_validation.py",
        "quickstart.py",
        "larger_than_memory.py",
        "resume.py",
    }
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_quickstart(tmp_path: Path) -> None:
    said = run(EXAMPLES / "quickstart.py", cwd=tmp_path)
    assert "20 × 158 scores" in said
    assert "(20, 158, 13) perturbation influences" in said


def test_larger_than_memory(tmp_path: Path) -> None:
    said = run(EXAMPLES / "larger_than_memory.py", str(tmp_path), cwd=tmp_path)
    assert "lazy: dask.array<" in said
    assert "of all helpful images have the label of their test image" in said


def test_resume(tmp_path: Path) -> None:
    said = run(EXAMPLES / "resume.py", str(tmp_path / "scores.zarr"), cwd=tmp_path)
    assert "strips   3 of" in said
    assert "strips   0 of" not in said
    assert "0 missing" in said
    assert "hessian_regularization: stored 0.01, asked 0.1" in said


def test_demo_in_a_small_setting_replaces_what_an_earlier_run_left(tmp_path: Path) -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    stale = DirectInfluence(torch.nn.Linear(3, 1), torch.nn.functional.mse_loss, 0.1).fit((x, y))
    stale.influences_to_zarr(tmp_path / "out" / "exact.zarr", (x, y), (x, y))

    small = ("--train=200", "--test=30", "--hidden=8", "--rank=20", "--shown=2", "--output=out")
    said = run(DEMO, *small, cwd=tmp_path)
    assert "factors" in said  # the stages of the progress shown
    assert "strips" in said
    assert said.count("helped by") == said.count("harmed by") == 2
    assert "Pearson  median" in said
    assert 'open_influences("out/exact.zarr")' in said

    pixels = open_influences(str(tmp_path / "out" / "pixels.zarr"))
    assert pixels["influence"].shape == (2, 200, 8, 8)
    for name in ("exact", "sketch"):
        scores = open_influences(str(tmp_path / "out" / f"{name}.zarr"))
        assert scores["influence"].shape == (30, 200)
        assert scores.attrs["state"] == "complete"
        assert not scores["influence"].isnull().any()
    assert (tmp_path / "out" / "digits.png").stat().st_size > 10_000
