"""The papers' baselines: the video model alone, trained on with the same videos and steps.

No module of theirs: the model's own text encoder reads the texts. RISE-T2V's table 6 trains a LoRA
of its rank; SemanticGen's Base-CT the whole model, and Base-Swin-CT the same within windows.

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

from trainers.encoders import BaseText, Latents, count_cut, dtype_of, empty_text, stacked
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
from trainers.tuning import Tuning, save_tuned, tune
from trainers.vdm import VDM, Backbone, Conditioning, Variant, check_buckets, drawn
from trainers.windows import check_window

LORA = "finetune"


@dataclass(frozen=True, kw_only=True)
class Finetune(System):
    """A video diffusion model with its own text encoder, trained on; one stage."""

    vdm: Backbone
    tuning: Tuning = "lora"
    rank: int = 128
    """Of a LoRA."""
    window_s: float | None = None
    """Length of an attention window, in s; None is full attention."""
    flow: bool = False
    """Rectified flow in place of the model's own schedule."""
    text_dropout: float = 0.1
    """Share of samples that train the unconditional, which is the empty text."""

    def check(self, stage: TrainStage) -> None:
        """Raises ValueError where the model is missing or shapes do not meet."""
        facts = self.vdm.facts()
        if self.window_s is not None:
            units = {"a latent frame": facts.frames_per_latent}
            check_window(self.window_s * stage.data.fps, units)
        check_buckets(self.vdm, stage.data.buckets, self.variant(stage.data.fps))

    def variant(self, fps: float) -> Variant:
        """Of the denoiser."""
        window = None if self.window_s is None else round(self.window_s * fps)
        return Variant(window=window, flow=self.flow)

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
        vdm = self.vdm.load(
            video=True,
            device=device,
            dtype=dtype_of(stage.precision),
            variant=self.variant(stage.data.fps),
        )
        tune(vdm, self.tuning, rank=self.rank, name=LORA, seed=stage.seed)
        return FinetuneLearner(vdm, self.tuning, self.text_dropout)

    def export(
        self,
        results: Mapping[str, Mapping[str, Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        """Writes what was trained, and what the pipeline is made of."""
        (stage,) = stages
        vdm = self.vdm.pinned()
        files = save_tuned(
            {n.removeprefix("denoiser."): t for n, t in results[stage.name].items()},
            self.tuning,
            folder,
            vdm,
            self.variant(stage.data.fps),
            rank=self.rank,
            name=LORA,
            dtype=dtype_of(stage.precision),
        )
        write_pipeline(folder, "finetune", replace(self, vdm=vdm), stages)
        return Card(
            title="Baseline: the video model trained on",
            paper="the baselines of RISE-T2V (arXiv 2511.04317, table 6) and SemanticGen"
            " (arXiv 2512.20619, tables 1 and 2)",
            models={
                "video model": named(vdm.base),
                **({"motion modules": named(vdm.motion)} if vdm.motion else {}),
            },
            files={**files, "pipeline.json": "base model and sizes"},
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

    def __init__(self, vdm: VDM, tuning: Tuning, text_dropout: float):
        self.module, self.blocks = FinetuneModule(vdm), vdm.blocks
        named_parameters = self.module.named_parameters()
        group = "lora" if tuning == "lora" else "denoiser"
        self.groups = {group: [n for n, p in named_parameters if p.requires_grad]}
        self.counts = Counter(texts_cut=0)
        self._null_LD, self._dropout = empty_text(vdm), text_dropout

    def checkpoint_gradients(self) -> None:
        """From now on activations are computed again in backward."""
        self.module.denoiser.enable_gradient_checkpointing()

    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
        """Texts, latents, and what is drawn for them."""
        count_cut(self.module.vdm, samples, self.counts)
        device = self._null_LD.device
        text_BLD = stacked(samples, "base_text", device)
        dropped_B = (noise.uniform("drop") < self._dropout).to(device)[:, None, None]
        moments_B2CTYX = stacked(samples, "latents", device)
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
