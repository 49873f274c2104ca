"""What a layer costs on 5, 15, 30 and 60 seconds of video: in shifted windows, and in full.

The layer is a whole block of Wan's transformer (self-attention, attention to the text,
feed-forward) on video tokens at 24 frames a second with semantic tokens of 1.6 beside them, in
windows of 5 s. On a GPU it is of Wan 1.3B's size on 480 x 832 px, in bf16; on a CPU 128 wide (two
heads) on a grid of 6 x 12 video and 4 x 6 semantic tokens a frame in place of 30 x 52 and 17 x 30,
in fp32.

Shapes: B samples, N tokens, E their width.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from bench_train import Figure

from trainers.windows import Windows, plan_windows

SECONDS = (5, 15, 30, 60)
FPS, PER_LATENT, PER_SEMANTIC, WINDOW_S = 24, 4, 30, 5
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """Of the layer and of what it is given."""

    heads: int
    head_dim: int
    hidden: int
    per_frame: int
    """Tokens of a latent frame."""
    per_semantic: int
    text: int


SMALL = Shape(heads=2, head_dim=64, hidden=512, per_frame=6 * 12, per_semantic=4 * 6, text=64)
WAN_1_3B = Shape(
    heads=12, head_dim=128, hidden=8960, per_frame=30 * 52, per_semantic=17 * 30, text=512
)


@dataclass(frozen=True)
class Cost:
    """Of a layer's forward pass."""

    tokens: int
    seconds: float
    gib: float
    """Peak of memory beyond the layer and what it is given."""


def layout(shape: Shape, seconds: int, device: torch.device) -> tuple[int, Windows]:
    """Number of tokens, and the windows of a video of so many seconds.

    Of an even layer: those of odd layers, two of them halves, are less work.
    """
    frames = seconds * FPS
    middles = [0.0, *((t - 1) * PER_LATENT + 2.5 for t in range(1, frames // PER_LATENT + 1))]
    semantic = [j * PER_SEMANTIC + 15.5 for j in range(frames // PER_SEMANTIC)]
    windows = plan_windows(
        middles,
        shape.per_frame,
        WINDOW_S * FPS,
        shifted=False,
        context_middles=semantic,
        context_per_frame=shape.per_semantic,
        device=device,
    )
    return len(middles) * shape.per_frame + len(semantic) * shape.per_semantic, windows


@torch.no_grad()
def cost(seconds: int, windowed: bool, repeats: int = 3, *, full_size: bool = False) -> Cost:
    """Of one layer; run in a process of its own, whose peak of memory is the layer's."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    from trainers.context_wan import WindowAttention

    device = torch.device("cuda" if torch.cuda.is_available() and full_size else "cpu")
    shape, dtype = (WAN_1_3B, torch.bfloat16) if full_size else (SMALL, torch.float32)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    width = shape.heads * shape.head_dim
    layer = WanTransformerBlock(width, shape.hidden, shape.heads, cross_attn_norm=True)
    layer = layer.to(device, dtype).eval()
    layer.attn1.set_processor(WindowAttention())
    num, windows = layout(shape, seconds, device)
    hidden_BNE = torch.randn(1, num, width, device=device, dtype=dtype)
    text_BLE = torch.randn(1, shape.text, width, device=device, dtype=dtype)
    modulation = torch.randn(1, 6, width, device=device, dtype=dtype)
    turns = tuple(torch.randn(1, num, 1, shape.head_dim, device=device) for _ in range(2))
    rotary = (*turns, windows) if windowed else turns
    layer(hidden_BNE[:, :64], text_BLE, modulation, tuple(t[:, :64] for t in turns))  # warm
    before = _peak(device, reset=True)
    times = []
    for _ in range(repeats):
        began = time.perf_counter() if device.type == "cuda" else time.process_time()
        layer(hidden_BNE, text_BLE, modulation, rotary)
        if device.type == "cuda":
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        else:
            times.append(time.process_time() - began)
    return Cost(num, statistics.median(times), _peak(device) - before)


def _peak(device: torch.device, *, reset: bool = False) -> float:
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / GIB
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def costs(*, full_size: bool = False) -> dict[bool, list[Cost]]:
    """In windows and in full, of each number of seconds."""
    # Each allocation is the system's own, so a process's peak is that of what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("spawn")
    found: dict[bool, list[Cost]] = {True: [], False: []}
    for seconds in SECONDS:
        for windowed in found:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found[windowed].append(
                    pool.submit(cost, seconds, windowed, full_size=full_size).result()
                )
    return found


def windows() -> list[Figure]:
    """The table of `make bench`."""
    full_size = torch.cuda.is_available()
    found = costs(full_size=full_size)
    where = "Wan 1.3B, 480p" if full_size else "128 wide, a smaller grid"
    unit = "s" if full_size else "CPU s"
    lines = []
    for windowed, name in ((True, "in windows of 5 s"), (False, "in full")):
        each = found[windowed]
        times = " / ".join(f"{c.seconds:.3g}" for c in each)
        memory = " / ".join(f"{c.gib:.2f}" for c in each)
        growth = each[-1].seconds / each[0].seconds
        more = each[-1].tokens / each[0].tokens
        peak = each[-1].gib / max(each[0].gib, 1e-6)
        lines.append(
            Figure(
                f"a layer on {' / '.join(map(str, SECONDS))} s of tokens ({where}), {name}",
                f"{times} {unit}; {growth:.1f} times from first to last ({more:.1f} times the"
                f" tokens); peak {memory} GiB",
                "linear in both" if windowed else "",
                growth <= 1.15 * more and peak <= 1.15 * more if windowed else None,
            )
        )
    ratio = found[False][-1].seconds / found[True][-1].seconds
    lines.append(Figure("the same at 60 s, full / in windows", f"{ratio:.1f}"))
    return lines
