"""Several scenes in CogVideoX: who attends to whom in one sequence of their texts and the video.

The sequence holds the text of each scene, one after the other, and the video. In every layer

- a video token of latent frame t attends to all of the video and to the text of scene k with the
  logarithm of the share that t has of k added to the score: not at all where the share is 0;
- a text token of scene k attends to the text of its own scene and to all of the video.

So K scenes of the same text are one scene, whatever the shares: K equal keys with weights that sum
to 1 are one key. Tokens that see the same keys are one call of plain attention, so no mask is made
where shares are one-hot, and a row of it where they are not.

Shapes: B samples, T latent frames, K scenes; N tokens of the sequence, Q of them that ask, V of
them that are seen, S of one latent frame; L text positions; A attention heads, E their width, D all
heads' width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import CogVideoXPatchEmbed, apply_rotary_emb
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from trainers.windows import Windows, attend


@dataclass(frozen=True)
class Ask:
    """Tokens of the sequence that see the same keys."""

    who_Q: Tensor
    sees_V: Tensor
    bias_V: Tensor | None
    """Added to the scores; None is nothing."""


@dataclass(frozen=True)
class Plan:
    """Who attends to whom, for samples that have the same shares."""

    samples: slice
    asks: tuple[Ask, ...]
    back_N: Tensor
    """Where each token of the sequence is among the answers of all asks."""


def plan_scenes(
    shares_BTK: Tensor, length: int, per_frame: int, device: torch.device
) -> tuple[Plan, ...]:
    """How K texts of `length` and T latent frames of `per_frame` tokens attend to each other."""
    schedules = [tuple(map(tuple, schedule)) for schedule in shares_BTK.tolist()]
    if len(set(schedules)) == 1:
        return (_plan(schedules[0], slice(None), length, per_frame, device),)
    return tuple(
        _plan(schedule, slice(n, n + 1), length, per_frame, device)
        for n, schedule in enumerate(schedules)
    )


def _plan(
    schedule: Sequence[tuple[float, ...]],
    samples: slice,
    length: int,
    per_frame: int,
    device: torch.device,
) -> Plan:
    num = len(schedule[0])
    text_KL = torch.arange(num * length).view(num, length)
    video_TS = num * length + torch.arange(len(schedule) * per_frame).view(-1, per_frame)
    # The text of a scene sees what the frames see that follow this scene alone.
    asking = {tuple(float(j == k) for j in range(num)): [text_KL[k]] for k in range(num)}
    for shares, video_S in zip(schedule, video_TS, strict=True):
        asking.setdefault(shares, []).append(video_S)
    asks = []
    for shares, tokens in asking.items():
        seen = [k for k, share in enumerate(shares) if share > 0]
        sees_V = torch.cat([text_KL[seen].flatten(), video_TS.flatten()])
        logs_K = torch.tensor([shares[k] for k in seen]).log()
        bias_V = pad(logs_K.repeat_interleave(length), (0, video_TS.numel()))
        bias = bias_V.to(device) if logs_K.any() else None
        asks.append(Ask(torch.cat(tokens).to(device), sees_V.to(device), bias))
    back_N = torch.cat([ask.who_Q for ask in asks]).argsort()
    return Plan(samples, tuple(asks), back_N)


class SceneAttention(CogVideoXAttnProcessor2_0):
    """Joint attention of text and video; with neither plan nor windows diffusers' own."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        plan: tuple[Plan, ...] | None = None,
        windows: Windows | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The video's and the text's answers."""
        if plan is None and windows is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        num_text = encoder_hidden_states.shape[1]
        joint_BND = torch.cat([encoder_hidden_states, hidden_states], 1)
        query, key, value = (
            project(joint_BND).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            _placed(x if norm is None else norm(x), num_text, image_rotary_emb)
            for x, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )
        if windows is not None:
            said_BANE = attend(query, key, value, windows, num_text)
        else:
            said_BANE = torch.cat([_attend(p, query, key, value) for p in plan])
        said_BND = attn.to_out[1](attn.to_out[0](said_BANE.transpose(1, 2).flatten(2)))
        return said_BND[:, num_text:], said_BND[:, :num_text]


def _placed(x_BANE: Tensor, num_text: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Queries or keys turned by their place in the video; text has none."""
    if rotary is None:
        return x_BANE
    turned = apply_rotary_emb(x_BANE[:, :, num_text:], rotary)
    return torch.cat([x_BANE[:, :, :num_text], turned], 2)


def _attend(plan: Plan, query_BANE: Tensor, key_BANE: Tensor, value_BANE: Tensor) -> Tensor:
    query, key, value = (x[plan.samples] for x in (query_BANE, key_BANE, value_BANE))
    answers = [
        scaled_dot_product_attention(
            query.index_select(2, ask.who_Q),
            key.index_select(2, ask.sees_V),
            value.index_select(2, ask.sees_V),
            attn_mask=None if ask.bias_V is None else ask.bias_V.to(query.dtype)[None, None, None],
        )
        for ask in plan.asks
    ]
    return torch.cat(answers, 2).index_select(2, plan.back_N)


class ScenePatchEmbed(CogVideoXPatchEmbed):
    """Takes the texts of several scenes too, where diffusers' counts on one length."""

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Tokens of text and video with their positions; those of text are zero."""
        own = self.max_text_seq_length
        if not self.use_positional_embeddings or text_embeds.shape[1] <= own:
            return super().forward(text_embeds, image_embeds)
        joint = super().forward(text_embeds[:, :own], image_embeds)
        more = self.text_proj(text_embeds[:, own:])
        return torch.cat([joint[:, :own], more, joint[:, own:]], 1)
