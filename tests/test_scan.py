"""The pass as a whole: rows, spans, keyframes, and parts that give what the whole gives."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest

from engine.assemble import KEYFRAMES
from engine.keyframes import Keyframe, Keyframes, Marks, choose
from engine.picture import Upright
from engine.scan import (
    Scan,
    SegmentScan,
    assemble,
    plan_segments,
    scan_segment,
    scan_source,
)
from engine.segments import Segment
from engine.signals import Brightness
from engine.video import DamagedError, Frame, Metadata, decode, open_video, probe
from tests.clips import as_frame, colourful, encode, real, shots_of

Spans = Sequence[tuple[float, float]]
LENGTHS = [30, 7, 61, 40, 3, 2, 1, 55, 120, 13, 20, 35, 50, 5, 88, 9, 44]


def rows(path: Path | str, scan: Scan | None = None, spans: Spans = ()) -> list[dict[str, Any]]:
    return scan_source(str(path), scan or Scan(), spans)[1].to_pylist()


def image_of(jpeg: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)


def whole_and_parts(path: Path | str, scan: Scan, spans: Spans = ()) -> tuple[int, Any, Any]:
    """Number of parts, what the whole gives, and what the parts give, scanned last to first."""
    media = str(path)
    metadata = probe(media)
    whole = assemble(metadata, [scan_segment(media, scan, Segment(), spans)], scan, spans)
    segments = plan_segments(media, scan)
    parts = [
        SegmentScan.from_bytes(scan_segment(media, scan, segment, spans).to_bytes())
        for segment in reversed(segments)
    ]
    return len(segments), whole, assemble(metadata, parts, scan, spans)


def assert_same(path: Path | str, scan: Scan, spans: Spans = (), least: int = 2) -> None:
    num, whole, parts = whole_and_parts(path, scan, spans)
    assert num >= least
    assert whole[0] == parts[0]
    assert whole[1].equals(parts[1])
    assert whole[2].equals(parts[2])


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """583 frames in 17 shots, some of them of one frame."""
    path = tmp_path_factory.mktemp("scan") / "edited.mp4"
    return encode(path, shots_of(LENGTHS), options={"g": "25", "bf": "3"})


# Clips.


def test_clips_are_the_shots_and_cover_every_frame(edited: Path) -> None:
    clips = rows(edited)
    found = [row["num_frames"] for row in clips]
    assert sum(found) == sum(LENGTHS)
    # Changes in each of several frames look like fast motion to Adaptive: one shot of 3+2+1+55.
    assert found == [30, 7, 61, 40, 61, 120, 13, 20, 35, 50, 5, 88, 9, 44]
    assert [row["start_frame"] for row in clips] == [0, *np.cumsum(found)[:-1].tolist()]
    for row in clips:
        assert row["start_s"] == pytest.approx(row["start_frame"] / 25)
        assert row["duration_s"] == pytest.approx(row["num_frames"] / 25)
        assert row["end_s"] - row["start_s"] == pytest.approx(row["duration_s"])
        assert (row["width_px"], row["height_px"], row["codec"]) == (160, 90, "h264")
        assert row["fps"] == 25.0


def test_columns_are_exactly_those_announced(edited: Path) -> None:
    scan = Scan()
    metadata, clips, keyframes = scan_source(str(edited), scan)
    assert clips.schema.equals(scan.writes, check_metadata=True)
    assert keyframes.schema.equals(KEYFRAMES, check_metadata=True)
    assert scan.writes.field("motion_score").metadata[b"unit"] == b"px/frame"
    assert scan.writes.field("black_frame_frac").type == pa.float32()
    assert (metadata.num_frames, metadata.duration_s) == (583, pytest.approx(583 / 25))


def test_the_operator_s_function_gives_the_same_clips(edited: Path) -> None:
    scan = Scan()
    table = scan.load()(pa.table({"path": [str(edited), str(edited)]}))
    once = scan_source(str(edited), scan)[1]
    assert table.equals(pa.concat_tables([once, once]))


def test_motion_does_not_look_across_a_cut(tmp_path: Path) -> None:
    """Still pictures that follow each other: change at every cut, motion in no clip."""
    frames = [f for seed in range(8) for f in [colourful(90, 160, seed)] * 14]
    clips = rows(encode(tmp_path / "stills.mp4", frames, options={"crf": "12"}))
    assert len(clips) == 8
    assert {row["motion_score"] for row in clips} == {0.0}


def test_long_shots_are_split_evenly_and_fixed_spans_are_not(tmp_path: Path) -> None:
    path = encode(tmp_path / "long.mp4", shots_of([110, 65]))
    assert [r["num_frames"] for r in rows(path, Scan(max_shot_s=2.0))] == [37, 37, 36, 33, 32]
    fixed = rows(path, Scan(shots="none", clip_seconds=3.0, max_shot_s=0.5))
    assert [r["num_frames"] for r in fixed] == [75, 75, 25]
    assert [r["start_s"] for r in fixed] == [0.0, 3.0, 6.0]


def test_a_span_is_one_clip_whatever_the_shots(edited: Path) -> None:
    spans = [(0.0, 1.0), (0.5, 9.99), (0.6, 1.7), (5.0, 23.0), (10.0, 99.0)]
    clips = rows(edited, Scan(max_shot_s=1.0), spans)
    starts = [-(-round(a * 100) * 25 // 100) for a, _ in spans]
    ends = [min(583, -(-round(b * 100) * 25 // 100)) for _, b in spans]
    assert [r["start_frame"] for r in clips] == starts
    assert [r["start_frame"] + r["num_frames"] for r in clips] == ends
    assert all(r["error"] is None for r in clips)


@pytest.mark.parametrize(
    ("span", "error"),
    [
        ((50.0, 60.0), "span 50-60 s lies outside the video (0.0-23.3 s)"),
        ((-2.0, -1.0), "span -2--1 s lies outside the video (0.0-23.3 s)"),
        ((4.0, 3.0), "span 4-3 s ends before it starts"),
        ((1.001, 1.002), "span 1.001-1.002 s holds no frame"),
    ],
)
def test_a_span_without_frames_is_an_error_of_its_row(
    edited: Path, span: tuple[float, float], error: str
) -> None:
    first, second = rows(edited, spans=[(0.0, 1.0), span])
    assert first["error"] is None
    assert (second["error_type"], second["error"]) == ("SpanOutside", error)
    assert (second["start_s"], second["end_s"]) == span
    assert second["num_frames"] is None and second["motion_score"] is None


def test_a_file_of_one_frame(tmp_path: Path) -> None:
    path = encode(tmp_path / "one.mp4", shots_of([1]))
    _, clips, keyframes = scan_source(str(path), Scan())
    (row,) = clips.to_pylist()
    assert (row["num_frames"], row["start_s"], row["motion_score"]) == (1, 0.0, None)
    assert (row["error_type"], row["error"]) == (
        "TooFewFrames",
        "motion_score: cannot be measured on 1 frame (0.04 s)",
    )
    assert row["brightness"] is not None
    assert keyframes["frame"].to_pylist() == [0]


def test_one_pixel_is_a_video_too() -> None:
    (row,) = rows(real("Zulko__moviepy__bitmap.mp4"))
    assert (row["width_px"], row["height_px"], row["num_frames"]) == (1, 1, 5)


def test_a_signal_is_added_by_one_class(edited: Path) -> None:
    scan = Scan(signals=(Brightness(),))
    assert scan.writes.names[-3:] == ["brightness", "error_type", "error"]
    assert rows(edited, scan)[0]["brightness"] == rows(edited)[0]["brightness"]


def test_the_fingerprint_holds_what_changes_the_numbers() -> None:
    assert Scan().fingerprint == Scan().fingerprint
    changed = [
        Scan(shots="content"),
        Scan(max_shot_s=10.0),
        Scan(signals=(Brightness(),)),
        Scan(jpeg_quality=80),
    ]
    assert len({s.fingerprint for s in [Scan(), *changed]}) == 5


@pytest.mark.parametrize("name", ["clip_seconds", "max_shot_s", "keyframe_every_s", "segment_s"])
def test_nonsense_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be more than 0, and is -1"):
        Scan(**{name: -1.0})


def test_damage_fails_the_source() -> None:
    with pytest.raises(DamagedError, match=r"damaged after 2\.70 s"):
        rows(real("dmlc__decord__corrupted.mp4"))


# Keyframes.


@pytest.mark.parametrize("shots", ["adaptive", "content", "threshold", "none"])
def test_every_clip_has_3_to_16_keyframes_or_all_it_has(edited: Path, shots: Any) -> None:
    for scan in (
        Scan(shots=shots),
        Scan(shots=shots, max_shot_s=1.1, clip_seconds=1.7),
        Scan(shots=shots, keyframe_every_s=0.2),
    ):
        _, clips, keyframes = scan_source(str(edited), scan)
        owners, frames = (keyframes[n].to_numpy() for n in ("clip", "frame"))
        for i, row in enumerate(clips.to_pylist()):
            taken = frames[owners == i]
            wanted = min(16, max(3, round(row["duration_s"] / scan.keyframe_every_s)))
            assert min(3, row["num_frames"]) <= len(taken) <= wanted, (i, row)
            assert (taken >= row["start_frame"]).all()
            assert (taken < row["start_frame"] + row["num_frames"]).all()
            assert len(set(taken.tolist())) == len(taken)
            if row["num_frames"] >= 12:  # spread over the clip, not at one end
                thirds = (taken - row["start_frame"]) * 3 // row["num_frames"]
                assert set(thirds.tolist()) == {0, 1, 2}, (i, row, taken)


def test_keyframes_come_once_a_second(tmp_path: Path) -> None:
    path = encode(tmp_path / "calm.mp4", shots_of([260]))
    _, _, keyframes = scan_source(str(path), Scan())
    assert keyframes["time_s"].to_pylist() == pytest.approx(
        [0.52, 1.52, 2.52, 3.52, 4.52, 5.52, 6.52, 7.52, 8.52, 9.52], abs=0.001
    )
    _, _, keyframes = scan_source(str(path), Scan(keyframe_every_s=0.25))
    assert keyframes.num_rows == 16


def test_a_span_has_its_keyframes(edited: Path) -> None:
    spans = [(0.0, 0.3), (3.1, 3.3), (2.0, 9.0), (8.96, 9.04)]
    _, clips, keyframes = scan_source(str(edited), Scan(), spans)
    counts = np.bincount(keyframes["clip"].to_numpy(), minlength=4)
    assert counts.tolist() == [3, 3, 7, 2]
    assert clips["num_frames"].to_pylist()[3] == 2


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_keyframes_are_upright_with_square_pixels(tmp_path: Path, rotation: int) -> None:
    image = np.zeros((120, 200, 3), np.uint8)
    image[:60, :100] = 255  # white at the top left, as coded
    image[:60, 100:] = (255, 0, 0)

    def turned(stream: av.VideoStream) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        if rotation:
            stream.set_display_rotation(-rotation)

    path = encode(tmp_path / "turned.mp4", [image] * 30, setup=turned, options={"crf": "10"})
    metadata, _, keyframes = scan_source(str(path), Scan())
    shown = (400, 120) if rotation % 180 == 0 else (120, 400)
    assert (metadata.width_px, metadata.height_px) == shown
    row = keyframes.to_pylist()[0]
    assert (row["width_px"], row["height_px"]) == shown
    found = image_of(row["jpeg"])
    assert found.shape[1::-1] == shown
    wide = cv2.resize(image, (400, 120), interpolation=cv2.INTER_NEAREST)
    truth = np.ascontiguousarray(np.rot90(wide, -rotation // 90))
    assert np.abs(found.astype(int) - truth).mean() < 6


def test_keyframes_are_scaled_to_a_short_side_of_448(tmp_path: Path) -> None:
    path = encode(tmp_path / "hd.mp4", [colourful(720, 1280, 3)] * 4)
    row = scan_source(str(path), Scan())[2].to_pylist()[0]
    assert (row["width_px"], row["height_px"]) == (796, 448)
    assert image_of(row["jpeg"]).shape == (448, 796, 3)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv444p", "yuv420p10le"])
@pytest.mark.parametrize("size", [(160, 90), (1600, 900)])
@pytest.mark.parametrize("space", [1, 5])  # BT.709 and BT.601
def test_colours_of_keyframes_are_those_meant(
    pix_fmt: str, size: tuple[int, int], space: int
) -> None:
    patches = np.random.default_rng(1).integers(0, 256, (9, 16, 3)).astype(np.uint8)
    image = np.kron(patches, np.ones((size[1] // 9, size[0] // 16, 1), np.uint8))
    full = pix_fmt.startswith("yuvj")
    frame = as_frame(_as_if_709(image) if space == 1 else image, pix_fmt, full)
    frame.colorspace = space
    found = Upright(size, 0, 180).bgr(frame)
    step = found.shape[0] // 9
    centres = found[step // 2 :: step, step // 2 :: step][:9, :16]
    assert np.abs(centres.astype(int) - patches)[1:-1, 1:-1].max() <= 6


def _as_if_709(image: np.ndarray) -> np.ndarray:
    """Colours that BT.601 codes as BT.709 codes those of an image, float64 (H, W, 3)."""
    blue, green, red = (image[..., i].astype(np.float64) for i in range(3))
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    blueness, redness = (blue - light) / 1.8556, (red - light) / 1.5748
    new_red, new_blue = light + 1.402 * redness, light + 1.772 * blueness
    new_green = (light - 0.299 * new_red - 0.114 * new_blue) / 0.587
    return np.stack([new_blue, new_green, new_red], -1)


def test_chosen_keyframes_are_even() -> None:
    assert choose(np.arange(3.0), 0.0, 3.0, 3) == [0, 1, 2]
    assert choose(np.arange(20) + 0.5, 0.0, 20.0, 5) == [1, 5, 9, 13, 17]
    picked = choose(np.linspace(0, 19, 20), 0.0, 20.0, 16)
    assert len(picked) == len(set(picked)) == 16
    assert max(np.diff(picked)) <= 2


def test_held_frames_are_bounded(tmp_path: Path) -> None:
    """A slow fade-in to the third keyframe at 1000 frames/s never holds more than a few."""
    frame = as_frame(np.zeros((16, 16), np.uint8))
    collector = Keyframes(Upright((16, 16), 0, 16), Marks(1.0), 3)
    most = 0
    for i in range(2600):
        collector.push(i, _frame_at(i, frame), (i - 1) / 1000 if i else None, ours=True)
        if i == 0:
            collector.begin(0)
        held = collector._held
        most = max(most, len(held.frames) if held else 0)
    assert 6 <= most <= 13
    assert not collector.holding
    assert all(isinstance(k, Keyframe) for k in collector.found)


def _frame_at(index: int, picture: av.VideoFrame) -> Any:
    return Frame(index, index / 1000, picture)


# Parts.


@pytest.mark.parametrize("shots", ["adaptive", "content", "threshold", "none"])
def test_parts_give_the_rows_of_the_whole(edited: Path, shots: Any) -> None:
    assert_same(edited, Scan(shots=shots, segment_s=0.5), least=8)
    assert_same(edited, Scan(shots=shots, segment_s=1.0, max_shot_s=1.3, clip_seconds=1.7), least=8)
    assert_same(edited, Scan(shots=shots, segment_s=2.0, keyframe_every_s=0.3), least=4)


def test_parts_give_the_rows_of_the_whole_for_spans(edited: Path) -> None:
    spans = [(0.5, 1.0), (2.5, 7.9), (2.7, 3.0), (7.0, 22.1), (3.96, 4.04), (50.0, 60.0)]
    assert_same(edited, Scan(segment_s=0.5), spans, least=8)


CODINGS = {
    "h264 closed": ("a.mp4", "libx264", "yuv420p", {"g": "25", "bf": "3"}, 5),
    "h264 mkv 10 bit": ("b.mkv", "libx264", "yuv420p10le", {"g": "25", "bf": "2"}, 5),
    # A cut inside an open GOP could change pictures: the source stays whole.
    "h264 open": ("c.mp4", "libx264", "yuv420p", {"g": "25", "x264-params": "open-gop=1"}, 1),
    "h264 refresh": ("d.mp4", "libx264", "yuv420p", {"x264-params": "intra-refresh=1"}, 1),
    "h264 fragments": ("e.mp4", "libx264", "yuv420p", {"g": "25"}, 1),
    "hevc open": (
        *("f.mp4", "libx265", "yuv420p"),
        {"x265-params": "keyint=25:bframes=4:open-gop=1:log-level=none"},
        5,
    ),
    "hevc mkv 10 bit": (
        *("g.mkv", "libx265", "yuv420p10le"),
        {"x265-params": "keyint=25:bframes=4:open-gop=1:log-level=none"},
        5,
    ),
    "vp8": ("h.webm", "libvpx", "yuv420p", {"g": "25", "deadline": "realtime"}, 5),
    "vp9": ("i.webm", "libvpx-vp9", "yuv420p", {"g": "25", "cpu-used": "8"}, 5),
    "av1": ("j.mp4", "libsvtav1", "yuv420p10le", {"g": "25", "preset": "11"}, 5),
    "mpeg4": ("k.avi", "mpeg4", "yuv420p", {"g": "25"}, 1),
}


@pytest.mark.parametrize("name", CODINGS)
def test_parts_give_the_rows_of_the_whole_in_every_coding(tmp_path: Path, name: str) -> None:
    file, codec, pix_fmt, options, least = CODINGS[name]
    path = encode(
        tmp_path / file,
        shots_of([40, 9, 60, 2, 33, 51, 20, 77], 48, 64),
        codec=codec,
        pix_fmt=pix_fmt,
        options=options,
        container_options={"movflags": "frag_keyframe+empty_moov"} if "fragm" in name else {},
    )
    assert_same(path, Scan(segment_s=0.5), least=least)
    if name == "h264 open":
        assert len(plan_segments(str(path), Scan(segment_s=0.5))) == 1


def test_parts_give_the_rows_of_the_whole_at_a_variable_rate(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    steps = rng.choice([10, 20, 40, 200, 900], 291, p=[0.3, 0.3, 0.3, 0.08, 0.02])
    path = encode(
        tmp_path / "vfr.mkv",
        shots_of([40, 9, 60, 2, 33, 51, 20, 76], 48, 64),
        pts=np.cumsum(steps).tolist(),
        time_base=Fraction(1, 1000),
        options={"g": "20", "bf": "2"},
    )
    for shots in ("adaptive", "none"):
        assert_same(path, Scan(segment_s=0.5, shots=shots, clip_seconds=1.1), least=4)


@pytest.mark.parametrize(
    "name",
    [
        "androidx__media__sample_edit_list.mp4",
        "Zulko__moviepy__big_buck_bunny_0_30.webm",
        "Breakthrough__PySceneDetect__issue-195-aspect-ratio.mp4",
    ],
)
def test_parts_of_real_files_give_the_rows_of_the_whole(name: str) -> None:
    assert_same(real(name), Scan(segment_s=1.0))


def test_a_short_source_is_one_part_and_the_plan_depends_on_the_file_alone(edited: Path) -> None:
    assert plan_segments(str(edited), Scan()) == (Segment(),)
    plan = plan_segments(str(edited), Scan(segment_s=1.0))
    assert plan == plan_segments(str(edited), Scan(segment_s=1.0, shots="none"))
    with open(edited, "rb") as file:
        assert plan == plan_segments(file, Scan(segment_s=1.0))
    assert [s.index for s in plan] == list(range(len(plan)))
    assert (plan[0].start_pts, plan[-1].stop_pts) == (None, None)
    assert [s.stop_pts for s in plan[:-1]] == [s.start_pts for s in plan[1:]]


def test_without_a_duration_there_is_one_part() -> None:
    plan = plan_segments(real("Zulko__moviepy__no_duration.webm"), Scan(segment_s=0.2))
    assert plan == (Segment(),)


def test_more_pixels_make_shorter_parts(tmp_path: Path) -> None:
    options = {"g": "10", "preset": "ultrafast"}
    small = encode(tmp_path / "s.mp4", shots_of([70], 48, 64), options=options)
    large = encode(tmp_path / "l.mp4", [colourful(720, 1280, 0)] * 70, options=options)
    scan = Scan(segment_s=1.0)
    assert len(plan_segments(str(small), scan)) == 1
    assert len(plan_segments(str(large), scan)) == 2


def test_a_part_decodes_little_more_than_its_own_frames(edited: Path) -> None:
    scan = Scan(segment_s=4.0, shots="none", clip_seconds=5.0)
    segments = plan_segments(str(edited), scan)
    assert len(segments) >= 2
    decoded = sum(scan_segment(str(edited), scan, s).frames_decoded for s in segments)
    assert 583 <= decoded <= 583 + 100 * len(segments)
    assert scan_segment(str(edited), scan, Segment()).frames_decoded == 583


def test_a_part_of_another_file_is_refused(edited: Path, tmp_path: Path) -> None:
    scan = Scan(segment_s=1.0)
    other = encode(tmp_path / "other.mp4", shots_of([300]), options={"g": "7"})
    segment = plan_segments(str(edited), scan)[3]
    with pytest.raises(DamagedError, match="is gone"):
        scan_segment(str(other), scan, segment)
    missing = [scan_segment(str(edited), scan, s) for s in plan_segments(str(edited), scan)[:2]]
    with pytest.raises(AssertionError, match="does not reach the end"):
        assemble(probe(edited), missing, scan)


def test_a_part_survives_its_bytes(edited: Path) -> None:
    scan = Scan(segment_s=1.0)
    for segment in (Segment(), plan_segments(str(edited), scan)[1]):
        part = scan_segment(str(edited), scan, segment)
        back = SegmentScan.from_bytes(part.to_bytes())
        assert back.frames.equals(part.frames) and back.keyframes.equals(part.keyframes)
        assert (back.index, back.last_s) == (part.index, part.last_s)
        assert back.frames_decoded == part.frames_decoded


def test_a_long_source_passes_in_bounded_memory(tmp_path: Path) -> None:
    """Frames are not kept: four times as many need no more Python memory, but for their rows."""

    def peak(num: int) -> int:
        path = encode(tmp_path / f"{num}.mp4", shots_of([num // 4] * 4, 180, 320))
        tracemalloc.start()
        scan_segment(str(path), Scan(), Segment())
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(800) < peak(200) + 3_000_000


def test_metadata_tells_what_was_decoded() -> None:
    path = real("androidx__media__sample_edit_list.mp4")
    claimed = probe(path)
    found, _, _ = scan_source(path, Scan())
    assert (claimed.num_frames, found.num_frames) == (86, 77)
    assert found.duration_s == pytest.approx(2.568, abs=0.001)
    unchanged = {f.name for f in dataclasses.fields(Metadata)} - {
        *("num_frames", "duration_s", "fps")
    }
    assert all(getattr(claimed, n) == getattr(found, n) for n in unchanged)


def test_a_rate_that_the_container_mistakes_is_measured() -> None:
    path = real("androidx__media__sample.flv")
    assert probe(path).fps is None  # it claims 1000 frames/s, its clock
    found, clips, _ = scan_source(path, Scan())
    assert found.fps == pytest.approx(30, rel=0.04)
    assert clips["fps"].to_pylist() == pytest.approx([30], rel=0.04)


def test_an_open_file_gives_the_same_rows(edited: Path) -> None:
    with open(edited, "rb") as file:
        found = scan_source(file, Scan(segment_s=1.0))
    assert found[1].equals(scan_source(str(edited), Scan())[1])


def test_the_size_may_change_on_the_way(tmp_path: Path) -> None:
    """A stream that doubles its size keeps the small pictures of its beginning."""
    path = tmp_path / "grows.webm"
    small = encode(tmp_path / "s.webm", shots_of([25], 90, 160), codec="libvpx")
    large = encode(tmp_path / "l.webm", shots_of([25], 180, 320), codec="libvpx")
    with av.open(str(path), "w") as out, av.open(str(small)) as a, av.open(str(large)) as b:
        stream = out.add_stream_from_template(a.streams.video[0])
        for offset, source in ((0, a), (1000, b)):
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                    packet.stream = stream
                    out.mux(packet)
    with open_video(path) as video:
        widths = {frame.picture.width for frame in decode(video)}
    assert widths == {160, 320}
    assert sum(r["num_frames"] for r in rows(path)) == 50
