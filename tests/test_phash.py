"""Hashes: what leaves them alone, what changes them, and what has none."""

from __future__ import annotations

import importlib.resources
import itertools

import cv2
import numpy as np
import pyarrow as pa
import pytest

from engine.phash import FLAT, PerceptualHash, phash
from tests.clips import texture

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "ihc.png", "camera.png")


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    pytest.importorskip("skimage")
    package = importlib.resources.files("skimage") / "data"
    return [cv2.imread(str(package / name), cv2.IMREAD_COLOR) for name in PHOTOS]


def jpeg(image: np.ndarray, quality: int = 90) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def rows(*clips: list[bytes]) -> list[dict]:
    keyframes = [[{"time_s": float(i), "jpeg": j} for i, j in enumerate(clip)] for clip in clips]
    return PerceptualHash().load()(pa.table({"keyframes": keyframes})).to_pylist()


def hashes(*images: np.ndarray, quality: int = 90) -> list[int]:
    return rows([jpeg(i, quality) for i in images])[0]["phashes"]


def bits(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def test_a_pattern_of_one_frequency_gives_the_bit_of_that_frequency() -> None:
    y, x = np.mgrid[:320, :320]
    noise = texture(320, 320, 1, blur=30.0).astype(float) - 128
    for row, column in ((1, 1), (2, 5), (8, 8)):
        wave = np.cos(np.pi * (2 * y + 1) * row / 640) * np.cos(np.pi * (2 * x + 1) * column / 640)
        both = [phash(np.clip(128 + noise / 4 + s * 80 * wave, 0, 255)) for s in (1, -1)]
        bit = 1 << (63 - 8 * (row - 1) - (column - 1))
        assert both[0] & bit
        assert not both[1] & bit


def test_half_of_the_bits_are_set(photos: list[np.ndarray]) -> None:
    assert [h.bit_count() for h in hashes(*photos)] == [32] * len(photos)


def test_coding_size_and_light_leave_it_within_a_few_bits(photos: list[np.ndarray]) -> None:
    before = hashes(*photos)
    changed = {
        "quality 50": hashes(*photos, quality=50),
        "half the size": hashes(*(cv2.resize(p, None, fx=0.5, fy=0.5) for p in photos)),
        "twice the size": hashes(*(cv2.resize(p, None, fx=2, fy=2) for p in photos)),
        "darker": hashes(*(cv2.convertScaleAbs(p, alpha=0.85, beta=5) for p in photos)),
        "grey": hashes(*(cv2.cvtColor(p, cv2.COLOR_BGR2GRAY) for p in photos)),
    }
    for how, after in changed.items():
        apart = [bits(a, b) for a, b in zip(before, after, strict=True)]
        assert max(apart) <= 4, (how, apart)


def test_other_pictures_have_other_hashes(photos: list[np.ndarray]) -> None:
    apart = [bits(a, b) for a, b in itertools.combinations(hashes(*photos), 2)]
    assert min(apart) > 10
    assert 28 < np.mean(apart) < 36


@pytest.mark.parametrize(
    "turn", [lambda p: p[:, ::-1], lambda p: p[::-1], lambda p: cv2.rotate(p, 0)]
)
def test_mirrored_and_turned_are_others(photos: list[np.ndarray], turn) -> None:
    before, after = hashes(*photos), hashes(*(np.ascontiguousarray(turn(p)) for p in photos))
    assert min(bits(a, b) for a, b in zip(before, after, strict=True)) > 10


def test_what_is_flat_has_no_hash() -> None:
    noise = np.random.default_rng(0).normal(0, 6, (360, 640))
    stripes = np.tile(np.repeat([[0, 255]], 40, axis=1), (360, 8)).astype(np.uint8)
    ramp = np.tile(np.linspace(0, 255, 640), (360, 1)).astype(np.uint8)
    flat = [
        np.zeros((360, 640), np.uint8),
        np.full((360, 640), 90, np.uint8),
        np.clip(40 + noise, 0, 255).astype(np.uint8),
        stripes,
        ramp,
    ]
    found = rows([jpeg(f, q) for f in flat for q in (30, 90)])[0]
    assert found["phashes"] == [FLAT] * 10
    assert found["phash"] == FLAT


def test_a_row_has_each_keyframe_in_order_and_the_one_in_the_middle(photos) -> None:
    one, two, three, four = (jpeg(p) for p in photos[:4])
    singles = [rows([j])[0]["phash"] for j in (one, two, three, four)]
    odd, even = rows([one, two, three], [one, two, three, four])
    assert odd == {**odd, "phash": singles[1], "phashes": singles[:3]}
    assert even == {**even, "phash": singles[2], "phashes": singles}
    assert odd["error_type"] is None


def test_what_cannot_be_read_fails_alone(photos: list[np.ndarray]) -> None:
    good = jpeg(photos[0])
    none, broken, fine = rows([], [good, b"no picture"], [good])
    assert (none["error_type"], none["phash"], none["phashes"]) == ("ValueError", None, None)
    assert broken["phash"] is None
    assert "10 bytes" in broken["error"]
    assert fine["error"] is None
    assert not fine["transient"]


def test_types_are_the_schemas_and_parameters_count() -> None:
    table = PerceptualHash().load()(pa.table({"keyframes": [[]]}))
    assert table.schema.field("phash").type == pa.uint64()
    assert table.schema.field("phashes").type == pa.list_(pa.uint64())
    assert PerceptualHash(min_spread=3.0).fingerprint != PerceptualHash().fingerprint
    assert PerceptualHash(batch_size=3).fingerprint == PerceptualHash().fingerprint
