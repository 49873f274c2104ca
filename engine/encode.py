"""Clips encoded anew, exact to the frame, as every browser and every trainer reads them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import av
import av.error
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from engine.integrity import Media, VideoError
from engine.operator import Failed
from engine.segments import CODECS, CONTAINERS, gives_picture, is_exact
from engine.video import (
    MAX_PIXELS,
    Frame,
    Video,
    decode,
    is_full_range,
    metadata_of,
    open_video,
)

Mode = Literal["copy", "encode"]
BITEXACT = {"fflags": "+bitexact"}  # no words that depend on the library's build
NO_EDITS = {"movflags": "+faststart+negative_cts_offsets", "use_editlist": "0"}
_GAP_S = 20.0
"""Decoding on to the next clip is cheaper than to look for a place to start, up to about this."""
_SAME_S = 1e-6
_FINEST = Fraction(1, 1_000_000)
"""A finer clock than this, in s, overflows the 32-bit fields of an MP4 within seconds."""
_UNSPECIFIED = 2
_SMPTE170M = 6


@dataclass(frozen=True, kw_only=True)
class Span:
    """A clip as its row describes it: the exact time and index of its first frame, and how many."""

    clip_id: str = ""
    start_s: float
    end_s: float
    start_frame: int
    num_frames: int


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How clips are encoded."""

    crf: int = 18
    """Of x264: smaller is better and larger; 18 is hardly told from the source."""
    preset: str = "fast"
    max_side_px: int | None = None
    """Longer sides are scaled down to this; None keeps the size."""


DEFAULT = Encoding()


class NotWritten(OSError):
    """The file for a clip could not be written: no source's fault."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A clip in a file of its own. Times are those of the source."""

    mode: Mode
    start_s: float
    end_s: float
    num_frames: int
    width_px: int
    height_px: int
    size_bytes: int
    path: str


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Tells errors of writing from those of reading."""
    try:
        yield
    except OSError as error:
        raise NotWritten(error.errno, error.strerror or str(error)) from error


def failure(error: VideoError | Failed) -> Failed:
    """What a clip's row records of an error."""
    return error if isinstance(error, Failed) else Failed(type(error).__name__, str(error))


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Clips to be cut in one go, and the key packet to decode from."""

    clips: list[tuple[Span, str]]
    start: tuple[int, int] | None = None
    """Its time stamps, shown and decoded; None: from the first frame."""


def _passes(media: Media, clips: Sequence[tuple[Span, str]]) -> Iterator[_Pass]:
    groups: list[list[tuple[Span, str]]] = []
    reached = 0.0
    for span, name in clips:
        if not groups or span.start_s - reached > _GAP_S:
            groups.append([])
        groups[-1].append((span, name))
        reached = max(reached, span.end_s)
    starts = _starts(media, [group[0][0].start_s for group in groups])
    for group, start in zip(groups, starts, strict=True):
        yield _Pass(clips=group, start=start)


def _starts(media: Media, times_s: Sequence[float]) -> list[tuple[int, int] | None]:
    """For each time the last key packet at or before it that decodes as the whole file does."""
    if not times_s or times_s[-1] < _GAP_S:
        return [None] * len(times_s)
    keys: list[tuple[int, int]] = []
    with open_video(media) as video:
        known = video.stream.codec_context.codec.canonical_name in CODECS
        if known and video.family in CONTAINERS:
            keys = _key_packets(video, times_s[-1])
        in_s = [video.seconds(pts) for pts, _ in keys]
    found: list[tuple[int, int] | None] = []
    for time_s in times_s:
        before = [key for key, at in zip(keys, in_s, strict=True) if at <= time_s]
        good = (key for key in reversed(before[-3:]) if gives_picture(media, key, MAX_PIXELS))
        found.append(next(good, None))
    return found


def _key_packets(video: Video, until_s: float) -> list[tuple[int, int]]:
    """Times, shown and decoded, of clean key packets; none where the clock is not to be trusted."""
    base = video.stream.time_base
    assert base is not None
    second, seen, latest = round(1 / base), set(), None
    found = []
    for packet in video.container.demux(video.stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_corrupt or packet.pts in seen:
            return []
        if latest is not None and packet.pts < latest - second:
            return []
        if packet.is_keyframe and (latest is None or packet.pts > latest):
            if video.seconds(packet.pts) > until_s:
                break
            if latest is not None and is_exact(video, packet):
                found.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        seen.add(packet.pts)
        latest = packet.pts if latest is None else max(latest, packet.pts)
    return found


def encoded(
    media: Media, clips: Sequence[tuple[Span, str]], folder: str, encoding: Encoding
) -> Iterator[tuple[Span, Cut | Failed]]:
    """Encodes clips, in order of their starts, each into the file that is named beside it."""
    for some in _passes(media, clips):
        yield from _in_one_pass(media, some, folder, encoding)


def _in_one_pass(
    media: Media, some: _Pass, folder: str, encoding: Encoding
) -> Iterator[tuple[Span, Cut | Failed]]:
    waiting, active = list(some.clips), list[_Encoder]()
    why: Failed | None = None
    try:
        with open_video(media) as video:
            pts, seek_ts = some.start or (None, None)
            for index, frame in enumerate(decode(video, start_pts=pts, seek_ts=seek_ts)):
                while waiting and _begins(frame, waiting[0][0]):
                    span, name = waiting.pop(0)
                    if _is_first(frame, span, None if some.start else index):
                        active.append(_Encoder(span, video, frame, folder, name, encoding))
                    else:
                        yield span, _changed(span)
                for encoder in list(active):
                    encoder.add(frame)
                    if encoder.is_full:
                        active.remove(encoder)
                        yield encoder.span, encoder.end()
                if not active and not waiting:
                    return
            why = Failed("TruncatedError", "the source ends before the clip does: curate it again")
    except VideoError as error:
        why = failure(error)
    finally:
        for encoder in active:
            encoder.abandon()
    for span in (*(e.span for e in active), *(span for span, _ in waiting)):
        yield span, why


def _begins(frame: Frame, span: Span) -> bool:
    return frame.time_s > span.start_s - _SAME_S


def _is_first(frame: Frame, span: Span, index: int | None) -> bool:
    there = abs(frame.time_s - span.start_s) <= _SAME_S
    return there and (index is None or index == span.start_frame)


def _changed(span: Span) -> Failed:
    return Failed(
        "SourceChanged",
        f"no frame {span.start_frame} at {span.start_s:.3f} s: the source has changed since it was"
        " read; curate it again",
    )


class _Encoder:
    """One clip on its way into a file."""

    def __init__(
        self, span: Span, video: Video, first: Frame, folder: str, name: str, encoding: Encoding
    ):
        self.span, self._first_pts, self._count = span, first.pts, 0
        self._path = os.path.join(folder, f"{name}.mp4")
        self._picture = _Browser(video, first.picture, encoding.max_side_px)
        source_base = video.stream.time_base
        assert source_base is not None
        self._source_base, self._base = source_base, clock_of(source_base)
        self._length = max(1, round((span.end_s - span.start_s) / self._base))
        with writing():
            self._container = av.open(self._path, "w", format="mp4", options=BITEXACT | NO_EDITS)
        rate = Fraction(span.num_frames / max(span.end_s - span.start_s, 1e-3))
        self._stream: Any = self._container.add_stream(
            "libx264",
            rate=rate.limit_denominator(1001),
            options={
                "crf": str(encoding.crf),
                "preset": encoding.preset,
                "profile": "high",
                "x264-params": "mbtree=0",  # its assembler rounds differently from run to run
            },
        )
        context = self._stream.codec_context
        self._stream.width, self._stream.height = self._picture.size
        self._stream.pix_fmt = "yuv420p"
        self._stream.time_base = context.time_base = self._base
        context.thread_count = 1  # one clip a core; and x264's slices depend on it
        context.color_range = ColorRange.MPEG
        context.colorspace = self._picture.space
        context.color_primaries, context.color_trc = self._picture.primaries, self._picture.transfer
        self._waiting: VideoFrame | None = None
        self._durations: dict[int, int] = {}

    @property
    def is_full(self) -> bool:
        return self._count == self.span.num_frames

    def add(self, frame: Frame) -> None:
        picture = self._picture(frame.picture)
        since_first = (frame.pts - self._first_pts) * self._source_base
        picture.pts, picture.time_base = round(since_first / self._base), self._base
        self._give(until=picture.pts)
        self._waiting = picture
        self._count += 1

    def _give(self, until: int) -> None:
        """Encodes the frame before, whose duration is known only now."""
        if self._waiting is not None:
            assert self._waiting.pts is not None
            self._durations[self._waiting.pts] = max(1, until - self._waiting.pts)
            self._mux(self._stream.encode(self._waiting))

    def _mux(self, packets: list[Packet[Any]]) -> None:
        for packet in packets:
            assert packet.pts is not None
            packet.duration = self._durations.pop(packet.pts)
            with writing():
                self._container.mux_one(packet)

    def end(self) -> Cut:
        self._give(until=self._length)
        self._mux(self._stream.encode(None))
        with writing():
            self._container.close()
        width, height = self._picture.size
        return Cut(
            mode="encode",
            start_s=self.span.start_s,
            end_s=self.span.end_s,
            num_frames=self._count,
            width_px=width,
            height_px=height,
            size_bytes=os.path.getsize(self._path),
            path=self._path,
        )

    def abandon(self) -> None:
        """Leaves no half file."""
        if os.path.exists(self._path):
            with contextlib.suppress(OSError):  # of a full disk, said already
                self._container.close()
            os.unlink(self._path)


def clock_of(source: Fraction) -> Fraction:
    """The clock of a clip whose source has this one."""
    return source if source.denominator <= _FINEST.denominator else _FINEST


class _Browser:
    """Makes frames that every browser shows alike: upright, square pixels, even, 8-bit 4:2:0."""

    def __init__(self, video: Video, first: VideoFrame, max_side_px: int | None):
        metadata = metadata_of(video, first)
        self._turns = metadata.rotation_deg // 90
        shown = (metadata.width_px, metadata.height_px)
        coded = (first.width, first.height)
        scale = min(1.0, (max_side_px or max(shown)) / max(shown))
        is_scaled = scale < 1 or shown not in (coded, coded[::-1])
        self.size = tuple(_even(side * scale, up=is_scaled) for side in shown)
        """Width and height in px, upright."""
        target = self.size if is_scaled or min(coded) < 2 else shown
        self._scaled = target[::-1] if self._turns % 2 else target
        self._reformatter = VideoReformatter()
        if first.format.is_rgb:
            self.space = self.primaries = self.transfer = int(Colorspace.ITU709)
        else:
            assumed = int(Colorspace.ITU709) if first.height > 576 else _SMPTE170M
            self.space = assumed if first.colorspace == _UNSPECIFIED else first.colorspace
            self.primaries, self.transfer = first.color_primaries, first.color_trc

    def __call__(self, picture: VideoFrame) -> VideoFrame:
        full = is_full_range(picture)
        if picture.format.name != "yuv420p" or full or self._is_other_size(picture):
            picture = self._reformatter.reformat(
                picture,
                *self._scaled,
                "yuv420p",
                src_colorspace=None if picture.format.is_rgb else self.space,
                dst_colorspace=self.space,
                src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation="BICUBIC",
            )
        width, height = self.size
        planes = []
        for plane, half in zip(picture.planes, (1, 2, 2), strict=True):
            lines = np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width]
            upright = np.rot90(lines, -self._turns)
            planes.append(upright[: height // half, : width // half].reshape(-1))
        # A frame of its own: types and side data of the decoder's must not reach the encoder.
        joined = np.concatenate(planes).reshape(height * 3 // 2, width)
        return VideoFrame.from_ndarray(joined, "yuv420p")

    def _is_other_size(self, picture: VideoFrame) -> bool:
        return (picture.width, picture.height) != self._scaled


def _even(side: float, *, up: bool) -> int:
    return max(2, 2 * round(side / 2) if up else 2 * int(side / 2))
