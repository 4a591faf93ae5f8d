"""What the image is made of, without making it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.deploy.manifests import ROOT, tool

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def hadolint(file: Path) -> str:
    return subprocess.run([tool("hadolint"), "--no-color", str(file)], capture_output=True, text=True).stdout


def test_the_dockerfile_is_clean(tmp_path: Path) -> None:
    assert hadolint(DOCKERFILE) == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text(DOCKERFILE.read_text() + "RUN cd /tmp && sudo make\n")
    assert {"DL3003", "DL3004"} == set(re.findall(r"DL\d{4}", hadolint(worse)))


def test_the_image_ends_without_root() -> None:
    last = DOCKERFILE.read_text().rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["10001:10001"]
    assert "ADD " not in last


def test_everything_is_installed_with_the_constraints() -> None:
    installs = re.findall(r"pip\b[^&]*? install ((?:[^&])*)", DOCKERFILE.read_text())
    assert len(installs) == 2
    for arguments in installs:
        assert "--constraint constraints.txt" in arguments or "--no-deps" in arguments


def test_requirements_are_those_of_the_package() -> None:
    def printed(extras: str) -> list[str]:
        command = [sys.executable, "deploy/requirements.py", extras]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )[:-1]

    plain = printed("")
    assert any(each.startswith("torch>=") for each in plain)
    assert set(printed("dashboard,metrics")) - set(plain) == {"bokeh>=3.1", "prometheus-client>=0.20"}
    wrong = subprocess.run(
        [sys.executable, "deploy/requirements.py", "unheard"], cwd=ROOT, capture_output=True
    )
    assert wrong.returncode != 0


def test_what_is_copied_is_in_the_context() -> None:
    """.dockerignore leaves everything out but what it names."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    copied = [
        each
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE.read_text(), re.MULTILINE)
        for each in line.split()[:-1]
    ]
    assert set(copied) == allowed
    assert all((ROOT / each).exists() for each in copied)
