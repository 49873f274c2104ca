"""Drift against closed forms: videos that get brighter, noisier or blurred at a known rate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import av
import clips
import cv2
import numpy as np
import pyarrow as pa
import pytest

from engine.operator import Failed, results
from evals import drift, segments
from evals.dimensions import DIMENSIONS
from evals.metric import ASKED, Metric
from evals.native import Native
from evals.segments import TooShort

NUM_FRAMES, FPS, SIDE = 40, 20, 64
HEAD, TAIL = range(6), range(34, 40)


@dataclass(frozen=True, kw_only=True)
class OfFrames(Metric):
    """A metric of grey frames: all that a new one needs is `_score` and what it is called."""

    implementation: ClassVar[str] = "test"

    def load(self) -> Callable[[pa.Table], pa.Table]:
        def measure(asked: pa.Table) -> pa.Table:
            return results(self.writes, [self._row(row) for row in asked.to_pylist()])

        return measure

    def _row(self, asked: dict[str, Any]) -> dict[str, Any] | Failed:
        try:
            frames = list(decoded(asked["path"]))[asked["start_frame"] : asked["stop_frame"]]
        except (av.error.FFmpegError, IndexError) as error:
            return Failed(type(error).__name__, "the file is no video")
        scores = self._score(np.stack(frames).astype(float))
        known = [score for score in scores if score is not None]
        return {
            "raw_score": sum(known) / len(known),
            "frame_scores": scores,
            "num_frames": len(frames),
            "details": "{}",
        }

    def _score(self, frames: np.ndarray) -> list[float | None]:
        raise NotImplementedError


class Brightness(OfFrames):
    """Mean luma."""

    def _score(self, frames: np.ndarray) -> list[float | None]:
        return frames.mean((1, 2)).tolist()


class Sharpness(OfFrames):
    """Gradient energy along lines, away from the border: over 64 pixels."""

    def _score(self, frames: np.ndarray) -> list[float | None]:
        return (np.diff(frames[:, :, 16:-15], axis=2) ** 2).mean((1, 2)).tolist()


class Steadiness(OfFrames):
    """1 - MAE/255 of each frame and the next; the last frame has no next."""

    def _score(self, frames: np.ndarray) -> list[float | None]:
        return [*(1 - np.abs(np.diff(frames, axis=0)).mean((1, 2)) / 255).tolist(), None]


def decoded(path: str) -> Iterator[np.ndarray]:
    """Luma as it is coded."""
    with av.open(path) as container:
        for frame in container.decode(video=0):
            plane = frame.planes[0]
            lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            yield lines[: frame.height, : frame.width].copy()


def written(path: Path, frames: Sequence[np.ndarray]) -> str:
    """A file whose luma is the frames, to the bit."""
    options = {"qp": "0", "preset": "ultrafast"}
    return str(clips.encode(path, frames, fps=FPS, full_range=True, options=options))


def rows_of(
    metric: Metric, paths: Sequence[str], spans: Sequence[tuple[int, int] | None] = (None,)
) -> list[dict[str, Any]]:
    """As `scores` holds what a metric gives."""
    asked = [
        {"path": path, "dimension": metric.dimensions[0], "prompt": "a", "auxiliary": None}
        | dict(zip(("start_frame", "stop_frame"), span or (None, None), strict=True))
        for path in paths
        for span in spans
    ]
    found = metric.load()(pa.Table.from_pylist(asked, ASKED)).to_pylist()
    return [
        row
        | {
            "model": "m",
            "dimension": ask["dimension"],
            "prompt": Path(ask["path"]).stem,
            "sample": 0,
            "segment": None if ask["start_frame"] is None
            else segments.str_of((ask["start_frame"], ask["stop_frame"])),
            "fps": FPS,
        }
        for ask, row in zip(asked, found, strict=True)
    ]  # fmt: skip


def row(**given: Any) -> dict[str, Any]:
    """A row of `scores` by hand."""
    return {
        "model": "m", "dimension": "x", "prompt": "a", "sample": 0, "segment": None,
        "raw_score": 50.0, "frame_scores": None, "num_frames": 100, "details": None, "fps": 10.0,
    } | given  # fmt: skip


def ramp(start: float, stop: float, num_frames: int = 100, **given: Any) -> dict[str, Any]:
    """A row whose frame scores go from one number to another."""
    return row(
        frame_scores=np.linspace(start, stop, num_frames).tolist(), num_frames=num_frames, **given
    )


def test_brightness_that_grows_by_r_a_frame_drifts_by_r_times_n_minus_m(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.mp4", [np.full((SIDE, SIDE), 20 + 3 * t, np.uint8) for t in range(NUM_FRAMES)]
    )
    found = drift.measure(rows_of(Brightness(dimensions=("brightness",)), [path]))
    assert found.absolute.mean == found.signed.mean == 3 * (NUM_FRAMES - 6)
    assert found.slope_per_second.mean == pytest.approx(3 * FPS)
    assert found.r_squared.mean == pytest.approx(1)
    assert found.worst_drop.mean == 0
    # Tenths of 4 frames are 12 brighter each, from 24.5: linear weights 9 .. 1 for 1 .. 9 steps.
    steps = sum((10 - i) * 12 * i for i in range(1, 10))
    assert found.vde_linear.mean == pytest.approx(steps / 24.5)
    assert found.vde_linear_mean.mean == pytest.approx(steps / 24.5 / 45)
    assert found.num_videos == 1
    assert found.absolute.stderr is None


def test_a_video_that_darkens_has_the_same_contrast_and_a_drop(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.mp4",
        [np.full((SIDE, SIDE), 200 - 3 * t, np.uint8) for t in range(NUM_FRAMES)],
    )
    found = drift.measure(rows_of(Brightness(dimensions=("brightness",)), [path]))
    assert (found.absolute.mean, found.signed.mean) == (3 * 34, -3 * 34)
    assert found.worst_drop.mean == pytest.approx(12 * 9)


def test_noise_that_grows_makes_flicker_by_the_mean_of_a_folded_normal(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    sigmas = 2 + 0.25 * np.arange(NUM_FRAMES)
    frames = [np.rint(128 + s * rng.normal(size=(96, 96))).astype(np.uint8) for s in sigmas]
    path = written(tmp_path / "a-0.mp4", frames)
    # |x - y| of two normals: sqrt(2 / pi) times the deviation; rounding adds 1/12 to each variance.
    changes = math.sqrt(2 / math.pi) * np.sqrt(sigmas[:-1] ** 2 + sigmas[1:] ** 2 + 1 / 6) / 255
    error = 0.75 * changes[34:39].mean() / math.sqrt(5 * 96 * 96)

    ours = drift.measure(rows_of(Steadiness(dimensions=("steadiness",)), [path]))
    expected = changes[0:6].mean() - changes[34:39].mean()
    assert ours.signed.mean == pytest.approx(expected, abs=4 * error)
    assert abs(expected) > 100 * error

    # The other way round: the first frame has none before it.
    flickering = Native(cache=str(tmp_path), dimensions=("temporal_flickering",))
    found = drift.measure(rows_of(flickering, [path]))
    expected = changes[0:5].mean() - changes[33:39].mean()
    assert found.signed.mean == pytest.approx(expected, abs=4 * error)
    assert found.slope_per_second.mean == pytest.approx(
        FPS * np.polyfit(range(39), -changes, 1)[0], rel=0.02
    )

    # Measured alone, the last frames do not see the one before them: one change less.
    ends = rows_of(flickering, [path], [None, *segments.head_tail(NUM_FRAMES)])
    alone = drift.measure([row | {"frame_scores": None} for row in ends])
    expected = changes[0:5].mean() - changes[34:39].mean()
    assert alone.signed.mean == pytest.approx(expected, abs=4 * error)


def test_blur_that_grows_takes_gradient_energy_as_it_must(tmp_path: Path) -> None:
    k = 2 * math.pi / 16
    wave = np.tile(100 * np.cos(k * np.arange(96)), (96, 1))
    variances = 1 + 0.2 * np.arange(NUM_FRAMES)
    frames = [
        np.rint(128 + cv2.GaussianBlur(wave, (0, 0), math.sqrt(v))).astype(np.uint8)
        for v in variances
    ]
    found = drift.measure(
        rows_of(Sharpness(dimensions=("sharpness",)), [written(tmp_path / "a.mp4", frames)])
    )
    # A Gaussian of variance v leaves exp(-k² v / 2) of a wave's amplitude.
    energy = (100 * 2 * math.sin(k / 2)) ** 2 / 2 * np.exp(-(k**2) * variances)
    assert found.signed.mean == pytest.approx(energy[TAIL].mean() - energy[HEAD].mean(), rel=0.01)
    parts = energy.reshape(10, 4).mean(1)
    assert found.worst_drop.mean == pytest.approx(parts[0] - parts[-1], rel=0.01)


def test_a_constant_video_reads_0_in_everything(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", [clips.texture(SIDE, SIDE)] * NUM_FRAMES)
    metrics = [kind(dimensions=("x",)) for kind in (Brightness, Sharpness, Steadiness)]
    for metric in (*metrics, Native(cache=str(tmp_path), dimensions=("temporal_flickering",))):
        found = drift.measure(rows_of(metric, [path])).to_dict()
        for name in (
            "absolute",
            "signed",
            "vde_linear_mean",
            "vde_linear",
            "vde_log_mean",
            "slope_per_second",
            "worst_drop",
        ):
            assert found[name]["mean"] == 0, (metric, name)
        assert found["r_squared"]["mean"] is None


def test_parts_scored_alone_give_what_scores_of_frames_give(tmp_path: Path) -> None:
    frames = [np.full((SIDE, SIDE), 20 + 3 * t, np.uint8) for t in range(NUM_FRAMES)]
    metric, path = Brightness(dimensions=("brightness",)), written(tmp_path / "a.mp4", frames)
    spans = [None, *segments.head_tail(NUM_FRAMES), *segments.equal_parts(NUM_FRAMES)]
    by_parts = [r | {"frame_scores": None} for r in rows_of(metric, [path], spans)]
    one, other = drift.measure(rows_of(metric, [path])), drift.measure(by_parts)
    for name in (
        "absolute",
        "signed",
        "vde_linear_mean",
        "vde_linear",
        "vde_log",
        "worst_drop",
        "slope_per_second",
    ):
        assert getattr(other, name).mean == pytest.approx(getattr(one, name).mean), name


def test_a_file_that_is_no_video_is_counted_and_the_rest_is_measured(tmp_path: Path) -> None:
    good = written(
        tmp_path / "a.mp4", [np.full((SIDE, SIDE), 100 + t, np.uint8) for t in range(NUM_FRAMES)]
    )
    bad = tmp_path / "b.mp4"
    bad.write_bytes(b"nothing")
    found = drift.measure(rows_of(Brightness(dimensions=("x",)), [good, str(bad)]))
    assert (found.num_videos, found.num_failed, found.num_unmeasured) == (1, 1, 0)
    assert found.absolute.mean == 34
    assert found.reasons == {"the file is no video": 1}
    (cell,) = drift.cells([found])
    assert (cell.num_expected, cell.num_videos, cell.num_failed) == (2, 1, 1)
    assert not cell.is_complete


def test_opposite_drifts_do_not_cancel() -> None:
    rows = [ramp(10, 20), ramp(20, 10, sample=1), ramp(30, 30, prompt="b")]
    found = drift.measure(rows)
    step = 10 / 99 * 85
    assert found.absolute.mean == pytest.approx(2 * step / 3)
    assert found.signed.mean == pytest.approx(0)
    # Prompts' sums about the mean: a -2/3 + 2 * 1, b -2/3, times step; 2 prompts, 3 videos.
    assert found.absolute.stderr == pytest.approx(math.sqrt(2 * 2 * (2 / 3 * step) ** 2) / 3)
    assert found.num_videos == 3


def test_the_contrast_of_frame_scores_leaves_out_frames_without_one() -> None:
    scores = [None, 1.0, 1.0, *[9.0] * 14, 4.0, None, 4.0]
    assert drift.from_frame_scores(scores, 20) == (3.0, 3.0)
    assert drift.from_frame_scores([None] * 3 + [1.0] * 17, 20) is None
    assert drift.start_end(0.9, 0.4) == (-0.5, 0.5)
    with pytest.raises(ValueError, match="20 frames have 3 scores"):
        drift.from_frame_scores([1.0] * 3, 20)


def test_vde_by_hand() -> None:
    parts = [1.0, 0.9, 1.2, 0.5]
    # 3 * 0.1 + 2 * 0.2 + 1 * 0.5, of weights that sum to 6
    assert drift.vde(parts) == (pytest.approx(1.2), pytest.approx(0.2), None)
    total = 0.1 * math.log(3) + 0.2 * math.log(2)
    assert drift.vde(parts, "log") == (
        pytest.approx(total),
        pytest.approx(total / math.log(6)),
        None,
    )
    assert drift.vde([2 * part for part in parts])[0] == pytest.approx(1.2)


@pytest.mark.parametrize("parts", [[0.0, 1.0], [-0.1, 1.0], [1.0], [1.0, None]])
def test_vde_is_nothing_rather_than_infinite(parts: list[float | None]) -> None:
    total, mean, reason = drift.vde(parts)
    assert total is None
    assert mean is None
    assert reason
    assert reason.startswith("VDE ")


def test_slope_is_that_of_least_squares() -> None:
    assert drift.slope([1, None, 2, 2.5], [0, 2, 4, 6]) == (pytest.approx(0.25), pytest.approx(1))
    # 0 1 0 1 about 0.5, times about 1.5: slope 1 / 5, and it explains 1/5 of a variance of 1.
    assert drift.slope([0, 1, 0, 1], [0, 1, 2, 3]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert drift.slope([0.1] * 10, range(10)) == (0, None)
    assert drift.slope([1, None], [0, 1]) == (None, None)
    assert drift.slope([], []) == (None, None)


def test_the_worst_drop_is_below_the_best_before_it() -> None:
    assert drift.worst_segment_drop([0.5, 0.9, 0.6, 0.8, 0.4]) == pytest.approx(0.5)
    assert drift.worst_segment_drop([0.1, 0.2, 0.2]) == 0
    assert drift.worst_segment_drop([0.5, None, 0.2]) == pytest.approx(0.3)
    assert drift.worst_segment_drop([0.5]) is None


def test_cells_are_on_the_scale_of_scores() -> None:
    rows = [ramp(60, 40), ramp(60, 20, prompt="b"), row(prompt="c", raw_score=None, error="bad")]
    found = drift.measure([row | {"dimension": "imaging_quality"} for row in rows])
    (cell,) = drift.cells([found], num_expected=5, notes=("native",))
    assert (cell.model, cell.column, cell.category) == ("m", "drift:imaging_quality", None)
    assert cell.value == pytest.approx(30 / 99 * 85 / 100)
    assert cell.stderr == pytest.approx(10 / 99 * 85 / 100)
    assert (cell.num_videos, cell.num_prompts, cell.num_expected, cell.num_failed) == (2, 2, 5, 1)
    assert [v.score is None for v in cell.values] == [False, False, True]
    assert cell.values[2].error == "bad"
    assert cell.notes == ("native",)
    assert drift.header() == "Δdrift (imaging_quality)"


def test_a_yes_or_no_says_that_its_drift_is_coarse() -> None:
    rows = [
        row(dimension="dynamic_degree", prompt=prompt, segment=where, raw_score=score)
        for prompt, scores in {"a": (1, 1, 0), "b": (1, 1, 1)}.items()
        for where, score in zip((None, "0:15", "85:100"), scores, strict=True)
    ]
    found = drift.measure(rows)
    assert (found.absolute.mean, found.signed.mean) == (0.5, -0.5)
    assert "share of videos that switch" in found.notes[0]


def test_what_lacks_a_part_says_why() -> None:
    def of(**given: Any) -> drift.DriftSummary:
        return drift.measure([row(dimension="temporal_style", raw_score=0.2, **given)])

    assert of().reasons == {"start and end of the video were not scored": 1}
    assert of().num_unmeasured == 1
    (reason,) = of(num_frames=53).reasons
    assert "15% of 53 frames are 7, and 8 at each end are needed: a video of 54" in reason
    ends = [row(segment="0:15"), row(segment="85:100", raw_score=None, error="too dark")]
    found = drift.measure([row(), *ends])
    assert found.reasons == {"frames 85:100: too dark": 1}
    assert found.num_failed == 1
    unknown = drift.measure([ramp(1, 2, fps=None)])
    assert unknown.slope_per_second.mean is None
    assert unknown.absolute.mean is not None
    assert "frame rate" in next(iter(unknown.reasons))


def test_a_long_video_needs_no_row_of_the_whole() -> None:
    clip = {"video_frames": 100, "num_frames": 20, "frame_scores": [1.0] * 20}
    spans = segments.two_second_clips(100, 10.0)
    rows = [row(**clip, segment=segments.str_of(s), raw_score=90.0 - s[0]) for s in spans]
    assert drift.measure(rows).reasons == {"start and end of the video were not scored": 1}
    head, tail = segments.head_tail(100)
    rows += [
        row(**clip, segment=segments.str_of(head), raw_score=80.0),
        row(**clip, segment=segments.str_of(tail), raw_score=30.0),
    ]
    found = drift.measure(rows)
    assert found.signed.mean == -50
    assert found.slope_per_second.mean == pytest.approx(-10)
    assert found.worst_drop.mean == 80
    assert found.vde_linear_mean.mean is None


def test_similarity_is_averaged_at_distances_that_all_videos_have() -> None:
    def told(dt_frames: list[int], similarity: list[float], **given: Any) -> dict[str, Any]:
        at = {"dt_frames": dt_frames, "similarity": similarity}
        return ramp(
            1, 2, details={"head_tail_similarity": similarity[-1], "similarity_at": at}, **given
        )

    rows = [
        told([5, 10, 20], [0.9, 0.8, 0.6], fps=10.0),
        told([10, 20], [0.7, 0.4], fps=20.0, prompt="b"),
        ramp(1, 2, prompt="c"),
    ]
    rows[0]["details"] = json.dumps(rows[0]["details"])
    found = drift.measure(rows)
    assert found.similarity_at == ((0.5, pytest.approx(0.8)), (1.0, pytest.approx(0.6)))
    assert found.head_tail_similarity.mean == pytest.approx(0.5)
    assert found.head_tail_similarity.num_videos == 2
    assert drift.mean_curve([]) == ()


def test_a_summary_goes_into_json_and_by_category() -> None:
    rows = [ramp(1, 2, categories=("x",)), ramp(1, 3, prompt="b", categories=("y",))]
    found = drift.measure(rows, category="y")
    assert (found.category, found.num_videos) == ("y", 1)
    said = json.loads(json.dumps(found.to_dict()))
    assert said["absolute"]["mean"] == pytest.approx(2 / 99 * 85)
    with pytest.raises(ValueError, match="at least one row"):
        drift.measure(rows, category="z")
    with pytest.raises(ValueError, match="one model in one dimension"):
        drift.measure([row(), row(model="other")])


def test_head_and_tail_are_shares_of_frames_rounded_down() -> None:
    assert segments.head_tail(40) == ((0, 6), (34, 40))
    assert segments.head_tail(33) == ((0, 4), (29, 33))
    assert segments.head_tail(2) == ((0, 1), (1, 2))
    with pytest.raises(TooShort):
        segments.head_tail(1)
    for least in (1, 2, 3, 8):
        first = segments.shortest(min_frames=least)
        segments.head_tail(first, min_frames=least)
        with pytest.raises(TooShort, match=f"a video of {first} frames"):
            segments.head_tail(first - 1, min_frames=least)
    with pytest.raises(ValueError, match=r"at most 0\.5, not 0\.6"):
        segments.head_tail(10, 0.6)


def test_clips_of_two_seconds_by_frame_index() -> None:
    assert segments.two_second_clips(100, 25) == [(0, 50), (50, 100)]
    assert segments.two_second_clips(120, 25) == [(0, 50), (50, 100), (70, 120)]
    assert segments.two_second_clips(30, 25) == [(0, 30)]
    assert segments.two_second_clips(50, 25) == [(0, 50)]
    assert segments.two_second_clips(59, 29.97) == [(0, 58), (1, 59)]
    with pytest.raises(ValueError, match="at least one frame"):
        segments.two_second_clips(30, 0.5)


def test_parts_tile_the_video() -> None:
    parts = segments.equal_parts(37)
    assert len(parts) == 10
    assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == (0, 37)
    assert {stop - start for start, stop in parts} == {3, 4}
    with pytest.raises(TooShort, match="9 frames do not make 10 parts"):
        segments.equal_parts(9)


def test_spans_are_written_and_read() -> None:
    assert segments.parse(segments.str_of((12, 40))) == (12, 40)
    for text in ("12", "40:12", "1:1", "-1:3", "a:b"):
        with pytest.raises(ValueError, match="a span of frames"):
            segments.parse(text)


def test_only_what_drift_lacks_is_scored_beside_the_video() -> None:
    assert drift.needed_segments(True, 100, 1) == []
    assert drift.needed_segments(False, 100, 3) == [(0, 15), (85, 100)]
    assert drift.needed_segments(False, 19, 3) == []
    assert len(drift.needed_segments(False, 100, 3, parts=10)) == 12
    assert drift.needed_segments(False, 20, 3, parts=10) == [(0, 3), (17, 20)]
    motion, text = DIMENSIONS["motion_smoothness"], DIMENSIONS["overall_consistency"]
    assert (segments.least(motion), segments.least(text)) == (3, 8)
    assert drift.needed_segments(False, 53, segments.least(text)) == []
    assert drift.needed_segments(False, 54, segments.least(text)) == [(0, 8), (46, 54)]
