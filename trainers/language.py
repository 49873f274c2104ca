"""A decoder-only LLM: texts as tokens, states of answers as they are learned from, and rephrasing.

A text is three runs of tokens: `prefix`, the instruction up to the caption, which all texts of an
instruction share; `rest`, the caption and what follows it; and the answer. Runs are tokenised apart
and their ids joined, in training as in generation, so that merges at the seams cannot differ.

Shapes: B texts, N tokens fed, P tokens of a prefix, S tokens of an answer, D width, V vocabulary.
"""

from __future__ import annotations

import bisect
import functools
import inspect
import itertools
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from engine.caption_text import clean, clean_scenes, is_refusal
from engine.operator import resource
from engine.weights import Weights
from trainers.encoders import Precision, dtype_of
from trainers.system import Encoder, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import (
        DynamicCache,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from engine.caption import Instruction

PromptFormat = Literal["raw", "chat"]

_SLOT = re.compile(r"\{(y_ori|language)\}")
# Private-use characters stand for the slots while a chat template is filled.
_MARKS = {"y_ori": "\ue000", "language": "\ue001"}
_MARK = re.compile("([\ue000\ue001])")
_ANSWER = "\ue002"
_QUOTES = " \t\"'“”„«»"
_PREFIXES = 4
"""Prefixes that are kept: at 315 tokens of a 7B model each takes 165 MB."""


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Any causal language model of transformers, as a value; its own code is never run."""

    weights: Weights
    prompt_format: PromptFormat = "chat"
    """chat: within the tokenizer's chat template, as a user's words; raw: as it stands."""

    def check(self) -> None:
        """Raises ValueError, one line, where it is no such model; loads no weights."""
        self._prompts()

    def width(self) -> int:
        """D, as the configuration says."""
        return _config(self.weights).get_text_config(decoder=True).hidden_size

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values."""
        return self.weights.describe() | {"prompt_format": self.prompt_format}

    def load(self, device: torch.device, dtype: torch.dtype) -> DecoderLM:
        """The model, frozen, on a device."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        prompts = self._prompts()
        disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            self.weights.local(), dtype=dtype, trust_remote_code=False
        )
        return DecoderLM(model.to(device).eval().requires_grad_(False), prompts)

    def _prompts(self) -> Prompts:
        prompts, folder = Prompts.load(self), self.weights.local()
        if not any(next(folder.glob(f"*.{kind}"), None) for kind in ("safetensors", "bin")):
            raise ValueError(
                f"{self.weights.at} has no weights (*.safetensors): fetch or copy the whole folder"
            )
        return prompts


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

        config, name = _config(lm.weights), lm.weights.at
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


class Scene(NamedTuple):
    """A part of an answer, and where its states are."""

    text: str
    span: slice


@dataclass(frozen=True, kw_only=True)
class Rephrased:
    """What the model said, with the states that it had while saying it."""

    text: str
    """Cleaned; scenes are joined by the delimiter."""
    states_SD: Tensor
    """Of the tokens `ids`, as they were when the next token was predicted."""
    scenes: tuple[Scene, ...]
    """One, or as many as were found where the instruction wants several; an answer that says
    nothing has one without tokens."""
    generated: tuple[int, ...]
    """All tokens that were generated and have a state: neither an end nor, where the answer was
    cut off, the last one, which was never fed."""
    kept: slice
    """Of `generated`: without what was said around the answer."""
    raw: str
    """`generated`, word for word."""
    stopped: Literal["eos", "length", "stop"]
    """By its end token, by `max_new_tokens`, or where it went on with another input."""
    fault: str
    """What is wrong with the answer, for a person; "" is nothing."""
    num_tokens: int
    """Tokens generated."""
    seconds: float
    """That its whole batch took."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The answer's tokens."""
        return self.generated[self.kept]

    @property
    def complete(self) -> bool:
        """Whether it ended by itself, says something, and has the scenes that were wanted."""
        return not self.fault


class DecoderLM:
    """A causal language model in memory, frozen.

    A state is the last layer's, after its norm. The state *of* a token is the one computed when the
    token is fed, not the one that predicted it.

    Args:
        model: A causal language model of transformers.
        prompts: Its tokenizer.

    Source:
        RISE-T2V (arXiv:2511.04317), "Seamless Prompt Rephrasing", equations 1 and 2.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts):
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        self.model, self.prompts = model, prompts
        self._decoder = model.get_decoder()
        self._decoder.register_forward_hook(self._see)
        self._seen_BND: Tensor | None = None
        text = model.config.get_text_config(decoder=True)
        self.width: int = text.hidden_size
        self._positions = "position_ids" in inspect.signature(self._decoder.forward).parameters
        layers = DynamicCache(config=model.config).layers
        self._shareable = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
        self._window = min((x.sliding_window for x in layers if x.is_sliding), default=None)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = frozenset({*ends, prompts.tokenizer.eos_token_id} - {None})
        self._pad = prompts.tokenizer.pad_token_id or 0  # masked, so any will do
        self._prefixes: OrderedDict[tuple[int, ...], DynamicCache] = OrderedDict()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    def tokenized(
        self,
        instruction_text: str,
        language: str | None,
        original: str,
        rephrased: str | None = None,
    ) -> TextIds:
        """See `Prompts.tokenized`."""
        return self.prompts.tokenized(instruction_text, language, original, rephrased)

    def prefix(self, prefix_ids: Sequence[int]) -> DynamicCache:
        """Keys and values of a prefix, (1, heads, P, head) a layer, computed once; to be read."""
        import torch
        from transformers import DynamicCache

        key = tuple(prefix_ids)
        if key not in self._prefixes:
            cache = DynamicCache(config=self.model.config)
            ids_1P = torch.tensor([key], device=self.device)
            with torch.no_grad():
                self._decoder(input_ids=ids_1P, past_key_values=cache, use_cache=True)
            self._prefixes[key] = cache
            if len(self._prefixes) > _PREFIXES:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return self._prefixes[key]

    def teacher_forced(self, texts: Sequence[TextIds], *, use_prefix: bool = True) -> list[Tensor]:
        """States of each answer's tokens (S, D): the rephrasing feature.

        They are the states that generating the same tokens has, to rounding.

        Args:
            texts: With answers; their instructions may differ.
            use_prefix: Prefixes are computed once and kept; the results are the same.
        """
        hidden_BND, begins = self._forced(texts, use_prefix=use_prefix)
        return [
            hidden_ND[begin : begin + len(text.answer)]
            for hidden_ND, begin, text in zip(hidden_BND, begins, texts, strict=True)
        ]

    def encoded(self, texts: Sequence[TextIds]) -> list[Tensor]:
        """States (S, D) of each answer on its own: the encoded feature, for the ablation.

        Source:
            RISE-T2V, "Seamless Prompt Rephrasing": h = E(y_rephrase).
        """
        alone = [TextIds((), self.prompts.beginning, text.answer) for text in texts]
        return self.teacher_forced(alone, use_prefix=False)

    def nll(self, texts: Sequence[TextIds]) -> list[float]:
        """How unlikely the model finds each answer: mean negative log-likelihood of its tokens.

        In nats a token. Answers that another model wrote score higher than its own; an answer
        without tokens is nan.
        """
        import torch

        logits_BNV, begins = self._forced(texts, use_prefix=True, logits=True)
        found = []
        for logits_NV, begin, text in zip(logits_BNV, begins, texts, strict=True):
            logits_SV = logits_NV[begin - 1 : begin - 1 + len(text.answer)].float()
            answer_S = torch.tensor(text.answer, dtype=torch.long, device=self.device)
            found.append(torch.nn.functional.cross_entropy(logits_SV, answer_S).item())
        return found

    def rephrase(
        self,
        instruction: Instruction,
        originals: Sequence[str],
        *,
        languages: Sequence[str | None] | None = None,
        max_new_tokens: int = 256,
        sample: bool = False,
        temperature: float = 0.7,
        top_p: float = 0.9,
        seeds: Sequence[int] | None = None,
        use_prefix: bool = True,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[Rephrased]:
        """Rephrases a batch of captions in one pass, and gives the states it went through.

        Of the checkpoint's generation settings only the end tokens count. A caption's answer does
        not depend on those beside it, but for rounding, which can turn a close choice.

        Args:
            instruction: What is asked for.
            originals: Captions.
            languages: Theirs, where the instruction names it.
            max_new_tokens: An answer is cut off after as many tokens; the last has no state.
            sample: Draw tokens; else the likeliest is taken.
            temperature: Of drawing.
            top_p: Tokens are drawn from the likeliest that together have this probability.
            seeds: Of drawing, one a caption; None is 0 for all.
            use_prefix: See `teacher_forced`.
            progress: Called with the number of tokens of the longest answer so far.

        Raises:
            ValueError: A prompt with its answer would be longer than the model reads.
        """
        started = time.perf_counter()
        languages = languages or [None] * len(originals)
        texts, stops = [], []
        for original, language in zip(originals, languages, strict=True):
            texts.append(self.tokenized(instruction.text, language, original))
            self.prompts.check_length(len(texts[-1].prompt), max_new_tokens)
            stops.append(self.prompts.next_turn(instruction.text, language))
        if not texts:
            return []
        seeds = seeds or [0] * len(texts)
        draw = _Draw(temperature, top_p, seeds) if sample else _likeliest
        ids, states_BND, why = self._generate(
            texts, stops, max_new_tokens, draw, use_prefix, progress
        )
        return [
            self._result(instruction, i, states_ND, w, stop, time.perf_counter() - started)
            for i, states_ND, w, stop in zip(ids, states_BND, why, stops, strict=True)
        ]

    def _see(self, module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
        self._seen_BND = output.last_hidden_state

    def _forced(
        self, texts: Sequence[TextIds], *, use_prefix: bool, logits: bool = False
    ) -> tuple[Tensor, list[int]]:
        """States (or logits) of whole texts, and where in them each answer begins."""
        import torch

        if not texts:
            return torch.empty(0, 0, self.width), []
        for text in texts:
            self.prompts.check_length(len(text.prompt) + len(text.answer))
        fed = self._laid_out(texts, [t.rest + t.answer for t in texts], "right", use_prefix)
        model = self.model if logits else self._decoder
        with torch.no_grad():
            out = model(**fed, use_cache="past_key_values" in fed)
        shared = "past_key_values" in fed
        begins = [len(t.rest) if shared else len(t.prompt) for t in texts]
        self._seen_BND = None
        return out.logits if logits else out.last_hidden_state, begins

    def _laid_out(
        self,
        texts: Sequence[TextIds],
        runs: Sequence[tuple[int, ...]],
        side: Literal["left", "right"],
        use_prefix: bool,
        new_tokens: int = 0,
    ) -> dict[str, Any]:
        """What the model is called with, for runs of tokens that follow the texts' prefixes."""
        import torch

        prefixes = [t.prefix for t in texts]
        longest = max(map(len, prefixes)) + max(map(len, runs)) + new_tokens
        # Windows are told by places, which padding between prefix and rest takes too.
        fits = self._window is None or longest <= self._window
        share = use_prefix and self._shareable and fits and all(prefixes)
        if not share:
            runs = [p + r for p, r in zip(prefixes, runs, strict=True)]
        length = max(map(len, runs))
        ids_BN = torch.full((len(runs), length), self._pad)
        mask_BN = torch.zeros_like(ids_BN)
        for i, run in enumerate(runs):
            at = slice(length - len(run), None) if side == "left" else slice(len(run))
            ids_BN[i, at] = torch.tensor(run, dtype=torch.long)
            mask_BN[i, at] = 1
        fed: dict[str, Any] = {"input_ids": ids_BN.to(self.device)}
        if share:
            fed["past_key_values"], mask_BP = self._prefix_cache(prefixes)
            mask_BN = torch.cat([mask_BP, mask_BN], 1)
        fed["attention_mask"] = mask_BN.to(self.device)
        if self._positions:
            positions_BN = (mask_BN.cumsum(1) - 1).clamp(min=0)[:, -length:]
            fed["position_ids"] = positions_BN.to(self.device)
        return fed

    def _prefix_cache(self, prefixes: Sequence[tuple[int, ...]]) -> tuple[DynamicCache, Tensor]:
        """A cache that begins with each text's prefix, padded on the left, and its mask (B, P)."""
        import torch
        from torch.nn.functional import pad
        from transformers import DynamicCache

        caches = {p: self.prefix(p) for p in dict.fromkeys(prefixes)}
        longest = max(map(len, prefixes))
        layers = []
        for i in range(self.model.config.get_text_config(decoder=True).num_hidden_layers):
            found = {p: (c.layers[i].keys, c.layers[i].values) for p, c in caches.items()}
            if len(caches) == 1:
                ((keys, values),) = found.values()
                shape = (len(prefixes), -1, -1, -1)
                layers.append((keys.expand(shape), values.expand(shape)))
                continue
            rows = [[pad(x, (0, 0, longest - len(p), 0)) for x in found[p]] for p in prefixes]
            layers.append(tuple(torch.cat(both) for both in zip(*rows, strict=True)))
        mask_BP = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prefixes])
        return DynamicCache(layers, config=self.model.config), mask_BP

    def _generate(
        self,
        texts: Sequence[TextIds],
        stops: Sequence[re.Pattern[str] | None],
        max_new_tokens: int,
        draw: Callable[[Tensor], Tensor],
        use_prefix: bool,
        progress: Callable[[int], None],
    ) -> tuple[list[tuple[int, ...]], Tensor, list[str]]:
        """Tokens of each answer, their states but the last's (B, N, D), and why each stopped."""
        import torch
        from transformers import DynamicCache

        fed = self._laid_out(texts, [t.rest for t in texts], "left", use_prefix, max_new_tokens)
        fed.setdefault("past_key_values", DynamicCache(config=self.model.config))
        ids: list[list[int]] = [[] for _ in texts]
        why = [""] * len(texts)
        states: list[Tensor] = []
        for _ in range(max_new_tokens):
            with torch.no_grad():
                out = self.model(**fed, use_cache=True, logits_to_keep=1)
            assert self._seen_BND is not None, "the decoder was not called"
            states.append(self._seen_BND[:, -1])  # of the token that was just fed
            next_B = draw(out.logits[:, -1].float())
            for i, token in enumerate(next_B.tolist()):
                if not why[i]:
                    ids[i].append(token)
                    why[i] = self._why(ids[i], stops[i])
            progress(len(states))
            if all(why):
                break
            fed["input_ids"] = next_B[:, None]
            fed["attention_mask"] = torch.nn.functional.pad(fed["attention_mask"], (0, 1), value=1)
            if self._positions:
                fed["position_ids"] = fed["position_ids"][:, -1:] + 1
        self._seen_BND = None
        states_BND = torch.stack(states, 1)[:, 1:]  # the first is of the prompt's last token
        return [tuple(i) for i in ids], states_BND, [w or "length" for w in why]

    def _why(self, ids: list[int], stop: re.Pattern[str] | None) -> str:
        if ids[-1] in self._ends:
            return "eos"
        return "stop" if stop and stop.search(self.prompts.said(ids)) else ""

    def _result(
        self,
        instruction: Instruction,
        ids: tuple[int, ...],
        states_ND: Tensor,
        why: str,
        stop: re.Pattern[str] | None,
        seconds: float,
    ) -> Rephrased:
        generated = ids[:-1]
        raw, starts = self.prompts.said(generated), self.prompts.starts(generated)
        # With the last token, which may be the one that told a stop.
        found = stop.search(self.prompts.said(ids)) if stop else None
        until = found.start() if found else len(raw)
        said, scenes = _scenes(raw[:until], instruction.scenes and instruction.delimiter)
        scenes = scenes or [("", 0, 0)]
        spans = _token_spans(starts, [(a, b) for _, a, b in scenes])
        kept = slice(spans[0].start, spans[-1].stop)
        fault = ""
        if not said:
            fault = "the model said nothing"
        elif instruction.scenes and len(scenes) != instruction.scenes:
            fault = f"{instruction.scenes} scenes wanted, {len(scenes)} found"
        elif is_refusal(said):
            fault = "the model declined"
        elif why == "length":
            fault = f"cut off after {len(ids)} tokens"
        return Rephrased(
            text=said,
            states_SD=states_ND[: len(generated)][kept],
            scenes=tuple(
                Scene(text, slice(s.start - kept.start, s.stop - kept.start))
                for (text, _, _), s in zip(scenes, spans, strict=True)
            ),
            generated=generated,
            kept=kept,
            raw=raw,
            stopped=why,  # type: ignore[arg-type]
            fault=fault,
            num_tokens=len(ids),
            seconds=seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Tokens(Encoder):
    """A pair's texts as the tokens of a language model: int32, see `TextIds.pack`.

    Rows have `instruction_text`, `original`, `rephrased`, and `language` where it is named.
    """

    kind = "tokens"
    needs = ()
    of = "pair"
    libraries = ("transformers",)

    lm: LanguageModel
    batch_size: int = resource(256)

    def check(self) -> None:
        """The model is there."""
        self.lm.check()

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """Tokenises; loads no weights."""
        prompts = Prompts.load(self.lm)

        def encode(samples: Sequence[Sample]) -> list[Tensor]:
            texts = (
                prompts.tokenized(
                    s.row["instruction_text"],
                    s.row.get("language"),
                    s.row["original"],
                    s.row["rephrased"],
                )
                for s in samples
            )
            return [text.pack().to(device) for text in texts]

        return encode


@dataclass(frozen=True, kw_only=True)
class States(Encoder):
    """Hidden states of a pair's rephrased caption (S, D): what the adapter is trained on.

    Source:
        RISE-T2V (arXiv:2511.04317), equation 2; figure 3 and "The Analysis of Rephrasing and
        Encoded Features" for the encoded feature.
    """

    kind = "states"
    needs = ("tokens",)
    of = "pair"
    libraries = ("torch", "transformers")

    lm: LanguageModel
    feature: Literal["rephrasing", "encoded"] = "rephrasing"
    """Given instruction and original, as in generation; or of the rephrased caption alone."""
    precision: Precision = "bf16"
    """Of weights and states."""
    limit: int = 256
    """Tokens beyond as many are cut off; `num_cut` tells how many."""
    num_gpus: float = resource(1.0)

    def check(self) -> None:
        """The model is there."""
        self.lm.check()

    def on(self, device: torch.device) -> Callable[[Sequence[Sample]], list[Tensor]]:
        """Loads the model."""
        model = self.lm.load(device, dtype_of(self.precision))

        def encode(samples: Sequence[Sample]) -> list[Tensor]:
            texts = [TextIds.unpack(sample.features["tokens"]) for sample in samples]
            # A state depends on nothing after it, so what is cut off need not be computed.
            texts = [TextIds(t.prefix, t.rest, t.answer[: self.limit]) for t in texts]
            states = model.encoded if self.feature == "encoded" else model.teacher_forced
            return [states_SD.clone() for states_SD in states(texts)]

        return encode


def num_cut(tokens: Tensor, limit: int) -> int:
    """How many tokens of an answer, packed as `Tokens` gives it, are beyond `limit`."""
    return max(0, int(tokens[2]) - limit)


def _config(weights: Weights) -> PretrainedConfig:
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


def _likeliest(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(-1)


class _Draw:
    """Draws tokens; each text has a generator of its own, so those beside it do not matter."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        import torch

        if temperature <= 0 or not 0 < top_p <= 1:
            raise ValueError(
                "to sample, temperature is more than 0 and top_p in (0, 1]: found"
                f" {temperature} and {top_p}"
            )
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        import torch

        probs_BV, order_BV = (logits_BV / self._temperature).softmax(-1).sort(descending=True)
        likelier_BV = probs_BV.cumsum(-1) - probs_BV
        probs_BV = probs_BV.masked_fill(likelier_BV >= self._top_p, 0)
        sums_BV = probs_BV.cumsum(-1)
        at_B1 = torch.stack([torch.rand(1, generator=g) for g in self._generators])
        at_B1 = at_B1.to(sums_BV) * sums_BV[:, -1:]
        found_B1 = torch.searchsorted(sums_BV, at_B1, right=True)
        last_B1 = (probs_BV > 0).sum(-1, keepdim=True) - 1  # rounding may lead past it
        return order_BV.gather(1, found_B1.minimum(last_B1))[:, 0]


def _scenes(text: str, delimiter: str | None) -> tuple[str, list[tuple[str, int, int]]]:
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


def _token_spans(starts: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[slice]:
    """The tokens that hold each range of characters; one that two ranges share is the first's."""
    spans: list[slice] = []
    for start, end in ranges:
        first = bisect.bisect_right(starts, start) - 1
        while first and starts[first - 1] == starts[first]:  # bytes of one character
            first -= 1
        first = max(first, spans[-1].stop) if spans else first
        spans.append(slice(first, max(first, bisect.bisect_left(starts, end))))
    return spans
