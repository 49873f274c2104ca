"""CogVideoX, 2B and 5B: one transformer over the text's and the video's tokens together.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X latent lines and
columns; L text positions, D their width, K scenes; S frames of the context, V U their lines and
columns, E width of the denoiser's tokens.

Source: Yang et al. 2024, arXiv 2408.06072.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.weights import Weights
from trainers.cogvideox_context import (
    ContextTransformer,
    Layout,
    from_scratch,
    in_space,
    move_to_space,
)
from trainers.diffusion import (
    Euler,
    Folder,
    Parts,
    RandomParts,
    check_text,
    flow_noised,
    near,
    noised,
    sampled,
    to_pixels,
    to_unit,
)
from trainers.lora import attention_projections
from trainers.scene_attention import SceneAttention, ScenePatchEmbed, plan_scenes
from trainers.vdm import VDM, Conditioning, Context, Facts, Noised, Variant
from trainers.windows import check_window


def facts(base: Weights, motion: Weights | None) -> Facts:
    """What `Backbone.facts` gives."""
    return _facts(_folder(base, motion))


def _folder(base: Weights, motion: Weights | None) -> Folder:
    if motion is not None:
        raise ValueError("CogVideoX is a video model by itself: give it no motion adapter")
    return Folder.of("CogVideoX", base, None)


def _facts(parts: Parts) -> Facts:
    parts.config("")
    transformer, vae, text = (parts.config(part) for part in ("transformer", "vae", "text_encoder"))
    parts.config("scheduler")
    for config, kind in (
        (transformer, "CogVideoXTransformer3DModel"),
        (vae, "AutoencoderKLCogVideoX"),
    ):
        if (found := config.get("_class_name")) != kind:
            raise ValueError(f"CogVideoX needs a {kind}, but the base holds a {found}")
    odd = [
        name
        for name in ("patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings")
        if transformer.get(name)
    ]
    if odd or transformer["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            "CogVideoX 2B or 5B for text alone is needed, but this is 1.5 or takes pictures: its"
            f" transformer has {', '.join(odd) or 'more channels than the VAE'}"
        )
    if text.get("d_model") != transformer["text_embed_dim"]:
        raise ValueError(
            f"the text encoder is {text.get('d_model')} wide, but the transformer takes"
            f" {transformer['text_embed_dim']}: they are of different models"
        )
    return Facts(
        text_dim=transformer["text_embed_dim"],
        text_len=transformer["max_text_seq_length"],
        any_text_len=bool(transformer.get("use_rotary_positional_embeddings")),
        frames_per_latent=int(vae["temporal_compression_ratio"]),
        pixels_per_latent=2 ** (len(vae["block_out_channels"]) - 1) * transformer["patch_size"],
        max_frames=None,
    )


class CogVideoX(VDM):
    """CogVideoX 2B (sine positions, text of at least one length) or 5B (rotary positions).

    Pictures are videos of one frame; `video` changes nothing. Several scenes go with neither a
    context nor windows.

    Args:
        base: Folder of a CogVideoX, or its hub id.
        motion: None.
        video: Pictures and videos are the same to it.
        device: Where it runs.
        dtype: Of frozen weights.
        variant: Of the transformer.
    """

    def __init__(
        self,
        base: Weights,
        motion: Weights | None = None,
        *,
        video: bool = True,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant = Variant(),  # noqa: B008 - frozen
    ):
        self._set(_folder(base, motion), video=video, device=device, dtype=dtype, variant=variant)

    @classmethod
    def random(
        cls,
        configs: Mapping[str, Mapping[str, Any]],
        *,
        video: bool = True,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant = Variant(),  # noqa: B008 - frozen
    ) -> Self:
        """The model of these shapes with random weights, made where they run: to measure speed."""
        made = cls.__new__(cls)
        variant = replace(variant, scratch=False)  # as these are
        made._set(RandomParts(configs), video=video, device=device, dtype=dtype, variant=variant)
        return made

    def _set(
        self,
        parts: Parts,
        *,
        video: bool,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant,
    ) -> None:
        self._parts, self.facts, self._config = parts, _facts(parts), parts.config("transformer")
        self.video, self.device, self.dtype = video, torch.device(device), dtype
        self.text_dim, self.text_len = self.facts.text_dim, self.facts.text_len
        _check_variant(variant, self.facts)
        self._variant, self._shift = variant, variant.shift or 1.0
        self._patch = 1 if variant.channels else self._config["patch_size"]
        self.width = None
        if variant.channels is None:
            self.width = self._config["num_attention_heads"] * self._config["attention_head_dim"]
        self._layout = Layout(self._config, variant, self.facts.frames_per_latent, self.device)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The transformer, as in its file but for the variant, and what scenes and context need."""
        from diffusers import CogVideoXTransformer3DModel

        where = self.device, self.dtype
        if self._variant.scratch:
            made: Any = from_scratch(self._config, *where)
        else:
            made = self._parts.load(CogVideoXTransformer3DModel, "transformer", *where)
        if self._variant.channels is not None:
            move_to_space(made, self._variant.channels)
        made.set_attn_processor(SceneAttention())
        # Weights and their names stay.
        made.__class__, made.patch_embed.__class__ = ContextTransformer, ScenePatchEmbed
        return made

    @cached_property
    def vae(self) -> Any:
        """Causal in time; samples one by one, to bound memory."""
        from diffusers import AutoencoderKLCogVideoX

        vae = self._parts.load(AutoencoderKLCogVideoX, "vae", self.device, self.dtype)
        vae.enable_slicing()
        return vae

    @cached_property
    def text_encoder(self) -> Any:
        """T5's encoder."""
        from transformers import T5EncoderModel

        return self._parts.load(T5EncoderModel, "text_encoder", self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the text encoder."""
        from transformers import T5Tokenizer

        return self._parts.tokenizer(T5Tokenizer)

    @cached_property
    def scheduler(self) -> Any:
        """The folder's noise schedule, sampled by DDIM; or a rectified flow's sampler."""
        if self._variant.flow:
            return Euler(self._shift)
        from diffusers import CogVideoXDDIMScheduler

        return CogVideoXDDIMScheduler.from_config(self._parts.config("scheduler"))

    def denoiser_config(self) -> dict[str, Any]:
        """What diffusers builds the transformer from, as JSON values."""
        if self._variant.channels is None:
            return dict(self._config)
        return in_space(self._config, self._variant.channels)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks."""
        transformer: Any = self.denoiser
        return list(transformer.transformer_blocks)

    @cached_property
    def lora_targets(self) -> Sequence[str]:
        """Of the joint attention."""
        return attention_projections(self.denoiser)

    def num_latent_frames(self, frames: int) -> int:
        """T of a video."""
        return (frames - 1) // self.facts.frames_per_latent + 1

    def latent_shape(self, frames: int, height_px: int, width_px: int) -> tuple[int, ...]:
        """(C, T, Y, X) of a video's latents."""
        side = self.facts.pixels_per_latent
        # The VAE decodes latent frames in pairs after the first, so their number is odd.
        pair = 2 * self.facts.frames_per_latent
        if frames < 1 or (frames - 1) % pair or height_px % side or width_px % side:
            nearest = 1 + max(0, round((frames - 1) / pair)) * pair
            raise ValueError(
                f"CogVideoX makes 1, {1 + pair}, {1 + 2 * pair}, … frames with sides of multiples"
                f" of {side} px, not {frames} of {height_px}x{width_px}: the nearest are {nearest}"
                f" of {near(height_px, width_px, side)}"
            )
        lines = side // self._config["patch_size"]
        return (
            self._config["in_channels"],
            self.num_latent_frames(frames),
            height_px // lines,
            width_px // lines,
        )

    @torch.no_grad()
    def encode(self, pixels_BFHW3: Tensor) -> Tensor:
        """Mean and standard deviation, (B, 2, C, T, Y, X)."""
        unit_B3FHW = to_unit(pixels_BFHW3.to(self.device), self.dtype).permute(0, 4, 1, 2, 3)
        posterior = self.vae.encode(unit_B3FHW).latent_dist
        moments = torch.stack([posterior.mean, posterior.std], 1).float()
        return moments * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents_BCTYX: Tensor) -> Tensor:
        """uint8 RGB (B, F, H, W, 3)."""
        scaled_BCTYX = latents_BCTYX.to(self.device).float() / self.vae.config.scaling_factor
        unit_B3FHW = self.vae.decode(scaled_BCTYX.to(self.dtype)).sample
        return to_pixels(unit_B3FHW).permute(0, 2, 3, 4, 1).contiguous()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """T5's last hidden states, padding included, (B, L, D) in float32.

        T5 attends to the padding, as in the pipeline: the model was trained so.
        """
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device))[0].float()

    def noised(self, latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor) -> Noised:
        """What the denoiser is given and what it should say, in float32."""
        if self._variant.flow:
            return flow_noised(latents_BCTYX, noise_BCTYX, at_B, self._shift)
        return noised(self.scheduler, latents_BCTYX, noise_BCTYX, at_B)

    def denoise(self, noisy_BCTYX: Tensor, timestep_B: Tensor, text: Conditioning) -> Tensor:
        """The transformer's prediction, (B, C, T, Y, X) in float32."""
        self._check(noisy_BCTYX, text)
        scenes, length = text.tokens_BKLD.shape[1:3]
        frames, lines, columns = noisy_BCTYX.shape[2:]
        grid = frames, lines // self._patch, columns // self._patch
        plan = None
        if scenes > 1:
            assert text.shares_BFK is not None
            shares_BTK = self._shares_of_latents(text.shares_BFK, frames)
            plan = plan_scenes(shares_BTK, length, grid[1] * grid[2], self.device)
        context, beside = text.context, {}
        if context is not None:
            beside = {
                "context_BNE": context.tokens_BSVUE.flatten(1, 3).to(self.device, self.dtype),
                "context_places": self._layout.places(grid, context),
            }
        said_BTCYX = self.denoiser(
            noisy_BCTYX.transpose(1, 2).to(self.dtype),
            text.tokens_BKLD.flatten(1, 2).to(self.device, self.dtype),
            timestep_B.to(self.device),
            image_rotary_emb=self._layout.rotary(grid, context),
            attention_kwargs=None if plan is None else {"plan": plan},
            windows=self._layout.windows(grid, context),
            **beside,
        ).sample
        return said_BTCYX.transpose(1, 2).float()

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
        """Latents (B, C, T, Y, X) by DDIM, or Euler's method for a flow, with guidance."""
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

    def _shares_of_latents(self, shares_BFK: Tensor, latent_frames: int) -> Tensor:
        """Means over the frames that each latent frame holds, (B, T, K)."""
        frames, each = shares_BFK.shape[1], self.facts.frames_per_latent
        if frames != (latent_frames - 1) * each + 1:
            raise ValueError(
                f"shares are of {frames} frames, but {latent_frames} latent frames hold"
                f" {(latent_frames - 1) * each + 1}"
            )
        first_B1K, rest_BFK = shares_BFK[:, :1], shares_BFK[:, 1:]
        return torch.cat([first_B1K, rest_BFK.unflatten(1, (-1, each)).mean(2)], 1)

    def _check(self, noisy_BCTYX: Tensor, text: Conditioning) -> None:
        """Raises ValueError where the transformer cannot take these."""
        check_text(text, self.text_dim)
        num, scenes, length = text.tokens_BKLD.shape[:3]
        if length < self.text_len and not self.facts.any_text_len:
            raise ValueError(
                f"this CogVideoX takes text of no less than {self.text_len} positions, not"
                f" {length}: fill it"
            )
        channels = self._variant.channels or self._config["in_channels"]
        if noisy_BCTYX.shape[1] != channels:
            raise ValueError(
                f"this CogVideoX denoises a space of {channels} channels, not of"
                f" {noisy_BCTYX.shape[1]}"
            )
        context = text.context
        if scenes > 1 and (context is not None or self._variant.window is not None):
            raise ValueError(
                f"CogVideoX takes {scenes} scenes with neither a context nor windows: give it one"
                " scene, or a model without them"
            )
        if context is None:
            return
        if self.width is None:
            raise ValueError("a CogVideoX of another space takes no context: leave it out")
        *found, width = context.tokens_BSVUE.shape
        if len(found) != 4 or (*found[:2], width) != (num, len(context.middles), self.width):
            raise ValueError(
                f"the context's tokens are {(*found, width)}, but {num} samples of"
                f" {len(context.middles)} frames of lines and columns of {self.width} are needed"
            )


def _check_variant(variant: Variant, facts: Facts) -> None:
    if variant.window is not None:
        if variant.channels is not None:
            raise ValueError(
                "windows are of the VAE's latent frames: leave out window, or channels"
            )
        check_window(variant.window, {"a latent frame": facts.frames_per_latent})
    if variant.channels is not None and variant.channels < 1:
        raise ValueError(f"a space has channels, at least 1, not {variant.channels}")
    if variant.shift is not None and not (variant.flow and variant.shift > 0):
        raise ValueError(
            f"a shift is of a rectified flow's times and above 0, but this is {variant.shift:g}"
            f" with flow={variant.flow}"
        )
