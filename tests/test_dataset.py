"""What is trained on, in which order, and as which pixels: manifest, plan, frames and loader."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from clips import encode, texture
from small_sets import Item, Letters, Projected, make_set, numbered, numbers, picture

from engine.integrity import VideoError
from engine.schema import CLIPS
from engine.tables import DatasetError, Writer, create, table_uri
from trainers.dataset import Manifest, bucket_of, read_manifest
from trainers.frames import covered, pixels_of, times_of
from trainers.loader import Loader, Micro
from trainers.plan import Plan
from trainers.system import Bucket, Data

PICTURE = Bucket(frames=1, height_px=32, width_px=32)
SHORT = Bucket(frames=9, height_px=32, width_px=48)
LONG = Bucket(frames=17, height_px=32, width_px=48)
DATA = Data(buckets=(PICTURE, SHORT, LONG))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A numbered video of 60 frames at 8 a second, and six pictures."""
    folder = tmp_path_factory.mktemp("files")
    numbered(folder / "v.mp4", 60)
    for i in range(6):
        picture(folder / f"p{i}.png", 30 * i)
    return folder


def items(files: Path) -> list[Item]:
    """Eight spans of 2 to 3.75 s and six pictures."""
    spans = [(i / 2, i / 2 + 2 + i / 4) for i in range(8)]
    videos = [
        Item(file=files / "v.mp4", start_s=a, end_s=b, rephrased=f"Text {a}.") for a, b in spans
    ]
    return videos + [Item(file=files / f"p{i}.png", size=(40, 40)) for i in range(6)]


@pytest.fixture(scope="module")
def root(files: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_set(tmp_path_factory.mktemp("set") / "set", items(files))


# Manifest


def test_a_manifest_has_each_kept_pair_once_in_order_with_what_training_needs(root: str) -> None:
    found = read_manifest(root, DATA)
    assert len(found) == 14 and not found.left_out
    ids = found.rows["sample_id"].to_pylist()
    assert ids == sorted(set(ids)) == found.rows["pair_id"].to_pylist()
    row = next(r for r in found.take(range(14)) if r["rephrased"] == "Text 1.5.")
    assert (row["start_s"], row["end_s"], row["num_frames"]) == (1.5, 4.25, 22)
    assert row["instruction_text"] == "dense: rewrite {y_ori}" and row["media"] == "video"
    assert row["original"] == "a grey wall" and row["source_uri"].endswith("v.mp4")
    shapes = Counter(str(DATA.buckets[b]) for b in found.bucket)
    assert shapes == {"1x32x32": 6, "9x32x48": 1, "17x32x48": 7}
    assert found.row(3) == found.take([5, 3])[1]


def test_what_is_left_out_is_counted_by_its_reason(files: Path, tmp_path: Path) -> None:
    some = items(files)
    some[0] = replace(some[0], pair_kept=False)
    some[1] = replace(some[1], kept=False)
    some[2] = replace(some[2], rephrased="")
    some[3] = replace(some[3], original=None)
    some[8] = replace(some[8], missing=True)
    some.append(Item(file=files / "v.mp4", start_s=0, end_s=0.5))
    root = make_set(tmp_path / "set", some)
    data = Data(buckets=(SHORT, PICTURE), media=("video", "image"))
    found = read_manifest(root, data)
    assert found.left_out == {
        "not kept": 1,
        "clip not kept": 1,
        "source gone": 1,
        "no text (original)": 1,
        "no text (rephrased)": 1,
    }
    assert len(found) == len(some) - 5  # the short one is a picture
    videos = read_manifest(root, replace(data, buckets=(SHORT,)))
    assert videos.left_out["fits no bucket"] == 6 and set(videos.rows["media"].to_pylist()) == {
        "video"
    }
    pictures = read_manifest(root, replace(data, media=("image",)))
    assert set(pictures.rows["media"].to_pylist()) == {"image"}
    assert pictures.left_out["another medium"] == 7


def test_captioned_clips_take_the_place_of_pairs(root: str, files: Path, tmp_path: Path) -> None:
    found = read_manifest(root, replace(DATA, table="clips"))
    assert len(found) == 14
    row = found.row(0)
    assert row["sample_id"] == row["clip_id"] and row["pair_id"] is None
    assert row["rephrased"] == "A caption of the clip." and row["original"] == "a grey wall"
    bare = [replace(items(files)[0], original=None), replace(items(files)[1], caption=None)]
    other = read_manifest(make_set(tmp_path / "set", bare), replace(DATA, table="clips"))
    assert len(other) == 1 and other.row(0)["original"] is None
    assert other.left_out == {"no text (rephrased)": 1}


def changed(files: Path, tmp_path: Path, name: str, **changes: object) -> Manifest:
    some = items(files)
    some[4] = replace(some[4], **changes)
    return read_manifest(make_set(tmp_path / name, some), DATA)


def test_the_hash_changes_with_all_that_is_learnt_and_with_nothing_else(
    root: str, files: Path, tmp_path: Path
) -> None:
    base = read_manifest(root, DATA).hash
    backwards = make_set(tmp_path / "backwards", items(files)[::-1], run_id="another")
    assert read_manifest(backwards, DATA).hash == base
    others = {
        "rephrased": changed(files, tmp_path, "a", rephrased="Another text.").hash,
        "original": changed(files, tmp_path, "b", original="another").hash,
        "instruction": changed(files, tmp_path, "f", instruction_text="make {y_ori} long").hash,
        "span": changed(files, tmp_path, "d", end_s=5.25).hash,
        "row": changed(files, tmp_path, "e", pair_kept=False).hash,
        "rate": read_manifest(root, replace(DATA, fps=4.0)).hash,
        "buckets": read_manifest(root, replace(DATA, buckets=DATA.buckets[:2])).hash,
        "variants": read_manifest(root, replace(DATA, variants=2)).hash,
        "base": base,
    }
    assert len(set(others.values())) == len(others), others
    files_elsewhere = tmp_path / "elsewhere"
    files_elsewhere.mkdir()
    for file in files.iterdir():
        (files_elsewhere / file.name).write_bytes(file.read_bytes())
    moved = make_set(tmp_path / "moved", items(files_elsewhere))
    assert read_manifest(moved, DATA).hash == base, "the same content, lying elsewhere"
    numbered(files_elsewhere / "v.mp4", 61)
    content = make_set(tmp_path / "content", items(files_elsewhere))
    assert read_manifest(content, DATA).hash != base


def test_where_one_text_ends_and_the_next_begins_is_in_the_hash(
    files: Path, tmp_path: Path
) -> None:
    def of(name: str, *originals: str) -> str:
        two = [replace(i, original=o) for i, o in zip(items(files)[:2], originals, strict=True)]
        return read_manifest(make_set(tmp_path / name, two), DATA).hash

    assert of("a", "aa", "a") != of("b", "a", "aa")


def test_the_hash_stays_when_tables_are_stored_anew(files: Path, tmp_path: Path) -> None:
    import lance

    root = make_set(tmp_path / "set", items(files))
    before = read_manifest(root, DATA)
    writer = Writer(root, "again")
    for name, key in (("pairs", "pair_id"), ("clips", "clip_id")):
        for value in writer.table(name).to_table(columns=[key])[key].to_pylist()[:3]:
            rows = writer.tables[name].rows_with(key, [value])
            writer.remove(name, key, [value])
            writer.append(name, rows)
        lance.dataset(table_uri(root, name)).optimize.compact_files()
    after = read_manifest(root, DATA)
    assert after.hash == before.hash and after.rows.equals(before.rows)


@pytest.mark.parametrize("case", ["nothing", "no pairs", "none kept", "too short", "no clips"])
def test_a_dataset_without_samples_is_one_line_that_says_what_to_do(
    case: str, files: Path, tmp_path: Path
) -> None:
    short = [Item(file=files / "v.mp4", start_s=0, end_s=d) for d in (0.5, 0.75)]
    root, data, words = str(tmp_path / "set"), Data(buckets=(SHORT,)), []
    if case == "nothing":
        words = ["holds no dataset"]
    elif case == "no pairs":
        create(root, "classic")
        words = ["no kept pairs of dense", f"recaption.py --src {root} --instruction dense"]
    elif case == "none kept":
        make_set(tmp_path / "set", [replace(i, pair_kept=False) for i in items(files)])
        words = ["no kept pairs", "14 are not kept"]
    elif case == "no clips":
        create(root, "classic")
        data, words = replace(data, table="clips"), ["no kept clips"]
    else:
        make_set(tmp_path / "set", short)
        words = ["9x32x48", "from 1.00 s", "2 videos of 0.50 to 0.75 s", "at most 6 frames"]
    with pytest.raises(DatasetError) as caught:
        read_manifest(root, data)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


def shaped(*rows: tuple[str, float, float, int, int]) -> pa.Table:
    """Rows of (media, fps, duration, width, height)."""
    names = ("media", "fps", "duration_s", "width_px", "height_px")
    listed = [dict(zip(names, row, strict=True)) for row in rows]
    for row in listed:
        row["num_frames"] = round(row["fps"] * row["duration_s"])
    return pa.Table.from_pylist(listed, schema=pa.schema([CLIPS.field(n) for n in listed[0]]))


def test_a_sample_goes_to_the_longest_bucket_it_fills_and_there_to_the_nearest_aspect() -> None:
    wide, tall = replace(LONG, height_px=32, width_px=64), replace(LONG, height_px=64, width_px=32)
    data = Data(buckets=(PICTURE, SHORT, wide, tall))  # 17 frames at 8 a second: 2 s
    rows = shaped(
        ("image", 0, 0, 500, 400),
        ("video", 24, 2.0, 640, 360),
        ("video", 24, 2.0, 360, 640),
        ("video", 24, 1.98, 640, 360),  # within half a frame of 24 a second
        ("video", 24, 1.97, 640, 360),
        ("video", 8, 2.0, 640, 360),  # has 16 frames
        ("video", 8, 2.125, 640, 360),
        ("video", 24, 0.9, 640, 360),
        ("video", 24, 60.0, 100, 101),
    )
    assert bucket_of(rows, data).tolist() == [0, 2, 3, 2, 1, 1, 2, 0, 3]
    alone = bucket_of(rows, replace(data, buckets=(wide,)))
    assert alone.tolist() == [-1, 0, 0, 0, -1, -1, 0, -1, 0]
    faster = replace(data, fps=16.0)
    assert bucket_of(rows, faster)[7] == 1, "9 frames at 16 a second take half a second"


# Frames


def span(file: Path, start_s: float, end_s: float) -> dict[str, object]:
    return {"source_uri": str(file), "media": "video", "start_s": start_s, "end_s": end_s}


@pytest.mark.parametrize("start", [0.0, 0.5, 1.375, 3.0, 5.25])
def test_frames_are_those_shown_from_the_middle_of_the_span_at_the_rate(
    start: float, files: Path
) -> None:
    row = span(files / "v.mp4", start, start + 2.0)  # frames start * 8 to start * 8 + 15
    first = round(start * 8)
    assert numbers(pixels_of(row, SHORT, 8.0)) == [first + 4 + i for i in range(9)]
    assert numbers(pixels_of(row, SHORT, 4.0)) == [first + 2 * i for i in range(8)] + [first + 15]
    four = replace(SHORT, frames=4)
    assert numbers(pixels_of(row, four, 2.0)) == [first + 2 + 4 * i for i in range(4)]
    exact = replace(SHORT, frames=16)
    assert numbers(pixels_of(row, exact, 8.0)) == [first + i for i in range(16)]


def test_a_picture_of_a_video_is_the_middle_of_its_part(files: Path) -> None:
    row = span(files / "v.mp4", 1.0, 6.0)  # frames 8 to 47
    assert numbers(pixels_of(row, PICTURE, 8.0)) == [28]
    four = [numbers(pixels_of(row, PICTURE, 8.0, v, 4))[0] for v in range(4)]
    assert four == [13, 23, 33, 43]
    assert times_of(1.0, 6.0, 1, 8.0, 3, 4) == [5.375]


def test_a_seek_gives_the_bits_that_decoding_from_the_start_gives(
    files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = (texture(72, 96, i) for i in range(100))
    noisy = encode(tmp_path / "n.mp4", images, fps=20, options={"g": "15", "bf": "3"})
    row = span(noisy, 3.1, 4.9)
    found = pixels_of(row, SHORT, 8.0)
    assert np.array_equal(found, pixels_of(row, SHORT, 8.0))
    monkeypatch.setattr("trainers.frames._key_before", lambda *_: None)
    assert np.array_equal(found, pixels_of(row, SHORT, 8.0))


def test_only_the_span_is_decoded(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers import frames

    decoded: list[float] = []

    def counting(*arguments: object, **named: object) -> object:
        for frame in decode(*arguments, **named):
            decoded.append(frame.time_s)
            yield frame

    decode = frames.decode
    monkeypatch.setattr(frames, "decode", counting)
    pixels_of(span(files / "v.mp4", 4.0, 5.5), SHORT, 8.0)  # key frames are 1.25 s apart
    assert min(decoded) >= 2.75 and max(decoded) < 5.51


def test_pictures_cover_the_bucket_from_their_middle() -> None:
    stripes = np.zeros((40, 120, 3), np.uint8)
    stripes[:, 40:80] = 200
    assert (covered(stripes, Bucket(frames=1, height_px=20, width_px=20)) == 200).all()
    upwards = covered(stripes, Bucket(frames=1, height_px=80, width_px=60))
    assert upwards.shape == (80, 60, 3) and (upwards == 200).all()
    exact = covered(stripes, Bucket(frames=1, height_px=40, width_px=120))
    assert np.array_equal(exact, stripes)
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    grey = covered(np.repeat(checks[..., None], 3, 2).astype(np.uint8), replace(PICTURE))
    assert abs(grey.astype(int) - 127).max() <= 1, "antialiased"


def test_images_are_upright_and_in_the_order_red_green_blue(tmp_path: Path) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[..., 2] = 250  # red, as OpenCV has it
    cv2.imwrite(str(tmp_path / "red.png"), image)
    row = {"source_uri": str(tmp_path / "red.png"), "media": "image"}
    found = pixels_of(row, PICTURE, 8.0)
    assert found.shape == (1, 32, 32, 3) and found[0, 5, 5].tolist() == [250, 0, 0]


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    from fractions import Fraction

    def wide(stream: object) -> None:
        stream.sample_aspect_ratio = Fraction(2, 1)

    left = np.full((32, 32), 40, np.uint8)
    left[:, 8:24] = 200  # shown at twice the width: the middle 32 of 64
    file = encode(tmp_path / "s.mp4", [left] * 12, fps=8, full_range=True, setup=wide)
    found = pixels_of(span(file, 0, 1.5), Bucket(frames=1, height_px=32, width_px=64), 8.0)
    bright = found[0, 16, :, 0] > 120
    assert bright.sum() == pytest.approx(32, abs=2) and bright[20:44].all()


def test_what_cannot_be_read_is_an_error_of_one_line(files: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pixels_of(span(tmp_path / "gone.mp4", 0, 1), SHORT, 8.0)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="not a video"):
        pixels_of(span(tmp_path / "text.mp4", 0, 1), SHORT, 8.0)
    with pytest.raises(VideoError, match="curate it again"):
        pixels_of(span(files / "v.mp4", 9.0, 11.0), SHORT, 8.0)


# Plan

SIZES = {0: 12, 2: 6, 3: 1, 5: 30}


def mixed() -> np.ndarray:
    rows = np.repeat(list(SIZES), list(SIZES.values()))
    return np.random.default_rng(7).permutation(rows).astype(np.int16)


@pytest.mark.parametrize("batch", [1, 4, 5, 64])
def test_every_row_comes_equally_often_and_buckets_in_exact_proportion(batch: int) -> None:
    of_row = mixed()
    plan = Plan(of_row, batch, seed=3)
    assert plan.cycle == 49
    cycles = 30  # over which each bucket's stream ends with an epoch
    batches = [plan.batch(step) for step in range(cycles * plan.cycle)]
    for start in range(0, len(batches), plan.cycle):
        turns = Counter(b.bucket for b in batches[start : start + plan.cycle])
        assert turns == SIZES
    for found in batches:
        assert len(found.rows) == batch and (of_row[found.rows] == found.bucket).all()
    counts = Counter(np.concatenate([b.rows for b in batches]).tolist())
    assert set(counts.values()) == {cycles * batch} and len(counts) == len(of_row)
    assert plan.epoch(plan.cycle) == batch


def test_no_row_comes_again_before_all_others_of_its_bucket_have() -> None:
    plan = Plan(mixed(), 4, seed=3)
    batches = [plan.batch(step) for step in range(500)]
    stream = [row for found in batches if found.bucket == 0 for row in found.rows]
    epochs = [stream[i : i + 12] for i in range(0, len(stream) - 11, 12)]
    assert len(epochs) > 10 and all(len(set(epoch)) == 12 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each in another order"


def test_a_step_depends_on_nothing_but_its_number_and_the_seed() -> None:
    def facts(plan: Plan, step: int) -> tuple[int, list[int], list[int]]:
        found = plan.batch(step)
        return found.bucket, found.rows.tolist(), found.variants.tolist()

    forwards = Plan(mixed(), 5, seed=3, variants=3)
    expected = {step: facts(forwards, step) for step in range(300)}
    backwards = Plan(mixed(), 5, seed=3, variants=3)
    order = np.random.default_rng(0).permutation(300).tolist()
    assert all(facts(backwards, step) == expected[step] for step in order)
    other = Plan(mixed(), 5, seed=4, variants=3)
    assert sum(facts(other, step) == expected[step] for step in range(300)) < 10
    orders = [[forwards.batch(c * 49 + i).bucket for i in range(49)] for c in range(3)]
    assert orders[0] != orders[1] != orders[2]


def test_long_cycles_are_counted_in_blocks() -> None:
    of_row = np.repeat([0, 1], [6_001, 3_000])  # no common divisor: a cycle of 9001 steps
    plan = Plan(of_row, 2, seed=0)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for step in range(plan.cycle):
        found = plan.batch(step)
        seen[found.bucket] += found.rows.tolist()
    assert Counter(Counter(seen[0] + seen[1]).values()) == {2: 9001}


def test_all_variants_of_a_row_take_turns() -> None:
    plan = Plan(np.zeros(10, np.int16), 5, seed=0, variants=4)
    seen = Counter()
    for step in range(8):  # four epochs
        found = plan.batch(step)
        seen.update(zip(found.rows.tolist(), found.variants.tolist(), strict=True))
    assert seen == dict.fromkeys(((r, v) for r in range(10) for v in range(4)), 1)


def test_a_plan_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Plan(np.empty(0, np.int16), 4, seed=0)


# Loader


def loader(root: str, batch: int = 4, data: Data = DATA, **changes: object) -> Loader:
    manifest = read_manifest(root, data)
    plan = Plan(manifest.bucket, batch, 0, data.variants)
    named = {"micro_batch": 2, "threads": 2} | changes
    return Loader(manifest, data, plan, (Projected(), Letters()), {}, **named)


def told(micros: Sequence[Micro]) -> list[tuple[int, str, int, bytes, str | None]]:
    return [
        (slot, s.row["sample_id"], s.variant, s.features["pixels"].numpy().tobytes(), why)
        for m in micros
        for slot, s, why in zip(m.slots, m.samples, m.failed, strict=True)
    ]


def test_steps_are_the_same_from_wherever_they_are_begun(root: str) -> None:
    first = loader(root)
    first.start(0)
    expected = [told(first.get(step)) for step in range(9)]
    first.close()
    second = loader(root, ahead=0, threads=1)
    for step in (5, 6, 2, 8, 0):
        assert told(second.get(step)) == expected[step]
    second.close()
    plan = first.plan
    for step, found in enumerate(expected):
        rows = first.manifest.take(plan.batch(step).rows)
        assert [f[1] for f in found] == [r["sample_id"] for r in rows]
        assert [f[0] for f in found] == [0, 1, 2, 3]


def test_the_slots_of_all_workers_are_those_of_one(root: str) -> None:
    one = loader(root, micro_batch=3)
    two = [loader(root, rank=rank, world=2, micro_batch=lambda _: 2) for rank in range(2)]
    for step in range(6):
        whole = one.get(step)
        assert [m.slots for m in whole] == [(0, 1, 2), (3,)]
        halves = [told(each.get(step)) for each in two]
        assert halves[0] + halves[1] == told(whole)
    for each in (one, *two):
        each.close()
    with pytest.raises(ValueError, match="batch of 4 cannot be shared by 3 workers"):
        loader(root, rank=0, world=3)


def test_only_pictures_of_videos_have_variants(root: str) -> None:
    found = loader(root, data=Data(buckets=(PICTURE, LONG), variants=4))
    seen = Counter()
    for step in range(40):
        for micro in found.get(step):
            for s in micro.samples:
                seen[s.bucket.frames, s.row["media"]] |= 1 << s.variant
    found.close()
    assert seen == {(1, "image"): 1, (17, "video"): 1, (1, "video"): 0b1111}


def test_a_file_that_is_gone_costs_its_samples_alone(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for file in files.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    root = make_set(tmp_path / "set", items(folder))
    (folder / "p1.png").unlink()
    (folder / "p2.png").write_bytes((folder / "p2.png").read_bytes()[:30])
    found = loader(root, batch=6, data=Data(buckets=(PICTURE,)))
    failed = Counter()
    steps = range(14)
    for step in steps:
        for micro in found.get(step):
            for s, why in zip(micro.samples, micro.failed, strict=True):
                if why:
                    failed[Path(s.row["source_uri"]).name] += 1
                    assert not s.features["pixels"].any() and "\n" not in why
    found.close()
    assert failed == {"p1.png": 6, "p2.png": 6} and found.num_failed == 12
    said = [r.getMessage() for r in caplog.records if "not trained on" in r.getMessage()]
    assert len(said) == 2 and any("No such file" in words for words in said)


def test_when_nothing_can_be_read_it_says_so_and_stops(files: Path, tmp_path: Path) -> None:
    lost = picture(tmp_path / "lost.png", 9)
    root = make_set(tmp_path / "set", [Item(file=lost)])
    lost.unlink()
    alone = loader(root, data=Data(buckets=(PICTURE,)))
    with pytest.raises(ValueError, match=r"no sample of step 0 can be read.*lost.png") as caught:
        alone.get(0)
    assert "\n" not in str(caught.value)
    alone.close()
    among = loader(root, data=Data(buckets=(PICTURE,)), rank=1, world=2)
    assert [m.failed[0] is None for m in among.get(0)] == [False]
    for step in range(1, 7):
        among.get(step)
    with pytest.raises(ValueError, match="can be read"):
        among.get(7)
    among.close()


def test_reading_goes_ahead_and_closing_ends_its_threads(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: object) -> np.ndarray:
        time.sleep(0.1)
        return pixels_of(*arguments)

    monkeypatch.setattr("trainers.loader.pixels_of", slow)
    found = loader(root, threads=4)
    found.start(0)
    found.get(0)
    assert found.waited_s > 0.09
    time.sleep(1.0)
    waited = found.waited_s
    found.get(1)
    assert found.waited_s - waited < 0.05, "it was read meanwhile"
    found.close()
    deadline = time.monotonic() + 5
    names = ("steps", "decoders")
    while any(t.name.startswith(names) for t in threading.enumerate()):
        assert time.monotonic() < deadline, "threads go on"
        time.sleep(0.02)
