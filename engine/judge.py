"""One pure function from stored columns to verdicts: signals are facts, thresholds are policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.operator import Rule, Stage
from engine.schema import VERDICT

_STATES = ("kept", "rejected", "failed", "duplicate", "pending")
_KEPT, _REJECTED, _FAILED, _DUPLICATE, _PENDING = range(5)
_UNDECIDED = -1
_FACTS = ("error_type", "duplicate_of")


def columns_read(stages: Sequence[Stage]) -> list[str]:
    """The columns of `clips` that `judge` needs for these stages."""
    return list(dict.fromkeys([*(r.column for s in stages for r in s.rules), *_FACTS]))


def judge(clips: pa.Table, stages: Sequence[Stage]) -> pa.Table:
    """Each row's one state, and the first thing that decided it, in the order of the stages.

    A stage rejects by any value it knows; a row that passes so far, but lacks a value the stage
    needs, is failed where an error is recorded, and else pending: it was never measured.

    Args:
        clips: At least `columns_read(stages)`.
        stages: In the order in which they filter.

    Returns:
        One row a clip, in order, with the columns of `engine.schema.VERDICT`.
    """
    num = clips.num_rows
    state = np.full(num, _UNDECIDED, np.int8)
    cause = np.full(num, -1, np.int16)  # index into `causes`
    values, causes = np.full(num, np.nan), []
    errors = pc.is_valid(clips["error_type"]).to_numpy(zero_copy_only=False)

    for stage in stages:
        unknown = np.zeros(num, bool)
        for rule in stage.rules:
            column = clips[rule.column]
            found = column.to_numpy(zero_copy_only=False)
            unknown |= pc.is_null(column).to_numpy(zero_copy_only=False)
            for sign, bound in rule.bounds:
                out = (state == _UNDECIDED) & _crosses(found, sign, bound)
                causes.append((stage.name, rule, (sign, bound)))
                state[out], cause[out], values[out] = _REJECTED, len(causes) - 1, found[out]
        unknown &= state == _UNDECIDED
        causes.append((stage.name, None, None))
        state[unknown], cause[unknown] = (
            np.where(errors[unknown], _FAILED, _PENDING),
            len(causes) - 1,
        )

    state[(state == _UNDECIDED) & errors] = _FAILED
    copies = pc.is_valid(clips["duplicate_of"]).to_numpy(zero_copy_only=False)
    state[(state == _UNDECIDED) & copies] = _DUPLICATE
    state[state == _UNDECIDED] = _KEPT
    return _verdicts(state, cause, values, causes)


def _crosses(values: np.ndarray, sign: str, bound: float) -> np.ndarray:
    # a float32 is held against the bound as float32, so that 0.8 stored is not more than 0.8
    limit = np.asarray(bound, values.dtype if values.dtype.kind == "f" else np.float64)
    with np.errstate(invalid="ignore"):
        return {"<": np.less, "<=": np.less_equal, ">": np.greater}[sign](values, limit)


def _verdicts(
    state: np.ndarray,
    cause: np.ndarray,
    values: np.ndarray,
    causes: list[tuple[str, Rule | None, tuple[str, float] | None]],
) -> pa.Table:
    index = pa.array(cause, mask=cause < 0)
    of_state = pa.array(state)

    def look_up(entries: list, kind: pa.DataType) -> pa.Array:
        return pa.array(entries, kind).take(index)

    rejected = pc.equal(of_state, _REJECTED)
    columns = {
        "state": pa.array(_STATES).take(of_state),
        "kept": pc.equal(of_state, _KEPT),
        "stage": look_up([c[0] for c in causes], pa.string()),
        "reason": look_up([_reason(rule, cross) for _, rule, cross in causes], pa.string()),
        "rule_column": look_up([rule and rule.column for _, rule, _ in causes], pa.string()),
        "rule_value": pc.if_else(rejected, pa.array(values), None),
        "rule_bound": look_up([cross and cross[1] for _, _, cross in causes], pa.float64()),
    }
    return pa.table([columns[f.name] for f in VERDICT], schema=VERDICT)


def _reason(rule: Rule | None, crossed: tuple[str, float] | None) -> str | None:
    return None if rule is None or crossed is None else f"{rule.column}{crossed[0]}{crossed[1]:g}"


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
