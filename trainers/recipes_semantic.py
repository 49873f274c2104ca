"""SemanticGen's recipes, its ablations and its baselines; each number beside its source."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from engine.weights import Weights, tiny_folder
from trainers.recipe import Models, Recipe, smaller, swapped_vdm
from trainers.system import Bucket, Data, Optim, TrainStage
from trainers.vdm import Backbone

if TYPE_CHECKING:
    from trainers.semantics import SemanticEncoder

NAMES = {
    "semanticgen": "SemanticGen on Wan 2.1 1.3B: 5 seconds",
    "semanticgen_long": "the same on 60 seconds, within shifted windows of 5 s",
    "semanticgen_cogvideox": "SemanticGen on CogVideoX-5B, with rectified flow",
    "semanticgen_vjepa2": "SemanticGen with V-JEPA 2 for the semantic encoder",
    "semanticgen_dim8": "its table 3: Qwen2.5-VL-3B, compressed to 8 channels",
    "semanticgen_dim64": "its table 3: to 64 channels",
    "semanticgen_uncompressed": "its table 3: all 2048 channels",
    "semanticgen_scratch": "its figure 9: both generators from scratch",
    "semanticgen_vae": "its figure 9: the same in a compressed VAE space",
    "base_ct": "its baseline: the video model trained on without semantics",
    "base_ct_swin": "its baseline of long video: the same within shifted windows",
}
"""Each recipe in a line."""

# The paper's base model is internal: Wan is open, a rectified flow, with attention to text apart.
WAN = Backbone(kind="wan", base=Weights(at="Wan-AI/Wan2.1-T2V-1.3B-Diffusers"))
COGVIDEOX = Backbone(kind="cogvideox", base=Weights(at="zai-org/CogVideoX-5b"))
# "the vision tower of Qwen2.5-VL-72B-Instruct"; in 4.3 that of the 3B
QWEN_72B, QWEN_3B = (Weights(at=f"Qwen/Qwen2.5-VL-{n}B-Instruct") for n in (72, 3))
VJEPA2 = Weights(at="facebook/vjepa2-vitl-fpc64-256")
FPS, SEMANTIC_FPS = 24.0, 1.6  # section 4.1
# 480p (section 1); the paper names no length of its short videos
SHORT = (Bucket(frames=121, height_px=480, width_px=832),)
# "splitting films and series into 60 s"; at 24 frames/s those have 1,440 frames, one too few
LONG = tuple(Bucket(frames=n, height_px=480, width_px=832) for n in (1441, 1381))
WINDOW_S = 5.0  # T_w has no number in the paper: the shortest that holds whole frames of both rates
LATENT_STEPS, PLAN_STEPS = 10_000, 50_000  # section 4.3, of the ablations
SCRATCH_STEPS = 10_000  # section 4.3, both of figure 9
BATCH = 64  # this and the rates: ours
LR, SCRATCH_LR, FIT_LR = 5e-5, 2e-4, 1e-2
EMA = 0.9995  # as RAE has it

_CHANNELS = {"semanticgen_dim64": 64, "semanticgen_uncompressed": None}
_SCRATCH = ("semanticgen_scratch", "semanticgen_vae")
_OF_3B = ("semanticgen_dim8", *_CHANNELS, *_SCRATCH)


def build(name: str, models: Models, *, tiny: bool) -> Recipe:
    """A recipe of this file, at full size or with small random models."""
    cog, swin = name == "semanticgen_cogvideox", name in ("semanticgen_long", "base_ct_swin")
    at = tiny_folder()
    vdm = COGVIDEOX if cog else WAN
    if tiny:
        vdm = Backbone(kind=vdm.kind, base=Weights(at=str(at / ("cogvideox_5b" if cog else "wan"))))
    vdm = swapped_vdm(models, vdm)
    window_s = (1.0 if tiny else WINDOW_S) if swin else None
    latents, semantics = _stages(LONG if swin else SHORT, scratch=name in _SCRATCH)
    if tiny:
        frames = 17 if swin else 9
        buckets = tuple(Bucket(frames=frames, height_px=48, width_px=w) for w in (48, 64))
        latents, semantics = (
            smaller(stage, buckets, steps=10, fps=8.0) for stage in (latents, semantics)
        )
    if name.startswith("base_ct"):
        from trainers.finetune import Finetune

        alone = dataclasses.replace(latents, optim=latents.optim[:1])
        system = Finetune(vdm=vdm, tuning="full", window_s=window_s)
        return Recipe(name=name, system=system, stages=(alone,))
    from trainers.semantic import SemanticGen

    channels = _CHANNELS.get(name, 8)
    return Recipe(
        name=name,
        system=SemanticGen(
            vdm=vdm,
            encoder=_encoder(name, vdm, models, tiny=tiny),
            channels=min(channels, 16) if tiny and channels else channels,
            window_s=window_s,
            scratch=name in _SCRATCH,
        ),
        stages=(latents, semantics),
    )


def _encoder(name: str, vdm: Backbone, models: Models, *, tiny: bool) -> SemanticEncoder:
    from trainers.semantics import SemanticEncoder

    kind, weights = "qwen2_5_vl", QWEN_3B if name in _OF_3B else QWEN_72B
    if name == "semanticgen_vae":
        return SemanticEncoder(kind="vae", weights=vdm.base, fps=4.0 if tiny else SEMANTIC_FPS)
    if name == "semanticgen_vjepa2":
        kind, weights = "vjepa2", VJEPA2
    if tiny:
        weights = Weights(at=str(tiny_folder() / kind))
    if models.semantic_encoder:
        weights = Weights(at=models.semantic_encoder)
    return SemanticEncoder(kind=kind, weights=weights, fps=4.0 if tiny else SEMANTIC_FPS)


def _stages(buckets: tuple[Bucket, ...], *, scratch: bool) -> tuple[TrainStage, TrainStage]:
    data = Data(buckets=buckets, table="clips", media=("video",), fps=FPS)
    lr = SCRATCH_LR if scratch else LR
    denoiser = Optim(group="denoiser", lr=lr, warmup_steps=500)
    latents = TrainStage(
        name="latents",
        data=data,
        optim=(
            denoiser,
            Optim(group="semantic", lr=SCRATCH_LR, warmup_steps=500),
            Optim(group="whitening", lr=FIT_LR, weight_decay=0.0),
        ),
        steps=SCRATCH_STEPS if scratch else LATENT_STEPS,
        batch=BATCH,
        ema_decay=EMA,
    )
    semantics = TrainStage(
        name="semantics",
        data=data,
        optim=(denoiser,),
        steps=SCRATCH_STEPS if scratch else PLAN_STEPS,
        batch=BATCH,
        after=("latents",),
        ema_decay=EMA,
    )
    return latents, semantics
