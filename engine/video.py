"""The one home of decoding: what a file is, its frames in order, and a few frames at random.

PyAV reads, because it alone tells a damaged file from one that ends. Nothing here takes a name for
a URL, opens what a file refers to, or passes a broken file off as a short one.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, BinaryIO, NamedTuple

import av
import av.error
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

Media = str | os.PathLike[str] | BinaryIO
"""A local path, never a URL, or a seekable binary file that the caller closes."""

MAX_PIXELS = 8192 * 8192
"""Largest coded frame that is decoded; 8K has half of it."""

# What may be detected: no playlists, image sequences, subtitles or devices.
_FORMATS = (
    "mov,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,gif,mxf,nut,ivf,h264,hevc,av1,obu,"
    "m4v,dv,rm,yuv4mpegpipe,vc1,wtv,mjpeg,apng"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}

_MOST_FPS = 480  # above, the clock of the container was taken for a rate

av.logging.set_level(None)  # what libav has to say comes back as an exception


class VideoError(ValueError):
    """A source whose content cannot be used: final until the file changes."""


class NotVideoError(VideoError):
    """No moving picture can be found in the file."""


class TruncatedError(VideoError):
    """The file ends before the video does."""


class DamagedError(VideoError):
    """A part of the video cannot be decoded."""


class TooLargeError(VideoError):
    """A frame has more pixels than are decoded."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a container and its first frame say about a video; None where they say nothing."""

    container: str
    codec: str
    pix_fmt: str
    coded_width_px: int
    coded_height_px: int
    width_px: int
    """As shown: turned upright, with square pixels."""
    height_px: int
    aspect_ratio: float
    """Shown width / shown height."""
    rotation_deg: int
    """Clockwise turn that a player applies: 0, 90, 180 or 270."""
    fps: float | None
    """Average frame rate."""
    duration_s: float | None
    num_frames: int | None
    """As the container claims: frames that an edit list hides are counted."""
    bit_depth: int
    full_range: bool
    """Luma spans 0 to 255 (8 bit), not 16 to 235."""
    has_audio: bool
    num_video_streams: int
    note: str | None = None
    """What was passed over."""


class Frame(NamedTuple):
    """A decoded frame and when it is shown."""

    pts: int
    time_s: float
    picture: VideoFrame


@dataclass
class Video:
    """An open file, at its first real video stream."""

    container: InputContainer
    stream: VideoStream
    size_bytes: int
    origin: Fraction
    """Seconds that players subtract from every time stamp."""
    family: str
    """`mov`, `matroska` or another container's first name."""
    frames_decoded: int = 0
    """Frames that came out of the decoder, wanted or not."""

    def seconds(self, pts: int) -> float:
        """When a time stamp is shown, from the start of the file."""
        scale, shift, unit = self._clock
        return (pts * scale - shift) / unit  # integers: rounded once, and fast

    @cached_property
    def _clock(self) -> tuple[int, int, int]:
        base, origin = self.stream.time_base, self.origin
        assert base is not None
        return (
            base.numerator * origin.denominator,
            origin.numerator * base.denominator,
            base.denominator * origin.denominator,
        )


@contextmanager
def open_video(media: Media, *, max_pixels: int = MAX_PIXELS) -> Iterator[Video]:
    """Opens a video, with one decoding thread and errors that are raised, not concealed.

    Raises:
        VideoError: What is wrong with the content.
        OSError: The file cannot be read.
    """
    target, size = _target(media)
    if not size:
        raise NotVideoError("empty file: it has 0 bytes")
    try:
        container = av.open(target, metadata_errors="replace", options=_OPTIONS)
    except av.error.FFmpegError as e:
        raise _not_video(media, size, e) from e
    with container:
        family = container.format.name.split(",")[0]
        if not container.streams.video:
            _check_size(media, size, family)
        stream = _first_video(container)
        context = stream.codec_context
        if context.width * context.height > max_pixels:
            raise TooLargeError(
                f"frames of {context.width}x{context.height} px:"
                f" at most {max_pixels} px are decoded"
            )
        # Concealed errors look like content; only "explode" makes slices that are lost raise.
        context.options = {"err_detect": "explode"}
        stream.thread_type = "NONE"
        context.thread_count = 1
        start = container.start_time
        origin = Fraction(start, av.time_base) if start is not None else Fraction(0)
        yield Video(container, stream, size, origin, family)


def probe(media: Media, *, max_pixels: int = MAX_PIXELS) -> Metadata:
    """What a file is, from its container and its first frame.

    Raises:
        VideoError: It is no video, or it is known to be broken without decoding it all.
        OSError: The file cannot be read.
    """
    with open_video(media, max_pixels=max_pixels) as video:
        check_complete(video, media)
        first = next(decode(video, max_pixels=max_pixels), None)
        if first is None:
            raise DamagedError("no frame could be decoded")
        return metadata_of(video, first.picture)


def decode(
    video: Video,
    *,
    start_pts: int | None = None,
    seek_ts: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Frame]:
    """Frames in the order in which they are shown, with strictly increasing times.

    Args:
        video: Just opened.
        start_pts: Time stamp of a key packet to start at; earlier frames are left out.
        seek_ts: Its decoding time stamp, to find it by.
        max_pixels: A frame that is larger than the header said raises, too.

    Raises:
        DamagedError: A packet cannot be decoded.
        TruncatedError: There are fewer packets than the index lists.
    """
    last_s, last_pts, count = None, None, 0
    try:
        for packet in _packets(video, start_pts, seek_ts):
            if packet.is_corrupt:
                raise TruncatedError(_at("truncated", last_s))
            for picture in packet.decode():
                video.frames_decoded += 1
                if picture.is_corrupt:
                    raise DamagedError(f"{_at('damaged', last_s)}: a frame is incomplete")
                if picture.width * picture.height > max_pixels:
                    raise TooLargeError(
                        f"a frame of {picture.width}x{picture.height} px:"
                        f" at most {max_pixels} px are decoded"
                    )
                pts = _pts(video, picture, last_pts, count)
                last_s, last_pts, count = video.seconds(pts), pts, count + 1
                if start_pts is None or pts >= start_pts:
                    yield Frame(pts, last_s, picture)
    except av.error.FFmpegError as e:
        if isinstance(e, OSError):
            raise
        raise DamagedError(f"{_at('damaged', last_s)}: {e.strerror}") from e


def check_complete(video: Video, media: Media) -> None:
    """Raises TruncatedError where the container shows, undecoded, that its end is missing."""
    if video.family == "mov":
        index = video.stream.index_entries
        listed = len(index)
        there = sum(entry.pos + entry.size <= video.size_bytes for entry in index)
        if there < listed:
            raise TruncatedError(f"truncated: {there} of {listed} frames are in the file")
    _check_size(media, video.size_bytes, video.family)


def _target(media: Media) -> tuple[Any, int]:
    """What libav is to open, and its size."""
    if isinstance(media, (str, os.PathLike)):
        path = os.fspath(media)
        with open(path, "rb") as file:  # raises what a person understands
            found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotVideoError("not a regular file")
        return "file:" + os.path.abspath(path), found.st_size
    size = media.seek(0, os.SEEK_END)
    media.seek(0)
    return media, size


def _read_at(media: Media, offset: int, count: int) -> bytes:
    if isinstance(media, (str, os.PathLike)):
        with open(media, "rb") as file:
            file.seek(offset)
            return file.read(count)
    media.seek(offset)
    return media.read(count)


def _not_video(media: Media, size: int, error: av.error.FFmpegError) -> Exception:
    """What a person calls a file that libav cannot open."""
    if isinstance(error, OSError) and not isinstance(error, ValueError):
        return OSError(error.errno, error.strerror)
    head = _read_at(media, 0, 64)
    for what, found in (
        ("index (moov)", head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")),
        ("Matroska header", head[:4] == b"\x1aE\xdf\xa3"),
        ("AVI header", head[:4] == b"RIFF" and head[8:12] == b"AVI "),
        ("FLV header", head[:3] == b"FLV"),
    ):
        if found:
            return TruncatedError(f"truncated or damaged: its {what} cannot be read")
    if head.startswith(b"version https://git-lfs"):
        return NotVideoError("not a video: a Git LFS pointer, the file itself was never fetched")
    try:
        text = head.decode("utf-8", errors="strict" if size <= 64 else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if text and all(c.isprintable() or c in "\r\n\t" for c in text) and len(text) > len(head) * 0.9:
        return NotVideoError(f"not a video: a text file that begins with {text[:24]!r}")
    return NotVideoError("not a video: no known container format")


def _first_video(container: InputContainer) -> VideoStream:
    real = [s for s in container.streams.video if not _is_cover(s)]
    if not real:
        audio = " (audio only)" if container.streams.audio else ""
        raise NotVideoError(f"no video stream{audio}")
    stream = real[0]
    if stream.codec_context is None:
        raise NotVideoError("no decoder for its video stream")
    return stream


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & (Disposition.attached_pic | Disposition.timed_thumbnails))


def _packets(video: Video, start_pts: int | None, seek_ts: int | None) -> Iterator[Packet[Any]]:
    """Packets from the start, or from a key packet on; the last one is empty and flushes."""
    if start_pts is None:
        yield from _from_start(video)
        return
    for seek in (True, False):  # a container without an index may land behind: then from the start
        video.container.seek(
            (start_pts if seek_ts is None else seek_ts) if seek else 0,
            stream=video.stream,
        )
        found = False
        for packet in video.container.demux(video.stream):
            found = found or (packet.is_keyframe and packet.pts == start_pts)
            if found:
                yield packet
        if found:
            return
    raise DamagedError(f"the key frame at {video.seconds(start_pts):.2f} s is gone")


def _from_start(video: Video) -> Iterator[Packet[Any]]:
    count, last_dts = 0, None
    for packet in video.container.demux(video.stream):
        if packet.size:
            count += 1
            last_dts = packet.dts
        elif video.family == "mov" and count < (listed := len(video.stream.index_entries)):
            at = "" if last_dts is None else f" after {video.seconds(last_dts):.2f} s"
            raise TruncatedError(f"truncated{at}: {count} of {listed} frames could be read")
        yield packet


def _pts(video: Video, picture: VideoFrame, last: int | None, count: int) -> int:
    """A frame's time stamp; guessed from its place where the container gives none, or one twice."""
    pts = picture.pts if picture.pts is not None else picture.dts
    if pts is not None and (last is None or pts > last):
        return pts
    rate = video.stream.average_rate or video.stream.guessed_rate or Fraction(25)
    assert video.stream.time_base is not None
    if pts is None:
        pts = round(count / rate / video.stream.time_base)
    return pts if last is None else max(pts, last + 1)


def _at(what: str, last_s: float | None) -> str:
    return f"{what} at the start" if last_s is None else f"{what} after {last_s:.2f} s"


def metadata_of(video: Video, first: VideoFrame) -> Metadata:
    """What an open video and its first frame say."""
    stream, container = video.stream, video.container
    context = stream.codec_context
    num_streams = sum(not _is_cover(s) for s in container.streams.video)
    rotation = round(-first.rotation / 90) * 90 % 360
    width, height = shown_size(video, rotation)
    duration = _claimed_duration(video)
    rate = stream.average_rate
    return Metadata(
        container=container.format.name,
        codec=context.codec.canonical_name,
        pix_fmt=first.format.name,
        coded_width_px=context.width,
        coded_height_px=context.height,
        width_px=width,
        height_px=height,
        aspect_ratio=width / height,
        rotation_deg=rotation,
        fps=float(rate) if rate and rate <= _MOST_FPS else None,
        duration_s=duration,
        num_frames=stream.frames or None,
        bit_depth=max(c.bits for c in first.format.components),
        full_range=is_full_range(first),
        has_audio=bool(container.streams.audio),
        num_video_streams=num_streams,
        note=f"{num_streams} video streams: the first was read" if num_streams > 1 else None,
    )


def shown_size(video: Video, rotation_deg: int) -> tuple[int, int]:
    """Width and height in px as shown: square pixels, upright."""
    context = video.stream.codec_context
    width, height = context.width, context.height
    sample = video.stream.sample_aspect_ratio or context.sample_aspect_ratio or Fraction(1)
    if not Fraction(1, 16) <= sample <= 16:
        sample = Fraction(1)  # what players do with nonsense
    if sample > 1:
        width = round(width * sample)
    elif sample < 1:
        height = round(height / sample)
    return (height, width) if rotation_deg % 180 else (width, height)


def is_full_range(picture: VideoFrame) -> bool:
    """Whether luma spans the whole of its bits."""
    name = picture.format.name
    return picture.color_range == 2 or name.startswith("yuvj") or picture.format.is_rgb


def _claimed_duration(video: Video) -> float | None:
    stream, container = video.stream, video.container
    if stream.duration and stream.duration > 0 and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and container.duration > 0:
        return container.duration / av.time_base
    return None


def _check_size(media: Media, size: int, family: str) -> None:
    """Whether the last box, segment or chunk that the container announces is all there."""
    if family == "mov":
        end = _end_of_boxes(media, size)
    elif family == "matroska":
        end = _end_of_segment(_read_at(media, 0, 4096))
    elif family == "avi" and size < 2**30:  # larger ones have several RIFF chunks
        end = 8 + struct.unpack("<I", _read_at(media, 4, 4))[0]
    else:
        end = 0
    if end > size:
        raise TruncatedError(f"truncated: the file has {size} of {end} bytes")


def _end_of_boxes(media: Media, size: int) -> int:
    """End of the last top-level box that holds media or its index."""
    if isinstance(media, (str, os.PathLike)):
        with open(media, "rb") as file:
            return _end_of_boxes(file, size)
    position, end = 0, 0
    while position + 8 <= size:
        media.seek(position)
        head = media.read(16)
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        if length < 8:
            break  # 0: up to the end of the file; else no box at all
        if kind in (b"moov", b"mdat", b"moof"):
            end = position + length
        position += length
    return end


def _end_of_segment(head: bytes) -> int:
    """End of a Matroska file's segment; 0 where a live recording left it open."""
    at = head.find(b"\x18\x53\x80\x67")
    if at < 0 or at + 5 > len(head) or not head[at + 4]:
        return 0
    length = 9 - head[at + 4].bit_length()
    value = int.from_bytes(head[at + 4 : at + 4 + length], "big") & ((1 << 7 * length) - 1)
    return 0 if value == (1 << 7 * length) - 1 else at + 4 + length + value
