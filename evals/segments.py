"""Parts of a video, as spans of frames: its head and tail, its two-second clips, its tenths."""

from __future__ import annotations

import itertools
import re

from evals.dimensions import Dimension

Span = tuple[int, int]
"""First frame, and the frame after the last."""

SHARE = 0.15
"""Of the frames, at each end: FramePack's start and end (arXiv 2504.12626, eq. 7)."""
PARTS = 10
"""Of a video, for VDE (BlockVid, arXiv 2511.22973)."""
LONG_CLIP = "long_clip"
"""Name of the protocol of `two_second_clips`."""
LONG_CLIP_ABOUT = "two-second clips by frame index, not re-encoded; not official VBench-Long"
SAMPLED = {"temporal_style": 8, "overall_consistency": 8}
"""Frames that ViCLIP reads: of fewer it reads some twice, which is no number to compare."""


class TooShort(ValueError):
    """A video has too few frames to be taken apart so."""


def head_tail(num_frames: int, share: float = SHARE, min_frames: int = 1) -> tuple[Span, Span]:
    """The first and the last frames of a video, max(1, int(share * num_frames)) each.

    Args:
        num_frames: Of the video.
        share: Of its frames, above 0 and at most a half.
        min_frames: That a metric needs in a part (`least`).

    Raises:
        TooShort: Where a part has fewer frames than the metric needs, or the two would overlap.

    Source:
        FramePack (arXiv 2504.12626), eq. 7: 15 % at each end. It leaves the rounding open; this one
        is that of the public evaluator of Helios.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"the share of frames at each end is above 0 and at most 0.5, not {share}")
    size = max(1, int(share * num_frames))
    if size < min_frames or num_frames < 2:
        raise TooShort(
            f"{share:.0%} of {num_frames} frames are {size if num_frames else 0}, and"
            f" {min_frames} at each end are needed: a video of"
            f" {shortest(share, min_frames)} frames or more has them"
        )
    return (0, size), (num_frames - size, num_frames)


def shortest(share: float = SHARE, min_frames: int = 1) -> int:
    """Frames of the shortest video that `head_tail` takes apart."""
    if min_frames <= 1:
        return 2
    num_frames = int(min_frames / share) - 1
    while int(share * num_frames) < min_frames:
        num_frames += 1
    return num_frames


def two_second_clips(num_frames: int, fps: float, seconds: float = 2.0) -> list[Span]:
    """Clips of int(fps) * seconds frames, as VBench-Long cuts them.

    A rest that is shorter than a clip is filled up with frames of the clip before it; a video that
    is shorter than one clip is kept whole. Frames are counted, not times: at 29.97 frames a second
    a clip has 58.

    Source:
        VBench-Long (`vbench2_beta_long/utils.py`, `split_video_into_clips`), which writes each clip
        to a new file and so scores re-encoded pictures; see `LONG_CLIP_ABOUT`.
    """
    size = int(int(fps) * seconds)
    if size < 1:
        raise ValueError(
            f"clips of {seconds} s need at least one frame, and {fps} a second gives 0"
        )
    if num_frames < 1:
        raise TooShort("a video without frames has no clips")
    if num_frames <= size:
        return [(0, num_frames)]
    starts = [*range(0, num_frames - size, size), num_frames - size]
    return [(start, start + size) for start in starts]


def equal_parts(num_frames: int, parts: int = PARTS) -> list[Span]:
    """Consecutive parts of a video, as equal as whole frames allow.

    Raises:
        TooShort: Where a part would be empty.
    """
    if parts < 1:
        raise ValueError(f"a video has at least one part, not {parts}")
    if num_frames < parts:
        raise TooShort(f"{num_frames} frames do not make {parts} parts")
    edges = [index * num_frames // parts for index in range(parts + 1)]
    return list(itertools.pairwise(edges))


def least(dimension: Dimension) -> int:
    """Frames that a part of a video needs to be measured in a dimension."""
    return max(dimension.min_frames, SAMPLED.get(dimension.name, 1))


def str_of(span: Span) -> str:
    """START:STOP, as `scores.segment` has it."""
    start, stop = span
    if not 0 <= start < stop:
        raise ValueError(f"a span of frames starts at 0 or later and ends after that: {span}")
    return f"{start}:{stop}"


def parse(text: str) -> Span:
    """The span that `str_of` wrote."""
    if not (found := re.fullmatch(r"(\d+):(\d+)", text)):
        raise ValueError(f"a span of frames is written START:STOP, not {text!r}")
    span = int(found[1]), int(found[2])
    str_of(span)
    return span
