"""One pure function from stored columns to verdicts: signals are facts, thresholds are policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.operator import Operator, Rule, Stage
from engine.schema import GIVEN, VERDICT

_STATES = ("kept", "rejected", "failed", "duplicate", "pending")
_KEPT, _REJECTED, _FAILED, _DUPLICATE, _PENDING = range(5)
_UNDECIDED = -1
_FACTS = ("media", "error_type")


def written_by(stages: Sequence[Stage]) -> dict[str, Operator]:
    """For each column that operators over stored rows write, the one that does."""
    return {name: o for stage in stages for o in stage.measures for name in o.writes.names}


def facts_read(operator: Operator) -> tuple[str, ...]:
    """Columns an operator reads that a source may have come without: such a row is not measured."""
    return tuple(c for c in operator.reads if c in GIVEN)


def columns_read(stages: Sequence[Stage]) -> list[str]:
    """The columns that `judge` needs for these stages; none of them is large."""
    operators = [o for s in stages for o in s.measures]
    names = [r.column for s in stages for r in s.rules]
    names += [o.marker for o in operators]
    names += [c for o in operators for c in facts_read(o)]
    return list(dict.fromkeys([*names, *_FACTS]))


@dataclass
class _Verdicts:
    """States as they are found; each decided row points to what decided it."""

    state: np.ndarray
    cause: np.ndarray
    values: np.ndarray
    causes: list[tuple[str, Rule | None, str | None, float | None]] = field(default_factory=list)
    """(stage, rule, reason, bound)."""

    def decide(
        self, where: np.ndarray, state: int | np.ndarray, *cause: str | Rule | float | None
    ) -> None:
        self.causes.append(cause)  # type: ignore[arg-type]
        self.state[where], self.cause[where] = state, len(self.causes) - 1


def judge(rows: pa.Table, stages: Sequence[Stage]) -> pa.Table:
    """Each row's one state, and the first thing that decided it, in the order of the stages.

    A stage rejects by any value it knows. A row that passes so far, but lacks a value of a stage
    (one that a rule reads, or that an operator should have written), is failed where an error is
    recorded, and else pending: it was never measured. Neither holds for what does not apply: to
    media that an operator does not measure, to a row without a fact that it reads (such as a
    caption found beside the input), and for images to what a scan writes of videos only.

    Args:
        rows: At least `columns_read(stages)`.
        stages: In the order in which they filter.

    Returns:
        One row each, in order, with the columns of `engine.schema.VERDICT`. Which rows stand for
        others is not for a row by itself to tell: see `with_duplicates`.
    """
    num = rows.num_rows
    found = _Verdicts(np.full(num, _UNDECIDED, np.int8), np.full(num, -1), np.full(num, np.nan))
    errors = _is_valid(rows["error_type"])
    applies = _applicability(rows, stages)

    for stage in stages:
        unknown = np.zeros(num, bool)
        for operator in stage.measures:
            unknown |= applies(operator.marker) & ~_is_valid(rows[operator.marker])
        for rule in stage.rules:
            column, concerned = rows[rule.column], applies(rule.column)
            unknown |= concerned & ~_is_valid(column)
            for crossed, reason, bound in _crossings(rule, column):
                out = (found.state == _UNDECIDED) & concerned & crossed
                if not rule.empty:
                    found.values[out] = column.to_numpy(zero_copy_only=False)[out]
                found.decide(out, _REJECTED, stage.name, rule, reason, bound)
        unknown &= found.state == _UNDECIDED
        lacking = np.where(errors[unknown], _FAILED, _PENDING)
        found.decide(unknown, lacking, stage.name, None, None, None)

    found.state[(found.state == _UNDECIDED) & errors] = _FAILED
    found.state[found.state == _UNDECIDED] = _KEPT
    return _table(found)


def waiting_for(
    rows: pa.Table, verdicts: pa.Table, stages: Sequence[Stage], *, measure_all: bool = False
) -> np.ndarray:
    """For each row, the index among all operators of the stages that it waits for, or -1.

    Args:
        rows: At least `columns_read(stages)`, and for each operator the markers of what it reads.
        verdicts: From `judge`, of these rows.
        stages: In order.
        measure_all: Rejected rows go on, too.
    """
    states = ("pending", "rejected") if measure_all else ("pending",)
    open_ = pc.is_in(verdicts["state"], pa.array(states)).to_numpy(zero_copy_only=False)
    open_ = open_ & ~_is_valid(rows["error_type"])
    applies, written = _applicability(rows, stages), written_by(stages)
    waits, index = np.full(rows.num_rows, -1), 0
    for stage in stages:
        for rule in stage.rules:
            if rule.column not in written:  # what the scan should have measured
                open_ = open_ & ~(applies(rule.column) & ~_is_valid(rows[rule.column]))
        for operator in stage.measures:
            ready = open_ & (waits < 0) & applies(operator.marker)
            ready &= ~_is_valid(rows[operator.marker])
            for name in operator.reads:
                if name in written:
                    ready &= _is_valid(rows[written[name].marker])
            waits[ready] = index
            index += 1
    return waits


def _is_valid(column: pa.ChunkedArray) -> np.ndarray:
    return pc.is_valid(column).to_numpy(zero_copy_only=False)


def _applicability(rows: pa.Table, stages: Sequence[Stage]) -> Callable[[str], np.ndarray]:
    """A function from a column to the rows that it applies to."""
    media = pc.fill_null(rows["media"], "video")
    is_image = pc.equal(media, "image").to_numpy(zero_copy_only=False)
    written = written_by(stages)

    def applies(column: str) -> np.ndarray:
        operator = written.get(column)
        if operator is None:
            return ~is_image | _is_valid(rows[column])
        concerned = pc.is_in(media, pa.array(operator.media)).to_numpy(zero_copy_only=False)
        for fact in facts_read(operator):
            concerned = concerned & _is_valid(rows[fact])
        return concerned

    return applies


def _crossings(
    rule: Rule, column: pa.ChunkedArray
) -> Iterator[tuple[np.ndarray, str, float | None]]:
    """For each way in which a rule rejects: the rows, the reason and the bound."""
    if rule.empty:
        for word in sorted(w for w in pc.unique(column).to_pylist() if w):
            is_it = pc.fill_null(pc.equal(column, word), False).to_numpy(zero_copy_only=False)
            yield is_it, f"{rule.column}={word}", None
    else:
        values = column.to_numpy(zero_copy_only=False)
        for sign, bound in rule.bounds:
            yield _crosses(values, sign, bound), f"{rule.column}{sign}{bound:g}", bound


def _crosses(values: np.ndarray, sign: str, bound: float) -> np.ndarray:
    # a float32 is held against the bound as float32, so that 0.8 stored is not more than 0.8
    limit = np.asarray(bound, values.dtype if values.dtype.kind == "f" else np.float64)
    if values.dtype.kind == "O":  # nothing but nulls
        values = np.full(len(values), np.nan)
    with np.errstate(invalid="ignore"):
        return {"<": np.less, "<=": np.less_equal, ">": np.greater}[sign](values, limit)


def _table(found: _Verdicts) -> pa.Table:
    index = pa.array(found.cause, mask=found.cause < 0)
    state = pa.array(found.state)

    def look_up(entries: list, kind: pa.DataType) -> pa.Array:
        return pa.array(entries, kind).take(index)

    causes = found.causes
    columns = {
        "state": pa.array(_STATES).take(state),
        "kept": pc.equal(state, _KEPT),
        "stage": look_up([c[0] for c in causes], pa.string()),
        "reason": look_up([c[2] for c in causes], pa.string()),
        "rule_column": look_up([c[1] and c[1].column for c in causes], pa.string()),
        "rule_value": pa.array(found.values, mask=np.isnan(found.values)),
        "rule_bound": look_up([c[3] for c in causes], pa.float64()),
        "duplicate_of": pa.nulls(len(found.state), pa.string()),
    }
    return pa.table([columns[f.name] for f in VERDICT], schema=VERDICT)


def with_duplicates(verdicts: pa.Table, stage: str, duplicate_of: pa.Array) -> pa.Table:
    """Verdicts in which kept rows that another stands for are duplicates of it.

    Args:
        verdicts: From `judge`.
        stage: The one that says what counts as the same.
        duplicate_of: For each row, the id of the row that stands for it, or null.
    """
    copies = pc.is_valid(duplicate_of)
    changes = {
        "state": pc.if_else(copies, "duplicate", verdicts["state"]),
        "kept": pc.and_not(verdicts["kept"], copies),
        "stage": pc.if_else(copies, stage, verdicts["stage"]),
        "duplicate_of": duplicate_of,
    }
    columns = [changes.get(f.name, verdicts[f.name]) for f in VERDICT]
    return pa.table(columns, schema=VERDICT)


def container_reject(metadata: dict[str, float | None], stages: Sequence[Stage]) -> bool:
    """Whether a source's container alone makes sure that no clip of it can be kept.

    Args:
        metadata: `num_frames`, `duration_s`, `aspect_ratio` of the whole source; None is unknown.
            A clip is at most as long as its source and has its aspect ratio.
        stages: Those of the recipe.
    """
    for rule in (r for s in stages for r in s.rules):
        value = metadata.get(rule.column)
        if value is None:
            continue
        for sign, bound in rule.bounds:
            # a part of a long source may still be short enough: only lower bounds are final there
            final = sign != ">" or rule.column == "aspect_ratio"
            if final and bool(_crosses(np.asarray(value, np.float64), sign, bound)):
                return True
    return False
