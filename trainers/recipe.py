"""A recipe as a value: a system, the stages that train it, and what may be changed of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.weights import Weights
from trainers.system import System, TrainStage
from trainers.vdm import Backbone

if TYPE_CHECKING:
    from trainers.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named training: a system, and the stages in which it is trained."""

    name: str
    system: System
    stages: tuple[TrainStage, ...]

    def stage(self, name: str) -> TrainStage:
        """A stage by its name."""
        return next(s for s in self.stages if s.name == name)


@dataclass(frozen=True, kw_only=True)
class Models:
    """Base models in place of a recipe's own, by hub id or local folder."""

    llm: str | None = None
    """Any decoder-only language model of transformers."""
    prompt_format: str | None = None
    """chat (the tokenizer's template) or raw."""
    video_model: str | None = None
    """Stable Diffusion 1.5 (or a model made from it) for AnimateDiff; CogVideoX; Wan 2.1."""
    motion_modules: str | None = None
    """AnimateDiff's motion adapter."""
    semantic_encoder: str | None = None
    """Of the recipe's own kind: Qwen2.5-VL, whose vision tower alone is read, or V-JEPA 2."""


def swapped(models: Models, lm: LanguageModel, vdm: Backbone) -> tuple[LanguageModel, Backbone]:
    """A recipe's language and video model, or those that are named in place of them."""
    if models.llm or models.prompt_format:
        weights = Weights(at=models.llm) if models.llm else lm.weights
        lm = dataclasses.replace(
            lm, weights=weights, prompt_format=models.prompt_format or lm.prompt_format
        )
    return lm, swapped_vdm(models, vdm)


def swapped_vdm(models: Models, vdm: Backbone) -> Backbone:
    """The same of a recipe without a language model."""
    if models.video_model:
        vdm = dataclasses.replace(vdm, base=Weights(at=models.video_model))
    if models.motion_modules:
        vdm = dataclasses.replace(vdm, motion=Weights(at=models.motion_modules))
    return vdm


def smaller(
    stage: TrainStage, buckets: tuple, *, steps: int, fps: float | None = None, lr: float = 1e-3
) -> TrainStage:
    """A stage for small random models: few steps in float32, with an average, so all code runs."""
    data = dataclasses.replace(stage.data, buckets=buckets, fps=fps or stage.data.fps)
    return dataclasses.replace(
        stage,
        data=data,
        optim=tuple(dataclasses.replace(o, lr=lr, warmup_steps=2) for o in stage.optim),
        steps=steps,
        batch=4,
        precision="fp32",
        ema_decay=0.9,
    )


def with_stages(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """The recipe with some of its stages alone, such as without `domain`.

    Raises:
        ValueError: It has no such stage, or lacks one that another starts from.
    """
    known = [s.name for s in recipe.stages]
    for name in names:
        if name not in known:
            raise ValueError(f"recipe {recipe.name} has the stages {', '.join(known)}: no {name!r}")
    kept = [
        dataclasses.replace(s, after=tuple(a for a in s.after if a in names or a != "domain"))
        for s in recipe.stages
        if s.name in names
    ]
    return dataclasses.replace(recipe, stages=tuple(kept))


def with_settings(recipe: Recipe, changes: Sequence[str]) -> Recipe:
    """The recipe with other settings, each as STAGE.FIELD=VALUE, such as image.steps=100.

    `lr`, `warmup_steps` and `schedule` are those of all groups of the stage.

    Raises:
        ValueError: There is no such stage or setting, or the value is none for it.
    """
    stages = {s.name: s for s in recipe.stages}
    for change in changes:
        found = re.fullmatch(r"(\w+)\.(\w+)=(.+)", change)
        if not found or found[1] not in stages or found[2] not in _SETTINGS:
            raise ValueError(
                f"--set {change}: write STAGE.SETTING=VALUE with a stage of {', '.join(stages)} and"
                f" a setting of {', '.join(_SETTINGS)}"
            )
        name, setting, text = found.groups()
        try:
            value = _SETTINGS[setting](text)
        except ValueError:
            raise ValueError(f"--set {change}: {text!r} is no value for {setting}") from None
        stage = stages[name]
        if setting in ("lr", "warmup_steps", "schedule"):
            optim = tuple(dataclasses.replace(o, **{setting: value}) for o in stage.optim)
            stages[name] = dataclasses.replace(stage, optim=optim)
        elif setting in ("fps", "variants"):
            data = dataclasses.replace(stage.data, **{setting: value})
            stages[name] = dataclasses.replace(stage, data=data)
        else:
            stages[name] = dataclasses.replace(stage, **{setting: value})
    return dataclasses.replace(recipe, stages=tuple(stages.values()))


def _decay(text: str) -> float | None:
    return None if text == "none" else float(text)


def _one_of(*words: str):  # noqa: ANN202 - a parser of text
    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return parse


_SETTINGS = {
    "steps": int,
    "batch": int,
    "seed": int,
    "lr": float,
    "warmup_steps": int,
    "schedule": _one_of("constant", "cosine"),
    "clip_norm": float,
    "ema_decay": _decay,
    "precision": _one_of("bf16", "fp32"),
    "fps": float,
    "variants": int,
}
