"""How stored rows change without being measured: verdicts, values that go, values that come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lance.fragment import FragmentMetadata, LanceFragment

from engine.duplicates import settle
from engine.judge import columns_read, judge, with_duplicates
from engine.operator import Operator, Stage
from engine.schema import ERRORS, VERDICT


@dataclass(frozen=True)
class Overrule:
    """What the rest of a dataset says of a row, after its own values have spoken."""

    reads: tuple[str, ...]
    apply: Callable[[pa.Table, pa.Table], pa.Table]
    """From rows and their verdicts to verdicts."""


def overrule_unkept(kept: pa.ChunkedArray) -> Overrule:
    """A pair of a clip that is not kept is rejected with it.

    Args:
        kept: clip_ids of the clips that are kept.
    """

    def overrule(rows: pa.Table, verdicts: pa.Table) -> pa.Table:
        gone = pc.invert(pc.is_in(rows["clip_id"], kept))
        changes = {"state": "rejected", "stage": "clips", "reason": "clip is not kept"}
        columns = [
            pc.if_else(gone, changes.get(f.name, pa.scalar(None, f.type)), verdicts[f.name])
            for f in VERDICT
            if f.name != "kept"
        ]
        columns.insert(VERDICT.names.index("kept"), pc.and_not(verdicts["kept"], gone))
        return pa.table(columns, schema=VERDICT)

    return Overrule(("clip_id",), overrule)


def overrule_copies(fragments: Sequence[LanceFragment], stages: Sequence[Stage]) -> Overrule | None:
    """Settles near-duplicates among the rows that all rules keep."""
    stage = next((s for s in stages if s.distinct), None)
    if stage is None or stage.distinct is None:
        return None
    columns = list(stage.distinct.columns)
    kept = []
    for fragment in fragments:
        rows = fragment.to_table(columns=columns_read(stages))
        indices = np.flatnonzero(judge(rows, stages)["kept"].to_numpy())
        if len(indices):
            kept.append(fragment.take(indices.tolist(), columns=columns))
    if not kept:
        return None
    candidates = pa.concat_tables(kept)
    stands = settle(candidates, stage.distinct)
    stands_for = dict(zip(candidates["clip_id"].to_pylist(), stands.to_pylist(), strict=True))
    copies = {clip: keeper for clip, keeper in stands_for.items() if keeper}

    def overrule(rows: pa.Table, verdicts: pa.Table) -> pa.Table:
        of = [copies.get(clip_id) for clip_id in rows["clip_id"].to_pylist()]
        return with_duplicates(verdicts, stage.name, pa.array(of, pa.string()))

    return Overrule(("clip_id",), overrule) if copies else None


def rejudged(
    fragment: LanceFragment, stages: Sequence[Stage], overrule: Overrule | None
) -> tuple[FragmentMetadata, list[int], int] | None:
    """A fragment with its verdicts of today, the fields written and how many rows changed."""
    more = overrule.reads if overrule else ()
    columns = dict.fromkeys([*columns_read(stages), *more, *VERDICT.names])
    rows = fragment.to_table(columns=list(columns), with_row_id=True)
    verdicts = judge(rows, stages)
    if overrule:
        verdicts = overrule.apply(rows, verdicts)
    num_changed = _rows_that_differ(rows.select(VERDICT.names), verdicts)
    if not num_changed:
        return None
    found = verdicts.add_column(0, "_rowid", rows["_rowid"])
    updated, fields = fragment.update_columns(found, left_on="_rowid", right_on="_rowid")
    return updated, fields, num_changed


def forgotten(
    fragment: LanceFragment, stale: Sequence[Operator], where: str | None, retry_failed: bool
) -> tuple[tuple[FragmentMetadata, list[int]] | None, set[str]]:
    """A fragment without stale values and failures, and the markers of what it held."""
    markers = [o.marker for o in stale]
    rows = fragment.to_table(columns=[*markers, *ERRORS.names], filter=where, with_row_id=True)
    held = {m for m in markers if rows[m].null_count < rows.num_rows}
    again = pc.is_in(
        rows["error_operator"], pa.array([type(o).__name__ for o in stale], pa.string())
    )
    transient = pc.fill_null(rows["error_transient"], False)
    if retry_failed:
        transient = pa.chunked_array([pa.array([True] * rows.num_rows, pa.bool_())])
    again = pc.or_(again, pc.and_(pc.is_valid(rows["error_operator"]), transient))
    if not held and not pc.any(again).as_py():
        return None, set()
    columns = {"_rowid": rows["_rowid"]}
    columns |= {
        n: pc.if_else(again, None, rows[n]).cast(ERRORS.field(n).type) for n in ERRORS.names
    }
    columns |= {f.name: pa.nulls(rows.num_rows, f.type) for o in stale for f in o.writes}
    return fragment.update_columns(pa.table(columns), left_on="_rowid", right_on="_rowid"), held


def overlaid(rows: pa.Table, change: pa.Table, key: str) -> pa.Table:
    """Rows with another table's values, where it has the row."""
    place = pc.index_in(rows[key], change[key])
    index = pc.if_else(
        pc.is_valid(place),
        pc.add(pc.fill_null(place, 0), rows.num_rows),
        pa.array(range(rows.num_rows), pa.int32()),
    )
    for name in change.column_names:
        if name != key:
            kind = rows.schema.field(name).type
            both = pa.chunked_array([*rows[name].chunks, *change[name].cast(kind).chunks], kind)
            at = rows.schema.get_field_index(name)
            rows = rows.set_column(at, rows.schema.field(name), both.take(index).combine_chunks())
    return rows


def _rows_that_differ(old: pa.Table, new: pa.Table) -> int:
    if old.equals(new):
        return 0
    differ = pa.scalar(False)
    for name in new.column_names:
        a, b = old[name].combine_chunks(), new[name].combine_chunks()
        both_null = pc.and_(pc.is_null(a), pc.is_null(b))
        same = pc.or_(pc.fill_null(pc.equal(a, b), False), both_null)
        differ = pc.or_(differ, pc.invert(same))
    return pc.sum(differ).as_py()
