"""From a prompt to a video of any length with SemanticGen, and from a video to one like it.

Shapes: B prompts, F frames, H W pixels; L text positions, D their width; K S V U channels, frames,
lines and columns of the embeddings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.video import probe
from trainers.encoders import Precision
from trainers.frames import pixels_of
from trainers.generation import (
    Generated,
    Progress,
    Size,
    asked,
    check_texts,
    placed,
    seconds_since,
    told,
    videos_of,
)
from trainers.semantic import LORA, Beside, SemanticCompressor, SemanticGen
from trainers.semantic_towers import SemanticTower
from trainers.system import Bucket, Noise, read_pipeline
from trainers.tuning import load_tuned
from trainers.vdm import VDM, Conditioning, Context


class SemanticGenPipeline:
    """SemanticGen, loaded: `from_export` makes one.

    Args:
        system: That was trained.
        filler: The VAE-latent generator.
        beside: Embeddings as its tokens.
        planner: The semantic generator; None where that stage was not trained.
        compressor: For reconstruction.
        size: Of a video by default.
    """

    modes = ("seconds", "reference")
    """What `__call__` takes beside what every pipeline does."""

    def __init__(
        self,
        system: SemanticGen,
        filler: VDM,
        beside: Beside,
        planner: VDM | None,
        compressor: SemanticCompressor,
        size: Size,
    ):
        self.system, self.filler, self.beside = system, filler, beside
        self.planner, self.compressor, self.size = planner, compressor, size
        self.device = beside.null_E.device
        self._dtype = next(filler.denoiser.parameters()).dtype
        self._tower: SemanticTower | None = None

    @classmethod
    def from_export(
        cls, folder: str | Path, *, device: str | None = None, precision: Precision | None = None
    ) -> Self:
        """Loads an export; see `RisePipeline.from_export`."""
        folder = Path(folder).expanduser()
        about = read_pipeline(folder, "semanticgen")
        system = SemanticGen.from_portable(about["semanticgen"])
        where, dtype = placed(device, precision)
        size = Size(**about["video"])
        bucket = Bucket(frames=size.frames, height_px=size.height_px, width_px=size.width_px)
        variants = {
            "latents": system.variant(size.fps),
            "semantics": system.planner(bucket, size.fps),
        }
        loaded = {}
        for stage in about["stages"]:
            vdm = system.vdm.load(video=True, device=where, dtype=dtype, variant=variants[stage])
            tuning = system.tuning_of(stage)
            load_tuned(vdm, tuning, folder / stage, system.vdm.kind, rank=system.rank, name=LORA)
            loaded[stage] = vdm
        filler = loaded["latents"]
        assert filler.width is not None
        compressor = system.compressor()
        compressor.load_state_dict(load_file(folder / "compressor.safetensors"))
        beside = Beside(system.embedding_channels(), filler.width)
        beside.load_state_dict(load_file(folder / "beside.safetensors"))
        compressor, beside = (
            m.to(where).eval().requires_grad_(False) for m in (compressor, beside)
        )
        return cls(system, filler, beside, loaded.get("semantics"), compressor, size)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        seconds: float | None = None,
        reference: str | Path | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 5.0,
        seed: int | Sequence[int] = 0,
        progress: Progress = lambda *_: None,
    ) -> Generated | list[Generated]:
        """Generates a video, or one for each of several prompts in one batch.

        Args:
            prompt: One, or several.
            seconds: Length of the video, in place of `frames`.
            reference: A video whose embeddings are used in place of generated ones (figure 4).
            frames: Of the video; like height and width, by default as it was trained.
            height: In px.
            width: In px.
            steps: Of Euler's method, in each of the two spaces.
            guidance_scale: Of classifier-free guidance; 1 is none.
            seed: Of the noise, for all or for each; a video does not depend on those beside it.
            progress: Told of every step.

        Raises:
            ValueError: The models have no such shape, or the reference is too short for it.
        """
        prompts, seeds = asked(prompt, seed)
        if seconds is not None:
            if frames is not None:
                raise ValueError("name seconds or frames, not both")
            frames = round(seconds * self.size.fps) + 1
        size = self.size.changed(frames=frames, height_px=height, width_px=width)
        bucket = Bucket(frames=size.frames, height_px=size.height_px, width_px=size.width_px)
        shape = self.filler.latent_shape(size.frames, size.height_px, size.width_px)
        grid = self.system.encoder.grid(bucket, size.fps)
        check_texts(self.filler, prompts)
        began = time.perf_counter()
        text_BLD = self.filler.encode_text(prompts)
        null_LD = self.filler.encode_text([""])[0]
        spent = {"text_s": seconds_since(began, self.device)}
        began = time.perf_counter()
        if reference is not None:
            progress("encoding", 0, 1)
            embeddings = self.embeddings_of(reference, bucket).expand(len(prompts), -1, -1, -1, -1)
        else:
            embeddings = self._planned(
                text_BLD, null_LD, grid, seeds, steps, guidance_scale, progress
            )
        spent["plan_s"] = seconds_since(began, self.device)
        videos, seconds_of = videos_of(
            self.filler,
            replace(Conditioning(text_BLD[:, None]), context=self._context(embeddings)),
            null_LD,
            shape,
            seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            null_context=self._context(embeddings, dropped=True),
            progress=progress,
        )
        timings = spent | seconds_of
        return told(prompt, videos, prompts=prompts, seeds=seeds, fps=size.fps, timings=timings)

    def reconstruct(self, reference: str | Path, prompt: str = "", **how: object) -> Generated:
        """A video of what a reference video shows, as its embeddings tell it (paper, figure 4).

        Args:
            reference: A video file; as many of its frames are taken as the result has, from its
                middle.
            prompt: Beside the embeddings.
            how: As of `__call__`.
        """
        made = self(prompt, reference=reference, **how)  # type: ignore[arg-type]
        assert isinstance(made, Generated)
        return made

    @torch.no_grad()
    def embeddings_of(self, reference: str | Path, bucket: Bucket) -> Tensor:
        """Whitened embeddings of a video file, the posterior's means, (1, K, S, V, U)."""
        uri, fps = str(reference), self.size.fps
        if not Path(uri).is_file():
            raise ValueError(f"{uri} is no file: name a video to take embeddings of")
        length_s = probe(uri).duration_s
        if length_s is None or length_s + 0.5 / fps < (bucket.frames - 1) / fps:
            found = "of unknown length" if length_s is None else f"{length_s:.2f} s long"
            raise ValueError(
                f"{uri} is {found}, and {(bucket.frames - 1) / fps:.2f} s are needed: name fewer"
                " seconds"
            )
        row = {"source_uri": uri, "media": "video", "start_s": 0.0, "end_s": length_s}
        pixels_FHW3 = torch.from_numpy(pixels_of(row, bucket, fps))
        if self._tower is None:
            self._tower = self.system.encoder.load(self.device, self._dtype)
        sampled_1FHW3 = self.system.encoder.sampled(pixels_FHW3[None], fps)
        features = self._tower.encode(sampled_1FHW3.to(self.device))
        mean, _ = self.compressor.moments(features)
        return self.compressor.whitening(mean).movedim(-1, 1)

    def _planned(
        self,
        text_BLD: Tensor,
        null_LD: Tensor,
        grid: tuple[int, int, int],
        seeds: Sequence[int],
        steps: int,
        guidance_scale: float,
        progress: Progress,
    ) -> Tensor:
        """Whitened embeddings (B, K, S, V, U) that follow texts."""
        if self.planner is None:
            raise ValueError(
                "this export has no stage semantics, which makes embeddings of text: train it, or"
                " give a reference video"
            )
        shape = (self.system.embedding_channels(), *grid)
        noise = torch.cat([Noise(seed, 0, [0]).normal("embeddings", shape) for seed in seeds])
        return self.planner.generate(
            Conditioning(text_BLD[:, None]),
            null_LD,
            noise.to(self.device),
            steps=steps,
            guidance_scale=guidance_scale,
            progress=lambda step: progress("planning", step, steps),
        )

    def _context(self, embeddings_BKSVU: Tensor, *, dropped: bool = False) -> Context:
        dropped_B = torch.full((len(embeddings_BKSVU),), dropped, device=self.device)
        tokens = self.beside(embeddings_BKSVU.movedim(1, -1), dropped_B)
        return Context(tokens, self.system.encoder.middles(tokens.shape[1], self.size.fps))
