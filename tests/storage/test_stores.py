"""Locations: URLs, options, errors that name the place and never the credentials."""

from __future__ import annotations

import itertools
import pickle
import traceback
from pathlib import Path
from typing import Any

import obstore
import pytest

from dask_influence.errors import MissingObjectError, StoreError
from dask_influence.storage import stores
from dask_influence.storage.stores import Location
from tests.contracts.stores import StoreContract

KEY, SECRET = "AKIAEXAMPLEKEYID", "an-example-secret-access-key"
_names = itertools.count()


class TestFile(StoreContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> Location:
        return Location.of(tmp_path / "not yet" / "run 1%2.zarr")


class TestMemory(StoreContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> Location:
        return Location.of(f"memory://contract-{next(_names)}/below")


class TestS3(StoreContract):
    @pytest.fixture
    def location(self, s3: Location) -> Location:
        return s3

    def test_pickle_and_equality(self, location: Location) -> None:
        super().test_pickle_and_equality(location)
        assert pickle.loads(pickle.dumps(location)).storage_options == location.storage_options


# -- URLs ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("/a/b/", "file:///a/b"),
        ("/a/../b c", "file:///b%20c"),
        ("file:///a/b%20c", "file:///a/b%20c"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("S3A://bucket", "s3://bucket"),
        ("gcs://bucket/a", "gs://bucket/a"),
        ("gs://bucket/a", "gs://bucket/a"),
        ("abfs://container/a", "az://container/a"),
        ("memory://name/", "memory://name"),
    ],
)
def test_normalised(given: str, url: str) -> None:
    assert Location.of(given).url == url
    assert Location.of(url).url == url


def test_relative_paths_and_path_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Location.of("out.zarr") == Location.of(Path("out.zarr")) == Location.of(tmp_path / "out.zarr")
    assert Location.of("out.zarr").local_path == tmp_path / "out.zarr"
    assert Location.of(".").local_path == tmp_path
    assert Location.of("file").local_path == tmp_path / "file"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("http://host/a", "'http'.*file://"),
        ("simplecache::s3://bucket/a", "not supported"),
        ("s3://", "names no bucket"),
        ("memory://", "no name"),
        ("", "names no folder"),
        ("file://", "names no folder"),
        (3, "got int"),
        (None, "got NoneType"),
    ],
)
def test_urls_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Location.of(given)


@pytest.mark.parametrize("given", [f"s3://{KEY}:{SECRET}@bucket/a", f"az://container/a?sig={SECRET}"])
def test_credentials_in_the_url_are_refused_and_not_repeated(given: str) -> None:
    with pytest.raises(StoreError, match="storage_options") as caught:
        Location.of(given)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shared", "in_process"),
    [("/a", False, False), ("memory://a", False, True), ("s3://a", True, False), ("az://a", True, False)],
)
def test_who_can_read(url: str, shared: bool, in_process: bool) -> None:
    location = Location.of(url)
    assert (location.shared, location.in_process) == (shared, in_process)
    assert (location.local_path is not None) == (location.scheme == "file")


def test_repr_and_equality_leave_options_out() -> None:
    location = Location.of("s3://bucket/a", {"key": KEY, "secret": SECRET})
    assert repr(location) == "Location(url='s3://bucket/a')"
    assert location == Location.of("s3://bucket/a")
    assert location.child("b").storage_options == location.storage_options


def test_memory_stores_of_one_name_are_one() -> None:
    Location.of("memory://one-name/a").put("k", b"1")
    assert Location.of("memory://one-name").list() == ["a/k"]
    assert Location.of("memory://another-name").list() == []


# -- options ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"key": KEY, "secret": SECRET, "endpoint_url": "{}", "region_name": "us-east-1"},
        {"key": KEY, "secret": SECRET, "client_kwargs": {"endpoint_url": "{}", "region_name": "us-east-1"}},
        {"access_key_id": KEY, "secret_access_key": SECRET, "endpoint": "{}", "allow_http": True},
        {"key": KEY, "secret": SECRET, "token": None, "endpoint": "{}", "use_ssl": False},
        {"key": KEY, "secret": SECRET, "endpoint": "{}", "client_options": {"allow_http": True}},
        {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": "{}",
            "config_kwargs": {"s3": {"addressing_style": "path"}},
        },
    ],
)
def test_spellings_of_s3_options(s3_endpoint: str, options: dict[str, Any]) -> None:
    location = Location.of(f"s3://bucket/spelling-{next(_names)}", _filled(options, s3_endpoint))
    location.put("k", b"v")
    assert location.get("k") == b"v"


@pytest.mark.parametrize(
    "options", [{"anon": True, "endpoint_url": "{}"}, {"skip_signature": True, "endpoint": "{}"}]
)
def test_anonymous_reads_of_a_private_object_are_refused(s3: Location, options: dict[str, Any]) -> None:
    s3.put("k", b"v")
    with pytest.raises(StoreError, match="permission denied"):
        Location.of(s3.url, _filled(options, s3.storage_options["endpoint"])).get("k")


def _filled(value: Any, endpoint: str) -> Any:
    if isinstance(value, dict):
        return {name: _filled(inner, endpoint) for name, inner in value.items()}
    return endpoint if value == "{}" else value


def test_clients_of_other_clouds_are_made() -> None:
    azure = Location.of("az://container/a", {"account_name": "name", "account_key": "c2VjcmV0"})
    google = Location.of("gs://bucket/a", {"anon": True})
    assert "Azure" in type(azure._client()).__name__
    assert "GCS" in type(google._client()).__name__
    assert azure._client() is azure._client()


def test_clients_do_not_outlive_a_change_of_options(s3: Location) -> None:
    other = Location(s3.url, {**s3.storage_options, "access_key_id": "another"})
    assert other == s3
    assert other._client() is not s3._client()
    assert Location(s3.url, dict(s3.storage_options))._client() is s3._client()


# -- refusals -----------------------------------------------------------------------------
def test_missing_bucket(s3: Location) -> None:
    location = Location.of("s3://no-such-bucket/a", s3.storage_options)
    for action in [location.check_writable, lambda: location.put("k", b""), lambda: location.get("k")]:
        with pytest.raises(StoreError, match=r"s3://no-such-bucket/a: the bucket does not exist") as caught:
            action()
        assert not isinstance(caught.value, MissingObjectError)


def test_no_server_answers() -> None:
    options = {"endpoint": "http://127.0.0.1:9", "key": KEY, "secret": SECRET}
    with pytest.raises(StoreError, match="cannot write to s3://bucket/a") as caught:
        Location.of("s3://bucket/a", options).check_writable()
    shown = "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert SECRET not in shown


def test_unknown_option_is_named(s3: Location) -> None:
    with pytest.raises(StoreError, match="a name this store does not know: 'acces_key'"):
        Location.of("s3://bucket/a", {**s3.storage_options, "acces_key": KEY}).check_writable()


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (
            obstore.exceptions.PermissionDeniedError(
                f"403: <Error><Code>AccessDenied</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>"
            ),
            "permission denied",
        ),
        (obstore.exceptions.UnauthenticatedError(f"401 {SECRET}"), "credentials were refused"),
        (
            obstore.exceptions.GenericError(f"<Error><Code>InvalidAccessKeyId</Code>{KEY}</Error>"),
            "credentials were refused",
        ),
        (
            obstore.exceptions.GenericError("PUT http://169.254.169.254/latest/api/token failed"),
            "no credentials were found",
        ),
        (
            obstore.exceptions.GenericError(
                f"PUT https://host/c/k?sig=abc%2Bdef - key {SECRET} - 500\nDebug {KEY}"
            ),
            "PUT https://host/c/k - key … - 500",
        ),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_reasons_without_secrets(raised: Exception, reason: str) -> None:
    location = Location.of("s3://bucket/a", {"key": KEY, "secret": SECRET, "region": "eu-west-1"})
    with (
        pytest.raises(StoreError, match="cannot read s3://bucket/a") as caught,
        stores.store_errors(location, "read"),
    ):
        raise raised
    assert reason in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert not any(secret in shown for secret in (KEY, SECRET, "abc%2Bdef"))


def test_file_where_a_folder_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    location = Location.of(tmp_path / "file" / "run.zarr")
    with pytest.raises(StoreError, match=r"file/run\.zarr: a file stands where a folder is needed"):
        location.check_writable()
    with pytest.raises(StoreError, match="cannot write 'k'"):
        location.put("k", b"")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_check_writable_makes_no_folder(tmp_path: Path) -> None:
    Location.of(tmp_path / "a" / "b").check_writable()
    assert list(tmp_path.iterdir()) == []


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom no folder refuses.
    monkeypatch.setattr(stores.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(StoreError, match="permission denied"):
        Location.of(tmp_path).check_writable()


def test_deleting_a_link_keeps_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "data").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    Location.of(tmp_path).delete("link")
    assert (tmp_path / "kept" / "data").read_bytes() == b"1"
    assert not (tmp_path / "link").exists()


def test_options_of_the_wrong_kind_are_refused_without_their_values() -> None:
    wrong = Location.of("s3://bucket/run", {"secret": SECRET, "retry_config": {"retry_timeout": 1}})
    with pytest.raises(StoreError, match=r"storage_options of s3://bucket/run.*wrong kind") as refusal:
        wrong.check_writable()
    assert SECRET not in str(refusal.value)


def test_plain_http_may_be_allowed_by_the_environment(s3: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {name: value for name, value in s3.storage_options.items() if name != "endpoint"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(s3.storage_options["endpoint"]))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    allowed = Location.of(f"{s3.url}-allowed", options)
    allowed.check_writable()
    allowed.put("key", b"1")
    assert allowed.list() == ["key"]
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="cannot write"):
        Location.of(f"{s3.url}-refused", options).check_writable()
