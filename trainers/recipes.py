"""What there is to train, by name: each number beside its source."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.weights import Weights, make_missing, tiny_folder
from trainers.system import Bucket, Data, Optim, System, TrainStage
from trainers.vdm import Backbone


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
    """Stable Diffusion 1.5 (or a model made from it) for AnimateDiff; CogVideoX."""
    motion_modules: str | None = None
    """AnimateDiff's motion adapter."""


NAMES = {
    "rise_animatediff": "RISE-T2V on AnimateDiff, as the paper has it",
    "rise_cogvideox": "RISE-T2V on CogVideoX-2B, of the paper's table 5",
    "rise_encoded": "its ablation of figure 6: encoded features in place of rephrasing features",
    "baseline_finetune": "AnimateDiff alone on the same videos, of table 6",
    "tiny_rise_animatediff": "rise_animatediff on small random models; runs anywhere",
    "tiny_rise_cogvideox": "rise_cogvideox on small random models",
    "tiny_baseline_finetune": "baseline_finetune on small random models",
}
"""Each recipe in a line."""

# "LLaMA2-Chat 7B"; "Stable Diffusion with the Civitai checkpoint 4201", which stands in for 1.5
LLAMA = Weights(at="meta-llama/Llama-2-7b-chat-hf")
ANIMATEDIFF = Backbone(
    kind="animatediff",
    base=Weights(at="stable-diffusion-v1-5/stable-diffusion-v1-5"),
    motion=Weights(at="guoyww/animatediff-motion-adapter-v1-5-3"),
)
COGVIDEOX = Backbone(kind="cogvideox", base=Weights(at="zai-org/CogVideoX-2b"))

# "All content is processed at 512 resolution, with video clips having 16 frames."
PICTURE, CLIP = (Bucket(frames=n, height_px=512, width_px=512) for n in (1, 16))
# CogVideoX: 49 frames at 8 a second, 480 x 720
COG_PICTURE, COG_CLIP = (Bucket(frames=n, height_px=480, width_px=720) for n in (1, 49))
IMAGE_LR, MOTION_LR = 5e-5, 1e-4  # appendix, Implementation Details; AdamW, weight decay 0.01
# 12 million pictures and 1 million videos once; the paper names neither batch nor steps
IMAGE_BATCH, IMAGE_STEPS = 256, 46_875
DOMAIN_STEPS = 2_000
MOTION_BATCH, MOTION_STEPS = 64, 15_625


def recipe(name: str, models: Models | None = None) -> Recipe:
    """A recipe with the models that are named in place of its own.

    Raises:
        ValueError: There is none of this name.
    """
    from trainers.finetune import Finetune
    from trainers.language import LanguageModel
    from trainers.rise import Rise

    models = models or Models()
    if name not in NAMES:
        raise ValueError(f"there is no recipe {name!r}: choose one of {', '.join(NAMES)}")
    tiny = name.startswith("tiny_")
    kind = name.removeprefix("tiny_")
    lm = LanguageModel(weights=LLAMA)
    cog = kind == "rise_cogvideox"
    vdm = COGVIDEOX if cog else ANIMATEDIFF
    if tiny:
        lm, vdm = _tiny_models(cog=cog)
    if models.llm or models.prompt_format:
        weights = Weights(at=models.llm) if models.llm else lm.weights
        lm = dataclasses.replace(
            lm, weights=weights, prompt_format=models.prompt_format or lm.prompt_format
        )
    if models.video_model:
        vdm = dataclasses.replace(vdm, base=Weights(at=models.video_model))
    if models.motion_modules:
        vdm = dataclasses.replace(vdm, motion=Weights(at=models.motion_modules))
    stages = (_tiny_stages if tiny else _paper_stages)(cog=cog)
    rank = 4 if tiny else 128
    if kind == "baseline_finetune":
        motion = dataclasses.replace(stages[-1], after=())
        return Recipe(name=name, system=Finetune(vdm=vdm, rank=rank), stages=(motion,))
    system = Rise(
        lm=lm,
        vdm=vdm,
        rank=rank,
        length=226 if cog else 256,
        feature="encoded" if kind == "rise_encoded" else "rephrasing",
    )
    return Recipe(name=name, system=system, stages=stages)


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


def make_tiny(folder: Path | None = None) -> None:
    """Builds the small random checkpoints that are missing."""
    from transformers.utils.logging import disable_progress_bar

    from trainers.tiny_llm import build_llm
    from trainers.tiny_vdm import build_animatediff, build_cogvideox

    disable_progress_bar()
    make_missing(
        folder or tiny_folder(),
        {
            "llama": lambda at: build_llm(at, "llama"),
            "animatediff": build_animatediff,
            "cogvideox": lambda at: build_cogvideox(at, rotary=False),
        },
    )


def _tiny_models(*, cog: bool) -> tuple:
    from trainers.language import LanguageModel

    at = tiny_folder()
    lm = LanguageModel(weights=Weights(at=str(at / "llama")))
    if cog:
        return lm, Backbone(kind="cogvideox", base=Weights(at=str(at / "cogvideox")))
    base, motion = (Weights(at=str(at / "animatediff" / n)) for n in ("sd", "motion"))
    return lm, Backbone(kind="animatediff", base=base, motion=motion)


def _paper_stages(*, cog: bool) -> tuple[TrainStage, ...]:
    picture, clip = (COG_PICTURE, COG_CLIP) if cog else (PICTURE, CLIP)
    pictures = Data(buckets=(picture,), media=("image", "video"))
    frames = Data(buckets=(picture,), media=("video",), variants=4)
    videos = Data(buckets=(clip,), media=("video",))
    return (
        TrainStage(
            name="image",
            data=pictures,
            optim=(Optim(group="adapter", lr=IMAGE_LR), Optim(group="lora", lr=IMAGE_LR)),
            steps=IMAGE_STEPS,
            batch=IMAGE_BATCH,
        ),
        TrainStage(
            name="domain",
            data=frames,
            optim=(Optim(group="adapter", lr=IMAGE_LR),),
            steps=DOMAIN_STEPS,
            batch=IMAGE_BATCH,
            after=("image",),
        ),
        TrainStage(
            name="motion",
            data=videos,
            optim=(Optim(group="lora", lr=MOTION_LR),),
            steps=MOTION_STEPS,
            batch=MOTION_BATCH,
            after=("image", "domain"),
        ),
    )


def _tiny_stages(*, cog: bool) -> tuple[TrainStage, ...]:
    """The paper's stages on 64 px and a few steps, with an average, so that all code runs."""
    frames = 9 if cog else 8
    picture = Bucket(frames=1, height_px=64, width_px=64)
    clips = tuple(Bucket(frames=frames, height_px=64, width_px=w) for w in (64, 96))
    image, domain, motion = _paper_stages(cog=cog)

    def small(stage: TrainStage, buckets: tuple[Bucket, ...], steps: int) -> TrainStage:
        return dataclasses.replace(
            stage,
            data=dataclasses.replace(stage.data, buckets=buckets),
            optim=tuple(dataclasses.replace(o, lr=1e-3, warmup_steps=2) for o in stage.optim),
            steps=steps,
            batch=4,
            precision="fp32",
            ema_decay=0.9,
        )

    return small(image, (picture,), 20), small(domain, (picture,), 4), small(motion, clips, 10)


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
