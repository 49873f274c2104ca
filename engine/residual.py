"""Cuts that shot detection missed, found in the keyframes of a clip, without weights.

At a cut everything changes at once and stays changed: the colours, the layout of the picture, and
every detail of it. A camera or an object that moves keeps some of these from one keyframe to the
next; a flash, or somebody who walks by, keeps them from the keyframe before to the one after.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from engine.operator import Failed, Operator, results
from engine.schema import CLIPS

cv2.setNumThreads(1)  # the pipeline runs one process a core

_LONGER_SIDE_PX = 256
_THUMB = (32, 18)
_BINS = (8, 16, 16)
_CELLS = (6, 4)
_BLENDS = 2  # keyframes that a dissolve may take
_BLACK = 24
_ZOOM = 2.5

# Where each doubt begins and where it is certainty; chosen on cuts and moving cameras whose truth
# is known (the test has some of them), and no finer than they tell apart.
_COLOURS = (0.08, 0.24)
_LAYOUT = (0.7, 0.97)
_OTHER_LAYOUT = (0.4, 0.8)
_DETAILS = (3, 8)
_MIXED = (0.6, 0.8)


@dataclass(frozen=True, kw_only=True)
class ResidualCut(Operator):
    """Evidence that a clip's keyframes show two shots or more, 0 to 1.

    0.5 is meant as the threshold: above it a cut is likelier than none. A dissolve and a fade
    through black count as cuts. A clip with fewer than two keyframes that are not flat has 0. No
    cut is told to or from a plain colour (text on black is one), outside the first and last
    keyframe, or where layout or details stay (the same set from nearly the same place, a change
    of nothing but colour). It is misled by what is all new at the next keyframe and stays: a whip
    pan, a car that fills the picture.
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("residual_cut_score")])
    libraries: ClassVar[tuple[str, ...]] = ("opencv-python", "numpy")
    media: ClassVar[tuple[str, ...]] = ("video",)

    flat_levels: float = 16.0
    """Keyframes whose middle 90 % of grey levels span less are left out."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights."""

        def measure(clips: pa.Table) -> pa.Table:
            return results(self.writes, [self._row(k) for k in clips["keyframes"].to_pylist()])

        return measure

    def _row(self, keyframes: Sequence[dict[str, Any]]) -> dict[str, Any] | Failed:
        try:
            images = [_small(k["jpeg"]) for k in keyframes]
        except ValueError as error:
            return Failed("ValueError", str(error))
        seen = [i for i in images if _spread(_grey(i)) >= self.flat_levels]
        return {"residual_cut_score": cut_score([Look(i) for i in _without_bars(seen)])}


def cut_score(looks: Sequence[Look]) -> float:
    """Evidence of a cut between any two neighbours, 0 to 1.

    Each place between two keyframes is tried as a cut, and each one or two keyframes as a
    dissolve, in which case they must be mixtures of their neighbours. There the score is that of
    the less changed of up to four pairs: the last two keyframes before with the first two after.
    A pair is changed as far as colours, layout and details all are, and that counts less where
    neighbours on one side change as much. Where a side holds still, colours need not have changed.

    Args:
        looks: In order of time.
    """
    pairs = _Pairs(looks)
    last = len(looks) - 1
    best = 0.0
    for skipped in range(_BLENDS + 1):
        for before in range(last - skipped):
            after = before + 1 + skipped
            mixed = [
                _mixed(looks[i], looks[before], looks[after]) for i in range(before + 1, after)
            ]
            score = _ramp(min(mixed, default=1.0), *_MIXED)
            if score > best:
                best = max(best, score * _changed(pairs, before, after, last))
    return best


def _changed(pairs: _Pairs, before: int, after: int, last: int) -> float:
    firsts, seconds = [before, before - 1][: before + 1], [after, after + 1][: last - after + 1]
    across = [(i, k) for i in firsts for k in seconds]
    inside = [tuple(sorted(side)) for side in (firsts, seconds) if len(side) == 2]
    everything = _least(pairs.changed(*pair) for pair in across)
    if everything and inside:
        everything *= 1 - 0.6 * sum(pairs.changed(*pair) for pair in inside) / len(inside)
    if not inside or not _least(pairs.elsewhere(*pair) for pair in across):
        return everything
    still = [pairs.still(*pair) for pair in inside]
    steady = max(min(still), 0.6 * max(still))
    if steady <= everything:
        return everything
    return max(everything, steady * _least(pairs.replaced(*pair) for pair in across))


def _least(values: Iterable[float]) -> float:
    """The smallest, and none is asked for after a 0."""
    least = 1.0
    for value in values:
        least = min(least, value)
        if not least:
            break
    return least


class _Pairs:
    """Comparisons of the pictures of a clip, each made once, and only where one asks for it."""

    def __init__(self, looks: Sequence[Look]):
        self._looks = looks
        self._layout = functools.cache(self._layout_of)
        self._details = functools.cache(self._details_of)

    def changed(self, i: int, k: int) -> float:
        """How surely colours, layout and details are others."""
        overlap = float(self._looks[i].colours @ self._looks[k].colours)
        sure = _ramp(1 - overlap, *_COLOURS) * (1 - _ramp(self._layout(i, k), *_LAYOUT))
        return sure and sure * (1 - self._kept(i, k))

    def elsewhere(self, i: int, k: int) -> float:
        """How surely the layout is another."""
        return 1 - _ramp(self._layout(i, k), *_OTHER_LAYOUT)

    def replaced(self, i: int, k: int) -> float:
        """How surely layout and details are others."""
        return self.elsewhere(i, k) * (1 - self._kept(i, k))

    def still(self, i: int, k: int) -> float:
        """How surely the camera rests from one to the other."""
        layout = self._layout(i, k)
        sure = _ramp(layout, 0.5, 0.8)
        return sure and sure * max(_ramp(layout, 0.75, 0.92), _ramp(self._details(i, k), 6, 12))

    def _kept(self, i: int, k: int) -> float:
        return _ramp(self._details(i, k), *_DETAILS)

    def _layout_of(self, i: int, k: int) -> float:
        return float((self._looks[i].layout * self._looks[k].layout).sum())

    def _details_of(self, i: int, k: int) -> int:
        return _kept_details(self._looks[i], self._looks[k])


class Look:
    """What is compared of a picture.

    Args:
        image: BGR, uint8 (H, W, 3).
    """

    def __init__(self, image: np.ndarray):
        self.size = image.shape[1], image.shape[0]
        self.colours = _colours(image)
        """Square roots of a histogram, so that the product of two is their overlap."""
        small = cv2.resize(image, _THUMB, interpolation=cv2.INTER_AREA).astype(np.float32)
        self.thumb = (small - small.mean((0, 1))).ravel()
        self._grey = _grey(image)
        grey = cv2.resize(self._grey, _THUMB, interpolation=cv2.INTER_AREA).astype(np.float32)
        grey -= grey.mean()
        self.layout = grey / max(1e-6, float(np.linalg.norm(grey)))

    @functools.cached_property
    def details(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Places in px, float32 (N, 2), and ORB descriptors, uint8 (N, 32)."""
        points, descriptors = _orb().detectAndCompute(self._grey, None)
        return np.array([p.pt for p in points], np.float32).reshape(-1, 2), descriptors


def _small(jpeg: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_REDUCED_COLOR_2)
    if image is None:
        raise ValueError(f"a keyframe of {len(jpeg)} bytes cannot be decoded")
    height, width = image.shape[:2]
    scale = _LONGER_SIDE_PX / max(height, width)
    size = max(8, round(width * scale)), max(8, round(height * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _without_bars(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Cropped by the lines and columns that are black in all: bars make any two pictures alike."""
    if len({image.shape for image in images}) != 1:
        return list(images)
    bright = np.max([_grey(image) for image in images], 0) > _BLACK
    rows, columns = (np.flatnonzero(bright.mean(axis) > 0.1) for axis in (1, 0))
    if min(len(rows), len(columns)) < 16:
        return list(images)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return [np.ascontiguousarray(image[top:bottom, left:right]) for image in images]


def _spread(grey: np.ndarray) -> int:
    """Levels that the middle 90 % of a picture's span."""
    below = np.bincount(grey.ravel(), minlength=256).cumsum() / grey.size
    return int(np.searchsorted(below, 0.95) - np.searchsorted(below, 0.05))


def _grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)


def _colours(image: np.ndarray) -> np.ndarray:
    lab = cv2.cvtColor(image, cv2.COLOR_BGR2Lab)
    counts = cv2.calcHist([lab], [0, 1, 2], None, list(_BINS), [0, 256] * 3)
    smooth = cv2.GaussianBlur(counts.reshape(_BINS[0], -1), (1, 3), 0)
    return np.sqrt(smooth.ravel() / smooth.sum())


@functools.cache
def _orb() -> cv2.ORB:
    return cv2.ORB_create(300, 1.3, 5, edgeThreshold=15, patchSize=31, fastThreshold=7)


def _kept_details(a: Look, b: Look) -> int:
    """Cells (of 24) of `a` with features found in `b`.

    They must agree on one similarity transform (RANSAC, whose draws are the same every time).
    """
    (places, ours), (others, theirs) = a.details, b.details
    if ours is None or theirs is None or min(len(ours), len(theirs)) < 5:
        return 0
    found = cv2.BFMatcher(cv2.NORM_HAMMING).knnMatch(ours, theirs, 2)
    good = [(m.queryIdx, m.trainIdx) for m, second in found if m.distance < 0.8 * second.distance]
    if len(good) < 7:
        return 0
    mine, their = (list(side) for side in zip(*good, strict=True))
    source, target = places[mine], others[their]
    moved, fits = cv2.estimateAffinePartial2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=6, maxIters=300
    )
    if moved is None or fits.sum() < 7:  # six fit by chance
        return 0
    if not 1 / _ZOOM <= np.hypot(*moved[:, 0]) <= _ZOOM:  # to one spot, anything fits
        return 0
    cells = source[fits.ravel() > 0] * np.array(_CELLS) / a.size
    return len(np.unique(cells.astype(int), axis=0))


def _mixed(middle: Look, a: Look, b: Look) -> float:
    """Share of a picture's variance that the best mixture of two others explains, 0 to 1."""
    parts = np.stack([a.thumb, b.thumb], 1)
    weights = np.linalg.lstsq(parts, middle.thumb, rcond=None)[0]
    if weights.min() < 0.08:
        return 0.0
    rest = middle.thumb - parts @ weights
    return 1 - float(rest @ rest) / max(1e-6, float(middle.thumb @ middle.thumb))


def _ramp(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
