"""Shots: PySceneDetect's detectors, fed with scores of small frames, and the spans they give.

Scores are kept for each frame, so that a source that was scanned in parts is decided as a whole.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence
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


class FrameScorer:
    """Gives each frame its score, as PySceneDetect's detectors define it.

    For `adaptive` and `content` the mean change of hue, saturation and value since the frame before
    (0 for the first), for `threshold` the mean of blue, green and red; both of 255.
    """

    def __init__(self, shots: Shots):
        self._shots = shots
        self._before: np.ndarray | None = None

    def score(self, bgr_HW3: np.ndarray) -> float:
        """The score of the next frame, uint8 (H, W, 3)."""
        if self._shots == "threshold":
            return sum(cv2.mean(bgr_HW3)[:3]) / 3
        hsv_HW3 = cv2.cvtColor(bgr_HW3, cv2.COLOR_BGR2HSV)
        before, self._before = self._before, hsv_HW3
        if before is None:
            return 0.0
        return cv2.norm(hsv_HW3, before, cv2.NORM_L1) / hsv_HW3.size


class _Scored:
    """Takes a frame's score from where a detector would compute it from a picture."""

    def _calculate_frame_score(self, timecode: Any, frame_img: Any) -> float:
        return frame_img


class _Adaptive(_Scored, AdaptiveDetector):
    pass


class _Content(_Scored, ContentDetector):
    pass


def _is_cut(shots: Shots, threshold: float, scores: Sequence[float]) -> bool:
    """Whether the detector cuts at the middle one of an odd number of scores."""
    middle = len(scores) // 2
    if scores[middle] < _least_score(shots, threshold):
        return False
    if shots == "content":
        decide: Any = _Content(threshold=threshold, min_scene_len=0)
    else:
        decide = _Adaptive(adaptive_threshold=threshold, min_scene_len=0, window_width=middle)
    return any(middle in decide.process_frame(i, score) for i, score in enumerate(scores))


def _least_score(shots: Shots, threshold: float) -> float:
    """No frame below it is a cut: AdaptiveDetector's `min_content_val`, or the threshold."""
    return threshold if shots == "content" else 15.0


def look_ahead(shots: Shots) -> int:
    """Frames after a boundary that must be seen before it is known."""
    return 2 if shots == "adaptive" else 0


def cuts(shots: Shots, threshold: float | None, scores: np.ndarray) -> list[int]:
    """Frames at which a shot begins, the first left out.

    Args:
        shots: Detector; `none` gives no cuts.
        threshold: Its threshold, None for PySceneDetect's default.
        scores: `FrameScorer.score` of every frame of a source, float64 (N,).
    """
    if shots == "none" or not len(scores):
        return []
    value = THRESHOLDS[shots] if threshold is None else threshold
    if shots == "threshold":
        return _fades(value, scores)
    reach = look_ahead(shots)
    if len(scores) <= 2 * reach:
        return []
    # Without a least length a detector decides from these few scores alone.
    windows = np.lib.stride_tricks.sliding_window_view(scores, 2 * reach + 1)
    likely = np.flatnonzero(scores[reach : len(scores) - reach] >= _least_score(shots, value))
    found = [i + reach for i in likely.tolist() if _is_cut(shots, value, windows[i].tolist())]
    return [cut for cut in found if cut > 0]


def _fades(threshold: float, scores: np.ndarray) -> list[int]:
    decide = ThresholdDetector(threshold=threshold, min_scene_len=0)
    frames = [FrameTimecode(i, fps=25.0) for i in range(len(scores))]
    # It takes numpy's mean of what it is given, and a score is its own mean.
    found = [c for t, s in zip(frames, scores, strict=True) for c in decide.process_frame(t, s)]
    found += decide.post_process(frames[-1])
    return sorted({c.frame_num for c in found} - {0})


class Boundaries:
    """Finds, frame by frame, where keyframes must start anew: at cuts, fades or fixed spans.

    Of a part of a source, boundaries from frame `SETTLED_AFTER` on are those of the whole source.
    """

    def __init__(self, shots: Shots, threshold: float | None, clip_seconds: float):
        self._shots, self._clip_seconds = shots, clip_seconds
        self._threshold = THRESHOLDS.get(shots, 0.0) if threshold is None else threshold
        self._scores: deque[float] = deque(maxlen=2 * look_ahead(shots) + 1)
        self._state: int | None = None

    def push(self, frame: int, time_s: float, score: float | None) -> int | None:
        """The boundary that this frame settles, if any.

        Args:
            frame: Its number.
            time_s: Its time.
            score: From `FrameScorer`; None for the first of a part, which nothing precedes there.
        """
        if self._shots in ("adaptive", "content"):
            if score is None:
                return None
            self._scores.append(score)
            full = len(self._scores) == self._scores.maxlen
            if full and _is_cut(self._shots, self._threshold, list(self._scores)):
                return (frame - look_ahead(self._shots)) or None
            return None
        if self._shots == "threshold":
            assert score is not None
            state = int(score < int(self._threshold))  # the detector compares with an integer
        else:
            state = math.floor(time_s / self._clip_seconds)
        before, self._state = self._state, state
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
    for first, after in itertools.pairwise(bounds):
        end = times_s[after] if after < len(times_s) else end_s
        wanted = split_evenly(times_s[first], end, longest_s)
        begins += [first, *np.searchsorted(times_s, wanted[1:]).tolist()]
    # A part may begin while the last frame is still shown.
    begins = sorted({begin for begin in begins if begin < len(times_s)})
    return list(zip(begins, [*begins[1:], len(times_s)], strict=True))
