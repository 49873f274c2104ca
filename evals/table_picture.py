"""Where everything of a table stands when it is a picture."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evals.formats import Label, grid, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.tables import Entry, Table

INK, GREY, RED = "#1A1A1A", "#666666", "#B00020"
SIZE, SMALL, RAISED = 10.0, 7.8, 6.5
"""Of text, in points."""
_LINE, _SMALL_LINE = 1.28 * SIZE, 1.28 * SMALL
_MARGIN, _GAP, _MIN_WIDE = 16.0, 18.0, 430.0
_LONGEST = 44
"""Letters of a name."""


def short(name: str, limit: int = 34) -> str:
    """A model's name, its middle left out where it is long."""
    name = one_line(name)
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2]}…{name[-(limit - limit // 2 - 1) :]}"


@dataclass
class Sheet:
    """A table laid out in points from the upper left corner, then drawn on a figure."""

    table: Table
    figure: Figure
    _texts: list[tuple[float, float, str, dict[str, Any]]] = field(default_factory=list)
    """Left or right end, baseline, text and look."""
    _rules: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Height, both ends and thickness."""

    def __post_init__(self) -> None:
        self._renderer = self.figure.canvas.get_renderer()
        self._grid = grid(self.table)
        numbers = [self._column(num) for num in range(len(self._grid.heads))]
        self._widths = [wide for wide, _ in numbers]
        marks = [mark for _, mark in numbers]
        corner = self._width(self._grid.corner, bold=True)
        names = max([corner, *map(self._name_width, self._grid.names)])
        needed = names + sum(self._widths) + sum(marks) + _GAP * len(numbers)
        self._wide = max(needed, _MIN_WIDE)
        gap = _GAP + (self._wide - needed) / max(1, len(numbers))
        self._ends, end = [], names
        for wide, mark in numbers:  # numbers end below each other, marks hang behind them
            self._ends.append(end + gap + wide)
            end += gap + wide + mark

    def draw(self) -> None:
        """All of it; the figure becomes as large as that takes."""
        y = _MARGIN
        if self.table.is_meaningless:
            y = self._paragraph(y, "MEANINGLESS: small random weights", color=RED, weight="bold")
        y = self._paragraph(y, self.table.title, size=SIZE + 1, weight="bold") + 7
        self._rule(y, 1.3)
        y = self._headings(y + 5) + 5
        self._rule(y, 0.7)
        y = self._rows(y + 4) + 2
        self._rule(y, 1.3)
        y = self._paragraph(y + 7, self.table.caption, size=SMALL, color=GREY)
        for mark, text in self.table.footnotes:
            self._raise((mark,), 0, y, SMALL)
            y = self._paragraph(y, text, size=SMALL, color=GREY, indent=12)
        self._put(y + _MARGIN)

    def _width(self, text: str, size: float = SIZE, *, bold: bool = False) -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight="bold" if bold else "normal")
        wide, _, _ = self._renderer.get_text_width_height_descent(text, font, False)
        return wide * 72 / self.figure.dpi

    def _marks_width(self, marks: tuple[str, ...]) -> float:
        return self._width(",".join(marks), RAISED) + 2 if marks else 0

    def _column(self, num: int) -> tuple[float, float]:
        """How wide its numbers and headings are, and the marks behind them."""
        head, entries = self._grid.heads[num], [row[num] for row in self._grid.entries]
        widths = [self._width(word, bold=True) for word in short(head.text, _LONGEST).split()]
        widths += [self._width(_count(head.n), SMALL)] if head.n is not None else []
        for entry in entries:
            widths.append(self._width(entry.number, bold=entry.place == "best"))
            widths += [self._width(text, SMALL) for text in _beneath(entry)]
        notes = [head.notes, *(entry.notes for entry in entries)]
        return max(widths), max(map(self._marks_width, notes))

    def _name_width(self, name: Label) -> float:
        count = self._width(_count(name.n), SMALL) + 6 if name.n is not None else 0
        return self._width(short(name.text, _LONGEST)) + self._marks_width(name.notes) + count

    def _headings(self, y: float) -> float:
        heads = [self._stacked(num) for num in range(len(self._grid.heads))]
        last = y + (max(map(len, heads), default=1) - 1) * _LINE
        self._write(0, last, self._grid.corner, weight="bold")
        for label, head, end in zip(self._grid.heads, heads, self._ends, strict=True):
            for num, text in enumerate(reversed(head)):
                self._write(end, last - num * _LINE, text, ha="right", weight="bold")
            self._raise(label.notes, end, last)
            if label.n is not None:
                look = {"ha": "right", "size": SMALL, "color": GREY}
                self._write(end, last + _LINE, _count(label.n), **look)
        is_counted = any(label.n is not None for label in self._grid.heads)
        return last + _LINE + (_SMALL_LINE if is_counted else 0)

    def _stacked(self, num: int) -> list[str]:
        """A heading's words, as many to a line as the column has room for."""
        lines: list[str] = []
        for word in short(self._grid.heads[num].text, _LONGEST).split():
            longer = f"{lines[-1]} {word}" if lines else word
            if lines and self._width(longer, bold=True) <= self._widths[num]:
                lines[-1] = longer
            else:
                lines.append(word)
        return lines

    def _rows(self, y: float) -> float:
        heads = self._grid.heads
        for num, (name, entries) in enumerate(
            zip(self._grid.names, self._grid.entries, strict=True)
        ):
            if num and num == self._grid.num_above:
                self._rule(y, 0.7)
                y += 4
            text = short(name.text, _LONGEST)
            self._write(0, y, text, color=GREY if name.is_published else INK)
            self._raise(name.notes, self._width(text), y)
            if name.n is not None:
                start = self._name_width(name) - self._width(_count(name.n), SMALL)
                self._write(
                    start, y + 0.95 * (SIZE - SMALL), _count(name.n), size=SMALL, color=GREY
                )
            for head, entry, end in zip(heads, entries, self._ends, strict=True):
                is_published = name.is_published or head.is_published
                self._entry(entry, end, y, GREY if is_published else INK)
            y += _LINE + max(map(len, map(_beneath, entries)), default=0) * _SMALL_LINE + 3
        return y

    def _entry(self, entry: Entry, end: float, y: float, colour: str) -> None:
        weight = "bold" if entry.place == "best" else "normal"
        self._write(end, y, entry.number, ha="right", weight=weight, color=colour)
        if entry.place == "second":
            self._rules.append((y + 1.08 * SIZE, end - self._width(entry.number), end, 0.9))
        self._raise(entry.notes, end, y)
        for num, text in enumerate(_beneath(entry)):
            top = y + _LINE + num * _SMALL_LINE
            self._write(end, top, text, ha="right", size=SMALL, color=GREY)

    def _paragraph(
        self, y: float, text: str, *, size: float = SIZE, indent: float = 0, **look: Any
    ) -> float:
        """Text in lines as wide as the table; gives where it ends."""
        text, bold = one_line(text), look.get("weight") == "bold"
        mean = self._width(text or "x", size, bold=bold) / max(1, len(text))
        for line in textwrap.wrap(text, max(20, int(0.95 * (self._wide - indent) / mean))):
            self._write(indent, y, line, size=size, **look)
            y += 1.28 * size
        return y

    def _raise(self, marks: tuple[str, ...], x: float, y: float, beside: float = SIZE) -> None:
        self._write(x + 1.5, y - 0.3 * beside + 1.5, ",".join(marks), size=RAISED, color=GREY)

    def _write(self, x: float, top: float, text: str, *, size: float = SIZE, **look: Any) -> None:
        """Texts of one line stand on one baseline, whatever their letters."""
        if text:
            self._texts.append((x, top + 0.95 * size, text, {"size": size, "color": INK} | look))

    def _rule(self, y: float, thick: float) -> None:
        self._rules.append((y, 0, self._wide, thick))

    def _put(self, high: float) -> None:
        from matplotlib.lines import Line2D

        wide = self._wide + 2 * _MARGIN
        self.figure.set_size_inches(wide / 72, high / 72)
        for x, y, text, look in self._texts:
            place = (x + _MARGIN) / wide, 1 - y / high
            self.figure.text(*place, text, va="baseline", **look)
        for y, start, end, thick in self._rules:
            ends = [(x + _MARGIN) / wide for x in (start, end)]
            rule = Line2D(ends, [1 - y / high] * 2, color=INK, linewidth=thick)
            self.figure.add_artist(rule)


def _count(n: int) -> str:
    return f"n={n:,}"


def _beneath(entry: Entry) -> list[str]:
    """What stands under a number, in small."""
    lines = [f"± {entry.stderr}"] if entry.stderr is not None else []
    return lines + ([_count(entry.n)] if entry.n is not None else [])
