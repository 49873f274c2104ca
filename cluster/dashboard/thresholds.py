"""What other thresholds would keep, from stored signals: as `pipelines/refilter.py` would publish.

Nothing is written. A move judges only the clips whose signal lies between the old bound and the
new one: `engine.judge` looks at nothing of a rule but which rows cross it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from cluster.dashboard import lance_sql
from cluster.dashboard.funnel import parsed, tallies
from engine.duplicates import settle
from engine.judge import columns_read, judge
from engine.operator import Rule, Stage
from engine.tables import read
from pipelines.cli import with_bounds

Bounds = Mapping[tuple[str, str], float]
"""By column and `lo`, `hi` or `above`."""
SIGNS = {"lo": "<", "above": "<=", "hi": ">"}
"""How a reason says which bound was crossed."""
SETTLED_AT_ONCE = 30_000
"""So many clips take about a second to be compared with each other."""
SETTLE_S = 35e-6
"""For each clip, with five keyframes: see `engine.duplicates.settle`."""
_PART = 131_072
_SHOWN_S = 1.0
"""A browser has shown a page by then."""


@dataclass(frozen=True, order=True)
class Group:
    """Clips that one thing decided."""

    state: str
    stage: str
    crossed: str
    """The reason without its number, such as `brightness<`; empty where no rule decided."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Verdicts of all clips, in the table's order: the number of the group that each is in."""

    groups: tuple[Group, ...]
    codes: np.ndarray

    def in_state(self, *states: str) -> np.ndarray:
        """Which clips are, bool (N,)."""
        return self.told(lambda group: group.state in states)

    def told(self, of: Callable[[Group], Any]) -> np.ndarray:
        """What a function says of each clip's group, (N,)."""
        return np.array([of(group) for group in self.groups])[self.codes]

    def counts(self, weights: np.ndarray | None = None) -> dict[Group, float]:
        """Clips of each group, or the sum of their weights."""
        sums = np.bincount(self.codes, weights, minlength=len(self.groups))
        found: Counter[Group] = Counter()
        for group, num in zip(self.groups, sums.tolist(), strict=True):
            found[group] += num
        return {group: num for group, num in found.items() if num}

    def group_of(self, row: int) -> Group:
        """What decided one clip."""
        return self.groups[self.codes[row]]


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
    asked = ", ".join(f"min({c}), max({c})" for c in columns)
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
    if not lance_sql.has_rows(root, "runs"):
        return {}
    runs = lance_sql.columns(root, "runs", ("started_at", "resolved")).to_pylist()
    for run in sorted(runs, key=lambda r: r["started_at"], reverse=True):
        recipe = json.loads(run["resolved"] or "{}")
        stages = recipe.get("stages") if isinstance(recipe, dict) else None
        rules = [r for s in stages or () for r in s.get("rules", ())]
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


def tidy(bound: float) -> float:
    """A bound with as many digits as reasons show."""
    return float(f"{bound:g}")


def rows_of(root: str, stages: Sequence[Stage]) -> pa.Table:
    """Columns that judging needs; kept in memory."""
    return lance_sql.columns(root, "clips", tuple(columns_read(stages)))


def values_of(root: str, column: str) -> np.ndarray:
    """A signal of all clips, float (N,), nan where it was not measured; kept in memory."""
    values = lance_sql.columns(root, "clips", (column,))[column]
    return values.cast(pa.float64()).to_numpy(zero_copy_only=False)


def published(root: str) -> Judged:
    """The verdicts that a dataset has now."""
    return _published(root, lance_sql.newest(root, "clips").version)


@st.cache_resource(max_entries=4, show_spinner=False)
def _published(root: str, version: int) -> Judged:
    fragments = read(root, "clips", version=version).get_fragments()
    with ThreadPoolExecutor() as threads:  # Lance and Arrow work outside of Python's lock
        names = ["state", "stage", "reason"]
        return _joined(list(threads.map(lambda f: _coded(f.to_table(columns=names)), fragments)))


def prepare(root: str, stages: Sequence[Stage]) -> None:
    """Judges all clips behind a page that is shown, so that a first move finds that done."""
    key = root, lance_sql.newest(root, "clips").version
    if key not in _prepared:
        _prepared.add(key)
        _behind.submit(_prepare, root, stages)


_prepared: set[tuple[str, int]] = set()
_behind = ThreadPoolExecutor(2, thread_name_prefix="thresholds")


def foresee(root: str) -> None:
    """Begins to read what a page needs a little later."""
    _behind.submit(published, root)


def _prepare(root: str, stages: Sequence[Stage]) -> None:
    time.sleep(_SHOWN_S)
    judged(root, stages, published_bounds(root, stages))


def judged(root: str, stages: Sequence[Stage], bounds: Bounds) -> Judged:
    """The verdicts of all rules with other bounds; near-duplicates are still among the kept."""
    rows, start = rows_of(root, stages), published_bounds(root, stages)
    version = lance_sql.newest(root, "clips").version
    first = _first(root, version, tuple(start.items()), stages, rows)
    between = np.zeros(rows.num_rows, bool)
    for (column, which), bound in bounds.items():
        if bound != start[column, which]:
            between |= _between(rows[column], start[column, which], bound)
    moved = with_bounds(stages, changes(stages, bounds))
    if 2 * between.sum() > len(between):
        return _all_judged(rows, moved)
    if not between.any():
        return first
    some = _coded(judge(rows.filter(pa.array(between)), moved))
    codes = first.codes.copy()
    codes[between] = some.codes + len(first.groups)
    return Judged((*first.groups, *some.groups), codes)


@st.cache_resource(max_entries=4, show_spinner=False)
def _first(
    root: str,
    version: int,
    bounds: tuple[tuple[tuple[str, str], float], ...],
    _stages: Sequence[Stage],
    _rows: pa.Table,
) -> Judged:
    return _all_judged(_rows, with_bounds(_stages, changes(_stages, dict(bounds))))


def _all_judged(rows: pa.Table, stages: Sequence[Stage]) -> Judged:
    parts = [rows.slice(start, _PART) for start in range(0, rows.num_rows, _PART)]
    with ThreadPoolExecutor() as threads:
        return _joined(list(threads.map(lambda part: _coded(judge(part, stages)), parts)))


def _joined(parts: Sequence[Judged]) -> Judged:
    places = {group: i for i, group in enumerate(dict.fromkeys(g for p in parts for g in p.groups))}
    codes = [np.array([places[g] for g in p.groups], np.int64)[p.codes] for p in parts]
    return Judged(tuple(places), np.concatenate(codes) if codes else np.zeros(0, np.int64))


def _between(column: pa.ChunkedArray, old: float, new: float) -> np.ndarray:
    """Rows that may cross one bound and not the other; a few more do no harm."""
    low, high = sorted((old, new))
    slack = 1e-6 * max(abs(low), abs(high), 1e-30)  # signals are stored as float32
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "O":  # nothing but nulls
        return np.zeros(len(values), bool)
    with np.errstate(invalid="ignore"):
        return (values >= low - slack) & (values <= high + slack)


def _coded(verdicts: pa.Table) -> Judged:
    """Verdicts as groups and codes."""
    codes = np.zeros(verdicts.num_rows, np.int64)
    words: list[list[str]] = []
    for name in ("state", "stage", "reason"):
        column = pc.fill_null(verdicts[name], "").combine_chunks().dictionary_encode()
        words.append(column.dictionary.to_pylist())
        codes = codes * max(1, len(words[-1])) + column.indices.to_numpy()
    there = np.flatnonzero(np.bincount(codes, minlength=1))
    codes = np.cumsum(np.bincount(codes, minlength=1) > 0)[codes] - 1
    groups = []
    for code in there.tolist():
        code, reason = divmod(code, max(1, len(words[2])))
        state, stage = divmod(code, max(1, len(words[1])))
        column, sign = parsed(words[2][reason])
        crossed = words[2][reason] if sign in ("", "=") else column + sign
        groups.append(Group(words[0][state], words[1][stage], crossed))
    return Judged(tuple(groups), codes)


def settled(root: str, stages: Sequence[Stage], found: Judged) -> Judged:
    """With near-duplicates among the kept taken out, as a publication does it."""
    stage = next((s for s in stages if s.distinct), None)
    kept = np.flatnonzero(found.in_state("kept"))
    if stage is None or not len(kept):
        return found
    version = lance_sql.newest(root, "clips").version
    digest = hashlib.sha256(kept.tobytes()).hexdigest()
    copies = _copies(root, version, stage, digest, kept)
    codes = found.codes.copy()
    codes[copies] = len(found.groups)
    return Judged((*found.groups, Group("duplicate", stage.name, "")), codes)


def same_as_published(found: Judged, now: Judged) -> bool:
    """Whether the rules keep the clips among which published near-duplicates were settled."""
    return np.array_equal(found.in_state("kept"), now.in_state("kept", "duplicate"))


def with_published_copies(found: Judged, now: Judged, stages: Sequence[Stage]) -> Judged:
    """With the near-duplicates that are published: right where `same_as_published`."""
    stage = next(s.name for s in stages if s.distinct)
    codes = np.where(now.in_state("duplicate"), len(found.groups), found.codes)
    return Judged((*found.groups, Group("duplicate", stage, "")), codes)


@st.cache_resource(max_entries=32, show_spinner=False, hash_funcs={Stage: repr})
def _copies(root: str, version: int, stage: Stage, digest: str, _kept: np.ndarray) -> np.ndarray:
    """Rows, out of those that all rules keep, that another of them stands for."""
    assert stage.distinct is not None
    clips = read(root, "clips", version=version)
    candidates = clips.take(_kept.tolist(), columns=list(stage.distinct.columns))
    stands = settle(candidates, stage.distinct)
    return _kept[stands.is_valid().to_numpy(zero_copy_only=False)]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What is published and what would be, compared."""

    now: Judged
    then: Judged
    gained: np.ndarray
    """Rows of clips that would be kept, and are not."""
    lost: np.ndarray
    """Rows of clips that are kept, and would not be."""
    awaited: np.ndarray
    """Rows of clips that would be pending, and are not."""


def compared(now: Judged, then: Judged) -> Outcome:
    """The difference that a publication would make."""
    kept, will = now.in_state("kept"), then.in_state("kept")
    waits, would = now.in_state("pending"), then.in_state("pending")
    return Outcome(
        now,
        then,
        np.flatnonzero(will & ~kept),
        np.flatnonzero(kept & ~will),
        np.flatnonzero(would & ~waits),
    )


def states(found: Judged) -> dict[str, int]:
    """Clips by state."""
    counts: Counter[str] = Counter()
    for group, num in found.counts().items():
        counts[group.state] += int(num)
    return dict(counts)


def reasons(found: Judged, bounds: Bounds) -> dict[str, int]:
    """Rejected clips by reason, as `refilter.py --json` prints them."""
    names = {column + SIGNS[which]: bound for (column, which), bound in bounds.items()}
    counts: Counter[str] = Counter()
    for group, num in found.counts().items():
        if group.state == "rejected":
            crossed = group.crossed
            counts[f"{crossed}{names[crossed]:g}" if crossed in names else crossed] += int(num)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class Spread:
    """Where the values of a signal lie."""

    low: float
    """Between this and `high` are 99 % of them; of a thousand or fewer, all."""
    high: float
    num: int
    """Clips that have a value."""
    beyond: int
    """Of these, outside."""


def spread(root: str, column: str) -> Spread | None:
    """Where the values of a signal lie; None where no clip has any."""
    return _spread(root, lance_sql.newest(root, "clips").version, column)


@st.cache_data(max_entries=64, show_spinner=False)
def _spread(root: str, version: int, column: str) -> Spread | None:
    values = values_of(root, column)
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    ends = np.percentile(known, [0.5, 99.5]) if len(known) > 1000 else (known.min(), known.max())
    low, high = map(float, ends)
    return Spread(low, high, len(known), int(((known < low) | (known > high)).sum()))


def histogram(
    values: np.ndarray, parts: np.ndarray, low: float, high: float, bins: int = 60
) -> np.ndarray:
    """Counts by part and bin, int (parts, bins); what lies outside is in the outer bins.

    Args:
        values: Of one signal, (N,), nan where it was not measured.
        parts: Number of the part that each clip is in, int (N,).
        low: Left end.
        high: Right end.
        bins: How many.
    """
    num = int(parts.max(initial=0)) + 1
    with np.errstate(invalid="ignore"):
        places = np.clip((values - low) * (bins / (high - low)), 0, bins - 1)
    places = np.where(np.isfinite(places), places, bins).astype(np.int64)  # behind the last
    return np.bincount(parts * (bins + 1) + places, minlength=num * (bins + 1)).reshape(
        num, bins + 1
    )[:, :bins]


def rule_with(stages: Sequence[Stage], column: str) -> tuple[Stage, Rule]:
    """The rule on a column, and its stage."""
    return next((s, r) for s in stages for r in s.rules if r.column == column)


def described(recipe: Any, bounds: Bounds) -> dict[str, Any]:
    """The recipe with these bounds, as JSON values: what a run records of it."""
    stages = with_bounds(recipe.stages, changes(recipe.stages, bounds))
    return replace(recipe, stages=stages).describe()
