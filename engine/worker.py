"""What a worker does with one source, or with one part of a long one: read, scan, write, report.

A `Reader` is an actor of the Ray Data pipeline. It holds a sandboxed child that touches the media
and writes keyframes to Lance itself; the driver gets numbers: never a frame, never a video.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import lance
import pyarrow as pa
from lance.fragment import FragmentMetadata

from engine import logs, observe, storage
from engine.image import ImageMetadata, NotImageError, is_image, scan_image
from engine.judge import container_reject
from engine.operator import Failed, Stage
from engine.sandbox import Sandbox
from engine.scan import Scan, SegmentScan, assemble, plan_segments, scan_segment
from engine.schema import CLIPS, KEYFRAMES, SOURCES
from engine.segments import Segment
from engine.sources import Source, Span
from engine.tables import write_rows
from engine.video import Media, Metadata, probe

NAMESPACE = uuid.UUID("5f0c9a52-4d5b-5c56-9a3e-0c1b0d7e7a11")
PARTS = "parts"
"""Folder below a dataset's root where scanned parts of long sources wait."""
FETCH_BYTES = 256 * 2**20
"""A remote file up to this size is fetched once, then hashed and decoded from local disk."""


KEYFRAMES_AT_ONCE = 256


class Unwritable(RuntimeError):
    """The dataset cannot be written: no source's fault, and the end of the run."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every unit of a run shares."""

    root: str
    run_id: str
    scan: Scan
    stages: tuple[Stage, ...]
    measure_all: bool = False
    time_limit_s: float = 600.0
    memory_limit_bytes: int = 4 * 2**30
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the driver that workers need (`engine.stores.worker_environment`)."""

    def parked(self, sha256: str, request: str, part: int) -> str:
        """Where a part of a long source waits for the others; the same for whoever scans it so."""
        folder = f"{sha256[:32]}-{request}-{self.scan.fingerprint}"
        return storage.join(self.root, PARTS, folder, f"{part:06d}.arrow")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One thing to do: hash a source, scan it, or scan one part of it."""

    source: Source
    hash_only: bool = False
    sha256: str | None = None
    """Content hash, where it is known already."""
    heir_of: str | None = None
    """uri of a source with this content that is gone: this one takes its place."""
    parts: tuple[Segment, ...] = ()
    """All parts of a long source, planned by the unit that found it long."""
    part: int | None = None
    died: int = 0
    """Times that a worker was lost with it: then nothing shares its fate."""

    @property
    def source_id(self) -> str:
        """Of its source."""
        return source_id(self.source.uri)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a unit: rows, or else a hash, or parts that are still to scan or to wait for."""

    unit: Unit
    sha256: str | None = None
    parts: tuple[Segment, ...] = ()
    source_row: dict[str, Any] | None = None
    clips: pa.Table = dataclasses.field(default_factory=CLIPS.empty_table)
    keyframes: tuple[FragmentMetadata, ...] = ()
    frames_decoded: int = 0
    """By this unit alone."""
    seconds: float = 0.0
    """That it took."""
    unwritable: str | None = None
    """Why the dataset could not be written: the run cannot go on."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the child gives back of one unit."""

    sha256: str
    media: str | None = None
    """As found, where it was read."""
    parts: tuple[Segment, ...] = ()
    metadata: Metadata | ImageMetadata | None = None
    scanned: bool = True
    clips: pa.Table | None = None
    keyframes: tuple[FragmentMetadata, ...] = ()
    frames_decoded: int = 0
    total_frames_decoded: int = 0


def source_id(uri: str) -> str:
    """uuid5 of the uri: a file keeps its id whatever it holds."""
    return str(uuid.uuid5(NAMESPACE, uri))


def clip_id(sha256: str, start_s: float, end_s: float) -> str:
    """uuid5 of content and span, to the microsecond: the same wherever the file lies.

    The span of an image is 0 to 0.
    """
    return str(uuid.uuid5(NAMESPACE, f"{sha256}:{start_s:.6f}:{end_s:.6f}"))


def request_of(source: Source) -> str:
    """Hash of what is asked of a source: its spans."""
    return _hash([(s.start_s, s.end_s) for s in source.spans])


def beside_of(source: Source) -> str:
    """Hash of what travels along with a source: captions and extra columns."""
    return _hash([source.caption, source.extra, *((s.caption, s.extra) for s in source.spans)])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class Reader:
    """The actor: units in, outcomes out, one bad input costing one row."""

    def __init__(self, job: Job):
        storage.take_environment(job.environment)
        logs.set_up_worker(job.run_id)
        self.job = job
        self.sandbox = Sandbox(
            "engine.worker:read_source",
            time_limit_s=job.time_limit_s,
            memory_limit_bytes=job.memory_limit_bytes,
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A column `unit` in, a column `outcome` out, both pickled by this very program."""
        units = [pickle.loads(u) for u in batch["unit"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(self.do(unit)) for unit in units]})

    def do(self, unit: Unit) -> Outcome:
        """The outcome of one unit; never raises for what is in a file."""
        began = time.perf_counter()
        outcome = self._outcome(unit)
        return dataclasses.replace(outcome, seconds=time.perf_counter() - began)

    def _outcome(self, unit: Unit) -> Outcome:
        try:
            if unit.source.error:
                raise Failed("SourceError", unit.source.error, transient=True)
            reading: Reading = self.sandbox.call((self.job, unit))
        except Failed as failure:
            if failure.error_type == Unwritable.__name__:
                return Outcome(unit=unit, unwritable=failure.message)
            why = observe.Failure(
                unit.source_id, failure.error_type, failure.message, {"uri": unit.source.uri}
            )
            observe.log_failures([why], stage="scan", operator="Scan")
            return failed(self.job, unit, failure)
        outcome = Outcome(
            unit=unit,
            sha256=reading.sha256,
            parts=reading.parts,
            frames_decoded=reading.frames_decoded,
        )
        if reading.clips is None:
            return outcome
        return dataclasses.replace(
            outcome,
            source_row=_done(self.job, unit, reading),
            clips=reading.clips,
            keyframes=reading.keyframes,
        )


def failed(job: Job, unit: Unit, failure: Failed) -> Outcome:
    """The outcome of a unit that gave no rows, or no hash."""
    row = _source_row(job, unit) | {
        "state": "failed",
        "error_type": failure.error_type,
        "error": failure.message,
        "transient": failure.transient,
    }
    return Outcome(unit=unit, source_row=row)


def duplicate_row(job: Job, source: Source, sha256: str, of: str) -> dict[str, Any]:
    """The row of a source with the same content as another."""
    row = _source_row(job, Unit(source=source, sha256=sha256))
    return row | {"state": "duplicate", "duplicate_of": of}


def _source_row(job: Job, unit: Unit) -> dict[str, Any]:
    source = unit.source
    return dict.fromkeys(SOURCES.names) | {
        "source_id": unit.source_id,
        "uri": source.uri,
        "media": source.media,
        "transient": False,
        "missing": False,
        "size_bytes": source.size_bytes,
        "mtime_ns": source.mtime_ns,
        "etag": source.etag,
        "sha256": unit.sha256,
        "request": request_of(source),
        "beside": beside_of(source),
        "fingerprint": job.scan.fingerprint,
        "scanned": False,
        "num_clips": 0,
        "frames_decoded": 0,
        "caption": source.caption,
        "extra": source.extra,
        "run_id": job.run_id,
    }


def _done(job: Job, unit: Unit, reading: Reading) -> dict[str, Any]:
    assert reading.clips is not None
    row = _source_row(job, unit)
    known = dataclasses.asdict(reading.metadata) if reading.metadata else {}
    return (
        row
        | {name: value for name, value in known.items() if name in row}
        | {
            "state": "done",
            "media": reading.media,
            "sha256": reading.sha256,
            "scanned": reading.scanned,
            "num_clips": reading.clips.num_rows,
            "frames_decoded": reading.total_frames_decoded,
        }
    )


def _complete(found: pa.Table, source: Source, sha256: str, media: str) -> pa.Table:
    """The scan's rows with the schema of `clips`; their verdict is still to come."""
    num = found.num_rows
    spans: list[tuple[float, float]] = [(s.start_s, s.end_s) for s in source.spans] or list(
        zip(found["start_s"].to_pylist(), found["end_s"].to_pylist(), strict=True)
    )
    if media == "image":
        spans = [(0.0, 0.0)]
    columns: dict[str, Any] = {name: found[name] for name in found.column_names}
    columns |= {
        "clip_id": [clip_id(sha256, start_s, end_s) for start_s, end_s in spans],
        "source_id": [source_id(source.uri)] * num,
        "source_uri": [source.uri] * num,
        "media": [media] * num,
        "state": ["pending"] * num,
        "kept": [False] * num,
    }
    table = pa.table(
        [
            pa.chunked_array([pa.array(columns[f.name], f.type)])
            if isinstance(columns.get(f.name), list)
            else (columns[f.name].cast(f.type) if f.name in columns else pa.nulls(num, f.type))
            for f in CLIPS
        ],
        schema=CLIPS,
    )
    return with_captions(table, source, sha256)


def with_captions(clips: pa.Table, source: Source, sha256: str) -> pa.Table:
    """A source's clips with what lies beside it today."""
    whole = Span(start_s=0.0, end_s=0.0)
    spans = {clip_id(sha256, s.start_s, s.end_s): s for s in source.spans}
    beside = [spans.get(key, whole) for key in clips["clip_id"].to_pylist()]
    for name, values in (
        ("caption_original", [s.caption or source.caption for s in beside]),
        ("extra", [s.extra or source.extra for s in beside]),
    ):
        clips = clips.set_column(
            clips.schema.get_field_index(name), CLIPS.field(name), pa.array(values, pa.string())
        )
    return clips


# What follows runs in the sandboxed child.


def read_source(argument: tuple[Job, Unit]) -> Reading:
    """Reads what a unit asks for. Called in the child, under its limits."""
    job, unit = argument
    uri = unit.source.uri
    if not storage.is_remote(uri):
        path = storage.allowed_path(uri)
        return _read(job, unit, lambda: path)
    if unit.part is None and (unit.source.size_bytes or 0) <= FETCH_BYTES:
        with storage.fetch(uri, FETCH_BYTES) as path:
            return _read(job, unit, lambda: path)
    return _read(job, unit, lambda: storage.open_read(uri))


def _read(job: Job, unit: Unit, media: Callable[[], Any]) -> Reading:
    sha256 = unit.sha256 or _hash_of_content(media())
    if unit.hash_only:
        return Reading(sha256=sha256)
    if unit.source.media == "image" or (unit.source.media is None and is_image(media())):
        return _read_image(job, unit, sha256, media())
    metadata = probe(media())
    scan, spans = job.scan, tuple((s.start_s, s.end_s) for s in unit.source.spans)
    if unit.part is None:
        known = {n: getattr(metadata, n) for n in ("num_frames", "duration_s", "aspect_ratio")}
        if not spans and not job.measure_all and container_reject(known, job.stages):
            clips = _complete(_spanning(metadata), unit.source, sha256, "video")
            return Reading(
                sha256=sha256, media="video", metadata=metadata, scanned=False, clips=clips
            )
        parts = plan_segments(media(), scan, metadata)
        if len(parts) > 1:
            return Reading(sha256=sha256, parts=parts)
        found = [scan_segment(media(), scan, parts[0], spans=spans)]
        decoded = found[0].frames_decoded
    else:
        request = request_of(unit.source)
        places = [job.parked(sha256, request, i) for i in range(len(unit.parts))]
        part = _scan_part(unit, places[unit.part], media, scan, spans)
        decoded = part.frames_decoded if part else 0
        # whoever scans the last part joins them; when all were there before, the first does
        joins = (part or unit.part == 0) and all(storage.kind(p) == "file" for p in places)
        if not joins:
            return Reading(sha256=sha256, frames_decoded=decoded)
        found = [SegmentScan.from_bytes(storage.read_bytes(p)) for p in places]
    total = sum(f.frames_decoded for f in found)
    metadata, clips, keyframes = assemble(metadata, found, scan, spans)
    del found  # of a long source its pictures are most of what is in memory
    clips = _complete(clips, unit.source, sha256, "video")
    return Reading(
        sha256=sha256,
        media="video",
        metadata=metadata,
        clips=clips,
        keyframes=_write_keyframes(job.root, unit, keyframes, clips),
        frames_decoded=decoded,
        total_frames_decoded=total,
    )


def _hash_of_content(media: str | BinaryIO) -> str:
    """Of a source that is open, or of one on this machine, or a copy there."""
    if isinstance(media, str):
        return storage.sha256_of_file(media)
    with media:
        return storage.sha256(media)


def _read_image(job: Job, unit: Unit, sha256: str, media: Media) -> Reading:
    if unit.source.spans:  # the listing could not know
        raise NotImageError(
            "a span of it is asked for, but it is an image, which has no time: leave start_s and "
            "end_s empty in its manifest"
        )
    metadata, clips, keyframes = scan_image(media, job.scan)
    clips = _complete(clips, unit.source, sha256, "image")
    return Reading(
        sha256=sha256,
        media="image",
        metadata=metadata,
        clips=clips,
        keyframes=_write_keyframes(job.root, unit, keyframes, clips),
        frames_decoded=1,
        total_frames_decoded=1,
    )


def _scan_part(
    unit: Unit, place: str, media: Callable[[], Any], scan: Scan, spans: tuple[Any, ...]
) -> SegmentScan | None:
    """Scans a part and parks it; None where it is parked already."""
    assert unit.part is not None
    if storage.kind(place) == "file":
        return None
    part = scan_segment(media(), scan, unit.parts[unit.part], spans=spans)
    storage.make_folder(storage.parent(place))
    storage.write_bytes(place, part.to_bytes())
    return part


def _write_keyframes(
    root: str, unit: Unit, keyframes: pa.Table, clips: pa.Table
) -> tuple[FragmentMetadata, ...]:
    """Writes the keyframes of a source, a few hundred in memory at a time."""
    if not keyframes.num_rows:
        return ()

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, keyframes.num_rows, KEYFRAMES_AT_ONCE):
            some = keyframes.slice(start, KEYFRAMES_AT_ONCE)
            columns: dict[str, Any] = {name: some[name] for name in some.column_names}
            columns["clip_id"] = clips["clip_id"].take(some["clip"])
            columns["source_id"] = pa.array([unit.source_id] * some.num_rows)
            columns["jpeg"] = lance.blob_array(some["jpeg"].to_pylist())
            rows = pa.table([columns[f.name] for f in KEYFRAMES], schema=KEYFRAMES)
            yield from rows.combine_chunks().to_batches()

    try:
        reader = pa.RecordBatchReader.from_batches(KEYFRAMES, batches())
        return tuple(write_rows(root, "keyframes", reader))
    except OSError as error:
        raise Unwritable(str(error)) from error


def _spanning(metadata: Metadata) -> pa.Table:
    """One clip as long as its source: all that is known of one that its container rejects."""
    return pa.Table.from_pylist(
        [
            {
                "start_s": 0.0,
                "end_s": metadata.duration_s,
                "start_frame": 0,
                "num_frames": metadata.num_frames,
                "fps": metadata.fps,
                "width_px": metadata.width_px,
                "height_px": metadata.height_px,
                "duration_s": metadata.duration_s,
                "aspect_ratio": metadata.aspect_ratio,
                "codec": metadata.codec,
            }
        ]
    )
