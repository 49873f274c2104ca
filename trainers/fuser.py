"""Mimir's token fuser: a text encoder's tokens and a decoder-only LLM's, as one text.

Shapes: B samples, L text positions, D width of the text encoder, E width of the LLM, N attribute
instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

NUM_ATTRIBUTES = 4
"""N: objects, color, motion and spatial relationships."""
_EPSILON = 1e-6


class Row(TypedDict):
    """What a token fuser has, of the parts that table 3 adds one by one."""

    decoder: bool
    norm: bool
    zero_conv: bool
    stabilizer: bool


def _row(decoder: bool, norm: bool, zero_conv: bool, stabilizer: bool) -> Row:
    return Row(decoder=decoder, norm=norm, zero_conv=zero_conv, stabilizer=stabilizer)


ROWS: Mapping[str, Row] = {
    "baseline": _row(False, False, False, False),
    "decoder": _row(True, False, False, False),
    "decoder_norm": _row(True, True, False, False),
    "decoder_norm_ss": _row(True, True, False, True),
    "zeroconv": _row(True, False, True, False),
    "zeroconv_ss": _row(True, False, True, True),
    "mimir": _row(True, True, True, True),
}
"""The rows of table 3, in its order."""


class TokenFuser(nn.Module):
    """e = (1 + Z_theta) e_theta + alpha Z_beta(s RMSNorm(e_beta) + b), and e_s = e_i + e_l behind.

    Z are zero-convs: a convolution of width 1 over tokens is a linear map, here with weights and
    bias of zero. That of the LLM's tokens maps E to D, too. So at the start the encoder's tokens
    are what they were, and what is concatenated behind them is zero.

    The instruction tokens e_i get a norm, scale, bias and map of their own: they are states of a
    prompt's last token alone, which lie elsewhere than those of its words and of answers.

    Positions behind a text's end are masked after the map, whose bias they would get otherwise: the
    padding stays the encoder's, on which the video model was trained. A text of length 0 is none:
    of it nothing of the LLM is left, and e_s is e_l.

    Args:
        encoder_dim: D.
        decoder_dim: E.
        decoder: False is the baseline: the encoder's tokens alone, without any parameters.
        norm: RMSNorm, and a small scale and bias for each channel, of the LLM's tokens.
        zero_conv: False puts a linear map of the usual random start in place of those of the LLM's
            tokens, and nothing in place of that of the encoder's.
        stabilizer: Semantic tokens behind the text's.
        alpha: Share of the LLM's tokens in the sum.
        scale_init: Where the scale starts.

    Raises:
        ValueError: A stabilizer without the LLM whose tokens it takes.

    Source: Mimir (arXiv 2412.03085), equation 3, section 2.3 and algorithm 1.
    """

    def __init__(
        self,
        encoder_dim: int,
        decoder_dim: int,
        *,
        decoder: bool = True,
        norm: bool = True,
        zero_conv: bool = True,
        stabilizer: bool = True,
        alpha: float = 1.0,
        scale_init: float = 0.01,
    ):
        super().__init__()
        if stabilizer and not decoder:
            raise ValueError("the stabilizer takes tokens of the LLM: it cannot be without decoder")
        self.encoder_dim, self.decoder_dim, self.alpha = encoder_dim, decoder_dim, alpha

        def joined() -> nn.Sequential:
            scaled = Scaled(decoder_dim, scale_init) if norm else nn.Identity()
            return nn.Sequential(scaled, _linear(decoder_dim, encoder_dim, zero=zero_conv))

        self.decoder = joined() if decoder else None
        zero = decoder and zero_conv
        self.encoder = _linear(encoder_dim, encoder_dim, zero=True) if zero else None
        self.instruction = joined() if stabilizer else None
        learned = torch.zeros(NUM_ATTRIBUTES, encoder_dim)
        self.learned_ND = nn.Parameter(learned) if stabilizer else None

    @property
    def num_more(self) -> int:
        """Tokens that it puts behind the encoder's."""
        return 0 if self.learned_ND is None else NUM_ATTRIBUTES

    def forward(
        self,
        encoder_BLD: Tensor,
        decoder_BLE: Tensor | None = None,
        length_B: Tensor | None = None,
        attributes_BNE: Tensor | None = None,
    ) -> Tensor:
        """The text of the video model, (B, L + num_more, D).

        Args:
            encoder_BLD: Of the text encoder, padding included.
            decoder_BLE: Of the LLM: the prompt's tokens, then the answer's.
            length_B: How many of those are a text's own; 0 is no text.
            attributes_BNE: The LLM's answers to the attribute instructions.
        """
        if self.decoder is None:
            return encoder_BLD
        assert decoder_BLE is not None and length_B is not None
        own_BL = torch.arange(decoder_BLE.shape[1], device=length_B.device) < length_B[:, None]
        # In float32 outside of autocast, too: frozen models may give bfloat16.
        said_BLD = torch.where(own_BL[:, :, None], self.decoder(decoder_BLE.float()), 0)
        fused_BLD = encoder_BLD.float()
        if self.encoder is not None:
            fused_BLD = fused_BLD + self.encoder(fused_BLD)
        fused_BLD = fused_BLD + self.alpha * said_BLD
        if self.instruction is None or self.learned_ND is None:
            return fused_BLD
        assert attributes_BNE is not None
        found_BND = self.instruction(attributes_BNE.float())
        semantic_BND = torch.where((length_B > 0)[:, None, None], found_BND, 0) + self.learned_ND
        return torch.cat([fused_BLD, semantic_BND], 1)

    def unconditional(self, empty_LD: Tensor) -> Tensor:
        """What stands for no text, (L + num_more, D), from the encoder's tokens of an empty one."""
        device, width = empty_LD.device, self.decoder_dim
        return self(
            empty_LD[None],
            torch.zeros(1, len(empty_LD), width, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
            torch.zeros(1, NUM_ATTRIBUTES, width, device=device),
        )[0]

    def normed(self, decoder: Tensor) -> Tensor:
        """The LLM's tokens (..., E) as the map to D gets them, for looking at."""
        return decoder.float() if self.decoder is None else self.decoder[0](decoder.float())


class Scaled(nn.Module):
    """RMSNorm without parameters, then a scale and a bias for each channel.

    Args:
        width: Channels.
        scale: Where the scale starts; the bias starts at 0.
    """

    def __init__(self, width: int, scale: float):
        super().__init__()
        self.scale_E = nn.Parameter(torch.full((width,), scale))
        self.bias_E = nn.Parameter(torch.zeros(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (..., E) of a root mean square of 1, scaled and moved."""
        return rms_norm(tokens, tokens.shape[-1:], eps=_EPSILON) * self.scale_E + self.bias_E


def _linear(inputs: int, outputs: int, *, zero: bool) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    if zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return linear
