"""Frame signals against closed-form truth, on arrays and through real encodings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from engine.picture import Shrinker, small_size
from engine.scan import Scan, scan_source
from engine.signals import (
    BlackArea,
    BlackFrames,
    Brightness,
    FrameSignal,
    Motion,
    frames_table,
    luma_of,
)
from engine.video import decode, open_video
from tests.clips import REAL, as_frame, encode, real, texture

EVERY_PAIR = Motion(pairs_per_s=1e6)


def measured(signal: FrameSignal, images: Sequence[np.ndarray], fps: float = 25.0) -> list:
    """A signal's column over grey images, uint8 (H, W)."""
    table = table_of(images, [i / fps for i in range(len(images))])
    return signal.load()(table)[signal.writes.names[0]].to_pylist()


def table_of(
    images: Sequence[np.ndarray], times: Sequence[float], key: Sequence[bool] | None = None
) -> pa.Table:
    return frames_table(range(len(images)), times, key or [False] * len(images), np.stack(images))


def motion(images: Sequence[np.ndarray]) -> float:
    return float(np.mean(measured(EVERY_PAIR, images)[1:]))


def pan(scene: np.ndarray, step: float, num: int, size: tuple[int, int]) -> list[np.ndarray]:
    """A window of `size` (width, height) that moves `step` px a frame to the right."""
    centres = [(size[0] / 2 + 4 + step * i, size[1] / 2 + 4) for i in range(num)]
    return [cv2.getRectSubPix(scene, size, centre) for centre in centres]


def moving_square(ground: np.ndarray, square: np.ndarray, step: int, num: int) -> list[np.ndarray]:
    frames = []
    side = square.shape[0]
    for i in range(num):
        frame = ground.copy()
        frame[40 : 40 + side, 30 + step * i : 30 + step * i + side] = square
        frames.append(frame)
    return frames


def photographs() -> list[np.ndarray]:
    """Grey photographs of at least 400x300 px that happen to be installed, else none."""
    data = pytest.importorskip("skimage.data")
    return [cv2.cvtColor(getattr(data, n)(), cv2.COLOR_RGB2GRAY) for n in ("astronaut", "coffee")]


def test_brightness_is_the_mean_of_known_patches() -> None:
    image = np.full((180, 320), 51, np.uint8)  # 0.2
    image[:90] = 204  # 0.8
    assert measured(Brightness(), [image, np.zeros_like(image)]) == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize(("share", "lines"), [(0.0, 0), (0.25, 45), (0.5, 90), (1.0, 180)])
def test_black_area_is_the_share_of_black_lines(share: float, lines: int) -> None:
    image = np.full((180, 320), 200, np.uint8)
    image[:lines] = 10
    assert measured(BlackArea(), [image]) == pytest.approx([share])


@pytest.mark.parametrize(("level", "black"), [(25, True), (26, False)])
def test_a_pixel_is_black_below_a_tenth(level: int, black: bool) -> None:
    image = np.full((18, 32), level, np.uint8)  # 25 / 255 < 0.1 <= 26 / 255
    assert measured(BlackArea(), [image]) == [float(black)]


@pytest.mark.parametrize(("lines", "black"), [(98, True), (97, False)])
def test_a_frame_is_black_from_98_percent(lines: int, black: bool) -> None:
    image = np.full((100, 50), 255, np.uint8)
    image[:lines] = 0
    assert measured(BlackFrames(), [image]) == [black]


@pytest.mark.parametrize("step", [1.5, 3.0, 6.0, 12.0])
@pytest.mark.parametrize("blur", [0.7, 1.5, 3.0])
def test_a_pan_reads_its_speed_within_2_percent(step: float, blur: float) -> None:
    frames = pan(texture(200, 420, blur=blur), step, 6, (320, 180))
    assert motion(frames) == pytest.approx(step, rel=0.02)


@pytest.mark.parametrize("step", [1.5, 3.0, 4.0])
def test_a_pan_over_photographs_reads_its_speed_within_2_percent(step: float) -> None:
    for photo in photographs():
        assert motion(pan(photo, step, 6, (320, 180))) == pytest.approx(step, rel=0.02)


def test_a_pan_reads_the_same_at_any_size() -> None:
    """3 px a frame at 640 px are 1.5 at 320, and 1 px at 160 are 2."""
    large = pan(texture(400, 760, blur=4.0), 3.0, 4, (640, 360))
    small = [cv2.resize(i, (320, 180), interpolation=cv2.INTER_AREA) for i in large]
    tiny = pan(texture(100, 200, blur=1.5), 1.0, 4, (160, 90))
    assert motion(small) == pytest.approx(1.5, rel=0.02)
    assert motion(tiny) == pytest.approx(2.0, rel=0.02)
    portrait = [np.rot90(i).copy() for i in small]
    assert motion(portrait) == pytest.approx(1.5, rel=0.02)


@pytest.mark.parametrize("step", [2, 4, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_square_over_a_textured_ground_reads_area_times_speed(step: int, seed: int) -> None:
    ground, square = texture(180, 320, 2 * seed, 1.5), texture(80, 80, 2 * seed + 1, 1.5)
    truth = 80 * 80 / (180 * 320) * step
    found = motion(moving_square(ground, square, step, 5))
    assert found == pytest.approx(truth, rel=0.1)


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0, 3.0])
def test_a_static_clip_with_sensor_noise_reads_exactly_0(sigma: float) -> None:
    rng = np.random.default_rng(3)
    for scene in (texture(180, 320), np.full((180, 320), 120, np.uint8), texture(180, 320, 9, 0.6)):
        noisy = [scene + rng.normal(0, sigma, scene.shape) for _ in range(60)]
        frames = [np.clip(np.rint(f), 0, 255).astype(np.uint8) for f in noisy]
        assert motion(frames) == 0.0


def test_a_still_wall_does_not_add_to_what_moves_before_it() -> None:
    """Noise on a flat wall must not be taken for flow: at most the stated factor of three."""
    rng = np.random.default_rng(4)
    ground = np.full((180, 320), 120, np.uint8)
    frames = moving_square(ground, texture(80, 80, 1, 1.5), 4, 6)
    noisy = [np.clip(f + rng.normal(0, 2, f.shape), 0, 255).astype(np.uint8) for f in frames]
    truth = 80 * 80 / (180 * 320) * 4
    assert truth * 0.8 < motion(noisy) < truth * 3.3


def test_motion_is_measured_on_a_grid_of_time_and_null_elsewhere() -> None:
    frames = pan(texture(200, 600), 3.0, 51, (320, 180))
    found = measured(Motion(pairs_per_s=2.0), frames, fps=25.0)
    assert [i for i, v in enumerate(found) if v is not None] == [13, 25, 38, 50]


def test_a_pair_that_ends_in_a_key_frame_gives_way_to_the_next() -> None:
    frames = pan(texture(200, 420), 3.0, 31, (320, 180))
    times = [i / 10 for i in range(31)]

    def measured_at(key: list[int], num: int = 31) -> list[int]:
        table = table_of(frames[:num], times[:num], [i in key for i in range(num)])
        column = Motion(pairs_per_s=1.0).load()(table)["motion_score"].to_pylist()
        return [i for i, value in enumerate(column) if value is not None]

    assert measured_at([]) == [10, 20, 30]
    assert measured_at([0]) == [1, 10, 20, 30]  # the first pair of a file counts
    assert measured_at([10, 13, 20]) == [11, 21, 30]
    assert measured_at(list(range(31))) == [10, 20, 30]  # every frame is a key frame


def test_batches_do_not_change_what_is_measured() -> None:
    frames = pan(texture(200, 420), 3.0, 9, (320, 180))
    whole = measured(EVERY_PAIR, frames)
    first = measured(EVERY_PAIR, frames[:5])
    rest = measured(EVERY_PAIR, frames[4:])[1:]  # with the frame before as context
    assert whole[1:] == first[1:] + rest


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (16, 16), (320, 1), (7, 320)])
def test_tiny_pictures_are_measured(size: tuple[int, int]) -> None:
    frames = [np.full(size, 30 * i, np.uint8) for i in range(4)]
    assert measured(Brightness(), frames) == pytest.approx([30 * i / 255 for i in range(4)])
    assert all(v is not None and np.isfinite(v) for v in measured(EVERY_PAIR, frames)[1:])


def test_pictures_reach_a_signal_without_a_copy() -> None:
    images = np.zeros((5, 4, 6), np.uint8)
    table = frames_table(range(5), [0.0] * 5, [False] * 5, images)
    images[2, 1, 3] = 77
    assert luma_of(table)[2, 1, 3] == 77
    assert table.schema.names == ["frame", "time_s", "key", "luma"]


def test_signals_are_values_with_exact_columns() -> None:
    for signal in (Motion(), BlackArea(), Brightness(), BlackFrames()):
        field = signal.writes.field(0)
        assert field.type in (pa.float32(), pa.bool_())
        assert b"about" in field.metadata
        assert signal == type(signal)()
        assert len(signal.fingerprint) == 16
    assert Motion().fingerprint != Motion(pairs_per_s=4.0).fingerprint
    assert Motion().writes.field(0).metadata[b"unit"] == b"px/frame"


# From files.

ENCODINGS = {
    "h264": ("a.mp4", "libx264", "yuv420p", False, {"crf": "16"}),
    "h264 full": ("b.mp4", "libx264", "yuv420p", True, {"crf": "16"}),
    "h264 444": ("c.mp4", "libx264", "yuv444p", False, {"crf": "16"}),
    "h264 10 bit": ("d.mp4", "libx264", "yuv420p10le", False, {"crf": "16"}),
    "h264 10 bit full": ("e.mp4", "libx264", "yuv420p10le", True, {"crf": "16"}),
    "hevc": ("f.mp4", "libx265", "yuv420p", False, {"crf": "16", "x265-params": "log-level=none"}),
    "vp9": ("g.webm", "libvpx-vp9", "yuv420p", False, {"crf": "15", "b": "0", "cpu-used": "6"}),
    "av1": ("h.mp4", "libsvtav1", "yuv420p", False, {"crf": "15", "preset": "10"}),
    "av1 10 bit": ("i.mkv", "libsvtav1", "yuv420p10le", False, {"crf": "15", "preset": "10"}),
    "ffv1 rgb": ("j.mkv", "ffv1", "bgr0", True, {}),
    "mjpeg": ("k.mkv", "mjpeg", "yuvj420p", True, {"q": "2"}),
}


def clip_row(path: Path | str, **scan: object) -> dict:
    """The one clip of a video without cuts."""
    _, clips, _ = scan_source(str(path), Scan(shots="none", **scan))  # type: ignore[arg-type]
    assert clips.num_rows == 1
    return clips.to_pylist()[0]


@pytest.mark.parametrize("name", ENCODINGS)
def test_levels_and_patches_survive_every_encoding(tmp_path: Path, name: str) -> None:
    """A quarter black, a quarter at 0.2, half at 0.8: brightness 0.45, black area 0.25."""
    file, codec, pix_fmt, full, options = ENCODINGS[name]
    image = np.full((180, 320), 204, np.uint8)
    image[:90, :160], image[:90, 160:] = 0, 51
    dark = np.full_like(image, 6)
    frames = [image] * 12 + [dark] * 4
    row = clip_row(
        encode(
            tmp_path / file, frames, codec=codec, pix_fmt=pix_fmt, full_range=full, options=options
        )
    )
    assert row["brightness"] == pytest.approx((12 * 0.45 + 4 * 6 / 255) / 16, abs=0.005)
    assert row["black_area_frac"] == pytest.approx((12 * 0.25 + 4) / 16, rel=0.02)
    assert row["black_frame_frac"] == 0.25


@pytest.mark.parametrize("name", ENCODINGS)
def test_motion_survives_every_encoding(tmp_path: Path, name: str) -> None:
    file, codec, pix_fmt, full, options = ENCODINGS[name]
    frames = pan(texture(200, 480, blur=2.0), 3.0, 45, (320, 180))
    row = clip_row(
        encode(
            tmp_path / file, frames, codec=codec, pix_fmt=pix_fmt, full_range=full, options=options
        )
    )
    assert row["motion_score"] == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("name", ["h264", "h264 10 bit", "vp9", "av1"])
@pytest.mark.parametrize("crf", ["23", "35"])
def test_a_static_noisy_clip_reads_exactly_0_after_encoding(
    tmp_path: Path, name: str, crf: str
) -> None:
    file, codec, pix_fmt, full, options = ENCODINGS[name]
    rng = np.random.default_rng(5)
    scene = texture(180, 320, blur=1.5)
    frames = [
        np.clip(scene + rng.normal(0, 2, scene.shape), 0, 255).astype(np.uint8) for _ in range(50)
    ]
    path = encode(
        tmp_path / file,
        frames,
        codec=codec,
        pix_fmt=pix_fmt,
        full_range=full,
        options=options | {"crf": crf, "g": "10"},
    )
    assert clip_row(path, signals=(EVERY_PAIR,))["motion_score"] == 0.0


def test_limited_range_is_expanded_and_full_range_is_not() -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    shrinker = Shrinker()
    for pix_fmt in ("yuv420p", "yuv444p", "yuv422p10le", "yuv444p12le"):
        for full in (False, True):
            found = shrinker.luma(as_frame(ramp, pix_fmt, full), (256, 64))
            assert np.abs(found.astype(int) - ramp).max() <= 1, (pix_fmt, full)


def test_chroma_of_every_layout_gives_the_same_colours() -> None:
    patch = np.zeros((64, 64, 3), np.uint8)
    patch[:32, :32], patch[:32, 32:], patch[32:, :32] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
    for pix_fmt in ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuv420p10le", "nv12", "bgr24"):
        frame = as_frame(patch, pix_fmt, full_range=pix_fmt.startswith("yuvj"))
        shrinker = Shrinker()
        found = shrinker.colour(frame, shrinker.luma(frame, (64, 64)), (32, 32))
        small = cv2.resize(patch, (32, 32), interpolation=cv2.INTER_AREA)
        error = np.abs(found.astype(int) - small)[4:12, 4:12]
        assert error.max() <= 4, pix_fmt


@pytest.mark.parametrize("size", [(161, 121), (1, 1), (333, 77), (1280, 720), (640, 2)])
def test_luma_of_odd_sizes_keeps_its_mean(size: tuple[int, int]) -> None:
    image = texture(size[1], size[0], blur=1.0)
    found = Shrinker().luma(as_frame(image), small_size(*size, 320))
    assert found.shape[::-1] == small_size(*size, 320)
    assert found.mean() == pytest.approx(image.mean(), abs=1.5)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real clips")
def test_known_real_clips() -> None:
    static = clip_row(real("aigc-apps__VideoX-Fun__inpaint_video_mask.mp4"))
    assert static["motion_score"] == 0.0
    assert clip_row(real("androidx__media__checkerboard_854x356_avc_baseline.mp4"))[
        "motion_score"
    ] == pytest.approx(0.0)
    black = clip_row(real("androidx__media__silent-black-10s.mp4"))
    assert (black["black_area_frac"], black["black_frame_frac"]) == (1.0, 1.0)
    assert black["brightness"] == 0.0
    assert clip_row(real("zai-org__CogVideo__train_running.mp4"))["motion_score"] > 5


def test_decoded_frames_do_not_keep_the_file_s_padding() -> None:
    with open_video(real("androidx__media__bear-vp9-odd-dimensions.webm")) as video:
        picture = next(decode(video)).picture
    assert picture.planes[0].line_size > picture.width == 161
    expected = cv2.cvtColor(picture.to_ndarray(format="bgr24"), cv2.COLOR_BGR2GRAY)
    found = Shrinker().luma(picture, (161, 121))
    assert np.abs(found.astype(int) - expected).mean() < 1.5
