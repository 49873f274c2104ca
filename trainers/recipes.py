"""What there is to train, by name; the recipes are in a file for each paper."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from engine.weights import make_missing, tiny_folder
from trainers import recipes_mimir, recipes_rise, recipes_semantic
from trainers.recipe import Models, Recipe, with_settings, with_stages

__all__ = [
    "NAMES",
    "TINY",
    "Models",
    "Recipe",
    "make_tiny",
    "recipe",
    "with_settings",
    "with_stages",
]

TINY = "tiny_"
"""Before a recipe's name: the same on small random models, which the project builds itself."""
_FILES = (recipes_rise, recipes_mimir, recipes_semantic)
NAMES = {name: about for file in _FILES for name, about in file.NAMES.items()}
"""Each recipe in a line; every one is there as `tiny_NAME` too."""


def recipe(name: str, models: Models | None = None) -> Recipe:
    """A recipe with the models that are named in place of its own.

    Raises:
        ValueError: There is none of this name.
    """
    known = name.removeprefix(TINY)
    if known not in NAMES:
        raise ValueError(
            f"there is no recipe {name!r}: choose one of {', '.join(NAMES)}, or {TINY} and one of"
            " these"
        )
    file = next(f for f in _FILES if known in f.NAMES)
    made = file.build(known, models or Models(), tiny=name != known)
    return dataclasses.replace(made, name=name)


def make_tiny(folder: Path | None = None) -> None:
    """Builds the small random checkpoints that are missing."""
    from transformers.utils.logging import disable_progress_bar

    from trainers.tiny_llm import build_llm
    from trainers.tiny_semantics import build_qwen2_5_vl, build_vjepa2
    from trainers.tiny_vdm import build_animatediff, build_cogvideox, build_wan

    disable_progress_bar()
    make_missing(
        folder or tiny_folder(),
        {
            "llama": lambda at: build_llm(at, "llama"),
            "phi3": lambda at: build_llm(at, "phi3"),
            "animatediff": build_animatediff,
            "cogvideox": lambda at: build_cogvideox(at, rotary=False),
            "cogvideox_5b": lambda at: build_cogvideox(at, rotary=True),
            "wan": build_wan,
            "qwen2_5_vl": build_qwen2_5_vl,
            "vjepa2": build_vjepa2,
        },
    )
