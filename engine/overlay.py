"""Overlays that stay while the picture moves (logos, watermarks, burnt-in lines), by arithmetic.

An overlay's edges keep their place and direction in every keyframe while what surrounds them
changes. So does much else: the background of a camera that stands still, the border of letterbox
bars, an edge that the camera moves along, the middle of a zoom. What is left after these is
counted. Shapes: T keyframes, H lines, W columns; B blocks down, C blocks across.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from engine.operator import Failed, Operator, results
from engine.schema import CLIPS

cv2.setNumThreads(1)  # the pipeline runs one process a core

# Fitted together on the sample corpus and the real clips of the tests: a change of any is a new
# `version` of the operator.
_NOISE = 8.0
"""Gradient, in levels per pixel, that counts half: noise and compression stay below."""
_SAME_DIRECTION = 0.75
"""Least cosine between a keyframe's gradient and the mean direction, for it to agree."""
_STRONG = 0.3
"""Least part of a gradient along the mean direction, on the scale that `_NOISE` sets."""
_SPARED = 4
"""Of so many keyframes one may disagree: white on white is no edge."""
_WINDOW_PX = 9
"""Side of the window in which edges of two directions make a corner."""
_STAYS = 0.25
"""Least share of a window's edges that stay, in both directions, for it to be a candidate."""
_BLOCK_PX = 8
"""Side of the blocks in which movement is looked for: compression noise averages out."""
_MOVES = 2.0
"""Least median change of a block over time, in levels."""
_MOVES_RELATIVE = 0.3
"""The same as a share of the contrast around: a camera that sways moves nothing away."""
_SAME_SCENE = 0.7
"""Least correlation of a keyframe with the median one for its contrast to be evened out."""
_STILL = 0.08
"""Least mean strength of edges that stay, for a block to count as standing still."""
_AROUND = 0.6
"""Least share of moving blocks among those around a candidate."""
_GLOBAL = 0.15
"""Weight of the whole picture's share of movement where nothing around tells (a black bar)."""
_MOVING_PICTURE = 0.7
"""Least share of moving blocks among those that move or stand still."""
_MOVING_AREA = 0.05
"""Least share of moving blocks among all."""
_THICK = 0.12
"""Half the thickness, over the shorter side, at which a candidate is scenery."""
_LEAST_PX = 30.0
"""Least evidence of a candidate, in pixels."""
_OVER_CHANCE = 1.5
"""A candidate has more than this times the evidence of the largest one among edges that agree by
chance, as they do in three keyframes of a smooth texture."""
_ZOOMS = np.geomspace(1 / 1.6, 1.6, 19)
"""Scales that the surroundings of a candidate are compared at, from one keyframe to the next."""
_ZOOM_SEEN, _ZOOM_GAIN = 0.5, 0.2
"""Least correlation at one of these scales, and by how much it exceeds that at scale 1."""
_HALF_AREA = 3e-4
"""Evidence over the picture's area at which the score is 0.5: a logo of a tenth of the height."""
_MIN_KEYFRAMES = 3
_MIN_SIDE_PX = 48


@dataclass(frozen=True, kw_only=True)
class StaticOverlay(Operator):
    """How sure it is that something was laid over the moving picture: 0 to 1, from 0.5 on likely.

    0 is no evidence, which is not the same as no overlay: where the camera stands still, the
    picture hardly moves or the clip has fewer than three keyframes, an overlay cannot be told
    from the scene. Text that changes (a counter, subtitles) is not static. Misleads where a thing
    moves with the camera (a helmet's rim, a windscreen's sticker), and misses what is faint over
    strong texture, or thicker than a quarter of the picture.

    Source: that edges which agree over many pictures are a watermark's: Dekel et al., "On the
    Effectiveness of Visible Watermarks" (2017), section 3.1, which takes the median of gradients.
    With a clip's few keyframes each must agree instead, and the test of what moves is our own.
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("overlay_score")])
    libraries: ClassVar[tuple[str, ...]] = ("opencv-python", "numpy")
    media: ClassVar[tuple[str, ...]] = ("video",)

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights."""

        def measure(clips: pa.Table) -> pa.Table:
            return results(self.writes, [_row(k or ()) for k in clips["keyframes"].to_pylist()])

        return measure


def _row(keyframes: Sequence[dict[str, Any]]) -> dict[str, float] | Failed:
    if not keyframes:
        return Failed("NoKeyframes", "an overlay is looked for in keyframes, and there are none")
    frames = []
    for keyframe in keyframes:
        data = np.frombuffer(keyframe["jpeg"], np.uint8)
        grey_HW = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE)
        if grey_HW is None:
            return Failed("ValueError", f"a keyframe of {len(data)} bytes cannot be decoded")
        if frames and grey_HW.shape != frames[0].shape:
            grey_HW = cv2.resize(grey_HW, frames[0].shape[::-1], interpolation=cv2.INTER_AREA)
        frames.append(grey_HW)
    return {"overlay_score": overlay_score(np.stack(frames))}


def overlay_score(frames_THW: np.ndarray) -> float:
    """Evidence of a static overlay in keyframes of one clip.

    Args:
        frames_THW: Luma, uint8 (T, H, W), in order of time.

    Returns:
        1 - 2**(-x), with x the evidence over the picture's area in units of `_HALF_AREA`; 0 where
        nothing can be told.
    """
    height, width = frames_THW.shape[1:]
    if min(height, width) < _MIN_SIDE_PX:
        return 0.0
    high_TBC = _high_pass(frames_THW)
    contrast_T = np.sqrt((high_TBC**2).mean((1, 2)))
    pictures = contrast_T > max(0.7, 0.2 * float(contrast_T.max()))  # the others are blank
    if np.count_nonzero(pictures) < _MIN_KEYFRAMES:
        return 0.0
    frames_THW = frames_THW[pictures]
    inside = _inside_bars(frames_THW)
    gradients = _gradients(frames_THW)
    edges = _edges_that_stay(gradients, inside)
    found = _surrounded(edges, _candidates(edges), _moving(high_TBC[pictures]), inside)
    if not found:
        return 0.0
    chance = _candidates(_edges_that_stay(gradients.scattered(), inside))
    largest_px = _OVER_CHANCE * max((one.evidence_px for one in chance), default=0.0)
    evidence_px = sum(
        one.evidence_px
        for one in found
        if one.evidence_px > largest_px and not _amid_zoom(frames_THW, one.box)
    )
    return 1.0 - 2.0 ** (-evidence_px / (height * width) / _HALF_AREA)


def _blocks(image_HW: np.ndarray) -> np.ndarray:
    """Means of blocks, (B, C); the last ones give up a few pixels to even sizes."""
    height, width = image_HW.shape
    size = (width // _BLOCK_PX, height // _BLOCK_PX)
    return cv2.resize(image_HW, size, interpolation=cv2.INTER_AREA)


def _high_pass(frames_THW: np.ndarray) -> np.ndarray:
    """Blocks without what their surroundings share, float32 (T, B, C): light does not matter."""
    found = []
    for frame_HW in frames_THW:
        small_BC = _blocks(frame_HW).astype(np.float32)
        found.append(small_BC - cv2.blur(small_BC, (7, 7)))
    return np.stack(found)


def _moving(high_TBC: np.ndarray) -> np.ndarray:
    """Blocks whose content changes in most of the keyframes, bool (B, C).

    By the median of deviations from the median: what passes before a still background leaves
    that as it is most of the time.
    """
    median_BC = np.median(high_TBC, 0)
    energy = float((median_BC**2).sum()) + 1e-6
    product_T = (high_TBC * median_BC).sum((1, 2))
    correlation_T = product_T / np.sqrt((high_TBC**2).sum((1, 2)) * energy + 1e-6)
    # A still scene that fades is a still scene: its contrast is evened out first.
    gain_T = np.where(correlation_T > _SAME_SCENE, np.maximum(product_T / energy, 0.1), 1.0)
    even_TBC = (high_TBC / gain_T[:, None, None]).astype(np.float32)
    change_BC = np.median(np.abs(even_TBC - np.median(even_TBC, 0)), 0)
    around_BC = np.sqrt(cv2.blur((even_TBC**2).mean(0), (5, 5)))
    return (change_BC > _MOVES) & (change_BC > _MOVES_RELATIVE * around_BC)


class _Box(NamedTuple):
    """A part of a picture: lines [top, bottom), columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


def _inside_bars(frames_THW: np.ndarray) -> _Box:
    """What is left without bars: lines and columns at the border that are flat in all keyframes.

    Most of a line counts, so that a logo within a bar does not hide the bar.
    """

    def flat(line_TN: np.ndarray) -> bool:
        low_T, high_T = np.percentile(line_TN, (25, 75), axis=1)
        return float((high_T - low_T).max()) < 6

    _, height, width = frames_THW.shape
    top, bottom, left, right = 0, height, 0, width
    while top < height // 2 and flat(frames_THW[:, top]):
        top += 1
    while bottom > height // 2 and flat(frames_THW[:, bottom - 1]):
        bottom -= 1
    inner_THW = frames_THW[:, top:bottom] if bottom > top else frames_THW
    while left < width // 2 and flat(inner_THW[:, :, left]):
        left += 1
    while right > width // 2 and flat(inner_THW[:, :, right - 1]):
        right -= 1
    return _Box(top, bottom, left, right)


class _Edges(NamedTuple):
    """Edges that stay, each (H, W)."""

    strength: np.ndarray
    """Of a pixel's edge, 0 to 1; 0 where it does not stay."""
    share: np.ndarray
    """Of the edges around, those that stay and run in two directions: 0 to 1, about."""
    candidate: np.ndarray
    """uint8: 1 where that share is high."""


class _Gradients(NamedTuple):
    """Of keyframes, each (T, H, W): no keyframe, however strong its edges, has one over 1."""

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray

    def scattered(self) -> _Gradients:
        """The same with each keyframe displaced, wrapping round: nothing stays but by chance."""
        random = np.random.default_rng(0)
        height, width = self.x.shape[1:]
        found = _Gradients(*(np.empty_like(part) for part in self))
        for t in range(len(self.x)):
            by = (int(random.integers(height)), int(random.integers(width)))
            for part, scattered in zip(self, found, strict=True):
                scattered[t] = np.roll(part[t], by, (0, 1))
        return found


def _gradients(frames_THW: np.ndarray) -> _Gradients:
    x_THW, y_THW, size_THW = (np.empty(frames_THW.shape, np.float32) for _ in range(3))
    for t, frame_HW in enumerate(frames_THW):
        smooth_HW = cv2.GaussianBlur(frame_HW, (3, 3), 0)
        x_HW = cv2.Sobel(smooth_HW, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 4)
        y_HW = cv2.Sobel(smooth_HW, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 4)
        size_HW = cv2.magnitude(x_HW, y_HW)
        bounded_HW = size_HW + _NOISE
        np.divide(x_HW, bounded_HW, out=x_THW[t])
        np.divide(y_HW, bounded_HW, out=y_THW[t])
        np.divide(size_HW, bounded_HW, out=size_THW[t])
    return _Gradients(x_THW, y_THW, size_THW)


def _edges_that_stay(gradients: _Gradients, inside: _Box) -> _Edges:
    x_THW, y_THW, size_THW = gradients
    count, height, width = x_THW.shape
    mean_x_HW, mean_y_HW = x_THW.mean(0), y_THW.mean(0)
    length_HW = cv2.magnitude(mean_x_HW, mean_y_HW) + np.float32(1e-6)
    mean_x_HW /= length_HW
    mean_y_HW /= length_HW
    agree_HW = np.zeros((height, width), np.uint8)
    strength_HW = np.zeros((height, width), np.float32)
    for t in range(count):
        along_HW = x_THW[t] * mean_x_HW + y_THW[t] * mean_y_HW
        agree_HW += (along_HW > _SAME_DIRECTION * size_THW[t]) & (along_HW > _STRONG)
        strength_HW += along_HW
    strength_HW /= count
    strength_HW[agree_HW < count - count // _SPARED] = 0
    for at in inside[:2]:  # where a bar meets the picture
        strength_HW[max(0, at - 5) : at + 5] = 0
    for at in inside[2:]:
        strength_HW[:, max(0, at - 5) : at + 5] = 0
    # An edge that the camera moves along stays too, but has one direction: the smaller eigenvalue
    # of the structure tensor tells.
    xx_HW, xy_HW, yy_HW = (
        _window_mean(strength_HW * a * b)
        for a, b in ((mean_x_HW, mean_x_HW), (mean_x_HW, mean_y_HW), (mean_y_HW, mean_y_HW))
    )
    spread_HW = np.sqrt((xx_HW - yy_HW) ** 2 + 4 * xy_HW**2)
    both_HW = xx_HW + yy_HW - spread_HW
    share_HW = both_HW / (_window_mean(size_THW.mean(0)) + np.float32(0.05))
    candidate_HW = ((share_HW > _STAYS) & (both_HW > 0.06)).astype(np.uint8)
    candidate_HW = cv2.morphologyEx(candidate_HW, cv2.MORPH_CLOSE, _square(9))
    return _Edges(strength_HW, share_HW, candidate_HW)


def _window_mean(image_HW: np.ndarray) -> np.ndarray:
    return cv2.boxFilter(image_HW, -1, (_WINDOW_PX, _WINDOW_PX))


def _square(side: int) -> np.ndarray:
    return np.ones((side, side), np.uint8)


@dataclass
class _Candidate:
    """A connected region of edges that stay."""

    evidence_px: float
    """Its pixels, each by how much of the edges around it stays."""
    box: _Box
    area: tuple[slice, slice]
    """The blocks it and its surroundings lie in."""
    own: np.ndarray
    """Of these, the ones it lies in; bool (B, C)."""
    around: np.ndarray
    """The others; bool (B, C)."""
    accepted: bool


def _surrounded(
    edges: _Edges, candidates: list[_Candidate], moving_BC: np.ndarray, inside: _Box
) -> list[_Candidate]:
    """Those of the candidates that have movement all around."""
    halo_HW = cv2.dilate(edges.candidate, _square(15))
    free_BC = _blocks(1.0 - halo_HW.astype(np.float32)) > 0
    moving_BC = moving_BC & free_BC
    kept_HW = edges.strength * (halo_HW == 0)
    still_BC = (_blocks(kept_HW) > _STILL) & free_BC & ~moving_BC
    num_moving = np.count_nonzero(moving_BC)
    shown_BC = np.zeros_like(free_BC)
    top, bottom, left, right = (at / _BLOCK_PX for at in inside)
    shown_BC[int(top) : int(np.ceil(bottom)), int(left) : int(np.ceil(right))] = True
    if num_moving < _MOVING_AREA * max(1, np.count_nonzero(free_BC & shown_BC)):
        return []
    share = 0.0
    for _ in range(3):  # what is refused is scenery, which tells about its neighbours
        all_still_BC = still_BC.copy()
        for one in candidates:
            if not one.accepted:
                all_still_BC[one.area] |= one.own & ~moving_BC[one.area]
        share = num_moving / max(1, num_moving + np.count_nonzero(all_still_BC))
        for one in candidates:
            num = np.count_nonzero(moving_BC[one.area] & one.around)
            still = np.count_nonzero(all_still_BC[one.area] & one.around)
            prior = _GLOBAL * np.count_nonzero(one.around)
            around = (num + prior * share) / max(1e-6, num + still + prior)
            one.accepted = one.accepted and around >= _AROUND
    return [one for one in candidates if one.accepted and share >= _MOVING_PICTURE]


def _candidates(edges: _Edges) -> list[_Candidate]:
    height, width = edges.candidate.shape
    num_down, num_across = height // _BLOCK_PX, width // _BLOCK_PX
    sure_HW = np.clip((edges.share - _STAYS) / 0.25, 0, 1)
    count, label_HW, boxes, _ = cv2.connectedComponentsWithStats(edges.candidate)
    found = []
    for index in range(1, count):
        x, y, wide, high, _ = (int(v) for v in boxes[index])
        mask_HW = (label_HW[y : y + high, x : x + wide] == index).astype(np.uint8)
        evidence_px = float(sure_HW[y : y + high, x : x + wide][mask_HW > 0].sum())
        if evidence_px < _LEAST_PX:
            continue
        rim_HW = cv2.copyMakeBorder(mask_HW, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        thickness = float(cv2.distanceTransform(rim_HW, cv2.DIST_L2, 3).max())
        # The blocks it touches, with three more on each side.
        ys, xs = np.nonzero(mask_HW)
        rows = np.minimum((ys + y) // _BLOCK_PX, num_down - 1)
        columns = np.minimum((xs + x) // _BLOCK_PX, num_across - 1)
        area = (
            slice(max(0, int(rows.min()) - 3), int(rows.max()) + 4),
            slice(max(0, int(columns.min()) - 3), int(columns.max()) + 4),
        )
        own_BC = np.zeros((num_down, num_across), np.uint8)
        own_BC[rows, columns] = 1
        own_BC = own_BC[area]
        around_BC = cv2.dilate(own_BC, _square(7)) > own_BC
        thin = thickness < _THICK * min(height, width)
        found.append(
            _Candidate(
                evidence_px=evidence_px,
                box=_Box(y, y + high, x, x + wide),
                area=area,
                own=own_BC > 0,
                around=around_BC,
                accepted=thin,
            )
        )
    return found


def _amid_zoom(frames_THW: np.ndarray, box: _Box) -> bool:
    """Whether what surrounds a box grows or shrinks about it, in most of the keyframes.

    A camera that moves straight in or out leaves one point of the scene where it is.
    """
    height, width = frames_THW.shape[1:]
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    reach = 32 + max(box.bottom - box.top, box.right - box.left) // 2
    area = _Box(
        max(0, int(y) - reach), min(height, int(y) + reach),
        max(0, int(x) - reach), min(width, int(x) + reach),
    )  # fmt: skip
    outside_HW = np.ones((area.bottom - area.top, area.right - area.left), bool)
    top, left = box.top - area.top, box.left - area.left
    outside_HW[max(0, top) : box.bottom - area.top, max(0, left) : box.right - area.left] = False
    patches = [_detail(f[area.top : area.bottom, area.left : area.right]) for f in frames_THW]
    centre = (x - area.left, y - area.top)
    zooms = [
        _zooms(before_HW, after_HW, outside_HW, centre)
        for before_HW, after_HW in itertools.pairwise(patches)
    ]
    return 2 * sum(zooms) > len(zooms)


def _detail(image_HW: np.ndarray) -> np.ndarray:
    """Without noise and without slow changes of light."""
    fine_HW = cv2.GaussianBlur(image_HW.astype(np.float32), (0, 0), 2)
    return fine_HW - cv2.GaussianBlur(fine_HW, (0, 0), 12)


def _zooms(
    before_HW: np.ndarray, after_HW: np.ndarray, outside_HW: np.ndarray, centre: tuple[float, float]
) -> bool:
    def likeness(scale: float) -> float:
        turn = cv2.getRotationMatrix2D(centre, 0, float(scale))
        scaled_HW = cv2.warpAffine(before_HW, turn, before_HW.shape[::-1], borderValue=np.nan)
        seen_HW = outside_HW & np.isfinite(scaled_HW)
        a, b = scaled_HW[seen_HW], after_HW[seen_HW]
        norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
        return float((a * b).sum()) / norm if norm > 0 else 0.0

    best = max(likeness(scale) for scale in _ZOOMS)
    return best > _ZOOM_SEEN and best > likeness(1.0) + _ZOOM_GAIN
