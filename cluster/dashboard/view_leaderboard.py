"""The leaderboard: a paper's table of the models' scores, and a small chart of each column."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from cluster.dashboard import evaluation_charts as charts
from cluster.dashboard import look, markup
from cluster.dashboard.evaluation import Evaluation, cell_row, short
from evals import published
from evals.tables import Entry, Row, Table


def show(one: Evaluation) -> None:
    """The view."""
    presets = {preset.name: preset for preset in one.presets()}
    left, middle, right = st.columns([2, 1.2, 1], vertical_alignment="bottom")
    name = left.selectbox(
        "Table", list(presets), key="table",
        format_func=lambda n: f"{n} · {presets[n].title}",
    )  # fmt: skip
    preset = presets[name]
    columns = {column.dimension: column for column in preset.columns}
    order = middle.selectbox(
        "Sort by", ["as evaluated", *columns], key="sort", disabled=preset.by_category,
        format_func=lambda n: columns[n].header if n in columns else n,
    )  # fmt: skip
    has_rows = bool(published.published(name)) if preset.source else False
    with_published = right.toggle(
        "Published rows", key="published", disabled=not has_rows,
        help="The numbers that the paper prints, of its authors' own videos.",
    ) and has_rows  # fmt: skip
    try:
        made = one.table(preset, with_published=with_published)
    except ValueError as error:
        why = look.verbatim(error)
        st.info(f"This table cannot be filled: {why}", icon=":material/table_rows:")
        return
    _table(made, None if order == "as evaluated" or preset.by_category else order)
    _downloads(made)
    if not preset.by_category:
        _dots(one, made)


def _table(made: Table, order: str | None) -> None:
    """The numbers, and what must be known to read them."""
    columns = [heading.column.dimension for heading in made.headings]
    rows = list(made.rows)
    if order in columns:
        place = columns.index(order)
        sign = -1 if made.headings[place].column.higher_is_better else 1

        def key(row: Row) -> tuple[bool, float]:
            value = row.entries[place].value
            return value is None, sign * (value or 0.0)

        rows.sort(key=key)
    heads = ["Model"]
    for heading in made.headings:
        count = f"<small>{heading.n:,} videos</small>" if heading.n else ""
        suffix = f" {heading.column.suffix}" if heading.column.suffix else ""
        heads.append(f"{markup.text(heading.title)}{suffix}{_raised(heading.notes)}{count}")
    lines = [[_model(row), *map(_entry, row.entries)] for row in rows]
    html = markup.table(heads, lines, name="leaderboard")
    notes = [f"<sup>{mark}</sup> {markup.text(said)}" for mark, said in made.footnotes]
    markup.show(
        html, *(f'<div class="notes">{note}</div>' for note in [markup.text(made.caption), *notes])
    )


def _model(row: Row) -> str:
    name = markup.text(short(row.model))
    if row.published:
        return f'<span class="dim"><i>{name}</i>{_raised(row.notes)}<small>published</small></span>'
    return f"{name}{_raised(row.notes)}"


def _entry(entry: Entry) -> str:
    number = markup.text(entry.number.removesuffix("%"))
    if entry.place:
        number = f'<span class="{entry.place}">{number}</span>'
    more = [f"± {entry.stderr}"] if entry.stderr is not None else []
    more += [f"n={entry.n:,}"] if entry.n is not None else []
    if entry.cell is not None and entry.cell.published is not None:
        number = f'<span class="dim"><i>{number}</i></span>'
    below = f"<small>{markup.text(' '.join(more))}</small>" if more else ""
    return f"{number}{_raised(entry.notes)}{below}"


def _raised(marks: Sequence[str]) -> str:
    return f"<sup>{markup.text(','.join(marks))}</sup>" if marks else ""


def _downloads(made: Table) -> None:
    with st.container(horizontal=True):
        for label, suffix, text in (
            ("CSV", "csv", made.csv),
            ("Markdown", "md", made.markdown),
            ("LaTeX", "tex", made.latex),
            ("JSON", "json", made.to_json),
        ):
            st.download_button(
                label, text(), f"{made.preset.name}.{suffix}", type="tertiary",
                icon=":material/download:", key=f"get {suffix}",
            )  # fmt: skip
        with st.popover("What the columns are", type="tertiary", icon=":material/help:"):
            st.markdown("\n".join(f"- {line}" for line in made.about))


def _dots(one: Evaluation, made: Table) -> None:
    """A small chart a column."""
    shown = [h for h in made.headings if any(c.value is not None for c in one.cells
                                             if c.column == h.column.dimension)]  # fmt: skip
    models = [short(model) for model in one.models]
    for start in range(0, len(shown), 3):
        for place, heading in zip(st.columns(3), shown[start : start + 3], strict=False):
            column = heading.column
            rows = [
                cell_row(cell, column.multiplier)
                for cell in one.overall(column.dimension)
                if cell.value is not None
            ]
            head = column.header + ("" if column.higher_is_better else ", less is better")
            times = f"score × {column.multiplier}" if column.multiplier > 1 else "score"
            unit = f"{column.suffix or times} ± standard error"
            with place:
                look.chart(charts.dots(rows, models, title=head, unit=unit))
