"""How much of a clip's pictures is covered by text, found by RapidOCR."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa

from engine.operator import Failed, Operator, resource, results
from engine.picture import rgb_of
from engine.schema import CLIPS

cv2.setNumThreads(1)  # the pipeline runs one process a core


@dataclass(frozen=True, kw_only=True)
class TextCoverage(Operator):
    """Share of the frame under boxes of text, 0 to 1, mean over keyframes.

    Boxes may overlap and lie aslant: what counts is the area of their union. Only text detection
    runs, nothing is read. Misleads on patterns that look like writing (grids, brickwork); sees no
    text lower than about 8 px, nor letters higher than a third of the picture.

    Source:
        Mimir (arXiv 2412.03085), appendix A, OCR coverage, which names no detector. PP-OCR's
        detection model, through RapidOCR, whose wheel carries it (Apache-2.0 both).
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("ocr_area_frac")])
    libraries: ClassVar[tuple[str, ...]] = ("rapidocr", "onnxruntime", "opencv-python")

    num_frames: int = 3
    """Keyframes that are looked at, evenly spread over the clip."""
    longer_side_px: int = 640
    """Larger pictures are scaled down to this."""
    unclip_ratio: float = 0.85
    """How far a box is blown up from the core of the text that the model marks: with this, boxes
    end where the ink does, within some percent."""
    box_thresh: float = 0.6
    """Least mean probability of text in a box."""

    max_height_frac: float = 0.35
    """Of the picture's shorter side: a higher box is none of text. What the detector takes for
    text by mistake is mostly a round thing that fills the picture, such as a cup from above."""

    batch_size: int = resource(8)

    def check(self) -> None:
        """RapidOCR and the engine that runs its models are installed."""
        lacking = [n for n in ("rapidocr", "onnxruntime") if importlib.util.find_spec(n) is None]
        if lacking:
            raise ValueError(f"OCR coverage needs them: pip install {' '.join(lacking)}")

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the detection model, on one core."""
        from rapidocr import RapidOCR

        params: dict[str, Any] = {
            "Global.log_level": "critical",
            "Global.use_cls": False,
            "Global.use_rec": False,
            "Global.use_vertical_padding": False,
            "Det.limit_type": "max",
            "Det.limit_side_len": self.longer_side_px,
            "Det.unclip_ratio": self.unclip_ratio,
            "Det.box_thresh": self.box_thresh,
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        engine = RapidOCR(params=params)

        def detect(image_HWC: np.ndarray) -> list[np.ndarray]:
            found = engine(image_HWC, use_det=True, use_cls=False, use_rec=False).boxes
            highest = self.max_height_frac * min(image_HWC.shape[:2])
            boxes = [] if found is None else [np.asarray(box, np.float32) for box in found]
            return [box for box in boxes if min(cv2.minAreaRect(box)[1]) <= highest]

        def measure(clips: pa.Table) -> pa.Table:
            rows = [self._row(detect, k or []) for k in clips["keyframes"].to_pylist()]
            return results(self.writes, rows)

        return measure

    def _row(
        self,
        detect: Callable[[np.ndarray], Sequence[np.ndarray]],
        keyframes: Sequence[dict[str, Any]],
    ) -> dict[str, float] | Failed:
        if not keyframes:
            return Failed("NoKeyframes", "text is looked for in keyframes, and there is none")
        shares = []
        for index in spread(len(keyframes), self.num_frames):
            try:
                image_HWC = np.ascontiguousarray(rgb_of(keyframes[index]["jpeg"])[..., ::-1])
            except ValueError as error:
                return Failed("DecodeError", str(error))
            shares.append(covered(detect(image_HWC), image_HWC.shape[:2]))
        return {"ocr_area_frac": float(np.mean(shares))}


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` places: those in the middle of as many equal parts."""
    num = min(count, wanted)
    return [(2 * part + 1) * count // (2 * num) for part in range(num)]


def covered(boxes: Sequence[np.ndarray], size: tuple[int, int]) -> float:
    """Share of a picture under the union of boxes.

    Args:
        boxes: Corners of each as (x, y) in px, in order around it, shape (4, 2).
        size: Height and width of the picture in px.
    """
    mask_HW = np.zeros(size, np.uint8)
    for box_42 in boxes:
        cv2.fillPoly(mask_HW, [np.round(box_42).astype(np.int32)], 1)
    return cv2.countNonZero(mask_HW) / mask_HW.size
