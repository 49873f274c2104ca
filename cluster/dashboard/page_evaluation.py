"""Evaluation: models against each other, with their noise, their drift and their videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from cluster.dashboard import evaluation_charts as charts
from cluster.dashboard import look, markup, playable
from cluster.dashboard.evaluation import (
    TINY,
    Evaluation,
    Run,
    curve_rows,
    evaluation,
    nights,
    normalised,
    runs,
    short,
    title,
    video_bytes,
    why_not,
)
from cluster.dashboard.places import Places
from evals import published
from evals.compare import MIN_PROMPTS
from evals.dimensions import DIMENSIONS
from evals.drift import COLUMN
from evals.results import Cell
from evals.suites import Prompt
from evals.tables import Entry, Row, Table
from evals.trend import Night

_DASH = "–"


def show(places: Places) -> None:
    """The page."""
    look.begin("Evaluation", "How models score, how sure that is, and what their videos look like.")
    markup.style()
    found = runs(places.evaluations)
    if not found:
        look.empty(
            f"There is no evaluation in {places.evaluations}.",
            "`python -m evals run tiny_custom --models a=FOLDER --prompts FILE --dst DATASET` makes"
            " one; name it with `--evaluations DATASET` where it is not the dataset itself.",
        )
        return
    one = _chosen(places.evaluations, found)
    if one.is_meaningless:
        look.meaningless(TINY)
    _state(one, found)
    views: dict[str, Callable[[Evaluation], None]] = {
        "Leaderboard": _leaderboard,
        "Categories": _categories,
        "Trend": _trend,
        "Differences": _differences,
        "Drift": _drift,
        "Videos": lambda one: _videos(one, places),
    }
    view = st.segmented_control(
        "View", list(views), default="Leaderboard", required=True, key="view",
        bind="query-params", label_visibility="collapsed",
    )  # fmt: skip
    views[view or "Leaderboard"](one)


def _chosen(root: str, found: Sequence[Run]) -> Evaluation:
    """The recipe, and which of its runs."""
    left, right = st.columns([1, 2.4])
    recipes = list(dict.fromkeys(run.recipe for run in found))
    recipe = left.selectbox("Recipe", recipes, key="recipe", bind="query-params")
    of = {run.run_id: run for run in found if run.recipe == recipe}
    newest = next(iter(of.values()))

    def named(run_id: str | None) -> str:
        if run_id is None:
            return f"newest scores of each model ({newest.about})"
        run = of[run_id]
        ended = ["has not ended"] * run.interrupted
        nights = [f"night {run.night}"] * bool(run.night)
        models = ", ".join(run.models)
        return " · ".join([run.started, run_id[:8], models, run.about, *nights, *ended])

    run_id = right.selectbox("Run", [None, *of], format_func=named, key=f"run of {recipe}")
    return evaluation(root, recipe, run_id)


def _state(one: Evaluation, found: Sequence[Run]) -> None:
    """What is there and what is not (yet)."""
    there, expected, failed = one.progress
    plan = one.plan
    newest = next(run for run in found if run.run_id == plan.run_id)
    figures = st.columns(5)
    figures[0].metric("Models", len(one.models))
    figures[1].metric("Prompts", look.count(len(one.prompts)))
    figures[2].metric("Dimensions", len(one.dimensions))
    figures[3].metric(
        "Scores",
        look.count(there) if there == expected else f"{there:,} of {expected:,}",
        help=f"{failed:,} failed" if failed else None,
    )
    figures[4].metric("Newest run", newest.started)
    if newest.interrupted:
        st.info(
            f"Run {newest.run_id[:8]} has not ended: {there:,} of {expected:,} scores are there."
            " It may be under way; the same command again goes on with it.",
            icon=":material/hourglass_top:",
        )
    elif there + failed < expected:
        st.info(
            f"{expected - there - failed:,} scores are missing: cells that are not complete show"
            " their count, and take no place.",
            icon=":material/hourglass_empty:",
        )


# Leaderboard


def _leaderboard(one: Evaluation) -> None:
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
        st.info(f"This table cannot be filled: {error}", icon=":material/table_rows:")
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
                _row(cell, column.multiplier)
                for cell in one.overall(column.dimension)
                if cell.value is not None
            ]
            head = column.header + ("" if column.higher_is_better else ", less is better")
            times = f"score × {column.multiplier}" if column.multiplier > 1 else "score"
            unit = f"{column.suffix or times} ± standard error"
            with place:
                look.chart(charts.dots(rows, models, title=head, unit=unit))


def _row(cell: Cell, multiplier: float = 1) -> dict[str, Any]:
    value, error = cell.value or 0.0, cell.stderr
    return {
        "model": short(cell.model),
        "value": multiplier * value,
        "stderr": None if error is None else multiplier * error,
        "n": cell.num_videos,
    }


# Categories


def _categories(one: Evaluation) -> None:
    models = [short(model) for model in one.models]
    left, right = st.columns([1.25, 1], gap="large")
    with right:
        _radar(one, models)
    with left:
        if not one.results.categories:
            st.info("The prompts of this suite have no categories.", icon=":material/category:")
            return
        dimension = _dimension(one.dimensions, "category dimension")
        rows = [
            _row(cell) | {"group": cell.category}
            for cell in one.by_category(dimension)
            if cell.value is not None
        ]
        if not rows:
            st.info("Nothing is scored yet.")
            return
        look.chart(
            charts.grouped(
                rows, models, one.results.categories, title=f"{title(dimension)} by category",
                unit="score, 0 to 1, ± standard error",
            )
        )  # fmt: skip


def _radar(one: Evaluation, models: Sequence[str]) -> None:
    """Ranks by category where they can be told, else scores by dimension."""
    number = len(models)
    try:
        ranks = one.ranks()
        why = f"{len(ranks)} categories" if len(ranks) < 3 else ""
    except ValueError as error:
        ranks, why = {}, str(error)
    if ranks and not why:
        by = {spoke: {short(m): rank for m, rank in of.items()} for spoke, of in ranks.items()}
        rings = range(1, number + 1) if number <= 6 else (1, (number + 1) // 2, number)
        chart = charts.radar(
            by, models, title="Average rank in each category", rings=tuple(rings),
            inner=number + 0.6, outer=1, unit="average rank",
        )  # fmt: skip
        st.altair_chart(chart, width="content")
        found = one.places()
        rows = [[markup.text(short(m)), str(p.first), str(p.second)] for m, p in found.items()]
        markup.show(
            '<div class="notes">The outer ring is the first place.</div>',
            markup.table(["", "first in categories", "second"], rows),
        )
        return
    values = normalised(one.cells)
    by = {
        title(spoke): {short(m): min(max(v, 0.0), 1.0) for m, v in of.items()}
        for spoke, of in values.items()
    }
    if len(by) < 3:
        st.info(f"There is no radar: {why}.", icon=":material/radar:")
        return
    chart = charts.radar(
        by, models, title="Score between the leaderboard's bounds", rings=(0.25, 0.5, 0.75, 1),
        inner=0, outer=1, unit="normalised",
    )  # fmt: skip
    st.altair_chart(chart, width="content")
    st.caption("What is below or above its bounds is drawn at the middle, or at the rim.")
    if one.results.categories:
        st.caption(f"No ranks by category: {why}.")


def _dimension(names: Sequence[str], key: str) -> str:
    return st.selectbox("Dimension", names, key=key, format_func=title)


# Nights


def _trend(one: Evaluation) -> None:
    points, found = nights(one.root, one.plan.recipe)
    if not points:
        look.empty(
            "There are no nightly evaluations of this recipe.",
            "`python -m evals nightly` evaluates the newest exports once a night, and tells when a"
            " score falls by more than its noise.",
        )
        return
    _night(found)
    models = list(dict.fromkeys(point.model for point in points))
    measured = dict.fromkeys(point.dimension for point in points)
    known = [name for name in DIMENSIONS if name in measured]
    dimension = _dimension([*known, *(n for n in measured if n not in known)], "trend dimension")
    shown = [point for point in points if point.dimension == dimension]
    rows = [
        {"model": p.model, "date": p.date, "value": p.value, "stderr": p.stderr, "n": p.num_videos,
         "fell": p.regressed}
        for p in shown
    ]  # fmt: skip
    less = dimension.startswith(COLUMN)
    label = f"{'drift' if less else 'score'} ± standard error{', less is better' * less}"
    look.chart(charts.trend(rows, models, title=f"{title(dimension)}, by night", label=label))
    if any(point.regressed for point in shown):
        st.caption("A red ring: it fell beyond its noise on that night.")
    last = {point.model: point for point in shown}
    heads = ["Newest night of each model", "night", label.partition(" ")[0], "± standard error",
             "videos", "fell beyond noise"]  # fmt: skip
    lines = [
        [markup.text(p.model), markup.text(p.date), f"{p.value:.4f}",
         _DASH if p.stderr is None else f"{p.stderr:.4f}", look.count(p.num_videos),
         '<span class="best">yes</span>' if p.regressed else "no"]
        for p in last.values()
    ]  # fmt: skip
    markup.show(markup.table(heads, lines, name="trend"))


def _night(found: Sequence[Night]) -> None:
    """What the newest finished night found, in its own words."""
    newest = next((night.report for night in found if night.report is not None), None)
    if newest is None:
        return
    told = "\n".join(f"- {line}" for line in newest.sentences())
    box = st.error if newest.has_regressed else st.info
    icon = ":material/trending_down:" if newest.has_regressed else ":material/bedtime:"
    box(f"**The night of {newest.date}**\n\n{told}", icon=icon)


# Differences


def _differences(one: Evaluation) -> None:
    if len(one.models) < 2:
        st.info("A difference needs two models.", icon=":material/difference:")
        return
    a, b = _two_models(one, "difference")
    if a == b:
        st.info("Choose two different models.", icon=":material/difference:")
        return
    with st.spinner("Drawing prompts again, ten thousand times …"):
        found = one.compared(a, b)
    rows = [
        {"dimension": title(name), "mean": d.mean, "low": d.low, "high": d.high,
         "verdict": "too few prompts" if d.p is None
         else "beyond noise" if d.is_beyond_noise else "within noise"}
        for name, d in found.items() if d.mean is not None
    ]  # fmt: skip
    if not rows:
        st.info("The two share no scored video.", icon=":material/difference:")
        return
    look.chart(charts.differences(rows, title="What differs", a=short(a), b=short(b)))
    heads = ["Dimension", short(a), short(b), "difference", "95 % interval", "p (Holm)", "prompts",
             "videos", "beyond noise"]  # fmt: skip
    lines = []
    for name, d in found.items():
        if d.mean is None or d.a is None or d.b is None:
            continue
        interval = _DASH if d.low is None else f"{d.low:+.4f} … {d.high:+.4f}"
        better = a if (d.mean > 0) == DIMENSIONS[name].higher_is_better else b
        verdict = f"yes: {short(better)}" if d.is_beyond_noise else "no"
        lines.append(
            [title(name), f"{d.a:.4f}", f"{d.b:.4f}", f"{d.mean:+.4f}", interval,
             _DASH if d.p_adjusted is None else f"{d.p_adjusted:.3f}", f"{d.num_prompts:,}",
             f"{d.num_videos:,}", f"needs {MIN_PROMPTS} prompts" if d.p is None else verdict]
        )  # fmt: skip
    markup.show(
        markup.table(
            [markup.text(h) for h in heads], [[markup.text(c) for c in line] for line in lines],
            name="differences",
        ),
        '<div class="notes">Paired bootstrap over prompts; p is adjusted by Holm for the number of'
        " dimensions.</div>",
    )  # fmt: skip


def _two_models(one: Evaluation, key: str) -> tuple[str, str]:
    left, right = st.columns(2)
    a = left.selectbox("Model", one.models, key=f"{key} a", format_func=short)
    rest = min(1, len(one.models) - 1)
    b = right.selectbox("against", one.models, index=rest, key=f"{key} b", format_func=short)
    return a, b


# Drift


def _drift(one: Evaluation) -> None:
    found = one.drifts
    if not found:
        st.info(
            "Nothing here was scored frame by frame, nor at the start and the end of videos.",
            icon=":material/show_chart:",
        )
        return
    models = [short(model) for model in one.models]
    dimension = _dimension(list(found), "drift dimension")
    curves = one.curves(dimension)
    if curves:
        look.chart(
            charts.curves(
                curve_rows(curves), models,
                title=f"{title(dimension)} over the length of the videos",
                label="score, 0 to 1", length_s=one.length_s(dimension),
            )
        )  # fmt: skip
        st.caption(
            "Mean over videos. Dashed: least-squares line. Shaded: the first and the last 15 %,"
            " which drift contrasts."
        )
    else:
        st.caption("Its heads and tails alone were scored: there are no scores of frames to draw.")
    heads = ["Model", "|end − start|", "end − start", "slope, per s", "R²", "worst drop", "VDE",
             "head-tail similarity", "videos"]  # fmt: skip
    lines = []
    for model, of in found[dimension].items():
        error = of.absolute.stderr
        below = "" if error is None else f"<small>± {error:.4f}</small>"
        numbers = [
            (of.absolute.mean, ".4f"), (of.signed.mean, "+.4f"),
            (of.slope_per_second.mean, "+.5f"), (of.r_squared.mean, ".2f"),
            (of.worst_drop.mean, ".4f"), (of.vde_linear_mean.mean, ".4f"),
            (of.head_tail_similarity.mean, ".4f"),
        ]  # fmt: skip
        texts = [_DASH if value is None else format(value, how) for value, how in numbers]
        texts[0] += below
        lines.append([markup.text(short(model)), *texts, f"{of.num_videos:,}"])
    markup.show(markup.table(heads, lines, name="drift"))


# Videos


def _videos(one: Evaluation, places: Places) -> None:
    prompt, sample = _prompt(one)
    if len(one.models) > 1:
        a, b = _two_models(one, "video")
        models = [a, b]
    else:
        models = [one.models[0]]
    for place, model in zip(st.columns(len(models), gap="medium"), models, strict=True):
        with place:
            _video(one, model, prompt, sample, places)
    _scores(one, models, prompt, sample)


def _prompt(one: Evaluation) -> tuple[Prompt, int]:
    by_text = {prompt.prompt: prompt for prompt in one.prompts}
    left, middle, right = st.columns([1, 3, 0.8])
    categories = one.results.categories
    category = left.selectbox(
        "Category", ["all", *categories], key="video category", disabled=not categories
    )
    texts = [t for t, p in by_text.items() if category == "all" or category in p.categories]
    text = middle.selectbox("Prompt", texts, key="prompt", bind="query-params")
    most = one.samples(text)
    sample = right.selectbox("Sample", range(most), key="sample", disabled=most == 1)
    prompt = by_text[text]
    if prompt.text != prompt.prompt:
        st.caption(f"Models are given: {prompt.text}")
    return prompt, sample


def _video(one: Evaluation, model: str, prompt: Prompt, sample: int, places: Places) -> None:
    st.subheader(short(model), anchor=False)
    row = one.video(model, prompt, sample)
    if row is None:
        st.info("This video is not there (yet).", icon=":material/hourglass_empty:")
        return
    if row["error_type"]:
        st.error(f"{row['error_type']}: {row['error']}", icon=":material/videocam_off:")
        return
    if one.is_replaced(model, prompt, sample):
        st.info("Another video came in place of the one whose scores these are.")
    try:
        data = video_bytes(
            one.root, row["generation_id"], row["sha256"],
            cache=places.cache, cache_bytes=places.cache_bytes,
        )  # fmt: skip
    except playable.Unplayable as error:
        st.error(str(error), icon=":material/videocam_off:")
        return
    st.video(data, loop=True, autoplay=True, muted=True)
    facts = [f"{row['width_px']} × {row['height_px']} px", f"{row['num_frames']:,} frames",
             f"{row['fps']:g} frames/s", look.seconds(row["duration_s"]),
             look.size(row["size_bytes"])]  # fmt: skip
    if row["seed"] is not None:
        facts.append(f"seed {row['seed']}")
    st.caption(" · ".join(facts))
    if row["rephrased"]:
        st.caption(f"Its LLM made of the text: {row['rephrased']}")


def _scores(one: Evaluation, models: Sequence[str], prompt: Prompt, sample: int) -> None:
    """Of these videos, under them."""
    asked = [d for d in one.dimensions if d in prompt.dimensions and d in DIMENSIONS]
    lines = []
    for dimension in asked:
        values = [one.value(model, dimension, prompt.prompt, sample) for model in models]
        scores = [None if v is None else v.score for v in values]
        known = [s for s in scores if s is not None]
        higher = DIMENSIONS[dimension].higher_is_better
        best = (max if higher else min)(known) if len(known) > 1 and len(set(known)) > 1 else None
        cells = [
            f'<span class="dim">{markup.text(why_not(value))}</span>' if score is None
            else f'<span class="{"best" if score == best else ""}">{score:.4f}</span>'
            for value, score in zip(values, scores, strict=True)
        ]  # fmt: skip
        lines.append([markup.text(title(dimension)), *cells])
    if not lines:
        return
    heads = ["Scores of these videos", *(markup.text(short(model)) for model in models)]
    markup.show(markup.table(heads, lines, name="video-scores"))
    _frame_scores(one, models, asked, prompt, sample)


def _frame_scores(
    one: Evaluation, models: Sequence[str], asked: Sequence[str], prompt: Prompt, sample: int
) -> None:
    """Scores of the frames of these videos, in the dimensions that have them."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for dimension in asked:
        for model in dict.fromkeys(models):
            value = one.value(model, dimension, prompt.prompt, sample)
            fps = one.results.fps(model)
            for number, score in enumerate((value and value.frame_scores) or ()):
                if score is not None:
                    point = {"model": short(model), "time_s": number / fps, "score": score}
                    rows.setdefault(dimension, []).append(point)
    if not rows:
        return
    with st.expander("Scores of their frames"):
        dimension = _dimension(list(rows), "frames dimension")
        names = [short(model) for model in dict.fromkeys(models)]
        look.chart(charts.frames(rows[dimension], names, label=title(dimension)))
