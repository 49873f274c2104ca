"""How pages look: colours for both themes, numbers with units, charts in one style."""

from __future__ import annotations

import re

import altair as alt
import streamlit as st

STATES = {
    "kept": "#2f9e6e",
    "rejected": "#d9635b",
    "failed": "#a14bb0",
    "duplicate": "#8a93a3",
    "pending": "#d9a441",
}
"""A colour for each state of a row; legible on light and on dark."""
GREY = "#8a93a3"
"""Legible on both grounds."""
SERIES = ("#3d7dca", "#e08a3c", "#2f9e6e", "#c4588c", "#8b6fd1", "#4ba3b5", "#b3894d", "#7a8699")
"""Of models and runs, in the order in which they are shown."""
THEME = {
    "theme.primaryColor": "#3d7dca",
    "theme.font": "sans-serif",
    "theme.baseRadius": "0.4rem",
    "theme.light.backgroundColor": "#fbfbfa",
    "theme.light.secondaryBackgroundColor": "#f1f2f0",
    "theme.light.textColor": "#23282f",
    "theme.light.borderColor": "#dfe2de",
    "theme.dark.backgroundColor": "#16191d",
    "theme.dark.secondaryBackgroundColor": "#1f2429",
    "theme.dark.textColor": "#dde2e8",
    "theme.dark.borderColor": "#343b43",
}
"""Settings of Streamlit, given on its command line."""

_CSS = """
<style>
  .block-container {padding-top: 3.2rem; max-width: 1400px;}
  h1 {font-size: 1.7rem !important; font-weight: 650 !important; padding-bottom: .2rem;}
  h2 {font-size: 1.2rem !important; font-weight: 600 !important;}
  h3 {font-size: 1.0rem !important; font-weight: 600 !important;}
  [data-testid="stMetricValue"] {font-size: 1.5rem; font-variant-numeric: tabular-nums;}
  [data-testid="stMetricLabel"] {opacity: .75;}
  [data-testid="stDataFrame"] {font-variant-numeric: tabular-nums;}
</style>
"""


def begin(title: str, about: str) -> None:
    """A page's head: what it shows, and a line that says of what."""
    st.html(_CSS)
    st.title(title, anchor=False)
    st.caption(about)


def empty(what: str, do: str) -> None:
    """In place of a page that has nothing to show: what is not there, and what makes it."""
    st.info(f"**{what}**\n\n{do}", icon=":material/inbox:")


def verbatim(text: object) -> str:
    """Anything as text on one line that Markdown takes as such; not for within backticks."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(str(text).split()))


def count(number: int | None) -> str:
    """A count as people read it: 1,234,567."""
    return "–" if number is None else f"{number:,}"


def share(part: float, whole: float) -> str:
    """A part of a whole, in percent."""
    return "–" if not whole else f"{100 * part / whole:.1f} %"


def seconds(value: float | None) -> str:
    """A time as people read it: 8.4 s, 12 min, 3.1 h, 2.5 d."""
    if value is None:
        return "–"
    for limit, unit, size in ((120, "s", 1), (7_200, "min", 60), (172_800, "h", 3600)):
        if value < limit:
            return (
                f"{value / size:.1f} {unit}" if value / size < 20 else f"{value / size:.0f} {unit}"
            )
    return f"{value / 86_400:.1f} d"


def hours(value: float | None) -> str:
    """An amount of video: 45 s, 12.4 min, 1,234.5 h."""
    if value is None:
        return "–"
    for limit, unit, each in ((120, "s", 1), (7_200, "min", 60)):
        if value < limit:
            return f"{value / each:.1f} {unit}"
    return f"{value / 3600:,.1f} h"


def size(num_bytes: int | None) -> str:
    """A size as people read it: 512 B, 3.4 MB."""
    if num_bytes is None:
        return "–"
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def chart(made: alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart) -> None:
    """Shows a chart in Streamlit's theme, as wide as its place."""
    st.altair_chart(made, width="stretch", theme="streamlit")


def meaningless(what: str) -> None:
    """Over numbers and videos of small random models."""
    st.warning(f"**MEANINGLESS**: {what}.", icon=":material/science:")
