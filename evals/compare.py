"""Which differences between two models are beyond their noise: a paired bootstrap over prompts."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.results import Value

RESAMPLES = 10_000
LEVEL = 0.95
"""Of intervals; a p below 1 - LEVEL is beyond noise."""
MIN_PROMPTS = 8
"""Below it nothing is said to be beyond noise: a bootstrap of a few differences that happen to have
one sign never sees the other (of equal models, with six prompts, 9 % of comparisons were called
different in a simulation; with eight and more, 3 to 6 %)."""

Statistic = Callable[[Sequence[Value]], float]
"""How videos are merged into one number."""
Weight = Callable[[Value], float]
"""How much a video counts in the mean over videos."""


def _frames(value: Value, less: int = 0) -> float:
    """Frames that a video's score is the mean of; one where it is the mean of clips instead."""
    if value.details is None:
        return 1.0
    if value.num_frames is None:
        raise ValueError(f"a mean over frames needs num_frames of {value.prompt!r}")
    return float(value.num_frames - less)


WEIGHTS: Mapping[str, Weight] = {
    "subject_consistency": functools.partial(_frames, less=1),
    "background_consistency": functools.partial(_frames, less=1),
    "appearance_style": _frames,
}
"""Dimensions that VBench merges as a mean over frames instead of over videos: long videos weigh
more. The others are means over videos, or over sixteen frames of each, which is the same. A value
without `details` is that of a long video, a mean over its clips, and those count alike."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two models in one dimension, over the videos for which both have a score."""

    a: float | None
    b: float | None
    mean: float | None
    """a - b: above 0 where the first scores higher; None where they share no video."""
    low: float | None
    """Ends of the 95 % interval of `mean`; None below `MIN_PROMPTS`."""
    high: float | None
    p: float | None
    """Two-sided, of no difference; None below `MIN_PROMPTS`. p < 0.05 where the interval leaves
    out 0."""
    p_adjusted: float | None = None
    """By Holm, among the comparisons of a table."""
    num_prompts: int
    num_videos: int
    """Pairs."""
    num_left_out: int
    """Videos of either model without a partner, or with a failure in the pair."""

    @property
    def is_beyond_noise(self) -> bool:
        """p, adjusted where it is one of several, is below 5 %."""
        p = self.p if self.p_adjusted is None else self.p_adjusted
        return p is not None and p < 1 - LEVEL

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self) | {"is_beyond_noise": self.is_beyond_noise}


def compare(
    a: Sequence[Value],
    b: Sequence[Value],
    *,
    weight: Weight | None = None,
    statistic: Statistic | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """The difference of two models, with its noise.

    Videos are paired by prompt and sample. Prompts are drawn with replacement, each with all its
    pairs: videos of one prompt are not independent, and a prompt that is easy is so for both. What
    it tells holds for other prompts like these, of the samples that were drawn.

    The interval is the percentiles' of the bootstrap, widened as Student's t is against the normal
    (the expanded percentile interval): plain percentiles, and BCa with them, are too narrow by
    about sqrt((n - 1) / n) and more for few prompts, and BCa is undefined where all differences
    are equal. p is what makes that interval end at 0.

    Args:
        a: Scores of the first model.
        b: Scores of the second model, in the same dimension.
        weight: Of a video in the mean; see `WEIGHTS`. All count alike by default.
        statistic: Instead of a weighted mean; called 2 * resamples times, so rather slow.
        seed: Of the resamples: the same gives the same numbers.
        resamples: Of prompts.

    Source:
        Hesterberg, What Teachers Should Know About the Bootstrap (arXiv 1411.5279): the
        expanded percentile interval.
    """
    pairs, left_out = _paired(a, b)
    prompts: dict[str, list[tuple[Value, Value]]] = defaultdict(list)
    for one, other in pairs:
        prompts[one.prompt].append((one, other))
    groups = list(prompts.values())
    counted = {
        "num_prompts": len(groups),
        "num_videos": len(pairs),
        "num_left_out": left_out,
    }
    if not pairs:
        return Difference(a=None, b=None, mean=None, low=None, high=None, p=None, **counted)
    if statistic is None:
        merge = _means(groups, weight or (lambda value: 1.0))
    else:
        merge = _merged(groups, statistic)
    one, other = (float(side) for side in merge(np.arange(len(groups))))
    mean = one - other
    low = high = p = None
    if len(groups) >= MIN_PROMPTS:
        draws = _draws(lambda index: np.subtract(*merge(index)), len(groups), resamples, seed)
        low, high, p = _noise(draws, len(groups))
    return Difference(a=one, b=other, mean=mean, low=low, high=high, p=p, **counted)


def compare_all(
    a: Mapping[str, Sequence[Value]],
    b: Mapping[str, Sequence[Value]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Difference]:
    """`compare` for each column that both models have, merged as VBench merges it.

    p is adjusted over all of them by Holm: the chance that any of the differences called beyond
    noise is noise stays below 5 %, however the dimensions depend on one another.

    Args:
        a: Scores of the first model by dimension, or by drift (`drift:DIMENSION`).
        b: Scores of the second model.
        seed: Of the resamples.
        resamples: Of prompts, for each.
    """
    found = {
        name: compare(a[name], b[name], weight=WEIGHTS.get(name), seed=seed, resamples=resamples)
        for name in a
        if name in b
    }
    tested = {name: d.p for name, d in found.items() if d.p is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        name: dataclasses.replace(d, p_adjusted=adjusted.get(name)) for name, d in found.items()
    }


def holm(p: Sequence[float]) -> list[float]:
    """What p becomes where it is one of several tests, in the same order.

    Source:
        Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, float)[order] * (len(p) - np.arange(len(p)))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.tolist()


def mean_and_error(scores: Sequence[float], prompts: Sequence[str]) -> tuple[float, float | None]:
    """The mean over videos and its standard error over prompts; None below two prompts.

    Videos of one prompt are not independent: prompts are the sample. Where all have as many videos
    this is the standard deviation of their means (n - 1) over the root of their number.
    """
    values = np.asarray(scores, float)
    _, group = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    mean, num_prompts = float(values.mean()), int(group.max()) + 1
    if num_prompts < 2:
        return mean, None
    deviations = np.bincount(group, values - mean)
    variance = num_prompts / (num_prompts - 1) * float(deviations @ deviations)
    return mean, math.sqrt(variance) / len(values)


def _paired(a: Sequence[Value], b: Sequence[Value]) -> tuple[list[tuple[Value, Value]], int]:
    """Pairs that both have a score for, in the order of `a`, and how many videos are in none.

    A prompt that a suite has twice (VBench has two) counts twice: its n-th is paired with the n-th.
    """
    one, other = by_place(a), by_place(b)
    pairs = [
        (value, other[place])
        for place, value in one.items()
        if place in other and value.score is not None and other[place].score is not None
    ]
    return pairs, len(one.keys() | other.keys()) - len(pairs)


def by_place(values: Sequence[Value]) -> dict[tuple[str, int, int], Value]:
    """By prompt, sample, and how often the suite had these before."""
    seen: Counter[tuple[str, int]] = Counter()
    found = {}
    for value in values:
        place = value.prompt, value.sample
        found[(*place, seen[place])] = value
        seen[place] += 1
    return found


def _means(groups: list[list[tuple[Value, Value]]], weight: Weight) -> Callable[..., Any]:
    """Weighted means of both models over prompts, for an array of indices (..., prompt)."""
    sums = []
    for side in (0, 1):
        weights = [[weight(pair[side]) for pair in group] for group in groups]
        scores = [[pair[side].score for pair in group] for group in groups]
        sums.append(
            (
                np.array([np.dot(w, s) for w, s in zip(weights, scores, strict=True)]),
                np.array([math.fsum(w) for w in weights]),
            )
        )
        if not sums[-1][1].min() > 0:
            raise ValueError("the weights of a prompt's videos must sum to more than 0")

    def merge(index: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(num[index].sum(-1) / den[index].sum(-1) for num, den in sums)

    return merge


def _merged(groups: list[list[tuple[Value, Value]]], statistic: Statistic) -> Callable[..., Any]:
    """The same of any statistic, one resample after the other."""

    def side(index: np.ndarray, which: int) -> float:
        return statistic([pair[which] for prompt in index for pair in groups[prompt]])

    def merge(index: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.apply_along_axis(side, -1, index, which) for which in (0, 1))

    return merge


def _draws(
    difference: Callable[[np.ndarray], np.ndarray], prompts: int, resamples: int, seed: int
) -> np.ndarray:
    """The difference in each resample of the prompts, in pieces that fit in a cache."""
    rng = np.random.default_rng(seed)
    piece = max(1, 200_000 // prompts)
    sizes = [min(piece, resamples - done) for done in range(0, resamples, piece)]
    return np.concatenate(
        [difference(rng.integers(0, prompts, (size, prompts), np.int32)) for size in sizes]
    )


def _noise(draws: np.ndarray, prompts: int) -> tuple[float, float, float]:
    """The expanded percentile interval, and the p at which it ends at 0."""
    from scipy import stats

    wider = math.sqrt(prompts / (prompts - 1))
    tail = stats.norm.cdf(wider * stats.t.ppf((1 - LEVEL) / 2, prompts - 1))
    low, high = np.quantile(draws, [tail, 1 - tail])
    beyond = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    z = min(0.0, stats.norm.ppf((beyond + 1) / (len(draws) + 1)))
    return float(low), float(high), float(2 * stats.t.cdf(z / wider, prompts - 1))
