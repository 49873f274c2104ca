"""Nights of a dataset, and how scores went from one to the next: read from `runs` alone.

A nightly run stores its report beside its counts, so that months of nights open at once: neither
scores nor videos are read, and what it was asked for (suites are long) only where it is needed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from engine.tables import read
from evals.evaluation import KIND, Plan
from evals.report import Report

NIGHTS = 30
"""That a trend shows, unless another number is asked for."""


@dataclass(frozen=True, kw_only=True)
class Night:
    """A nightly evaluation."""

    date: str
    """YYYY-MM-DD."""
    run_id: str
    asked: str
    """Fingerprint of what its command asked for, beside models (`evals.nightly.fingerprint`)."""
    read: Callable[[], Plan] = field(repr=False)
    finished: bool
    """It came to its end; one that did not is there only where no later one did its work."""
    report: Report | None = None
    """What it found; None where it did not finish."""

    @functools.cached_property
    def plan(self) -> Plan:
        """What it was asked for."""
        return self.read()

    @property
    def models(self) -> tuple[str, ...]:
        """Their names."""
        if self.report is not None:
            return tuple(model.name for model in self.report.models)
        return tuple(model["name"] for model in self.plan.models)


@dataclass(frozen=True, kw_only=True)
class TrendPoint:
    """A model's score in a dimension on a night."""

    date: str
    model: str
    dimension: str
    """Or a drift, such as `drift:imaging_quality`, of which less is better."""
    value: float | None
    """0 to 1; None where no video was scored."""
    stderr: float | None
    num_videos: int
    run_id: str
    fingerprint: str = ""
    """Of the metric: points with different ones are not to be compared."""
    num_failed: int = 0
    regressed: bool = False
    """It fell beyond its noise on this night."""
    checkpoint: str | None = None
    is_tiny: bool = False
    """Small random weights gave it: it means nothing."""


def nights_of(root: str, recipe: str | None = None) -> list[Night]:
    """Nights of a dataset, the newest first.

    Args:
        root: The dataset.
        recipe: Of this recipe alone.

    Raises:
        DatasetError: There is no dataset.
    """
    found, done = [], set[tuple[str, ...]]()
    for row in _rows(root, recipe):
        counts = json.loads(row["counts"] or "{}")
        report = Report.of(counts["night"]) if "night" in counts else None
        night = Night(
            date=row["night"],
            run_id=row["run_id"],
            asked=report.asked if report else counts.get("asked", ""),
            read=functools.partial(_plan, root, row["run_id"]),
            finished=not row["interrupted"],
            report=report,
        )
        keys = {(night.date, row["recipe"], night.asked, name) for name in night.models}
        if night.finished:
            done |= keys
        elif keys <= done:
            continue  # gone on with
        found.append(night)
    return found


def trend(root: str, recipe: str | None = None, nights: int = NIGHTS) -> list[TrendPoint]:
    """Scores of the last finished nights, the oldest first; of a date the one of most videos.

    Args:
        root: The dataset.
        recipe: Of this recipe; by default that of the newest night.
        nights: So many dates at most.

    Raises:
        DatasetError: There is no dataset.
    """
    dates: set[str] = set()
    points: dict[tuple[str, str, str], TrendPoint] = {}
    for row in _rows(root, recipe):
        if row["interrupted"] or (recipe is not None and row["recipe"] != recipe):
            continue
        if len(dates) == nights and row["night"] not in dates:
            break
        recipe = row["recipe"]
        said = json.loads(row["counts"] or "{}").get("night")
        if said is None:
            continue
        dates.add(row["night"])
        for point in points_of(Report.of(said)):
            known = points.setdefault((point.date, point.model, point.dimension), point)
            if point.num_videos > known.num_videos:
                points[point.date, point.model, point.dimension] = point
    return sorted(points.values(), key=lambda p: (p.date, p.model, p.dimension))


def points_of(report: Report) -> Iterator[TrendPoint]:
    """The scores of one night."""
    fell = {(c.model, c.dimension) for c in report.regressions}
    for model in report.models:
        for score in model.scores:
            yield TrendPoint(
                date=report.date,
                model=model.name,
                dimension=score.dimension,
                value=score.value,
                stderr=score.stderr,
                num_videos=score.num_videos,
                run_id=model.run_id,
                fingerprint=score.fingerprint,
                num_failed=score.num_failed,
                regressed=(model.name, score.dimension) in fell,
                checkpoint=model.checkpoint,
                is_tiny=model.is_tiny,
            )


def _rows(root: str, recipe: str | None) -> list[dict[str, Any]]:
    """Rows of `runs` that are nights, the newest first, `recipe` without what tells its kind."""
    table = read(root, "runs")
    if "night" not in table.schema.names:  # of an earlier version, which had no nights
        return []
    found: list[dict[str, Any]] = table.to_table(
        columns=["run_id", "recipe", "night", "started_at", "interrupted", "counts"],
        filter=f"night IS NOT NULL AND starts_with(recipe, '{KIND}')",
    ).to_pylist()
    for row in found:
        row["recipe"] = row["recipe"].removeprefix(KIND)
    found = [row for row in found if recipe in (None, row["recipe"])]
    return sorted(found, key=lambda row: (row["night"], row["started_at"]), reverse=True)


def _plan(root: str, run_id: str) -> Plan:
    rows = read(root, "runs").to_table(
        columns=["run_id", "resolved", "counts"], filter=f"run_id = '{run_id}'"
    )
    (row,) = rows.to_pylist()
    return Plan.of(row)
