"""Mimir's recipes: the seven rows of its table 3; each number beside its source."""

from __future__ import annotations

from engine.weights import Weights, tiny_folder
from trainers.recipe import Models, Recipe, smaller, swapped
from trainers.system import Bucket, Data, Optim, TrainStage
from trainers.vdm import Backbone

NAMES = {
    "mimir": "Mimir on CogVideoX-5B, as the paper has it; row 7 of its table 3",
    "mimir_baseline": "its table 3, row 1: the text encoder alone",
    "mimir_decoder": "row 2: the LLM's tokens added as they are",
    "mimir_decoder_norm": "row 3: normalised and added",
    "mimir_decoder_norm_ss": "row 4: and the semantic stabilizer",
    "mimir_zeroconv": "row 5: through zero-convolutions",
    "mimir_zeroconv_ss": "row 6: and the semantic stabilizer",
}
"""Each recipe in a line."""

PHI = Weights(at="microsoft/Phi-3.5-mini-instruct")  # section 3.1
COGVIDEOX = Backbone(kind="cogvideox", base=Weights(at="zai-org/CogVideoX-5b"))
CLIP = Bucket(frames=49, height_px=480, width_px=720)  # as CogVideoX was trained: 8 frames/s
# 500,000 clips (section 3.1) once; the paper names no batch, rate or steps: ours
BATCH, STEPS = 64, 7_813
FUSER_LR, DENOISER_LR = 1e-4, 1e-5


def build(name: str, models: Models, *, tiny: bool) -> Recipe:
    """A recipe of this file, at full size or with small random models."""
    from trainers.fuser import ROWS
    from trainers.language import LanguageModel
    from trainers.mimir import Mimir

    lm, vdm = LanguageModel(weights=PHI), COGVIDEOX
    if tiny:
        at = tiny_folder()
        lm = LanguageModel(weights=Weights(at=str(at / "phi3")))
        vdm = Backbone(kind="cogvideox", base=Weights(at=str(at / "cogvideox_5b")))
    lm, vdm = swapped(models, lm, vdm)
    row = name.removeprefix("mimir_") if name != "mimir" else name
    denoiser = Optim(group="denoiser", lr=DENOISER_LR, warmup_steps=500)
    fuser = Optim(group="fuser", lr=FUSER_LR, warmup_steps=500)
    stage = TrainStage(
        name="fuse",
        data=Data(buckets=(CLIP,), table="clips", media=("video",)),
        optim=(denoiser,) if row == "baseline" else (fuser, denoiser),
        steps=STEPS,
        batch=BATCH,
    )
    if tiny:
        clips = tuple(Bucket(frames=9, height_px=48, width_px=w) for w in (48, 64))
        stage = smaller(stage, clips, steps=10)
    system = Mimir(
        lm=lm, vdm=vdm, prompt="caption", max_answer_tokens=24 if tiny else 226, **ROWS[row]
    )
    return Recipe(name=name, system=system, stages=(stage,))
