"""What views of an evaluation have in common: a dimension to choose, and two models."""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from cluster.dashboard.evaluation import Evaluation, short, title

DASH = "–"
"""Of a number that there is not."""


def dimension(names: Sequence[str], key: str) -> str:
    """One of these, of the score or of its drift."""
    return st.selectbox("Dimension", names, key=key, format_func=title)


def two_models(one: Evaluation, key: str) -> tuple[str, str]:
    """Two of the models, different ones at first; they may be made the same."""
    left, right = st.columns(2)
    a = left.selectbox("Model", one.models, key=f"{key} a", format_func=short)
    rest = min(1, len(one.models) - 1)
    b = right.selectbox("against", one.models, index=rest, key=f"{key} b", format_func=short)
    return a, b
