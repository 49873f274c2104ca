"""Text coverage against rendered text of known area."""

from __future__ import annotations

import cv2
import numpy as np
import pyarrow as pa
import pytest

from engine.gauge import PICTURES
from engine.ocr import TextCoverage, covered, spread

SIZE = (448, 796)


def rendered(
    *lines: str, scale: float = 1.0, angle: float = 0.0, ground: np.ndarray | int = 90
) -> tuple[bytes, float]:
    """A picture with text, and the share of it under the boxes that hug the lines' ink."""
    image = np.full((*SIZE, 3), ground, np.uint8) if isinstance(ground, int) else ground.copy()
    known = np.zeros(SIZE, np.uint8)
    thick = max(1, int(scale * 2))
    for number, line in enumerate(lines):
        ink = np.zeros(SIZE, np.uint8)
        (_, height), base = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, scale, thick)
        at = (40, 90 + int(number * (height + base) * 1.8))
        cv2.putText(ink, line, at, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, thick, cv2.LINE_AA)
        turn = cv2.getRotationMatrix2D((SIZE[1] / 2, SIZE[0] / 2), angle, 1)
        ink = cv2.warpAffine(ink, turn, SIZE[::-1])
        image[ink > 127] = 255
        box = cv2.boxPoints(cv2.minAreaRect(cv2.findNonZero(ink)))
        cv2.fillPoly(known, [np.round(box).astype(np.int32)], 1)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes(), known.mean()


@pytest.fixture(scope="module")
def coverage() -> object:
    measure = TextCoverage().load()

    def of(*clips: list[bytes]) -> list[dict]:
        pictures = [[{"time_s": float(i), "jpeg": j} for i, j in enumerate(c)] for c in clips]
        ids = [str(i) for i in range(len(clips))]
        return measure(
            pa.table({"clip_id": ids, "keyframes": pa.array(pictures, PICTURES)})
        ).to_pylist()

    return of


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.6, 2.2])
@pytest.mark.parametrize("angle", [0, 15])
def test_coverage_is_the_area_of_the_text(coverage: object, scale: float, angle: float) -> None:
    lines = ("Reelwright makes data", "measured in one pass") if scale < 2 else ("Big words",)
    jpeg, known = rendered(*lines, scale=scale, angle=angle)
    (row,) = coverage([jpeg])
    assert row["ocr_area_frac"] == pytest.approx(known, rel=0.15)


def test_a_subtitle_over_a_photograph_is_found_as_large_as_it_is(coverage: object) -> None:
    from skimage import data

    photo = cv2.resize(data.coffee()[..., ::-1], SIZE[::-1])
    jpeg, known = rendered("This was laid over the scene", scale=1.2, ground=photo)
    (plain, titled) = coverage([rendered(ground=photo)[0]], [jpeg])
    assert plain["ocr_area_frac"] < 0.01
    assert titled["ocr_area_frac"] == pytest.approx(known, rel=0.15)


def test_a_picture_without_text_has_none(coverage: object) -> None:
    (row,) = coverage([rendered()[0]])
    assert row["ocr_area_frac"] == 0.0 and row["error_type"] is None


def test_the_mean_is_over_keyframes_with_and_without_text(coverage: object) -> None:
    text, known = rendered("Reelwright makes data", scale=1.4)
    plain = rendered()[0]
    (row,) = coverage([text, plain, plain])
    assert row["ocr_area_frac"] == pytest.approx(known / 3, rel=0.15)


def test_boxes_that_overlap_count_once_and_slanted_ones_by_their_own_area() -> None:
    square = np.array([[10, 10], [59, 10], [59, 59], [10, 59]], np.float32)
    beside = square + np.array([25, 0], np.float32)
    assert covered([square], (100, 100)) == pytest.approx(0.25)
    assert covered([square, beside], (100, 100)) == pytest.approx(0.375)
    diamond = np.array([[50, 10], [90, 50], [50, 90], [10, 50]], np.float32)
    assert covered([diamond], (100, 100)) == pytest.approx(0.32, rel=0.05)
    assert covered([], (100, 100)) == 0.0


def test_keyframes_are_spread_over_the_clip() -> None:
    assert spread(16, 3) == [2, 8, 13]
    assert spread(3, 3) == [0, 1, 2]
    assert spread(1, 3) == [0]


def test_what_cannot_be_looked_at_fails_alone(coverage: object) -> None:
    none, broken, good = coverage([], [b"no jpeg"], [rendered()[0]])
    assert none["error_type"] == "NoKeyframes" and none["ocr_area_frac"] is None
    assert broken["error_type"] == "DecodeError"
    assert good["ocr_area_frac"] == 0.0
