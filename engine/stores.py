"""Connections to object stores: fsspec or else pyarrow, set up by the standard variables alone."""

from __future__ import annotations

import functools
import importlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.spec import AbstractFileSystem
from pyarrow import fs as arrow_fs
from pyarrow.lib import ArrowException

from engine import logs, roots

# What a person sets to reach S3. Not what belongs to one machine (instance and container roles, web
# identity): a worker has its own, and must keep it.
AWS_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CA_BUNDLE",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_MAX_ATTEMPTS",
    "AWS_RETRY_MODE",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)
S3_SCHEMES = frozenset({"s3", "s3a"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")


@dataclass(frozen=True, slots=True)
class Stat:
    """What tells whether a file must be read again; what a store does not say is None."""

    size_bytes: int | None
    mtime_ns: int | None
    etag: str | None = None


def aws_environment() -> dict[str, str]:
    """The AWS variables set in this process."""
    return {name: os.environ[name] for name in AWS_VARIABLES if os.environ.get(name)}


def worker_environment() -> dict[str, str]:
    """`aws_environment`, and the variables of our own that hold in workers, too.

    Hand them over as an argument of the worker's constructor, which gives them to
    `take_environment`: Ray's job pages list a `runtime_env`.
    """
    own = (roots.VARIABLE, logs.VARIABLE)
    return aws_environment() | {name: os.environ[name] for name in own if os.environ.get(name)}


def take_environment(given: Iterable[tuple[str, str]]) -> None:
    """Sets in a worker what the driver's `worker_environment` gave.

    Roots that this machine was started with stand: the driver's might allow more.
    """
    own = os.environ.get(roots.VARIABLE)
    os.environ.update(given)
    if own:
        os.environ[roots.VARIABLE] = own


def lance_options(uri: str) -> dict[str, str] | None:
    """Lance's `storage_options` for `uri` from the AWS variables; None where it needs none.

    Holds no credentials, which Lance reads from the environment itself.
    """
    if scheme_of(uri) not in S3_SCHEMES:
        return None
    options = {}
    if endpoint := _aws_endpoint():
        options["aws_endpoint"] = endpoint
        options["aws_virtual_hosted_style_request"] = "false"
        if endpoint.lower().startswith("http://"):
            options["allow_http"] = "true"
    if region := _aws_region():
        options["aws_region"] = region
    return options or None


class _Reader(io.RawIOBase):
    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri = file, uri

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._file.seek(offset, whence)
        return self._file.tell()

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        with as_os_errors(self._uri):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def buffered(file: Any, uri: str, buffer_bytes: int) -> BinaryIO:
    """A store's open file as one of Python's own, which raises `OSError`s."""
    return io.BufferedReader(_Reader(file, uri), buffer_bytes)


def scheme_of(uri: str) -> str:
    """The lower-case scheme of a URI; empty for a plain path."""
    found = _SCHEME.match(uri)
    return found[1].lower() if found else ""


def _aws_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _aws_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def store_of(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a remote `uri` and its path there.

    Raises:
        NotAllowed: It is outside the allowed roots, or not in an object store.
    """
    roots.check_remote(uri)
    scheme = scheme_of(uri)
    environment = tuple(aws_environment().items()) if scheme in S3_SCHEMES else ()
    root = uri if scheme not in S3_SCHEMES else scheme + "://"
    fs = _store(scheme, _store_root(root), environment, os.getpid())
    if isinstance(fs, ArrowFSWrapper):
        return fs, uri.split("://", 1)[1].rstrip("/")
    return fs, fs._strip_protocol(uri)


def _store_root(uri: str) -> str:
    """Scheme and host: what a connection is made from."""
    scheme, rest = uri.split("://", 1)
    return f"{scheme}://{rest.split('/', 1)[0]}"


@functools.lru_cache(maxsize=64)
def _store(
    scheme: str, root: str, environment: tuple[tuple[str, str], ...], pid: int
) -> AbstractFileSystem:
    """One connection a store, made anew where variables change and after a fork."""
    try:
        cls = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as missing:
        try:
            wrapped, _ = arrow_fs.FileSystem.from_uri(root)
        except (ArrowException, OSError, ValueError) as e:
            raise ValueError(
                f"{root}: nothing installed here opens {scheme}:// : {install_hint(root)}"
            ) from e
        del missing
        return ArrowFSWrapper(wrapped, skip_instance_cache=True)
    # A remembered listing would hide what another machine has just written.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in S3_SCHEMES:
        options["endpoint_url"] = _aws_endpoint()
        if region := os.environ.get("AWS_REGION"):  # which botocore does not read
            options["client_kwargs"] = {"region_name": region}
    else:
        options |= cls._get_kwargs_from_urls(root)
    return cls(**options)


def install_hint(uri: str) -> str:
    """What a person does to open this scheme."""
    known = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
    known |= dict.fromkeys(("az", "abfs", "abfss"), "adlfs") | {"hf": "huggingface_hub"}
    if package := known.get(scheme_of(uri)):
        return f"`pip install {package}`"
    return "install the fsspec implementation for it"


@functools.cache
def _store_errors() -> tuple[type[Exception], ...]:
    """What stores' libraries raise that is no `OSError`."""
    found: list[type[Exception]] = [ArrowException]
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
        ("aiohttp", "ClientError"),
    ):
        try:
            found.append(getattr(importlib.import_module(module), name))
        except ImportError:
            continue
    return tuple(found)


@contextmanager
def as_os_errors(uri: str) -> Iterator[None]:
    """Turns what a store's library raises into `OSError`; one line that names `uri`."""
    try:
        yield
    except OSError:
        raise
    except _store_errors() as e:
        message = f"{uri}: {type(e).__name__}: " + " ".join(str(e).split())
        raise ConnectionError(message) from e


def s3_code(error: OSError) -> str:
    """The code in S3's own answer; empty where the error came from elsewhere."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def describe(uri: str) -> dict[str, Any]:
    """What the store says about an object or folder, with fsspec's names.

    Raises:
        FileNotFoundError: Nothing has this name.
    """
    fs, path = store_of(uri)
    with as_os_errors(uri):
        return fs.info(path)


def stat_of(info: dict[str, Any]) -> Stat:
    """The `Stat` in what fsspec says about an object."""
    lowered = {key.lower().replace("-", "_"): value for key, value in info.items()}
    etag = lowered.get("etag")
    etag = etag.strip('"') if isinstance(etag, str) and etag else None
    times = ("lastmodified", "last_modified", "mtime", "updated", "modified", "created")
    mtime_ns = _nanoseconds(lowered[key] for key in times if lowered.get(key))
    if etag and mtime_ns is not None:
        # Some stores give fractions in listings and whole seconds in headers; the ETag tells more.
        mtime_ns -= mtime_ns % 10**9
    return Stat(lowered.get("size"), mtime_ns, etag)


def _nanoseconds(times: Iterable[Any]) -> int | None:
    for when in times:
        if isinstance(when, (int, float)):
            return round(when * 10**9)
        if isinstance(when, str):
            try:
                when = datetime.fromisoformat(when)
            except ValueError:
                continue
        if isinstance(when, datetime):
            aware = when if when.tzinfo else when.replace(tzinfo=UTC)
            since = aware - datetime(1970, 1, 1, tzinfo=UTC)
            return since // timedelta(microseconds=1) * 1000  # a float would lose microseconds
    return None
