"""VBench's total against hand-worked numbers."""

from __future__ import annotations

import pytest

from evals import leaderboard
from evals.dimensions import DIMENSIONS, VBENCH
from evals.leaderboard import BOUNDS, QUALITY, SEMANTIC, Total, normalised, total

MIDDLE = {name: (low + high) / 2 for name, (low, high) in BOUNDS.items()}


def test_a_hand_worked_total() -> None:
    """Each dimension halfway between its bounds, but for five.

    Quality: subject 1 -> (1 - 0.1462) / 0.8538 = 1; dynamic 1 -> 1, which counts half;
    motion 0.9975 -> 1; the other four 0.5: (1 + 0.5 * 1 + 1 + 4 * 0.5) / 6.5 = 4.5 / 6.5.
    Semantic: scene 0.4111 of 0.8222 -> 0.5; temporal style 0.091 of 0.364 -> 0.25; appearance
    0.0009 -> 0; the other six 0.5: (0.5 + 0.25 + 0 + 6 * 0.5) / 9 = 3.75 / 9.
    """
    given = MIDDLE | {
        "subject_consistency": 1.0,
        "dynamic_degree": 1.0,
        "motion_smoothness": 0.9975,
        "temporal_style": 0.091,
        "appearance_style": 0.0009,
    }
    found = total(given)
    assert found == pytest.approx((4.5 / 6.5, 3.75 / 9, (4 * 4.5 / 6.5 + 3.75 / 9) / 5))
    assert found == Total(leaderboard.quality(given), leaderboard.semantic(given), found.total)


def test_the_constants_are_of_the_sixteen() -> None:
    assert (len(QUALITY), len(SEMANTIC)) == (7, 9)
    assert set(BOUNDS) == set(leaderboard.WEIGHTS) == set(VBENCH)
    assert sum(leaderboard.WEIGHTS[name] for name in QUALITY) == 6.5


def test_nothing_is_clipped() -> None:
    assert normalised("temporal_flickering", 0.6293) == 0
    assert normalised("motion_smoothness", 1.0) == pytest.approx((1 - 0.706) / 0.2915)
    assert normalised("subject_consistency", 0.0) == pytest.approx(-0.1462 / 0.8538)
    assert normalised("text_alignment", 0.3) is None
    assert all((normalised(name, 0.5) or -1) > 0 for name in VBENCH if BOUNDS[name][0] < 0.5)


def test_what_is_missing_is_named() -> None:
    lacking = {name: value for name, value in MIDDLE.items() if name != "color"}
    lacking["scene"] = None
    with pytest.raises(ValueError, match=r"total .* all 16 .*: color is missing, scene is missing"):
        total(lacking)
    with pytest.raises(ValueError, match="the semantic score needs all 9 "):
        leaderboard.semantic(lacking)
    assert leaderboard.quality(lacking) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="dynamic_degree is incomplete"):
        total(MIDDLE, incomplete={"dynamic_degree", "text_alignment"})


def test_dimensions_beyond_the_sixteen_do_not_count() -> None:
    others = dict.fromkeys(DIMENSIONS, 0.0) | MIDDLE
    assert total(others) == total(MIDDLE)
