"""Verdicts: boundary values as the paper words them, order, nulls, scale."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from engine.judge import columns_read, container_reject, judge, with_duplicates
from engine.operator import Operator, Rule, Stage
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
    "media": "video",
    "error_type": None,
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
        "duplicate_of": None,
    }


def test_a_value_that_was_never_measured_makes_a_clip_pending_at_its_stage() -> None:
    found = verdict(brightness=None)
    assert (found["state"], found["stage"], found["kept"]) == ("pending", "quality", False)


def test_a_known_value_of_the_same_stage_rejects_although_another_is_missing() -> None:
    assert verdict(num_frames=None, aspect_ratio=3.0)["reason"] == "aspect_ratio>2"


def test_a_failed_measurement_makes_a_clip_failed_not_pending() -> None:
    found = verdict(motion_score=None, error_type="SpanError")
    assert (found["state"], found["stage"]) == ("failed", "basic")


def test_a_copy_of_a_kept_clip_becomes_its_duplicate_and_others_stay_as_they_are() -> None:
    judged = judge(clips({}, {}, {"brightness": 0.0}), STAGES)
    found = with_duplicates(judged, "same", pa.array([None, "x", None])).to_pylist()
    assert [v["state"] for v in found] == ["kept", "duplicate", "rejected"]
    assert [v["kept"] for v in found] == [True, False, False]
    assert (found[1]["stage"], found[1]["duplicate_of"]) == ("same", "x")
    assert found[2]["reason"] == "brightness<0.2"


@dataclass(frozen=True, kw_only=True)
class _Measure(Operator):
    """Stands in the stages only: these tests are about verdicts."""

    name: str
    reads: tuple[str, ...] = ("keyframes",)
    media: tuple[str, ...] = ("video", "image")

    @property
    def writes(self) -> pa.Schema:
        return pa.schema([CLIPS.field(self.name)])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        raise AssertionError


CAPTIONED = (
    *STAGES,
    Stage(
        name="watermark",
        operators=(_Measure(name="overlay_score", media=("video",)),),
        rules=(Rule(column="overlay_score", hi=0.5),),
    ),
    Stage(name="recaption", operators=(_Measure(name="caption"),)),
    Stage(
        name="caption",
        operators=(
            _Measure(name="caption_fault", reads=("caption",)),
            _Measure(name="clip_score", reads=("caption_original",)),
        ),
        rules=(Rule(column="caption_fault", empty=True), Rule(column="clip_score", lo=0.25)),
    ),
)
WHOLE = GOOD | {
    "overlay_score": 0.1,
    "caption": "A dog runs.",
    "caption_fault": "",
    "clip_score": None,
    "caption_original": None,
}


def staged(**values: object) -> tuple[str, str | None, str | None]:
    row = WHOLE | values
    schema = pa.schema([CLIPS.field(name) for name in row])
    found = judge(pa.Table.from_pylist([row], schema=schema), CAPTIONED).to_pylist()[0]
    return found["state"], found["stage"], found["reason"]


def test_what_an_operator_of_a_stage_has_not_written_makes_a_clip_pending_there() -> None:
    assert staged() == ("kept", None, None)
    assert staged(overlay_score=None) == ("pending", "watermark", None)
    assert staged(caption=None, caption_fault=None) == ("pending", "recaption", None)
    assert staged(caption=None, error_type="X") == ("failed", "recaption", None)
    assert staged(caption="", caption_fault="") == ("kept", None, None)


def test_a_measurement_applies_only_where_the_facts_it_reads_are_there() -> None:
    assert staged(caption_original="A dog.") == ("pending", "caption", None)
    low = staged(caption_original="A dog.", clip_score=0.1)
    assert low == ("rejected", "caption", "clip_score<0.25")


def test_each_word_of_a_rule_about_words_is_a_reason_of_its_own() -> None:
    assert staged(caption_fault="refusal") == ("rejected", "caption", "caption_fault=refusal")
    assert staged(caption_fault="empty") == ("rejected", "caption", "caption_fault=empty")


def test_rules_about_frames_and_time_do_not_apply_to_images() -> None:
    none = dict.fromkeys(("num_frames", "duration_s", "motion_score", "black_frame_frac"))
    assert staged(media="image", overlay_score=None, **none) == ("kept", None, None)
    assert staged(overlay_score=None, **none)[:2] == ("pending", "basic")
    assert staged(media="image", **none | {"brightness": 0.1})[2] == "brightness<0.2"
    assert staged(media="image", **none | {"aspect_ratio": 0.5})[2] == "aspect_ratio<1"


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
            else pa.array([value] * num)
            if isinstance(value, str)
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
