"""Cuts the kept clips of a dataset out of their sources, on Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import pyarrow as pa
from lance.fragment import FragmentMetadata

from engine import observe, storage
from engine.cutter import READS, CutJob, CutOutcome, Cutter, place_of, units
from engine.pipeline import outcomes
from engine.tables import Writer

_log = logging.getLogger(__name__)


def to_cut(writer: Writer, mode: str) -> pa.Table:
    """Kept clips of videos of which there is no cut of this mode; the cuts of others go.

    A cut that failed for what is in its source is not tried again.
    """
    kept = writer.table("clips").to_table(columns=[*READS, "media"], filter="kept")
    cuts = writer.table("cuts").to_table(columns=["clip_id", "mode", "path"]).to_pylist()
    there = {c["clip_id"] for c in cuts if c["mode"] == mode}
    wanted = set(kept["clip_id"].to_pylist())
    stale = [c for c in cuts if c["mode"] != mode or c["clip_id"] not in wanted]
    for path in (c["path"] for c in stale if c["path"]):
        storage.delete(place_of(writer.root, path))
    writer.remove("cuts", "clip_id", sorted({c["clip_id"] for c in stale}))
    lacking = [i not in there for i in kept["clip_id"].to_pylist()]
    return kept.filter(pa.array(lacking, pa.bool_()))


def cut(
    writer: Writer,
    clips: pa.Table,
    job: CutJob,
    *,
    workers: int | None,
    commit_every_s: float,
    watch: Callable[[int], None],
) -> int:
    """Cuts clips, and commits as they come.

    Args:
        writer: Of the dataset.
        clips: From `to_cut`.
        job: How, and where to.
        workers: Actors that cut; None is one a core.
        commit_every_s: What a death may cost.
        watch: Called with how many clips are through.

    Returns:
        How many clips have no outcome, because their workers were lost or a failure may pass.

    Raises:
        OSError: What was cut cannot be written.
    """
    waiting: list[FragmentMetadata] = []
    committed_at, num_done, num_open = time.monotonic(), 0, clips.num_rows
    asked = units(clips)
    try:
        for outcome in outcomes(
            asked, job, actor=Cutter, workers=workers, share=1.0, wait_s=min(1.0, commit_every_s)
        ):
            if isinstance(outcome, CutOutcome):
                if outcome.unwritable:
                    raise OSError(outcome.unwritable)
                num_done += outcome.rows.num_rows
                observe.measured(
                    outcome.rows, "clip_id", table="cuts", stage="cut", operator="Cutter"
                )
                num_open -= outcome.rows.num_rows if outcome.fragments else 0
                waiting += outcome.fragments
            watch(num_done)
            if waiting and time.monotonic() - committed_at > commit_every_s:
                fragments, waiting = waiting, []
                writer.append("cuts", fragments)
                committed_at = time.monotonic()
    finally:
        writer.append("cuts", waiting)
    if num_open:
        _log.warning("%d clip(s) could not be cut for now: run the same command again", num_open)
    return num_open
