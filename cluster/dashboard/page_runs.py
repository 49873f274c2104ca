"""Runs: what was done when and with what, where the time went, and what failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import streamlit as st

from cluster.dashboard import look, markup, runs
from cluster.dashboard.places import Places
from cluster.dashboard.runs import Run

MOST_DIFFERENCES = 300
MOST_FAILURES = 100


def show(places: Places) -> None:
    """The page."""
    look.begin("Runs", "Every run of the dataset: when, with what, for how long, and what failed.")
    markup.style()
    found = runs.runs([places.dataset, places.evaluations])
    if not found:
        look.empty(
            "No run has come to its end yet.",
            f"`python pipelines/curate.py --src FOLDER --dst {places.dataset}` writes a row when it"
            " ends, an evaluation when it begins.",
        )
        return
    _list(found)
    left, right = st.columns(2)
    run = left.selectbox("Run", found, format_func=lambda one: one.label, key="run")
    others = [one for one in found if one.run_id != run.run_id]
    same = [one for one in others if (one.kind, one.recipe) == (run.kind, run.recipe)]
    before = [one for one in same if one.started_at < run.started_at]
    first = others.index(before[0]) + 1 if before else 0
    other = right.selectbox(
        "Compared with", [None, *others], index=first, key=f"other than {run.run_id}",
        format_func=lambda one: "none" if one is None else one.label,
    )  # fmt: skip
    if run.is_tiny:
        look.meaningless(f"recipe {look.verbatim(run.recipe)} has small random models")
    _facts(run)
    _time(run)
    _failures(run)
    if other is not None:
        _difference(other, run)
    _recipe(run)


def _list(found: Sequence[Run]) -> None:
    rows = [
        {
            "started": run.started_at,
            "kind": run.kind,
            "recipe": run.recipe,
            "night": run.night or "",
            "time": look.seconds(run.seconds),
            "state": run.state,
            "what came of it": runs.summary(run),
            "commit": (run.git_commit or "")[:8],
            "run": run.run_id[:8],
        }
        for run in found
    ]
    if not any(row["night"] for row in rows):
        for row in rows:
            del row["night"]
    st.dataframe(
        rows,
        hide_index=True,
        height=min(38 + 35 * len(rows), 300),
        column_config={
            "started": st.column_config.DatetimeColumn(
                "started, UTC", format="YYYY-MM-DD HH:mm", timezone="UTC"
            ),
            "what came of it": st.column_config.TextColumn(width=260),
            "night": st.column_config.TextColumn(width=90),
        },
    )


def _facts(run: Run) -> None:
    figures = st.columns(5)
    figures[0].metric("Time", look.seconds(run.seconds))
    figures[1].metric("State", run.state)
    figures[2].metric("Frames decoded", look.count(run.frames_decoded))
    commit = run.git_commit or "–"
    figures[3].metric("Commit", commit[:8], help=look.verbatim(commit))
    figures[4].metric("Run", run.run_id[:8], help=look.verbatim(run.run_id))
    asked = ", ".join(run.src) or "what was there"
    st.caption(look.verbatim(f"Of {asked} · {runs.summary(run)} · dataset {run.root}"))


def _time(run: Run) -> None:
    """Where the time went."""
    work = [one for one in runs.work(run) if one["seconds"] or one["rows"]]
    if not work:
        return
    st.subheader("Where the time went", anchor=False)
    whole = sum(one["seconds"] for one in work)
    rows = [
        one | {"share": one["seconds"] / whole if whole else 0.0,
               "pace": one["rows"] / one["seconds"] if one["seconds"] else None}
        for one in work
    ]  # fmt: skip
    rows.sort(key=lambda one: -one["seconds"])
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("what:N", sort=[one["what"] for one in rows], title=None,
                axis=alt.Axis(labelLimit=240)),
        x=alt.X("seconds:Q", title="seconds of all workers together",
                scale=alt.Scale(domainMax=1.08 * max(one["seconds"] for one in rows))),
        tooltip=[alt.Tooltip("what:N"), alt.Tooltip("seconds:Q", format=",.2f"),
                 alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("rows:Q", format=","),
                 alt.Tooltip("pace:Q", format=",.2f", title="rows/s"),
                 alt.Tooltip("failed:Q", format=",")],
    )  # fmt: skip
    label = base.mark_text(align="left", dx=5, color="#8a93a3").encode(
        text=alt.Text("share:Q", format=".0%")
    )
    bars = base.mark_bar(color=look.SERIES[0], cornerRadiusEnd=2)
    look.chart((bars + label).properties(height=26 * len(rows) + 70))
    heads = ["", "seconds", "share", "rows", "rows/s", "failed"]
    lines = [
        [markup.text(one["what"]), f"{one['seconds']:,.2f}", f"{100 * one['share']:.1f} %",
         look.count(one["rows"]), "–" if one["pace"] is None else f"{one['pace']:,.2f}",
         look.count(one["failed"])]
        for one in rows
    ]  # fmt: skip
    with st.expander("As numbers"):
        markup.show(markup.table(heads, lines))


def _failures(run: Run) -> None:
    st.subheader("Failures", anchor=False)
    found = runs.failures(run)
    if not found:
        st.caption("Nothing of what this run wrote failed.")
        return
    counts = {kind: sum(f["count"] for f in found if f["kind"] == kind)
              for kind in ("final", "may pass", "left out")}  # fmt: skip
    told = {
        "final": "final until content or operator changes",
        "may pass": "tried again by the next run",
        "left out": "videos without the object of their prompt, left out by design",
    }
    st.caption(" · ".join(f"{n:,} {told[kind]}" for kind, n in counts.items() if n))
    heads = ["Table", "at", "error", "message", "", "rows"]
    lines = [
        [
            markup.text(one["table"]), markup.text(one["at"]), markup.text(one["error_type"]),
            markup.text(one["message"]),
            markup.chip(one["kind"], look.STATES[_COLOURS[one["kind"]]]), look.count(one["count"]),
        ]
        for one in found[:MOST_FAILURES]
    ]  # fmt: skip
    markup.show(markup.table(heads, lines, left=[1, 2, 3, 4], name="failures"))
    if len(found) > MOST_FAILURES:
        st.caption(f"and {len(found) - MOST_FAILURES:,} more kinds of failure")
    if run.kind == "curation":
        st.caption("Clips and pairs are those whose source this run was the last to read.")


_COLOURS = {"final": "rejected", "may pass": "pending", "left out": "duplicate"}


def _difference(before: Run, after: Run) -> None:
    """What changed from one to the other."""
    st.subheader("What changed", anchor=False)
    st.caption(look.verbatim(f"From {before.label} to {after.label}"))
    parts = [
        ("recipe", before.resolved, after.resolved),
        ("versions", before.versions, after.versions),
        ("commit", {"commit": before.git_commit}, {"commit": after.git_commit}),
    ]
    lines = []
    for name, old, new in parts:
        for one in runs.changed(old, new):
            times = f" ({one.places:,} times)" if one.places > 1 else ""
            lines.append([name, f"{one.path}{times}", _said(one.before), _said(one.after)])
    if not lines:
        st.caption("Recipe, versions and commit are the same.")
        return
    cells = [[markup.text(cell) for cell in line] for line in lines[:MOST_DIFFERENCES]]
    heads = ["", "what", "before", "after"]
    with st.container(height=440 if len(lines) > 12 else "content", border=False):
        markup.show(markup.table(heads, cells, left=[1, 2, 3], name="changed"))
    if len(lines) > MOST_DIFFERENCES:
        st.caption(f"and {len(lines) - MOST_DIFFERENCES:,} more")


def _said(value: Any) -> str:
    if value is None:
        return "–"
    if (number := runs.num_leaves(value)) > 1:
        name = markup.name_of(value)
        return f"{name + ', ' if name else ''}{number:,} settings"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{text[:120]} …" if len(text) > 120 else text


def _recipe(run: Run) -> None:
    """The whole of it, and the libraries."""
    st.subheader("Recipe", anchor=False)
    if not run.resolved:
        st.caption("This run did not say what it was asked for.")
    else:
        markup.show(markup.tree(_readable(run.resolved)))
    with st.expander("Versions of libraries"):
        lines = [[markup.text(k), markup.text(v or "–")] for k, v in run.versions.items()]
        markup.show(markup.table(["library", "version"], lines))


def _readable(value: Any) -> Any:
    """Rules in the words of their reasons; long texts cut."""
    if isinstance(value, Mapping):
        if {"column", "lo", "hi"} <= value.keys():
            return _rule(value)
        return {key: _readable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_readable(one) for one in value]
    return f"{value[:300]} …" if isinstance(value, str) and len(value) > 300 else value


def _rule(rule: Mapping[str, Any]) -> str:
    """What a row must hold to be kept."""
    column, parts = rule["column"], []
    if rule.get("above") is not None:
        parts.append(f"{column} > {rule['above']:g}")
    if rule["lo"] is not None:
        parts.append(f"{column} ≥ {rule['lo']:g}")
    if rule["hi"] is not None:
        parts.append(f"{column} ≤ {rule['hi']:g}")
    if rule.get("empty"):
        parts.append(f"{column} is empty")
    return " and ".join(parts) or str(column)
