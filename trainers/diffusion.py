"""What the video diffusion models have in common: their parts, noising, sampling, pixels.

Shapes: B samples, F frames, H W pixels; C latent channels, T latent frames, Y X latent lines and
columns; L text positions, D their width, K scenes; N pictures.
"""

from __future__ import annotations

import contextlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.weights import Weights
from trainers.vdm import Conditioning, Context, Noised

SEED = 0
"""Of weights that are not pretrained."""
FLOW_STEPS = 1000
"""What a rectified flow's times 0 to 1 are multiplied by for the denoiser."""
_WEIGHTS = tuple(
    f"{name}.safetensors{index}"
    for name in ("diffusion_pytorch_model", "model")
    for index in ("", ".index.json")
)
"""As diffusers and transformers name them, in one file or by the index of several."""


class Config(dict[str, Any]):
    """What a part's configuration says; asking for what it lacks is a user's mistake."""

    def __missing__(self, key: str) -> Any:
        kind = self.get("_class_name", "text encoder")
        raise ValueError(f"the configuration of the {kind} lacks {key}: fetch it again")


class Parts(ABC):
    """Where a model's VAE, denoiser, text encoder, tokenizer and scheduler come from.

    They are named as the subfolders of diffusers' layout; `motion` is AnimateDiff's motion adapter,
    and the empty name the index of the folder itself.
    """

    @abstractmethod
    def config(self, part: str) -> Config:
        """What the part's configuration says.

        Raises:
            ValueError: There is none.
        """

    @abstractmethod
    def load(self, kind: type[Any], part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """A frozen module of class `kind` for inference, of diffusers or of transformers."""

    @abstractmethod
    def tokenizer(self, kind: type[Any]) -> Any:
        """Of the text encoder, of a class of transformers."""


@dataclass(frozen=True)
class Folder(Parts):
    """Parts as trained, in files on this machine."""

    what: str
    """As an error calls the model."""
    base: Path
    motion: Path | None = None

    @classmethod
    def of(cls, what: str, base: Weights, motion: Weights | None) -> Folder:
        """Where the weights lie."""
        return cls(what, base.local(), motion.local() if motion else None)

    def config(self, part: str) -> Config:
        """What the part's configuration file says; that there are weights is looked at too."""
        names = {"": "model_index.json", "scheduler": "scheduler_config.json"}
        path = self._path(part) / names.get(part, "config.json")
        try:
            found = Config(json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{self._path('')} holds no {self.what}: {path} is missing, and a whole folder in"
                " diffusers' layout is needed"
            ) from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not JSON ({error}): fetch it again") from None
        if part not in names and not any((path.parent / name).exists() for name in _WEIGHTS):
            raise ValueError(
                f"{path.parent} holds no weights: {_WEIGHTS[0]} or {_WEIGHTS[2]} is needed,"
                " whole or in shards"
            )
        return found

    def load(self, kind: type[Any], part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """Read by the library's own loader."""
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        for logging in (of_diffusers, of_transformers):
            logging.disable_progress_bar()
        loaded = kind.from_pretrained(
            self._path(part), dtype=dtype, use_safetensors=True, local_files_only=True
        )
        return frozen(loaded, device)

    def tokenizer(self, kind: type[Any]) -> Any:
        """Read by the library's own loader."""
        return kind.from_pretrained(self._path("tokenizer"), local_files_only=True)

    def _path(self, part: str) -> Path:
        if part != "motion":
            return self.base / part
        if self.motion is None:
            raise ValueError(f"a {self.what} needs a motion adapter to make video: name its folder")
        return self.motion


@dataclass(frozen=True)
class RandomParts(Parts):
    """Parts of given shapes with random weights, made where they run: for measuring speed."""

    configs: Mapping[str, Mapping[str, Any]]

    def config(self, part: str) -> Config:
        """As given."""
        if part not in self.configs:
            raise ValueError(f"no {part} among the shapes {', '.join(self.configs)}: add it")
        return Config(self.configs[part])

    def load(self, kind: type[Any], part: str, device: torch.device, dtype: torch.dtype) -> Any:
        """Initialised as the library does it, from torch's own random state."""
        config, before = self.config(part), torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                of_diffusers = hasattr(kind, "from_config")
                made = (
                    kind.from_config(config) if of_diffusers else kind(kind.config_class(**config))
                )
        finally:
            torch.set_default_dtype(before)
        return frozen(made, device)

    def tokenizer(self, kind: type[Any]) -> Any:
        """There is none."""
        raise ValueError("a model of random weights has no tokenizer: encode no text with it")


def frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """The module for inference, on the device."""
    return module.requires_grad_(False).eval().to(device)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Weights are drawn the same wherever they go; other randomness is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # of the CPU alone: no other one is put back
        yield


def noised(scheduler: Any, latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor) -> Noised:
    """What `VDM.noised` gives, by a scheduler of diffusers."""
    if latents_BCTYX.dtype != torch.float32 or noise_BCTYX.dtype != torch.float32:
        raise TypeError(f"noising is in float32: latents are {latents_BCTYX.dtype}")
    num = scheduler.config.num_train_timesteps
    timestep_B = (at_B.to(latents_BCTYX.device) * num).long().clamp(max=num - 1)
    noisy_BCTYX = scheduler.add_noise(latents_BCTYX, noise_BCTYX, timestep_B)
    match scheduler.config.prediction_type:
        case "epsilon":
            target_BCTYX = noise_BCTYX
        case "v_prediction":
            target_BCTYX = scheduler.get_velocity(latents_BCTYX, noise_BCTYX, timestep_B)
        case "sample":
            target_BCTYX = latents_BCTYX
        case other:
            raise ValueError(
                f"the scheduler's prediction_type is {other}: none that can be trained"
            )
    return Noised(noisy_BCTYX, timestep_B, target_BCTYX)


def flow_noised(
    latents_BCTYX: Tensor, noise_BCTYX: Tensor, at_B: Tensor, shift: float = 1.0
) -> Noised:
    """What `VDM.noised` gives for a rectified flow: z_t = (1 - t) z_0 + t noise, and noise - z_0.

    Times are logit-normal, and shifted towards noise; the denoiser is told them times 1000.

    Source: SemanticGen (arXiv 2512.20619), equations 1 to 3; Esser et al. 2024, arXiv 2403.03206,
    section 3.1 and equation 23, for the times and their shift.
    """
    if latents_BCTYX.dtype != torch.float32 or noise_BCTYX.dtype != torch.float32:
        raise TypeError(f"noising is in float32: latents are {latents_BCTYX.dtype}")
    time_B = shifted(torch.special.ndtri(at_B.to(latents_BCTYX.device)).sigmoid(), shift)
    time_B1111 = time_B[:, None, None, None, None]
    noisy_BCTYX = (1 - time_B1111) * latents_BCTYX + time_B1111 * noise_BCTYX
    return Noised(noisy_BCTYX, time_B * FLOW_STEPS, noise_BCTYX - latents_BCTYX)


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times of a flow moved towards noise: 0 and 1 stay."""
    return shift * time / (1 + (shift - 1) * time)


class Euler:
    """Euler's method along a rectified flow from noise, as `sampled` drives it.

    Args:
        shift: Of the times, as in training.

    Source: SemanticGen, equation 4.
    """

    init_noise_sigma = 1.0

    def __init__(self, shift: float = 1.0):
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._scheduler = FlowMatchEulerDiscreteScheduler(FLOW_STEPS, shift=shift)

    def set_timesteps(self, steps: int) -> None:
        """From pure noise to none in so many steps."""
        self._scheduler.set_timesteps(sigmas=[1 - n / steps for n in range(steps)])

    @property
    def timesteps(self) -> Tensor:
        """What the denoiser is told in each step."""
        return self._scheduler.timesteps

    def step(self, said_BCTYX: Tensor, timestep: Tensor, latents_BCTYX: Tensor) -> Any:
        """One step along the predicted velocity."""
        return self._scheduler.step(said_BCTYX, timestep, latents_BCTYX)


@torch.no_grad()
def sampled(
    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor],
    scheduler: Any,
    text: Conditioning,
    null_LD: Tensor,
    noise_BCTYX: Tensor,
    *,
    steps: int,
    guidance_scale: float,
    null_context: Context | None = None,
    progress: Callable[[int], None],
) -> Tensor:
    """What `VDM.generate` gives, by a scheduler of diffusers or by `Euler`; float32.

    The unconditional prediction is a pass of its own: its text may be of another length than that
    of several scenes, and a pass needs half the memory.

    Source: Ho and Salimans 2022, arXiv 2207.12598, equation 6, with w + 1 for the scale.
    """
    num = len(noise_BCTYX)
    null = Conditioning(null_LD.expand(num, 1, *null_LD.shape), context=null_context)
    scheduler.set_timesteps(steps)
    latents_BCTYX = noise_BCTYX.float() * scheduler.init_noise_sigma
    for number, timestep in enumerate(scheduler.timesteps, start=1):
        timestep_B = timestep.to(latents_BCTYX.device).expand(num)
        said_BCTYX = denoise(latents_BCTYX, timestep_B, text).float()
        if guidance_scale != 1:
            null_BCTYX = denoise(latents_BCTYX, timestep_B, null).float()
            said_BCTYX = null_BCTYX + guidance_scale * (said_BCTYX - null_BCTYX)
        latents_BCTYX = scheduler.step(said_BCTYX, timestep, latents_BCTYX).prev_sample
        progress(number)
    return latents_BCTYX


def near(height_px: int, width_px: int, side: int) -> str:
    """The nearest size of sides that are multiples of `side`, as an error names it."""
    return "x".join(str(max(1, round(px / side)) * side) for px in (height_px, width_px))


def to_unit(pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 in the VAE's range, -1 to 1."""
    return (pixels.float() / 127.5 - 1).to(dtype)


def to_pixels(unit: Tensor) -> Tensor:
    """The VAE's range as uint8, as diffusers rounds and clips."""
    return ((unit.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def check_text(text: Conditioning, dim: int) -> None:
    """Raises ValueError where the conditioning is none that a model of width `dim` takes."""
    num, scenes, _, width = text.tokens_BKLD.shape
    if width != dim:
        raise ValueError(f"the model's text is {dim} wide, but the conditioning {width}")
    if text.shares_BFK is None and scenes > 1:
        raise ValueError(f"{scenes} scenes need their share of each frame: give shares_BFK")
    if text.shares_BFK is not None and text.shares_BFK.shape[::2] != (num, scenes):
        raise ValueError(
            f"shares of {tuple(text.shares_BFK.shape)} do not meet {num} texts of {scenes} scenes"
        )
