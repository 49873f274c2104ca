"""Cuts clips out of a source: encoded anew, exact to the frame, or copied between key frames.

Sound is left out: the models are text-to-video, and a clip's file is as long as its frames. What is
made begins at time 0 without an edit list, which index-based readers (decord, OpenCV) ignore.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from engine.encode import DEFAULT, Cut, Encoding, Mode, NotWritten, Span, encoded
from engine.integrity import Media
from engine.operator import Failed
from engine.remux import copied

__all__ = ["DEFAULT", "Cut", "Encoding", "Mode", "NotWritten", "Span", "cut_clip", "cut_clips"]


def cut_clip(
    media: Media,
    out_path: str,
    *,
    start_s: float,
    end_s: float,
    start_frame: int,
    num_frames: int,
    mode: Mode,
    encoding: Encoding = DEFAULT,
) -> Cut:
    """Cuts one clip: `cut_clips` of a single one.

    Args:
        media: The source.
        out_path: Where to, without an ending: what is in the file decides on that.
        start_s: Of the clip, in s.
        end_s: Of the clip, in s.
        start_frame: Index of its first frame in the source.
        num_frames: How many it has.
        mode: As for `cut_clips`.
        encoding: As for `cut_clips`.

    Raises:
        Failed: It cannot be cut.
    """
    span = Span(start_s=start_s, end_s=end_s, start_frame=start_frame, num_frames=num_frames)
    folder, name = os.path.split(out_path)
    ((_, found),) = cut_clips(media, [(span, name)], folder, mode=mode, encoding=encoding)
    if isinstance(found, Failed):
        raise found
    return found


def cut_clips(
    media: Media,
    clips: Sequence[tuple[Span, str]],
    folder: str,
    *,
    mode: Mode,
    encoding: Encoding = DEFAULT,
) -> Iterator[tuple[Span, Cut | Failed]]:
    """Cuts clips of one source, decoding what they share once.

    `encode` gives exactly the clip's frames, each at its own time: H.264 in 8-bit 4:2:0, upright
    with square pixels and even sides (an odd line or column is cut off), limited range, the
    source's colours as tagged (HDR is not tone-mapped), in an MP4 that browsers play. The bytes are
    the same on every run.

    `copy` takes the packets as they are, so a clip can begin only at a key frame and must end where
    nothing later is referred to. Both ends are moved inward: no frame of a neighbouring shot gets
    in, and the span of the result is the true one. Where less than half of the clip is left, it
    fails. What was written is decoded once, to count its frames and to know that it plays. H.264,
    HEVC, AV1 and VP9 go into MP4, VP8 into WebM, and the rest into Matroska, which no browser
    plays. A turn by display matrix and the pixel shape stay as they are in the source.

    Args:
        media: The source.
        clips: Each with the name of its file, without ending.
        folder: Where the files go, on this machine.
        mode: What is done.
        encoding: Of `encode`.

    Returns:
        Each clip once, not in order, with what came of it.

    Raises:
        NotWritten: A file cannot be written.
        OSError: The source cannot be read.
    """
    ordered = sorted(clips, key=lambda c: (c[0].start_s, c[0].end_s))
    if mode == "copy":
        return copied(media, ordered, folder)
    return encoded(media, ordered, folder, encoding)
