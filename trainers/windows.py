"""Attention in windows of time, shifted by half a window in every other layer.

A window holds all tokens of a span of the video: the denoiser's own, and those of its context
(semantic tokens, say), interleaved by their time. In even layers windows begin at multiples of the
window's length W; in odd layers the first ends at W / 2. Every token belongs to one window a layer,
so time and memory grow linearly with the video. Windows of equal numbers of tokens are one call of
plain attention, and no mask is made.

Shapes: B samples, A attention heads, N tokens of video and context, P tokens that all windows see
(a text), E width of a head.

Source: SemanticGen (arXiv 2512.20619), section 3.4 and figure 5.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class Windows:
    """Which tokens attend to each other in a layer."""

    order_N: Tensor
    """The sequence's tokens, window after window."""
    back_N: Tensor
    """Where each token of the sequence is in that order."""
    groups: tuple[tuple[int, int], ...]
    """That order in parts: how many windows, of how many tokens each."""


def check_window(window: float, units: dict[str, int]) -> None:
    """Raises ValueError where half a window does not hold whole frames of every kind.

    Args:
        window: In frames of the video.
        units: By name, how many frames of the video a frame of each kind holds.
    """
    whole = math.lcm(*units.values())
    if window <= 0 or window % (2 * whole):
        nearest = max(1, round(window / (2 * whole))) * 2 * whole
        needs = " and ".join(f"{num} for {name}" for name, num in units.items())
        raise ValueError(
            f"a window of {window:g} frames is not twice a whole number of frames of each kind"
            f" ({needs}): the nearest is {nearest}"
        )


def plan_windows(
    middles: Sequence[float],
    per_frame: int,
    window: float,
    *,
    shifted: bool,
    context_middles: Sequence[float] = (),
    context_per_frame: int = 0,
    device: torch.device,
) -> Windows:
    """The windows of one layer.

    The sequence holds the video's tokens, frame after frame, and then the context's.

    Args:
        middles: Of each latent frame the time in its middle, in frames of the video after the
            first, ascending.
        per_frame: Tokens of a latent frame.
        window: Its length, in frames of the video.
        shifted: By half a window: an odd layer.
        context_middles: As `middles`, of the context's frames.
        context_per_frame: Tokens of a frame of the context.
        device: Where the tokens are.
    """
    of_window: dict[int, list[Tensor]] = {}
    start = 0
    for times, num in ((middles, per_frame), (context_middles, context_per_frame)):
        for time in times:
            number = int((time + (window / 2 if shifted else 0)) // window)
            of_window.setdefault(number, []).append(torch.arange(start, start + num))
            start += num
    windows = [torch.cat(parts) for _, parts in sorted(of_window.items())]
    windows.sort(key=len)  # stable: equal ones stay in order of time
    groups = tuple((len(list(same)), num) for num, same in itertools.groupby(map(len, windows)))
    order_N = torch.cat(windows)
    return Windows(order_N.to(device), order_N.argsort().to(device), groups)


def attend(
    query_BANE: Tensor, key_BANE: Tensor, value_BANE: Tensor, windows: Windows, num_shared: int = 0
) -> Tensor:
    """Attention within windows, in the order of the sequence.

    Args:
        query_BANE: Of the whole sequence, P + N tokens.
        key_BANE: The same.
        value_BANE: The same.
        windows: Of the N tokens behind the shared ones.
        num_shared: P: the first tokens are seen in all windows, and see everything.
    """
    batch, start, answers = len(query_BANE), 0, []
    moved = [x[:, :, num_shared:].index_select(2, windows.order_N)
             for x in (query_BANE, key_BANE, value_BANE)]  # fmt: skip
    for num, length in windows.groups:
        query, key, value = (
            x[:, :, start : start + num * length]
            .unflatten(2, (num, length))
            .transpose(1, 2)
            .flatten(0, 1)
            for x in moved
        )
        if num_shared:
            key, value = (
                torch.cat([x[:, :, :num_shared].repeat_interleave(num, 0), own], 2)
                for x, own in ((key_BANE, key), (value_BANE, value))
            )
        said = scaled_dot_product_attention(query, key, value)
        answers.append(said.unflatten(0, (batch, num)).transpose(1, 2).flatten(2, 3))
        start += num * length
    said_BANE = torch.cat(answers, 2).index_select(2, windows.back_N)
    if not num_shared:
        return said_BANE
    shared_BAPE = scaled_dot_product_attention(query_BANE[:, :, :num_shared], key_BANE, value_BANE)
    return torch.cat([shared_BAPE, said_BANE], 2)
