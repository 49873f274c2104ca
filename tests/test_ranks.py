"""Ranks against RISE-T2V's table 3, whose printed scores give its printed ranks."""

from __future__ import annotations

import math

import pytest

from evals.ranks import average_ranks, places, ranks

RISE = {  # aesthetic, motion, text, rank
    "Pika": (6.11, 0.996, 29.65, 4.33),
    "Gen2": (6.45, 0.995, 31.35, 3.33),
    "ModelScope": (4.94, 0.967, 31.61, 6.67),
    "Latte": (5.60, 0.970, 32.07, 4.67),
    "VideoCrafter2": (6.00, 0.984, 31.86, 3.67),
    "CogVideoX-2B": (5.40, 0.983, 30.12, 6.33),
    "AnimateDiff": (6.39, 0.983, 31.36, 4.33),
    "RISE-AnimateDiff": (6.61, 0.984, 31.95, 2.00),
}
COLUMNS = ("aesthetic", "motion", "text")


def test_the_ranks_of_rise_come_out_of_its_scores() -> None:
    table = {
        column: {model: row[n] for model, row in RISE.items()} for n, column in enumerate(COLUMNS)
    }
    found = average_ranks(table)
    assert {m: round(rank, 2) for m, rank in found.items()} == {m: r[3] for m, r in RISE.items()}
    assert list(found) == list(RISE)


def test_ties_share_the_better_rank() -> None:
    values = {"a": 0.9, "b": 0.5, "c": 0.5, "d": 0.1}
    assert ranks(values) == {"a": 1, "b": 2, "c": 2, "d": 4}
    assert ranks(values, higher_is_better=False) == {"a": 4, "b": 2, "c": 2, "d": 1}
    assert ranks(dict.fromkeys("abc", 1.0)) == dict.fromkeys("abc", 1)
    with pytest.raises(ValueError, match="b has no score"):
        ranks({"a": 1.0, "b": math.nan})


def test_a_column_may_count_the_other_way() -> None:
    table = {"quality": {"a": 2.0, "b": 1.0}, "drift": {"a": 2.0, "b": 1.0}}
    assert average_ranks(table) == {"a": 1.0, "b": 2.0}
    assert average_ranks(table, lower_is_better=["drift"]) == {"a": 1.5, "b": 1.5}


def test_what_is_not_comparable_is_refused() -> None:
    table = {"x": {"a": 1.0, "b": 2.0}, "y": {"a": 1.0}}
    with pytest.raises(ValueError, match="y has no score of b, so that ranks would be of diff"):
        average_ranks(table)
    with pytest.raises(ValueError, match="there is none"):
        average_ranks({})
    table = {"x": {"a": 1.0, "b": 2.0}}
    same = {("dog", 0), ("dog", 1)}
    assert average_ranks(table, videos={"x": {"a": same, "b": {*same}}}) == {"a": 2.0, "b": 1.0}
    with pytest.raises(
        ValueError, match=r"a and b are not .* in x \(2 and 1\): \('dog', 1\) is of a"
    ):
        average_ranks(table, videos={"x": {"a": same, "b": {("dog", 0)}}})


def test_first_and_second_places_over_categories() -> None:
    found = places(
        {
            "animal": {"a": 1.0, "b": 1.5, "c": 3.0},
            "food": {"a": 2.0, "b": 2.0, "c": 2.5},  # two firsts, and no second
            "plant": {"a": 2.0, "b": 1.0, "c": 2.0},
        }
    )
    assert found == {"a": (2, 1), "b": (2, 1), "c": (0, 1)}
    assert found["a"].first == 2 and found["a"].second == 1
    assert places({"x": {"a": 9.0, "b": 3.0}}, higher_is_better=True)["a"] == (1, 0)
    with pytest.raises(ValueError, match="y has no score of b"):
        places({"x": {"a": 1.0, "b": 2.0}, "y": {"a": 1.0}})
