"""The paired bootstrap on models whose difference is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evals.compare import MIN_PROMPTS, compare, compare_all, holm, mean_and_error
from evals.merge import merge
from evals.results import Value


def values(scores: np.ndarray, **given: Any) -> list[Value]:
    """One a prompt (rows) and sample (columns); NaN is a failure."""
    return [
        Value(
            prompt=f"prompt {prompt}",
            sample=sample,
            categories=(),
            score=None if np.isnan(score) else float(score),
            **given,
        )
        for (prompt, sample), score in np.ndenumerate(scores)
    ]


def models(
    seed: int, difference: float, prompts: int = 40, samples: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Two models: prompts are easy or hard for both, each has its own way with some of them."""
    rng = np.random.default_rng(seed)
    easy = rng.normal(0.6, 0.1, (prompts, 1))
    a, b = (
        easy + rng.normal(0, 0.02, (prompts, 1)) + rng.normal(0, 0.02, (prompts, samples))
        for _ in range(2)
    )
    return a + difference, b


def test_of_equal_models_five_in_a_hundred_are_called_different() -> None:
    alarms = outside = 0
    for seed in range(200):
        a, b = models(seed, 0.0, prompts=30)
        found = compare(values(a), values(b), seed=seed, resamples=500)
        alarms += found.is_beyond_noise
        outside += not found.low <= 0 <= found.high
    # Binomial: 10 of 200, and a deviation of 3.
    assert 2 <= alarms <= 19
    assert 2 <= outside <= 19


def test_a_planted_difference_is_found_and_covered() -> None:
    found = [compare(*map(values, models(seed, 0.02)), resamples=500) for seed in range(50)]
    assert sum(one.is_beyond_noise for one in found) >= 45
    assert sum(one.low <= 0.02 <= one.high for one in found) >= 40
    assert np.mean([one.mean for one in found]) == pytest.approx(0.02, abs=0.003)
    assert all(one.mean == pytest.approx(one.a - one.b) for one in found)


def test_pairs_are_what_makes_it_visible() -> None:
    a, b = models(1, 0.02)
    paired = compare(values(a), values(b))
    # The same scores, but each prompt of one against another prompt of the other.
    unpaired = compare(values(a), values(np.roll(b, 7, axis=0)))
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.is_beyond_noise
    assert not unpaired.is_beyond_noise
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)


def test_videos_of_a_prompt_are_not_counted_as_independent() -> None:
    """Twenty copies of each prompt's one video tell no more than one."""
    a, b = models(2, 0.01, samples=1)
    one = compare(values(a), values(b))
    many = compare(values(np.repeat(a, 20, 1)), values(np.repeat(b, 20, 1)))
    assert (many.low, many.high, many.p) == pytest.approx((one.low, one.high, one.p))
    assert (one.num_videos, many.num_videos) == (40, 800)


def test_the_interval_is_that_of_students_t_where_differences_are_normal() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 0.1, (12, 1)), np.full((12, 1), 0.5)
    found = compare(values(a), values(b), resamples=20_000)
    half = 2.200985 * a.std(ddof=1) / np.sqrt(12)
    assert found.low == pytest.approx(found.mean - half, abs=0.15 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.15 * half)


def test_p_is_below_a_twentieth_where_the_interval_leaves_out_zero() -> None:
    for seed in range(60):
        a, b = models(seed, 0.006)
        found = compare(values(a), values(b), resamples=2000)
        if abs(found.p - 0.05) > 0.005:
            assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_a_model_against_itself_is_no_different() -> None:
    a, _ = models(3, 0.0)
    found = compare(values(a), values(a))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert not found.is_beyond_noise
    # Most prompts tie, a few differ: half of the draws and more are on the side of 0.
    b = a.copy()
    b[0] += 0.1
    assert not compare(values(a), values(b)).is_beyond_noise
    assert compare(values(a + 0.25), values(a)).low == pytest.approx(0.25)


def test_only_pairs_that_both_have_count() -> None:
    a, b = models(4, 0.0, prompts=10, samples=2)
    a[0, 0] = b[1, 1] = np.nan
    ours, theirs = values(a), values(b)[:-2]
    found = compare(ours, list(reversed(theirs)))
    keep = ~np.isnan(a) & ~np.isnan(b)
    keep[-1] = False
    assert (found.num_videos, found.num_prompts, found.num_left_out) == (16, 9, 4)
    assert found.a == pytest.approx(a[keep].mean())
    assert found.b == pytest.approx(b[keep].mean())
    assert compare(ours, []).mean is None
    assert compare(ours, []).num_left_out == 20


def test_a_prompt_that_a_suite_has_twice_counts_twice() -> None:
    one = values(np.array([[1.0], [2.0]]))
    other = values(np.zeros((2, 1)))
    found = compare([*one, one[0]], [*other, other[0]])
    assert found.a == pytest.approx(4 / 3)
    assert found.num_videos == 3


def test_few_prompts_tell_nothing() -> None:
    a, b = models(5, 1.0, prompts=MIN_PROMPTS - 1)
    found = compare(values(a), values(b))
    assert found.mean > 0.9
    assert (found.low, found.high, found.p) == (None, None, None)
    assert not found.is_beyond_noise
    assert compare(*map(values, models(5, 1.0, prompts=MIN_PROMPTS))).is_beyond_noise


def test_means_over_frames_weigh_long_videos() -> None:
    a = values(np.array([[0.2]] * 8), num_frames=11, details={})
    a += [Value(prompt="long", sample=0, categories=(), score=0.8, num_frames=81, details={})]
    b = [
        Value(prompt=v.prompt, sample=0, categories=(), score=0.5, num_frames=5, details={})
        for v in a
    ]
    found = compare_all(dict.fromkeys(NAMES, a), dict.fromkeys(NAMES, b), resamples=500)
    assert found["subject_consistency"].a == pytest.approx((80 * 0.2 + 80 * 0.8) / 160)
    assert found["appearance_style"].a == pytest.approx((88 * 0.2 + 81 * 0.8) / 169)
    assert found["color"].a == pytest.approx((8 * 0.2 + 0.8) / 9)
    assert all(one.b == pytest.approx(0.5) for one in found.values())


def test_what_is_compared_is_what_vbench_merges() -> None:
    rng = np.random.default_rng(0)
    ours = []
    for prompt in range(9):
        frames = rng.random(rng.integers(3, 30)).tolist()
        consistent = {"video_sim": sum(frames[1:]), "cnt_per_video": len(frames) - 1}
        of = {
            "subject_consistency": consistent,
            "background_consistency": consistent,
            "appearance_style": {"frame_results": frames},
            "motion_smoothness": {},
        }
        ours.append((f"prompt {prompt}", frames, of))
    by_name = {}
    for name in ours[0][2]:
        skip = int(name.endswith("consistency"))
        by_name[name] = [
            Value(
                prompt=prompt,
                sample=0,
                categories=(),
                score=(mean := float(np.mean(frames[skip:]))),
                num_frames=len(frames),
                details=of[name] | {"video_results": mean, "num_frames": len(frames)},
            )
            for prompt, frames, of in ours
        ]
    found = compare_all(by_name, by_name, resamples=100)
    for name, of_model in by_name.items():
        merged = merge(name, [value.details for value in of_model])
        assert found[name].a == pytest.approx(merged, rel=1e-12), name
    assert found["subject_consistency"].a != pytest.approx(found["motion_smoothness"].a, rel=1e-4)


NAMES = ("subject_consistency", "appearance_style", "color")


def test_any_statistic_can_be_compared() -> None:
    def mean(found: Sequence[Value]) -> float:
        return float(np.mean([value.score for value in found]))

    a, b = models(6, 0.01)
    fast, slow = (
        compare(values(a), values(b), resamples=300),
        compare(values(a), values(b), statistic=mean, resamples=300),
    )
    for name in ("a", "b", "mean", "low", "high", "p"):
        assert getattr(slow, name) == pytest.approx(getattr(fast, name)), name

    def median(found: Sequence[Value]) -> float:
        return float(np.median([value.score for value in found]))

    found = compare(values(a), values(b), statistic=median, resamples=300)
    assert found.mean == pytest.approx(np.median(a) - np.median(b))
    assert found.low < found.mean < found.high


def test_the_same_seed_gives_the_same_numbers() -> None:
    a, b = map(values, models(7, 0.005))
    assert compare(a, b) == compare(a, b)
    assert compare(a, b).p != compare(a, b, seed=1).p


def test_holm_by_hand() -> None:
    # Sorted 0.01 0.02 0.03 0.5, times 4 3 2 1, never below one before: 0.04 0.06 0.06 0.5.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_a_table_of_comparisons_is_adjusted() -> None:
    """One p of 0.02 among sixteen is what chance gives."""
    a, b = models(8, 0.0)
    small, planted = models(9, 0.0), models(10, 0.05)
    first = {f"d{i}": values(a) for i in range(14)} | {"planted": values(planted[0])}
    second = {f"d{i}": values(b) for i in range(14)} | {"planted": values(planted[1])}
    shift = small[1] + compare(values(small[0]), values(small[1])).mean - 0.0105
    first["small"], second["small"] = values(small[0]), values(shift)
    second["only here"] = values(a)
    found = compare_all(first, second)
    assert list(found) == list(first)
    assert found["small"].p < 0.05
    assert not found["small"].is_beyond_noise
    assert found["planted"].is_beyond_noise
    assert found["planted"].p_adjusted == pytest.approx(16 * found["planted"].p)
    few = {"d": values(a[:3])}
    assert compare_all(few, few)["d"].p_adjusted is None


def test_the_standard_error_is_over_prompts() -> None:
    scores = np.array([[1.0, 2.0], [3.0, 4.0], [8.0, 9.0]])
    mean, error = mean_and_error(scores.ravel(), ["a", "a", "b", "b", "c", "c"])
    assert mean == 4.5
    assert error == pytest.approx(scores.mean(1).std(ddof=1) / np.sqrt(3))
    assert mean_and_error([1.0, 2.0], ["a", "a"]) == (1.5, None)


def test_differences_go_into_json() -> None:
    a, b = models(11, 0.05)
    said = compare(values(a), values(b)).to_dict()
    assert said["is_beyond_noise"] is True
    assert said["num_prompts"] == 40
