"""The papers' tables, filled with cells: ours with standard error and n, published ones apart.

Places (bold, underlined, ranks) go by the numbers as printed, so that equal digits tie, as in the
papers. A cell that is not complete is shown with its count and takes no place; ranks and totals are
refused, with the reason, while something that they are made of is missing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

from evals import formats, leaderboard
from evals.presets import Column, Preset, preset_named
from evals.published import published
from evals.ranks import places, ranks
from evals.results import Cell
from evals.rows import (
    Model,
    categories_of,
    differ,
    has_value,
    is_whole,
    lacks,
    models_of,
    obstacle,
    ranked,
    signed,
    totals,
)

if TYPE_CHECKING:
    from rich.table import Table as RichTable

DASH = "–"
TOLD: Mapping[str, str | None] = {
    "tiny": "MEANINGLESS: measured with small random weights",
    "filtered": None,
    "unfiltered": "unfiltered: flickering is comparable only behind VBench's static filter",
    "native": "measured by this project's own implementation, not by the vbench package",
    "long_clip": "mean over two-second clips of each video, cut by frame index: not VBench-Long",
}
"""What a cell's notes mean, for a person; None needs no word. A note that is not here stands as it
is."""
_SOURCE_MARKS = "†‡§¶"
_RANK = Column(
    dimension="rank",
    header="Rank",
    multiplier=1,
    digits=2,
    higher_is_better=False,
    meaning="mean of a model's ranks in the other columns; equal numbers share the better rank",
)
_FIRST, _SECOND = (
    Column(
        dimension=f"places:{which}",
        header=header,
        multiplier=1,
        digits=0,
        meaning=f"categories in which a model's average rank is {header.lower()}",
    )
    for which, header in ((1, "First"), (2, "Second"))
)

Place = Literal["best", "second"]
Competing = Literal["all", "ours"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What stands in one place of a table."""

    number: str
    """As printed, with its suffix; a dash where there is none."""
    stderr: str | None = None
    """In the number's unit."""
    interval: str = ""
    """Of 95 %, in brackets."""
    n: int | None = None
    """Videos; None where the column's heading says it."""
    place: Place | None = None
    notes: tuple[str, ...] = ()
    """Marks of footnotes."""
    value: float | None = None
    """On the scale 0 to 1, or a rank; None where the dash stands."""
    cell: Cell | None = None
    """What it is of; None for what is derived from several."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Of a column."""

    column: Column
    title: str
    n: int | None
    """Videos of every cell below that says nothing else."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model."""

    model: str
    published: str | None
    """Where its numbers were published; None is ours."""
    notes: tuple[str, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A preset filled with cells; published rows first."""

    preset: Preset
    caption: str
    headings: tuple[Heading, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[tuple[str, str], ...]
    """Mark and text."""
    is_meaningless: bool
    """Some number is of small random weights."""

    @property
    def title(self) -> str:
        """Paper, table and its name."""
        source = self.preset.source
        return f"{source}: {self.preset.title}" if source else self.preset.title

    @property
    def about(self) -> tuple[str, ...]:
        """A line for each column: what its numbers are."""
        return tuple(
            f"{h.column.header}: {h.column.meaning} ({h.column.dimension}, {h.column.unit})"
            for h in self.headings
        )

    def markdown(self) -> str:
        """For a README: a pipe table, its caption, footnotes and columns."""
        return formats.markdown(formats.grid(self))

    def latex(self) -> str:
        r"""A `table` float; needs `\usepackage{booktabs,graphicx}`."""
        return formats.latex(formats.grid(self))

    def csv(self) -> str:
        """For machines: a row a model; a column's value, then COLUMN_stderr, COLUMN_n and more."""
        return formats.csv_text(self)

    def rich(self) -> RichTable:
        """For a terminal; models beside each other where there are more columns than fit."""
        return formats.rich_table(formats.grid(self, formats.MAX_TERMINAL))

    def to_json(self) -> str:
        """Everything, numbers in full, as JSON."""
        return formats.json_text(self)


class _Footnotes:
    """Texts with their marks, each once: daggers for sources, letters for the rest."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}
        self._num_sources = 0

    def source(self, text: str) -> str:
        if text not in self._marks:
            times, which = divmod(self._num_sources, len(_SOURCE_MARKS))
            self._marks[text] = _SOURCE_MARKS[which] * (times + 1)
            self._num_sources += 1
        return self._marks[text]

    def marks(self, texts: Iterable[str]) -> tuple[str, ...]:
        return tuple(self._letter(text) for text in dict.fromkeys(texts))

    def mark_of(self, text: str) -> str | None:
        return self._marks.get(text)

    def _letter(self, text: str) -> str:
        if text not in self._marks:
            times, which = divmod(len(self._marks) - self._num_sources, 26)
            self._marks[text] = chr(ord("a") + which) * (times + 1)
        return self._marks[text]

    def all(self) -> tuple[tuple[str, str], ...]:
        """Sources first."""
        found = [(mark, text) for text, mark in self._marks.items()]
        return tuple(sorted(found, key=lambda one: one[0][0] not in _SOURCE_MARKS))


def table(
    preset: Preset | str,
    cells: Iterable[Cell],
    *,
    models: Sequence[str] | None = None,
    with_published: bool = False,
    mark: Competing = "all",
) -> Table:
    """The table of a preset.

    Args:
        preset: Or its name.
        cells: Of all models; those that the preset has no column for are left aside.
        models: Ours that are shown, in this order; None is all, as they come.
        with_published: The paper's own rows stand above.
        mark: Rows among which best and second are told, and ranks counted.

    Raises:
        ValueError: A chosen model has no cell, one has two of the same, or nothing can be shown.
    """
    preset = preset_named(preset) if isinstance(preset, str) else preset
    given = [*(published(preset.name) if with_published else ()), *cells]
    shown = models_of(preset, given, models)
    competing = [one for one in shown if mark == "all" or one.published is None]
    own = [one for one in shown if one.published is None]
    columns, derived = (
        _category_columns(preset, competing)
        if preset.by_category
        else _table_columns(preset, shown, competing)
    )
    footnotes = _Footnotes()
    headings = tuple(_heading(preset, column, own, footnotes) for column in columns)
    placed = {c.dimension: _places(c, competing, derived) for c in columns}
    rows = tuple(
        Row(
            model=one.name,
            published=one.published,
            notes=(footnotes.source(one.published),) if one.published else (),
            entries=tuple(
                _entry(h, one, derived, placed[h.column.dimension].get(one.key), footnotes)
                for h in headings
            ),
        )
        for one in shown
    )
    return Table(
        preset=preset,
        caption=_caption(preset, shown, competing),
        headings=headings,
        rows=rows,
        footnotes=footnotes.all(),
        is_meaningless=any(_tiny(shown)),
    )


_Derived = dict[tuple[str, str], tuple[float | None, str | None]]
"""By row and column: a number, or why there is none."""


def _table_columns(
    preset: Preset, shown: Sequence[Model], competing: Sequence[Model]
) -> tuple[list[Column], _Derived]:
    """The preset's columns, then the rank; with what is not a cell of its own."""
    columns, derived = list(preset.columns), _Derived()
    if "totals" in preset.extras:
        for one in shown:
            for name, number in totals(one).items():
                derived[one.key, name] = number
    if "rank" in preset.extras:
        columns.append(_RANK)
        derived |= _ranked(_RANK, preset.columns, shown, competing, None)
    return columns, derived


def _category_columns(preset: Preset, competing: Sequence[Model]) -> tuple[list[Column], _Derived]:
    """A column of average ranks a category, then how often a model is first and second."""
    columns, derived = [], _Derived()
    by_category = {}
    for category in categories_of(competing):
        column = dataclasses.replace(_RANK, dimension=f"rank:{category}", header=category)
        columns.append(column)
        derived |= _ranked(column, preset.columns, competing, competing, category)
        if all(derived[one.key, column.dimension][0] is not None for one in competing):
            by_category[category] = ranked(preset.columns, competing, category)
    missing = [c.header for c in columns if c.header not in by_category]
    reason = f"refused: there is no rank in {', '.join(missing)}" if missing else None
    for column, which in ((_FIRST, 1), (_SECOND, 2)):
        columns.append(column)
        for one in competing:
            number = None if missing else float(places(by_category)[one.key][which - 1])
            derived[one.key, column.dimension] = (number, reason)
    return columns, derived


def _ranked(
    column: Column,
    over: Sequence[Column],
    shown: Sequence[Model],
    competing: Sequence[Model],
    category: str | None,
) -> _Derived:
    """Average ranks under the name of a column; refused for all while anything is missing."""
    reason = obstacle(over, competing, category)
    found = {} if reason else ranked(over, competing, category)
    outside = "only our rows are ranked"
    return {
        (one.key, column.dimension): (
            found.get(one.key),
            f"refused: {reason}" if reason else None if one.key in found else outside,
        )
        for one in shown
    }


def _places(column: Column, competing: Sequence[Model], derived: _Derived) -> dict[str, Place]:
    """Rows of rank 1 and 2 in a column; none where all are equal, nor in second places."""
    numbers = {}
    for one in competing:
        own = derived.get((one.key, column.dimension), (None, None))[0]
        if own is None and one.counts(column):
            own = one.cell(column).value
        if own is not None:
            numbers[one.key] = signed(column, own)
    if len(set(numbers.values())) < 2 or column is _SECOND:
        return {}
    names: dict[int, Place] = {1: "best", 2: "second"}
    return {key: names[rank] for key, rank in ranks(numbers).items() if rank in names}


def _heading(
    preset: Preset, column: Column, own: Sequence[Model], footnotes: _Footnotes
) -> Heading:
    cells = [cell for cell in _below(preset, column, own) if has_value(cell)]
    counts = Counter(cell.num_videos for cell in cells if is_whole(cell))
    is_ranked = column.dimension.startswith("rank:")
    notes = [c.note for c in (preset.columns if is_ranked else [column]) if c.note]
    notes += _shared_notes(cells)
    if differ(column, own, None):
        notes.append("models were scored on different prompts or samples")
    arrow = ("↑" if column.higher_is_better else "↓") if preset.arrows else ""
    return Heading(
        column=column,
        title=column.header + arrow,
        n=counts.most_common(1)[0][0] if counts else None,
        notes=footnotes.marks(notes),
    )


def _below(preset: Preset, column: Column, own: Sequence[Model]) -> list[Cell | None]:
    """Our cells that a column's numbers are of."""
    if column.dimension.startswith("rank:"):
        category = column.dimension.removeprefix("rank:")
        return [one.cell(of, category) for one in own for of in preset.columns]
    return [one.cell(column) for one in own]


def _shared_notes(cells: Sequence[Cell]) -> list[str]:
    """What is noted of every one of the cells."""
    if not cells:
        return []
    return [note for note in _told(cells[0]) if all(note in _told(cell) for cell in cells)]


def _told(cell: Cell) -> list[str]:
    """A cell's notes, as a person reads them."""
    return [told for note in cell.notes if (told := TOLD.get(note, note))]


def _entry(
    heading: Heading,
    model: Model,
    derived: _Derived,
    place: Place | None,
    footnotes: _Footnotes,
) -> Entry:
    column, cell = heading.column, model.cell(heading.column)
    if (model.key, column.dimension) in derived:
        value, reason = derived[model.key, column.dimension]
        number = DASH if value is None else f"{column.rounded(value)}{column.suffix}"
        notes = footnotes.marks([reason] if reason else [])
        return Entry(number=number, place=place, notes=notes, value=value)
    if cell is None:
        return Entry(number=DASH, notes=footnotes.marks(["not scored"]))
    notes = [note for note in _told(cell) if footnotes.mark_of(note) not in heading.notes]
    if cell.published is None and not is_whole(cell):
        notes.insert(0, lacks(cell))
    if not has_value(cell):
        return Entry(number=DASH, notes=footnotes.marks(notes), cell=cell)
    has_error = cell.stderr is not None and math.isfinite(cell.stderr)
    if cell.published is None and not has_error:
        notes.append("no standard error: it needs two prompts")
    is_plain = cell.published is not None or (is_whole(cell) and cell.num_videos == heading.n)
    return Entry(
        number=f"{column.rounded(cell.value)}{column.suffix}",
        stderr=_stderr(column, cell.stderr) if has_error else None,
        n=None if is_plain else cell.num_videos,
        place=place,
        notes=footnotes.marks(notes),
        value=cell.value,
        cell=cell,
    )


def _stderr(column: Column, stderr: float) -> str:
    printed = column.rounded(stderr)
    return str(printed) if printed or not stderr else f"<{Decimal(1).scaleb(-column.digits)}"


def _tiny(models: Sequence[Model]) -> list[bool]:
    """Of each cell of ours, whether small random weights gave it."""
    own = [one for one in models if one.published is None]
    return ["tiny" in cell.notes for one in own for cell in one.cells.values()]


def _caption(preset: Preset, shown: Sequence[Model], competing: Sequence[Model]) -> str:
    """What a reader has to know to read the numbers."""
    own = [one for one in shown if one.published is None]
    tiny = _tiny(own)
    told = [f"{TOLD['tiny']}{'.' if all(tiny) else ', where it is said.'}"] if any(tiny) else []
    if len(competing) > 1:
        among = "all rows" if len(competing) == len(shown) else "our rows"
        told.append(f"Best in bold, second underlined, among {among}, by the numbers as printed.")
    if own and not preset.by_category:
        told.append(
            "± is the standard error of the mean over prompts, n counts videos; an incomplete cell"
            " takes no place."
        )
    if len(competing) < 2:
        pass
    elif preset.by_category:
        over = ", ".join(column.header for column in preset.columns)
        told.append(
            f"Average of the ranks in {over} among {len(competing)} models (ties share the better"
            " rank), and the number of categories in which it is first and second."
        )
    elif "rank" in preset.extras:
        told.append(
            f"Rank is the average of the ranks in the columns before it, among {len(competing)}"
            " models (ties share the better rank)."
        )
    if len(own) < len(shown):
        told.append(f"The authors scored {preset.suite}; published rows are of their own videos.")
    if "totals" in preset.extras:
        told.append(f"Totals by {leaderboard.CONSTANTS_VERSION}.")
    return " ".join(told)
