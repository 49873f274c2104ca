"""Mimir's encoders over a language model: sampled answers, their states, and those of attributes.

Shapes: K variants of an answer, L positions (of the longest of them), Q tokens of the prompt, S of
an answer, E width of the LLM, N attribute instructions.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from engine.caption import Instruction
from engine.operator import resource
from trainers.encoders import Precision, dtype_of
from trainers.language import LanguageModel
from trainers.prompts import TextIds
from trainers.system import Encoder, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainers.decoder import DecoderLM, Rephrased

Prompt = Literal["original", "caption"]
"""Which text of a row the LLM is asked about."""
_loaded: weakref.WeakValueDictionary[tuple[Any, ...], DecoderLM] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Answered:
    """A prompt within its instruction, with one answer to it."""

    text: TextIds
    num_query: int
    """Tokens of the prompt alone: so many of `text.rest`, from its start."""

    def __len__(self) -> int:
        return self.num_query + len(self.text.answer)

    def cut(self, limit: int) -> Answered:
        """With as many tokens of prompt and answer as fit: the prompt's first."""
        num = min(self.num_query, limit)
        return Answered(replace(self.text, answer=self.text.answer[: limit - num]), num)


def pack(answers: Sequence[Answered]) -> Tensor:
    """One int32 tensor: how many; for each its prompt's tokens and its size; the texts."""
    import torch

    texts = [a.text.pack() for a in answers]
    sizes = [n for a, t in zip(answers, texts, strict=True) for n in (a.num_query, len(t))]
    return torch.cat([torch.tensor([len(answers), *sizes], dtype=torch.int32), *texts])


def unpack(packed: Tensor) -> list[Answered]:
    """What `pack` was given."""
    num = int(packed[0])
    sizes = packed[1 : 1 + 2 * num].view(num, 2).tolist()
    texts = packed[1 + 2 * num :].split([size for _, size in sizes])
    return [Answered(TextIds.unpack(t), q) for t, (q, _) in zip(texts, sizes, strict=True)]


def lengths(packed: Tensor) -> list[int]:
    """Tokens of prompt and answer of each variant."""
    return [len(a) for a in unpack(packed)]


def prompt_of(row: Mapping[str, Any], prompt: Prompt = "caption") -> str:
    """The text of a row that the LLM is asked about: its caption where there is no other."""
    original = row["original"] if prompt == "original" else None
    return original if original and original.strip() else row["rephrased"]


def seed_of(prompt: str, variant: int) -> int:
    """Of drawing an answer: of the prompt and the variant alone."""
    words = f"{variant}:{prompt}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()) >> 1


def answered(
    lm: DecoderLM, instruction: Instruction, prompts: Sequence[str], said: Sequence[Rephrased]
) -> list[Answered]:
    """Prompts with the tokens that were said to them, to be read again by `states_of`.

    They are all that were generated, with what a chat model says around its answer, but for what
    follows where it went on with an input of its own.
    """
    found = []
    for prompt, one in zip(prompts, said, strict=True):
        text = lm.tokenized(instruction.text, None, prompt)
        ids = one.generated[: one.kept.stop] if one.stopped == "stop" else one.generated
        found.append(Answered(replace(text, answer=ids), lm.prompts.num_tokens(prompt)))
    return found


def states_of(lm: DecoderLM, answers: Sequence[Answered]) -> list[tuple[Tensor, Tensor]]:
    """States of each prompt's tokens (Q, E) and of its answer's (S, E), in training as in use."""
    found = lm.query_and_answer([a.text for a in answers], [a.num_query for a in answers])
    return [(query_QE.clone(), answer_SE.clone()) for query_QE, answer_SE in found]


def attributes_of(lm: DecoderLM, instructions: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """The state from which an answer to each instruction would begin, (prompts, N, E)."""
    texts = [lm.tokenized(text, None, prompt) for prompt in prompts for text in instructions]
    return lm.last_states(texts).unflatten(0, (len(prompts), len(instructions)))


def shared(lm: LanguageModel, device: torch.device, dtype: torch.dtype) -> DecoderLM:
    """The model, loaded once for all that hold it."""
    key = (lm, device, dtype)
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = lm.load(device, dtype)
    return found


@dataclass(frozen=True, kw_only=True)
class _OfLLM(Encoder):
    """An encoder that runs the language model."""

    of = "pair"
    libraries = ("torch", "transformers")

    lm: LanguageModel
    precision: Precision = "bf16"
    """Of weights and states."""
    num_gpus: float = resource(1.0)

    def check(self) -> None:
        """The model is there."""
        self.lm.check()


@dataclass(frozen=True, kw_only=True)
class Answers(_OfLLM):
    """K sampled answers of the LLM to a prompt, int32, see `pack`.

    An answer depends on its prompt and the variant's number, but for rounding, which can turn a
    close choice.
    """

    kind = "answers"
    needs = ()

    instruction: str
    """What the LLM is told, with the slot {y_ori} for the prompt."""
    prompt: Prompt = "caption"
    variants: int = 4
    temperature: float = 0.7
    top_p: float = 0.9
    max_tokens: int = 226
    """An answer is cut off after as many."""

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """Loads the model."""
        model = shared(self.lm, device, dtype_of(self.precision))
        instruction = Instruction(name="answer", text=self.instruction)

        def encode(samples: Sequence[Sample]) -> list[Tensor]:
            texts = [prompt_of(s.row, self.prompt) for s in samples]
            asked = [(text, k) for text in texts for k in range(self.variants)]
            prompts = [text for text, _ in asked]
            said = model.rephrase(
                instruction,
                prompts,
                max_new_tokens=self.max_tokens,
                sample=True,
                temperature=self.temperature,
                top_p=self.top_p,
                seeds=[seed_of(*one) for one in asked],
            )
            found = answered(model, instruction, prompts, said)
            starts = range(0, len(found), self.variants)
            return [pack(found[start : start + self.variants]) for start in starts]

        return encode


@dataclass(frozen=True, kw_only=True)
class AnswerStates(_OfLLM):
    """States of prompt and answer for each variant (K, L, E), zero behind a variant's end."""

    kind = "answer_states"
    needs = ("answers",)

    limit: int
    """Tokens beyond as many are cut off; `lengths` tells how many there are."""

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """Loads the model."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        model = shared(self.lm, device, dtype_of(self.precision))

        def encode(samples: Sequence[Sample]) -> list[Tensor]:
            answers = [unpack(s.features["answers"]) for s in samples]
            # A state depends on nothing after it, so what is cut off need not be computed.
            states = states_of(model, [a.cut(self.limit) for one in answers for a in one])
            joined = iter([torch.cat(both) for both in states])
            return [pad_sequence([next(joined) for _ in one], batch_first=True) for one in answers]

        return encode


@dataclass(frozen=True, kw_only=True)
class Attributes(_OfLLM):
    """The LLM's state for each attribute instruction (N, E): what an answer would begin from."""

    kind = "attributes"
    needs = ()

    instructions: tuple[str, ...]
    """What the LLM is told, each with the slot {y_ori} for the prompt."""
    prompt: Prompt = "caption"

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """Loads the model."""
        model = shared(self.lm, device, dtype_of(self.precision))

        def encode(samples: Sequence[Sample]) -> list[Tensor]:
            prompts = [prompt_of(s.row, self.prompt) for s in samples]
            return [x.clone() for x in attributes_of(model, self.instructions, prompts)]

        return encode
