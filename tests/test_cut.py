"""Clips in files of their own: exactly the frames meant, at their times, playable everywhere."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
from clips import encode, real, texture
from conftest import Bucket

from engine.cut import Cut, Encoding, Span, cut_clip, cut_clips
from engine.cutter import CutJob, Cutter, CutUnit, units
from engine.encode import _starts
from engine.operator import Failed
from engine.remux import _inward, _Mark
from engine.tables import Writer, create
from engine.video import decode, open_video, probe

SILENT = {"x265-params": "log-level=none"}
FAST = Encoding(preset="ultrafast")


def levels(num: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Flat grey frames, each two levels brighter than the one before."""
    return [np.full((height, width), 20 + 2 * i, np.uint8) for i in range(num)]


def moving(num: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """A pan over a texture: frames that predict each other."""
    scene = texture(height, width + 2 * num)
    return [scene[:, 2 * i : 2 * i + width] for i in range(num)]


def frames_of(path: str | Path) -> tuple[list[float], list[np.ndarray]]:
    """Times and luma of all frames."""
    with open_video(path) as video:
        found = [(f.time_s, f.picture.to_ndarray(format="gray")) for f in decode(video)]
    return [t for t, _ in found], [p for _, p in found]


def span_of(path: str | Path, first: int, after: int) -> dict[str, Any]:
    times, _ = frames_of(path)
    times.append(2 * times[-1] - times[-2])
    return {
        "start_s": times[first],
        "end_s": times[after],
        "start_frame": first,
        "num_frames": after - first,
    }


def cut(path: str | Path, out: Path, first: int, after: int, mode: Any = "encode") -> Cut:
    return cut_clip(
        path, str(out / "clip"), **span_of(path, first, after), mode=mode, encoding=FAST
    )


def test_encoding_gives_exactly_the_frames_of_the_clip_in_what_a_browser_plays(
    tmp_path: Path,
) -> None:
    source = encode(tmp_path / "a.mp4", levels(60), fps=25)
    found = cut(source, tmp_path, 17, 41)
    times, pictures = frames_of(found.path)
    assert (found.num_frames, found.start_s, found.end_s) == (24, 0.68, 1.64)
    assert times == pytest.approx([i / 25 for i in range(24)], abs=1e-9)
    _, truth = frames_of(source)
    for got, want in zip(pictures, truth[17:41], strict=True):
        assert abs(float(got.mean()) - float(want.mean())) < 1  # the next one differs by two
    facts = probe(found.path)
    assert (facts.codec, facts.pix_fmt, facts.full_range) == ("h264", "yuv420p", False)
    assert facts.duration_s == pytest.approx(24 / 25, abs=1e-4)
    assert not facts.has_audio
    data = Path(found.path).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "a browser must not need the end first"
    assert b"edts" not in data
    assert found.size_bytes == len(data)


def test_frames_of_a_variable_rate_keep_their_times(tmp_path: Path) -> None:
    pts = [0, 40, 50, 130, 170, 171, 300, 340, 500, 540]
    source = encode(
        tmp_path / "a.mkv", levels(10), pts=pts, time_base=Fraction(1, 1000), codec="libx264"
    )
    found = cut_clip(
        source, str(tmp_path / "clip"), start_s=0.05, end_s=0.5, start_frame=2, num_frames=6,
        mode="encode", encoding=FAST,
    )  # fmt: skip
    times, _ = frames_of(found.path)
    assert times == pytest.approx([(p - 50) / 1000 for p in pts[2:8]], abs=1e-9)
    assert probe(found.path).duration_s == pytest.approx(0.45, abs=1e-3)


def test_the_same_clip_has_the_same_bytes(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", moving(40))
    contents = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        contents.add(Path(cut(source, tmp_path / name, 5, 30).path).read_bytes())
    assert len(contents) == 1


def test_odd_sides_and_pixels_that_are_not_square_become_even_and_square(tmp_path: Path) -> None:
    images = [cv2.cvtColor(i, cv2.COLOR_GRAY2BGR) for i in moving(8, 61, 81)]
    odd = encode(tmp_path / "odd.mkv", images, codec="libvpx-vp9")
    found = cut(odd, tmp_path, 0, 6)
    assert (found.width_px, found.height_px) == (80, 60)
    _, pictures = frames_of(found.path)
    _, truth = frames_of(odd)
    assert np.abs(pictures[0].astype(int) - truth[0][:60, :80]).mean() < 3, "cut off, not scaled"

    def wide(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    source = encode(tmp_path / "wide.mp4", moving(8, 48, 60), setup=wide)
    found = cut(source, tmp_path, 0, 6)
    assert (found.width_px, found.height_px) == (80, 48)
    assert probe(found.path).width_px == 80


def test_a_longer_side_can_be_limited(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", moving(8, 90, 160))
    for limit, size in ((100, (100, 56)), (400, (160, 90))):
        found = cut_clip(
            source, str(tmp_path / "clip"), **span_of(source, 0, 4), mode="encode",
            encoding=Encoding(preset="ultrafast", max_side_px=limit),
        )  # fmt: skip
        assert (found.width_px, found.height_px) == size
        assert (probe(found.path).width_px, probe(found.path).height_px) == size


def test_full_range_and_ten_bits_become_eight_bits_of_limited_range_with_the_same_light(
    tmp_path: Path,
) -> None:
    for name, options in (
        ("full", {"pix_fmt": "yuvj420p", "full_range": True}),
        ("ten", {"pix_fmt": "yuv420p10le", "codec": "libx265", "options": SILENT}),
    ):  # fmt: skip
        grey = [np.full((64, 64), 180, np.uint8)] * 6
        source = encode(tmp_path / f"{name}.mp4", grey, **options)
        found = cut(source, tmp_path, 0, 5)
        with open_video(found.path) as video:
            frame = next(decode(video)).picture
        assert frame.format.name == "yuv420p"
        assert frame.color_range == 1
        luma = np.frombuffer(frame.planes[0], np.uint8)[:64].mean()
        assert luma == pytest.approx(16 + 180 * 219 / 255, abs=2)


def test_what_a_source_says_of_its_colours_is_said_of_the_clip(tmp_path: Path) -> None:
    def tagged(stream: Any) -> None:
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1

    source = encode(tmp_path / "a.mp4", moving(6), setup=tagged)
    with open_video(cut(source, tmp_path, 0, 5).path) as video:
        picture = next(decode(video)).picture
    assert (picture.colorspace, picture.color_primaries, picture.color_trc) == (1, 1, 1)
    untagged = encode(tmp_path / "b.mp4", moving(6))
    with open_video(cut(untagged, tmp_path, 0, 5).path) as video:
        assert next(decode(video)).picture.colorspace == 6, "BT.601, which players assume here"


def test_a_turned_source_gives_an_upright_clip(tmp_path: Path) -> None:
    source = real("dmlc__decord__video_90.mov")
    found = cut(source, tmp_path, 0, 2)
    facts = probe(found.path)
    assert (facts.width_px, facts.height_px, facts.rotation_deg) == (320, 568, 0)
    _, (got, *_) = frames_of(found.path)
    _, (lying, *_) = frames_of(source)
    turned = cv2.rotate(lying, cv2.ROTATE_90_CLOCKWISE)
    assert np.abs(got.astype(int) - turned).mean() < 3


def test_a_clip_far_into_a_source_is_the_same_whether_decoding_starts_near_it_or_not(
    tmp_path: Path,
) -> None:
    source = encode(tmp_path / "a.mp4", moving(700), fps=10, options={"g": "40", "bf": "2"})
    far = span_of(source, 615, 640)
    (start,) = _starts(str(source), [far["start_s"]])
    assert start is not None and 56 <= start[0] / (10 * 1024) <= 61.5
    near = Path(
        cut_clip(source, str(tmp_path / "near"), **far, mode="encode", encoding=FAST).path
    ).read_bytes()
    both = [(Span(clip_id="first", **span_of(source, 0, 450)), "first")]
    both += [(Span(clip_id="far", **far), "far")]  # less than a gap away: decoded through
    made = dict(cut_clips(str(source), both, str(tmp_path), mode="encode", encoding=FAST))
    assert all(isinstance(c, Cut) for c in made.values())
    through = cut_clips(
        str(source), [(Span(clip_id="f", **span_of(source, 0, 610)), "f"), both[1]],
        str(tmp_path), mode="encode", encoding=FAST,
    )  # fmt: skip
    far_cut = next(c for s, c in through if s.clip_id == "far")
    assert isinstance(far_cut, Cut) and Path(far_cut.path).read_bytes() == near


def test_clips_that_overlap_are_cut_in_one_pass(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", levels(60))
    ranges = {"a": (0, 30), "b": (10, 20), "c": (10, 59)}
    wanted = [(Span(clip_id=n, **span_of(source, *r)), n) for n, r in ranges.items()]
    for span, found in cut_clips(str(source), wanted, str(tmp_path), mode="encode", encoding=FAST):
        assert isinstance(found, Cut)
        first, after = ranges[span.clip_id]
        _, pictures = frames_of(found.path)
        assert len(pictures) == after - first
        assert float(pictures[0].mean()) == pytest.approx(20 + 2 * first, abs=1)


def test_a_source_that_changed_or_ends_early_fails_its_clips_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    source = encode(tmp_path / "a.mp4", levels(30))
    for start_frame, start_s, error_type in ((5, 0.21, "SourceChanged"), (6, 0.2, "SourceChanged"),
                                             (5, 0.2, "TruncatedError")):  # fmt: skip
        with pytest.raises(Failed) as caught:
            cut_clip(
                source, str(tmp_path / "clip"), start_s=start_s, end_s=4.2,
                start_frame=start_frame, num_frames=100, mode="encode", encoding=FAST,
            )  # fmt: skip
        assert caught.value.error_type == error_type
    assert not list(tmp_path.glob("clip*"))


# Copying


@pytest.mark.parametrize(
    "codec, options, ending",
    [
        ("libx264", {"g": "10", "bf": "2", "keyint_min": "10", "sc_threshold": "0"}, "mp4"),
        (
            "libx265",
            {"x265-params": "keyint=10:min-keyint=1:open-gop=1:scenecut=0:log-level=none"},
            "mp4",
        ),
        ("libvpx-vp9", {"g": "10"}, "mp4"),
        ("mpeg4", {"g": "10", "bf": "1"}, "mkv"),
        ("mpeg2video", {"g": "10", "bf": "2"}, "mkv"),  # frames of open groups come behind keys
    ],
)
def test_copying_begins_at_a_key_frame_and_holds_no_frame_from_outside_the_clip(
    tmp_path: Path, codec: str, options: dict[str, str], ending: str
) -> None:
    source = encode(tmp_path / "a.mkv", moving(60), codec=codec, options=options)
    found = cut(source, tmp_path, 13, 47, mode="copy")
    assert Path(found.path).suffix == f".{ending}"
    times, pictures = frames_of(found.path)
    source_times, truth = frames_of(source)
    first = source_times.index(pytest.approx(found.start_s, abs=1e-6))
    assert 13 <= first <= 22
    assert 44 <= first + found.num_frames <= 47
    assert found.end_s == pytest.approx((first + found.num_frames) / 25, abs=1e-6)
    assert len(pictures) == found.num_frames
    with av.open(found.path) as container:
        packets = sum(packet.size > 0 for packet in container.demux(video=0))
    assert packets == found.num_frames, "what cannot be decoded is not in the file at all"
    assert times == pytest.approx([i / 25 for i in range(len(times))], abs=1e-3)
    for got, want in zip(pictures, truth[first:], strict=False):
        np.testing.assert_array_equal(got, want)


def test_copying_of_open_groups_starts_only_where_a_decoder_can(tmp_path: Path) -> None:
    options = {"x264-params": "keyint=10:min-keyint=10:open-gop=1:bframes=3:scenecut=0"}
    source = encode(tmp_path / "a.mp4", moving(60), options=options)
    with av.open(str(source)) as container:
        keys = [p.pts for p in container.demux(video=0) if p.size and p.is_keyframe]
    assert len(keys) > 3, "there are key frames, though a decoder cannot start at them"
    with pytest.raises(Failed, match="no key frame") as caught:
        cut(source, tmp_path, 13, 47, mode="copy")
    assert caught.value.error_type == "NoKeyFrame"
    assert cut(source, tmp_path, 0, 47, mode="copy").num_frames >= 44


def test_a_copy_ends_before_frames_whose_places_between_others_would_stay_empty(
    tmp_path: Path,
) -> None:
    source = encode(tmp_path / "a.mkv", moving(12), fps=1, codec="libx264")
    with open_video(source) as video:
        unit = round(1 / video.stream.time_base)

        def ends(order: list[int], end: int) -> tuple[list[int], int]:
            marks = [_Mark(pts=i * unit, starts=i == 0, hidden=False) for i in order]
            span = Span(start_s=0, end_s=end, start_frame=0, num_frames=end)
            wanted, after = _inward(video, marks, span)
            return [m.pts // unit for m in wanted], after // unit

        assert ends([0, 2, 1, 4, 9, 3], end=5) == ([0, 2, 1], 3), "3 is behind 9, which is outside"
        assert ends([0, 2, 1, 4, 3, 9], end=5) == ([0, 2, 1, 4, 3], 5)
        assert ends([0, 2, 1, 4, 3], end=12)[0] == [0, 2, 1, 4, 3]


def test_a_copy_of_less_than_half_a_clip_is_none(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", moving(60), options={"g": "20", "sc_threshold": "0"})
    with pytest.raises(Failed, match=r"only 0\.20 of 0\.92 s .*use --cut encode") as caught:
        cut(source, tmp_path, 2, 25, mode="copy")
    assert caught.value.error_type == "TooShort"
    assert not list(tmp_path.glob("clip*"))


def test_readers_that_go_by_the_index_find_all_frames_of_a_cut(tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", moving(60), options={"g": "10", "bf": "2"})
    for mode in ("encode", "copy"):
        found = cut_clip(
            source, str(tmp_path / "clip"), **span_of(source, 20, 50), mode=mode
        )  # with B-frames
        reader = cv2.VideoCapture(found.path)
        assert int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) == found.num_frames
        num = 0
        while reader.read()[0]:
            num += 1
        assert num == found.num_frames


# In a worker


def clips_of(source: Path, ranges: list[tuple[int, int]], source_id: str = "s") -> pa.Table:
    rows = [
        {"clip_id": f"{source_id}-{i}", "source_id": source_id, "source_uri": str(source),
         "media": "video"} | span_of(source, *r)
        for i, r in enumerate(ranges)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


@pytest.fixture
def dataset(tmp_path: Path) -> Writer:
    create(str(tmp_path / "set"), "classic")
    return Writer(str(tmp_path / "set"), "run")


def job(writer: Writer, **options: Any) -> CutJob:
    given: dict[str, Any] = {"mode": "encode", "encoding": FAST} | options
    return CutJob(root=writer.root, run_id="run", **given)


def do(writer: Writer, clips: pa.Table, **options: Any) -> pa.Table:
    """Cuts, commits and gives the table's rows."""
    cutter = Cutter(job(writer, **options))
    try:
        for unit in units(clips):
            outcome = cutter.do(unit)
            assert outcome.unwritable is None
            writer.append("cuts", outcome.fragments)
    finally:
        cutter.close()
    return writer.table("cuts").to_table()


def test_clips_become_files_below_the_dataset_or_blobs_within_it(
    dataset: Writer, tmp_path: Path
) -> None:
    source = encode(tmp_path / "a.mp4", levels(60))
    rows = do(dataset, clips_of(source, [(0, 20), (20, 50)])).to_pylist()
    assert [r["path"] for r in rows] == ["cuts/s-/s-0.mp4", "cuts/s-/s-1.mp4"]
    contents = [(Path(dataset.root) / r["path"]).read_bytes() for r in rows]
    assert [r["size_bytes"] for r in rows] == [len(c) for c in contents]
    assert [r["num_frames"] for r in rows] == [20, 30]
    assert not list((Path(dataset.root) / "cuts").glob(".reelwright*"))
    dataset.remove("cuts", "source_id", ["s"])
    rows = do(dataset, clips_of(source, [(0, 20), (20, 50)]), where="blob").to_pylist()
    assert [r["path"] for r in rows] == [None, None]
    blobs = dataset.table("cuts").take_blobs("mp4", indices=[0, 1])
    assert [b.read() for b in blobs] == contents


def test_a_poison_file_costs_its_own_clips(dataset: Writer, tmp_path: Path) -> None:
    good = encode(tmp_path / "good.mp4", levels(40))
    bad = encode(tmp_path / "bad.mp4", moving(40))
    clips = pa.concat_tables(
        [clips_of(good, [(0, 20)], "g"), clips_of(bad, [(0, 9), (20, 39)], "b")]
    )
    data = bytearray(bad.read_bytes())
    middle = data.index(b"mdat") + len(data) // 2
    data[middle : middle + 400] = b"\xa5" * 400
    bad.write_bytes(data)
    rows = {r["clip_id"]: r for r in do(dataset, clips).to_pylist()}
    assert rows["g-0"]["error"] is None and rows["g-0"]["num_frames"] == 20
    assert rows["b-1"]["error_type"] in ("DamagedError", "TruncatedError")
    assert rows["b-1"]["path"] is None and rows["b-1"]["num_frames"] is None


def test_a_source_that_cannot_be_read_today_is_tried_again_by_the_next_run(
    dataset: Writer, tmp_path: Path
) -> None:
    source = encode(tmp_path / "a.mp4", levels(30))
    clips = clips_of(source, [(0, 20)])
    moved = source.rename(tmp_path / "elsewhere.mp4")
    (unit,) = units(clips)
    cutter = Cutter(job(dataset))
    outcome = cutter.do(unit)
    assert outcome.rows["error_type"].to_pylist() == ["FileNotFoundError"]
    assert outcome.fragments == ()
    moved.rename(source)
    assert len(cutter.do(unit).fragments) == 1
    cutter.close()


def test_a_limit_of_time_is_a_failure_of_the_clip(dataset: Writer, tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", moving(120, 480, 640), options={"preset": "ultrafast"})
    (unit,) = units(clips_of(source, [(0, 119)]))
    cutter = Cutter(job(dataset, time_limit_s=0.01))
    outcome = cutter.do(unit)
    cutter.close()
    assert outcome.rows["error_type"].to_pylist() == ["TimeLimit"]
    assert len(outcome.fragments) == 1


def test_a_folder_that_cannot_be_written_ends_the_run_and_blames_no_clip(
    dataset: Writer, tmp_path: Path
) -> None:
    source = encode(tmp_path / "a.mp4", levels(30))
    (Path(dataset.root) / "cuts").write_bytes(b"")
    (unit,) = units(clips_of(source, [(0, 20)]))
    cutter = Cutter(job(dataset))
    outcome = cutter.do(unit)
    cutter.close()
    assert outcome.unwritable and outcome.rows.num_rows == 0


def test_clips_are_cut_by_source_and_images_are_not(tmp_path: Path) -> None:
    row = {"source_uri": "/x", "start_frame": 0, "num_frames": 9, "media": "video"}
    rows = [
        row | {"clip_id": f"{s}{i}", "source_id": s, "start_s": float(i), "end_s": i + 1.0}
        for i in reversed(range(40))
        for s in ("a", "b")
    ]
    rows.append(rows[0] | {"clip_id": "picture", "source_id": "c", "media": "image"})
    found = units(pa.Table.from_pylist(rows))
    assert [(u.source_id, len(u.clips)) for u in found] == [
        ("a", 32),
        ("a", 8),
        ("b", 32),
        ("b", 8),
    ]
    assert [s.clip_id for s in found[0].clips][:2] == ["a0", "a1"]
    assert isinstance(found[0], CutUnit)


@pytest.mark.slow
def test_from_a_store_and_into_one(bucket: Bucket, tmp_path: Path) -> None:
    source = encode(tmp_path / "a.mp4", levels(40))
    bucket.put("a.mp4", source.read_bytes())
    root = f"{bucket.uri}/set"
    create(root, "classic")
    writer = Writer(root, "run")
    clips = clips_of(source, [(0, 20)])
    remote = clips.set_column(2, "source_uri", pa.array([f"{bucket.uri}/a.mp4"]))
    local = do(Writer(str(_created(tmp_path / "here")), "run"), clips).to_pylist()[0]
    found = do(writer, remote).to_pylist()[0]
    assert found["path"] == local["path"] and found["size_bytes"] == local["size_bytes"]
    from engine import storage

    content = storage.read_bytes(storage.join(root, found["path"]))
    assert content == (tmp_path / "here" / local["path"]).read_bytes()


def _created(path: Path) -> Path:
    create(str(path), "classic")
    return path
