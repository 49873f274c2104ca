"""Mimir's figure 7 of an export, as pictures; `trainers.token_numbers` says what a point is.

t-SNE shows which points are neighbours, and neither how far apart they are nor how wide a cloud is:
those numbers are in the legend of (b), and all of them in `tokens.json`.

Source: Mimir (arXiv 2412.03085), figure 7 and section 3.3.
"""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainers.token_numbers import (
    SAME,
    Map,
    Measured,
    embedded,
    facts,
    measured,
    point_facts,
    within,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainers.generation import Progress
    from trainers.mimir_pipeline import MimirPipeline

PROMPTS = Path(__file__).with_name("prompts_figure7.txt")
FIGURE, NUMBERS = "figure7", "tokens.json"
MIN_TEXTS = 5
"""With fewer prompts or answers there is nothing to compare."""

# Okabe and Ito's colours, which the colour-blind tell apart; shapes say it again.
_BLUE, _ORANGE, _GREEN, _RED, _PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_GREY = "#555555"
_DOT = {"color": _BLUE, "s": 36, "edgecolor": "white", "linewidth": 0.5}
_TRIANGLE = {"color": _ORANGE, "marker": "^", "s": 44, "edgecolor": "white", "linewidth": 0.5}
_RING = {"facecolor": "none", "s": 80, "edgecolor": _GREEN, "linewidth": 1.4}
_STAR = {"color": _PURPLE, "marker": "*", "s": 300, "edgecolor": "white", "zorder": 3}
_STYLE = {
    "axes.edgecolor": "#999999",
    "font.size": 10,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


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
        ValueError: See `check`; the export has no LLM, or a prompt is too long for it.
    """
    check(prompts, prompt, answers)
    if batch < 1:
        raise ValueError(f"batches of {batch}: at least 1 text is answered at once")
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
            raise ValueError(f"{num} {what}: figure 7 needs at least {MIN_TEXTS}; the paper has 50")


def prompts_of(path: str | Path | None = None) -> tuple[str, ...]:
    """The lines of a file, those without words left out; by default 50 prompts of our own.

    Raises:
        ValueError: It is no text file.
    """
    try:
        lines = Path(path or PROMPTS).expanduser().read_text(encoding="utf-8").splitlines()
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


def _written(found: Measured, prompts: Map, answers: Map, folder: Path) -> list[Path]:
    """The figure whole, and each of its parts."""
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, nothing global is left behind

    parts: dict[str, Callable[[Axes], None]] = {
        "a": lambda axes: _draw_prompts(axes, found, prompts),
        "b": lambda axes: _draw_answers(axes, found, answers),
        "c": lambda axes: _draw_values(axes, found, normed=False),
        "d": lambda axes: _draw_values(axes, found, normed=True),
    }
    written = []
    with matplotlib.rc_context(_STYLE):
        for name in ("", *parts):
            side = 1 if name else 2
            figure = Figure(figsize=(6.2 * side, 5.6 * side), layout="constrained")
            figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
            all_axes = figure.subplots(side, side, squeeze=False).flat
            for axes, part in zip(all_axes, name or parts, strict=True):
                parts[part](axes)
            if found.meaningless:
                told = "MEANINGLESS: these models are small and random"
                figure.suptitle(told, color=_RED, weight="bold")
            written.append(folder / f"{FIGURE}{name and '_'}{name}.png")
            with warnings.catch_warnings():
                # A prompt may hold what the font lacks; `tokens.json` has it whole.
                warnings.filterwarnings("ignore", "Glyph .* missing from font")
                figure.savefig(written[-1], dpi=150)
    return written


def _draw_prompts(axes: Axes, found: Measured, where: Map) -> None:
    for kind, label, look in (
        ("encoder", _encoder(found), _DOT),
        ("decoder", _decoder(found), _TRIANGLE),
        ("sum", "their sum, as the video model reads it", _RING),
    ):
        axes.scatter(*where.kinds[kind].T, label=label, **look)
    _finish_map(axes, f"(a) Tokens of {found.num_prompts} prompts", found, where)


def _draw_answers(axes: Axes, found: Measured, where: Map) -> None:
    title = f"(b) One prompt answered {found.num_answers} times by {_short(found.decoder)}"
    for kind, what, look in (
        ("query", "query tokens", _STAR),
        ("answer", "answer tokens", _TRIANGLE),
        ("final", f"final tokens (all {found.num_read})", _RING),
    ):
        about = point_facts(found.answers[kind], found.rounding if kind == "query" else SAME)
        num, apart = about["num_different"], about["mean_distance"]
        label = f"{what}: {num} points, {apart:.2g} apart on average" if num > 1 else None
        axes.scatter(*where.kinds[kind].T, label=label or f"{what}: one point", **look)
    _finish_map(axes, title, found, where)
    prompt = textwrap.shorten(found.prompt, 70, placeholder=" …")
    # A prompt may hold a $, which is no formula.
    axes.set_xlabel(f"“{prompt}”", color=_GREY, size=9, parse_math=False)


def _finish_map(axes: Axes, title: str, found: Measured, where: Map) -> None:
    method = f"t-SNE, perplexity {where.perplexity:.0f}" if where.perplexity else "principal axes"
    point = "a point is the mean over the tokens of a text"
    if found.is_zero:
        point = "nothing of the LLM passes the fuser, whose map is zero"
    _title(axes, title, f"{method}; {point}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.08)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.06))


def _draw_values(axes: Axes, found: Measured, *, normed: bool) -> None:
    looks = {
        "encoder": (_encoder(found), _BLUE),
        "decoder_normed" if normed else "decoder": (_decoder(found), _ORANGE),
    }
    # A few values lie far out, and would squeeze all others together.
    limit = max(1.1, *(np.quantile(np.abs(found.values[kind]), 0.99) for kind in looks))
    edges = np.linspace(-limit, limit, 111)
    for kind, (name, color) in looks.items():
        values = found.values[kind]
        share = np.histogram(values, edges)[0] / values.size
        shares = f"{within(values, 0.5):.1%} within ±0.5, {within(values, 1.0):.1%} within ±1"
        axes.stairs(share, edges, fill=True, color=color, alpha=0.35, label=f"{name}: {shares}")
        axes.stairs(share, edges, color=color, linewidth=1.3)
    for edge in (-1.0, -0.5, 0.5, 1.0):
        axes.axvline(edge, color="#999999", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    title = f"({'d' if normed else 'c'}) Token values of {found.num_prompts} prompts"
    how = "as the models give them"
    if normed:
        title += ", after normalisation"
        how = "the LLM's behind norm, scale and bias" if found.normed else "this fuser has no norm"
    _title(axes, title, f"share of values in ranges of {edges[1] - edges[0]:.2g}; {how}")
    about = f"a token's values (dotted: ±0.5, ±1); those beyond ±{limit:.2g} are not drawn"
    axes.set_xlabel(about, color=_GREY, size=9)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.12))


def _title(axes: Axes, title: str, more: str) -> None:
    axes.set_title(title, loc="left", size=11, weight="bold", pad=20)
    axes.text(0, 1.02, more, transform=axes.transAxes, color=_GREY, size=9)


def _encoder(found: Measured) -> str:
    return f"encoder: T5 of {_short(found.encoder)}"


def _decoder(found: Measured) -> str:
    return f"decoder-only: {_short(found.decoder)}"


def _short(name: str) -> str:
    """Of a hub id with its revision, what a person calls the model."""
    return name.split(" at ")[0].split("/")[-1][:40]
