"""What a score is made of: a Metric is an Operator that measures videos in some dimensions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from engine.operator import Operator
from engine.schema import field

ASKED = pa.schema(
    [
        field("path", pa.string(), "file on this machine, named as VBench names it: PROMPT-N.mp4"),
        field("dimension", pa.string(), "that it is to be measured in"),
        field("prompt", pa.string(), "short prompt that the video is of"),
        field("auxiliary", pa.string(), "JSON of what else the dimension is told; null is nothing"),
        field("start_frame", pa.int64(), "first frame that counts; null is the first of the file"),
        field("stop_frame", pa.int64(), "frame after the last that counts; null is the file's end"),
    ]
)
"""Columns that a metric reads. Rows of one file lie together: it need be decoded only once."""

SCORED = pa.schema(
    [
        field("raw_score", pa.float64(), "in the dimension's own unit"),
        field(
            "frame_scores",
            pa.list_(pa.float64()),
            "the same unit, one a frame, null for a frame that has none; null where there are none",
        ),
        field("num_frames", pa.int64(), "frames that counted"),
        field(
            "details", pa.string(), "as JSON: what merging videos needs, as the package gives it"
        ),
    ]
)
"""Columns that a metric writes."""

NO_OBJECT = "NoObject"
"""Error of a video that VBench leaves out: nothing failed, what is measured is not in it."""


@dataclass(frozen=True, kw_only=True)
class Metric(Operator):
    """Dimensions that are measured together: models are loaded once, a file is decoded once.

    `load` gives a function from rows of `ASKED` to as many rows of `SCORED` (see
    `engine.operator.results`); a row that cannot be measured is a `Failed`.
    """

    reads: ClassVar[tuple[str, ...]] = tuple(ASKED.names)
    writes: ClassVar[pa.Schema] = SCORED
    row: ClassVar[str] = "video"
    implementation: ClassVar[str]
    """What scores are labelled with: vbench, native …"""

    dimensions: tuple[str, ...]
    """Names in `evals.dimensions`."""

    def key(self, dimension: str) -> str:
        """Fingerprint of one dimension: its scores hold whatever is measured beside it."""
        return dataclasses.replace(self, dimensions=(dimension,)).fingerprint

    def weights(self) -> dict[str, str]:
        """Hash of each file of weights that its dimensions read, by name."""
        return {}

    def environment(self) -> dict[str, Any]:
        """What scores were computed with; asked where they are, after `load`."""
        versions = {name: importlib.metadata.version(name) for name in self.libraries}
        return {"python": platform.python_version()} | versions
