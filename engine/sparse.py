"""A few frames of a video, wherever they lie: by index or by time."""

from __future__ import annotations

import bisect
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from engine.picture import Upright
from engine.video import (
    Media,
    VideoError,
    decode,
    metadata_of,
    open_video,
)

Reader = Literal["pyav", "decord"]


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Frames that were read."""

    indices: tuple[int, ...]
    """Their places in the source."""
    times_s: tuple[float, ...]
    rgb: tuple[np.ndarray, ...]
    """Each uint8 (H, W, 3), full range, upright, with pixels as coded."""
    reader: Reader
    note: str | None
    """Why it was not the reader that was asked for."""


@dataclass(frozen=True)
class _Index:
    """What demuxing tells of every frame that is shown: time stamps, ascending, and key packets."""

    pts: list[int]
    times_s: list[float]
    keys: list[tuple[int, int]]


def read_frames(
    media: Media,
    *,
    indices: Sequence[int] | None = None,
    times_s: Sequence[float] | None = None,
    prefer: Reader = "pyav",
) -> Pictures:
    """Frames by index, or those shown at given times.

    Both readers give the same pixels, but decord takes every colour for BT.601. PyAV goes forward
    from key frame to key frame and needs no more CPU time than decord, so it comes first; the other
    one steps in where the first fails or does not count the same frames.

    Args:
        media: Local path, or a seekable binary file, which only PyAV reads.
        indices: Places in the order in which frames are shown; or else:
        times_s: Seconds from the start of the file; before the first frame, the first is meant.
        prefer: The reader that is tried first.

    Raises:
        IndexError: There is no such frame.
        VideoError: Neither reader gets the frames.
        OSError: The file cannot be read.
    """
    if (indices is None) == (times_s is None):
        raise TypeError("read_frames needs either indices or times_s")
    try:
        return _read(media, _demuxed(media), indices, times_s, prefer)
    except _Unseen:
        return _read(media, _decoded(media), indices, times_s, prefer)


class _Unseen(Exception):
    """A packet turned out to hold no picture of its own, as hidden frames of VP9 may."""


def _read(
    media: Media,
    index: _Index,
    indices: Sequence[int] | None,
    times_s: Sequence[float] | None,
    prefer: Reader,
) -> Pictures:
    if times_s is not None:
        indices = [max(0, bisect.bisect_right(index.times_s, t) - 1) for t in times_s]
    assert indices is not None
    wanted = [int(i) for i in indices]
    if wanted and not 0 <= min(wanted) <= max(wanted) < len(index.pts):
        raise IndexError(f"frames {min(wanted)} to {max(wanted)} asked for, of {len(index.pts)}")

    def result(reader: Reader, rgb: list[np.ndarray], note: str | None) -> Pictures:
        times = tuple(index.times_s[i] for i in wanted)
        return Pictures(
            indices=tuple(wanted), times_s=times, rgb=tuple(rgb), reader=reader, note=note
        )

    if prefer == "decord":
        try:
            return result("decord", _by_decord(media, index, wanted), None)
        except VideoError as why:
            return result("pyav", _by_pyav(media, index, wanted), f"not decord: {why}")
    try:
        return result("pyav", _by_pyav(media, index, wanted), None)
    except VideoError as why:
        try:
            return result("decord", _by_decord(media, index, wanted), f"not PyAV: {why}")
        except VideoError:
            raise why from None


def _decoded(media: Media) -> _Index:
    index = _demuxed(media)
    with open_video(media) as video:
        frames = [(frame.pts, frame.time_s) for frame in decode(video)]
    return _Index([pts for pts, _ in frames], [time_s for _, time_s in frames], index.keys)


def _demuxed(media: Media) -> _Index:
    with open_video(media) as video:
        shown, keys = [], []
        for packet in video.container.demux(video.stream):
            if not packet.size or packet.pts is None:
                continue
            if packet.is_keyframe:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if not packet.is_discard:
                shown.append(packet.pts)
        shown.sort()
        return _Index(shown, [video.seconds(pts) for pts in shown], sorted(keys))


def _by_pyav(media: Media, index: _Index, wanted: Sequence[int]) -> list[np.ndarray]:
    """Decodes forward from the key packet before each frame, each stretch once."""
    pts = [index.pts[i] for i in wanted]
    stretches: dict[int, set[int]] = {}
    for stamp in pts:
        key = bisect.bisect_right(index.keys, (stamp, float("inf"))) - 1
        stretches.setdefault(key, set()).add(stamp)
    found: dict[int, np.ndarray] = {}
    for key, stamps in sorted(stretches.items()):
        # Before the second key packet, from the start: the first may not be the first packet.
        start, seek = index.keys[key] if key > 0 else (None, None)
        found |= _stretch(media, start, seek, stamps)
    if any(stamp not in found for stamp in pts):
        raise _Unseen
    return [found[stamp] for stamp in pts]


def _stretch(
    media: Media, start_pts: int | None, seek_ts: int | None, stamps: set[int]
) -> dict[int, np.ndarray]:
    found: dict[int, np.ndarray] = {}
    upright: Upright | None = None
    with open_video(media) as video:
        for frame in decode(video, start_pts=start_pts, seek_ts=seek_ts):
            if frame.pts in stamps:
                if upright is None:
                    rotation = metadata_of(video, frame.picture).rotation_deg
                    size = (frame.picture.width, frame.picture.height)
                    shown = size[::-1] if rotation % 180 else size
                    upright = Upright(shown, rotation, min(size))
                found[frame.pts] = np.ascontiguousarray(upright.bgr(frame.picture)[..., ::-1])
            if len(found) == len(stamps):
                break
    return found


def _by_decord(media: Media, index: _Index, wanted: Sequence[int]) -> list[np.ndarray]:
    if not isinstance(media, (str, os.PathLike)):
        raise VideoError("decord reads local files only")
    try:
        decord: Any = importlib.import_module("decord")
    except ImportError as e:
        raise VideoError("decord is not installed") from e
    decord.logging.set_level(decord.logging.QUIET)
    path = os.path.abspath(os.fspath(media))
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        if len(reader) != len(index.pts):
            raise VideoError(f"decord counts {len(reader)} frames, PyAV {len(index.pts)}")
        return list(reader.get_batch(list(wanted)).asnumpy())
    except (decord.DECORDError, RuntimeError) as e:
        reason = str(e).strip().splitlines()[0].split("] ")[-1]
        raise VideoError(f"decord: {reason}") from e
