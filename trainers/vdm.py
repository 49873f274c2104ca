"""Video diffusion models: what training and generation ask of one, whatever its architecture.

To add a model, fill `VDM` in one file and name it in `Backbone`.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X latent lines and
columns; L text positions, D their width, K scenes; S frames of the context, V U their lines and
columns, E width of the denoiser's tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from engine.weights import Weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from trainers.system import Bucket, Noise


@dataclass(frozen=True)
class Conditioning:
    """The text that a video follows: one scene, or several with a schedule."""

    tokens_BKLD: Tensor
    shares_BFK: Tensor | None = None
    """How much of each scene a frame follows, rows summing to 1: one-hot for a schedule of steps,
    else interpolated. None is one scene. F counts the video's frames; a latent frame follows the
    mean of the frames that it holds."""
    context: Context | None = None


@dataclass(frozen=True)
class Context:
    """Tokens beside the video's in the denoiser's sequence, of which nothing is predicted.

    They take part in all layers, and their places in space and time are told as the video's are.
    """

    tokens_BSVUE: Tensor
    middles: tuple[float, ...]
    """Of each of the S frames the time in its middle, in frames of the video after the first."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A denoiser that is not quite as it was pretrained."""

    channels: int | None = None
    """Denoises a space of so many channels, a token a position, by first and last layers of its
    own; None is the VAE's."""
    window: int | None = None
    """Attention in windows of so many frames of the video; None is full. See `trainers.windows`."""
    scratch: bool = False
    """Random weights in place of the pretrained."""
    flow: bool = False
    """Rectified flow in place of the model's own schedule."""
    shift: float | None = None
    """Of the flow's times towards noise; None is the model's own, or 1."""


PARTS: dict[str, Literal["unet", "transformer"]] = {
    "animatediff": "unet",
    "cogvideox": "transformer",
    "wan": "transformer",
}
"""What diffusers calls the denoiser of each kind of model."""


class VDM(ABC):
    """A pretrained video diffusion model: VAE, denoiser, noise schedule and text encoder.

    Parts are loaded when they are first used, so training on cached features loads no VAE and no
    text encoder. Weights are frozen and in `dtype`; adapters that are added are trained in float32.

    Args:
        base: Folder in diffusers' layout, or its hub id.
        motion: What a picture model needs to become a video model (AnimateDiff's motion modules).
        video: False is the plain picture model, where there is one apart.
        device: Where it runs.
        dtype: Of frozen weights.
        variant: Of the denoiser.
    """

    text_dim: int
    """D of the conditioning."""
    text_len: int
    """Positions that the model's own text encoder gives."""
    tokenizer: Any
    """Of that encoder, as transformers has it."""
    denoiser: nn.Module
    """Predicts; LoRA is added to it through peft."""
    blocks: Sequence[nn.Module]
    """The denoiser's repeated layers."""
    lora_targets: Sequence[str]
    """Names of attention projections (to_q, to_k, to_v, to_out.0) outside motion modules."""
    width: int | None = None
    """E of the context that the denoiser takes; None: it takes none."""
    motion_lora_targets: Sequence[str] = ()
    """The same inside motion modules, where there are any."""

    def losses(
        self,
        moments_B2CTYX: Tensor,
        posterior_BCTYX: Tensor,
        noise_BCTYX: Tensor,
        at_B: Tensor,
        text: Conditioning,
    ) -> Tensor:
        """Mean squared error of the denoiser's prediction, float32 (B,).

        Args:
            moments_B2CTYX: Of the VAE's posterior, as `encode` gives them.
            posterior_BCTYX: Standard normal: draws the latents.
            noise_BCTYX: Standard normal: what is added to them.
            at_B: Uniform in [0, 1): how much of it.
            text: What the videos show.
        """
        mean_BCTYX, deviation_BCTYX = moments_B2CTYX.float().unbind(1)
        latents_BCTYX = mean_BCTYX + deviation_BCTYX * posterior_BCTYX
        return self.errors(latents_BCTYX, noise_BCTYX, at_B, text)

    def errors(
        self, latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor, text: Conditioning
    ) -> Tensor:
        """The same for latents that are drawn already, float32."""
        example = self.noised(latents_BCTYX, noise_BCTYX, at_B)
        said_BCTYX = self.denoise(example.noisy_BCTYX, example.timestep_B, text)
        return (said_BCTYX.float() - example.target_BCTYX).square().flatten(1).mean(1)

    @abstractmethod
    def denoiser_config(self) -> dict[str, Any]:
        """What diffusers builds the denoiser from, as JSON values."""

    @abstractmethod
    def latent_shape(self, frames: int, height_px: int, width_px: int) -> tuple[int, ...]:
        """(C, T, Y, X) of a video's latents.

        Raises:
            ValueError: The model has no such shape; names the nearest that it has.
        """

    @abstractmethod
    def encode(self, pixels_BFHW3: Tensor) -> Tensor:
        """Mean and standard deviation of the VAE's posterior, scaled as the denoiser wants them.

        Args:
            pixels_BFHW3: uint8 RGB.

        Returns:
            float32 (B, 2, C, T, Y, X).
        """

    @abstractmethod
    def decode(self, latents_BCTYX: Tensor) -> Tensor:
        """uint8 RGB (B, F, H, W, 3)."""

    def text_cut(self, texts: Sequence[str]) -> list[int]:
        """How many tokens of each text are beyond those that the model's text encoder reads."""
        tokenizer: Any = self.tokenizer
        return [max(0, len(ids) - self.text_len) for ids in tokenizer(list(texts)).input_ids]

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """The model's own text encoder, exactly as its diffusers pipeline uses it: (B, L, D)."""

    @abstractmethod
    def noised(self, latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor) -> Noised:
        """What the denoiser is given and what it should say, in float32.

        Args:
            latents_BCTYX: float32.
            noise_BCTYX: Standard normal float32.
            at_B: Uniform in [0, 1): where in the schedule.
        """

    @abstractmethod
    def denoise(self, noisy_BCTYX: Tensor, timestep_B: Tensor, text: Conditioning) -> Tensor:
        """The denoiser's prediction, (B, C, T, Y, X)."""

    @abstractmethod
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
        """Latents (B, C, T, Y, X) by DDIM, or Euler's method for a flow, with guidance.

        Args:
            text: What is to be seen.
            null_LD: Unconditional text.
            noise_BCTYX: Standard normal float32; a sample's result depends on its own alone.
            steps: Of the sampler.
            guidance_scale: Of classifier-free guidance; 1 is none.
            null_context: Unconditional context, where there is a context.
            progress: Called with each step's number, from 1.
        """


def drawn(noise: Noise, moments_B2CTYX: Tensor) -> dict[str, Tensor]:
    """The randomness that `VDM.losses` takes, on the device of the latents."""
    shape = moments_B2CTYX.shape[2:]
    device = moments_B2CTYX.device
    return {
        "posterior_BCTYX": noise.normal("posterior", shape).to(device),
        "noise_BCTYX": noise.normal("noise", shape).to(device),
        "at_B": noise.uniform("at").to(device),
    }


@dataclass(frozen=True)
class Noised:
    """A training example of a denoiser."""

    noisy_BCTYX: Tensor
    timestep_B: Tensor
    target_BCTYX: Tensor


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """Which video diffusion model."""

    kind: Literal["animatediff", "cogvideox", "wan"]
    base: Weights
    motion: Weights | None = None
    """AnimateDiff's motion adapter."""

    def load(
        self,
        *,
        video: bool,
        device: torch.device,
        dtype: torch.dtype,
        variant: Variant = Variant(),
    ) -> VDM:
        """The model, its parts to be loaded when used.

        Raises:
            ValueError: The model has no such variant.
        """
        if self.kind == "animatediff":
            from trainers.animatediff import AnimateDiff as Model
        elif self.kind == "cogvideox":
            from trainers.cogvideox import CogVideoX as Model
        else:
            from trainers.wan import Wan as Model
        return Model(
            self.base, self.motion, video=video, device=device, dtype=dtype, variant=variant
        )

    def facts(self) -> Facts:
        """What its configuration files say; loads no weights.

        Raises:
            ValueError: It is no such model, or not there: what was needed, found, to do.
        """
        if self.kind == "animatediff":
            from trainers.animatediff import facts
        elif self.kind == "cogvideox":
            from trainers.cogvideox import facts
        else:
            from trainers.wan import facts
        return facts(self.base, self.motion)

    def pinned(self) -> Backbone:
        """The same by the commits of what is on this machine."""
        motion = self.motion.pinned() if self.motion else None
        return replace(self, base=self.base.pinned(), motion=motion)

    @classmethod
    def from_portable(cls, about: Mapping[str, Any]) -> Backbone:
        """The model that an export names: `dataclasses.asdict` of one."""
        motion = Weights(**about["motion"]) if about["motion"] else None
        return cls(kind=about["kind"], base=Weights(**about["base"]), motion=motion)

    def describe(self) -> dict[str, Any]:
        """What tells this model from others, as JSON values."""
        motion = self.motion.describe() if self.motion else None
        return {"kind": self.kind, "base": self.base.describe(), "motion": motion}


def check_buckets(
    vdm: Backbone,
    buckets: Sequence[Bucket],
    variant: Variant = Variant(),
) -> None:
    """Raises ValueError where a model cannot take videos of a bucket's shape; loads no weights."""
    import torch

    model = vdm.load(video=True, device=torch.device("cpu"), dtype=torch.float32, variant=variant)
    for bucket in buckets:
        try:
            model.latent_shape(bucket.frames, bucket.height_px, bucket.width_px)
        except ValueError as error:
            raise ValueError(f"bucket {bucket}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a model before it is loaded."""

    text_dim: int
    text_len: int
    any_text_len: bool
    """Whether shorter texts than `text_len` are taken; longer ones are."""
    frames_per_latent: int
    """Frames of the video in a latent frame, after the first."""
    pixels_per_latent: int
    """Sides must be a multiple of it (VAE and patches)."""
    max_frames: int | None
    """Longest video that its positions reach."""
