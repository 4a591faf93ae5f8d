"""The README's Python runs as printed, in order, and prints what the README shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from decimal import Decimal
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dask_influence.cli import cli

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def blocks(text: str) -> list[tuple[str, str]]:
    return BLOCK.findall(text)


def shown_after(text: str) -> list[tuple[str, str | None]]:
    """Each Python block, with the output shown right after it."""
    found = [*blocks(text), ("", "")]
    return [
        (body, after if after_kind == "text" else None)
        for (kind, body), (after_kind, after) in pairwise(found)
        if kind == "python"
    ]


NUMBER = re.compile(r"\d+\.\d+")


def agree(printed: str, shown: str) -> bool:
    """Whether the last digits of numbers differ by one at the most, which processors round differently."""
    if NUMBER.sub("", printed) != NUMBER.sub("", shown):
        return False
    pairs = zip(*(map(Decimal, NUMBER.findall(text)) for text in (printed, shown)), strict=True)
    return all(abs(ours - theirs) <= Decimal(1).scaleb(theirs.as_tuple().exponent) for ours, theirs in pairs)


def steady(output: str) -> str:
    """Output without what differs from machine to machine: trailing blanks and times."""
    lines = "\n".join(map(str.rstrip, output.strip().splitlines()))
    return re.sub(r"[\d.]+ (s|min|h)\b", "T", lines)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_python_blocks_print_what_the_readme_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    names: dict[str, object] = {"__name__": "__main__"}
    examples = shown_after(README.read_text())
    assert len(examples) == 3
    try:
        for body, shown in examples:
            printed = StringIO()
            with redirect_stdout(printed):
                exec(compile(body, str(README), "exec"), names)
            assert shown is not None
            assert steady(printed.getvalue()) == steady(shown)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_job_file_is_that_of_the_examples_and_its_output_is_shown(tmp_path: Path) -> None:
    text = README.read_text()
    (shown,) = [body for kind, body in blocks(text) if kind == "yaml"]
    examples = README.parent / "examples"
    assert shown == (examples / "digits.yaml").read_text()
    for name in ("digits.yaml", "digits_job.py"):
        shutil.copy(examples / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / "digits_job.py"], check=True)
    # in this process instead of two workers: the same bits, sooner
    job = tmp_path / "here.yaml"
    job.write_text(shown.replace("{workers: 2, memory_limit: 2GiB}", "{workers: 0}"))
    for command in ("run", "verify"):
        result = CliRunner().invoke(cli, [command, str(job)])
        assert result.exit_code == 0, result.stderr
    (line,) = [line for line in text.splitlines() if line.startswith("dask-influence top")]
    top = CliRunner().invoke(cli, ["top", str(job), *line.split()[3:]])
    assert any(agree(top.stdout, body) for kind, body in blocks(text) if kind == "text")


def test_a_changed_output_would_be_noticed() -> None:
    text = "```python\nprint(1)\n```\n\n```text\n2\n```\n\n```sh\nls\n```\n"
    assert shown_after(text) == [("print(1)\n", "2\n")]
    assert steady("1\n") != steady("2\n")
    assert not agree("1  +0.12344", "1  +0.12346")
    assert agree("1  +95.3494", "1  +95.3495")
    assert not agree("1  +95.3494", "2  +95.3494")
    assert not agree("1  +95.3494", "1  -95.3494")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "deploy/README.md", "examples/README.md"])
def test_links_lead_to_files(page: str) -> None:
    path = README.parent / page
    missing = [target for target in LINK.findall(path.read_text()) if not (path.parent / target).exists()]
    assert not missing
