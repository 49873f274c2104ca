"""Shots: the same cuts as PySceneDetect gives on the same frames, and how they become spans."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode, ThresholdDetector

from engine.picture import Shrinker, small_size
from engine.shots import (
    DETECTION_PX,
    SETTLED_AFTER,
    Boundaries,
    FrameScorer,
    cuts,
    spans_of_shots,
    split_evenly,
)
from engine.video import decode, open_video
from tests.clips import real, shots_of

STOCK = {"adaptive": AdaptiveDetector, "content": ContentDetector, "threshold": ThresholdDetector}


def fading(length: int, black: int) -> list[np.ndarray]:
    """A picture that fades to black, stays so, and fades in again."""
    picture = shots_of([1])[0]
    levels = [*np.linspace(1, 0, length), *np.zeros(black), *np.linspace(0, 1, length)]
    return [(picture * level).astype(np.uint8) for level in levels]


def stock_cuts(shots: str, frames: list[np.ndarray]) -> list[int]:
    """What PySceneDetect finds by itself, told to merge nothing."""
    detector = STOCK[shots](min_scene_len=0)
    times = [FrameTimecode(i, fps=25.0) for i in range(len(frames))]
    found = [c for t, f in zip(times, frames, strict=True) for c in detector.process_frame(t, f)]
    found += detector.post_process(times[-1])
    return sorted({c.frame_num for c in found} - {0})


def scores_of(shots: str, frames: list[np.ndarray]) -> np.ndarray:
    scorer = FrameScorer(shots)  # type: ignore[arg-type]
    return np.array([scorer.score(frame) for frame in frames])


def small_frames(path: str, limit: int = 10_000) -> list[np.ndarray]:
    """What the scan shows the detectors."""

    def frames() -> Iterator[np.ndarray]:
        shrinker = Shrinker()
        with open_video(path) as video:
            for count, frame in enumerate(decode(video)):
                if count == limit:
                    return
                picture = frame.picture
                size = (picture.width, picture.height)
                image = shrinker.luma(picture, small_size(*size, 320))
                yield shrinker.colour(picture, image, small_size(*size, DETECTION_PX))

    return list(frames())


CORPUS = {
    "cuts": shots_of([30, 7, 61, 40, 3, 2, 1, 25, 1, 1, 20]),
    "fades": fading(20, 12) + fading(9, 1) + fading(5, 0),
    "static": [np.full((90, 160, 3), 90, np.uint8)] * 30,
    "flashes": [np.full((90, 160, 3), 255 * (i % 7 == 3), np.uint8) for i in range(40)],
    "one": shots_of([1]),
    "four": shots_of([2, 2]),
}


@pytest.mark.parametrize("shots", STOCK)
@pytest.mark.parametrize("name", CORPUS)
def test_cuts_are_those_of_the_stock_detector(shots: str, name: str) -> None:
    frames = CORPUS[name]
    found = cuts(shots, None, scores_of(shots, frames))  # type: ignore[arg-type]
    assert found == stock_cuts(shots, frames)


@pytest.mark.parametrize("shots", STOCK)
def test_cuts_of_a_real_clip_are_those_of_the_stock_detector(shots: str) -> None:
    frames = small_frames(real("nvidia-cosmos__cosmos-curate__test_video_30s.mp4"))
    found = cuts(shots, None, scores_of(shots, frames))  # type: ignore[arg-type]
    assert found == stock_cuts(shots, frames)
    assert len(found) >= 2


@pytest.mark.parametrize("shots", ["adaptive", "content"])
def test_cuts_of_random_scores_are_those_of_the_stock_detector(shots: str) -> None:
    """With pictures that give exactly these scores: flat ones, whose value changes by them."""
    rng = np.random.default_rng(7)
    for spread in (10, 60, 255):
        frames = [np.full((4, 4, 3), v, np.uint8) for v in rng.integers(0, spread + 1, 200)]
        found = cuts(shots, None, scores_of(shots, frames))  # type: ignore[arg-type]
        assert found == stock_cuts(shots, frames)


def test_hard_cuts_are_found_at_their_frames() -> None:
    lengths = [30, 25, 61, 40]
    scores = scores_of("adaptive", shots_of(lengths))
    assert cuts("adaptive", None, scores) == [30, 55, 116]
    assert cuts("content", None, scores) == [30, 55, 116]
    assert cuts("none", None, scores) == []


def test_a_short_shot_is_never_merged() -> None:
    lengths = [30, 3, 30, 5, 2, 30]
    assert cuts("content", None, scores_of("content", shots_of(lengths))) == [30, 33, 63, 68, 70]


def test_a_fade_is_cut_in_the_middle_of_the_black() -> None:
    frames = shots_of([20]) + fading(10, 11) + shots_of([20])
    scores = scores_of("threshold", frames)
    black = np.flatnonzero(scores < 12)
    found = cuts("threshold", None, scores)
    assert found == [pytest.approx((black[0] + black[-1] + 1) / 2, abs=0.5)]


def test_thresholds_are_the_caller_s() -> None:
    scores = scores_of("content", shots_of([20, 20]))
    assert cuts("content", None, scores) == [20]
    assert cuts("content", 200.0, scores) == []
    assert cuts("adaptive", 250.0, scores) == []


def test_stock_shots_of_the_reference_clip() -> None:
    """The cuts that PySceneDetect's default pipeline finds at full size."""
    detector = AdaptiveDetector(min_scene_len=0)
    found = []
    path = real("Breakthrough__PySceneDetect__testvideo.mp4")
    with open_video(path) as video:
        for i, frame in enumerate(decode(video)):
            small = cv2.resize(frame.picture.to_ndarray(format="bgr24"), (256, 144))
            found += detector.process_frame(FrameTimecode(i, fps=29.97), small)
    ours = cuts("adaptive", None, scores_of("adaptive", small_frames(path)))
    assert ours == [c.frame_num for c in found]


@pytest.mark.parametrize("shots", ["adaptive", "content", "threshold"])
def test_boundaries_found_frame_by_frame_are_the_cuts(shots: str) -> None:
    frames = CORPUS["cuts"] + CORPUS["fades"] + CORPUS["cuts"]
    scores = scores_of(shots, frames)
    for start in (0, 17, 99):
        boundaries = Boundaries(shots, None, 1.0)  # type: ignore[arg-type]
        found = []
        for i, score in enumerate(scores[start:].tolist()):
            known = None if start and i == 0 and shots != "threshold" else score
            found.append(boundaries.push(i, i / 25, known))
        ours = {b + start for b in found if b is not None and (not start or b >= SETTLED_AFTER)}
        if shots == "threshold":  # both ends of the black, not its middle
            dark = scores < 12
            whole = set((np.flatnonzero(dark[1:] != dark[:-1]) + 1).tolist())
        else:
            whole = set(cuts(shots, None, scores))  # type: ignore[arg-type]
        assert ours == {c for c in whole if c >= (start + SETTLED_AFTER if start else 0)}


@pytest.mark.parametrize(
    ("length", "longest", "parts"),
    [(20.0, 20.0, 1), (20.0000001, 20.0, 1), (20.04, 20.0, 2), (60.0, 20.0, 3), (0.04, 20.0, 1)],
)
def test_long_shots_are_split_evenly(length: float, longest: float, parts: int) -> None:
    starts = split_evenly(5.0, 5.0 + length, longest)
    assert len(starts) == parts
    assert np.diff([*starts, 5.0 + length]) == pytest.approx([length / parts] * parts)


def test_spans_cover_every_frame_once() -> None:
    times = np.arange(1000) / 25
    spans = spans_of_shots([100, 101, 700], times, 40.0, 10.0)
    assert [b for _, b in spans[:-1]] == [a for a, _ in spans[1:]]
    assert (spans[0][0], spans[-1][1]) == (0, 1000)
    assert (100, 101) in spans
    assert max(b - a for a, b in spans) <= 250


def test_a_gap_in_the_frames_makes_no_empty_clip() -> None:
    times = np.array([0.0, 0.04, 90.0, 90.04])
    spans = spans_of_shots([], times, 90.08, 20.0)
    assert spans == [(0, 2), (2, 4)]
    assert spans_of_shots([], np.array([0.0, 0.04]), 90.0, 20.0) == [(0, 2)]
