"""Nights of a dataset, and how scores went from one to the next: read from `runs` alone.

A nightly run stores its report beside its counts, so that months of nights open at once: neither
scores nor videos are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    models: tuple[str, ...]
    plan: Plan
    finished: bool
    """It came to its end; one that did not is there only where no later one did its work."""
    report: Report | None = None
    """What it found; None where it did not finish."""


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


def nights_of(root: str, recipe: str | None = None, *, before: str | None = None) -> list[Night]:
    """Nights of a dataset, the newest first; one a date and set of models.

    Args:
        root: The dataset.
        recipe: Of this recipe alone.
        before: Of earlier dates than this one.

    Raises:
        DatasetError: There is no dataset.
    """
    found, done = [], set[tuple[str, str, str]]()
    for row in _rows(root, recipe, before):
        plan = Plan.of(row)
        models = tuple(m["name"] for m in plan.models)
        keys = {(row["night"], plan.recipe, name) for name in models}
        if row["interrupted"] and keys <= done:
            continue  # gone on with
        said = json.loads(row["counts"] or "{}").get("night")
        if not row["interrupted"]:
            done |= keys
        found.append(
            Night(
                date=row["night"],
                run_id=row["run_id"],
                models=models,
                plan=plan,
                finished=not row["interrupted"],
                report=Report.of(said) if said else None,
            )
        )
    return found


def trend(root: str, recipe: str | None = None, nights: int = NIGHTS) -> list[TrendPoint]:
    """Scores of the last finished nights, the oldest first.

    Args:
        root: The dataset.
        recipe: Of this recipe; by default that of the newest night.
        nights: So many dates at most.

    Raises:
        DatasetError: There is no dataset.
    """
    dates: set[str] = set()
    points: dict[tuple[str, str, str], TrendPoint] = {}
    for row in _rows(root, recipe, None, columns=("counts",)):
        if row["interrupted"] or (recipe is not None and row["recipe"] != recipe):
            continue
        recipe = row["recipe"]
        said = json.loads(row["counts"] or "{}").get("night")
        if said is None or (len(dates) == nights and row["night"] not in dates):
            continue
        dates.add(row["night"])
        for point in points_of(Report.of(said)):
            points.setdefault((point.date, point.model, point.dimension), point)
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


def _rows(
    root: str, recipe: str | None, before: str | None, columns: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Rows of `runs` that are nights, the newest first, `recipe` without what tells its kind."""
    table = read(root, "runs")
    if "night" not in table.schema.names:  # of an earlier version, which had no nights
        return []
    wanted = columns or ("counts", "resolved")
    where = f"night IS NOT NULL AND starts_with(recipe, '{KIND}')"
    rows: list[dict[str, Any]] = table.to_table(
        columns=["run_id", "recipe", "night", "started_at", "interrupted", *wanted], filter=where
    ).to_pylist()
    found: list[dict[str, Any]] = []
    for row in rows:
        row["recipe"] = row["recipe"].removeprefix(KIND)
        if recipe in (None, row["recipe"]) and (before is None or row["night"] < before):
            found.append(row)
    return sorted(found, key=_when, reverse=True)


def _when(row: Mapping[str, Any]) -> tuple[str, Any]:
    return row["night"], row["started_at"]
