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
from typing import ClassVar

import numpy as np
import pyarrow as pa
from av.video.frame import PictureType

from engine.assemble import Spans, assemble, described
from engine.keyframes import Keyframes, Marks
from engine.operator import Operator
from engine.picture import Shrinker, Upright, small_size
from engine.segments import Segment, plan
from engine.shots import (
    DETECTION_PX,
    SETTLED_AFTER,
    Boundaries,
    FrameScorer,
    Shots,
    look_ahead,
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
    check_complete,
    decode,
    metadata_of,
    open_video,
    probe,
)

_BATCH = 64


_CLIP = pa.schema(
    [
        described("start_s", pa.float64(), "first frame's time", "s"),
        described("end_s", pa.float64(), "end of the last frame's time", "s"),
        described("start_frame", pa.int64(), "index of the first frame in the source"),
        described("num_frames", pa.int64(), "frames in the clip"),
        described("fps", pa.float64(), "average frame rate", "frames/s"),
        described("width_px", pa.int32(), "as shown", "px"),
        described("height_px", pa.int32(), "as shown", "px"),
        described("duration_s", pa.float64(), "end_s - start_s", "s"),
        described("aspect_ratio", pa.float64(), "shown width / shown height"),
        described("codec", pa.string(), "video codec of the source"),
    ]
)
_ERRORS = pa.schema(
    [
        described("error_type", pa.string(), "class of a failed measurement"),
        described("error", pa.string(), "what was wrong, for a person"),
    ]
)
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
    row: ClassVar[str] = "source"
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


def plan_segments(
    media: Media, scan: Scan, metadata: Metadata | None = None
) -> tuple[Segment, ...]:
    """The parts that a source is scanned in, which depend on the file and `segment_s` alone.

    Args:
        media: Local path, or a seekable binary file.
        scan: Of which `segment_s` counts.
        metadata: From `probe`, which is called where it is not given.

    Raises:
        VideoError: It cannot be read as a video.
    """
    metadata = metadata or probe(media, max_pixels=scan.max_pixels)
    return plan(media, metadata, scan.segment_s, scan.max_pixels)


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
    with open_video(media, max_pixels=scan.max_pixels) as video:
        check_complete(video, media)
        metadata, part = _scan(video, scan, Segment(), spans)
    return assemble(metadata, [part], scan, spans)


def scan_segment(media: Media, scan: Scan, segment: Segment, spans: Spans = ()) -> SegmentScan:
    """Decodes a part of a source, once.

    Raises:
        VideoError: The content cannot be used.
        OSError: The file cannot be read.
    """
    with open_video(media, max_pixels=scan.max_pixels) as video:
        return _scan(video, scan, segment, spans)[1]


def _scan(video: Video, scan: Scan, segment: Segment, spans: Spans) -> tuple[Metadata, SegmentScan]:
    start = segment.start_pts
    frames = decode(video, start_pts=start, seek_ts=segment.seek_ts, max_pixels=scan.max_pixels)
    first = next(frames, None)
    if first is None:
        raise DamagedError("no frame could be decoded")
    if start is not None and first.pts != start:
        raise DamagedError(f"the key frame at {video.seconds(start):.2f} s gives no picture")
    metadata = metadata_of(video, first.picture)
    part = _Part(scan, segment, metadata, spans)
    part.read(first, frames)
    return metadata, part.result(video)


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
        return 0 if self._boundaries is None else SETTLED_AFTER - 1 + self._reach

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
