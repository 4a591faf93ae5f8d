"""Artifacts: tensors published once to a store and loaded lazily, by digest, once per process.

This is how weights, sketches, factorisations and vector blocks reach the workers. Nothing
of size travels in a task graph, and no worker holds the only copy of anything: a worker
that joins late or loses its memory loads the artifact again.

An artifact carries a checksum of its tensors in its header, and is compared with it wherever it
is read: a flipped byte in a weight would otherwise be in every score, and nobody would know.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import google_crc32c
import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dask_influence.core.content import octets, tensors_digest
from dask_influence.errors import ConfigurationError, CorruptStoreError, MissingObjectError
from dask_influence.storage.stores import Location, store_errors

CACHE_BYTES = 4 * 2**30
"""Artifacts that a process keeps, the least recently used going first."""

RIDING_BYTES = 8 * 2**20
"""Tensors that may travel inside a task where there is no store for them."""


@dataclass(frozen=True)
class Artifact:
    """Where published tensors are: in a store, in the reference itself, or in this process.

    Attributes
    ----------
    digest : str
        Of the bytes; names the object in the store and the entry in each process's cache.
    nbytes : int
        Size of the tensors.
    """

    digest: str
    nbytes: int
    location: Location | None = None
    inline: bytes | None = field(default=None, repr=False)
    tensors: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def key(self) -> str:
        """Name of the object inside its location."""
        return f"{self.digest}.safetensors"

    def load(self, *, passing: bool = False) -> dict[str, Tensor]:
        """The tensors, on CPU; read-only by agreement, since every caller in the process shares them.

        Of what is ``passing``, wanted for one stretch of work, a process keeps the last one alone.
        """
        if self.tensors is not None:
            return self.tensors
        return (_PASSING if passing else _CACHE).get(self)

    def read(self) -> dict[str, Tensor]:
        """The tensors, read anew.

        Raises
        ------
        MissingObjectError
            Where the object is gone.
        CorruptStoreError
            Where it is not what was written; names it.
        """
        # Copied: a file aligns tensors to 8 bytes, torch's own memory to 64, and the bits of a
        # product may depend on it.
        return {name: value.clone() for name, value in self.mapped().items()}

    def mapped(self) -> dict[str, Tensor]:
        """The same where they lie, in the file if there is one; to be copied from, not computed with."""
        if self.tensors is not None:
            return self.tensors
        if self.inline is not None:
            return safetensors.torch.load(self.inline)
        assert self.location is not None
        path = self.location.local_path
        try:
            if path is None:
                return _unpacked(self.location.get(self.key))
            with store_errors(self.location, f"read {self.key!r} from"):
                return _mapped_file(path / self.key)
        except (SafetensorError, _ChecksumError) as error:
            raise CorruptStoreError(
                f"{self.key!r} of {self.location.url} is damaged ({error}); delete it and run the same call again"
            ) from None


class Artifacts:
    """Publishes tensors to ``location``; without one they stay in this process.

    Parameters
    ----------
    location : Location, optional
        A store that every worker can read.
    riding : bool
        Without a location, let small tensors ride inside their reference.

    Raises
    ------
    ConfigurationError
        Where tensors that must ride are larger than ``RIDING_BYTES``.
    """

    def __init__(self, location: Location | None = None, *, riding: bool = False) -> None:
        self.location = location
        self.riding = riding

    def publish(self, tensors: dict[str, Tensor], digest: str | None = None) -> Artifact:
        """Write once (equal content is found again by its digest) and return the reference.

        A caller that knows a ``digest`` of the content spares this process making another.
        """
        tensors = {name: value.detach().to("cpu") for name, value in tensors.items()}
        nbytes = sum(value.nbytes for value in tensors.values())
        if self.riding and nbytes > RIDING_BYTES:
            raise ConfigurationError(
                f"{nbytes / 2**20:.0f} MB of tensors would travel inside the task graph; give the model "
                "client= (and artifacts= where workers do not share this host's files), so that they go through a store"
            )
        if self.location is None and not self.riding:
            return Artifact(digest=f"held-{next(_SERIAL)}", nbytes=nbytes, tensors=tensors)
        held = {name: owned(value) for name, value in tensors.items()}
        if digest is None:
            digest = tensors_digest(sorted(held.items()))
        if self.location is None:
            return Artifact(digest, nbytes, inline=_packed(held))
        artifact = Artifact(digest, nbytes, self.location)
        folder = self.location.local_path
        if folder is not None:
            if not _sound_file(folder / artifact.key):
                doing = f"write {artifact.key!r} to"
                with store_errors(self.location, doing):
                    with _written(folder, artifact.key) as path:
                        _save_file(held, path)
                    _SOUND[folder / artifact.key] = _mark(folder / artifact.key)
        elif not self.location.exists(artifact.key):
            self.location.put(artifact.key, _packed(held))
        return artifact

    def adopt(self, artifact: Artifact) -> Artifact | None:
        """``artifact`` of another location under this one, where that is a second name of one file; else None.

        Files of artifacts are replaced whole and never written into, so neither name sees the other's fate.
        """
        folder = None if self.location is None else self.location.local_path
        source = None if artifact.location is None else artifact.location.local_path
        if folder is None or source is None:
            return None
        if not _sound_file(folder / artifact.key):
            try:
                with _written(folder, artifact.key) as path:
                    path.hardlink_to(source / artifact.key)
            except OSError:  # another file system, or one without hard links
                return None
        return replace(artifact, location=self.location)


def whole(location: Location, artifacts: Iterable[Artifact]) -> set[str]:
    """Digests of those ``artifacts`` that ``location`` holds undamaged, from one listing and no content.

    Of files the header tells whether they are cut short. Of other objects only the size of their tensors is
    known; reading finds what that misses.
    """
    sizes, folder = location.stat(), location.local_path
    return {
        artifact.digest
        for artifact in artifacts
        if sizes.get(artifact.key, (0, ""))[0] > artifact.nbytes
        and (folder is None or _whole_file(folder / artifact.key))
    }


def _whole_file(path: Path) -> bool:
    """Whether a file of tensors is there and as long as its header says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _sound_file(path: Path) -> bool:
    """Whether a file of tensors is there and holds what was written; read once, until it is another or is changed."""
    try:
        mark = _mark(path)
        if _SOUND.get(path) != mark:
            _mapped_file(path)
            _SOUND[path] = mark
    except (OSError, SafetensorError, _ChecksumError):
        return False
    return True


def _mark(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


_SOUND: dict[Path, tuple[int, ...]] = {}
"""Files that this process has written, or has read and found to be what was written, as they were then."""


def damaged_artifact(location: Location, key: str) -> str | None:
    """What is wrong with the artifact stored as ``key``, read anew; None where it is what was written."""
    folder = location.local_path
    try:
        if folder is None:
            _unpacked(location.get(key))
        else:
            with store_errors(location, f"read {key!r} from"):
                _mapped_file(folder / key)
    except MissingObjectError:
        return "is missing"
    except (SafetensorError, _ChecksumError) as error:
        return f"is damaged ({error})"
    return None


# -- checksums -------------------------------------------------------------------------
_CHECKSUM = "crc32c"


class _ChecksumError(Exception):
    """Tensors are not those whose checksum stands beside them."""


def _save_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Straight from the tensors; a full disk is an OSError, as elsewhere."""
    try:
        safetensors.torch.save_file(tensors, path, _signature(tensors))
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _packed(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors, _signature(tensors))


def _signature(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """CRC-32C of names, dtypes, shapes and bytes, as the header's metadata."""
    crc = 0
    for name in sorted(tensors):
        value = tensors[name]
        crc = google_crc32c.extend(crc, f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        content = octets(value)
        content.flags.writeable = False  # what the extension asks for
        crc = google_crc32c.extend(crc, content)
    return {_CHECKSUM: f"{crc:08x}"}


def _compared(tensors: dict[str, Tensor], metadata: Mapping[str, str] | None) -> dict[str, Tensor]:
    if metadata and _CHECKSUM in metadata and metadata[_CHECKSUM] != _signature(tensors)[_CHECKSUM]:
        raise _ChecksumError("its checksum differs")
    return tensors


def _mapped_file(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as held:
        return _compared({name: held.get_tensor(name) for name in held.keys()}, held.metadata())  # noqa: SIM118


def _unpacked(data: bytes) -> dict[str, Tensor]:
    tensors = safetensors.torch.load(data)  # refuses a header that is not one, before it is read here
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return _compared(tensors, header.get("__metadata__"))


@contextmanager
def _written(folder: Path, key: str) -> Iterator[Path]:
    """A path to write to; what is there at the end appears in ``folder`` as ``key``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as private:
        path = Path(private) / key
        yield path
        path.replace(folder / key)


def owned(tensor: Tensor) -> Tensor:
    """``tensor`` in memory of its own: safetensors refuses views and tensors that share storage."""
    dense = tensor.contiguous()
    return dense if dense.untyped_storage().nbytes() == dense.nbytes else dense.clone()


_SERIAL = itertools.count()


class _Cache:
    """Least recently used artifacts of this process, bounded in bytes; loading is done once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.RLock()
        self._held: OrderedDict[str, tuple[int, dict[str, Tensor]]] = OrderedDict()

    def get(self, artifact: Artifact) -> dict[str, Tensor]:
        with self._lock:
            if artifact.digest not in self._held:
                # room is made before, or the old and the new would be held at once
                while self._held and artifact.nbytes + sum(n for n, _ in self._held.values()) > self._limit:
                    self._held.popitem(last=False)
                self._held[artifact.digest] = (artifact.nbytes, artifact.read())
            self._held.move_to_end(artifact.digest)
            return self._held[artifact.digest][1]

    def clear(self) -> None:
        with self._lock:
            self._held.clear()


_CACHE = _Cache(CACHE_BYTES)
_PASSING = _Cache(0)


def let_pass() -> None:
    """Let go of what was loaded in passing: other work begins."""
    _PASSING.clear()
