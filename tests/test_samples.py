"""The sample corpus shows what its labels say, far from every threshold; poison is poisonous."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import av
import cv2
import numpy as np
import pytest
from PIL import Image
from scenedetect import AdaptiveDetector
from scenedetect.common import FrameTimecode

from pipelines.samples import CAPTIONS, SAMPLES, SIDECARS, Sample, make_samples

ROOT = Path(__file__).parents[1]
VIDEOS = tuple(s for s in SAMPLES if s.source == "done" and s.media == "video")
IMAGES = tuple(s for s in SAMPLES if s.source == "done" and s.media == "image")
CLIPS = tuple((sample, i) for sample in VIDEOS for i in range(len(sample.clips)))

RULES = (
    ("num_frames<65", lambda c: c.num_frames < 65),
    ("duration_s<1", lambda c: c.duration_s < 1),
    ("aspect_ratio<1", lambda c: c.aspect_ratio < 1),
    ("aspect_ratio>2", lambda c: c.aspect_ratio > 2),
    ("motion_score<=0", lambda c: c.motion_px < 0.05),
    ("black_area_frac>0.8", lambda c: c.black_area > 0.8),
    ("brightness<0.2", lambda c: c.brightness < 0.2),
    ("black_frame_frac>0.4", lambda c: c.black_frames > 0.4),
)
"""Mimir's basic and quality filtration as `classic` words it: the first that fits is the reason."""
LATER = {"overlay_score>0.5", "residual_cut_score>0.5"}
"""Reasons of the stages that follow: their detectors have tests of their own."""


@dataclass(frozen=True)
class Seen:
    """A whole file as a player shows it, frame by frame."""

    times_s: tuple[float, ...]
    size: tuple[int, int]
    """Width and height as shown."""
    brightness: np.ndarray
    black_area: np.ndarray
    small: tuple[np.ndarray, ...]
    """Luma, 320 px wide as stored."""
    cuts: tuple[int, ...]
    """What AdaptiveDetector finds."""


@dataclass(frozen=True)
class Clip:
    """The eight numbers of one clip that `classic` judges, worked out the plain way."""

    num_frames: int
    duration_s: float
    aspect_ratio: float
    motion_px: float
    black_area: float
    brightness: float
    black_frames: float


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples")
    assert make_samples(path) == SAMPLES
    return path


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Seen]:
    return {sample.name: _watch(folder / sample.name) for sample in VIDEOS}


def _watch(path: Path) -> Seen:
    times, brightness, black, small, cuts = [], [], [], [], []
    detector = AdaptiveDetector(min_scene_len=0)
    with av.open(str(path)) as file:
        for i, frame in enumerate(file.decode(video=0)):
            planes = frame.to_ndarray(format="yuv420p")
            luma = np.clip((planes[: frame.height].astype(np.float32) - 16) / 219, 0, 1)
            times.append(frame.time)
            brightness.append(luma.mean())
            black.append((luma < 0.1).mean())
            low = 320, max(1, round(320 * frame.height / frame.width))
            small.append(cv2.resize(np.uint8(luma * 255), low, interpolation=cv2.INTER_AREA))
            cuts += detector.process_frame(FrameTimecode(i, 24.0), frame.to_ndarray(format="bgr24"))
        cuts += detector.post_process(FrameTimecode(len(times) - 1, 24.0))
    size = (frame.width, frame.height) if frame.rotation % 180 == 0 else (frame.height, frame.width)
    return Seen(
        times_s=tuple(times),
        size=size,
        brightness=np.array(brightness),
        black_area=np.array(black),
        small=tuple(small),
        cuts=tuple(cut.frame_num for cut in cuts),
    )


def _clip(sample: Sample, number: int, seen: Seen) -> Clip:
    edges = (0, *sample.cuts, sample.num_frames)
    first, end = edges[number], edges[number + 1]
    span = slice(first, end)
    num = end - first
    lasts = (seen.times_s[end - 1] - seen.times_s[first]) * num / (num - 1)
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    moves = [
        np.hypot(*np.moveaxis(flow.calc(seen.small[i], seen.small[i + 1], None), 2, 0)).mean()
        for i in range(first, end - 1, 6)
    ]
    return Clip(
        num_frames=num,
        duration_s=lasts,
        aspect_ratio=seen.size[0] / seen.size[1],
        motion_px=float(np.mean(moves)),
        black_area=float(seen.black_area[span].mean()),
        brightness=float(seen.brightness[span].mean()),
        black_frames=float((seen.black_area[span] >= 0.98).mean()),
    )


@pytest.mark.parametrize(
    ("sample", "number"), CLIPS, ids=[f"{s.name.split('/')[-1]}-{i}" for s, i in CLIPS]
)
def test_label_is_the_first_rule_that_fits(
    sample: Sample, number: int, seen: dict[str, Seen]
) -> None:
    clip = _clip(sample, number, seen[sample.name])
    reason = next((reason for reason, fits in RULES if fits(clip)), None)
    state, expected = sample.clips[number]
    if expected in LATER:
        state, expected = "kept", None
    assert (("rejected" if reason else "kept"), reason) == (state, expected), clip


@pytest.mark.parametrize(
    ("sample", "number"), CLIPS, ids=[f"{s.name.split('/')[-1]}-{i}" for s, i in CLIPS]
)
def test_label_is_far_from_its_threshold(
    sample: Sample, number: int, seen: dict[str, Seen]
) -> None:
    """What decides a label is a fifth or more away from the bound, unless it is exact."""
    clip = _clip(sample, number, seen[sample.name])
    state, reason = sample.clips[number]
    assert clip.motion_px < 0.002 if reason == "motion_score<=0" else clip.motion_px > 0.15
    if reason == "black_area_frac>0.8":
        assert clip.black_area > 0.88
    if reason == "brightness<0.2":
        assert clip.brightness < 0.16 and clip.black_area < 0.5
    if reason == "black_frame_frac>0.4":
        assert clip.black_frames > 0.48 and clip.black_area < 0.64 and clip.brightness > 0.25
    if state == "kept":
        assert clip.num_frames >= 70 and clip.duration_s > 1.5
        assert clip.black_area < 0.5 and clip.brightness > 0.25 and clip.black_frames < 0.2


@pytest.mark.parametrize("sample", VIDEOS, ids=lambda s: s.name.split("/")[-1])
def test_frames_and_cuts_are_as_stated(sample: Sample, seen: dict[str, Seen]) -> None:
    found = seen[sample.name]
    assert len(found.times_s) == sample.num_frames
    if sample.name == "long_take.mp4":  # one shot: its clips come of the limit of 20 s
        assert found.cuts == () and found.times_s[-1] > 20
    else:
        assert found.cuts == sample.cuts
        assert len(sample.clips) == len(sample.cuts) + 1


@pytest.mark.parametrize("sample", IMAGES, ids=lambda s: s.name)
def test_label_of_an_image_is_far_from_the_first_rule_that_fits(
    sample: Sample, folder: Path
) -> None:
    """OpenCV reads them here, which turns a picture as its EXIF data say."""
    luma = cv2.imread(str(folder / sample.name), cv2.IMREAD_GRAYSCALE) / 255
    aspect_ratio, brightness = luma.shape[1] / luma.shape[0], luma.mean()
    (clip,) = sample.clips
    assert sample.num_frames == 0 and (luma < 0.1).mean() < 0.5
    if clip == ("rejected", "aspect_ratio<1"):
        assert aspect_ratio < 0.6
    elif clip == ("rejected", "brightness<0.2"):
        assert 1.2 < aspect_ratio < 1.8 and brightness < 0.16
    else:
        assert clip == ("kept", None)
        assert 1.2 < aspect_ratio < 1.8 and brightness > 0.25


def test_every_rule_and_every_state_has_a_sample() -> None:
    reasons = {reason for s in SAMPLES for state, reason in s.clips if state == "rejected"}
    assert reasons == {reason for reason, _ in RULES} | LATER
    assert {s.source for s in SAMPLES} == {"done", "failed", "duplicate", "ignored"}
    assert {s.overlay for s in SAMPLES} == {"watermark", "subtitle", None}
    assert len({s.name for s in SAMPLES}) == len(SAMPLES)
    assert all(bool(s.clips) == (s.source == "done") for s in SAMPLES)
    assert {s.source for s in SAMPLES if s.media == "image"} == {"done", "failed"}
    assert {c for s in IMAGES for c in s.clips} == {
        ("kept", None),
        ("rejected", "brightness<0.2"),
        ("rejected", "aspect_ratio<1"),
    }


def test_stored_forms(folder: Path, seen: dict[str, Seen]) -> None:
    """What the names promise of the container: rotation, uneven times, bounds met exactly."""
    with av.open(str(folder / "rotated_upright.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (270, 480)
        assert next(file.decode(video=0)).rotation == 90
    steps = np.diff(seen["vfr.mp4"].times_s)
    assert {round(float(step) * 30) for step in steps} == {1, 2, 3}
    assert seen["square.mp4"].size == (360, 360)
    assert seen["two_to_one.mp4"].size == (640, 320)
    assert seen["motorcycle_hd.mp4"].size == (1280, 720)
    with av.open(str(folder / "grass.webm")) as file:
        assert file.streams.video[0].codec_context.name == "vp9"
        assert file.streams.video[0].frames == 0


def test_overlays_lie_over_the_scene(folder: Path) -> None:
    """The watermark stays while the scene moves; the subtitle is white on a black rim."""
    with av.open(str(folder / "watermarked.mp4")) as file:
        luma = np.stack([f.to_ndarray()[:360] for f in file.decode(video=0)]).astype(float)
    lightest = luma.min(0)  # a pan leaves no place light all the time but where something stays
    corner, scene = lightest[300:345, 390:620], lightest[100:145, 100:330]
    assert np.percentile(corner, 95) > np.percentile(scene, 95) + 40
    with av.open(str(folder / "subtitled.mp4")) as file:
        words = [f.to_ndarray()[300:345, 150:490] > 225 for f in file.decode(video=0)]
    assert min(w.mean() for w in words) > 0.03
    same = [
        np.logical_and(a, b).sum() / np.logical_or(a, b).sum()
        for a, b in zip(words[:-8], words[8:], strict=True)
    ]
    assert same[0] > 0.8  # the same line
    assert same[36] < 0.5  # 36 shows the first line, 44 the second


def test_what_cannot_be_read(folder: Path) -> None:
    for sample in SAMPLES:
        path = folder / sample.name
        if sample.source == "failed" and sample.media == "image":
            with Image.open(path) as image, pytest.raises(OSError, match="truncated"):
                image.load()
        elif sample.source == "failed":
            with pytest.raises(av.error.InvalidDataError), av.open(str(path)):
                pass
        elif sample.source == "ignored":
            assert path.suffix == ".md"
    copies = [folder / s.name for s in SAMPLES if s.source == "duplicate"]
    assert [c.read_bytes() for c in copies] == [(folder / "coffee_pan.mp4").read_bytes()]
    # Sources are told apart in the order of their names: the copy is the later one.
    assert all(c.name > "coffee_pan.mp4" for c in copies)


def test_sidecars_stand_beside_their_sources(folder: Path) -> None:
    assert {Path(name).stem for name in SIDECARS} == {Path(name).stem for name in CAPTIONS}
    for name in SIDECARS:
        (source,) = (v for v in CAPTIONS if Path(v).stem == Path(name).stem)
        assert CAPTIONS[source] in (folder / name).read_text(encoding="utf-8")
        assert (folder / source).exists()


def test_nothing_else_is_written(folder: Path) -> None:
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {s.name for s in SAMPLES} | set(SIDECARS)


def test_makes_only_what_is_missing_and_the_same_again(folder: Path) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    gone = folder / "cuts.mp4"
    before = gone.read_bytes()
    gone.unlink()
    make_samples(folder)
    assert gone.read_bytes() == before
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert {p for p in after if after[p] != stamps[p]} == {gone}


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'reelwright\[demo\]'"):
        make_samples(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_need_no_heavy_import() -> None:
    code = "import sys, pipelines.samples; print({'skimage', 'scipy', 'torch'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr


@pytest.fixture(scope="module")
def poison() -> ModuleType:
    spec = importlib.util.spec_from_file_location("poison", Path(__file__).with_name("poison.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def poisoned(
    poison: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("poison")
    return folder, poison.make_poison(folder)


def _decoded(path: Path) -> int:
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def test_poison_is_made_once(poison: ModuleType, poisoned: tuple[Path, dict[str, str]]) -> None:
    folder, expected = poisoned
    stamps = {p: p.lstat().st_mtime_ns for p in folder.iterdir()}
    assert {p.name for p in stamps} == set(expected)
    assert poison.make_poison(folder) == expected
    assert {p: p.lstat().st_mtime_ns for p in folder.iterdir()} == stamps
    for value in expected.values():
        assert poison.states(value) <= {"done", "failed"}


def test_truncation_is_an_error_or_an_early_end(
    poison: ModuleType, poisoned: tuple[Path, dict[str, str]]
) -> None:
    folder, _ = poisoned
    for name in ("index_last", "index_first"):
        assert _decoded(folder / f"whole_{name}.mp4") == poison.TRUNCATED_FRAMES
        for tenth in range(1, 10):
            with pytest.raises(av.error.InvalidDataError):
                _decoded(folder / f"{name}_{tenth}_tenths.mp4")
    between = folder / "cut_between_frames.mp4"
    assert 0 < _decoded(between) < poison.TRUNCATED_FRAMES
    with av.open(str(between)) as file:  # the one way to see it
        index = file.streams.video[0].index_entries
        assert max(entry.pos + entry.size for entry in index) > between.stat().st_size


def test_endless_and_bomb_are_small_files_of_many_pixels(
    poison: ModuleType, poisoned: tuple[Path, dict[str, str]]
) -> None:
    folder, _ = poisoned
    for name, frames, side in (
        ("endless.mp4", poison.ENDLESS_FRAMES, (320, 180)),
        ("bomb.mp4", poison.BOMB_FRAMES, (poison.BOMB_SIDE_PX, poison.BOMB_SIDE_PX)),
    ):
        assert (folder / name).stat().st_size < 10_000_000
        with av.open(str(folder / name)) as file:
            stream = file.streams.video[0]
            assert (stream.width, stream.height) == side
            assert sum(1 for packet in file.demux(stream) if packet.size) == frames


def test_unreadable_follows_who_asks(poisoned: tuple[Path, dict[str, str]]) -> None:
    folder, expected = poisoned
    path = folder / "unreadable.mp4"
    assert path.stat().st_mode & 0o777 == 0
    assert os.access(path, os.R_OK) == (expected[path.name] == "done")
