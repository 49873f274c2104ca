"""The papers' tables of their user studies, filled with votes: for a terminal, a paper, a program.

RISE's table 4 has a row a method and a column a question; Mimir's table 2 has a row a question and
a column a method. Shares have two digits, as printed there, and their 95 % interval in brackets.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import TYPE_CHECKING, Any, Literal

from evals.formats import Grid, Label, latex, markdown, rich_table
from evals.ranks import ranks
from evals.study import PUBLISHED, Name
from evals.tables import Entry, Place
from evals.tally import FEW, Pair, Share, Tally

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DASH = "–"
_DAGGER = ("†",)
"""Marks what is published."""
_MOST = 3
"""Columns of shares with their intervals that fit into a line of a paper."""
Format = Literal["markdown", "latex", "csv", "json"]
_HOW: Mapping[Name, str] = {
    "rise": "Share of the results in which a model was among those chosen; several may be, so a"
    " column sums to 100 % or more.",
    "mimir": "Share of its comparisons that a model won; every pair has one winner, so models that"
    " all meet each other equally often sum to half their number times 100 %.",
}
_INTERVALS = (
    "In brackets the 95 % interval for other voters and prompts like these (Wilson's, with the"
    " variance clustered by voter and by prompt)."
)
_PLACES = "Best in bold, second underlined, among our models, by the numbers as printed."


def grids(tally: Tally, *, with_published: bool = False) -> list[Grid]:
    """The paper's table, and of mimir the pairs behind it."""
    made = [_paper_grid(tally, with_published)]
    if tally.pairs:
        made.append(_pair_grid(tally))
    return made


def _paper_grid(tally: Tally, with_published: bool) -> Grid:
    study, design = tally.study, tally.study.design
    asked = [question.key for question in design.questions]
    places = {key: _places(tally.shares[key]) for key in asked}
    models = [Label(model) for model in study.models]
    columns = [
        [_entry(tally.shares[key][model], places[key].get(model)) for key in asked]
        for model in study.models
    ]
    footnotes: tuple[tuple[str, str], ...] = ()
    if with_published:
        models = [Label(m, _DAGGER, is_published=True) for m in PUBLISHED[study.name]] + models
        printed = [[Entry(number=f"{n}%") for n in ns] for ns in PUBLISHED[study.name].values()]
        columns = printed + columns
        footnotes = (("†", f"as printed in {design.source}, of other videos and voters"),)
    heads, names = [Label(question.header) for question in design.questions], models
    if study.name == "mimir":
        heads, names, columns = names, heads, [list(one) for one in zip(*columns, strict=True)]
    return Grid(
        name=f"{study.name}_study",
        title=f"{design.source}: user study",
        caption=" ".join(_caption(tally)),
        heads=heads,
        names=names,
        entries=columns,
        corner="Method",
        num_above=sum(name.is_published for name in names),
        footnotes=footnotes,
        most=_MOST,
    )


def _caption(tally: Tally) -> list[str]:
    study = tally.study
    if not tally.num_votes:
        return [f"No vote yet, on {len(study.items):,} items."]
    counts = (
        f"{_num(tally.num_voters, 'voter')} ({tally.num_finished:,} to the end),"
        f" {_num(tally.num_results, 'result')} on {tally.num_items:,} of {len(study.items):,}"
        f" items ({_num(tally.num_prompts, 'prompt')}), {_num(tally.num_votes, 'vote')}."
    )
    said = [counts]
    if study.tiny:
        said.insert(
            0, f"MEANINGLESS: small random models made the videos of {', '.join(study.tiny)}."
        )
    if tally.is_thin:
        said.insert(
            0, f"TOO FEW VOTES to tell models apart: {FEW} voters and {FEW} prompts at least."
        )
    said.append(_HOW[study.name])
    if study.reference:
        said.append(f"Pairs with {study.reference} only.")
    said += [_INTERVALS, _PLACES]
    return said


def _num(number: int, of: str) -> str:
    return f"{number:,} {of}{'' if number == 1 else 's'}"


def _entry(share: Share, place: Place | None = None) -> Entry:
    if share.value is None:
        return Entry(number=DASH)
    return Entry(number=f"{_printed(share.value)}%", interval=_interval(share), place=place)


def _printed(value: float) -> Decimal:
    return (Decimal(repr(value)) * 100).quantize(Decimal("0.01"), ROUND_HALF_EVEN)


def _interval(share: Share) -> str:
    if share.low is None or share.high is None:
        return ""
    return f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"


def _places(shares: Mapping[str, Share]) -> dict[str, Place]:
    """Models of rank 1 and 2 by the numbers as printed; none where all are equal."""
    numbers = {m: float(_printed(s.value)) for m, s in shares.items() if s.value is not None}
    if len(set(numbers.values())) < 2:
        return {}
    names: dict[float, Place] = {1: "best", 2: "second"}
    return {model: names[rank] for model, rank in ranks(numbers).items() if rank in names}


def _pair_grid(tally: Tally) -> Grid:
    titles = {question.key: question.title for question in tally.study.design.questions}
    heads = (
        Label("Question", is_text=True),
        Label("Votes"),
        Label("for the first"),
        Label("Prompts won:lost"),
        Label("p (Holm)"),
        Label("p by votes"),
    )
    entries = [
        [
            Entry(number=titles[one.question]),
            Entry(number=f"{one.share.of:,}"),
            _entry(one.share),
            Entry(number=f"{one.prompts_a:,}:{one.prompts_b:,}"),
            Entry(number=_p(one.p_adjusted)),
            Entry(number=_p(one.p_votes)),
        ]
        for one in tally.pairs
    ]
    return Grid(
        name="mimir_pairs",
        title="Pairwise preference",
        caption="p: two-sided sign test over prompts, each decided by the majority of its votes,"
        " adjusted by Holm over all lines. p by votes takes every vote for independent, which votes"
        " of one voter or on one prompt are not: it is too small.",
        heads=heads,
        names=[Label(f"{one.a} – {one.b}") for one in tally.pairs],
        entries=entries,
        corner="Pair",
        most=_MOST,
    )


def _p(value: float | None) -> str:
    return DASH if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def rich_tables(tally: Tally, *, with_published: bool = False) -> list[RichTable]:
    """For a terminal."""
    return [rich_table(grid) for grid in grids(tally, with_published=with_published)]


def text(tallies: Sequence[Tally], kind: Format, *, with_published: bool = False) -> str:
    """Tables of several studies as one text."""
    if kind == "json":
        told = [_record(tally, with_published) for tally in tallies]
        return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if kind == "csv":
        return _csv(tallies, with_published)
    write = {"markdown": markdown, "latex": latex}[kind]
    made = [write(g) for t in tallies for g in grids(t, with_published=with_published)]
    return "\n".join(made)


_COLUMNS = (
    *("study", "question", "model", "against", "published", "chosen", "of", "share", "low", "high"),
    *("prompts_won", "prompts_lost", "p", "p_adjusted", "p_votes"),
)


def _csv(tallies: Sequence[Tally], with_published: bool) -> str:
    """A row a model and question, then a row a pair and question; shares are 0 to 1."""
    written = io.StringIO()
    writer = csv.DictWriter(written, _COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for tally in tallies:
        for row in _lines(tally, with_published):
            told = {"study": tally.study.name} | row
            writer.writerow({k: "" if v is None else v for k, v in told.items()})
    return written.getvalue()


def _lines(tally: Tally, with_published: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if with_published:
        found += [
            {
                "question": question.key,
                "model": model,
                "published": tally.study.design.source,
                "share": float(Decimal(number) / 100),
            }
            for model, numbers in PUBLISHED[tally.study.name].items()
            for question, number in zip(tally.study.design.questions, numbers, strict=True)
        ]
    found += [
        {"question": question, "model": model} | _numbers(share)
        for question, of in tally.shares.items()
        for model, share in of.items()
    ]
    return found + [_pair_line(one) for one in tally.pairs]


def _numbers(share: Share) -> dict[str, Any]:
    return {
        "chosen": share.chosen,
        "of": share.of,
        "share": share.value,
        "low": share.low,
        "high": share.high,
    }


def _pair_line(one: Pair) -> dict[str, Any]:
    return {
        "question": one.question,
        "model": one.a,
        "against": one.b,
        "prompts_won": one.prompts_a,
        "prompts_lost": one.prompts_b,
        "p": one.p,
        "p_adjusted": one.p_adjusted,
        "p_votes": one.p_votes,
    } | _numbers(one.share)


def _record(tally: Tally, with_published: bool) -> dict[str, Any]:
    study = tally.study
    counts = {
        field.name: getattr(tally, field.name)
        for field in dataclasses.fields(tally)
        if field.name.startswith("num_")
    }
    return {
        "study": study.name,
        "source": study.design.source,
        "fingerprint": study.fingerprint,
        "models": study.models,
        "reference": study.reference,
        "tiny": study.tiny,
        "items": len(study.items),
        **counts,
        "too_few": tally.is_thin,
        "how": _HOW[study.name],
        "intervals": _INTERVALS,
        "questions": [vars(question) for question in study.design.questions],
        "rows": _lines(tally, with_published),
    }
