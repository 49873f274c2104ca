"""One home for paths that may be local or in an object store (what fsspec or pyarrow open).

A local path is a plain absolute path; a file whose name is not valid UTF-8 is a `file://` URI with
percent signs, because tables hold text. Whatever a store's library raises leaves here as `OSError`.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import importlib
import io
import os
import re
import shutil
import stat as stat_bits
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar
from urllib.parse import quote, unquote_to_bytes

import fsspec
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.spec import AbstractFileSystem
from pyarrow import fs as arrow_fs
from pyarrow.lib import ArrowException

T = TypeVar("T")

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
# Stores whose fsspec implementation makes `pipe_file(mode="create")` one conditional request.
_CONDITIONAL_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
_S3_SCHEMES = frozenset({"s3", "s3a"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_CHUNK_BYTES = 4 << 20  # of one request
_BLOCKS = 16  # kept of an open file, because a demuxer alternates between distant places
_REQUESTS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Stat:
    """What tells whether a file must be read again; what a store does not say is None."""

    size_bytes: int | None
    mtime_ns: int | None
    etag: str | None = None


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object in a store rather than a local file."""
    return _scheme(uri) not in ("", "file", "local")


def local_path(uri: str) -> str:
    """The path to hand to `open` for a local `uri`: the same text, except for `file://` URIs."""
    if _scheme(uri) not in ("file", "local"):
        return uri
    return os.fsdecode(unquote_to_bytes(uri.split("://", 1)[1].removeprefix("localhost")))


def local_uri(path: str) -> str:
    """The text that stands for a local `path` in a table: itself where it is valid UTF-8."""
    if is_text(path):
        return path
    return "file://" + quote(os.fsencode(path))


def is_text(value: str) -> bool:
    """Whether `value` can be stored as UTF-8 (it has no lone surrogates)."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def absolute(uri: str) -> str:
    """The absolute form of a local `uri`, links not resolved; a remote one unchanged."""
    if is_remote(uri):
        return uri
    given = local_path(uri)
    if given == "~" or given.startswith("~/"):
        given = os.path.expanduser(given)
    path = os.path.abspath(given)
    if ".." in given.split("/") and os.path.realpath(path) != os.path.realpath(given):
        path = os.path.join(os.getcwd(), given)  # `link/..` is beside what the link points to
    return local_uri(path)


def join(root: str, *parts: str) -> str:
    """`root` and `parts` as one path or URI; locally as `os.path.join` does it."""
    if not is_remote(root):
        return local_uri(os.path.join(local_path(root), *parts))
    return "/".join([root.rstrip("/"), *(part.strip("/") for part in parts)])


def parent(uri: str) -> str:
    """The folder that holds `uri`."""
    if not is_remote(uri):
        return local_uri(os.path.dirname(local_path(uri)))
    start = uri.index("://") + 3
    return uri[:start] + uri[start:].rstrip("/").rpartition("/")[0]


def aws_environment() -> dict[str, str]:
    """The AWS variables set in this process, to be set in a worker by `os.environ.update`.

    Hand them over as an argument of the worker's constructor: Ray's job pages list a `runtime_env`.
    """
    return {name: os.environ[name] for name in AWS_VARIABLES if os.environ.get(name)}


def lance_options(uri: str) -> dict[str, str] | None:
    """Lance's `storage_options` for `uri` from the AWS variables; None where it needs none.

    Holds no credentials, which Lance reads from the environment itself.
    """
    if _scheme(uri) not in _S3_SCHEMES:
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


def stat(uri: str) -> Stat:
    """Size, time stamp and ETag of a file, read without opening it.

    Raises:
        FileNotFoundError: Nothing has this name, or it is a broken link.
        PermissionError: The store or folder does not let us look.
        IsADirectoryError: It is a folder.
        OSError: It is something that must not be opened (a pipe, a device), or the store failed.
    """
    if not is_remote(uri):
        try:
            found = os.stat(local_path(uri))
        except ValueError as e:  # a NUL in the name
            raise FileNotFoundError(errno.ENOENT, str(e), uri) from e
        if stat_bits.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
        if not stat_bits.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"is {special(found.st_mode)}, not a file", uri)
        return Stat(found.st_size, found.st_mtime_ns)
    info = _info(uri)
    if info["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
    return stat_of_info(info)


def kind(uri: str) -> Literal["file", "folder"] | None:
    """What has this name; None where nothing has, or a broken link.

    Pipes and devices count as files. In a store a folder is a name that another one continues.

    Raises:
        OSError: We may not look, or the store failed.
    """
    if not is_remote(uri):
        if "\0" in uri:
            return None
        try:
            mode = os.stat(local_path(uri)).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        return "folder" if stat_bits.S_ISDIR(mode) else "file"
    try:
        return "folder" if _info(uri)["type"] == "directory" else "file"
    except FileNotFoundError:
        return None


def names_in(folder: str) -> list[str]:
    """Names of what is directly in `folder`, sorted; none where there is no such folder."""
    try:
        if not is_remote(folder):
            return sorted(os.listdir(local_path(folder)))
        fs, path = store_of(folder)
        with as_os_errors(folder):
            found = fs.ls(path, detail=False)
    except FileNotFoundError:
        return []
    prefix = path.rstrip("/") + "/"
    names = {name.removeprefix(prefix).rstrip("/") for name in found if name.startswith(prefix)}
    return sorted(names - {""})  # a folder's marker is named like the folder


def make_folder(uri: str) -> None:
    """Makes a local folder and those above it; a store has no folders to make."""
    if not is_remote(uri):
        os.makedirs(local_path(uri), exist_ok=True)


def exists_many(uris: Sequence[str]) -> list[bool]:
    """For each URI False where it is known to be gone; what we may not look at counts as there."""

    def there(uri: str) -> bool:
        try:
            stat(uri)
        except FileNotFoundError:
            return False
        except (PermissionError, IsADirectoryError):
            return True
        return True

    return map_requests(there, uris)


def map_requests(function: Callable[[str], T], uris: Sequence[str]) -> list[T]:
    """`function` of each URI, in order; 32 at once where any is remote."""
    if not any(is_remote(uri) for uri in uris):
        return [function(uri) for uri in uris]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        return list(pool.map(function, uris))


def open_read(uri: str) -> BinaryIO:
    """A seekable binary file.

    Of a remote file it keeps 16 blocks of 4 MiB, so that a demuxer that alternates between two
    places asks for each once. An S3 object that was replaced since it was opened raises `OSError`.
    """
    if not is_remote(uri):
        return open(local_path(uri), "rb", buffering=1 << 20)
    fs, path = store_of(uri)
    with as_os_errors(uri):
        if isinstance(fs, ArrowFSWrapper):
            return io.BufferedReader(_Reader(fs.open(path, "rb"), uri), _CHUNK_BYTES)
        file = fs.open(
            path,
            "rb",
            block_size=_CHUNK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": _BLOCKS},
        )
    return io.BufferedReader(_Reader(file, uri), 1 << 18)


@contextmanager
def fetch(uri: str, max_bytes: int | None = None) -> Iterator[str]:
    """A local path with the content of `uri`: itself when local, else a temporary copy.

    Raises:
        ValueError: The remote file is larger than `max_bytes`.
    """
    if not is_remote(uri):
        yield local_path(uri)
        return
    size = stat(uri).size_bytes
    if max_bytes is not None and (size is None or size > max_bytes):
        raise ValueError(f"{uri}: at most {max_bytes} bytes are fetched, and it has {size}")
    with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
        path = os.path.join(folder, "file" + os.path.splitext(uri)[1])
        with open_read(uri) as remote, open(path, "wb") as copy:
            shutil.copyfileobj(remote, copy, _CHUNK_BYTES)
        yield path


def sha256(file: str | BinaryIO) -> str:
    """Hex SHA-256 of the content of a URI or of an open file from where it stands."""
    if isinstance(file, str):
        with open_read(file) as opened:
            return sha256(opened)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:count])
    return digest.hexdigest()


def read_bytes(uri: str) -> bytes:
    """The whole content of a small file."""
    if not is_remote(uri):
        return Path(local_path(uri)).read_bytes()
    fs, path = store_of(uri)
    with as_os_errors(uri):
        return fs.cat_file(path)


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a small file, replacing what is there; a reader sees the old content or the new."""
    if not is_remote(uri):
        with _written_beside(local_path(uri), data) as temporary:
            os.replace(temporary, local_path(uri))
        return
    fs, path = store_of(uri)
    with as_os_errors(uri):
        fs.pipe_file(path, data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Writes a small file unless the name is taken: of any number of racing writers one gets True.

    After a lost answer a store's client asks again and can be told False about its own success, so
    put something of the writer's own into `data` and read it back where that matters.

    Raises:
        ValueError: The store cannot do it in one request.
    """
    if not is_remote(uri):
        with _written_beside(local_path(uri), data) as temporary:
            try:
                os.link(temporary, local_path(uri))
            except FileExistsError:
                return False
        return True
    fs, path = store_of(uri)
    if _scheme(uri) not in _CONDITIONAL_PUT or isinstance(fs, ArrowFSWrapper):
        raise ValueError(
            f"{uri}: needs a store that writes a name only where it is absent; {type(fs).__name__}"
            f" has no such request: {_install_hint(uri)}"
        )
    for attempt in range(8):
        try:
            with as_os_errors(uri):
                fs.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as e:
            code = _s3_code(e)
            if code in ("PreconditionFailed", "412"):  # servers that do not name the condition
                return False
            if code not in ("ConditionalRequestConflict", "OperationAborted", "409"):
                raise
            # S3 could not decide, another request being under way, and wants to be asked again.
            time.sleep(0.05 * 2**attempt)
    raise OSError(errno.EBUSY, "the store could not decide in 8 tries who writes first", uri)


def delete(uri: str) -> bool:
    """Removes one file; False where there was none."""
    if not is_remote(uri):
        try:
            os.unlink(local_path(uri))
        except FileNotFoundError:
            return False
        return True
    try:
        stat(uri)
    except FileNotFoundError:
        return False
    fs, path = store_of(uri)
    with as_os_errors(uri):
        fs.rm_file(path)
    return True


class _Reader(io.RawIOBase):
    """A store's file for `io.BufferedReader`, with its library's errors turned into `OSError`."""

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


def _scheme(uri: str) -> str:
    found = _SCHEME.match(uri)
    return found[1].lower() if found else ""


def _aws_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def _aws_region() -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def store_of(uri: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec file system of a remote `uri` and its path there."""
    scheme = _scheme(uri)
    environment = tuple(aws_environment().items()) if scheme in _S3_SCHEMES else ()
    root = uri if scheme not in _S3_SCHEMES else scheme + "://"
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
                f"{root}: nothing installed here opens {scheme}:// : {_install_hint(root)}"
            ) from e
        del missing
        return ArrowFSWrapper(wrapped, skip_instance_cache=True)
    # A remembered listing would hide what another machine has just written.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in _S3_SCHEMES:
        options["endpoint_url"] = _aws_endpoint()
        if region := os.environ.get("AWS_REGION"):  # which botocore does not read
            options["client_kwargs"] = {"region_name": region}
    else:
        options |= cls._get_kwargs_from_urls(root)
    return cls(**options)


def _install_hint(uri: str) -> str:
    known = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
    known |= dict.fromkeys(("az", "abfs", "abfss"), "adlfs") | {"hf": "huggingface_hub"}
    if package := known.get(_scheme(uri)):
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


def _s3_code(error: OSError) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _info(uri: str) -> dict[str, Any]:
    fs, path = store_of(uri)
    with as_os_errors(uri):
        return fs.info(path)


def stat_of_info(info: dict[str, Any]) -> Stat:
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


def special(mode: int) -> str:
    """What a local path that is neither a file nor a folder is."""
    kinds = {
        stat_bits.S_IFIFO: "a named pipe",
        stat_bits.S_IFSOCK: "a socket",
        stat_bits.S_IFBLK: "a device",
        stat_bits.S_IFCHR: "a device",
    }
    return kinds.get(stat_bits.S_IFMT(mode), "something special")


@contextmanager
def _written_beside(path: str, data: bytes) -> Iterator[str]:
    """A temporary file in the folder of `path` with `data` on disk; gone afterwards."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    # Not mkstemp, whose files no other user may read.
    temporary = os.path.join(folder, f".reelwright-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        Path(temporary).unlink(missing_ok=True)
