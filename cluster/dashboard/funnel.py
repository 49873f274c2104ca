"""The funnel of a dataset: what went in, what each rule took in its order, what is left."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dashboard import lance_sql
from cluster.dashboard.runs import Run, runs
from engine.accounts import CLIP_STATES, SOURCE_STATES
from engine.operator import Stage
from engine.tables import identity
from pipelines.recipes import NAMES, Recipe, recipe

OTHER = "other"
"""Stage of a reason that no rule of the recipe gives."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """Clips that met one end."""

    state: str
    stage: str | None
    reason: str | None
    num: int
    video_s: float | None
    """Together; None where it is not known."""
    bound: float | None = None
    """That the rejecting rule had."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row of the funnel."""

    stage: str
    label: str
    state: str
    num: int
    """Clips that it takes; of the first and the last row, clips that are there."""
    video_s: float | None
    left: int
    """Clips that are left behind it."""


def recipe_of(root: str) -> Recipe | None:
    """The recipe that a dataset was curated with; None where it was not, or none that is known."""
    name = identity(root)["recipe"]
    return recipe(name) if name in NAMES else None


def tallies(root: str) -> list[Tally]:
    """Clips by state, stage and reason, as they are published now."""
    found = lance_sql.streamed(
        root,
        "clips",
        ("state", "stage", "reason", "rule_bound", "duration_s"),
        "SELECT state, stage, reason, rule_bound AS bound, count(*) AS num,"
        " coalesce(sum(duration_s), 0) AS video_s"
        " FROM rows GROUP BY ALL ORDER BY num DESC, reason, stage, bound",
    )
    return [Tally(**row) for row in found.to_pylist()]


def totals(counted: Iterable[Tally], by: str) -> dict[str, int]:
    """Clips by `state`, `stage` or `reason`: states in their order, others by number."""
    found: dict[str, int] = {}
    for tally in counted:
        if value := getattr(tally, by):
            found[value] = found.get(value, 0) + tally.num

    def place(item: tuple[str, int]) -> tuple[int, int, str]:
        word, num = item
        order = CLIP_STATES.index(word) if word in CLIP_STATES else len(CLIP_STATES)
        return order, -num, word

    return dict(sorted(found.items(), key=place))


def tallies_of(run: Run) -> list[Tally]:
    """The same, of a run that is past: without hours, which it did not record."""
    lost = [
        Tally(state="rejected", stage=None, reason=reason, num=num, video_s=None)
        for reason, num in (run.counts.get("reasons") or {}).items()
    ]
    rest = [
        Tally(state=state, stage=None, reason=None, num=num, video_s=None)
        for state, num in run.counts["clips"].items()
        if state in CLIP_STATES and state != "rejected" and num
    ]
    return [*lost, *rest]


def steps(stages: Sequence[Stage], counted: Iterable[Tally]) -> list[Step]:
    """Rows of the funnel: all clips, each reason in the recipe's order, other states, the kept."""
    counted = list(counted)
    places = {
        (rule.column, sign): (number, place)
        for number, stage in enumerate(stages)
        for place, rule in enumerate(stage.rules)
        for sign in [*(sign for sign, _ in rule.bounds), *(("=",) if rule.empty else ())]
    }

    def order(tally: Tally) -> tuple[int, int, int, str]:
        place = places.get(parsed(tally.reason or ""), (len(stages), 0))
        return (*place, -tally.num, tally.reason or "")

    left = sum(t.num for t in counted)
    found = [_step("", "clips", "", counted, left)]
    by_reason: dict[str | None, list[Tally]] = {}
    for tally in sorted((t for t in counted if t.state == "rejected"), key=order):
        by_reason.setdefault(tally.reason, []).append(tally)
    for reason, some in by_reason.items():
        number = places.get(parsed(reason or ""), (None, 0))[0]
        stage = stages[number].name if number is not None else some[0].stage or OTHER
        left -= sum(t.num for t in some)
        found.append(_step(stage, reason or "rejected", "rejected", some, left))
    for state in ("failed", "duplicate", "pending"):
        if some := [t for t in counted if t.state == state]:
            left -= sum(t.num for t in some)
            found.append(_step(state, state, state, some, left))
    kept = [t for t in counted if t.state == "kept"]
    return [*found, _step("", "kept", "kept", kept, left)]


def parsed(reason: str) -> tuple[str, str]:
    """Column and comparison of a reason such as `brightness<0.2`."""
    found = re.match(r"(\w+)(<=|<|>|=)", reason)
    return (found[1], found[2]) if found else (reason, "")


def _step(stage: str, label: str, state: str, some: Sequence[Tally], left: int) -> Step:
    known = [t.video_s for t in some if t.video_s is not None]
    return Step(
        stage=stage,
        label=label,
        state=state,
        num=sum(t.num for t in some),
        video_s=sum(known) if len(known) == len(some) else None,
        left=left,
    )


def sources(root: str) -> dict[str, dict[str, Any]]:
    """Sources by state: `num`, `video_s`, `size_bytes`, and how many are `missing` now."""
    found = lance_sql.streamed(
        root,
        "sources",
        ("state", "duration_s", "size_bytes", "missing"),
        "SELECT state, count(*) AS num, coalesce(sum(duration_s), 0) AS video_s,"
        " coalesce(sum(size_bytes), 0)::BIGINT AS size_bytes,"
        " count(*) FILTER (missing) AS missing FROM rows GROUP BY state",
    ).to_pylist()
    none = {"num": 0, "video_s": 0.0, "size_bytes": 0, "missing": 0}
    return dict.fromkeys(SOURCE_STATES, none) | {row.pop("state"): row for row in found}


def failures(root: str, num: int = 12) -> list[dict[str, Any]]:
    """The most common failures, of sources and of clips: what, where, how many, an example."""
    of_sources = lance_sql.streamed(
        root,
        "sources",
        ("state", "error_type", "error", "uri"),
        "SELECT 'source' AS what, 'scan' AS operator, error_type, min(error) AS error,"
        " count(*) AS num, min(uri) AS example FROM rows WHERE state = 'failed'"
        f" GROUP BY error_type ORDER BY num DESC, error_type LIMIT {num}",
    )
    of_clips = lance_sql.streamed(
        root,
        "clips",
        ("state", "error_operator", "error_type", "error", "clip_id"),
        "SELECT 'clip' AS what, coalesce(error_operator, 'scan') AS operator, error_type,"
        " min(error) AS error, count(*) AS num, min(clip_id) AS example FROM rows"
        f" WHERE state = 'failed' GROUP BY ALL ORDER BY num DESC, error_type LIMIT {num}",
    )
    found = [*of_sources.to_pylist(), *of_clips.to_pylist()]
    return sorted(found, key=lambda f: -f["num"])[:num]


def curations(root: str) -> list[Run]:
    """Runs that curated and recorded their counts, oldest first."""
    return [run for run in reversed(runs([root])) if isinstance(run.counts.get("clips"), dict)]
