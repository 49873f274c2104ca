"""Thresholds: move one and see what would be kept, from the stored signals; export the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from cluster.dashboard import cards, clips, funnel, lance_sql, look, markup, thresholds
from cluster.dashboard.bounds import SIGNS, Bounds, bounds_of, changes, scale, tidy
from cluster.dashboard.places import Places
from cluster.dashboard.thresholds import Group, Judged, Outcome
from engine.operator import Stage
from pipelines.recipes import Recipe

_KEY = "bound-{}-{}"
_OUT, _ELSE = "rejected by this rule", "otherwise not kept"
_SHOWN = 6
_DIGITS = 4


def show(places: Places) -> None:
    """The page."""
    look.begin(
        "Thresholds",
        "Move one and see what would be kept. Nothing is written: the line below does that.",
    )
    markup.style()
    cards.style()
    root = places.dataset
    recipe = funnel.recipe_of(root)
    bounds = bounds_of(recipe.stages) if recipe else {}
    if not lance_sql.has_rows(root, "clips"):
        look.empty(
            "No clips yet.",
            f"`python pipelines/curate.py --src FOLDER --dst {root}` measures the clips of videos.",
        )
        return
    if recipe is None or not bounds:
        look.empty(
            "This dataset's recipe has no thresholds.",
            "Datasets of `classic`, `mimir`, `small`, `tiny` and `long` have.",
        )
        return
    now, start = thresholds.published_with_bounds(root, recipe.stages)
    moved = _moved(start)
    left, right = st.columns(2, gap="large")
    with left:
        column = _signal(recipe.stages, moved, start)
        moved = _sliders(root, recipe.stages, column, start)
    with right:
        outcome, is_settled = _outcome(root, recipe.stages, now, moved, start)
    with left:
        _histogram(root, column, moved, outcome.then)
    with right:
        _result(root, outcome, is_settled)
        _stages(recipe.stages, outcome, moved)
    _export(root, recipe, moved)
    _examples(root, outcome, moved)
    if outcome.then is now:
        thresholds.prepare(root, recipe.stages, start)


# What is moved


def _moved(start: Bounds) -> dict[tuple[str, str], float]:
    """The bounds as the sliders stand, those of other signals among them."""
    held = st.session_state.setdefault("moved_bounds", {})
    return {key: held.get(key, bound) for key, bound in start.items()}


def _signal(stages: Sequence[Stage], moved: Bounds, start: Bounds) -> str:
    """Which signal's bounds are moved now."""
    columns = dict.fromkeys(column for column, _ in moved)
    changed = {c for (c, w), bound in moved.items() if bound != start[c, w]}
    said = {c: f"{c} ●" if c in changed else c for c in columns}
    chosen = st.selectbox(
        "Signal",
        list(columns),
        format_func=lambda c: f"{thresholds.rule_with(stages, c)[0].name} · {said[c]}",
        key="threshold_signal",
        persist_state="session",
        help="● marks those that were moved.",
    )
    about, unit = clips.meaning("clips", chosen)
    st.caption(f"{about}{f', in {unit}' if unit else ''}.")
    return chosen


def _sliders(
    root: str, stages: Sequence[Stage], column: str, start: Bounds
) -> dict[tuple[str, str], float]:
    extent = clips.extent(root, column)
    held = st.session_state["moved_bounds"]
    for name, which in start:
        if name != column:
            continue
        if extent is None:
            st.info(f"{column} was not measured in this dataset: its bound decides nothing.")
            break
        _slider(column, which, start[name, which], held, extent)
    changed = [key for key in held if held[key] != start.get(key)]
    others = [f"`{c}{SIGNS[w]}{held[c, w]:g}`" for c, w in changed if c != column]
    if others:
        st.caption(f"Moved as well: {', '.join(others)}.")
    buttons = st.columns(2)
    buttons[0].button(
        "Back to what is published",
        icon=":material/restart_alt:",
        on_click=_set_all,
        args=({},),
        disabled=not changed,
        width="stretch",
    )
    own = bounds_of(stages)
    differs = {key: own[key] for key in own if own[key] != start[key]}
    if differs:
        buttons[1].button("The recipe's own", on_click=_set_all, args=(differs,), width="stretch")
    return _moved(start)


def _slider(
    column: str,
    which: str,
    bound: float,
    held: dict[tuple[str, str], float],
    extent: tuple[float, float],
) -> None:
    """A slider and a number that stand for the same bound."""
    value = held.get((column, which), bound)
    low, high, step = scale(extent, value, bound)
    words = {"lo": "out when less than", "hi": "out when more than", "above": "out when at most"}
    left, right = st.columns([4, 1], vertical_alignment="bottom")
    key = _KEY.format(column, which)
    for widget in ("-slider", "-number"):  # the bound may have been moved while they were not here
        st.session_state.setdefault(key + widget, value)
    left.slider(
        f"{column}: {words[which]}",
        low,
        high,
        step=step,
        format=f"%.{_DIGITS}g",
        key=f"{key}-slider",
        on_change=_take,
        args=(column, which, "-slider"),
    )
    right.number_input(
        "exactly",
        min_value=0.0,
        step=step,
        format="%.6g",
        key=f"{key}-number",
        on_change=_take,
        args=(column, which, "-number"),
        label_visibility="collapsed",
    )
    if value != bound:
        st.caption(f"published: {bound:g}")


def _take(column: str, which: str, widget: str) -> None:
    """A bound was moved by one of its widgets: the other one follows."""
    key = _KEY.format(column, which)
    value = tidy(float(st.session_state[key + widget]))
    st.session_state["moved_bounds"][column, which] = value
    for other in ("-slider", "-number"):
        if other != widget:
            st.session_state[key + other] = value


def _set_all(bounds: Mapping[tuple[str, str], float]) -> None:
    st.session_state["moved_bounds"] = dict(bounds)
    for name in [n for n in st.session_state if str(n).startswith("bound-")]:
        del st.session_state[name]


# What comes of it


def _outcome(
    root: str, stages: Sequence[Stage], now: Judged, moved: Bounds, start: Bounds
) -> tuple[Outcome, bool]:
    """What would be published; False where near-duplicates are still among the kept."""
    is_large = len(now.codes) > thresholds.SETTLED_AT_ONCE
    if moved == start and is_large and not now.in_state("pending").any():
        return thresholds.compared(now, now), True  # a million take half a second to judge
    found = thresholds.judged(root, stages, moved)
    if all(stage.distinct is None for stage in stages):
        return thresholds.compared(now, found), True
    num = int(found.in_state("kept").sum())
    if num > thresholds.SETTLED_AT_ONCE:
        if thresholds.same_as_published(found, now):
            found = thresholds.with_published_copies(found, now, stages)
            return thresholds.compared(now, found), True
        about_s = max(1.0, num * thresholds.SETTLE_S)
        if not st.toggle(
            f"Settle near-duplicates among {look.count(num)} clips, too (about"
            f" {look.seconds(about_s)})",
            key="settle_copies",
            persist_state="session",
        ):
            return thresholds.compared(now, found), False
    with st.spinner("Settling near-duplicates …"):
        return thresholds.compared(now, thresholds.settled(root, stages, found)), True


def _result(root: str, outcome: Outcome, is_settled: bool) -> None:
    now, then = thresholds.states(outcome.now), thresholds.states(outcome.then)
    lasts = np.nan_to_num(thresholds.values_of(root, "duration_s"))
    kept_s, keeps_s = (lasts[j.in_state("kept")].sum() for j in (outcome.now, outcome.then))
    first = st.columns(2)
    first[0].metric("Would be kept", look.count(then.get("kept", 0)),
                    delta=_delta(then, now, "kept"))  # fmt: skip
    change_s = keeps_s - kept_s
    first[1].metric(
        "Video kept",
        look.hours(keeps_s),
        delta=f"{'+' if change_s > 0 else '-'}{look.hours(abs(change_s))}" if change_s else None,
    )
    second = st.columns(4)
    for place, state in zip(second, ("pending", "rejected", "duplicate", "failed"), strict=True):
        place.metric(state.capitalize(), look.count(then.get(state, 0)),
                     delta=_delta(then, now, state), delta_color="off")  # fmt: skip
    if not is_settled:
        st.caption("Near-duplicates among them are not taken out yet: see the switch above.")
    if len(outcome.awaited):
        st.caption(
            f"Admitted, and never measured any further: {look.count(len(outcome.awaited))} that"
            " would be pending. The line for `curate.py` below measures just these."
        )


def _delta(then: Mapping[str, int], now: Mapping[str, int], state: str) -> str | None:
    change = then.get(state, 0) - now.get(state, 0)
    return f"{change:+,}" if change else None


def _stages(stages: Sequence[Stage], outcome: Outcome, moved: Bounds) -> None:
    """Clips that each rule takes, as published and then."""
    now, then = (_by_rule(judged) for judged in (outcome.now, outcome.then))
    names = {column + SIGNS[which]: bound for (column, which), bound in moved.items()}
    rules = [r.column + sign for s in stages for r in s.rules for sign, _ in r.bounds]
    keys = sorted(now | then, key=lambda k: rules.index(k[1]) if k[1] in rules else len(rules))
    rows = []
    for stage, crossed in keys:
        before, after = now.get((stage, crossed), 0), then.get((stage, crossed), 0)
        reason = f"{crossed}{names[crossed]:g}" if crossed in names else crossed
        change = f"{after - before:+,}".replace("-", "−") if after != before else ""
        rows.append(
            [
                f"<code>{markup.text(reason)}</code><small>{markup.text(stage)}</small>",
                look.count(before),
                f"{look.count(after)}<small>{change}</small>",
            ]
        )
    markup.show(markup.table(["Rejected by", "published", "then"], rows, name="by-rule"))


def _by_rule(judged: Judged) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for group, num in judged.counts().items():
        if group.state == "rejected":
            key = (group.stage, group.crossed)
            found[key] = found.get(key, 0) + int(num)
    return found


def _histogram(root: str, column: str, moved: Bounds, then: Judged) -> None:
    spread = thresholds.spread(root, column)
    if spread is None:
        return
    bounds = [bound for (name, _), bound in moved.items() if name == column]
    low, high = min(spread.low, *bounds), max(spread.high, *bounds)
    if high <= low:
        high = low + 1.0
    crossed = {column + SIGNS[which] for name, which in moved if name == column}

    def part(group: Group) -> int:
        if group.state == "kept":
            return 0
        return 1 if group.state == "rejected" and group.crossed in crossed else 2

    values = thresholds.values_of(root, column)
    counts = thresholds.histogram(values, then.told(part), low, high)
    edges = np.linspace(low, high, counts.shape[1] + 1).tolist()
    parts = ("kept", _OUT, _ELSE)
    data = pd.DataFrame(
        {"part": parts[i], "from": edges[place], "to": edges[place + 1], "clips": num}
        for i, found in enumerate(counts.tolist())
        for place, num in enumerate(found)
        if num
    )
    colours = {"kept": look.STATES["kept"], _OUT: look.STATES["rejected"], _ELSE: "#97a1ae"}
    _, unit = clips.meaning("clips", column)
    bars = (
        alt.Chart(data)
        .mark_bar(binSpacing=0.5)
        .encode(
            x=alt.X("from:Q", bin="binned", title=f"{column}{f' ({unit})' if unit else ''}",
                    scale=alt.Scale(domain=[low, high], nice=False)),
            x2="to:Q",
            y=alt.Y("clips:Q", title="clips", stack="zero", axis=alt.Axis(tickMinStep=1)),
            color=alt.Color("part:N", title=None,
                            legend=alt.Legend(orient="top", labelLimit=300),
                            scale=alt.Scale(domain=list(colours), range=list(colours.values()))),
            tooltip=[alt.Tooltip("from:Q", format=".4g"), alt.Tooltip("to:Q", format=".4g"),
                     "part:N", alt.Tooltip("clips:Q", format=",")],
        )
    )  # fmt: skip
    lines = (
        alt.Chart(pd.DataFrame({"bound": bounds}))
        .mark_rule(color="#e08a3c", strokeWidth=2.5, strokeDash=[6, 3])
        .encode(x="bound:Q", tooltip=[alt.Tooltip("bound:Q", format=".6g")])
    )
    look.chart((bars + lines).properties(height=300))
    unmeasured = len(values) - spread.num
    notes = []
    if spread.beyond:
        notes.append(f"in the outer bars: {look.count(spread.beyond)} that lie beyond the ends")
    if unmeasured:
        notes.append(f"without a value: {look.count(unmeasured)}")
    if notes:
        st.caption("; ".join(notes).capitalize() + ".")


def _examples(root: str, outcome: Outcome, moved: Bounds) -> None:
    """Clips that would be gained and lost, nearest to the bound that decides on them."""
    for title, found, judged in (
        ("Gained", outcome.gained, outcome.now),
        ("Lost", outcome.lost, outcome.then),
        ("Newly pending", outcome.awaited, outcome.now),
    ):
        if not len(found):
            continue
        st.subheader(f"{title}: {look.count(len(found))}", anchor=False)
        chosen = _nearest(root, found, judged, moved)
        shown = clips.at(root, chosen, *(name for name, _ in moved))
        why = {
            row["clip_id"]: _deciding(row, judged.group_of(place))
            for place, row in zip(chosen, shown, strict=True)
        }
        cards.grid(root, shown, beside=lambda r, why=why: why[r["clip_id"]])


def _nearest(root: str, found: np.ndarray, judged: Judged, moved: Bounds) -> list[int]:
    """Some of these rows: those whose deciding value is nearest to its bound."""
    far = np.full(len(found), np.inf)
    for number, group in enumerate(judged.groups):
        for (column, which), bound in moved.items():
            if group.crossed == column + SIGNS[which]:
                here = judged.codes[found] == number
                far[here] = np.abs(thresholds.values_of(root, column)[found[here]] - bound)
    return found[np.argsort(far, kind="stable")[:_SHOWN]].tolist()


def _deciding(row: Mapping[str, Any], group: Group) -> str:
    """The value that decides, or the state that it comes from."""
    column, sign = funnel.parsed(group.crossed)
    value = row.get(column)
    return f"{column} {value:.4g}" if sign and value is not None else group.state


# What is exported


def _export(root: str, recipe: Recipe, moved: Bounds) -> None:
    st.subheader("Export", anchor=False)
    flags = "".join(f" {change}" for change in changes(recipe.stages, moved))
    flags = f" --set{flags}" if flags else ""
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    with left:
        st.caption("Publishes these verdicts, decoding nothing:")
        st.code(f"python pipelines/refilter.py {root}{flags}", language="sh", wrap_lines=True)
        st.caption("Measures what would be pending, and keeps to these thresholds:")
        st.code(
            f"python pipelines/curate.py {recipe.name} --src FOLDER --dst {root}{flags}",
            language="sh",
            wrap_lines=True,
        )
    right.download_button(
        "Recipe as JSON",
        lambda: json.dumps(thresholds.described(recipe, moved), indent=2),
        file_name=f"{recipe.name}.json",
        mime="application/json",
        icon=":material/download:",
        width="stretch",
        on_click="ignore",
    )
