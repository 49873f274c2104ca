"""The baseline of RISE-T2V's table 6: the video model alone, fine-tuned on the same videos.

No adapter and no LLM: the model's own text encoder reads the rephrased texts, and a LoRA of the
same rank trains for the same number of steps.

Shapes: B samples, L text positions, D their width; latents as in `trainers.vdm`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainers.encoders import BaseText, Latents, dtype_of
from trainers.lora import add_lora, lora_state, save_lora
from trainers.system import (
    Card,
    Encoder,
    Learner,
    Noise,
    Sample,
    System,
    TrainStage,
    named,
    write_pipeline,
)
from trainers.vdm import PARTS, VDM, Backbone, Conditioning, check_buckets, drawn

LORA = "finetune"


@dataclass(frozen=True, kw_only=True)
class Finetune(System):
    """LoRA on a video diffusion model with its own text encoder; one stage, `motion`."""

    vdm: Backbone
    rank: int = 128
    text_dropout: float = 0.1
    """Share of samples that train the unconditional, which is the empty text."""

    def check(self, stage: TrainStage) -> None:
        """Raises ValueError where the model is missing or shapes do not meet."""
        if stage.name != "motion":
            raise ValueError(f"fine-tuning has the stage motion, and no {stage.name!r}")
        self.vdm.facts()
        check_buckets(self.vdm, stage.data.buckets)

    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        """The VAE and the model's own text encoder."""
        return (
            Latents(vdm=self.vdm, precision=stage.precision),
            BaseText(vdm=self.vdm, precision=stage.precision),
        )

    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, Tensor]],
    ) -> FinetuneLearner:
        """The system loaded for its stage."""
        vdm = self.vdm.load(video=True, device=device, dtype=dtype_of(stage.precision))
        add_lora(vdm.denoiser, self.rank, self.rank, vdm.lora_targets, LORA, seed=stage.seed)
        return FinetuneLearner(vdm, self.text_dropout)

    def export(
        self,
        results: Mapping[str, Mapping[str, Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        """Writes the LoRA, and what the pipeline is made of."""
        trained = {n.removeprefix("denoiser."): t for n, t in results["motion"].items()}
        part = PARTS[self.vdm.kind]
        save_lora(lora_state(trained, LORA), folder, alpha=self.rank, part=part)
        vdm = self.vdm.pinned()
        write_pipeline(folder, "finetune", replace(self, vdm=vdm), stages)
        return Card(
            title="Baseline: the video model fine-tuned",
            paper="the baseline of table 6 of RISE-T2V (arXiv 2511.04317)",
            models={
                "video model": named(vdm.base),
                **({"motion modules": named(vdm.motion)} if vdm.motion else {}),
            },
            files={
                "pytorch_lora_weights.safetensors": "LoRA, for diffusers' load_lora_weights",
                "pipeline.json": "base model and sizes",
            },
            usage=_USAGE,
        )

    @classmethod
    def from_portable(cls, about: Mapping[str, Any]) -> Finetune:
        """The system that an export names."""
        return cls(**dict(about) | {"vdm": Backbone.from_portable(about["vdm"])})


class FinetuneModule(nn.Module):
    """The denoiser and its loss."""

    def __init__(self, vdm: VDM):
        super().__init__()
        self.denoiser, self.vdm = vdm.denoiser, vdm

    def forward(self, text_BLD: Tensor, **latents: Tensor) -> Tensor:
        """Losses (B,): see `VDM.losses`, which takes `latents`."""
        return self.vdm.losses(text=Conditioning(text_BLD[:, None]), **latents)


class FinetuneLearner(Learner):
    """The baseline under training."""

    def __init__(self, vdm: VDM, text_dropout: float):
        self.module, self.blocks = FinetuneModule(vdm), vdm.blocks
        named_parameters = self.module.named_parameters()
        self.groups = {"lora": [n for n, p in named_parameters if p.requires_grad]}
        self.counts = Counter()
        self._null_LD, self._dropout = vdm.encode_text([""])[0], text_dropout

    def checkpoint_gradients(self) -> None:
        """From now on activations are computed again in backward."""
        self.module.denoiser.enable_gradient_checkpointing()

    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
        """Texts, latents, and what is drawn for them."""
        device = self._null_LD.device
        text_BLD = torch.stack([s.features["base_text"] for s in samples]).to(device)
        dropped_B = (noise.uniform("drop") < self._dropout).to(device)[:, None, None]
        moments_B2CTYX = torch.stack([s.features["latents"] for s in samples]).to(device)
        return {
            "text_BLD": torch.where(dropped_B, self._null_LD.to(text_BLD.dtype), text_BLD),
            "moments_B2CTYX": moments_B2CTYX,
            **drawn(noise, moments_B2CTYX),
        }


_USAGE = """\
from trainers.finetune_pipeline import FinetunedPipeline

pipe = FinetunedPipeline.from_export("{folder}")
made = pipe("a cute cat", frames=16, seed=0)
made.video, made.timings
"""
