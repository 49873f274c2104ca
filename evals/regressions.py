"""What got worse since earlier nights: which exports are compared, and what is beyond their noise.

Exports are compared, not nights: one that did not change keeps the verdict that it had. Each score
is tested twice, on the same prompts: against the export before it, which catches a jump, and
against the mean of the last exports that had not regressed in it, which catches a slow decline and
keeps a regression named until it is mended. All tests of a run are adjusted together by Holm.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evals import drift
from evals.compare import (
    LEVEL,
    MIN_PROMPTS,
    RESAMPLES,
    WEIGHTS,
    Difference,
    by_place,
    compare,
    holm,
)
from evals.evaluation import Plan, Results
from evals.metric import NO_OBJECT
from evals.report import Against, Comparison, Loss, Verdict, higher_is_better
from evals.results import Value

Values = Mapping[str, Sequence[Value]]
"""By dimension, or by drift of one."""
_LONGEST = 160
"""Letters of an error."""


@dataclass(kw_only=True)
class Earlier:
    """A model on an earlier night; its scores are read when they are needed."""

    date: str
    columns: Collection[str]
    """That may be compared with tonight's."""
    regressed: Collection[str] = ()
    """In which it had regressed itself, or had lost videos."""
    read: Callable[[], Values] = field(repr=False)
    _values: Values | None = field(default=None, repr=False)

    def values(self, column: str) -> Sequence[Value]:
        """Its scores."""
        if self._values is None:
            self._values = self.read()
        return self._values.get(column, ())


def compared(
    model: str, tonight: Values, earlier: Sequence[Earlier], *, nights: int
) -> tuple[list[Comparison], list[Loss]]:
    """A model's comparisons, not yet judged (`judged` does it), and what has lost its scores.

    Args:
        model: Its name.
        tonight: Its scores.
        earlier: Other exports of it, the newest first.
        nights: Of them in the mean, at most.
    """
    found, losses = [], []
    for column, values in tonight.items():
        there = [one for one in earlier if column in one.columns]
        good = [one for one in there if column not in one.regressed][:nights]
        sides: list[tuple[Against, list[Earlier]]] = []
        if there:
            sides.append(("previous", there[:1]))
        if good and good != there[:1]:
            sides.append(("window", good))
        for against, some in sides:
            reference = averaged([one.values(column) for one in some])
            difference = with_tail(compare(values, reference, weight=WEIGHTS.get(column)))
            found.append(
                Comparison(
                    model=model,
                    dimension=column,
                    against=against,
                    nights=tuple(one.date for one in some),
                    difference=difference,
                    verdict="same" if difference.p is not None else "too few",
                )
            )
        loss = lost(model, column, values, [*there[:1], *good])
        losses += [loss] if loss else []
    return found, losses


def with_tail(difference: Difference) -> Difference:
    """With p where no resample came to 0, which the bootstrap only bounds: Student's t there.

    Its standard error is that of the interval. Whatever the numbers, p is not below that of n
    prompts that all differ to one side, which happens by chance in one of 2 ** (n - 1).
    """
    from scipy import stats

    d = difference
    if d.p is None or d.mean is None or d.low is None or d.high is None:
        return d
    n = d.num_prompts
    bound = 2 * stats.t.cdf(stats.norm.ppf(1 / (RESAMPLES + 1)) * math.sqrt((n - 1) / n), n - 1)
    if d.p > bound * (1 + 1e-9):
        return d
    error = (d.high - d.low) / 2 / stats.t.ppf((1 + LEVEL) / 2, n - 1)
    p = 2 * stats.t.sf(abs(d.mean) / error, n - 1) if error > 0 else 0.0
    return dataclasses.replace(d, p=max(min(float(p), d.p), 2.0 ** (1 - n)))


def needed(num_tests: int) -> int:
    """Prompts below which nothing can be beyond noise, where so many tests are adjusted for."""
    return max(MIN_PROMPTS, math.floor(1 + math.log2(num_tests / (1 - LEVEL))) + 1)


def judged(found: Sequence[Comparison], tolerance: float = 0.0) -> list[Comparison]:
    """Comparisons with p adjusted by Holm over all of them, and what follows from it.

    Args:
        found: All of a run.
        tolerance: What falls by no more than this is no regression.
    """
    tested = [c.difference.p for c in found if c.difference.p is not None]
    p, least = iter(holm(tested)), needed(max(1, len(tested)))
    made = []
    for one in found:
        difference = one.difference
        if difference.p is not None:
            difference = dataclasses.replace(difference, p_adjusted=next(p))
        told = verdict(one.dimension, difference, least, tolerance)
        made.append(dataclasses.replace(one, difference=difference, verdict=told, needed=least))
    return made


def verdict(column: str, difference: Difference, least: int, tolerance: float = 0.0) -> Verdict:
    """What a difference, tonight less earlier, says."""
    if difference.p is None or difference.mean is None:
        return "too few"
    if not difference.is_beyond_noise:
        return "too few" if difference.num_prompts < least else "same"
    if abs(difference.mean) <= tolerance:
        return "same"
    return "better" if (difference.mean > 0) == higher_is_better(column) else "worse"


def averaged(nights: Sequence[Sequence[Value]]) -> list[Value]:
    """The mean of each video's scores over nights that have one."""
    found: dict[tuple[str, int, int], list[Value]] = defaultdict(list)
    for values in nights:
        for place, value in by_place(values).items():
            found[place].append(value)
    made = []
    for some in found.values():
        scored = [value for value in some if value.score is not None]
        if not scored:
            made.append(some[0])
            continue
        mean = float(np.mean([value.score for value in scored]))
        made.append(dataclasses.replace(scored[0], score=mean))
    return made


def lost(
    model: str, column: str, tonight: Sequence[Value], earlier: Sequence[Earlier]
) -> Loss | None:
    """Videos without a score that had one before; all of them, where nothing has one."""
    failed = {
        place: value
        for place, value in by_place(tonight).items()
        if value.score is None and value.error != NO_OBJECT
    }
    had = [one for one in earlier if failed and _scored(one.values(column)) & failed.keys()]
    gone = set[tuple[str, int, int]]().union(*(_scored(one.values(column)) for one in had))
    gone &= failed.keys()
    if not gone and len(failed) == len(tonight) > 0:
        gone = set(failed)  # on a first night, too
    if not gone:
        return None
    ((why, _),) = Counter(failed[place].error or "no score" for place in gone).most_common(1)
    return Loss(
        model=model,
        dimension=column,
        num_lost=len(gone),
        num_expected=len(tonight),
        night=max((one.date for one in had), default=None),
        why=why if len(why) <= _LONGEST else f"{why[:_LONGEST]} …",
    )


def _scored(values: Sequence[Value]) -> set[tuple[str, int, int]]:
    return {place for place, value in by_place(values).items() if value.score is not None}


def values_of(root: str, plan: Plan, name: str) -> dict[str, list[Value]]:
    """A model's scores as a run has them, without what comparing does not need."""
    results = Results.of(root, plan, {name: plan})
    found = {d: [_slim(v) for v in results.values(name, d)] for d in plan.dimensions}
    for dimension in plan.drift:
        summary = results.drifts(name, dimension)
        if summary is not None:
            (cell,) = drift.cells([summary])
            found[drift.COLUMN + dimension] = [_slim(v) for v in cell.values]
    return found


def _slim(value: Value) -> Value:
    details = None if value.details is None else {}
    return dataclasses.replace(value, frame_scores=None, details=details)


def columns_of(plan: Plan) -> list[str]:
    """What a run measures."""
    return [*plan.dimensions, *(drift.COLUMN + dimension for dimension in plan.drift)]


def obstacle(column: str, tonight: Plan, earlier: Plan) -> str | None:
    """Why tonight's scores are not compared with an earlier run's; None where they are."""
    dimension = column.removeprefix(drift.COLUMN)
    if column not in columns_of(earlier):
        return "it was not measured"
    if tonight.metrics[dimension]["fingerprint"] != earlier.metrics[dimension]["fingerprint"]:
        return "other weights or versions measured it"
    if tonight.clips != earlier.clips or _expected(tonight, dimension) != _expected(
        earlier, dimension
    ):
        return "other prompts or samples were asked for"
    if dimension == "temporal_flickering" and tonight.is_filtered != earlier.is_filtered:
        return "VBench's static filter was used on one of them alone"
    return None


def _expected(plan: Plan, dimension: str) -> list[Any]:
    return [
        (p.prompt, p.text, p.samples, p.auxiliary.get(dimension))
        for p in plan.suite.prompts
        if dimension in p.dimensions
    ]


def export_of(plan: Plan, name: str, held: Sequence[Any] | None) -> str:
    """Names what a run evaluated: weights, settings and seed, or the videos that a folder held."""
    model = plan.model(name)
    if held is not None:
        says = ["folder", *(row and row[0] for row in held)]
    else:
        says = [model["kind"], model["checkpoint"], dict(model["settings"]), plan.seed]
    return hashlib.sha256(json.dumps(says, sort_keys=True).encode()).hexdigest()[:16]
