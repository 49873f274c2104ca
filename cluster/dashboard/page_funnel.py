"""Funnel: from sources to kept clips, what each rule took, and how it changed over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from cluster.dashboard import funnel, lance_sql, look, markup
from cluster.dashboard.funnel import Step
from cluster.dashboard.places import Places
from cluster.dashboard.runs import Run
from engine.accounts import SOURCE_STATES
from pipelines.cli import PAPER_CLIP_S

_CLIPS = "#6f8fb3"
_TEXT = "#838d9a"  # legible on light and on dark
_ROW_PX = 30
_RUNS_SHOWN = 60


def show(places: Places) -> None:
    """The page."""
    look.begin("Funnel", "What went in, what each rule took in the recipe's order, what is left.")
    markup.style()
    root = places.dataset
    if not lance_sql.has_rows(root, "sources"):
        look.empty(
            "No sources yet.",
            f"`python pipelines/curate.py --src FOLDER --dst {root}` reads a folder of videos.",
        )
        return
    recipe, runs, now = funnel.recipe_of(root), funnel.curations(root), funnel.tallies(root)
    sources = funnel.sources(root)
    run = _chosen(runs)
    counted = now if run is None else funnel.tallies_of(run)
    steps = funnel.steps(recipe.stages if recipe else (), counted)
    _figures(steps, sources if run is None else None, run)
    if not steps[0].num:
        look.empty(
            "No clips yet.",
            "Sources were listed, and none of them has been split into clips so far.",
        )
    else:
        _pending(steps)
        st.subheader("From clips to kept", anchor=False)
        look.chart(_waterfall(steps))
        _table(steps)
    left, right = st.columns(2, gap="large")
    with left:
        st.subheader("Sources", anchor=False)
        _sources(sources, run)
    with right:
        st.subheader("Clips by state", anchor=False)
        _states(steps)
    if run is None:
        _failures(root)
    _over_runs(runs)


def _chosen(runs: Sequence[Run]) -> Run | None:
    """The run that is shown; None is the dataset as it is now."""
    if not runs:
        st.caption("No run has ended yet: these are the tables as they are now.")
        return None
    named = {f"{r.started_at:%Y-%m-%d %H:%M} UTC · run {r.run_id[:8]}": r for r in reversed(runs)}
    label = st.columns([2, 3])[0].selectbox(
        "What is shown",
        ["The dataset as it is now", *named],
        key="funnel_run",
        persist_state="session",
        help="Past runs recorded their counts; hours of video are known of the dataset as it is.",
    )
    return named.get(label)


def _counts(run: Run, of: str) -> dict[str, int]:
    return run.counts.get(of) or {}


def _figures(steps: Sequence[Step], sources: dict[str, Any] | None, run: Run | None) -> None:
    clips, kept = steps[0], steps[-1]
    of_sources: dict[str, int] = {}
    if sources is not None:
        of_sources = {state: one["num"] for state, one in sources.items()}
    elif run is not None:
        of_sources = {s: _counts(run, "sources").get(s, 0) for s in SOURCE_STATES}
    mean_s = kept.video_s / kept.num if kept.num and kept.video_s is not None else None
    figures = (
        (
            "Sources",
            look.count(sum(of_sources.values())),
            " · ".join(f"{num:,} {s}" for s, num in of_sources.items() if num),
        ),
        ("Clips", look.count(clips.num), f"{look.hours(clips.video_s)} of video"),
        ("Kept", look.count(kept.num), f"{look.share(kept.num, clips.num)} of clips"),
        (
            "Video kept",
            look.hours(kept.video_s),
            f"{look.share(kept.video_s or 0, clips.video_s or 0)} of all clips' video",
        ),
        ("Mean kept clip", look.seconds(mean_s), f"Mimir: about {PAPER_CLIP_S:.0f} s"),
    )
    for column, (name, value, beside) in zip(st.columns(5), figures, strict=True):
        column.metric(name, value)
        column.caption(beside)


def _pending(steps: Sequence[Step]) -> None:
    pending = next((s.num for s in steps if s.state == "pending"), 0)
    if pending:
        st.info(
            f"{look.count(pending)} clips are pending: a run is under way, or it was stopped, or"
            " looser thresholds admitted clips that were never measured. The same"
            " `pipelines/curate.py` command measures them.",
            icon=":material/hourglass_top:",
        )


def _waterfall(steps: Sequence[Step]) -> alt.LayerChart:
    total = steps[0].num
    rows = []
    for number, step in enumerate(steps):
        is_end = number in (0, len(steps) - 1)
        low, high = (0, step.num) if is_end else (step.left, step.left + step.num)
        number_said = f"{step.num:,}" if is_end else f"−{step.num:,}"
        said = [number_said, look.share(step.num, total)]
        if step.video_s is not None:
            said.append(look.hours(step.video_s))
        rows.append(
            {
                "label": _label(step),
                "low": low,
                "high": high,
                "state": "clips" if number == 0 else step.state,
                "said": "  ·  ".join(said),
                "clips": step.num,
                "share": look.share(step.num, total),
                "hours": look.hours(step.video_s),
                "left": step.left,
            }
        )
    data = pd.DataFrame(rows)
    colours = {"clips": _CLIPS, **look.STATES}
    there = [s for s in colours if s in set(data["state"])]
    base = alt.Chart(data).encode(
        y=alt.Y("label:N", sort=None, title=None, axis=alt.Axis(labelLimit=330, ticks=False,
                domain=False, labelPadding=10)),
        tooltip=[alt.Tooltip("label:N", title="step"), alt.Tooltip("clips:Q", format=","),
                 alt.Tooltip("share:N", title="of all clips"),
                 alt.Tooltip("hours:N", title="video"),
                 alt.Tooltip("left:Q", title="left behind it", format=",")],
    )  # fmt: skip
    bars = base.mark_bar(height=17, cornerRadius=2).encode(
        x=alt.X(
            "low:Q",
            title="clips",
            scale=alt.Scale(domain=[0, total * 1.3], nice=False),
            axis=alt.Axis(format="~s", tickCount=6, values=_ticks(total)),
        ),
        x2="high:Q",
        color=alt.Color(
            "state:N",
            legend=None,
            scale=alt.Scale(domain=there, range=[colours[s] for s in there]),
        ),
    )
    words = base.mark_text(align="left", dx=8, color=_TEXT, fontSize=12).encode(
        x="high:Q", text="said:N"
    )
    return (bars + words).properties(height=_ROW_PX * len(rows) + 40)


def _ticks(total: int) -> list[float]:
    """Round numbers up to the total."""
    step = 10 ** (len(str(max(total, 1))) - 1)
    step = step / 2 if total / step < 3 else step * (2 if total / step > 6 else 1)
    return [i * step for i in range(int(total / step) + 1)]


def _label(step: Step) -> str:
    return f"{step.stage} · {step.label}" if step.stage and step.stage != step.label else step.label


def _table(steps: Sequence[Step]) -> None:
    total = steps[0].num
    rows = []
    for step in steps[1:]:
        reached = step.left + step.num if step.state != "kept" else total
        name = step.label if step.state == "rejected" else ""
        stage = step.stage if step.state == "rejected" else step.state
        rows.append(
            [
                markup.chip(stage, look.STATES[step.state]),
                f"<code>{markup.text(name)}</code>" if name else "",
                look.count(step.num),
                look.share(step.num, total),
                look.share(step.num, reached) if step.state != "kept" else "",
                look.hours(step.video_s),
                look.count(step.left),
            ]
        )
    heads = ["Stage", "Reason", "Clips", "of all", "of those that reached it", "Video", "Left"]
    with st.expander("As a table"):
        markup.show(markup.table(heads, rows, left=[1], name="funnel"))


def _sources(sources: dict[str, Any], run: Run | None) -> None:
    total = sum(s["num"] for s in sources.values())
    rows = []
    for state, of in sources.items():
        num = of["num"] if run is None else _counts(run, "sources").get(state, 0)
        whole = total if run is None else _counts(run, "sources").get("total", 0)
        facts = [look.hours(of["video_s"]), look.size(of["size_bytes"])] if run is None else []
        rows.append([markup.text(state), look.count(num), look.share(num, whole), *facts])
    facts = ["Video", "Files"] if run is None else []
    markup.show(markup.table(["State", "Sources", "Share", *facts], rows, name="sources"))
    missing = sum(s["missing"] for s in sources.values())
    if missing and run is None:
        st.caption(f"{look.count(missing)} of the files were gone when the last run looked.")


def _states(steps: Sequence[Step]) -> None:
    counts: dict[str, int] = dict.fromkeys(look.STATES, 0)
    for step in steps[1:]:
        counts[step.state] += step.num
    total = steps[0].num
    rows = [
        [
            markup.chip(state, look.STATES[state]),
            look.count(num),
            look.share(num, total),
            markup.bar(num / total if total else 0, look.STATES[state], 200) if num else "",
        ]
        for state, num in counts.items()
    ]
    markup.show(markup.table(["State", "Clips", "Share", ""], rows, left=[3], name="states"))


def _failures(root: str) -> None:
    found = funnel.failures(root)
    if not found:
        return
    st.subheader("Failures", anchor=False)
    rows = [
        [
            markup.text(one["what"]),
            markup.text(one["operator"]),
            f"<b>{markup.text(one['error_type'])}</b>",
            look.count(one["num"]),
            markup.text(one["error"] or ""),
            f"<code>{markup.text(_end_of(one['example']))}</code>",
        ]
        for one in found
    ]
    heads = ["Of a", "Operator", "Failure", "Times", "For example", "which is of"]
    markup.show(markup.table(heads, rows, left=[1, 2, 4, 5], name="failures"))


def _end_of(name: str) -> str:
    return name if len(name) <= 48 else "…" + name[-47:]


def _over_runs(runs: Sequence[Run]) -> None:
    if not runs:
        return
    st.subheader("Over runs", anchor=False)
    shown = list(enumerate(runs, 1))[-_RUNS_SHOWN:]
    rows = [
        {
            "run": f"{number}  {run.started_at:%m-%d %H:%M}",
            "id": run.run_id[:8],
            "started": f"{run.started_at:%Y-%m-%d %H:%M} UTC",
            "state": state,
            "order": place,
            "clips": _counts(run, "clips").get(state, 0),
            "took": look.seconds(run.seconds) + (", interrupted" if run.interrupted else ""),
        }
        for number, run in shown
        for place, state in enumerate(look.STATES)
    ]
    data = pd.DataFrame(rows)
    there = [s for s in look.STATES if data.loc[data["state"] == s, "clips"].sum()]
    bars = (
        alt.Chart(data[data["state"].isin(there)])
        .mark_bar(size=min(46, 900 // len(shown)), cornerRadius=2)
        .encode(
            x=alt.X("run:N", sort=None, title="run, and when it started (UTC)",
                    axis=alt.Axis(labelAngle=0 if len(shown) < 9 else -45)),
            y=alt.Y("clips:Q", title="clips"),
            color=alt.Color("state:N", title=None, legend=alt.Legend(orient="top"),
                            scale=alt.Scale(domain=there, range=[look.STATES[s] for s in there])),
            order="order:Q",
            tooltip=["id:N", "started:N", "took:N", "state:N", alt.Tooltip("clips:Q", format=",")],
        )
    )  # fmt: skip
    look.chart(bars.properties(height=230))
    st.caption("What each run left: one that was interrupted, or added sources, shows as a step.")
