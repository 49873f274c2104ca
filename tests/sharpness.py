"""A metric of one's own, as the README shows it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa

from engine.operator import results
from engine.video import decode, open_video
from evals.metric import Metric


@dataclass(frozen=True, kw_only=True)
class Sharpness(Metric):
    """Variance of the Laplacian, mean over frames. Misleads on grain, which is sharp."""

    implementation: ClassVar[str] = "ours"
    libraries: ClassVar[tuple[str, ...]] = ("av", "opencv-python")

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(asked: pa.Table) -> pa.Table:
            return results(self.writes, [_sharpness(**row) for row in asked.to_pylist()])

        return measure


def _sharpness(path: str, start_frame: int | None, stop_frame: int | None, **_: object) -> dict:
    with open_video(path) as video:
        frames = [f.picture.to_ndarray(format="gray") for f in decode(video)]
    found = [float(cv2.Laplacian(f, cv2.CV_64F).var()) for f in frames[start_frame:stop_frame]]
    return {
        "raw_score": float(np.mean(found)),
        "frame_scores": found,
        "num_frames": len(found),
        "details": json.dumps({"video_results": float(np.mean(found))}),
    }
