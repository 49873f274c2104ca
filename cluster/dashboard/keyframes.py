"""Keyframes for pages: some of each clip, made small."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lance
import streamlit as st
from PIL import Image

from cluster.dashboard import lance_sql
from engine.blobs import take_blobs

CARD_PX = 320
PAIR_PX = 400
RECORD_PX = 1280
"""Longest sides, sharp on dense screens."""
Keyframe = tuple[float | None, bytes]
"""Its time in the source, in s, and a JPEG: empty where what is stored cannot be read."""


def found(
    root: str, clip_ids: Sequence[str], longest_px: int, most: int | None = None
) -> dict[str, list[Keyframe]]:
    """Keyframes of each clip that has any, in the order of time.

    Args:
        root: The dataset.
        clip_ids: Of which clips.
        longest_px: Larger pictures are made smaller.
        most: So many of each at most, evenly chosen; of one it is the middle.
    """
    if not clip_ids or not lance_sql.has_rows(root, "keyframes"):
        return {}
    table = lance_sql.newest(root, "keyframes")
    return _found(table, tuple(dict.fromkeys(clip_ids)), longest_px, most)


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _found(
    table: lance.LanceDataset, clip_ids: tuple[str, ...], longest_px: int, most: int | None
) -> dict[str, list[Keyframe]]:
    rows = table.to_table(
        columns=["clip_id", "time_s"],
        filter=f"clip_id IN ({', '.join(map(lance_sql.quoted, clip_ids))})",
        with_row_id=True,
    ).to_pylist()
    of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["time_s"] or 0.0):
        of[row["clip_id"]].append(row)
    chosen = [row for some in of.values() for row in _spread(some, most)]
    blobs = take_blobs(table, "jpeg", ids=[row["_rowid"] for row in chosen]) if chosen else []
    made: dict[str, list[Keyframe]] = {clip_id: [] for clip_id in of}
    for row, blob in zip(chosen, blobs, strict=True):
        jpeg = b"" if blob is None else small(blob.read(), longest_px)
        made[row["clip_id"]].append((row["time_s"], jpeg))
    return made


def _spread(rows: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    if most is None or len(rows) <= most:
        return rows
    if most == 1:
        return [rows[len(rows) // 2]]
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)]


def small(jpeg: bytes, longest_px: int) -> bytes:
    """A JPEG made smaller, unless it is small already; empty where it cannot be read."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as picture:
            if max(picture.size) <= longest_px:
                return jpeg
            picture.draft("RGB", (longest_px, longest_px))
            picture.thumbnail((longest_px, longest_px))
            out = io.BytesIO()
            picture.convert("RGB").save(out, "JPEG", quality=85)
            return out.getvalue()
    except (OSError, Image.DecompressionBombError):
        return b""
