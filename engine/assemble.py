"""A source's clips and keyframes, decided from what its parts gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from engine.keyframes import choose
from engine.shots import cuts, spans_of_shots
from engine.video import DamagedError, Metadata

if TYPE_CHECKING:
    from engine.scan import Scan, SegmentScan

Spans = Sequence[tuple[float, float]]
"""Start and end in s of the clips asked for."""


def described(name: str, kind: pa.DataType, about: str, unit: str = "") -> pa.Field:
    """A column with its meaning, and unit, in the field's metadata."""
    return pa.field(name, kind, metadata={"about": about} | ({"unit": unit} if unit else {}))


KEYFRAMES = pa.schema(
    [
        described("clip", pa.int64(), "row of its clip"),
        described("frame", pa.int64(), "index of the frame in the source"),
        described("time_s", pa.float64(), "time of the frame in the source", "s"),
        described("width_px", pa.int32(), "upright, square pixels", "px"),
        described("height_px", pa.int32(), "upright, square pixels", "px"),
        described("jpeg", pa.binary(), "the picture"),
    ]
)
"""Columns of the keyframes of a scan."""


def assemble(
    metadata: Metadata, parts: Sequence[SegmentScan], scan: Scan, spans: Spans = ()
) -> tuple[Metadata, pa.Table, pa.Table]:
    """Decides a source's clips from what its parts gave.

    Args:
        metadata: From `probe`.
        parts: All parts, of the same scan and spans.
        scan: What was measured.
        spans: As `scan_segment` got them.

    Returns:
        The metadata with length, frames and rate as decoded; clips with the columns of
        `scan.writes`, in order of time or of `spans`; keyframes with those of `KEYFRAMES`.
    """
    frames, end_s = _joined(parts)
    times = frames["time_s"].to_numpy()
    length_s = end_s - times[0]
    rate = len(times) / length_s if length_s > 0 else metadata.fps
    metadata = dataclasses.replace(
        metadata, num_frames=len(times), duration_s=length_s, fps=_rate(metadata.fps, rate)
    )
    ranges = _ranges(scan, frames, times, end_s, spans)
    rows = [_clip(metadata, scan, frames, times, end_s, first, after) for first, after in ranges]
    for row, (first, after), span in zip(rows, ranges, spans, strict=bool(spans)):
        if first == after:
            row.update(_outside(span, times, end_s))
    clips = pa.Table.from_pylist(rows, schema=scan.writes)
    return metadata, clips, _chosen(scan, parts, frames, times, end_s, ranges)


def _joined(parts: Sequence[SegmentScan]) -> tuple[pa.Table, float]:
    """One row a frame of the whole source, and the end of the last."""
    parts = sorted(parts, key=lambda p: p.index)
    assert [p.index for p in parts] == list(range(len(parts))), "a part is missing"
    tables: list[pa.Table] = []
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        table = part.frames if part.index == 0 else part.frames.slice(1)
        if following is not None and table["pts"][-1] != following.frames["pts"][0]:
            raise DamagedError(f"part {part.index + 1} does not begin where it was planned")
        tables.append(table)
    last_s = parts[-1].last_s
    assert last_s is not None, "the last part does not reach the end"
    frames = pa.concat_tables(tables).combine_chunks()
    times = frames["time_s"].to_numpy()
    before_s = times[-1] - times[-2] if len(times) > 1 else 0.0
    # Some containers give the last frame one tick of their clock.
    return frames, float(times[-1] + (last_s if last_s >= before_s / 2 else before_s))


def _rate(claimed: float | None, found: float | None) -> float | None:
    """The claimed rate where frames come at it, which is the exact fraction; else the one found."""
    if claimed is not None and found is not None and abs(found - claimed) <= 0.01 * claimed:
        return claimed
    return found


def _ranges(
    scan: Scan, frames: pa.Table, times: np.ndarray, end_s: float, spans: Spans
) -> list[tuple[int, int]]:
    """First and next-after-last frame of each clip."""
    if spans:
        bounds = np.searchsorted(times, np.array(spans, np.float64).ravel()).reshape(-1, 2)
        return [(first, max(first, after)) for first, after in bounds.tolist()]
    if scan.shots == "none":
        slots = np.floor(times / scan.clip_seconds)
        begins = [0, *(np.flatnonzero(slots[1:] != slots[:-1]) + 1).tolist()]
        return list(zip(begins, [*begins[1:], len(times)], strict=True))
    found = cuts(scan.shots, scan.shot_threshold, frames["score"].to_numpy())
    return spans_of_shots(found, times, end_s, scan.max_shot_s)


def _clip(
    metadata: Metadata,
    scan: Scan,
    frames: pa.Table,
    times: np.ndarray,
    end_s: float,
    first: int,
    after: int,
) -> dict[str, Any]:
    """The row of a clip that has frames."""
    if first == after:
        return {}
    start, end = times[first], times[after] if after < len(times) else end_s
    row: dict[str, Any] = {
        "start_s": start,
        "end_s": end,
        "start_frame": first,
        "num_frames": after - first,
        "fps": _rate(metadata.fps, (after - first) / (end - start))
        if end > start
        else metadata.fps,
        "width_px": metadata.width_px,
        "height_px": metadata.height_px,
        "duration_s": end - start,
        "aspect_ratio": metadata.aspect_ratio,
        "codec": metadata.codec,
    }
    missing = []
    for signal in scan.signals:
        name = signal.writes.names[0]
        values = frames[name].slice(first + signal.context, max(0, after - first - signal.context))
        known = values.drop_null().to_numpy()
        row[name] = float(np.mean(known, dtype=np.float64)) if len(known) else None
        if not len(known):
            missing.append(name)
    if missing:
        row["error_type"] = "TooFewFrames"
        row["error"] = (
            f"{', '.join(missing)}: cannot be measured on"
            f" {after - first} frame{'s' * (after - first > 1)} ({end - start:.2f} s)"
        )
    return row


def _outside(span: tuple[float, float], times_s: np.ndarray, end_s: float) -> dict[str, Any]:
    start, end = span
    if end <= start:
        why = "ends before it starts"
    elif start >= end_s or end <= times_s[0]:
        why = f"lies outside the video ({times_s[0]:.1f}-{end_s:.1f} s)"
    else:
        why = "holds no frame"
    return {
        "start_s": start,
        "end_s": end,
        "error_type": "SpanOutside",
        "error": f"span {start:g}-{end:g} s {why}",
    }


def _chosen(
    scan: Scan,
    parts: Sequence[SegmentScan],
    frames: pa.Table,
    times: np.ndarray,
    end_s: float,
    ranges: Sequence[tuple[int, int]],
) -> pa.Table:
    """The keyframes of each clip: one a second or so, evenly, within the numbers allowed."""
    candidates = pa.concat_tables([p.keyframes for p in parts])
    pts, order = np.unique(candidates["pts"].to_numpy(), return_index=True)
    index = np.searchsorted(frames["pts"].to_numpy(), pts)
    clips: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for clip, (first, after) in enumerate(ranges):
        low, high = np.searchsorted(index, (first, after))
        end = times[after] if after < len(times) else end_s
        start = times[first] if after > first else end
        wanted = round((end - start) / scan.keyframe_every_s)
        wanted = min(scan.max_keyframes, max(scan.min_keyframes, wanted))
        picked = choose(times[index[low:high]], start, end, wanted)
        rows.append(low + np.array(picked, np.int64))
        clips.append(np.full(len(rows[-1]), clip))
    row, clip = (np.concatenate([np.empty(0, np.int64), *a]) for a in (rows, clips))
    taken = candidates.take(pa.array(order[row]))
    return pa.table(
        [
            pa.array(clip),
            pa.array(index[row]),
            pa.array(times[index[row]]),
            *(taken[name].combine_chunks() for name in ("width_px", "height_px", "jpeg")),
        ],
        schema=KEYFRAMES,
    )
