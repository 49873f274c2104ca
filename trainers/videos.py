"""Finished videos as files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_mp4(path: Path, video_FHW3: np.ndarray, fps: float) -> None:
    """Writes uint8 RGB frames as H.264 in an MP4 that browsers play; even sides are needed."""
    height, width = video_FHW3.shape[1:3]
    made = path.with_name(f".{path.name}")
    with av.open(str(made), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # mbtree's assembler rounds differently from one run to the next
        stream.options = {"crf": "18", "x264-params": "mbtree=0"}
        for frame_HW3 in video_FHW3:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    made.replace(path)
