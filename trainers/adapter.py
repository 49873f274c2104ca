"""RISE-T2V's Rephrasing Adapter: from an LLM's hidden states to a video model's text encodings.

Shapes: B samples, S tokens of a text, L positions of the conditioning, D width of the conditioning,
E width of the LLM.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

Kind = Literal["geglu", "mlp"]


class RephrasingAdapter(nn.Module):
    """c = f_RA(h'_rephrase): two feed-forward layers, and the learned null sequence around a text.

    The paper says "stacked feed-forward layers", "two" of them, and no more. `geglu` is the block
    of LaVi-Bridge, which it builds on: each layer norm, then GEGLU of four times the width (4096 to
    768: 228.9 million parameters). `mlp` is two linear layers with GELU between (19.9 million).

    Positions behind a text's end hold the null sequence, which is also the unconditional: shapes
    are static, and a video model without a text mask sees what it was trained on.

    Args:
        width: E, of the LLM.
        text_dim: D, of the video model's text.
        null_LD: Starting value of the null sequence; it gives L.
        kind: Of the layers.

    Source: RISE-T2V, equation 3 and "Implementation Details"; LaVi-Bridge's TextAdapter.
    """

    def __init__(self, width: int, text_dim: int, null_LD: Tensor, kind: Kind = "geglu"):
        super().__init__()
        if kind == "geglu":
            middle = (width + text_dim) // 2
            self.layers = nn.Sequential(
                nn.LayerNorm(width),
                FeedForward(width, middle, activation_fn="geglu"),
                nn.LayerNorm(middle),
                FeedForward(middle, text_dim, activation_fn="geglu"),
            )
        else:
            self.layers = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, text_dim)
            )
        self.null_LD = nn.Parameter(null_LD.detach().float().clone())

    @property
    def length(self) -> int:
        """L: positions of the conditioning."""
        return self.null_LD.shape[0]

    def forward(self, states_BLE: Tensor, length_B: Tensor) -> Tensor:
        """Text encodings (B, L, D) of texts that `padded` brought to L positions."""
        is_text_BL = torch.arange(self.length, device=length_B.device) < length_B[:, None]
        text_BLD = self.layers(states_BLE.float())
        return torch.where(is_text_BL[:, :, None], text_BLD, self.null_LD.to(text_BLD.dtype))


def padded(states: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """States (S, E) of texts as (B, L, E), zero behind their ends, and how many are theirs (B,).

    What is longer than `length` is cut; who calls counts it.
    """
    cut = [s[:length] for s in states]
    padded_BLE = cut[0].new_zeros(len(cut), length, cut[0].shape[-1])
    for row_LE, text_SE in zip(padded_BLE, cut, strict=True):
        row_LE[: len(text_SE)] = text_SE
    return padded_BLE, torch.tensor([len(s) for s in cut], device=padded_BLE.device)


def null_of(empty_text_LD: Tensor, length: int) -> Tensor:
    """The null sequence at the start: what the base model's encoder makes of an empty text.

    Where the conditioning is longer, its last position (padding) goes on; where it is shorter, it
    is cut.
    """
    lacking = length - empty_text_LD.shape[0]
    if lacking <= 0:
        return empty_text_LD[:length]
    return torch.cat([empty_text_LD, empty_text_LD[-1:].expand(lacking, -1)])
