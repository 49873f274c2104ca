"""Clips as files that a browser plays: cut out of their source, made H.264 where they must be.

What comes from a dataset is not trusted: a clip is named by its id, its source is the one that the
dataset lists, `engine.storage` opens it where that is allowed, files are decoded by a sandboxed
child under limits, and nothing is served that is not a video.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lance

from cluster.dashboard import lance_sql
from cluster.dashboard.lance_sql import quoted
from engine import storage
from engine.blobs import take_blobs
from engine.cut import Cut, Encoding, Span
from engine.cutter import CutUnit, place_of
from engine.operator import Failed
from engine.sandbox import Sandbox

ENCODING = Encoding(crf=23, preset="veryfast", max_side_px=1280)
"""For looking at, not for training."""
AS_IT_IS_BYTES = 64 * 2**20
"""A file up to this size is played whole, as it is."""
TIME_LIMIT_S = 300.0
MEMORY_LIMIT_BYTES = 4 * 2**30
_VERSION = 1
_EIGHT_BIT = frozenset({"yuv420p", "yuvj420p"})
_PLAYS = {
    "h264": _EIGHT_BIT,
    "vp8": _EIGHT_BIT | {"yuva420p"},
    "vp9": _EIGHT_BIT | {"yuva420p"},
    "av1": _EIGHT_BIT | {"yuv420p10le"},
}
"""Pixel formats that every usual browser shows, by codec."""
_ENDINGS = {"mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/mp4", "webm": "video/webm"}
_OURS = re.compile(r"[0-9a-f]{64}\.(mp4|webm)")
_SCRATCH = ".reelwright-"
_STALE_S = 3600.0
_CLIP = "clip_id source_id source_uri media start_s end_s start_frame num_frames codec".split()
_SOURCE = "uri codec pix_fmt num_frames size_bytes mtime_ns sha256".split()


class Unplayable(ValueError):
    """Why a clip cannot be played, in one line."""


@dataclass(frozen=True, kw_only=True)
class Playable:
    """Something that a browser plays."""

    data: bytes
    mime: str
    how: str
    """What was done for it, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What there is to play of a clip."""

    uri: str
    """A file; of what is in a table, the table."""
    read: Callable[[int], bytes] | None = None
    """Reads it out of the table, if it has at most so many bytes; of a file there is none."""
    span: Span
    codec: str
    plays: bool
    """A browser knows its codec and pixels: else it is made H.264, on request."""
    whole: bool
    """The clip is all of the file."""
    key: str
    """Of the content, the span and how it is encoded."""


def offer(root: str, clip_id: str) -> Offer:
    """What there is to play: the clip's own file where it was cut, else a span of its source.

    Raises:
        Unplayable: Neither is there.
    """
    clip = _row(root, "clips", _CLIP, f"clip_id = {quoted(clip_id)}")
    if clip is None:
        raise Unplayable(f"no clip has the id {clip_id!r}")
    if clip["media"] == "image":
        raise Unplayable("an image: its keyframe is all there is")
    source = _row(root, "sources", _SOURCE, f"source_id = {quoted(clip['source_id'] or '')}")
    return _of_cut(root, clip, source or {}) or _of_source(clip, source)


def _row(root: str, name: str, names: list[str], where: str) -> dict[str, Any] | None:
    table = lance_sql.newest(root, name)
    there = [n for n in names if n in table.schema.names]
    rows = table.scanner(columns=there, filter=where, with_row_id=True).to_table().to_pylist()
    return dict.fromkeys(names) | rows[0] if rows else None


def _of_cut(root: str, clip: Mapping[str, Any], source: Mapping[str, Any]) -> Offer | None:
    """The clip's own file, where it was cut and is still there."""
    if not lance_sql.has_rows(root, "cuts"):
        return None
    names = "mode start_s end_s num_frames size_bytes path".split()
    where = f"clip_id = {quoted(clip['clip_id'])} AND error_type IS NULL"
    cut = _row(root, "cuts", names, where)
    if cut is None:
        return None
    uri = place_of(root, cut["path"]) if cut["path"] else storage.join(root, "cuts.lance")
    if cut["path"] and not _is_there(uri):
        return None
    codec = "h264" if cut["mode"] == "encode" else clip["codec"] or ""
    pixels = "yuv420p" if cut["mode"] == "encode" else source.get("pix_fmt")
    length_s = cut["end_s"] - cut["start_s"]
    return Offer(
        uri=uri,
        read=None if cut["path"] else partial(_blob, lance_sql.newest(root, "cuts"), cut["_rowid"]),
        span=Span(clip_id=clip["clip_id"], start_s=0.0, end_s=length_s, start_frame=0,
                  num_frames=cut["num_frames"]),
        codec=codec,
        plays=pixels in _PLAYS.get(codec, ()),
        whole=True,
        key=key_of("cut", clip["clip_id"], cut["mode"], cut["size_bytes"], cut["num_frames"]),
    )  # fmt: skip


def _of_source(clip: Mapping[str, Any], source: Mapping[str, Any] | None) -> Offer:
    if source is None or source["uri"] != clip["source_uri"]:
        raise Unplayable(f"{clip['source_uri']} is no source that this dataset lists")
    uri = source["uri"]
    try:
        stat = storage.stat(uri)
    except FileNotFoundError:
        raise Unplayable(f"its source is no longer at {uri}") from None
    except OSError as error:
        raise Unplayable(f"{uri}: {error.strerror or error}") from error
    if source["size_bytes"] is not None and stat.size_bytes != source["size_bytes"]:
        raise Unplayable(f"{uri} has changed since it was read: curate it again")
    span = Span(**{name: clip[name] for name in ("clip_id", "start_s", "end_s")},
                start_frame=clip["start_frame"], num_frames=clip["num_frames"])  # fmt: skip
    content = source["sha256"] or f"{uri} {stat.size_bytes} {stat.mtime_ns} {stat.etag}"
    codec = source["codec"] or clip["codec"] or ""
    return Offer(
        uri=uri,
        span=span,
        codec=codec,
        plays=source["pix_fmt"] in _PLAYS.get(codec, ()),
        whole=span.start_frame == 0 and span.num_frames == source["num_frames"],
        key=key_of(content, span.start_s, span.end_s, span.start_frame, span.num_frames),
    )


def _is_there(uri: str) -> bool:
    try:
        return storage.kind(uri) == "file"
    except OSError:  # it may not be read: then its source may be
        return False


def key_of(*facts: object) -> str:
    """The name in the cache of what is made of something with these facts."""
    said = json.dumps([_VERSION, dataclasses.asdict(ENCODING), *facts])
    return hashlib.sha256(said.encode()).hexdigest()


def is_ready(offered: Offer, cache: str) -> bool:
    """Whether playing it takes no work that somebody should ask for."""
    return offered.plays or _cached(offered, cache) is not None


def play(offered: Offer, cache: str, cache_bytes: int) -> Playable:
    """The clip for a browser: as it is, from the cache, or made now.

    Safe to be called by several threads and processes: one file is made once in a process, appears
    whole or not at all, and the least recently played go where the cache is full.

    Raises:
        Unplayable: It cannot be had.
    """
    if found := _as_it_is(offered):
        return found
    if found := _cached(offered, cache):
        return found
    with _lock:
        future = _making.get(offered.key)
        if future is None:
            future = _workers.submit(_made, offered, cache, cache_bytes)
            _making[offered.key] = future
            future.add_done_callback(lambda _: _making.pop(offered.key))
    try:
        return future.result()
    except Failed as failure:
        raise Unplayable(failure.message) from failure
    except (OSError, ValueError) as error:  # a full disk, or too large a blob
        raise Unplayable(str(error).partition("\n")[0]) from error


def _as_it_is(offered: Offer) -> Playable | None:
    """A whole file that plays, if it is small."""
    ending = "mp4" if offered.read else storage.local_path(offered.uri).rsplit(".")[-1]
    mime = _ENDINGS.get(ending.lower())
    if not (offered.plays and offered.whole and mime):
        return None
    try:
        read = offered.read or partial(storage.read_bytes, offered.uri)
        data = read(AS_IT_IS_BYTES)
    except ValueError:  # larger
        return None
    except OSError as error:
        raise Unplayable(f"{offered.uri}: {error.strerror or error}") from error
    if data[4:8] == b"ftyp":
        return Playable(data=data, mime="video/mp4", how="the file as it is")
    if data[:4] == b"\x1aE\xdf\xa3":
        return Playable(data=data, mime="video/webm", how="the file as it is")
    return None


def _blob(table: lance.LanceDataset, row_id: int, max_bytes: int) -> bytes:
    (blob,) = take_blobs(table, "mp4", ids=[row_id])
    if blob is None or blob.size() > max_bytes:
        raise ValueError(f"a blob of at most {max_bytes} bytes is read")
    return blob.read()


def _cached(offered: Offer, cache: str) -> Playable | None:
    for ending in ("mp4", "webm"):
        path = Path(cache, f"{offered.key}.{ending}")
        try:
            data = path.read_bytes()
        except OSError:  # not there, or not to be read
            continue
        with contextlib.suppress(OSError):  # a cache that is not ours to change
            os.utime(path)  # the least recently played go first
        return Playable(data=data, mime=_ENDINGS[ending], how="made before")
    return None


# Made here

_lock = threading.Lock()
_making: dict[str, Future[Playable]] = {}
# A child dies with the thread that started it, and Streamlit's threads last as long as a page.
_workers = ThreadPoolExecutor(2, thread_name_prefix="playable")
_child = threading.local()


def _sandbox() -> Sandbox:
    if not hasattr(_child, "sandbox"):
        _child.sandbox = Sandbox(
            "engine.cutter:cut_files",
            time_limit_s=TIME_LIMIT_S,
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
        )
    return _child.sandbox


def _made(offered: Offer, cache: str, cache_bytes: int) -> Playable:
    os.makedirs(cache, exist_ok=True)
    _clear(cache)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH, dir=cache) as folder:
        unit = CutUnit(source_id="", source_uri=offered.uri, clips=(offered.span,))
        if offered.read:
            path = os.path.join(folder, "stored")
            Path(path).write_bytes(offered.read(2**31))
            unit = dataclasses.replace(unit, source_uri=path)
        made = _copy(unit, folder) if offered.plays else None
        how = "copied out of its source" if made else f"made H.264 of {offered.codec}"
        if offered.plays and not made:
            how = "encoded anew, to begin and end on its frames"
        if made is None:
            made = _sandbox().call((unit, folder, "encode", ENCODING))[offered.span.clip_id]
            if not isinstance(made, Cut):
                raise Failed(*made)
        ending = os.path.splitext(made.path)[1]
        if made.size_bytes > cache_bytes:
            raise Failed(
                "CacheTooSmall",
                f"it has {made.size_bytes / 1e6:.1f} MB and the cache may hold"
                f" {cache_bytes / 1e6:.1f} MB: start the dashboard with a larger --cache-gb",
            )
        data = Path(made.path).read_bytes()
        make_room(cache, cache_bytes - made.size_bytes)
        os.replace(made.path, os.path.join(cache, offered.key + ending))
    make_room(cache, cache_bytes)  # others may have added theirs meanwhile
    return Playable(data=data, mime=_ENDINGS[ending[1:]], how=how)


def _copy(unit: CutUnit, folder: str) -> Cut | None:
    """The clip copied packet by packet, where that gives exactly its frames."""
    (span,) = unit.clips
    cut = _sandbox().call((unit, folder, "copy", ENCODING))[span.clip_id]
    if not isinstance(cut, Cut):
        return None
    exact = cut.num_frames == span.num_frames and abs(cut.start_s - span.start_s) < 1e-3
    if exact and cut.path.endswith((".mp4", ".webm")):
        return cut
    os.unlink(cut.path)
    return None


def make_room(cache: str, num_bytes: int) -> None:
    """Removes the least recently played clips until the others have at most so many bytes."""
    found = []
    for entry in os.scandir(cache):
        if _OURS.fullmatch(entry.name):
            try:
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # another process was faster
            found.append((stat.st_mtime_ns, entry.path, stat.st_size))
    total = sum(size for *_, size in found)
    for _, path, size in sorted(found):
        if total <= num_bytes:
            return
        Path(path).unlink(missing_ok=True)
        total -= size


def _clear(cache: str) -> None:
    """Removes what a process that was killed has left."""
    for entry in os.scandir(cache):
        if entry.name.startswith(_SCRATCH):
            try:
                is_stale = time.time() - entry.stat().st_mtime > _STALE_S
            except FileNotFoundError:
                continue
            if is_stale:
                shutil.rmtree(entry.path, ignore_errors=True)
