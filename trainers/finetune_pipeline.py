"""From a prompt to a video with the papers' baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from trainers.encoders import Precision
from trainers.finetune import LORA, Finetune
from trainers.generation import (
    Generated,
    Progress,
    Size,
    asked,
    check_texts,
    placed,
    told,
    videos_of,
)
from trainers.system import read_pipeline
from trainers.tuning import load_tuned
from trainers.vdm import VDM, Conditioning


class FinetunedPipeline:
    """A baseline: the video model as `Finetune` trained it on.

    Args:
        vdm: With what was trained.
        size: Of its videos.
    """

    modes = ()
    """What `__call__` takes beside what every pipeline does."""

    def __init__(self, vdm: VDM, size: Size):
        self.vdm, self.size = vdm, size

    @classmethod
    def from_export(
        cls, folder: str | Path, *, device: str | None = None, precision: Precision | None = None
    ) -> Self:
        """Loads an export; see `RisePipeline.from_export`."""
        folder = Path(folder).expanduser()
        about = read_pipeline(folder, "finetune")
        system = Finetune.from_portable(about["finetune"])
        where, dtype = placed(device, precision)
        size = Size(**about["video"])
        variant = system.variant(size.fps)
        vdm = system.vdm.load(video=True, device=where, dtype=dtype, variant=variant)
        load_tuned(vdm, system.tuning, folder, system.vdm.kind, rank=system.rank, name=LORA)
        return cls(vdm, size)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] = 0,
        progress: Progress = lambda *_: None,
    ) -> Generated | list[Generated]:
        """Generates a video, or one for each of several prompts; see `RisePipeline.__call__`."""
        prompts, seeds = asked(prompt, seed)
        size = self.size.changed(frames=frames, height_px=height, width_px=width)
        shape = self.vdm.latent_shape(size.frames, size.height_px, size.width_px)
        check_texts(self.vdm, prompts)
        text_BLD = self.vdm.encode_text(prompts)
        videos, seconds = videos_of(
            self.vdm,
            Conditioning(text_BLD[:, None]),
            self.vdm.encode_text([""])[0],
            shape,
            seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            progress=progress,
        )
        return told(prompt, videos, prompts=prompts, seeds=seeds, fps=size.fps, timings=seconds)
