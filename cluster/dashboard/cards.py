"""Clips as cards in a grid: a keyframe, how long it is, what became of it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import streamlit as st

from cluster.dashboard import keyframes, look, markup

_CSS = """
<style>
  .rw-card {border-radius: .45rem; overflow: hidden; line-height: 1.35;
    background: color-mix(in srgb, currentColor 5%, transparent);
    border: 1px solid color-mix(in srgb, currentColor 12%, transparent);}
  .rw-card .picture {position: relative; aspect-ratio: 16 / 9; background: #0c0e11;
    display: flex; align-items: center; justify-content: center; color: #8a93a3;
    font-size: .78rem;}
  .rw-card img {width: 100%; height: 100%; object-fit: contain; display: block;}
  .rw-card .length {position: absolute; right: .35rem; bottom: .35rem; color: #fff;
    background: rgba(0, 0, 0, .66); border-radius: .25rem; padding: 0 .35rem; font-size: .72rem;
    font-variant-numeric: tabular-nums;}
  .rw-card .words {padding: .4rem .55rem .5rem; border-top: 3px solid var(--state);
    font-size: .78rem;}
  .rw-card .name {white-space: nowrap; overflow: hidden; text-overflow: ellipsis;
    font-weight: 600;}
  .rw-card .why {white-space: nowrap; overflow: hidden; text-overflow: ellipsis;}
  .rw-card .beside {opacity: .66; white-space: pre; overflow: hidden; text-overflow: ellipsis;
    font-variant-numeric: tabular-nums; min-height: 1.05rem;}
  a.rw-link {color: inherit !important; text-decoration: none !important; display: block;}
  [class*="st-key-card-"] {position: relative;}
  [class*="st-key-card-"]:hover .rw-card, a.rw-link:hover .rw-card {border-color: #3d7dca;}
  [class*="st-key-card-"] [data-testid="stElementContainer"]:has([data-testid="stButton"]) {
    position: absolute; inset: 0; width: 100% !important; height: 100%;}
  [class*="st-key-card-"] [data-testid="stButton"],
  [class*="st-key-card-"] button {width: 100%; height: 100%; opacity: 0; min-height: 0;}
  [class*="st-key-card-"]:has(button:focus-visible) .rw-card {outline: 2px solid #3d7dca;}
</style>
"""


def style() -> None:
    """Once on a page that shows cards."""
    st.html(_CSS)


def grid(
    root: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    open_clip: Callable[[str], None] | None = None,
    beside: Callable[[Mapping[str, Any]], str] = lambda _: "",
    columns: int = 6,
    key: str = "",
) -> None:
    """Clips in rows of cards.

    Args:
        root: The dataset.
        rows: With `clips.CARD`.
        open_clip: Called with the id of a card that is clicked; None: a click opens a new tab.
        beside: What stands below, a line or more.
        columns: Cards in a row.
        key: Tells grids on one page apart.
    """
    ids = [row["clip_id"] for row in rows]
    pictures = keyframes.found(root, ids, keyframes.CARD_PX, most=1)
    for start in range(0, len(rows), columns):
        places = st.columns(columns, gap="small")
        for place, row in zip(places, rows[start : start + columns], strict=False):
            clip_id = row["clip_id"]
            ((_, jpeg),) = pictures.get(clip_id) or [(None, b"")]
            card = _card(row, jpeg, beside(row))
            with place:
                if open_clip is None:
                    link = f'<a class="rw-link" target="_blank" href="clips?clip={quote(clip_id)}">'
                    st.html(f"{link}{card}</a>")
                    continue
                with st.container(key=f"card-{key}{clip_id}", gap=None):
                    st.html(card)
                    st.button(
                        f"Open {look.verbatim(name_of(row))}",
                        key=f"open-{key}{clip_id}",
                        on_click=open_clip,
                        args=(clip_id,),
                    )


def _card(row: Mapping[str, Any], jpeg: bytes, beside: str) -> str:
    state = row["state"] or "pending"
    colour = look.STATES.get(state, "#8a93a3")
    picture = "no keyframe"
    if jpeg:
        picture = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
    lasts = "image" if row["media"] == "image" else look.seconds(row["duration_s"])
    why = row["reason"] or (f"{state}: {row['stage']}" if row["stage"] else state)
    return (
        f'<div class="rw-card" style="--state: {colour}"><div class="picture">{picture}'
        f'<span class="length">{lasts}</span></div><div class="words">'
        f'<div class="name" title="{markup.text(row["source_uri"])}">{markup.text(name_of(row))}'
        f'</div><div class="why">{markup.text(why)}</div>'
        f'<div class="beside">{markup.text(beside)}</div></div></div>'
    )


def name_of(row: Mapping[str, Any]) -> str:
    """The name of a clip's source, and where in it the clip begins."""
    name = (row["source_uri"] or "").rstrip("/").rsplit("/", 1)[-1] or "no source"
    return f"{name} · {row['start_s']:.1f} s" if row["start_s"] else name
