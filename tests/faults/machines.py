"""Faults of machines, as far as this one lets us have them: a network that is cut, a disk that is full."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

NEEDS_ROOT = "needs root"


def run(*command: object) -> None:
    """A command of the system, or an error with what it said."""
    try:
        subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{' '.join(map(str, command))}: {error.stderr.strip()}") from None


def is_root() -> bool:
    """Whether namespaces and mounts are allowed."""
    return os.geteuid() == 0


class OtherHost:
    """A network namespace, joined to this one by a cable that can be pulled.

    Attributes
    ----------
    here, there : str
        Addresses of the two ends.
    """

    def __init__(self) -> None:
        tag = f"{os.getpid() % 100_000:05}"
        # of this suite alone: another one may run beside it, or have been killed
        subnet, first = os.getpid() % 256, 4 * (os.getpid() // 256 % 63) + 1
        self.here, self.there = f"10.213.{subnet}.{first}", f"10.213.{subnet}.{first + 1}"
        self._name, self._near, self._far = f"faults{tag}", f"dif{tag}a", f"dif{tag}b"
        run("ip", "netns", "add", self._name)
        try:
            run(
                "ip",
                "link",
                "add",
                self._near,
                "type",
                "veth",
                "peer",
                "name",
                self._far,
                "netns",
                self._name,
            )
            run("ip", "address", "add", f"{self.here}/30", "dev", self._near)
            run("ip", "link", "set", self._near, "up")
            run("ip", "-n", self._name, "address", "add", f"{self.there}/30", "dev", self._far)
            run("ip", "-n", self._name, "link", "set", "lo", "up")
            self.join()
        except OSError:
            self.close()
            raise

    @property
    def prefix(self) -> tuple[str, ...]:
        """What runs a command over there."""
        return ("ip", "netns", "exec", self._name)

    def cut(self) -> None:
        """Pull the cable: nothing arrives, and nobody is told."""
        # at the far end, so that this host keeps its own address
        run("ip", "-n", self._name, "link", "set", self._far, "down")

    def join(self) -> None:
        """Put it back."""
        run("ip", "-n", self._name, "link", "set", self._far, "up")

    def close(self) -> None:
        """Remove both ends."""
        with suppress(OSError):
            run("ip", "link", "delete", self._near)
        run("ip", "netns", "delete", self._name)


class SmallDisk:
    """A file system of a few MiB, of which all but a few bytes can be taken.

    Parameters
    ----------
    folder : Path
        Where it appears.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"
        folder.mkdir()
        run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder)

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return shutil.disk_usage(self.folder).used

    def leave(self, nbytes: int) -> None:
        """Take all but ``nbytes``."""
        free = shutil.disk_usage(self.folder).free
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, free - nbytes))

    def make_room(self) -> None:
        """Give back what was taken."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        run("umount", "-l", self.folder)
