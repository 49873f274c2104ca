"""What is below a folder, local or in an object store, found without opening a file."""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine import storage, stores
from engine.storage import Stat


@dataclass(frozen=True, slots=True)
class Entry:
    """One name met while listing: a file with its `stat`, or `error` says what it is instead."""

    uri: str
    stat: Stat | None
    error: str | None = None
    folder: bool = False


def listing(
    root: str,
    closed: Callable[[str], bool] = lambda name: False,
    enter: Callable[[tuple[str, ...]], bool] = lambda parts: True,
) -> Iterator[Entry]:
    """Every file below the folder `root`, by name; opens none.

    Links are followed, but never into a folder that holds the link. Broken links, pipes and folders
    that cannot be read are entries with an error.

    Args:
        root: A folder, local or remote.
        closed: Given a folder's name, True makes it one entry with an error, not looked into.
        enter: Given a local folder's path below `root` in parts, False leaves it out.

    Raises:
        OSError: `root` itself cannot be read.
    """
    if storage.is_remote(root):
        return _remote_listing(root, closed)
    return _local_listing(storage.allowed_path(root), closed, enter)


def _local_listing(
    root: str, closed: Callable[[str], bool], enter: Callable[[tuple[str, ...]], bool]
) -> Iterator[Entry]:
    top = os.stat(root)
    open_folders = [(_scan(root), (), (top.st_dev, top.st_ino))]
    while open_folders:
        children, parts, _ = open_folders[-1]
        child = next(children, None)
        if child is None:
            open_folders.pop()
            continue
        name, path, found, error = child
        uri = storage.local_uri(path)
        if found is None:
            yield Entry(uri, None, error)
        elif not stat_bits.S_ISDIR(found.st_mode):
            if stat_bits.S_ISREG(found.st_mode):
                yield Entry(uri, Stat(found.st_size, found.st_mtime_ns))
            else:
                yield Entry(uri, None, f"is {storage.special(found.st_mode)}, not a file")
        elif closed(name):
            yield Entry(uri, None, "is a folder, not a file", folder=True)
        elif (inode := (found.st_dev, found.st_ino)) in [opened[2] for opened in open_folders]:
            continue  # a link to a folder that holds it: all of it is listed already
        elif enter(below := (*parts, name)):
            try:
                open_folders.append((_scan(path), below, inode))
            except OSError as e:
                yield Entry(uri, None, f"a folder that cannot be read ({e.strerror})", folder=True)


def _scan(folder: str) -> Iterator[tuple[str, str, os.stat_result | None, str | None]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            status, error = None, None
            try:
                status = entry.stat()
            except OSError as e:
                error = f"cannot be read ({e.strerror})"
                if entry.is_symlink() and e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    error = f"a broken link to {os.readlink(entry.path)!a}"
            # With the slash, siblings sort as their whole paths do: "a.mp4" before "a/b.mp4".
            slash = "/" if status and stat_bits.S_ISDIR(status.st_mode) else ""
            found.append((entry.name + slash, entry.name, entry.path, status, error))
    found.sort(key=lambda item: item[0])
    return (item[1:] for item in found)


def _remote_listing(root: str, closed: Callable[[str], bool]) -> Iterator[Entry]:
    fs, path = stores.store_of(root)
    with stores.as_os_errors(root):
        found = fs.find(path, detail=True)
    if not found and storage.kind(root) != "folder":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), root)
    prefix = path.rstrip("/") + "/"
    last_closed = ""
    for name in sorted(found):
        info = found[name]
        if info["type"] == "directory" or (name.endswith("/") and not info["size"]):
            continue  # stores keep a folder's marker as an empty object
        folders = name.removeprefix(prefix).split("/")[:-1]
        inside = next((i for i, folder in enumerate(folders) if closed(folder)), None)
        if inside is None:
            uri = f"{root.rstrip('/')}/{name.removeprefix(prefix)}"
            yield Entry(uri, stores.stat_of(info))
            continue
        uri = storage.join(root, *folders[: inside + 1])
        if uri != last_closed:
            yield Entry(uri, None, "is a folder, not a file", folder=True)
        last_closed = uri
