"""The poison corpus: files that break naive readers, each with the state its source must end in.

Loaded by path, for `tests/` is no package:
`importlib.util.spec_from_file_location("poison", Path(__file__).with_name("poison.py"))`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

FAILED = "failed"
DONE = "done"
EITHER = "done|failed"
"""The file is valid, or its damage cannot be seen: whether it fits the limits is the engine's."""

ENDLESS_FRAMES = 100_000
BOMB_SIDE_PX = 16_000
"""FFmpeg takes frames up to about 16,100 px square."""
BOMB_FRAMES = 72
"""Enough to pass `num_frames<65` and `duration_s<1`, so that only decoding can refuse it."""
BOMB_FRAME_BYTES = BOMB_SIDE_PX**2 * 3 // 2
"""384 MB a decoded frame; a decoder holds three: 1.2 GB resident at least."""
TRUNCATED_FRAMES = 96


def make_poison(folder: Path) -> dict[str, str]:
    """Writes what is missing of the corpus into `folder`: about 4 CPU s and 1.4 GB of memory.

    Returns:
        For each name below `folder` the states that its source may end in, joined by `|`, and after
        a colon and a space what its error must contain, in lower case, where that is certain.
    """
    folder.mkdir(parents=True, exist_ok=True)
    expected: dict[str, str] = {}

    def add(name: str, expect: str, make: Callable[[Path], object]) -> None:
        expected[name] = expect
        path = folder / name
        if not os.path.lexists(path):
            partial = folder / f".{name}.partial"
            make(partial)
            os.replace(partial, path)

    for name, flags in (("index_last", ""), ("index_first", "faststart")):
        whole = f"whole_{name}.mp4"
        add(whole, DONE, lambda path, flags=flags: _pan(path, flags=flags))
        for tenth in range(1, 10):
            add(
                f"{name}_{tenth}_tenths.mp4",
                FAILED,
                lambda path, whole=whole, tenth=tenth: _head(folder / whole, path, tenth / 10),
            )
    indexed = folder / "whole_index_first.mp4"
    add("cut_between_frames.mp4", EITHER, lambda p: _head_of_frames(indexed, p))
    add("half.mkv", EITHER, _half_matroska)
    add("random.mp4", FAILED, lambda p: p.write_bytes(np.random.default_rng(7).bytes(65536)))
    add("empty.mp4", FAILED, lambda p: p.touch())
    add("x.mp4", f"{FAILED}: folder", lambda p: p.mkdir())
    add("text.mp4", FAILED, lambda p: p.write_text("This is text, whatever its name says.\n"))
    add("audio.mp4", f"{FAILED}: no video", _audio)
    add("one_pixel.mp4", EITHER, _one_pixel)
    add("endless.mp4", EITHER, _endless)
    add("bomb.mp4", EITHER, _bomb)
    root = os.geteuid() == 0  # whom no permission stops
    add("unreadable.mp4", DONE if root else f"{FAILED}: permission denied", _unreadable)
    return expected


def states(expect: str) -> set[str]:
    """The states that a value of `make_poison` allows."""
    return set(expect.partition(": ")[0].split("|"))


def fragment(expect: str) -> str:
    """What the error must contain, in lower case; empty where that is open."""
    return expect.partition(": ")[2]


def _ground(seed: int) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).integers(0, 256, (240, 640, 3), np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)


def _encode(file: av.container.OutputContainer, frames: Iterable[av.VideoFrame]) -> None:
    """H.264 at 24 frames/s, one thread, a key frame a second."""
    stream = None
    for i, frame in enumerate(frames):
        if stream is None:
            stream = file.add_stream("libx264", rate=24, options={"preset": "veryfast"})
            stream.width, stream.height = frame.width, frame.height
            stream.pix_fmt = frame.format.name
            stream.codec_context.thread_count = 1
            stream.codec_context.gop_size = 24
        frame.pts, frame.time_base = i, Fraction(1, 24)
        file.mux(stream.encode(frame))
    assert stream is not None
    file.mux(stream.encode())


def _panned(seed: int) -> Iterator[av.VideoFrame]:
    ground = _ground(seed)
    for x in range(0, 3 * TRUNCATED_FRAMES, 3):
        planes = cv2.cvtColor(ground[30:210, x : x + 320], cv2.COLOR_BGR2YUV_I420)
        yield av.VideoFrame.from_ndarray(planes, format="yuv420p")


def _pan(path: Path, *, flags: str = "", container: str = "mp4", seed: int = 0) -> None:
    options = {"movflags": flags} if flags else {}
    with av.open(str(path), "w", format=container, options=options) as file:
        _encode(file, _panned(seed))


def _head(source: Path, path: Path, share: float) -> None:
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def _head_of_frames(source: Path, path: Path) -> None:
    """Cut exactly after a frame: no decoder complains, only the index tells that more was meant."""
    with av.open(str(source)) as file:
        ends = sorted(entry.pos + entry.size for entry in file.streams.video[0].index_entries)
    path.write_bytes(source.read_bytes()[: ends[TRUNCATED_FRAMES * 3 // 4]])


def _half_matroska(path: Path) -> None:
    """Half of a Matroska file, which ends without an error: its header counts no frames."""
    _pan(path, container="matroska", seed=1)
    os.truncate(path, path.stat().st_size // 2)


def _audio(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16000, layout="mono")
        tone = np.sin(np.arange(16000) * 2 * np.pi * 440 / 16000).astype(np.float32)
        for start in range(0, len(tone), 1024):
            frame = av.AudioFrame.from_ndarray(
                tone[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _one_pixel(path: Path) -> None:
    levels = np.linspace(60, 200, TRUNCATED_FRAMES).astype(np.uint8)
    grey = (np.array([[[level]], [[128]], [[128]]], np.uint8) for level in levels)
    with av.open(str(path), "w", format="mp4") as file:
        _encode(file, (av.VideoFrame.from_ndarray(g, format="yuv444p") for g in grey))


def _unreadable(path: Path) -> None:
    _pan(path, seed=2)
    path.chmod(0)


def _black(
    path: Path, codec: str, size: tuple[int, int], *, encoded: int, total: int, again: int
) -> None:
    """`total` black frames at 25 frames/s, of which only the first `encoded` are encoded.

    The packets from number `again` on follow each other over and over: a whole group of pictures,
    or one picture that says "as before". The file is as valid as one that took an hour to encode.
    """
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.max_b_frames = 0
        stream.codec_context.gop_size = encoded
        frame = av.VideoFrame(*size, "yuv420p")
        for plane, level in zip(frame.planes, (16, 128, 128), strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        packets = []
        for frame.pts in range(encoded):
            packets += stream.encode(frame)
        coded = [(bytes(p), p.is_keyframe) for p in packets + stream.encode()]
        assert len(coded) == encoded
        for i in range(total):
            at = i if i < encoded else again + (i - encoded) % (encoded - again)
            packet = av.Packet(coded[at][0])
            packet.is_keyframe = coded[at][1]
            packet.pts = packet.dts = i
            packet.time_base, packet.stream = Fraction(1, 25), stream
            file.mux(packet)


def _endless(path: Path) -> None:
    _black(path, "libx264", (320, 180), encoded=1000, total=ENDLESS_FRAMES, again=0)


def _bomb(path: Path) -> None:
    side = BOMB_SIDE_PX, BOMB_SIDE_PX
    _black(path, "mpeg2video", side, encoded=2, total=BOMB_FRAMES, again=1)
