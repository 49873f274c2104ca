"""Pieces of HTML for pages: tables, marks, trees. All text that comes from data is escaped here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import streamlit as st

_CSS = """
<style>
  .rw {font-size: .875rem; line-height: 1.45;}
  .rw-scroll {overflow-x: auto; margin: .2rem 0 .6rem;}
  .rw table {border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;}
  .rw th, .rw td {border: 0; border-bottom: 1px solid color-mix(in srgb, currentColor 13%,
    transparent); padding: .42rem .75rem; vertical-align: top; text-align: right;}
  .rw th {font-weight: 600; opacity: .72; vertical-align: bottom; font-size: .8rem;}
  .rw th:first-child, .rw td:first-child, .rw .l {text-align: left;}
  .rw tr:last-child td {border-bottom: 0;}
  .rw small {opacity: .66; font-size: .76rem; display: block; white-space: nowrap;}
  .rw sup {opacity: .6; font-size: .7em;}
  .rw .best {font-weight: 700;}
  .rw .second {text-decoration: underline; text-underline-offset: 3px;}
  .rw .dim {opacity: .62;}
  .rw .notes {font-size: .78rem; opacity: .75; margin: .1rem 0;}
  .rw .chip {display: inline-block; border-radius: 1rem; padding: .02rem .55rem; font-size: .76rem;
    border: 1px solid color-mix(in srgb, currentColor 22%, transparent); margin-right: .3rem;}
  .rw .chip.state {color: #fff; border-color: transparent;}
  .rw .bar {display: inline-block; height: .5rem; border-radius: .2rem; vertical-align: middle;}
  .rw mark.added {background: color-mix(in srgb, #3d7dca 24%, transparent); color: inherit;
    border-radius: .2rem; padding: 0 .08rem;}
  .rw .kept {font-weight: 600; text-decoration: underline dotted; text-underline-offset: 3px;}
  .rw s {opacity: .5;}
  .rw .label {font-size: .74rem; opacity: .62; margin: .45rem 0 .1rem;}
  .rw .label:first-child {margin-top: 0;}
  .rw .words {font-size: .95rem; line-height: 1.55; overflow-wrap: anywhere;}
  .rw .strip {display: flex; gap: 4px;}
  .rw .strip img {flex: 1 1 0; min-width: 0; max-width: 50%; aspect-ratio: 4 / 3;
    object-fit: cover; border-radius: 4px;}
  .rw .facts {margin-top: .5rem; display: flex; flex-wrap: wrap; gap: 0 .9rem;}
  .rw .facts span {white-space: nowrap;}
  .rw details {margin-left: .9rem;}
  .rw summary {cursor: pointer; font-weight: 600;}
  .rw .leaf {margin-left: 1.9rem;}
  .rw .leaf b {font-weight: 500; opacity: .7;}
  .rw code {font-size: .8rem;}
</style>
"""


def style() -> None:
    """Once on a page that shows any of these."""
    st.html(_CSS)


def text(value: object) -> str:
    """Anything as text that HTML takes as such."""
    return html.escape(str(value))


def show(*parts: str) -> None:
    """Puts pieces on the page."""
    st.html(f'<div class="rw">{"".join(parts)}</div>')


def table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, left: Iterable[int] = (), name: str = ""
) -> str:
    """A table of pieces; the first column and those of `left` are words, the others numbers."""
    words = {0, *left}

    def line(cells: Sequence[str], tag: str) -> str:
        looks = (' class="l"' if number in words else "" for number in range(len(cells)))
        return "".join(f"<{tag}{how}>{c}</{tag}>" for how, c in zip(looks, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    named = f' id="{name}"' if name else ""
    head = f"<thead><tr>{line(heads, 'th')}</tr></thead>" if any(heads) else ""
    return f'<div class="rw-scroll"><table{named}>{head}<tbody>{body}</tbody></table></div>'


def chip(label: object, colour: str = "") -> str:
    """A small mark around a word."""
    look = f' state" style="background: {colour}' if colour else ""
    return f'<span class="chip{look}">{text(label)}</span>'


def bar(share: float, colour: str, width_px: int = 120) -> str:
    """A length that is a share of the whole."""
    wide = max(1, round(width_px * min(max(share, 0.0), 1.0)))
    return f'<span class="bar" style="width: {wide}px; background: {colour}"></span>'


def dot(colour: str) -> str:
    """What tells a line of a chart in a table beside it."""
    return (
        '<span style="display: inline-block; width: .65rem; height: .65rem; border-radius: 50%;'
        f' margin-right: .5rem; background: {colour}"></span>'
    )


def labelled(label: str, *parts: str) -> str:
    """Words under a small heading."""
    return f'<div class="label">{text(label)}</div><div class="words">{"".join(parts)}</div>'


def tree(value: Any, name: str = "", *, is_open: bool = True, depth: int = 0) -> str:
    """Nested values as a tree that opens and closes; short ones stand in one line."""
    if not isinstance(value, Mapping | list):
        return f'<div class="leaf"><b>{text(name)}</b> {text(_plain(value))}</div>'
    if isinstance(value, list) and not any(isinstance(v, Mapping | list) for v in value):
        said = ", ".join(_plain(v) for v in value) or "none"
        return f'<div class="leaf"><b>{text(name)}</b> {text(said)}</div>'
    if isinstance(value, Mapping):
        parts = [(str(k), v) for k, v in value.items()]
    else:
        parts = [(name_of(v) or str(number), v) for number, v in enumerate(value)]
    inner = "".join(tree(v, k, is_open=depth < 1, depth=depth + 1) for k, v in parts)
    if not name:
        return inner
    count = f' <span class="dim">{len(parts):,}</span>' if isinstance(value, list) else ""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{text(name)}{count}</summary>{inner}</details>"


_NAMES = ("name", "operator", "column", "prompt")


def name_of(value: Any) -> str | None:
    """What an entry of a recipe's list is called."""
    if not isinstance(value, Mapping):
        return None
    return next((str(value[key]) for key in _NAMES if value.get(key)), None)


def _plain(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
