"""Texts as a language model's tokens, and its words as text again; runs on the CPU.

A text is three runs of tokens: `prefix`, the instruction up to the caption, which all texts of an
instruction share; `rest`, the caption and what follows it; and the answer. Runs are tokenised apart
and their ids joined, in training as in generation, so that merges at the seams cannot differ.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engine.caption_text import clean, clean_scenes
from engine.weights import Weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from trainers.language import LanguageModel

PromptFormat = Literal["raw", "chat"]
"""chat: within the tokenizer's chat template, as a user's words; raw: as it stands."""

_SLOT = re.compile(r"\{(y_ori|language)\}")
# Private-use characters stand for the slots while a chat template is filled.
_MARKS = {"y_ori": "\ue000", "language": "\ue001"}
_MARK = re.compile("([\ue000\ue001])")
_ANSWER = "\ue002"
_QUOTES = " \t\"'“”„«»"


@dataclass(frozen=True)
class TextIds:
    """A text as tokens."""

    prefix: tuple[int, ...]
    rest: tuple[int, ...]
    answer: tuple[int, ...] = ()
    """Without the token that ends it, whose state generation never has."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """All that comes before the answer."""
        return self.prefix + self.rest

    def pack(self) -> Tensor:
        """One int32 tensor: three lengths, then the ids."""
        import torch

        runs = (self.prefix, self.rest, self.answer)
        lengths = [len(run) for run in runs]
        return torch.tensor([*lengths, *(i for run in runs for i in run)], dtype=torch.int32)

    @staticmethod
    def unpack(packed: Tensor) -> TextIds:
        """What `pack` was given."""
        prefix, rest, answer, *ids = packed.tolist()
        assert len(ids) == prefix + rest + answer, "not a packed text"
        cuts = (0, prefix, prefix + rest, len(ids))
        return TextIds(*(tuple(ids[a:b]) for a, b in itertools.pairwise(cuts)))


class Prompts:
    """A model's tokenizer and limits: what turns instructions and captions into tokens.

    Captions and languages are words whatever they contain: "<|im_end|>" in one is no control token.

    Args:
        tokenizer: Of the model.
        config: Of the model.
        prompt_format: As `LanguageModel` has it.
        name: Of the model, for errors.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: PretrainedConfig,
        prompt_format: PromptFormat,
        name: str,
    ):
        self.tokenizer, self.name, self._format = tokenizer, name, prompt_format
        self.limit = _limit(config)
        """Most tokens of a text; None is no limit."""
        # Special tokens are told to be split; others that were added are not, so they are broken.
        added = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special]
        added = sorted((a for a in added if len(a) > 1 and not a.isspace()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._filled = functools.lru_cache(maxsize=64)(self._fill)

    @staticmethod
    def load(lm: LanguageModel) -> Prompts:
        """Of a model's folder, without its weights.

        Raises:
            ValueError: It is no causal language model, or has no tokenizer or no chat template.
        """
        from transformers import AutoTokenizer

        config, name = config_of(lm.weights), lm.weights.at
        folder = lm.weights.local()
        known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
        if not any((folder / file).is_file() for file in known):
            raise ValueError(f"{name} has no tokenizer ({known[0]}): copy the whole folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the tokenizer of {name} cannot be loaded: {reason}") from error
        if lm.prompt_format == "chat" and not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {name} has no chat template: name a chat model, or set"
                " prompt_format to raw"
            )
        return Prompts(tokenizer, config, lm.prompt_format, name)

    def tokenized(
        self,
        instruction_text: str,
        language: str | None,
        original: str,
        rephrased: str | None = None,
    ) -> TextIds:
        """A text as tokens; without an answer where `rephrased` is None.

        Args:
            instruction_text: With its slots open: y_inst.
            language: Of the original, where the instruction names it.
            original: y_ori.
            rephrased: y_rephrase.

        Raises:
            ValueError: A slot cannot be filled, or the text is longer than the model reads.
        """
        if "{y_ori}" not in instruction_text:
            raise ValueError("the instruction has no slot {y_ori} for the caption")
        if "{language}" in instruction_text and not language:
            raise ValueError(
                "the instruction needs the language of the original, and there is none"
            )
        if not original.strip():
            raise ValueError("an original caption is needed to rephrase, and it is empty")
        pieces, lead = self._filled(instruction_text)
        values = {_MARKS["y_ori"]: original.strip(), _MARKS["language"]: language or ""}
        runs = [self._words(values[p]) if p in values else ids for p, ids in pieces]
        slot = [p for p, _ in pieces].index(_MARKS["y_ori"])
        answer = self._words(lead + rephrased.strip()) if rephrased is not None else ()
        text = TextIds(sum(runs[:slot], ()), sum(runs[slot:], ()), answer)
        self.check_length(len(text.prompt) + len(answer))
        return text

    def num_tokens(self, original: str) -> int:
        """Tokens of a caption alone: so many of `rest`, from its start."""
        return len(self._words(original.strip()))

    def check_length(self, tokens: int, more: int = 0) -> None:
        """Raises ValueError where so many tokens, and `more`, are beyond the limit."""
        if self.limit is not None and tokens + more > self.limit:
            new = f" and {more} new ones" if more else ""
            raise ValueError(
                f"the text has {tokens} tokens{new}, and {self.name} reads {self.limit} at most:"
                " shorten the caption or the instruction"
            )

    def said(self, ids: Sequence[int]) -> str:
        """Tokens as text, without special ones."""
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def starts(self, ids: Sequence[int]) -> list[int]:
        """Where each token begins in `said(ids)`, and the text's length."""
        # Of a character of several tokens, those before its last are shown as U+FFFD.
        return [len(self.said(ids[:i]).rstrip("\ufffd")) for i in range(len(ids) + 1)]

    def next_turn(self, instruction_text: str, language: str | None) -> re.Pattern[str] | None:
        """What a raw prompt's continuation begins its next example with: a line's "Input:".

        It is what stands before the caption, on its line. A chat model ends its turn by itself.
        """
        line = instruction_text.partition("{y_ori}")[0].rpartition("\n")[2]
        label = line.replace("{language}", language or "").strip(_QUOTES)
        if self._format == "chat" or not re.search(r"\w\w", label):
            return None
        return re.compile(rf"\n\s*{re.escape(label)}", re.IGNORECASE)

    @functools.cached_property
    def beginning(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text that is no chat."""
        ids = tuple(self.tokenizer("")["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _fill(self, instruction_text: str) -> tuple[tuple[tuple[str, tuple[int, ...]], ...], str]:
        """The prompt's pieces, literal ones with their ids, and what an answer begins with."""
        marked = _SLOT.sub(lambda slot: _MARKS[slot[1]], instruction_text)
        prompt, lead = self._chat(marked) if self._format == "chat" else (marked, " ")
        if prompt[-1:].isspace():
            lead = ""
        pieces = [p for p in _MARK.split(prompt) if p]
        known: list[tuple[str, tuple[int, ...]]] = []
        if self._format == "raw":
            known.append(("", self.beginning))
        for i, piece in enumerate(pieces):
            ids = () if _MARK.match(piece) else self._joined(piece, first=i == 0)
            known.append((piece, ids))
        return tuple(known), lead

    def _chat(self, words: str) -> tuple[str, str]:
        """The user's words in the chat template, and the space that an answer begins with.

        The prompt ends where the answer begins: some templates put a line feed (GLM) or a space
        (LLaMA-2) before it.
        """
        render = functools.partial(
            self.tokenizer.apply_chat_template, tokenize=False, enable_thinking=False
        )
        asked = [{"role": "user", "content": words}]
        prompt = render(asked, add_generation_prompt=True)
        if _MARKS["y_ori"] not in prompt:
            raise ValueError(f"the chat template of {self.name} leaves out what the user says")
        answered = render([*asked, {"role": "assistant", "content": _ANSWER}])
        before = answered.partition(_ANSWER)[0]
        lead = before[len(prompt) :] if before.startswith(prompt) else ""
        if lead.strip() or lead == " ":
            return prompt, " " if lead == " " else ""
        return prompt + lead, ""

    def _words(self, text: str) -> tuple[int, ...]:
        """Ids of words from outside, none of which is a control token."""
        if self._added:
            text = self._added.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return self._joined(text, split_special_tokens=True)

    def _joined(self, text: str, *, first: bool = False, **settings: bool) -> tuple[int, ...]:
        """Ids of a text that goes on from another: no space is put before it.

        Tokenizers such as LLaMA's begin every text with a space; behind something that cannot
        merge with the text they do not.
        """
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False, **settings)
        if first or not text:
            return tuple(encode(text))
        anchor = "a" if text[0].isspace() else "\n"
        before, ids = encode(anchor), encode(anchor + text)
        return tuple(ids[len(before) :] if ids[: len(before)] == before else encode(text))


def config_of(weights: Weights) -> PretrainedConfig:
    """A checkpoint's configuration; raises ValueError where it is no causal language model."""
    path = weights.local() / "config.json"
    if not path.is_file():
        raise ValueError(f"{weights.at} has no config.json: it is no checkpoint of transformers")
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the config.json of {weights.at} is no JSON: {error}") from None
    kind = found.get("model_type", "?") if isinstance(found, dict) else "?"
    if kind not in KNOWN:
        own = (
            " without the code that comes with it, which is never run"
            if "auto_map" in found
            else ""
        )
        raise ValueError(
            f"{weights.at} is a {kind} model, which transformers does not know as a causal"
            f" language model{own}: name one such as Qwen/Qwen2.5-7B-Instruct"
        )
    return AutoConfig.from_pretrained(path.parent, trust_remote_code=False)


def _limit(config: PretrainedConfig) -> int | None:
    """Most tokens of a text."""
    text = config.get_text_config(decoder=True)
    most = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond it the whole batch changes its frequencies, and keys that are cached do not fit.
        most = min(filter(None, (most, rope.get("original_max_position_embeddings"))))
    return most


def scenes_of(text: str, delimiter: str | None) -> tuple[str, list[tuple[str, int, int]]]:
    """What a model's words say, and its scenes: each cleaned, and where in the words it is."""
    said, start, end = _within(text, functools.partial(clean, finished=True))
    if not said or not delimiter:
        return said, [(said, start, end)] if said else []

    def cleaned(part: str) -> str:
        return (clean_scenes(part, delimiter, finished=True) or [""])[0]

    scenes, at = [], start
    for part in text[start:end].split(delimiter):
        scene, first, last = _within(part, cleaned)
        if scene:
            scenes.append((scene, at + first, at + last))
        at += len(part) + len(delimiter)
    return f" {delimiter} ".join(scene for scene, _, _ in scenes), scenes


def _within(text: str, cleaned: Callable[[str], str]) -> tuple[str, int, int]:
    """A text cleaned, and the shortest part of the text that is cleaned to the same."""
    said = cleaned(text)
    if not said:
        return "", 0, 0
    slack = 8  # cleaning may add a few full stops
    starts = [
        i
        for i in range(max(0, len(text) - len(said)) + slack)
        if i < len(text) and not (text[i].isspace() or text[max(0, i - 1) : i + 1].isalnum())
    ]
    start = next((i for i in reversed(starts) if cleaned(text[i:]) == said), 0)
    ends = (
        i
        for i in range(max(start + 1, start + len(said) - slack), len(text))
        if not (text[i - 1].isspace() or text[i - 1 : i + 1].isalnum())
    )
    return said, start, next((i for i in ends if cleaned(text[start:i]) == said), len(text))


def token_spans(starts: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[slice]:
    """The tokens that hold each range of characters; one that two ranges share is the first's."""
    spans: list[slice] = []
    for start, end in ranges:
        first = bisect.bisect_right(starts, start) - 1
        while first and starts[first - 1] == starts[first]:  # bytes of one character
            first -= 1
        first = max(first, spans[-1].stop) if spans else first
        spans.append(slice(first, max(first, bisect.bisect_left(starts, end))))
    return spans
