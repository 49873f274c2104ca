"""The sample corpus: some thirty-five files whose state and reason under `classic` are known.

The second half of this file is the list itself: a label, and beside it how the file is made.

Real photographs (the ones that ship inside scikit-image) seen by a moving camera, a few drawn
scenes, and the files that every real folder holds too: broken, mislabelled, copied, not video.
Every label is far from its threshold, so it tests the run and not the last digit of a signal.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Frame = NDArray[np.uint8]
"""Height, width, 3: blue, green, red."""
Frames = Iterator[Frame]
Size = tuple[int, int]
"""Width and height in pixels."""

Make = Callable[[Path], object]
"""Writes a file at a path."""

KEPT: tuple[str, str | None] = ("kept", None)


@dataclass(frozen=True)
class Sample:
    """A file of the corpus and what a `classic` run must say about it."""

    name: str
    """Path below the corpus folder."""
    source: str
    """State of the source: done, failed, duplicate or ignored."""
    clips: tuple[tuple[str, str | None], ...]
    """State and reason of each clip, in time order."""
    about: str
    """What it shows."""
    cuts: tuple[int, ...] = ()
    """First frame of every clip but the first."""
    num_frames: int = 0
    """Frames that a decoder gives; 0 for what is not decoded, and for images."""
    overlay: str | None = None
    """What is drawn over the scene: watermark or subtitle."""
    media: str = "video"
    """video or image, as its name says."""


CAPTIONS = {
    "coffee_pan.mp4": "A slow pan over a cup of espresso on a wooden table.",
    "astronaut_zoom.mp4": "The camera moves in on an astronaut in an orange suit.",
    "coins.jpg": "Greek coins from Pompeii, laid out in rows on a dark ground.",
}
"""Caption that a sidecar file gives to a sample."""

SIDECARS = {
    "coffee_pan.txt": CAPTIONS["coffee_pan.mp4"] + "\n",
    "astronaut_zoom.json": json.dumps({"caption": CAPTIONS["astronaut_zoom.mp4"]}) + "\n",
    "coins.txt": CAPTIONS["coins.jpg"] + "\n",
}
"""Files that carry the captions, and their text: neither sources nor ignored."""


def make_samples(folder: Path) -> tuple[Sample, ...]:
    """Writes what is missing of the corpus into `folder`, and gives the labels of all of it.

    Each file appears under its name only when it is whole. The same frames every time.

    Raises:
        ModuleNotFoundError: scikit-image, whose photographs are filmed, is not installed.
    """
    for sample, make in _CORPUS:
        _place(folder / sample.name, make)
    for name, text in SIDECARS.items():
        _place(folder / name, _text(text))
    _photo.cache_clear()  # tens of megabytes that nobody needs again
    return SAMPLES


def _place(path: Path, make: Make) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes may make the same corpus: each writes its own, and the last rename stands.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        make(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# What a camera sees


@functools.cache
def _photo(name: str, width: int) -> Frame:
    """A photograph of scikit-image scaled to `width`; read as a file, which imports no SciPy."""
    try:
        package = importlib.resources.files("skimage")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the sample corpus needs scikit-image: pip install 'reelwright[demo]'", name="skimage"
        ) from error
    try:
        with importlib.resources.as_file(package / "data" / name) as path, Image.open(path) as read:
            photo = np.ascontiguousarray(np.asarray(read.convert("RGB"))[..., ::-1])
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the sample corpus needs the photograph data/{name} of scikit-image, which this "
            "version does not carry: pip install 'reelwright[demo]'"
        ) from None
    height = round(photo.shape[0] * width / photo.shape[1])
    shrinks = width < photo.shape[1]
    return cv2.resize(
        photo, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def _view(photo: Frame, size: Size, x: float, y: float, zoom: float = 1.0) -> Frame:
    """The window of `size / zoom` whose upper left corner is at (x, y), shown at `size`."""
    width, height = size
    assert x >= 0 and x + width / zoom <= photo.shape[1], f"{x=} leaves the photograph"
    assert y >= 0 and y + height / zoom <= photo.shape[0], f"{y=} leaves the photograph"
    inverse = np.array([[1 / zoom, 0, x], [0, 1 / zoom, y]])
    return cv2.warpAffine(
        photo,
        inverse,
        size,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _pan(
    name: str,
    width: int,
    size: Size,
    count: int,
    start: tuple[float, float] = (0, 0),
    step: tuple[float, float] = (3, 0),
) -> Frames:
    """`count` frames of a camera that moves `step` px a frame over a photograph."""
    photo = _photo(name, width)
    for i in range(count):
        yield _view(photo, size, start[0] + i * step[0], start[1] + i * step[1])


def _zoom(name: str, width: int, size: Size, count: int, first: float, last: float) -> Frames:
    """A camera that moves in on, or away from, the middle of a photograph."""
    photo = _photo(name, width)
    for zoom in np.geomspace(first, last, count):
        x = (photo.shape[1] - size[0] / zoom) / 2
        y = (photo.shape[0] - size[1] / zoom) / 2
        yield _view(photo, size, x, y, float(zoom))


def _orbit(name: str, width: int, size: Size, count: int, turns: float) -> Frames:
    """A camera on an ellipse: a long take that never leaves the photograph and never stops."""
    photo = _photo(name, width)
    reach = (photo.shape[1] - size[0]) / 2, (photo.shape[0] - size[1]) / 2
    for angle in np.linspace(0, 2 * np.pi * turns, count):
        yield _view(photo, size, reach[0] * (1 + np.cos(angle)), reach[1] * (1 + np.sin(angle)))


def _still(frame: Frame, count: int) -> Frames:
    return (frame for _ in range(count))


def _plain(size: Size, level: int, count: int) -> Frames:
    return _still(np.full((size[1], size[0], 3), level, np.uint8), count)


def _shapes(size: Size, count: int) -> Frames:
    """A textured square and a disc that cross a still, textured ground."""
    ground = _view(_photo("gravel.png", 512), size, 0, 0)
    square = _view(_photo("brick.png", 512), (120, 120), 0, 0)
    for i in range(count):
        frame = ground.copy()
        x = 20 + 3 * i
        frame[40:160, x : x + 120] = square
        cv2.circle(frame, (size[0] - 60 - 3 * i, 205), 45, (40, 90, 230), -1, cv2.LINE_AA)
        yield frame


# What is done to its pictures


def _expose(frames: Frames, gain: Callable[[int], float], offset: float = 0) -> Frames:
    return (cv2.convertScaleAbs(f, alpha=gain(i), beta=offset) for i, f in enumerate(frames))


def _ramp(*points: tuple[int, float]) -> Callable[[int], float]:
    """Straight lines through points of (frame, value)."""
    at, values = zip(*points, strict=True)
    return lambda i: float(np.interp(i, at, values))


def _boxed(frames: Frames, size: Size) -> Frames:
    """Each frame in the middle of a black one of `size`."""
    for frame in frames:
        canvas = np.zeros((size[1], size[0], 3), np.uint8)
        top, left = (size[1] - frame.shape[0]) // 2, (size[0] - frame.shape[1]) // 2
        canvas[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
        yield canvas


def _write_on(frame: Frame, text: str, at: tuple[int, int], scale: float) -> Frame:
    """White letters with a black rim, their base line starting at `at`."""
    out = frame.copy()
    for colour, thick in (((0, 0, 0), 4), ((255, 255, 255), 2)):
        cv2.putText(out, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, thick, cv2.LINE_AA)
    return out


def _watermarked(frames: Frames, text: str) -> Frames:
    """The same half transparent text in the lower right corner of each frame."""
    for frame in frames:
        at = frame.shape[1] - 250, frame.shape[0] - 24
        yield cv2.addWeighted(frame, 0.4, _write_on(frame, text, at, 0.9), 0.6, 0)


def _subtitled(frames: Frames, lines: tuple[str, ...], each: int) -> Frames:
    """One line after the other below the picture's middle, `each` frames long."""
    for i, frame in enumerate(frames):
        line = lines[min(i // each, len(lines) - 1)]
        (wide, _), _ = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.8, 2)
        yield _write_on(frame, line, ((frame.shape[1] - wide) // 2, frame.shape[0] - 30), 0.8)


def _turned(frames: Frames) -> Frames:
    return (cv2.rotate(f, cv2.ROTATE_90_CLOCKWISE) for f in frames)


# How it is stored

_CODECS = {
    "libx264": {"preset": "veryfast", "crf": "20"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "30", "b": "0"},
    "mpeg4": {"b": "1500000"},
}


def _video(
    frames: Callable[[], Frames],
    *,
    fps: int = 24,
    container: str = "mp4",
    codec: str = "libx264",
    turn: int = 0,
    ticks: tuple[int, ...] = (1,),
) -> Make:
    """A function that encodes `frames` into a file.

    Args:
        frames: Gives the frames, anew at each call.
        fps: Ticks a second.
        container: FFmpeg's name of the file format.
        codec: An encoder of `_CODECS`.
        turn: Counter-clockwise degrees that a player must turn the stored frames by.
        ticks: How long each frame stays, over and over; (1,) is a constant frame rate.
    """

    def make(path: Path) -> None:
        with av.open(str(path), "w", format=container) as file:
            stream = None
            pts = 0
            for i, picture in enumerate(frames()):
                if stream is None:
                    stream = file.add_stream(codec, rate=fps, options=_CODECS[codec])
                    stream.height, stream.width = picture.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    # One thread: the stored bytes then do not depend on how many cores there are.
                    stream.codec_context.thread_count = 1
                    stream.codec_context.gop_size = 2 * fps
                    if turn:
                        stream.set_display_rotation(turn)
                # OpenCV turns grey into exactly neutral chroma. swscale is off by one, and a tint
                # of one level is a saturation that jumps wherever the picture is nearly black.
                planes = cv2.cvtColor(picture, cv2.COLOR_BGR2YUV_I420)
                frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                frame.pts, frame.time_base = pts, Fraction(1, fps)
                pts += ticks[i % len(ticks)]
                file.mux(stream.encode(frame))
            assert stream is not None, "a video without frames"
            file.mux(stream.encode())

    return make


def _half(make: Make) -> Make:
    """The first half of what `make` writes; of an mp4 its index is lost, which comes last."""

    def cut(path: Path) -> None:
        make(path)
        os.truncate(path, path.stat().st_size // 2)

    return cut


def _copy(name: str) -> Make:
    return lambda path: shutil.copyfile(path.parent / name, path)


def _text(text: str) -> Make:
    return lambda path: path.write_text(text, encoding="utf-8")


def _image(frame: Callable[[], Frame], *, kind: str = "JPEG", orientation: int = 1) -> Make:
    """A function that stores a picture with Pillow.

    Args:
        frame: Gives the picture.
        kind: Pillow's name of the file format.
        orientation: What its EXIF data tell a viewer; 6 is to turn it clockwise by 90 degrees.
    """

    def make(path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(cv2.cvtColor(frame(), cv2.COLOR_BGR2RGB)).save(path, kind, exif=exif)

    return make


# The corpus: label, then how it is made


def _rejected(reason: str) -> tuple[str, str]:
    return "rejected", reason


_HD, _WIDE, _SMALL, _TINY = (1280, 720), (640, 360), (480, 270), (320, 180)

_CORPUS: tuple[tuple[Sample, Make], ...] = (
    # Kept: plain shots
    (
        Sample("coffee_pan.mp4", "done", (KEPT,), "3 px a frame; .txt caption", num_frames=96),
        _video(lambda: _pan("coffee.png", 1200, _WIDE, 96, (60, 200))),
    ),
    (
        Sample("astronaut_zoom.mp4", "done", (KEPT,), "moving in; .json caption", num_frames=96),
        _video(lambda: _zoom("astronaut.png", 720, (480, 360), 96, 1.0, 1.7)),
    ),
    (
        Sample(
            "motorcycle_hd.mp4", "done", (KEPT,), "1280x720 at 25 frames/s, panning", num_frames=75
        ),
        _video(lambda: _pan("motorcycle_left.png", 1700, _HD, 75, (40, 200), (5, 1)), fps=25),
    ),
    (
        Sample(
            "shapes.mp4", "done", (KEPT,), "a square and a disc over still gravel", num_frames=90
        ),
        _video(lambda: _shapes(_SMALL, 90), fps=30),
    ),
    (
        Sample(
            "grass.webm", "done", (KEPT,), "VP9 in WebM, its header counts no frames", num_frames=72
        ),
        _video(
            lambda: _pan("grass.png", 700, _SMALL, 72, (200, 10), (-2, 2)),
            container="webm",
            codec="libvpx-vp9",
        ),
    ),
    (
        Sample("retina.avi", "done", (KEPT,), "MPEG-4 part 2 in AVI, moving away", num_frames=75),
        _video(
            lambda: _zoom("retina.jpg", 700, _SMALL, 75, 1.8, 1.1),
            fps=25,
            container="avi",
            codec="mpeg4",
        ),
    ),
    (
        Sample(
            "square.mp4", "done", (KEPT,), "aspect ratio exactly 1, the rule's bound", num_frames=72
        ),
        _video(lambda: _pan("ihc.png", 700, (360, 360), 72, (10, 10), (2, 3))),
    ),
    (
        Sample(
            "two_to_one.mp4", "done", (KEPT,), "aspect ratio exactly 2, the rule's bound", (), 72
        ),
        _video(lambda: _pan("chelsea.png", 900, (640, 320), 72, (220, 200), (-3, -1))),
    ),
    (
        Sample(
            "städte reise/naïve café 猫 01.mp4",
            "done",
            (KEPT,),
            "Unicode and spaces",
            num_frames=75,
        ),
        _video(lambda: _pan("chelsea.png", 1000, _WIDE, 75, (10, 60), (3, 2)), fps=25),
    ),
    (
        Sample(
            "long_take.mp4",
            "done",
            (KEPT, KEPT),
            "one shot of 24 s: split evenly, for it is longer than 20 s",
            cuts=(288,),
            num_frames=576,
        ),
        _video(lambda: _orbit("motorcycle_right.png", 741, _TINY, 576, 1.5)),
    ),
    # Kept: what must not mislead the signals
    (
        Sample(
            "letterboxed.mp4",
            "done",
            (KEPT,),
            "bars above and below: a quarter black",
            num_frames=96,
        ),
        _video(lambda: _boxed(_pan("ihc.png", 1000, (640, 272), 96, (10, 500)), _WIDE)),
    ),
    (
        Sample(
            "watermarked.mp4",
            "done",
            (_rejected("overlay_score>0.5"),),
            "a half transparent text in the corner of a pan",
            num_frames=96,
            overlay="watermark",
        ),
        _video(
            lambda: _watermarked(
                _pan("motorcycle_right.png", 1100, _WIDE, 96, (400, 300), (-3, -1)), "STOCK CLIPS"
            )
        ),
    ),
    (
        Sample(
            "subtitled.mp4",
            "done",
            (_rejected("overlay_score>0.5"),),
            "a pan with three subtitles, one after the other",
            num_frames=120,
            overlay="subtitle",
        ),
        _video(
            lambda: _subtitled(
                _pan("astronaut.png", 1100, _WIDE, 120, (20, 10), (3, 3)),
                ("We have known each other", "for a long time, you and I.", "Ready to leave?"),
                40,
            )
        ),
    ),
    (
        Sample("vfr.mp4", "done", (KEPT,), "frames of 1/30, 1/30, 1/15 and 1/10 s", num_frames=100),
        _video(
            lambda: _pan("brick.png", 900, _SMALL, 100, (400, 20), (-3, 3)),
            fps=30,
            ticks=(1, 1, 2, 3),
        ),
    ),
    (
        Sample(
            "rotated_upright.mp4", "done", (KEPT,), "stored 270x480, shown 480x270", num_frames=72
        ),
        _video(lambda: _turned(_pan("rocket.jpg", 900, _SMALL, 72, (60, 300), (3, -2))), turn=90),
    ),
    # Kept and rejected: several shots in a file
    (
        Sample(
            "cuts.mp4",
            "done",
            (KEPT, _rejected("num_frames<65"), KEPT, _rejected("motion_score<=0")),
            "hard cuts: slides, a short rocket, a cat, a cup that does not move",
            cuts=(72, 102, 174),
            num_frames=246,
        ),
        _video(
            lambda: chain(
                _pan("ihc.png", 1100, _WIDE, 72, (400, 20), (-3, 2)),
                _pan("rocket.jpg", 1000, _WIDE, 30, (20, 20), (3, 1)),
                _pan("chelsea.png", 1200, _WIDE, 72, (300, 400), (2, -3)),
                _still(_view(_photo("coffee.png", 800), _WIDE, 80, 80), 72),
            )
        ),
    ),
    (
        Sample(
            "fades.mp4",
            "done",
            (KEPT, _rejected("residual_cut_score>0.5")),
            "a hard cut, then a fade through black, which AdaptiveDetector takes for one shot",
            cuts=(72,),
            num_frames=216,
        ),
        _video(
            lambda: chain(
                _pan("coffee.png", 900, _SMALL, 72, (400, 10), (-2, 2)),
                _expose(
                    chain(
                        _pan("camera.png", 900, _SMALL, 72, (10, 10), (3, 1)),
                        _pan("moon.png", 800, _SMALL, 72, (20, 200), (3, 1)),
                    ),
                    _ramp((22, 1), (68, 0), (76, 0), (122, 1)),
                ),
            )
        ),
    ),
    # Rejected, one for each rule
    (
        Sample(
            "static.mp4", "done", (_rejected("motion_score<=0"),), "a still photo", num_frames=96
        ),
        _video(lambda: _still(_view(_photo("chelsea.png", 700), _SMALL, 100, 100), 96)),
    ),
    (
        Sample(
            "black.mp4", "done", (_rejected("motion_score<=0"),), "black, so still", num_frames=96
        ),
        _video(lambda: _plain(_TINY, 0, 96)),
    ),
    (
        Sample(
            "dark.mp4", "done", (_rejected("brightness<0.2"),), "a pan, underexposed", num_frames=96
        ),
        _video(
            lambda: _expose(
                _pan("gravel.png", 900, _SMALL, 96, (10, 300), (3, 0)), lambda i: 0.12, 22
            )
        ),
    ),
    (
        Sample(
            "pinhole.mp4",
            "done",
            (_rejected("black_area_frac>0.8"),),
            "a moving picture on a tenth of a black frame",
            num_frames=96,
        ),
        _video(lambda: _boxed(_pan("coffee.png", 600, (208, 112), 96, (20, 100)), _WIDE)),
    ),
    (
        Sample(
            "blackout.mp4",
            "done",
            (_rejected("black_frame_frac>0.4"),),
            "a bright wall that fades to black for half of the time",
            num_frames=168,
        ),
        _video(
            lambda: _expose(
                _pan("brick.png", 1100, _SMALL, 168, (20, 100), (3, 2)),
                _ramp((12, 1.8), (42, 0), (120, 0), (150, 1.8)),
            )
        ),
    ),
    (
        Sample("portrait.mp4", "done", (_rejected("aspect_ratio<1"),), "270x480", num_frames=72),
        _video(lambda: _pan("astronaut.png", 600, (270, 480), 72, (20, 20), (3, 1))),
    ),
    (
        Sample(
            "rotated_portrait.mp4",
            "done",
            (_rejected("aspect_ratio<1"),),
            "stored 480x270, shown 270x480",
            num_frames=72,
        ),
        _video(
            lambda: _turned(_pan("rocket.jpg", 900, (270, 480), 72, (300, 100), (3, 0))), turn=90
        ),
    ),
    (
        Sample("wide.mp4", "done", (_rejected("aspect_ratio>2"),), "640x240", num_frames=72),
        _video(lambda: _pan("grass.png", 900, (640, 240), 72, (20, 20), (3, 3))),
    ),
    (
        Sample("short.mp4", "done", (_rejected("num_frames<65"),), "48 frames", num_frames=48),
        _video(lambda: _pan("camera.png", 700, _SMALL, 48, (20, 200))),
    ),
    (
        Sample(
            "blink.mp4", "done", (_rejected("duration_s<1"),), "72 frames in 0.6 s", num_frames=72
        ),
        _video(lambda: _pan("moon.png", 700, _SMALL, 72, (200, 20), (-2, 2)), fps=120),
    ),
    # Images
    (
        Sample("coins.jpg", "done", (KEPT,), "a photograph; .txt caption", media="image"),
        _image(lambda: _view(_photo("coins.png", 640), _WIDE, 0, 0)),
    ),
    (
        Sample(
            "night.png",
            "done",
            (_rejected("brightness<0.2"),),
            "a photograph, underexposed",
            media="image",
        ),
        _image(
            lambda: cv2.convertScaleAbs(
                _view(_photo("gravel.png", 900), _SMALL, 10, 300), alpha=0.12, beta=22
            ),
            kind="PNG",
        ),
    ),
    (
        Sample(
            "turned.jpg",
            "done",
            (_rejected("aspect_ratio<1"),),
            "stored 480x270, EXIF turns it to 270x480",
            media="image",
        ),
        _image(lambda: _view(_photo("clock_motion.png", 640), _SMALL, 80, 100), orientation=6),
    ),
    (
        Sample("half.png", "failed", (), "half of a PNG", media="image"),
        _half(_image(lambda: _view(_photo("page.png", 640), _SMALL, 80, 20), kind="PNG")),
    ),
    # Not videos that can be read, or not videos
    (
        Sample("truncated.mp4", "failed", (), "half of an mp4, its index is in the other half"),
        _half(_video(lambda: _pan("camera.png", 800, _SMALL, 48, (20, 200)))),
    ),
    (
        Sample("not_a_video.mp4", "failed", (), "a line of text under a video's name"),
        _text("This is text, whatever its name says.\n"),
    ),
    (
        Sample("same_as_coffee_pan.mp4", "duplicate", (), "coffee_pan.mp4 under another name"),
        _copy("coffee_pan.mp4"),
    ),
    (
        Sample("READ ME.md", "ignored", (), "a note about the folder"),
        _text("Samples whose truth is known; the labels are in pipelines/samples.py.\n"),
    ),
)

SAMPLES: tuple[Sample, ...] = tuple(sample for sample, _ in _CORPUS)
"""Every source of the corpus, and what else lies beside them, with its labels."""
