"""Small datasets with a known truth for training, and frozen encoders whose output is known."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
from clips import encode

from engine import storage
from engine.operator import resource
from engine.schema import CLIPS, PAIRS, SOURCES
from engine.tables import Writer, create
from engine.worker import clip_id, source_id
from trainers.system import Bucket, Data, Encoder, Sample

if TYPE_CHECKING:
    import torch

STEP = 4
"""Levels of grey between one frame of a numbered video and the next."""

DATA = Data(
    buckets=(
        Bucket(frames=1, height_px=16, width_px=16),
        Bucket(frames=9, height_px=16, width_px=24),
    ),
    instructions=("dense", "multi_scene"),
)
PICTURES = replace(DATA, buckets=DATA.buckets[:1], variants=3)


def numbered(path: Path, frames: int, fps: int = 8, size: tuple[int, int] = (32, 48)) -> Path:
    """A video without loss whose frame i has the grey level STEP * i; a key frame every 10."""
    images = (np.full(size, STEP * i, np.uint8) for i in range(frames))
    options = {"qp": "0", "g": "10", "bf": "2", "x264-params": "scenecut=0"}
    return encode(path, images, fps=fps, full_range=True, options=options)


def numbers(pixels_FHWC: np.ndarray) -> list[int]:
    """The frames of a numbered video, by what they show."""
    levels = pixels_FHWC.reshape(len(pixels_FHWC), -1)
    assert (levels.max(1) - levels.min(1)).max() <= 2, "one level of grey in each frame"
    return [round(float(level)) for level in levels.mean(1) / STEP]


def picture(path: Path, level: int, size: tuple[int, int] = (40, 40)) -> Path:
    """A picture of one grey level."""
    assert cv2.imwrite(str(path), np.full((*size, 3), level, np.uint8))
    return path


@dataclass(frozen=True, kw_only=True)
class Item:
    """A clip of a dataset in the making."""

    file: Path
    start_s: float = 0.0
    end_s: float = 0.0
    fps: float | None = 8.0
    size: tuple[int, int] = (32, 48)
    kept: bool = True
    pair_kept: bool = True
    missing: bool = False
    original: str | None = "a grey wall"
    rephrased: str | None = "A wall in one shade of grey."
    instructions: tuple[str, ...] = ("dense",)
    instruction_text: str = "rewrite {y_ori}"
    caption: str | None = "A caption of the clip."


def make_set(root: Path, items: Sequence[Item], *, run_id: str = "made") -> str:
    """A dataset of these clips, as curation and recaptioning would leave it."""
    create(str(root), "classic")
    writer = Writer(str(root), run_id)
    hashes = {i.file: storage.sha256(str(i.file)) if i.file.exists() else "gone" for i in items}
    clips = [_clip(item, hashes[item.file]) for item in items]
    gone = {i.file for i in items if i.missing}
    sources = [
        {
            "source_id": source_id(str(file)),
            "uri": str(file),
            "media": "image" if file.suffix == ".png" else "video",
            "state": "done",
            "missing": file in gone,
            "sha256": sha256,
        }
        for file, sha256 in hashes.items()
    ]
    pairs = [
        _pair(item, clip, instruction)
        for item, clip in zip(items, clips, strict=True)
        for instruction in item.instructions
    ]
    writer.commit(
        sources=pa.Table.from_pylist(sources, schema=SOURCES),
        clips=pa.Table.from_pylist(clips, schema=CLIPS),
    )
    writer.append("pairs", pa.Table.from_pylist(pairs, schema=PAIRS))
    return str(root)


def _clip(item: Item, sha256: str) -> dict[str, Any]:
    is_image = item.file.suffix == ".png"
    duration_s = item.end_s - item.start_s
    height, width = item.size
    return {
        "clip_id": clip_id(sha256, item.start_s, item.end_s),
        "source_id": source_id(str(item.file)),
        "source_uri": str(item.file),
        "media": "image" if is_image else "video",
        "start_s": None if is_image else item.start_s,
        "end_s": None if is_image else item.end_s,
        "num_frames": None if is_image else round(duration_s * (item.fps or 0)),
        "fps": None if is_image else item.fps,
        "width_px": width,
        "height_px": height,
        "duration_s": None if is_image else duration_s,
        "caption": item.caption,
        "caption_original": item.original,
        "kept": item.kept,
        "state": "kept" if item.kept else "rejected",
    }


def _pair(item: Item, clip: dict[str, Any], instruction: str) -> dict[str, Any]:
    names = ("clip_id", "source_id", "source_uri", "media", "start_s", "end_s")
    return {name: clip[name] for name in names} | {
        "pair_id": str(uuid.uuid5(uuid.NAMESPACE_OID, clip["clip_id"] + instruction)),
        "instruction": instruction,
        "instruction_text": f"{instruction}: {item.instruction_text}",
        "original": item.original,
        "rephrased": item.rephrased,
        "kept": item.pair_kept,
        "state": "kept" if item.pair_kept else "rejected",
    }


# Frozen encoders


def _note(log: str, what: str) -> None:
    with open(log, "a") as file:
        file.write(what + "\n")


@dataclass(frozen=True, kw_only=True)
class Projected(Encoder):
    """A random linear map of the pixels, to (2, F): depends on their every bit."""

    kind = "latents"
    needs = ("pixels",)
    of = "clip"

    seed: int = 0
    log: str = resource(None)  # type: ignore[assignment] - a file that notes what was encoded
    delay_s: float = resource(0.0)
    batch_size: int = resource(4)

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        import time

        import torch

        def encode(samples: Sequence[Sample]) -> list[torch.Tensor]:
            if self.log:
                for s in samples:
                    _note(self.log, f"{s.row['clip_id']} {s.variant} {os.getpid()}")
            time.sleep(self.delay_s * len(samples))
            pixels_BFHW3 = torch.stack([s.features["pixels"] for s in samples]).to(device)
            flat_BFN = pixels_BFHW3.float().flatten(2) / 255
            generator = torch.Generator().manual_seed(self.seed)
            map_N2 = torch.randn(flat_BFN.shape[2], 2, generator=generator)
            return list((flat_BFN @ map_N2).transpose(1, 2).contiguous().unbind())

        return encode


@dataclass(frozen=True, kw_only=True)
class Letters(Encoder):
    """The rephrased text's characters as numbers; a text with a `#` is refused."""

    kind = "tokens"
    needs = ()
    of = "pair"

    shift: int = 0
    log: str = resource(None)  # type: ignore[assignment] - as above

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        import torch

        def encode(samples: Sequence[Sample]) -> list[torch.Tensor]:
            texts = [s.row["rephrased"] for s in samples]
            if any("#" in text for text in texts):
                raise ValueError("a number sign is no letter")
            if self.log:
                for s in samples:
                    _note(self.log, s.row["sample_id"])
            return [torch.tensor([ord(c) + self.shift for c in t]).int() for t in texts]

        return encode


@dataclass(frozen=True, kw_only=True)
class States(Encoder):
    """A bfloat16 row for each letter."""

    kind = "states"
    needs = ("tokens",)
    of = "pair"

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        import torch

        def encode(samples: Sequence[Sample]) -> list[torch.Tensor]:
            table_VD = torch.randn(256, 3, generator=torch.Generator().manual_seed(1))
            return [table_VD[s.features["tokens"].long()].bfloat16() for s in samples]

        return encode
