"""Videos of a prompt beside each other, with their scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import streamlit as st

from cluster.dashboard import evaluation_charts as charts
from cluster.dashboard import evaluation_choice as choice
from cluster.dashboard import look, markup, playable
from cluster.dashboard.evaluation import Evaluation, short, title, video_bytes, why_not
from cluster.dashboard.places import Places
from evals.dimensions import DIMENSIONS
from evals.suites import Prompt


def show(one: Evaluation, places: Places) -> None:
    """The view."""
    prompt, sample = _prompt(one)
    if len(one.models) > 1:
        a, b = choice.two_models(one, "video")
        models = [a, b]
    else:
        models = [one.models[0]]
    for place, model in zip(st.columns(len(models), gap="medium"), models, strict=True):
        with place:
            _video(one, model, prompt, sample, places)
    _scores(one, models, prompt, sample)


def _prompt(one: Evaluation) -> tuple[Prompt, int]:
    by_text = {prompt.prompt: prompt for prompt in one.prompts}
    left, middle, right = st.columns([1, 3, 0.8])
    categories = one.results.categories
    category = left.selectbox(
        "Category", ["all", *categories], key="video category", disabled=not categories
    )
    texts = [t for t, p in by_text.items() if category == "all" or category in p.categories]
    text = middle.selectbox("Prompt", texts, key="prompt", bind="query-params")
    most = one.samples(text)
    sample = right.selectbox("Sample", range(most), key="sample", disabled=most == 1)
    prompt = by_text[text]
    if prompt.text != prompt.prompt:
        st.caption(f"Models are given: {look.verbatim(prompt.text)}")
    return prompt, sample


def _video(one: Evaluation, model: str, prompt: Prompt, sample: int, places: Places) -> None:
    st.subheader(look.verbatim(short(model)), anchor=False)
    row = one.video(model, prompt, sample)
    if row is None:
        st.info("This video is not there (yet).", icon=":material/hourglass_empty:")
        return
    if row["error_type"]:
        said = look.verbatim(f"{row['error_type']}: {row['error']}")
        st.error(said, icon=":material/videocam_off:")
        return
    if one.is_replaced(model, prompt, sample):
        st.info("Another video came in place of the one whose scores these are.")
    try:
        data = video_bytes(
            one.root, row["generation_id"], cache=places.cache, cache_bytes=places.cache_bytes
        )
    except playable.Unplayable as error:
        st.error(look.verbatim(error), icon=":material/videocam_off:")
        return
    st.video(data, loop=True, autoplay=True, muted=True)
    facts = [f"{row['width_px']} × {row['height_px']} px", f"{row['num_frames']:,} frames",
             f"{row['fps']:g} frames/s", look.seconds(row["duration_s"]),
             look.size(row["size_bytes"])]  # fmt: skip
    if row["seed"] is not None:
        facts.append(f"seed {row['seed']}")
    st.caption(" · ".join(facts))
    if row["rephrased"]:
        st.caption(f"Its LLM made of the text: {look.verbatim(row['rephrased'])}")


def _scores(one: Evaluation, models: Sequence[str], prompt: Prompt, sample: int) -> None:
    """Of these videos, under them."""
    asked = [d for d in one.dimensions if d in prompt.dimensions and d in DIMENSIONS]
    lines = []
    for dimension in asked:
        values = [one.value(model, dimension, prompt.prompt, sample) for model in models]
        scores = [None if v is None else v.score for v in values]
        known = [s for s in scores if s is not None]
        higher = DIMENSIONS[dimension].higher_is_better
        best = (max if higher else min)(known) if len(known) > 1 and len(set(known)) > 1 else None
        cells = [
            f'<span class="dim">{markup.text(why_not(value))}</span>' if score is None
            else f'<span class="{"best" if score == best else ""}">{score:.4f}</span>'
            for value, score in zip(values, scores, strict=True)
        ]  # fmt: skip
        lines.append([markup.text(title(dimension)), *cells])
    if not lines:
        return
    heads = ["Scores of these videos", *(markup.text(short(model)) for model in models)]
    markup.show(markup.table(heads, lines, name="video-scores"))
    _frame_scores(one, models, asked, prompt, sample)


def _frame_scores(
    one: Evaluation, models: Sequence[str], asked: Sequence[str], prompt: Prompt, sample: int
) -> None:
    """Scores of the frames of these videos, in the dimensions that have them."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for dimension in asked:
        for model in dict.fromkeys(models):
            value = one.value(model, dimension, prompt.prompt, sample)
            fps = one.results.fps(model)
            for number, score in enumerate((value and value.frame_scores) or ()):
                if score is not None:
                    point = {"model": short(model), "time_s": number / fps, "score": score}
                    rows.setdefault(dimension, []).append(point)
    if not rows:
        return
    with st.expander("Scores of their frames"):
        dimension = choice.dimension(list(rows), "frames dimension")
        names = [short(model) for model in dict.fromkeys(models)]
        look.chart(charts.frames(rows[dimension], names, label=title(dimension)))
