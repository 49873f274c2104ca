"""AnimateDiff: Stable Diffusion, and with motion modules between its layers a video model.

Pictures and videos have the same latents, text and spatial layers, so LoRA trained on the one fits
the other; they differ in their noise schedule. Frames are encoded each by itself: T is F.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X latent lines and
columns; L text positions, D their width, K scenes.

Source: Guo et al. 2023, arXiv 2307.04725; its public training code for the schedules.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.weights import Weights
from trainers.diffusion import (
    Folder,
    Parts,
    RandomParts,
    check_text,
    frozen,
    near,
    noised,
    sampled,
    to_pixels,
    to_unit,
)
from trainers.lora import attention_projections
from trainers.vdm import VDM, Conditioning, Context, Facts, Noised, Variant

_FRAMES_AT_ONCE = 16
_VIDEO_SCHEDULE = {
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "steps_offset": 1,
}


def facts(base: Weights, motion: Weights | None) -> Facts:
    """What `Backbone.facts` gives."""
    return _facts(Folder.of("Stable Diffusion for AnimateDiff", base, motion), video=True)


def _facts(parts: Parts, *, video: bool) -> Facts:
    parts.config("")
    unet, vae, text = (parts.config(part) for part in ("unet", "vae", "text_encoder"))
    parts.config("scheduler")
    for config, kind in ((unet, "UNet2DConditionModel"), (vae, "AutoencoderKL")):
        if (found := config.get("_class_name")) != kind:
            raise ValueError(f"AnimateDiff needs a {kind}, but the base holds a {found}")
    if unet.get("addition_embed_type") or unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            "AnimateDiff needs Stable Diffusion 1 or 2 made for text alone, but the UNet takes more"
        )
    if text.get("hidden_size") != unet["cross_attention_dim"]:
        raise ValueError(
            f"the text encoder is {text.get('hidden_size')} wide, but the UNet takes"
            f" {unet['cross_attention_dim']}: they are of different models"
        )
    longest = _longest(parts.config("motion"), unet) if video else None
    return Facts(
        text_dim=unet["cross_attention_dim"],
        text_len=text["max_position_embeddings"],
        any_text_len=True,
        frames_per_latent=1,
        pixels_per_latent=2 ** (len(vae["block_out_channels"]) - 1),
        max_frames=longest,
    )


def _longest(motion: Mapping[str, Any], unet: Mapping[str, Any]) -> int:
    if (found := motion.get("_class_name")) != "MotionAdapter":
        raise ValueError(
            f"AnimateDiff needs a MotionAdapter, but the motion folder holds a {found}"
        )
    if motion.get("conv_in_channels"):
        raise ValueError("AnimateDiff needs a motion adapter for text alone, but it is PIA's")
    own, wanted = list(motion["block_out_channels"]), list(unet["block_out_channels"])
    layers, wanted_layers = motion["motion_layers_per_block"], unet["layers_per_block"]
    if own != wanted or layers != wanted_layers:
        raise ValueError(
            f"the motion adapter is for blocks of {own} channels with {layers} layers, but the UNet"
            f" has {wanted} with {wanted_layers}"
        )
    return motion["motion_max_seq_length"]


class AnimateDiff(VDM):
    """Stable Diffusion's UNet, with motion modules or without.

    Args:
        base: Folder of a Stable Diffusion 1 or 2, or its hub id.
        motion: Motion adapter; not needed for pictures.
        video: Without it the denoiser is the plain UNet, and several frames are so many pictures.
        device: Where it runs.
        dtype: Of frozen weights.
    """

    def __init__(
        self,
        base: Weights,
        motion: Weights | None,
        *,
        video: bool,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant = Variant(),  # noqa: B008 - frozen
    ):
        if variant != Variant():
            raise ValueError(
                "AnimateDiff takes no context, no windows and no other space: name a Wan or a"
                " CogVideoX as the video model"
            )
        parts = Folder.of("Stable Diffusion for AnimateDiff", base, motion)
        self._set(parts, video=video, device=device, dtype=dtype)

    @classmethod
    def random(
        cls,
        configs: Mapping[str, Mapping[str, Any]],
        *,
        video: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """The model of these shapes with random weights, made where they run: to measure speed."""
        made = cls.__new__(cls)
        made._set(RandomParts(configs), video=video, device=device, dtype=dtype)
        return made

    def _set(self, parts: Parts, *, video: bool, device: torch.device, dtype: torch.dtype) -> None:
        self._parts, self.facts = parts, _facts(parts, video=video)
        self._channels = parts.config("unet")["in_channels"]
        self.video, self.device, self.dtype = video, torch.device(device), dtype
        self.text_dim, self.text_len = self.facts.text_dim, self.facts.text_len

    @cached_property
    def denoiser(self) -> nn.Module:
        """The UNet."""
        from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

        unet = self._parts.load(UNet2DConditionModel, "unet", self.device, self.dtype)
        if not self.video:
            return unet
        motion = self._parts.load(MotionAdapter, "motion", self.device, self.dtype)
        log = logging.getLogger("diffusers.models.modeling_utils")
        level = log.level
        log.setLevel(logging.ERROR)  # it warns of modules to be kept in float32, of which none is
        try:
            with torch.device(self.device):
                return frozen(UNetMotionModel.from_unet2d(unet, motion), self.device)
        finally:
            log.setLevel(level)

    @cached_property
    def vae(self) -> Any:
        """Of single frames."""
        from diffusers import AutoencoderKL

        return self._parts.load(AutoencoderKL, "vae", self.device, self.dtype)

    @cached_property
    def text_encoder(self) -> Any:
        """CLIP's."""
        from transformers import CLIPTextModel

        return self._parts.load(CLIPTextModel, "text_encoder", self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the text encoder."""
        from transformers import CLIPTokenizer

        return self._parts.tokenizer(CLIPTokenizer)

    @cached_property
    def scheduler(self) -> Any:
        """The noise schedule: the folder's for pictures, AnimateDiff's for video."""
        from diffusers import DDIMScheduler

        own = {"clip_sample": False} | (_VIDEO_SCHEDULE if self.video else {})
        return DDIMScheduler.from_config(self._parts.config("scheduler") | own)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Down, middle, up."""
        unet: Any = self.denoiser
        return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]

    @cached_property
    def lora_targets(self) -> Sequence[str]:
        """The same for pictures and video."""
        return attention_projections(self.denoiser)

    @cached_property
    def motion_lora_targets(self) -> Sequence[str]:
        """Attention projections of the motion modules, for an adapter of their own."""
        return attention_projections(self.denoiser, motion=True)

    def num_latent_frames(self, frames: int) -> int:
        """T of a video."""
        return frames

    def denoiser_config(self) -> dict[str, Any]:
        """As JSON values."""
        config = {n: v for n, v in dict(self.denoiser.config).items() if not n.startswith("_")}
        return {"_class_name": type(self.denoiser).__name__} | json.loads(json.dumps(config))

    def latent_shape(self, frames: int, height_px: int, width_px: int) -> tuple[int, ...]:
        """(C, T, Y, X) of a video's latents."""
        side, longest = self.facts.pixels_per_latent, self.facts.max_frames or max(frames, 1)
        if height_px % side or width_px % side or not 0 < frames <= longest:
            nearest = f"{min(max(frames, 1), longest)} of {near(height_px, width_px, side)}"
            raise ValueError(
                f"AnimateDiff makes at most {longest} frames with sides of multiples of {side} px,"
                f" not {frames} of {height_px}x{width_px}: the nearest are {nearest}"
            )
        return self._channels, frames, height_px // side, width_px // side

    @torch.no_grad()
    def encode(self, pixels_BFHW3: Tensor) -> Tensor:
        """Mean and standard deviation, (B, 2, C, T, Y, X)."""
        num, frames = pixels_BFHW3.shape[:2]
        found = []
        for pixels_N3HW in pixels_BFHW3.flatten(0, 1).permute(0, 3, 1, 2).split(_FRAMES_AT_ONCE):
            unit_N3HW = to_unit(pixels_N3HW.to(self.device), self.dtype)
            posterior = self.vae.encode(unit_N3HW).latent_dist
            found.append(torch.stack([posterior.mean, posterior.std], 1).float())
        moments = torch.cat(found).unflatten(0, (num, frames)).permute(0, 2, 3, 1, 4, 5)
        return moments.contiguous() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents_BCTYX: Tensor) -> Tensor:
        """uint8 RGB (B, F, H, W, 3)."""
        num, _, frames = latents_BCTYX.shape[:3]
        scaled_BCTYX = latents_BCTYX.to(self.device).float() / self.vae.config.scaling_factor
        latents_NCYX = scaled_BCTYX.transpose(1, 2).flatten(0, 1).to(self.dtype)
        found = [to_pixels(self.vae.decode(n).sample) for n in latents_NCYX.split(_FRAMES_AT_ONCE)]
        return torch.cat(found).unflatten(0, (num, frames)).permute(0, 1, 3, 4, 2).contiguous()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """CLIP's last hidden states, (B, L, D) in float32."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask if masked else None
        return self.text_encoder(tokens.input_ids, attention_mask=mask)[0].float()

    def noised(self, latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor) -> Noised:
        """What the denoiser is given and what it should say, in float32."""
        return noised(self.scheduler, latents_BCTYX, noise_BCTYX, at_B)

    def denoise(self, noisy_BCTYX: Tensor, timestep_B: Tensor, text: Conditioning) -> Tensor:
        """The UNet's prediction, (B, C, T, Y, X) in float32."""
        check_text(text, self.text_dim)
        num, _, frames = noisy_BCTYX.shape[:3]
        text_NLD = _text_of_frames(text, frames).to(self.device, self.dtype)
        noisy_BCTYX, timestep_B = noisy_BCTYX.to(self.dtype), timestep_B.to(self.device)
        if self.video:
            return self.denoiser(noisy_BCTYX, timestep_B, text_NLD).sample.float()
        noisy_NCYX = noisy_BCTYX.transpose(1, 2).flatten(0, 1)
        said_NCYX = self.denoiser(noisy_NCYX, timestep_B.repeat_interleave(frames), text_NLD).sample
        return said_NCYX.unflatten(0, (num, frames)).transpose(1, 2).float()

    def generate(
        self,
        text: Conditioning,
        null_LD: Tensor,
        noise_BCTYX: Tensor,
        *,
        steps: int,
        guidance_scale: float,
        null_context: Context | None = None,
        progress: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Latents (B, C, T, Y, X) by DDIM with classifier-free guidance."""
        return sampled(
            self.denoise,
            self.scheduler,
            text,
            null_LD,
            noise_BCTYX.to(self.device),
            steps=steps,
            guidance_scale=guidance_scale,
            null_context=null_context,
            progress=progress,
        )


def _text_of_frames(text: Conditioning, frames: int) -> Tensor:
    """The text of each frame, mixed from its scenes' as they share it: (B*F, L, D)."""
    tokens_BKLD, shares_BFK = text.tokens_BKLD, text.shares_BFK
    if tokens_BKLD.shape[1] == 1:
        return tokens_BKLD[:, 0].repeat_interleave(frames, 0)
    assert shares_BFK is not None
    if shares_BFK.shape[1] != frames:
        raise ValueError(f"shares are of {shares_BFK.shape[1]} frames, but the video has {frames}")
    shares_BFK = shares_BFK.to(tokens_BKLD)
    # Not einsum: autocast would mix the scenes in bfloat16.
    mixed_BFLD = sum(
        share_BF[:, :, None, None] * tokens_BLD[:, None]
        for share_BF, tokens_BLD in zip(shares_BFK.unbind(2), tokens_BKLD.unbind(1), strict=True)
    )
    return mixed_BFLD.flatten(0, 1)
