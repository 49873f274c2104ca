"""SemanticGen: a video is planned in a small semantic space, and then filled in, in the VAE's.

Stages, by name (paper, figure 3):

    latents    a video model learns to denoise VAE latents with noisy semantic embeddings beside
               them in its sequence; the compressor learns with it
    semantics  another one learns to make the embeddings from text; the compressor is frozen

Embeddings are whitened before anything is done with them, in training as in generation. Long video
is the same with `window_s`: in `latents` tokens attend within shifted windows, in `semantics` to
everything.

Shapes: B samples, L text positions, D their width; latents as in `trainers.vdm`; semantic features
as in `trainers.compressor`; E width of the denoiser's tokens.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trainers.compressor import SemanticCompressor, drawn_from, kl_to_normal
from trainers.encoders import BaseText, Latents, count_cut, dtype_of, empty_text, stacked
from trainers.semantics import SemanticEncoder, Semantics
from trainers.system import (
    Bucket,
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
from trainers.tuning import Tuning, below, save_tuned, tune
from trainers.vdm import VDM, Backbone, Conditioning, Context, Variant, check_buckets, drawn
from trainers.windows import check_window

STAGES = ("latents", "semantics")
LORA = "semanticgen"
FIT = 1e-3
"""Weight of fitting the whitening, whose gradient must not count when gradients are clipped."""
PIXELS_AT_ONCE = 2**27
"""That a frozen encoder is given together at most, unless one video has more: 400 MB."""
TOKENS_OF_SHIFT = 4096
"""Numbers of an embedding whose flow needs no shift."""


@dataclass(frozen=True, kw_only=True)
class SemanticGen(System):
    """Two generators on one pretrained video model.

    Source: SemanticGen (arXiv 2512.20619), section 3.
    """

    vdm: Backbone
    encoder: SemanticEncoder
    channels: int | None = 8
    """K: of the compressed space (table 3 has 64 and 8); None compresses nothing."""
    window_s: float | None = None
    """T_w: length of an attention window over VAE latents, in s; None is full attention."""
    tuning: Tuning = "full"
    """Of the VAE-latent generator; the paper trains it whole. The semantic generator always is, for
    its first and last layers are new."""
    rank: int = 128
    """Of a LoRA."""
    scratch: bool = False
    """Both denoisers from random weights, as for figure 9."""
    kl_weight: float = 1e-4
    """Of the posterior's divergence from the standard normal, a number of K."""
    noise: float = 0.8
    """Embeddings beside the latents have noise of standard deviation U(0, this), in training; as
    RAE has it, which the paper follows without a number."""
    text_dropout: float = 0.1
    semantic_dropout: float = 0.1
    """Shares of samples that train the unconditional, of text and of embeddings."""

    def check(self, stage: TrainStage) -> None:
        """Raises ValueError where models are missing or shapes do not meet."""
        if stage.name not in STAGES:
            raise ValueError(f"SemanticGen has stages {' and '.join(STAGES)}, and no {stage.name}")
        facts = self.vdm.facts()
        self.encoder.check()
        width = self.encoder.facts().dim
        if self.channels is not None and not 0 < self.channels <= width:
            raise ValueError(
                f"{self.channels} channels of the compressed space: 1 to {width}, the width of the"
                " semantic encoder's features, are possible"
            )
        for bucket in stage.data.buckets:
            self.encoder.grid(bucket, stage.data.fps)
        if self.window_s is not None:
            each = self.encoder.facts().frames_per_token * self.encoder.every(stage.data.fps)
            check_window(
                self.window_s * stage.data.fps,
                {"a latent frame": facts.frames_per_latent, "a semantic frame": each},
            )
        check_buckets(self.vdm, stage.data.buckets, self.variant(stage.data.fps))

    def variant(self, fps: float) -> Variant:
        """Of the VAE-latent generator."""
        window = None if self.window_s is None else round(self.window_s * fps)
        return Variant(window=window, scratch=self.scratch, flow=True)

    def planner(self, bucket: Bucket, fps: float) -> Variant:
        """Of the semantic generator, whose flow is shifted by the size of what it makes.

        Source: RAE (arXiv 2510.11690), the dimension-dependent shift.
        """
        channels = self.embedding_channels()
        numbers = math.prod(self.encoder.grid(bucket, fps)) * channels
        shift = max(1.0, math.sqrt(numbers / TOKENS_OF_SHIFT))
        return Variant(channels=channels, scratch=self.scratch, flow=True, shift=shift)

    def tuning_of(self, stage_name: str) -> Tuning:
        """How a stage's denoiser is trained."""
        return "full" if stage_name == "semantics" else self.tuning

    def embedding_channels(self) -> int:
        """K of what the semantic generator makes."""
        return self.channels or self.encoder.facts().dim

    def compressor(self) -> SemanticCompressor:
        """With the weights it starts from."""
        return SemanticCompressor(self.encoder.facts().dim, self.channels)

    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        """The text encoder, the semantic encoder, and where latents are learnt the VAE."""
        at_once = max(1, min(8, PIXELS_AT_ONCE // max(b.pixels for b in stage.data.buckets)))
        text = BaseText(vdm=self.vdm, precision=stage.precision)
        semantics = Semantics(
            encoder=self.encoder,
            video_fps=stage.data.fps,
            precision=stage.precision,
            batch_size=at_once,
        )
        if stage.name == "semantics":
            return text, semantics
        latents = Latents(vdm=self.vdm, precision=stage.precision, batch_size=at_once)
        return latents, text, semantics

    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, Tensor]],
    ) -> SemanticLearner:
        """The system loaded for a stage."""
        planning = stage.name == "semantics"
        fps, largest = stage.data.fps, max(stage.data.buckets, key=lambda b: b.pixels)
        vdm = self.vdm.load(
            video=True,
            device=device,
            dtype=dtype_of(stage.precision),
            variant=self.planner(largest, fps) if planning else self.variant(fps),
        )
        tune(vdm, self.tuning_of(stage.name), rank=self.rank, name=LORA, seed=stage.seed)
        compressor = self.compressor().to(device)
        if planning:
            compressor.load_state_dict(below("compressor.", parents["latents"]))
            compressor.requires_grad_(False)
            return SemanticLearner(PlanModule(vdm, compressor), self)
        assert vdm.width is not None  # `check` has seen that the model takes a context
        beside = Beside(self.embedding_channels(), vdm.width).to(device)
        return SemanticLearner(FillModule(vdm, compressor, beside, self, fps), self)

    def export(
        self,
        results: Mapping[str, Mapping[str, Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        """Writes the compressor, both denoisers, and what the pipeline is made of."""
        latents = results["latents"]
        files = {
            "compressor.safetensors": "the MLP and the whitening of what it gives",
            "beside.safetensors": "embeddings as tokens of the VAE-latent generator",
            "pipeline.json": "base models and sizes",
        }
        save_file(below("compressor.", latents), folder / "compressor.safetensors")
        save_file(below("beside.", latents), folder / "beside.safetensors")
        pinned = replace(self, vdm=self.vdm.pinned(), encoder=self.encoder.pinned())
        for stage in stages:
            (folder / stage.name).mkdir()
            largest = max(stage.data.buckets, key=lambda b: b.pixels)
            fps = stage.data.fps
            planning = stage.name == "semantics"
            found = save_tuned(
                below("denoiser.", results[stage.name]),
                self.tuning_of(stage.name),
                folder / stage.name,
                pinned.vdm,
                self.planner(largest, fps) if planning else self.variant(fps),
                rank=self.rank,
                name=LORA,
                dtype=dtype_of(stage.precision),
            )
            files |= {f"{stage.name}/{name}": what for name, what in found.items()}
        write_pipeline(folder, "semanticgen", pinned, stages)
        return Card(
            title="SemanticGen",
            paper="SemanticGen: Video Generation in Semantic Space (arXiv 2512.20619)",
            models={
                "video model": named(pinned.vdm.base),
                "semantic encoder": named(pinned.encoder.weights),
            },
            files=files,
            usage=_USAGE,
            limits=(
                "What changes faster than the semantic encoder's frame rate is lost (paper, B.3).",
                "Textures and small objects may not stay the same in long video (paper, B.3).",
            ),
        )

    @classmethod
    def from_portable(cls, about: Mapping[str, Any]) -> SemanticGen:
        """The system that an export names."""
        vdm = Backbone.from_portable(about["vdm"])
        encoder = SemanticEncoder.from_portable(about["encoder"])
        return cls(**dict(about) | {"vdm": vdm, "encoder": encoder})


class Beside(nn.Module):
    """Whitened embeddings as tokens beside the video's, told apart by an embedding of their kind.

    Not zero at the start: a token of zeros is scaled to full size by the first layer's norm as soon
    as it is none any more.

    Args:
        channels: K.
        width: E.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.project = nn.Linear(channels, width)
        self.null_E = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, embeddings_BSVUK: Tensor, dropped_B: Tensor | None = None) -> Tensor:
        """Tokens (B, S, V, U, E); of a sample that is dropped the null token in each place."""
        tokens_BSVUE = self.project(embeddings_BSVUK)
        if dropped_B is None:
            return tokens_BSVUE
        null_E = self.null_E.to(tokens_BSVUE.dtype)
        return torch.where(dropped_B[:, None, None, None, None], null_E, tokens_BSVUE)


class FillModule(nn.Module):
    """The VAE-latent generator with its compressor, and their loss.

    Args:
        vdm: Its denoiser as it is trained.
        compressor: On the same device.
        beside: The same.
        system: For the weights of the loss.
        fps: Of the video.
    """

    def __init__(
        self,
        vdm: VDM,
        compressor: SemanticCompressor,
        beside: Beside,
        system: SemanticGen,
        fps: float,
    ):
        super().__init__()
        self.denoiser, self.compressor, self.beside = vdm.denoiser, compressor, beside
        self.vdm, self.system = vdm, system
        self._middles = functools.lru_cache(lambda num: system.encoder.middles(num, fps))

    def forward(
        self,
        text_BLD: Tensor,
        features_BSVUW: Tensor,
        drawn_BSVUK: Tensor,
        added_BSVUK: Tensor,
        sigma_B: Tensor,
        dropped_B: Tensor,
        **latents: Tensor,
    ) -> Tensor:
        """Losses (B,): of the flow (see `VDM.losses`), and the posterior's divergence."""
        mean, log_variance = self.compressor.moments(features_BSVUW)
        embeddings = drawn_from(mean, log_variance, drawn_BSVUK)
        whitening = self.compressor.whitening
        fit_B = whitening.unlikelihood(embeddings)
        noisy = whitened(whitening, embeddings) + sigma_B[:, None, None, None, None] * added_BSVUK
        tokens = self.beside(noisy, dropped_B)
        context = Context(tokens, self._middles(tokens.shape[1]))
        text = Conditioning(text_BLD[:, None], context=context)
        loss_B = self.vdm.losses(text=text, **latents)
        loss_B = loss_B + self.system.kl_weight * kl_to_normal(mean, log_variance)
        return loss_B + FIT * (fit_B - fit_B.detach())  # whose value says nothing of the model


class PlanModule(nn.Module):
    """The semantic generator behind the frozen compressor, and its loss.

    Args:
        vdm: Of the embeddings' space, its denoiser as it is trained.
        compressor: On the same device.
    """

    def __init__(self, vdm: VDM, compressor: SemanticCompressor):
        super().__init__()
        self.denoiser, self.compressor, self.vdm = vdm.denoiser, compressor, vdm

    def forward(
        self,
        text_BLD: Tensor,
        features_BSVUW: Tensor,
        drawn_BSVUK: Tensor,
        noise_BSVUK: Tensor,
        at_B: Tensor,
    ) -> Tensor:
        """Losses (B,): see `VDM.errors`."""
        embeddings = drawn_from(*self.compressor.moments(features_BSVUW), drawn_BSVUK)
        embeddings_BKSVU = self.compressor.whitening(embeddings).movedim(-1, 1)
        return self.vdm.errors(
            embeddings_BKSVU, noise_BSVUK.movedim(-1, 1), at_B, Conditioning(text_BLD[:, None])
        )


class SemanticLearner(Learner):
    """SemanticGen in one of its stages.

    Args:
        module: As the stage starts.
        system: That it is of.
    """

    def __init__(self, module: FillModule | PlanModule, system: SemanticGen):
        self.module, self.system, self.blocks = module, system, module.vdm.blocks
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        members = {
            group: [n for n in trained if group_of(n) == group]
            for group in ("denoiser", "semantic", "whitening")
        }
        self.groups = {group: names for group, names in members.items() if names}
        self.counts = Counter(texts_cut=0)
        self._null_LD = empty_text(module.vdm)

    def checkpoint_gradients(self) -> None:
        """From now on activations are computed again in backward."""
        self.module.vdm.denoiser.enable_gradient_checkpointing()

    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
        """Texts, features, latents, and what is drawn for them."""
        count_cut(self.module.vdm, samples, self.counts)
        device, system = self._null_LD.device, self.system
        text_BLD = stacked(samples, "base_text", device)
        features_BSVUW = stacked(samples, "semantics", device)
        shape = (*features_BSVUW.shape[1:4], system.embedding_channels())
        silent_B = (noise.uniform("drop") < system.text_dropout).to(device)[:, None, None]
        batch = {
            "text_BLD": torch.where(silent_B, self._null_LD.to(text_BLD.dtype), text_BLD),
            "features_BSVUW": features_BSVUW,
            "drawn_BSVUK": noise.normal("embedding", shape).to(device),
        }
        if isinstance(self.module, PlanModule):
            return batch | {
                "noise_BSVUK": noise.normal("noise", shape).to(device),
                "at_B": noise.uniform("at").to(device),
            }
        moments_B2CTYX = stacked(samples, "latents", device)
        return batch | {
            "added_BSVUK": noise.normal("added", shape).to(device),
            "sigma_B": (noise.uniform("sigma") * system.noise).to(device),
            "dropped_B": (noise.uniform("drop_semantics") < system.semantic_dropout).to(device),
            "moments_B2CTYX": moments_B2CTYX,
            **drawn(noise, moments_B2CTYX),
        }


def group_of(name: str) -> str:
    """The optimiser group of a parameter."""
    if name.startswith("compressor.whitening."):
        return "whitening"
    return "denoiser" if name.startswith("denoiser.") else "semantic"


def whitened(whitening: nn.Module, embeddings: Tensor) -> Tensor:
    """Embeddings through a whitening that learns nothing of what is done with them."""
    fixed = {n: p.detach() for n, p in whitening.named_parameters()}
    return torch.func.functional_call(whitening, fixed, embeddings)


_USAGE = """\
from trainers.semantic_pipeline import SemanticGenPipeline

pipe = SemanticGenPipeline.from_export("{folder}")
made = pipe("a cute cat", seconds=60, seed=0)
made.video, made.timings
again = pipe.reconstruct("clip.mp4")
"""
