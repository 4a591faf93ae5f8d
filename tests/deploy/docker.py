"""A Docker engine of the tests' own, with the images that it builds: Debian's docker.io, stopped when they end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CLIENT = "/usr/bin/docker"
"""Debian's: it speaks to the engine of the same package."""

BASE, BUILD_BASE, IMAGE = "debian-python:slim", "debian-python:build", "dask-influence:0.1.0"

CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


class Engine:
    """``dockerd`` over a folder, which keeps its layers from one call to the next.

    Parameters
    ----------
    folder : Path
        Of its data.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._socket = folder / "docker.sock"

    @contextmanager
    def running(self) -> Iterator[Engine]:
        """The engine up, and at the end no container of it left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *("dockerd", f"--host=unix://{self._socket}", f"--data-root={self.folder / 'data'}"),
            *(f"--exec-root={self.folder / 'exec'}", f"--pidfile={self.folder / 'docker.pid'}"),
            *("--bridge=none", "--storage-driver=overlay2"),
        ]
        with (self.folder / "engine.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            self._wait(process)
            self.remove_all()  # of a call that was killed
            yield self
        finally:
            self.remove_all()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        end = time.monotonic() + 60
        while subprocess.run(
            [CLIENT, "-H", f"unix://{self._socket}", "version"], capture_output=True
        ).returncode:
            log = (self.folder / "engine.log").read_text()
            assert process.poll() is None, (
                f"dockerd ended; it needs root, iptables and overlayfs:\n{log[-2000:]}"
            )
            assert time.monotonic() < end, f"dockerd does not answer:\n{log[-2000:]}"
            time.sleep(0.2)

    def run(
        self, *arguments: object, timeout: float = 120, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """``docker …``, whatever comes of it."""
        command = [CLIENT, "-H", f"unix://{self._socket}", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)

    def __call__(self, *arguments: object, **how: Any) -> str:
        """What ``docker …`` prints; it has to succeed."""
        ran = self.run(*arguments, **how)
        assert ran.returncode == 0, f"docker {arguments}: {ran.stdout[-3000:]} {ran.stderr[-3000:]}"
        return ran.stdout.strip()

    def remove_all(self) -> None:
        """Containers and networks, of which nothing may outlive the tests."""
        containers = self.run("ps", "--all", "--quiet").stdout.split()
        if containers:
            self.run("rm", "--force", "--volumes", *containers)
        self.run("network", "prune", "--force")

    # -- images ----------------------------------------------------------------------------
    def has(self, image: str) -> bool:
        return bool(self("images", "--quiet", image))

    def build(self) -> None:
        """The image of deploy/Dockerfile, upon bases of Debian's own packages: nothing is pulled."""
        self._bases()
        environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
        bases = ("--build-arg", f"BASE={BASE}", "--build-arg", f"BUILD_BASE={BUILD_BASE}")
        more = ("--build-arg", "TORCH_INDEX=", "--network=host")
        self(
            *("build", *bases, *more, "-f", ROOT / "deploy/Dockerfile", "-t", IMAGE, ROOT),
            timeout=1800,
            environment=environment,
        )

    def _bases(self) -> None:
        """Python on Debian; for building with venv, and this host's certificates and wheels for pip."""
        if not self.has(BASE):
            self._debian(BASE, "python3,ca-certificates")
        if not self.has(BUILD_BASE):
            hooks = [f"copy-in {CERTIFICATES} /etc/ssl/certs"]
            settings = [f"cert = {CERTIFICATES}"]
            wheels = os.environ.get("PIP_FIND_LINKS")
            if wheels and Path(wheels).is_dir():
                hooks += [f'mkdir -p "$1{Path(wheels).parent}"', f"copy-in {wheels} {Path(wheels).parent}"]
                settings.append(f"find-links = {wheels}")
            content = "\\n".join(["[global]", *settings])
            hooks.append(f"printf '{content}\\n' > \"$1/etc/pip.conf\"")
            self._debian(BUILD_BASE, "python3,python3-venv,ca-certificates", hooks)

    def _debian(self, name: str, packages: str, hooks: list[str] | None = None) -> None:
        archive = self.folder / "base.tar"
        customize = [f"--customize-hook={hook}" for hook in hooks or []]
        command = ["mmdebstrap", "--variant=minbase", f"--include={packages}", *customize]
        command += ["--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*"]
        ran = subprocess.run(
            [*command, "--aptopt=APT::Install-Recommends false", "bookworm", str(archive)],
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, f"mmdebstrap: {ran.stderr[-3000:]}"
        self("import", archive, name, timeout=600)
        archive.unlink()


def missing_tools() -> list[str]:
    """Debian packages that have to be installed first."""
    tools = {CLIENT: "docker.io", "dockerd": "docker.io", "mmdebstrap": "mmdebstrap", "iptables": "iptables"}
    return sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
