"""The one home of decoding: what a file is, its frames in order, and a few frames at random.

PyAV reads, because it alone tells a damaged file from one that ends. Nothing here takes a name for
a URL, opens what a file refers to, or passes a broken file off as a short one.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import av
import av.error
import av.logging
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from engine.integrity import (
    DamagedError,
    Media,
    NotVideoError,
    TooLargeError,
    TruncatedError,
    VideoError,
    check_size,
    not_video,
)

__all__ = [
    "MAX_PIXELS",
    "DamagedError",
    "Frame",
    "Media",
    "Metadata",
    "NotVideoError",
    "TooLargeError",
    "TruncatedError",
    "Video",
    "VideoError",
    "check_complete",
    "decode",
    "metadata_of",
    "open_video",
    "probe",
]

MAX_PIXELS = 8192 * 8192
"""Largest coded frame that is decoded; 8K has half of it."""

# What may be detected: no playlists, image sequences, subtitles or devices.
_FORMATS = (
    "mov,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg,gif,mxf,nut,ivf,h264,hevc,av1,obu,"
    "m4v,dv,rm,yuv4mpegpipe,vc1,wtv"
)
_OPTIONS = {"format_whitelist": _FORMATS, "protocol_whitelist": "file"}

_CLOCK_JUMP_S = 1.0
"""No codec shows frames so much out of order: a clock that goes back this far began anew."""
_MOST_STREAMS = 16
_MOST_FPS = 480  # above, the clock of the container was taken for a rate

av.logging.set_level(None)  # what libav has to say comes back as an exception


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
    with ExitStack() as stack:
        target, size = _target(media, stack)
        if not size:
            raise NotVideoError("empty file: it has 0 bytes")
        try:
            container = _container(target, max_pixels)
        except av.error.FFmpegError as e:
            raise not_video(media, size, e) from e
        stack.enter_context(container)
        family = container.format.name.split(",")[0]
        if not container.streams.video:
            check_size(media, size, family)
        stream = _first_video(container)
        context = stream.codec_context
        if context.width * context.height > max_pixels:
            raise TooLargeError(_too_large(context.width, context.height, max_pixels))
        # Concealed errors look like content; only "explode" makes slices that are lost raise.
        context.options = {"err_detect": "explode", "max_pixels": str(max_pixels)}
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
    clock, last_s = _Clock(video), None
    try:
        for packet in _packets(video, start_pts, seek_ts):
            # In a transport stream it may be whole, the next one's counter being off.
            if packet.is_corrupt and video.family != "mpegts":
                raise TruncatedError(_at("truncated", last_s))
            for picture in packet.decode():
                video.frames_decoded += 1
                if picture.is_corrupt:
                    raise DamagedError(f"{_at('damaged', last_s)}: a frame is incomplete")
                if picture.width * picture.height > max_pixels:
                    raise TooLargeError(_too_large(picture.width, picture.height, max_pixels))
                pts = clock.next(picture)
                last_s = video.seconds(pts)
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
    check_size(media, video.size_bytes, video.family)


def _target(media: Media, stack: ExitStack) -> tuple[Any, int]:
    """What libav is to open, and its size."""
    if isinstance(media, (str, os.PathLike)):
        path = os.fspath(media)
        with open(path, "rb") as file:  # raises what a person understands
            found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotVideoError("not a regular file")
        path = os.path.abspath(path)
        if path.isprintable():
            return "file:" + path, found.st_size
        # A name that is no UTF-8 text; libav takes names as that.
        return stack.enter_context(open(path, "rb")), found.st_size
    size = media.seek(0, os.SEEK_END)
    media.seek(0)
    return media, size


def _container(target: Any, max_pixels: int) -> InputContainer:
    """Opens a container; it is told to decode nothing while it looks at its streams.

    Else libav decodes up to 20 frames, of any size, to learn how H.264 reorders them, which costs
    as much as half a second of video and is of no use here.
    """

    def opened(options: dict[str, str] | None) -> InputContainer:
        if hasattr(target, "seek"):
            target.seek(0)
        streams = None if options is None else [options] * _MOST_STREAMS
        return av.open(target, metadata_errors="replace", options=_OPTIONS, stream_options=streams)

    try:
        container = opened({"skip_frame": "all", "max_pixels": str(max_pixels)})
    except av.error.FFmpegError:
        raise
    except ValueError:  # streams are found later, and cannot be told anything now
        return opened(None)
    if all(s.codec_context and s.codec_context.width for s in container.streams.video):
        return container
    container.close()  # the limit took the size away; it is wanted for the message
    return opened({"skip_frame": "all"})


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
        elif packet.dts is not None:
            count += 1
            continue  # an empty sample: a decoder would take it for the end
        elif video.family == "mov" and count < (listed := len(video.stream.index_entries)):
            at = "" if last_dts is None else f" after {video.seconds(last_dts):.2f} s"
            raise TruncatedError(f"truncated{at}: {count} of {listed} frames could be read")
        yield packet


class _Clock:
    """Time stamps of frames, made to increase: broken clocks are common, and order is not in doubt.

    Joined recordings start their clock anew; some containers give no times, or one twice.
    """

    def __init__(self, video: Video):
        base = video.stream.time_base
        rate = video.stream.average_rate or video.stream.guessed_rate or Fraction(25)
        assert base is not None
        self._tick = max(1, round(1 / (rate * base)))
        self._jump = round(_CLOCK_JUMP_S / base)
        self._last: int | None = None
        self._offset = 0

    def next(self, picture: VideoFrame) -> int:
        """The time stamp of the next frame."""
        last = self._last
        pts = picture.pts if picture.pts is not None else picture.dts
        if pts is None:
            pts = 0 if last is None else last + self._tick
        else:
            pts += self._offset
        if last is not None and pts <= last:
            if last - pts > self._jump:
                self._offset += last + self._tick - pts
                pts = last + self._tick
            else:
                pts = last + 1
        self._last = pts
        return pts


def _too_large(width: int, height: int, max_pixels: int) -> str:
    return f"frames of {width}x{height} px: at most {max_pixels} px are decoded"


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
        coded_width_px=context.width or first.width,
        coded_height_px=context.height or first.height,
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
