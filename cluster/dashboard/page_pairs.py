"""Pairs: what the captioner made of a short caption, beside it, with the clip that both are of."""

from __future__ import annotations

import base64
from typing import Any

import streamlit as st

from cluster.dashboard import keyframes, lance_sql, look, markup, pairs
from cluster.dashboard.places import Places
from engine import tables

PER_PAGE = 8
_PICTURES = 3
_ALL = "all"
_SCORES = (
    ("clip_score", "CLIP score"),
    ("repetition_2gram", "repeated 2-grams"),
    ("repetition_5gram", "5-grams"),
    ("repetition_10gram", "10-grams"),
)


def show(places: Places) -> None:
    """The page."""
    look.begin(
        "Pairs", "What was asked, the short caption, what the captioner made of it, and the clip."
    )
    markup.style()
    if tables.identity(places.dataset)["recipe"] == "tiny":
        look.meaningless("captions are of small random models")
    if not lance_sql.has_rows(places.dataset, "pairs"):
        look.empty(
            "There are no pairs yet.",
            f"`python pipelines/recaption.py --src {places.dataset}` makes RISE-T2V's training"
            " pairs of the clips that are kept.",
        )
        return
    counted = pairs.counts(places.dataset).to_pylist()
    _summary(counted)
    which = _filter(counted)
    total = pairs.num(places.dataset, which)
    if not total:
        st.info("No pair passes these filters.", icon=":material/filter_alt_off:")
        return
    page = _page(total)
    rows = pairs.found(places.dataset, which, page * PER_PAGE, PER_PAGE)
    markup.show(
        '<div class="notes"><span class="kept">word for word</span> in both &nbsp;'
        ' <s>not in the rephrased text</s> &nbsp; <mark class="added">added by the captioner</mark>'
        "</div>"
    )
    ids = [row["clip_id"] for row in rows]
    pictures = keyframes.found(places.dataset, ids, keyframes.PAIR_PX, most=_PICTURES)
    for row in rows:
        _card(row, [jpeg for _, jpeg in pictures.get(row["clip_id"], []) if jpeg])


def _summary(counted: list[dict[str, Any]]) -> None:
    """How many there are, by instruction and state."""
    total = sum(row["num_pairs"] for row in counted)
    kept = sum(row["num_pairs"] for row in counted if row["state"] == "kept")
    figures = st.columns(4)
    figures[0].metric("Pairs", look.count(total))
    figures[1].metric("Kept", look.count(kept), help="of these, training learns from")
    figures[2].metric("Share kept", look.share(kept, total))
    reasons = [row for row in counted if row["reason"]]
    first = max(reasons, key=lambda row: row["num_pairs"], default=None)
    figures[3].metric(
        "Most common reason", look.verbatim(first["reason"]) if first else "–",
        help=f"{look.count(first['num_pairs'])} pairs" if first else None,
    )  # fmt: skip
    by: dict[str, dict[str, int]] = {}
    for row in counted:
        of = by.setdefault(row["instruction"] or "–", {})
        of[row["state"] or "–"] = of.get(row["state"] or "–", 0) + row["num_pairs"]
    states = [s for s in look.STATES if any(s in of for of in by.values())]
    heads = ["Instruction", *(markup.text(s) for s in states), "all", ""]
    rows = []
    for name, of in by.items():
        whole = sum(of.values())
        bars = "".join(markup.bar(of.get(s, 0) / whole, look.STATES[s], 220) for s in states
                       if of.get(s))  # fmt: skip
        numbers = [look.count(of.get(s, 0)) for s in states]
        rows.append([markup.text(name), *numbers, look.count(whole), bars])
    markup.show(markup.table(heads, rows, left=[len(heads) - 1]))


def _filter(counted: list[dict[str, Any]]) -> pairs.Filter:
    def choose(place: Any, label: str, column: str) -> str | None:
        values = sorted({row[column] for row in counted if row[column] is not None})
        chosen = place.selectbox(
            label, [_ALL, *values], key=f"pairs_{column}", disabled=not values,
            bind="query-params",
        )  # fmt: skip
        return None if chosen == _ALL else chosen

    places = st.columns([1.1, 1, 1, 1.4, 2])
    return pairs.Filter(
        instruction=choose(places[0], "Instruction", "instruction"),
        state=choose(places[1], "State", "state"),
        language=choose(places[2], "Language", "language"),
        reason=choose(places[3], "Reason", "reason"),
        words=places[4].text_input(
            "Text",
            key="pairs_words",
            bind="query-params",
            placeholder="words in either text",
            type="search",
        ),
    )


def _page(total: int) -> int:
    """Which one is shown, from 0."""
    last = (total - 1) // PER_PAGE
    if last == 0:
        st.caption(f"{look.count(total)} pair{'s' * (total != 1)}")
        return 0
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    page = right.number_input(f"Page, of {last + 1:,}", 1, last + 1, key="pairs_page") - 1
    first = page * PER_PAGE
    left.caption(
        f"{look.count(total)} pairs, {first + 1:,} to {min(first + PER_PAGE, total):,} shown"
    )
    return page


def _card(row: dict[str, Any], pictures: list[bytes]) -> None:
    """One pair."""
    original, rephrased = pairs.marked(row["original"] or "", row["rephrased"] or "")
    with st.container(border=True):
        head, instruction = st.columns([6, 1], vertical_alignment="center")
        with head:
            markup.show(_marks(row))
        if row["instruction_text"]:
            with instruction.popover("Instruction", type="tertiary", width="stretch"):
                st.text(row["instruction_text"])
        left, middle, right = st.columns([1.15, 1, 1.5], gap="medium")
        with left:
            markup.show(_pictures(pictures), _facts(row))
        given = {"given": "found beside the input", "generated": "generated"}
        source = given.get(row["original_source"], "source not known")
        with middle:
            markup.show(markup.labelled(f"Original, {source}", original))
        with right:
            nothing = '<span class="dim">none</span>'
            markup.show(markup.labelled("Rephrased", rephrased or nothing), _scores(row))


def _pictures(pictures: list[bytes]) -> str:
    if not pictures:
        return '<div class="dim">no keyframes</div>'
    return (
        '<div class="strip">'
        + "".join(
            f'<img alt="keyframe" src="data:image/jpeg;base64,{base64.b64encode(one).decode()}">'
            for one in pictures
        )
        + "</div>"
    )


def _facts(row: dict[str, Any]) -> str:
    name = (row["source_uri"] or "").rpartition("/")[2]
    span = ""
    if row["start_s"] is not None:
        span = f"{row['start_s']:.1f} – {row['end_s']:.1f} s of "
    return f'<div class="notes">{span}{markup.text(name)}</div>'


def _marks(row: dict[str, Any]) -> str:
    state = row["state"] or "not judged"
    parts = [markup.chip(state, look.STATES.get(state, look.SERIES[-1]))]
    parts += [markup.chip(row[name]) for name in ("instruction", "language") if row[name]]
    if row["caption_fault"]:
        parts.append(markup.chip(row["caption_fault"]))
    why = row["reason"] or (f"{row['error_type']}: {row['error']}" if row["error_type"] else "")
    return f'<div>{"".join(parts)} <span class="dim">{markup.text(why)}</span></div>'


def _scores(row: dict[str, Any]) -> str:
    kept = pairs.kept_share(row["original"] or "", row["rephrased"] or "")
    told = [] if kept is None else [f"{100 * kept:.0f} % of the original word for word"]
    told += [f"{label} {row[name]:.3f}" for name, label in _SCORES if row[name] is not None]
    return f'<div class="notes facts">{"".join(f"<span>{one}</span>" for one in told)}</div>'
