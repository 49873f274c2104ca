"""Mimir: a video model that reads its text encoder's tokens and a decoder-only LLM's, fused.

The LLM is asked to describe the video of a prompt. The states of the prompt's tokens and then of
the answer's, of which `variants` are drawn and take turns, are summed with the text encoder's,
position by position; behind them stand semantic tokens. One stage, `fuse`, trains the token fuser
and the video model end to end.

Shapes: B samples, L text positions, D width of the text encoder; K variants of an answer, E width
of the LLM, N attribute instructions; latents as in `trainers.vdm`.

Source: Mimir (arXiv 2412.03085), sections 2.2 and 2.3, and algorithm 1.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.caption import Instruction
from engine.weights import Weights
from trainers.adapter import padded
from trainers.answers import Answers, AnswerStates, Attributes, Prompt, lengths
from trainers.diffusion import Folder
from trainers.encoders import BaseText, Latents, count_cut, dtype_of, empty_text, stacked
from trainers.fuser import NUM_ATTRIBUTES, TokenFuser
from trainers.language import LanguageModel
from trainers.prompts import Prompts
from trainers.system import (
    Card,
    Encoder,
    Learner,
    Noise,
    Sample,
    System,
    TrainStage,
    named,
    write_pipeline,
)
from trainers.tuning import Tuning, below, save_tuned, tune
from trainers.vdm import VDM, Backbone, Conditioning, Variant, check_buckets, drawn

_log = logging.getLogger(__name__)
STAGE, LORA, FUSER = "fuse", "mimir", "fuser.safetensors"
ANSWER = (
    "Describe in detail the video that a caption is of, in one paragraph of plain English: its"
    " objects and their colors, how they move and change, where they are to each other, and the"
    " surroundings.\n\nCaption: {y_ori}\n\nDescription:"
)
# The first is the paper's example; the others it names by their attribute alone.
ATTRIBUTES = tuple(
    f"Describe the detailed {attribute} in the video.\n\nCaption: {{y_ori}}\n\nDescription:"
    for attribute in ("objects", "colors", "motion", "spatial relationships")
)


@dataclass(frozen=True, kw_only=True)
class Mimir(System):
    """Mimir on CogVideoX and any decoder-only LLM; `ROWS` of `trainers.fuser` are its ablations."""

    lm: LanguageModel
    vdm: Backbone
    decoder: bool = True
    """The LLM's tokens; without them it is the paper's baseline, and there is no LLM."""
    norm: bool = True
    """Norm, scale and bias of the LLM's tokens."""
    zero_conv: bool = True
    """Zero-convs; without, the LLM's tokens go through a linear map of random start."""
    stabilizer: bool = True
    """The semantic stabilizer."""
    alpha: float = 1.0
    """Share of the LLM's tokens in the sum."""
    scale_init: float = 0.01
    """Where the scale of `norm` starts."""
    tuning: Tuning = "full"
    """How the denoiser is trained; the paper does not say, and its collapse in row two of table 3
    tells that it is."""
    rank: int = 128
    """Of a LoRA."""
    variants: int = 4
    """K: answers that are drawn for each prompt."""
    temperature: float = 0.7
    """Of drawing."""
    top_p: float = 0.9
    """Of drawing."""
    max_answer_tokens: int = 226
    """Of an answer; with the prompt's tokens so many are read as the video model takes."""
    answer_instruction: str = ANSWER
    """What the LLM is told, with the slot {y_ori} for the prompt."""
    attribute_instructions: tuple[str, ...] = ATTRIBUTES
    """The same, for each semantic token."""
    prompt: Prompt = "caption"
    """Which text of a row the LLM is asked about, where there are two: equation 3 gives both
    branches the same, and the text encoder reads the caption."""
    text_dropout: float = 0.1
    """Share of samples that train the unconditional."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Optimiser groups of its stage."""
        trained = {"fuser": self.decoder, "denoiser": self.tuning != "frozen"}
        return tuple(group for group, there in trained.items() if there)

    def check(self, stage: TrainStage) -> None:
        """Raises ValueError where models are missing or shapes do not meet."""
        if stage.name != STAGE:
            raise ValueError(f"Mimir has the stage {STAGE}, and no {stage.name!r}")
        if self.vdm.kind != "cogvideox":
            raise ValueError(
                f"Mimir needs a CogVideoX, which reads text and video as one sequence, and"
                f" {self.vdm.base.at} is taken for {self.vdm.kind}"
            )
        self.vdm.facts()
        self._check_schedule()
        if {o.group for o in stage.optim} != set(self.groups) or not self.groups:
            raise ValueError(
                f"with tuning {self.tuning} and {'an' if self.decoder else 'no'} LLM"
                f" {' and '.join(self.groups) or 'nothing'} can be trained, but the stage names"
                f" {' and '.join(o.group for o in stage.optim) or 'nothing'}"
            )
        check_buckets(self.vdm, stage.data.buckets)
        if self.decoder:
            self._check_texts()
        elif self.stabilizer:
            raise ValueError("stabilizer: its tokens are the LLM's, so it needs decoder too")

    def _check_schedule(self) -> None:
        found = Folder.of("CogVideoX", self.vdm.base, None).config("scheduler")
        kind, zero = found.get("prediction_type"), found.get("rescale_betas_zero_snr")
        if kind != "v_prediction" or not zero:
            raise ValueError(
                "Mimir trains v-prediction with a terminal SNR of zero, as CogVideoX's scheduler"
                f" says, but that of {self.vdm.base.at} says prediction_type {kind} and"
                f" rescale_betas_zero_snr {zero}"
            )

    def _check_texts(self) -> None:
        """The LLM is there, and its instructions leave room for prompt and answer."""
        self.lm.check()
        if self.variants < 1 or self.max_answer_tokens < 1:
            raise ValueError(
                f"{self.variants} answers of {self.max_answer_tokens} tokens: at least 1 of 1"
            )
        if len(self.attribute_instructions) != NUM_ATTRIBUTES:
            raise ValueError(
                f"{NUM_ATTRIBUTES} attribute instructions are needed, and"
                f" {len(self.attribute_instructions)} were given"
            )
        prompts = Prompts.load(self.lm)
        text_len = self.vdm.facts().text_len  # of a prompt that the text encoder reads whole
        for number, text in enumerate((self.answer_instruction, *self.attribute_instructions)):
            told = Instruction(name=f"attribute {number}" if number else "answer", text=text)
            num = len(prompts.tokenized(told.text, None, "a").prompt) + text_len
            prompts.check_length(num, 0 if number else self.max_answer_tokens)

    def encoders(self, stage: TrainStage) -> tuple[Encoder, ...]:
        """The VAE, the model's own text encoder, and the LLM's tokens."""
        own = (
            Latents(vdm=self.vdm, precision=stage.precision),
            BaseText(vdm=self.vdm, precision=stage.precision),
        )
        if not self.decoder:
            return own
        answers = Answers(
            lm=self.lm,
            precision=stage.precision,
            instruction=self.answer_instruction,
            prompt=self.prompt,
            variants=self.variants,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_answer_tokens,
        )
        limit = self.vdm.facts().text_len
        states = AnswerStates(lm=self.lm, precision=stage.precision, limit=limit)
        if not self.stabilizer:
            return (*own, answers, states)
        attributes = Attributes(
            lm=self.lm,
            precision=stage.precision,
            instructions=self.attribute_instructions,
            prompt=self.prompt,
        )
        return (*own, answers, states, attributes)

    def fuser(self, seed: int = 0) -> TokenFuser:
        """A fuser as training starts from."""
        width = self.lm.width() if self.decoder else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TokenFuser(
                self.vdm.facts().text_dim,
                width,
                decoder=self.decoder,
                norm=self.norm,
                zero_conv=self.zero_conv,
                stabilizer=self.stabilizer,
                alpha=self.alpha,
                scale_init=self.scale_init,
            )

    def learner(
        self,
        stage: TrainStage,
        device: torch.device,
        parents: Mapping[str, Mapping[str, Tensor]],
    ) -> MimirLearner:
        """The system loaded for its stage."""
        dtype = dtype_of(stage.precision)
        null_LD = empty_text(self.vdm.load(video=True, device=device, dtype=dtype))
        # Trained weights are fp32: those of a file in fp16 would lose bits in bf16 before.
        whole = torch.float32 if self.tuning == "full" else dtype
        vdm = self.vdm.load(video=True, device=device, dtype=whole)
        tune(vdm, self.tuning, rank=self.rank, name=LORA, seed=stage.seed)
        module = MimirModule(vdm, self.fuser(stage.seed).to(device))
        return MimirLearner(module, null_LD, self.text_dropout)

    def export(
        self,
        results: Mapping[str, Mapping[str, Tensor]],
        stages: Sequence[TrainStage],
        folder: Path,
    ) -> Card:
        """Writes the fuser, the denoiser, and what the pipeline is made of."""
        (stage,) = stages
        lm = replace(self.lm, weights=self.lm.weights.pinned()) if self.decoder else self.lm
        pinned = replace(self, lm=lm, vdm=self.vdm.pinned())
        files = {"pipeline.json": "base models, sizes and instructions"}
        if fuser := below("fuser.", results[STAGE]):
            save_file({n: t.detach().cpu().contiguous() for n, t in fuser.items()}, folder / FUSER)
            files[FUSER] = "the token fuser"
        files |= save_tuned(
            below("denoiser.", results[STAGE]),
            self.tuning,
            folder,
            pinned.vdm,
            Variant(),
            rank=self.rank,
            name=LORA,
            dtype=dtype_of(stage.precision),
        )
        write_pipeline(folder, "mimir", pinned, stages)
        return Card(
            title="Mimir",
            paper="Mimir: Improving Video Diffusion Models for Precise Text Understanding"
            " (arXiv 2412.03085)",
            models={
                **({"LLM": named(lm.weights)} if self.decoder else {}),
                "video model": named(pinned.vdm.base),
            },
            files=files,
            usage=_USAGE,
            limits=(
                "The video model's own limits stay.",
                "Answers are drawn: they may add what was not asked for.",
            ),
        )

    @classmethod
    def from_portable(cls, about: Mapping[str, Any]) -> Mimir:
        """The system that an export names."""
        lm = LanguageModel(**about["lm"] | {"weights": Weights(**about["lm"]["weights"])})
        given = {
            "lm": lm,
            "vdm": Backbone.from_portable(about["vdm"]),
            "attribute_instructions": tuple(about["attribute_instructions"]),
        }
        return cls(**dict(about) | given)


class MimirModule(nn.Module):
    """What is trained, and its loss.

    Args:
        vdm: Tuned.
        fuser: On the same device.
    """

    def __init__(self, vdm: VDM, fuser: TokenFuser):
        super().__init__()
        self.fuser, self.denoiser, self.vdm = fuser, vdm.denoiser, vdm

    def forward(
        self,
        encoder_BLD: Tensor,
        decoder_BLE: Tensor | None = None,
        length_B: Tensor | None = None,
        attributes_BNE: Tensor | None = None,
        **latents: Tensor,
    ) -> Tensor:
        """Losses (B,): see `TokenFuser.forward` and `VDM.losses`, which takes `latents`."""
        text_BLD = self.fuser(encoder_BLD, decoder_BLE, length_B, attributes_BNE)
        return self.vdm.losses(text=Conditioning(text_BLD[:, None]), **latents)


class MimirLearner(Learner):
    """Mimir under training.

    Args:
        module: As the stage starts.
        null_LD: What the text encoder makes of an empty text.
        text_dropout: Share of samples that get it, and nothing of the LLM.
    """

    def __init__(self, module: MimirModule, null_LD: Tensor, text_dropout: float):
        self.module, self.blocks = module, module.vdm.blocks
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        groups = {
            group: [n for n in trained if n.startswith(f"{group}.")]
            for group in ("fuser", "denoiser")
        }
        self.groups = {group: names for group, names in groups.items() if names}
        self.counts = Counter(texts_cut=0, answers_cut=0)
        self._null_LD, self._dropout = null_LD, text_dropout

    def checkpoint_gradients(self) -> None:
        """From now on activations are computed again in backward."""
        self.module.vdm.denoiser.enable_gradient_checkpointing()

    def batch(self, samples: Sequence[Sample], noise: Noise) -> dict[str, Tensor]:
        """Tokens, latents, and what is drawn for them."""
        count_cut(self.module.vdm, samples, self.counts)
        device = self._null_LD.device
        dropped_B = noise.uniform("drop") < self._dropout
        moments_B2CTYX = stacked(samples, "latents", device)
        text_BLD = stacked(samples, "base_text", device)
        null_LD = self._null_LD.to(text_BLD.dtype)
        given = {
            "encoder_BLD": torch.where(dropped_B.to(device)[:, None, None], null_LD, text_BLD),
            "moments_B2CTYX": moments_B2CTYX,
            **drawn(noise, moments_B2CTYX),
        }
        if self.module.fuser.decoder is not None:
            decoder_BLE, length_B = self._said(samples, noise.uniform("answer"))
            length_B = length_B.masked_fill(dropped_B, 0)
            given |= {"decoder_BLE": decoder_BLE.to(device), "length_B": length_B.to(device)}
        if self.module.fuser.instruction is not None:
            given["attributes_BNE"] = stacked(samples, "attributes", device)
        return given

    def _said(self, samples: Sequence[Sample], at_B: Tensor) -> tuple[Tensor, Tensor]:
        """The LLM's tokens with one of each sample's answers (B, L, E), and how many (B,)."""
        limit, states, cut = len(self._null_LD), [], 0
        for sample, at in zip(samples, at_B.tolist(), strict=True):
            length_K = lengths(sample.features["answers"])
            which = int(at * len(length_K))
            cut += length_K[which] > limit
            states.append(sample.features["answer_states"][which, : length_K[which]])
        if cut and not self.counts["answers_cut"]:
            _log.warning("%d of %d answers end behind %d tokens: cut", cut, len(samples), limit)
        self.counts["answers_cut"] += cut
        decoder_BLE, length_B = padded(states, limit)
        return decoder_BLE, length_B.cpu()


_USAGE = """\
from trainers.mimir_pipeline import MimirPipeline

pipe = MimirPipeline.from_export("{folder}")
made = pipe("a cute cat", frames=49, seed=0)
made.video, made.rephrased, made.timings
"""
