"""How a pretrained denoiser is trained: whole, through a LoRA, or not at all; and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors.torch import load_file, save_file

from trainers.lora import add_lora, load_lora, lora_state, save_lora
from trainers.vdm import PARTS, VDM, Backbone, Variant

if TYPE_CHECKING:
    from torch import Tensor

Tuning = Literal["full", "lora", "frozen"]
WHOLE = "diffusion_pytorch_model.safetensors"


def tune(vdm: VDM, tuning: Tuning, *, rank: int, name: str, seed: int) -> None:
    """Makes of a frozen denoiser what is trained: float32, and requiring gradients.

    Args:
        vdm: As it was loaded.
        tuning: What is trained of it.
        rank: Of a LoRA on its attention projections.
        name: Of that LoRA.
        seed: Of its weights.
    """
    if tuning == "full":
        vdm.denoiser.float().requires_grad_(True)
    elif tuning == "lora":
        add_lora(vdm.denoiser, rank, rank, vdm.lora_targets, name, seed=seed)


def save_tuned(
    trained: Mapping[str, Tensor],
    tuning: Tuning,
    folder: Path,
    vdm: Backbone,
    variant: Variant,
    *,
    rank: int,
    name: str,
    dtype: torch.dtype,
) -> dict[str, str]:
    """Writes what was trained of a denoiser; gives what each file holds.

    Args:
        trained: By the denoiser's own names.
        tuning: As of `tune`.
        folder: There is, and is the export's own or one below it.
        vdm: Whose denoiser it is.
        variant: Of it.
        rank: As of `tune`.
        name: As of `tune`.
        dtype: Of whole weights in the file.
    """
    part = PARTS[vdm.kind]
    if tuning == "full":
        (folder / part).mkdir()
        tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in trained.items()}
        save_file(tensors, folder / part / WHOLE, metadata={"format": "pt"})
        config = vdm.load(
            video=True, device=torch.device("cpu"), dtype=dtype, variant=variant
        ).denoiser_config()
        words = json.dumps(config, indent=1)
        (folder / part / "config.json").write_text(words, encoding="utf-8")
        return {f"{part}/": "the whole denoiser, for diffusers' from_pretrained"}
    if tuning == "lora":
        save_lora(lora_state(trained, name), folder, alpha=rank, part=part)
        return {"pytorch_lora_weights.safetensors": "LoRA, for diffusers' load_lora_weights"}
    return {}


def load_tuned(vdm: VDM, tuning: Tuning, folder: Path, kind: str, *, rank: int, name: str) -> None:
    """Puts what `save_tuned` wrote into a denoiser as it was loaded; it stays frozen."""
    part = PARTS[kind]
    if tuning == "full":
        vdm.denoiser.load_state_dict(load_file(folder / part / WHOLE))
    elif tuning == "lora":
        add_lora(vdm.denoiser, rank, rank, vdm.lora_targets, name)
        stored = load_file(folder / "pytorch_lora_weights.safetensors")
        load_lora(vdm.denoiser, {n.removeprefix(f"{part}."): t for n, t in stored.items()}, name)
        vdm.denoiser.requires_grad_(False)


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
