"""One home for paths that may be local or in an object store (what fsspec or pyarrow open).

A local path is a plain absolute path; a file whose name is not valid UTF-8 is a `file://` URI with
percent signs, because tables hold text. Whatever a store's library raises leaves here as `OSError`.
What is outside the allowed roots (`engine.roots`) is neither opened nor changed: `NotAllowed`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat as stat_bits
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar
from urllib.parse import quote, unquote_to_bytes

from fsspec.implementations.arrow import ArrowFSWrapper

from engine import roots, stores
from engine.stores import Stat, as_os_errors, scheme_of, store_of
from engine.stores import aws_environment as aws_environment
from engine.stores import lance_options as lance_options
from engine.stores import take_environment as take_environment
from engine.stores import worker_environment as worker_environment

T = TypeVar("T")

# Stores whose fsspec implementation makes `pipe_file(mode="create")` one conditional request.
_CONDITIONAL_PUT = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"})
_CHUNK_BYTES = 4 << 20  # of one request
_BLOCKS = 16  # kept of an open file, because a demuxer alternates between distant places
_REQUESTS_AT_ONCE = 32


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object in a store rather than a local file."""
    return scheme_of(uri) not in ("", "file", "local")


def local_path(uri: str) -> str:
    """The path to hand to `open` for a local `uri`: the same text, except for `file://` URIs."""
    if scheme_of(uri) not in ("file", "local"):
        return uri
    return os.fsdecode(unquote_to_bytes(uri.split("://", 1)[1].removeprefix("localhost")))


def allowed_path(uri: str, *, to_change: bool = False) -> str:
    """`local_path` of what may be opened: all that opens a local file by name goes through here.

    A remote URI comes back as it is, when it may be opened.

    Args:
        uri: Of a file or folder.
        to_change: It is to be written or removed.

    Raises:
        NotAllowed: It is outside the allowed roots (`engine.roots`).
    """
    if is_remote(uri):
        roots.check_remote(uri)
        return uri
    path = local_path(uri)
    roots.check_local(path, to_change=to_change)
    return path


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


def stat(uri: str) -> Stat:
    """Size, time stamp and ETag of a file, read without opening it.

    Raises:
        FileNotFoundError: Nothing has this name, or it is a broken link.
        PermissionError: The store or folder does not let us look.
        IsADirectoryError: It is a folder.
        OSError: It is something that must not be opened (a pipe, a device), or the store failed.
    """
    if not is_remote(uri):
        path = allowed_path(uri)
        try:
            found = os.stat(path)
        except (NotADirectoryError, ValueError) as e:  # a file's name, or a NUL, in the path
            raise FileNotFoundError(errno.ENOENT, str(e), uri) from e
        if stat_bits.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
        if not stat_bits.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"is {special(found.st_mode)}, not a file", uri)
        return Stat(found.st_size, found.st_mtime_ns)
    info = stores.describe(uri)
    if info["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
    return stores.stat_of(info)


def kind(uri: str) -> Literal["file", "folder"] | None:
    """What has this name; None where nothing has, or a broken link.

    Pipes and devices count as files. In a store a folder is a name that another one continues.

    Raises:
        OSError: We may not look, or the store failed.
    """
    if not is_remote(uri):
        if "\0" in uri:
            return None
        path = allowed_path(uri)
        try:
            mode = os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        return "folder" if stat_bits.S_ISDIR(mode) else "file"
    try:
        return "folder" if stores.describe(uri)["type"] == "directory" else "file"
    except FileNotFoundError:
        return None


def names_in(folder: str) -> list[str]:
    """Names of what is directly in `folder`, sorted; none where there is no such folder."""
    try:
        if not is_remote(folder):
            return sorted(os.listdir(allowed_path(folder)))
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
    path = allowed_path(uri, to_change=True)
    if not is_remote(uri):
        os.makedirs(path, exist_ok=True)


def exists_many(uris: Sequence[str]) -> list[bool]:
    """For each URI False where it is known to be gone; what we may not look at counts as there.

    Raises:
        ConnectionError: A store does not answer.
    """

    def there(uri: str) -> bool:
        try:
            stat(uri)
        except FileNotFoundError:
            return False
        except (ConnectionError, TimeoutError):
            raise  # says nothing about this file
        except (OSError, ValueError):
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
        return open(allowed_path(uri), "rb", buffering=1 << 20)
    fs, path = store_of(uri)
    with as_os_errors(uri):
        if isinstance(fs, ArrowFSWrapper):
            return stores.buffered(fs.open(path, "rb"), uri, _CHUNK_BYTES)
        file = fs.open(
            path,
            "rb",
            block_size=_CHUNK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": _BLOCKS},
        )
    return stores.buffered(file, uri, 1 << 18)


@contextmanager
def fetch(uri: str, max_bytes: int | None = None) -> Iterator[str]:
    """A local path with the content of `uri`: itself when local, else a temporary copy.

    Raises:
        ValueError: The remote file is larger than `max_bytes`.
    """
    if not is_remote(uri):
        yield allowed_path(uri)
        return
    if max_bytes is not None:
        _refuse_larger(uri, stat(uri).size_bytes, max_bytes)
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


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """The same of a file on this machine that no table names, such as a copy or weights."""
    with open(path, "rb") as file:
        return sha256(file)


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """The whole content of a small file.

    Raises:
        ValueError: It is larger than `max_bytes`; no more than that is read.
    """
    if max_bytes is not None and scheme_of(uri) not in stores.S3_SCHEMES:
        _refuse_larger(uri, stat(uri).size_bytes, max_bytes)
    if not is_remote(uri):
        return Path(allowed_path(uri)).read_bytes()
    fs, path = store_of(uri)
    with as_os_errors(uri):
        if max_bytes is None or scheme_of(uri) not in stores.S3_SCHEMES:
            return fs.cat_file(path)
        try:  # one request for both questions: there may be a hundred thousand to ask about
            data = fs.cat_file(path, start=0, end=max_bytes + 1)
        except OSError as e:
            if stores.s3_code(e) in ("InvalidRange", "416"):
                return b""  # an empty object has no first byte
            raise
    if len(data) > max_bytes:
        _refuse_larger(uri, stat(uri).size_bytes, max_bytes)
    return data


def _refuse_larger(uri: str, size_bytes: int | None, max_bytes: int) -> None:
    if size_bytes is None or size_bytes > max_bytes:
        raise ValueError(f"{uri}: at most {max_bytes} bytes are read, and it has {size_bytes}")


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a small file, replacing what is there; a reader sees the old content or the new."""
    if not is_remote(uri):
        path = allowed_path(uri, to_change=True)
        with _written_beside(path, data) as temporary:
            os.replace(temporary, path)
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
        path = allowed_path(uri, to_change=True)
        with _written_beside(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
        return True
    fs, path = store_of(uri)
    if scheme_of(uri) not in _CONDITIONAL_PUT or isinstance(fs, ArrowFSWrapper):
        raise ValueError(
            f"{uri}: needs a store that writes a name only where it is absent; {type(fs).__name__}"
            f" has no such request: {stores.install_hint(uri)}"
        )
    for attempt in range(8):
        try:
            with as_os_errors(uri):
                fs.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as e:
            code = stores.s3_code(e)
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
            os.unlink(allowed_path(uri, to_change=True))
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


def delete_folder(uri: str) -> None:
    """Removes a folder with all below it, where there is one."""
    if not is_remote(uri):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(allowed_path(uri, to_change=True))
        return
    fs, path = store_of(uri)
    with contextlib.suppress(FileNotFoundError), as_os_errors(uri):
        fs.rm(path, recursive=True)


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
