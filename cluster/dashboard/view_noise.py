"""How sure scores are: over nights, of one model against another, and over a video's length."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from cluster.dashboard import evaluation_charts as charts
from cluster.dashboard import evaluation_choice as choice
from cluster.dashboard import look, markup
from cluster.dashboard.evaluation import Evaluation, curve_rows, nights, short, title
from evals.compare import MIN_PROMPTS
from evals.dimensions import DIMENSIONS
from evals.drift import COLUMN
from evals.trend import Night


def show_trend(one: Evaluation) -> None:
    """Scores by night, and what the newest night found."""
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
    dimension = choice.dimension(
        [*known, *(n for n in measured if n not in known)], "trend dimension"
    )
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
         choice.DASH if p.stderr is None else f"{p.stderr:.4f}", look.count(p.num_videos),
         '<span class="best">yes</span>' if p.regressed else "no"]
        for p in last.values()
    ]  # fmt: skip
    markup.show(markup.table(heads, lines, name="trend"))


def _night(found: Sequence[Night]) -> None:
    """What the newest finished night found, in its own words."""
    newest = next((night.report for night in found if night.report is not None), None)
    if newest is None:
        return
    told = "\n".join(f"- {look.verbatim(line)}" for line in newest.sentences())
    box = st.error if newest.has_regressed else st.info
    icon = ":material/trending_down:" if newest.has_regressed else ":material/bedtime:"
    box(f"**The night of {newest.date}**\n\n{told}", icon=icon)


def show_differences(one: Evaluation) -> None:
    """One model less another, with intervals."""
    if len(one.models) < 2:
        st.info("A difference needs two models.", icon=":material/difference:")
        return
    a, b = choice.two_models(one, "difference")
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
        interval = choice.DASH if d.low is None else f"{d.low:+.4f} … {d.high:+.4f}"
        better = a if (d.mean > 0) == DIMENSIONS[name].higher_is_better else b
        verdict = f"yes: {short(better)}" if d.is_beyond_noise else "no"
        lines.append(
            [title(name), f"{d.a:.4f}", f"{d.b:.4f}", f"{d.mean:+.4f}", interval,
             choice.DASH if d.p_adjusted is None else f"{d.p_adjusted:.3f}", f"{d.num_prompts:,}",
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


def show_drift(one: Evaluation) -> None:
    """What becomes of a score from a video's start to its end."""
    found = one.drifts
    if not found:
        st.info(
            "Nothing here was scored frame by frame, nor at the start and the end of videos.",
            icon=":material/show_chart:",
        )
        return
    models = [short(model) for model in one.models]
    dimension = choice.dimension(list(found), "drift dimension")
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
        texts = [choice.DASH if value is None else format(value, how) for value, how in numbers]
        texts[0] += below
        lines.append([markup.text(short(model)), *texts, f"{of.num_videos:,}"])
    markup.show(markup.table(heads, lines, name="drift"))
