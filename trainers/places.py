"""Where tokens are: latent frames in time, cells of a grid among the tokens of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainers.windows import Windows, plan_windows


def latent_middles(latent_frames: int, frames_per_latent: int) -> tuple[float, ...]:
    """Of each latent frame the time in its middle, in frames of the video after the first.

    The first latent frame holds one frame of the video, the others `frames_per_latent`.
    """
    half = (frames_per_latent - 1) / 2
    return tuple(max(0.0, frames_per_latent * t - half) for t in range(latent_frames))


def latent_time(middle: float, frames_per_latent: int) -> float:
    """Where among the latent frames a time is: `latent_middles` gives whole numbers."""
    half = (frames_per_latent - 1) / 2
    # The first latent frame holds a single frame of the video, so the second is nearer to it.
    return min(middle / (frames_per_latent - half), (middle + half) / frames_per_latent)


def spread(num: int, over: int) -> list[float]:
    """Middles of `num` equal cells that cover `over` tokens, which are at whole numbers."""
    return [(n + 0.5) * over / num - 0.5 for n in range(num)]


def windows_of_layers(
    latent_frames: int,
    per_frame: int,
    frames_per_latent: int,
    window: float,
    context_middles: Sequence[float],
    context_per_frame: int,
    device: torch.device,
) -> tuple[Windows, Windows]:
    """Of even and of odd layers; see `plan_windows`."""
    even, odd = (
        plan_windows(
            latent_middles(latent_frames, frames_per_latent),
            per_frame,
            window,
            shifted=shifted,
            context_middles=context_middles,
            context_per_frame=context_per_frame,
            device=device,
        )
        for shifted in (False, True)
    )
    return even, odd
