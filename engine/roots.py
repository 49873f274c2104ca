"""Where anything may be opened: below `REELWRIGHT_ALLOWED_ROOTS`, and never in some places.

A manifest, or a dataset that somebody else made, names files and objects that workers open with
rights of their own. `engine.storage` asks here before it opens, lists, writes or removes anything.
"""

from __future__ import annotations

import errno
import functools
import os
import posixpath
import re
import sysconfig
from collections.abc import Iterable
from typing import NamedTuple

VARIABLE = "REELWRIGHT_ALLOWED_ROOTS"
"""Folders and URI prefixes with commas, colons or white space between them; unset: no limit."""
STORES = frozenset("s3 s3a gs gcs az abfs abfss hdfs viewfs hf memory".split())
"""Schemes of object stores. Any other (http, ftp, zip, …) reaches what no store guards."""
_SYSTEM, _DATA = ("/dev", "/proc", "/sys"), "/dev/shm"
# a colon is one where a folder or a URI follows: else it is before a port
_BETWEEN = r"[,\s]+|:(?=/(?!/)|~|[A-Za-z][\w+.-]*://)"
_SAME = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}


class NotAllowed(PermissionError):
    """A path or URI that this program may not open, however its rights are set."""

    def __init__(self, why: str, uri: str):
        super().__init__(errno.EPERM, why, uri)

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"

    def __reduce__(self) -> tuple[type[NotAllowed], tuple[str, str]]:
        return type(self), (self.strerror, self.filename)


class _Roots(NamedTuple):
    local: tuple[str, ...]
    to_read: tuple[str, ...]
    """`local`, and VBench's package, which runs anyway: its prompts lie there."""
    remote: tuple[str, ...]
    shown: str


def check_local(path: str, *, to_change: bool = False) -> None:
    """Raises `NotAllowed` unless a local path may be opened; links are resolved first.

    Args:
        path: Of a file or folder.
        to_change: It is to be written or removed.

    Raises:
        ValueError: `REELWRIGHT_ALLOWED_ROOTS` itself is wrong.
    """
    if "\0" in path:
        return  # no file has such a name
    roots = _allowed()
    real = os.path.realpath(path) if roots else _real(path)
    for one in (os.path.abspath(path), real):
        if _is_below(one, _SYSTEM) and not _is_below(one, (_DATA,)):
            raise NotAllowed(f"is in {', '.join(_SYSTEM)}: nothing in there is opened", path)
    if roots is not None and not _is_below(real, roots.local if to_change else roots.to_read):
        raise NotAllowed(_outside(roots), path)


def check_remote(uri: str) -> None:
    """Raises `NotAllowed` unless an object or a folder of a store may be opened.

    Raises:
        ValueError: `REELWRIGHT_ALLOWED_ROOTS` itself is wrong.
    """
    scheme = uri.partition("://")[0].lower()
    if scheme not in STORES:
        known = ", ".join(sorted(STORES))
        raise NotAllowed(
            f"is of {scheme}://, and only local files and object stores ({known}) are opened: copy"
            " it to one",
            uri,
        )
    roots = _allowed()
    if roots is not None and not _is_below(_normal(uri), roots.remote):
        raise NotAllowed(_outside(roots), uri)


def _real(path: str) -> str:
    """`os.path.realpath`, for where there is no limit: where a folder leads is looked up once.

    To follow the links of all folders above a file costs more than to look at it.
    """
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path if os.path.isabs(path) else os.path.join(os.getcwd(), path))
    return os.path.normpath(os.path.join(_real_folder(folder), name))


@functools.lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def _allowed() -> _Roots | None:
    text = os.environ.get(VARIABLE, "").strip()
    return _read(text) if text else None


@functools.lru_cache(maxsize=8)
def _read(text: str) -> _Roots:
    local, remote = [], []
    named = [one for one in re.split(_BETWEEN, text) if one]
    for one in named:
        scheme = one.partition("://")[0].lower() if "://" in one else ""
        if scheme in STORES:
            remote.append(_normal(one))
        elif not scheme and os.path.isabs(path := os.path.expanduser(one)):
            local.append(os.path.realpath(path))
        else:
            raise ValueError(
                f"{VARIABLE}: needs absolute folders and URIs of object stores, found {one!a}:"
                " correct it"
            )
    vbench = os.path.join(os.path.realpath(sysconfig.get_path("purelib")), "vbench")
    return _Roots(tuple(local), (*local, vbench), tuple(remote), ", ".join(named))


def _normal(uri: str) -> str:
    """A URI for comparing: one spelling of its scheme, and no `..` that a client might resolve."""
    scheme, _, rest = uri.partition("://")
    scheme = scheme.lower()
    return f"{_SAME.get(scheme, scheme)}://{posixpath.normpath(rest.lstrip('/'))}"


def _is_below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def _outside(roots: _Roots) -> str:
    return f"is outside {VARIABLE} ({roots.shown}): move it there, or allow its folder"
