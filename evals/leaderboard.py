"""VBench's leaderboard: how sixteen dimensions become three numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from evals.dimensions import DIMENSIONS, VBENCH

CONSTANTS_VERSION = "vbench-leaderboard 45e79ec (2026-03-23)"
"""Commit of VBench whose `scripts/constant.py` has the numbers below."""

BOUNDS = dict.fromkeys(VBENCH, (0.0, 1.0)) | {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""What counts as 0 and as 1 (`NORMALIZE_DIC`)."""
WEIGHTS = {name: 0.5 if name == "dynamic_degree" else 1.0 for name in VBENCH}
"""Within quality and within semantic (`DIM_WEIGHT`)."""
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0
QUALITY = tuple(name for name in VBENCH if DIMENSIONS[name].kind == "quality")
SEMANTIC = tuple(name for name in VBENCH if DIMENSIONS[name].kind == "semantic")


class Total(NamedTuple):
    """A model's scores over several dimensions, about 0 to 1; nothing is clipped, as upstream."""

    quality: float
    semantic: float
    total: float


def normalised(dimension: str, value: float) -> float | None:
    """A dimension's score between the leaderboard's bounds, unclipped; None where it has none.

    Args:
        dimension: Name.
        value: Merged score, 0 to 1: `imaging_quality` divided by 100.
    """
    if dimension not in BOUNDS:
        return None
    low, high = BOUNDS[dimension]
    return (value - low) / (high - low)


def quality(values: Mapping[str, float | None], incomplete: Collection[str] = ()) -> float:
    """The weighted mean of the seven normalised quality dimensions; see `total`."""
    return _mean("quality", QUALITY, values, incomplete)


def semantic(values: Mapping[str, float | None], incomplete: Collection[str] = ()) -> float:
    """The mean of the nine normalised semantic dimensions; see `total`."""
    return _mean("semantic", SEMANTIC, values, incomplete)


def total(values: Mapping[str, float | None], incomplete: Collection[str] = ()) -> Total:
    """Quality, semantic and total score of a model.

    Upstream counts a missing dimension as 0, which normalises to less than 0 and looks like a bad
    model: here it is refused.

    Args:
        values: Merged score, 0 to 1, by dimension; other names than VBench's are left alone.
        incomplete: Dimensions in which a video of the suite has no score.

    Raises:
        ValueError: Where one of the sixteen dimensions is missing or incomplete, by name.

    Source:
        VBench, `scripts/cal_final_score.py`: (4 * quality + semantic) / 5.
    """
    _refuse("total", VBENCH, values, incomplete)
    parts = quality(values), semantic(values)
    weighted = QUALITY_WEIGHT * parts[0] + SEMANTIC_WEIGHT * parts[1]
    return Total(*parts, weighted / (QUALITY_WEIGHT + SEMANTIC_WEIGHT))


def _mean(
    name: str,
    dimensions: tuple[str, ...],
    values: Mapping[str, float | None],
    incomplete: Collection[str],
) -> float:
    found = _refuse(name, dimensions, values, incomplete)
    score = {d: (found[d] - BOUNDS[d][0]) / (BOUNDS[d][1] - BOUNDS[d][0]) for d in dimensions}
    return sum(WEIGHTS[d] * score[d] for d in dimensions) / sum(WEIGHTS[d] for d in dimensions)


def _refuse(
    name: str,
    dimensions: tuple[str, ...],
    values: Mapping[str, float | None],
    incomplete: Collection[str],
) -> dict[str, float]:
    """The values that a score is made of, all of them."""
    found = {d: value for d in dimensions if (value := values.get(d)) is not None}
    said = [f"{d} is missing" for d in dimensions if d not in found]
    said += [f"{d} is incomplete" for d in dimensions if d in found and d in incomplete]
    if said:
        raise ValueError(
            f"the {name} score needs all {len(dimensions)} dimensions, each over all videos of the"
            f" suite: {', '.join(said)}; score them first"
        )
    return found
