"""Where a long source can be cut into parts that decode exactly as the whole does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from av.packet import Packet
from av.video.frame import PictureType

from engine.video import Media, Metadata, Video, VideoError, decode, open_video

CONTAINERS = ("mov", "matroska")
CODECS = ("h264", "hevc", "vp8", "vp9", "av1")
_REFERENCE_RATE = 1280 * 720 * 30  # px/s
_SHORTEST_S, _LONGEST_S = 30.0, 600.0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a source: frames from `start_pts` until before `stop_pts`. By default, all."""

    index: int = 0
    start_pts: int | None = None
    """Time stamp of a key packet; None: from the first frame."""
    stop_pts: int | None = None
    """None: to the last frame."""
    seek_ts: int | None = None
    """Decoding time stamp of the key packet."""


def plan(
    media: Media, metadata: Metadata, segment_s: float, max_pixels: int
) -> tuple[Segment, ...]:
    """The parts of a source; one where it is short, or where a cut could change what is decoded."""
    length_s = _length(metadata, segment_s)
    if (
        metadata.container.split(",")[0] not in CONTAINERS
        or metadata.codec not in CODECS
        or metadata.duration_s is None
        or metadata.duration_s < 1.5 * length_s
    ):
        return (Segment(),)
    with open_video(media, max_pixels=max_pixels) as video:
        found = _key_packets(video, length_s)
    # Each in a file of its own: a decoder that has seen other frames proves nothing.
    splits = [key for key in found if gives_picture(media, key, max_pixels)]
    starts = [(None, None), *splits]
    stops = [*(pts for pts, _ in splits), None]
    return tuple(
        Segment(index=i, start_pts=pts, stop_pts=stop, seek_ts=seek)
        for i, ((pts, seek), stop) in enumerate(zip(starts, stops, strict=True))
    )


def _length(metadata: Metadata, segment_s: float) -> float:
    """Length of a part in s: shorter where a second has more pixels."""
    rate = min(metadata.fps or 30.0, 240.0)
    scale = _REFERENCE_RATE / (metadata.coded_width_px * metadata.coded_height_px * rate)
    low, high = (bound * segment_s / 300 for bound in (_SHORTEST_S, _LONGEST_S))
    return min(high, max(low, segment_s * scale))


def _key_packets(video: Video, length_s: float) -> list[tuple[int, int]]:
    """Times, shown and decoded, of the first clean key packet in each stretch of the source."""
    stream = video.stream
    assert stream.time_base is not None
    length, second = round(length_s / stream.time_base), round(1 / stream.time_base)
    seen: set[int] = set()
    found: list[tuple[int, int]] = []
    due: int | None = None
    latest: int | None = None
    for packet in video.container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_corrupt or packet.pts in seen:
            return []
        seen.add(packet.pts)
        if latest is not None and packet.pts < latest - second:
            return []  # the clock began anew: times depend on what came before
        due = packet.pts + length if due is None else due
        # Frames shown earlier must all come earlier, or right after it and be cut off there.
        if (
            packet.is_keyframe
            and packet.pts >= due
            and latest is not None
            and packet.pts > latest
            and is_exact(video, packet)
        ):
            # A file that has no decoding times is sought by those of showing.
            found.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            due = packet.pts + length
        latest = packet.pts if latest is None else max(latest, packet.pts)
    if found and latest is not None and latest - found[-1][0] < length // 2:
        found.pop()
    return found


def gives_picture(media: Media, key: tuple[int, int], max_pixels: int) -> bool:
    """Whether decoding from a key packet begins with its own frame, whole."""
    pts, seek_ts = key
    with open_video(media, max_pixels=max_pixels) as video:
        try:
            first = next(decode(video, start_pts=pts, seek_ts=seek_ts, max_pixels=max_pixels), None)
        except VideoError:
            return False
        return first is not None and first.pts == pts and first.picture.pict_type == PictureType.I


def is_exact(video: Video, packet: Packet[Any]) -> bool:
    """Whether nothing shown from this packet on refers to anything before it.

    In H.264 only an IDR picture is sure to be such a place: after the others of an open GOP a
    strict decoder misses the references that are listed, if never used.
    """
    if video.stream.codec_context.codec.canonical_name != "h264":
        return True
    return any(header & 31 == 5 for header in _unit_headers(video, bytes(packet)))


def _unit_headers(video: Video, data: bytes) -> list[int]:
    """First byte of each NAL unit of an H.264 packet, with lengths before them or start codes."""
    extradata = video.stream.codec_context.extradata or b""
    if len(extradata) < 7 or extradata[0] != 1:
        return [unit[0] for unit in data.split(b"\0\0\1")[1:] if unit]
    width = (extradata[4] & 3) + 1
    headers, at = [], 0
    while at + width < len(data):
        headers.append(data[at + width])
        at += width + int.from_bytes(data[at : at + width], "big")
    return headers
