"""Thresholds of recipes, and those that the verdicts in a dataset were published with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster.dashboard import lance_sql
from cluster.dashboard.funnel import parsed, tallies
from cluster.dashboard.runs import runs
from engine.operator import Stage

Bounds = Mapping[tuple[str, str], float]
"""By column and `lo`, `hi` or `above`."""
SIGNS = {"lo": "<", "above": "<=", "hi": ">"}
"""How a reason says which bound was crossed."""


def bounds_of(stages: Sequence[Stage]) -> dict[tuple[str, str], float]:
    """The thresholds of a recipe, in its order."""
    return {
        (rule.column, which): float(bound)
        for stage in stages
        for rule in stage.rules
        for which in SIGNS
        if (bound := getattr(rule, which)) is not None
    }


def published_bounds(root: str, stages: Sequence[Stage]) -> dict[tuple[str, str], float]:
    """The thresholds that the verdicts in a dataset were published with, as far as they tell.

    Reasons name theirs. Of a bound that rejected no clip nothing is left but that all kept clips
    are within: it is that of the last run, else the recipe's, else as loose as it must have been.
    """
    bounds, names = bounds_of(stages), {sign: which for which, sign in SIGNS.items()}
    ran, told = _of_last_run(root), dict[tuple[str, str], float]()
    kept = _kept_extents(root, tuple(dict.fromkeys(column for column, _ in bounds)))
    for tally in sorted(tallies(root), key=lambda t: t.num):
        if tally.bound is not None:
            column, sign = parsed(tally.reason or "")
            told[column, names.get(sign, "")] = tally.bound
    for (column, which), own in bounds.items():
        low, high = kept[column]
        last = high if which == "hi" else low
        likely = [ran.get((column, which), own), own]
        fitting = (b for b in likely if last is None or _admits(which, b, last))
        bounds[column, which] = told.get((column, which), next(fitting, last))
    return bounds


def _admits(which: str, bound: float, value: float) -> bool:
    # a bound is compared in the type of its signal, which may be float32
    slack = 1e-6 * abs(bound)
    return value <= bound + slack if which == "hi" else value >= bound - slack


def _kept_extents(
    root: str, columns: tuple[str, ...]
) -> dict[str, tuple[float | None, float | None]]:
    """Least and greatest value of the clips that all rules kept."""
    asked = ", ".join(f"min({c}), max({c})" for c in map(lance_sql.identifier, columns))
    if not columns:
        return {}
    row = lance_sql.streamed(
        root,
        "clips",
        (*columns, "state"),
        f"SELECT {asked} FROM rows WHERE state IN ('kept', 'duplicate')",
    )
    ends = [column[0].as_py() for column in row.columns]
    return {c: (ends[2 * i], ends[2 * i + 1]) for i, c in enumerate(columns)}


def _of_last_run(root: str) -> dict[tuple[str, str], float]:
    """The thresholds that the last run recorded."""
    for run in runs([root]):
        rules = [r for s in run.resolved.get("stages") or () for r in s.get("rules", ())]
        if rules:
            return {
                (rule["column"], which): float(rule[which])
                for rule in rules
                for which in SIGNS
                if rule.get(which) is not None
            }
    return {}


def changes(stages: Sequence[Stage], bounds: Bounds) -> tuple[str, ...]:
    """What `--set` must be given for these bounds: those that differ from the recipe's."""
    own = bounds_of(stages)
    return tuple(
        f"{column}.{which}={bound!r}".removesuffix(".0")
        for (column, which), bound in bounds.items()
        if own.get((column, which)) != bound
    )


def scale(
    extent: tuple[float, float], value: float, published: float
) -> tuple[float, float, float]:
    """Least and greatest value of a slider for a bound, and its step.

    Args:
        extent: Of the signal.
        value: Where the slider stands.
        published: The bound in force.
    """
    low = max(0.0, min(extent[0], value, published))
    high = max(extent[1], value, published)
    if high <= low:
        high = low + 1.0
    step = 10.0 ** math.floor(math.log10((high - low) / 200))
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    # 70 * 0.01 is more than 0.7
    return min(low, value), max(high, value), step


def tidy(bound: float) -> float:
    """A bound with as many digits as reasons show."""
    return float(f"{bound:g}")
