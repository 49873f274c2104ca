"""Videos for a blind comparison: they play in every browser, and carry no words of their makers.

A file's titles, comments and names of encoders go, and what encoders write into the stream itself
(x264 puts all its settings there). What a model's videos are stays: length, frame rate, size in
pixels and in bytes may tell a voter who looks for it which videos have one maker.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import av.error
from av.bitstream import BitStreamFilterContext

from engine.blobs import take_blobs
from engine.cut import cut_clip
from engine.encode import BITEXACT, NO_EDITS
from engine.integrity import VideoError
from engine.tables import DatasetError, read
from engine.video import decode, open_video
from evals.videofiles import NEAR_LOSSLESS

_NO_WORDS = "filter_units=remove_types=6"
"""Supplemental information of H.264: nothing that a picture depends on."""
_PLAIN = ("yuv420p", "yuvj420p")


@dataclass(frozen=True)
class Blinded:
    """A video without words."""

    mp4: bytes
    aspect_ratio: float
    """Width / height as coded."""


def stored(root: str) -> set[str]:
    """generation_ids of what can be shown."""
    rows = read(root, "generations").to_table(
        columns=["generation_id"], filter="error_type IS NULL AND size_bytes > 0"
    )
    return set(rows["generation_id"].to_pylist())


def fetch(root: str, generation_ids: Sequence[str]) -> list[bytes]:
    """Stored videos, in the order of their ids.

    Raises:
        DatasetError: One is not there any more.
    """
    table = read(root, "generations")
    asked = ", ".join(f"'{one}'" for one in generation_ids)
    rows = table.to_table(
        columns=["generation_id"], filter=f"generation_id IN ({asked})", with_row_id=True
    )
    row_ids = dict(zip(rows["generation_id"].to_pylist(), rows["_rowid"].to_pylist(), strict=True))
    if gone := [one for one in generation_ids if one not in row_ids]:
        raise DatasetError(f"{root} has no video {gone[0]} any more: the study was made with it")
    blobs = take_blobs(table, "mp4", ids=[row_ids[one] for one in generation_ids])
    if None in blobs:
        raise DatasetError(f"{root} has no video {generation_ids[blobs.index(None)]} any more")
    return [blob.read() for blob in blobs]


def blinded(video: bytes) -> Blinded:
    """An MP4 with the same pictures and nothing else; of H.264, so that every browser plays it.

    What is H.264 stays as it is, packet by packet; anything else is encoded almost without loss.

    Raises:
        VideoError: It cannot be decoded.
    """
    with tempfile.TemporaryDirectory(prefix="reelwright-") as folder:
        path, made = os.path.join(folder, "given"), os.path.join(folder, "made.mp4")
        Path(path).write_bytes(video)
        try:
            _without_words(path if _plays(path) else _encoded(path, folder), made)
        except av.error.FFmpegError:  # packets that the filter cannot read, and decoders can
            _without_words(_encoded(path, folder), made)
        with av.open(made) as target:
            stream = target.streams.video[0]
            ratio = stream.width / stream.height
        return Blinded(mp4=Path(made).read_bytes(), aspect_ratio=ratio)


def _plays(path: str) -> bool:
    """Whether every browser plays it as it is coded."""
    with av.open(path) as source:
        for stream in source.streams.video[:1]:
            if context := stream.codec_context:  # else there is no decoder of it
                return context.codec.canonical_name == "h264" and context.pix_fmt in _PLAIN
    return False


def _without_words(path: str, made: str) -> None:
    options = BITEXACT | NO_EDITS
    with av.open(path) as source, av.open(made, "w", format="mp4", options=options) as target:
        given = source.streams.video[0]
        stream: Any = target.add_stream_from_template(given, opaque=True)
        stream.metadata.clear()
        silenced = BitStreamFilterContext(_NO_WORDS, in_stream=given, out_stream=stream)
        packets = [
            one
            for packet in source.demux(given)
            # the last one is empty: it asks for what the filter holds back
            for one in silenced.filter(packet if packet.size else None)
        ]
        # files without edit lists show frames before they decode them, which no muxer takes
        early = max((p.dts - p.pts for p in packets if None not in (p.dts, p.pts)), default=0)
        for packet in packets:
            if packet.dts is not None:
                packet.dts -= max(early, 0)
            packet.stream = stream
            target.mux_one(packet)


def _encoded(path: str, folder: str) -> str:
    with open_video(path) as opened:
        times = [frame.time_s for frame in decode(opened)]
    if not times:
        raise VideoError("it has no frame")
    a_frame = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
    cut = cut_clip(
        path,
        os.path.join(folder, "encoded"),
        start_s=times[0],
        end_s=times[-1] + a_frame,
        start_frame=0,
        num_frames=len(times),
        mode="encode",
        encoding=NEAR_LOSSLESS,
    )
    return cut.path
