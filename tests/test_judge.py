"""Verdicts: boundary values as the paper words them, order, nulls, scale."""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import pytest

from engine.judge import columns_read, container_reject, judge
from engine.operator import Rule, Stage
from engine.schema import CLIPS, VERDICT

STAGES = (
    Stage(
        name="basic",
        rules=(
            Rule(column="num_frames", lo=65),
            Rule(column="duration_s", lo=1),
            Rule(column="aspect_ratio", lo=1, hi=2),
            Rule(column="motion_score", above=0),
        ),
    ),
    Stage(
        name="quality",
        rules=(
            Rule(column="black_area_frac", hi=0.8),
            Rule(column="brightness", lo=0.2),
            Rule(column="black_frame_frac", hi=0.4),
        ),
    ),
)
GOOD = {
    "num_frames": 100,
    "duration_s": 4.0,
    "aspect_ratio": 16 / 9,
    "motion_score": 1.5,
    "black_area_frac": 0.1,
    "brightness": 0.5,
    "black_frame_frac": 0.0,
    "error_type": None,
    "duplicate_of": None,
}


def clips(*rows: dict) -> pa.Table:
    fields = [CLIPS.field(name) for name in GOOD]
    return pa.Table.from_pylist([GOOD | row for row in rows], schema=pa.schema(fields))


def verdict(**values: object) -> dict:
    return judge(clips(values), STAGES).to_pylist()[0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_frames": 65}, None),
        ({"num_frames": 64}, "num_frames<65"),
        ({"duration_s": 1.0}, None),
        ({"duration_s": 0.999}, "duration_s<1"),
        ({"aspect_ratio": 1.0}, None),
        ({"aspect_ratio": 2.0}, None),
        ({"aspect_ratio": 0.99}, "aspect_ratio<1"),
        ({"aspect_ratio": 2.01}, "aspect_ratio>2"),
        ({"motion_score": 0.0}, "motion_score<=0"),
        ({"motion_score": 1e-6}, None),
        ({"black_area_frac": 0.75}, None),
        ({"black_area_frac": 0.81}, "black_area_frac>0.8"),
        ({"brightness": 0.25}, None),
        ({"brightness": 0.19}, "brightness<0.2"),
        ({"black_frame_frac": 0.375}, None),
        ({"black_frame_frac": 0.41}, "black_frame_frac>0.4"),
    ],
)
def test_boundaries_are_those_of_the_paper(values: dict, reason: str | None) -> None:
    found = verdict(**values)
    assert (found["state"], found["reason"]) == ("rejected" if reason else "kept", reason)
    assert found["kept"] is (reason is None)


@pytest.mark.parametrize("column", ["black_area_frac", "brightness", "black_frame_frac"])
def test_a_float32_signal_that_equals_its_bound_is_kept(column: str) -> None:
    bound = {"black_area_frac": 0.8, "brightness": 0.2, "black_frame_frac": 0.4}[column]
    assert verdict(**{column: float(np.float32(bound))})["state"] == "kept"


def test_the_first_rule_in_order_gives_the_reason_with_its_value_and_bound() -> None:
    found = verdict(num_frames=10, brightness=0.0, duration_s=0.5)
    assert found == {
        "state": "rejected",
        "kept": False,
        "stage": "basic",
        "reason": "num_frames<65",
        "rule_column": "num_frames",
        "rule_value": 10.0,
        "rule_bound": 65.0,
    }


def test_a_value_that_was_never_measured_makes_a_clip_pending_at_its_stage() -> None:
    found = verdict(brightness=None)
    assert (found["state"], found["stage"], found["kept"]) == ("pending", "quality", False)


def test_a_known_value_of_the_same_stage_rejects_although_another_is_missing() -> None:
    assert verdict(num_frames=None, aspect_ratio=3.0)["reason"] == "aspect_ratio>2"


def test_a_failed_measurement_makes_a_clip_failed_not_pending() -> None:
    found = verdict(motion_score=None, error_type="SpanError")
    assert (found["state"], found["stage"]) == ("failed", "basic")


def test_a_copy_is_a_duplicate_only_where_it_would_be_kept() -> None:
    assert verdict(duplicate_of="x")["state"] == "duplicate"
    assert verdict(duplicate_of="x", brightness=0.0)["state"] == "rejected"


def test_verdicts_do_not_depend_on_the_order_of_rows() -> None:
    rows = clips({}, {"num_frames": 3}, {"brightness": None}, {"aspect_ratio": 5.0})
    backwards = rows.take([3, 2, 1, 0])
    assert judge(backwards, STAGES).take([3, 2, 1, 0]).equals(judge(rows, STAGES))


def test_an_empty_table_gives_an_empty_verdict() -> None:
    assert judge(clips().slice(0, 0), STAGES).schema == VERDICT


def test_only_columns_that_decide_are_read() -> None:
    assert columns_read(STAGES) == list(GOOD)


def test_a_million_verdicts_take_less_than_two_seconds() -> None:
    num, rng = 1_000_000, np.random.default_rng(0)
    table = pa.table(
        {
            name: pa.nulls(num, CLIPS.field(name).type)
            if value is None
            else pa.array(rng.random(num) * 2 * value).cast(CLIPS.field(name).type, safe=False)
            for name, value in GOOD.items()
        }
    )
    started = time.process_time()
    judge(table, STAGES)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("metadata", "rejects"),
    [
        ({"num_frames": 64, "duration_s": 5.0, "aspect_ratio": 1.5}, True),
        ({"num_frames": None, "duration_s": None, "aspect_ratio": 0.5}, True),
        ({"num_frames": None, "duration_s": None, "aspect_ratio": 1.5}, False),
        ({"num_frames": 9999, "duration_s": 300.0, "aspect_ratio": 2.0}, False),
    ],
)
def test_a_container_decides_only_what_no_clip_of_it_could_escape(
    metadata: dict, rejects: bool
) -> None:
    assert container_reject(metadata, STAGES) is rejects


def test_a_long_source_is_not_rejected_for_a_rule_on_long_clips() -> None:
    stages = (Stage(name="s", rules=(Rule(column="duration_s", hi=30),)),)
    assert not container_reject({"duration_s": 100.0}, stages)
