"""A table as text: Markdown, LaTeX, CSV, JSON, and rich's for a terminal."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable
    from rich.text import Text

    from evals.tables import Entry, Heading, Row, Table

_SUPERSCRIPT = dict(zip("abcdefghijklmnoprstuvwxyz", "ᵃᵇᶜᵈᵉᶠᵍʰⁱʲᵏˡᵐⁿᵒᵖʳˢᵗᵘᵛʷˣʸᶻ", strict=True))
_TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    '"': "{''}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "–": "--",
    "…": r"\ldots{}",
    "Δ": r"$\Delta$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "§": r"\S{}",
    "¶": r"\P{}",
}
"""What LaTeX would read otherwise; [ or * behind a line's end would belong to that."""
MAX_WIDE = 10
"""Columns that a page has room for."""
MAX_TERMINAL = 8


@dataclass(frozen=True)
class Label:
    """Of a line of a grid: a model or a column."""

    text: str
    notes: tuple[str, ...] = ()
    n: int | None = None
    is_published: bool = False
    is_text: bool = False
    """A column whose entries are words."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as it is shown: models are rows, or columns where there are too many of those."""

    name: str
    title: str
    caption: str
    heads: Sequence[Label]
    names: Sequence[Label]
    entries: Sequence[Sequence[Entry]]
    corner: str
    num_above: int = 0
    """Rows above the line between published and ours."""
    footnotes: tuple[tuple[str, str], ...] = ()
    """Mark and text."""
    about: tuple[str, ...] = ()
    """A line for each column."""
    most: int = 6
    """Columns that fit into a line of a paper as they are."""


def grid(table: Table, most: int = MAX_WIDE) -> Grid:
    """A table with at most so many columns, if turning it helps."""
    heads = [Label(h.title, h.notes, n=h.n) for h in table.headings]
    names = [Label(r.model, r.notes, is_published=r.published is not None) for r in table.rows]
    entries = [list(row.entries) for row in table.rows]
    if len(heads) > most and len(heads) > len(names):
        turned = [list(one) for one in zip(*entries, strict=True)]
        placed = {"heads": names, "names": heads, "entries": turned, "corner": ""}
    else:
        placed = {"heads": heads, "names": names, "entries": entries, "corner": "Method",
                  "num_above": sum(name.is_published for name in names)}  # fmt: skip
    return Grid(
        name=table.preset.name,
        title=table.title,
        caption=table.caption,
        footnotes=table.footnotes,
        about=table.about,
        **placed,
    )


def superscript(marks: tuple[str, ...]) -> str:
    """Marks of footnotes, raised: letters where Unicode has them so."""
    return ",".join("".join(_SUPERSCRIPT.get(c, c) for c in mark) for mark in marks)


def one_line(text: str) -> str:
    """Without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def error_text(entry: Entry) -> str:
    """Standard error, interval and count of an entry, as far as it has its own."""
    parts = [f"± {entry.stderr}"] if entry.stderr is not None else []
    parts += [entry.interval] if entry.interval else []
    parts += [f"(n={entry.n:,})"] if entry.n is not None else []
    return " ".join(parts)


def markdown(shown: Grid) -> str:
    """A pipe table with title and caption above, footnotes and columns below."""

    def escaped(text: str) -> str:
        return re.sub(r"([\\`*_|<>\[\]~&#])", r"\\\1", one_line(text))

    def entry_text(entry: Entry) -> str:
        number = escaped(entry.number)
        if entry.place:
            number = f"**{number}**" if entry.place == "best" else f"<ins>{number}</ins>"
        more = escaped(error_text(entry))
        return number + (f" {more}" if more else "") + superscript(entry.notes)

    def label_text(label: Label) -> str:
        return escaped(label.text) + superscript(label.notes)

    heads = [
        label_text(head) + (f"<br>n={head.n:,}" if head.n is not None else "")
        for head in shown.heads
    ]
    lines = [f"**{escaped(shown.title)}**", "", escaped(shown.caption), ""]
    lines.append("| " + " | ".join([shown.corner, *heads]) + " |")
    lines.append("|:--|" + "".join(":--|" if head.is_text else "--:|" for head in shown.heads))
    for name, entries in zip(shown.names, shown.entries, strict=True):
        count = f" (n={name.n:,})" if name.n is not None else ""
        texts = [label_text(name) + count, *map(entry_text, entries)]
        lines.append("| " + " | ".join(texts) + " |")
    lines.append("")
    lines += [f"{superscript((mark,))} {escaped(text)}  " for mark, text in shown.footnotes]
    lines += [""] if shown.footnotes else []
    if shown.about:
        lines += ["Columns:", "", *(f"- {escaped(line)}" for line in shown.about)]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_TEX.get(c, c) for c in one_line(text))


def latex(shown: Grid) -> str:
    r"""A float with booktabs' rules; as wide as the line where it has many columns."""

    def raised(marks: tuple[str, ...]) -> str:
        return rf"\textsuperscript{{{','.join(map(tex, marks))}}}" if marks else ""

    def stacked(title: str) -> str:
        words = [tex(word) for word in title.split()]
        stack = r"\\".join(words)
        return rf"\shortstack{{{stack}}}" if len(words) > 1 else stack

    def entry_text(entry: Entry) -> str:
        number = tex(entry.number)
        if entry.place:
            number = rf"\{'textbf' if entry.place == 'best' else 'underline'}{{{number}}}"
        more = error_text(entry)
        return number + (rf" {{\scriptsize {tex(more)}}}" if more else "") + raised(entry.notes)

    def line(texts: list[str]) -> str:
        return " & ".join(texts) + r" \\"

    def count(label: Label) -> str:
        return rf"{{\scriptsize n={label.n:,}}}" if label.n is not None else ""

    heads = [stacked(head.text) + raised(head.notes) for head in shown.heads]
    body = [line([shown.corner, *heads])]
    if any(head.n is not None for head in shown.heads):
        body.append(line(["", *map(count, shown.heads)]))
    body.append(r"\midrule")
    for num, (name, entries) in enumerate(zip(shown.names, shown.entries, strict=True)):
        if num == shown.num_above and num:
            body.append(r"\midrule")
        label = tex(name.text) + raised(name.notes) + (f" {count(name)}" if name.n else "")
        body.append(line([label, *map(entry_text, entries)]))
    is_wide = len(heads) > shown.most
    kinds = "".join("l" if head.is_text else "r" for head in shown.heads)
    lines = [
        r"% needs \usepackage{booktabs,graphicx}",
        *(f"% {one_line(about)}" for about in shown.about),
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{tex(shown.title)}. {tex(shown.caption)}}}",
        rf"\label{{tab:{shown.name.replace('_', '-')}}}",
        *([r"\resizebox{\linewidth}{!}{%"] if is_wide else []),
        rf"\begin{{tabular}}{{l{kinds}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}" + ("}" if is_wide else ""),
    ]
    if shown.footnotes:
        notes = r"\\ ".join(f"{raised((mark,))} {tex(text)}" for mark, text in shown.footnotes)
        lines.append(
            rf"\par\smallskip\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"
        )
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def csv_text(table: Table) -> str:
    """A row a model; numbers in full, on the scale 0 to 1, empty where there is none."""
    fields = ["value", "stderr", "n", "num_prompts", "num_expected", "num_failed"]
    keys = [h.column.dimension for h in table.headings]
    heads = ["model", "published"]
    for key in keys:
        heads += [key, *(f"{key}_{name}" for name in (*fields[1:], "unit", "printed", "notes"))]
    written = io.StringIO()
    writer = csv.DictWriter(written, heads, lineterminator="\n")
    writer.writeheader()
    for row, record in zip(table.rows, _rows(table), strict=True):
        found = {"model": row.model, "published": row.published or ""}
        for key, heading in zip(keys, table.headings, strict=True):
            entry = record["cells"][key]
            found[key] = entry["value"]
            found |= {f"{key}_{name}": entry[name] for name in fields[1:]}
            found[f"{key}_unit"] = heading.column.unit
            found[f"{key}_printed"] = entry["printed"]
            found[f"{key}_notes"] = "; ".join(entry["notes"])
        writer.writerow({k: "" if v is None else v for k, v in found.items()})
    return written.getvalue()


def json_text(table: Table) -> str:
    """Preset, columns, rows and footnotes."""
    preset = table.preset
    told = {
        "preset": preset.name,
        "title": preset.title,
        "source": preset.source,
        "suite": preset.suite,
        "caption": table.caption,
        "is_meaningless": table.is_meaningless,
        "columns": [
            {
                "dimension": h.column.dimension,
                "header": h.column.header,
                "meaning": h.column.meaning,
                "clip": h.column.clip,
                "multiplier": h.column.multiplier,
                "digits": h.column.digits,
                "suffix": h.column.suffix,
                "higher_is_better": h.column.higher_is_better,
                "notes": _texts(table, h.notes),
            }
            for h in table.headings
        ],
        "rows": _rows(table),
        "footnotes": dict(table.footnotes),
    }
    return json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False)


def _texts(table: Table, marks: tuple[str, ...]) -> list[str]:
    texts = dict(table.footnotes)
    return [texts[mark] for mark in marks]


def _rows(table: Table) -> list[dict[str, Any]]:
    """The rows as plain numbers."""

    def record(row: Row, heading: Heading, entry: Entry) -> dict[str, Any]:
        cell = None if row.published else entry.cell
        marks = (heading.notes if cell else ()) + entry.notes
        return {
            "value": entry.value,
            "stderr": cell.stderr if cell and entry.stderr is not None else None,
            "n": cell and cell.num_videos,
            "num_prompts": cell and cell.num_prompts,
            "num_expected": cell and cell.num_expected,
            "num_failed": cell and cell.num_failed,
            "printed": entry.number,
            "place": entry.place,
            "notes": _texts(table, marks),
        }

    return [
        {
            "model": row.model,
            "published": row.published,
            "cells": {
                heading.column.dimension: record(row, heading, entry)
                for heading, entry in zip(table.headings, row.entries, strict=True)
            },
        }
        for row in table.rows
    ]


def rich_table(shown: Grid) -> RichTable:
    """Numbers with their errors beneath; models become columns where there are many dimensions."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    def entry_text(entry: Entry) -> Text:
        style = {"best": "bold", "second": "underline", None: ""}[entry.place]
        text = Text(entry.number, style=style)
        text = Text.assemble(text, superscript(entry.notes))
        for more in (
            f"±{entry.stderr}" if entry.stderr is not None else "",
            entry.interval,
            f"n={entry.n:,}" if entry.n is not None else "",
        ):
            if more:
                text.append(f"\n{more}", style="dim")
        return text

    def label_text(label: Label, *, between: str) -> Text:
        text = Text(one_line(label.text).replace(" ", between) + superscript(label.notes))
        if label.n is not None:
            text.append(f"\nn={label.n:,}", style="dim")
        return text

    notes = [f"{superscript((mark,))} {one_line(text)}" for mark, text in shown.footnotes]
    made = RichTable(
        title=Text(shown.title, style="bold"),
        caption=Text("\n".join([shown.caption, *notes])),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    made.add_column(shown.corner, overflow="fold")
    for head in shown.heads:
        justify = "left" if head.is_text else "right"
        made.add_column(label_text(head, between="\n"), justify=justify, overflow="fold")
    for num, (name, entries) in enumerate(zip(shown.names, shown.entries, strict=True), start=1):
        made.add_row(
            label_text(name, between=" "),
            *map(entry_text, entries),
            style="dim" if name.is_published else "",
            end_section=num == shown.num_above,
        )
    return made
