"""A decoded frame as arrays: small luma, small colour, and an upright JPEG.

The luma and chroma planes are taken as they lie in the decoder's memory: a conversion by swscale
costs as much as decoding. Shapes: H, W are lines and columns.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace

from engine.video import is_full_range

cv2.setNumThreads(1)  # the pipeline runs one process a core

_SEMI_PLANAR = {"nv12": False, "nv16": False, "nv24": False, "nv21": True, "nv42": True}
_UNSPECIFIED = 2


def small_size(width: int, height: int, longer_side_px: int) -> tuple[int, int]:
    """Width and height scaled down so that the longer side has `longer_side_px`; never up."""
    longer = max(width, height)
    if longer <= longer_side_px:
        return width, height
    scale = longer_side_px / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


def luma(picture: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Full-range luma, uint8 (H, W), averaged down to `size` (width, height)."""
    depth = _plane_depth(picture.format.name)
    if not depth:
        return cv2.cvtColor(_converted(picture, size), cv2.COLOR_BGR2GRAY)
    small = _shrink(_plane(picture, 0, depth), size)
    if depth > 8:
        low, span = (0, (1 << depth) - 1) if is_full_range(picture) else _limited(depth)
        return cv2.convertScaleAbs(cv2.subtract(small, float(low)), alpha=255 / span)
    return small if is_full_range(picture) else cv2.LUT(small, _expand(219, 16))


def colour(picture: VideoFrame, luma_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """BGR, uint8 (H, W, 3) of `size`, from `luma` and the chroma planes.

    BT.601 whatever the source says: good for comparing neighbours, not for looking at.
    """
    name = picture.format.name
    depth = _plane_depth(name)
    if not depth:
        return _converted(picture, size)
    if name in _SEMI_PLANAR:
        pair = _shrink(_plane(picture, 1, 8, channels=2), size)
        blue, red = cv2.split(pair)[:: -1 if _SEMI_PLANAR[name] else 1]
    else:
        blue, red = (_shrink(_plane(picture, k, depth), size) for k in (1, 2))
    if depth > 8:
        blue, red = (cv2.convertScaleAbs(c, alpha=1 / (1 << depth - 8)) for c in (blue, red))
    planes = cv2.merge((_shrink(luma_HW, size), red, blue))
    if not is_full_range(picture):
        planes[..., 1:] = cv2.LUT(planes[..., 1:], _expand(224, 128, 128))
    return cv2.cvtColor(planes, cv2.COLOR_YCrCb2BGR)


def upright_jpeg(
    picture: VideoFrame, shown: tuple[int, int], rotation_deg: int, short_side_px: int, quality: int
) -> tuple[int, int, bytes]:
    """Width, height and JPEG of a frame as a player shows it.

    HDR is not tone-mapped: such frames look flat.

    Args:
        picture: As decoded.
        shown: Width and height of the video, upright with square pixels.
        rotation_deg: Clockwise turn that makes it upright.
        short_side_px: Of the JPEG, unless the video is smaller.
        quality: Of the JPEG, 1 to 100.
    """
    scale = min(1.0, short_side_px / min(shown))
    width, height = (max(1, round(side * scale)) for side in shown)
    turned = (height, width) if rotation_deg % 180 else (width, height)
    image = _converted(picture, turned)
    if rotation_deg:
        turn = {
            90: cv2.ROTATE_90_CLOCKWISE,
            180: cv2.ROTATE_180,
            270: cv2.ROTATE_90_COUNTERCLOCKWISE,
        }[rotation_deg]
        image = cv2.rotate(image, turn)
    done, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done, "imencode refused an 8-bit BGR image"
    return width, height, jpeg.tobytes()


def rgb(picture: VideoFrame, rotation_deg: int) -> np.ndarray:
    """Full-size RGB, uint8 (H, W, 3), upright, with pixels as coded."""
    image = _converted(picture, (picture.width, picture.height))[..., ::-1]
    return np.ascontiguousarray(np.rot90(image, -rotation_deg // 90))


@lru_cache(maxsize=64)
def _plane_depth(name: str) -> int:
    """Bits of the planes of a planar or semi-planar YUV format; 0 for what swscale must unpack."""
    if name in _SEMI_PLANAR:
        return 8
    family, _, bits = name.partition("p")
    if family.rstrip("0123456789") not in ("yuv", "yuvj", "yuva") or family in ("yuv", "yuva"):
        return 0
    if not bits:
        return 8
    depth = bits.removesuffix("le")
    return int(depth) if bits.endswith("le") and depth.isdigit() else 0


def _plane(picture: VideoFrame, index: int, depth: int, channels: int = 1) -> np.ndarray:
    """A view of a plane; lines are longer in memory than the picture is wide."""
    plane = picture.planes[index]
    dtype = np.uint8 if depth == 8 else np.dtype("<u2")
    lines = np.frombuffer(plane, dtype).reshape(plane.height, -1)
    view = lines[:, : plane.width * channels]
    return view.reshape(plane.height, plane.width, channels) if channels > 1 else view


def _shrink(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Averages down: exact halves first, for which OpenCV has fast code."""
    height, width = image.shape[:2]
    while width >= 2 * size[0] and height >= 2 * size[1] and not (width % 2 or height % 2):
        width, height = width // 2, height // 2
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if (width, height) == size:
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


@lru_cache(maxsize=8)
def _expand(span: int, low: int, zero: int = 0) -> np.ndarray:
    """Look-up table from limited to full range, 8 bit."""
    values = (np.arange(256) - low) * (255 / span) + zero
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _limited(depth: int) -> tuple[int, int]:
    return 16 << depth - 8, 219 << depth - 8


def _converted(picture: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """BGR, uint8 (H, W, 3), in the colours that a player shows."""
    space = picture.colorspace
    if space == _UNSPECIFIED:  # what players assume
        space = Colorspace.ITU709 if picture.height > 576 else Colorspace.ITU601
    converted = picture.reformat(
        *size,
        "bgr24",
        src_colorspace=space,
        interpolation="AREA" if size != (picture.width, picture.height) else "BICUBIC",
    )
    return converted.to_ndarray()
