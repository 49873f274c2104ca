"""Small videos with a known truth, written for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

REAL = Path(__file__).parents[1].parent / "shared" / "videos"


def real(name: str) -> str:
    """Path of a real clip; skips the test where the clips are not there."""
    path = REAL / name
    if not path.is_file():
        pytest.skip(f"needs the real clip {name}")
    return str(path)


def encode(
    path: Path,
    images: Iterable[np.ndarray],
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int | Fraction = 25,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    full_range: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    setup: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """Writes BGR or grey images, uint8 (H, W[, 3]), as one video stream.

    Args:
        path: Its ending chooses the container.
        images: Frames; a grey level is luma, full range.
        codec: Encoder of libav.
        pix_fmt: Coded pixel format.
        fps: Frame rate.
        pts: Time stamps in `time_base`, for variable frame rates.
        time_base: 1 / fps by default.
        full_range: Whether luma is coded 0 to 255.
        options: Of the encoder.
        container_options: Of the muxer.
        setup: Called with the stream before the first frame.
    """
    base = time_base or 1 / Fraction(fps)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = None
        for index, image in enumerate(images):
            if stream is None:
                stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = pix_fmt
                stream.time_base = stream.codec_context.time_base = base
                stream.codec_context.color_range = 2 if full_range else 1
                stream.codec_context.thread_count = 1
                setup(stream)
            frame = as_frame(image, pix_fmt, full_range)
            frame.pts = pts[index] if pts is not None else index
            frame.time_base = base
            container.mux(stream.encode(frame))
        assert stream is not None
        container.mux(stream.encode())
    return path


def as_frame(image: np.ndarray, pix_fmt: str = "yuv420p", full_range: bool = False) -> Any:
    """A frame of an image, converted by formula: BT.601, chroma by averaging."""
    if not pix_fmt.startswith("yuv"):
        bgr = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if image.ndim == 2 else image
        return av.VideoFrame.from_ndarray(bgr, "bgr24").reformat(format=pix_fmt)
    if image.ndim == 2:
        planes = [image.astype(np.float64), *(np.full(image.shape, 128.0) for _ in range(2))]
    else:
        blue, green, red = (image[..., i].astype(np.float64) for i in range(3))
        light = 0.299 * red + 0.587 * green + 0.114 * blue
        planes = [light, (blue - light) / 1.772 + 128, (red - light) / 1.402 + 128]
    frame = av.VideoFrame(image.shape[1], image.shape[0], pix_fmt)
    frame.color_range = 2 if full_range else 1
    depth = frame.format.components[0].bits
    top = (1 << depth) - 1
    for index, (plane, values) in enumerate(zip(frame.planes, planes, strict=True)):
        if full_range:
            coded = values * top / 255
        elif index == 0:
            coded = (16 + values * 219 / 255) * (1 << depth - 8)
        else:
            coded = (128 + (values - 128) * 224 / 255) * (1 << depth - 8)
        if (plane.height, plane.width) != coded.shape:
            coded = cv2.resize(coded, (plane.width, plane.height), interpolation=cv2.INTER_AREA)
        kind = np.uint8 if depth == 8 else np.dtype("<u2")
        lines = np.zeros((plane.height, plane.line_size // np.dtype(kind).itemsize), kind)
        lines[:, : plane.width] = np.clip(np.rint(coded), 0, top)
        plane.update(lines.tobytes())
    return frame


def texture(height: int, width: int, seed: int = 0, blur: float = 2.0) -> np.ndarray:
    """Random grey texture, uint8 (H, W), with detail of about `blur` px."""
    noise = np.random.default_rng(seed).normal(size=(height, width))
    smooth = cv2.GaussianBlur(noise, (0, 0), blur)
    return np.clip(128 + 45 * smooth / (smooth.std() or 1.0), 0, 255).astype(np.uint8)


def colourful(height: int, width: int, seed: int) -> np.ndarray:
    """Random colour texture, uint8 (H, W, 3)."""
    planes = [texture(height, width, 3 * seed + i, blur=4.0) for i in range(3)]
    tint = np.random.default_rng(seed).uniform(0.2, 1.0, 3)
    return np.clip(np.stack(planes, -1) * tint, 0, 255).astype(np.uint8)


def shots_of(lengths: Sequence[int], height: int = 90, width: int = 160) -> list[np.ndarray]:
    """Frames of shots with these lengths: each pans over a colour texture of its own."""
    frames = []
    for seed, length in enumerate(lengths):
        scene = colourful(height, width + 2 * max(lengths), seed)
        frames += [scene[:, 2 * i : 2 * i + width] for i in range(length)]
    return frames
