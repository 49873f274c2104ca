"""Semantic encoders loaded: their configurations, their weights, and what they make of frames.

To add one, fill `SemanticTower` and name it in `SemanticEncoder.kind` and in `_KINDS`.

Shapes: B samples, F sampled frames, H W pixels; S semantic frames, V U their lines and columns, D
width; N pictures or groups of them, T frames of a group, P patches, C latent channels.
"""

from __future__ import annotations

import contextlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.functional import interpolate

from engine.weights import Weights
from trainers.diffusion import Folder, frozen
from trainers.semantics import SemanticEncoder, SemanticFacts, size_of
from trainers.vdm import Backbone

_FRAMES_AT_ONCE = 32
_GRID = 2**12
"""More lines and columns than a frame of V-JEPA 2's has."""
_VISUAL = re.compile(r"^(model\.)?visual\.")
_VJEPA2 = re.compile(r"^(vjepa2\.)?encoder\.")
_SUCH = {"qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct", "vjepa2": "facebook/vjepa2-vitl-fpc64-256"}
_PATCH_LATENTS = 4
"""Side of what a token gathers, in latent positions: 32 px of a VAE that makes 8 px one."""
_PROCESSORS = (
    "processor_config.json",
    "video_preprocessor_config.json",
    "preprocessor_config.json",
)
"""Where transformers keeps mean and deviation of pixels, the newest way first."""


class SemanticTower(ABC):
    """A frozen semantic encoder.

    Args:
        encoder: Which.
        device: Where it runs.
        dtype: Of weights and of what it gives.
    """

    side: int | None = None
    """Side of a token in the frames it is given, in px; None: `pixels_per_token`."""

    def __init__(self, encoder: SemanticEncoder, device: torch.device, dtype: torch.dtype):
        self.facts, self.device, self.dtype = facts(encoder), torch.device(device), dtype
        # Bounds memory; frames that are not of one token, or of one chunk, never see each other.
        self.frames_at_once = _FRAMES_AT_ONCE
        self._load(encoder)

    @staticmethod
    @abstractmethod
    def read_facts(encoder: SemanticEncoder) -> SemanticFacts:
        """What the configuration files say; raises ValueError where it is no such encoder."""

    @staticmethod
    @abstractmethod
    def check_weights(encoder: SemanticEncoder) -> None:
        """Raises ValueError where there are no weights; loads none."""

    @abstractmethod
    def _load(self, encoder: SemanticEncoder) -> None:
        """Loads the model."""

    @abstractmethod
    def _encoded(self, frames_BF3HW: Tensor) -> Tensor:
        """(B, S, V, U, D) of frames whose sides are whole tokens."""

    @torch.no_grad()
    def encode(self, pixels_BFHW3: Tensor) -> Tensor:
        """What it makes of videos, (B, S, V, U, D) in `dtype` on its device.

        Args:
            pixels_BFHW3: uint8 RGB, the sampled frames only.
        """
        num, each = pixels_BFHW3.shape[1], self.facts.frames_per_token
        if pixels_BFHW3.dtype != torch.uint8 or not num or num % each:
            raise ValueError(
                f"semantic tokens are made of {each} frames each in uint8: {num} in"
                f" {pixels_BFHW3.dtype} are no whole number of them"
            )
        lines, columns = size_of(self.facts, *pixels_BFHW3.shape[2:4])
        side = self.side or self.facts.pixels_per_token
        frames_N3HW = pixels_BFHW3.flatten(0, 1).movedim(-1, 1)
        parts = [
            resized(part_N3HW.to(self.device), lines * side, columns * side)
            for part_N3HW in frames_N3HW.split(self.frames_at_once)
        ]
        frames_BF3HW = torch.cat(parts).unflatten(0, (-1, num))
        return self._encoded(frames_BF3HW)


class QwenTower(SemanticTower):
    """The vision tower of Qwen2.5-VL, merged tokens; frames of different pairs do not meet in it.

    Source: Bai et al. 2025, arXiv 2502.13923.
    """

    @staticmethod
    def read_facts(encoder: SemanticEncoder) -> SemanticFacts:
        """Of `config.json`."""
        vision = _config(encoder).vision_config
        return SemanticFacts(
            dim=vision.out_hidden_size,
            frames_per_token=vision.temporal_patch_size,
            pixels_per_token=vision.patch_size * vision.spatial_merge_size,
            chunk=_no_chunk(encoder),
        )

    @staticmethod
    def check_weights(encoder: SemanticEncoder) -> None:
        """There are tensors of a vision tower."""
        _files(encoder.weights, _VISUAL)

    def _load(self, encoder: SemanticEncoder) -> None:
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        from transformers.initialization import no_init_weights
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
            Qwen2_5_VisionTransformerPretrainedModel as Tower,
        )

        weights = encoder.weights
        vision = _config(encoder).vision_config
        self._patch, self._merge = vision.patch_size, vision.spatial_merge_size
        self._statistics = _statistics(weights, self.device, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        with no_init_weights():  # the language model is never made
            tower: Any = Tower._from_config(vision, dtype=self.dtype)
        found = dict(_tower_tensors(weights, self.dtype))
        wanted = tower.state_dict()
        odd = sorted(
            name
            for name in wanted.keys() | found.keys()
            if name not in wanted or name not in found or wanted[name].shape != found[name].shape
        )
        if odd:
            raise ValueError(
                f"the vision tower of {weights.at} is not the one of its config.json: {len(odd)}"
                f" tensors are missing, left over or of another shape, such as visual.{odd[0]}:"
                " fetch it again"
            )
        tower.load_state_dict(found)
        self._tower: Any = frozen(tower, self.device)

    def _encoded(self, frames_BF3HW: Tensor) -> Tensor:
        num, frames = frames_BF3HW.shape[:2]
        each = self.facts.frames_per_token
        groups_NT3HW = frames_BF3HW.flatten(0, 1).unflatten(0, (-1, each))
        at_once = max(1, self.frames_at_once // each)
        tokens_NVUD = torch.cat([self._tokens(part) for part in groups_NT3HW.split(at_once)])
        return tokens_NVUD.unflatten(0, (num, frames // each))

    def _tokens(self, groups_NT3HW: Tensor) -> Tensor:
        """Of groups of frames, each a video of one step: (N, V, U, D)."""
        unit_NT3HW = _normalised(groups_NT3HW, *self._statistics)
        num, _, _, height, width = unit_NT3HW.shape
        patch, merge = self._patch, self._merge
        lines, columns = height // patch, width // patch
        # The tower wants patches in the order of the tokens that they are merged to.
        patches_PD = (
            unit_NT3HW.unflatten(4, (columns // merge, merge, patch))
            .unflatten(3, (lines // merge, merge, patch))
            .permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            .flatten(5)
            .flatten(0, 4)
        )
        shapes_N3 = torch.tensor([[1, lines, columns]] * num, device=self.device)
        merged_ND = self._tower(patches_PD.to(self.dtype), grid_thw=shapes_N3).pooler_output
        return merged_ND.unflatten(0, (num, lines // merge, columns // merge))


class VJEPA2Tower(SemanticTower):
    """The encoder of V-JEPA 2; all frames of a chunk see each other.

    It was trained on square frames; larger and others are told their true lines and columns.

    Source: Assran et al. 2025, arXiv 2506.09985.
    """

    @staticmethod
    def read_facts(encoder: SemanticEncoder) -> SemanticFacts:
        """Of `config.json`."""
        config = _config(encoder)
        each = config.tubelet_size
        chunk = config.frames_per_clip if encoder.chunk is None else encoder.chunk
        if chunk < each or chunk % each:
            raise ValueError(
                f"V-JEPA 2 encodes chunks of whole tokens, of {each} sampled frames each, not of"
                f" {chunk}: the nearest is {max(1, round(chunk / each)) * each}"
            )
        return SemanticFacts(
            dim=config.hidden_size,
            frames_per_token=each,
            pixels_per_token=config.patch_size,
            chunk=chunk,
        )

    @staticmethod
    def check_weights(encoder: SemanticEncoder) -> None:
        """There are weights."""
        _files(encoder.weights, _VJEPA2)

    def _load(self, encoder: SemanticEncoder) -> None:
        from transformers import VJEPA2Model
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from transformers.utils.logging import disable_progress_bar

        weights = encoder.weights
        self._statistics = _statistics(
            weights, self.device, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        )
        disable_progress_bar()
        loaded, about = VJEPA2Model.from_pretrained(
            weights.local(),
            dtype=self.dtype,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        odd = {*about["missing_keys"], *(name for name, *_ in about["mismatched_keys"])}
        if odd := sorted(name for name in odd if name.startswith("encoder.")):
            raise ValueError(
                f"the encoder of {weights.at} is not the one of its config.json: {len(odd)} tensors"
                f" are missing or of another shape, such as {odd[0]}: fetch it again"
            )
        self._encoder: Any = frozen(loaded.encoder, self.device)
        for layer in self._encoder.layer:
            layer.attention.grid_size = _GRID

    def _encoded(self, frames_BF3HW: Tensor) -> Tensor:
        videos = [
            torch.cat([self._tokens(part) for part in frames_F3HW.split(self.facts.chunk)])
            for frames_F3HW in frames_BF3HW
        ]
        return torch.stack(videos)

    def _tokens(self, frames_F3HW: Tensor) -> Tensor:
        """Of one chunk, (S, V, U, D)."""
        height, width = frames_F3HW.shape[-2:]
        side, each = self.facts.pixels_per_token, self.facts.frames_per_token
        shape = len(frames_F3HW) // each, height // side, width // side
        axes = (torch.arange(length, device=self.device) for length in shape)
        step, line, column = torch.meshgrid(*axes, indexing="ij")
        # By itself the encoder numbers tokens as if every frame were of the size it was trained on.
        place_1N = ((step * _GRID + line) * _GRID + column).reshape(1, -1)
        unit_1F3HW = _normalised(frames_F3HW, *self._statistics)[None]
        hidden_1ND = self._encoder.embeddings(unit_1F3HW)
        for layer in self._encoder.layer:
            hidden_1ND = layer(hidden_1ND, place_1N)[0]
        return self._encoder.layernorm(hidden_1ND)[0].unflatten(0, shape)


class VAETower(SemanticTower):
    """A video model's VAE on single pictures, means of the posterior, scaled for the denoiser.

    A token gathers 4 x 4 latent positions of two pictures, so that it stands for as much of the
    video as one of Qwen2.5-VL's.

    Source: SemanticGen, section 4.3 and figure 9, which leave open how the latents are compressed.
    """

    @staticmethod
    def read_facts(encoder: SemanticEncoder) -> SemanticFacts:
        """Of `vae/config.json`."""
        _, channels, _ = _vae(encoder.weights)
        return SemanticFacts(
            dim=2 * _PATCH_LATENTS**2 * channels,
            frames_per_token=2,
            pixels_per_token=28,
            chunk=_no_chunk(encoder),
        )

    @staticmethod
    def check_weights(encoder: SemanticEncoder) -> None:
        """It is that of a whole video model."""
        Backbone(kind=_vae(encoder.weights)[0], base=encoder.weights).facts()

    def _load(self, encoder: SemanticEncoder) -> None:
        kind, _, scale = _vae(encoder.weights)
        self.side = _PATCH_LATENTS * scale
        backbone = Backbone(kind=kind, base=encoder.weights)
        self._vdm = backbone.load(video=False, device=self.device, dtype=self.dtype)

    def _encoded(self, frames_BF3HW: Tensor) -> Tensor:
        num, frames = frames_BF3HW.shape[:2]
        pictures_N1HW3 = frames_BF3HW.flatten(0, 1).movedim(1, -1)[:, None]
        parts = pictures_N1HW3.split(self.frames_at_once)
        latents_NCYX = torch.cat([self._vdm.encode(part)[:, 0, :, 0] for part in parts])
        each, side = self.facts.frames_per_token, _PATCH_LATENTS
        tokens_BSVUD = (
            latents_NCYX.unflatten(3, (-1, side))
            .unflatten(2, (-1, side))
            .unflatten(0, (num, frames // each, each))
            .permute(0, 1, 4, 6, 2, 5, 7, 3)
            .flatten(4)
        )
        return tokens_BSVUD.to(self.dtype)


_KINDS: dict[str, type[SemanticTower]] = {
    "qwen2_5_vl": QwenTower,
    "vjepa2": VJEPA2Tower,
    "vae": VAETower,
}


def facts(encoder: SemanticEncoder) -> SemanticFacts:
    """What `SemanticEncoder.facts` gives."""
    return _kind(encoder).read_facts(encoder)


def check(encoder: SemanticEncoder) -> None:
    """Raises ValueError where it is no such encoder or has no weights; loads none."""
    facts(encoder)
    _kind(encoder).check_weights(encoder)


def load(encoder: SemanticEncoder, device: torch.device, dtype: torch.dtype) -> SemanticTower:
    """What `SemanticEncoder.load` gives."""
    return _kind(encoder)(encoder, device, dtype)


def resized(pixels_N3HW: Tensor, height_px: int, width_px: int) -> Tensor:
    """uint8 frames of another size, bicubic and antialiased as the encoders' own processors do."""
    if pixels_N3HW.shape[-2:] == (height_px, width_px):
        return pixels_N3HW
    found_N3HW = interpolate(
        pixels_N3HW.float(), (height_px, width_px), mode="bicubic", antialias=True
    )
    return found_N3HW.round().clamp(0, 255).to(torch.uint8)


def _kind(encoder: SemanticEncoder) -> type[SemanticTower]:
    if encoder.kind not in _KINDS:
        raise ValueError(f"no semantic encoder {encoder.kind}: there are {', '.join(_KINDS)}")
    return _KINDS[encoder.kind]


def _no_chunk(encoder: SemanticEncoder) -> None:
    if encoder.chunk is not None:
        raise ValueError(
            f"chunks of {encoder.chunk} frames would change nothing of what {encoder.kind} gives:"
            " only frames of one token see each other in it; leave chunk out"
        )


def _json(path: Path, weights: Weights) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the {path.name} of {weights.at} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"the {path.name} of {weights.at} is no JSON object: fetch it again")
    return found


def _config(encoder: SemanticEncoder) -> Any:
    """Configuration of a checkpoint of transformers, which calls its kind as `encoder` does."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    weights, kind, such = encoder.weights, encoder.kind, _SUCH[encoder.kind]
    path = weights.local() / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{weights.at} has no config.json: a checkpoint of transformers such as {such} is"
            " needed, its whole folder"
        )
    found = _json(path, weights).get("model_type")
    if found != kind:
        raise ValueError(
            f"{weights.at} is a model of type {found}, not {kind}: name one such as {such}"
        )
    try:
        return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the config.json of {weights.at} cannot be used: {reason}") from None


def _files(weights: Weights, part: re.Pattern[str]) -> dict[str, Path]:
    """By name of each tensor of a part the file that holds it; other files need not be there."""
    folder = weights.local()
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        named = _json(index, weights).get("weight_map", {})
        files = {name: folder / file for name, file in named.items() if part.match(name)}
        gone = sorted({file.name for file in files.values() if not file.is_file()})
        if gone:
            raise ValueError(
                f"{weights.at} lacks {gone[0]}, which its index names: fetch the whole folder"
            )
    elif whole.is_file():
        with _opened(whole) as opened:
            files = {name: whole for name in opened.keys() if part.match(name)}  # noqa: SIM118
    else:
        raise ValueError(
            f"{weights.at} has no weights (model.safetensors, whole or in shards with its index):"
            " fetch or copy the whole folder"
        )
    if not files:
        raise ValueError(
            f"{weights.at} does not hold the encoder: no name of a tensor matches {part.pattern};"
            " name the folder of the whole model"
        )
    return files


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again") from None


def _tower_tensors(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tower's tensors by its own names; files without any are not opened."""
    files = _files(weights, _VISUAL)
    for path in sorted(set(files.values())):
        with _opened(path) as opened:
            for name in (name for name, file in files.items() if file == path):
                yield _VISUAL.sub("", name), opened.get_tensor(name).to(dtype)


def _statistics(
    weights: Weights, device: torch.device, mean: Sequence[float], deviation: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixels in 0 to 255, (3, 1, 1), the defaults where unsaid."""
    for path in (weights.local() / name for name in _PROCESSORS):
        said = _json(path, weights) if path.is_file() else {}
        said = said.get("video_processor", said)
        if "image_mean" in said and "image_std" in said:
            mean, deviation = said["image_mean"], said["image_std"]
            break
    mean_311, deviation_311 = (
        torch.tensor(values, device=device)[:, None, None] * 255 for values in (mean, deviation)
    )
    return mean_311, deviation_311


def _normalised(pixels: Tensor, mean_311: Tensor, deviation_311: Tensor) -> Tensor:
    """uint8 (…, 3, H, W) as the encoders were trained on it, float32."""
    return (pixels.float() - mean_311) / deviation_311


def _vae(weights: Weights) -> tuple[Any, int, int]:
    """Kind of video model, channels of its VAE's latents and pixels to a side of one."""
    config = Folder.of("video model", weights, None).config("vae")
    match config.get("_class_name"):
        case "AutoencoderKLCogVideoX":
            scale = 2 ** (len(config["block_out_channels"]) - 1)
            return "cogvideox", config["latent_channels"], scale
        case "AutoencoderKLWan":
            return "wan", config["z_dim"], 2 ** len(config["temperal_downsample"])
        case found:
            raise ValueError(
                f"latents in place of semantics need the VAE of a CogVideoX or a Wan, but the one"
                f" of {weights.at} is a {found}"
            )
