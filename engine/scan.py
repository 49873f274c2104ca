"""One decode pass over a source: shots, frame signals and keyframes, whole or in parts.

A long source is cut into parts that different processes scan; `assemble` gives the same rows, bit
for bit, as a scan of the whole, which is a scan in one part by the same code.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from av.video.frame import PictureType

from engine.keyframes import Keyframes, Marks, choose
from engine.operator import Operator
from engine.picture import Shrinker, Upright, small_size
from engine.segments import Segment, plan
from engine.shots import (
    DETECTION_PX,
    SETTLED_AFTER,
    Boundaries,
    FrameScorer,
    Shots,
    cuts,
    look_ahead,
    spans_of_shots,
)
from engine.signals import (
    LONGER_SIDE_PX,
    BlackArea,
    BlackFrames,
    Brightness,
    FrameSignal,
    Motion,
    frames_table,
)
from engine.video import (
    DamagedError,
    Frame,
    Media,
    Metadata,
    Video,
    decode,
    metadata_of,
    open_video,
    probe,
)

Spans = Sequence[tuple[float, float]]
_BATCH = 64


def _field(name: str, kind: pa.DataType, about: str, unit: str = "") -> pa.Field:
    return pa.field(name, kind, metadata={"about": about} | ({"unit": unit} if unit else {}))


_CLIP = pa.schema(
    [
        _field("start_s", pa.float64(), "first frame's time", "s"),
        _field("end_s", pa.float64(), "end of the last frame's time", "s"),
        _field("start_frame", pa.int64(), "index of the first frame in the source"),
        _field("num_frames", pa.int64(), "frames in the clip"),
        _field("fps", pa.float64(), "average frame rate", "frames/s"),
        _field("width_px", pa.int32(), "as shown", "px"),
        _field("height_px", pa.int32(), "as shown", "px"),
        _field("duration_s", pa.float64(), "end_s - start_s", "s"),
        _field("aspect_ratio", pa.float64(), "shown width / shown height"),
        _field("codec", pa.string(), "video codec of the source"),
    ]
)
_ERRORS = pa.schema(
    [
        _field("error_type", pa.string(), "class of a failed measurement"),
        _field("error", pa.string(), "what was wrong, for a person"),
    ]
)
KEYFRAMES = pa.schema(
    [
        _field("clip", pa.int64(), "row of its clip"),
        _field("frame", pa.int64(), "index of the frame in the source"),
        _field("time_s", pa.float64(), "time of the frame in the source", "s"),
        _field("width_px", pa.int32(), "upright, square pixels", "px"),
        _field("height_px", pa.int32(), "upright, square pixels", "px"),
        _field("jpeg", pa.binary(), "the picture"),
    ]
)
"""Columns of the keyframes of a scan."""
_CANDIDATES = pa.schema(
    [
        ("pts", pa.int64()),
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("jpeg", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Scan(Operator):
    """What one pass over a source measures."""

    reads: ClassVar[tuple[str, ...]] = ("path",)
    libraries: ClassVar[tuple[str, ...]] = ("av", "opencv-python", "scenedetect", "numpy")

    shots: Shots = "adaptive"
    """Detector of shots; `none` cuts into spans of `clip_seconds`."""
    shot_threshold: float | None = None
    """Of the detector; None is PySceneDetect's default."""
    clip_seconds: float = 60.0
    """Length of fixed spans; the last one of a source is what remains."""
    max_shot_s: float = 20.0
    """Longer shots are split evenly."""
    signals: tuple[FrameSignal, ...] = (Motion(), BlackArea(), Brightness(), BlackFrames())
    """What is measured on frames."""
    keyframe_every_s: float = 1.0
    min_keyframes: int = 3
    max_keyframes: int = 16
    keyframe_short_side_px: int = 448
    jpeg_quality: int = 90
    segment_s: float = 300.0
    """Length of parts at 1280x720 and 30 frames/s; more pixels a second make them shorter."""
    max_pixels: int = 8192 * 8192
    """Largest frame that is decoded."""

    def __post_init__(self) -> None:
        for name in ("clip_seconds", "max_shot_s", "keyframe_every_s", "segment_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be more than 0, and is {getattr(self, name)}")

    @property
    def writes(self) -> pa.Schema:  # type: ignore[override]
        """Columns of the clips."""
        fields = [field for signal in self.signals for field in signal.writes]
        means = [pa.field(f.name, pa.float32(), metadata=f.metadata) for f in fields]
        return pa.schema([*_CLIP, *means, *_ERRORS])

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """A function from local paths to their clips: many rows for one, unlike other operators."""

        def measure(sources: pa.Table) -> pa.Table:
            found = [scan_source(path, self)[1] for path in sources["path"].to_pylist()]
            return pa.concat_tables([self.writes.empty_table(), *found])

        return measure

    def marks(self, spans: Spans) -> Marks:
        """Where keyframes are taken, whatever the shots turn out to be."""
        shortest = self.clip_seconds if self.shots == "none" else self.max_shot_s / 2
        if spans:
            shortest = math.inf
        thirds = [
            start + (end - start) * (2 * i + 1) / (2 * self.min_keyframes)
            for start, end in spans
            if end - start < self.min_keyframes * self.keyframe_every_s
            for i in range(self.min_keyframes)
        ]
        return Marks(
            min(self.keyframe_every_s, shortest / self.min_keyframes),
            [*(start for start, _ in spans), *thirds],
        )


@dataclass(frozen=True, kw_only=True)
class SegmentScan:
    """What scanning a part gives: a row a frame, and keyframes to choose from.

    The last row, unless the source ends here, is the first frame of the next part: only here is
    known what came before it.
    """

    index: int
    frames: pa.Table
    """`pts`, `time_s`, `score` and a column for each signal."""
    keyframes: pa.Table
    frames_decoded: int
    last_s: float | None
    """Duration of the last frame, 0 where unknown; None unless the source ends here."""

    def to_bytes(self) -> bytes:
        """For `from_bytes`, in any process."""
        sink = pa.BufferOutputStream()
        facts = {"index": self.index, "frames_decoded": self.frames_decoded, "last_s": self.last_s}
        frames = self.frames.replace_schema_metadata({"segment": json.dumps(facts)})
        for table in (frames, self.keyframes):
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue().to_pybytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> SegmentScan:
        """What `to_bytes` was called on."""
        source = pa.BufferReader(data)
        frames, keyframes = (pa.ipc.open_stream(source).read_all() for _ in range(2))
        facts = json.loads(frames.schema.metadata[b"segment"])
        return cls(frames=frames.replace_schema_metadata(None), keyframes=keyframes, **facts)


def plan_segments(media: Media, scan: Scan) -> tuple[Segment, ...]:
    """The parts that a source is scanned in, which depend on the file and `segment_s` alone.

    Raises:
        VideoError: It cannot be read as a video.
    """
    return plan(media, scan.segment_s, scan.max_pixels)


def scan_source(media: Media, scan: Scan, spans: Spans = ()) -> tuple[Metadata, pa.Table, pa.Table]:
    """Metadata, clips and keyframes of a source, in one pass.

    Args:
        media: Local path, or a seekable binary file.
        scan: What to measure.
        spans: Start and end in s of the clips wanted; none: its shots.

    Raises:
        VideoError: The content cannot be used.
        OSError: The file cannot be read.
    """
    metadata = probe(media, max_pixels=scan.max_pixels)
    return assemble(metadata, [scan_segment(media, scan, Segment(), spans)], scan, spans)


def scan_segment(media: Media, scan: Scan, segment: Segment, spans: Spans = ()) -> SegmentScan:
    """Decodes a part of a source, once.

    Raises:
        VideoError: The content cannot be used.
        OSError: The file cannot be read.
    """
    with open_video(media, max_pixels=scan.max_pixels) as video:
        start = segment.start_pts
        frames = decode(video, start_pts=start, seek_ts=segment.seek_ts, max_pixels=scan.max_pixels)
        first = next(frames, None)
        if first is None:
            raise DamagedError("no frame could be decoded")
        if start is not None and first.pts != start:
            raise DamagedError(f"the key frame at {video.seconds(start):.2f} s gives no picture")
        part = _Part(scan, segment, metadata_of(video, first.picture), spans)
        part.read(first, frames)
        return part.result(video)


class _Part:
    """The state of one pass over a part."""

    def __init__(self, scan: Scan, segment: Segment, metadata: Metadata, spans: Spans):
        self._segment = segment
        coded = (metadata.coded_width_px, metadata.coded_height_px)
        self._shrinker = Shrinker()
        self._small = small_size(*coded, DETECTION_PX)
        self._reach = look_ahead(scan.shots)
        self._scorer = self._boundaries = None
        if not spans:
            self._boundaries = Boundaries(scan.shots, scan.shot_threshold, scan.clip_seconds)
            self._scorer = None if scan.shots == "none" else FrameScorer(scan.shots)
        look = Upright(
            (metadata.width_px, metadata.height_px),
            metadata.rotation_deg,
            scan.keyframe_short_side_px,
            scan.jpeg_quality,
        )
        self._keyframes = Keyframes(look, scan.marks(spans), scan.min_keyframes)
        self._signals = _Signals(scan.signals, small_size(*coded, LONGER_SIDE_PX))
        self._pts: list[int] = []
        self._times: list[float] = []
        self._scores: list[float] = []
        self._last_s: float | None = None

    def read(self, first: Frame, rest: Iterator[Frame]) -> None:
        """Sees the frames of the part, and as many after it as its last shots need."""
        stop = self._segment.stop_pts
        index, before_s, after = 0, None, 0
        frame: Frame | None = first
        while frame is not None:
            after += stop is not None and frame.pts >= stop
            self._see(index, frame, before_s, after)
            if after and after > self._look_ahead and not self._keyframes.holding:
                return
            index, before_s, last = index + 1, frame.time_s, frame
            frame = next(rest, None)
        self._keyframes.end(index)
        if not after:
            self._last_s = float((last.picture.duration or 0) * (last.picture.time_base or 0))

    @property
    def _look_ahead(self) -> int:
        """Frames of the next part that settle the boundaries which are this part's to find."""
        if self._boundaries is None or not self._reach:
            return 0
        return SETTLED_AFTER - 1 + self._reach

    def _see(self, index: int, frame: Frame, before_s: float | None, after: int) -> None:
        begins_file = index == 0 and self._segment.index == 0
        ours = after <= 1 and (index > 0 or begins_file)
        wanted = after <= 1
        image = score = None
        if wanted or self._scorer is not None:
            slot = self._signals.slot(index, frame) if wanted else None
            image = self._shrinker.luma(frame.picture, self._signals.size, slot)
        if self._scorer is not None and image is not None:
            small = self._shrinker.colour(frame.picture, image, self._small)
            score = self._scorer.score(small)
        if wanted:
            self._pts.append(frame.pts)
            self._times.append(frame.time_s)
            self._scores.append(math.nan if score is None else score)
        self._keyframes.push(index, frame, before_s, ours=ours)
        if begins_file:
            self._keyframes.begin(0)
        self._settle(index, frame.time_s, score, after)

    def _settle(self, index: int, time_s: float, score: float | None, after: int) -> None:
        """Lets keyframes begin anew where a boundary is found that this part is to find."""
        if self._boundaries is None:
            return
        if index == 0 and self._segment.index and self._reach:
            score = None  # it compares with a frame of the part before
        boundary = self._boundaries.push(index, time_s, score)
        if boundary is None or (self._segment.index and boundary < SETTLED_AFTER):
            return
        first_after = index - after + 1 if after else index + 1
        if boundary - first_after < SETTLED_AFTER:
            self._keyframes.begin(boundary)
        else:
            self._keyframes.end(boundary)

    def result(self, video: Video) -> SegmentScan:
        """What the part gives."""
        found = self._keyframes.found
        columns = {
            "pts": pa.array(self._pts, pa.int64()),
            "time_s": pa.array(self._times, pa.float64()),
            "score": pa.array(self._scores, pa.float64()),
        }
        return SegmentScan(
            index=self._segment.index,
            frames=pa.table(columns | self._signals.columns()),
            keyframes=pa.Table.from_pylist(
                [dataclasses.asdict(k) for k in found], schema=_CANDIDATES
            ),
            frames_decoded=video.frames_decoded,
            last_s=self._last_s,
        )


class _Signals:
    """Runs the signals on batches of small pictures, each with the last picture before it."""

    def __init__(self, signals: Sequence[FrameSignal], size: tuple[int, int]):
        self.size = size
        self._functions = [(signal.writes, signal.load()) for signal in signals]
        self._images = np.empty((_BATCH + 1, size[1], size[0]), np.uint8)
        self._frames: list[tuple[int, float, bool]] = []
        self._context = 0
        self._found: list[list[pa.Array]] = [[] for _ in signals]

    def slot(self, index: int, frame: Frame) -> np.ndarray:
        """Where the next frame's picture goes."""
        if len(self._frames) == len(self._images):
            self._measure()
        self._frames.append((index, frame.time_s, frame.picture.pict_type == PictureType.I))
        return self._images[len(self._frames) - 1]

    def columns(self) -> dict[str, pa.ChunkedArray]:
        """What the signals gave for every frame."""
        if len(self._frames) > self._context:
            self._measure()
        return {
            schema.names[0]: pa.chunked_array(chunks, schema.field(0).type)
            for (schema, _), chunks in zip(self._functions, self._found, strict=True)
        }

    def _measure(self) -> None:
        count = len(self._frames)
        indices, times, key = zip(*self._frames, strict=True)
        table = frames_table(indices, times, key, self._images[:count])
        for (schema, function), chunks in zip(self._functions, self._found, strict=True):
            column = function(table)[schema.names[0]].combine_chunks()
            chunks.append(column.slice(self._context))
        self._images[0] = self._images[count - 1]
        self._frames, self._context = self._frames[-1:], 1


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
            row.update(_outside(span, end_s))
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


def _outside(span: tuple[float, float], end_s: float) -> dict[str, Any]:
    return {
        "start_s": span[0],
        "end_s": span[1],
        "error_type": "SpanOutside",
        "error": f"span {span[0]:g}-{span[1]:g} s lies outside the video (0.0-{end_s:.1f} s)"
        if span[0] >= end_s or span[1] <= span[0]
        else f"span {span[0]:g}-{span[1]:g} s holds no frame",
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
