"""A decoded frame as arrays: small luma, small colour, and an upright JPEG.

The luma and chroma planes are taken as they lie in the decoder's memory: a conversion by swscale
costs as much as decoding. Shapes: H, W are lines and columns.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from engine.video import is_full_range

cv2.setNumThreads(1)  # the pipeline runs one process a core

_SEMI_PLANAR = {"nv12": False, "nv16": False, "nv24": False, "nv21": True, "nv42": True}
_UNSPECIFIED = 2
_TURNS = {
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}
_WORD = np.dtype("<u2")


def small_size(width: int, height: int, longer_side_px: int) -> tuple[int, int]:
    """Width and height scaled down so that the longer side has `longer_side_px`; never up."""
    longer = max(width, height)
    if longer <= longer_side_px:
        return width, height
    scale = longer_side_px / longer
    return max(1, round(width * scale)), max(1, round(height * scale))


class Shrinker:
    """Makes small pictures of the frames of one source, in buffers that it keeps.

    Fresh memory for every step would cost as much as the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int, int], np.ndarray] = {}
        self._converter = Converter()

    def luma(
        self, picture: VideoFrame, size: tuple[int, int], out: np.ndarray | None = None
    ) -> np.ndarray:
        """Full-range luma, uint8 (H, W), averaged down to `size` (width, height), into `out`."""
        depth = _plane_depth(picture.format.name)
        if not depth:
            return cv2.cvtColor(self._converter.bgr(picture, size), cv2.COLOR_BGR2GRAY, out)
        full = is_full_range(picture)
        if depth == 8 and full:
            return self._shrink(_plane(picture.planes[0], 8), size, "y", out)
        small = self._shrink(_plane(picture.planes[0], depth), size, "y")
        low, span = (0, (1 << depth) - 1) if full else (16 << depth - 8, 219 << depth - 8)
        if low:
            small = cv2.subtract(small, float(low), self._buffer("y-", size, small.dtype))
        return cv2.convertScaleAbs(small, out, 255 / span)

    def colour(self, picture: VideoFrame, luma_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """BGR, uint8 (H, W, 3) of `size`, from `luma` and the chroma planes.

        BT.601 whatever the source says: good for comparing neighbours, not for looking at.
        """
        name = picture.format.name
        depth = _plane_depth(name)
        if not depth:
            return self._converter.bgr(picture, size)
        planes = picture.planes
        if name in _SEMI_PLANAR:
            pair = self._shrink(_plane(planes[1], 8, channels=2), size, "uv")
            blue, red = cv2.split(pair)[:: -1 if _SEMI_PLANAR[name] else 1]
        else:
            blue = self._shrink(_plane(planes[1], depth), size, "u")
            red = self._shrink(_plane(planes[2], depth), size, "v")
        # Limited range spans 224 of 255 levels around the middle.
        span = 255 / (255 if is_full_range(picture) else 224)
        scale, shift = span / (1 << depth - 8), 128 * (1 - span)
        if scale != 1:
            blue = cv2.convertScaleAbs(blue, self._buffer("b", size), scale, shift)
            red = cv2.convertScaleAbs(red, self._buffer("r", size), scale, shift)
        merged = self._buffer("ycc", (size[0], 3 * size[1])).reshape(size[1], size[0], 3)
        cv2.merge((self._shrink(luma_HW, size, "l"), red, blue), merged)
        return cv2.cvtColor(merged, cv2.COLOR_YCrCb2BGR)

    def _shrink(
        self, image: np.ndarray, size: tuple[int, int], role: str, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Averages down by halves, then interpolates.

        OpenCV has fast code for both, and none for averaging by any other factor. Halves of an odd
        side are interpolated, which is as good as exact.
        """
        height, width = image.shape[:2]
        single = image.ndim == 2
        while width >= 2 * size[0] and height >= 2 * size[1]:
            exact = not (width % 2 or height % 2)
            width, height = width // 2, height // 2
            target = out if (width, height) == size else None
            if target is None and single:
                target = self._buffer(role, (width, height), image.dtype)
            how = cv2.INTER_AREA if exact else cv2.INTER_LINEAR
            image = cv2.resize(image, (width, height), target, interpolation=how)
        if (width, height) != size:
            # Where one side shrinks by more than two, as in odd shapes, only averaging is right.
            far = width > 2 * size[0] or height > 2 * size[1]
            how = cv2.INTER_AREA if far else cv2.INTER_LINEAR
            return cv2.resize(image, size, out, interpolation=how)
        if out is None or image is out:
            return image
        out[...] = image
        return out

    def _buffer(
        self, role: str, size: tuple[int, int], dtype: np.typing.DTypeLike = np.uint8
    ) -> np.ndarray:
        key = (role, *size)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.dtype != dtype:
            buffer = self._buffers[key] = np.empty((size[1], size[0]), dtype)
        return buffer


class Upright:
    """Shows frames as a player does: upright, with square pixels, in the colours meant.

    HDR is not tone-mapped: such frames look flat.

    Args:
        shown: Width and height of the video, upright with square pixels.
        rotation_deg: Clockwise turn that makes it upright.
        short_side_px: Of the result, unless the video is smaller.
        quality: Of JPEGs, 1 to 100.
    """

    def __init__(
        self, shown: tuple[int, int], rotation_deg: int, short_side_px: int, quality: int = 90
    ):
        scale = min(1.0, short_side_px / min(shown))
        self.width_px, self.height_px = (max(1, round(side * scale)) for side in shown)
        self._rotation_deg, self._quality = rotation_deg, quality
        self._converter = Converter()

    def bgr(self, picture: VideoFrame) -> np.ndarray:
        """Full-range BGR, uint8 (H, W, 3)."""
        size = (self.width_px, self.height_px)
        turned = size[::-1] if self._rotation_deg % 180 else size
        image = self._converter.bgr(picture, turned)
        return cv2.rotate(image, _TURNS[self._rotation_deg]) if self._rotation_deg else image

    def jpeg(self, picture: VideoFrame) -> bytes:
        """A JPEG file."""
        quality = [cv2.IMWRITE_JPEG_QUALITY, self._quality]
        done, data = cv2.imencode(".jpg", self.bgr(picture), quality)
        assert done, "imencode refused an 8-bit BGR image"
        return data.tobytes()


class Converter:
    """Converts the frames of one source to BGR, with swscale's tables made once."""

    def __init__(self) -> None:
        self._scaler, self._painter = VideoReformatter(), VideoReformatter()

    def bgr(self, picture: VideoFrame, size: tuple[int, int]) -> np.ndarray:
        """Full-range BGR, uint8 (H, W, 3), of `size` (width, height), not turned."""
        space = picture.colorspace
        if space == _UNSPECIFIED:  # what players assume
            space = Colorspace.ITU709 if picture.height > 576 else Colorspace.ITU601
        span = ColorRange.JPEG if is_full_range(picture) else ColorRange.MPEG
        if size != (picture.width, picture.height) and _plane_depth(picture.format.name):
            # JPEG halves chroma anyway; scaling in YUV takes half the time.
            picture = self._scaler.reformat(
                picture,
                *size,
                "yuv420p",
                src_color_range=span,
                dst_color_range=span,
                interpolation="BILINEAR",
            )
        converted = self._painter.reformat(
            picture,
            *size,
            "bgr24",
            src_colorspace=space,
            src_color_range=span,
            dst_color_range=ColorRange.JPEG,
            interpolation="BILINEAR",
        )
        return converted.to_ndarray()


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


def _plane(plane: VideoPlane, depth: int, channels: int = 1) -> np.ndarray:
    """A view of a plane; lines are longer in memory than the picture is wide."""
    height, width = plane.height, plane.width
    lines = np.frombuffer(plane, np.uint8 if depth == 8 else _WORD).reshape(height, -1)
    view = lines[:, : width * channels]
    return view.reshape(height, width, channels) if channels > 1 else view


def rgb_of(jpeg: bytes) -> np.ndarray:
    """A JPEG's picture, RGB uint8 (H, W, 3).

    Raises:
        ValueError: It is no picture that can be decoded.
    """
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) if jpeg else None
    if image is None:
        raise ValueError(f"a keyframe of {len(jpeg)} bytes cannot be decoded")
    return image
