"""Which frames of a source become keyframes, decided while it is decoded.

Frames on a grid of time are taken as they come. A shot that turns out too short for the grid needs
more of them: until a shot has enough, some of its frames are held.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from engine.picture import Upright
from engine.video import Frame

_MOST_HELD = 12
_RECENT = 4  # a cut is known two frames late
_HELD_BYTES = 16 * 2**20
"""Larger pictures are made keyframes at once: in memory are 12 up to this size, and 4 of any."""


@dataclass(frozen=True, kw_only=True)
class Keyframe:
    """One JPEG and when it is shown."""

    pts: int
    width_px: int
    height_px: int
    jpeg: bytes


@dataclass
class Marks:
    """Times from which the first frame is taken: a grid, and what else is asked for."""

    step_s: float
    more_s: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.more_s = np.sort(np.asarray(self.more_s, np.float64))

    def between(self, before_s: float | None, time_s: float) -> bool:
        """Whether one lies after the frame before (None: there is none), up to this one."""
        slot = math.floor(time_s / self.step_s - 0.5)
        last = -1 if before_s is None else math.floor(before_s / self.step_s - 0.5)
        if slot > last or not len(self.more_s):
            return slot > last
        low = 0 if before_s is None else np.searchsorted(self.more_s, before_s, "right")
        return bool(np.searchsorted(self.more_s, time_s, "right") > low)


@dataclass
class _Held:
    """Frames of a shot that has too few keyframes: every first, second, fourth ... of them."""

    start: int
    stride: int = 1
    on_grid: list[int] = field(default_factory=list)
    frames: dict[int, Frame | Keyframe] = field(default_factory=dict)


class Keyframes:
    """Collects the keyframes of a part of a source.

    Args:
        look: How they look.
        marks: Where they are taken.
        least: How many a shot must have, if it has as many frames.
    """

    def __init__(self, look: Upright, marks: Marks, least: int):
        self._look, self._marks, self._least = look, marks, least
        self._found: dict[int, Keyframe] = {}
        self._recent: deque[tuple[int, Frame, bool]] = deque(maxlen=_RECENT)
        self._held: _Held | None = None

    @property
    def holding(self) -> bool:
        """Whether a shot still needs frames."""
        return self._held is not None

    @property
    def found(self) -> list[Keyframe]:
        """What was collected, in order of time."""
        return [self._found[pts] for pts in sorted(self._found)]

    def push(self, index: int, frame: Frame, before_s: float | None, *, ours: bool) -> None:
        """Sees the next frame.

        Args:
            index: Its number.
            frame: The frame.
            before_s: Time of the frame before.
            ours: Whether it is this part's to take, if it lies on the grid.
        """
        marked = self._marks.between(before_s, frame.time_s)
        if marked and ours:
            self._take(frame)
        self._recent.append((index, frame, marked))
        if self._held is not None:
            self._hold(index, frame, marked)

    def begin(self, start: int) -> None:
        """A shot begins at a frame seen lately; the one before ends there."""
        self.end(start)
        self._held = _Held(start)
        for index, frame, marked in list(self._recent):
            if index >= start and self._held is not None:
                self._hold(index, frame, marked)

    def end(self, end: int) -> None:
        """The shot ends before frame `end`: takes held frames if it has too few keyframes."""
        held, self._held = self._held, None
        if held is None or sum(i < end for i in held.on_grid) >= self._least:
            return
        inside = sorted(i for i in held.frames if i < end)
        length = end - held.start
        for part in range(min(self._least, len(inside))):
            wanted = held.start + (2 * part + 1) * length // (2 * self._least)
            nearest = min(inside, key=lambda i: (abs(i - wanted), i))
            inside.remove(nearest)
            self._take(held.frames[nearest])

    def _hold(self, index: int, frame: Frame, marked: bool) -> None:
        held = self._held
        assert held is not None
        if marked:
            held.on_grid.append(index)
        enough = held.on_grid[self._least - 1 : self._least]
        if (
            enough and enough[0] <= index - _RECENT
        ):  # the shot reaches there, whatever comes to light
            self._held = None
            return
        if (index - held.start) % held.stride:
            return
        large = sum(plane.buffer_size for plane in frame.picture.planes) > _HELD_BYTES
        held.frames[index] = self._encode(frame) if large else frame
        if len(held.frames) > _MOST_HELD:
            held.stride *= 2
            held.frames = {
                i: f for i, f in held.frames.items() if (i - held.start) % held.stride == 0
            }

    def _take(self, frame: Frame | Keyframe) -> None:
        if frame.pts not in self._found:
            self._found[frame.pts] = frame if isinstance(frame, Keyframe) else self._encode(frame)

    def _encode(self, frame: Frame) -> Keyframe:
        if known := self._found.get(frame.pts):
            return known
        return Keyframe(
            pts=frame.pts,
            width_px=self._look.width_px,
            height_px=self._look.height_px,
            jpeg=self._look.jpeg(frame.picture),
        )


def choose(times_s: np.ndarray, start_s: float, end_s: float, wanted: int) -> list[int]:
    """At most `wanted` of the candidates: those nearest the middles of as many equal parts.

    Args:
        times_s: Of the candidates, ascending, float64 (N,).
        start_s: Start of the clip.
        end_s: Its end.
        wanted: How many.
    """
    left = list(range(len(times_s)))
    if len(left) <= wanted:
        return left
    chosen = []
    for part in range(wanted):
        middle = start_s + (end_s - start_s) * (2 * part + 1) / (2 * wanted)
        nearest = min(left, key=lambda i: (abs(times_s[i] - middle), i))
        left.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen)
