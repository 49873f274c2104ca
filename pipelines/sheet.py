"""A picture of a dataset: keyframes of kept clips above, of rejected ones below, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from engine.blobs import take_blobs
from engine.tables import read

CELL = (240, 135)
"""Width and height of a picture, px."""
TEXT_PX = 38
COLUMNS = 6
KEPT, REJECTED = (120, 200, 120), (110, 110, 235)


def contact_sheet(root: str, path: Path, *, rows_each: int = 2) -> int:
    """Writes the picture as a JPEG or PNG; gives how many clips it shows.

    Rejects are taken in turn from each reason, so that every reason is seen.

    Raises:
        ValueError: The dataset has no keyframes, or the name ends in no picture format.
    """
    names = ["clip_id", "state", "reason", "duration_s", "motion_score", "brightness"]
    clips = read(root, "clips").to_table(columns=names).to_pylist()
    frames = _middle_frames(root)
    shown = [c for c in sorted(clips, key=lambda c: c["clip_id"]) if c["clip_id"] in frames]
    if not shown:
        raise ValueError(f"{root} has no keyframes to show: nothing in it was decoded")
    kept = _whole_rows([c for c in shown if c["state"] == "kept"], rows_each)
    rejected = _whole_rows(_in_turn([c for c in shown if c["state"] == "rejected"]), rows_each)
    pictures = take_blobs(
        read(root, "keyframes"), "jpeg", indices=[frames[c["clip_id"]] for c in (*kept, *rejected)]
    )
    cells = [
        _cell(clip, blob.read()) for clip, blob in zip((*kept, *rejected), pictures, strict=True)
    ]
    lines = [_line(cells[i : i + COLUMNS]) for i in range(0, len(kept), COLUMNS)]
    below = cells[len(kept) :]
    lines += [_line(below[i : i + COLUMNS]) for i in range(0, len(below), COLUMNS)]
    is_jpeg = path.suffix.lower() in (".jpg", ".jpeg")
    try:
        how = [cv2.IMWRITE_JPEG_QUALITY, 80] if is_jpeg else []
        written = cv2.imwrite(str(path), np.vstack(lines), how)
    except cv2.error as error:
        raise ValueError(f"{path}: name a file that ends in .jpg or .png") from error
    if not written:
        raise ValueError(f"{path} cannot be written: is there such a folder?")
    return len(cells)


def _middle_frames(root: str) -> dict[str, int]:
    """Row of the keyframe in the middle of each clip."""
    table = read(root, "keyframes").to_table(columns=["clip_id", "time_s"])
    rows = table.append_column("row", pa.array(range(table.num_rows))).sort_by("time_s")
    found: dict[str, list[int]] = {}
    for clip_id, row in zip(rows["clip_id"].to_pylist(), rows["row"].to_pylist(), strict=True):
        found.setdefault(clip_id, []).append(row)
    return {clip_id: numbers[len(numbers) // 2] for clip_id, numbers in found.items()}


def _whole_rows(clips: Sequence[dict[str, Any]], at_most: int) -> list[dict[str, Any]]:
    return list(clips[: COLUMNS * min(at_most, max(1, len(clips) // COLUMNS))])


def _in_turn(clips: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_reason: dict[str, list[dict[str, Any]]] = {}
    for clip in clips:
        by_reason.setdefault(clip["reason"], []).append(clip)
    longest = max(map(len, by_reason.values()), default=0)
    return [group[i] for i in range(longest) for group in by_reason.values() if i < len(group)]


def _cell(clip: dict[str, Any], jpeg: bytes) -> np.ndarray:
    width, height = CELL
    cell = np.full((height + TEXT_PX, width, 3), 24, np.uint8)
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    colour = KEPT if clip["state"] == "kept" else REJECTED
    cell[height : height + 3] = colour
    facts = "image"
    if clip["duration_s"] is not None:
        facts = f"{clip['duration_s']:.1f} s, motion {clip['motion_score'] or 0:.2f}"
    for text, line, tint in (
        (clip["reason"] or "kept", 17, colour),
        (f"{facts}, brightness {clip['brightness']:.2f}", 32, (200, 200, 200)),
    ):
        where = (6, height + line)
        cv2.putText(cell, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.38, tint, 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(cell, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(24, 24, 24))


def _line(cells: Sequence[np.ndarray]) -> np.ndarray:
    empty = [np.full_like(cells[0], 24)] * (COLUMNS - len(cells))
    return np.hstack([*cells, *empty])
