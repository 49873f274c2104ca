"""Clips for pages: found by filter, nearest to a threshold, whole records, and small pictures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa
import streamlit as st
from lance.dataset import ColumnOrdering

from cluster.dashboard import lance_sql
from cluster.dashboard.bounds import SIGNS
from cluster.dashboard.lance_sql import quoted
from engine.operator import Rule, Stage
from engine.schema import TABLES

CARD = (
    "clip_id", "source_uri", "media", "start_s", "end_s", "duration_s", "width_px", "height_px",
    "state", "stage", "reason", "rule_column", "rule_value", "rule_bound", "duplicate_of",
)  # fmt: skip
"""Columns that a clip is shown by in a grid."""
_LONG = 12
"""Numbers of a list that are shown."""


@dataclass(frozen=True)
class Signal:
    """A numeric column of `clips`."""

    name: str
    about: str
    unit: str
    is_integer: bool

    @property
    def label(self) -> str:
        """Its name, with the unit where the name does not tell."""
        return f"{self.name} ({self.unit})" if self.unit not in ("", "s", "px") else self.name


def meaning(table: str, column: str) -> tuple[str, str]:
    """What a column means, and its unit; empty where the schema does not say."""
    schema = TABLES[table]
    if column not in schema.names:
        return "", ""
    said = schema.field(column).metadata or {}
    return said.get(b"about", b"").decode(), said.get(b"unit", b"").decode()


def signals(root: str) -> list[Signal]:
    """Numeric columns of our schema that a dataset has, in its order; hashes are none."""
    return [
        Signal(f.name, *meaning("clips", f.name), is_integer=pa.types.is_integer(f.type))
        for f in lance_sql.newest(root, "clips").schema
        if f.name in TABLES["clips"].names  # others may be of any name
        if pa.types.is_floating(f.type) or pa.types.is_signed_integer(f.type)
    ]


def extent(root: str, signal: str) -> tuple[float, float] | None:
    """Least and greatest value of a signal; None where it was never measured."""
    if signal not in lance_sql.newest(root, "clips").schema.names:
        return None
    name = lance_sql.identifier(signal)
    query = f"SELECT min({name}) AS low, max({name}) AS high FROM rows"
    found = lance_sql.streamed(root, "clips", (signal,), query).to_pylist()[0]
    return None if found["low"] is None else (float(found["low"]), float(found["high"]))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which clips are shown, and in what order; empty is all."""

    states: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    ranges: tuple[tuple[str, float, float], ...] = ()
    """Signals with what they lie between, ends included."""
    words: str = ""
    """In a caption, in any case."""
    source: str = ""
    """In the path of the source, in any case."""
    sort: str = ""
    """A signal; empty is the order of the table."""
    descending: bool = False

    def where(self, there: Collection[str]) -> str | None:
        """As Lance's predicate over the columns that are there."""
        parts = [
            f"{name} IN ({', '.join(map(quoted, values))})"
            for name, values in (
                ("state", self.states), ("stage", self.stages), ("reason", self.reasons),
            )
            if values
        ]  # fmt: skip
        parts += [f"{name} >= {low!r} AND {name} <= {high!r}" for name, low, high in self.ranges]
        captions = [c for c in ("caption", "caption_original") if c in there]
        for sought, columns in ((self.words, captions), (self.source, ["source_uri"])):
            if sought.strip():
                word = quoted(sought.strip().lower())
                found = [f"contains(lower({column}), {word})" for column in columns]
                parts.append(f"({' OR '.join(found)})" if found else "false")
        return " AND ".join(parts) or None


def num(root: str, choice: Choice) -> int:
    """How many clips pass."""
    return _num(lance_sql.newest(root, "clips"), choice)


@st.cache_data(max_entries=256, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _num(table: lance.LanceDataset, choice: Choice) -> int:
    return table.count_rows(choice.where(table.schema.names))


def found(root: str, choice: Choice, offset: int, limit: int) -> list[dict[str, Any]]:
    """Some of the clips that pass, in the order that is asked for."""
    return _found(lance_sql.newest(root, "clips"), choice, offset, limit)


@st.cache_data(max_entries=256, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _found(
    table: lance.LanceDataset, choice: Choice, offset: int, limit: int
) -> list[dict[str, Any]]:
    more = [choice.sort] if choice.sort else []
    more += [name for name, *_ in choice.ranges]
    order = None
    if choice.sort:
        first = ColumnOrdering(choice.sort, ascending=not choice.descending, nulls_first=False)
        order = [first, ColumnOrdering("clip_id")]
    return _rows(table, [*CARD, *more], choice.where(table.schema.names), order, offset, limit)


def _rows(
    table: lance.LanceDataset,
    names: Sequence[str],
    where: str | None,
    order: list[ColumnOrdering] | None,
    offset: int,
    limit: int,
) -> list[dict[str, Any]]:
    there = [name for name in dict.fromkeys(names) if name in table.schema.names]
    scanner = table.scanner(columns=there, filter=where, order_by=order, offset=offset, limit=limit)
    return [dict.fromkeys(names) | row for row in scanner.to_table().to_pylist()]


def at(root: str, rows: Sequence[int], *more: str) -> list[dict[str, Any]]:
    """Clips by their place in the table, in that order."""
    table = lance_sql.newest(root, "clips")
    names = [name for name in dict.fromkeys((*CARD, *more)) if name in table.schema.names]
    if not len(rows):
        return []
    return [dict.fromkeys(CARD) | r for r in table.take(list(rows), columns=names).to_pylist()]


def nearest(
    root: str, column: str, which: str, bound: float, num: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Kept clips and rejects that are nearest to a bound, nearest first.

    Rejects are those that this bound rejected, as `pipelines/report.py --near` has them.

    Args:
        root: The dataset.
        column: That the rule reads.
        which: `lo`, `hi` or `above`.
        bound: The one that is published.
        num: At most so many of each.
    """
    table = lance_sql.newest(root, "clips")
    rises = which != "hi"  # kept values lie above the bound
    crossed = quoted(f"{column}{SIGNS[which]}{bound:g}")

    def ordered(name: str, *, ascending: bool) -> list[ColumnOrdering]:
        return [ColumnOrdering(name, ascending=ascending), ColumnOrdering("clip_id")]

    kept = _rows(table, [*CARD, column], f"state = 'kept' AND {column} IS NOT NULL",
                 ordered(column, ascending=rises), 0, num)  # fmt: skip
    out = _rows(table, [*CARD, column], f"state = 'rejected' AND reason = {crossed}",
                ordered("rule_value", ascending=not rises), 0, num)  # fmt: skip
    return kept, out


@dataclass(frozen=True)
class Check:
    """What one rule says of one clip."""

    stage: str
    column: str
    says: str
    """The rule, such as `≥ 0.2`."""
    value: Any
    passes: bool | None
    """None where there is no value to tell from."""
    decided: bool
    """It is what the published verdict names."""


def checks(clip: Mapping[str, Any], stages: Sequence[Stage], bounds: Mapping) -> list[Check]:
    """Each rule of a recipe on one clip's stored values, with the bounds that are published."""
    made = []
    for stage in stages:
        for rule in stage.rules:
            value = clip.get(rule.column)
            made.append(
                Check(
                    stage.name,
                    rule.column,
                    says(rule, bounds),
                    value,
                    _passes(rule, value, bounds),
                    clip.get("rule_column") == rule.column and clip.get("stage") == stage.name,
                )
            )
    return made


def says(rule: Rule, bounds: Mapping[tuple[str, str], float]) -> str:
    """A rule in words: what it keeps."""
    if rule.empty:
        return "no fault"
    low, high = bounds.get((rule.column, "lo")), bounds.get((rule.column, "hi"))
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    if high is not None:
        return f"≤ {high:g}"
    return f"≥ {low:g}" if low is not None else f"> {bounds[rule.column, 'above']:g}"


def _passes(rule: Rule, value: Any, bounds: Mapping[tuple[str, str], float]) -> bool | None:
    if value is None:
        return None
    if rule.empty:
        return not value
    # as float32, in which signals are stored: see `engine.judge`
    is_single = TABLES["clips"].field(rule.column).type == pa.float32()
    kind = pa.float32() if is_single else pa.float64()

    def stored(bound: float) -> float:
        return pa.scalar(bound, kind).as_py()

    low, high = bounds.get((rule.column, "lo")), bounds.get((rule.column, "hi"))
    above = bounds.get((rule.column, "above"))
    return not (
        (low is not None and value < stored(low))
        or (above is not None and value <= stored(above))
        or (high is not None and value > stored(high))
    )


def record(root: str, table: str, key: str, value: str) -> list[dict[str, Any]]:
    """Whole rows of a table, without what is too large to show."""
    if table != "clips" and not lance_sql.has_rows(root, table):
        return []
    opened = lance_sql.newest(root, table)
    names = [f.name for f in opened.schema if f.name not in ("jpeg", "mp4")]
    return opened.to_table(columns=names, filter=f"{key} = {quoted(value)}").to_pylist()


def plain(value: Any) -> str:
    """Any value of a row as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, list):
        some = ", ".join(plain(v) for v in value[:_LONG])
        return f"{some} … ({len(value)} numbers)" if len(value) > _LONG else some
    return str(value)
