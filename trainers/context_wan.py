"""Wan's transformer with a context in its sequence, and with self-attention in windows of time.

Shapes: B samples; C latent channels, T latent frames, Y X latent lines and columns, h w those of a
patch, y x patches; L text positions, D their width; M tokens of the context; N tokens of video and
context, E width of a token; A attention heads, R width of a head.

Source: SemanticGen (arXiv 2512.20619), sections 3.3 and 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from trainers.diffusion import frozen, seeded
from trainers.windows import Windows, attend

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines (1, N, 1, R) of where each token is, repeated for its pairs of channels."""
Grid = tuple[Sequence[float], Sequence[float], Sequence[float]]
"""Times, lines and columns of a block of tokens; a video's own are at whole numbers."""


def rotary(rope: WanRotaryPosEmbed, grids: Sequence[Grid], device: torch.device) -> Rotary:
    """Of the tokens of one grid after the other; of a video alone it is what `rope` gives.

    Places need not be whole numbers and know no largest.
    """
    cosines, sines = [], []
    for grid in grids:
        tables = [
            get_1d_rotary_pos_embed(
                dim,
                torch.tensor(places, dtype=torch.float64),
                use_real=True,
                repeat_interleave_real=True,
                freqs_dtype=torch.float64,
            )
            for dim, places in zip((rope.t_dim, rope.h_dim, rope.w_dim), grid, strict=True)
        ]
        for found, (time, line, column) in zip(
            (cosines, sines), zip(*tables, strict=True), strict=True
        ):
            shape = (*map(len, grid), -1)
            axes = time[:, None, None], line[None, :, None], column[None, None]
            of_grid = torch.cat([axis.to(device).expand(shape) for axis in axes], -1)
            found.append(of_grid.flatten(0, 2))
    cos_NR, sin_NR = torch.cat(cosines), torch.cat(sines)
    return cos_NR[None, :, None], sin_NR[None, :, None]


class WindowAttention(WanAttnProcessor):
    """Self-attention in windows where they come with the rotary positions; else diffusers' own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Rotary | tuple[Tensor, Tensor, Windows] | None = None,
    ) -> Tensor:
        """What the layer adds, (B, N, E)."""
        if rotary_emb is None or len(rotary_emb) == 2:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb
            )
        cos, sin, windows = rotary_emb
        query_BNE, key_BNE, value_BNE = (
            project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key, value = (
            x_BNE.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for x_BNE in (attn.norm_q(query_BNE), attn.norm_k(key_BNE), value_BNE)
        )
        query, key = (apply_rotary_emb(x, (cos[0, :, 0], sin[0, :, 0])) for x in (query, key))
        said_BANR = attend(query, key, value, windows)
        said_BNE = said_BANR.transpose(1, 2).flatten(2).type_as(query)
        return attn.to_out[1](attn.to_out[0](said_BNE))


class ContextWan(WanTransformer3DModel):
    """Wan's transformer, which also takes a context and windows; without them diffusers' own."""

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        context_BME: Tensor | None = None,
        rotary_emb: Rotary | None = None,
        windows: tuple[Windows, Windows] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The prediction for the video's tokens.

        Args:
            hidden_states: Noisy latents (B, C, T, Y, X).
            timestep: (B,).
            encoder_hidden_states: Text (B, L, D).
            encoder_hidden_states_image: None.
            return_dict: As of diffusers.
            attention_kwargs: As of diffusers.
            context_BME: Tokens behind the video's in the sequence.
            rotary_emb: Of video and context; None is the library's, of the video alone.
            windows: Of even and of odd layers; None is full attention.
        """
        assert encoder_hidden_states_image is None
        if rotary_emb is None:
            rotary_emb = self.rope(hidden_states)
        tokens_BETYX = self.patch_embedding(hidden_states)
        tokens_BNE = tokens_BETYX.flatten(2).transpose(1, 2).contiguous()
        if context_BME is not None:
            tokens_BNE = torch.cat([tokens_BNE, context_BME.type_as(tokens_BNE)], 1)
        time_BE, modulation_BE, text_BLE, _ = self.condition_embedder(
            timestep, encoder_hidden_states, None
        )
        modulation_B6E = modulation_BE.unflatten(1, (6, -1))
        for number, block in enumerate(self.blocks):
            places = rotary_emb if windows is None else (*rotary_emb, windows[number % 2])
            given = tokens_BNE, text_BLE, modulation_B6E, places
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens_BNE = self._gradient_checkpointing_func(block, *given)
            else:
                tokens_BNE = block(*given)
        out_BCTYX = self._unpatched(tokens_BNE, time_BE, tokens_BETYX.shape[2:])
        return Transformer2DModelOutput(sample=out_BCTYX) if return_dict else (out_BCTYX,)

    def _unpatched(self, tokens_BNE: Tensor, time_BE: Tensor, grid: Sequence[int]) -> Tensor:
        """What the last layer says of the video's tokens, as latents."""
        frames, lines, columns = grid
        video_BNE = tokens_BNE[:, : frames * lines * columns]
        shift_B1E, scale_B1E = (self.scale_shift_table + time_BE[:, None]).chunk(2, dim=1)
        normed_BNE = self.norm_out(video_BNE.float()) * (1 + scale_B1E) + shift_B1E
        said = self.proj_out(normed_BNE.type_as(tokens_BNE))
        _, high, wide = self.config.patch_size
        said_BTyxhwC = said.view(len(said), frames, lines, columns, high, wide, -1)
        said_BCTyhxw = said_BTyxhwC.permute(0, 6, 1, 2, 4, 3, 5)
        return said_BCTyhxw.flatten(5, 6).flatten(3, 4)


def respace(denoiser: ContextWan, channels: int) -> None:
    """Gives the denoiser first and last layers for a space of so many channels, a token a position.

    The last says zero, as is usual for diffusion transformers, so training starts from a prediction
    that does not depend on what is behind it; the first is initialised as the library does it.

    Source: Peebles and Xie 2023, arXiv 2212.09748, section 3.2, for the zeros.
    """
    width = denoiser.config.num_attention_heads * denoiser.config.attention_head_dim
    device, dtype = denoiser.patch_embedding.weight.device, denoiser.patch_embedding.weight.dtype
    with seeded():
        first, last = nn.Conv3d(channels, width, 1), nn.Linear(width, channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    denoiser.patch_embedding = frozen(first, device).to(dtype)
    denoiser.proj_out = frozen(last, device).to(dtype)
    denoiser.rope.patch_size = (1, 1, 1)
    denoiser.register_to_config(**of_space(channels))


def of_space(channels: int) -> dict[str, Any]:
    """What the configuration of such a denoiser says otherwise."""
    return {"in_channels": channels, "out_channels": channels, "patch_size": (1, 1, 1)}
