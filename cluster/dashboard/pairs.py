"""RISE's quadruples for the page that shows them: what is there, found by filter, with pictures."""

from __future__ import annotations

import difflib
import io
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cluster.dashboard import lance_sql, markup
from engine.blobs import take_blobs

SHOWN = (
    "pair_id", "clip_id", "source_uri", "media", "start_s", "end_s", "instruction",
    "instruction_text", "language", "original", "original_source", "rephrased", "caption_fault",
    "repetition_2gram", "repetition_5gram", "repetition_10gram", "clip_score", "state", "stage",
    "reason", "error_type", "error",
)  # fmt: skip
"""Columns of a pair on the page."""
THUMBNAIL_PX = 120
"""Height of a keyframe."""
# words, single signs of scripts without spaces, and other signs; each with the space behind it
_TOKENS = re.compile(
    r"([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
    r"|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\w\s]|_)(\s*)"
)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which pairs are shown; None is all."""

    instruction: str | None = None
    state: str | None = None
    language: str | None = None
    reason: str | None = None
    words: str = ""
    """In the original or the rephrased text, in any case."""

    def where(self) -> str | None:
        """As Lance's predicate."""
        parts = [
            f"{name} = {_quoted(value)}"
            for name in ("instruction", "state", "language", "reason")
            if (value := getattr(self, name)) is not None
        ]
        if self.words.strip():
            sought = _quoted(self.words.strip().lower())
            columns = ("original", "rephrased")
            found = " OR ".join(f"strpos(lower({name}), {sought}) > 0" for name in columns)
            parts.append(f"({found})")
        return " AND ".join(parts) or None


def counts(root: str) -> pa.Table:
    """Pairs by instruction, language, state and reason."""
    return lance_sql.streamed(
        root,
        "pairs",
        ("instruction", "language", "state", "reason"),
        "SELECT instruction, language, state, reason, count(*) AS num_pairs FROM rows"
        " GROUP BY ALL ORDER BY num_pairs DESC, reason",
    )


def found(root: str, which: Filter, offset: int, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """How many pairs pass a filter, and some of them in the table's order."""
    table = lance_sql.newest(root, "pairs")
    names = [name for name in SHOWN if name in table.schema.names]
    where = which.where()
    rows = table.to_table(columns=names, filter=where, offset=offset, limit=limit).to_pylist()
    return table.count_rows(where), [dict.fromkeys(SHOWN) | row for row in rows]


def keyframes(root: str, clip_ids: Sequence[str], most: int) -> dict[str, list[bytes]]:
    """Small pictures of clips in the order of time, evenly chosen, as JPEG."""
    wanted = ", ".join(_quoted(one) for one in dict.fromkeys(clip_ids))
    if not wanted or not lance_sql.has_rows(root, "keyframes"):
        return {}
    table = lance_sql.newest(root, "keyframes")
    rows = table.to_table(
        columns=["clip_id", "time_s"], filter=f"clip_id IN ({wanted})", with_row_id=True
    ).to_pylist()
    of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["time_s"] or 0.0):
        of[row["clip_id"]].append(row)
    chosen = [row for listed in of.values() for row in _spread(listed, most)]
    blobs = take_blobs(table, "jpeg", ids=[row["_rowid"] for row in chosen]) if chosen else []
    made: dict[str, list[bytes]] = defaultdict(list)
    for row, blob in zip(chosen, blobs, strict=True):
        made[row["clip_id"]].append(small(blob.read()))
    return dict(made)


def small(jpeg: bytes, height_px: int = THUMBNAIL_PX * 2) -> bytes:
    """A picture made smaller, sharp on dense screens."""
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        if image.height <= height_px:
            return jpeg
        size = round(image.width * height_px / image.height), height_px
        image.draft("RGB", size)
        out = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=85)
        return out.getvalue()


def marked(original: str, rephrased: str) -> tuple[str, str]:
    """Both texts as HTML: what is kept word for word, what went, what was added.

    Words count as kept where they come in the same order, in any case.
    """
    old, new = (_TOKENS.findall((said or "").lstrip()) for said in (original, rephrased))
    before, after = list[str](), list[str]()
    for kind, a, b, c, d in _matcher(old, new).get_opcodes():
        is_kept = kind == "equal" and any(word.isalnum() for word, _ in old[a:b])
        same = '<span class="kept">' if is_kept else "<span>"
        is_same = kind == "equal"
        before.append(_within(same if is_same else "<s>", old[a:b]))
        after.append(_within(same if is_same else '<mark class="added">', new[c:d]))
    return "".join(before), "".join(after)


def kept_share(original: str, rephrased: str) -> float | None:
    """Share of the original's words that the rephrased text has word for word, in their order."""
    old, new = (
        [token for token in _TOKENS.findall(said or "") if token[0].isalnum()]
        for said in (original, rephrased)
    )
    if not old:
        return None
    return sum(block.size for block in _matcher(old, new).get_matching_blocks()) / len(old)


_Tokens = list[tuple[str, str]]


def _matcher(old: _Tokens, new: _Tokens) -> difflib.SequenceMatcher[str]:
    words = ([word.casefold() for word, _ in one] for one in (old, new))
    return difflib.SequenceMatcher(None, *words, autojunk=False)


def _within(tag: str, tokens: _Tokens) -> str:
    """Words within a tag, the space behind the last one outside."""
    if not tokens:
        return ""
    inner = "".join(word + space for word, space in tokens)
    words = inner.rstrip()
    end = tag.split()[0].strip("<>")
    return f"{tag}{markup.text(words)}</{end}>{inner[len(words) :]}"


def _spread(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    if len(rows) <= most:
        return rows
    return [rows[i * (len(rows) - 1) // (most - 1)] for i in range(most)] if most > 1 else rows[:1]


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
