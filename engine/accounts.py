"""The accounts of a dataset: every source and every clip in exactly one state, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lance
import pyarrow as pa
import pyarrow.compute as pc

from engine.sources import Listing

SOURCE_STATES = ("done", "failed", "duplicate")
CLIP_STATES = ("kept", "rejected", "failed", "duplicate", "pending")


@dataclass(frozen=True, kw_only=True)
class Accounts:
    """Counts by state, and what does not add up."""

    sources: dict[str, int]
    """total, done, failed, duplicate (the total is their sum), and ignored files beside them."""
    clips: dict[str, int]
    """total and its five states."""
    reasons: dict[str, int]
    """Rejected clips by reason."""
    faults: tuple[str, ...]
    """One line for each thing that does not add up; empty when the accounts balance."""

    def as_dict(self) -> dict[str, Any]:
        """The counts, as they are printed and stored."""
        return {"sources": self.sources, "clips": self.clips, "reasons": self.reasons}


def balance(table: Callable[[str], lance.LanceDataset], listing: Listing | None) -> Accounts:
    """Counts a dataset and checks that nothing vanished, nothing is double, and all is decided.

    Args:
        table: Gives a table by name.
        listing: What the run was asked for; None to check the dataset by itself.
    """
    sources = table("sources").to_table(columns=["source_id", "uri", "state", "num_clips"])
    clips = table("clips").to_table(columns=["clip_id", "source_id", "state", "reason"])
    of_sources = _count(sources["state"])
    of_clips = _count(clips["state"])
    rejected = clips.filter(pc.equal(clips["state"], "rejected"))
    reasons = _count(rejected["reason"])
    return Accounts(
        sources={"total": sources.num_rows}
        | {s: of_sources.get(s, 0) for s in SOURCE_STATES}
        | {"ignored": listing.ignored if listing else 0},
        clips={"total": clips.num_rows} | {s: of_clips.get(s, 0) for s in CLIP_STATES},
        reasons=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        faults=tuple(_faults(sources, clips, of_sources, of_clips, listing)),
    )


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    counts = pc.value_counts(column.combine_chunks()).to_pylist()
    return {str(c["values"]): c["counts"] for c in counts}


def _faults(
    sources: pa.Table,
    clips: pa.Table,
    of_sources: dict[str, int],
    of_clips: dict[str, int],
    listing: Listing | None,
) -> list[str]:
    faults = []
    unread = set()
    if listing:
        unread = {s.uri for s in listing.sources} - set(sources["uri"].to_pylist())
    if unread:
        faults.append(f"{len(unread)} source(s) not read yet, such as {min(unread)}")
    for name, table, key in (("sources", sources, "uri"), ("clips", clips, "clip_id")):
        double = table.num_rows - pc.count_distinct(table[key]).as_py() if table.num_rows else 0
        if double:
            faults.append(f"{double} row(s) too many in {name}")
    strange = (set(of_sources) - set(SOURCE_STATES)) | (set(of_clips) - set(CLIP_STATES))
    if strange:
        faults.append(f"unknown state(s) {sorted(strange)}")
    expected = {
        s: n
        for s, n in zip(
            sources["source_id"].to_pylist(), sources["num_clips"].to_pylist(), strict=True
        )
        if n
    }
    if expected != _count(clips["source_id"]):
        faults.append("clips do not add up to what their sources were split into")
    if of_clips.get("pending"):
        faults.append(f"{of_clips['pending']} clip(s) pending: run the same command again")
    return faults
