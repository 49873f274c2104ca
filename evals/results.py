"""Scores of a suite as models have them: what tables, ranks and comparisons are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Value:
    """The score of one video in one dimension."""

    prompt: str
    sample: int
    categories: tuple[str, ...]
    score: float | None
    """On the scale 0 to 1 (`Dimension.scale` applied); None where it failed."""
    num_frames: int | None = None
    frame_scores: tuple[float | None, ...] | None = None
    """On the same scale."""
    details: Mapping[str, Any] | None = None
    """What merging videos needs."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A model's score in one dimension (or a drift of it), over all its videos or a category's."""

    model: str
    column: str
    """Name of a dimension, or of a drift such as `drift:imaging_quality`."""
    category: str | None
    value: float | None
    """Merged as VBench's single process merges, 0 to 1; None while nothing was scored."""
    stderr: float | None
    """Standard error of the mean over prompts; None below two prompts."""
    num_videos: int
    """That have a score."""
    num_prompts: int
    num_expected: int
    """Videos that the suite asks for."""
    num_failed: int
    published: str | None = None
    """Where the number was published, if it is not ours."""
    notes: tuple[str, ...] = ()
    """Such as `unfiltered`, `tiny`, `native`."""
    values: Sequence[Value] = ()
    """What it was merged from, in suite order; empty for published cells."""

    @property
    def is_complete(self) -> bool:
        """Every video that the suite asks for has a score."""
        return self.num_videos == self.num_expected > 0
