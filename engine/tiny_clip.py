"""Small random checkpoints of CLIP and of the aesthetic predictor, for tests and recipe `tiny`.

They are of the real architectures and are loaded by the very code that loads the real ones. What
they say means nothing: they are set so that scores spread around the usual thresholds.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from engine.aesthetic import LAYERS, WIDTHS

if TYPE_CHECKING:
    import torch
    from open_clip import CLIP

CONFIG: dict[str, Any] = {
    "embed_dim": 768,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
_LEAN = 4.8
"""How far all embeddings lean to one direction: their cosines are about 0.27 on average."""
_MEAN_SCORE, _SPREAD = 4.9, 0.9
_WORDS = (
    "a the dog cat woman man child bird river mountain street table cup red green blue white old"
    " small large runs stands flies turns slowly quickly camera light evening morning beside over"
).split()


def build_clip(folder: Path) -> Path:
    """Writes a CLIP as open-clip saves one; the same every time.

    Embeddings of pictures and of texts are spread out, and lean to one direction in common.
    """
    from open_clip.transform import PreprocessCfg
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    preprocess = dict(vars(PreprocessCfg(size=CONFIG["vision_cfg"]["image_size"])))
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    state = {name: value.contiguous() for name, value in _model().state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def build_aesthetic_head(file: Path) -> Path:
    """Writes an aesthetic predictor whose scores of `build_clip`'s embeddings are about 5."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        layers = [nn.Linear(*shape) for shape in zip(WIDTHS, WIDTHS[1:], strict=False)]
        scores = nn.Sequential(*layers)(_model().encode_image(_pictures(), normalize=True))
        scale = _SPREAD / scores.std()
        layers[-1].weight *= scale
        layers[-1].bias.copy_((layers[-1].bias - scores.mean()) * scale + _MEAN_SCORE)
    state = {
        f"layers.{place}.{name}": value.contiguous()
        for place, layer in zip(LAYERS, layers, strict=True)
        for name, value in layer.state_dict().items()
    }
    save_file(state, file)
    return file


def _model() -> CLIP:
    import open_clip
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = open_clip.CLIP(**deepcopy(CONFIG)).eval()
        common_D = torch.nn.functional.normalize(torch.randn(CONFIG["embed_dim"]), dim=0)
        tokens = open_clip.get_tokenizer("ViT-B-32")(_texts())
        _spread(model.visual.ln_post, lambda: model.encode_image(_pictures()))
        _spread(model.ln_final, lambda: model.encode_text(tokens))
        for norm, projection in (
            (model.visual.ln_post, model.visual.proj),
            (model.ln_final, model.text_projection),
        ):
            projection.copy_(torch.nn.functional.normalize(torch.randn_like(projection), dim=1))
            projection[0] = common_D
            norm.weight[0], norm.bias[0] = 0.0, _LEAN
    return model


def _spread(norm: torch.nn.LayerNorm, run: Any) -> None:
    """Makes what a last normalisation gives vary by 1 around 0, over what `run` shows the model.

    Of a random model's features nearly all is the same for every input.
    """
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_hook(lambda _, __, output: seen.append(output))
    run()
    hook.remove()
    (found_NLD,) = seen  # of which a tower reads one place: the first of pictures, texts' ends
    features_ND = found_NLD.flatten(0, -2)
    std_D = features_ND.std(0).clamp_min(1e-6)
    norm.weight.copy_(1 / std_D)
    norm.bias.copy_(-features_ND.mean(0) / std_D)


def _pictures() -> torch.Tensor:
    """Sixty-four soft colour fields, as the preprocessing gives them."""
    import torch

    rng = np.random.default_rng(0)
    side = CONFIG["vision_cfg"]["image_size"]
    fields = []
    for _ in range(64):
        coarse_HWC = rng.random((int(rng.integers(2, 9)),) * 2 + (3,)).astype(np.float32)
        field_HWC = cv2.resize(coarse_HWC, (side, side), interpolation=cv2.INTER_CUBIC)
        level = rng.uniform(-0.3, 0.3)
        fields.append(np.clip(field_HWC + level, 0, 1).transpose(2, 0, 1))
    return torch.from_numpy((np.stack(fields) - 0.45) / 0.27)


def _texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(_WORDS, int(rng.integers(4, 40)))) for _ in range(64)]
