"""Frozen encoders that more than one system trains behind.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X their lines and
columns; L text positions, D width.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine.operator import resource
from trainers.system import Encoder, Sample
from trainers.vdm import VDM, Backbone

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
Precision = Literal["bf16", "fp32"]


def dtype_of(precision: Precision) -> torch.dtype:
    """Of frozen weights."""
    import torch

    return torch.bfloat16 if precision == "bf16" else torch.float32


def stacked(samples: Sequence[Sample], kind: str, device: torch.device) -> torch.Tensor:
    """A feature of samples as one tensor on a device, wherever each was computed or read."""
    import torch

    return torch.stack([s.features[kind].to(device) for s in samples])


def count_cut(vdm: VDM, samples: Sequence[Sample], counts: Counter[str]) -> None:
    """Counts the samples whose text the model's own text encoder does not read to its end."""
    found = sum(num > 0 for num in vdm.text_cut([s.row["rephrased"] for s in samples]))
    if found and not counts["texts_cut"]:
        read = vdm.text_len
        _log.warning("%d of %d texts are longer than %d tokens: cut", found, len(samples), read)
    counts["texts_cut"] += found


def empty_text(vdm: VDM) -> torch.Tensor:
    """What the model's own text encoder makes of an empty text, (L, D); the encoder is let go."""
    null_LD = vdm.encode_text([""])[0]
    vars(vdm).pop("text_encoder", None)  # several GiB, and nothing else is asked of it
    return null_LD


@dataclass(frozen=True, kw_only=True)
class Latents(Encoder):
    """Mean and standard deviation of a VAE's latents, float32 (2, C, T, Y, X).

    Scaled for the denoiser; training draws from them anew in every epoch.
    """

    kind = "latents"
    needs = ("pixels",)
    of = "clip"
    libraries = ("torch", "diffusers")

    vdm: Backbone
    precision: Precision = "bf16"
    num_gpus: float = resource(1.0)

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        """The function that encodes samples of one bucket."""
        import torch

        vdm = self.vdm.load(video=False, device=device, dtype=dtype_of(self.precision))

        @torch.no_grad()
        def encode(samples: Sequence[Sample]) -> list[torch.Tensor]:
            pixels_BFHW3 = torch.stack([s.features["pixels"] for s in samples])
            return list(vdm.encode(pixels_BFHW3.to(device)).unbind())

        return encode


@dataclass(frozen=True, kw_only=True)
class BaseText(Encoder):
    """What the video model's own text encoder makes of the rephrased text, (L, D)."""

    kind = "base_text"
    needs = ()
    of = "pair"
    libraries = ("torch", "transformers", "diffusers")

    vdm: Backbone
    precision: Precision = "bf16"
    num_gpus: float = resource(1.0)

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[torch.Tensor]]:
        """The function that encodes texts."""
        import torch

        vdm = self.vdm.load(video=False, device=device, dtype=dtype_of(self.precision))

        @torch.no_grad()
        def encode(samples: Sequence[Sample]) -> list[torch.Tensor]:
            return list(vdm.encode_text([s.row["rephrased"] for s in samples]).unbind())

        return encode
