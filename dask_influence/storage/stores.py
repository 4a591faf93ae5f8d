"""Location: where bytes live, as a URL that can be pickled, with credentials never shown.

Everything the package stores goes through obstore, one client per URL and process. Zarr
gets its own local store for ``file://`` (it reads whole tiles 1.2 to 1.4 times as fast as
through obstore) and obstore for the rest.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
import zarr
from obstore import exceptions as obstore_errors
from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store
from zarr import storage as zarr_storage
from zarr.abc.store import Store
from zarr.core.buffer import Buffer, default_buffer_prototype

from dask_influence.errors import ConfigurationError, MissingObjectError, StoreError

SCHEMES = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "azure": "az"}
"""Object stores by the scheme users write, and the scheme of the normalised URL."""

_CLIENTS = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}

_SPELLINGS: dict[str, dict[str, str]] = {
    "s3": {
        "key": "access_key_id",
        "secret": "secret_access_key",
        "token": "session_token",
        "endpoint_url": "endpoint",
        "region_name": "region",
        "anon": "skip_signature",
    },
    "gs": {"token": "service_account", "endpoint_url": "base_url", "anon": "skip_signature"},
    "az": {"sas_token": "sas_key", "endpoint_url": "endpoint", "anon": "skip_signature"},
}
"""What s3fs, gcsfs and adlfs call an option, and what obstore calls it."""

_PATIENCE: dict[str, Any] = {
    "max_retries": 100,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
}
"""A store that is away for up to three minutes delays a run; obstore's own ten retries take five seconds."""

_VARIABLES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
"""Beginning of the names of environment variables."""

_OPTIONS_TO_SHOW = {"endpoint", "region", "base_url", "account_name"}
_FETCH_THREADS = 32
_WORTH_THREADS = 16
"""Files from which reading them side by side is faster than starting threads for it."""
_PIECE_BYTES = 4 * 2**20

_LOCAL = LocalStore()
_memory_stores: dict[str, MemoryStore] = {}
_remote_clients: dict[tuple[str, str, bool], Any] = {}
_clients_lock = threading.Lock()


_PROCESS = f"{os.getpid()}-{secrets.token_hex(8)}"
"""Names this process in the pickles of memory:// locations, which mean nothing in another."""


@dataclass(frozen=True)
class Location:
    """A folder of objects at a URL; cheap, picklable, compared by its URL alone.

    Parameters
    ----------
    url : str
        Normalised: ``file:///absolute/path``, ``s3://bucket/prefix``, ``gs://…``, ``az://…``
        or ``memory://name/prefix``. Use :meth:`of`, which normalises.
    storage_options : mapping
        Credentials and client settings in obstore's spelling or that of fsspec's s3fs,
        gcsfs and adlfs. They travel with a pickle and never appear in a repr or an error.

    Examples
    --------
    >>> run = Location.of("memory://stores-example")
    >>> run.child("ledger").put("strip-0.json", b"{}")
    >>> run.list()
    ['ledger/strip-0.json']
    >>> run.get("ledger/strip-0.json")
    b'{}'
    >>> Location.of("s3://bucket/run", {"key": "id", "secret": "hidden"})
    Location(url='s3://bucket/run')
    """

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls, store: str | os.PathLike[str] | Location, storage_options: Mapping[str, Any] | None = None
    ) -> Location:
        """The location named by a path or URL; a :class:`Location` is returned as it is.

        Raises
        ------
        StoreError
            Where the scheme is not one of file, s3, gs, az and memory, the URL names no
            folder or bucket or holds NUL, or credentials stand in the URL itself.
        ConfigurationError
            Where ``storage_options`` is no mapping of names.
        """
        if storage_options is not None and not (
            isinstance(storage_options, Mapping) and all(isinstance(name, str) for name in storage_options)
        ):
            raise ConfigurationError(  # what arrived may be a secret: its type alone
                "storage_options must be None or a mapping of names to values, such as {'endpoint': url}; got "
                f"{type(storage_options).__name__}"
            )
        if isinstance(store, Location):
            return store if storage_options is None else cls(store.url, dict(storage_options))
        if not isinstance(store, str | os.PathLike):
            raise StoreError(
                f"store must be a path or a URL; got {type(store).__name__}. Pass for example "
                "'results.zarr' or 's3://bucket/results.zarr'"
            )
        path = os.fspath(store)
        if not isinstance(path, str) or "\0" in path:
            raise StoreError(f"store={path!r} cannot be the name of a store; pass a str without NUL")
        return cls(_normalise(path), dict(storage_options or {}))

    def __reduce__(self) -> tuple[Any, ...]:
        home = _PROCESS if self.in_process else None
        return _unpickled, (self.url, self.storage_options, home)

    def child(self, *parts: str) -> Location:
        """The folder ``parts`` below this one, with the same credentials."""
        below = "/".join(part.strip("/") for part in parts)
        if self.local_path is not None:
            return Location((self.local_path / below).as_uri(), self.storage_options)
        return Location(f"{self.url}/{below}", self.storage_options)

    @property
    def scheme(self) -> str:
        """``file``, ``s3``, ``gs``, ``az`` or ``memory``."""
        return self.url.partition("://")[0]

    @property
    def local_path(self) -> Path | None:
        """The folder on this machine, or None for every scheme but ``file``."""
        return Path(unquote(urlsplit(self.url).path)) if self.scheme == "file" else None

    @property
    def in_process(self) -> bool:
        """True where the bytes live in this process only (``memory``)."""
        return self.scheme == "memory"

    @property
    def shared(self) -> bool:
        """True where every host can reach the bytes (an object store).

        A ``file`` location is shared between the processes of one host; whether its folder is on a network
        drive cannot be told from here.
        """
        return self.scheme in _CLIENTS

    # -- objects ----------------------------------------------------------------------
    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write one whole object; a reader sees the old one or the new one, never a part."""
        with store_errors(self, f"write {key!r} to"):
            obstore.put(self._client(), self._key(key), data)

    def get(self, key: str) -> bytes:
        """The bytes of one object.

        Raises
        ------
        MissingObjectError
            Where there is none of that name; any other failure is a plain StoreError.
        """
        with store_errors(self, f"read {key!r} from"):
            return bytes(obstore.get(self._client(), self._key(key)).bytes())

    def stream(self, key: str) -> Iterator[bytes]:
        """The bytes of one object in pieces of a few MiB, so that no more of it is in memory at once.

        Raises
        ------
        MissingObjectError
            Where there is none of that name.
        """
        with store_errors(self, f"read {key!r} from"):
            for piece in obstore.get(self._client(), self._key(key)).stream(min_chunk_size=_PIECE_BYTES):
                yield bytes(piece)

    def get_many(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The bytes of many objects, fetched side by side; names that are missing are left out."""
        keys = list(keys)
        if len(keys) < (2 if self.shared else _WORTH_THREADS):
            fetched: Iterable[bytes | None] = [self._get_or_none(key) for key in keys]
        else:
            with ThreadPoolExecutor(min(_FETCH_THREADS, len(keys))) as pool:
                fetched = list(pool.map(self._get_or_none, keys))
        return {key: data for key, data in zip(keys, fetched, strict=True) if data is not None}

    def exists(self, key: str) -> bool:
        """Whether an object of that name is there."""
        return self.size(key) is not None

    def list(self, prefix: str = "") -> list[str]:
        """Names of all objects below the folder ``prefix``, sorted; empty where there are none."""
        return sorted(self.stat(prefix))

    def stat(self, prefix: str = "") -> dict[str, tuple[int, str]]:
        """Size in bytes and a version mark (etag, or for files the time of change) by name."""
        return {found["path"]: _size_and_mark(found) for found in self._found(prefix)}

    def sizes(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Name and size in bytes of each object below the folder ``prefix``, in no order; none of them is kept."""
        return ((found["path"], found["size"]) for found in self._found(prefix))

    def folders(self) -> Iterator[str]:
        """Names of the folders right below this one, in no order; what is in them is not listed."""
        with store_errors(self, "list"):
            found = obstore.list_with_delimiter(self._client(), self._key("").rstrip("/") or None)
        return (path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def size(self, key: str) -> int | None:
        """Bytes of one object, None where there is none of that name."""
        try:
            with store_errors(self, f"look for {key!r} in"):
                return int(obstore.head(self._client(), self._key(key))["size"])
        except MissingObjectError:
            return None

    def delete(self, prefix: str = "") -> None:
        """Remove the object ``prefix``, or everything below that folder."""
        with store_errors(self, f"delete {prefix!r} from" if prefix else "delete"):
            if self.local_path is not None:
                _remove_local(self.local_path / prefix)
                return
            below = [self._key(key) for key in self.list(prefix)]
            if prefix and self.exists(prefix):
                below.append(self._key(prefix))
            if below:
                obstore.delete(self._client(), below)

    def check_writable(self) -> None:
        """Write and remove one object, so that a refusal comes before any work is done.

        Nothing is left behind: of a ``file`` location that does not exist yet, only the
        nearest folder that does is tried.

        Raises
        ------
        StoreError
            Names the URL and the reason: permissions, missing credentials, missing bucket,
            a file where a folder should be, an endpoint that does not answer.
        """
        with store_errors(self, "write to"):
            if self.local_path is not None:
                _probe_folder(self.local_path)
                return
            client = self._client(patient=False)
            probe = self._key(f".probe-{uuid.uuid4().hex}")
            obstore.put(client, probe, b"probe")
            obstore.delete(client, probe)

    def zarr(self) -> Store:
        """The same folder as a store that zarr and xarray open."""
        _start_zarr()
        if self.local_path is not None:
            return zarr_storage.LocalStore(self.local_path)
        if self.in_process:
            return zarr_storage.MemoryStore(_Buffers(self))
        with store_errors(self, "open"):
            return zarr_storage.ObjectStore(self._client())

    # -- inside -----------------------------------------------------------------------
    def _client(self, patient: bool = True) -> Any:
        if self.in_process:
            return _memory_store(self.url)
        if self.local_path is not None:
            return _LOCAL
        return _remote_client(self, patient)

    def _key(self, key: str) -> str:
        """``key`` as the client knows it: clients of buckets carry the prefix, the others do not."""
        if self.local_path is not None:
            prefix = str(self.local_path).strip("/")
        else:
            prefix = self.url.partition("://")[2].partition("/")[2] if self.in_process else ""
        return f"{prefix}/{key}" if prefix else key

    def _found(self, prefix: str) -> Iterator[dict[str, Any]]:
        """What the client says of each object below a folder, its path being the name here."""
        skip = len(self._key(""))
        with store_errors(self, "list"):
            for batch in obstore.list(self._client(), self._key(prefix).rstrip("/") or None):
                for found in batch:
                    yield {**found, "path": found["path"][skip:]}

    def _get_or_none(self, key: str) -> bytes | None:
        try:
            return self.get(key)
        except MissingObjectError:
            return None


def _size_and_mark(found: Mapping[str, Any]) -> tuple[int, str]:
    return found["size"], str(found["e_tag"] or found["last_modified"])


@cache
def _start_zarr() -> None:
    """Start zarr's event loop, which holds the context of its first use as long as the process lives.

    Of a ``with Client(...)`` block that context would hold the client, and so what is removed with it.
    """
    contextvars.Context().run(zarr.create_group, zarr_storage.MemoryStore())


def _unpickled(url: str, storage_options: Mapping[str, Any], home: str | None) -> Location:
    if home is not None and home != _PROCESS:
        raise StoreError(
            f"{url} lives in the process that made it, and another process was asked to use it; "
            "give a URL that both reach (file, s3, gs, az)"
        )
    return Location(url, storage_options)


class _Buffers(MutableMapping[str, Buffer]):
    """The objects of a ``memory`` location as the mapping that zarr's MemoryStore wants."""

    def __init__(self, location: Location) -> None:
        self.location = location

    def __getitem__(self, key: str) -> Buffer:
        try:
            return default_buffer_prototype().buffer.from_bytes(self.location.get(key))
        except MissingObjectError as error:
            raise KeyError(key) from error

    def __setitem__(self, key: str, value: Buffer) -> None:
        self.location.put(key, value.to_bytes())

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self.location.delete(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.location.list())

    def __contains__(self, key: object) -> bool:
        return self.location.exists(str(key))

    def __len__(self) -> int:
        return len(self.location.list())


# -- URLs and options ---------------------------------------------------------------------
def _normalise(store: str) -> str:
    if store.lower() in {"", "file://"}:
        raise StoreError(
            f"store={store!r} names no folder; pass for example 'results.zarr', or '.' for this folder"
        )
    scheme, separator, rest = store.partition("://")
    if not separator:
        return Path(os.path.abspath(os.path.expanduser(store))).as_uri()
    scheme = scheme.lower()
    if scheme == "file":
        return Path(os.path.abspath(unquote(rest))).as_uri()
    rest = rest.rstrip("/")
    if scheme == "memory":
        if not rest:
            raise StoreError("store='memory://' has no name; pass for example 'memory://scratch'")
        return f"memory://{rest}"
    if scheme not in SCHEMES:
        raise StoreError(
            f"store has the scheme {scheme!r}, which is not supported; use a path or one of file://, "
            "s3://, gs://, az:// and memory://"
        )
    bucket = rest.partition("/")[0]
    if "@" in bucket or "?" in rest:
        raise StoreError(
            f"store carries credentials or a query in its {scheme}:// URL; pass them in storage_options "
            f"and the URL as '{SCHEMES[scheme]}://bucket/prefix'"
        )
    if not bucket:
        raise StoreError(f"store={store!r} names no bucket; pass '{SCHEMES[scheme]}://bucket/prefix'")
    return f"{SCHEMES[scheme]}://{rest}"


def _client_settings(
    scheme: str, storage_options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Client arguments and HTTP options, from any of the accepted spellings."""
    options = dict(storage_options)
    nested = dict(options.pop("client_kwargs", None) or {})
    styles = dict(options.pop("config_kwargs", None) or {})
    addressing = dict(styles.get("s3") or {}).get("addressing_style")
    http = dict(options.pop("client_options", None) or {})
    spelled = _SPELLINGS[scheme]
    settings: dict[str, Any] = {
        spelled.get(name) or name: value for name, value in (nested | options).items() if value is not None
    }
    if addressing is not None:
        settings.setdefault("virtual_hosted_style_request", addressing == "virtual")
    if "allow_http" in settings:
        http.setdefault("allow_http", settings.pop("allow_http"))
    if settings.pop("use_ssl", True) is False or str(settings.get("endpoint", "")).startswith("http://"):
        http.setdefault("allow_http", True)
    if settings.pop("verify", True) is False:
        http.setdefault("allow_invalid_certificates", True)
    return settings, http


def _remote_client(location: Location, patient: bool) -> Any:
    """The client of an object store, one per URL, options and process."""
    options = json.dumps(location.storage_options, sort_keys=True, default=repr)
    key = (location.url, hashlib.blake2b(options.encode()).hexdigest(), patient)
    with _clients_lock:
        if key not in _remote_clients:
            _remote_clients[key] = _new_client(location, patient)
        return _remote_clients[key]


def _new_client(location: Location, patient: bool) -> Any:
    bucket, _, prefix = location.url.partition("://")[2].partition("/")
    settings, http = _client_settings(location.scheme, location.storage_options)
    if not patient:  # a check should not spend obstore's ten retries on a wrong endpoint
        settings.setdefault("retry_config", {"max_retries": 2, "retry_timeout": timedelta(seconds=10)})
        http = {"connect_timeout": "5s", "timeout": "15s"} | http
    settings.setdefault("retry_config", _PATIENCE)
    if http and os.environ.get(f"{_VARIABLES[location.scheme]}_ALLOW_HTTP", "").lower() in {"1", "true"}:
        http.setdefault("allow_http", True)  # obstore reads the variable only where no options are given
    try:
        return _CLIENTS[location.scheme](
            bucket, prefix=prefix or None, client_options=http or None, **settings
        )
    except TypeError as error:
        text = _scrubbed(str(error), location.storage_options)
        raise StoreError(
            f"storage_options of {location.url} hold a value of the wrong kind: {text}"
        ) from None


def _memory_store(url: str) -> MemoryStore:
    name = url.removeprefix("memory://").partition("/")[0]
    with _clients_lock:
        return _memory_stores.setdefault(name, MemoryStore())


# -- local folders ------------------------------------------------------------------------
def _probe_folder(path: Path) -> None:
    for folder in (path, *path.parents):
        if folder.exists():
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-"):
                return
    raise FileNotFoundError(f"no parent of {path} exists")


def _remove_local(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- errors -------------------------------------------------------------------------------
_REASONS: tuple[tuple[type[BaseException], str], ...] = (
    (NotADirectoryError, "a file stands where a folder is needed"),
    (obstore_errors.UnauthenticatedError, "the credentials were refused"),
    (obstore_errors.PermissionDeniedError, "permission denied"),
    (PermissionError, "permission denied"),
    (obstore_errors.UnknownConfigurationKeyError, "storage_options holds a name this store does not know"),
)

_CODES = {
    "NoSuchBucket": "the bucket does not exist",
    "AccessDenied": "permission denied",
    "InvalidAccessKeyId": "the credentials were refused",
    "SignatureDoesNotMatch": "the credentials were refused",
    "ExpiredToken": "the credentials have expired",
}


@contextmanager
def store_errors(location: Location, doing: str) -> Iterator[None]:
    """Turn what obstore and the file system raise into a StoreError that names the URL.

    The message of a server can hold key ids, signed URLs and tokens. Only its error code and a
    scrubbed first line are kept, and the original is not chained, unless it is about a local file: then it
    may come from the user's data.
    """
    try:
        yield
    except StoreError:
        raise
    except (obstore_errors.BaseError, OSError) as error:
        kind = MissingObjectError if _is_missing(error) else StoreError
        cause = error if _is_of_a_file(error) else None
        raise kind(f"cannot {doing} {location.url}: {_reason(error, location)}") from cause


def _is_of_a_file(error: BaseException) -> bool:
    """Whether the operating system raised it about a path; obstore's own kinds name none."""
    return isinstance(error, OSError) and error.filename is not None


def _is_missing(error: BaseException) -> bool:
    missing = isinstance(error, FileNotFoundError) and not _is_of_a_file(error)
    return missing and "NoSuchBucket" not in str(error)


def _reason(error: BaseException, location: Location) -> str:
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>", text)
    if code and code[1] in _CODES:
        return f"{_CODES[code[1]]} ({code[1]})"
    if "169.254.169.254" in text or "metadata.google.internal" in text:
        return "no credentials were found; pass them in storage_options or the environment"
    for kind, reason in _REASONS:
        if isinstance(error, kind):
            unknown = re.search(r"Configuration key: ('\w+')", text)
            return f"{reason}: {unknown[1]}" if unknown else reason
    if _is_missing(error):
        return "it does not exist"
    return _scrubbed(text, location.storage_options)


def _scrubbed(text: str, storage_options: Mapping[str, Any]) -> str:
    """First line of a message without query strings, bodies and values of ``storage_options``."""
    line = re.sub(r"\?\S+", "", text.partition("\n")[0].partition("<?xml")[0])
    for secret in _secrets(storage_options):
        line = line.replace(secret, "…")
    return line.strip()


def _secrets(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets(value)
        elif (
            isinstance(value, str) and len(value) > 3 and not any(shown in name for shown in _OPTIONS_TO_SHOW)
        ):
            yield value
