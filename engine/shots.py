"""Shots: PySceneDetect's detectors, fed with scores of small frames, and the spans they give.

Scores are kept for each frame, so that a source that was scanned in parts is decided as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import cv2
import numpy as np
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

Shots = Literal["adaptive", "content", "threshold", "none"]
DETECTION_PX = 160
"""Longer side of the picture that detectors see."""

THRESHOLDS = {"adaptive": 3.0, "content": 27.0, "threshold": 12.0}
"""PySceneDetect's own: ratio to the neighbours' change, change, and mean level of 255."""

SETTLED_AFTER = 3
"""A boundary at this frame of a part, or later, is found from the part's own scores."""
_LOOK_AHEAD = 2


class FrameScorer:
    """Gives each frame its score, as PySceneDetect's detectors define it.

    For `adaptive` and `content` the mean change of hue, saturation and value since the frame before
    (0 for the first), for `threshold` the mean of blue, green and red; both of 255.
    """

    def __init__(self, shots: Shots):
        self._shots = shots
        self._before: Sequence[np.ndarray] | None = None

    def score(self, bgr_HW3: np.ndarray) -> float:
        """The score of the next frame, uint8 (H, W, 3)."""
        if self._shots == "threshold":
            return sum(cv2.mean(bgr_HW3)[:3]) / 3
        planes = cv2.split(cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2HSV))
        before, self._before = self._before, planes
        if before is None:
            return 0.0
        changes = (cv2.norm(p, q, cv2.NORM_L1) for p, q in zip(planes, before, strict=True))
        return sum(changes) / (3 * planes[0].size)


class _Scored:
    """Takes a frame's score from where a detector would compute it from a picture."""

    def _calculate_frame_score(self, timecode: Any, frame_img: Any) -> float:
        return frame_img


class _Adaptive(_Scored, AdaptiveDetector):
    pass


class _Content(_Scored, ContentDetector):
    pass


def detector(shots: Shots, threshold: float | None) -> Any:
    """A detector whose `process_frame` takes a frame's number and score, and merges no shots."""
    value = THRESHOLDS[shots] if threshold is None else threshold
    if shots == "adaptive":
        return _Adaptive(adaptive_threshold=value, min_scene_len=0, window_width=_LOOK_AHEAD)
    if shots == "content":
        return _Content(threshold=value, min_scene_len=0)
    return ThresholdDetector(threshold=value, min_scene_len=0)


def cuts(shots: Shots, threshold: float | None, scores: np.ndarray) -> list[int]:
    """Frames at which a shot begins, the first left out.

    Args:
        shots: Detector; `none` gives no cuts.
        threshold: Its threshold, None for PySceneDetect's default.
        scores: `FrameScorer.score` of every frame of a source, float64 (N,).
    """
    if shots == "none" or not len(scores):
        return []
    found: Iterable[Any]
    decide = detector(shots, threshold)
    if shots == "threshold":
        frames = [FrameTimecode(i, fps=25.0) for i in range(len(scores))]
        # The detector takes numpy's mean of what it is given: a score is its own mean.
        found = [c for t, s in zip(frames, scores, strict=True) for c in decide.process_frame(t, s)]
        found = [c.frame_num for c in [*found, *decide.post_process(frames[-1])]]
    else:
        found = [c for i, s in enumerate(scores.tolist()) for c in decide.process_frame(i, s)]
    return sorted({c for c in found if 0 < c < len(scores)})


class Boundaries:
    """Finds, frame by frame, where keyframes must start anew: at cuts, fades or fixed spans.

    Of a part of a source, boundaries from frame `SETTLED_AFTER` on are those of the whole source.
    """

    def __init__(self, shots: Shots, threshold: float | None, clip_seconds: float):
        self._shots, self._clip_seconds = shots, clip_seconds
        self._level = THRESHOLDS["threshold"] if threshold is None else threshold
        self._detector = None if shots in ("threshold", "none") else detector(shots, threshold)
        self._before: float | None = None

    @property
    def look_ahead(self) -> int:
        """Frames after a boundary that must be seen before it is known."""
        return _LOOK_AHEAD if self._shots == "adaptive" else 0

    def push(self, frame: int, time_s: float, score: float | None) -> int | None:
        """The boundary that this frame settles, if any; `score` is None where it is not known."""
        if self._detector is not None:
            return (
                None
                if score is None
                else next(iter(self._detector.process_frame(frame, score)), None)
            )
        if self._shots == "threshold":
            assert score is not None
            state = float(score < int(self._level))  # the detector compares with an integer
        else:
            state = math.floor(time_s / self._clip_seconds)
        before, self._before = self._before, state
        return frame if before is not None and state != before else None


def split_evenly(start_s: float, end_s: float, longest_s: float) -> list[float]:
    """Times at which parts begin, so that none is longer than `longest_s` and all are as long."""
    parts = max(1, math.ceil(round((end_s - start_s) / longest_s, 6)))
    return [start_s + (end_s - start_s) * i / parts for i in range(parts)]


def spans_of_shots(
    starts: Sequence[int], times_s: np.ndarray, end_s: float, longest_s: float
) -> list[tuple[int, int]]:
    """First and next-after-last frames of clips: shots, the long ones split evenly.

    Args:
        starts: Frames at which shots begin, ascending, without frame 0.
        times_s: Of every frame, ascending, float64 (N,).
        end_s: End of the last frame.
        longest_s: Longest clip.
    """
    bounds = [0, *starts, len(times_s)]
    begins: list[int] = []
    for first, after in zip(bounds[:-1], bounds[1:], strict=True):
        end = times_s[after] if after < len(times_s) else end_s
        wanted = split_evenly(times_s[first], end, longest_s)
        begins += [first, *np.searchsorted(times_s, wanted[1:]).tolist()]
    begins = sorted(set(begins))
    return list(zip(begins, [*begins[1:], len(times_s)], strict=True))
