"""A still picture as a source: one clip without frames, time or motion, and one keyframe.

Pillow reads: it tells the size before it allocates anything, and a truncated file from a whole one.
What is then measured is measured by the code that measures frames, on the same small luma picture.

Transparent parts are shown on white, as a page shows them. ICC profiles are not applied. Damage in
the middle of a JPEG that leaves its length alone cannot be told from content.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np
import pyarrow as pa
from av.video.frame import VideoFrame
from PIL import Image, UnidentifiedImageError

from engine.assemble import KEYFRAMES
from engine.integrity import DamagedError, Media, TooLargeError, TruncatedError, VideoError
from engine.picture import Shrinker, Upright, small_size
from engine.signals import LONGER_SIDE_PX, frames_table

if TYPE_CHECKING:
    from engine.scan import Scan

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")
_SEVERAL_JPEGS = "MPO"  # in one file, as phones write them: the first is the photograph
MAX_SIDE_PX = 65_500
"""No JPEG, which keyframes are, has longer sides."""
_MOST_BYTES_PER_PX = 8  # four channels of 16 bits
_SPARE_BYTES = 64 * 2**20  # profiles, previews, metadata
_HEAD_BYTES = 512
_ORIENTATION = 0x0112
_TURNS = {1: 0, 2: 0, 3: 180, 4: 180, 5: 270, 6: 90, 7: 90, 8: 270}
"""Clockwise degrees for each EXIF orientation, after mirroring those in `_MIRRORED`."""
_MIRRORED = (2, 4, 5, 7)
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_NO_WHITE = ("I", "F", "LAB", "HSV")
_MALFORMED = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError,
    AttributeError, ArithmeticError, NotImplementedError, RuntimeError,
)  # fmt: skip
"""What Pillow raises on bytes that lie; it never touches the file itself here."""


class NotImageError(VideoError):
    """No still picture can be found in the file."""


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """What is known of an image; the names are those of columns of `sources`."""

    codec: str
    width_px: int
    """As shown: turned upright."""
    height_px: int
    aspect_ratio: float
    rotation_deg: int
    """Clockwise turn that its EXIF data asks for, after mirroring."""
    note: str | None = None
    """What was passed over, or put in its place."""


def is_image(media: Media) -> bool:
    """Whether a file begins as a still picture does, also one of a kind that is not read here."""
    with _opened(media) as file:
        head = file.read(_HEAD_BYTES)
    return _image_kind(head) is not None


def scan_image(media: Media | bytes, scan: Scan) -> tuple[ImageMetadata, pa.Table, pa.Table]:
    """Metadata, the one clip and the one keyframe of an image.

    Args:
        media: Local path, a seekable binary file, or the bytes themselves.
        scan: What to measure; what takes more than one frame to measure is null.

    Returns:
        The metadata; one row with the columns of `scan.writes`, null where they speak of frames or
        time; one keyframe with those of `engine.assemble.KEYFRAMES`, its frame and time 0.

    Raises:
        VideoError: The content cannot be used.
        OSError: The file cannot be read.
    """
    rgb_HWC, metadata = decode_image(media, max_pixels=scan.max_pixels)
    size = (metadata.width_px, metadata.height_px)
    row = {
        "width_px": metadata.width_px,
        "height_px": metadata.height_px,
        "aspect_ratio": metadata.aspect_ratio,
        "codec": metadata.codec,
    }
    frame = frames_table([0], [0.0], [True], _small_luma(rgb_HWC))
    for signal in scan.signals:
        if "image" in signal.media:
            name = signal.writes.names[0]
            row[name] = signal.load()(frame)[name][0].as_py()
    look = Upright(size, 0, scan.keyframe_short_side_px, scan.jpeg_quality)
    keyframe = {
        "clip": 0,
        "frame": 0,
        "time_s": 0.0,
        "width_px": look.width_px,
        "height_px": look.height_px,
        "jpeg": look.jpeg(VideoFrame.from_ndarray(rgb_HWC, format="rgb24")),
    }
    return (
        metadata,
        pa.Table.from_pylist([row], schema=scan.writes),
        pa.Table.from_pylist([keyframe], schema=KEYFRAMES),
    )


def decode_image(media: Media | bytes, *, max_pixels: int) -> tuple[np.ndarray, ImageMetadata]:
    """An image as it is shown, RGB uint8 (H, W, 3), upright.

    Args:
        media: Local path, a seekable binary file, or the bytes themselves.
        max_pixels: A header that announces more is refused before anything is allocated.

    Raises:
        VideoError: The content cannot be used.
        OSError: The file cannot be read.
    """
    data = media if isinstance(media, bytes) else _bytes_of(media, max_pixels)
    if not data:
        raise NotImageError("empty file: it has 0 bytes")
    image, note = _loaded(data, max_pixels)
    orientation, unread = _orientation(image)
    rgb_HWC, transparent = _rgb(image)
    turn = _TURNS[orientation]
    if orientation in _MIRRORED:
        rgb_HWC = rgb_HWC[:, ::-1]
    rgb_HWC = np.ascontiguousarray(np.rot90(rgb_HWC, k=-turn // 90))
    height, width = rgb_HWC.shape[:2]
    notes = [
        note,
        unread and "its EXIF data cannot be read: taken as upright",
        transparent and "its transparent parts are shown on white",
    ]
    return rgb_HWC, ImageMetadata(
        codec=_codec(image),
        width_px=width,
        height_px=height,
        aspect_ratio=width / height,
        rotation_deg=turn,
        note="; ".join(filter(None, notes)) or None,
    )


def _loaded(data: bytes, max_pixels: int) -> tuple[Image.Image, str | None]:
    """A decoded picture and what was passed over; all that a file can do to Pillow it does here."""
    with _pixel_limit(max_pixels):
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            note = _check(image)
            image.load()
        except UnidentifiedImageError:
            raise _no_image(data) from None
        except Image.DecompressionBombError as error:
            raise TooLargeError(
                f"its header announces more than the {max_pixels} px that are decoded"
            ) from error
        except VideoError:
            raise
        except _MALFORMED as error:
            raise _damage(error, data) from error
    return image, note


def _check(image: Image.Image) -> str | None:
    """Refuses what is too long or moves, by its header; what of it will be passed over, if any."""
    longest = max(image.size)
    if longest > MAX_SIDE_PX:
        raise TooLargeError(f"a side of {longest} px: at most {MAX_SIDE_PX} px are decoded")
    if image.format == _SEVERAL_JPEGS or not getattr(image, "is_animated", False):
        return None
    if image.format == "TIFF":
        return "has several pages: the first was read"
    raise NotImageError(
        f"a moving picture ({_codec(image)}): convert it to a video to have it read"
    )


def _codec(image: Image.Image) -> str:
    assert image.format, "it was read from a file"
    return "jpeg" if image.format == _SEVERAL_JPEGS else image.format.lower()


def _orientation(image: Image.Image) -> tuple[int, bool]:
    """The EXIF orientation, 1 to 8, and whether EXIF data are there that cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _MALFORMED:
        return 1, True
    return (found, False) if found in _TURNS else (1, False)


def _rgb(image: Image.Image) -> tuple[np.ndarray, bool]:
    """RGB uint8 (H, W, 3), and whether something behind it was to be seen through it."""
    if image.mode in _SIXTEEN_BITS:
        grey_HW = (np.asarray(image) >> 8).astype(np.uint8)
        return cv2.cvtColor(grey_HW, cv2.COLOR_GRAY2RGB), False
    if image.mode in _NO_WHITE:
        raise NotImageError(
            f"its pixels are of type {image.mode}, of which no one knows what is white: only "
            "8- and 16-bit grey, RGB and CMYK are read"
        )
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB")), False
    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][0] == 255:
        return np.asarray(rgba.convert("RGB")), False
    paper = Image.new("RGBA", rgba.size, "white")
    return np.asarray(Image.alpha_composite(paper, rgba).convert("RGB")), True


def _small_luma(rgb_HWC: np.ndarray) -> np.ndarray:
    """Full-range luma as signals see it, uint8 (1, H, W): made from what a decoder would give."""
    height, width = rgb_HWC.shape[:2]
    picture = VideoFrame(width, height, "yuvj420p")
    plane = picture.planes[0]
    lines = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
    lines[:, :width] = cv2.cvtColor(rgb_HWC, cv2.COLOR_RGB2GRAY)
    size = small_size(width, height, LONGER_SIDE_PX)
    luma_1HW = np.empty((1, size[1], size[0]), np.uint8)
    luma_1HW[0] = Shrinker().luma(picture, size)
    return luma_1HW


@contextmanager
def _pixel_limit(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit, which some of its readers need before they know what they open.

    It warns from the limit on and raises from twice that: only the latter is wanted.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment] - it is only compared
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would go to nobody; what counts is an error
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _opened(media: Media) -> Iterator[BinaryIO]:
    if not isinstance(media, (str, os.PathLike)):
        media.seek(0)
        yield media
        return
    if not stat.S_ISREG(os.stat(media).st_mode):
        raise NotImageError("not a regular file")
    with open(media, "rb") as file:
        yield file


def _bytes_of(media: Media, max_pixels: int) -> bytes:
    """The whole file, so that what Pillow raises is about content and never about a network."""
    most = max_pixels * _MOST_BYTES_PER_PX + _SPARE_BYTES
    with _opened(media) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size > most:
            head = file.read(_HEAD_BYTES)
            if _image_kind(head) is None:
                raise _no_image(head)
            raise TooLargeError(f"{size} bytes for an image: at most {most} bytes are read")
        return file.read()


def _damage(error: Exception, data: bytes) -> Exception:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    if "out of memory" in said:
        return MemoryError(said)
    if _image_kind(data) == "WEBP" and (end := 8 + int.from_bytes(data[4:8], "little")) > len(data):
        return TruncatedError(f"truncated: the file has {len(data)} of {end} bytes")
    if "truncated" in said.lower() or isinstance(error, EOFError):
        return TruncatedError("truncated: the file ends before the picture does")
    return DamagedError(f"damaged: {said}")


def _image_kind(head: bytes) -> str | None:
    """What a file that begins as a still picture does calls itself, in capitals."""
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    for kind, found in (
        ("JPEG", head[:3] == b"\xff\xd8\xff"),
        ("PNG", head[:8] == b"\x89PNG\r\n\x1a\n"),
        ("WEBP", head[:4] == b"RIFF" and head[8:12] == b"WEBP"),
        ("TIFF", head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")),
        ("AVIF", brand in (b"avif", b"avis")),
        ("BMP", head[:2] == b"BM" and head[6:10] == bytes(4)),
        ("HEIC", brand in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1")),
        ("JPEG XL", head[:2] == b"\xff\x0a" or head[4:12] == b"JXL \r\n\x87\n"),
        ("JPEG 2000", head[4:12] == b"jP  \r\n\x87\n"),
    ):
        if found:
            return kind
    return None


def _no_image(data: bytes) -> VideoError:
    """What a person calls a file that Pillow cannot open."""
    head = data[:_HEAD_BYTES]
    kind = _image_kind(head)
    if kind in _FORMATS:
        return DamagedError(f"truncated or damaged: its {kind} header cannot be read")
    if kind:
        return NotImageError(f"a {kind} image, which is not read here: convert it to JPEG or PNG")
    for what, found in (
        (
            "a GIF, which is read as a video: name it .gif in a manifest",
            head[:3] == b"GIF",
        ),
        (
            "a video: give it a video's name, or `media` video in a manifest and --retry-failed",
            head[4:8] in (b"ftyp", b"moov", b"mdat")
            or head[:4] == b"\x1aE\xdf\xa3"
            or (head[:4] == b"RIFF" and head[8:12] == b"AVI "),
        ),
        ("a PDF file", head[:4] == b"%PDF"),
        (
            "a Git LFS pointer, the file itself was never fetched",
            head.startswith(b"version https://git-lfs"),
        ),
        ("an HTML page", head.lstrip().lower().startswith((b"<!doctype html", b"<html"))),
    ):
        if found:
            return NotImageError(f"not an image: {what}")
    try:
        text = head.decode(errors="strict" if len(data) <= len(head) else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if len(text.encode()) > len(head) - 4 and all(c.isprintable() or c in "\r\n\t" for c in text):
        return NotImageError(f"not an image: a text file that begins with {text[:24]!r}")
    return NotImageError("not an image: no known format")
