"""What other thresholds would keep, from stored signals: as `pipelines/refilter.py` would publish.

Nothing is written. A move judges only the clips whose signal lies between the old bound and the
new one: `engine.judge` looks at nothing of a rule but which rows cross it.
"""

from __future__ import annotations

import contextvars
import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import duckdb
import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from cluster.dashboard import lance_sql
from cluster.dashboard.bounds import SIGNS, Bounds, changes, published_bounds
from cluster.dashboard.funnel import parsed
from engine.duplicates import settle
from engine.judge import columns_read, judge
from engine.operator import Rule, Stage
from engine.tables import DatasetError
from pipelines.cli import with_bounds

SETTLED_AT_ONCE = 30_000
"""So many clips take about a second to be compared with each other."""
SETTLE_S = 35e-6
"""For each clip, with five keyframes: see `engine.duplicates.settle`."""
_PART = 131_072
_SHOWN_S = 1.0
"""A browser has shown a page by then."""
_log = logging.getLogger(__name__)


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


def rows_of(root: str, stages: Sequence[Stage]) -> pa.Table:
    """Columns that judging needs; kept in memory."""
    return lance_sql.columns(root, "clips", tuple(columns_read(stages)))


def values_of(root: str, column: str) -> np.ndarray:
    """A signal of all clips, float (N,), nan where it was not measured; kept in memory."""
    values = lance_sql.columns(root, "clips", (column,))[column]
    return values.cast(pa.float64()).to_numpy(zero_copy_only=False)


def published(root: str) -> Judged:
    """The verdicts that a dataset has now."""
    return _published(lance_sql.newest(root, "clips"))


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _published(clips: lance.LanceDataset) -> Judged:
    names = ["state", "stage", "reason"]
    with ThreadPoolExecutor() as threads:  # Lance and Arrow work outside of Python's lock
        parts = threads.map(lambda f: _coded(f.to_table(columns=names)), clips.get_fragments())
        return _joined(list(parts))


def published_with_bounds(
    root: str, stages: Sequence[Stage]
) -> tuple[Judged, dict[tuple[str, str], float]]:
    """`published` and `published_bounds`, read side by side."""
    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(_published, lance_sql.newest(root, "clips"))
        bounds = published_bounds(root, stages)
        return reading.result(), bounds


def prepare(root: str, stages: Sequence[Stage], start: Bounds) -> None:
    """Judges all clips behind a page that is shown, so that a first move finds that done.

    One at a time: while a run commits, each of its states would be another. It waits, for it would
    keep the page from being sent.
    """
    if _preparing.acquire(blocking=False):
        seen = contextvars.copy_context()  # the tables as the page has them
        timer = threading.Timer(_SHOWN_S, seen.run, (_prepare, root, stages, start))
        timer.daemon = True
        timer.start()


_preparing = threading.Lock()


def _prepare(root: str, stages: Sequence[Stage], start: Bounds) -> None:
    try:
        judged(root, stages, start)
    except (DatasetError, OSError, pa.ArrowException, duckdb.Error) as error:
        _log.warning("clips were not judged ahead of a move: %s", error)
    finally:
        _preparing.release()


def judged(root: str, stages: Sequence[Stage], bounds: Bounds) -> Judged:
    """The verdicts of all rules with other bounds; near-duplicates are still among the kept."""
    rows, start = rows_of(root, stages), published_bounds(root, stages)
    first = _first(lance_sql.newest(root, "clips"), tuple(start.items()), stages, rows)
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


@st.cache_resource(max_entries=4, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _first(
    clips: lance.LanceDataset,
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
    digest = hashlib.sha256(kept.tobytes()).hexdigest()
    copies = _copies(lance_sql.newest(root, "clips"), stage, digest, kept)
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


@st.cache_resource(
    max_entries=32, show_spinner=False, hash_funcs={**lance_sql.BY_STAMP, Stage: repr}
)
def _copies(clips: lance.LanceDataset, stage: Stage, digest: str, _kept: np.ndarray) -> np.ndarray:
    """Rows, out of those that all rules keep, that another of them stands for."""
    assert stage.distinct is not None
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
    return _spread(lance_sql.newest(root, "clips"), column, values_of(root, column))


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _spread(clips: lance.LanceDataset, column: str, _values: np.ndarray) -> Spread | None:
    known = _values[np.isfinite(_values)]
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
