"""From a prompt to a video with Mimir: the LLM answers, and the fuser joins what was read and said.

Shapes: B prompts, F frames, H W pixels; L text positions, D width of the text encoder; Q tokens of
a prompt and S of an answer, E width of the LLM, N attribute instructions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.caption import Instruction
from trainers.adapter import padded
from trainers.answers import answered, attributes_of, states_of
from trainers.encoders import Precision
from trainers.fuser import TokenFuser
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
from trainers.mimir import FUSER, LORA, Mimir
from trainers.system import read_pipeline
from trainers.tuning import load_tuned
from trainers.vdm import VDM, Conditioning

if TYPE_CHECKING:
    from trainers.decoder import DecoderLM, Rephrased

Answering = Literal["sample", "greedy"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the LLM gives for a prompt."""

    answer: Rephrased
    query_QE: Tensor
    """States of the prompt's tokens: the same for every answer."""
    answer_SE: Tensor
    """States of the answer's tokens."""
    attributes_NE: Tensor | None
    """States for the attribute instructions; None where there is no stabilizer."""

    @property
    def decoder(self) -> Tensor:
        """The decoder-only tokens (Q + S, E), neither cut nor normed: prompt, then answer."""
        return torch.cat([self.query_QE, self.answer_SE])


@dataclass(frozen=True, kw_only=True)
class PromptTokens:
    """A prompt's tokens on their way to the video model."""

    prompt: str
    encoder_LD: Tensor
    """Of the text encoder, padding included."""
    said: Said | None
    """Of the LLM; None where the system has none."""
    fused_LD: Tensor
    """What the video model is given: the sums, then the semantic tokens."""

    @property
    def text(self) -> str:
        """The answer, or the prompt where there is no LLM."""
        return self.said.answer.text if self.said else self.prompt

    @property
    def notes(self) -> tuple[str, ...]:
        """What did not go as asked, for a person."""
        if self.said is None:
            return ()
        fault, limit = self.said.answer.fault, len(self.encoder_LD)
        notes = [fault] if fault else []
        if (more := len(self.said.decoder) - limit) > 0:
            notes.append(f"{more} tokens of prompt and answer were cut: {limit} are read")
        return tuple(notes)


class MimirPipeline:
    """Mimir, loaded: `from_export` makes one.

    Args:
        mimir: The system that was trained.
        lm: Its LLM; None where it has none.
        vdm: Its video model, as it was tuned.
        fuser: On the same device.
        size: Frames, lines and columns of a video by default, and its frames a second.
    """

    modes = ("answers", "temperature")
    """What `__call__` takes beside what every pipeline does."""

    def __init__(self, mimir: Mimir, lm: DecoderLM | None, vdm: VDM, fuser: TokenFuser, size: Size):
        self.mimir, self.lm, self.vdm, self.fuser, self.size = mimir, lm, vdm, fuser, size
        self._instruction = Instruction(name="answer", text=mimir.answer_instruction)
        with torch.no_grad():
            self.null_LD = fuser.unconditional(vdm.encode_text([""])[0])
        """What stands for no text, as in training."""

    @classmethod
    def from_export(
        cls, folder: str | Path, *, device: str | None = None, precision: Precision | None = None
    ) -> Self:
        """Loads what `python -m trainers export` wrote, and the base models that it names.

        Args:
            folder: The export.
            device: By default a GPU where there is one.
            precision: By default bf16 on a GPU, and fp32 elsewhere; the fuser is always in fp32.

        Raises:
            ValueError: It is no export, or a base model is missing.
        """
        folder = Path(folder).expanduser()
        about = read_pipeline(folder, "mimir")
        mimir = Mimir.from_portable(about["mimir"])
        where, dtype = placed(device, precision)
        vdm = mimir.vdm.load(video=True, device=where, dtype=dtype)
        load_tuned(vdm, mimir.tuning, folder, mimir.vdm.kind, rank=mimir.rank, name=LORA)
        fuser = mimir.fuser()
        if mimir.decoder:
            fuser.load_state_dict(load_file(folder / FUSER))
        lm = mimir.lm.load(where, dtype) if mimir.decoder else None
        fuser = fuser.to(where).eval().requires_grad_(False)
        return cls(mimir, lm, vdm, fuser, Size(**about["video"]))

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        answers: Answering = "sample",
        temperature: float = 0.7,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int = 50,
        guidance_scale: float = 6.0,
        seed: int | Sequence[int] = 0,
        progress: Progress = lambda *_: None,
    ) -> Generated | list[Generated]:
        """Generates a video, or one for each of several prompts in one batch.

        Args:
            prompt: One, or several.
            answers: Draw the LLM's tokens (by the same seed), as in training, or take the
                likeliest.
            temperature: Of drawing.
            frames: Of the video; like height and width, by default as it was trained.
            height: In px.
            width: In px.
            steps: Of DDIM.
            guidance_scale: Of classifier-free guidance; 1 is none.
            seed: Of answer and noise, for all or for each; a video does not depend on those beside
                it.
            progress: Told of every step.

        Raises:
            ValueError: The model has no such shape, or a prompt is too long.
        """
        prompts, seeds = asked(prompt, seed)
        size = self.size.changed(frames=frames, height_px=height, width_px=width)
        shape = self.vdm.latent_shape(size.frames, size.height_px, size.width_px)
        check_texts(self.vdm, prompts)
        began = time.perf_counter()
        found = self.tokens(
            prompts, seeds, answers=answers, temperature=temperature, progress=progress
        )
        rephrase_s = max((one.said.answer.seconds for one in found if one.said), default=0.0)
        text_s = seconds_since(began, self.null_LD.device) - rephrase_s
        fused_BLD = torch.stack([one.fused_LD for one in found])
        videos, seconds = videos_of(
            self.vdm,
            Conditioning(fused_BLD[:, None]),
            self.null_LD,
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
            timings={"rephrase_s": rephrase_s, "text_s": text_s} | seconds,
            rephrased=[one.text for one in found],
            notes=[one.notes for one in found],
        )

    @torch.no_grad()
    def tokens(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        answers: Answering = "sample",
        temperature: float = 0.7,
        progress: Progress = lambda *_: None,
    ) -> list[PromptTokens]:
        """All tokens of each prompt on their way to the video model.

        Args:
            prompts: One or several; the same several times, with seeds of its own each, for as many
                answers to it.
            seeds: Of each answer.
            answers: As of `__call__`, like the rest.
            temperature: See there.
            progress: See there.
        """
        said = self._said(prompts, seeds, answers, temperature, progress)
        encoder_BLD = self.vdm.encode_text(prompts)
        if said:
            decoder_BLE, length_B = padded([s.decoder for s in said], encoder_BLD.shape[1])
            found = [s.attributes_NE for s in said if s.attributes_NE is not None]
            attributes_BNE = torch.stack(found) if found else None
            fused_BLD = self.fuser(encoder_BLD, decoder_BLE, length_B, attributes_BNE)
        else:
            fused_BLD = self.fuser(encoder_BLD)
        own = zip(prompts, encoder_BLD, said or [None] * len(prompts), fused_BLD, strict=True)
        return [PromptTokens(prompt=p, encoder_LD=e, said=s, fused_LD=f) for p, e, s, f in own]

    def _said(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        answers: Answering,
        temperature: float,
        progress: Progress,
    ) -> list[Said]:
        """What the LLM gives for each prompt; nothing where there is none."""
        if self.lm is None:
            return []
        limit = self.mimir.max_answer_tokens
        found = self.lm.rephrase(
            self._instruction,
            prompts,
            max_new_tokens=limit,
            sample=answers == "sample",
            temperature=temperature,
            top_p=self.mimir.top_p,
            seeds=seeds,
            progress=lambda n: progress("rephrasing", n, limit),
        )
        states = states_of(self.lm, answered(self.lm, self._instruction, prompts, found))
        attributes: Sequence[Tensor | None] = [None] * len(found)
        if self.mimir.stabilizer:
            told = self.mimir.attribute_instructions
            attributes = list(attributes_of(self.lm, told, prompts))
        return [
            Said(answer=one, query_QE=query_QE, answer_SE=answer_SE, attributes_NE=attributes_NE)
            for one, (query_QE, answer_SE), attributes_NE in zip(
                found, states, attributes, strict=True
            )
        ]
