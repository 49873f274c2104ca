"""Votes counted as the papers count them, with intervals that know who voted.

RISE prints for each model the share of results in which it was among those chosen: several may be,
so a column sums to more than 100 % (its table 4: 120 %, 122 % and 169 % over 300 results).
Mimir prints for each model the share of its comparisons that it won: a model is in five of six
models' fifteen pairs, so a row sums to 300 % (its table 2 does, exactly). Its shares are multiples
of 0.05 % though 10 participants, 20 prompts and 5 pairs make 1,000 comparisons of a model; the
paper does not say why.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from evals.compare import LEVEL, holm
from evals.study import Study

FEW = 5
"""Voters or prompts below which a table says that it tells little."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How often a model was chosen."""

    chosen: int
    of: int
    """Votes in which it was shown."""
    value: float | None
    """chosen / of; None where there is no vote."""
    low: float | None
    """Ends of the 95 % interval; None below two voters or two prompts."""
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models compared in one question."""

    question: str
    a: str
    b: str
    share: Share
    """Of votes for `a`."""
    prompts_a: int
    """Prompts for which `a` got more votes than `b`."""
    prompts_b: int
    p: float | None
    """Of no preference, two-sided: a sign test over prompts, each decided by its majority, those
    that are undecided left out. Votes on one prompt are not independent; prompts are."""
    p_adjusted: float | None
    """By Holm, among all pairs and questions."""
    p_votes: float | None
    """Of the binomial test that takes every vote for independent, as papers often give it; too
    small where voters or prompts agree among themselves."""


@dataclass(frozen=True, kw_only=True)
class Tally:
    """A study's votes, counted."""

    study: Study
    num_votes: int
    """Answers: one a voter, item and question."""
    num_results: int
    """Items that voters have answered, each counted once a voter: RISE's "valid results"."""
    num_voters: int
    num_finished: int
    """Voters who answered every item."""
    num_items: int
    """Items with a vote."""
    num_prompts: int
    """Prompts with a vote."""
    shares: Mapping[str, Mapping[str, Share]]
    """By question and model."""
    pairs: tuple[Pair, ...]
    """Of mimir."""

    @property
    def is_thin(self) -> bool:
        """Too few voters or prompts to tell models apart."""
        return min(self.num_voters, self.num_prompts) < FEW


def tally(study: Study, votes: pa.Table) -> Tally:
    """Counts a study's votes.

    Args:
        study: The study.
        votes: Rows of `engine.schema.VOTES`; those of other studies or models are left aside.
    """
    known = {item.item_id for item in study.items}
    rows = [
        row
        for row in votes.to_pylist()
        if row["study"] == study.fingerprint and row["item_id"] in known
    ]
    asked = [question.key for question in study.design.questions]
    items_of: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        items_of[row["voter_id"]].add(row["item_id"])
    return Tally(
        study=study,
        num_votes=len(rows),
        num_results=sum(map(len, items_of.values())),
        num_voters=len(items_of),
        num_finished=sum(found == known for found in items_of.values()),
        num_items=len({row["item_id"] for row in rows}),
        num_prompts=len({row["prompt"] for row in rows}),
        shares={
            key: {
                model: share_of(model, [r for r in rows if r["question"] == key])
                for model in study.models
            }
            for key in asked
        },
        pairs=_pairs(study, rows) if study.name == "mimir" else (),
    )


def share_of(model: str, rows: Sequence[Mapping[str, Any]]) -> Share:
    """How often a model was chosen of the votes in which it was shown."""
    shown = [row for row in rows if model in row["shown"]]
    hits = np.array([model in row["chosen"] for row in shown], float)
    if not shown:
        return Share(chosen=0, of=0, value=None, low=None, high=None)
    low, high = interval(hits, [r["voter_id"] for r in shown], [r["prompt"] for r in shown])
    return Share(chosen=int(hits.sum()), of=len(hits), value=float(hits.mean()), low=low, high=high)


def interval(
    hits: np.ndarray, voters: Sequence[str], prompts: Sequence[str]
) -> tuple[float | None, float | None]:
    """The 95 % interval of a share, for other voters and other prompts like these.

    Votes of one voter are alike, and so are votes on one prompt. The variance is therefore
    clustered both ways (voters + prompts - both), never less than that of independent votes nor
    than one of the two; the share's interval is Wilson's for as many independent votes as have this
    variance, with Student's t of one degree less than the fewer of voters and prompts. Where all
    votes are equal nothing can be estimated, and that fewer number stands for the votes.

    In simulations with 3 to 30 voters and 8 to 40 prompts it held the truth 95 to 99 % of the time.

    Args:
        hits: 0 or 1 for each vote.
        voters: Of each vote.
        prompts: Of each vote.

    Returns:
        Its ends, None below two voters or two prompts.

    Source:
        Cameron, Gelbach, Miller, Robust Inference With Multiway Clustering (2011), for the
        variance; Wilson, Probable Inference (1927), for the interval.
    """
    from scipy import stats

    mean, count = float(hits.mean()), len(hits)
    off = hits - mean
    by_voter, num_voters = _clustered(off, voters)
    by_prompt, num_prompts = _clustered(off, prompts)
    groups = min(num_voters, num_prompts)
    if groups < 2:
        return None, None
    by_both, _ = _clustered(off, [f"{v}\n{p}" for v, p in zip(voters, prompts, strict=True)])
    independent = mean * (1 - mean) / count
    variance = max(by_voter + by_prompt - by_both, by_voter, by_prompt, independent)
    effective = mean * (1 - mean) / variance if variance > 0 else groups
    t = float(stats.t.ppf((1 + LEVEL) / 2, groups - 1))
    return wilson(mean, effective, t)


def _clustered(off: np.ndarray, groups: Sequence[str]) -> tuple[float, int]:
    """Variance of a mean whose deviations hang together in groups, and the number of these."""
    _, index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.bincount(index, off)
    num = len(sums)
    return float(sums @ sums) / len(off) ** 2 * num / max(num - 1, 1), num


def wilson(share: float, count: float, z: float) -> tuple[float, float]:
    """Wilson's score interval of a share of `count` independent votes, `z` standard errors wide."""
    shrink = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _pairs(study: Study, rows: Sequence[Mapping[str, Any]]) -> tuple[Pair, ...]:
    by_pair: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    order = {model: place for place, model in enumerate(study.models)}
    for row in rows:
        a, b = sorted(row["shown"], key=order.__getitem__)
        by_pair[row["question"], a, b].append(row)
    asked = [question.key for question in study.design.questions]
    keys = sorted(by_pair, key=lambda k: (asked.index(k[0]), order[k[1]], order[k[2]]))
    found = [_pair(key, by_pair[key]) for key in keys]
    tested = [one["p"] for one in found if one["p"] is not None]
    adjusted = iter(holm(tested))
    return tuple(
        Pair(**one, p_adjusted=None if one["p"] is None else next(adjusted)) for one in found
    )


def _pair(key: tuple[str, str, str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    question, a, b = key
    lead: dict[str, int] = defaultdict(int)
    for row in rows:
        lead[row["prompt"]] += 1 if a in row["chosen"] else -1
    for_a, for_b = (sum(sign * n > 0 for n in lead.values()) for sign in (1, -1))
    share = share_of(a, rows)
    return {
        "question": question,
        "a": a,
        "b": b,
        "share": share,
        "prompts_a": for_a,
        "prompts_b": for_b,
        "p": sign_test(for_a, for_b),
        "p_votes": sign_test(share.chosen, share.of - share.chosen),
    }


def sign_test(for_a: int, for_b: int) -> float | None:
    """Two-sided p of no preference (the exact binomial test); None where nothing was decided."""
    from scipy import stats

    if not for_a + for_b:
        return None
    return float(stats.binomtest(for_a, for_a + for_b, 0.5).pvalue)
