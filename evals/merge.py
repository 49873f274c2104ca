"""From the rows of videos to the number of a model: VBench's formulas, to the bit.

They are those of its single process. Its own runs on several GPUs merge subject_consistency (mean
of videos in place of mean of frames) and appearance_style (mean of the videos' last frames) by
others, and give other numbers.

Source: `vbench==0.1.5`, the function of each dimension's name in the module of that name.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Rows = Sequence[Mapping[str, Any]]


def merge(dimension: str, rows: Rows) -> float | None:
    """A model's score in a dimension, about 0 to 1.

    Args:
        dimension: VBench's name. Of one that it does not have, it is the plain mean of videos.
        rows: Details of its videos, in the order of the suite, on which the last bits depend.
            A video in which the object of `color` was never found has no score, and is left out.

    Returns:
        None where there is nothing to merge.
    """
    scored = [row for row in rows if row.get("video_results") is not None]
    return float(_FORMULAS.get(dimension, _mean)(scored)) if scored else None


def _sum(values: Iterable[float]) -> float:
    """One after another: from Python 3.12 on `sum` corrects for rounding, which VBench's += not."""
    return functools.reduce(operator.add, values, 0.0)


def _mean(rows: Rows) -> float:
    return float(np.mean([row["video_results"] for row in rows]))


def _mean_in_order(rows: Rows) -> float:
    return _sum(row["video_results"] for row in rows) / len(rows)


def _imaging_quality(rows: Rows) -> float:
    """Of videos from 0 to 100. Here the package itself says `sum`."""
    return sum([row["video_results"] for row in rows]) / len(rows) / 100.0


def _subject_consistency(rows: Rows) -> float:
    """Mean over frames: the first of each video has no score."""
    return _sum(_total(row) for row in rows) / sum(row["num_frames"] - 1 for row in rows)


def _total(row: Mapping[str, Any]) -> float:
    if "video_sim" in row:
        return row["video_sim"]
    return row["video_results"] * (row["num_frames"] - 1)  # within a bit of it


def _background_consistency(rows: Rows) -> float:
    return _sum(row["video_sim"] for row in rows) / sum(row["cnt_per_video"] for row in rows)


def _appearance_style(rows: Rows) -> float:
    frames = [score for row in rows for score in row["frame_results"]]
    return _sum(frames) / len(frames)


def _spatial_relationship(rows: Rows) -> float:
    return float(np.mean([score for row in rows for score in row["frame_results"]]))


def _success(rows: Rows) -> float:
    found = sum(row["success_frame_count"] for row in rows)
    return found / sum(row["frame_count"] for row in rows)


def _human_action(rows: Rows) -> float:
    return sum(row["cor_num_per_video"] for row in rows) / len(rows)


_FORMULAS: dict[str, Callable[[Rows], float]] = {
    "subject_consistency": _subject_consistency,
    "background_consistency": _background_consistency,
    "aesthetic_quality": _mean_in_order,
    "imaging_quality": _imaging_quality,
    "object_class": _success,
    "multiple_objects": _success,
    "scene": _success,
    "human_action": _human_action,
    "color": _mean_in_order,
    "spatial_relationship": _spatial_relationship,
    "appearance_style": _appearance_style,
}
"""Of the others the package takes numpy's mean of videos."""
