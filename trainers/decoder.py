"""A causal language model in memory: rephrasing, with the states that its answers go through.

Shapes: B texts, N tokens fed, P tokens of a prefix, S tokens of an answer, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from engine.caption_text import is_refusal
from trainers.prompts import Prompts, TextIds, scenes_of, token_spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.caption import Instruction

_PAD = 0
"""Is masked, so any will do; a tokenizer's own may lie beyond the model's vocabulary."""
_PREFIXES = 4
"""Prefixes that are kept: at 315 tokens of a 7B model each takes 165 MB."""


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
        self.model, self.prompts = model, prompts
        self._decoder = model.get_decoder()
        text = model.config.get_text_config(decoder=True)
        self.width: int = text.hidden_size
        self._positions = "position_ids" in inspect.signature(self._decoder.forward).parameters
        layers = DynamicCache(config=model.config).layers
        self._shareable = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers)
        self._window = min((x.sliding_window for x in layers if x.is_sliding), default=None)
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = frozenset({*ends, prompts.tokenizer.eos_token_id} - {None})
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

    def query_and_answer(
        self, texts: Sequence[TextIds], num_query: Sequence[int], *, use_prefix: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """States of each caption's tokens and of each answer's, (Q, D) and (S, D).

        What stands around a caption (instruction and chat template) is read, and left out.

        Args:
            texts: With answers; their instructions may differ.
            num_query: Q of each: see `Prompts.num_tokens`.
            use_prefix: See `teacher_forced`.

        Source:
            Mimir (arXiv:2412.03085), section 2.2: query and answer tokens.
        """
        hidden_BND, begins = self._forced(texts, use_prefix=use_prefix)
        found = []
        for hidden_ND, begin, text, num in zip(hidden_BND, begins, texts, num_query, strict=True):
            start = begin - len(text.rest)
            query_QD = hidden_ND[start : start + num]
            found.append((query_QD, hidden_ND[begin : begin + len(text.answer)]))
        return found

    def last_states(self, texts: Sequence[TextIds], *, use_prefix: bool = True) -> Tensor:
        """The state of each prompt's last token (B, D), from which its answer would begin.

        Args:
            texts: Without answers; their instructions may differ.
            use_prefix: See `teacher_forced`.
        """
        hidden_BND, begins = self._forced(texts, use_prefix=use_prefix)
        last_B = torch.tensor(begins, dtype=torch.long, device=hidden_BND.device) - 1
        return hidden_BND[torch.arange(len(begins), device=hidden_BND.device), last_B]

    def nll(self, texts: Sequence[TextIds]) -> list[float]:
        """How unlikely the model finds each answer: mean negative log-likelihood of its tokens.

        In nats a token. Answers that another model wrote score higher than its own; an answer
        without tokens is nan.
        """
        logits_BNV, begins = self._forced(texts, use_prefix=True, logits=True)
        found = []
        for logits_NV, begin, text in zip(logits_BNV, begins, texts, strict=True):
            logits_SV = logits_NV[begin - 1 : begin - 1 + len(text.answer)].float()
            answer_S = torch.tensor(text.answer, dtype=torch.long, device=self.device)
            found.append(cross_entropy(logits_SV, answer_S).item())
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
            ValueError: A prompt with its answer would be longer than the model reads, or seeds are
                not as many as captions.
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
        seeds = [0] * len(texts) if seeds is None else seeds
        if len(seeds) != len(texts):
            raise ValueError(f"{len(texts)} captions need as many seeds: found {len(seeds)}")
        draw = (
            _Draw(temperature, top_p, seeds) if sample else functools.partial(torch.argmax, dim=-1)
        )
        ids, states_BND, why = self._generate(
            texts, stops, max_new_tokens, draw, use_prefix, progress
        )
        seconds = time.perf_counter() - started
        return [
            self._result(instruction, i, states_ND, w, stop, seconds)
            for i, states_ND, w, stop in zip(ids, states_BND, why, stops, strict=True)
        ]

    def _forced(
        self, texts: Sequence[TextIds], *, use_prefix: bool, logits: bool = False
    ) -> tuple[Tensor, list[int]]:
        """States (or logits) of whole texts, and where in them each answer begins."""
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
        prefixes = [t.prefix for t in texts]
        longest = max(map(len, prefixes)) + max(map(len, runs)) + new_tokens
        # Windows are told by places, which padding between prefix and rest takes too.
        fits = self._window is None or longest <= self._window
        # More than are kept would be computed again in each batch, one at a time.
        few = len(set(prefixes)) <= _PREFIXES
        share = use_prefix and self._shareable and fits and few and all(prefixes)
        if not share:
            runs = [p + r for p, r in zip(prefixes, runs, strict=True)]
        length = max(1, *map(len, runs))
        ids_BN = torch.full((len(runs), length), _PAD)
        mask_BN = torch.zeros_like(ids_BN)
        for i, run in enumerate(runs):
            at = slice(length - len(run), None) if side == "left" else slice(len(run))
            ids_BN[i, at] = torch.tensor(run, dtype=torch.long)
            mask_BN[i, at] = 1
        fed: dict[str, Any] = {"input_ids": ids_BN.to(self.device)}
        if share:
            fed["past_key_values"], mask_BP = self._prefix_cache(prefixes)
            mask_BN = torch.cat([mask_BP, mask_BN], 1)
        # Where nothing is padded: a mask would be read back from the device in every step.
        fed["attention_mask"] = None if mask_BN.all() else mask_BN.to(self.device)
        if self._positions:
            positions_BN = (mask_BN.cumsum(1) - 1).clamp(min=0)[:, -length:]
            fed["position_ids"] = positions_BN.to(self.device)
        return fed

    def _prefix_cache(self, prefixes: Sequence[tuple[int, ...]]) -> tuple[DynamicCache, Tensor]:
        """A cache that begins with each text's prefix, padded on the left, and its mask (B, P)."""
        caches = {p: self.prefix(p) for p in dict.fromkeys(prefixes)}
        longest = max(map(len, prefixes))

        def batched(layer: int, part: Literal["keys", "values"]) -> Tensor:
            found = {
                p: pad(getattr(cache.layers[layer], part), (0, 0, longest - len(p), 0))
                for p, cache in caches.items()
            }
            if len(found) == 1:
                return found[prefixes[0]].expand(len(prefixes), -1, -1, -1)
            return torch.cat([found[p] for p in prefixes])

        # Layer after layer, since the new cache holds copies of what it is given.
        num_layers = len(caches[prefixes[0]].layers)
        layers = ((batched(i, "keys"), batched(i, "values")) for i in range(num_layers))
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
        fed = self._laid_out(texts, [t.rest for t in texts], "left", use_prefix, max_new_tokens)
        fed.setdefault("past_key_values", DynamicCache(config=self.model.config))
        ids: list[list[int]] = [[] for _ in texts]
        why = [""] * len(texts)
        with _last_states(self._decoder) as states:
            for _ in range(max_new_tokens):
                with torch.no_grad():
                    out = self.model(**fed, use_cache=True, logits_to_keep=1)
                next_B = draw(out.logits[:, -1].float())
                for i, token in enumerate(next_B.tolist()):
                    if not why[i]:
                        ids[i].append(token)
                        why[i] = self._why(ids[i], stops[i])
                progress(len(states))
                if all(why):
                    break
                fed["input_ids"] = next_B[:, None]
                if fed["attention_mask"] is not None:
                    fed["attention_mask"] = pad(fed["attention_mask"], (0, 1), value=1)
                if self._positions:
                    fed["position_ids"] = fed["position_ids"][:, -1:] + 1
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
        said, scenes = scenes_of(raw[:until], instruction.scenes and instruction.delimiter)
        scenes = scenes or [("", 0, 0)]
        spans = token_spans(starts, [(a, b) for _, a, b in scenes])
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


@contextlib.contextmanager
def _last_states(decoder: nn.Module) -> Iterator[list[Tensor]]:
    """While it is open: the state (B, D) of the last token in each call of a decoder."""
    states: list[Tensor] = []

    def see(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        # Cloned: a view would hold the states of the whole prompt.
        states.append(output.last_hidden_state[:, -1].clone())

    hook = decoder.register_forward_hook(see)
    try:
        yield states
    finally:
        hook.remove()


class _Draw:
    """Draws tokens; each text has a generator of its own, so those beside it do not matter."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        if temperature <= 0 or not 0 < top_p <= 1:
            raise ValueError(
                "to sample, temperature is more than 0 and top_p in (0, 1]: found"
                f" {temperature} and {top_p}"
            )
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor) -> Tensor:
        probs_BV, order_BV = (logits_BV / self._temperature).softmax(-1).sort(descending=True)
        likelier_BV = probs_BV.cumsum(-1) - probs_BV
        probs_BV = probs_BV.masked_fill(likelier_BV >= self._top_p, 0)
        sums_BV = probs_BV.cumsum(-1)
        at_B1 = torch.stack([torch.rand(1, generator=g) for g in self._generators])
        # Not waiting for the device, whose tokens are waited for anyway.
        at_B1 = at_B1.to(sums_BV.device, non_blocking=True) * sums_BV[:, -1:]
        found_B1 = torch.searchsorted(sums_BV, at_B1, right=True)
        last_B1 = (probs_BV > 0).sum(-1, keepdim=True) - 1  # rounding may lead past it
        return order_BV.gather(1, found_B1.minimum(last_B1))[:, 0]
