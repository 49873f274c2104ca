"""Frozen semantic encoders of video, sampled at a frame rate of their own.

A semantic frame stands for a whole number of the video's frames after the first, which counts to
the first of them; what is sampled lies in the middle of what it stands for.

Shapes: B samples, F frames, H W pixels; S semantic frames, V U their lines and columns, D width.

Source: SemanticGen (arXiv 2512.20619), sections 3.2 and 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from engine.operator import resource
from engine.weights import Weights
from trainers.encoders import Precision, dtype_of
from trainers.system import Bucket, Encoder, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainers.semantic_towers import SemanticTower

Kind = Literal["qwen2_5_vl", "vjepa2", "vae"]


@dataclass(frozen=True, kw_only=True)
class SemanticFacts:
    """What is known of an encoder before it is loaded."""

    dim: int
    """D."""
    frames_per_token: int
    """Sampled frames in a semantic frame."""
    pixels_per_token: int
    """Side of what a token stands for, in the video's own pixels."""
    chunk: int | None
    """Sampled frames that see each other; None: only those of one semantic frame do, so that a
    video may be encoded in parts of any length."""


@dataclass(frozen=True, kw_only=True)
class SemanticEncoder:
    """Which semantic encoder, and how a video is sampled for it."""

    kind: Kind
    """The vision tower of a Qwen2.5-VL; the encoder of a V-JEPA 2; or, in place of semantics, the
    VAE of a video model, picture by picture."""
    weights: Weights
    """Of the whole model in its own layout: only the part that encodes is loaded."""
    fps: float = 1.6
    """Frames taken from a second of video."""
    chunk: int | None = None
    """Sampled frames encoded at once, where the encoder attends over time (V-JEPA 2); None is as
    many as it was trained on."""
    known: SemanticFacts | None = None
    """What its files say, where they need not be there: text becomes video without them."""

    def check(self) -> None:
        """Raises ValueError, one line, where it is no such encoder; loads no weights."""
        from trainers import semantic_towers

        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"semantic frames need a rate above 0, not {self.fps:g} a second")
        semantic_towers.check(self)

    def facts(self) -> SemanticFacts:
        """What its configuration files say.

        Raises:
            ValueError: It is no such encoder, or not there: what was needed, found, to do.
        """
        from trainers import semantic_towers

        return self.known or semantic_towers.facts(self)

    def every(self, video_fps: float) -> int:
        """The video's frames from one that is sampled to the next.

        Raises:
            ValueError: They are no whole number.
        """
        ratio = video_fps / self.fps if self.fps > 0 else 0.0
        number = max(1, round(ratio)) if math.isfinite(ratio) else 1
        if abs(ratio - number) > 1e-6 * number:
            raise ValueError(
                f"a video of {video_fps:g} fps has no whole number of frames from one semantic"
                f" sample to the next at {self.fps:g} a second: the nearest rates are"
                f" {number * self.fps:g} fps of video or {video_fps / number:g} samples a second"
            )
        return number

    def grid(self, bucket: Bucket, video_fps: float) -> tuple[int, int, int]:
        """(S, V, U) of a video.

        Raises:
            ValueError: It does not hold whole semantic frames; names the nearest length.
        """
        facts = self.facts()
        each = self.every(video_fps) * facts.frames_per_token
        if bucket.frames <= each or (bucket.frames - 1) % each:
            nearest = 1 + max(1, round((bucket.frames - 1) / each)) * each
            raise ValueError(
                f"{bucket.frames} frames at {video_fps:g} fps are not 1 and whole semantic frames"
                f" of {each} each ({facts.frames_per_token} samples at {self.fps:g} a second): take"
                f" {1 + each}, {1 + 2 * each}, …; the nearest is {nearest}"
            )
        lines, columns = size_of(facts, bucket.height_px, bucket.width_px)
        return (bucket.frames - 1) // each, lines, columns

    def middles(self, num: int, video_fps: float) -> tuple[float, ...]:
        """Of each of so many semantic frames the time in its middle, in frames after the first."""
        each = self.every(video_fps) * self.facts().frames_per_token
        return tuple(each * index + (each + 1) / 2 for index in range(num))

    def sampled(self, pixels_BFHW3: Tensor, video_fps: float) -> Tensor:
        """Of a video's frames those that are encoded."""
        every = self.every(video_fps)
        return pixels_BFHW3[:, 1 + every // 2 :: every]

    def load(self, device: torch.device, dtype: torch.dtype) -> SemanticTower:
        """The encoder, frozen, on a device."""
        from trainers import semantic_towers

        return semantic_towers.load(self, device, dtype)

    def pinned(self) -> SemanticEncoder:
        """The same by the commit of what is on this machine, with what its files say."""
        return replace(self, weights=self.weights.pinned(), known=self.facts())

    @classmethod
    def from_portable(cls, about: Mapping[str, Any]) -> SemanticEncoder:
        """The encoder that an export names: `dataclasses.asdict` of one."""
        known = SemanticFacts(**about["known"]) if about["known"] else None
        return cls(**(dict(about) | {"weights": Weights(**about["weights"]), "known": known}))

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values."""
        about = {"kind": self.kind, "fps": float(self.fps), "chunk": self.facts().chunk}
        return about | self.weights.describe()


def size_of(facts: SemanticFacts, height_px: int, width_px: int) -> tuple[int, int]:
    """Lines and columns of tokens nearest to a frame's size."""
    lines, columns = (max(1, round(px / facts.pixels_per_token)) for px in (height_px, width_px))
    return lines, columns


@dataclass(frozen=True, kw_only=True)
class Semantics(Encoder):
    """What a semantic encoder makes of a video, (S, V, U, D)."""

    kind = "semantics"
    needs = ("pixels",)
    of = "clip"
    libraries = ("torch", "transformers", "diffusers")

    encoder: SemanticEncoder
    video_fps: float
    """Of the frames that it is given."""
    precision: Precision = "bf16"
    """Of weights and features."""
    num_gpus: float = resource(1.0)

    def check(self) -> None:
        """The encoder is there and fits the video's rate."""
        self.encoder.check()
        self.encoder.every(self.video_fps)

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """Loads the encoder."""
        import torch

        tower = self.encoder.load(device, dtype_of(self.precision))

        def encode(samples: Sequence[Sample]) -> list[Tensor]:
            self.encoder.grid(samples[0].bucket, self.video_fps)
            pixels_BFHW3 = torch.stack([s.features["pixels"] for s in samples])
            sampled_BFHW3 = self.encoder.sampled(pixels_BFHW3, self.video_fps)
            return list(tower.encode(sampled_BFHW3).unbind())

        return encode
