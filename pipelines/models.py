"""The models of a recipe: which by default, and how flags put others in their places."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine.aesthetic import LAION
from engine.chat import Chat, TransformersChat
from engine.clip import ClipModel
from engine.endpoint import EndpointChat
from engine.watermark import QWEN2_VL
from engine.weights import Weights, make_missing, tiny_folder
from pipelines.flags import ModelFlags


@dataclass(frozen=True, kw_only=True)
class Models:
    """What a recipe with models loads, each by hub id or local path."""

    clip: ClipModel
    """Embedding of keyframes: aesthetic score, CLIP score and near-duplicates."""
    aesthetic: Weights
    """Head on that embedding."""
    watermark: Weights
    """Model that is asked about watermarks."""
    captioner: Chat
    """Model that captions and rephrases."""


PAPER = Models(
    # Mimir, appendix A: "the aesthetic predictor" (ViT-L/14 of OpenAI is the one it was fitted to)
    # and "CLIP Score", whose model it does not name
    clip=ClipModel(),
    aesthetic=LAION,
    watermark=QWEN2_VL,  # "QWen2-VL-7B"
    # "CogVim2", which is CogVLM2's caption model; its code runs with transformers 4.40 only, so
    # it can stand behind an endpoint, and this is what stands in for it by default
    captioner=TransformersChat(weights=Weights(at="Qwen/Qwen2.5-VL-7B-Instruct")),
)
SMALL = dataclasses.replace(
    PAPER,
    watermark=Weights(at="Qwen/Qwen2-VL-2B-Instruct"),
    captioner=TransformersChat(weights=Weights(at="HuggingFaceTB/SmolVLM2-500M-Video-Instruct")),
)
"""Models that fit a laptop: together 3.1 billion parameters, 12 GiB in fp32."""


def tiny(folder: Path | None = None) -> Models:
    """The small random checkpoints that `make_tiny` builds; their outputs mean nothing."""
    at = folder or tiny_folder()
    vlm = Weights(at=str(at / "qwen2_vl"))
    return Models(
        clip=ClipModel(weights=Weights(at=str(at / "clip"))),
        aesthetic=Weights(at=str(at / "aesthetic.safetensors")),
        watermark=vlm,
        captioner=TransformersChat(weights=vlm, max_new_tokens=64),
    )


def make_tiny(folder: Path | None = None) -> None:
    """Builds the small checkpoints that are missing."""
    from engine.tiny_clip import build_aesthetic_head, build_clip
    from engine.tiny_vlm import build_qwen2_vl

    make_missing(
        folder or tiny_folder(),
        {
            "clip": build_clip,
            "aesthetic.safetensors": build_aesthetic_head,
            "qwen2_vl": build_qwen2_vl,
        },
    )


def with_flags(models: Models, flags: ModelFlags) -> Models:
    """The models, with those that the flags name in their places.

    Raises:
        ValueError: A flag lacks another one.
    """
    changes: dict[str, object] = {}
    if flags.clip:
        changes["clip"] = _clip(flags.clip)
    if flags.aesthetic_head:
        changes["aesthetic"] = Weights(at=flags.aesthetic_head)
    if flags.watermark_model:
        changes["watermark"] = Weights(at=flags.watermark_model)
    if flags.endpoint:
        if not flags.captioner:
            raise ValueError(
                "--endpoint needs --captioner, the name by which the endpoint knows the model"
            )
        changes["captioner"] = EndpointChat(
            url=flags.endpoint,
            model=flags.captioner,
            key_variable=flags.endpoint_key,
            concurrency=flags.endpoint_concurrency,
        )
    elif flags.captioner:
        changes["captioner"] = TransformersChat(
            weights=Weights(at=flags.captioner), remote_code_of=flags.trust_model_code
        )
    return dataclasses.replace(models, **changes)  # type: ignore[arg-type]


def _clip(named: str) -> ClipModel:
    if Path(named).expanduser().exists():
        return ClipModel(weights=Weights(at=named))
    name, _, tag = named.rpartition("/")
    if not name:
        raise ValueError(f"--clip {named}: name a file, a folder, or MODEL/TAG of open-clip")
    return ClipModel(name=name, weights=tag)
