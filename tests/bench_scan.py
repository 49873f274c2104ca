"""CPU time of the whole pass over a source against bare decoding, and each part's share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import av

import engine.assemble
import engine.scan
from engine.keyframes import Keyframes
from engine.picture import Shrinker
from engine.scan import Scan, scan_source
from engine.shots import FrameScorer

ROUNDS = 5

# What a function's time is counted as; none of them calls another.
_PARTS: tuple[tuple[str, Any, str], ...] = (
    ("luma", Shrinker, "luma"),
    ("shots", Shrinker, "colour"),
    ("shots", FrameScorer, "score"),
    ("shots", engine.scan.Boundaries, "push"),
    ("shots", engine.assemble, "cuts"),
    ("signals", engine.scan._Signals, "_measure"),
    ("keyframes", Keyframes, "push"),
    ("keyframes", Keyframes, "begin"),
    ("keyframes", engine.assemble, "_chosen"),
)


@dataclass(frozen=True)
class Row:
    """One file: seconds of process CPU time, one decoding thread, the best of some rounds."""

    name: str
    frames: int
    decode_s: float
    """Every frame decoded and dropped."""
    pass_s: float
    """Probe, shots, signals, keyframes and assembly."""
    shares: dict[str, float]
    """Of the pass; the rest is opening the file, and Python between the parts."""

    @property
    def ratio(self) -> float:
        """The pass over bare decoding."""
        return self.pass_s / self.decode_s


def measure(paths: Sequence[str | Path], scan: Scan | None = None) -> list[Row]:
    """Rows of the table, each file decoded and scanned by turns."""
    return [_measure(Path(path), scan or Scan()) for path in paths]


def _measure(path: Path, scan: Scan) -> Row:
    frames, decode_s, pass_s = 0, float("inf"), float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        frames = _decode_and_drop(path)
        middle = time.process_time()
        scan_source(path, scan)
        decode_s = min(decode_s, middle - start)
        pass_s = min(pass_s, time.process_time() - middle)
    return Row(path.name, frames, decode_s, pass_s, _shares(path, scan))


def _decode_and_drop(path: Path) -> int:
    with av.open(f"file:{path}") as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        return sum(1 for packet in container.demux(stream) for _ in packet.decode())


def _shares(path: Path, scan: Scan) -> dict[str, float]:
    spent = dict.fromkeys(("decode", "luma", "shots", "signals", "keyframes"), 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.process_time() - start

        return call

    def decode(*args: Any, **kwargs: Any) -> Iterator[Any]:
        frames = original(*args, **kwargs)
        step = timed("decode", lambda: next(frames, None))
        while (frame := step()) is not None:
            yield frame

    original = engine.scan.decode
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(engine.scan, "decode", decode))
        for part, owner, name in _PARTS:
            replacement = timed(part, getattr(owner, name))
            stack.enter_context(_replaced(owner, name, replacement))
        start = time.process_time()
        scan_source(path, scan)
        total = time.process_time() - start
    spent["rest"] = total - sum(spent.values())
    return {part: seconds / total for part, seconds in spent.items()}


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


if __name__ == "__main__":
    for row in measure(sys.argv[1:]):
        parts = ", ".join(f"{part} {share:.0%}" for part, share in row.shares.items())
        print(f"{row.name}: {row.ratio:.2f} ({row.pass_s:.3f} / {row.decode_s:.3f} s); {parts}")
