"""RISE-T2V's recipes and its baseline; each number beside its source."""

from __future__ import annotations

import dataclasses

from engine.weights import Weights, tiny_folder
from trainers.recipe import Models, Recipe, smaller, swapped
from trainers.system import Bucket, Data, Optim, TrainStage
from trainers.vdm import Backbone

NAMES = {
    "rise_animatediff": "RISE-T2V on AnimateDiff, as the paper has it",
    "rise_cogvideox": "RISE-T2V on CogVideoX-2B, of the paper's table 5",
    "rise_encoded": "its ablation of figure 6: encoded features in place of rephrasing features",
    "baseline_finetune": "AnimateDiff alone on the same videos, of table 6",
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


def build(name: str, models: Models, *, tiny: bool) -> Recipe:
    """A recipe of this file, at full size or with small random models."""
    from trainers.finetune import Finetune
    from trainers.language import LanguageModel
    from trainers.rise import Rise

    cog = name == "rise_cogvideox"
    lm, vdm = LanguageModel(weights=LLAMA), COGVIDEOX if cog else ANIMATEDIFF
    if tiny:
        lm, vdm = _tiny_models(cog=cog)
    lm, vdm = swapped(models, lm, vdm)
    stages = (_tiny_stages if tiny else _paper_stages)(cog=cog)
    rank = 4 if tiny else 128
    if name == "baseline_finetune":
        motion = dataclasses.replace(stages[-1], after=())
        return Recipe(name=name, system=Finetune(vdm=vdm, rank=rank), stages=(motion,))
    system = Rise(
        lm=lm,
        vdm=vdm,
        rank=rank,
        length=226 if cog else 256,
        feature="encoded" if name == "rise_encoded" else "rephrasing",
    )
    return Recipe(name=name, system=system, stages=stages)


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
    """The paper's stages on 48 px and a few steps, with an average, so that all code runs."""
    frames = 9 if cog else 8
    picture = Bucket(frames=1, height_px=48, width_px=48)
    clips = tuple(Bucket(frames=frames, height_px=48, width_px=w) for w in (48, 64))
    image, domain, motion = _paper_stages(cog=cog)

    return (
        smaller(image, (picture,), steps=20),
        smaller(domain, (picture,), steps=4),
        smaller(motion, clips, steps=10),
    )
