"""RISE-T2V: a video model that follows what an LLM thinks while it rephrases the prompt.

Stages, by name (paper, "Adapting Rephrasing Feature" and appendix, "Implementation Details"):

    image    the adapter and a LoRA on the video model learn from pictures with quadruples
    domain   the adapter goes on alone, on frames of the video dataset: it is what `motion` uses,
             so that the LoRA need not learn how video frames differ from good pictures
    motion   the adapter is frozen; the LoRA of `image` goes on, on video

The export holds the adapter of `image` and the LoRA of `motion`.

Shapes: B samples, L positions of the conditioning, D its width, E width of the LLM; C latent
channels, T latent frames, Y X their lines and columns.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.weights import Weights
from trainers.adapter import Kind, RephrasingAdapter, null_of, padded
from trainers.encoders import Latents, dtype_of, stacked
from trainers.language import LanguageModel, States, Tokens, num_cut
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
from trainers.tuning import below
from trainers.vdm import PARTS, VDM, Backbone, Conditioning, check_buckets, drawn

_log = logging.getLogger(__name__)
GROUPS = {"image": ("adapter", "lora"), "domain": ("adapter",), "motion": ("lora",)}
"""What each stage trains."""
STAGES = tuple(GROUPS)
LORA, MOTION_LORA = "rise", "rise_motion"
MOTION_FOLDER = "motion_lora"
INSTRUCTIONS = Path(__file__).parents[1] / "engine" / "instructions"


@dataclass(frozen=True, kw_only=True)
class Rise(System):
    """RISE-T2V on any decoder-only LLM and a video diffusion model."""

    lm: LanguageModel
    vdm: Backbone
    length: int = 256
    """L: positions of the conditioning, which hold the whole rephrasing (the paper's example has
    120 tokens); CogVideoX-2B takes 226 or more."""
    feature: Literal["rephrasing", "encoded"] = "rephrasing"
    """`encoded`, of the paper's ablation (figure 6), encodes the rephrased text by itself."""
    adapter: Kind = "geglu"
    rank: int = 128
    """Of the LoRA."""
    motion_lora: bool = False
    """AnimateDiff: in `motion`, another LoRA on the motion modules."""
    text_dropout: float = 0.1
    """Share of samples that train the unconditional."""

    def check(self, stage: TrainStage) -> None:
        """Raises ValueError where models are missing or shapes do not meet."""
        if stage.name not in STAGES:
            raise ValueError(f"RISE has the stages {', '.join(STAGES)}, and no {stage.name!r}")
        self.lm.check()
        facts = self.vdm.facts()
        if not facts.any_text_len and self.length < facts.text_len:
            raise ValueError(
                f"length {self.length}: {self.vdm.base.at} takes texts of {facts.text_len}"
                " positions or more"
            )
        if self.motion_lora and self.vdm.motion is None:
            raise ValueError(f"motion_lora: {self.vdm.base.at} has no motion modules of its own")
        check_buckets(self.vdm, stage.data.buckets)

    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        """The VAE, the LLM's tokens, and its states over them."""
        return (
            Latents(vdm=self.vdm, precision=stage.precision),
            Tokens(lm=self.lm),
            States(lm=self.lm, feature=self.feature, precision=stage.precision, limit=self.length),
        )

    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, Tensor]],
    ) -> RiseLearner:
        """The system loaded for a stage."""
        vdm = self.vdm.load(
            video=stage.name == "motion", device=device, dtype=dtype_of(stage.precision)
        )
        null_LD = null_of(vdm.encode_text([""])[0], self.length)
        adapter = RephrasingAdapter(self.lm.width(), vdm.text_dim, null_LD, self.adapter)
        self._add_lora(vdm, LORA, vdm.lora_targets, stage.seed)
        if stage.name == "motion" and self.motion_lora:
            self._add_lora(vdm, MOTION_LORA, vdm.motion_lora_targets, stage.seed)
        module = RiseModule(vdm, adapter.to(device), self.text_dropout)
        for parent in ("image", "domain"):  # which trained the adapter alone: its own comes last
            _adopt(module, parents.get(parent, {}))
        return RiseLearner(module, GROUPS[stage.name])

    def _add_lora(self, vdm: VDM, name: str, targets: Sequence[str], seed: int) -> None:
        add_lora(vdm.denoiser, self.rank, self.rank, targets, name, seed=seed)

    def export(
        self,
        results: Mapping[str, Mapping[str, Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        """Writes the adapter, the LoRA, the instructions, and what the pipeline is made of."""
        image = results["image"]
        newest = results.get("motion", image)
        files = {
            "adapter.safetensors": "the Rephrasing Adapter of stage image, and the null sequence",
            "pytorch_lora_weights.safetensors": "LoRA, for diffusers' load_lora_weights",
            "instructions/": "what the LLM is told, by mode",
            "pipeline.json": "base models and sizes",
        }
        save_file(below("adapter.", image), folder / "adapter.safetensors")
        denoiser = below("denoiser.", newest)
        part = PARTS[self.vdm.kind]
        save_lora(lora_state(denoiser, LORA), folder, alpha=self.rank, part=part)
        if any(f".{MOTION_LORA}." in name for name in denoiser):
            (folder / MOTION_FOLDER).mkdir()
            state = lora_state(denoiser, MOTION_LORA)
            save_lora(state, folder / MOTION_FOLDER, alpha=self.rank, part=part)
            files[f"{MOTION_FOLDER}/"] = "LoRA of the motion modules"
        shutil.copytree(INSTRUCTIONS, folder / "instructions")
        lm = replace(self.lm, weights=self.lm.weights.pinned())
        pinned = replace(self, lm=lm, vdm=self.vdm.pinned())
        write_pipeline(folder, "rise", pinned, stages)
        return Card(
            title="RISE-T2V",
            paper="RISE-T2V: Rephrasing and Injecting Semantics with LLM for Expansive"
            " Text-to-Video Generation (arXiv 2511.04317)",
            models={
                "LLM": named(lm.weights),
                "video model": named(pinned.vdm.base),
                **({"motion modules": named(pinned.vdm.motion)} if pinned.vdm.motion else {}),
            },
            files=files,
            usage=_USAGE,
            limits=(
                "The video model's own limits stay (paper, Limitations).",
                "Rephrasing is the LLM's: it may add what was not asked for.",
            ),
        )

    @classmethod
    def from_portable(cls, about: Mapping[str, Any]) -> Rise:
        """The system that an export names."""
        lm = LanguageModel(**about["lm"] | {"weights": Weights(**about["lm"]["weights"])})
        return cls(**dict(about) | {"lm": lm, "vdm": Backbone.from_portable(about["vdm"])})


class RiseModule(nn.Module):
    """What is trained, and its loss.

    Args:
        vdm: With the LoRA.
        adapter: On the same device.
        text_dropout: Share of samples that get the null sequence.
    """

    def __init__(self, vdm: VDM, adapter: RephrasingAdapter, text_dropout: float):
        super().__init__()
        self.adapter, self.denoiser = adapter, vdm.denoiser
        self.vdm, self.text_dropout = vdm, text_dropout

    def forward(
        self, states_BLE: Tensor, length_B: Tensor, drop_B: Tensor, **latents: Tensor
    ) -> Tensor:
        """Losses (B,): see `VDM.losses`, which takes `latents`."""
        text_BLD = self.adapter(states_BLE, length_B)
        dropped_B = (drop_B < self.text_dropout)[:, None, None]
        text_BLD = torch.where(dropped_B, self.adapter.null_LD.to(text_BLD.dtype), text_BLD)
        return self.vdm.losses(text=Conditioning(text_BLD[:, None]), **latents)


class RiseLearner(Learner):
    """RISE-T2V in one of its stages.

    Args:
        module: As the stage starts.
        groups: What it trains: `adapter`, `lora`, or both.
    """

    def __init__(self, module: RiseModule, groups: Sequence[str]):
        self.module, self.blocks = module, module.vdm.blocks
        names = [n for n, _ in module.named_parameters()]
        members = {
            "adapter": [n for n in names if n.startswith("adapter.")],
            "lora": [n for n in names if ".lora_" in n],
        }
        self.groups = {group: members[group] for group in groups}
        trained = {name for group in groups for name in members[group]}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in trained)
        self.counts = Counter(texts_cut=0)

    def checkpoint_gradients(self) -> None:
        """From now on activations are computed again in backward."""
        self.module.vdm.denoiser.enable_gradient_checkpointing()

    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
        """States, latents, and what is drawn for them."""
        length = self.module.adapter.length
        states_BLE, length_B = padded([s.features["states"] for s in samples], length)
        device = self.module.adapter.null_LD.device
        moments_B2CTYX = stacked(samples, "latents", device)
        cut = sum(num_cut(s.features["tokens"], length) > 0 for s in samples)
        if cut and not self.counts["texts_cut"]:
            _log.warning("%d of %d texts are longer than %d tokens: cut", cut, len(samples), length)
        self.counts["texts_cut"] += cut
        return {
            "states_BLE": states_BLE.to(device),
            "length_B": length_B.to(device),
            "drop_B": noise.uniform("drop").to(device),
            "moments_B2CTYX": moments_B2CTYX,
            **drawn(noise, moments_B2CTYX),
        }


def _adopt(module: nn.Module, trained: Mapping[str, Tensor]) -> None:
    """Puts what an earlier stage trained into a module that has parameters of these names."""
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in trained.items():
            if name not in named or named[name].shape != tensor.shape:
                raise ValueError(f"{name} of the earlier stage does not fit this model")
            named[name].copy_(tensor)


_USAGE = """\
from trainers.rise_pipeline import RisePipeline

pipe = RisePipeline.from_export("{folder}")
made = pipe("a cute cat", mode="dense", frames=16, seed=0)
made.video, made.rephrased, made.timings
"""
