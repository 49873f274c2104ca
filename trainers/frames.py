"""Frames of a sample's span as a model takes them: in number, in time, and cut to its bucket.

Shapes: F frames, H lines, W columns.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from engine import storage
from engine.image import decode_image
from engine.integrity import Media
from engine.picture import Upright
from engine.segments import CODECS, CONTAINERS, is_exact
from engine.video import (
    MAX_PIXELS,
    Frame,
    TruncatedError,
    Video,
    VideoError,
    decode,
    metadata_of,
    open_video,
)
from trainers.system import Bucket

VERSION = 1
"""Raised when other pixels come out for the same sample: cached features are then computed anew."""
LIBRARIES = ("av", "opencv-python", "pillow")
_SAME_S = 1e-6
_SEEK_FROM_S = 1.0
"""Spans that begin earlier are decoded from the start of the file."""
_SEEKS = 4
_PILLOW = threading.Lock()
"""The limits that `decode_image` sets are those of the whole process while it runs."""


def pixels_of(
    row: Mapping[str, Any], bucket: Bucket, fps: float, variant: int = 0, variants: int = 1
) -> np.ndarray:
    """The frames of a sample, upright with square pixels, resized to cover the bucket and cropped.

    Of a video `bucket.frames` frames are taken, 1 / `fps` apart, from the middle of its span; each
    is the one shown at its time. A single frame is the one in the middle of part `variant` of the
    span's `variants` equal parts. The same bits come out each time; only the span is decoded, from
    the key frame before it.

    Args:
        row: Of the manifest: `source_uri`, `media`, `start_s`, `end_s`.
        bucket: How many frames, and their size.
        fps: Frames taken from a second.
        variant: Which frame of a video, where it is a picture.
        variants: How many there are.

    Returns:
        RGB uint8 (F, H, W, 3).

    Raises:
        VideoError: The content cannot be used.
        OSError: The file cannot be read.
    """
    with _opened(row["source_uri"]) as media:
        if row["media"] == "image":
            with _PILLOW:
                rgb_HWC, _ = decode_image(media, max_pixels=MAX_PIXELS)
            return covered(rgb_HWC, bucket)[None]
        start_s, end_s = row["start_s"], row["end_s"]
        times_s = times_of(start_s, end_s, bucket.frames, fps, variant, variants)
        for from_start in (False, True):
            key = None if from_start else _key_before(media, max(start_s, times_s[0]))
            try:
                return _decoded(media, bucket, start_s, end_s, times_s, key)
            except VideoError:
                if key is None:
                    raise  # else it may be the seek that failed
    raise AssertionError("the second pass returns or raises")


def times_of(
    start_s: float, end_s: float, frames: int, fps: float, variant: int = 0, variants: int = 1
) -> list[float]:
    """When the frames that are taken from a span are shown, in s from the start of the file."""
    if frames == 1:
        return [start_s + (variant + 0.5) / variants * (end_s - start_s)]
    first_s = (start_s + end_s - (frames - 1) / fps) / 2
    return [first_s + index / fps for index in range(frames)]


def covered(image_HWC: np.ndarray, bucket: Bucket) -> np.ndarray:
    """A picture resized to cover the bucket's frame, and its middle cut out."""
    height, width = image_HWC.shape[:2]
    scale = max(bucket.height_px / height, bucket.width_px / width)
    tall = max(bucket.height_px, round(height * scale))
    wide = max(bucket.width_px, round(width * scale))
    if (tall, wide) != (height, width):
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image_HWC = cv2.resize(image_HWC, (wide, tall), interpolation=how)
    top, left = (tall - bucket.height_px) // 2, (wide - bucket.width_px) // 2
    return image_HWC[top : top + bucket.height_px, left : left + bucket.width_px]


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[Media]:
    """A source where it lies; of a remote one only what is needed is read."""
    if not storage.is_remote(uri):
        yield storage.allowed_path(uri)
        return
    with storage.open_read(uri) as file:
        yield file


def _decoded(
    media: Media,
    bucket: Bucket,
    start_s: float,
    end_s: float,
    times_s: Sequence[float],
    key: tuple[int, int] | None,
) -> np.ndarray:
    """The frames shown at these times, decoded from a key packet or from the start."""
    pixels_FHWC = np.empty((len(times_s), bucket.height_px, bucket.width_px, 3), np.uint8)
    pts, seek_ts = key or (None, None)
    upright: Upright | None = None
    last_pts, last_HWC = None, None
    with open_video(media) as video:
        frames = decode(video, start_pts=pts, seek_ts=seek_ts)
        for index, frame in enumerate(_shown(frames, times_s, start_s, end_s)):
            if frame.pts != last_pts:
                upright = upright or _upright(video, frame)
                bgr_HWC = covered(upright.bgr(frame.picture), bucket)
                last_pts, last_HWC = frame.pts, bgr_HWC[..., ::-1]
            pixels_FHWC[index] = last_HWC
    return pixels_FHWC


def _shown(
    frames: Iterator[Frame], times_s: Sequence[float], start_s: float, end_s: float
) -> Iterator[Frame]:
    """For each time the frame of the span that is shown then; the first or last one beyond it."""
    shown: Frame | None = None
    count = 0
    for frame in frames:
        if frame.time_s > end_s - _SAME_S:
            break
        if frame.time_s < start_s - _SAME_S:
            continue
        while shown and count < len(times_s) and frame.time_s > times_s[count] + _SAME_S:
            yield shown
            count += 1
        if count == len(times_s):
            return
        shown = frame
    if shown is None:
        raise TruncatedError(
            f"no frame from {start_s:.3f} to {end_s:.3f} s: the source has changed since it was"
            " read; curate it again"
        )
    for _ in range(count, len(times_s)):
        yield shown


def _upright(video: Video, frame: Frame) -> Upright:
    found = metadata_of(video, frame.picture)
    shown = (found.width_px, found.height_px)
    return Upright(shown, found.rotation_deg, min(shown))


def _key_before(media: Media, time_s: float) -> tuple[int, int] | None:
    """Time stamps, shown and decoded, of a key packet to decode from; None: from the start.

    All that is shown from `time_s` on decodes from there as in the whole file.
    """
    if time_s < _SEEK_FROM_S:
        return None
    with open_video(media) as video:
        stream, family = video.stream, video.family
        codec = stream.codec_context.codec.canonical_name
        if codec not in CODECS or family not in CONTAINERS or stream.time_base is None:
            return None
        target = int((time_s + float(video.origin)) / stream.time_base)
        sought = target
        for _ in range(_SEEKS):
            video.container.seek(sought, stream=stream)
            packet = next((p for p in video.container.demux(stream) if p.size), None)
            if packet is None or packet.pts is None or packet.dts is None:
                return None
            if packet.is_keyframe and packet.pts <= target and is_exact(video, packet):
                return packet.pts, packet.dts
            sought = min(sought, packet.dts) - 1
    return None
