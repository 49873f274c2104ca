"""Evaluation: models against each other, with their noise, their drift and their videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import streamlit as st

from cluster.dashboard import evaluation_charts as charts
from cluster.dashboard import evaluation_choice as choice
from cluster.dashboard import look, markup, view_leaderboard, view_noise, view_videos
from cluster.dashboard.evaluation import (
    TINY,
    Evaluation,
    Run,
    cell_row,
    evaluation,
    normalised,
    runs,
    short,
    title,
)
from cluster.dashboard.places import Places


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
        "Leaderboard": view_leaderboard.show,
        "Categories": _categories,
        "Trend": view_noise.show_trend,
        "Differences": view_noise.show_differences,
        "Drift": view_noise.show_drift,
        "Videos": lambda one: view_videos.show(one, places),
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
    # a run may have begun since these were listed
    newest = next((run for run in found if run.run_id == one.plan.run_id), found[0])
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


def _categories(one: Evaluation) -> None:
    models = [short(model) for model in one.models]
    left, right = st.columns([1.25, 1], gap="large")
    with right:
        _radar(one, models)
    with left:
        if not one.results.categories:
            st.info("The prompts of this suite have no categories.", icon=":material/category:")
            return
        dimension = choice.dimension(one.dimensions, "category dimension")
        rows = [
            cell_row(cell) | {"group": cell.category}
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
        ranks, why = {}, look.verbatim(error)
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
