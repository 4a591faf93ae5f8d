"""Every script of examples/ runs as a user runs it, without a warning, and says what it is there to say."""

from __future__ import annotations

import os
import re
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
    pytest.importorskip("matplotlib", reason="the pictures need the extra [demo]")
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


def drawn(name: str, *arguments: str, cwd: Path) -> str:
    """What the example of that name says, once it has drawn its picture."""
    said = run(EXAMPLES / f"{name}.py", "--output=out", *arguments, cwd=cwd)
    assert (cwd / "out" / f"{name}.png").stat().st_size > 10_000
    return said


def numbers(pattern: str, said: str) -> list[float]:
    """The numbers in the one place of ``said`` where ``pattern`` has them."""
    (found,) = re.findall(pattern.replace("#", r"([+−-]?[\d,.]*\d)"), said)
    return [float(one.replace(",", "")) for one in (found if isinstance(found, tuple) else (found,))]


def test_every_example_is_run_by_a_test() -> None:
    # digits_job.py is what digits.yaml names: tests/test_readme.py runs both; digits_validation.py is what
    # digits_logistic.yaml and digits_network.yaml name: tests/test_accuracy.py runs them
    tested = {
        "digits_demo",
        "digits_job",
        "digits_validation",
        "label_noise",
        "larger_than_memory",
        "poisoning",
    }
    tested |= {"quickstart", "resume", "sentences", "tabular"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
    listed = (EXAMPLES / "README.md").read_text()
    assert all(
        f"]({path.name})" in listed
        for path in EXAMPLES.iterdir()
        if path.suffix in {".py", ".ipynb", ".yaml"}
    )


def test_quickstart(tmp_path: Path) -> None:
    said = run(EXAMPLES / "quickstart.py", cwd=tmp_path)
    assert "20 × 158 scores" in said
    assert "(20, 158, 13) perturbation influences" in said


def test_planted_label_noise_is_found_and_mended(tmp_path: Path) -> None:
    said = drawn("label_noise", cwd=tmp_path)
    before, after, clean = numbers("accuracy before #%, after #%, had no label been wrong #%", said)
    assert before < after - 1
    assert after > clean - 1.5
    looked, mended, wrong = numbers("looking at # labels mends # of #\n", said)
    assert (looked, wrong) == (287, 144)
    assert mended > 0.9 * wrong
    (share,) = numbers("harm it most, #% have a wrong label", said)
    assert share > 40  # of all labels 10 % are wrong
    assert "self influence  0.9" in said


# zmq's sockets and event loops, which the kernel's client leaves to the garbage collector
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_is_the_script_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    notebook, script = (jupytext.read(EXAMPLES / f"label_noise.{end}") for end in ("ipynb", "py"))
    kinds = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (notebook, script)]
    assert kinds[0] == kinds[1]
    assert not any(cell.get("outputs") for cell in notebook.cells)

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in outputs)
    before, after = numbers("accuracy before #%, after #%,", said)
    assert before < after
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_measurements_of_tumours_matter_as_said(tmp_path: Path) -> None:
    said = drawn("tabular", cwd=tmp_path)
    correlation, slope = numbers("correlate by #, slope #\n", said)
    assert correlation > 0.99
    assert 0.9 < slope < 1.1
    (share,) = numbers("the model gives that #%", said)
    assert share < 50  # misread


def test_sentences_are_helped_by_their_chapter(tmp_path: Path) -> None:
    said = drawn("sentences", cwd=tmp_path)
    (right,) = numbers("words; #% of", said)
    assert right > 60
    (share,) = numbers("help a test sentence most, #% are from its chapter", said)
    assert share > 60  # of six
    assert said.count("most helpful, of ") == said.count("most harmful, of ") == 3
    loss, without, others = numbers(
        "loss of the first one #; .* its most helpful sentences #; others of its chapter #;", said
    )
    assert without > loss + 0.2
    assert without > others + 0.2


def test_poisoned_images_are_found(tmp_path: Path) -> None:
    said = drawn("poisoning", cwd=tmp_path)
    (poisoned,) = numbers("# of 1437 training images are poisoned", said)
    effect, read = numbers("\n#% of marked test digits are read as 0; #% of clean ones", said)
    assert effect > 60
    found, last = numbers("read so, # are poisoned; the last one has rank #\n", said)
    assert found >= 0.8 * poisoned
    assert last <= 3 * poisoned
    effect_after, read_after = numbers("trained again without .*: #% and #%", said)
    assert effect_after < 25
    assert read_after > read - 2


def test_larger_than_memory(tmp_path: Path) -> None:
    said = drawn("larger_than_memory", "--images=19000", cwd=tmp_path)
    assert "lazy scores: dask.array<" in said
    sizes = {"MiB": 2**20, "GiB": 2**30}
    (data, limit, taken) = [float(n) * sizes[unit] for n, unit in re.findall(r"([\d.]+) ([MG]iB)", said)]
    assert limit < data
    assert taken < limit
    (share,) = numbers("#% of the images that help", said)
    assert share > 90


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
