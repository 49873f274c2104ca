"""From a prompt to a video with RISE-T2V: the LLM rephrases once, and its states are the text.

Shapes: B prompts, F frames, H W pixels; K scenes, L positions of the conditioning, D its width,
S tokens, E width of the LLM.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.caption import Instruction
from trainers.adapter import RephrasingAdapter, padded
from trainers.decoder import DecoderLM, Rephrased
from trainers.encoders import Precision
from trainers.generation import (
    Generated,
    Progress,
    Size,
    add_exported_lora,
    asked,
    placed,
    seconds_since,
    told,
    videos_of,
)
from trainers.languages import language_of
from trainers.rise import LORA, MOTION_FOLDER, MOTION_LORA, Rise
from trainers.system import read_pipeline
from trainers.vdm import VDM, Conditioning

Mode = Literal["dense", "multi_scene", "multilingual", "two_stage"]
Schedule = Literal["step", "interpolated"]
SCENES = {"multi_scene": 2}
"""The paper's instruction asks for the first frame and the last."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Prompts as the video model is given them."""

    conditioning: Conditioning
    rephrased: tuple[Rephrased, ...]
    notes: tuple[tuple[str, ...], ...]
    seconds: dict[str, float]


class RisePipeline:
    """RISE-T2V, loaded: `from_export` makes one.

    Args:
        rise: The system that was trained.
        lm: Its LLM.
        vdm: Its video model, with the LoRA.
        adapter: On the same device.
        instructions: By mode, what the LLM is told.
        size: Frames, lines and columns of a video by default, and its frames a second.
    """

    modes = ("mode", "schedule", "language", "sample")
    """What `__call__` takes beside what every pipeline does."""

    def __init__(
        self,
        rise: Rise,
        lm: DecoderLM,
        vdm: VDM,
        adapter: RephrasingAdapter,
        instructions: dict[str, Instruction],
        size: Size,
    ):
        self.rise, self.lm, self.vdm, self.adapter = rise, lm, vdm, adapter
        self.instructions, self.size = instructions, size
        self.device = adapter.null_LD.device

    @classmethod
    def from_export(
        cls, folder: str | Path, *, device: str | None = None, precision: Precision | None = None
    ) -> Self:
        """Loads what `python -m trainers export` wrote, and the base models that it names.

        Args:
            folder: The export.
            device: By default a GPU where there is one.
            precision: By default bf16 on a GPU, and fp32 elsewhere.

        Raises:
            ValueError: It is no export, or a base model is missing.
        """
        folder = Path(folder).expanduser()
        about = read_pipeline(folder, "rise")
        rise = Rise.from_portable(about["rise"])
        where, dtype = placed(device, precision)
        weights = load_file(folder / "adapter.safetensors")
        vdm = rise.vdm.load(video=True, device=where, dtype=dtype)
        adapter = RephrasingAdapter(rise.lm.width(), vdm.text_dim, weights["null_LD"], rise.adapter)
        adapter.load_state_dict(weights)
        add_exported_lora(vdm, folder, LORA, rise.vdm.kind, rise.rank, vdm.lora_targets)
        if (folder / MOTION_FOLDER).is_dir():
            targets = vdm.motion_lora_targets
            add_exported_lora(
                vdm, folder / MOTION_FOLDER, MOTION_LORA, rise.vdm.kind, rise.rank, targets
            )
        instructions = {
            path.stem: Instruction(
                name=path.stem, text=path.read_text("utf-8"), scenes=SCENES.get(path.stem)
            )
            for path in sorted((folder / "instructions").glob("*.txt"))
        }
        lm = rise.lm.load(where, dtype)
        adapter = adapter.to(where).eval().requires_grad_(False)
        return cls(rise, lm, vdm, adapter, instructions, Size(**about["video"]))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        mode: Mode = "dense",
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        seed: int | Sequence[int] = 0,
        schedule: Schedule = "interpolated",
        language: str | None = None,
        sample: bool = False,
        progress: Progress = lambda *_: None,
    ) -> Generated | list[Generated]:
        """Generates a video, or one for each of several prompts in one batch.

        Args:
            prompt: One, or several.
            mode: What the LLM is asked for. `two_stage` is the paper's comparison (table 2): the
                rephrased text goes through the video model's own encoder, without the LoRA.
            frames: Of the video; like height and width, by default as it was trained.
            height: In px.
            width: In px.
            steps: Of DDIM.
            guidance_scale: Of classifier-free guidance; 1 is none.
            seed: Of the noise, for all or for each; a video does not depend on those beside it.
            schedule: How the frames of `multi_scene` pass from scene to scene: at once, or by
                and by.
            language: Of the prompt in mode `multilingual`, such as French; by default detected.
            sample: Draw the LLM's tokens (by the same seed); else the likeliest are taken.
            progress: Told of every step.

        Raises:
            ValueError: The model has no such shape, or a prompt is too long.
        """
        prompts, seeds = asked(prompt, seed)
        size = self.size.changed(frames=frames, height_px=height, width_px=width)
        shape = self.vdm.latent_shape(size.frames, size.height_px, size.width_px)
        text = self.condition(
            prompts,
            mode=mode,
            frames=size.frames,
            schedule=schedule,
            language=language,
            seeds=seeds if sample else None,
            progress=progress,
        )
        two_stage = mode == "two_stage"
        null_LD = self.vdm.encode_text([""])[0] if two_stage else self.adapter.null_LD
        with _without_lora(self.vdm) if two_stage else contextlib.nullcontext():
            videos, seconds = videos_of(
                self.vdm,
                text.conditioning,
                null_LD,
                shape,
                seeds,
                steps=steps,
                guidance_scale=guidance_scale,
                progress=progress,
            )
        return told(
            prompt,
            videos,
            prompts=prompts,
            seeds=seeds,
            fps=size.fps,
            timings=text.seconds | seconds,
            rephrased=[said.text for said in text.rephrased],
            scenes=[tuple(scene.text for scene in said.scenes) for said in text.rephrased],
            notes=text.notes,
        )

    @torch.no_grad()
    def condition(
        self,
        prompts: Sequence[str],
        *,
        mode: Mode = "dense",
        frames: int | None = None,
        schedule: Schedule = "interpolated",
        language: str | None = None,
        seeds: Sequence[int] | None = None,
        progress: Progress = lambda *_: None,
    ) -> Text:
        """What the video model is given for some prompts: one pass of the LLM, and the adapter.

        Args:
            prompts: As of `__call__`, like the rest.
            mode: See there.
            frames: Of the videos, for the schedule of scenes.
            schedule: See there.
            language: See there.
            seeds: Of the LLM's tokens; None takes the likeliest.
            progress: See there.
        """
        instruction = self.instructions["dense" if mode == "two_stage" else mode]
        languages = None
        if instruction.needs_language:
            languages = [language or language_of(prompt) for prompt in prompts]
        limit, began = self.adapter.length, time.perf_counter()
        said = self.lm.rephrase(
            instruction,
            prompts,
            languages=languages,
            max_new_tokens=limit * (instruction.scenes or 1) + 1,  # the last has no state
            sample=seeds is not None,
            seeds=seeds,
            progress=lambda n: progress("rephrasing", n, limit),
        )
        rephrased_s = seconds_since(began, self.device)
        began = time.perf_counter()
        if mode == "two_stage":
            tokens_BLD = self.vdm.encode_text([r.text for r in said])
            conditioning = Conditioning(tokens_BLD[:, None])
        else:
            conditioning = self._adapted(said, frames or self.size.frames, schedule)
        notes = [_notes(one, instruction, limit) for one in said]
        if languages and not language:
            notes = [
                (f"taken for {name}", *own) for name, own in zip(languages, notes, strict=True)
            ]
        seconds = {"rephrase_s": rephrased_s, "text_s": seconds_since(began, self.device)}
        return Text(
            conditioning=conditioning, rephrased=tuple(said), notes=tuple(notes), seconds=seconds
        )

    def _adapted(self, said: Sequence[Rephrased], frames: int, schedule: Schedule) -> Conditioning:
        """The adapter on each scene's states; a text with fewer scenes than others shares none."""
        num_scenes = max(len(one.scenes) for one in said)
        states = [
            one.states_SD[scene.span] for one in said for scene in _filled(one.scenes, num_scenes)
        ]
        states_NLE, length_N = padded(states, self.adapter.length)
        tokens_NLD = self.adapter(states_NLE, length_N)
        tokens_BKLD = tokens_NLD.unflatten(0, (len(said), num_scenes))
        if num_scenes == 1:
            return Conditioning(tokens_BKLD)
        shares = [shares_of(len(one.scenes), frames, schedule) for one in said]
        shares_BFK = torch.zeros(len(said), frames, num_scenes)
        for row_FK, own_FK in zip(shares_BFK, shares, strict=True):
            row_FK[:, : own_FK.shape[1]] = own_FK
        return Conditioning(tokens_BKLD, shares_BFK.to(tokens_BKLD.device))


def shares_of(num_scenes: int, frames: int, schedule: Schedule) -> Tensor:
    """How much of each scene a frame follows, (F, K).

    `step`: scenes take equal parts of the video, one after the other. `interpolated`: the first
    frame is the first scene's and the last the last's, as the paper's instruction describes them;
    between the places of two scenes their shares change linearly.
    """
    if schedule == "step":
        scene_F = torch.arange(frames) * num_scenes // frames
        return torch.nn.functional.one_hot(scene_F, num_scenes).float()
    place_F = torch.linspace(0, num_scenes - 1, frames)
    return (1 - (place_F[:, None] - torch.arange(num_scenes)).abs()).clamp(min=0)


def _filled(scenes: Sequence, num: int) -> Iterator:
    """The scenes, and the first again in place of those that are lacking."""
    yield from scenes
    for _ in range(num - len(scenes)):
        yield scenes[0]


def _notes(said: Rephrased, instruction: Instruction, limit: int) -> tuple[str, ...]:
    notes = [said.fault] if said.fault else []
    longest = max((s.span.stop - s.span.start for s in said.scenes), default=0)
    if longest > limit:
        notes.append(f"{longest - limit} tokens of the rephrased text were cut: {limit} are read")
    return tuple(notes)


@contextlib.contextmanager
def _without_lora(vdm: VDM) -> Iterator[None]:
    vdm.denoiser.disable_adapters()
    try:
        yield
    finally:
        vdm.denoiser.enable_adapters()
