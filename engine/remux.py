"""Clips copied out of a source as they are, from a key frame on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np

from engine.encode import BITEXACT, NO_EDITS, Cut, Span, clock_of, failure, writing
from engine.integrity import DamagedError, Media, VideoError
from engine.operator import Failed
from engine.segments import is_exact
from engine.video import Video, decode, metadata_of, open_video, shown_size

MIN_COPIED_FRAC = 0.5
"""Of a clip's length that a copy must keep: its caption tells of all of it."""
_MP4_CODECS = {"h264": "avc1", "hevc": "hvc1", "av1": "av01", "vp9": "vp09"}
"""Codecs that browsers play from an MP4, with the tags that they expect there."""


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """What is known of a packet without its bytes."""

    pts: int
    starts: bool
    """A decoder can start here, and nothing shown from here on refers to anything before it."""
    hidden: bool
    """An edit list cuts it away."""


def copied(
    media: Media, clips: Sequence[tuple[Span, str]], folder: str
) -> Iterator[tuple[Span, Cut | Failed]]:
    """Copies clips, each into the file that is named beside it."""
    try:
        with open_video(media) as video:
            marks = _marks(video, max(span.end_s for span, _ in clips))
    except (VideoError, Failed) as error:
        for span, _ in clips:
            yield span, failure(error)
        return
    for span, name in clips:
        try:
            with open_video(media) as video:
                wanted, ends = _inward(video, marks, span)
                path = _remuxed(video, wanted, ends, folder, name)
                start_s, end_s = (video.seconds(pts) for pts in (wanted[0].pts, ends))
            cut = _checked(path, start_s, end_s)
        except (VideoError, Failed) as error:
            yield span, failure(error)
        else:
            yield span, cut


def _marks(video: Video, until_s: float) -> list[_Mark]:
    """The packets up to some time and the group after it, in decoding order."""
    found: list[_Mark] = []
    seen: set[int] = set()
    keys_behind = 0
    for packet in video.container.demux(video.stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.pts in seen or packet.is_corrupt:
            raise Failed("NoTimes", "its packets have no times of their own: use --cut encode")
        seen.add(packet.pts)
        starts = packet.is_keyframe and is_exact(video, packet)
        found.append(_Mark(pts=packet.pts, starts=starts, hidden=packet.is_discard))
        keys_behind += starts and video.seconds(packet.pts) >= until_s
        if keys_behind > 1:  # frames shown before the first one may come behind it
            break
    return found


def _inward(video: Video, marks: Sequence[_Mark], span: Span) -> tuple[list[_Mark], int]:
    """The packets of the longest part of a clip that stands by itself, and when it ends."""
    seconds, base = video.seconds, video.stream.time_base
    assert base is not None
    begins, ends = (
        round((Fraction(at) + video.origin) / base) for at in (span.start_s, span.end_s)
    )
    first = next((i for i, m in enumerate(marks) if m.starts and begins <= m.pts < ends), None)
    if first is None:
        raise Failed(
            "NoKeyFrame",
            f"no key frame lies in {span.start_s:.2f}-{span.end_s:.2f} s, so nothing can be copied:"
            " use --cut encode",
        )
    start = marks[first].pts
    # What is shown before the key frame though it comes behind refers to what is not there.
    order = [m for m in marks[first:] if m.pts >= start]
    least_behind = np.minimum.accumulate([m.pts for m in reversed(order)])[::-1]
    last, highest = -1, start
    for i, mark in enumerate(order):
        if mark.pts >= ends or mark.hidden:
            break
        highest = max(highest, mark.pts)
        if i + 1 == len(order) or least_behind[i + 1] > highest:
            last = i
    if last + 1 < len(order):
        ends = min(ends, int(least_behind[last + 1]))
    kept_s, length_s = seconds(ends) - seconds(start), span.end_s - span.start_s
    if last < 0 or kept_s < MIN_COPIED_FRAC * length_s:
        raise Failed(
            "TooShort",
            f"only {max(kept_s, 0):.2f} of {length_s:.2f} s lie between usable key frames:"
            " use --cut encode",
        )
    return order[: last + 1], ends


def _remuxed(video: Video, wanted: Sequence[_Mark], ends: int, folder: str, name: str) -> str:
    """Writes packets into a file of their own, from time 0 on."""
    codec = video.stream.codec_context.codec.canonical_name
    mp4 = codec in _MP4_CODECS
    ending = "mp4" if mp4 else "webm" if codec == "vp8" else "mkv"
    path = os.path.join(folder, f"{name}.{ending}")
    options = BITEXACT | (NO_EDITS if mp4 else {})
    origin = wanted[0].pts
    shown = sorted(m.pts - origin for m in wanted)
    times = [*shown, max(ends - origin, shown[-1] + 1)]
    durations = dict(zip(shown, np.diff(times).tolist(), strict=True))
    # Decoding times anew: many containers have none, and frames need them to be in order.
    delay = max(at - (m.pts - origin) for at, m in zip(shown, wanted, strict=True))
    decoded = {m.pts: at - delay for at, m in zip(shown, wanted, strict=True)}
    video.container.seek(origin, stream=video.stream)
    with av.open(path, "w", format="matroska" if ending == "mkv" else ending, options=options) as o:
        try:
            stream: Any = o.add_stream_from_template(video.stream, opaque=True)
        except ValueError as error:
            raise Failed("NoContainer", f"{error}: use --cut encode") from error
        if mp4:
            stream.time_base = clock_of(video.stream.time_base)
            stream.codec_context.codec_tag = _MP4_CODECS[codec]
        started = False
        for packet in video.container.demux(video.stream):
            started = started or packet.pts == origin
            if not started or not packet.size or packet.pts not in decoded:
                continue
            dts = decoded.pop(packet.pts)
            packet.pts, packet.dts = packet.pts - origin, dts
            packet.duration = durations[packet.pts]
            packet.stream = stream
            with writing():
                o.mux_one(packet)
            if not decoded:
                break
    if decoded:
        os.unlink(path)
        raise DamagedError(f"{len(decoded)} packets were not found again: use --cut encode")
    return path


def _checked(path: str, start_s: float, end_s: float) -> Cut:
    """What a copied file holds, decoded; there is no file where it does not play."""
    num, size, is_good = 0, (0, 0), False
    try:
        with open_video(path) as video:
            for frame in decode(video):
                if not num:
                    rotation = metadata_of(video, frame.picture).rotation_deg
                    size = shown_size(video, rotation)
                num += 1
        is_good = num > 0
    finally:
        if not is_good:
            os.unlink(path)
    if not is_good:
        raise DamagedError("what was copied holds no frame: use --cut encode")
    return Cut(
        mode="copy",
        start_s=start_s,
        end_s=end_s,
        num_frames=num,
        width_px=size[0],
        height_px=size[1],
        size_bytes=os.path.getsize(path),
        path=path,
    )
