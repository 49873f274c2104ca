"""RISE's quadruples for the page that shows them: what is there, found by filter, with pictures."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa
import streamlit as st

from cluster.dashboard import lance_sql, markup
from cluster.dashboard.lance_sql import quoted

SHOWN = (
    "pair_id", "clip_id", "source_uri", "media", "start_s", "end_s", "instruction",
    "instruction_text", "language", "original", "original_source", "rephrased", "caption_fault",
    "repetition_2gram", "repetition_5gram", "repetition_10gram", "clip_score", "state", "stage",
    "reason", "error_type", "error",
)  # fmt: skip
"""Columns of a pair on the page."""
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
            f"{name} = {quoted(value)}"
            for name in ("instruction", "state", "language", "reason")
            if (value := getattr(self, name)) is not None
        ]
        if self.words.strip():
            sought = quoted(self.words.strip().lower())
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


def num(root: str, which: Filter) -> int:
    """How many pairs pass."""
    return _num(lance_sql.newest(root, "pairs"), which)


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _num(table: lance.LanceDataset, which: Filter) -> int:
    return table.count_rows(which.where())


def found(root: str, which: Filter, offset: int, limit: int) -> list[dict[str, Any]]:
    """Some of the pairs that pass, in the table's order."""
    return _found(lance_sql.newest(root, "pairs"), which, offset, limit)


@st.cache_data(max_entries=64, show_spinner=False, hash_funcs=lance_sql.BY_STAMP)
def _found(
    table: lance.LanceDataset, which: Filter, offset: int, limit: int
) -> list[dict[str, Any]]:
    names = [name for name in SHOWN if name in table.schema.names]
    rows = table.to_table(columns=names, filter=which.where(), offset=offset, limit=limit)
    return [dict.fromkeys(SHOWN) | row for row in rows.to_pylist()]


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
