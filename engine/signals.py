"""Frame signals: what is measured on every small luma picture while a source is decoded.

A signal is an `Operator` over a table of consecutive frames with the columns of `frames_table`; it
gives one column, a clip's value of which is the mean over the clip's frames, nulls left out. To add
one: a class here, a line in a recipe's stage, a test.

Shapes: N frames, H lines, W columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa

from engine.operator import Operator

LONGER_SIDE_PX = 320
"""The picture that signals see: full-range 8-bit luma, its longer side scaled down to this."""

FRAMES = ("frame", "time_s", "key", "luma")
_WORK_PX = LONGER_SIDE_PX // 2
_MIN_PX = 16


def frames_table(
    frames: Sequence[int], times_s: Sequence[float], key: Sequence[bool], luma_NHW: np.ndarray
) -> pa.Table:
    """What signals read; the pictures are not copied.

    Args:
        frames: Numbers of consecutive frames.
        times_s: When they are shown.
        key: Whether they are coded without reference to others.
        luma_NHW: Full-range pictures, uint8.
    """
    columns = {
        "frame": pa.array(frames, pa.int64()),
        "time_s": pa.array(times_s, pa.float64()),
        "key": pa.array(key, pa.bool_()),
        "luma": pa.FixedShapeTensorArray.from_numpy_ndarray(luma_NHW),
    }
    return pa.table(columns)


def luma_of(frames: pa.Table) -> np.ndarray:
    """The pictures of such a table, uint8 (N, H, W), without a copy where they are one chunk."""
    column = frames["luma"]
    chunk = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return chunk.to_numpy_ndarray()


def _schema(name: str, about: str, unit: str = "", kind: pa.DataType | None = None) -> pa.Schema:
    metadata = {"about": about, "source": "Mimir appendix A"} | ({"unit": unit} if unit else {})
    return pa.schema([pa.field(name, kind or pa.float32(), metadata=metadata)])


@dataclass(frozen=True, kw_only=True)
class FrameSignal(Operator):
    """An operator whose rows are consecutive frames of one source."""

    reads: ClassVar[tuple[str, ...]] = FRAMES
    row: ClassVar[str] = "frame"
    libraries: ClassVar[tuple[str, ...]] = ("opencv-python", "numpy")
    context: ClassVar[int] = 0
    """Frames before a frame that its value depends on; these must lie in the same clip to count."""


@dataclass(frozen=True, kw_only=True)
class Brightness(FrameSignal):
    """Mean luma, 0 (black) to 1 (white), gamma-encoded as displayed.

    Misleads on letterboxed pictures, whose bars count, and on HDR, which is not tone-mapped.
    """

    writes: ClassVar[pa.Schema] = _schema("brightness", "mean luma, 0 to 1")

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Frames to their mean luma."""

        def measure(frames: pa.Table) -> pa.Table:
            means = [cv2.mean(image)[0] / 255 for image in luma_of(frames)]
            return pa.table([pa.array(means, pa.float32())], schema=self.writes)

        return measure


@dataclass(frozen=True, kw_only=True)
class BlackArea(FrameSignal):
    """Share of pixels darker than `level`, mean over frames.

    Misleads on night scenes, and on thin dark lines, which scaling down makes grey.
    """

    writes: ClassVar[pa.Schema] = _schema("black_area_frac", "share of black pixels")
    level: float = 0.1
    """Luma, 0 to 1, below which a pixel is black."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Frames to their share of black pixels."""

        def measure(frames: pa.Table) -> pa.Table:
            shares = _black_shares(luma_of(frames), self.level)
            return pa.table([pa.array(shares, pa.float32())], schema=self.writes)

        return measure


@dataclass(frozen=True, kw_only=True)
class BlackFrames(FrameSignal):
    """Whether at least `share` of a frame is darker than `level`; of a clip, the share of such."""

    media: ClassVar[tuple[str, ...]] = ("video",)
    writes: ClassVar[pa.Schema] = _schema(
        "black_frame_frac", "share of black frames", kind=pa.bool_()
    )
    level: float = 0.1
    """Luma, 0 to 1, below which a pixel is black."""
    share: float = 0.98
    """Share of black pixels from which a frame is black."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Frames to whether they are black."""

        def measure(frames: pa.Table) -> pa.Table:
            black = _black_shares(luma_of(frames), self.level) >= self.share
            return pa.table([pa.array(black)], schema=self.writes)

        return measure


def _black_shares(luma_NHW: np.ndarray, level: float) -> np.ndarray:
    top = np.ceil(level * 255) - 1  # largest value that is below the level
    num_pixels = luma_NHW.shape[1] * luma_NHW.shape[2]
    bright = [
        cv2.countNonZero(cv2.threshold(image, top, 1, cv2.THRESH_BINARY)[1]) for image in luma_NHW
    ]
    return 1 - np.array(bright, np.float64) / num_pixels


@dataclass(frozen=True, kw_only=True)
class Motion(FrameSignal):
    """Mean length of dense optical flow, in px per frame, on a picture 320 px at its longer side.

    Flow is DIS. It counts where the picture changes by more than noise does; what changes nowhere
    so reads exactly 0. Areas without texture say nothing of motion, so the mean leaves them out,
    but never more than half of the picture. Pairs of neighbouring frames are sampled on a grid of
    time, beside key frames; the other frames are null, and so is a clip that holds no pair.

    Noise reads 0 up to a standard deviation of 3 of 255 on the small picture (a 720p original may
    have four times that). Misleads where light flickers or fades by some 10 % a frame (reads as
    motion), below 0.25 px per frame (may read 0), where little moves before a flat wall (reads up
    to three times as much), and between clips of other frame rates, as it is per frame.

    Source: Kroeger et al., "Fast Optical Flow using Dense Inverse Search" (2016).
    """

    media: ClassVar[tuple[str, ...]] = ("video",)
    writes: ClassVar[pa.Schema] = _schema(
        "motion_score", "mean optical flow, longer side 320 px", unit="px/frame"
    )
    context: ClassVar[int] = 1
    pairs_per_s: float = 2.0
    """How many neighbouring pairs are measured, at most, a second."""
    noise_level: float = 3.0
    """Locally averaged change of luma, of 255, that only motion reaches."""
    edge_level: float = 0.8
    """Change down to which the surroundings of such a place move, too."""
    floor_px: float = 0.1
    """Flow of a pixel below this is 0."""
    mean_floor_px: float = 0.01
    """A mean below this is 0: key frames of coarsely coded clips make still pictures breathe."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Frames to the flow from the frame before."""
        flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        flow.setFinestScale(0)
        flow.setPatchStride(5)
        flow.setGradientDescentIterations(6)

        def measure(frames: pa.Table) -> pa.Table:
            luma_NHW = luma_of(frames)
            scores: list[float | None] = [None] * len(luma_NHW)
            for i in self._sampled(frames["time_s"].to_numpy(), frames["key"].to_numpy(False)):
                scores[i] = self._pair(flow, _work_size(luma_NHW[i - 1]), _work_size(luma_NHW[i]))
            return pa.table([pa.array(scores, pa.float32())], schema=self.writes)

        return measure

    def _sampled(self, times_s: np.ndarray, key: np.ndarray) -> np.ndarray:
        """Frames that are measured against the one before: the first ones of a slot of time.

        Where that is a key frame, whose coding errors differ from its neighbours' and look like
        motion, the next one. A choice that depends on two frames alone is the same in any batch.
        """
        before, after = times_s[:-1], times_s[1:]
        first = self._slots(after) != self._slots(before)
        first_was_before = self._slots(before) != self._slots(2 * before - after)
        alone, begins = key[1:] & ~key[:-1], key[:-1] & ~key[1:]
        return np.flatnonzero((first & ~alone) | (first_was_before & begins)) + 1

    def _slots(self, times_s: np.ndarray) -> np.ndarray:
        return np.floor(times_s * self.pairs_per_s)

    def _pair(self, flow: cv2.DISOpticalFlow, before_HW: np.ndarray, after_HW: np.ndarray) -> float:
        change_HW = _local_change(before_HW, after_HW)
        if change_HW.max() < self.noise_level:
            return 0.0
        # Each place of certain change, with the weaker change around it.
        count, labels_HW = cv2.connectedComponents(
            (change_HW > self.edge_level).astype(np.uint8), connectivity=4
        )
        certain = np.zeros(count, bool)
        certain[labels_HW[change_HW >= self.noise_level]] = True
        changed_HW = certain[labels_HW]

        flow_HW2 = flow.calc(before_HW, after_HW, None)
        length_HW = cv2.magnitude(flow_HW2[..., 0], flow_HW2[..., 1])
        texture_HW = _local_texture(after_HW)
        still_HW = length_HW < self.floor_px * _WORK_PX / LONGER_SIDE_PX
        # Texture that shows no change, whatever the flow claims, or that the flow leaves in place.
        contradicted_HW = texture_HW * length_HW > 20 * self.edge_level
        known = np.count_nonzero(
            changed_HW | contradicted_HW | (still_HW & (texture_HW > self.edge_level))
        )
        total = length_HW[changed_HW & ~still_HW].sum(dtype=np.float64)
        mean_px = float(total / max(known, change_HW.size / 2)) * LONGER_SIDE_PX / _WORK_PX
        return mean_px if mean_px >= self.mean_floor_px else 0.0


def _work_size(luma_HW: np.ndarray) -> np.ndarray:
    """A picture of 160 px at its longer side, whatever the source, and large enough for flow.

    Softened, as flow is found to parts of a pixel by linear interpolation, which detail misleads.
    """
    height, width = luma_HW.shape
    scale = _WORK_PX / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(luma_HW, size, interpolation=how)
    missing = [max(0, _MIN_PX - side) for side in small.shape]
    if any(missing):
        small = cv2.copyMakeBorder(small, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    return cv2.GaussianBlur(small, (5, 5), 1.2)


def _local_change(before_HW: np.ndarray, after_HW: np.ndarray) -> np.ndarray:
    """Change of luma beyond that of the wider surroundings, averaged so that noise cancels out."""
    difference = cv2.subtract(before_HW, after_HW, dtype=cv2.CV_16S)
    near = cv2.boxFilter(difference, cv2.CV_32F, (3, 3))
    wide = cv2.boxFilter(near, -1, (21, 21))
    return cv2.boxFilter(np.abs(near - wide), -1, (3, 3))


def _local_texture(luma_HW: np.ndarray) -> np.ndarray:
    """Mean gradient in levels per px."""
    smooth = cv2.boxFilter(luma_HW, cv2.CV_32F, (3, 3))
    along, down = (cv2.Sobel(smooth, cv2.CV_32F, dx, 1 - dx, scale=1 / 8) for dx in (1, 0))
    return cv2.boxFilter(cv2.magnitude(along, down), -1, (3, 3))
