"""A small curated dataset for the dashboard: real spans that play, and clips with known signals."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import cv2
import lance
import numpy as np
import pyarrow as pa
from clips import encode

from engine import storage
from engine.schema import CLIPS, CUTS, KEYFRAMES, SOURCES
from engine.tables import Writer, create
from engine.worker import clip_id, source_id
from pipelines.recipes import CLASSIC

FPS, FRAMES, SIZE = 24, 96, (90, 160)
NUM = 90
"""Clips with made-up signals."""
SIGNALS = {
    "num_frames": (40, 300), "duration_s": (0.5, 12), "aspect_ratio": (0.8, 2.2),
    "motion_score": (0, 3), "black_area_frac": (0, 1), "brightness": (0.1, 1),
    "black_frame_frac": (0, 0.6), "residual_cut_score": (0, 0.6), "ocr_area_frac": (0, 0.12),
    "overlay_score": (0, 0.6),
}  # fmt: skip
LATER = ("residual_cut_score", "ocr_area_frac", "overlay_score")
"""Not measured of what the first stages reject."""


def film(path: Path, codec: str = "libx264", **more: Any) -> Path:
    """A ramp of grey that says which frame it is: level 40 + 2 i; a key frame every second."""
    images = (np.full((*SIZE, 3), 40 + 2 * i, np.uint8) for i in range(FRAMES))
    options = {"g": str(FPS), "bf": "0", "x264-params": "scenecut=0"} if "x264" in codec else {}
    if codec in ("mpeg4", "flv"):
        options = {"qmin": "1", "qmax": "2"}
    if codec == "libx265":
        options = {"x265-params": "log-level=none"}
    return encode(path, images, codec=codec, fps=FPS, options=options, **more)


def source_row(path: Path | str, uri: str | None = None) -> dict[str, Any]:
    """A row of `sources` of a file on this machine, at another place where `uri` says so."""
    stat = Path(path).stat()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        facts = {
            "container": container.format.name,
            "codec": stream.codec_context.codec.canonical_name,
            "pix_fmt": stream.codec_context.pix_fmt,
            "width_px": stream.width,
            "height_px": stream.height,
        }
    uri = uri or str(path)
    return facts | {
        "source_id": source_id(uri),
        "uri": uri,
        "media": "video",
        "state": "done",
        "size_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": storage.sha256(str(path)),
        "num_frames": FRAMES,
        "duration_s": FRAMES / FPS,
        "num_clips": 1,
    }


def clip_row(source: dict[str, Any], first: int = 0, num: int = FRAMES) -> dict[str, Any]:
    """A row of `clips` of some frames of a source, which every rule keeps."""
    height, width = SIZE
    start_s, end_s = first / FPS, (first + num) / FPS
    return {
        "clip_id": clip_id(source["sha256"], start_s, end_s),
        "source_id": source["source_id"], "source_uri": source["uri"], "media": "video",
        "start_s": start_s, "end_s": end_s, "start_frame": first, "num_frames": num, "fps": FPS,
        "width_px": width, "height_px": height, "duration_s": end_s - start_s,
        "aspect_ratio": width / height, "codec": source["codec"], "motion_score": 1.0,
        "black_area_frac": 0.1, "brightness": 0.6, "black_frame_frac": 0.0,
        "residual_cut_score": 0.1, "ocr_area_frac": 0.01, "overlay_score": 0.1, "phash": first + 1,
        "phashes": [first + 1], "caption": f"A wall that becomes brighter from frame {first} on.",
        "state": "pending", "kept": False,
    }  # fmt: skip


def made_up(rng: np.random.Generator, source: dict[str, Any]) -> list[dict[str, Any]]:
    """Clips with random signals: some of them copies, some failed, some not measured further."""
    rows = []
    for i in range(NUM):
        row = clip_row(source) | {"clip_id": str(uuid.UUID(int=i + 1)), "caption": None}
        row |= {n: low + (high - low) * rng.random() for n, (low, high) in SIGNALS.items()}
        row["num_frames"] = int(row["num_frames"])
        look = int(rng.integers(1, 2**62)) if i % 3 else 2**40 + 7  # a third looks the same
        row |= {"phash": look, "phashes": [look]}
        embedding = rng.standard_normal(768) if i % 5 else np.ones(768)
        row["clip_embedding"] = embedding.astype(np.float32).tolist()
        if row["aspect_ratio"] < 1 or row["num_frames"] < 65:
            row |= dict.fromkeys((*LATER, "phash", "phashes"))
        if i % 11 == 0:
            row |= {"ocr_area_frac": None, "error_operator": "TextCoverage",
                    "error_type": "DecodeError", "error": "a keyframe cannot be read"}  # fmt: skip
        if i % 10 == 0:
            row |= {"brightness": float(np.float32(0.2)), "aspect_ratio": 1.0}  # on the bound
        rows.append(row)
    return rows


def picture(level: int) -> bytes:
    """A keyframe."""
    done, jpeg = cv2.imencode(".jpg", np.full((*SIZE, 3), level, np.uint8))
    assert done
    return jpeg.tobytes()


def keyframe_rows(clips: list[dict[str, Any]], each: int = 2) -> pa.Table:
    """Keyframes of clips."""
    rows = [(clip, i) for clip in clips for i in range(each)]
    columns = {
        "clip_id": [c["clip_id"] for c, _ in rows],
        "source_id": [c["source_id"] for c, _ in rows],
        "frame": [c["start_frame"] + 12 * i for c, i in rows],
        "time_s": [c["start_s"] + i / 2 for c, i in rows],
        "width_px": [SIZE[1]] * len(rows),
        "height_px": [SIZE[0]] * len(rows),
    }
    arrays = [pa.array(columns[f.name], f.type) for f in KEYFRAMES if f.name != "jpeg"]
    arrays.append(lance.blob_array([picture(60 + 90 * i) for _, i in rows]))
    return pa.table(arrays, schema=KEYFRAMES)


def commit(root: str, sources: list[dict[str, Any]], clips: list[dict[str, Any]]) -> Writer:
    """Writes rows into a dataset that is made if there is none; nothing is judged."""
    create(root, CLASSIC.name)
    writer = Writer(root, "made")
    writer.commit(
        sources=pa.Table.from_pylist(sources, schema=SOURCES),
        clips=pa.Table.from_pylist(clips, schema=CLIPS),
        keyframes=writer.fragments_of("keyframes", keyframe_rows(clips)) if clips else (),
    )
    return writer


def add_cut(writer: Writer, clip: dict[str, Any], file: Path, *, path: str | None) -> None:
    """A row of `cuts`: at `path`, or as a blob."""
    row = dict.fromkeys(CUTS.names) | {
        "clip_id": clip["clip_id"], "source_id": clip["source_id"], "mode": "encode",
        "start_s": clip["start_s"], "end_s": clip["end_s"], "num_frames": clip["num_frames"],
        "width_px": SIZE[1], "height_px": SIZE[0], "size_bytes": file.stat().st_size, "path": path,
    }  # fmt: skip
    arrays = [pa.array([row[f.name]], f.type) for f in CUTS if f.name != "mp4"]
    blob = lance.blob_array([None if path else file.read_bytes()])
    arrays.insert(CUTS.names.index("mp4"), blob)
    writer.append("cuts", pa.table(arrays, schema=CUTS))


def add_run(writer: Writer, counts: dict[str, Any], day: int, recipe: Any = CLASSIC) -> None:
    """A row of `runs`."""
    writer.add_run(
        {
            "run_id": str(uuid.UUID(int=day)),
            "recipe": recipe.name,
            "resolved": json.dumps(recipe.describe()),
            "started_at": datetime(2026, 11, day, tzinfo=UTC),
            "seconds": 12.5,
            "interrupted": False,
            "counts": json.dumps(counts),
        }
    )
