"""What a nightly evaluation found: scores, what fell beyond its noise, and what could not be told.

A report is a value that is stored with its run: a night that is asked for again says the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine import command
from evals.compare import MIN_PROMPTS, Difference
from evals.dimensions import DIMENSIONS
from evals.drift import COLUMN

Against = Literal["previous", "window"]
Verdict = Literal["worse", "better", "same", "too few"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's score in a dimension, or a drift of it, on one night."""

    dimension: str
    value: float | None
    stderr: float | None
    num_videos: int
    num_prompts: int
    num_expected: int
    num_failed: int
    fingerprint: str
    """Of the metric."""
    note: str | None = None
    """Why it is compared with nothing, or with fewer nights."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Tonight's score against one of earlier nights."""

    model: str
    dimension: str
    against: Against
    """The export before this one, or the mean of the last ones that did not regress."""
    nights: tuple[str, ...]
    """Dates, the newest first."""
    difference: Difference
    """Tonight less those nights."""
    verdict: Verdict
    needed: int = MIN_PROMPTS
    """Prompts below which nothing can be told."""

    @property
    def has_regressed(self) -> bool:
        """It got worse beyond its noise."""
        return self.verdict == "worse"

    @property
    def nights_told(self) -> str:
        """Such as `2026-11-20`, or `the mean of 7 exports since 2026-11-14`."""
        if len(self.nights) == 1:
            return self.nights[0]
        return f"the mean of {len(self.nights)} exports since {self.nights[-1]}"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A dimension in which videos have no score, that had one before or that should have one."""

    model: str
    dimension: str
    num_lost: int
    num_expected: int
    night: str | None
    """When they had one; None where nothing was ever scored."""
    why: str
    """What most of them lack."""


@dataclass(frozen=True, kw_only=True)
class ModelNight:
    """A model on one night."""

    name: str
    kind: str
    checkpoint: str | None
    at: str
    """Folder or endpoint."""
    export: str
    """Names what was evaluated: weights and settings, or the videos that a folder held."""
    unchanged_since: str | None
    """The night that evaluated the same first; None where it is new."""
    run_id: str
    is_tiny: bool
    num_made: int
    """Videos generated or imported by this night."""
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """A night."""

    date: str
    recipe: str
    asked: str
    """Fingerprint of what the command asked for, beside models: suite, dimensions, samples …"""
    suite: str
    num_prompts: int
    seconds: float
    num_scored: int
    """Scores measured by this night; others were there."""
    nights: int
    """Exports that tonight's is compared with, at most."""
    tolerance: float
    since: str | None
    """Earlier nights are not compared with."""
    models: tuple[ModelNight, ...]
    comparisons: tuple[Comparison, ...]
    losses: tuple[Loss, ...]

    @property
    def regressions(self) -> list[Comparison]:
        """What got worse beyond its noise, once a model and dimension.

        Against the export before, where that tells it already.
        """
        found: dict[tuple[str, str], Comparison] = {}
        for one in self.comparisons:
            if one.has_regressed:
                found.setdefault((one.model, one.dimension), one)
        return list(found.values())

    @property
    def untold(self) -> list[Comparison]:
        """Comparisons of too few prompts."""
        return [c for c in self.comparisons if c.verdict == "too few"]

    @property
    def has_regressed(self) -> bool:
        """A score fell, or videos have none that had one."""
        return bool(self.regressions or self.losses)

    @property
    def exit_code(self) -> int:
        """Of the command."""
        return command.REGRESSION if self.has_regressed else 0

    @property
    def is_tiny(self) -> bool:
        """Small random weights made or measured its videos: it means nothing."""
        return any(model.is_tiny for model in self.models)

    @property
    def status(self) -> str:
        """In a few words."""
        said = [
            f"{number:,} {word}{'s' * (number != 1)}{rest}"
            for number, word, rest in (
                (len(self.regressions), "regression", ""),
                (len(self.losses), "dimension", " lost scores"),
            )
            if number
        ]
        return " and ".join(said) or "no regression"

    def sentences(self) -> list[str]:
        """What a person is to know, the worst first."""
        found = [sentence(c) for c in self.regressions] + [lost(one) for one in self.losses]
        if not found:
            found.append(self._all_well())
        if few := self.untold:
            least, needed = min(c.difference.num_prompts for c in few), max(c.needed for c in few)
            of = sorted({f"{c.model} in {title(c.dimension)}" for c in few})
            found.append(f"cannot be told for {_some(of)}: {least:,} prompts, {needed:,} needed")
        found += [
            f"{m.name}: unchanged since {m.unchanged_since}"
            for m in self.models
            if m.unchanged_since
        ]
        found += sorted(
            {f"{m.name}: {title(s.dimension)}: {s.note}" for m in self.models for s in m.scores
             if s.note}
        )  # fmt: skip
        return found

    def _all_well(self) -> str:
        tested = sum(c.verdict != "too few" for c in self.comparisons)
        if tested:
            return f"no regression: {tested:,} comparisons, none worse beyond its noise"
        if self.comparisons:
            return f"nothing can be told: {len(self.comparisons):,} comparisons of too few prompts"
        return (
            "nothing was compared: no earlier night evaluated other exports of these models that"
            " can be compared with"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `of` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Report:
        """What `to_dict` gave."""
        models = (
            ModelNight(**{**m, "scores": tuple(Score(**s) for s in m["scores"])})
            for m in said["models"]
        )
        comparisons = (
            Comparison(
                **{**c, "nights": tuple(c["nights"]), "difference": Difference(**c["difference"])}
            )
            for c in said["comparisons"]
        )
        found = {
            "models": tuple(models),
            "comparisons": tuple(comparisons),
            "losses": tuple(Loss(**one) for one in said["losses"]),
        }
        return cls(**{**said, **found})

    @classmethod
    def merged(cls, reports: Iterable[Report], names: Iterable[str]) -> Report:
        """One night of several runs, with these models alone, in this order."""
        some = list(reports)
        of = {
            name: next(r for r in some if any(m.name == name for m in r.models)) for name in names
        }
        used = [one for one in some if one in of.values()]
        return dataclasses.replace(
            some[0],
            seconds=sum(one.seconds for one in used),
            num_scored=sum(one.num_scored for one in used),
            models=tuple(next(m for m in r.models if m.name == n) for n, r in of.items()),
            comparisons=tuple(c for n, r in of.items() for c in r.comparisons if c.model == n),
            losses=tuple(one for n, r in of.items() for one in r.losses if one.model == n),
        )


def title(column: str) -> str:
    """A dimension's name, or a drift's, for a person."""
    name = column.removeprefix(COLUMN)
    found = DIMENSIONS[name].title if name in DIMENSIONS else name
    return f"Drift of {found}" if column.startswith(COLUMN) else found


def higher_is_better(column: str) -> bool:
    """Of a dimension; less drift is better."""
    return not column.startswith(COLUMN) and DIMENSIONS[column].higher_is_better


def sentence(one: Comparison) -> str:
    """A regression, with its numbers."""
    d = one.difference
    how = "fell" if higher_is_better(one.dimension) else "rose, which is worse,"
    p = d.p if d.p_adjusted is None else d.p_adjusted
    return (
        f"{one.model}: {title(one.dimension)} {how} from {d.b:.4f} ({one.nights_told}) to"
        f" {d.a:.4f}: {d.mean:+.4f}, 95 % interval {d.low:+.4f} … {d.high:+.4f},"
        f" p {p_told(p)}, {d.num_prompts:,} prompts"
    )


def lost(one: Loss, *, with_reason: bool = True) -> str:
    """Videos without a score."""
    before = f" that had one on {one.night}" if one.night else ""
    return (
        f"{one.model}: {title(one.dimension)}: {one.num_lost:,} of {one.num_expected:,} videos"
        f"{before} have no score{f': {one.why}' if with_reason else ''}"
    )


def p_told(p: float | None) -> str:
    """A p for a person."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
