"""Clips: found by any signal; one of them played, with its whole record and what each rule says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from cluster.dashboard import cards, clips, funnel, keyframes, lance_sql, look, markup, playable
from cluster.dashboard.bounds import SIGNS, published_bounds
from cluster.dashboard.clips import Choice, Signal
from cluster.dashboard.places import Places

PER_PAGE = 24
_MOST_PAGES = 400
_NEAR = 6
_AS_STORED = "as stored"
_KEPT = {"persist_state": "session"}


def show(places: Places) -> None:
    """The page."""
    look.begin("Clips", "Find clips by any signal; choose one to play it and to see its record.")
    markup.style()
    cards.style()
    root = places.dataset
    if not lance_sql.has_rows(root, "clips"):
        look.empty(
            "No clips yet.",
            f"`python pipelines/curate.py --src FOLDER --dst {root}` makes clips of videos.",
        )
        return
    chosen = st.query_params.get("clip")
    if chosen:
        _clip(places, chosen)
        return
    view = st.segmented_control(
        "View",
        ["All clips", "Nearest to each threshold"],
        default="All clips",
        key="clips_view",
        required=True,
        label_visibility="collapsed",
        **_KEPT,
    )
    if view == "All clips":
        _all(root)
    else:
        _near(root)


def _open(clip_id: str) -> None:
    st.query_params["clip"] = clip_id


def _close() -> None:
    st.query_params.pop("clip", None)


# The grid


def _all(root: str) -> None:
    choice = _choice(root)
    total = clips.num(root, choice)
    left, right = st.columns([3, 2], vertical_alignment="center")
    left.markdown(f"**{look.count(total)}** clips" + (" pass" if choice.where(()) else ""))
    if not total:
        st.info("No clip passes these filters.", icon=":material/filter_alt_off:")
        return
    num_pages = min(_MOST_PAGES, -(-total // PER_PAGE))
    page = 1
    if num_pages > 1:
        with right:
            page = st.pagination(num_pages, key=f"page-{hash(choice)}", **_KEPT)
    rows = clips.found(root, choice, (page - 1) * PER_PAGE, PER_PAGE)
    cards.grid(root, rows, open_clip=_open, beside=lambda row: _beside(row, choice))
    if total > _MOST_PAGES * PER_PAGE:
        st.caption(
            f"The first {look.count(_MOST_PAGES * PER_PAGE)} can be paged through: filter or sort"
            " to reach the others."
        )


def _beside(row: Mapping[str, Any], choice: Choice) -> str:
    names = ([choice.sort] if choice.sort else []) + [name for name, *_ in choice.ranges]
    if names:
        return "\n".join(f"{n} {_number(row[n])}" for n in dict.fromkeys(names))
    return f"{row['width_px']} × {row['height_px']} px" if row["width_px"] else ""


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def _choice(root: str) -> Choice:
    """The filters, as they are set."""
    tallies = funnel.tallies(root)
    signals = clips.signals(root)
    first, second, third = st.columns([2, 2, 2])
    words = first.text_input("Words in a caption", key="clips_words", **_KEPT)
    source = second.text_input("Path of the source", key="clips_source", **_KEPT)
    with third:
        sort, descending = _order(signals)
    states, stages, reasons = (
        funnel.totals(tallies, name) for name in ("state", "stage", "reason")
    )
    left, middle, right = st.columns([2, 2, 2])
    with left:
        chosen_states = st.pills(
            "State", list(states), selection_mode="multi", key="clips_state",
            format_func=lambda s: f"{look.verbatim(s)} {look.count(states[s])}", **_KEPT,
        )  # fmt: skip
    chosen_stages = middle.multiselect(
        "Stage that decided", list(stages), key="clips_stage", placeholder="any",
        format_func=lambda s: f"{s} ({look.count(stages[s])})", **_KEPT,
    )  # fmt: skip
    chosen_reasons = right.multiselect(
        "Reason", list(reasons), key="clips_reason", placeholder="any",
        format_func=lambda r: f"{r} ({look.count(reasons[r])})", **_KEPT,
    )  # fmt: skip
    return Choice(
        states=tuple(chosen_states),
        stages=tuple(chosen_stages),
        reasons=tuple(chosen_reasons),
        ranges=_ranges(root, signals),
        words=words,
        source=source,
        sort=sort,
        descending=descending,
    )


def _order(signals: Sequence[Signal]) -> tuple[str, bool]:
    left, right = st.columns([5, 4], vertical_alignment="bottom")
    labels = {_AS_STORED: ""} | {s.label: s.name for s in signals}
    chosen = left.selectbox("Sort by", list(labels), key="clips_sort", **_KEPT)
    falling = right.toggle(
        "Descending", key="clips_falling", disabled=chosen == _AS_STORED, **_KEPT
    )
    return labels.get(chosen, ""), bool(falling)


def _ranges(root: str, signals: Sequence[Signal]) -> tuple[tuple[str, float, float], ...]:
    by_label = {s.label: s for s in signals}
    picked = st.multiselect(
        "Signals to filter by",
        list(by_label),
        key="clips_signals",
        placeholder="any signal: brightness, motion, duration …",
        **_KEPT,
    )
    found = []
    places = st.columns(3, gap="medium") if picked else []
    for number, label in enumerate(picked):
        with places[number % 3]:
            if (range_ := _range(root, by_label[label])) is not None:
                found.append(range_)
    return tuple(found)


def _range(root: str, signal: Signal) -> tuple[str, float, float] | None:
    """Two numbers that a signal lies between; None where it was never measured."""
    extent = clips.extent(root, signal.name)
    if extent is None:
        st.caption(f"**{signal.name}** was not measured in this dataset.")
        return None
    st.markdown(f"**{signal.label}**", help=f"{signal.about}. Clips without a value do not pass.")
    low, high = extent
    if low == high:
        st.caption(f"always {low:g}")
        return signal.name, low, high
    step = 1.0 if signal.is_integer else 10.0 ** math.floor(math.log10((high - low) / 100))
    low, high = (f(end / step) * step for f, end in ((math.floor, low), (math.ceil, high)))
    kind = int if signal.is_integer else float
    low, high, step = kind(low), kind(high), kind(step)
    left, right = st.columns(2)
    options: dict[str, Any] = {"step": step, "format": None if signal.is_integer else "%.4g"}
    least = left.number_input(
        "from", value=low, key=f"from-{signal.name}", label_visibility="collapsed",
        **options, **_KEPT,
    )  # fmt: skip
    most = right.number_input(
        "to", value=high, key=f"to-{signal.name}", label_visibility="collapsed",
        **options, **_KEPT,
    )  # fmt: skip
    return signal.name, least, most


# Nearest to each threshold


def _near(root: str) -> None:
    recipe = funnel.recipe_of(root)
    bounds = published_bounds(root, recipe.stages) if recipe else {}
    there = set(lance_sql.newest(root, "clips").schema.names)
    bounds = {key: bound for key, bound in bounds.items() if key[0] in there}
    if not bounds:
        look.empty("This dataset's recipe has no thresholds.", "`recipe` tells which it was.")
        return
    named = {f"{c}{SIGNS[w]}{b:g}": (c, w, b) for (c, w), b in bounds.items()}
    label = st.selectbox("A clip is out when", list(named), key="clips_near", **_KEPT)
    column, which, bound = named[label]
    about, unit = clips.meaning("clips", column)
    st.caption(f"{about}{f', in {unit}' if unit else ''}. Nearest to the bound first.")
    kept, out = clips.nearest(root, column, which, bound, 2 * _NEAR)

    def beside(row: Mapping[str, Any]) -> str:
        return f"{column} {_number(row[column])}\nby {abs(row[column] - bound):.3g}"

    for title, rows in (("Kept, and almost not", kept), ("Rejected, and almost kept", out)):
        st.subheader(title, anchor=False)
        if rows:
            cards.grid(root, rows, open_clip=_open, beside=beside, key=title[:4])
        else:
            st.caption("none")


# One clip


def _clip(places: Places, clip_id: str) -> None:
    root = places.dataset
    st.button("All clips", icon=":material/arrow_back:", on_click=_close)
    rows = clips.record(root, "clips", "clip_id", clip_id)
    if not rows:
        sought = look.verbatim(clip_id[:64])
        st.warning(f"No clip has the id {sought}.", icon=":material/search_off:")
        return
    clip = dict.fromkeys(n for n in (*clips.CARD, "error")) | rows[0]
    markup.show(_headline(clip))
    left, right = st.columns([5, 4], gap="large")
    with left:
        _player(places, clip)
        _pictures(root, clip)
        _texts(clip)
    with right:
        _verdict(root, clip)
    source = clips.record(root, "sources", "source_id", clip["source_id"])
    pairs = clips.record(root, "pairs", "clip_id", clip_id)
    cuts = clips.record(root, "cuts", "clip_id", clip_id)
    st.subheader("Record", anchor=False)
    titles = ["Clip", "Source"] + ["Pairs"] * bool(pairs) + ["Cut"] * bool(cuts)
    shown = [("clips", rows), ("sources", source), ("pairs", pairs), ("cuts", cuts)]
    shown = [one for one in shown if one[1] or one[0] == "sources"]
    for tab, (table, some) in zip(st.tabs(titles), shown, strict=True):
        with tab:
            for row in some:
                _record(table, row)


def _headline(clip: Mapping[str, Any]) -> str:
    state = clip["state"] or "pending"
    span = ""
    if clip["start_s"] is not None:
        span = f"{clip['start_s']:.2f} – {clip['end_s']:.2f} s of "
    facts = f"{clip['width_px']} × {clip['height_px']} px" if clip["width_px"] else ""
    return (
        f"{markup.chip(state, look.STATES.get(state, ''))}<b>{markup.text(cards.name_of(clip))}</b>"
        f' <span class="dim">{span}{markup.text(clip["source_uri"])} · {facts} ·'
        f" <code>{markup.text(clip['clip_id'])}</code></span>"
    )


def _player(places: Places, clip: Mapping[str, Any]) -> None:
    root, clip_id = places.dataset, clip["clip_id"]
    if clip["media"] == "image":
        return
    try:
        played = _played(places, root, clip_id)
    except playable.Unplayable as error:
        st.warning(f"It cannot be played: {look.verbatim(error)}. Its keyframes are stored.",
                   icon=":material/videocam_off:")  # fmt: skip
        return
    if played is not None:
        st.video(played.data, format=played.mime, autoplay=True, muted=True, loop=True)
        st.caption(f"{played.how} · {look.size(len(played.data))} · without sound")


def _played(places: Places, root: str, clip_id: str) -> playable.Playable | None:
    """The clip to play; None while nobody has asked for what takes work."""
    offered = playable.offer(root, clip_id)
    held = st.session_state.get("played")
    if held and held[0] == offered.key:
        return held[1]
    if not playable.is_ready(offered, places.cache):
        codec = look.verbatim(offered.codec or "unknown codec")
        st.caption(
            f"Browsers do not play this clip as it is ({codec})."
            " It can be made H.264, and is kept for the next time."
        )
        if not st.button("Make it playable", icon=":material/movie:", type="primary"):
            return None
    with st.spinner("Getting the clip out of its source …"):
        played = playable.play(offered, places.cache, places.cache_bytes)
    st.session_state["played"] = (offered.key, played)
    return played


def _pictures(root: str, clip: Mapping[str, Any]) -> None:
    clip_id = clip["clip_id"]
    frames = keyframes.found(root, [clip_id], keyframes.RECORD_PX).get(clip_id, [])
    if not frames:
        st.caption("No keyframe is stored of it: its container already decided.")
        return
    if damaged := sum(not jpeg for _, jpeg in frames):
        st.caption(f"Of its keyframes, {damaged} of {len(frames)} are damaged.")
    frames = [(time_s, jpeg) for time_s, jpeg in frames if jpeg]
    if clip["media"] == "image":
        for _, jpeg in frames[:1]:
            st.image(jpeg, width="stretch")
        return
    st.subheader("Keyframes", anchor=False)
    for start in range(0, len(frames), 4):
        for place, (time_s, jpeg) in zip(st.columns(4), frames[start : start + 4], strict=False):
            place.image(jpeg, caption=None if time_s is None else f"{time_s:.2f} s",
                        width="stretch")  # fmt: skip


def _texts(clip: Mapping[str, Any]) -> None:
    for name, title in (("caption", "Caption"), ("caption_original", "Caption found beside it")):
        if clip.get(name):
            markup.show(markup.labelled(title, markup.text(clip[name])))


def _verdict(root: str, clip: Mapping[str, Any]) -> None:
    st.subheader("Verdict", anchor=False)
    markup.show(f'<div class="words">{_why(clip)}</div>')
    recipe = funnel.recipe_of(root)
    if recipe is None:
        return
    bounds = published_bounds(root, recipe.stages)
    rows = []
    for check in clips.checks(clip, recipe.stages, bounds):
        unit = clips.meaning("clips", check.column)[1]
        mark = {True: "passes", False: "fails", None: "no value"}[check.passes]
        colour = {True: look.STATES["kept"], False: look.STATES["rejected"], None: ""}
        name = f"<b>{check.column}</b>" if check.decided else check.column
        rows.append(
            [
                f"{name}<small>{check.stage}</small>",
                markup.text(_short(check.value)),
                f"{markup.text(check.says)}<small>{markup.text(unit)}</small>",
                markup.chip(mark, colour[check.passes]),
            ]
        )  # fmt: skip
    markup.show(markup.table(["Rule", "Value", "Keeps", ""], rows, name="rules"))


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value or "none"
    return "–" if value is None else f"{value:.4g}"


def _why(clip: Mapping[str, Any]) -> str:
    """Why it is not kept, in a sentence."""
    state, stage = clip["state"], markup.text(clip["stage"])
    if state == "kept":
        return "Kept: it passes every rule."
    if state == "rejected" and clip["rule_bound"] is not None:
        value, bound = clip["rule_value"], clip["rule_bound"]
        column = markup.text(clip["rule_column"])
        sign = funnel.parsed(clip["reason"])[1]
        return (
            f"Rejected by stage <b>{stage}</b>: {column} is <b>{value:.4g}</b>, and"
            f" {markup.text(sign)} {bound:g} is out. It missed by {abs(value - bound):.3g}."
        )
    if state == "rejected":
        return f"Rejected by stage <b>{stage}</b>: {markup.text(clip['reason'])}."
    if state == "failed":
        return (
            f"Failed in stage <b>{stage}</b>: {markup.text(clip.get('error_type'))}:"
            f" {markup.text(clip.get('error'))}"
        )
    if state == "duplicate":
        other = markup.text(clip["duplicate_of"])
        return f'A near-duplicate of <a href="clips?clip={other}" target="_self">{other}</a>.'
    where = f" of stage <b>{stage}</b>" if clip["stage"] else ""
    return f"Pending: a signal{where} was not measured yet."


def _record(table: str, row: Mapping[str, Any]) -> None:
    rows = []
    for name, value in row.items():
        about, unit = clips.meaning(table, name)
        said = markup.text(clips.plain(value))
        shown = f'<span class="dim">{said}</span>' if value is None else said
        rows.append([f"<code>{markup.text(name)}</code>", shown, markup.text(unit),
                     f'<span class="dim">{markup.text(about)}</span>'])  # fmt: skip
    heads = ["Column", "Value", "Unit", "Meaning"]
    markup.show(markup.table(heads, rows, left=[1, 2, 3], name=f"record-{table}"))
