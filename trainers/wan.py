"""Wan 2.1 for text: a transformer over a video's tokens that attends to the text apart.

Beside the video's tokens it takes those of a context, at places of their own in space and time, and
its self-attention may be in windows of time.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X latent lines and
columns; L text positions, D their width, K scenes; S frames of the context, V U their lines and
columns, M tokens of all of it, E their width.

Source: Wan Team 2025, arXiv 2503.20314.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Self

import torch
from torch import Tensor, nn

from engine.weights import Weights
from trainers.context_wan import (
    ContextWan,
    Grid,
    WindowAttention,
    of_space,
    respace,
    rotary,
)
from trainers.diffusion import (
    Euler,
    Folder,
    Parts,
    RandomParts,
    check_text,
    flow_noised,
    frozen,
    near,
    sampled,
    seeded,
    to_pixels,
    to_unit,
)
from trainers.lora import attention_projections
from trainers.places import latent_time, spread, windows_of_layers
from trainers.vdm import VDM, Conditioning, Context, Facts, Noised, Variant
from trainers.windows import Windows, check_window

TEXT_LEN = 512
"""Positions of the text that the published models were trained with."""


def facts(base: Weights, motion: Weights | None) -> Facts:
    """What `Backbone.facts` gives."""
    return _facts(_folder(base, motion))


def _folder(base: Weights, motion: Weights | None) -> Folder:
    if motion is not None:
        raise ValueError("Wan is a video model by itself: give it no motion adapter")
    return Folder.of("Wan", base, None)


def _facts(parts: Parts) -> Facts:
    index = parts.config("")
    transformer, vae, text = (parts.config(part) for part in ("transformer", "vae", "text_encoder"))
    parts.config("scheduler")
    for config, kind in ((transformer, "WanTransformer3DModel"), (vae, "AutoencoderKLWan")):
        if (found := config.get("_class_name")) != kind:
            raise ValueError(f"Wan needs a {kind}, but the base holds a {found}")
    deep, high, wide = transformer["patch_size"]
    doublings = vae["temperal_downsample"]
    channels = {transformer["in_channels"], transformer["out_channels"], vae["z_dim"]}
    odd = [
        *(name for name in ("image_dim", "added_kv_proj_dim") if transformer.get(name)),
        *(name for name in ("boundary_ratio", "expand_timesteps") if index.get(name)),
        *(name for name in ("is_residual", "patch_size") if vae.get(name)),
        *(["more channels than the VAE"] if len(channels) > 1 else []),
        *([f"patches of {deep}x{high}x{wide}"] if deep != 1 or high != wide else []),
        *([f"a VAE of {2 ** sum(doublings)} frames a latent"] if sum(doublings) != 2 else []),
    ]
    if odd:
        raise ValueError(
            "Wan 2.1 for text alone is needed, but this is 2.2 or takes pictures: it has"
            f" {', '.join(odd)}"
        )
    if text.get("d_model") != transformer["text_dim"]:
        raise ValueError(
            f"the text encoder is {text.get('d_model')} wide, but the transformer takes"
            f" {transformer['text_dim']}: they are of different models"
        )
    return Facts(
        text_dim=transformer["text_dim"],
        text_len=TEXT_LEN,
        any_text_len=True,
        frames_per_latent=2 ** sum(doublings),
        pixels_per_latent=2 ** len(doublings) * high,
        max_frames=None,
    )


class Wan(VDM):
    """Wan 2.1 for text, 1.3B or 14B: a rectified flow.

    Pictures are videos of one frame; `video` changes nothing. With `variant.channels` the denoiser
    takes (B, channels, frames, lines, columns) of any sizes; VAE and `latent_shape` stay as they
    are.

    Args:
        base: Folder of a Wan in diffusers' layout, or its hub id.
        motion: None.
        video: Pictures and videos are the same to it.
        device: Where it runs.
        dtype: Of frozen weights; as in diffusers some small ones stay in float32.
        variant: Of the denoiser; `flow` says nothing that it is not.
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
        self._set(_folder(base, motion), variant, video=video, device=device, dtype=dtype)

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
        made._set(RandomParts(configs), variant, video=video, device=device, dtype=dtype)
        return made

    def _set(
        self,
        parts: Parts,
        variant: Variant,
        *,
        video: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._parts, self._variant, self.facts = parts, variant, _facts(parts)
        self.video, self.device, self.dtype = video, torch.device(device), dtype
        self.text_dim, self.text_len = self.facts.text_dim, self.facts.text_len
        self._config = parts.config("transformer")
        if variant.channels is None:
            self.width = self._config["num_attention_heads"] * self._config["attention_head_dim"]
        else:
            self._config.update(of_space(variant.channels))
        if variant.window is not None:
            if variant.channels is not None:
                raise ValueError(
                    f"a window of {variant.window} frames is of the VAE's space, but the denoiser"
                    f" is of another of {variant.channels} channels: give it no window"
                )
            check_window(variant.window, {"the VAE": self.facts.frames_per_latent})
        self._windows_of = lru_cache(maxsize=16)(self._plan)

    @cached_property
    def denoiser(self) -> nn.Module:
        """The transformer, as in its file but for its variant."""
        if self._variant.scratch:
            with seeded():
                made = ContextWan.from_config(self._parts.config("transformer"))
            kept = set(ContextWan._keep_in_fp32_modules)  # from_pretrained goes by it too
            for name, parameter in made.named_parameters():
                if kept.isdisjoint(name.split(".")):
                    parameter.data = parameter.data.to(self.dtype)
            made = frozen(made, self.device)
        else:
            made = self._parts.load(ContextWan, "transformer", self.device, self.dtype)
        if self._variant.channels is not None:
            respace(made, self._variant.channels)
        if self._variant.window is not None:
            for block in made.blocks:
                block.attn1.set_processor(WindowAttention())
        return made

    def denoiser_config(self) -> dict[str, Any]:
        """What diffusers builds the denoiser from, as JSON values."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in self._config.items()}

    @cached_property
    def vae(self) -> Any:
        """Causal in time and frame after frame; samples one by one, to bound memory."""
        from diffusers import AutoencoderKLWan

        vae = self._parts.load(AutoencoderKLWan, "vae", self.device, self.dtype)
        vae.enable_slicing()
        return vae

    @cached_property
    def text_encoder(self) -> Any:
        """UMT5's encoder."""
        from transformers import UMT5EncoderModel

        return self._parts.load(UMT5EncoderModel, "text_encoder", self.device, self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the text encoder."""
        from transformers import T5Tokenizer

        return self._parts.tokenizer(T5Tokenizer)

    @cached_property
    def shift(self) -> float:
        """Of the flow's times, in training and in generation."""
        if self._variant.shift is not None:
            return self._variant.shift
        scheduler = self._parts.config("scheduler")
        return float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks."""
        transformer: Any = self.denoiser
        return list(transformer.blocks)

    @cached_property
    def lora_targets(self) -> Sequence[str]:
        """Of self- and cross-attention."""
        return attention_projections(self.denoiser)

    def num_latent_frames(self, frames: int) -> int:
        """T of a video."""
        return (frames - 1) // self.facts.frames_per_latent + 1

    def latent_shape(self, frames: int, height_px: int, width_px: int) -> tuple[int, ...]:
        """(C, T, Y, X) of a video's latents."""
        side, each = self.facts.pixels_per_latent, self.facts.frames_per_latent
        if frames < 1 or (frames - 1) % each or height_px % side or width_px % side:
            nearest = 1 + max(0, round((frames - 1) / each)) * each
            raise ValueError(
                f"Wan makes 1, {1 + each}, {1 + 2 * each}, … frames with sides of multiples of"
                f" {side} px, not {frames} of {height_px}x{width_px}: the nearest are {nearest} of"
                f" {near(height_px, width_px, side)}"
            )
        vae = self._parts.config("vae")
        lines = 2 ** len(vae["temperal_downsample"])
        return vae["z_dim"], self.num_latent_frames(frames), height_px // lines, width_px // lines

    @torch.no_grad()
    def encode(self, pixels_BFHW3: Tensor) -> Tensor:
        """Mean and standard deviation, (B, 2, C, T, Y, X)."""
        unit_B3FHW = to_unit(pixels_BFHW3.to(self.device), self.dtype).permute(0, 4, 1, 2, 3)
        posterior = self.vae.encode(unit_B3FHW).latent_dist
        mean, deviation = self._latent_scale()
        return torch.stack(
            [(posterior.mean.float() - mean) / deviation, posterior.std.float() / deviation], 1
        )

    @torch.no_grad()
    def decode(self, latents_BCTYX: Tensor) -> Tensor:
        """uint8 RGB (B, F, H, W, 3)."""
        mean, deviation = self._latent_scale()
        scaled_BCTYX = latents_BCTYX.to(self.device).float() * deviation + mean
        unit_B3FHW = self.vae.decode(scaled_BCTYX.to(self.dtype)).sample
        return to_pixels(unit_B3FHW).permute(0, 2, 3, 4, 1).contiguous()

    def _latent_scale(self) -> tuple[Tensor, Tensor]:
        """What the VAE's latents have for mean and standard deviation, (C, 1, 1, 1)."""
        config = self.vae.config
        mean, deviation = (
            torch.tensor(values, device=self.device)[:, None, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """UMT5's last hidden states, zero behind the text, (B, L, D) in float32."""
        tokens = self.tokenizer(
            [_cleaned(text) for text in texts],
            padding="max_length",
            max_length=self.text_len,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        ids_BL, mask_BL = (x.to(self.device) for x in (tokens.input_ids, tokens.attention_mask))
        states_BLD = self.text_encoder(ids_BL, mask_BL).last_hidden_state.float()
        return states_BLD.masked_fill(mask_BL[:, :, None] == 0, 0)

    def noised(self, latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor) -> Noised:
        """What the denoiser is given and what it should say, in float32."""
        return flow_noised(latents_BCTYX, noise_BCTYX, at_B, self.shift)

    def denoise(self, noisy_BCTYX: Tensor, timestep_B: Tensor, text: Conditioning) -> Tensor:
        """The transformer's prediction, (B, C, T, Y, X) in float32."""
        self._check(noisy_BCTYX, text)
        patch = self._config["patch_size"][1]
        frames, lines, columns = noisy_BCTYX.shape[2], *(n // patch for n in noisy_BCTYX.shape[3:])
        grids: list[Grid] = [(range(frames), range(lines), range(columns))]
        context, context_BME = text.context, None
        if context is not None:
            _, _, high, wide, _ = context.tokens_BSVUE.shape
            each = self.facts.frames_per_latent
            times = [latent_time(middle, each) for middle in context.middles]
            grids.append((times, spread(high, lines), spread(wide, columns)))
            context_BME = context.tokens_BSVUE.flatten(1, 3).to(self.device)
        windows = None
        if self._variant.window is not None:
            of_context = (context.middles, high * wide) if context is not None else ((), 0)
            windows = self._windows_of(frames, lines * columns, *of_context)
        transformer: Any = self.denoiser
        return transformer(
            noisy_BCTYX.to(self.device, self.dtype),
            timestep_B.to(self.device),
            text.tokens_BKLD[:, 0].to(self.device, self.dtype),
            context_BME=context_BME,
            rotary_emb=rotary(transformer.rope, grids, self.device),
            windows=windows,
        ).sample.float()

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
        """Latents (B, C, T, Y, X) by Euler's method with classifier-free guidance."""
        return sampled(
            self.denoise,
            Euler(self.shift),
            text,
            null_LD,
            noise_BCTYX.to(self.device),
            steps=steps,
            guidance_scale=guidance_scale,
            null_context=null_context,
            progress=progress,
        )

    def _plan(
        self,
        frames: int,
        per_frame: int,
        context_middles: tuple[float, ...] = (),
        context_per_frame: int = 0,
    ) -> tuple[Windows, Windows]:
        """The windows of even and of odd layers."""
        assert self._variant.window is not None
        return windows_of_layers(
            frames,
            per_frame,
            self.facts.frames_per_latent,
            self._variant.window,
            context_middles,
            context_per_frame,
            self.device,
        )

    def _check(self, noisy_BCTYX: Tensor, text: Conditioning) -> None:
        """Raises ValueError where shapes do not meet."""
        check_text(text, self.text_dim)
        scenes = text.tokens_BKLD.shape[1]
        if scenes > 1:
            raise ValueError(f"Wan follows one text, but there are {scenes} scenes: give it one")
        channels, patch = self._config["in_channels"], self._config["patch_size"][1]
        if noisy_BCTYX.shape[1] != channels or any(n % patch for n in noisy_BCTYX.shape[3:]):
            raise ValueError(
                f"the denoiser takes latents of {channels} channels and sides of multiples of"
                f" {patch}, not of {tuple(noisy_BCTYX.shape[1:])}"
            )
        if (context := text.context) is None:
            return
        num, frames, _, _, width = context.tokens_BSVUE.shape
        if self.width is None:
            raise ValueError("a denoiser of a space of its own takes no context: leave it out")
        if width != self.width:
            raise ValueError(
                f"the denoiser's tokens are {self.width} wide, but the context's {width}"
            )
        if (num, frames) != (len(noisy_BCTYX), len(context.middles)):
            raise ValueError(
                f"a context of {num} samples of {frames} frames does not meet {len(noisy_BCTYX)}"
                f" samples and {len(context.middles)} middles of frames"
            )


def _cleaned(text: str) -> str:
    """As the pipeline of diffusers does where ftfy is not installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
