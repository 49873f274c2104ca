"""An AnimateDiff, a CogVideoX and a Wan of a few megabytes that this project builds, for tests.

Architecture, tokenizers and file formats are the real ones, so the code that loads and runs the
real models runs on them; sides of latents are an eighth of the video's, too. All weights are random
and fixed: what they make is MEANINGLESS noise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainers.vdm_shapes import COGVIDEOX_2B, COGVIDEOX_5B, SD15, WAN_1_3B

SEED = 17
TEXT_DIM = 32
"""D of all."""

_VAE_CHANNELS = (8, 8, 8, 8)
_UNET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": TEXT_DIM,
    "norm_num_groups": 2,
    "sample_size": 8,
}
_VAE = {"block_out_channels": _VAE_CHANNELS, "layers_per_block": 1, "norm_num_groups": 2}
_MOTION = {
    "block_out_channels": (8, 16),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 2,
    "motion_num_attention_heads": 2,
}
_CLIP = {
    "hidden_size": TEXT_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": TEXT_DIM,
}
_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": TEXT_DIM,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
}
_T5 = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_WAN_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "ffn_dim": 48,
    "freq_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
}
_WAN_VAE = {
    "base_dim": 8,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "z_dim": 4,
    "latents_mean": (-0.5, 0.25, 0.0, 0.125),
    "latents_std": (0.5, 1.5, 2.0, 1.0),
}


def build_animatediff(folder: Path) -> Path:
    """Writes `sd`, a Stable Diffusion, and `motion`, a motion adapter, into `folder`; gives it."""
    from diffusers import (
        AutoencoderKL,
        MotionAdapter,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    with _seeded():
        tokenizer = _clip_tokenizer()
        text = SD15["text_encoder"] | _CLIP | _special(tokenizer)
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_config(SD15["vae"] | _VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel.from_config(SD15["unet"] | _UNET),
            scheduler=PNDMScheduler.from_config(SD15["scheduler"] | {"skip_prk_steps": True}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        motion = MotionAdapter.from_config(SD15["motion"] | _MOTION)
    pipeline.save_pretrained(folder / "sd")
    motion.save_pretrained(folder / "motion")
    return folder


def build_cogvideox(folder: Path, *, rotary: bool) -> Path:
    """Writes a CogVideoX into `folder`, like 5B where `rotary`, else like 2B; gives the folder."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    shapes = COGVIDEOX_5B if rotary else COGVIDEOX_2B
    vae = _VAE | {"latent_channels": 4, "sample_height": 64, "sample_width": 64}
    with _seeded():
        tokenizer = _t5_tokenizer()
        text = shapes["text_encoder"] | _T5 | _special(tokenizer)
        pipeline = CogVideoXPipeline(
            tokenizer=tokenizer,
            text_encoder=T5EncoderModel(T5Config(**text)),
            vae=AutoencoderKLCogVideoX.from_config(shapes["vae"] | vae),
            transformer=CogVideoXTransformer3DModel.from_config(
                shapes["transformer"] | _TRANSFORMER
            ),
            scheduler=CogVideoXDDIMScheduler.from_config(shapes["scheduler"]),
        )
    pipeline.save_pretrained(folder)
    return folder


def build_wan(folder: Path) -> Path:
    """Writes a Wan 2.1 for text alone into `folder`; gives the folder."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel

    with _seeded():
        tokenizer = _t5_tokenizer()
        text = WAN_1_3B["text_encoder"] | _T5 | _special(tokenizer)
        pipeline = WanPipeline(
            tokenizer=tokenizer,
            text_encoder=UMT5EncoderModel(UMT5Config(**text)),
            vae=AutoencoderKLWan.from_config(WAN_1_3B["vae"] | _WAN_VAE),
            scheduler=UniPCMultistepScheduler.from_config(WAN_1_3B["scheduler"]),
            transformer=WanTransformer3DModel.from_config(
                WAN_1_3B["transformer"] | _WAN_TRANSFORMER
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _special(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(tokenizer, name) for name in names}
    return {"vocab_size": len(tokenizer)} | {k: v for k, v in found.items() if v is not None}


def _clip_tokenizer() -> Any:
    """CLIP's with no merges: a token is a byte."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    bytes_ = sorted(ByteLevel.alphabet())
    pieces = [*bytes_, *(f"{b}</w>" for b in bytes_), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> Any:
    """T5's with the printable ASCII characters for pieces."""
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces = [(chr(n), -3.0) for n in range(33, 127)]
    extra = [(f"<extra_id_{n}>", 0.0) for n in reversed(range(100))]
    return T5Tokenizer(vocab=special + pieces + extra, model_max_length=226)
