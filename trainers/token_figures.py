"""Mimir's figure 7 of an export: what its text encoder gives, what its LLM gives, and their sum.

The paper does not say how tokens of 4096 and of 3072 channels come into one plot, nor what a point
is. Here (a) and (b) are behind the two branches of the fuser, in the video model's width: the
encoder's tokens with their zero-conv's added; the LLM's after norm, scale, bias, map and alpha. So
a sum is the sum of the two beside it. A point is the mean over the tokens of one text, padding left
out. (c) and (d) are of the models' own tokens, and count single values, padding left out too.

t-SNE shows who is near whom; how far apart they are is in `tokens.json` and in the legend of (b).

Shapes: P points; M tokens of the text encoder, Q of a prompt for the LLM and S of its answer, N of
both, K that the video model reads; D width of the text encoder, E of the LLM.

Source: Mimir (arXiv 2412.03085), figure 7 and section 3.3.
"""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.weights import tiny_folder
from trainers.system import named

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from trainers.fuser import TokenFuser
    from trainers.generation import Progress
    from trainers.mimir_pipeline import MimirPipeline, PromptTokens

PROMPTS = Path(__file__).with_name("prompts_figure7.txt")
FIGURE, NUMBERS = "figure7", "tokens.json"
MIN_TEXTS = 5
"""With fewer prompts or answers there is nothing to compare."""
RANGES = (-np.inf, -1.0, -0.5, 0.0, 0.5, 1.0, np.inf)
"""Between these, values are counted."""
_ROUNDING = {"float32": 1e-4, "bfloat16": 0.03, "float16": 0.01}
"""How far the same states of an LLM lie apart, relative to their length, when computed beside
others."""
_SAME = 1e-5
"""Points that are nearer, relative to their length, are one: t-SNE would pull them apart."""

# Okabe and Ito's colours, which the colour-blind tell apart; markers and hatches say it again.
_ENCODER, _DECODER, _SUM, _ALARM = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_DOT = {"color": _ENCODER, "s": 34, "edgecolor": "white", "linewidth": 0.5}
_TRIANGLE = {"color": _DECODER, "marker": "^", "s": 40, "edgecolor": "white", "linewidth": 0.5}
_RING = {"facecolor": "none", "s": 75, "edgecolor": _SUM, "linewidth": 1.4}
_STAR = {"color": _ENCODER, "marker": "*", "s": 260, "edgecolor": "white", "zorder": 3}
_BLUE_BARS = {"color": _ENCODER}
_ORANGE_BARS = {"color": _DECODER}
_STYLE = {
    "axes.edgecolor": "#888888",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.parse_math": False,  # a prompt may hold a $
}


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
    final_KD: np.ndarray
    """The sum with the semantic tokens behind it."""
    answer: str

    @property
    def of_answer(self) -> dict[str, np.ndarray]:
        """What an answer may change, and the prompt's tokens, which it may not."""
        return {
            "query": self.query_branch_QD,
            "answer": self.answer_branch_SD,
            "final": self.final_KD,
            "llm_query": self.query_QE,
            "llm_answer": self.answer_SE,
        }

    @property
    def decoder_branch_ND(self) -> np.ndarray:
        """Of prompt and answer."""
        return np.concatenate([self.query_branch_QD, self.answer_branch_SD])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the figures are drawn from. A point is the mean over the tokens of a text."""

    encoder: str
    """Of which model the text encoder is."""
    decoder: str
    """The LLM."""
    normed: bool
    """Whether the fuser norms the LLM's tokens."""
    meaningless: bool
    """Whether the models are the small random ones."""
    prompt: str
    """Which is answered again and again."""
    different_answers: int
    rounding: float
    """How far the same states of the LLM may lie apart, relative to their length."""
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

    @property
    def method(self) -> str:
        """For a title."""
        if self.perplexity is None:
            return "principal axes (too few different points for t-SNE)"
        return f"t-SNE, perplexity {self.perplexity:.0f}"


def draw(
    pipe: MimirPipeline,
    prompts: Sequence[str],
    prompt: str,
    folder: Path,
    *,
    answers: int = 50,
    seed: int = 0,
    batch: int = 10,
    progress: Progress = lambda *_: None,
) -> list[Path]:
    """Draws figure 7 whole, its four parts, and writes the numbers behind them.

    Args:
        pipe: Of an export with an LLM.
        prompts: Answered once each; of figures a, c and d.
        prompt: Answered again and again; of figure b.
        folder: For `figure7.png`, `figure7_a.png` to `figure7_d.png`, and `tokens.json`.
        answers: How many to `prompt`.
        seed: Of answers and t-SNE: the same gives the same files on the same machine.
        batch: Texts that are answered at once.
        progress: Told how many texts have been answered.

    Returns:
        What was written, `tokens.json` last.

    Raises:
        ValueError: See `check`; or the export has no LLM, or a prompt is too long for it.
    """
    check(prompts, prompt, answers)
    _check_pipeline(pipe, [*prompts, prompt])
    folder.mkdir(parents=True, exist_ok=True)
    found = measured(
        pipe, prompts, prompt, answers=answers, seed=seed, batch=batch, progress=progress
    )
    maps = embedded(found.prompts, seed), embedded(found.drawn_answers, seed)
    written = _written(found, *maps, folder)
    numbers = json.dumps(facts(found, *maps), indent=1, allow_nan=False)
    (folder / NUMBERS).write_text(numbers, encoding="utf-8")
    return [*written, folder / NUMBERS]


def check(prompts: Sequence[str], prompt: str, answers: int) -> None:
    """What can be known before a model is loaded.

    Raises:
        ValueError: A library is missing, a prompt is empty, or they or answers are too few.
    """
    if not (find_spec("matplotlib") and find_spec("sklearn")):
        raise ValueError(
            "figure 7 needs matplotlib and scikit-learn:"
            " pip install -c constraints.txt '.[figures]'"
        )
    if not all(text.strip() for text in (*prompts, prompt)):
        raise ValueError("a prompt is empty: figure 7 needs words in each")
    for num, what in ((len(set(prompts)), "different prompts"), (answers, "answers")):
        if num < MIN_TEXTS:
            raise ValueError(f"{num} {what}: figure 7 needs {MIN_TEXTS} at least, and has 50")


def read_prompts(path: Path | None = None) -> tuple[str, ...]:
    """The lines of a file, those without words left out; by default 50 prompts of our own.

    Raises:
        ValueError: It is no text file.
    """
    try:
        lines = (path or PROMPTS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"cannot read prompts, one a line, from {path}: {why}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _check_pipeline(pipe: MimirPipeline, prompts: Sequence[str]) -> None:
    """Raises ValueError where it has no tokens to compare, or a prompt is too long."""
    from trainers.mimir_pipeline import MimirPipeline

    if not isinstance(pipe, MimirPipeline):
        raise ValueError(
            f"figure 7 is of Mimir's tokens, and a {type(pipe).__name__} has none: name an export"
            " of a recipe of Mimir"
        )
    if pipe.lm is None:
        raise ValueError(
            "this export is of Mimir's baseline, which has no LLM to compare with its text encoder:"
            " name one of another recipe of Mimir"
        )
    for prompt in prompts:
        num = len(pipe.lm.tokenized(pipe.mimir.answer_instruction, None, prompt).prompt)
        pipe.lm.prompts.check_length(num, pipe.mimir.max_answer_tokens)


# What is measured


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
    once = list(texts(pipe, prompts, [seed] * len(prompts), batch, "prompts", progress))
    values = {
        "encoder": _values([t.encoder_MD for t in once]),
        "decoder": _values([x for t in once for x in (t.query_QE, t.answer_SE)]),
        "decoder_normed": _values([t.normed_NE for t in once]),
    }
    points = {
        "encoder": _points([t.encoder_branch_MD for t in once]),
        "decoder": _points([t.decoder_branch_ND for t in once]),
        "sum": _points([t.sum_KD for t in once]),
    }
    del once  # half a gigabyte at full size
    means, said = defaultdict[str, list[np.ndarray]](list), set()
    seeds = range(seed, seed + answers)
    for text in texts(pipe, [prompt] * answers, seeds, batch, "answers", progress):
        said.add(text.answer)
        for kind, tokens in text.of_answer.items():
            if len(tokens):
                means[kind].append(_mean(tokens))
    if "answer" not in means:
        raise ValueError(f"the LLM has no answer to {prompt!r} that is read: choose another prompt")
    lm = pipe.lm
    assert lm is not None
    bases = pipe.mimir.vdm.base, pipe.mimir.lm.weights
    encoder, decoder = (named(base).split(" at ")[0].split("/")[-1] for base in bases)
    tiny = tiny_folder().resolve()
    return Measured(
        encoder=encoder,
        decoder=decoder,
        normed=pipe.mimir.norm,
        meaningless=any(Path(base.at).resolve().is_relative_to(tiny) for base in bases),
        prompt=prompt,
        different_answers=len(said),
        rounding=_ROUNDING[str(lm.model.dtype).removeprefix("torch.")],
        values=values,
        prompts=points,
        answers={kind: np.stack(found) for kind, found in means.items()},
    )


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
        for one, ids in zip(
            found, tokenizer(asked, truncation=True, max_length=limit).input_ids, strict=True
        ):
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
    end = max(num, len(decoder_ND))
    sum_KD = found.fused_LD[:end]
    text = Text(
        encoder_MD=_array(encoder_MD),
        query_QE=_array(said.query_QE),
        answer_SE=_array(said.answer_SE),
        normed_NE=_array(normed_NE),
        encoder_branch_MD=_array(read_MD),
        query_branch_QD=_array(decoder_ND[:num_query]),
        answer_branch_SD=_array(decoder_ND[num_query:]),
        sum_KD=_array(sum_KD),
        final_KD=_array(torch.cat([sum_KD, found.fused_LD[limit:]])),
        answer=said.answer.text,
    )
    if not all(np.isfinite(x).all() for x in (text.encoder_MD, text.query_QE, text.answer_SE)):
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


# What is computed of it


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
    different, which_P = np.unique(first_same(points_PD, _SAME), return_inverse=True)
    plane_P2, perplexity = _plane(points_PD[different], seed)
    ends = np.cumsum([len(points) for points in kinds.values()])[:-1]
    split = np.split(plane_P2[which_P], ends)
    return Map(kinds=dict(zip(kinds, split, strict=True)), perplexity=perplexity)


def _plane(points_PD: np.ndarray, seed: int) -> tuple[np.ndarray, float | None]:
    """Different points in a plane (P, 2), and the perplexity if it is t-SNE's."""
    centred_PD = points_PD - points_PD.mean(0)
    if len(points_PD) < MIN_TEXTS:
        u, s, _ = np.linalg.svd(centred_PD, full_matrices=False)
        axes = (u * s)[:, :2]
        return np.pad(axes, ((0, 0), (0, 2 - axes.shape[1]))), None
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points_PD) - 1) / 3)
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
            "points": {kind: point_facts(p, _SAME) for kind, p in found.prompts.items()},
            "mean_distance": {
                f"{a}-{b}": float(
                    np.linalg.norm(found.prompts[a] - found.prompts[b], axis=1).mean()
                )
                for a, b in between
            },
            "map": _plain(prompts),
        },
        "answers": {
            "prompt": found.prompt,
            "num": found.num_answers,
            "different_texts": found.different_answers,
            "points": {
                kind: point_facts(p, found.rounding if "query" in kind else _SAME)
                for kind, p in found.answers.items()
            },
            "map": _plain(answers),
        },
    }


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


# What is drawn


def _written(found: Measured, prompts: Map, answers: Map, folder: Path) -> list[Path]:
    """The figure whole, and each of its parts."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot nothing global is left behind

    panels: tuple[Callable[[Axes], None], ...] = (
        lambda axes: _draw_prompts(axes, found, prompts),
        lambda axes: _draw_answers(axes, found, answers),
        lambda axes: _draw_values(axes, found, "c", "decoder", "as they are"),
        lambda axes: _draw_values(
            axes,
            found,
            "d",
            "decoder_normed",
            "the LLM's normed and scaled" if found.normed else "this system has no norm",
        ),
    )
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, drawn in ("", panels), *zip("abcd", ((p,) for p in panels), strict=True):
            side = 2 if len(drawn) > 1 else 1
            figure = Figure(figsize=(6.4 * side, 5.4 * side), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
            for axes, panel in zip(
                figure.subplots(side, side, squeeze=False).flat, drawn, strict=True
            ):
                panel(axes)
            if found.meaningless:
                told = "MEANINGLESS: of small random models"
                figure.suptitle(told, color=_ALARM, weight="bold", size=13)
            written.append(folder / (f"{FIGURE}_{name}.png" if name else f"{FIGURE}.png"))
            figure.savefig(written[-1], dpi=150)
    return written


def _draw_prompts(axes: Axes, found: Measured, where: Map) -> None:
    """(a)."""
    looks = {
        "encoder": (f"encoder (of {found.encoder})", _DOT),
        "decoder": (f"decoder-only ({found.decoder})", _TRIANGLE),
        "sum": ("their sum", _RING),
    }
    for kind, (label, look) in looks.items():
        axes.scatter(*where.kinds[kind].T, label=label, **look)
    axes.set_title(f"(a) Tokens of {found.num_prompts} prompts")
    _finish_map(axes, f"{where.method}; a point is the mean over a prompt's tokens")


def _draw_answers(axes: Axes, found: Measured, where: Map) -> None:
    """(b)."""
    for kind, look in (("final", _RING), ("answer", _TRIANGLE), ("query", _STAR)):
        about = point_facts(found.answers[kind], found.rounding if kind == "query" else _SAME)
        num = about["num_different"]
        label = f"{kind} tokens: {num} point{'s'[: num > 1]}"
        if num > 1:
            label += f", {about['mean_distance']:.2g} apart"
        axes.scatter(*where.kinds[kind].T, label=label, **look)
    axes.set_title(f"(b) One prompt answered {found.num_answers} times by {found.decoder}")
    prompt = textwrap.shorten(found.prompt, 60, placeholder=" …")
    _finish_map(axes, f"“{prompt}”\n{where.method}; a point is the mean over an answer's tokens")


def _finish_map(axes: Axes, about: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.08)
    axes.set_xlabel(about, color="#444444", size=9)
    axes.legend(loc="lower left", bbox_to_anchor=(0, -0.28), ncols=3)


def _draw_values(axes: Axes, found: Measured, letter: str, kind: str, how: str) -> None:
    """(c) and (d)."""
    both = {"encoder": found.encoder, kind: found.decoder}
    limit = max(1.1, *(float(np.quantile(np.abs(found.values[k]), 0.999)) for k in both))
    edges = np.linspace(-limit, limit, 111)
    for shown, look in zip(both, (_BLUE_BARS, _ORANGE_BARS), strict=True):
        values = found.values[shown]
        share = 100 * np.histogram(values, edges)[0] / values.size
        label = f"{both[shown]}: {within(values, 0.5):.1%} within ±0.5, {within(values, 1):.1%} within ±1"
        axes.stairs(share, edges, fill=True, alpha=0.35, label=label, **look)
        axes.stairs(share, edges, linewidth=1.3, **look)
    for edge in (-1.0, -0.5, 0.5, 1.0):
        axes.axvline(edge, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_title(f"({letter}) Values of tokens of {found.num_prompts} prompts, {how}")
    axes.set_xlabel("value of a channel of a token (dotted: ±0.5, ±1)")
    axes.set_ylabel("share in %")
    axes.legend()
