"""A nightly evaluation: the newest exports, scored and compared with those of earlier nights.

A night is named by its date and what is asked for. One that is finished is not done again, by
whomever it is asked for: its report is read from `runs`. One that died goes on, with the exports
that it began with.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.tables import NoDataset
from evals import exports
from evals.drift import COLUMN
from evals.evaluation import Plan, Results, held, videos_of
from evals.models import Model, named
from evals.regressions import (
    Earlier,
    columns_of,
    compared,
    export_of,
    judged,
    obstacle,
    values_of,
)
from evals.report import Comparison, Loss, ModelNight, Report, Score
from evals.running import Done, Request, run
from evals.trend import Night, nights_of

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Tonight:
    """What a night is to be."""

    root: str
    date: str
    """YYYY-MM-DD."""
    recipe: str
    asked: str
    """Fingerprint of everything else that was asked for (`fingerprint`)."""
    models: Mapping[str, str]
    """By name: folder or endpoint."""
    exports: Mapping[str, Path]
    """By name: folder whose newest export is evaluated."""
    optional: Collection[str] = ()
    """Of `exports` those that are passed over where there is none yet."""
    nights: int = 7
    """Exports that tonight's is compared with, at most."""
    tolerance: float = 0.0
    since: str | None = None
    """Date of the first night that is compared with."""

    def __post_init__(self) -> None:
        for what, given in (("--date", self.date), ("--since", self.since)):
            if given is not None:
                _check_date(what, given)
        if self.nights < 1:
            raise ValueError(f"--nights {self.nights}: one at least is needed")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"--tolerance {self.tolerance}: a score from 0 to below 1 is needed")
        if twice := self.models.keys() & self.exports.keys():
            raise ValueError(f"{', '.join(sorted(twice))}: named by --models and by --exports")
        if not self.names:
            raise ValueError("no model: --exports FOLDER, or --models NAME=WHERE, one or more")

    @property
    def names(self) -> list[str]:
        """Of models."""
        return [*self.models, *self.exports]


def today() -> str:
    """The date in UTC: machines and retries agree on it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def models_of(specs: Sequence[str]) -> dict[str, str]:
    """Places by name, of NAME=WHERE.

    Raises:
        ValueError: One has no name, by which later nights would know it again, or two the same.
    """
    found = dict(named(specs))
    for spec, (name, at) in zip(specs, found.items(), strict=True):
        if spec != f"{name}={at}":
            raise ValueError(f"--models {spec}: write NAME=FOLDER or NAME=URL")
    return found


def fingerprint(asked: Mapping[str, Any]) -> str:
    """Names what is asked for beside models: 16 hex digits.

    Args:
        asked: Options by name; `prompts` and `enhanced` count by what is in them.
    """
    from engine.weights import digest

    says = dict(asked)
    for name in ("prompts", "enhanced"):
        path = says.get(name)
        if path is not None and Path(path).expanduser().exists():
            says[name] = digest(Path(path).expanduser())
    text = json.dumps(says, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Meanwhile(Exception):
    """Another scheduler has done the night while this one got ready."""


def night(
    tonight: Tonight,
    request: Callable[[Sequence[str]], Request],
    *,
    connect: Callable[[], AbstractContextManager[Any]],
    watch: Callable[[Any], None] = lambda _: None,
    say: Say = lambda _: None,
    again: bool = False,
) -> Report:
    """Does what is left to do of a night; gives its report.

    Args:
        tonight: What it is to be.
        request: The evaluation of these models (NAME=WHERE), checked before any work starts.
        connect: To Ray, where something is to do.
        watch: Called with the run's progress.
        say: Called with lines for a person.
        again: Go over a finished night once more, such as after failures.

    Raises:
        ValueError: Something is not as it is needed.
        DatasetError: The dataset cannot be written to, or another night is under way on it.
        LeaseLost: Another driver has taken over.
        OSError: A model or the dataset cannot be read.
        Unloadable: A model or a metric cannot be loaded.
    """
    there = [n for n in _nights(tonight) if n.date == tonight.date]
    finished = _finished(tonight, there)
    done = _names(finished) & set(tonight.names)
    if done and not again:
        say(f"the night of {tonight.date} is done for {', '.join(sorted(done))}: not done again")
    todo = [name for name in tonight.names if again or name not in done]
    specs = [spec for name in todo if (spec := where(tonight, name, there, say))]
    if not specs and not done:
        raise ValueError(f"{', '.join(tonight.names)}: none has a finished export")
    if specs:
        asked = request(specs)
        asked = dataclasses.replace(asked, night=tonight.date, asked=tonight.asked)
        _check(asked.models)
        found: list[Report] = []

        def begin() -> None:
            if not again and _names(_finished(tonight, _nights(tonight))) & set(todo):
                raise _Meanwhile

        def conclude(ran: Done) -> dict[str, Any]:
            found.append(_report(tonight, asked, ran))
            return {"night": found[0].to_dict()}

        try:
            run(asked, connect=connect, watch=watch, begin=begin, conclude=conclude)
        except _Meanwhile:
            return night(tonight, request, connect=connect, watch=watch, say=say)
        finished = [*found, *finished]
    evaluated = _names(finished)
    return Report.merged(finished, [name for name in tonight.names if name in evaluated])


def _finished(tonight: Tonight, nights: Sequence[Night]) -> list[Report]:
    """What this command found on this date, the newest first."""
    return [
        one.report
        for one in nights
        if one.date == tonight.date and one.asked == tonight.asked and one.report
    ]


def _names(reports: Sequence[Report]) -> set[str]:
    return {model.name for report in reports for model in report.models}


def _check_date(what: str, given: str) -> None:
    try:
        is_date = datetime.date.fromisoformat(given).isoformat() == given
    except ValueError:
        is_date = False
    if not is_date:
        raise ValueError(f"{what} {given}: a date as YYYY-MM-DD is needed")


def _nights(tonight: Tonight) -> list[Night]:
    """Nights up to this one, the newest first; none where there is no dataset yet."""
    try:
        found = nights_of(tonight.root, tonight.recipe)
    except NoDataset:
        return []
    return [one for one in found if one.date <= tonight.date]


def where(tonight: Tonight, name: str, there: Sequence[Night], say: Say) -> str | None:
    """NAME=WHERE of a model; of one whose night died, where it began.

    None where it has no export, and none is needed.

    Raises:
        ValueError: It has none, and one is needed.
    """
    if name in tonight.models:
        return f"{name}={tonight.models[name]}"
    for one in there:
        if not one.finished and one.asked == tonight.asked and name in one.models:
            begun = Path(one.plan.model(name)["at"])
            if begun.is_relative_to(tonight.exports[name]) and exports.lacks(begun) is None:
                say(f"{name}: goes on with {begun}, which this night began with")
                return f"{name}={begun}"
    try:
        found = exports.newest(name, tonight.exports[name], say)
    except (ValueError, OSError) as error:
        if name not in tonight.optional:
            raise
        say(f"{name} is passed over: {error}")
        return None
    say(f"{name}: {found}")
    return f"{name}={found}"


def _check(models: Sequence[Model]) -> None:
    for model in models:
        if model.kind == "served" and model.checkpoint == model.at:
            raise ValueError(
                f"model {model.name}: its endpoint does not say which weights it serves, so that"
                " new ones would be taken for the old: let its GET answer with a `checkpoint`"
            )


def _report(tonight: Tonight, request: Request, done: Done) -> Report:
    """What a run that has just scored everything found."""
    plan = dataclasses.replace(request.plan, run_id=done.run_id)
    before = [n for n in _nights(tonight) if n.date < tonight.date and n.report]
    if tonight.since:
        before = [n for n in before if n.date >= tonight.since]
    models, comparisons, losses = [], list[Comparison](), list[Loss]()
    for model in request.models:
        folder = model.kind == "folder"
        held_now = (
            held(plan.suite, videos_of(tonight.root, model.describe(), plan.seed))
            if folder
            else None
        )
        export = export_of(plan, model.name, held_now)
        earlier, same = _earlier(tonight, plan, model.name, export, before)
        values = values_of(tonight.root, plan, model.name)
        some, gone = compared(model.name, values, earlier, nights=tonight.nights)
        gone += _not_measured(tonight, plan, model.name, before)
        comparisons += some
        losses += gone
        generated = done.generated.get(model.name)
        models.append(
            ModelNight(
                name=model.name,
                kind=model.kind,
                checkpoint=model.checkpoint,
                at=model.at,
                export=export,
                unchanged_since=same,
                run_id=done.run_id,
                is_tiny=plan.is_tiny or "tiny" in model.notes,
                num_made=0 if generated is None else _made(generated),
                scores=_scores(tonight, plan, model.name, before, {c.dimension for c in some}),
            )
        )
    return Report(
        date=tonight.date,
        recipe=tonight.recipe,
        asked=tonight.asked,
        suite=plan.suite.name,
        num_prompts=len(plan.suite.prompts),
        seconds=done.seconds,
        num_scored=done.scored.scored,
        nights=tonight.nights,
        tolerance=tonight.tolerance,
        since=tonight.since,
        models=tuple(models),
        comparisons=tuple(judged(comparisons, tonight.tolerance)),
        losses=tuple(losses),
    )


def _made(counts: Any) -> int:
    return getattr(counts, "generated", 0) + getattr(counts, "imported", 0)


def _earlier(
    tonight: Tonight, plan: Plan, name: str, export: str, before: Sequence[Night]
) -> tuple[list[Earlier], str | None]:
    """Other exports of a model, the newest first, and since when tonight's is the same."""
    found, same = list[Earlier](), None
    seen = defaultdict[str, set[str]](set)
    wanted = Counter(dict.fromkeys(columns_of(plan), tonight.nights))
    for one, said in _of(name, before):
        columns = {c for c in columns_of(plan) if not obstacle(c, plan, one.plan)}
        if not columns:
            continue  # such as a try-out with a few prompts: it hides no other night
        if said.export == export:
            same = one.date if not found else same
            continue
        assert one.report is not None
        earlier = Earlier(
            date=one.date,
            columns=columns - seen[said.export],
            regressed=frozenset(
                [c.dimension for c in one.report.regressions if c.model == name]
                + [x.dimension for x in one.report.losses if x.model == name]
            ),
            read=functools.partial(values_of, tonight.root, one.plan, name),
        )
        if earlier.columns:
            found.append(earlier)
        seen[said.export] |= columns
        wanted.subtract(set(earlier.columns) - set(earlier.regressed))
        if max(wanted.values()) <= 0:
            break  # older ones would not be compared with
    return found, same


def _of(name: str, before: Sequence[Night]) -> list[tuple[Night, ModelNight]]:
    """A model's nights, which may be several a date."""
    return [
        (one, said)
        for one in before
        for said in (one.report.models if one.report else ())
        if said.name == name
    ]


def _not_measured(tonight: Tonight, plan: Plan, name: str, before: Sequence[Night]) -> list[Loss]:
    """Dimensions that the same command measured on a night before, and cannot measure now."""
    found: dict[str, Loss] = {}
    like = [one for one in before if one.asked == tonight.asked]
    for one, said in _of(name, like)[: tonight.nights]:
        for score in said.scores:
            if score.num_videos and score.dimension not in columns_of(plan):
                loss = Loss(
                    model=name,
                    dimension=score.dimension,
                    num_lost=score.num_videos,
                    num_expected=score.num_expected,
                    night=one.date,
                    why="it cannot be measured here any more",
                )
                found.setdefault(score.dimension, loss)
    return list(found.values())


def _scores(
    tonight: Tonight,
    plan: Plan,
    name: str,
    before: Sequence[Night],
    tested: Collection[str],
) -> tuple[Score, ...]:
    """A model's scores, with why one is not `tested`: compared with no earlier night."""
    found = []
    last = next((one for one, _ in _of(name, before)), None)
    for cell in Results.of(tonight.root, plan, {name: plan}).cells():
        if cell.category is not None:
            continue
        note = None
        if last and cell.column not in tested and (why := obstacle(cell.column, plan, last.plan)):
            note = f"not compared with {last.date}: {why}"
        found.append(
            Score(
                dimension=cell.column,
                value=cell.value,
                stderr=cell.stderr,
                num_videos=cell.num_videos,
                num_prompts=cell.num_prompts,
                num_expected=cell.num_expected,
                num_failed=cell.num_failed,
                fingerprint=plan.metrics[cell.column.removeprefix(COLUMN)]["fingerprint"],
                note=note,
            )
        )
    return tuple(found)
