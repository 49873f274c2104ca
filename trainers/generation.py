"""What pipelines of any system share: from text that a video model is given to videos.

Shapes: B prompts, F frames, H W pixels; L text positions, D their width; latents as in
`trainers.vdm`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainers.encoders import Precision, dtype_of
from trainers.lora import add_lora, load_lora
from trainers.system import Noise, system_of
from trainers.vdm import PARTS, VDM, Conditioning, Context

if TYPE_CHECKING:
    from trainers.finetune_pipeline import FinetunedPipeline
    from trainers.mimir_pipeline import MimirPipeline
    from trainers.rise_pipeline import RisePipeline
    from trainers.semantic_pipeline import SemanticGenPipeline

    Pipeline = RisePipeline | FinetunedPipeline | MimirPipeline | SemanticGenPipeline

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A video, and how it came about."""

    prompt: str
    seed: int
    video: np.ndarray
    """uint8 RGB (F, H, W, 3)."""
    fps: float
    rephrased: str
    """What the LLM made of the prompt; scenes are joined by the instruction's delimiter."""
    scenes: tuple[str, ...]
    notes: tuple[str, ...]
    """What did not go as asked, for a person."""
    timings: dict[str, float]
    """Seconds of what was done, by its name with `_s`, of the whole batch."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a video."""

    frames: int
    height_px: int
    width_px: int
    fps: float

    def changed(self, **given: int | None) -> Size:
        """With what is given in place of its own."""
        own = {"frames": self.frames, "height_px": self.height_px, "width_px": self.width_px}
        asked = {name: value for name, value in given.items() if value is not None}
        return Size(fps=self.fps, **own | asked)


def asked(prompt: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """Prompts with a seed each.

    Raises:
        ValueError: There are no prompts, or not as many seeds.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if not prompts or len(seeds) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(seeds)} seeds: name as many, or one seed"
        )
    return prompts, seeds


def told(
    prompt: str | Sequence[str],
    videos: Sequence[np.ndarray],
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    fps: float,
    timings: dict[str, float],
    rephrased: Sequence[str] | None = None,
    scenes: Sequence[tuple[str, ...]] | None = None,
    notes: Sequence[tuple[str, ...]] | None = None,
) -> Generated | list[Generated]:
    """Videos with how they came about: one where one prompt was given, else a list.

    Args:
        prompt: As it was given.
        videos: Of `prompts`.
        prompts: As of `asked`, like the seeds.
        seeds: See there.
        fps: Of the videos.
        timings: Of all together.
        rephrased: What an LLM made of each; by default the prompt itself.
        scenes: Of each; by default the text as a whole.
        notes: On each, if there are any.
    """
    texts = rephrased or prompts
    made = [
        Generated(
            prompt=prompts[n],
            seed=seeds[n],
            video=video,
            fps=fps,
            rephrased=texts[n],
            scenes=scenes[n] if scenes else (texts[n],),
            notes=notes[n] if notes else (),
            timings=timings,
        )
        for n, video in enumerate(videos)
    ]
    return made[0] if isinstance(prompt, str) else made


def check_texts(vdm: VDM, prompts: Sequence[str]) -> None:
    """Raises ValueError where the model's own text encoder does not read a prompt to its end."""
    for prompt, cut in zip(prompts, vdm.text_cut(prompts), strict=True):
        if cut:
            raise ValueError(
                f"the prompt that begins with {prompt[:40]!r} has {vdm.text_len + cut} tokens, and"
                f" the text encoder reads {vdm.text_len}: shorten it"
            )


def load_pipeline(
    folder: Path, *, device: str | None = None, precision: Precision | None = None
) -> Pipeline:
    """The pipeline of whatever system an export is of."""
    name = system_of(folder)
    if name == "rise":
        from trainers.rise_pipeline import RisePipeline as Pipeline
    elif name == "finetune":
        from trainers.finetune_pipeline import FinetunedPipeline as Pipeline
    elif name == "mimir":
        from trainers.mimir_pipeline import MimirPipeline as Pipeline
    elif name == "semanticgen":
        from trainers.semantic_pipeline import SemanticGenPipeline as Pipeline
    else:
        raise ValueError(f"{folder} is an export of {name}, which this program does not know")
    return Pipeline.from_export(folder, device=device, precision=precision)


@torch.no_grad()
def videos_of(
    vdm: VDM,
    text: Conditioning,
    null_LD: Tensor,
    shape: tuple[int, ...],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    null_context: Context | None = None,
    progress: Progress,
) -> tuple[list[np.ndarray], dict[str, float]]:
    """uint8 videos (F, H, W, 3) from text, and the seconds that denoising and decoding took."""
    noise_BCTYX = torch.cat([Noise(seed, 0, [0]).normal("latents", shape) for seed in seeds])
    device = text.tokens_BKLD.device
    began = time.perf_counter()
    latents_BCTYX = vdm.generate(
        text,
        null_LD,
        noise_BCTYX.to(device),
        steps=steps,
        guidance_scale=guidance_scale,
        null_context=null_context,
        progress=lambda step: progress("denoising", step, steps),
    )
    denoise_s = seconds_since(began, device)
    began = time.perf_counter()
    progress("decoding", 0, 1)
    videos = list(vdm.decode(latents_BCTYX).cpu().numpy())
    progress("decoding", 1, 1)
    return videos, {"denoise_s": denoise_s, "decode_s": seconds_since(began, device)}


def seconds_since(began: float, device: torch.device) -> float:
    """Seconds since a time of `time.perf_counter`, what the device still does included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def placed(device: str | None, precision: Precision | None) -> tuple[torch.device, torch.dtype]:
    """Where a pipeline runs, and in what: by default bf16 on a GPU, else fp32 on the CPU."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return where, dtype_of(precision or ("bf16" if where.type == "cuda" else "fp32"))


def add_exported_lora(
    vdm: VDM, folder: Path, name: str, kind: str, rank: int, targets: Sequence[str]
) -> None:
    """Adds the LoRA that lies in a folder of an export to the video model."""
    add_lora(vdm.denoiser, rank, rank, targets, name)
    part = f"{PARTS[kind]}."
    stored = load_file(folder / "pytorch_lora_weights.safetensors")
    load_lora(vdm.denoiser, {n.removeprefix(part): t for n, t in stored.items()}, name)
    vdm.denoiser.requires_grad_(False)
