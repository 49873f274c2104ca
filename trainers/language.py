"""Which language model a system is built on, and its encoders: tokens of texts, and their states.

Shapes: S tokens of an answer, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from engine.operator import resource
from engine.weights import Weights
from trainers.encoders import Precision, dtype_of
from trainers.prompts import PromptFormat, Prompts, TextIds, config_of
from trainers.system import Encoder, Sample

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainers.decoder import DecoderLM


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
        return config_of(self.weights).get_text_config(decoder=True).hidden_size

    def describe(self) -> dict[str, Any]:
        """What tells it from others, as JSON values."""
        return self.weights.describe() | {"prompt_format": self.prompt_format}

    def load(self, device: torch.device, dtype: torch.dtype) -> DecoderLM:
        """The model, frozen, on a device."""
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        from trainers.decoder import DecoderLM

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
            return [text.pack() for text in texts]  # ids are read on the CPU

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
