"""What is wrong with a file, told from its bytes: not a video, empty, or cut short."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av.error

Media = str | os.PathLike[str] | BinaryIO
"""A local path, never a URL, or a seekable binary file that the caller closes."""


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


@contextmanager
def _beside(media: Media) -> Iterator[BinaryIO]:
    """The file, to look into while libav reads it, too."""
    if isinstance(media, (str, os.PathLike)):
        with open(media, "rb") as file:
            yield file
        return
    position = media.tell()
    try:
        yield media
    finally:
        media.seek(position)


def _read_at(media: Media, offset: int, count: int) -> bytes:
    with _beside(media) as file:
        file.seek(offset)
        return file.read(count)


def not_video(media: Media, size: int, error: av.error.FFmpegError) -> Exception:
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


def check_size(media: Media, size: int, family: str) -> None:
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
    position, end = 0, 0
    with _beside(media) as file:
        while position + 8 <= size:
            file.seek(position)
            head = file.read(16)
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
