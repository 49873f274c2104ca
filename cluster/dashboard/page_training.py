"""Training: how losses fall, how fast that goes, and what the models make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import streamlit as st

from cluster.dashboard import look, markup, playable, training
from cluster.dashboard.evaluation import video_bytes
from cluster.dashboard.places import Places
from cluster.dashboard.training import Run, Sample, Stage
from engine import storage

MOST_SAMPLES = 6
_UNITS = {
    "loss": ("Loss", "mean over the step's batch"),
    "grad_norm": ("Gradient norm", "before clipping"),
    "samples_per_s": ("Throughput", "samples/s, all workers"),
    "data_wait_frac": ("Waiting for data", "share of the time"),
    "tflops_per_s": ("Arithmetic", "TFLOP/s, of a worker"),
    "mfu": ("MFU", "share of the device's peak"),
    "memory_gib": ("Memory", "GiB, the most so far"),
}
"""Title and unit of what a step logs."""
_FIRST = ("loss",)
_LEGEND = alt.Legend(title=None, orient="top", symbolOpacity=1, symbolType="circle")
_DASHES = {"solid": [1, 0], "dashed": [7, 4], "dotted": [2, 3], "dash-dotted": [8, 3, 2, 3]}

_SPEED = ("samples_per_s", "data_wait_frac", "tflops_per_s", "mfu", "memory_gib")


def show(places: Places) -> None:
    """The page."""
    look.begin("Training", "Losses, learning rates and throughput of runs, and what they make.")
    markup.style()
    if not places.training:
        look.empty(
            "No training run is named.",
            "Start the dashboard with `--training FOLDER …`: what `python -m trainers train --out`"
            " made, or a folder that has such folders in it.",
        )
        return
    found = _runs(places.training)
    for run in found:
        if run.note:
            st.warning(look.verbatim(f"{run.name}: {run.note}"), icon=":material/healing:")
        if not run.stages:
            st.info(
                f"**{look.verbatim(run.folder)}** has no metrics (yet): its first steps may be"
                " under way, or it is not what `python -m trainers train --out` named.",
                icon=":material/hourglass_empty:",
            )
    trained = [run for run in found if run.stages]
    if not trained:
        return
    chosen, stage = _chosen(trained)
    if any(run.is_tiny for run in chosen):
        look.meaningless("small random models are trained; their losses and videos say nothing")
    series = [(run.name, one) for run in chosen for one in run.stages if one.name == stage]
    _figures(series)
    _curves(series)
    _stages(chosen)
    _samples(chosen, places)


@st.cache_resource(ttl=10, max_entries=4, show_spinner=False)
def _runs(folders: tuple[str, ...]) -> list[Run]:
    return training.runs(folders)


def _chosen(found: Sequence[Run]) -> tuple[list[Run], str]:
    """Runs over each other, and the stage of them that is looked at."""
    left, right = st.columns([2, 1])
    by_name = {run.name: run for run in found}
    names = left.multiselect("Runs", list(by_name), default=list(by_name)[:4], key="training runs")
    chosen = [by_name[name] for name in names] or list(found[:1])
    stages = list(dict.fromkeys(stage.name for run in chosen for stage in run.stages))
    under_way = [s.name for run in chosen for s in run.stages if not s.has_ended]
    first = stages.index(under_way[0]) if under_way else 0
    stage = right.selectbox("Stage", stages, index=first, key="training stage")
    return chosen, stage


def _figures(series: Sequence[tuple[str, Stage]]) -> None:
    """Where the stage stands."""
    heads = ["Run", "state", "steps", "last loss", "samples/s", "waiting for data", "memory",
             "skipped steps", "unreadable samples", "hardware"]  # fmt: skip
    lines = []
    for number, (name, stage) in enumerate(series):
        asked = f" of {stage.asked:,}" if stage.asked and stage.asked != stage.steps else ""
        lines.append(
            [
                f"{markup.dot(look.SERIES[number % len(look.SERIES)])}{markup.text(name)}",
                _state(stage),
                f"{stage.steps:,}{asked}",
                _number(stage.last("loss"), ".4f"),
                _number(stage.last("samples_per_s"), ",.2f"),
                "–" if (wait := stage.last("data_wait_frac")) is None else f"{100 * wait:.1f} %",
                _number(stage.last("memory_gib"), ".2f", " GiB"),
                look.count(int(stage.total("num_skipped"))),
                look.count(int(stage.total("num_unreadable"))),
                markup.text(stage.machine.get("hardware", "–")),
            ]
        )
    markup.show(markup.table(heads, lines, left=[1], name="stands"))


def _state(stage: Stage) -> str:
    if stage.has_ended:
        return markup.chip("ended", look.STATES["kept"])
    return markup.chip("not ended", look.STATES["pending"])


def _number(value: float | None, how: str, unit: str = "") -> str:
    return "–" if value is None else f"{format(value, how)}{unit}"


@st.fragment
def _curves(series: Sequence[tuple[str, Stage]]) -> None:
    """A chart a figure; several runs over each other. Smoothing them draws nothing else anew."""
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    smoothing = left.slider(
        "Smoothing", 0.0, 0.99, 0.6, 0.01, key="smoothing",
        help="Weight of the steps before in a running mean; the pale line is as it was logged.",
    )  # fmt: skip
    is_log = right.toggle("Logarithmic loss", key="log loss")
    logged = training.figures_of([stage for _, stage in series])
    rates = [name for name in logged if name.startswith("lr_")]
    for name in (n for n in _FIRST if n in logged):
        title, unit = _UNITS[name]
        look.chart(
            _lines(series, [name], title, unit, smoothing, is_log=is_log, height=380, legend=True)
        )
    charts = [([n], *_UNITS[n], smoothing) for n in ("grad_norm",) if n in logged]
    if rates:
        pairs = zip(_DASHES, map(_group, rates), strict=False)
        unit = ", ".join(f"{look_of} {group}" for look_of, group in pairs)
        charts.append((rates, "Learning rate", unit if len(rates) > 1 else "of all", 0.0))
    charts += [([n], *_UNITS[n], 0.0) for n in _SPEED if n in logged and _varies(series, n)]
    counted = [n for n in logged if n.startswith("num_") and any(s.total(n) for _, s in series)]
    charts += [([n], _title(n), "since the line before", 0.0) for n in counted]
    for start in range(0, len(charts), 2):
        for place, one in zip(st.columns(2), charts[start : start + 2], strict=False):
            with place:
                look.chart(_lines(series, *one))


def _varies(series: Sequence[tuple[str, Stage]], name: str) -> bool:
    return any(line.get(name) is not None for _, stage in series for line in stage.lines)


def _group(name: str) -> str:
    return name.removeprefix("lr_")


def _title(name: str) -> str:
    return name.removeprefix("num_").replace("_", " ").capitalize()


def _lines(
    series: Sequence[tuple[str, Stage]],
    names: Sequence[str],
    title: str,
    unit: str,
    smoothing: float,
    *,
    is_log: bool = False,
    height: int = 240,
    legend: bool = False,
) -> alt.LayerChart:
    """Figures over steps; a colour a run, a dash a figure."""
    rows = [
        {"run": run, "figure": _group(name), **point}
        for run, stage in series
        for name in names
        for point in training.curve(stage, name, smoothing)
        if not is_log or min(point["value"] or 0, point["smooth"] or 0) > 0
    ]
    runs = [run for run, _ in series]
    shades = alt.Scale(
        domain=runs, range=[look.SERIES[n % len(look.SERIES)] for n in range(len(runs))]
    )
    scale = alt.Scale(type="log" if is_log else "linear", zero=False, padding=6)
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "step:Q",
            title="step",
            scale=alt.Scale(nice=False),
            axis=alt.Axis(format=",d", tickMinStep=1),
        ),
        color=alt.Color("run:N", scale=shades, legend=_LEGEND if legend else None),
    )
    if len(names) > 1:
        dashes = alt.Scale(domain=[_group(n) for n in names], range=list(_DASHES.values()))
        base = base.encode(strokeDash=alt.StrokeDash("figure:N", scale=dashes, legend=None))
    tips = [alt.Tooltip("run:N"), alt.Tooltip("step:Q", format=",.0f"),
            alt.Tooltip("value:Q", format=".6g", title=title.lower())]  # fmt: skip
    layers = []
    if smoothing:
        layers.append(
            base.mark_line(strokeWidth=1, opacity=0.28).encode(
                y=alt.Y("value:Q", title=None, scale=scale)
            )
        )
    y = alt.Y("smooth:Q", title=None, scale=scale)
    layers.append(base.mark_line(strokeWidth=2).encode(y=y))
    layers.append(
        base.mark_point(size=30, opacity=1 if len(rows) < 40 else 0, filled=True).encode(
            y=y, tooltip=tips
        )
    )
    # the unit may be longer than the axis
    above = alt.TitleParams(title, subtitle=unit, subtitleColor=look.GREY, subtitleFontSize=12)
    return alt.layer(*layers).properties(title=above, height=height)


def _stages(chosen: Sequence[Run]) -> None:
    """What was trained on what, with which settings."""
    st.subheader("Stages", anchor=False)
    heads = ["Run", "stage", "after", "samples", "batch", "optimiser", "buckets", "steps",
             "state", "checkpoints"]  # fmt: skip
    lines = []
    for run in chosen:
        for stage in run.stages:
            said = stage.config.get("stage", {})
            data = said.get("data", {})
            rates = ", ".join(
                f"{one.get('group', '')} {one.get('lr', 0):g}" for one in said.get("optim", [])
            )
            buckets = ", ".join(
                f"{b['frames']} × {b['height_px']} × {b['width_px']}"
                for b in data.get("buckets", [])
            )
            lines.append(
                [
                    run.name, stage.name, ", ".join(said.get("after", [])) or "–",
                    look.count(stage.config.get("data", {}).get("samples")),
                    look.count(said.get("batch")), f"AdamW: {rates}" if rates else "–",
                    buckets or "–", look.count(stage.steps),
                    "ended" if stage.has_ended else "not ended",
                    ", ".join(map(str, stage.checkpoints)) or "–",
                ]
            )  # fmt: skip
    cells = [[markup.text(cell) for cell in line] for line in lines]
    markup.show(markup.table(heads, cells, left=[1, 2, 5, 6, 8], name="stages"))
    for run in chosen:
        named = look.verbatim(f"{run.name}: recipe {run.recipe}")
        with st.expander(f"Resolved settings of {named}"):
            about: dict[str, Any] = {"run.json": dict(run.about)} if run.about else {}
            for stage in run.stages:
                about[stage.name] = _short(stage.config)
            markup.show(markup.tree(about))


def _short(config: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's configuration with its long texts cut."""

    def cut(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cut(v) for k, v in value.items()}
        if isinstance(value, list):
            return [cut(v) for v in value]
        return f"{value[:200]} …" if isinstance(value, str) and len(value) > 200 else value

    return json.loads(json.dumps(cut(config)))


def _samples(chosen: Sequence[Run], places: Places) -> None:
    """What the runs' models make, as far as anyone let them."""
    evaluations = places.evaluations
    st.subheader("Samples", anchor=False)
    shown = False
    for run in chosen:
        own = training.samples_in(run, MOST_SAMPLES)
        parts = [(f"{run.name}, {training.SAMPLES}/", own)] if own else []
        for model, checkpoint in training.exports_of(run, evaluations).items():
            made = training.samples_of(evaluations, model, checkpoint, MOST_SAMPLES)
            parts += [(f"{run.name}, evaluated as {model}", made)] if made else []
        for title, samples in parts:
            shown = True
            st.markdown(f"**{look.verbatim(title)}**")
            for start in range(0, len(samples), 3):
                for place, one in zip(st.columns(3), samples[start : start + 3], strict=False):
                    with place:
                        _sample(one, places)
    if not shown:
        st.caption(
            "A training writes no videos itself. `python -m trainers export RUN FOLDER`, then"
            ' `python -m trainers generate FOLDER "a prompt" --out RUN/samples`, or evaluate the'
            " export: its videos are shown here."
        )


def _sample(one: Sample, places: Places) -> None:
    if one.generation_id:
        cache = {"cache": places.cache, "cache_bytes": places.cache_bytes}
        try:
            data = video_bytes(places.evaluations, one.generation_id, **cache)
        except playable.Unplayable as error:
            st.error(look.verbatim(error), icon=":material/videocam_off:")
            return
    else:
        data = storage.read_bytes(one.uri)
    if one.is_video:
        st.video(data, loop=True, autoplay=True, muted=True)
    else:
        st.image(data, width="stretch")
    st.caption(look.verbatim(one.caption), help=look.verbatim(one.about) or None)
