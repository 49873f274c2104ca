"""Whether a clip carries a watermark, asked of a vision-language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa

from engine.chat import Picture, Precision, Request, Shown, VisionLanguageModel, check_model
from engine.operator import Failed, Operator, resource, results
from engine.schema import CLIPS
from engine.weights import Weights

if TYPE_CHECKING:
    import torch

YES = ("yes", "Yes", " yes", " Yes", "YES")
NO = ("no", "No", " no", " No", "NO")
"""Spellings of the answers; those that a tokenizer writes as one token count."""

QWEN2_VL = Weights(at="Qwen/Qwen2-VL-7B-Instruct")
"""The model that Mimir asks."""

QUESTION = (
    "Is there a watermark in any of these pictures: a logo, a text or a pattern that was laid over"
    " the scene to show where it comes from or who owns it? Answer with one word, yes or no."
)


@dataclass(frozen=True, kw_only=True)
class Watermark(Operator):
    """Score of a watermark: P(yes) / (P(yes) + P(no)) of the answer's first token.

    One forward pass, nothing is generated. Misleads where text belongs to the scene (shop signs,
    subtitles): the model is asked to tell these from a watermark, and does not always.

    Source: Mimir (arXiv 2412.03085), appendix A, Watermark Filtration: Qwen2-VL-7B says which
    videos contain one. The paper prints neither its question nor how it samples.
    """

    reads: ClassVar[tuple[str, ...]] = ("keyframes",)
    writes: ClassVar[pa.Schema] = pa.schema([CLIPS.field("watermark_score")])
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torchvision", "transformers")

    weights: Weights = QWEN2_VL
    question: str = QUESTION
    """In English, and such that the answer is yes or no."""
    num_frames: int = 3
    """Keyframes asked about, as many images in one question; spread evenly over the clip."""
    max_pixels: int = 640 * 28 * 28
    """Larger frames are shrunk to as many pixels; 28 x 28 are one token."""
    dtype: Precision = "auto"

    batch_size: int = resource(8)
    num_gpus: float = resource(1.0)

    def check(self) -> None:
        """The weights are here."""
        if self.num_frames < 1:
            raise ValueError(f"num_frames is {self.num_frames}: at least one frame is asked about")
        check_model(self.weights)

    def load(self) -> Callable[[pa.Table], pa.Table]:
        """Loads the model, onto the GPU where there is one."""
        model = VisionLanguageModel(self.weights, self.dtype)
        yes, no = (_tokens(model, words) for words in (YES, NO))

        def score(asked: Sequence[Shown]) -> list[float | Failed]:
            return _scores(model.next_logits(asked), yes, no, model.tokenizer.decode)

        def measure(table: pa.Table) -> pa.Table:
            rows: list[dict[str, float] | Failed] = []
            requests = [self._request(row or ()) for row in table["keyframes"].to_pylist()]
            asked = [r for r in requests if r is not None]
            scores = iter(model.answer(asked, self.max_pixels, score) if asked else ())
            for request in requests:
                if request is None:
                    rows.append(Failed("NoKeyframes", "the clip has no keyframes to look at"))
                    continue
                found = next(scores)
                failed = isinstance(found, Failed)
                rows.append(found if failed else {"watermark_score": found})
            return results(self.writes, rows)

        return measure

    def _request(self, keyframes: Sequence[dict]) -> Request | None:
        if not keyframes:
            return None
        chosen = [keyframes[i] for i in spread(len(keyframes), self.num_frames)]
        pictures = tuple(Picture(jpeg=k["jpeg"], time_s=k["time_s"]) for k in chosen)
        return Request(text=self.question, pictures=pictures)


def spread(count: int, wanted: int) -> list[int]:
    """Indices of at most `wanted` of `count` things: the middles of as many equal parts."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _tokens(model: VisionLanguageModel, words: Sequence[str]) -> list[int]:
    ids = [model.tokenizer.encode(w, add_special_tokens=False) for w in words]
    found = sorted({i[0] for i in ids if len(i) == 1})
    if not found:
        raise ValueError(f"the model's tokenizer writes none of {words} as one token")
    return found


def _scores(
    logits_BV: torch.Tensor, yes: list[int], no: list[int], decode: Callable[[int], str]
) -> list[float | Failed]:
    """Scores of a batch; an answer that would be another word is a failure.

    Args:
        logits_BV: Logits of the first token, float32 (answer, vocabulary).
        yes: Tokens that say yes.
        no: Tokens that say no.
        decode: Words of a token.
    """
    # A ratio of sums of probabilities is a sigmoid of a difference of their logarithms.
    odds_B = logits_BV[:, yes].logsumexp(1) - logits_BV[:, no].logsumexp(1)
    said = logits_BV.argmax(1).tolist()
    answers = {*yes, *no}
    return [
        score if token in answers else Failed("NoAnswer", f"said {decode(token)!r}, not yes or no")
        for score, token in zip(odds_B.sigmoid().tolist(), said, strict=True)
    ]
