"""What Mimir's figure 7 shows, as numbers: the tokens of its text encoder, its LLM and their sum.

The paper does not say how tokens of 4096 and of 3072 channels come into one plot, nor what a point
is. Here points are of tokens behind the two branches of the fuser, in the video model's width: the
text encoder's with their zero-conv's added; the LLM's after norm, scale, bias, map and alpha, as
they are summed. A point is the mean over the tokens of one text. Values are counted of the models'
own tokens. Padding is left out, but for final tokens: they are all that the video model reads, so
only the LLM moves their mean. It moves less than that of an answer, which is over fewer tokens.

Shapes: P points; M tokens of the text encoder, Q of a prompt for the LLM and S of its answer, N of
both, K of the sum, L that the video model reads; D width of the text encoder, E of the LLM.

Source: Mimir (arXiv 2412.03085), figure 7 and section 3.3.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.weights import tiny_folder
from trainers.system import named

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.fuser import TokenFuser
    from trainers.generation import Progress
    from trainers.mimir_pipeline import MimirPipeline, PromptTokens

RANGES = (-np.inf, -1.0, -0.5, 0.0, 0.5, 1.0, np.inf)
"""Between these, values are counted."""
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01}
"""How far the same states of an LLM lie apart, relative to their length, when computed beside
others."""
SAME = 1e-5
"""Points that are nearer, relative to their length, are one: t-SNE would pull them apart."""
_FEW = 5
"""Of fewer different points there is no t-SNE."""
_PERPLEXITY = 15.0


@dataclass(frozen=True, kw_only=True)
class Text:
    """The tokens of a prompt with one answer, padding left out, in float32."""

    encoder_MD: np.ndarray
    """As the text encoder gives them."""
    query_QE: np.ndarray
    """As the LLM gives them."""
    answer_SE: np.ndarray
    """As the LLM gives them, not cut."""
    normed_NE: np.ndarray
    """Both as the fuser's map gets them."""
    encoder_branch_MD: np.ndarray
    query_branch_QD: np.ndarray
    answer_branch_SD: np.ndarray
    """Cut to what the video model reads."""
    sum_KD: np.ndarray
    final_LD: np.ndarray
    """All that the video model reads: the sum, padding, semantic tokens."""
    answer: str

    @property
    def of_answer(self) -> dict[str, np.ndarray]:
        """What an answer may change, and the prompt's tokens, which it may not."""
        return {
            "query": self.query_branch_QD,
            "answer": self.answer_branch_SD,
            "final": self.final_LD,
            "llm_query": self.query_QE,
            "llm_answer": self.answer_SE,
        }

    @property
    def decoder_branch(self) -> np.ndarray:
        """Of prompt and answer, (N, D)."""
        return np.concatenate([self.query_branch_QD, self.answer_branch_SD])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the figures are drawn from. A point is the mean over the tokens of a text."""

    encoder: str
    """The model whose text encoder it is, as hub id or folder name."""
    decoder: str
    """The LLM, likewise."""
    normed: bool
    """Whether the fuser norms the LLM's tokens."""
    meaningless: bool
    """Whether the models are the small random ones."""
    prompt: str
    """Which is answered again and again."""
    different_answers: int
    rounding: float
    """How far the same states of the LLM may lie apart, relative to their length."""
    num_read: int
    """L: final tokens of a text."""
    values: Mapping[str, np.ndarray]
    """All values of the tokens of encoder, decoder, and decoder_normed."""
    prompts: Mapping[str, np.ndarray]
    """Points of the prompts (P, D): encoder, decoder, sum."""
    answers: Mapping[str, np.ndarray]
    """Points of the answers: query, answer, final (P, D); llm_query, llm_answer (P, E)."""

    @property
    def num_prompts(self) -> int:
        """Of figures a, c and d."""
        return len(self.prompts["sum"])

    @property
    def num_answers(self) -> int:
        """Of figure b."""
        return len(self.answers["final"])

    @property
    def is_zero(self) -> bool:
        """Whether the fuser lets nothing of the LLM through, as before training."""
        return not self.prompts["decoder"].any()

    @property
    def drawn_answers(self) -> dict[str, np.ndarray]:
        """Points of figure b, with those of the prompt as one where rounding alone parts them."""
        query_PD = self.answers["query"]
        settled = query_PD[first_same(query_PD, self.rounding)]
        return {"query": settled} | {kind: self.answers[kind] for kind in ("answer", "final")}


@dataclass(frozen=True, kw_only=True)
class Map:
    """Points of several kinds in one plane."""

    kinds: Mapping[str, np.ndarray]
    """(P, 2) each."""
    perplexity: float | None
    """Of t-SNE; None where points were too few for it, and these are their principal axes."""


def measured(
    pipe: MimirPipeline,
    prompts: Sequence[str],
    prompt: str,
    *,
    answers: int,
    seed: int,
    batch: int,
    progress: Progress,
) -> Measured:
    """Runs the models; see `draw`.

    Raises:
        ValueError: The LLM says nothing to `prompt`, or values are not finite.
    """
    once = texts(pipe, prompts, [seed] * len(prompts), batch, "prompts", progress)
    values, points = _of_prompts(list(once))
    seeds = range(seed, seed + answers)
    again = texts(pipe, [prompt] * answers, seeds, batch, "answers", progress)
    means, said, num_read = defaultdict[str, list[np.ndarray]](list), set(), 0
    for text in again:  # not kept: each holds megabytes
        said.add(text.answer)
        num_read = len(text.final_LD)
        for kind, tokens in text.of_answer.items():
            if len(tokens):
                means[kind].append(_mean(tokens))
    if "answer" not in means:
        raise ValueError(f"no answer of the LLM to {prompt!r} is read: choose another prompt")
    assert pipe.lm is not None
    bases = pipe.mimir.vdm.base, pipe.mimir.lm.weights
    tiny = tiny_folder().resolve()
    return Measured(
        encoder=named(bases[0]),
        decoder=named(bases[1]),
        normed=pipe.mimir.norm,
        meaningless=any(
            Path(base.at).expanduser().resolve().is_relative_to(tiny) for base in bases
        ),
        prompt=prompt,
        different_answers=len(said),
        rounding=_ROUNDING[str(pipe.lm.model.dtype).removeprefix("torch.")],
        num_read=num_read,
        values=values,
        prompts=points,
        answers={kind: np.stack(found) for kind, found in means.items()},
    )


def _of_prompts(found: list[Text]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and points of each kind."""
    values = {
        "encoder": _values([t.encoder_MD for t in found]),
        "decoder": _values([x for t in found for x in (t.query_QE, t.answer_SE)]),
        "decoder_normed": _values([t.normed_NE for t in found]),
    }
    points = {
        "encoder": _points([t.encoder_branch_MD for t in found]),
        "decoder": _points([t.decoder_branch for t in found]),
        "sum": _points([t.sum_KD for t in found]),
    }
    return values, points


def texts(
    pipe: MimirPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch: int,
    doing: str,
    progress: Progress,
) -> Iterator[Text]:
    """The tokens of each prompt with an answer of its seed."""
    tokenizer: Any = pipe.vdm.tokenizer  # Mimir's video models all have one
    for start in range(0, len(prompts), batch):
        progress(doing, start, len(prompts))
        asked = list(prompts[start : start + batch])
        found = pipe.tokens(asked, list(seeds[start : start + batch]))
        limit = len(found[0].encoder_LD)
        ids_of = tokenizer(asked, truncation=True, max_length=limit).input_ids
        for one, ids in zip(found, ids_of, strict=True):
            yield _text(pipe.fuser, one, len(ids))
    progress(doing, len(prompts), len(prompts))


def _text(fuser: TokenFuser, found: PromptTokens, num: int) -> Text:
    """A text whose first `num` tokens of the text encoder are no padding."""
    import torch

    said, encoder, decoder = found.said, fuser.encoder, fuser.decoder
    assert said is not None and decoder is not None
    limit, num_query = len(found.encoder_LD), len(said.query_QE)
    with torch.no_grad():
        normed_NE = fuser.normed(said.decoder)
        decoder_ND = fuser.alpha * decoder(said.decoder[:limit].float())
        encoder_MD = found.encoder_LD[:num].float()
        read_MD = encoder_MD if encoder is None else encoder_MD + encoder(encoder_MD)
    text = Text(
        encoder_MD=_array(encoder_MD),
        query_QE=_array(said.query_QE),
        answer_SE=_array(said.answer_SE),
        normed_NE=_array(normed_NE),
        encoder_branch_MD=_array(read_MD),
        query_branch_QD=_array(decoder_ND[:num_query]),
        answer_branch_SD=_array(decoder_ND[num_query:]),
        sum_KD=_array(found.fused_LD[: max(num, len(decoder_ND))]),
        final_LD=_array(found.fused_LD),
        answer=said.answer.text,
    )
    ends = text.encoder_MD, text.query_QE, text.answer_SE, text.final_LD
    if not all(np.isfinite(x).all() for x in ends):
        raise ValueError(f"tokens of {found.prompt!r} are not finite: load the export in fp32")
    return text


def _array(tokens: Tensor) -> np.ndarray:
    return tokens.float().cpu().numpy()


def _values(tokens: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([x.ravel() for x in tokens])


def _points(tokens: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack([_mean(x) for x in tokens])


def _mean(tokens_ND: np.ndarray) -> np.ndarray:
    return tokens_ND.mean(0, dtype=np.float64)


def first_same(points_PD: np.ndarray, tolerance: float) -> np.ndarray:
    """For each point the number of the first that is the same, (P,) int.

    Args:
        points_PD: Some points.
        tolerance: How far such may lie apart, relative to their length.
    """
    first_P = np.arange(len(points_PD))
    for number, point_D in enumerate(points_PD):
        own = np.unique(first_P[:number])
        apart = np.linalg.norm(points_PD[own] - point_D, axis=1)
        same = own[apart <= tolerance * np.linalg.norm(point_D)]
        first_P[number] = same[0] if len(same) else number
    return first_P


def embedded(kinds: Mapping[str, np.ndarray], seed: int) -> Map:
    """Points (P, D) of several kinds by t-SNE of all; those that are the same stay so."""
    points_PD = np.concatenate(list(kinds.values()))
    different, which_P = np.unique(first_same(points_PD, SAME), return_inverse=True)
    plane_P2, perplexity = _plane(points_PD[different], seed)
    ends = np.cumsum([len(points) for points in kinds.values()])[:-1]
    split = np.split(plane_P2[which_P], ends)
    return Map(kinds=dict(zip(kinds, split, strict=True)), perplexity=perplexity)


def _plane(points_PD: np.ndarray, seed: int) -> tuple[np.ndarray, float | None]:
    """Different points in a plane (P, 2), and the perplexity if it is t-SNE's."""
    centred_PD = points_PD - points_PD.mean(0)
    if len(points_PD) < _FEW:
        u, s, _ = np.linalg.svd(centred_PD, full_matrices=False)
        axes = (u * s)[:, :2]
        return np.pad(axes, ((0, 0), (0, 2 - axes.shape[1]))), None
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(points_PD) - 1) / 3)
    # Exact: the approximation is for thousands of points, and its sums depend on threads.
    tsne = TSNE(perplexity=perplexity, init="pca", method="exact", random_state=seed)
    return tsne.fit_transform(centred_PD).astype(np.float64), perplexity


def facts(found: Measured, prompts: Map, answers: Map) -> dict[str, Any]:
    """The numbers that the figures show, as JSON values."""
    between = (("encoder", "decoder"), ("encoder", "sum"))
    return {
        "encoder": f"text encoder of {found.encoder}",
        "decoder": found.decoder,
        "meaningless": found.meaningless,
        "values": {kind: value_facts(values) for kind, values in found.values.items()},
        "prompts": {
            "num": found.num_prompts,
            "points": {kind: point_facts(p, SAME) for kind, p in found.prompts.items()},
            "mean_distance": {
                f"{one}-{other}": _apart(found.prompts[one], found.prompts[other])
                for one, other in between
            },
            "map": _plain(prompts),
        },
        "answers": {
            "prompt": found.prompt,
            "num": found.num_answers,
            "different_texts": found.different_answers,
            "points": {
                kind: point_facts(p, found.rounding if "query" in kind else SAME)
                for kind, p in found.answers.items()
            },
            "map": _plain(answers),
        },
    }


def _apart(one_PD: np.ndarray, other_PD: np.ndarray) -> float:
    """Mean distance of two points of the same text."""
    return float(np.linalg.norm(one_PD - other_PD, axis=1).mean())


def value_facts(values: np.ndarray) -> dict[str, Any]:
    """How single values of tokens are spread; shares are of 1."""
    counts, _ = np.histogram(values, RANGES)
    names = [f"{low:g} to {high:g}" for low, high in pairwise(RANGES)]
    return {
        "num": values.size,
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean(dtype=np.float64)),
        "std": float(values.std(dtype=np.float64)),
        "share_within_0.5": within(values, 0.5),
        "share_within_1": within(values, 1.0),
        "share_in": dict(zip(names, (counts / values.size).tolist(), strict=True)),
    }


def within(values: np.ndarray, limit: float) -> float:
    """Share of values from -limit to limit."""
    return float((np.abs(values) <= limit).mean())


def point_facts(points_PD: np.ndarray, tolerance: float) -> dict[str, Any]:
    """How far points lie apart: over all pairs."""
    pairs = np.concatenate(
        [np.linalg.norm(points_PD[n + 1 :] - p, axis=1) for n, p in enumerate(points_PD)]
    )
    return {
        "num": len(points_PD),
        "num_different": len(np.unique(first_same(points_PD, tolerance))),
        "mean_length": float(np.linalg.norm(points_PD, axis=1).mean()),
        "mean_distance": float(pairs.mean()) if pairs.size else 0.0,
        "max_distance": float(pairs.max(initial=0.0)),
    }


def _plain(found: Map) -> dict[str, Any]:
    kinds = {kind: points.tolist() for kind, points in found.kinds.items()}
    return {"perplexity": found.perplexity, "points": kinds}
