"""CogVideoX's transformer with tokens of a context in its sequence, windows of attention, or both.

The sequence is the text, the video and the context. To the layers the context is video: it is
normalised and modulated as such and has a place in space and time, which may lie between those of
the video's tokens. Only the video is predicted. In windows the text is shared: all windows see it,
and it sees everything.

Places are counted in the video's tokens: 0 is the middle of the first latent frame, line or column.

Shapes: B samples; T frames, Y X lines and columns of tokens, of video or context; N tokens of the
sequence or of a part of it; E width of the denoiser's tokens or of a head, L D of a text.

Source: SemanticGen (arXiv 2512.20619), sections 3.3 and 3.4, on CogVideoX.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import (
    get_1d_rotary_pos_embed,
    get_1d_sincos_pos_embed_from_grid,
    get_3d_rotary_pos_embed,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from trainers.diffusion import RandomParts, seeded
from trainers.places import latent_time, spread, windows_of_layers
from trainers.vdm import Context, Variant
from trainers.windows import Windows

Grid = tuple[int, int, int]
"""Frames, lines and columns of tokens."""
Places = tuple[Tensor, Tensor, Tensor]
"""Of such a grid: where its frames (T), lines (Y) and columns (X) are, float32."""


class ContextTransformer(CogVideoXTransformer3DModel):
    """CogVideoX's transformer; a loaded one becomes this by its class, and its weights stay."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        context_BNE: Tensor | None = None,
        context_places: Places | None = None,
        windows: tuple[Windows, Windows] | None = None,
        **others: Any,
    ) -> Any:
        """The video's prediction; with neither context nor windows diffusers' own forward.

        Args:
            hidden_states: The video (B, T, C, Y, X).
            encoder_hidden_states: The text (B, L, D).
            timestep: (B,).
            image_rotary_emb: Of the video's tokens and then the context's, (N, E) each.
            attention_kwargs: For the layers.
            context_BNE: The context's tokens.
            context_places: Theirs; positions that are added are made of them.
            windows: Of even layers, counted from 0, and of odd ones.
            others: For diffusers' own forward.
        """
        if context_BNE is None and windows is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                timestep,
                image_rotary_emb=image_rotary_emb,
                attention_kwargs=attention_kwargs,
                **others,
            )
        assert not others, "a context or windows take no more than the arguments named here"
        at_BE = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))
        joint_BNE = self.patch_embed(encoder_hidden_states, hidden_states)
        num_text, num = encoder_hidden_states.shape[1], joint_BNE.shape[1]
        if context_BNE is not None:
            assert context_places is not None
            beside_BNE = self._with_positions(context_BNE.to(joint_BNE.dtype), context_places)
            joint_BNE = torch.cat([joint_BNE, beside_BNE], 1)
        joint_BNE = self.embedding_dropout(joint_BNE)
        text, seen = joint_BNE[:, :num_text], joint_BNE[:, num_text:]
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        for number, block in enumerate(self.transformer_blocks):
            more = dict(attention_kwargs or {})
            if windows is not None:
                more["windows"] = windows[number % 2]
            given = seen, text, at_BE, image_rotary_emb, more
            seen, text = (
                self._gradient_checkpointing_func(block, *given) if checkpointing else block(*given)
            )
        said_BNE = self.norm_out(self.norm_final(seen[:, : num - num_text]), temb=at_BE)
        return Transformer2DModelOutput(sample=self._video(self.proj_out(said_BNE), hidden_states))

    def _with_positions(self, tokens_BNE: Tensor, places: Places) -> Tensor:
        """What the patch embedding does to the video's tokens."""
        embed = self.patch_embed
        if not embed.use_positional_embeddings:
            return tokens_BNE
        positions_NE = sincos_at(
            places,
            embed.embed_dim,
            space=embed.spatial_interpolation_scale,
            time=embed.temporal_interpolation_scale,
        )
        return tokens_BNE + positions_NE.to(tokens_BNE.dtype)

    def _video(self, patches: Tensor, like: Tensor) -> Tensor:
        """Patches of the video (B, N, C * p * p) put together in its shape."""
        num, frames, _, height, width = like.shape
        p = self.config.patch_size
        patches = patches.view(num, frames, height // p, width // p, -1, p, p)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(num, frames, -1, height, width)


def from_scratch(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> CogVideoXTransformer3DModel:
    """A transformer as the library initialises it: of a seed, and the same on every device."""
    parts = RandomParts({"transformer": config})
    with seeded():
        made = parts.load(
            CogVideoXTransformer3DModel, "transformer", torch.device("cpu"), torch.float32
        )
    return made.to(device, dtype)


def in_space(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    """The configuration of a transformer for a space of so many channels, a token a position.

    The grid of tokens that was trained stays, and with it the positions that are kept of it.
    """
    patch = config["patch_size"]
    height, width = config["sample_height"] // patch, config["sample_width"] // patch
    own = {"in_channels": channels, "out_channels": channels, "patch_size": 1}
    return {**config, **own, "sample_height": height, "sample_width": width}


def move_to_space(transformer: Any, channels: int) -> None:
    """Gives a transformer new first and last layers, and what else `in_space` says."""
    config = in_space(transformer.config, channels)
    embed, out = transformer.patch_embed, transformer.proj_out
    with seeded():
        first = nn.Conv2d(channels, embed.embed_dim, 1, bias=embed.proj.bias is not None)
        last = nn.Linear(out.in_features, channels, bias=out.bias is not None)
    embed.proj = first.to(embed.proj.weight).requires_grad_(False)
    transformer.proj_out = last.to(out.weight).requires_grad_(False)
    for name in ("patch_size", "sample_height", "sample_width"):
        setattr(embed, name, config[name])
    transformer.register_to_config(**config)


def rotary_at(places: Places, width: int) -> tuple[Tensor, Tensor]:
    """Rotary positions, cosines and sines (T * Y * X, E), anywhere.

    At whole places they are what diffusers' `get_3d_rotary_pos_embed` gives.

    Args:
        places: In the coordinates that are turned by.
        width: E, of a head.
    """
    sizes = width // 4, width // 8 * 3, width // 8 * 3
    turns = [
        get_1d_rotary_pos_embed(size, place, use_real=True)
        for size, place in zip(sizes, places, strict=True)
    ]
    cosines, sines = (torch.cat(_everywhere(axes), 1) for axes in zip(*turns, strict=True))
    return cosines, sines


def sincos_at(places: Places, width: int, *, space: float, time: float) -> Tensor:
    """Sine positions (T * Y * X, E), anywhere.

    At whole places they are what diffusers' `get_3d_sincos_pos_embed` gives.

    Args:
        places: Of frames, lines and columns.
        width: E, of a token.
        space: The library's interpolation scale for lines and columns.
        time: The same for frames.
    """
    sizes, scales = (width // 4, width // 8 * 3, width // 8 * 3), (time, space, space)
    of_frame, of_line, of_column = _everywhere(
        get_1d_sincos_pos_embed_from_grid(size, place / scale)
        for size, place, scale in zip(sizes, places, scales, strict=True)
    )
    return torch.cat([of_frame, of_column, of_line], 1)  # the library has the column first


def _everywhere(known: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What is known of frames (T, E), lines (Y, E) and columns (X, E), for each token (N, E)."""
    of_frame, of_line, of_column = known
    sizes = len(of_frame), len(of_line), len(of_column)
    return (
        of_frame[:, None, None].expand(*sizes, -1).flatten(0, 2),
        of_line[None, :, None].expand(*sizes, -1).flatten(0, 2),
        of_column[None, None].expand(*sizes, -1).flatten(0, 2),
    )


def rotary_of(
    grid: Grid,
    trained: tuple[int, int],
    width: int,
    device: torch.device,
    context: Places | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary positions of the video's tokens as diffusers' pipeline makes them; then a context's.

    Args:
        grid: The video's.
        trained: Lines and columns of tokens that the model was trained on.
        width: E, of a head.
        device: Where they are made.
        context: Among the video's tokens.
    """
    frames, lines, columns = grid
    start, stop = get_resize_crop_region_for_grid((lines, columns), trained[1], trained[0])
    video = get_3d_rotary_pos_embed(
        embed_dim=width,
        crops_coords=(start, stop),
        grid_size=(lines, columns),
        temporal_size=frames,
        device=device,
    )
    if context is None:
        return video
    of_frame, of_line, of_column = context
    of_line = _in_crop(of_line, start[0], stop[0], lines)
    of_column = _in_crop(of_column, start[1], stop[1], columns)
    beside = rotary_at((of_frame, of_line, of_column), width)
    return torch.cat([video[0], beside[0]]), torch.cat([video[1], beside[1]])


def _in_crop(places: Tensor, start: float, stop: float, num: int) -> Tensor:
    """Places among `num` lines or columns as the library's coordinates of a cropped region.

    Those are evenly spaced from `start` to `stop * (num - 1) / num`.
    """
    step = (stop * (num - 1) / num - start) / (num - 1) if num > 1 else stop - start
    return start + places * step


class Layout:
    """Where the tokens of video and context are, and who sees whom; what takes long is kept.

    Args:
        config: Of the transformer as it was pretrained.
        variant: Of it.
        each: Frames of the video in a latent frame, after the first.
        device: Where tokens are.
    """

    def __init__(
        self, config: Mapping[str, Any], variant: Variant, each: int, device: torch.device
    ):
        self._config, self._variant, self._each, self._device = config, variant, each, device
        self._rotary: dict[Any, tuple[Tensor, Tensor]] = {}
        self._windows: dict[Any, tuple[Windows, Windows]] = {}

    def places(self, grid: Grid, context: Context) -> Places:
        """Of the context's tokens among the video's."""
        lines, columns = context.tokens_BSVUE.shape[2:4]
        return (
            self._at([latent_time(m, self._each) for m in context.middles]),
            self._at(spread(lines, grid[1])),
            self._at(spread(columns, grid[2])),
        )

    def _at(self, places: Sequence[float]) -> Tensor:
        return torch.tensor(places, dtype=torch.float32, device=self._device)

    def rotary(self, grid: Grid, context: Context | None = None) -> tuple[Tensor, Tensor] | None:
        """As `rotary_of`; None where the transformer adds sine positions."""
        config = self._config
        if not config.get("use_rotary_positional_embeddings"):
            return None
        key = (grid, _shape(context))
        if key not in self._rotary:
            patch = config["patch_size"]
            trained = config["sample_height"] // patch, config["sample_width"] // patch
            self._rotary[key] = rotary_of(
                grid,
                trained if self._variant.channels is None else grid[1:],
                config["attention_head_dim"],
                self._device,
                None if context is None else self.places(grid, context),
            )
        return self._rotary[key]

    def windows(self, grid: Grid, context: Context | None = None) -> tuple[Windows, Windows] | None:
        """Of even and of odd layers; None where attention is full."""
        if self._variant.window is None:
            return None
        frames, lines, columns = grid
        key = (grid, _shape(context))
        if key not in self._windows:
            self._windows[key] = windows_of_layers(
                frames,
                lines * columns,
                self._each,
                self._variant.window,
                () if context is None else context.middles,
                0 if context is None else math.prod(context.tokens_BSVUE.shape[2:4]),
                self._device,
            )
        return self._windows[key]


def _shape(context: Context | None) -> tuple[Any, ...]:
    """What positions and windows of a context depend on: its times, lines and columns."""
    return () if context is None else (context.middles, *context.tokens_BSVUE.shape[2:4])
