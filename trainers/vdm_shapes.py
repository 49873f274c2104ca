"""Shapes of published video diffusion models, for measuring speed with random weights.

Each is what `RandomParts` takes: by part, what its `config.json` says beyond the library's
defaults.

Source: the configurations beside the weights of stable-diffusion-v1-5, animatediff-motion-adapter-
v1-5-3, CogVideoX-2b, CogVideoX-5b, Wan2.1-T2V-1.3B-Diffusers and Wan2.1-T2V-14B-Diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, Mapping[str, Any]]

_BLOCKS = (320, 640, 1280, 1280)

SD15: Shapes = {
    "": {"_class_name": "StableDiffusionPipeline"},
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8,
        "block_out_channels": _BLOCKS,
        "cross_attention_dim": 768,
        "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 64,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "projection_dim": 768,
    },
    "scheduler": {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
    },
    "motion": {
        "_class_name": "MotionAdapter",
        "block_out_channels": _BLOCKS,
        "motion_layers_per_block": 2,
        "motion_max_seq_length": 32,
        "motion_mid_block_layers_per_block": 1,
        "motion_norm_num_groups": 32,
        "motion_num_attention_heads": 8,
        "use_motion_mid_block": False,
    },
}
"""Stable Diffusion 1.5 with AnimateDiff's third motion adapter."""

_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_COGVIDEOX_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
_COGVIDEOX_VAE = {
    "_class_name": "AutoencoderKLCogVideoX",
    "block_out_channels": (128, 256, 256, 512),
    "latent_channels": 16,
    "layers_per_block": 3,
    "norm_num_groups": 32,
    "temporal_compression_ratio": 4,
    "sample_height": 480,
    "sample_width": 720,
}
_COGVIDEOX_TRANSFORMER = {
    "_class_name": "CogVideoXTransformer3DModel",
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "spatial_interpolation_scale": 1.875,
}

COGVIDEOX_2B: Shapes = {
    "": {"_class_name": "CogVideoXPipeline"},
    "transformer": _COGVIDEOX_TRANSFORMER
    | {
        "num_attention_heads": 30,
        "num_layers": 30,
        "use_rotary_positional_embeddings": False,
    },
    "vae": _COGVIDEOX_VAE | {"scaling_factor": 1.15258426},
    "text_encoder": _T5_XXL,
    "scheduler": _COGVIDEOX_SCHEDULER | {"snr_shift_scale": 3.0},
}

COGVIDEOX_5B: Shapes = {
    "": {"_class_name": "CogVideoXPipeline"},
    "transformer": _COGVIDEOX_TRANSFORMER
    | {
        "num_attention_heads": 48,
        "num_layers": 42,
        "use_rotary_positional_embeddings": True,
    },
    "vae": _COGVIDEOX_VAE | {"scaling_factor": 0.7},
    "text_encoder": _T5_XXL,
    "scheduler": _COGVIDEOX_SCHEDULER | {"snr_shift_scale": 1.0},
}

_WAN: Shapes = {
    "": {"_class_name": "WanPipeline"},
    "transformer": {
        "_class_name": "WanTransformer3DModel",
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "eps": 1e-6,
        "freq_dim": 256,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": (1, 2, 2),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": 4096,
    },
    # Means and standard deviations of its latents are the library's defaults.
    "vae": {
        "_class_name": "AutoencoderKLWan",
        "base_dim": 96,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "z_dim": 16,
    },
    "text_encoder": _T5_XXL | {"vocab_size": 256384},
    "scheduler": {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 3.0,
    },
}

WAN_1_3B: Shapes = dict(_WAN) | {
    "transformer": _WAN["transformer"]
    | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
}

WAN_14B: Shapes = dict(_WAN) | {
    "transformer": _WAN["transformer"]
    | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}
