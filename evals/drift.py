"""How videos change from start to end, from scores that are stored: nothing is measured here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from evals import segments
from evals.compare import mean_and_error
from evals.dimensions import DIMENSIONS
from evals.metric import NO_OBJECT
from evals.results import Cell, Value
from evals.segments import SHARE, Span, TooShort

COLUMN = "drift:"
"""Before a dimension's name, in `Cell.column`."""
HEADLINE = "imaging_quality"
"""The dimension of a table's only drift column. SemanticGen (arXiv 2512.20619) prints one and does
not say of what; this is FramePack's Clarity, which its table of long videos has as well."""

Scores = Sequence[float | None]
Row = Mapping[str, Any]


class StartEnd(NamedTuple):
    """FramePack's start-end contrast of a video."""

    signed: float
    """End - start: below 0 where the video gets worse."""
    absolute: float


class Vde(NamedTuple):
    """BlockVid's video drift error: how far parts of a video are from its first."""

    total: float | None
    """As published."""
    mean: float | None
    """Divided by the sum of weights: the relative distance of a part, on average."""
    reason: str | None = None
    """Why there is none."""


class Slope(NamedTuple):
    """A straight line through scores, by least squares."""

    per_second: float | None
    r_squared: float | None
    """Share of the variance that it explains; None where there is no variance."""


class Estimate(NamedTuple):
    """A mean over videos."""

    mean: float | None
    """None where no video has a number."""
    stderr: float | None
    """Over prompts, as `evals.compare.mean_and_error` has it."""
    num_videos: int


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Of one video in one dimension, scores times `Dimension.scale`; None where there is none."""

    prompt: str
    sample: int
    categories: tuple[str, ...] = ()
    num_frames: int | None = None
    start_end: StartEnd | None = None
    vde_linear: Vde | None = None
    vde_log: Vde | None = None
    slope: Slope | None = None
    worst_drop: float | None = None
    head_tail_similarity: float | None = None
    similarity_at: tuple[tuple[float, float], ...] = ()
    """Distance in seconds, and mean similarity of frames that far apart."""
    is_failed: bool = False
    """A row that it needs has an error instead of a score."""
    reasons: tuple[str, ...] = ()
    """Why something is missing."""


@dataclass(frozen=True, kw_only=True)
class DriftSummary:
    """Of one model in one dimension: means over videos, scores times `Dimension.scale`."""

    model: str
    dimension: str
    category: str | None
    absolute: Estimate
    """FramePack's number: the mean of |end - start|, not |mean of end - start|. A model that gets
    better as often as it gets worse has drift."""
    signed: Estimate
    """The mean of end - start: below 0 where videos get worse."""
    vde_linear: Estimate
    """As published, the sum over parts; `_mean`: divided by the sum of weights."""
    vde_linear_mean: Estimate
    vde_log: Estimate
    vde_log_mean: Estimate
    slope_per_second: Estimate
    r_squared: Estimate
    worst_drop: Estimate
    head_tail_similarity: Estimate
    similarity_at: tuple[tuple[float, float], ...]
    """Distance in seconds and similarity, mean over videos, at distances that all of them have."""
    num_videos: int
    """With a start-end contrast."""
    num_failed: int
    """With a row that could not be scored."""
    num_unmeasured: int
    """Without a contrast for another reason: too short, or not scored at start and end."""
    reasons: Mapping[str, int]
    """Why something is missing, and in how many videos."""
    notes: tuple[str, ...] = ()
    drifts: tuple[Drift, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the single videos."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del found["drifts"]
        return {k: v._asdict() if isinstance(v, Estimate) else v for k, v in found.items()}


_MEANS: Mapping[str, Callable[[Drift], float | None]] = {
    "absolute": lambda d: d.start_end and d.start_end.absolute,
    "signed": lambda d: d.start_end and d.start_end.signed,
    "vde_linear": lambda d: d.vde_linear and d.vde_linear.total,
    "vde_linear_mean": lambda d: d.vde_linear and d.vde_linear.mean,
    "vde_log": lambda d: d.vde_log and d.vde_log.total,
    "vde_log_mean": lambda d: d.vde_log and d.vde_log.mean,
    "slope_per_second": lambda d: d.slope and d.slope.per_second,
    "r_squared": lambda d: d.slope and d.slope.r_squared,
    "worst_drop": lambda d: d.worst_drop,
    "head_tail_similarity": lambda d: d.head_tail_similarity,
}


def start_end(head: float, tail: float) -> StartEnd:
    """The contrast of a score of the head and one of the tail.

    Absolute, since a model may generate in reverse order.

    Source:
        FramePack (arXiv 2504.12626), eq. 7.
    """
    return StartEnd(tail - head, abs(tail - head))


def from_frame_scores(
    frame_scores: Scores, num_frames: int, share: float = SHARE
) -> StartEnd | None:
    """The contrast of the means of per-frame scores; None where a part has no score.

    Args:
        frame_scores: One a frame; None for a frame without one.
        num_frames: Of the video.
        share: Of the frames, at each end.

    Raises:
        TooShort: A video of less than two frames.
    """
    if len(frame_scores) != num_frames:
        raise ValueError(f"{num_frames} frames have {len(frame_scores)} scores: one each is needed")
    head, tail = _part_means(frame_scores, segments.head_tail(num_frames, share))
    return None if head is None or tail is None else start_end(head, tail)


def vde(parts: Scores, weights: Literal["linear", "log"] = "linear") -> Vde:
    """The video drift error: sum of w_i |m_i - m_1| / m_1 over parts i = 2 .. N.

    w_i is N - i + 1 or its logarithm: early changes count most. The public code gives infinity
    where m_1 is 0; here there is no number then, and none for a first part below 0.

    Args:
        parts: Scores of N equal parts in their order.
        weights: "linear" or "log".

    Source:
        BlockVid (arXiv 2511.22973); N = 10.
    """
    if weights not in ("linear", "log"):
        raise ValueError(f"weights are linear or log, not {weights!r}")
    if len(parts) < 2:
        return Vde(None, None, "VDE needs two parts of the video")
    if any(part is None for part in parts):
        return Vde(None, None, "VDE needs a score of each part of the video")
    values = np.asarray(parts, float)
    if values[0] <= 0:
        return Vde(None, None, "VDE divides by the first part's score, which is not above 0")
    weight = np.arange(len(values) - 1, 0, -1.0)
    if weights == "log":
        weight = np.log(weight)
    total = float(weight @ np.abs(values[1:] - values[0]) / values[0])
    return Vde(total, total / float(weight.sum()) if weight.sum() > 0 else None)


def slope(values: Scores, times_s: Sequence[float]) -> Slope:
    """How fast scores change, per second, by least squares; those without a score are left out.

    Equal scores have slope 0 and no R². Misleads where a score jumps: see R².
    """
    pairs = [(t, v) for v, t in zip(values, times_s, strict=True) if v is not None]
    times, scores = np.array(pairs, float).reshape(-1, 2).T
    if len(pairs) < 2 or np.ptp(times) == 0:
        return Slope(None, None)
    if np.ptp(scores) == 0:
        return Slope(0.0, None)
    times, scores = times - times.mean(), scores - scores.mean()
    per_second = float(times @ scores / (times @ times))
    rest = scores - per_second * times
    return Slope(per_second, float(1 - rest @ rest / (scores @ scores)))


def worst_segment_drop(parts: Scores) -> float | None:
    """The deepest fall of a part below the best part before it; 0 where none falls.

    The best before it, not the first: a fall that follows a rise counts in full.
    """
    values = np.array([part for part in parts if part is not None], float)
    if len(values) < 2:
        return None
    return float((np.maximum.accumulate(values) - values).max())


def mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[tuple[float, float], ...]:
    """Similarity against distance, mean over videos.

    At distances that all of them have: with the longer ones of long videos alone the curve would
    bend where short videos end.
    """
    points = [{round(dt, 6): similarity for dt, similarity in curve} for curve in curves if curve]
    if not points:
        return ()
    common = sorted(set.intersection(*(set(point) for point in points)))
    return tuple((dt, float(np.mean([point[dt] for point in points]))) for dt in common)


def needed_segments(
    dimension_has_frame_scores: bool,
    num_frames: int,
    min_frames: int,
    *,
    share: float = SHARE,
    parts: int = 0,
) -> list[Span]:
    """What must be scored beside the whole video for its drift; nothing where it is too short.

    Args:
        dimension_has_frame_scores: The whole video's row then has all that is needed.
        num_frames: Of the video.
        min_frames: That the metric needs in a part (`segments.least`).
        share: Of the frames, at each end.
        parts: Equal parts to be scored for VDE, slope and worst drop as well; 0 is none.
    """
    if dimension_has_frame_scores:
        return []
    found: list[Span] = []
    try:
        found += segments.head_tail(num_frames, share, min_frames)
        found += segments.equal_parts(num_frames, parts) if parts else []
    except TooShort:
        return found  # and the drift of the video says why there is none
    return [span for span in dict.fromkeys(found) if span[1] - span[0] >= min_frames]


def measure(
    rows: Sequence[Row], *, share: float = SHARE, category: str | None = None
) -> DriftSummary:
    """The drift of a model's videos in one dimension.

    Where the whole video's row has `frame_scores`, all comes from them. Else the contrast comes
    from the rows of head and tail (`needed_segments`); slope (against a part's middle) and worst
    drop from the other parts that are scored, such as two-second clips; VDE from ten equal ones.

    Args:
        rows: Of `scores`, all of one model, dimension and metric: `model`, `dimension`, `prompt`,
            `sample`, `segment`, `raw_score`, `frame_scores`, `num_frames`, `details` (JSON, or what
            it says). Besides, where known: `fps` of the video (else nothing is per second),
            `video_frames` of the file (needed where the whole video has no row), `categories` of
            the prompt. A row without `raw_score` failed.
        share: Of the frames, at each end.
        category: Only of videos in it.
    """
    rows = [row for row in rows if category is None or category in (row.get("categories") or ())]
    of = sorted({(row["model"], row["dimension"]) for row in rows})
    if not of:
        raise ValueError("drift needs at least one row of scores")
    if len(of) > 1:
        raise ValueError(f"drift is of one model in one dimension, and these are of {of}")
    ((model, dimension),) = of
    videos: dict[tuple[str, int], dict[str | None, Row]] = defaultdict(dict)
    for row in rows:
        videos[row["prompt"], row["sample"]][row["segment"]] = row
    drifts = tuple(_of_video(found, dimension, share) for found in videos.values())
    measured = [drift for drift in drifts if drift.start_end]
    failed = sum(drift.is_failed for drift in drifts)
    reasons = [reason for drift in drifts for reason in drift.reasons]
    return DriftSummary(
        model=model,
        dimension=dimension,
        category=category,
        **{name: _mean(drifts, get) for name, get in _MEANS.items()},
        similarity_at=mean_curve([drift.similarity_at for drift in drifts]),
        num_videos=len(measured),
        num_failed=failed,
        num_unmeasured=len(drifts) - len(measured) - failed,
        reasons={reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
        notes=_notes(dimension),
        drifts=drifts,
    )


def cells(
    summaries: Sequence[DriftSummary], *, num_expected: int | None = None, notes: Sequence[str] = ()
) -> list[Cell]:
    """Start-end contrasts as cells of a table, column `drift:DIMENSION`.

    Args:
        summaries: Of models, dimensions, categories.
        num_expected: Videos that the suite asks for; None: those that there are rows of.
        notes: Said of each beside its own.
    """
    return [
        Cell(
            model=summary.model,
            column=COLUMN + summary.dimension,
            category=summary.category,
            value=summary.absolute.mean,
            stderr=summary.absolute.stderr,
            num_videos=summary.num_videos,
            num_prompts=len({drift.prompt for drift in summary.drifts if drift.start_end}),
            num_expected=len(summary.drifts) if num_expected is None else num_expected,
            num_failed=summary.num_failed,
            notes=(*notes, *summary.notes),
            values=tuple(_value(drift) for drift in summary.drifts),
        )
        for summary in summaries
    ]


def header(dimension: str = HEADLINE) -> str:
    """How a table names its drift column: always with what drifts."""
    return f"Δdrift ({dimension})"


def _of_video(by_segment: Mapping[str | None, Row], dimension: str, share: float) -> Drift:
    known = DIMENSIONS.get(dimension)
    scale = known.scale if known else 1.0
    whole, some = by_segment.get(None), next(iter(by_segment.values()))
    about: dict[str, Any] = {
        "prompt": some["prompt"],
        "sample": some["sample"],
        "categories": tuple(some.get("categories") or ()),
    }
    if whole is not None and whole["raw_score"] is None:
        return Drift(**about, **_failed(whole))
    num_frames = some.get("video_frames") if whole is None else whole["num_frames"]
    if num_frames is None:
        return Drift(**about, reasons=("the number of the video's frames is not known",))
    about["num_frames"] = num_frames
    fps = some.get("fps")
    if whole is not None:
        about |= _similarities(whole["details"], fps)
    try:
        if whole is not None and whole["frame_scores"] is not None:
            scores = [None if s is None else s * scale for s in whole["frame_scores"]]
            return Drift(**about, **_of_frames(scores, num_frames, fps, share))
        ends = segments.head_tail(num_frames, share, segments.least(known) if known else 1)
        return Drift(**about, **_of_segments(by_segment, scale, ends, num_frames, fps))
    except ValueError as error:
        return Drift(**about, reasons=(str(error),))


def _of_frames(scores: Scores, num_frames: int, fps: float | None, share: float) -> dict[str, Any]:
    contrast = from_frame_scores(scores, num_frames, share)
    reasons = [] if contrast else ["no frame of the head or of the tail has a score"]
    found: dict[str, Any] = {"start_end": contrast, "worst_drop": None}
    if fps:
        found["slope"] = slope(scores, [index / fps for index in range(num_frames)])
    else:
        reasons.append("the frame rate is not known: nothing is per second")
    try:
        parts = _part_means(scores, segments.equal_parts(num_frames))
    except TooShort as error:
        return found | {"reasons": (*reasons, f"VDE: {error}")}
    found["worst_drop"] = worst_segment_drop(parts)
    return found | _vdes(parts, reasons)


def _of_segments(
    by_segment: Mapping[str | None, Row],
    scale: float,
    ends: tuple[Span, Span],
    num_frames: int,
    fps: float | None,
) -> dict[str, Any]:
    rows = {segments.parse(text): row for text, row in by_segment.items() if text is not None}
    scored = {
        span: None if row["raw_score"] is None else row["raw_score"] * scale
        for span, row in rows.items()
    }
    found: dict[str, Any] = {}
    tenths = segments.equal_parts(num_frames) if num_frames >= segments.PARTS else []
    has_tenths = bool(tenths) and all(span in rows for span in tenths)
    parts = tenths if has_tenths else sorted(span for span in rows if span not in ends)
    scores = [scored[span] for span in parts]
    if len(parts) > 1 and None not in scores:
        found["worst_drop"] = worst_segment_drop(scores)
        if fps:
            found["slope"] = slope(scores, [(start + stop) / 2 / fps for start, stop in parts])
    if any(end not in rows for end in ends):
        return found | {"reasons": ("start and end of the video were not scored",)}
    head, tail = (scored[end] for end in ends)
    if head is None or tail is None:
        return found | _failed(rows[ends[0] if head is None else ends[1]])
    found["start_end"] = start_end(head, tail)
    return found | _vdes(scores, []) if has_tenths else found


def _vdes(parts: Scores, reasons: Sequence[str]) -> dict[str, Any]:
    linear, log = vde(parts, "linear"), vde(parts, "log")
    why = [linear.reason] if linear.reason else []
    return {"vde_linear": linear, "vde_log": log, "reasons": (*reasons, *why)}


def _part_means(frame_scores: Scores, spans: Sequence[Span]) -> list[float | None]:
    found = []
    for start, stop in spans:
        scores = [score for score in frame_scores[start:stop] if score is not None]
        found.append(math.fsum(scores) / len(scores) if scores else None)
    return found


def _similarities(details: Any, fps: float | None) -> dict[str, Any]:
    """What a metric that embeds frames tells of their similarity, distances in seconds."""
    said = json.loads(details) if isinstance(details, str) else details
    if not isinstance(said, Mapping):
        return {}
    found: dict[str, Any] = {"head_tail_similarity": said.get("head_tail_similarity")}
    if fps and (curve := said.get("similarity_at")):
        points = zip(curve["dt_frames"], curve["similarity"], strict=True)
        found["similarity_at"] = tuple((dt / fps, s) for dt, s in points if s is not None)
    return found


def _failed(row: Row) -> dict[str, Any]:
    where = "" if row["segment"] is None else f"frames {row['segment']}: "
    said = row.get("error") or row.get("error_type") or "no score"
    return {"is_failed": row.get("error_type") != NO_OBJECT, "reasons": (f"{where}{said}",)}


def _mean(drifts: Sequence[Drift], of: Callable[[Drift], float | None]) -> Estimate:
    found = [(value, drift.prompt) for drift in drifts if (value := of(drift)) is not None]
    if not found:
        return Estimate(None, None, 0)
    values, prompts = zip(*found, strict=True)
    return Estimate(*mean_and_error(values, prompts), len(values))


def _notes(dimension: str) -> tuple[str, ...]:
    known = DIMENSIONS.get(dimension)
    if known and known.unit.endswith("(0 or 1)"):
        return (f"coarse: {dimension} is 0 or 1, so this is the share of videos that switch",)
    return ()


def _value(drift: Drift) -> Value:
    return Value(
        prompt=drift.prompt,
        sample=drift.sample,
        categories=drift.categories,
        score=drift.start_end.absolute if drift.start_end else None,
        num_frames=drift.num_frames,
        error=None if drift.start_end else "; ".join(drift.reasons),
    )
