"""A Qwen2.5-VL and a V-JEPA 2 of about a megabyte that this project builds itself, for tests.

Architecture and file formats are the real ones, so the code that loads and runs the real models
runs on them. All weights are random and fixed: what they make is MEANINGLESS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SEED = 23
QWEN_DIM = 48
VJEPA2_DIM = 48

_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 4,
    "out_hidden_size": QWEN_DIM,
    "fullatt_block_indexes": [1, 3],
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
}
_TEXT = {
    "hidden_size": QWEN_DIM,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
}
_QWEN_PIXELS = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "merge_size": 2,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
}
_VJEPA2 = {
    "patch_size": 16,
    "crop_size": 64,
    "frames_per_clip": 8,
    "tubelet_size": 2,
    "hidden_size": VJEPA2_DIM,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
    "pred_num_mask_tokens": 2,
    "initializer_range": 0.2,  # 0.02 leaves tokens that hardly depend on each other
}
_VJEPA2_PIXELS = {
    "video_processor_type": "VJEPA2VideoProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "crop_size": {"height": 64, "width": 64},
}


def build_qwen2_5_vl(folder: Path, *, shards: bool = False) -> Path:
    """Writes a whole Qwen2.5-VL but for its tokenizer into `folder`; gives the folder.

    Args:
        folder: Is made.
        shards: Weights in several files, as those of the large models are.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(vision_config=_VISION, text_config=_TEXT)
    return _write(
        Qwen2_5_VLForConditionalGeneration, config, folder, "preprocessor_config.json",
        _QWEN_PIXELS, "40KB" if shards else "1GB",
    )  # fmt: skip


def build_vjepa2(folder: Path) -> Path:
    """Writes a V-JEPA 2 into `folder`; gives the folder."""
    from transformers import VJEPA2Config, VJEPA2Model

    name = "video_preprocessor_config.json"
    return _write(VJEPA2Model, VJEPA2Config(**_VJEPA2), folder, name, _VJEPA2_PIXELS, "1GB")


def _write(
    kind: Any, config: Any, folder: Path, processor: str, pixels: dict[str, Any], shard: str
) -> Path:
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = kind(config)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / processor).write_text(json.dumps(pixels, indent=1), encoding="utf-8")
    return folder
