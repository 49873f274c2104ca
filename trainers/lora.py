"""Low-rank adapters of a denoiser, through peft, in files that diffusers' pipelines load.

An adapter's state is named as in its file: `blocks.0.attn.to_q.lora_A.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Of an attention layer, where LoRA goes."""


def attention_projections(denoiser: nn.Module, *, motion: bool = False) -> list[str]:
    """Full names of the attention projections outside motion modules, or inside them."""
    return [
        name
        for name, _ in denoiser.named_modules()
        if name.endswith(tuple(f".{p}" for p in PROJECTIONS))
        and ("motion_modules" in name) == motion
    ]


def add_lora(
    denoiser: Any, rank: int, alpha: float, targets: Sequence[str], name: str, *, seed: int = 0
) -> None:
    """Adds an adapter that changes nothing yet, beside those that are there; all are active.

    Its weights are float32 and trainable, whatever the frozen ones are. B is zero and A normal with
    a standard deviation of 1 / rank, the same numbers on every device.

    Args:
        denoiser: A model of diffusers.
        rank: Of the update.
        alpha: The update is scaled by alpha / rank.
        targets: Full names of linear layers.
        name: Of the adapter.
        seed: Of its weights.

    Raises:
        ValueError: The name is taken, or a target is not there.

    Source: Hu et al. 2021, arXiv 2106.09685, section 4.1.
    """
    from peft import LoraConfig

    missing = set(targets) - {name for name, _ in denoiser.named_modules()}
    if missing or not targets:
        raise ValueError(
            f"no layers for LoRA in the denoiser: {sorted(missing)[:3] or 'none named'}"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian"
    )
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    denoiser.add_adapter(config, name)
    denoiser.set_adapter(list(denoiser.peft_config))
    own = dict(sorted(_parameters(denoiser, name).items()))
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in own.items():
        parameter.data = parameter.data.float()
        if ".lora_A." in key:
            drawn = torch.randn(parameter.shape, generator=generator) / rank
            parameter.data.copy_(drawn)
    # Setting the active adapters makes all of them trainable: who was frozen stays so.
    keep = {id(p) for p in [*trained, *own.values()]}
    for parameter in denoiser.parameters():
        parameter.requires_grad_(id(parameter) in keep)


def lora_state(denoiser: nn.Module | Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The adapter's weights, from a denoiser or from its parameters by name."""
    return {
        key.replace(f".{name}.weight", ".weight"): value.detach()
        for key, value in _parameters(denoiser, name).items()
    }


def load_lora(denoiser: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Copies weights into an adapter that was added before.

    Raises:
        ValueError: Names or shapes do not meet.
    """
    own = {
        k.replace(f".{name}.weight", ".weight"): p for k, p in _parameters(denoiser, name).items()
    }
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ValueError(
            f"LoRA of {len(state)} tensors does not fit the {len(own)} of adapter {name}:"
            f" {odd[0]} is in one alone"
        )
    for key, parameter in own.items():
        if parameter.shape != state[key].shape:
            raise ValueError(
                f"LoRA {key} is {tuple(state[key].shape)}, but the adapter's is"
                f" {tuple(parameter.shape)}: ranks differ"
            )
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])


def save_lora(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    alpha: float,
    part: Literal["unet", "transformer"],
) -> Path:
    """Writes `pytorch_lora_weights.safetensors`, for `load_lora_weights` of diffusers' pipelines.

    Args:
        state: Of the adapter.
        folder: Where to.
        alpha: As it was added with.
        part: What the denoiser is in the pipeline.

    Returns:
        The file.
    """
    from diffusers.loaders import CogVideoXLoraLoaderMixin, StableDiffusionLoraLoaderMixin
    from peft import LoraConfig

    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key}
    if len(ranks) != 1:
        raise ValueError(f"LoRA of one rank is needed, but these are of {sorted(ranks) or 'none'}")
    targets = sorted({key.rsplit(".lora_", 1)[0] for key in state})
    config = LoraConfig(r=ranks.pop(), lora_alpha=alpha, target_modules=targets).to_dict()
    facts = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    mixin = StableDiffusionLoraLoaderMixin if part == "unet" else CogVideoXLoraLoaderMixin
    mixin.save_lora_weights(
        folder, **{f"{part}_lora_layers": tensors, f"{part}_lora_adapter_metadata": facts}
    )
    return folder / "pytorch_lora_weights.safetensors"


def _parameters(denoiser: nn.Module | Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    named = denoiser if isinstance(denoiser, Mapping) else dict(denoiser.named_parameters())
    ends = (f".lora_A.{name}.weight", f".lora_B.{name}.weight")
    found = {key: value for key, value in named.items() if key.endswith(ends)}
    if not found:
        raise ValueError(f"the denoiser has no adapter {name}: add it first")
    return found
