"""RISE-T2V's quadruples: of each kept clip an instruction, a caption, and the caption rephrased.

A quadruple is a row of `pairs`. Its rows are made here; what is written into them is measured by
operators, judged and accounted for as clips are.

Source: RISE-T2V (arXiv 2511.04317), "Adapting Rephrasing Feature": (y_inst, y_ori, y_rephrase, x0).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from engine import chain
from engine.measuring import Measuring
from engine.operator import Stage
from engine.schema import PAIRS
from engine.tables import Writer
from engine.worker import NAMESPACE

if TYPE_CHECKING:
    from engine.caption import Instruction

_OF_CLIP = ("clip_id", "source_id", "source_uri", "media", "start_s", "end_s")
_TEXTS = ("original", "rephrased")


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which pairs are made, and how."""

    instruction: Instruction
    """y_inst."""
    stages: tuple[Stage, ...]
    """Operators and rules over rows of `pairs`."""
    language: str | None = None
    """Of the originals, for an instruction that names it."""

    @property
    def where(self) -> str:
        """SQL predicate of its rows."""
        language = f"= '{self.language}'" if self.language else "IS NULL"
        return f"instruction = '{self.instruction.name}' AND language {language}"


def prepare(
    writer: Writer, pairs: Pairs, clip_stages: tuple[Stage, ...], *, retry_failed: bool
) -> None:
    """Makes the rows of the pairs that are to be, and takes away those that are no more.

    A clip that is gone takes its pairs along. Where the captioner or the instruction changed, or a
    caption found beside the input did, the pairs are made anew.
    """
    operators = [o for s in pairs.stages for o in s.measures]
    keys = chain.keys(pairs.stages, given=_given(clip_stages))
    known = writer.keys("pairs", pairs.where)
    if any(known.get(name) != keys.get(name) for name in _TEXTS):
        stale = writer.table("pairs").to_table(columns=["pair_id"], filter=pairs.where)
        writer.remove("pairs", "pair_id", stale["pair_id"].to_pylist())
    there = _current(writer, pairs)
    # before new rows come in: captions that were given are no operator's to forget
    writer.adopt("pairs", operators, keys, where=pairs.where, retry_failed=retry_failed)
    kept = writer.table("clips").to_table(columns=[*_OF_CLIP, "caption_original"], filter="kept")
    rows = [
        _row(clip, pairs)
        for clip in kept.to_pylist()
        if _pair_id(clip["clip_id"], pairs) not in there
    ]
    writer.append("pairs", pa.Table.from_pylist(rows, schema=PAIRS))
    writer.publish(pairs.stages, "pairs")


def _given(clip_stages: tuple[Stage, ...]) -> dict[str, str]:
    """Keys of what pairs read of their clips."""
    keys = chain.keys(clip_stages)
    operators = [o for s in clip_stages for o in s.measures]
    return {name: keys[o.marker] for o in operators for name in o.writes.names}


def _current(writer: Writer, pairs: Pairs) -> set[str]:
    """Ids of the pairs that are there and stay; the others are removed."""
    columns = ["pair_id", "clip_id", "original", "original_source"]
    stored = writer.table("pairs").to_table(columns=columns, filter=pairs.where).to_pylist()
    if not stored:
        return set()
    clips = writer.table("clips").to_table(columns=["clip_id", "caption_original"])
    captions = dict(
        zip(clips["clip_id"].to_pylist(), clips["caption_original"].to_pylist(), strict=True)
    )
    gone = []
    for pair in stored:
        given = captions.get(pair["clip_id"])
        was_given = pair["original"] if pair["original_source"] == "given" else None
        if pair["clip_id"] not in captions or given != was_given:
            gone.append(pair["pair_id"])
    writer.remove("pairs", "pair_id", gone)
    return {pair["pair_id"] for pair in stored} - set(gone)


def _pair_id(clip_id: str, pairs: Pairs) -> str:
    return str(uuid.uuid5(NAMESPACE, f"{clip_id}:{pairs.instruction.name}:{pairs.language or ''}"))


def _row(clip: dict[str, Any], pairs: Pairs) -> dict[str, Any]:
    given = clip["caption_original"]
    return {name: clip[name] for name in _OF_CLIP} | {
        "pair_id": _pair_id(clip["clip_id"], pairs),
        "media": clip["media"] or "video",
        "instruction": pairs.instruction.name,
        "instruction_text": pairs.instruction.text,
        "language": pairs.language,
        "original": given,
        "original_source": "given" if given else None,
        "state": "pending",
        "kept": False,
    }


def pair(
    writer: Writer,
    pairs: Pairs,
    clip_stages: tuple[Stage, ...],
    *,
    retry_failed: bool,
    measure: Callable[[Measuring], None],
    measuring: Callable[..., Measuring],
) -> None:
    """Makes the pairs of all kept clips that have none yet, and judges them.

    Args:
        writer: Of the dataset.
        pairs: Which.
        clip_stages: Those of the clips, whose embeddings pairs read.
        retry_failed: Final failures too.
        measure: Runs measurements to their end.
        measuring: Makes them: called with the stages, `name` and `where`.
    """
    prepare(writer, pairs, clip_stages, retry_failed=retry_failed)
    try:
        measure(measuring(pairs.stages, name="pairs", where=pairs.where))
    finally:
        writer.publish(pairs.stages, "pairs")
