"""A CLIP and an aesthetic head of a few megabytes that this project builds itself, for tests.

Architecture, tokenizer and file formats are the real ones, so the code that loads and runs OpenAI's
CLIP and LAION's predictor runs on them. What they say is MEANINGLESS. All weights are random but
the last ones of each tower and of the head, which are laid so that real pictures and captions
spread around the thresholds of Mimir:

- a tower's features before its projection are nearly the same for all pictures (captions), as
  random networks make them. The projection sends what they share to one axis, and the directions
  in which they differ most, each scaled to the same variance, to axes of their own;
- both towers have these axes in common, so the cosine of a picture and a caption is a constant,
  from the shared axis, plus a random number;
- the head is blind to the shared axis, and its last bias is the mean score.

Shapes: N examples, F features of a tower, D width of the embedding, K axes on which they differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.aesthetic import ANY, LAYERS
from engine.clip import WIDTH
from engine.tiny_vlm import NOUNS, SENTENCE

if TYPE_CHECKING:
    import torch

SEED = 7
HEAD_SEED = 16
"""Chosen so that some of the sample corpus, some photographs and some real videos score below 4."""

_FEATURES, _AXES = 64, 16
_SHARED_COSINE = 0.39
"""Mean CLIP score of unrelated pictures and captions."""
_SHARED = math.sqrt(_SHARED_COSINE)
_MEAN_SCORE, _SCORE_SPREAD = 4.9, 1.5
_MODEL = {
    "embed_dim": WIDTH,
    "quick_gelu": True,  # as OpenAI's
    "vision_cfg": {"image_size": 64, "layers": 2, "width": _FEATURES, "patch_size": 16},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": _FEATURES,
        "heads": 1,
        "layers": 2,
    },
}
_WORDS = (
    "a an the this of on in with near behind slowly while small large old bright dark red green"
    " cat dog boat cup statue street garden river table woman man child light wall stands moves"
    " shows holds falls runs camera picture video close view left right"
).split()


def build_clip(folder: Path) -> Path:
    """Writes the checkpoint (about 7 MB) into `folder`, and gives the folder; seconds of work.

    open-clip loads it as `local-dir:FOLDER`, and so does `ClipModel(weights=Weights(at=FOLDER))`.
    The same tensors every time on the same machine and versions. All are numbers of float16, which
    OpenAI's are, too.
    """
    import open_clip
    import torch
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(SEED)
        model = open_clip.CLIP(**_MODEL).eval()
        for value in model.state_dict().values():
            value.copy_(value.half())
        pictures, captions = _examples(open_clip.SimpleTokenizer())
        towers = (
            (model.visual, "proj", model.encode_image, pictures),
            (model, "text_projection", model.encode_text, captions),
        )
        for seed, (owner, name, encode, examples) in enumerate(towers):
            projection = getattr(owner, name)
            setattr(owner, name, None)
            found = _projection(_features(encode, examples), SEED + seed)
            projection.copy_(torch.from_numpy(found).half())
            setattr(owner, name, projection)
        tensors = {k: v.half().contiguous() for k, v in model.state_dict().items()}
    config = {
        "model_cfg": _MODEL,
        "preprocess_cfg": {
            "mean": OPENAI_DATASET_MEAN,
            "std": OPENAI_DATASET_STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def build_aesthetic_head(path: Path) -> Path:
    """Writes a head (4 MB) to `path`, as safetensors or, by its suffix, a pth; gives the path.

    It takes the embeddings of whatever model, which only a safetensors file says.
    """
    rng = np.random.default_rng(SEED)
    tensors: dict[str, np.ndarray] = {}
    weight, bias = np.eye(WIDTH), np.zeros(WIDTH)
    for n, (out, into) in LAYERS.items():
        own, shift = rng.normal(0, into**-0.5, (out, into)), rng.normal(0, 0.02, out)
        if out == 1:
            own, shift = _last(weight, bias)
        tensors |= {f"layers.{n}.weight": own, f"layers.{n}.bias": shift}
        weight, bias = own @ weight, own @ bias + shift
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    if path.suffix == ".pth":
        import torch

        torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, path)
    else:
        from safetensors.numpy import save_file

        save_file(tensors, path, metadata={"clip_model": ANY})
    return path


def _last(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The head's last layer: what it makes of random layers before is blind to the shared axis.

    Args:
        weight: Product of the layers before, (16, D).
        bias: Theirs, (16,).
    """
    shared, *differing = _axes() @ weight.T
    blind = np.random.default_rng(HEAD_SEED).normal(size=len(bias))
    blind -= shared * (blind @ shared) / (shared @ shared)
    spread = np.linalg.norm(blind @ np.transpose(differing)) * math.sqrt((1 - _SHARED**2) / _AXES)
    own = blind[None] * (_SCORE_SPREAD / spread)
    return own, _MEAN_SCORE - own @ bias


def _axes() -> np.ndarray:
    """Orthonormal directions, (1 + K, D): the one that all share, and those where they differ."""
    random = np.random.default_rng(SEED).normal(size=(WIDTH, 1 + _AXES))
    return np.linalg.qr(random)[0].T


def _projection(features_NF: np.ndarray, seed: int) -> np.ndarray:
    """The matrix (F, D) that spreads a tower's embeddings, as said at the top."""
    mean_F = features_NF.mean(0)
    shared_F = mean_F / np.linalg.norm(mean_F)
    rest_NF = features_NF - mean_F
    rest_NF = rest_NF - np.outer(rest_NF @ shared_F, shared_F)
    _, spreads, directions_KF = np.linalg.svd(rest_NF, full_matrices=False)
    scales = spreads[:_AXES] / math.sqrt(len(features_NF))
    # Turned at random, or both towers' first axes would mean the same.
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(_AXES, _AXES)))[0]
    axes = _axes()
    share = np.outer(shared_F / np.linalg.norm(mean_F), axes[0]) * _SHARED
    differ = (directions_KF[:_AXES].T / scales) @ turn @ axes[1:]
    return share + differ * math.sqrt((1 - _SHARED**2) / _AXES)


def _features(encode: Callable[[torch.Tensor], torch.Tensor], examples: torch.Tensor) -> np.ndarray:
    return encode(examples).double().numpy()


def _examples(tokenizer: Callable[[Sequence[str]], Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures of a few colours each, as preprocessed, and captions, as tokens."""
    import torch

    rng = np.random.default_rng(SEED)
    size = _MODEL["vision_cfg"]["image_size"]
    pictures = []
    for i in range(192):
        cells = 2 + i % 5
        coarse = torch.from_numpy(rng.normal(0, 1, (1, 3, cells, cells))).float()
        grey = torch.from_numpy(rng.normal(0, 1, (1, 1, cells, cells))).float()
        fine = torch.from_numpy(rng.normal(0, 0.2, (1, 1, size, size))).float()
        mixed = torch.nn.functional.interpolate(
            0.4 * coarse + 0.9 * grey, size=(size, size), mode="bicubic"
        )
        pictures.append(mixed + fine + rng.normal(0, 0.4))
    captions = [" ".join(rng.choice(_WORDS, 4 + i % 40)) + "." for i in range(48)]
    for i in range(144):  # what the small captioner says, or its scores would all be the same
        places = SENTENCE if i % 4 else SENTENCE[: SENTENCE.index(NOUNS) + 1]
        captions.append("".join(rng.choice(place) for place in places).removesuffix(".") + ".")
    return torch.cat(pictures), tokenizer(captions)
