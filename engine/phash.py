"""A perceptual hash of every keyframe: near-equal pictures have near-equal hashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from engine.operator import Failed, Operator, results
from engine.schema import CLIPS

cv2.setNumThreads(1)  # the pipeline runs one process a core

FLAT = 0
"""Instead of a hash where a picture is too flat to have one. No picture has it as its hash."""
_SIDE, _LOW = 32, slice(1, 9)
_WEIGHTS = np.left_shift(np.uint64(1), np.arange(63, -1, -1, dtype=np.uint64))


@dataclass(frozen=True, kw_only=True)
class PerceptualHash(Operator):
    """64-bit hashes of a clip's keyframes, for near-duplicates.

    Re-encoding, scaling and a change of brightness or contrast leave a hash within a few bits;
    unrelated pictures differ in about 32. Mirrored, turned, cropped or newly framed pictures
    count as others. Of drawn pictures (stripes, a gradient) most of those frequencies are empty,
    and so are told as flat.
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("phash"), CLIPS.field("phashes")])
    libraries: ClassVar[tuple[str, ...]] = ("opencv-python", "numpy")

    min_spread: float = 2.0
    """Least median distance of the coefficients from their median, in levels: under it noise of
    coding decides most bits, and the hash is `FLAT`."""

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function that needs no weights."""

        def measure(clips: pa.Table) -> pa.Table:
            return results(self.writes, [self._row(k) for k in clips["keyframes"].to_pylist()])

        return measure

    def _row(self, keyframes: list[dict[str, Any]]) -> dict[str, Any] | Failed:
        if not keyframes:
            return Failed("ValueError", "a hash needs a keyframe, and the clip has none")
        try:
            hashes = [phash(_grey(k["jpeg"]), self.min_spread) for k in keyframes]
        except ValueError as error:
            return Failed("ValueError", str(error))
        return {"phash": hashes[len(hashes) // 2], "phashes": hashes}


def phash(grey_HW: np.ndarray, min_spread: float = 2.0) -> int:
    """The DCT hash of a picture, or `FLAT`.

    The picture is averaged to 32x32 (keeping no aspect ratio), its orthonormal DCT-II taken, and
    of that the 8x8 block of rows 1 to 8 and columns 1 to 8, without the constant and what varies
    along one axis alone. A bit is 1 where a coefficient exceeds the median of the 64 (the mean of
    the middle two), row by row, the first one highest: so 32 bits are 1.

    Args:
        grey_HW: uint8 (H, W).
        min_spread: As in `PerceptualHash`.

    Source:
        Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), 3.2.1
        (DCT based hash), with averaging by area in place of its 7x7 mean filter.
    """
    small = cv2.resize(grey_HW.astype(np.float32), (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small)[_LOW, _LOW].ravel()
    apart = low - np.median(low)
    if np.median(np.abs(apart)) < min_spread:
        return FLAT
    return int(_WEIGHTS[apart > 0].sum())


def _grey(jpeg: bytes) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise ValueError(f"a keyframe of {len(jpeg)} bytes cannot be decoded")
    return image
