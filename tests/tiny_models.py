"""Models that make videos within a tenth of a second, small files, and suites of a few prompts."""

import functools
import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np

from evals.suites import Prompt, Suite
from trainers.recipes import recipe

TEXTS = ("a red car", "a cat / a dog", "A cat", "a cat")
"""Two that are alike but for the case of a letter, and one that no file can be named after."""


def make_export(folder: Path, *, seed: int = 0) -> Path:
    """An export of a system as it is before training; the seed tells its weights from others'."""
    import torch

    chosen = recipe("tiny_baseline_finetune")
    (stage,) = chosen.stages
    learner = chosen.system.learner(stage, torch.device("cpu"), {})
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(p.shape, generator=generator) * 0.05
        for name, p in learner.module.named_parameters()
        if p.requires_grad
    }
    folder.mkdir(parents=True)
    chosen.system.export({stage.name: weights}, chosen.stages, folder)
    facts = {stage.name: {"config": {"recipe": chosen.name}}}
    (folder / "training.json").write_text(json.dumps(facts))
    return folder


def suite_of(*texts: str, samples: int = 1) -> Suite:
    """A suite of prompts that are their own texts."""
    prompts = (
        Prompt(prompt=text, text=text, dimensions=("temporal_flickering",), samples=samples)
        for text in texts
    )
    return Suite(name="few", source="a test", prompts=tuple(prompts))


def encoded(
    codec: str, container: str, seed: int = 0, *, frames: int = 4, pix_fmt: str = "yuv420p"
) -> bytes:
    """A video of 64 x 48 px at 8 frames a second, that its seed tells from others."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for number in range(frames):
            pixels = np.full((48, 64, 3), (20 + 30 * seed + 5 * number) % 256, np.uint8)
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            out.mux(stream.encode(picture.reformat(format=pix_fmt)))
        out.mux(stream.encode())
    return file.getvalue()


@functools.cache
def mp4(seed: int = 0, *, frames: int = 4) -> bytes:
    """One that VBench reads as it is; the same bytes each time, which x264 does not promise."""
    return encoded("libx264", "mp4", seed, frames=frames)


def frames_of(file: bytes) -> np.ndarray:
    """RGB (F, H, W, 3) that can be subtracted. Encoding costs a video of noise about 8 on average,
    and x264 does not encode it twice alike; of another seed it is 24 away."""
    with av.open(io.BytesIO(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).astype(int)
